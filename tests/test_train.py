"""train.py: the optimizer, DDP, and whole runs of 6 steps: stopped, resumed, branched, refused."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_faults import EXACT, check_same_ending, read_log
from tiny_run import NARROW, TINY, before_step, nan_loss, run_train, spoil_losses, start, wait

import evaluate
import model as detector
import train
from data import UserError
from tools.toy_coco import make_toy_coco
from train import RECIPES, Recipe

BOXES = replace(TINY, masks=False)

# -- The optimizer, and DDP ----------------------------------------------------------------------


@pytest.mark.parametrize("norm, freeze_at", [("gn", 0), ("syncbn", 2), ("frozen_bn", 2)])
def test_every_parameter_is_in_its_group(norm, freeze_at):
    model = detector.build_model(norm=norm, freeze_at=freeze_at, keypoints=17, **NARROW)
    groups = train.make_optimizer(model, Recipe()).param_groups
    assert [g["rate_factor"] for g in groups] == [1, 1, 2]  # of weights, gammas, biases
    assert [g["weight_decay"] for g in groups] == [1e-4, 0, 0]
    assert all(g["momentum"] == 0.9 and not g["nesterov"] for g in groups)
    place = {id(p): i for i, g in enumerate(groups) for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(place)  # none twice
    for name, parameter in model.named_parameters():
        frozen = freeze_at and name.startswith(("backbone.stem", "backbone.res2"))
        expected = 2 if name.endswith("bias") else 1 if ".norm." in name else 0
        assert place.pop(id(parameter), None) == (None if frozen else expected), name
    assert not place and bool(groups[1]["params"]) == (norm != "frozen_bn")


def ddp_model():
    torch.manual_seed(0)
    everything = {"rpn_batch_size_per_image": 5000, "rpn_positive_fraction": 0.9}
    everything |= {"box_batch_size_per_image": 400, "box_positive_fraction": 0.9}
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


def compare_gradients():
    rank, _, _ = evaluate.start_processes("cpu")
    ours = gradients(train.wrap(ddp_model()), ddp_example(rank))
    own = [gradients(ddp_model(), ddp_example(rank)) for rank in (0, 1)]
    assert ours.keys() == own[0].keys()
    for name, gradient in ours.items():
        expected = (own[0][name] + own[1][name]) / 2
        scale = expected.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(gradient, expected, atol=1e-5 * scale, rtol=1e-4, msg=name)


def test_ddp_gradients_are_the_mean_of_the_images_gradients(tmp_path):
    # GN, images of one size, all anchors and RoIs sampled: nothing depends on the process. Each
    # process divides its losses by its own counts, so that what DDP averages are image means.
    codes = wait(start(compare_gradients, [(), ()], tmp_path / "out"))
    assert codes == [0, 0], (tmp_path / "out.0.txt").read_text()


# -- Whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """command(out, ...) runs train.py on 8 generated images; returns its exit code."""
    folder = tmp_path_factory.mktemp("train")
    make_toy_coco(folder / "coco", train_images=8, val_images=2)

    def run(out, *arguments, recipe=TINY, pictures=False):
        fixed = ["--data", str(folder / "coco"), "--out", str(folder / out)]
        return run_train(recipe, [*fixed, *arguments], pictures=pictures)

    run.folder = folder
    return run


@pytest.fixture(scope="module")
def whole_run(command):
    """An uninterrupted run; the rate of each parameter group at each step."""
    seen, step = [], torch.optim.SGD.step

    def record(optimizer, *arguments):
        seen.append([group["lr"] for group in optimizer.param_groups])
        return step(optimizer, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", record)
        assert command("whole", pictures=True) == 0
    return command.folder / "whole", seen


def last_checkpoint(out):
    return detector.read_checkpoint(train.checkpoints_in(out)[-1])


def iterations_in(out):
    return [train.iteration_of(path) for path in train.checkpoints_in(out)]


def sentence(capsys):
    """The one line that train.py says about an error, at the end."""
    *before, line = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: ") and not any("train.py" in other for other in before)
    return line


def test_a_run_leaves_log_checkpoints_and_pictures(whole_run):
    out, group_rates = whole_run
    log = read_log(out)
    steps = [record for record in log if "loss" in record]
    assert [record["iteration"] for record in steps] == [1, 2, 3, 4, 5, 6]
    # the loop gives each group its rate: biases twice the others
    lr = [record["lr"] for record in steps]
    assert lr == pytest.approx([0.02 / 3, 0.02 * 2 / 3, 0.02, 0.002, 0.0002, 0.0002])
    assert group_rates == [[rate, rate, 2 * rate] for rate in lr]
    names = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}
    for record in steps:
        assert record["loss"] == pytest.approx(sum(record[n] for n in names), abs=1e-5)
        assert set(record) == names | {"iteration", "lr", "loss"}
    evaluations = [record for record in log if "bbox" in record]
    assert [record["iteration"] for record in evaluations] == [5, 6]
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl"} <= set(evaluations[-1]["segm"])
    assert iterations_in(out) == [3, 4, 5, 6]  # the drops and the last two, without 2
    checkpoint = last_checkpoint(out)
    assert checkpoint["iteration"] == 6 and len(checkpoint["data"]["classes"]) == 5
    assert checkpoint["momentum"].keys() == {n for n in checkpoint["weights"] if "image_" not in n}
    assert len([*(out / "pictures").glob("*.png")]) == 2


# before which step a signal comes, and which checkpoints there are then: the step is still made
@pytest.mark.parametrize("name, step, saved", [("SIGINT", 0, [1]), ("SIGTERM", 5, [3, 4, 5, 6])])
def test_an_interrupted_run_ends_as_undisturbed(command, whole_run, name, step, saved):
    out = command.folder / name
    with pytest.MonkeyPatch.context() as patch:
        before_step(step, lambda: signal.raise_signal(getattr(signal, name)), patch.setattr)
        assert command(out) == 0
    assert iterations_in(out) == saved
    evaluations = [record["iteration"] for record in read_log(out) if "bbox" in record]
    assert evaluations == ([5] if step == 5 else [])  # none between a signal and the end
    # What a kill may have left behind the checkpoint: an evaluation that is due again, a later
    # step, half a line, half a checkpoint.
    with open(out / "log.jsonl", "a") as file:
        file.write(json.dumps({"iteration": saved[-1], "bbox": {"AP": 1.0}}) + "\n")
        file.write('{"iteration": 9, "loss": 1.0}\n{"iteration": 9, "bbox": {"AP": 1.0}')
    Path(out, "checkpoint_0000099.pth.tmp").write_bytes(b"half a checkpoint")
    assert command(out, "--resume") == 0
    check_same_ending(out, whole_run[0])


def test_a_cascade_is_switched_and_resumed_on_either_side(command):
    recipe = replace(BOXES, cascade_iterations=3, eval_every=100)
    assert command("cascade", recipe=recipe) == 0
    log = read_log(command.folder / "cascade")[:6]
    names = [sorted(name for name in record if "classifier" in name) for record in log]
    three = [f"loss_classifier_{stage}" for stage in (1, 2, 3)]
    assert names == [["loss_classifier"]] * 3 + [three] * 3
    for stop in ("3", "4"):  # the last step before the switch, and the first after it
        assert command(f"cascade{stop}", "--stop-after", stop, recipe=recipe) == 0
        assert command(f"cascade{stop}", "--resume", recipe=recipe) == 0
        check_same_ending(command.folder / f"cascade{stop}", command.folder / "cascade")
    assert last_checkpoint(command.folder / "cascade4")["config"]["cascade"]


def test_every_stage_of_a_grown_cascade_starts_as_what_stage_one_does():
    torch.manual_seed(0)
    settings = NARROW | {"box_class_agnostic": True, "image_std": (0.2, 0.2, 0.2)}
    model = detector.build_model(num_classes=5, **settings)
    model.data_settings = {"classes": list("abcde")}
    optimizer = train.make_optimizer(model, TINY)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    grown, grown_optimizer = train.grow_to_cascade(model, optimizer, TINY)
    state = grown.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert grown.data_settings == model.data_settings and grown.training
    assert grown.config == replace(model.config, cascade=True)
    momentum, kept = train.momentum_of(model, optimizer), train.momentum_of(grown, grown_optimizer)
    torch.testing.assert_close({name: kept.pop(name) for name in momentum}, momentum, **EXACT)
    assert kept and not any(map(torch.any, kept.values()))  # stages 2 and 3 start at rest
    # the same scores and boxes, though the deltas are divided by weights 2 and 3 times as large
    pooled, boxes = torch.randn(4, NARROW["fpn_channels"], 7, 7), torch.tensor([[9.0, 9, 50, 40]])
    boxes = boxes.expand(4, 4)
    heads = [head(pooled) for head in grown.box_heads]
    refined = [grown.refine([boxes], heads[i][1], i, [(64, 96)])[0] for i in range(3)]
    assert not torch.allclose(refined[0][:, 0], boxes)
    for stage in (1, 2):
        torch.testing.assert_close(heads[stage][0], heads[0][0])
        torch.testing.assert_close(refined[stage], refined[0])
    # Fused SGD takes momentum for all parameters of a group or for none.
    for parameter in grown.parameters():
        parameter.grad = torch.ones_like(parameter)
    grown_optimizer.step()


# -- Branches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["r50-gn", "r50-gn-aug-cascade"])
def test_checkpoints_are_kept_where_shorter_schedules_leave_the_trunk(name):
    for batch in range(1, 129):  # 22 and 26, of 11 and 13 GPUs: numbers of iterations are rounded
        trunk = train.scale_to_batch(RECIPES[name], batch)
        kept = train.kept_iterations(trunk)
        assert {*trunk.drops, trunk.cascade_start} <= kept
        for n in range(1, RECIPES[name].iterations // 90_000):
            shorter = train.scale_to_batch(replace(RECIPES[name], iterations=n * 90_000), batch)
            assert shorter.first_change <= 0 or shorter.first_change in kept, (batch, n)


@pytest.mark.parametrize("cascade", [0, 3])
def test_branches_in_both_directions_end_as_runs_of_their_own(command, capsys, cascade):
    """A 2x off a finished 3x, and a 3x off a finished 2x. They part where the 2x changes first."""
    recipe = replace(BOXES, one_x=2, tails=(2, 1), cascade_iterations=cascade)
    recipe = replace(recipe, eval_every=100, checkpoint_every=100)
    parting = 4 - (cascade or 2)
    for schedule in ("2x", "3x"):
        assert command(f"{schedule}-{cascade}", "--schedule", schedule, recipe=recipe) == 0
    for schedule, trunk in (("2x", "3x"), ("3x", "2x")):
        capsys.readouterr()
        out, trunk = f"{schedule}-off-{trunk}-{cascade}", command.folder / f"{trunk}-{cascade}"
        assert command(out, "--schedule", schedule, "--from", str(trunk), recipe=recipe) == 0
        header = capsys.readouterr().out
        assert f"after iteration {parting}; changed from here on: nothing" in header
        alone = command.folder / f"{schedule}-{cascade}"
        check_same_ending(command.folder / out, alone, after=parting)


def test_what_is_no_trunk_is_refused(command, whole_run, capsys):
    model = detector.build_model(num_classes=5, **NARROW)
    Path(command.folder, "weights-only").mkdir()
    detector.save_model(model, command.folder / "weights-only" / "checkpoint_0000001.pth")
    for trunk, *arguments in (["nothing"], ["weights-only"], ["whole", "--norm", "syncbn"]):
        assert command("refused", "--from", str(command.folder / trunk), *arguments) == 1
        assert trunk in (said := sentence(capsys)) and ("norm" in said) == (trunk == "whole")
    assert not (command.folder / "refused").exists()


# -- Refused, and ended --------------------------------------------------------------------------


def test_a_run_is_not_continued_as_another(command, capsys, monkeypatch):
    """Never without being told, and not by another recipe, data, classes, init or batch."""
    assert command("first", "--stop-after", "1") == 0
    out, other = command.folder / "first", command.folder / "other"
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    shutil.copytree(command.folder / "coco", other)
    for file in other.glob("annotations/instances_*.json"):
        file.write_text(file.read_text().replace('"disk"', '"disc"'))
    # with the differences that follow from another recipe or init
    monkeypatch.setitem(RECIPES, "another", replace(TINY, batch_size=4, images_per_gpu=4))
    recipe = replace(TINY, one_x=2, iterations_pretrained=5)
    capsys.readouterr()
    assert command("first") == 1
    assert str(out) in (said := sentence(capsys)) and "--resume" in said
    for arguments, named in [
        (
            ["--images-per-gpu", "1"],
            "another batch_size (2 there, 1 here); choose --images-per-gpu",
        ),
        (
            ["--recipe", "another"],
            "another recipe ('tiny' there, 'another' here); give another --out.",
        ),
        (["--data", str(other)], "classes"),
        (["--train-split", "val2017"], "images"),
        (["--init", str(train.checkpoints_in(out)[-1])], "another init ('random' there"),
        (["--norm", "syncbn"], "norm ('gn' there"),
        (["--schedule", "4x"], f"--from {out}"),
    ]:
        assert command("first", "--resume", *arguments, recipe=recipe) == 1
        assert named in (said := sentence(capsys)) and "checkpoint_0000001" in said
    assert before == {path: path.read_bytes() for path in out.iterdir() if path.is_file()}


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nan_ends_a_run_before_the_step_and_another_seed_goes_on(
    command, monkeypatch, capsys, what
):
    out, ids, steps, step = command.folder / what, [], [], torch.optim.SGD.step

    def spoiled(losses, targets):
        ids[:] = [target["image_id"] for target in targets]
        if what == "loss":
            return nan_loss(losses, targets)
        losses["loss_classifier"].register_hook(lambda gradient: gradient * float("nan"))
        return losses

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", lambda *a: steps.append(1) or step(*a))
        before_step(4, lambda: spoil_losses(spoiled, patch.setattr), patch.setattr)
        assert command(out, recipe=BOXES) == 1
    said = sentence(capsys)
    assert "step 4 is not finite" in said and ("loss_classifier nan" in said) == (what == "loss")
    assert f"(images {ids[0]}, {ids[1]})" in said and "--resume with another --seed" in said
    assert len(steps) == iterations_in(out)[-1] == 4  # the weights of before
    other = "--seed", "1", "--learning-rate", "0.01"
    assert command(out, "--resume", *other, recipe=BOXES) == 0
    header = capsys.readouterr().out
    for fact in ("iteration 4", "seed (0 there, 1 here)", "learning_rate (0.02 there, 0.01 here)"):
        assert fact in header
    assert (
        command(out, "--resume", recipe=BOXES) == 1
    )  # not silently with the default seed and rate
    assert "seed (1 there, 0 here)" in sentence(capsys)
    rates = [record["lr"] for record in read_log(out) if "loss" in record]
    assert rates == pytest.approx([0.02 / 3, 0.02 * 2 / 3, 0.02, 0.002, 0.0001, 0.0001])


def test_a_full_disk_keeps_earlier_checkpoints_whole(command, whole_run, capsys):
    """The disk: a limit on the size of a file, which a checkpoint exceeds."""
    resource = pytest.importorskip("resource")
    out = command.folder / "full"
    assert command(out, "--stop-after", "2") == 0
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        assert command(out, "--resume") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in sentence(capsys)
    assert iterations_in(out) == [2] and last_checkpoint(out)["iteration"] == 2
    assert command(out, "--resume") == 0
    check_same_ending(out, whole_run[0])


def test_fine_tuning_takes_what_the_weights_say(command, capsys):
    """Image statistics and the place of the stride; the checkpoint keeps them."""
    weights, stated = (
        command.folder / "w.pth",
        {"image_std": (0.2, 0.2, 0.5), "stride_in_1x1": True},
    )
    model = detector.build_model(num_classes=3, **NARROW | stated)
    detector.save_model(model, weights)
    assert command("tuned", "--init", str(weights), "--stop-after", "1") == 0
    printed = capsys.readouterr().out
    assert "2 stages frozen" in printed and "left as they were: box_heads.0.classifier" in printed
    tuned = last_checkpoint(command.folder / "tuned")
    assert tuned["config"] | stated == tuned["config"]
    for name, tensor in model.state_dict().items():
        if name.startswith("backbone.") and name.endswith("conv.weight"):
            is_frozen = name.startswith(("backbone.stem", "backbone.res2"))
            assert torch.equal(tuned["weights"][name], tensor) == is_frozen, name
    assert command("tuned", "--init", str(weights), "--resume", "--stop-after", "2") == 0
    assert last_checkpoint(command.folder / "tuned")["config"] == tuned["config"]


def checked(recipe, *arguments):
    train.check(recipe, train.parse_arguments(list(arguments)))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"iterations": 60_100}, "drop at 100, before the warm-up ends"),
        ({"iterations": 180_000, "cascade_iterations": 270_000}, "cascade"),
        ({"norm": "frozen_bn"}, "frozen BN"),
        ({"freeze_at": 2}, "frozen random layers"),
        ({"amp": True}, "bfloat16"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(changes, named, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    with pytest.raises(UserError, match=named):
        checked(replace(RECIPES["r50-gn"], **changes))
    checked(replace(RECIPES["r50-gn"], norm="frozen_bn", freeze_at=2), "--init", "weights.pth")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    checked(replace(RECIPES["r50-gn"], amp=True))


def test_a_small_dev_shm_is_said_at_the_start(command, monkeypatch, capsys):
    isdir = os.path.isdir
    monkeypatch.setattr(os.path, "isdir", lambda path: path == "/dev/shm" or isdir(path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=67e6))
    monkeypatch.setattr(train, "train", lambda *_: None)
    for workers, is_said in (("2", True), ("0", False)):
        assert command("shm", "--workers", workers) == 0
        assert ("/dev/shm has 67 MB" in capsys.readouterr().out) == is_said
