"""tools/plan.py, tools/plot.py and tools/pretrain_toy.py."""

import json
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
from tiny_run import TINY

import train
from data import UserError
from tools import plot, pretrain_toy
from tools.toy_coco import make_toy_coco


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    root = tmp_path_factory.mktemp("tools") / "coco"
    make_toy_coco(root, train_images=8, val_images=4)
    return root


# -- The plan of a run ---------------------------------------------------------------------------


def test_the_plan_of_a_run_has_figure_2(monkeypatch, capsys):
    assert train.main(["--recipe", "r50-gn", "--dry-run"]) == 0
    plan = capsys.readouterr().out.splitlines()
    rows = {line[:24].strip(): line[24:].split() for line in plan[-3:]}
    # ImageNet: 1.28M images x 100 epochs, 224 x 224 pixels; 6x: 540,000 x 16 images
    assert rows["ImageNet, 100 epochs"] == ["128.0M", "128.0M", "6.42T", "6.42T"]
    assert rows["this run"][0] == "8.6M" and rows["this run"][3] == "9.21T"
    # one process, unless WORLD_SIZE says otherwise
    assert "4,320,000 iterations of 2 images" in plan[0] and "takes 8 process(es)" in plan[3]
    monkeypatch.setenv("WORLD_SIZE", "eight")
    assert train.main(["--recipe", "r50-gn", "--dry-run"]) == 2


@pytest.mark.parametrize("processes, batch, time", [(1, 2, "2 images on"), (4, 8, "4 processes")])
def test_the_plan_times_steps(coco, monkeypatch, capsys, processes, batch, time):
    monkeypatch.setitem(train.RECIPES, "tiny", TINY)
    monkeypatch.setenv("WORLD_SIZE", str(processes))  # without torchrun's other variables
    arguments = ["--recipe", "tiny", "--data", str(coco), "--device", "cpu", "--workers", "0"]
    assert train.main([*arguments, "--dry-run", "2"]) == 0
    printed = capsys.readouterr().out
    assert "epochs of 7 images" in printed and f"iterations of {batch} images" in printed
    assert "s a step of 2 images" in printed and time in printed


def test_fine_tuning_some_hundred_images_is_planned_by_images_seen(coco, monkeypatch, capsys):
    """240 images, and as few as 24."""
    for images in (24, 240):
        monkeypatch.setattr(train.data.CocoDataset, "__len__", lambda _, images=images: images)
        for more in ([], ["--init", "d2.pth"], ["--init", "d2.pth", "--no-masks"]):
            code = train.main(["--recipe", "finetune", "--data", str(coco), "--dry-run", *more])
            assert code == 0, capsys.readouterr().err
    assert "12,000 iterations of 2 images: 100.0 epochs of 240" in capsys.readouterr().out


# -- Curves --------------------------------------------------------------------------------------


def write_log(folder, *lines):
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder


STEP = json.dumps({"iteration": 1, "lr": 0.1, "loss": 2.0}).encode()
EVALUATION = json.dumps({"iteration": 2, "bbox": {"AP": 3.0, "AP50": None}}).encode()


def test_curves_of_several_runs(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    whole = write_log(tmp_path / "whole", STEP, EVALUATION)
    killed = write_log(tmp_path / "killed", STEP, b'{"iteration": 2, "lo')
    for name in ("curves.png", "curves.svg"):
        assert plot.main([str(whole), str(killed), "--out", str(tmp_path / name)]) in (None, 0)
        assert (tmp_path / name).stat().st_size > 1000
    assert "whole" in (tmp_path / "curves.svg").read_text()


def test_losses_are_smoothed_over_iterations_and_branches_start_at_their_trunk(tmp_path):
    pytest.importorskip("matplotlib")
    points = [(10, 1.0), (20, 3.0), (40, 5.0)]
    assert plot.smooth(points, 20) == [(10, 1.0), (20, 2.0), (40, 5.0)]
    trunk = write_log(tmp_path / "run-6x", STEP, EVALUATION)
    later = [line.replace(b'"iteration": ', b'"iteration": 1') for line in (STEP, EVALUATION)]
    branch = write_log(tmp_path / "run-2x", *later)
    with mock.patch("matplotlib.axes.Axes.plot") as drawn:
        plot.plot([trunk, branch], tmp_path / "curves.png")
    curves = [call.args for call in drawn.call_args_list]
    assert [(x, line) for x, _, line in curves] == [
        ((2,), "-"), ((1.0,), "-"), ((2, 12), "--"), ((1.0, 11.0), "--"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe\x00",
        b"[1, 2]",
        b"[" * 100_000,
        b'{"iteration": 1e400, "loss": 1}',
        b'{"iteration": "1", "loss": 1.0}',
        b'{"iteration": 3, "loss": "low"}',
        b'{"iteration": 3, "bbox": 7}',
        b'{"iteration": 3, "bbox": {"AP": []}}',
        b'{"loss": 1.0}',
    ],
)
def test_a_broken_log_is_drawn_without_its_broken_lines(tmp_path, capsys, line):
    pytest.importorskip("matplotlib")
    run = write_log(tmp_path / "run", STEP, line, EVALUATION)
    assert plot.read_log(run) == [json.loads(STEP), json.loads(EVALUATION)]
    assert "log.jsonl" in capsys.readouterr().out
    plot.plot([run], tmp_path / "curves.png")


def test_what_cannot_be_drawn_is_one_sentence(tmp_path, monkeypatch):
    empty = write_log(tmp_path / "empty")
    for runs, output, code in [
        ([tmp_path / "nothing"], "curves.png", 1),
        ([empty], "curves.png", 1),
        ([empty], "curves.txt", 2),
    ]:
        with pytest.raises(UserError) as caught:
            plot.plot(runs, tmp_path / output)
        assert caught.value.code == code
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot.plot([write_log(tmp_path / "run", STEP)], tmp_path / "curves.png")


# -- The toy's pre-training ----------------------------------------------------------------------


@pytest.fixture
def small_pretraining(monkeypatch):
    small = replace(pretrain_toy.RECIPE, batch_size=4, images_per_gpu=4, log_every=1)
    monkeypatch.setattr(pretrain_toy, "RECIPE", small)
    monkeypatch.setattr(pretrain_toy, "HELD_OUT", 8)
    return ["--workers", "0", "--device", "cpu", "--iterations", "3"]


def test_pre_training_gives_a_backbone_to_fine_tune(coco, tmp_path, small_pretraining, capsys):
    out = ["--out", str(tmp_path / "pre")]
    pretrain_toy.main([*small_pretraining, *out])
    assert "Accuracy on 8 other shapes" in capsys.readouterr().out
    weights = tmp_path / "pre" / "checkpoint_0000003.pth"
    fixed = ["--data", str(coco), "--device", "cpu", "--workers", "0"]
    tuned = ["--init", str(weights), "--out", str(tmp_path / "tuned"), "--iterations", "1"]
    assert train.main([*fixed, *tuned]) == 0
    told = capsys.readouterr().out
    assert "left as they were" in told and "2 stages frozen" in told
    before = torch.load(weights, weights_only=True)["weights"]
    after = torch.load(tmp_path / "tuned" / "checkpoint_0000001.pth")["weights"]
    assert all(n.startswith(("backbone.", "image_")) for n in before)
    assert all(torch.equal(before[n], after[n]) for n in before if "stem" in n or "res2" in n)
    trained = "backbone.res5.0.conv1.conv.weight"
    assert not torch.equal(before[trained], after[trained])
    with pytest.raises(UserError):  # never over another one
        pretrain_toy.main([*small_pretraining, *out])
    # a backbone is to start from, and no trunk
    trunk = ["--from", str(tmp_path / "pre"), "--out", str(tmp_path / "branch")]
    capsys.readouterr()
    assert train.main([*fixed, *trunk]) == 1
    assert "--init" in capsys.readouterr().err


def test_weights_of_a_loss_that_is_not_finite_are_not_saved(
    tmp_path, small_pretraining, monkeypatch
):
    small = replace(pretrain_toy.RECIPE, learning_rate=1e20, warmup_iterations=0)
    monkeypatch.setattr(pretrain_toy, "RECIPE", small)
    with pytest.raises(UserError):
        pretrain_toy.main([*small_pretraining, "--out", str(tmp_path / "nan")])
    assert not list(tmp_path.glob("nan/*"))
