"""look_inside.py: a picture of every step for every kind of model, and what the pictures show."""

import re

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_run import NARROW

import model as detector
from tools import look_inside
from tools.toy_coco import make_toy_coco

EVERY = [step.__name__ for step in look_inside.STEPS]
VGG = {"backbone": "vgg16", "norm": "none", "stem_width": 8, "box_head_convs": 0, "masks": False}
KINDS = {  # arguments of build_model, and the steps that have no picture
    "masks": ({}, {"keypoints"}),
    "cascade": ({"cascade": True, "keypoints": 17, "masks": False}, {"masks"}),
    "vgg": (VGG, {"masks", "keypoints"}),
    "nothing found": ({"box_score_thresh": 0.99}, {"masks", "keypoints", "refinement"}),
}


def make_model(sure=True, **arguments):
    """A small model with random weights that is sure of one class everywhere."""
    torch.manual_seed(0)
    narrow = {k: v for k, v in NARROW.items() if "box_" in k or "backbone" not in arguments}
    settings = {"num_classes": 5, "roi_sampling_ratio": 0} | narrow | arguments
    model = detector.build_model(**settings).eval()
    for head in model.box_heads:
        torch.nn.init.normal_(head.regressor.weight, std=0.1)
        head.classifier.bias.data[1] = 5.0 * sure
    model.data_settings |= {"min_size": 96, "max_size": 160}
    return model


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "toy"
    make_toy_coco(folder, 1, 2)
    return folder


def look(model, image, folder, *more):
    detector.save_model(model, folder / "a.pth")
    options = ["--weights", folder / "a.pth", "--image", image, "--out", folder, *more]
    look_inside.main([str(option) for option in options])


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_has_a_picture(tmp_path, toy, monkeypatch, kind):
    monkeypatch.setattr(Image.Image, "quantize", lambda picture, _: picture.convert("L"))  # fast
    arguments, absent = KINDS[kind]
    more = [] if kind == "nothing found" else ["--data", toy]
    image = sorted((toy / "val2017").iterdir())[0]
    look(make_model(kind != "nothing found", **arguments), image, tmp_path, *more)
    page = (tmp_path / "index.md").read_text()
    # The object in numbers: the first row is the object itself, whose IoU is 1.
    assert re.findall(r"\| the object: .* \| (.*) \|  \|", page) == ["1.00"] * bool(more)
    shown = re.findall(r"!\[.*\]\((\w+)\.png\)", page)
    absent = absent | (set() if more else {"training", "box_coding"})
    assert shown == [name for name in EVERY if name not in absent]
    for name in shown:
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 100 and len(picture.getcolors(10**6)) > 2, name


@pytest.mark.parametrize("ratio", [0, 2])
def test_sampling_points_are_those_of_roi_align(ratio):
    """The mean of a level, interpolated at a bin's points, is what the model pools."""
    model = make_model(roi_sampling_ratio=ratio)
    levels = [torch.randn(1, 4, 160 // stride, 160 // stride) for stride in (4, 8, 16, 32, 64)]
    box = torch.tensor([21.0, 35.0, 93.0, 71.0])
    pooled = model.pool(levels, [box[None]], 7)[0]
    points, (nx, ny) = look_inside.sampling_points(box, 7, ratio, 4)
    assert (nx, ny) == (ratio or 3, ratio or 2)
    grid = (points / 160 * 2 - 1).view(1, 7 * nx, 7 * ny, 2)
    values = F.grid_sample(levels[0], grid, align_corners=False)[0]  # [4, 7 nx, 7 ny]
    means = F.avg_pool2d(values, (nx, ny)).transpose(1, 2)
    torch.testing.assert_close(means, pooled, rtol=1e-4, atol=1e-4)
