"""look_inside.py: a picture of every step for every kind of model, and what the pictures show."""

import re

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_run import NARROW

import evaluate
import model as detector
from tools import look_inside
from tools.toy_coco import make_toy_coco

EVERY = {step.__name__ for step in look_inside.STEPS}
KINDS = {
    "masks": ({}, EVERY - {"keypoints"}),
    "cascade": ({"cascade": True}, EVERY - {"keypoints"}),
    "keypoints": ({"keypoints": 17, "masks": False, "num_classes": 1}, EVERY - {"masks"}),
    "vgg": (
        {"backbone": "vgg16", "norm": "none", "masks": False, "stem_width": 8, "box_head_convs": 0},
        EVERY - {"masks", "keypoints"},
    ),
    "nothing found": ({"box_score_thresh": 0.99}, EVERY - {"masks", "keypoints", "refinement"}),
}


def make_model(sure=True, **arguments):
    """A small model with random weights that is sure of one class everywhere."""
    torch.manual_seed(0)
    narrow = {k: v for k, v in NARROW.items() if arguments.get("backbone") is None or "box_" in k}
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
    make_toy_coco(folder, 2, 2)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_has_a_picture(tmp_path, toy, kind):
    arguments, expected = KINDS[kind]
    detector.save_model(make_model(kind != "nothing found", **arguments), tmp_path / "a.pth")
    image = sorted((toy / "val2017").iterdir())[0]
    options = ["--weights", tmp_path / "a.pth", "--image", image, "--out", tmp_path / "out"]
    for more in ([], ["--data", toy]):
        look_inside.main([str(option) for option in options + more])
        page = (tmp_path / "out" / "index.md").read_text()
        shown = re.findall(r"!\[.*\]\((\w+)\.png\)", page)
        assert set(shown) == expected - (set() if more else {"training"})
        assert shown == [s.__name__ for s in look_inside.STEPS if s.__name__ in shown]
        for name in shown:
            with Image.open(tmp_path / "out" / f"{name}.png") as picture:
                colors = len(picture.convert("RGB").getcolors(10**6))
                assert min(picture.size) > 100 and colors > 2, name


def test_an_image_that_is_not_in_the_data(tmp_path, toy, capsys):
    detector.save_model(make_model(), tmp_path / "a.pth")
    Image.new("RGB", (80, 60)).save(tmp_path / "other.png")
    options = ["--weights", tmp_path / "a.pth", "--image", tmp_path / "other.png"]
    options += ["--out", tmp_path / "out", "--data", toy]
    command = ["look_inside.py", look_inside.main, [str(option) for option in options]]
    assert evaluate.run_command(*command) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "other.png" in said


@pytest.mark.parametrize("cascade", [False, True])
def test_detections_are_those_of_the_model_and_come_from_their_proposals(cascade):
    model = make_model(cascade=cascade)
    image = torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8)
    with torch.no_grad():
        seen = look_inside.run(model, image, None)
        [expected] = model([image])
        assert len(expected["boxes"]) and seen.found.keys() == expected.keys()
        assert all(torch.equal(seen.found[name], expected[name]) for name in expected)
        # the arrows: what the heads make of these proposals alone
        rois = seen.proposals[seen.origin][None]
        valid = torch.ones(1, len(seen.origin), dtype=torch.bool)
        [(_, boxes)] = model.box_predictions(seen.levels, rois, valid, seen.sizes)
    boxes = boxes.expand(-1, 5, -1)[torch.arange(len(seen.labels)), seen.labels - 1]
    torch.testing.assert_close(boxes, seen.boxes, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("ratio", [0, 2])
def test_sampling_points_are_those_of_roi_align(ratio):
    """The mean of a level, interpolated at a bin's points, is what the model pools."""
    model = make_model(roi_sampling_ratio=ratio)
    levels = [torch.randn(1, 4, 160 // stride, 160 // stride) for stride in (4, 8, 16, 32, 64)]
    box = torch.tensor([21.0, 35.0, 93.0, 71.0])
    pooled = model.pool(levels, F.pad(box, (1, 0))[None], 7)[0]
    points, (nx, ny) = look_inside.sampling_points(box, 7, ratio, 4)
    assert (nx, ny) == (ratio or 3, ratio or 2)
    grid = (points / 160 * 2 - 1).view(1, 7 * nx, 7 * ny, 2)
    values = F.grid_sample(levels[0], grid, align_corners=False)[0]  # [4, 7 nx, 7 ny]
    means = F.avg_pool2d(values, (nx, ny)).transpose(1, 2)
    torch.testing.assert_close(means, pooled, rtol=1e-4, atol=1e-4)
