"""What a run of three weeks meets: kills at any moment, a full disk, signals, NaN, dying workers.

The longer ones are marked `long`:  pytest -m long tests/test_faults.py -s
"""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_train import read_log, same

import evaluate
import train
from tools.toy_coco import make_toy_coco

HERE = Path(__file__).parent
TINY = HERE / "tiny_run.py"
SAVING = ("write", "sync", "rename", "renamed", "prune", "log")  # tiny_run.py says which moments
LIMIT = 60  # seconds in which the other processes have to notice that one is gone


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults") / "coco"
    make_toy_coco(root, train_images=8, val_images=4)
    return root


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Launcher:
    """Starts tiny_run.py in processes that are forked from one that has imported torch already."""

    def __init__(self, coco):
        self.fixed = ["--data", str(coco), "--resume"]
        os.environ["PYTHONPATH"] = f"{HERE}:{HERE.parent}"  # for the process that is forked
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tiny_run"])

    def start(self, out, world_size=1, workers=0, fault=None, arguments=(), own_arguments=None):
        """own_arguments: of each process, besides those of all."""
        import tiny_run

        out.parent.mkdir(parents=True, exist_ok=True)
        environment = {"FAULT": fault} if fault else {}
        if world_size > 1:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            environment["WORLD_SIZE"] = str(world_size)
        arguments = [*self.fixed, "--out", str(out), "--workers", str(workers), *arguments]
        arguments += ["--images-per-gpu", str(2 // world_size)]
        processes = []
        for rank in range(world_size):
            own = dict(environment)
            if world_size > 1:
                own |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            its = [*arguments, *(own_arguments[rank] if own_arguments else ())]
            target = (its, own, str(out) + f".{rank}.txt")
            processes.append(self.context.Process(target=tiny_run.in_process, args=target))
            processes[-1].start()
        return processes

    def run(self, out, **options):
        return wait(self.start(out, **options))


def wait(processes, limit=300):
    """Exit codes of processes that all end by themselves."""
    end = time.monotonic() + limit
    for process in processes:
        process.join(max(0, end - time.monotonic()))
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging, f"still running after {limit} s"
    return [process.exitcode for process in processes]


@pytest.fixture(scope="module")
def launcher(coco):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", "")
        yield Launcher(coco)


def ending(out):
    """All that a run leaves behind: final checkpoint, log, results."""
    last = train.checkpoints_in(out)[-1]
    content = torch.load(last, weights_only=True)
    del content["log_bytes"]  # speeds in the log have more digits or fewer
    results = {path.name: path.read_bytes() for path in out.glob("results_*")}
    return last.name, content, read_log(out), results


def wait_for_log(out, records):
    """Until the run's log has so many records, but not for ever: the run may have died at once."""
    end = time.monotonic() + 2 * LIMIT
    while not (out / "log.jsonl").exists() or len(read_log(out)) < records:
        assert time.monotonic() < end, f"{out} has no {records} records yet"
        time.sleep(0.05)


def check_same_ending(out, expected):
    for ours, theirs in zip(ending(out), expected):
        assert same(ours, theirs)


def kill_and_resume(launcher, folder, world_size, kills):
    """Runs that are killed again and again, until `kills` have landed; returns (runs, landed)."""
    assert launcher.run(folder / "undisturbed", world_size=world_size) == [0] * world_size
    expected = ending(folder / "undisturbed")
    assert expected[1]["iteration"] == 40
    rng = random.Random(0)
    faults = [f"{moment}:{rng.randint(1, 4)}" for moment in SAVING]
    runs = landed = 0
    while landed < kills:
        out = folder / f"run{runs}"
        while True:
            fault = faults.pop() if faults else None
            output = Path(f"{out}.0.txt")
            output.touch()
            said = len(output.read_text())
            processes = launcher.start(out, world_size, workers=2 * rng.randint(0, 1), fault=fault)
            if fault is None:
                victim = rng.choice(processes)
                if rng.random() < 0.8:  # after a step, on a slow machine too
                    end = time.monotonic() + 30
                    while "it/s" not in output.read_text()[said:] and time.monotonic() < end:
                        time.sleep(0.05)
                time.sleep(rng.uniform(0, 2))
                victim.kill()
                victim.join()
                if "it/s" not in output.read_text()[said:]:
                    # No step yet: the others may wait to meet it, and torchrun would end them.
                    for process in processes:
                        process.kill()
            codes = wait(processes, LIMIT)
            landed += -signal.SIGKILL in codes
            for path in train.checkpoints_in(out):  # every one of them is complete
                assert torch.load(path, weights_only=True)["iteration"] == train.iteration_of(path)
            if codes == [0] * world_size:
                break
            text = "".join(p.read_text() for p in folder.glob(f"run{runs}.*.txt"))
            assert -signal.SIGKILL in codes, (codes, text[-3000:])
            assert "train.py:" not in text or world_size > 1, text[-3000:]  # nothing was refused
        check_same_ending(out, expected)
        shutil.rmtree(out)
        runs += 1
    return runs, landed


def test_a_run_killed_in_every_step_of_a_checkpoint_ends_as_if_it_had_not(launcher, tmp_path):
    kill_and_resume(launcher, tmp_path, world_size=1, kills=len(SAVING))


@pytest.mark.long
@pytest.mark.parametrize("world_size", [1, 2])
def test_fifty_kills(launcher, tmp_path, world_size):
    runs, landed = kill_and_resume(launcher, tmp_path, world_size, kills=50)
    print(f"{world_size} process(es): {runs} runs, {landed} kills, all bitwise as undisturbed")


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux's /proc")
def test_loading_processes_end_with_the_one_that_is_killed(launcher, tmp_path):
    (process,) = launcher.start(tmp_path / "out", workers=2)
    wait_for_log(tmp_path / "out", 1)
    _, workers = memory(process.pid)
    assert len(workers) >= 2
    process.kill()
    end = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < end, "orphans hold their memory"
        time.sleep(0.1)


def test_when_one_of_two_processes_is_killed_the_other_ends(launcher, tmp_path):
    processes = launcher.start(tmp_path / "out", world_size=2, workers=2)
    wait_for_log(tmp_path / "out", 3)
    processes[1].kill()
    assert wait(processes, 30) == [1, -signal.SIGKILL]


@pytest.mark.parametrize("amp", [[], ["--amp"]])
def test_a_loss_that_is_not_finite_on_one_process_stops_all(launcher, tmp_path, amp):
    out = tmp_path / "nan"
    start = time.monotonic()
    codes = launcher.run(out, world_size=2, fault="nan:7:1", arguments=amp)
    assert all(codes) and time.monotonic() - start < LIMIT
    text = (tmp_path / "nan.1.txt").read_text()
    assert "step 7" in text and "loss_mask nan" in text
    other = (tmp_path / "nan.0.txt").read_text()
    assert "step 7" in other and "loss_mask nan" not in other and "Traceback" not in text + other
    assert [train.iteration_of(path) for path in train.checkpoints_in(out)] == [4, 6]


def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint(coco, tmp_path):
    """The disk: a limit on the size of a file, which a checkpoint of 18 MB exceeds."""
    command = [sys.executable, TINY, "--data", coco, "--workers", "0", "--out", tmp_path / "out"]
    assert subprocess.run([*command, "--iterations", "3"], capture_output=True).returncode == 0
    before = ending(tmp_path / "out")
    limited = ["bash", "-c", 'ulimit -f 500; exec "$@"', "bash", *command, "--resume"]
    result = subprocess.run(limited, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "checkpoint_0000004.pth" in result.stderr
    for ours, theirs in zip(ending(tmp_path / "out")[:2], before[:2]):
        assert same(ours, theirs)
    assert not list((tmp_path / "out").glob("*.tmp"))
    assert len(train.checkpoints_in(tmp_path / "out")) == 2
    assert subprocess.run([*command, "--resume"], capture_output=True).returncode == 0


@pytest.mark.long
def test_a_full_tmpfs(coco, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=45m", "tmpfs", disk])
    if mount.returncode:
        pytest.skip("mounting a tmpfs needs root")
    command = [sys.executable, TINY, "--data", coco, "--workers", "0", "--out", disk / "out"]
    try:
        for fill in (False, True):  # two checkpoints of 18 MB fit; then not even a line of the log
            if fill:
                with contextlib.suppress(OSError):
                    (disk / "filler").write_bytes(bytes(45_000_000))
            result = subprocess.run([*command, "--resume"], capture_output=True, text=True)
            print(result.stderr.strip().splitlines()[-1])
            assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
            assert "No space left" in result.stderr
            for path in train.checkpoints_in(disk / "out"):
                torch.load(path, weights_only=True)
        assert train.checkpoints_in(disk / "out")
    finally:
        subprocess.run(["umount", disk])


# -- Under torchrun ------------------------------------------------------------------------------


def torchrun(coco, out, *options, fault=None, arguments=(), **popen):
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(TINY)]
    command += ["--data", str(coco), "--workers", "0", "--images-per-gpu", "1", "--out", str(out)]
    environment = {**os.environ, "FAULT": fault} if fault else dict(os.environ)
    return subprocess.Popen(
        [*command, *arguments], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, **popen,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(launcher, tmp_path_factory):
    out = tmp_path_factory.mktemp("two") / "undisturbed"
    assert launcher.run(out, world_size=2) == [0, 0]
    return ending(out)


TWO = ("--standalone", "--nproc-per-node", "2")


@pytest.mark.long
def test_sigterm_to_torchrun(coco, tmp_path, undisturbed):
    out = tmp_path / "out"
    run = torchrun(coco, out, *TWO)
    wait_for_log(out, 5)
    at = read_log(out)[-1]["iteration"]
    run.terminate()  # the launcher passes it on to the processes
    text, _ = run.communicate(timeout=LIMIT)
    assert "Stopped by SIGTERM after step" in text, text
    stopped = train.iteration_of(train.checkpoints_in(out)[-1])
    print(f"SIGTERM at step {at}, stopped after step {stopped}")
    assert stopped <= at + 8  # two steps later, and those that the signal took to arrive
    run = torchrun(coco, out, *TWO, arguments=["--resume"])
    assert run.wait(120) == 0
    check_same_ending(out, undisturbed)


@pytest.mark.long
def test_sigterm_to_one_process_stops_both_with_exit_code_0(launcher, tmp_path, undisturbed):
    out = tmp_path / "out"
    codes = launcher.run(out, world_size=2, fault="sigterm:11:1")
    assert codes == [0, 0]
    assert train.iteration_of(train.checkpoints_in(out)[-1]) == 12  # which is due anyway
    assert launcher.run(out, world_size=2) == [0, 0]
    check_same_ending(out, undisturbed)


@pytest.mark.long
def test_resuming_with_another_number_of_processes_says_what_changes(launcher, tmp_path):
    out = tmp_path / "out"
    assert launcher.run(out, world_size=2, arguments=["--iterations", "7"]) == [0, 0]
    assert launcher.run(out) == [0]
    name, last, log, _ = ending(out)
    assert (last["iteration"], last["world_size"]) == (40, 1)
    assert [r["iteration"] for r in log if "loss" in r] == list(range(1, 41))
    assert "written by 2 process(es)" in Path(f"{out}.0.txt").read_text()


@pytest.mark.parametrize("what", ["seed", "norm", "images", "classes"])
def test_processes_that_do_not_fit_together_are_all_refused(launcher, coco, tmp_path, what):
    """Before a step is made; each of them says why."""
    other = tmp_path / "other"
    if what in ("images", "classes"):
        shutil.copytree(coco, other)
        for file in other.glob("annotations/instances_*.json"):
            content = json.loads(file.read_text())
            if what == "images":  # the same number of other images
                last = max(image["id"] for image in content["images"])
                for entry in content["images"] + content["annotations"]:
                    key = "image_id" if "image_id" in entry else "id"
                    entry[key] += 1000 * (entry[key] == last)
            for category in content["categories"]:
                category["name"] += "s" * (what == "classes")
            file.write_text(json.dumps(content))
    different = {"seed": ["--seed", "1"], "norm": ["--norm", "syncbn"]}
    own = [[], different.get(what, ["--data", str(other)])]
    start = time.monotonic()
    assert launcher.run(tmp_path / "out", world_size=2, own_arguments=own) == [2, 2]
    assert time.monotonic() - start < LIMIT
    for rank in (0, 1):
        text = (tmp_path / f"out.{rank}.txt").read_text()
        assert what in text and "Traceback" not in text and "it/s" not in text, text
    assert not train.checkpoints_in(tmp_path / "out")


@pytest.mark.parametrize("left_over", [{"RANK": "1"}, {"WORLD_SIZE": "2"}, {"LOCAL_RANK": "3"}])
def test_what_is_left_of_torchruns_environment_is_refused(
    coco, tmp_path, monkeypatch, capsys, left_over
):
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    arguments = ["--data", str(coco), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert train.main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and next(iter(left_over)) in error[0]
    assert not (tmp_path / "out").exists()


def test_two_runs_with_one_folder(launcher, tmp_path):
    """The second is refused while the first one goes on, undisturbed."""
    (first,) = launcher.start(tmp_path / "out", workers=2)
    wait_for_log(tmp_path / "out", 2)
    shutil.copy(f"{tmp_path}/out.0.txt", tmp_path / "first.txt")
    assert launcher.run(tmp_path / "out") == [2]
    with pytest.raises(train.UserError), evaluate.lock_folder(tmp_path / "out"):
        pass
    assert wait([first]) == [0]
    steps = [r["iteration"] for r in read_log(tmp_path / "out") if "loss" in r]
    assert steps == list(range(1, 41))


@pytest.mark.long
def test_an_exception_ends_all_processes_and_is_shown(coco, tmp_path):
    start = time.monotonic()
    run = torchrun(coco, tmp_path / "out", *TWO, fault="raise:5:1")
    text, _ = run.communicate(timeout=120)
    print(f"ended after {time.monotonic() - start:.0f} s in all")
    assert run.returncode and "ArithmeticError: the fault of this test" in text
    assert time.monotonic() - start < LIMIT


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_max_restarts_survives_a_killed_process(coco, tmp_path, undisturbed, rank):
    out = tmp_path / "out"
    fault = f"step:15:{rank}:once {tmp_path / 'struck'}"
    run = torchrun(coco, out, *TWO, "--max-restarts", "2", fault=fault)
    text, _ = run.communicate(timeout=240)
    assert run.returncode == 0 and (tmp_path / "struck").exists(), text
    assert "Resumes" in text
    check_same_ending(out, undisturbed)


@pytest.mark.long
def test_two_nodes(coco, tmp_path, undisturbed):
    """Two launches of torchrun that meet on the loopback, one process each."""
    out, port = tmp_path / "out", str(free_port())
    nodes = ("--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1")
    runs = [
        torchrun(coco, out, *nodes, "--master-port", port, "--node-rank", str(n)) for n in (0, 1)
    ]
    texts = [run.communicate(timeout=180)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], texts
    assert "Weights:" in texts[0] and "Weights:" not in texts[1]
    check_same_ending(out, undisturbed)


# -- Memory --------------------------------------------------------------------------------------


def memory(pid):
    """Private memory of a process in MiB, and the ids of its children."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    lines = [line.split() for line in rollup.splitlines() if line.startswith("Private")]
    private = sum(int(line[1]) for line in lines)
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return private / 1024, [int(child) for child in children]


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux's /proc")
def test_memory_stays_flat_over_2000_steps(coco, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, TINY, "--data", coco, "--workers", "2", "--out", out]
    environment = {**os.environ, "TINY_STEPS": "2000"}
    output = open(tmp_path / "output", "w")
    run = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    samples = {}
    while run.poll() is None:
        time.sleep(1)
        steps = [r["iteration"] for r in read_log(out)] if (out / "log.jsonl").exists() else []
        due = steps and steps[-1] // 250 * 250
        if due and due not in samples:
            own, children = memory(run.pid)
            samples[due] = [own, *(memory(child)[0] for child in children[:2])]
            print(due, [round(value) for value in samples[due]], flush=True)
    assert run.returncode == 0
    for first, last in ((250, 750), (1250, 1750)):  # without an evaluation in between
        for before, after in zip(samples[first], samples[last]):
            assert after - before < 10, json.dumps(samples)
