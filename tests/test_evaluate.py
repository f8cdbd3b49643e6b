"""evaluate.py: masks pasted, test-time augmentation, COCO and VOC metrics, pictures, processes."""

import contextlib
import functools
import io
import json
import math
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_norms import run_processes
from torch import nn

import data
import evaluate
import model as mask_rcnn
from data import UserError

ROOT = Path(evaluate.__file__).parent
CLASSES = ["disc", "bar"]
CATEGORY_IDS = [3, 7]


# ---- Masks


def paste_by_hand(mask, box, height, width):
    """Values of Detectron2's rule, pixel by pixel in float64."""
    size = mask.shape[0]
    padded = np.zeros((size + 2, size + 2))
    padded[1:-1, 1:-1] = mask
    x1, y1, x2, y2 = box
    values = np.zeros((height, width))
    for row in range(height):
        v = (row + 0.5 - y1) / (y2 - y1) * size - 0.5
        for column in range(width):
            u = (column + 0.5 - x1) / (x2 - x1) * size - 0.5
            if not (-1 < u < size and -1 < v < size):
                continue
            i, j = math.floor(v), math.floor(u)
            a, b = v - i, u - j
            top = (1 - b) * padded[i + 1, j + 1] + b * padded[i + 1, j + 2]
            bottom = (1 - b) * padded[i + 2, j + 1] + b * padded[i + 2, j + 2]
            values[row, column] = (1 - a) * top + a * bottom
    return values


BOXES = [
    [3.2, 4.7, 30.1, 22.9],  # inside
    [-8.5, -3.0, 20.0, 60.0],  # partly outside, taller than the image
    [0.0, 0.0, 40.0, 30.0],  # the whole image: runs go from column to column
    [-5.0, -5.0, 45.0, 35.0],  # more than the image
    [50.0, 10.0, 60.0, 20.0],  # outside
    [-20.0, -20.0, -10.0, -10.0],  # outside
    [10.3, 10.3, 10.4, 10.4],  # smaller than a pixel, on no centre
    [10.4, 10.4, 10.6, 10.6],  # smaller than a pixel, on a centre
    [35.0, 25.0, 40.0, 30.0],  # the last pixel
    [5.0, 5.0, 5.0, 9.0],  # no width
]


def some_masks(count, seed=0):
    """Soft random shapes [count, 28, 28]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 1, 7, 7, generator=generator)
    return nn.functional.interpolate(coarse, size=28, mode="bicubic")[:, 0].mul(4).sigmoid()


def test_masks_are_pasted_where_the_formula_says():
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(30, 2, 2, generator=generator) * torch.tensor([60.0, 50.0]) - 10
    random = torch.cat([corners.amin(1), corners.amax(1)], dim=1)
    boxes = torch.cat([torch.tensor(BOXES), random])
    masks = some_masks(len(boxes))
    masks[3] = 1  # full, also at the edges
    pasted = evaluate.paste_masks(masks, boxes, 30, 40)
    assert pasted.dtype == torch.bool and pasted.shape == (len(boxes), 30, 40)
    assert pasted[0].any() and not pasted[4:7].any() and pasted[7].sum() <= 1
    for mask, box, got in zip(masks.double().numpy(), boxes.double().tolist(), pasted.numpy()):
        if box[0] == box[2]:
            assert not got.any()
            continue
        values = paste_by_hand(mask, box, 30, 40)
        clear = np.abs(values - 0.5) > 1e-5
        assert clear.mean() > 0.99
        np.testing.assert_array_equal(got[clear], (values >= 0.5)[clear])
    assert evaluate.paste_masks(masks[:0], boxes[:0], 30, 40).shape == (0, 30, 40)


def test_a_pixel_centre_on_the_edge_of_the_box_belongs_to_it():
    pasted = evaluate.paste_masks(torch.ones(1, 28, 28), torch.tensor([[2.5, 3, 30.5, 31]]), 40, 40)
    expected = torch.zeros(40, 40, dtype=torch.bool)
    expected[3:31, 2:31] = True  # exactly 0.5 at columns 2 and 30, and Detectron2 says >=
    assert torch.equal(pasted[0], expected)


def test_results_are_in_cocos_format():
    """Masks as pycocotools decodes them, keypoints as indices of pixels."""
    boxes = np.float32(BOXES[:4])
    masks = some_masks(4)
    keypoints = np.full((4, 17, 3), (10.5, 20.5, 1), np.float32)
    found = {"boxes": boxes, "labels": np.ones(4, int), "scores": np.float32([0.75] * 4)}
    found |= {"masks": masks.numpy(), "keypoints": keypoints}
    image_id, results = evaluate.coco_results((5, found, (30, 40), [9]))
    assert image_id == 5
    pasted = evaluate.paste_masks(masks, torch.from_numpy(boxes), 30, 40).numpy()
    for result, box, mask in zip(json.loads(json.dumps(results)), BOXES, pasted):
        assert (result["image_id"], result["category_id"], result["score"]) == (5, 9, 0.75)
        xywh = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
        assert result["bbox"] == pytest.approx(xywh, abs=1e-3)
        np.testing.assert_array_equal(coco_mask.decode(result["segmentation"]), mask)
        assert result["keypoints"] == [10.0, 20.0, 1.0] * 17


# ---- Models without weights, whose detections are known


class Oracle(nn.Module):
    """Stands in for MaskRCNN: returns given detections, found by the first pixel of the image."""

    def __init__(self, detections, masks=True, keypoints=0, classes=CLASSES):
        super().__init__()
        self.image_mean = torch.zeros(1)
        self.config = SimpleNamespace(num_classes=len(classes), masks=masks, keypoints=keypoints)
        self.data_settings = {"min_size": 96, "max_size": 200, "classes": classes}
        self.calls = 0
        self.detections = detections  # first pixel's red value -> detections at full size

    def forward(self, images):
        assert not self.training and not torch.is_grad_enabled()
        self.calls += 1
        results = []
        for image in images:
            found = dict(self.detections[int(image[0, 0, 0])])
            scale = image.shape[2] / found.pop("width")
            results.append(found | {"boxes": found["boxes"] * scale})
        return results


def tiny_coco(root, first_id=1, split="val2017"):
    """4 images (one empty, one with a crowd) of rectangles, as COCO files, and exact detections.

    Rectangles have whole multiples of 28 pixels as sides, so that 28 x 28 masks are exact.
    """
    objects = {  # image -> (category, x, y, w, h, crowd)
        10: [(3, 4, 5, 28, 28, 0), (7, 40, 20, 56, 28, 0)],
        20: [],
        30: [(7, 0, 0, 28, 56, 0), (3, 30, 10, 56, 56, 1)],
        40: [(3, 60, 40, 56, 28, 0), (3, 1, 2, 28, 28, 0), (7, 33, 50, 28, 28, 0)],
    }
    size = {"width": 120, "height": 96}
    categories = [{"id": k, "name": name} for k, name in zip(CATEGORY_IDS, CLASSES)]
    images, annotations, detections = [], [], {}
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    for image_id, boxes in objects.items():
        name = f"{image_id}.png"
        Image.new("RGB", (120, 96), (image_id,) * 3).save(root / split / name)
        images.append({"id": image_id, "file_name": name} | size)
        for category, x, y, w, h, crowd in boxes:
            one = {"id": len(annotations) + first_id, "image_id": image_id, "iscrowd": crowd}
            one |= {"category_id": category, "bbox": [x, y, w, h], "area": w * h}
            one["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            if crowd:
                one["segmentation"] = coco_mask.frPyObjects(one["segmentation"], 96, 120)[0]
                one["segmentation"]["counts"] = one["segmentation"]["counts"].decode()
            annotations.append(one)
        found = torch.tensor([box for box in boxes if not box[5]]).reshape(-1, 6)
        detections[image_id] = {
            "boxes": torch.cat([found[:, 1:3], found[:, 1:3] + found[:, 3:5]], dim=1).float(),
            "labels": (found[:, 0] == CATEGORY_IDS[1]).long() + 1,
            "scores": torch.linspace(0.9, 0.6, len(found)),
            "masks": torch.ones(len(found), 28, 28),
            "width": 120,
        }
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return detections


def open_tiny(root):
    return data.open_split(root, "val2017")


def imperfect(detections):
    """The same with boxes moved, a wrong class, a false positive and masks with a hole."""
    generator = torch.Generator().manual_seed(5)
    changed = {}
    for image_id, found in detections.items():
        boxes = found["boxes"] + 10 * torch.rand(found["boxes"].shape, generator=generator) - 5
        boxes = torch.cat([boxes, torch.tensor([[7.0, 7.0, 40.0, 30.0]])])
        masks = torch.ones(len(boxes), 28, 28)
        masks[:, 10:18, 5:20] = 0
        labels = torch.cat([found["labels"], torch.tensor([1])])
        scores = torch.rand(len(boxes), generator=generator)
        new = {"boxes": boxes, "labels": labels, "scores": scores, "masks": masks}
        changed[image_id] = found | new
    changed[40]["labels"][2] = 1
    return changed


def by_hand(annotations, results, kind):
    """pycocotools' own numbers on two files, all classes at once."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        scorer = COCOeval(truth, truth.loadRes(str(results)), kind)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    count = 5 if kind == "keypoints" else 6
    return [None if value == -1 else 100 * value for value in scorer.stats[:count]]


# ---- COCO's metrics


@pytest.mark.parametrize("first_id", [1, 0])
def test_perfect_detections_have_ap_100(tmp_path, first_id):
    """Whatever the annotations' ids are: pycocotools takes 0 for "not matched"."""
    model = Oracle(tiny_coco(tmp_path, first_id)).train()
    metrics = evaluate.evaluate(model, open_tiny(tmp_path), workers=0, per_class=True)
    shown = evaluate.format_classes(metrics)
    assert shown.splitlines()[1].split() == ["disc", "100.0", "100.0"]
    for kind in ("bbox", "segm"):
        per_class = metrics[kind].pop("per_class")
        assert per_class == {"disc": pytest.approx(100), "bar": pytest.approx(100)}
        assert metrics[kind]["AP"] == pytest.approx(100) and metrics[kind]["APl"] is None
    assert model.training  # as it was before
    head, first, _ = evaluate.format_table(metrics).splitlines()
    assert head.split() == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    assert first.split() == ["bbox", "100.0", "100.0", "100.0", "100.0", "100.0", "-"]


def test_metrics_are_those_of_the_written_files(tmp_path):
    model = Oracle(imperfect(tiny_coco(tmp_path)))
    dataset = open_tiny(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "results_keypoints.json").write_text("[]")  # of an earlier run
    (out / "results_2019.json").write_text("[]")  # somebody's own
    metrics = evaluate.evaluate(model, dataset, out, workers=2)
    files = ["results_2019.json", "results_bbox.json", "results_segm.json"]
    assert sorted(p.name for p in out.iterdir()) == files
    for kind in ("bbox", "segm"):
        results = out / f"results_{kind}.json"
        assert list(metrics[kind].values()) == by_hand(dataset.annotation_file, results, kind)
        assert 5 < metrics[kind]["AP"] < 95
        # Shared by processes, class by class: the same to the last bit.
        results = json.loads(results.read_text())
        shared = evaluate.coco_metrics(dataset.coco_gt(), results, kind, dataset, workers=2)
        del shared["per_class"]
        assert shared == metrics[kind]
    json.dumps(metrics, allow_nan=False)
    # Found nothing at all, which pycocotools cannot read.
    nothing = {
        image_id: {name: v[:0] if name != "width" else v for name, v in found.items()}
        for image_id, found in model.detections.items()
    }
    metrics = evaluate.evaluate(Oracle(nothing), dataset, out, workers=0)
    assert metrics["bbox"]["AP"] == 0 and metrics["segm"]["AP"] == 0
    assert json.loads((out / "results_segm.json").read_text()) == []


def evaluate_in_process(rank, root, detections):
    model = Oracle(detections)
    metrics = evaluate.evaluate(model, open_tiny(root), root / "two", workers=0)
    assert model.calls == 2  # of the four images
    (root / f"metrics_{rank}.json").write_text(json.dumps(metrics))
    dataset = open_tiny(root)
    if rank == 1:  # whose data set is another one
        dataset.image_ids = [1, 2, 3, 4]
        evaluate.evaluate(model, dataset, workers=0)
    else:
        with pytest.raises(UserError, match="different data"):
            evaluate.evaluate(model, dataset, workers=0)
        torch.distributed.broadcast_object_list([None])  # for which the other one waits


def test_two_processes_write_what_one_does(tmp_path):
    detections = imperfect(tiny_coco(tmp_path))
    one = evaluate.evaluate(Oracle(detections), open_tiny(tmp_path), tmp_path / "one", workers=0)
    run_processes(evaluate_in_process, tmp_path, detections)
    for rank in range(2):
        assert json.loads((tmp_path / f"metrics_{rank}.json").read_text()) == one
    files = sorted(p.name for p in (tmp_path / "two").iterdir())
    assert files == ["results_bbox.json", "results_segm.json"]
    for name in files:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_a_stopped_evaluation_leaves_no_results(tmp_path):
    detections = tiny_coco(tmp_path)
    out = tmp_path / "out"
    evaluate.evaluate(Oracle(detections), open_tiny(tmp_path), out, workers=0)
    assert (out / "results_bbox.json").exists()
    del detections[40]  # the last image: stands for the end of the process
    with pytest.raises(KeyError):
        evaluate.evaluate(Oracle(detections), open_tiny(tmp_path), out, workers=2)
    assert list(out.iterdir()) == []


def test_keypoint_metrics_are_pycocotools(tmp_path):
    """Also for a file without "num_keypoints", which pycocotools cannot do without."""
    generator = torch.Generator().manual_seed(3)
    root = tmp_path / "val2017"
    root.mkdir()
    images, annotations, detections = [], [], {0: {}, 8: {}}  # noise in pixels -> detections
    boxes = torch.tensor([[10.0, 20, 60, 90], [70, 10, 190, 150]])
    found = {"boxes": boxes, "labels": torch.tensor([1, 1]), "scores": torch.tensor([0.9, 0.8])}
    for image_id in (10, 20, 30):
        Image.new("RGB", (200, 160), (image_id,) * 3).save(root / f"{image_id}.png")
        image = {"id": image_id, "file_name": f"{image_id}.png", "width": 200, "height": 160}
        images.append(image)
        corner, side = boxes[:, None, :2], (boxes[:, 2:] - boxes[:, :2])[:, None]
        points = (corner + side * torch.rand(2, 17, 2, generator=generator)).floor()
        visible = torch.randint(3, (2, 17, 1), generator=generator)
        for (x1, y1, x2, y2), xyv in zip(boxes.tolist(), torch.cat([points, visible], dim=2)):
            xyv[xyv[:, 2] == 0] = 0
            one = {"id": len(annotations) + 1, "image_id": image_id, "category_id": 1, "iscrowd": 0}
            one |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
            one["keypoints"] = xyv.flatten().int().tolist()
            annotations.append(one | {"num_keypoints": int((xyv[:, 2] > 0).sum())})
        for noise in detections:
            moved = points + 0.5 + noise * torch.randn(points.shape, generator=generator)
            keypoints = torch.cat([moved, torch.ones(2, 17, 1)], dim=2)
            detections[noise][image_id] = found | {"keypoints": keypoints, "width": 200}
    content = {"images": images, "categories": [{"id": 1, "name": "person"}]}
    counted, uncounted = tmp_path / "counted.json", tmp_path / "uncounted.json"
    counted.write_text(json.dumps(content | {"annotations": annotations}))
    for annotation in annotations:
        del annotation["num_keypoints"]
    uncounted.write_text(json.dumps(content | {"annotations": annotations}))

    ap = []
    for noise in detections:
        model = Oracle(detections[noise], masks=False, keypoints=17, classes=["person"])
        model.data_settings |= {"min_size": 160, "max_size": 200}
        dataset = data.CocoDataset(root, uncounted, masks=False, keypoints=True)
        metrics = evaluate.evaluate(model, dataset, tmp_path / str(noise), workers=0)["keypoints"]
        written = tmp_path / str(noise) / "results_keypoints.json"
        assert list(metrics.values()) == by_hand(counted, written, "keypoints")
        assert list(metrics) == ["AP", "AP50", "AP75", "APm", "APl"]
        ap.append(metrics["AP"])
    assert ap[0] == pytest.approx(100) and 5 < ap[1] < 95


@pytest.mark.parametrize("polygons", [[], [[]], [[1, 2, 3, 4]], [[1, 2, 3, 4], None]])
def test_polygons_that_training_leaves_out_are_empty_masks(tmp_path, polygons):
    detections = tiny_coco(tmp_path)
    file = tmp_path / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    whole = content["annotations"][0]["segmentation"]
    content["annotations"][0]["segmentation"] = [whole[0] if p is None else p for p in polygons]
    file.write_text(json.dumps(content))
    metrics = evaluate.evaluate(Oracle(detections), open_tiny(tmp_path), workers=0)
    assert metrics["bbox"]["AP"] == pytest.approx(100)
    assert (metrics["segm"]["AP"] > 99) == (None in polygons)  # a mask that nothing can match


def test_faults_in_files_are_one_sentence_before_the_work(tmp_path):
    model = Oracle(tiny_coco(tmp_path))
    dataset = open_tiny(tmp_path)
    model.data_settings["classes"] = ["disc", "star"]
    with pytest.raises(UserError, match="star"):
        evaluate.evaluate(model, dataset, workers=0)
    model.data_settings["classes"], model.config.num_classes = None, 80  # weights of others
    with pytest.raises(UserError, match="2 classes, the weights have 80; .*--images.*--init"):
        evaluate.evaluate(model, dataset, workers=0)
    model = Oracle(model.detections)
    Path(dataset.annotation_file).write_text("{}")  # it was changed meanwhile
    with pytest.raises(UserError, match="instances_val2017.json"):
        evaluate.evaluate(model, dataset, workers=0)
    assert model.calls == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_one_sentence(tmp_path, workers):
    model = Oracle(tiny_coco(tmp_path))
    (tmp_path / "val2017" / "30.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="30.png") as error:
        evaluate.evaluate(model, open_tiny(tmp_path), workers=workers)
    assert "\n" not in str(error.value)


# ---- PASCAL VOC


def voc_object(number, image_id, box, difficult=False):
    bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    return {"id": number, "image_id": image_id, "bbox": bbox, "difficult": difficult}


def test_voc_average_precision_worked_by_hand():
    objects = [
        voc_object(1, 1, [0, 0, 10, 10]),
        voc_object(2, 1, [20, 20, 30, 30]),
        voc_object(3, 2, [0, 0, 10, 10]),
        voc_object(4, 2, [40, 40, 50, 50], difficult=True),
    ]
    found = [
        (1, 0.4, [20, 20, 30, 30]),  # true positive (4th that counts): precision 2/4
        (1, 0.9, [0, 0, 10, 10]),  # true positive: precision 1/1, recall 1/3
        (1, 0.8, [0, 0, 10, 9]),  # the same object again: false positive
        (2, 0.7, [40, 40, 50, 50]),  # difficult: counts for nothing
        (2, 0.6, [0, 0, 10, 4.9]),  # IoU 0.49: false positive
        (2, 0.2, [0, 0, 10, 5]),  # IoU 0.5, just enough: true positive, precision 3/5
        (3, 0.1, [0, 0, 5, 5]),  # an image without objects: false positive
    ]
    found = [voc_object(0, image_id, box) | {"score": score} for image_id, score, box in found]
    # Recall 1/3 at precision 1, 2/3 and 3/3 at precision 3/5, which is the best from 2/3 on.
    expected = (1 + 3 / 5 + 3 / 5) / 3
    assert evaluate.voc_average_precision(found, objects) == pytest.approx(expected)
    assert evaluate.voc_average_precision([], objects) == 0
    assert evaluate.voc_average_precision(found, objects[3:]) == -1


VOC_XML = """<annotation><size><width>100</width><height>80</height></size>{}</annotation>"""
VOC_OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin>"
    "<xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def tiny_voc(root):
    """A devkit with an image in each list, and detections: right, on a difficult object, wrong."""
    # VOC counts pixels from 1 and includes the last one.
    objects = [("cat", 0, 11, 21, 40, 60), ("cat", 1, 61, 11, 90, 40), ("dog", 0, 1, 1, 9, 9)]
    text = VOC_XML.format("".join(VOC_OBJECT.format(*one) for one in objects))
    found = {
        "boxes": torch.tensor([[10.0, 20, 40, 60], [60, 10, 90, 40], [30, 30, 60, 60]]),
        "labels": torch.tensor([8, 8, 12]),  # cat, cat, dog
        "scores": torch.tensor([0.9, 0.8, 0.7]),
        "width": 100,
    }
    names = {10: "VOC2007/trainval/000010", 20: "VOC2012/train/2008_000020"}
    names[30] = "VOC2012/val/2008_000030"
    for red, path in names.items():
        folder, split, name = path.split("/")
        for kind in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (root / folder / kind).mkdir(parents=True, exist_ok=True)
        (root / folder / "ImageSets/Main" / f"{split}.txt").write_text(f"{name}\n")
        image = Image.new("RGB", (100, 80), (red,) * 3)
        image.save(root / folder / "JPEGImages" / f"{name}.jpg", quality=100)
        (root / folder / "Annotations" / f"{name}.xml").write_text(text)
    return dict.fromkeys(names, found)


def test_voc_data_sets_are_scored_by_voc_rules(tmp_path):
    model = Oracle(tiny_voc(tmp_path), masks=False, classes=list(data.VOC_CLASSES))
    dataset = data.open_split(tmp_path, "val2017", masks=False)
    metrics = evaluate.evaluate(model, dataset, tmp_path / "out", workers=0, per_class=True)
    assert metrics["voc"]["mAP50"] == pytest.approx(50)  # of the classes that have objects
    per_class = {name: ap for name, ap in metrics["voc"]["per_class"].items() if ap is not None}
    assert per_class == {"cat": pytest.approx(100), "dog": 0}
    assert len(json.loads((tmp_path / "out" / "results_bbox.json").read_text())) == 3
    assert evaluate.format_table(metrics).split() == ["mAP50", "voc", "50.0"]


# ---- Test-time augmentation


class Seer(nn.Module):
    """Stands in for MaskRCNN: sees a red rectangle in an image wherever and however large it is.

    Its mask is the yellow half.
    """

    config = SimpleNamespace(num_classes=1, masks=True, keypoints=0, box_score_thresh=0.05)
    data_settings = {"min_size": 80, "max_size": 133, "classes": ["red"]}

    def __init__(self):
        super().__init__()
        self.image_mean = torch.zeros(1)
        self.seen = []

    def batch(self, images):
        self.seen.append(tuple(images[0].shape[-2:]))
        return images[0], [images[0].shape[-2:]]

    def features(self, image):
        red = image[0].float() > 128
        yellow = image[1][:, red.any(0)].float().mean(dim=0)
        return [red, bool(yellow[-3] > yellow[2])]

    def proposals(self, features, sizes):
        rows = features[0].any(1).nonzero()[:, 0]
        columns = features[0].any(0).nonzero()[:, 0]
        box = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
        return box[None, None], torch.ones(1, 1, dtype=torch.bool)

    def box_predictions(self, features, boxes, valid, sizes):
        return [(torch.tensor([[0.2, 0.8]]), boxes[0][:, None])]

    def postprocess(self, scores, boxes):
        self.united = boxes[:, 0]
        best = scores[:, 1].argmax()
        score = scores[best, 1][None]
        return {"boxes": boxes[best], "labels": torch.tensor([1]), "scores": score}

    def mask_probabilities(self, features, boxes, labels):
        seen = self.proposals(features, None)[0][0]
        assert (boxes[0] - seen).abs().max() < 2.5  # the final box, in the pixels of this view
        mask = torch.zeros(1, 28, 28)
        mask[:, :, :14] = 1
        return [mask.flip(-1) if features[1] else mask]

    def forward(self, images):
        view = (tuple(images[0].shape[-2:]), False)
        return [evaluate.detect_augmented(self, images[0], [view])]


def red_rectangle(height=120, width=160, box=(32, 24, 96, 72)):
    """An image with a red rectangle, whose left half is yellow: a mirror image can be told."""
    x1, y1, x2, y2 = box
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[0, y1:y2, x1:x2] = 255
    image[1, y1:y2, x1 : (x1 + x2) // 2] = 255
    return image


def test_all_views_see_the_same_boxes_and_masks():
    model = Seer()
    image = red_rectangle()
    plain = evaluate.predict(model, image)
    assert len(model.seen) == 1
    model.seen.clear()
    found = evaluate.predict(model, image, tta=True)
    shorter = [80, 80] + [s for scale in evaluate.TTA_SCALES for s in [scale // 10] * 2]
    assert [min(shape) for shape in model.seen] == shorter
    own_box = torch.tensor([32.0, 24.0, 96.0, 72.0]) * 80 / 120
    assert model.united.shape == (18, 4) and (model.united - own_box).abs().max() < 1.5
    for detections in (plain, found):
        box = torch.tensor([[32.0, 24.0, 96.0, 72.0]])
        assert (detections["boxes"] - box).abs().max() < 1
        mask = torch.zeros(120, 160, dtype=torch.bool)
        mask[24:72, 32:64] = True
        overlap = (mask & detections["masks"][0]).sum() / (mask | detections["masks"][0]).sum()
        assert overlap > 0.95


@functools.cache
def small_model():
    """A small real model with random weights that finds something."""
    torch.manual_seed(0)
    narrow = {"blocks": (1, 1, 1, 1), "box_head_convs": 1, "mask_head_convs": 1}
    for name in ("fpn", "box_head", "box_head_fc", "mask_head"):
        narrow[f"{name}_channels"] = 32
    few = {
        "rpn_pre_nms_top_n_test": 50,
        "rpn_post_nms_top_n_test": 20,
        "box_detections_per_img": 10,
    }
    small = mask_rcnn.build_model(num_classes=3, **narrow, **few)
    nn.init.normal_(small.box_heads[0].classifier.weight, std=0.5)
    small.data_settings |= {"min_size": 64, "max_size": 100}
    return small


def some_image(height=50, width=70):
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(3, height, width, generator=generator) * 255).byte()


def test_one_view_is_plain_prediction(monkeypatch):
    plain = evaluate.predict(small_model(), some_image())
    assert len(plain["scores"]) > 3

    def one_view(size, min_size, max_size):
        return [(data.resize_shape(*size, min_size, max_size), False)]

    monkeypatch.setattr(evaluate, "tta_views", one_view)
    monkeypatch.setattr(evaluate, "vote_boxes", lambda detections, *_: detections["boxes"])
    augmented = evaluate.predict(small_model(), some_image(), tta=True)
    assert plain.keys() == augmented.keys()
    for name in plain:
        assert torch.equal(plain[name], augmented[name]), name


def test_views_are_those_of_the_paper():
    views = evaluate.tta_views((480, 640), 800, 1333)
    assert len(views) == 18 and views[:2] == [((800, 1067), False), ((800, 1067), True)]
    assert {shape[0] for shape, _ in views} == {800, *evaluate.TTA_SCALES}
    wide = [shape[1] for shape, _ in evaluate.tta_views((400, 1600), 800, 1333)]
    assert max(wide) == 2000 and wide[0] == 1333


@pytest.mark.parametrize("agnostic", [False, True])
def test_box_voting_worked_by_hand(agnostic):
    united = torch.tensor(
        [[0, 0, 100, 100], [0, 0, 100, 94], [4, 0, 100, 100], [0, 0, 100, 50.0], [0, 0, 100, 98]]
    )
    scores = torch.tensor([[0, 0, 0.9], [0, 0, 0.6], [0, 0, 0.3], [0, 0, 0.8], [0, 0.9, 0.04]])
    boxes = united[:, None] if agnostic else united[:, None].expand(-1, 2, -1)
    kept = {"boxes": united[[0, 3]], "labels": torch.tensor([2, 2])}
    voted = evaluate.vote_boxes(kept, scores, boxes, 0.05)
    # The first three agree (IoU 1, 0.94, 0.96); the half does not; the last's score is too small.
    expected = [[0.3 * 4 / 1.8, 0, 100, (0.9 * 100 + 0.6 * 94 + 0.3 * 100) / 1.8], [0, 0, 100, 50]]
    torch.testing.assert_close(voted, torch.tensor(expected))
    with torch.autocast("cpu", torch.bfloat16):  # evaluate.py --amp
        assert torch.equal(evaluate.vote_boxes(kept, scores, boxes, 0.05), voted)


def test_keypoint_models_have_no_augmentation():
    with pytest.raises(UserError, match="Keypoint"):
        evaluate.predict(Oracle({}, keypoints=17), some_image(), tta=True)


# ---- Prediction on an image


def test_predictions_are_in_the_images_own_pixels():
    image = torch.zeros(3, 120, 160, dtype=torch.uint8) + 10
    found = {
        "boxes": torch.tensor([[20.0, 30.0, 76.0, 86.0], [150.0, 100.0, 200.0, 140.0]]),
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.9, 0.8]),
        "masks": torch.ones(2, 28, 28),
        "keypoints": torch.tensor([[[30.0, 40.0, 1.0]] * 17] * 2),
        "width": 160,
    }
    for height, width in ((60, 80), (240, 320)):
        model = Oracle({10: found | {"keypoints": found["keypoints"] * width / 160}})
        detections = evaluate.predict(model, image, min_size=height, max_size=width)
        expected = torch.tensor([[20.0, 30.0, 76.0, 86.0], [150.0, 100.0, 160.0, 120.0]])
        torch.testing.assert_close(detections["boxes"], expected)
        assert detections["masks"].shape == (2, 120, 160)
        assert detections["masks"][0].sum() == 56 * 56
        assert detections["masks"][0, 30:86, 20:76].all()
        expected = torch.tensor([30.0, 40.0]).expand(2, 17, 2)
        torch.testing.assert_close(detections["keypoints"][..., :2], expected)


def test_paths_arrays_and_tensors_are_the_same_image(tmp_path):
    image = some_image()
    array = image.permute(1, 2, 0).numpy()
    Image.fromarray(array).save(tmp_path / "a.png")
    bgr = np.ascontiguousarray(array[..., ::-1])
    expected = evaluate.predict(small_model(), image)
    for same in (tmp_path / "a.png", str(tmp_path / "a.png"), array, bgr[..., ::-1]):
        found = evaluate.predict(small_model(), same)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    found = evaluate.predict(small_model(), array.astype(np.float64) / 255)
    assert len(found["boxes"]) > 3
    for wrong in (array[:, :, 0], image[:2], image[None], np.zeros((5, 5, 4)), image.float()):
        with pytest.raises(ValueError, match="image"):
            evaluate.predict(small_model(), wrong)
    with pytest.raises(UserError, match="nothing.png"):
        evaluate.predict(small_model(), "nothing.png")


def test_bfloat16_finds_about_the_same(tmp_path):
    tiny_coco(tmp_path)
    model = small_model()
    dataset = open_tiny(tmp_path)
    dataset.classes, dataset.category_ids = ["a", "b", "c"], [3, 7, 8]
    dataset.coco_gt = open_tiny(tmp_path).coco_gt
    results = []
    for amp in (False, True):
        evaluate.evaluate(model, dataset, tmp_path / str(amp), workers=0, amp=amp)
        results.append(json.loads((tmp_path / str(amp) / "results_segm.json").read_text()))
    plain, amp = ([result["score"] for result in kind] for kind in results)
    assert plain != amp and abs(len(plain) - len(amp)) <= 4
    assert max(amp) == pytest.approx(max(plain), abs=0.1)


# ---- Pictures


def test_pictures_show_boxes_masks_and_names():
    image = red_rectangle()
    detections = evaluate.predict(Seer(), image)
    picture = evaluate.draw(image, detections, ["red"])
    assert picture.dtype == torch.uint8 and picture.shape == (3, 360, 480)
    plain = evaluate.draw(image, detections, score=0.95)
    changed = (picture != plain).any(0)
    assert changed[73, 97:287].all()  # the upper edge of the box, three times as large
    assert changed[80:210, 100:180].all() and not changed[80:210, 200:280].any()  # the mask
    name = changed[:71].nonzero()
    assert 8 < name[:, 0].max() - name[:, 0].min() < 30  # above the box, which it does not cover
    assert not changed[:, :90].any() and not changed[:50].any()
    soft = detections | {"masks": torch.ones(1, 28, 28)}  # as the model gives them
    assert (evaluate.draw(image, soft, ["red"]) != plain).any(0)[80:210, 200:280].all()


@pytest.mark.parametrize("size", [(100, 150), (900, 3200)])
@pytest.mark.parametrize("at_end", [False, True])
def test_names_are_beside_small_objects_and_can_be_read(size, at_end):
    """In pictures that are enlarged and shrunk, at their borders."""
    image = torch.zeros(3, *size, dtype=torch.uint8)
    box = [size[1] - 6, size[0] - 6, size[1], size[0]] if at_end else [0, 0, 6, 6]
    found = {"boxes": torch.tensor([box]).float(), "labels": torch.tensor([1])}
    found |= {"scores": torch.tensor([0.9]), "keypoints": torch.full((1, 17, 3), box[0] + 3.0)}
    picture = evaluate.draw(image, found, ["a thing"])
    assert max(picture.shape) == min(max(480, size[1]), 1600)
    x1, y1, x2, y2 = (round(side * picture.shape[2] / size[1]) for side in box)
    name = picture.any(0)
    name[max(0, y1 - 2) : y2 + 2, max(0, x1 - 9) : x2 + 9] = False
    rows, columns = name.nonzero().T
    assert rows.max() - rows.min() > picture.shape[2] // 80  # as high as text to be read
    assert columns.max() - columns.min() > 2 * (rows.max() - rows.min())
    drawn = picture.any(0)
    inside = drawn[y1 + 3 : y2 - 3, x1 + 3 : x2 - 3]  # keypoints only: no name
    assert not inside.numel() or inside.float().mean() < 0.8


def test_a_pictures_failure_costs_nothing_else(tmp_path, monkeypatch, capsys):
    """And masks of the truth, which may be of a huge image, are not read for a picture."""
    model = Oracle(tiny_coco(tmp_path))
    dataset = open_tiny(tmp_path)
    monkeypatch.setattr(data, "paint_segmentation", None)
    draw, drawn = evaluate.draw, []

    def once(*arguments):
        drawn.append(arguments)
        if len(drawn) == 2:
            raise MemoryError("30 GiB")
        return draw(*arguments)

    monkeypatch.setattr(evaluate, "draw", once)
    paths = evaluate.save_pictures(model, dataset, tmp_path / "pictures", count=3)
    assert [path.name for path in paths] == ["10_detections.png", "30_detections.png"]
    assert all(path.exists() for path in paths)
    error = capsys.readouterr().err
    assert "20.png" in error and error.count("\n") == 1
    (tmp_path / "file").touch()
    assert evaluate.save_pictures(model, dataset, tmp_path / "file", count=2) == []


# ---- Command line


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Arguments that name weights, whose model is an Oracle of `tiny_coco` in tmp_path / "data"."""
    model = Oracle(tiny_coco(tmp_path / "data"))
    monkeypatch.setattr(evaluate, "load_model", lambda path: model)
    return ["--device", "cpu", "--weights", "w"]


def run(*arguments):
    return evaluate.main([str(argument) for argument in arguments])


def test_tables_on_the_command_line(tmp_path, weights, capsys):
    out = tmp_path / "out"
    arguments = [*weights, "--workers", 0, "--data"]
    assert run(*arguments, tmp_path / "data", "--out", out, "--per-class") == 0
    shown = capsys.readouterr().out
    assert "disc" in shown and "segm" in shown and "100.0" in shown
    assert {path.name for path in out.iterdir()} >= {"results_bbox.json", "results_segm.json"}
    assert run(*arguments, tmp_path / "none") == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_the_split_asked_for_is_the_one_that_is_scored(tmp_path, weights, monkeypatch, capsys):
    tiny_coco(tmp_path / "data", split="train2017")
    for path in (tmp_path / "data" / "val2017").iterdir():
        path.unlink()
    arguments = [*weights, "--workers", 0, "--data", tmp_path / "data"]
    assert run(*arguments, "--split", "train2017") == 0
    assert run(*arguments, "--split", "test") == 1
    assert "test" in capsys.readouterr().err
    model = Oracle(tiny_voc(tmp_path / "voc"), masks=False, classes=list(data.VOC_CLASSES))
    monkeypatch.setattr(evaluate, "load_model", lambda path: model)
    out = tmp_path / "out"
    arguments = [*weights, "--workers", 0, "--data", tmp_path / "voc", "--out", out]
    assert run(*arguments, "--split", "train2017") == 0
    ids = {one["image_id"] for one in json.loads((out / "results_bbox.json").read_text())}
    assert ids == {10, 2008000020}
    assert run(*arguments, "--split", "train2012") == 1


@pytest.mark.parametrize(
    "wrong",
    [
        *("--data=", "--export=", "--images=", "--data=x --out=", "--data=x --weights="),
        *("--data=x --workers=-1", "--images=x --score=1.5", "--images=x --score=nan"),
        *("--data=x --device=mps", "--data=x --device=cuda:99", "--data=x --device=gpu"),
        *("", "--data=x --images=y"),
    ],
)
def test_bad_use_has_exit_code_2(tmp_path, weights, wrong, capsys):
    try:
        code = run(*weights, *wrong.split())
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("evaluate.py: ")  # with "error: " after it, where argparse says it


def test_pictures_of_images_never_replace_an_image(tmp_path, weights, capsys):
    folder = tmp_path / "data" / "val2017"
    os.rename(folder / "20.png", folder / "10_detections.png")
    before = (folder / "10_detections.png").read_bytes()
    images = [folder / "10.png", folder / "10_detections.png"]
    for _ in range(2):  # the second time beside the pictures of the first
        assert run(*weights, "--images", *images, "--out", folder) == 0
    assert (folder / "10_detections.png").read_bytes() == before
    shown = capsys.readouterr().out
    assert "bar" in shown and "10_detections_.png" in shown
    made = {path.name for path in folder.glob("*_detections*")}
    made.remove("10_detections.png")
    assert made == {"10_detections_.png", "10_detections_detections.png"}


def test_folders_of_images(tmp_path, weights, capsys):
    folder = tmp_path / "data" / "val2017"
    Image.open(folder / "10.png").save(folder / "a.GIF", "gif")
    Image.open(folder / "10.png").save(folder / "b.ppm")
    (folder / "15.png").write_bytes(b"no image")  # the others are looked at all the same
    (folder / "notes.txt").write_text("no image")
    out = tmp_path / "out"
    for _ in range(2):
        assert run(*weights, "--images", folder, "--out", folder) == 1
    told = capsys.readouterr()
    assert "15.png" in told.err and "Traceback" not in told.err
    names = {path.name for path in folder.glob("*_detections.png")}
    assert names == {f"{name}_detections.png" for name in ("10", "20", "30", "40", "a", "b")}
    (out / "empty").mkdir(parents=True)
    assert run(*weights, "--images", out / "empty") == 1
    surrogate = os.fsdecode(b"\xff.png")  # not UTF-8
    os.rename(folder / "10.png", folder / surrogate)
    assert run(*weights, "--images", folder / surrogate, "--out", out) == 0


def test_export_leaves_the_momentum_out_and_replaces_no_file(tmp_path, capsys):
    full, small = tmp_path / "a.pt", tmp_path / "b.pt"
    mask_rcnn.save_model(small_model(), full, momentum={"w": torch.ones(3)}, iteration=7)
    before = full.read_bytes()
    assert run("--weights", full, "--export", small) == 0
    exported = torch.load(small, weights_only=True)
    assert "momentum" not in exported and exported["iteration"] == 7
    mask_rcnn.load_model(small)
    (tmp_path / "link.pt").symlink_to(full)
    for taken in (full, tmp_path / "link.pt", tmp_path):
        assert run("--weights", full, "--export", taken) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert full.read_bytes() == before
    assert run("--weights", full, "--export", tmp_path / "none" / "c.pt") == 1
    assert str(tmp_path / "none") in capsys.readouterr().err


# ---- Plumbing: processes, lock, errors, memory


@pytest.mark.parametrize(
    "said, rank",
    [
        ("", (0, 1)),
        ("RANK=0 LOCAL_RANK=0 WORLD_SIZE=1", (0, 1)),
        ("RANK=1", None),
        ("WORLD_SIZE=2", None),
        ("LOCAL_RANK=1", None),
        ("RANK=0 WORLD_SIZE=1", None),
        ("RANK=2 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=x", None),
        ("RANK=0 LOCAL_RANK=1 WORLD_SIZE=2 MASTER_ADDR=x", None),
        ("RANK=-1 LOCAL_RANK=0 WORLD_SIZE=1", None),
        ("RANK=a LOCAL_RANK=0 WORLD_SIZE=1", None),
        ("RANK=1 LOCAL_RANK=1 WORLD_SIZE=2", None),  # of a torchrun that is gone
    ],
)
def test_ranks_fit_together_or_nothing_starts(said, rank, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    variables = dict(one.split("=") for one in said.split())
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if rank is None:
        with pytest.raises(UserError, match="torchrun") as error:
            evaluate.start_processes("cpu")
        assert error.value.code == 2 and all(name in str(error.value) for name in variables)
    else:
        assert evaluate.start_processes("cpu") == (*rank, torch.device("cpu"))


def hold(out, connection):
    """A run that holds the lock on `out`, with a loading process that may outlive it."""
    os.setsid()
    with evaluate.lock_folder(out):
        if os.fork() == 0:
            time.sleep(60)
        connection.send("locked")
        time.sleep(60)


def test_two_evaluations_do_not_share_a_folder(tmp_path, weights, capfd):
    out = tmp_path / "out"
    out.mkdir()
    (out / "results_bbox.json").write_text("another's")
    arguments = [*weights, "--data", tmp_path / "data", "--out", out, "--workers", 0]
    connection, there = multiprocessing.Pipe()
    holder = multiprocessing.get_context("fork").Process(target=hold, args=(out, there))
    holder.start()
    try:
        assert connection.recv() == "locked"
        assert run(*arguments) == 2
        error = capfd.readouterr().err
        assert str(out) in error and error.count("\n") == 1
        assert (out / "results_bbox.json").read_text() == "another's"
        holder.kill()  # with the lock held, and its child alive
        holder.join()
        assert run(*arguments) == 0
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_while_importing_ends_without_a_traceback(tmp_path, name):
    slow = "import time\nprint('importing', flush=True)\ntime.sleep(60)"
    (tmp_path / "torch.py").write_text(slow)
    command = [sys.executable, "evaluate.py", "--help"]
    settings = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(tmp_path)}, "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **settings, **pipes) as process:
        assert process.stdout.readline() == "importing\n"
        time.sleep(0.1)
        process.send_signal(getattr(signal, name))
        _, error = process.communicate(timeout=30)
    assert process.returncode == -getattr(signal, name) and error == ""


def raise_(error):
    raise error


@pytest.mark.parametrize(
    "error, code, words",
    [
        (UserError("a file is wrong", code=2), 2, "a file is wrong"),
        (UserError("two\nlines"), 1, "two lines"),
        (mask_rcnn.WeightsError("w.pt is broken"), 1, "w.pt"),
        (OSError(28, "No space left on device", "x/y.json"), 1, "x/y.json"),
        (OSError("odd"), 1, "odd"),
        (ImportError("pip install matplotlib"), 1, "matplotlib"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), 1, "--images-per-gpu 1"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_of_users_are_one_line(error, code, words, capsys):
    assert evaluate.run_command("tool.py", raise_, error) == code
    told = capsys.readouterr().err
    assert told.startswith("tool.py: ") and words in told and told.count("\n") == 1


def test_other_errors_pass_through_and_codes_come_back(capsys):
    with pytest.raises(ZeroDivisionError):
        evaluate.run_command("tool.py", raise_, ZeroDivisionError())
    assert evaluate.run_command("tool.py", lambda arguments: None) == 0
    assert evaluate.run_command("tool.py", lambda arguments: len(arguments), "abc") == 3


def test_a_closed_pipe_is_no_error(monkeypatch, capsys):
    """Of `... | head`, which has seen enough."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert evaluate.run_command("x", lambda _: print("much\n" * 9**5)) == 1
    assert capsys.readouterr().err == ""


KEEPING = """
import torch, evaluate
def kept():
    before, x = resident(), torch.ones(64, 2**20)  # 256 MB
    del x
    return resident() - before
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
print(kept())
evaluate.start_processes("cpu")
print(kept())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc's malloc")
def test_freed_memory_is_kept_for_the_next_step():
    command = [sys.executable, "-c", KEEPING]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    by_default, ours = map(float, done.stdout.split())
    assert by_default < 200 < ours
