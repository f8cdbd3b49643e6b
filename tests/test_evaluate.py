"""evaluate.py: masks pasted and encoded, test-time augmentation, COCO and VOC metrics, pictures."""

import builtins
import contextlib
import io
import json
import math
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

import data
import evaluate

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


@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_masks_are_pasted_where_the_formula_says(threshold):
    boxes = torch.tensor(BOXES)
    masks = some_masks(len(boxes))
    masks[3] = 1  # full, also at the edges
    pasted = evaluate.paste_masks(masks, boxes, 30, 40, threshold)
    assert pasted.dtype == torch.bool and pasted.shape == (len(boxes), 30, 40)
    assert pasted[0].any() and not pasted[4:7].any() and pasted[7].sum() <= 1
    assert not pasted[9].any()
    for mask, box, got in zip(masks.double().numpy(), boxes.double().tolist(), pasted.numpy()):
        if box[0] == box[2]:
            continue
        values = paste_by_hand(mask, box, 30, 40)
        clear = np.abs(values - threshold) > 1e-5
        assert clear.mean() > 0.99
        np.testing.assert_array_equal(got[clear], (values >= threshold)[clear])


def test_a_pixel_centre_on_the_edge_of_the_box_belongs_to_it():
    pasted = evaluate.paste_masks(torch.ones(1, 28, 28), torch.tensor([[2.5, 3, 30.5, 31]]), 40, 40)
    expected = torch.zeros(40, 40, dtype=torch.bool)
    expected[3:31, 2:31] = True  # exactly 0.5 at columns 2 and 30, and Detectron2 says >=
    assert torch.equal(pasted[0], expected)


def test_run_lengths_of_the_window_are_those_of_the_image():
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(150, 2, 2, generator=generator) * torch.tensor([60.0, 50.0]) - 10
    boxes = torch.cat([corners.amin(1), corners.amax(1)], dim=1)
    boxes = torch.cat([torch.tensor(BOXES), boxes])
    masks = some_masks(len(boxes), seed=2)
    masks[::7] = 1
    masks[2] = (torch.arange(28) % 2 == 0).float()[:, None]  # stripes that end at the columns' ends
    pasted = evaluate.paste_masks(masks, boxes, 30, 40).numpy()
    for mask, box, whole in zip(masks.numpy(), boxes.tolist(), pasted):
        code = evaluate.window_rle(*evaluate.paste_window(mask, box, 30, 40), 30, 40)
        expected = coco_mask.encode(np.asfortranarray(whole.astype(np.uint8)))
        assert code == {"size": [30, 40], "counts": expected["counts"].decode()}


# ---- Models without weights, whose detections are known


class Oracle(nn.Module):
    """Stands in for MaskRCNN: returns given detections, found by the first pixel of the image."""

    def __init__(self, detections, masks=True, keypoints=0):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = {"num_classes": 2, "masks": masks, "keypoints": keypoints}
        self.data_settings = {"min_size": 96, "max_size": 200, "classes": CLASSES}
        self.calls = 0
        self.detections = detections  # first pixel's red value -> detections at full size

    def forward(self, images):
        assert not self.training
        self.calls += 1
        results = []
        for image in images:
            found = dict(self.detections[int(image[0, 0, 0])])
            scale = image.shape[2] / found.pop("width")
            results.append(found | {"boxes": found["boxes"] * scale})
        return results


def tiny_coco(root):
    """4 images (one empty, one with a crowd) of rectangles, as COCO files, and exact detections.

    Rectangles have whole multiples of 28 pixels as sides, so that 28 x 28 masks are exact.
    """
    objects = {  # image -> (category, x, y, w, h, crowd)
        10: [(3, 4, 5, 28, 28, 0), (7, 40, 20, 56, 28, 0)],
        20: [],
        30: [(7, 0, 0, 28, 56, 0), (3, 30, 10, 56, 56, 1)],
        40: [(3, 60, 40, 56, 28, 0), (3, 1, 2, 28, 28, 0), (7, 33, 50, 28, 28, 0)],
    }
    width, height = 120, 96
    coco = {"images": [], "annotations": [], "categories": []}
    for category_id, name in zip(CATEGORY_IDS, CLASSES):
        coco["categories"].append({"id": category_id, "name": name})
    detections = {}
    (root / "val2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    for image_id, boxes in objects.items():
        image = np.zeros((height, width, 3), np.uint8) + image_id
        Image.fromarray(image).save(root / "val2017" / f"{image_id}.png")
        coco["images"].append(
            {"id": image_id, "file_name": f"{image_id}.png", "width": width, "height": height}
        )
        found = []
        for category, x, y, w, h, crowd in boxes:
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            segmentation = [polygon]
            if crowd:
                segmentation = coco_mask.frPyObjects([polygon], height, width)[0]
                segmentation["counts"] = segmentation["counts"].decode()
            else:
                found.append([category, x, y, x + w, y + h])
            coco["annotations"].append(
                {
                    "id": len(coco["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": crowd,
                    "segmentation": segmentation,
                }
            )
        found = torch.tensor(found, dtype=torch.float32).reshape(-1, 5)
        detections[image_id] = {
            "boxes": found[:, 1:],
            "labels": torch.tensor([CATEGORY_IDS.index(c) + 1 for c in found[:, 0].int()]).long(),
            "scores": torch.linspace(0.9, 0.6, len(found)),
            "masks": torch.ones(len(found), 28, 28),
            "width": width,
        }
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(coco))
    return detections


def open_tiny(root):
    return data.CocoDataset(root / "val2017", root / "annotations" / "instances_val2017.json")


def imperfect(detections):
    """The same with boxes moved, a wrong class, a false positive and masks with a hole."""
    generator = torch.Generator().manual_seed(5)
    changed = {}
    for image_id, found in detections.items():
        boxes = found["boxes"] + 6 * torch.rand(found["boxes"].shape, generator=generator) - 3
        boxes = torch.cat([boxes, torch.tensor([[7.0, 7.0, 40.0, 30.0]])])
        masks = torch.ones(len(boxes), 28, 28)
        masks[:, 10:18, 5:20] = 0
        changed[image_id] = {
            "boxes": boxes,
            "labels": torch.cat([found["labels"], torch.tensor([1])]),
            "scores": torch.rand(len(boxes), generator=generator),
            "masks": masks,
            "width": found["width"],
        }
    changed[40]["labels"][2] = 1
    return changed


def by_hand(annotations, results, kind):
    """pycocotools' own numbers on two files."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        scorer = COCOeval(truth, truth.loadRes(str(results)), kind)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    names = evaluate.COCO_METRICS[kind]
    return [None if value == -1 else 100 * value for value in scorer.stats[: len(names)]]


def test_perfect_detections_have_ap_100(tmp_path):
    model = Oracle(tiny_coco(tmp_path)).train()
    metrics = evaluate.evaluate(model, open_tiny(tmp_path), workers=0, per_class=True)
    for kind in ("bbox", "segm"):
        per_class = metrics[kind].pop("per_class")
        assert per_class == {"disc": pytest.approx(100), "bar": pytest.approx(100)}
        assert metrics[kind]["AP"] == pytest.approx(100) and metrics[kind]["APl"] is None
    assert model.training  # as it was before
    assert "100.0" in evaluate.format_table(metrics)


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
        expected = by_hand(dataset.annotation_file, out / f"results_{kind}.json", kind)
        assert list(metrics[kind].values()) == expected
        assert 5 < metrics[kind]["AP"] < 95
    json.dumps(metrics, allow_nan=False)
    # Found nothing at all, which pycocotools cannot read.
    nothing = {k: {n: v[:0] if n != "width" else v for n, v in found.items()}
               for k, found in model.detections.items()}  # fmt: skip
    metrics = evaluate.evaluate(Oracle(nothing), dataset, out, workers=0)
    assert metrics["bbox"]["AP"] == 0 and metrics["segm"]["AP"] == 0
    assert json.loads((out / "results_segm.json").read_text()) == []


def evaluate_in_process(rank, root, detections):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{root}/meeting", rank=rank, world_size=2
    )
    model = Oracle(detections)
    metrics = evaluate.evaluate(model, open_tiny(root), root / "two", rank, 2, workers=0)
    assert model.calls == 2  # of the four images
    (root / f"metrics_{rank}.json").write_text(json.dumps(metrics))
    torch.distributed.destroy_process_group()


def test_two_processes_write_what_one_does(tmp_path):
    detections = imperfect(tiny_coco(tmp_path))
    one = evaluate.evaluate(Oracle(detections), open_tiny(tmp_path), tmp_path / "one", workers=0)
    mp.spawn(evaluate_in_process, (tmp_path, detections), nprocs=2)
    for rank in range(2):
        assert json.loads((tmp_path / f"metrics_{rank}.json").read_text()) == one
    files = sorted(p.name for p in (tmp_path / "two").iterdir())
    assert files == ["results_bbox.json", "results_segm.json"]
    for name in files:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_a_killed_evaluation_leaves_no_results(tmp_path):
    detections = tiny_coco(tmp_path)
    out = tmp_path / "out"
    evaluate.evaluate(Oracle(detections), open_tiny(tmp_path), out, workers=0)
    assert (out / "results_bbox.json").exists()
    del detections[40]  # the last image: stands for the kill
    with pytest.raises(KeyError):
        evaluate.evaluate(Oracle(detections), open_tiny(tmp_path), out, workers=0)
    assert [p.name for p in out.iterdir()] == ["results_partial_0.jsonl"]
    assert len((out / "results_partial_0.jsonl").read_text().splitlines()) >= 2


def test_keypoints_are_pixel_indices_in_the_file():
    detections = {
        "boxes": torch.tensor([[1.0, 2.0, 31.0, 42.0]]),
        "labels": torch.tensor([1]),
        "scores": torch.tensor([0.75]),
        "keypoints": torch.tensor([[[10.5, 20.5, 1.0]] * 17]),
    }
    (result,) = evaluate.coco_results(5, detections, 50, 60, [9])
    assert result["keypoints"] == [10.0, 20.0, 1.0] * 17
    assert result["bbox"] == [1.0, 2.0, 30.0, 40.0] and result["category_id"] == 9


def test_keypoint_metrics_are_pycocotools(tmp_path):
    """Also for a file without "num_keypoints", which pycocotools cannot do without."""
    generator = torch.Generator().manual_seed(3)
    root = tmp_path / "val2017"
    root.mkdir()
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "person"}]}
    perfect, imperfect = {}, {}
    for image_id in (10, 20, 30):
        Image.new("RGB", (200, 160), (image_id,) * 3).save(root / f"{image_id}.png")
        name = {"id": image_id, "file_name": f"{image_id}.png", "width": 200, "height": 160}
        content["images"].append(name)
        boxes = torch.tensor([[10.0, 20, 60, 90], [70, 10, 190, 150]])
        corner, side = boxes[:, None, :2], (boxes[:, 2:] - boxes[:, :2])[:, None]
        points = (corner + side * torch.rand(2, 17, 2, generator=generator)).floor()
        visible = torch.randint(3, (2, 17, 1), generator=generator)
        for box, xyv in zip(boxes.tolist(), torch.cat([points, visible], dim=2)):
            xyv[xyv[:, 2] == 0] = 0
            content["annotations"].append({
                "id": len(content["annotations"]) + 1, "image_id": image_id, "category_id": 1,
                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]], "iscrowd": 0,
                "area": (box[2] - box[0]) * (box[3] - box[1]),
                "keypoints": xyv.flatten().int().tolist(),
                "num_keypoints": int((xyv[:, 2] > 0).sum()),
            })  # fmt: skip
        for found, noise in ((perfect, 0), (imperfect, 8)):
            moved = points + 0.5 + noise * torch.randn(points.shape, generator=generator)
            found[image_id] = {
                "boxes": boxes,
                "labels": torch.ones(2, dtype=torch.int64),
                "scores": torch.tensor([0.9, 0.8]),
                "keypoints": torch.cat([moved, torch.ones(2, 17, 1)], dim=2),
                "width": 200,
            }
    counted = tmp_path / "counted.json"
    counted.write_text(json.dumps(content))
    for annotation in content["annotations"]:
        del annotation["num_keypoints"]
    uncounted = tmp_path / "uncounted.json"
    uncounted.write_text(json.dumps(content))

    ap = {}
    for name, detections in {"perfect": perfect, "imperfect": imperfect}.items():
        model = Oracle(detections, masks=False, keypoints=17)
        model.config["num_classes"] = 1
        model.data_settings = {"min_size": 160, "max_size": 200, "classes": ["person"]}
        dataset = data.CocoDataset(root, uncounted, masks=False, keypoints=True)
        metrics = evaluate.evaluate(model, dataset, tmp_path / name, workers=0)
        ap[name] = metrics["keypoints"]["AP"]
        written = tmp_path / name / "results_keypoints.json"
        assert list(metrics["keypoints"].values()) == by_hand(counted, written, "keypoints")
    assert ap["perfect"] == pytest.approx(100) and 5 < ap["imperfect"] < 95


@pytest.mark.parametrize("polygons", [[], [[]], [[1, 2, 3, 4]], [[1, 2, 3, 4], None]])
def test_polygons_that_training_leaves_out_are_empty_masks(tmp_path, polygons):
    detections = tiny_coco(tmp_path)
    file = tmp_path / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    whole = content["annotations"][0]["segmentation"]
    content["annotations"][0]["segmentation"] = [
        whole[0] if p is None else p for p in polygons
    ]
    file.write_text(json.dumps(content))
    metrics = evaluate.evaluate(Oracle(detections), open_tiny(tmp_path), workers=0)
    assert metrics["bbox"]["AP"] == pytest.approx(100)
    assert (metrics["segm"]["AP"] > 99) == (None in polygons)  # a mask that nothing can match

    content["annotations"][0]["segmentation"] = {"size": [96, 120], "counts": [5]}
    file.write_text(json.dumps(content))
    model = Oracle(detections)
    with pytest.raises(data.DataError, match="annotation 1 of image 10"):
        evaluate.evaluate(model, open_tiny(tmp_path), workers=0)
    assert model.calls == 0  # said before the work, not after it


def test_other_classes_and_unreadable_images_are_one_sentence(tmp_path):
    model = Oracle(tiny_coco(tmp_path))
    dataset = open_tiny(tmp_path)
    model.data_settings["classes"] = ["disc", "star"]
    with pytest.raises(data.DataError, match="star"):
        evaluate.evaluate(model, dataset, workers=0)
    model.config["num_classes"] = 80
    with pytest.raises(data.DataError, match="80 classes"):
        evaluate.evaluate(model, dataset, workers=0)
    model = Oracle(model.detections)
    (tmp_path / "val2017" / "30.png").write_bytes(b"no image")
    with pytest.raises(data.DataError, match="30.png") as error:
        evaluate.evaluate(model, dataset, workers=1)
    assert "\n" not in str(error.value)


# ---- PASCAL VOC


def test_voc_average_precision_worked_by_hand():
    truths = {
        1: (np.array([[0, 0, 10, 10], [20, 20, 30, 30.0]]), np.array([False, False])),
        2: (np.array([[0, 0, 10, 10], [40, 40, 50, 50.0]]), np.array([False, True])),
    }
    found = [
        (1, 0.4, [20, 20, 30, 30]),  # true positive (4th that counts): precision 2/4
        (1, 0.9, [0, 0, 10, 10]),  # true positive: precision 1/1, recall 1/3
        (1, 0.8, [0, 0, 10, 9]),  # the same object again: false positive
        (2, 0.7, [40, 40, 50, 50]),  # difficult: counts for nothing
        (2, 0.6, [0, 0, 10, 4.9]),  # IoU 0.49: false positive
        (2, 0.2, [0, 0, 10, 5]),  # IoU 0.5, just enough: true positive, precision 3/5
        (3, 0.1, [0, 0, 5, 5]),  # an image without objects: false positive
    ]
    # Recall 1/3 at precision 1, 2/3 and 3/3 at precision 3/5, which is the best from 2/3 on.
    expected = (1 + 3 / 5 + 3 / 5) / 3
    assert evaluate.voc_average_precision(found, truths) == pytest.approx(expected)
    assert evaluate.voc_average_precision([], truths) == 0
    assert evaluate.voc_average_precision(found, {2: (truths[2][0][1:], np.array([True]))}) is None


def test_voc_data_sets_are_scored_by_voc_rules(tmp_path):
    detections = tiny_coco(tmp_path)
    dataset = open_tiny(tmp_path)
    truths = {category: {} for category in CATEGORY_IDS}
    for image_id, found in detections.items():
        for k, category in enumerate(CATEGORY_IDS, start=1):
            boxes = found["boxes"][found["labels"] == k].numpy()
            truths[category][image_id] = (boxes, np.zeros(len(boxes), bool))
    dataset.voc_truths = lambda: truths
    model = Oracle(detections, masks=False)
    for found in detections.values():
        found.pop("masks")
    assert evaluate.evaluate(model, dataset, workers=0) == {"voc": {"mAP50": pytest.approx(100)}}
    detections[10]["scores"][0] = 0.1
    detections[10]["boxes"] = detections[10]["boxes"].clone()
    detections[10]["boxes"][0] += 30  # one of three discs is missed, the worst by score
    per_class = evaluate.evaluate(model, dataset, workers=0, per_class=True)["voc"]["per_class"]
    assert per_class == {"disc": pytest.approx(200 / 3), "bar": pytest.approx(100)}


# ---- Test-time augmentation


class Seer(nn.Module):
    """Stands in for MaskRCNN: sees a red rectangle in an image wherever and however large it is.

    Its mask is the yellow half; its first keypoint, the nose, is in the middle; its second and
    third, the left and right eye, a quarter from the edges: the left one is on the image's right.
    """

    config = {"num_classes": 1, "masks": True, "keypoints": 17, "box_score_thresh": 0.05}
    data_settings = {"min_size": 80, "max_size": 133, "classes": ["red"]}

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
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
        return {
            "boxes": boxes[best],
            "labels": torch.tensor([1]),
            "scores": scores[best, 1][None],
        }

    def mask_probabilities(self, features, boxes, labels):
        seen = self.proposals(features, None)[0][0]
        assert (boxes[0] - seen).abs().max() < 2.5  # the final box, in the pixels of this view
        mask = torch.zeros(1, 28, 28)
        mask[:, :, :14] = 1
        return [mask.flip(-1) if features[1] else mask]

    def keypoint_heatmaps(self, features, boxes):
        maps = torch.zeros(1, 17, 56, 56)
        maps[:, 0, 27:29, 27:29] = 20
        maps[:, 3:, 50, 27:29] = 20
        maps[:, 1, 13:15, 41:43] = 20  # left and right stay what they look like in a mirror
        maps[:, 2, 13:15, 13:15] = 20
        if features[0].shape[0] < 80:
            maps = 100 * maps.flip(-2)  # wrong in smaller views, which this small box leaves out
        return [maps]

    def forward(self, images):
        views = [evaluate.View(*images[0].shape[-2:], scale=80)]
        return [evaluate.augmented_detections(self, images[0], views)]


def red_rectangle(height=120, width=160, box=(32, 24, 96, 72)):
    """An image with a red rectangle, whose left half is yellow: a mirror image can be told."""
    x1, y1, x2, y2 = box
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[0, y1:y2, x1:x2] = 255
    image[1, y1:y2, x1 : (x1 + x2) // 2] = 255
    return image


def test_all_views_see_the_same_boxes_masks_and_keypoints():
    model = Seer()
    image = red_rectangle()
    plain = evaluate.predict(model, image)
    assert len(model.seen) == 2
    model.seen.clear()
    found = evaluate.predict(model, image, tta=True)
    shorter = [80, 80] + [s for scale in evaluate.TTA_SCALES for s in [scale // 10] * 2]
    assert [min(shape) for shape in model.seen] == shorter * 2
    own_box = torch.tensor([32.0, 24.0, 96.0, 72.0]) * 80 / 120
    assert model.united.shape == (18, 4) and (model.united - own_box).abs().max() < 1.5
    for detections in (plain, found):
        box = torch.tensor([[32.0, 24.0, 96.0, 72.0]])
        assert (detections["boxes"] - box).abs().max() < 1
        mask = torch.zeros(120, 160, dtype=torch.bool)
        mask[24:72, 32:64] = True
        overlap = (mask & detections["masks"][0]).sum() / (mask | detections["masks"][0]).sum()
        assert overlap > 0.95
        points = detections["keypoints"][0]
        expected = torch.tensor([[64.0, 48.0, 1], [80.0, 36.0, 1], [48.0, 36.0, 1]])
        assert (points[:3] - expected).abs().max() < 2
        assert detections["keypoints_scores"].shape == (1, 17)


def test_one_view_is_plain_prediction(monkeypatch):
    model = data_free_model()
    image = (torch.rand(3, 50, 70, generator=torch.Generator().manual_seed(0)) * 255).byte()
    plain = evaluate.predict(model, image)
    assert len(plain["scores"]) > 3

    def one(h, w, low, high):
        return [evaluate.View(*data.resize_shape(h, w, low, high), scale=low)]

    monkeypatch.setattr(evaluate, "tta_views", one)
    monkeypatch.setattr(evaluate, "vote_boxes", lambda detections, *_: detections["boxes"])
    augmented = evaluate.predict(model, image, tta=True)
    assert plain.keys() == augmented.keys()
    for name in plain:
        assert torch.equal(plain[name], augmented[name]), name


def data_free_model():
    """A small real model with random weights that finds something."""
    import model

    torch.manual_seed(0)
    small = model.build_model(
        num_classes=3, keypoints=17, blocks=(1, 1, 1, 1), fpn_channels=32, box_head_convs=1,
        box_head_channels=32, box_head_fc_channels=32, mask_head_convs=1, mask_head_channels=32,
        keypoint_head_convs=1, keypoint_head_channels=32, rpn_pre_nms_top_n_test=50,
        rpn_post_nms_top_n_test=20, box_detections_per_img=10,
    )  # fmt: skip
    nn.init.normal_(small.box_heads[0].classifier.weight, std=0.5)
    small.data_settings = {"min_size": 64, "max_size": 100, "classes": None, "category_ids": None}
    return small


def test_keypoints_of_small_boxes_leave_out_the_smaller_views():
    own = evaluate.View(800, 1067, scale=800)
    boxes = torch.tensor([[0, 0, 240, 240.0], [0, 0, 260, 260.0]])  # 144 and 156 px in the image
    image = torch.zeros(3, 480, 640)

    def fits(scale):
        view = evaluate.View(1, 1, scale=scale)
        return evaluate.keypoint_scale_fits(boxes, image, own, view).tolist()

    assert fits(700) == [0, 1] and fits(800) == [1, 1] and fits(900) == [1, 0]


def test_views_are_those_of_the_paper():
    views = evaluate.tta_views(480, 640, 800, 1333)
    assert len(views) == 18 and views[0] == evaluate.View(800, 1067, False, 800)
    assert {view.height for view in views} == {800, *evaluate.TTA_SCALES}
    assert max(view.width for view in evaluate.tta_views(400, 1600, 800, 1333)) == 2000
    assert evaluate.tta_views(400, 1600, 800, 1333)[0].width == 1333


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


# ---- Prediction on real weights' shapes, pictures, curves, command line


def test_predictions_are_in_the_images_own_pixels():
    image = torch.zeros(3, 120, 160, dtype=torch.uint8) + 10
    found = {
        "boxes": torch.tensor([[20.0, 30.0, 76.0, 86.0], [150.0, 100.0, 200.0, 140.0]]),
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.9, 0.8]),
        "masks": torch.ones(2, 28, 28),
        "width": 160,
    }
    for height, width in ((60, 80), (240, 320)):
        detections = evaluate.predict(Oracle({10: found}), image, min_size=height, max_size=width)
        expected = torch.tensor([[20.0, 30.0, 76.0, 86.0], [150.0, 100.0, 160.0, 120.0]])
        torch.testing.assert_close(detections["boxes"], expected)
        assert detections["masks"].shape == (2, 120, 160)
        assert detections["masks"][0].sum() == 56 * 56
        assert detections["masks"][0, 30:86, 20:76].all()


def test_pictures_show_boxes_and_names_and_small_images_are_enlarged(tmp_path):
    image = red_rectangle()
    detections = evaluate.predict(Seer(), image)
    picture = evaluate.draw(image, detections, ["red"])
    assert picture.dtype == torch.uint8 and picture.shape == (3, 360, 480)
    plain = evaluate.draw(image, detections, score=0.95)
    changed = (picture != plain).any(0)
    assert changed[73, 97:287].all()  # the upper edge of the box
    assert not changed[:, :90].any() and not changed[:60].any()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    (tmp_path / "a_detections.png").touch()
    assert evaluate.find_images([tmp_path]) == [tmp_path / "a.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(data.DataError, match="no image"):
        evaluate.find_images([tmp_path / "empty"])


def write_log(run):
    run.mkdir()
    lines = [{"iteration": i, "lr": 0.1, "loss": 2.0 / i} for i in range(1, 101)]
    lines.append({"iteration": 100, "bbox": {"AP": 12.0}, "segm": {"AP": None}})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "log.jsonl").write_text(text + '{"iteration": 10')  # killed while it wrote


def test_curves(tmp_path, monkeypatch, capsys):
    write_log(tmp_path / "run")
    assert evaluate.smooth([1, 3, 5, 7], 2).tolist() == [1, 2, 4, 6]
    assert evaluate.main(["--plot", str(tmp_path / "none"), "--out", "x.png"]) == 1
    assert "log.jsonl" in capsys.readouterr().err
    original = builtins.__import__

    def without_matplotlib(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    assert evaluate.main(["--plot", str(tmp_path / "run"), "--out", str(tmp_path / "x.png")]) == 1
    error = capsys.readouterr().err
    assert "pip install matplotlib" in error and error.count("\n") == 1
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert evaluate.main(["--plot", str(tmp_path / "run"), "--out", str(tmp_path / "x.png")]) == 0
    assert Image.open(tmp_path / "x.png").width > 500
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig

    def keep_and_save(figure, *arguments, **named):
        figures.append(figure)
        save(figure, *arguments, **named)

    monkeypatch.setattr(Figure, "savefig", keep_and_save)
    evaluate.plot([tmp_path / "run"], tmp_path / "x.png")
    ((ap,), (loss,)) = (axes.lines for axes in figures[0].axes)
    assert ap.get_xydata().tolist() == [[100, 12]]
    steps = np.arange(1, 101)
    np.testing.assert_array_equal(loss.get_xdata(), steps)
    smoothed = np.convolve(2 / steps, [0.5, 0.5])[1:100]
    np.testing.assert_allclose(loss.get_ydata()[1:], smoothed)


def test_command_line(tmp_path, monkeypatch, capsys):
    assert evaluate.main(["--plot", "run", "--out", "figure.xyz"]) == 2
    for wrong in ([], ["--data", "x"], ["--weights", "x"], ["--images", "a", "--plot", "b"]):
        with pytest.raises(SystemExit) as stop:
            evaluate.main(wrong)
        assert stop.value.code == 2
    assert evaluate.main(["--weights", str(tmp_path / "no.pt"), "--data", str(tmp_path)]) == 1
    assert evaluate.main(["--weights", "w", "--data", str(tmp_path), "--device", "mps"]) == 2
    capsys.readouterr()

    model = Oracle(tiny_coco(tmp_path))
    said = {}

    def load_model(path, verbose, **unsaid):
        said.update(unsaid)
        return model

    monkeypatch.setattr(evaluate.detector, "load_model", load_model)
    out = str(tmp_path / "out")
    arguments = ["--weights", "w", "--data", str(tmp_path), "--out", out, "--workers", "0"]
    assert evaluate.main([*arguments, "--per-class"]) == 0
    shown = capsys.readouterr().out
    assert "disc" in shown and "segm" in shown and "100.0" in shown
    assert said == {}
    folder = tmp_path / "val2017"
    (folder / "15.png").write_bytes(b"no image")  # the others are looked at all the same
    for _ in range(2):  # the second time beside the pictures of the first
        shown = ["--weights", "w", "--images", str(folder), "--out", str(folder)]
        public = ["--image-mean", "51", "0", "255", "--stride-in-1x1", "0"]
        assert evaluate.main([*shown, *public, "--roi-sampling-ratio", "0"]) == 1
        told = capsys.readouterr()
        assert "bar" in told.out and "15.png" in told.err and "1 of 5 images" in told.err
    assert len(list(folder.glob("*_detections*.png"))) == 4
    assert said == {
        "image_mean": (0.2, 0.0, 1.0), "stride_in_1x1": False, "roi_sampling_ratio": 0
    }  # fmt: skip
    assert evaluate.main(["--weights", "w", "--data", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_export_leaves_the_momentum_out(tmp_path):
    weights = {"model_config": {}, "model": {"w": torch.ones(3)}, "momentum": {"w": torch.ones(3)}}
    torch.save(weights, tmp_path / "a.pt")
    full, small = str(tmp_path / "a.pt"), str(tmp_path / "b.pt")
    assert evaluate.main(["--weights", full, "--export", small]) == 0
    exported = torch.load(small, weights_only=True)
    assert exported.keys() == {"model_config", "model"} and exported["model"]["w"].sum() == 3


KEEPING = """
import sys, torch, evaluate
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
if sys.argv[1] == "keep":
    evaluate.start_processes("cpu")
before = resident()
x = torch.ones(64, 2**20)  # 256 MB
del x
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc's malloc")
@pytest.mark.parametrize("mode, kept", [("keep", True), ("default", False)])
def test_freed_memory_is_kept_for_the_next_step(mode, kept):
    root = Path(evaluate.__file__).parent
    command = [sys.executable, "-c", KEEPING, mode]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert (float(done.stdout) > 200) == kept
