"""What a run of three weeks meets: kills at any moment, signals, NaN, processes that differ.

The longer ones are marked `long`:  pytest -m long tests/test_faults.py -s
"""

import json
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import TINY, run_train, start, wait

import data
import model as detector
import train
from tools.toy_coco import make_toy_coco

RECIPE = replace(TINY, masks=False, iterations=8, tails=(4, 1))
EXACT = {"rtol": 0, "atol": 0}
MOMENTS = ("step", "write", "sync", "rename", "renamed", "prune", "log")  # of tiny_run.py


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults") / "coco"
    make_toy_coco(root, train_images=8, val_images=2)
    return root


@pytest.fixture(scope="module")
def launch(coco):
    """launch(out, ...) starts a run, or resumes it, on one or two processes; returns them."""

    def launch(out, world_size, *arguments, faults=(None, None), own=([], []), recipe=RECIPE):
        fixed = ["--data", str(coco), "--out", str(out), "--resume", *arguments]
        recipe = replace(recipe, images_per_gpu=2 // world_size)
        each = [(recipe, [*fixed, *own[rank]], faults[rank]) for rank in range(world_size)]
        return start(run_train, each, out)

    return launch


def printed(out, rank=0):
    return Path(f"{out}.{rank}.txt").read_text()


def read_log(out):
    """The log without what depends on the machine."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    machine = ("images_per_second", "peak_memory_mb")
    return [{k: v for k, v in record.items() if k not in machine} for record in records]


def check_same_ending(out, expected, after=0):
    """Two runs leave the same checkpoint, log (of the iterations `after`) and results behind."""
    ours, theirs = (train.checkpoints_in(folder)[-1] for folder in (out, expected))
    assert ours.name == theirs.name
    ours, theirs = detector.read_checkpoint(ours), detector.read_checkpoint(theirs)
    for part in ("weights", "momentum"):
        torch.testing.assert_close(ours.pop(part), theirs.pop(part), **EXACT)
    assert ours == theirs
    assert read_log(out) == [r for r in read_log(expected) if r["iteration"] > after]
    for path in expected.glob("results_*"):
        assert (out / path.name).read_bytes() == path.read_bytes()


# -- Kills ---------------------------------------------------------------------------------------


def kill_and_resume(launch, folder, recipe, world_size, faults, kills=0):
    """Kill runs again and again: first at the moments `faults`, then at random, from outside.

    Each goes on until it ends, as an undisturbed one does. Returns how many runs it took until all
    faults and so many kills had come.
    """
    expected = folder / "undisturbed"
    assert wait(launch(expected, world_size, recipe=recipe)) == [0] * world_size
    rng, faults = random.Random(0), list(faults)
    runs = landed = 0
    while faults or landed < kills:
        out, codes = folder / f"run{runs}", None
        while codes != [0] * world_size:
            fault = faults.pop() if faults else None
            # Rank 0 alone writes files.
            processes = launch(out, world_size, faults=(fault, None), recipe=recipe)
            if fault is None and landed < kills:  # enough of them: this run may end
                kill_at_random(processes, out, rng)
            codes = wait(processes)
            text = "".join(printed(out, rank) for rank in range(world_size))
            assert codes == [0] * world_size or -signal.SIGKILL in codes, (codes, text[-3000:])
            assert "train.py:" not in text, text[-3000:]  # nothing was refused
            landed += -signal.SIGKILL in codes
            for path in train.checkpoints_in(out):  # every one of them is complete
                iteration = detector.read_checkpoint(path)["iteration"]
                assert iteration == train.iteration_of(path)
        check_same_ending(out, expected)
        shutil.rmtree(out)
        runs += 1
    return runs, landed


def kill_at_random(processes, out, rng):
    """Kill one of the processes, mostly while they make steps."""
    victim = rng.choice(processes)
    if rng.random() < 0.8:
        while "it/s" not in printed(out) and victim.is_alive():
            time.sleep(0.02)
    time.sleep(rng.uniform(0, 2))
    victim.kill()
    if "it/s" not in printed(out):  # the others wait for it to join, until torchrun ends them
        for process in processes:
            process.kill()


def test_a_killed_run_ends_as_undisturbed(launch, tmp_path):
    faults = [(moment, moment in ("step", "log")) for moment in MOMENTS]
    assert kill_and_resume(launch, tmp_path, RECIPE, 1, faults) == (1, len(MOMENTS))


@pytest.mark.long
@pytest.mark.parametrize("world_size", [1, 2])
def test_fifty_kills(launch, tmp_path, world_size):
    recipe = replace(RECIPE, iterations=40, tails=(10, 4), eval_every=20)
    faults = [(moment, count) for moment in MOMENTS for count in (0, 3)]
    runs, landed = kill_and_resume(launch, tmp_path, recipe, world_size, faults, 50)
    print(f"{world_size} process(es): {runs} runs, {landed} kills, all bitwise as undisturbed")


# -- Two processes -------------------------------------------------------------------------------


def test_two_processes_of_which_one_is_killed_or_gets_a_sigterm(launch, tmp_path):
    """The other one ends too; after a SIGTERM both have saved and the exit code is 0."""
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    assert wait(launch(out, 2, faults=(None, ("step", 3)))) == [1, -signal.SIGKILL]
    assert wait(launch(out, 2, faults=(None, ("sigterm", 0)))) == [0, 0]
    assert "after iteration 2" in printed(out) and "signal after step 3" in printed(out)
    assert train.iteration_of(train.checkpoints_in(out)[-1]) == 3
    assert wait(launch(out, 2)) == wait(launch(undisturbed, 2)) == [0, 0]
    check_same_ending(out, undisturbed)


def test_nan_on_one_of_two_processes_ends_both_before_the_step(launch, coco, tmp_path):
    out = tmp_path / "out"
    assert wait(launch(out, 2, faults=(None, ("nan", 4)))) == [1, 1]
    dataset = data.open_split(coco, "train2017", training=True)
    sampler = data.BatchSampler(dataset, 1, rank=1, world_size=2, start_iteration=4)
    [(index, _)] = next(iter(sampler))
    for rank in (0, 1):
        text = printed(out, rank)
        said = text[text.index("train.py: ") :]
        assert "step 4 " in said and "loss_classifier nan" in said and "Traceback" not in text
        assert f"(images {dataset.image_ids[index]})" in said  # of the process that has it
    assert train.iteration_of(train.checkpoints_in(out)[-1]) == 4  # the weights of before
    # It goes on with other images at a lower rate, and says so.
    assert wait(launch(out, 2, "--seed", "1", "--learning-rate", "0.01")) == [0, 0]
    for fact in ("iteration 4", "seed (0 there, 1 here)", "learning_rate (0.02 there, 0.01 here)"):
        assert fact in printed(out)
    assert read_log(out)[-1]["iteration"] == RECIPE.iterations


@pytest.mark.parametrize(
    "own, named", [(["--seed", "1"], "seed (1"), (["--train-split", "val2017"], "images (")]
)
def test_processes_that_differ_are_all_refused(launch, tmp_path, own, named):
    """Before a step is made; each of them says why."""
    assert wait(launch(tmp_path / "out", 2, own=([], own))) == [1, 1]
    for rank in (0, 1):
        text = printed(tmp_path / "out", rank)
        assert f"The processes differ in {named}" in text and "Traceback" not in text
    assert not (tmp_path / "out").exists()
