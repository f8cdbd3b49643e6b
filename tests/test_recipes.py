"""Every experiment of the paper: its schedule by hand, its full model, and a run in miniature."""

import json
import math
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from tiny_run import NARROW

import model as detector
import train
from tools.toy_coco import make_toy_coco

PAPER = [name for name, recipe in train.RECIPES.items() if not recipe.paper.startswith("(")]

# -- Schedules, worked out by hand from the paper ------------------------------------------------

GN = ("r50-gn", "r101-gn", "r50-syncbn")
ENHANCED = [name for name in PAPER if "-aug" in name]  # "train aug", with and without a cascade

# recipes, init, schedule: total, first drop, second drop, rate before, factor of a drop
BY_HAND = [
    (GN, "random", "2x", 180_000, 120_000, 160_000, 0.02, 0.1),
    (GN, "random", "3x", 270_000, 210_000, 250_000, 0.02, 0.1),
    (GN, "random", "4x", 360_000, 300_000, 340_000, 0.02, 0.1),
    (GN, "random", "5x", 450_000, 390_000, 430_000, 0.02, 0.1),
    (GN, "random", None, 540_000, 480_000, 520_000, 0.02, 0.1),
    (GN, "file", None, 180_000, 120_000, 160_000, 0.02, 0.1),
    (ENHANCED, "random", None, 810_000, 750_000, 790_000, 0.02, 0.1),
    (ENHANCED, "file", None, 540_000, 480_000, 520_000, 0.02, 0.1),
    (["r50-gn-keypoints"], "random", None, 180_000, 120_000, 160_000, 0.02, 0.1),
    (["r50-gn-keypoints"], "random", "3x", 270_000, 210_000, 250_000, 0.02, 0.1),
    (["r50-gn-keypoints"], "file", None, 180_000, 120_000, 160_000, 0.02, 0.1),
    (["vgg16"], "random", None, 990_000, 930_000, 970_000, 0.02, 0.1),
    (["vgg16"], "file", None, 810_000, 750_000, 790_000, 0.02, 0.1),
    (["r50-gn-35k"], "random", None, 810_000, 750_000, 790_000, 0.04, 0.02),
    (["r50-gn-35k"], "file", None, 540_000, 480_000, 520_000, 0.04, 0.02),
    # 220,000 / 9 = 24,444 and / 27 = 8,148 before the end, rounded; the others likewise
    (["r50-gn-10k"], "random", None, 220_000, 195_556, 211_852, 0.04, 0.02),
    (["r50-gn-10k"], "file", None, 60_000, 53_333, 57_778, 0.04, 0.02),
    (["r50-gn-3.5k"], "random", None, 100_000, 88_889, 96_296, 0.04, 0.02),
    (["r50-gn-3.5k"], "file", None, 30_000, 26_667, 28_889, 0.04, 0.02),
    (["r50-gn-1k"], "random", None, 40_000, 35_556, 38_519, 0.04, 0.02),
    (["r50-gn-1k"], "file", None, 10_000, 8_889, 9_630, 0.04, 0.02),
    (["r101-gn-voc"], "random", None, 144_000, 128_000, 138_667, 0.02, 0.1),
    (["r101-gn-voc"], "file", None, 18_000, 16_000, 17_333, 0.02, 0.1),
]


def recipe_of(name, init="random", schedule=None, *more):
    arguments = ["--recipe", name, "--init", init, *more]
    if schedule:
        arguments += ["--schedule", schedule]
    args = train.parse_arguments(arguments)
    recipe = train.make_recipe(args)
    train.check(recipe, args)  # the table's own rows are not refused
    return recipe


@pytest.mark.parametrize("names, init, schedule, total, first, second, rate, factor", BY_HAND)
def test_rates_are_those_of_the_paper(names, init, schedule, total, first, second, rate, factor):
    expected = {0: rate / 3, 250: rate * 2 / 3, 499: rate * (1 - 2 / 3 / 500), 500: rate}
    expected |= {first - 1: rate, first: rate * factor, second - 1: rate * factor}
    expected |= {second: rate * factor**2, total - 1: rate * factor**2}
    for name in names:
        recipe = recipe_of(name, init, schedule)
        assert (recipe.iterations, recipe.batch_size) == (total, 16)
        assert recipe.freeze_at == (0 if init == "random" else 2)
        found = {iteration: train.learning_rate(iteration, recipe) for iteration in expected}
        assert found == pytest.approx(expected, rel=1e-12)


def test_every_recipe_is_in_the_table_by_hand_and_listed(capsys):
    for init in ("random", "file"):
        assert {n for names, its_init, *_ in BY_HAND for n in names if its_init == init} == {*PAPER}
    train.main(["--list"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in train.RECIPES) and "41.3" in listed


def test_linear_scaling_keeps_the_number_of_images():
    # Detectron2's 9x models: batch 64, lr 0.08, 202,500 iterations, drops 15,000 and 5,000 before
    large = train.scale_to_batch(recipe_of("r50-gn-aug"), 64)
    assert (large.iterations, large.tails, large.learning_rate) == (202_500, (15_000, 5_000), 0.08)
    assert large.warmup_iterations == 500  # kept for larger batches
    one_gpu = train.scale_to_batch(recipe_of("r50-gn"), 2)
    assert (one_gpu.iterations, one_gpu.tails) == (4_320_000, (480_000, 160_000))
    assert (one_gpu.learning_rate, one_gpu.warmup_iterations) == (0.0025, 4000)
    ninths = train.scale_to_batch(recipe_of("r50-gn-10k"), 8)
    assert (ninths.iterations, ninths.drops) == (440_000, [391_111, 423_704])
    # --learning-rate is that of the recipe's batch, as the paper's is
    own = recipe_of("r50-gn", "random", None, "--learning-rate", "0.01")
    assert own.learning_rate == 0.01
    assert train.scale_to_batch(own, 8).learning_rate == pytest.approx(0.005)


def test_cascades_subsets_and_sizes():
    recipes = {name: recipe_of(name) for name in PAPER}
    cascades = [name for name, recipe in recipes.items() if recipe.cascade_iterations]
    assert cascades == [name for name in PAPER if name.endswith("-cascade")] and len(cascades) == 3
    for name in cascades:  # the last 270k of 810k
        assert recipes[name].cascade_start == recipes[name].first_change == 540_000
    assert recipes["r50-gn"].cascade_start == 540_000  # never: the end
    sizes = {"r50-gn-35k": 35_000, "r50-gn-10k": 10_000, "r50-gn-3.5k": 3500, "r50-gn-1k": 1000}
    assert {name: r.subset for name, r in recipes.items() if r.subset} == sizes
    assert recipes["r50-gn"].min_sizes == (800,)
    assert recipes["r50-gn-aug"].min_sizes == (640, 672, 704, 736, 768, 800)
    for name in sizes:
        assert recipes[name].min_sizes == (512, 544, 576, 608, 640, 672, 704, 736, 768, 800)


# -- Every model in full size, without memory for it ---------------------------------------------


def on_meta(build, *arguments, **named):
    with torch.device("meta"), mock.patch.object(detector, "initialize"):
        return build(*arguments, **named)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


# As counted in Detectron2's models of the same configuration. (r50-gn is its
# scratch_mask_rcnn_R_50_FPN_3x_gn.) Frozen BN has no parameters.
@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"norm": "gn"}, 45_711_152),
        ({"norm": "syncbn"}, 45_711_152),
        ({"norm": "frozen_bn"}, 44_343_216),
        ({"norm": "frozen_bn", "backbone": "resnet101"}, 63_283_120),
        ({"norm": "frozen_bn", "backbone": "resnext101_32x8d"}, 107_427_760),
        ({"norm": "frozen_bn", "masks": False, "keypoints": 17, "num_classes": 1}, 59_133_158),
        ({"norm": "frozen_bn", "cascade": True}, 71_984_926),
    ],
)
def test_parameters_equal_detectron2s(settings, expected):
    assert parameters(on_meta(detector.build_model, **settings)) == expected


@pytest.mark.parametrize("name", [name for name in PAPER if not train.RECIPES[name].subset])
def test_full_models_give_the_right_shapes(name, monkeypatch):
    monkeypatch.setattr(train, "make_optimizer", lambda *_: None)
    classes = SimpleNamespace(classes=["thing"] * 80, category_ids=[*range(80)])
    run = train.RECIPES[name], train.parse_arguments(["--recipe", name]), None, classes
    net, _ = on_meta(train.start_model, *run, torch.device("meta"))
    levels = net.features(torch.zeros(1, 3, 800, 1216, device="meta"))
    if name == "vgg16":
        assert [tuple(x.shape) for x in levels] == [(1, 512, 50, 76)]
    else:
        shapes = [(1, 256, 800 // s, 1216 // s) for s in (4, 8, 16, 32)] + [(1, 256, 13, 19)]
        assert [tuple(x.shape) for x in levels] == shapes
    rois = torch.zeros(3, levels[0].shape[1], 7, 7, device="meta")
    logits, deltas = net.box_heads[-1](rois)
    assert logits.shape == (3, 81) and deltas.shape == (3, 1 if "cascade" in name else 80, 4)
    assert (net.mask_head is None) == (name in ("vgg16", "r101-gn-voc", "r50-gn-keypoints"))
    assert (net.keypoint_head is not None) == (name == "r50-gn-keypoints")
    if net.keypoint_head:
        assert net.keypoint_head(rois.new_zeros(3, 256, 14, 14)).shape == (3, 17, 56, 56)
    # Without a norm that rescales what comes, the images are divided by their deviation.
    std = (58.395 / 255, 57.12 / 255, 57.375 / 255) if name == "vgg16" else (1 / 255,) * 3
    assert net.config.image_std == pytest.approx(std)


# -- Every recipe in miniature -------------------------------------------------------------------


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """Two folders: generated data, and what tools/to_coco.py makes of VOC."""
    coco = tmp_path_factory.mktemp("recipes") / "coco"
    make_toy_coco(coco, train_images=12, val_images=2)
    voc = shutil.copytree(coco, coco.parent / "voc")
    for file in voc.glob("annotations/instances_*.json"):
        content = json.loads(file.read_text())
        for annotation in content["annotations"]:
            del annotation["segmentation"]
            annotation["difficult"] = annotation.pop("iscrowd")
        file.write_text(json.dumps(content))
    return coco, voc


def run(name, data, out, *arguments):
    """The log's records of steps, whose losses are finite, and its last record."""
    fixed = ["--recipe", name, "--data", str(data), "--out", str(out), "--device", "cpu"]
    train.main([*fixed, "--workers", "0", *arguments])
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert all(math.isfinite(record["loss"]) for record in steps)
    return steps, records[-1]


def miniatures():
    """All recipes; `long` are those whose miniature is the same model as that of one before."""
    models = set()
    for name, r in train.RECIPES.items():
        model = r.backbone[:6], r.norm, r.masks, r.keypoints, r.cascade_iterations > 0
        yield pytest.param(name, marks=[pytest.mark.long] if model in models else [])
        models.add(model)


@pytest.mark.parametrize("name", [*miniatures()])
def test_recipe_in_miniature(name, generated, tmp_path, monkeypatch):
    """Starts, steps through both drops (and the cascade switch), evaluates and finishes."""
    recipe = train.RECIPES[name]
    is_voc, is_cascade = name == "r101-gn-voc", bool(recipe.cascade_iterations)
    small = {"vgg16": {"stem_width": 8, "box_head_convs": 0}}
    small["resnext152_8x32d"] = {"width_per_group": 4}
    small = NARROW | small.get(recipe.backbone, {})
    miniature = replace(
        recipe, settings=recipe.settings | small, iterations=3, tails=(2, 1), warmup_iterations=1,
        cascade_iterations=recipe.cascade_iterations and 2, subset=recipe.subset and 6,
        batch_size=2, images_per_gpu=2, eval_every=3, log_every=1, test_size=64,
        min_sizes=tuple(size * 64 // recipe.test_size for size in recipe.min_sizes),
        max_size=recipe.max_size * 64 // recipe.test_size,
    )  # fmt: skip
    monkeypatch.setitem(train.RECIPES, name, miniature)
    steps, metrics = run(name, generated[is_voc], tmp_path)
    assert [record["iteration"] for record in steps] == [1, 2, 3]
    assert ["loss_classifier_3" in record for record in steps] == [False, is_cascade, is_cascade]
    kinds = {"voc" if is_voc else "bbox": True, "segm": recipe.masks, "keypoints": recipe.keypoints}
    assert metrics.keys() == {"iteration"} | {kind for kind, is_there in kinds.items() if is_there}
    saved = detector.read_checkpoint(tmp_path / "checkpoint_0000003.pth")
    assert saved["config"]["cascade"] == is_cascade


@pytest.mark.long
@pytest.mark.parametrize("name", PAPER)
def test_recipe_at_full_width(name, tmp_path, monkeypatch):
    """On real images: depth, widths, rates and warm-up are the recipe's.

    Images are smaller, and RoIs are fewer. Random predictions have the losses that they must have.
    """
    root = os.environ.get("COCO_DIR")
    if not root:
        pytest.skip("COCO_DIR, a folder with COCO images, is not set")
    recipe = train.RECIPES[name]
    fewer = {"box_batch_size_per_image": 32, "rpn_post_nms_top_n_train": 200}
    reduced = replace(
        recipe, settings=recipe.settings | fewer, batch_size=2, images_per_gpu=2, log_every=1,
        min_sizes=tuple(size // 5 for size in recipe.min_sizes), max_size=recipe.max_size // 5,
        cascade_iterations=recipe.cascade_iterations and recipe.iterations - 1, subset=None,
    )  # fmt: skip
    monkeypatch.setitem(train.RECIPES, name, reduced)
    for skipped in ("evaluate_and_log", "save_checkpoint", "show_results"):
        monkeypatch.setattr(train, skipped, lambda *_: None)
    steps, _ = run(name, root, tmp_path, "--stop-after", "3")
    assert len(steps) == 3
    assert ("loss_classifier_3" in steps[-1]) == bool(recipe.cascade_iterations)
    first, classes = steps[0], 1 if recipe.keypoints else 80
    assert first["loss_classifier"] == pytest.approx(math.log(classes + 1), rel=0.1)
    assert first["loss_objectness"] == pytest.approx(math.log(2), rel=0.1)
