"""tools/plan.py, plot.py, pretrain_toy.py and miniature.py."""

import contextlib
import json
from dataclasses import replace
from unittest import mock

import pytest
import torch
from tiny_run import TINY

import model as detector
import train
from data import UserError
from tools import miniature, plan, plot, pretrain_toy
from tools.toy_coco import make_toy_coco


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    root = tmp_path_factory.mktemp("tools") / "coco"
    make_toy_coco(root, train_images=8, val_images=1)
    return root


# -- The plan of a run -----------------------------------------------------------------------------


def test_the_plan_of_a_run_has_figure_2(capsys):
    plan.main(["--recipe", "r50-gn"])
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:24].strip(): line[24:].split() for line in lines[-3:]}
    # ImageNet: 1.28M images x 100 epochs, 224 x 224 pixels; 6x: 540,000 x 16 images
    assert rows["ImageNet, 100 epochs"] == ["128.0M", "128.0M", "6.42T", "6.42T"]
    assert rows["this run"][0] == "8.6M" and rows["this run"][3] == "9.21T"
    assert "4,320,000 iterations of 2 images" in lines[0] and "--processes 8" in lines[3]


def test_the_plan_times_steps(coco, capsys):
    arguments = ["--recipe", "tiny", "--data", str(coco), "--device", "cpu", "--workers", "0"]
    tiny = replace(TINY, iterations=90, paper="(tests)")
    with mock.patch.dict(train.RECIPES, tiny=tiny):
        plan.main([*arguments, "--steps", "1", "--processes", "4"])
    printed = capsys.readouterr().out
    for part in ("iterations of 8 images", "epochs of 7", "s a step of 2 images"):
        assert part in printed
    with pytest.raises(UserError, match="frozen BN"):  # as train.py refuses it
        plan.main([*arguments[2:], "--norm", "frozen_bn"])


# -- Curves ----------------------------------------------------------------------------------------

STEP = {"iteration": 1, "lr": 0.1, "loss": 2.0}
EVALUATION = {"iteration": 2, "bbox": {"AP": 3.0, "AP50": None}}


def write_log(folder, *records, end=""):
    folder.mkdir()
    (folder / "log.jsonl").write_text("\n".join([*map(json.dumps, records), end]))
    return folder


def test_curves_of_several_runs(tmp_path):
    pytest.importorskip("matplotlib")
    whole = write_log(tmp_path / "whole", STEP, EVALUATION)
    killed = write_log(tmp_path / "killed", STEP, end='{"iteration": 2, "lo')
    assert plot.read_log(killed) == [STEP]
    plot.main([str(whole), str(killed), "--out", str(tmp_path / "curves.svg")])
    assert "whole" in (tmp_path / "curves.svg").read_text()


# -- The toy's pre-training, and the paper in miniature --------------------------------------------


def test_pre_training_gives_a_backbone_to_start_from(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain_toy, "RECIPE", replace(pretrain_toy.RECIPE, batch_size=4))
    monkeypatch.setattr(pretrain_toy, "HELD_OUT", 4)
    out = ["--out", str(tmp_path), "--workers", "0", "--device", "cpu", "--iterations", "2"]
    pretrain_toy.main(out)
    assert "Accuracy on 4 other shapes" in capsys.readouterr().out
    path = tmp_path / "checkpoint_0000002.pth"
    saved = detector.read_checkpoint(path)["weights"]
    model = detector.build_model(num_classes=5, **train.TOY.settings)
    told = detector.load_weights(model, path)
    assert "rpn.conv" in told and "backbone" not in told.partition("left as they were")[2]
    assert all(torch.equal(model.state_dict()[name], saved[name]) for name in saved)
    with pytest.raises(UserError):  # never over another one
        pretrain_toy.main(out)


def test_the_runs_of_the_miniature_can_be_started_and_are_listed(tmp_path):
    for name, (_, arguments, _) in miniature.RUNS.items():
        args = train.parse_arguments(arguments.format(backbone="b.pth").split())
        with pytest.raises(UserError) if "frozen" in name else contextlib.nullcontext():
            train.check(train.make_recipe(args), args)
    for seed, ap in enumerate((60.0, None)):
        records = STEP, {"iteration": 9, "bbox": {"AP": ap}, "segm": {"AP": 61.0}}
        folder = write_log(tmp_path / f"bn-5x-seed{seed}", *records)
        (folder / "seconds.json").write_text("90")
    row = miniature.format_table(tmp_path).splitlines()[-1]
    assert row == "| bn-5x | 9 | 60.0, - | - | 61.0, 61.0 | 61.0 | 1.5 |"
