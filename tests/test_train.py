"""train.py: the schedule in the paper's numbers, the optimizer, DDP, and whole runs of 6 steps."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from test_norms import run_processes
from tiny_run import NARROW, TINY

import evaluate
import model as detector
import train
from data import UserError
from tools.toy_coco import make_toy_coco
from train import RECIPES, Recipe, learning_rate, scale_to_batch

# -- The schedule --------------------------------------------------------------------------------


def rates(recipe, *iterations):
    return [learning_rate(i, recipe) for i in iterations]


def test_the_rate_drops_where_the_paper_says():
    recipe = RECIPES["r50-gn"]
    assert (recipe.iterations, recipe.batch_size) == (540_000, 16)
    at = rates(recipe, 500, 479_999, 480_000, 519_999, 520_000, 539_999)
    assert at == pytest.approx([0.02, 0.02, 0.002, 0.002, 0.0002, 0.0002], rel=1e-12)
    # the last 60k and 20k, whatever the total: so 2x drops at 120k and 160k
    recipe = replace(recipe, iterations=train.SCHEDULES["2x"])
    at = rates(recipe, 119_999, 120_000, 159_999, 160_000)
    assert at == pytest.approx([0.02, 0.002, 0.002, 0.0002], rel=1e-12)
    # below 1: shares of the total
    assert replace(recipe, iterations=2700, tails=(1 / 9, 1 / 27)).drops == [2400, 2600]


def test_warm_up_is_linear_from_a_third():
    at = rates(RECIPES["r50-gn"], 0, 250, 499, 500)
    expected = [0.02 / 3, 0.02 * 2 / 3, 0.02 * (1 - 2 / 3 / 500), 0.02]
    assert at == pytest.approx(expected, rel=1e-12)


def test_linear_scaling_keeps_the_number_of_images():
    large = scale_to_batch(RECIPES["r50-gn"], 64)
    assert (large.iterations, large.tails) == (135_000, (15_000, 5_000))
    assert large.warmup_iterations == 500
    at = rates(large, 119_999, 120_000, 129_999, 130_000)
    assert at == pytest.approx([0.08, 0.008, 0.008, 0.0008], rel=1e-12)
    small = scale_to_batch(RECIPES["r50-gn"], 2)
    assert (small.iterations, small.tails) == (4_320_000, (480_000, 160_000))
    assert small.warmup_iterations == 4_000
    assert small.learning_rate == pytest.approx(0.0025, rel=1e-12)
    ninths = scale_to_batch(RECIPES["r50-gn-10k"], 8)
    assert (ninths.iterations, ninths.drops) == (440_000, [391_111, 423_704])


# -- What is refused -----------------------------------------------------------------------------


def checked(recipe, *arguments):
    train.check(recipe, train.parse_arguments(list(arguments)))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"iterations": 50_000}, "warm-up"),  # fewer than the first tail
        ({"iterations": 60_100}, "warm-up"),
        ({"iterations": 180_000, "cascade_iterations": 270_000}, "270,000"),
        ({"norm": "frozen_bn"}, "Frozen BN"),
        ({"freeze_at": 2}, "freeze_at 2"),
        ({"freeze_at": -1}, "freeze_at is -1"),
        ({"min_sizes": (800)}, "min_sizes is 800"),  # no tuple
        ({"min_sizes": (800, 0)}, "min_sizes"),
        ({"tails": ()}, "tails"),
        ({"tails": (-1,)}, "tails"),
        ({"batch_size": 0}, "batch_size"),
        ({"images_per_gpu": 0}, "images_per_gpu"),
        ({"log_every": 0}, "log_every"),
        ({"eval_every": 2.5}, "eval_every"),
        ({"learning_rate": -0.01}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"momentum": 1.5}, "momentum"),
        ({"subset": 0}, "subset"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(changes, named):
    with pytest.raises(UserError, match=named) as caught:
        checked(replace(RECIPES["r50-gn"], **changes))
    assert caught.value.code == 2 and str(caught.value).count(".\n") == 0


def test_compiled_syncbn_over_processes_is_refused(monkeypatch):
    compiled = replace(RECIPES["r50-syncbn"], compile=True)
    checked(compiled)
    monkeypatch.setattr(train, "rank_and_size", lambda: (0, 2))
    with pytest.raises(UserError, match="--compile"):
        checked(compiled)


def test_what_works_is_not_refused():
    frozen = replace(RECIPES["r50-gn"], norm="frozen_bn", freeze_at=2)
    checked(frozen, "--init", "weights.pth")
    for name in RECIPES:  # the table's own rows, both ways
        for init in ("random", "weights.pth"):
            args = train.parse_arguments(["--recipe", name, "--init", init])
            train.check(train.make_recipe(args), args)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--recipe", "r5000"], "r50-gn"),  # the names that there are
        (["--schedule", "12x"], "11x"),
        (["--images-per-gpu", "0"], "images_per_gpu"),
        (["--norm", "frozen_bn"], "Frozen BN"),
        (["--freeze-at", "2"], "freeze_at 2"),
        (["--freeze-at", "-1"], "freeze_at"),
        (["--recipe", "r50-gn"], "--data"),
        (["--device", "abacus"], "abacus"),
        (["--seed", str(10**22)], "--seed"),
        (["--seed", "-1"], "--seed"),
        (["--workers", "-1"], "--workers"),
        (["--iterations", "0"], "--iterations"),
        (["--data", ""], "--data"),
        (["--from", " "], "--from"),
        (["--out", ""], "--out"),
        (["--init", ""], "--init"),
        (["--recompute", "--norm", "bn"], "--recompute"),
        (["--recipe", "r50-gn", "--dry-run", "3"], "--data"),
    ],
)
def test_bad_use_is_exit_code_2(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = train.main(arguments)
    except SystemExit as stop:  # argparse's own way
        code = stop.code
    assert code == 2 and named in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # refused before anything was made


# -- The optimizer -------------------------------------------------------------------------------


@pytest.mark.parametrize("norm, freeze_at", [("gn", 0), ("syncbn", 2), ("frozen_bn", 2)])
def test_every_parameter_is_in_its_group(norm, freeze_at):
    model = detector.build_model(norm=norm, freeze_at=freeze_at, keypoints=17, **NARROW)
    weights, gammas, biases = train.make_optimizer(model, Recipe()).param_groups
    assert [g["rate"] for g in (weights, gammas, biases)] == [1, 1, 2]
    assert [g["weight_decay"] for g in (weights, gammas, biases)] == [1e-4, 0, 0]
    assert all(g["momentum"] == 0.9 and not g["nesterov"] for g in (weights, gammas, biases))
    place = {id(p): i for i, g in enumerate((weights, gammas, biases)) for p in g["params"]}
    assert sum(len(g["params"]) for g in (weights, gammas, biases)) == len(place)  # none twice
    for name, parameter in model.named_parameters():
        frozen = freeze_at and name.startswith(("backbone.stem", "backbone.res2"))
        expected = 2 if name.endswith("bias") else 1 if ".norm." in name else 0
        assert place.pop(id(parameter), None) == (None if frozen else expected), name
    assert not place
    assert bool(gammas["params"]) == (norm != "frozen_bn")


# -- Two processes -------------------------------------------------------------------------------


def ddp_model():
    torch.manual_seed(0)
    everything = {
        "rpn_batch_size_per_image": 5000,
        "box_batch_size_per_image": 400,
        "rpn_positive_fraction": 0.9,
        "box_positive_fraction": 0.9,
    }
    return detector.build_model(num_classes=3, **NARROW | everything).train()


def ddp_example(rank):
    g = torch.Generator().manual_seed(rank)
    image = torch.rand(3, 64, 96, generator=g)
    boxes = torch.tensor([[5.0, 5, 40, 60], [30, 10, 90, 50]]) + rank
    masks = torch.rand(2, 64, 96, generator=g) < 0.5
    return [image], [{"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks, "seed": rank}]


def gradients(model, example):
    sum(model(*example).values()).backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def assert_close(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        scale = expected[name].abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(
            gradient, expected[name], atol=tolerance * scale, rtol=1e-4, msg=name
        )


def _ddp_worker(rank, folder):
    ddp = train.wrap(ddp_model())
    torch.save(gradients(ddp, ddp_example(rank)), f"{folder}/{rank}.pth")


def test_ddp_gradients_are_the_mean_of_the_images_gradients(tmp_path):
    # GN, images of one size, all anchors and RoIs sampled: nothing depends on the process. Each
    # process divides its losses by its own counts, so that what DDP averages are image means.
    run_processes(_ddp_worker, str(tmp_path))
    own = [gradients(ddp_model(), ddp_example(rank)) for rank in range(2)]
    expected = {name: (own[0][name] + own[1][name]) / 2 for name in own[0]}
    for rank in range(2):
        assert_close(torch.load(tmp_path / f"{rank}.pth"), expected)


@pytest.mark.long
def test_compiled_parts_give_the_same_gradients(monkeypatch):
    def proposals(self, features, sizes):
        # fixed ones: NMS may decide otherwise on scores that are equal up to rounding
        corner = torch.rand(len(sizes), 20, 2, generator=torch.Generator().manual_seed(1)) * 30
        return torch.cat([corner, corner + 17], dim=2), torch.ones(len(sizes), 20, dtype=torch.bool)

    monkeypatch.setattr(detector.RPN, "proposals", lambda self, o, d, a, s: proposals(self, o, s))
    images, targets = ddp_example(0)
    small = [images[0][:, :48, :80]], [targets[0] | {"masks": targets[0]["masks"][:, :48, :80]}]
    compiled = ddp_model()
    train.compile_parts(compiled)
    for example in (small, (images, targets)):  # two sizes: for the second nothing is specialized
        compiled.zero_grad()
        assert_close(gradients(compiled, example), gradients(ddp_model(), example), 3e-5)


# -- Whole runs ----------------------------------------------------------------------------------

STEPS = 6


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """command(out, ...) runs train.py on 8 generated images with a recipe of 6 iterations."""
    folder = tmp_path_factory.mktemp("train")
    make_toy_coco(folder / "coco", train_images=8, val_images=4)
    recipe = replace(
        TINY,
        iterations=STEPS,
        iterations_pretrained=STEPS,
        tails=(3, 1),
        eval_every=2,
        checkpoint_every=100,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "tiny", recipe)

        def run(out, *arguments):
            fixed = ["--recipe", "tiny", "--data", str(folder / "coco"), "--workers", "0"]
            return train.main([*fixed, "--device", "cpu", "--out", str(folder / out), *arguments])

        run.folder = folder
        yield run


@pytest.fixture(scope="module")
def whole_run(command):
    """An uninterrupted run; the rate of each parameter group at each step; what it printed."""
    seen = []
    step = torch.optim.SGD.step

    def record(optimizer, *arguments):
        seen.append([group["lr"] for group in optimizer.param_groups])
        return step(optimizer, *arguments)

    printed = command.folder / "printed"
    with pytest.MonkeyPatch.context() as patch, open(printed, "w") as file:
        patch.setattr(torch.optim.SGD, "step", record)
        with contextlib.redirect_stdout(file):
            assert command("whole") == 0
    return command.folder / "whole", seen, printed.read_text()


def read_log(out):
    """The log without what depends on the machine."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    machine = ("images_per_second", "peak_memory_mb")
    return [{k: v for k, v in record.items() if k not in machine} for record in records]


def same(a, b):
    """Whether two checkpoints hold the same, tensors to the bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


def last_checkpoint(out):
    return torch.load(train.checkpoints_in(out)[-1], weights_only=True)


def iterations_in(out):
    return [train.iteration_of(path) for path in train.checkpoints_in(out)]


def assert_same_weights(out, expected):
    """Two runs end with the same weights and momentum, to the bit."""
    ours, theirs = last_checkpoint(out), last_checkpoint(expected)
    assert ours["iteration"] == theirs["iteration"]
    for part in ("weights", "momentum"):
        assert same(ours[part], theirs[part]), part


def at_step(monkeypatch, step, action):
    """Have `action` happen before a step: in the loop, which asks for the step's rate."""
    rate, started = train.learning_rate, []

    def loader(*arguments, _loader=train.make_loader):
        started.append(True)
        return _loader(*arguments)

    def at(iteration, recipe):
        if iteration == step and started:
            started.clear()
            action()
        return rate(iteration, recipe)

    monkeypatch.setattr(train, "make_loader", loader)
    monkeypatch.setattr(train, "learning_rate", at)


def test_a_run_leaves_log_and_checkpoint(whole_run):
    out, group_rates, printed = whole_run
    log = read_log(out)
    steps = [record for record in log if "loss" in record]
    assert [record["iteration"] for record in steps] == list(range(1, STEPS + 1))
    # the loop gives each group its rate: biases twice the others
    lr = rates(RECIPES["tiny"], *range(STEPS))
    assert lr == pytest.approx([0.02 / 3, 0.02 * 2 / 3, 0.02, 0.002, 0.002, 0.0002])
    assert [record["lr"] for record in steps] == lr
    assert group_rates == [[rate, rate, 2 * rate] for rate in lr]
    names = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}
    for record in steps:
        assert record["loss"] == pytest.approx(sum(record[n] for n in names), abs=1e-5)
        assert set(record) == names | {"iteration", "lr", "loss"}
    evaluations = [record for record in log if "bbox" in record]
    assert [record["iteration"] for record in evaluations] == [2, 4, 6]
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl"} <= set(evaluations[-1]["segm"])
    # plain data and tensors: nothing has to be executed to read it
    checkpoint = last_checkpoint(out)
    assert checkpoint["iteration"] == STEPS and len(checkpoint["data"]["classes"]) == 5
    assert checkpoint["init"] == "random" and checkpoint["recipe"]["name"] == "tiny"
    assert checkpoint["momentum"].keys() == {n for n in checkpoint["weights"] if "image_" not in n}
    tensors = [*checkpoint["weights"].values(), *checkpoint["momentum"].values()]
    size = train.checkpoints_in(out)[-1].stat().st_size
    assert size < sum(t.nbytes for t in tensors) + 500 * len(tensors)  # and their names
    # the header has the image statistics, the end what to look at
    assert "122.77, 115.95, 102.98" in printed
    assert any((out / "pictures").iterdir()) and f"{out}/pictures" in printed
    assert (out / "curves.png").stat().st_size > 1000 and f"{out}/curves.png" in printed
    command = printed[printed.index("tools/look_inside.py") :].split()
    assert Path(command[command.index("--weights") + 1]).is_file()
    assert Path(command[command.index("--image") + 1]).is_file()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_run_that_was_interrupted_ends_as_if_it_had_not(command, whole_run, monkeypatch, name):
    out = command.folder / f"resumed-{name}"
    handler = signal.getsignal(getattr(signal, name))
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), getattr(signal, name)))
    assert command(out) == 0
    assert signal.getsignal(getattr(signal, name)) == handler
    assert last_checkpoint(out)["iteration"] == 3  # a checkpoint is due; otherwise a step later
    # What a killed or a mistreated run may have behind its checkpoint: an evaluation that is due
    # again, a later step, foreign bytes, half a line, half a checkpoint.
    with open(out / "log.jsonl", "ab") as file:
        file.write(json.dumps({"iteration": 3, "bbox": {"AP": 1.0}}).encode() + b"\n")
        file.write(b'{"iteration": 4, "loss": 1.0}\n\xff\xfe[]\n{"iteration": 9, "lo')
    half = out / ".checkpoint_0000099.pth.1.tmp"
    half.write_bytes(b"half a checkpoint")
    assert command(out) == 2  # never over another run without being told
    assert command(out, "--resume") == 0
    assert not half.exists()
    assert read_log(out) == read_log(whole_run[0])
    assert_same_weights(out, whole_run[0])
    assert command(out, "--resume", "--seed", "1") == 2


def test_a_log_that_was_edited_does_not_prevent_a_resume(command):
    for name, edit in {"short": lambda text: text[:100], "gone": lambda text: b"\xff"}.items():
        assert command(name, "--iterations", "3") == 0
        path = command.folder / name / "log.jsonl"
        path.write_bytes(edit(path.read_bytes()))
        assert command(name, "--resume") == 0
        lines = path.read_bytes().splitlines()[1:]  # all but the broken one are records
        assert [json.loads(x)["iteration"] for x in lines][-4:] == [4, 5, 6, 6]


def test_a_signal_before_an_evaluation_is_answered_before_it(command, monkeypatch):
    evaluation, evaluated = evaluate.evaluate, []
    at_step(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGINT))  # before that at 2
    monkeypatch.setattr(
        evaluate, "evaluate", lambda *a, **k: evaluated.append(1) or evaluation(*a, **k)
    )
    assert command("signal") == 0
    assert not evaluated and iterations_in(command.folder / "signal") == [2]


def test_signals_that_are_ignored_stay_ignored(command, whole_run, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        at_step(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert command("nohup") == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert_same_weights(command.folder / "nohup", whole_run[0])


@pytest.mark.parametrize("batch", [2, 16, 22, 26])  # 22 and 26: numbers of iterations are rounded
def test_milestones_are_where_shorter_schedules_leave_the_trunk(batch):
    recipe = RECIPES["r50-gn"]
    trunk = train.scale_to_batch(recipe, batch)
    for n in range(1, 6):
        shorter = train.scale_to_batch(replace(recipe, iterations=n * 90_000), batch)
        assert shorter.drops[0] in train.milestones(trunk)


def test_a_shorter_schedule_branches_off_the_trunk(command, monkeypatch, capsys):
    """--from gives the weights that a run of that schedule from the start gives, to the bit."""
    monkeypatch.setitem(RECIPES, "tiny", replace(RECIPES["tiny"], one_x=1, eval_every=100))
    trunk = ("--from", str(command.folder / "trunk"))
    assert command("trunk", "--schedule", "6x") == 0
    assert 2 in iterations_in(command.folder / "trunk")  # where 5x, with its tail of 3, leaves 6x
    assert command("branch", "--schedule", "5x", *trunk) == 0
    assert "after iteration 2" in capsys.readouterr().out
    assert command("alone", "--schedule", "5x") == 0
    assert_same_weights(command.folder / "branch", command.folder / "alone")
    assert [r["iteration"] for r in read_log(command.folder / "branch") if "loss" in r] == [3, 4, 5]

    weights = str(train.checkpoints_in(command.folder / "alone")[-1])
    refused = [
        (["--schedule", "7x", "--from", str(command.folder / "alone")], "alone"),
        (["--schedule", "5x", *trunk, "--seed", "1"], "seed"),
        (["--schedule", "5x", *trunk, "--init", weights, "--freeze-at", "0"], "init"),
        (["--schedule", "5x", *trunk, "--images-per-gpu", "1"], "--images-per-gpu 2"),
        (["--schedule", "5x", *trunk, "--iterations", "2"], "--iterations 2"),  # nothing is left
        (["--schedule", "5x", "--from", str(command.folder / "nothing")], "nothing"),
    ]
    for arguments, named in refused:
        assert command("refused", *arguments) == 2
        assert named in capsys.readouterr().err
    monkeypatch.setitem(RECIPES, "tiny", replace(RECIPES["tiny"], cascade_iterations=2))
    assert command("refused", "--schedule", "5x", *trunk) == 2
    assert "cascade" in capsys.readouterr().err


def test_a_run_is_not_continued_as_another(command, capsys):
    """With another batch, other classes, another initialization, fewer steps than there were."""
    assert command("first", "--iterations", "3") == 0
    other = command.folder / "other"
    shutil.copytree(command.folder / "coco", other)
    for file in other.glob("annotations/instances_*.json"):
        file.write_text(file.read_text().replace('"disk"', '"disc"'))
    weights = str(train.checkpoints_in(command.folder / "first")[-1])
    capsys.readouterr()
    for arguments, named in [
        (["--images-per-gpu", "1"], "--images-per-gpu 2"),  # which keeps the batch
        (["--data", str(other)], "classes"),
        (["--init", weights], "init"),
        (["--iterations", "2"], "--iterations"),
        (["--norm", "syncbn"], "norm"),
    ]:
        assert command("first", "--resume", *arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and named in error[0] and "checkpoint_0000003" in error[0]
    assert last_checkpoint(command.folder / "first")["iteration"] == 3


def test_a_broken_checkpoint_is_passed_over(command, whole_run, capsys, monkeypatch):
    """The one before it is used, which is said; the end is the same. A broken disk is no reason."""
    out = command.folder / "broken"
    assert command(out, "--iterations", "5") == 0
    newest, before = train.checkpoints_in(out)[-1], train.checkpoints_in(out)[-2]
    no_memory = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")
    for fault, named in ((OSError(errno.EIO, "no"), "Input/output"), (no_memory, "memory")):
        with monkeypatch.context() as patched:
            patched.setattr(torch, "load", mock.Mock(side_effect=fault))
            assert command(out, "--resume") == 1
        printed = capsys.readouterr().err.splitlines()[-1]
        assert named in printed and str(newest) in printed and newest.exists()
    newest.write_bytes(newest.read_bytes()[:5000])
    capsys.readouterr()
    assert command(out, "--resume") == 0
    printed = capsys.readouterr().out
    assert newest.name in printed and f"{before}, after iteration 4" in printed
    assert_same_weights(out, whole_run[0])
    steps = [r for r in read_log(out) if "loss" in r]
    assert [r["iteration"] for r in steps] == list(range(1, STEPS + 1))
    for path in train.checkpoints_in(out):  # none is left to fall back to
        path.write_bytes(b"PK")
    assert command(out, "--resume") == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_folder_has_one_run(command, capsys):
    """While another process holds it, and where it left nothing but a log."""
    out = command.folder / "locked"
    holder = (
        "import evaluate, sys, time\n"
        f"with evaluate.lock_folder({str(out)!r}):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    root = Path(train.__file__).parent
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdout=subprocess.PIPE, cwd=root
    ) as process:
        assert process.stdout.readline() == b"held\n"
        assert command("locked") == 2
        assert str(out) in capsys.readouterr().err
        assert not train.checkpoints_in(out)
        process.kill()
    (out / "log.jsonl").write_text('{"iteration": 1, "loss": 2.5}\n')  # killed after one step
    assert command("locked") == 2
    assert "log.jsonl" in capsys.readouterr().err
    assert command("locked", "--resume", "--iterations", "1") == 0
    assert [r["iteration"] for r in read_log(out)] == [1, 1]


def test_fine_tuning_takes_what_the_weights_say(command, capsys):
    """Image statistics and the place of the stride; the header says so, the checkpoint keeps it."""
    model = detector.build_model(
        num_classes=5, image_std=(0.25, 0.25, 0.5), stride_in_1x1=True, **NARROW
    )
    detector.save_model(model, command.folder / "weights.pth")
    arguments = ["--init", str(command.folder / "weights.pth")]
    assert command("tuned", *arguments, "--iterations", "1") == 0
    printed = capsys.readouterr().out
    assert "63.75, 63.75, 127.50" in printed and "2 stages frozen" in printed
    checkpoint = last_checkpoint(command.folder / "tuned")
    assert checkpoint["config"]["image_std"] == (0.25, 0.25, 0.5)
    assert checkpoint["config"]["stride_in_1x1"] and checkpoint["init"] == arguments[1]
    stem = "backbone.stem.conv.weight"  # frozen
    assert torch.equal(checkpoint["weights"][stem], model.state_dict()[stem])
    assert command("tuned", *arguments, "--resume", "--iterations", "2") == 0
    assert last_checkpoint(command.folder / "tuned")["config"] == checkpoint["config"]


def test_splits_of_other_names_and_images_without_objects(command, monkeypatch, capsys):
    root = command.folder / "named"
    shutil.copytree(command.folder / "coco", root)
    for old, new in (("train2017", "fit"), ("val2017", "check")):
        (root / old).rename(root / new)
        (root / f"annotations/instances_{old}.json").rename(
            root / f"annotations/instances_{new}.json"
        )
    file = root / "annotations/instances_fit.json"
    content = json.loads(file.read_text())
    emptied = content["images"][0]["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != emptied]
    file.write_text(json.dumps(content))
    images = len({a["image_id"] for a in content["annotations"] if not a["iscrowd"]})
    for keep_empty, expected in ((False, images), (True, 8)):
        monkeypatch.setitem(RECIPES, "tiny", replace(RECIPES["tiny"], keep_empty=keep_empty))
        arguments = ["--data", str(root), "--train-split", "fit", "--val-split", "check"]
        assert command(f"named-{keep_empty}", *arguments, "--iterations", "2") == 0
        assert last_checkpoint(command.folder / f"named-{keep_empty}")["num_images"] == expected
    # and classes that differ between the two are seen before anything is trained
    file = root / "annotations/instances_check.json"
    file.write_text(file.read_text().replace('"disk"', '"disc"'))
    capsys.readouterr()
    assert command("named-no", *arguments) == 1
    assert "disc" in capsys.readouterr().err and not (command.folder / "named-no").exists()


def test_a_schedule_that_was_not_meant_for_so_few_images_is_refused(command, monkeypatch, capsys):
    recipe = replace(RECIPES["tiny"], iterations=90_000, tails=(60_000, 20_000))
    monkeypatch.setitem(RECIPES, "tiny", recipe)
    for arguments in ([], ["--dry-run"]):
        assert command("epochs", *arguments) == 2
        assert "epochs" in capsys.readouterr().err
    assert command("epochs", "--iterations", "1") == 0


# -- The cascade switch --------------------------------------------------------------------------


def cascade_recipe():
    return replace(
        RECIPES["tiny"],
        cascade_iterations=3,
        eval_every=100,
        checkpoint_every=1,
        model=RECIPES["tiny"].model | {"box_class_agnostic": True},
    )


def test_a_cascade_is_switched_and_resumed_on_either_side(command, monkeypatch):
    monkeypatch.setitem(RECIPES, "tiny", cascade_recipe())
    assert command("cascade") == 0
    names = [
        sorted(k for k in r if "classifier" in k) for r in read_log(command.folder / "cascade")
    ]
    three = [f"loss_classifier_{stage}" for stage in (1, 2, 3)]
    assert names[:STEPS] == [["loss_classifier"]] * 3 + [three] * 3
    for stop in ("3", "4"):  # the last step before the switch, and the first after it
        assert command(f"cascade{stop}", "--iterations", stop) == 0
        assert command(f"cascade{stop}", "--resume") == 0
        assert_same_weights(command.folder / f"cascade{stop}", command.folder / "cascade")
        assert last_checkpoint(command.folder / f"cascade{stop}")["config"]["cascade"]


def test_every_stage_of_a_grown_cascade_starts_as_what_stage_one_does(command):
    recipe = cascade_recipe()
    model = train.make_model(recipe, 5, image_std=(0.2, 0.2, 0.2))
    model.data_settings = {"classes": list("abcde")}
    optimizer = train.make_optimizer(model, recipe)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    grown, grown_optimizer = train.grow_to_cascade(model, optimizer, recipe)
    state = grown.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert grown.data_settings == model.data_settings
    assert grown.config.image_std == (0.2, 0.2, 0.2) and grown.config.cascade
    momentum, kept = train.momentum_of(model, optimizer), train.momentum_of(grown, grown_optimizer)
    assert same(momentum, {name: kept.pop(name) for name in momentum})
    assert kept and not any(map(torch.any, kept.values()))  # stages 2 and 3 start at rest
    # the same scores, and the same boxes: deltas are divided by weights 2 and 3 times as large
    pooled = torch.randn(4, NARROW["fpn_channels"], 7, 7)
    boxes = torch.tensor([[10.0, 10, 50, 40]]).expand(4, 4)
    (scores, deltas), *others = (head(pooled) for head in grown.box_heads)
    weights = torch.tensor(grown.config.bbox_reg_weights)
    expected = detector.decode_boxes(deltas[:, 0] / weights, boxes)
    assert not torch.allclose(expected, boxes)
    for factor, (stage_scores, stage_deltas) in zip((2, 3), others):
        assert torch.equal(stage_scores, scores)
        decoded = detector.decode_boxes(stage_deltas[:, 0] / (factor * weights), boxes)
        torch.testing.assert_close(decoded, expected)
    # Fused SGD takes momentum for all parameters of a group or for none.
    for parameter in grown.parameters():
        parameter.grad = torch.ones_like(parameter)
    grown_optimizer.step()


# -- Losses that are out of bounds ---------------------------------------------------------------


# before an evaluation without a checkpoint; the last step
@pytest.mark.parametrize("bad, factor", [(3, float("nan")), (5, float("nan")), (5, 1e5)])
def test_a_loss_that_explodes_stops_the_run(command, monkeypatch, capsys, bad, factor):
    losses, evaluation = detector.MaskRCNN.losses, evaluate.evaluate
    ids, evaluated = [], []

    def broken(self, features, sizes, targets):
        result = losses(self, features, sizes, targets)
        ids.append([t["image_id"] for t in targets])
        if len(ids) == bad + 1:
            result["loss_mask"] = result["loss_mask"] * factor
        return result

    def counted(*arguments, **named):
        evaluated.append(len(ids))
        return evaluation(*arguments, **named)

    monkeypatch.setattr(detector.MaskRCNN, "losses", broken)
    monkeypatch.setattr(evaluate, "evaluate", counted)
    out = command.folder / f"exploded-{bad}-{factor}"
    assert command(out) == 1
    error = capsys.readouterr().err
    assert all(str(int(i)) in error for i in ids[bad]) and f"step {bad} " in error
    for path in train.checkpoints_in(out):
        checkpoint = torch.load(path)
        assert checkpoint["iteration"] <= bad
        for part in ("weights", "momentum"):
            assert all(value.isfinite().all() for value in checkpoint[part].values())
    assert max(evaluated) <= bad  # nobody waits an hour for the AP of weights that are useless


def test_a_picture_that_fails_does_not_cost_the_table(command, monkeypatch, capsys):
    def fails(*_, **__):
        raise MemoryError("30 GiB of masks")

    monkeypatch.setattr(evaluate, "save_pictures", fails)
    assert command("pictures", "--iterations", "1") == 0
    printed = capsys.readouterr().out
    assert "AP50" in printed and "Weights:" in printed and "30 GiB of masks" in printed


# -- The command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, name", [("--data", "no/coco"), ("--init", "no.pth"), ("--init", "broken.pth")]
)
def test_bad_data_is_one_sentence_and_exit_code_1(command, option, name, tmp_path, capsys):
    path = tmp_path / name
    if "broken" in name:
        path.write_bytes(b"PK\3\4 but no weights")
    code = command("bad", option, str(path))
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 1 and len(error) == 1 and str(path) in error[0]
    assert not list((command.folder).glob("bad/[!.]*"))


def test_interrupting_the_imports_ends_without_a_traceback(tmp_path):
    command = [sys.executable, train.__file__, "--out", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    time.sleep(0.3)  # torch takes a second or more
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0 and "Traceback" not in error


def test_the_plan_is_shown_without_data(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert train.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in RECIPES) and "41.3" in listed
    assert train.main(["--recipe", "r50-gn", "--schedule", "6x", "--dry-run"]) == 0
    plan = capsys.readouterr().out
    for fact in ("540,000 iterations", "480,000", "520,000", "73.7 epochs", "0.002", "16 images"):
        assert fact in plan
