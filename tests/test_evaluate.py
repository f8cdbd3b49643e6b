"""evaluate.py against formulas, pycocotools and numbers worked by hand."""

import contextlib
import functools
import io
import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_norms import run_processes
from tiny_run import NARROW
from torch import nn

import data
import evaluate
import model as detector
from data import UserError

CLASSES = {3: "disc", 7: "bar"}


# -- Models without weights, whose detections are known --------------------------------------------


class Oracle(nn.Module):
    """Stands in for MaskRCNN: returns given detections, found by the first pixel of the image."""

    def __init__(self, detections, masks=True, keypoints=0, classes=("disc", "bar")):
        super().__init__()
        self.image_mean = torch.zeros(1)
        self.config = SimpleNamespace(num_classes=len(classes), masks=masks, keypoints=keypoints)
        self.data_settings = {"min_size": 96, "max_size": 200, "classes": list(classes)}
        self.calls = 0
        self.detections = detections  # first pixel's red value -> detections at full size

    def forward(self, images):
        assert not self.training and not torch.is_grad_enabled()
        self.calls += 1
        [image] = images
        found = dict(self.detections[int(image[0, 0, 0])])
        scale = image.shape[2] / found.pop("width")
        return [found | {"boxes": found["boxes"] * scale}]


RECTANGLES = [  # image, category, x, y, w, h, crowd; with whole multiples of a mask's 28 pixels
    (10, 3, 4, 5, 28, 28, 0),
    (10, 7, 40, 20, 56, 28, 0),
    (30, 7, 0, 0, 28, 56, 0),
    (30, 3, 30, 10, 56, 56, 1),
    (40, 3, 60, 40, 56, 28, 0),
    (40, 3, 1, 2, 28, 28, 0),
    (40, 7, 33, 50, 28, 28, 0),
]


def tiny_coco(root, first_id=1, split="val2017"):
    """Four images with RECTANGLES as COCO's files, and exact detections of each image."""
    images, annotations, detections = [], [], {}
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    for image_id in (10, 20, 30, 40):
        image = {"id": image_id, "file_name": f"{image_id}.png", "width": 120, "height": 96}
        Image.new("RGB", (120, 96), (image_id,) * 3).save(root / split / image["file_name"])
        images.append(image)
        rows = torch.tensor([r for r in RECTANGLES if r[0] == image_id and not r[-1]]).view(-1, 7)
        detections[image_id] = {
            "boxes": torch.cat([rows[:, 2:4], rows[:, 2:4] + rows[:, 4:6]], dim=1).float(),
            "labels": (rows[:, 1] == 7).long() + 1,
            "scores": torch.linspace(0.9, 0.6, len(rows)),
            "masks": torch.ones(len(rows), 28, 28),
            "width": 120,
        }
    for number, (image_id, category, x, y, w, h, crowd) in enumerate(RECTANGLES, first_id):
        shape = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        if crowd:
            [rle] = coco_mask.frPyObjects(shape, 96, 120)
            shape = rle | {"counts": rle["counts"].decode()}
        one = {"id": number, "image_id": image_id, "category_id": category, "iscrowd": crowd}
        annotations.append(one | {"bbox": [x, y, w, h], "area": w * h, "segmentation": shape})
    categories = [{"id": k, "name": name} for k, name in CLASSES.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return detections


def imperfect(detections):
    """The same with boxes moved, a hole in the masks, other scores and a wrong class."""
    generator = torch.Generator().manual_seed(5)
    for found in detections.values():
        moved = found["boxes"] + 10 * torch.rand(found["boxes"].shape, generator=generator) - 5
        found["boxes"] = moved.clamp(min=0)
        found["masks"][:, 10:18, 5:20] = 0
        found["scores"] = torch.rand(len(moved), generator=generator)
    detections[40]["labels"][2] = 1
    return detections


def first(found, count):
    """The first of an image's detections."""
    return {name: value if name == "width" else value[:count] for name, value in found.items()}


def open_tiny(root):
    return data.open_split(root, "val2017")


def pycocotools_numbers(annotations, results, kind):
    """What pycocotools says of two files: AP, AP50, AP75, ..."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        scorer = COCOeval(truth, truth.loadRes(str(results)), kind)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    numbers = scorer.stats[: 5 if kind == "keypoints" else 6]
    return [None if number == -1 else 100 * number for number in numbers]


# -- COCO's metrics --------------------------------------------------------------------------------


@pytest.mark.parametrize("first_id", [1, 0])
def test_perfect_detections_have_ap_100(tmp_path, first_id):
    """Whatever the annotations' ids are: pycocotools takes 0 for "not matched"."""
    model = Oracle(tiny_coco(tmp_path, first_id)).train()
    metrics = evaluate.evaluate(model, open_tiny(tmp_path), workers=0)
    for kind in ("bbox", "segm"):
        assert metrics[kind]["per_class"] == pytest.approx({"disc": 100, "bar": 100})
        assert metrics[kind]["AP"] == pytest.approx(100) and metrics[kind]["APl"] is None
    assert model.training  # as it was before


def test_metrics_are_those_of_the_written_files(tmp_path):
    model = Oracle(imperfect(tiny_coco(tmp_path)))
    dataset = open_tiny(tmp_path)
    metrics = evaluate.evaluate(model, dataset, tmp_path / "out", workers=2)
    for kind in ("bbox", "segm"):
        file = tmp_path / "out" / f"results_{kind}.json"
        *numbers, per_class = metrics[kind].values()
        assert numbers == pycocotools_numbers(dataset.annotation_file, file, kind)
        assert 5 < numbers[0] < 95
        assert numbers[0] == pytest.approx(sum(per_class.values()) / 2)
    # The file has what was found.
    found = model.detections[10]
    pasted = evaluate.paste_masks(found["masks"], found["boxes"], 96, 120).numpy()
    results = [result for result in json.loads(file.read_text()) if result["image_id"] == 10]
    for result, label, mask in zip(results, found["labels"].tolist(), pasted, strict=True):
        assert CLASSES[result["category_id"]] == model.data_settings["classes"][label - 1]
        np.testing.assert_array_equal(coco_mask.decode(result["segmentation"]), mask)


def test_no_detections_have_ap_0(tmp_path):
    """pycocotools cannot read a file without results."""
    nothing = {image_id: first(found, 0) for image_id, found in tiny_coco(tmp_path).items()}
    metrics = evaluate.evaluate(Oracle(nothing), open_tiny(tmp_path), workers=0)
    assert metrics["bbox"]["AP"] == 0 and metrics["segm"]["AP"] == 0


def evaluate_in_process(rank, root, detections):
    model = Oracle(detections)
    metrics = evaluate.evaluate(model, open_tiny(root), root / "two", workers=0)
    assert model.calls == 2  # of the four images
    (root / f"metrics_{rank}.json").write_text(json.dumps(metrics))


def test_two_processes_write_what_one_does(tmp_path):
    detections = imperfect(tiny_coco(tmp_path))
    one = evaluate.evaluate(Oracle(detections), open_tiny(tmp_path), tmp_path / "one", workers=0)
    run_processes(evaluate_in_process, tmp_path, detections)
    for rank in range(2):
        assert json.loads((tmp_path / f"metrics_{rank}.json").read_text()) == one
    for name in ("results_bbox.json", "results_segm.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_keypoint_metrics_are_pycocotools(tmp_path):
    """Also for a file without "num_keypoints", which pycocotools cannot do without."""
    detections = tiny_coco(tmp_path)
    file = tmp_path / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    generator = torch.Generator().manual_seed(3)
    points = 10 + (70 * torch.rand(len(RECTANGLES), 17, 2, generator=generator)).floor()
    for one, xy in zip(content["annotations"], points):
        one["keypoints"] = [0] * 15 + F.pad(xy[5:], (0, 1), value=2).flatten().tolist()
    for image_id, found in detections.items():
        mine = [i for i, r in enumerate(RECTANGLES) if r[0] == image_id and not r[-1]]
        noise = torch.randn(len(mine), 17, 2, generator=generator).round(decimals=1)
        found["keypoints"] = F.pad(points[mine] + 2 * noise, (0, 1), value=1)
    file.write_text(json.dumps(content))
    dataset = data.CocoDataset(tmp_path / "val2017", file, masks=False, keypoints=True)
    model = Oracle(detections, masks=False, keypoints=17)
    *numbers, _ = evaluate.evaluate(model, dataset, tmp_path, workers=0)["keypoints"].values()
    for one in content["annotations"]:
        one["num_keypoints"] = 12
    file.write_text(json.dumps(content))
    results = tmp_path / "results_keypoints.json"
    assert numbers == pycocotools_numbers(file, results, "keypoints") and 5 < numbers[0] < 95
    # Places become indices of pixels: the first pixel's centre is at 0.5.
    written = torch.tensor(json.loads(results.read_text())[0]["keypoints"]).view(17, 3)
    torch.testing.assert_close(written[:, :2] + 0.5, detections[10]["keypoints"][0, :, :2])


def test_a_model_for_other_classes_is_refused(tmp_path):
    model = Oracle(tiny_coco(tmp_path))
    model.data_settings["classes"] = ["disc", "star"]
    with pytest.raises(UserError, match="instances_val2017.json.*bar, star.*--images.*--init"):
        evaluate.evaluate(model, open_tiny(tmp_path), workers=0)


# -- PASCAL VOC's metric ---------------------------------------------------------------------------


def voc_object(image_id, x1, y1, x2, y2, **more):
    return {"image_id": image_id, "bbox": [x1, y1, x2 - x1, y2 - y1]} | more


def test_voc_average_precision_worked_by_hand():
    objects = [
        voc_object(1, 0, 0, 10, 10, id=1, difficult=0),
        voc_object(1, 20, 20, 30, 30, id=2, difficult=0),
        voc_object(2, 0, 0, 10, 10, id=3, difficult=0),
        voc_object(2, 40, 40, 50, 50, id=4, difficult=1),
    ]
    found = [
        voc_object(1, 20, 20, 30, 30, score=0.4),  # right (4th that counts): precision 2/4
        voc_object(1, 0, 0, 10, 10, score=0.9),  # right: precision 1/1, recall 1/3
        voc_object(1, 0, 0, 10, 9, score=0.8),  # the same object again: wrong
        voc_object(2, 40, 40, 50, 50, score=0.7),  # difficult: counts for nothing
        voc_object(2, 0, 0, 10, 4.9, score=0.6),  # IoU 0.49: wrong
        voc_object(2, 0, 0, 10, 5, score=0.2),  # IoU 0.5, just enough: right, precision 3/5
        voc_object(3, 0, 0, 5, 5, score=0.1),  # an image without objects: wrong
    ]
    # Recall 1/3 at precision 1, 2/3 and 3/3 at precision 3/5, which is the best from 2/3 on.
    expected = (1 + 3 / 5 + 3 / 5) / 3
    assert evaluate.voc_average_precision(found, objects) == pytest.approx(expected)
    assert evaluate.voc_average_precision([], objects) == 0
    assert evaluate.voc_average_precision(found, objects[3:]) == -1


def test_annotations_or_an_argument_choose_vocs_metric(tmp_path):
    detections = tiny_coco(tmp_path)
    detections[40] = first(detections[40], 2)  # the last bar is not found
    file = tmp_path / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())

    def metrics(metric=None):
        file.write_text(json.dumps(content))
        return evaluate.evaluate(Oracle(detections), open_tiny(tmp_path), workers=0, metric=metric)

    assert list(metrics()) == ["bbox", "segm"] and list(metrics("voc")) == ["voc"]
    for one in content["annotations"]:
        one["difficult"] = int(one["bbox"] == [33, 50, 28, 28] or one["iscrowd"])
    # Two of three bars are found: VOC ignores the third, and COCO reads 67 of 101 recalls.
    assert metrics("coco")["bbox"]["AP50"] == pytest.approx((100 + 100 * 67 / 101) / 2)
    assert metrics()["voc"]["mAP50"] == pytest.approx(100)


# -- Prediction on an image ------------------------------------------------------------------------


def paste_by_hand(mask, box, height, width):
    """Detectron2's rule in float64: bilinear between the centres of the mask's pixels."""

    def weights(low, high, count):  # [count, M]
        place = (np.arange(count) + 0.5 - low) / (high - low) * len(mask) - 0.5
        return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(len(mask))))

    x1, y1, x2, y2 = box
    return weights(y1, y2, height) @ mask @ weights(x1, x2, width).T


def test_masks_are_pasted_where_the_formula_says():
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(30, 2, 2, generator=generator) * torch.tensor([40.0, 30.0])
    boxes = torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1)
    boxes[0] = torch.tensor([0.0, 0.0, 40.0, 30.0])  # the whole image
    boxes[20:, 2:] = boxes[20:, :2] + 0.3  # less than a pixel
    coarse = torch.randn(len(boxes), 1, 7, 7, generator=generator)
    masks = F.interpolate(coarse, size=28, mode="bicubic")[:, 0].mul(4).sigmoid()
    masks[0] = 1  # also at the edges
    pasted = evaluate.paste_masks(masks, boxes, 30, 40)
    assert pasted.dtype == torch.bool and pasted[0].all()
    for mask, box, got in zip(masks.double().numpy(), boxes.tolist(), pasted.numpy()):
        values = paste_by_hand(mask, box, 30, 40)
        clear = np.abs(values - 0.5) > 1e-5  # where float32 decides as float64 does
        assert clear.mean() > 0.99
        np.testing.assert_array_equal(got[clear], (values >= 0.5)[clear])
    assert evaluate.paste_masks(masks[:0], boxes[:0], 30, 40).shape == (0, 30, 40)


@functools.cache
def small_model():
    """A small real model with random weights that finds something."""
    torch.manual_seed(0)
    small = detector.build_model(num_classes=2, **NARROW)
    nn.init.normal_(small.box_heads[0].classifier.weight, std=0.5)
    small.data_settings |= {"min_size": 64, "max_size": 100, "classes": ["disc", "bar"]}
    return small


def some_image():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (3, 50, 70), generator=generator).byte()


def test_predictions_are_in_the_images_own_pixels():
    image = torch.full((3, 120, 160), 10, dtype=torch.uint8)
    found = {"labels": torch.tensor([1, 2]), "scores": torch.tensor([0.9, 0.8]), "width": 160}
    found["boxes"] = torch.tensor([[20.0, 30.0, 76.0, 86.0], [150.0, 100.0, 200.0, 140.0]])
    found["masks"] = torch.ones(2, 28, 28)
    points = torch.tensor([[[30.0, 40.0, 1.0]] * 17] * 2)
    for height, width in ((60, 80), (240, 320)):
        scale = torch.tensor([width / 160, width / 160, 1])
        model = Oracle({10: found | {"keypoints": points * scale}})
        detections = evaluate.predict(model, image, min_size=height, max_size=width)
        expected = torch.tensor([[20.0, 30.0, 76.0, 86.0], [150.0, 100.0, 160.0, 120.0]])
        torch.testing.assert_close(detections["boxes"], expected)
        torch.testing.assert_close(detections["keypoints"], points)
        mask = torch.zeros(120, 160, dtype=torch.bool)
        mask[30:86, 20:76] = True
        assert torch.equal(detections["masks"][0], mask)


def test_paths_arrays_and_tensors_are_the_same_image(tmp_path):
    array = some_image().permute(1, 2, 0).numpy()
    Image.fromarray(array).save(tmp_path / "a.png")
    bgr = np.ascontiguousarray(array[..., ::-1])
    expected = evaluate.predict(small_model(), some_image())
    assert len(expected["boxes"]) > 3
    for same in (tmp_path / "a.png", str(tmp_path / "a.png"), array, bgr[..., ::-1]):
        found = evaluate.predict(small_model(), same)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    # Floats, at their own size: resized, they would not be rounded to whole numbers.
    pair = [evaluate.predict(small_model(), a, 50, 70) for a in (array, array / 255)]
    torch.testing.assert_close(*(found["boxes"] for found in pair), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "wrong, words",
    [
        ([np.zeros((5, 6, 3), np.uint8)] * 2, r"one RGB image, and is \(2, 5, 6, 3\)"),
        (np.zeros((5, 6, 4), np.uint8), r"one RGB image, and is \(5, 6, 4\)"),
        (torch.zeros(2, 3, 5, 6), r"a \[3, h, w\] tensor"),
        (torch.full((3, 5, 6), 255.0), r"uint8 or float in \[0, 1\]"),
    ],
)
def test_another_kind_of_image_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        evaluate.predict(small_model(), wrong)


# -- Test-time augmentation ------------------------------------------------------------------------


class Seer(nn.Module):
    """Stands in for MaskRCNN: sees a red rectangle in an image, wherever and however large it is.

    Its mask is the yellow half.
    """

    config = SimpleNamespace(num_classes=1, masks=True, keypoints=0, box_score_thresh=0.05)
    data_settings = {"min_size": 80, "max_size": 133, "classes": ["red"]}

    def __init__(self):
        super().__init__()
        self.image_mean = torch.zeros(1)
        self.seen = []

    def batch(self, images):
        self.seen.append(tuple(images[0].shape[1:]))
        return images[0], self.seen[-1:]

    def features(self, image):
        red = image[0].float() > 128
        yellow = image[1][:, red.any(0)].float().mean(dim=0)
        return red, bool(yellow[-3] > yellow[2])

    def proposals(self, features, sizes):
        rows, columns = (features[0].any(dim).nonzero()[:, 0] for dim in (1, 0))
        return [torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])[None].float()]

    def box_predictions(self, features, boxes, sizes):
        return [(torch.tensor([[0.2, 0.8]]), boxes[0][:, None])]

    def postprocess(self, scores, boxes):
        self.united = boxes[:, 0]
        return {"boxes": boxes[0], "labels": torch.tensor([1]), "scores": scores[0, 1:]}

    def mask_probabilities(self, features, boxes, labels):
        [seen] = self.proposals(features, None)
        assert (boxes[0] - seen).abs().max() < 2.5  # the final box, in the pixels of this view
        mask = (torch.arange(28) < 14).expand(1, 28, 28).float()
        return [mask.flip(-1) if features[1] else mask]


def test_all_views_see_the_same_boxes_and_masks():
    image = torch.zeros(3, 120, 160, dtype=torch.uint8)
    image[0, 24:72, 32:96] = 255
    image[1, 24:72, 32:64] = 255  # its left half is yellow
    model = Seer()
    found = evaluate.predict(model, image, tta=True)
    shorter = [80, *(scale // 10 for scale in evaluate.TTA_SCALES)]
    assert [min(size) for size in model.seen] == [side for side in shorter for _ in range(2)]
    # The smallest view has 40 rows: what it rounds to a pixel may be off by 1 of our 80.
    box = torch.tensor([[32.0, 24.0, 96.0, 72.0]])
    assert model.united.shape == (18, 4) and (model.united - box * 80 / 120).abs().max() < 1.5
    assert (found["boxes"] - box).abs().max() < 1
    [mask], expected = found["masks"], image[1] > 0
    assert (mask & expected).sum() / (mask | expected).sum() > 0.95


def test_views_are_those_of_the_paper():
    views = evaluate.tta_views((480, 640), 800, 1333)
    assert len(views) == 18 and views[:2] == [((800, 1067), False), ((800, 1067), True)]
    assert {shape[0] for shape, _ in views} == {800, *evaluate.TTA_SCALES}
    wide = [shape[1] for shape, _ in evaluate.tta_views((400, 1600), 800, 1333)]
    assert max(wide) == 2000 and wide[0] == 1333


def test_one_view_is_plain_prediction(monkeypatch):
    plain = evaluate.predict(small_model(), some_image())
    monkeypatch.setattr(evaluate, "tta_views", lambda *_: [((64, 90), False)])
    monkeypatch.setattr(evaluate, "vote_boxes", lambda detections, *_: detections["boxes"])
    augmented = evaluate.predict(small_model(), some_image(), tta=True)
    torch.testing.assert_close(augmented, plain, rtol=0, atol=0)


@pytest.mark.parametrize("agnostic", [False, True])
def test_box_voting_worked_by_hand(agnostic):
    united = [[0, 0, 100, 100], [0, 0, 100, 94], [4, 0, 100, 100], [0, 0, 100, 50], [0, 0, 100, 98]]
    united = torch.tensor(united).float()
    scores = torch.tensor([[0, 0, 0.9], [0, 0, 0.6], [0, 0, 0.3], [0, 0, 0.8], [0, 0.9, 0.04]])
    boxes = united[:, None] if agnostic else united[:, None].expand(-1, 2, -1)
    kept = {"boxes": united[[0, 3]], "labels": torch.tensor([2, 2])}
    voted = evaluate.vote_boxes(kept, scores, boxes, 0.05)
    # The first three agree (IoU 1, 0.94, 0.96); the half does not; the last's score is too small.
    expected = [[0.3 * 4 / 1.8, 0, 100, (0.9 * 100 + 0.6 * 94 + 0.3 * 100) / 1.8], [0, 0, 100, 50]]
    torch.testing.assert_close(voted, torch.tensor(expected))


# -- Pictures --------------------------------------------------------------------------------------


def test_pictures_show_boxes_masks_and_names():
    image = torch.zeros(3, 120, 160, dtype=torch.uint8)
    mask = torch.zeros(1, 120, 160, dtype=torch.bool)
    mask[:, 24:72, 140:150] = True
    found = {"boxes": torch.tensor([[140.0, 24, 160, 72]]), "labels": torch.tensor([1])}
    found |= {"scores": torch.tensor([0.9]), "masks": mask}
    assert not evaluate.draw(image, found, score=0.95).any()
    picture = evaluate.draw(image, found, ["a thing"])
    assert picture.dtype == torch.uint8 and picture.shape == (3, 360, 480)  # enlarged
    shown = picture.any(0)
    assert shown[73, 421:479].all()  # the upper edge of the box, three times as large
    assert shown[80:210, 424:449].all() and not shown[80:210, 451:476].any()  # the mask
    # The name, in letters of 13 pixels, is above the box and moved into the picture.
    assert shown[57, 415:479].all() and not shown[:50].any() and not shown[:, :400].any()
    soft = found | {"masks": torch.ones(1, 28, 28)}  # as the model gives them
    assert evaluate.draw(image, soft).any(0)[80:210, 451:476].all()


def run(*arguments):
    """evaluate.py with these arguments; returns its exit code."""
    return evaluate.run_command("evaluate.py", evaluate.main, [str(a) for a in arguments])


def test_images_become_pictures_and_json(tmp_path):
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    paths = folder / "a.png", folder / "b.PNG"
    pixels = some_image().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(paths[0])
    Image.fromarray(pixels[:40]).save(paths[1])
    (folder / "notes.txt").write_text("no image")
    detector.save_model(small_model(), tmp_path / "weights.pt")
    command = ["--weights", tmp_path / "weights.pt", "--device", "cpu", "--score", 0.3, "--images"]
    assert run(*command, folder, "--out", out) == 0
    assert sorted(p.name for p in out.glob("*.png")) == ["a_detections.png", "b_detections.png"]
    results = json.loads((out / "detections.json").read_text())
    for path in paths:
        expected = evaluate.predict(small_model(), path)
        found = [result for result in results if result["file_name"] == str(path)]
        assert len(found) == (expected["scores"] >= 0.3).sum() > 0
        boxes, scores = expected["boxes"].tolist(), expected["scores"].tolist()
        for i, ((x1, y1, x2, y2), result) in enumerate(zip(boxes, found)):
            assert result["class"] == ["disc", "bar"][expected["labels"][i] - 1]
            assert result["score"] == pytest.approx(scores[i], abs=1e-6)  # rounded
            assert result["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=1e-3)
            mask = coco_mask.decode(result["segmentation"])
            np.testing.assert_array_equal(mask, expected["masks"][i].numpy())
    assert run(*command, out) == 1  # only what was drawn, no images


# -- Command line, processes, errors ---------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Arguments that evaluate an Oracle of `tiny_coco` in tmp_path."""
    model = Oracle(tiny_coco(tmp_path))
    monkeypatch.setattr(evaluate, "load_model", lambda path: model)
    return ["--device", "cpu", "--weights", "w", "--data", tmp_path, "--workers"]


def test_tables_of_the_split_that_was_asked_for(tmp_path, command, capsys):
    command += [0, "--per-class", "--split", "train2017"]
    assert run(*command) == 1
    error = capsys.readouterr().err
    assert "train2017" in error and error.count("\n") == 1
    tiny_coco(tmp_path, split="train2017")
    for path in (tmp_path / "val2017").iterdir():
        path.unlink()
    assert run(*command) == 0
    classes, metrics = capsys.readouterr().out.split("\n\n")
    assert classes.splitlines()[1].split() == ["disc", "100.0", "100.0"]
    head, bbox, _ = metrics.splitlines()
    assert head.split() == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    assert bbox.split() == ["bbox", "100.0", "100.0", "100.0", "100.0", "100.0", "-"]


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_faults_of_a_loading_process_are_one_line(tmp_path, command, monkeypatch, capsys):
    (tmp_path / "val2017" / "30.png").write_bytes(b"no image")
    assert run(*command, 1) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"evaluate.py: {tmp_path}/val2017/30.png cannot be used")
    monkeypatch.setattr(data, "read_image", kill)
    assert run(*command, 1) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("evaluate.py: DataLoader worker") and "--workers" in error


def raise_(error):
    raise error


@pytest.mark.parametrize(
    "error, words",
    [
        (UserError("a file is wrong"), "a file is wrong"),
        (detector.WeightsError("w.pt is broken"), "w.pt"),
        (OSError(28, "No space left on device", "x/y.json"), "x/y.json"),
    ],
)
def test_errors_of_users_are_one_line(error, words, capsys):
    assert evaluate.run_command("tool.py", raise_, error) == 1
    told = capsys.readouterr().err
    assert told.startswith("tool.py: ") and words in told and told.count("\n") == 1
    with pytest.raises(ZeroDivisionError):  # a bug
        evaluate.run_command("tool.py", raise_, ZeroDivisionError())


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("RANK", "2"), ("LOCAL_RANK", "2"), ("WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="start at most 2 processes .--nproc-per-node."):
        evaluate.start_processes()
