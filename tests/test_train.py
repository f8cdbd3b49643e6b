"""train.py: the schedule in the paper's numbers, the optimizer, DDP, and whole runs of 6 steps."""

import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from test_norms import run_processes

import data
import evaluate
import model as detector
import train
from train import RECIPES, Recipe, learning_rate, scale_to_batch

NARROW = dict(
    blocks=(1, 1, 1, 1), stem_width=32, width_per_group=32, fpn_channels=32, box_head_convs=1,
    box_head_channels=32, box_head_fc_channels=64, mask_head_convs=1, mask_head_channels=32,
    rpn_pre_nms_top_n_train=50, rpn_post_nms_top_n_train=30,
)  # fmt: skip

# -- The schedule --------------------------------------------------------------------------------


def rates(recipe, *iterations):
    return [learning_rate(i, recipe) for i in iterations]


def test_the_rate_drops_where_the_paper_says():
    recipe = RECIPES["r50-gn"]
    assert (recipe.iterations, recipe.batch_size) == (540_000, 16)
    at = rates(recipe, 500, 479_999, 480_000, 519_999, 520_000, 539_999)
    assert at == pytest.approx([0.02, 0.02, 0.002, 0.002, 0.0002, 0.0002], rel=1e-12)
    # the last 60k and 20k, whatever the total: so 2x drops at 120k and 160k
    recipe = train.replace(recipe, iterations=train.SCHEDULES["2x"])
    at = rates(recipe, 119_999, 120_000, 159_999, 160_000)
    assert at == pytest.approx([0.02, 0.002, 0.002, 0.0002], rel=1e-12)


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


def test_what_cannot_work_is_refused():
    recipe = RECIPES["r50-gn"]
    with pytest.raises(train.UsageError, match="50,000 .* tail of 60,000"):
        train.check(train.replace(recipe, iterations=50_000), from_random=True)
    with pytest.raises(train.UsageError, match="warm-up of 500 .* drops at 100"):
        train.check(train.replace(recipe, iterations=60_100), from_random=True)
    with pytest.raises(train.UsageError, match="180,000 .* 270,000 .* cascade"):
        cascade = RECIPES["r50-gn-aug-cascade"]
        train.check(train.replace(cascade, iterations=180_000), from_random=True)
    with pytest.raises(train.UsageError, match="Frozen BN.*pre-trained"):
        train.check(train.replace(recipe, norm="frozen_bn"), from_random=True)
    with pytest.raises(train.UsageError, match="freeze_at 2.*random"):
        train.check(train.replace(recipe, freeze_at=2), from_random=True)
    train.check(train.replace(recipe, norm="frozen_bn", freeze_at=2), from_random=False)
    for name in RECIPES:  # and the table's own rows all work, both ways
        for init in ("random", "weights.pth"):
            args = train.parse_arguments(["--recipe", name, "--init", init])
            train.check(train.make_recipe(args), from_random=init == "random")


# -- The optimizer -------------------------------------------------------------------------------


@pytest.mark.parametrize("norm, freeze_at", [("gn", 0), ("syncbn", 2), ("frozen_bn", 2)])
def test_every_parameter_is_in_its_group(norm, freeze_at):
    model = detector.build_model(norm=norm, freeze_at=freeze_at, keypoints=17, **NARROW)
    recipe = Recipe(weight_decay=1e-4)
    weights, gammas, biases = train.make_optimizer(model, recipe).param_groups
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
    return detector.build_model(
        num_classes=3, rpn_batch_size_per_image=5000, box_batch_size_per_image=400,
        rpn_positive_fraction=0.9, box_positive_fraction=0.9, **NARROW,
    ).train()  # fmt: skip


def ddp_example(rank):
    g = torch.Generator().manual_seed(rank)
    image = torch.rand(3, 64, 96, generator=g)
    boxes = torch.tensor([[5.0, 5, 40, 60], [30, 10, 90, 50]]) + rank
    masks = torch.rand(2, 64, 96, generator=g) < 0.5
    return [image], [{"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks, "seed": rank}]


def gradients(model, example):
    sum(model(*example).values()).backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def _ddp_worker(rank, folder):
    ddp = train.wrap(ddp_model(), train.RECIPES["toy"], torch.device("cpu"), 2)
    torch.save(gradients(ddp, ddp_example(rank)), f"{folder}/{rank}.pth")


def test_ddp_gradients_are_the_mean_of_the_images_gradients(tmp_path):
    # GN, images of one size, all anchors and RoIs sampled: nothing depends on the process. Each
    # process divides its losses by its own counts, so that what DDP averages are image means.
    run_processes(_ddp_worker, str(tmp_path))
    own = [gradients(ddp_model(), ddp_example(rank)) for rank in range(2)]
    for rank in range(2):
        together = torch.load(tmp_path / f"{rank}.pth")
        assert together.keys() == own[0].keys()
        for name, gradient in together.items():
            expected = (own[0][name] + own[1][name]) / 2
            scale = expected.abs().max().item()
            assert scale > 0, name
            torch.testing.assert_close(gradient, expected, atol=1e-5 * scale, rtol=1e-4, msg=name)


@pytest.mark.long
def test_compiled_parts_give_the_same_gradients(monkeypatch):
    def proposals(self, objectness, deltas, anchors, sizes):
        # fixed ones: NMS may decide otherwise on scores that are equal up to rounding
        corner = torch.rand(len(sizes), 20, 2, generator=torch.Generator().manual_seed(1)) * 30
        return torch.cat([corner, corner + 17], dim=2), torch.ones(len(sizes), 20, dtype=torch.bool)

    monkeypatch.setattr(detector.RPN, "proposals", proposals)
    images, targets = ddp_example(0)
    small = [images[0][:, :48, :80]], [targets[0] | {"masks": targets[0]["masks"][:, :48, :80]}]
    compiled = ddp_model()
    train.compile_parts(compiled)
    for example in (small, (images, targets)):  # two sizes: for the second nothing is specialized
        compiled.zero_grad()
        expected, found = gradients(ddp_model(), example), gradients(compiled, example)
        for name, gradient in found.items():
            scale = expected[name].abs().max().item()
            torch.testing.assert_close(
                gradient, expected[name], atol=3e-5 * scale, rtol=1e-4, msg=name
            )


# -- Whole runs ----------------------------------------------------------------------------------

STEPS = 6


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """command(out, ...) runs train.py on 8 generated images with a recipe of 6 iterations."""
    folder = tmp_path_factory.mktemp("train")
    data.make_toy_coco(folder / "coco", train_images=8, val_images=4)
    recipe = Recipe(
        model=NARROW | {"box_score_thresh": 0.0, "box_detections_per_img": 5},
        iterations=STEPS, tails=(3, 1), batch_size=2, warmup_iterations=2,
        min_sizes=(64, 80), max_size=96, test_size=64,
        eval_every=2, checkpoint_every=100, log_every=1,
    )  # fmt: skip
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "tiny", recipe)

        def run(out, *arguments):
            fixed = ["--recipe", "tiny", "--data", str(folder / "coco"), "--workers", "0"]
            return train.main([*fixed, "--device", "cpu", "--out", str(folder / out), *arguments])

        run.folder = folder
        yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole_run(command):
    """An uninterrupted run; the rate of each parameter group at each step."""
    seen = []
    step = torch.optim.SGD.step

    def record(optimizer, *arguments):
        seen.append([group["lr"] for group in optimizer.param_groups])
        return step(optimizer, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", record)
        assert command("whole") == 0
    return command.folder / "whole", seen


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


def test_a_run_leaves_log_and_checkpoint(whole_run):
    out, group_rates = whole_run
    log = read_log(out)
    steps = [record for record in log if "loss" in record]
    assert [record["iteration"] for record in steps] == list(range(1, STEPS + 1))
    # the loop gives each group its rate: biases twice the others
    recipe = RECIPES["tiny"]
    lr = rates(recipe, *range(STEPS))
    assert lr == pytest.approx([0.02 / 3, 0.02 * 2 / 3, 0.02, 0.002, 0.002, 0.0002])
    assert [record["lr"] for record in steps] == lr
    assert group_rates == [[rate, rate, 2 * rate] for rate in lr]
    names = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}
    for record in steps:
        assert record["loss"] == pytest.approx(sum(record[n] for n in names), abs=1e-5)
        assert set(record) == names | {"iteration", "images", "lr", "loss"}
    evaluations = [record for record in log if "bbox" in record]
    assert [record["iteration"] for record in evaluations] == [2, 4, 6]
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl"} <= set(evaluations[-1]["segm"])
    # plain data and tensors: nothing has to be executed to read it
    checkpoint = torch.load(train.checkpoints_in(out)[-1], weights_only=True)
    assert checkpoint["iteration"] == STEPS and len(checkpoint["data"]["classes"]) == 5
    assert checkpoint["momentum"].keys() == {n for n in checkpoint["model"] if "image_" not in n}
    tensors = [*checkpoint["model"].values(), *checkpoint["momentum"].values()]
    size = train.checkpoints_in(out)[-1].stat().st_size
    assert size < sum(t.nbytes for t in tensors) + 500 * len(tensors)  # and their names
    assert any((out / "pictures").iterdir())


def test_a_run_that_was_interrupted_ends_as_if_it_had_not(command, whole_run, monkeypatch):
    whole, _ = whole_run
    rate = train.learning_rate

    def terminated(iteration, recipe):
        if iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(iteration, recipe)

    monkeypatch.setattr(train, "learning_rate", terminated)
    assert command("resumed") == 0
    out = command.folder / "resumed"
    last = train.checkpoints_in(out)[-1]
    stopped_at = torch.load(last)["iteration"]
    assert stopped_at == 3  # at a checkpoint that is due anyway; else a step later
    monkeypatch.undo()
    # What a killed run may leave: an evaluation that is due again, a later step, half a line.
    with open(out / "log.jsonl", "a") as file:
        file.write(json.dumps({"images": 2 * stopped_at, "bbox": {"AP": 1.0}}) + "\n")
        file.write(json.dumps({"images": 2 * (stopped_at + 1), "loss": 1.0}) + "\n")
        file.write('{"iteration": 9, "lo')
    (out / "checkpoint_0000099.tmp").write_bytes(b"half a checkpoint")
    assert command("resumed") == 2  # never over another run without being told
    assert command("resumed", "--resume") == 0
    assert read_log(out) == read_log(whole)
    ours, expected = (torch.load(train.checkpoints_in(o)[-1]) for o in (out, whole))
    assert ours["iteration"] == expected["iteration"] == STEPS
    for part in ("model", "momentum"):
        assert same(ours[part], expected[part]), part
    assert command("resumed", "--resume", "--seed", "1") == 2


def test_a_shorter_schedule_branches_off_the_trunk(command, monkeypatch, capsys):
    """--from gives the weights that a run of that schedule from the start gives, to the bit."""
    monkeypatch.setitem(RECIPES, "tiny", replace(RECIPES["tiny"], one_x=1, eval_every=100))
    assert command("trunk", "--schedule", "6x") == 0
    kept = [p.name for p in train.checkpoints_in(command.folder / "trunk")]
    assert "checkpoint_0000002.pth" in kept  # where 5x, with its tail of 3, leaves 6x
    assert command("branch", "--schedule", "5x", "--from", str(command.folder / "trunk")) == 0
    assert "after iteration 2" in capsys.readouterr().out
    assert command("alone", "--schedule", "5x") == 0
    ours, expected = (
        torch.load(train.checkpoint_path(command.folder / o, 5)) for o in ("branch", "alone")
    )
    for part in ("model", "momentum"):
        assert same(ours[part], expected[part]), part
    assert [r["iteration"] for r in read_log(command.folder / "branch") if "loss" in r] == [3, 4, 5]

    for arguments, says in [
        (["--schedule", "7x", "--from", str(command.folder / "alone")], "shorter run"),
        (["--schedule", "5x", "--from", str(command.folder / "trunk"), "--seed", "1"], "seed"),
        (
            ["--schedule", "5x", "--from", str(command.folder / "trunk"), "--images-per-gpu", "1"],
            "batch",
        ),
        (["--schedule", "5x", "--from", str(command.folder / "nothing")], "no checkpoint"),
    ]:
        assert command("refused", *arguments) == 2
        assert says in capsys.readouterr().err
    cascade = replace(RECIPES["tiny"], cascade_iterations=2)
    monkeypatch.setitem(RECIPES, "tiny", cascade)
    assert command("refused", "--schedule", "5x", "--from", str(command.folder / "trunk")) == 2
    assert "cascade" in capsys.readouterr().err


def test_resuming_with_another_batch_goes_on_in_images(command, capsys):
    assert command("batch", "--iterations", "4") == 0
    assert command("batch", "--resume", "--images-per-gpu", "1") == 0
    assert "no longer those of an undisturbed run" in capsys.readouterr().out
    last = torch.load(train.checkpoints_in(command.folder / "batch")[-1])
    assert (last["iteration"], last["batch_size"]) == (2 * STEPS, 1)  # as many images in all
    # the first drop of 6 iterations, kept for good, although 12 have it at 6
    assert train.checkpoint_path(command.folder / "batch", 3).exists()
    # The other way: the checkpoints of the smaller batch have higher numbers, and must not win.
    assert command("larger", "--images-per-gpu", "1", "--iterations", "8") == 0
    assert command("larger", "--resume", "--iterations", "5") == 0
    last = torch.load(train.checkpoints_in(command.folder / "larger")[-1])
    assert (last["iteration"], last["batch_size"]) == (5, 2)
    seen = [r["images"] for r in read_log(command.folder / "larger") if "loss" in r]
    assert seen == [1, 2, 3, 4, 5, 6, 7, 8, 10]


def test_a_signal_before_an_evaluation_is_answered_before_it(command, monkeypatch):
    rate, evaluation = train.learning_rate, evaluate.evaluate
    evaluated = []

    def terminated(iteration, recipe):
        if iteration == 1:  # the step before the evaluation at 2
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(iteration, recipe)

    monkeypatch.setattr(train, "learning_rate", terminated)
    monkeypatch.setattr(
        evaluate, "evaluate", lambda *a, **k: evaluated.append(1) or evaluation(*a, **k)
    )
    assert command("signal") == 0
    out = command.folder / "signal"
    assert not evaluated and [train.iteration_of(p) for p in train.checkpoints_in(out)] == [2]


def test_a_run_is_not_continued_on_other_classes(command, capsys):
    assert command("classes", "--iterations", "1") == 0
    other = command.folder / "other"
    shutil.copytree(command.folder / "coco", other)
    for file in other.glob("annotations/instances_*.json"):
        file.write_text(file.read_text().replace('"disk"', '"disc"'))
    capsys.readouterr()
    assert command("classes", "--resume", "--data", str(other)) == 2
    assert "other classes" in capsys.readouterr().err


def test_a_cascade_is_switched_and_resumed_on_either_side(command, monkeypatch):
    """Stages 2 and 3 start as copies of stage 1, the rest keeps its momentum, resume is exact."""
    recipe = replace(
        RECIPES["tiny"], cascade_iterations=3, eval_every=100, checkpoint_every=1,
        model=RECIPES["tiny"].model | {"box_class_agnostic": True},
    )  # fmt: skip
    monkeypatch.setitem(RECIPES, "tiny", recipe)
    grown = []
    grow = train.grow_to_cascade
    monkeypatch.setattr(
        train, "grow_to_cascade", lambda *a: grown.append((a, grow(*a))) or grown[-1][1]
    )
    assert command("cascade") == 0
    (before, before_optimizer, _), (model, optimizer) = grown.pop()
    old, new = before.state_dict(), model.state_dict()
    assert old.keys() < new.keys()
    momentum = train.momentum_of(before, before_optimizer)
    assert momentum and not any("box_heads.1" in name for name in momentum)

    for stop in ("3", "4"):  # the last step before the switch, and the first after it
        assert command(f"cascade{stop}", "--iterations", stop) == 0
        assert command(f"cascade{stop}", "--resume") == 0
        ours, expected = (
            torch.load(train.checkpoint_path(command.folder / o, STEPS))
            for o in (f"cascade{stop}", "cascade")
        )
        assert ours["model_config"]["cascade"]
        for part in ("model", "momentum"):
            assert same(ours[part], expected[part]), (stop, part)


def test_growing_copies_stage_one_and_keeps_momentum(command):
    recipe = replace(RECIPES["tiny"], model=RECIPES["tiny"].model | {"box_class_agnostic": True})
    model = train.make_model(recipe, 5)
    optimizer = train.make_optimizer(model, recipe)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    grown, grown_optimizer = train.grow_to_cascade(model, optimizer, recipe)
    state = grown.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
        for stage in ("box_heads.1.", "box_heads.2."):
            copy = state[name.replace("box_heads.0.", stage)]
            assert torch.equal(copy, tensor), name
    momentum, kept = train.momentum_of(model, optimizer), train.momentum_of(grown, grown_optimizer)
    assert same(momentum, kept)


def test_resuming_for_fewer_steps_than_there_were_is_no_crash(command):
    assert command("short", "--iterations", "3") == 0
    assert command("short", "--iterations", "2", "--resume") == 2
    assert torch.load(train.checkpoints_in(command.folder / "short")[-1])["iteration"] == 3


@pytest.mark.parametrize("bad", [3, 5])  # before an evaluation without a checkpoint; the last step
def test_a_loss_that_is_not_finite_stops_the_run(command, monkeypatch, capsys, bad):
    losses, evaluation = detector.MaskRCNN.losses, evaluate.evaluate
    ids, evaluated = [], []

    def broken(self, features, sizes, targets):
        result = losses(self, features, sizes, targets)
        ids.append([t["image_id"] for t in targets])
        if len(ids) == bad + 1:
            result["loss_mask"] = result["loss_mask"] * float("nan")
        return result

    def counted(*arguments, **named):
        evaluated.append(len(ids))
        return evaluation(*arguments, **named)

    monkeypatch.setattr(detector.MaskRCNN, "losses", broken)
    monkeypatch.setattr(evaluate, "evaluate", counted)
    assert command(f"nan-{bad}") == 1
    error = capsys.readouterr().err
    assert all(str(int(i)) in error for i in ids[bad]) and f"step {bad} " in error
    for path in train.checkpoints_in(command.folder / f"nan-{bad}"):
        checkpoint = torch.load(path)
        assert checkpoint["iteration"] <= bad
        for part in ("model", "momentum"):
            assert all(value.isfinite().all() for value in checkpoint[part].values())
    assert max(evaluated) <= bad  # nobody waits an hour for the AP of weights that are not numbers


def test_checkpoints_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = train.checkpoint_path(tmp_path, 7)
    train.save_checkpoint(path, {"weights": torch.zeros(3)})

    def dies(*_):
        raise KeyboardInterrupt  # between writing and renaming

    monkeypatch.setattr(train.os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        train.save_checkpoint(path, {"weights": torch.ones(3)})
    monkeypatch.undo()
    assert torch.equal(torch.load(path)["weights"], torch.zeros(3))
    assert train.checkpoints_in(tmp_path) == [path]  # what is half written does not count

    def full(checkpoint, file):
        file.write(b"PK")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.torch, "save", full)
    with pytest.raises(train.Stopped, match="No space left"):
        train.save_checkpoint(path, {"weights": torch.ones(3)})
    assert torch.equal(torch.load(path)["weights"], torch.zeros(3))


# -- The command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--recipe", "r5000"], "r50-gn"),  # the names that there are
        (["--images-per-gpu", "0"], "--images-per-gpu"),
        (["--schedule", "12x"], "11x"),
        (["--norm", "frozen_bn"], "Frozen BN"),
        (["--freeze-at", "2"], "freeze_at 2"),
        (["--recipe", "r50-gn"], "--data"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_bad_use_is_exit_code_2(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = train.main([*arguments])
    except SystemExit as stop:  # argparse's own way
        code = stop.code
    assert code == 2 and says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # refused before anything was made


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
    assert not (command.folder / "bad").exists()


def test_the_plan_is_shown_without_data(capsys):
    assert train.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in RECIPES) and "41.3" in listed
    assert train.main(["--recipe", "r50-gn", "--schedule", "6x", "--dry-run"]) == 0
    plan = capsys.readouterr().out
    for fact in ("540,000 iterations", "480,000", "520,000", "73.7 epochs", "0.002", "16 images"):
        assert fact in plan
