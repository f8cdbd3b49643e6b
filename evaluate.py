"""Prediction, metrics and pictures: how Mask R-CNN is tested (Sec. 4 and 5 of the paper).

    python evaluate.py --weights FILE --data DIR                COCO's or VOC's metrics
    python evaluate.py --weights FILE --images a.jpg FOLDER     detections as text and as pictures
    python evaluate.py --weights FILE --export SMALL            the weights alone, for sharing

In reading order: prediction on an image (`predict`), test-time augmentation, metrics over all
processes (`evaluate`), pictures (`draw`), command line. train.py uses the plumbing at the end, too.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    # Ctrl-C during the imports below, which take seconds, ends the process silently.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import copy
import ctypes
import datetime
import functools
import io
import json
import math
import os
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision import ops
from torchvision import utils as drawing
from tqdm import tqdm

import data
from data import UserError
from model import WeightsError, check_images, load_model, read_checkpoint, write_whole

# ---- Prediction on an image ----------------------------------------------------------------------


def predict(model, image, min_size=None, max_size=None, tta=False):
    """Detect the objects of one image.

    model: a MaskRCNN, in whatever mode; image: the path of a file, an array [H, W, 3] or a tensor
    [3, H, W], RGB, uint8 or float in [0, 1]; min_size, max_size: what the network sees has a
    shorter side of min_size pixels, unless the longer one exceeds max_size (None: the sizes stored
    with the weights); tta: test-time augmentation.

    Returns a dict on the CPU, best score first, all in the pixels of this image: `boxes` [N, 4]
    float xyxy, `labels` [N] int64 (1..K), `scores` [N], `masks` [N, H, W] bool (of a model with
    masks), `keypoints` [N, 17, 3] (x, y, 1) and `keypoints_scores` [N, 17] (with keypoints).
    Raises UserError for a file that cannot be read, ValueError for another kind of array.
    """
    if isinstance(image, (str, os.PathLike)):
        image = data.read_image(image)
    elif not torch.is_tensor(image):
        # A copy, since torch refuses the negative strides of bgr[..., ::-1].
        image = torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1)
    check_images([image])
    with evaluation_mode(model):
        detections = resize_and_detect(model, image, min_size, max_size, tta)
    if "masks" in detections:
        height, width = image.shape[1:]
        detections["masks"] = paste_masks(detections["masks"], detections["boxes"], height, width)
    return detections


@contextlib.contextmanager
def evaluation_mode(model):
    """Evaluation mode without gradients inside the `with`, then the mode that was before."""
    training = model.training
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        model.train(training)


def resize_and_detect(model, image, min_size=None, max_size=None, tta=False):
    """Detections in an image [3, H, W] of any size, as from `to_image`; arguments as in `predict`.

    The model must be in evaluation mode.
    """
    size = tuple(image.shape[1:])
    min_size = min_size or model.data_settings["min_size"]
    max_size = max_size or model.data_settings["max_size"]
    if tta:
        views = tta_views(size, min_size, max_size)
        return to_image(detect_augmented(model, image, views), views[0][0], size)
    resized = data.resize_image(image, *data.resize_shape(*size, min_size, max_size))
    return detect(model, resized, size)


def detect(model, image, size):
    """Detections in an image [3, h, w] resized for the network, in the pixels of its own `size`."""
    (detections,) = model([image.to(model.image_mean.device)])
    return to_image(detections, image.shape[1:], size)


def to_image(detections, resized, size):
    """The model's dict for an image resized to `resized` (h, w), in the pixels of its `size`.

    Boxes are clipped, those without area dropped; `masks` stay the probabilities [N, 28, 28] of the
    box. Returns tensors on the CPU.
    """
    # float32 again, where amp made them bfloat16
    moved = {k: v.cpu() if k == "labels" else v.cpu().float() for k, v in detections.items()}
    boxes = data.resize_boxes(moved["boxes"], resized, size, flip=False)
    moved["boxes"] = ops.clip_boxes_to_image(boxes, size)
    if "keypoints" in moved:
        scale = torch.tensor([size[1] / resized[1], size[0] / resized[0], 1.0])
        moved["keypoints"] = moved["keypoints"] * scale
    kept = (moved["boxes"][:, 2:] > moved["boxes"][:, :2]).all(dim=1)
    return {name: value[kept] for name, value in moved.items()}


def paste_masks(masks, boxes, height, width):
    """Masks [N, M, M] (probabilities) of boxes [N, 4] as bool [N, height, width] of the image."""
    pairs = zip(masks.float().cpu().numpy(), boxes.tolist())
    pasted = [paste_mask(mask, box, height, width) for mask, box in pairs]
    return torch.from_numpy(np.array(pasted, bool).reshape(len(pasted), height, width))


def paste_mask(mask, box, height, width):
    """One mask (numpy [M, M] float32) of a box (x1, y1, x2, y2) as bool [height, width].

    Bilinear interpolation as in Detectron2's `paste_masks_in_image`, along one axis after the
    other: pixel i has its centre at i + 0.5, and zeros around the mask let it fade out half a cell
    outside of the box. Only the pixels of the box are computed.
    """
    x1, y1, x2, y2 = box
    image = np.zeros((width, height), bool)  # column after column, as COCO encodes it
    if x2 <= x1 or y2 <= y1:
        return image.T
    window = []
    # Rows, then columns: [M, M] -> [M, rows] -> [rows, columns]
    for low, high, length in ((y1, y2, height), (x1, x2, width)):
        count = len(mask)
        fade = (high - low) / (2 * count)
        start = max(0, math.ceil(low - fade - 0.5))
        stop = max(start, min(length, math.ceil(high + fade - 0.5)))
        place = (np.arange(start, stop) + 0.5 - low) * (count / (high - low)) + 0.5
        before = np.clip(place.astype(int), 0, count)  # the cell before the pixel's centre
        weight = (place - before).astype(np.float32)[:, None]
        cells = np.pad(mask, ((1, 1), (0, 0)))
        mask = (cells[before] + weight * (cells[1:] - cells[:-1])[before]).T
        window.append(slice(start, stop))
    image[window[1], window[0]] = mask.T >= 0.5
    return image.T


# ---- Test-time augmentation (Sec. 5.1, Fig. 5, as in Detectron): every scale, also mirrored ------

TTA_SCALES = (400, 500, 600, 700, 900, 1000, 1100, 1200)  # shorter sides, for a model of 800
TTA_MAX_SIZE = 2000  # longer side at most, for a model of 800
TTA_VOTE_IOU = 0.9


def tta_views(size, min_size, max_size):
    """The 18 views of an image of `size` (H, W): pairs of an input's size (h, w) and "mirrored".

    The model's own size is first, the others are relative to it: a model for 160 pixels has
    shorter sides of 80 ... 240.
    """
    limits = [(min_size, max_size)]
    for scale in TTA_SCALES:
        limits.append((round(scale / 800 * min_size), round(TTA_MAX_SIZE / 800 * min_size)))
    shapes = [data.resize_shape(*size, *limit) for limit in limits]
    return [(shape, flip) for shape in shapes for flip in (False, True)]


def detect_augmented(model, image, views):
    """Detections of one image [3, H, W] from many views, as one model call gives them for views[0].

    1) Scores and boxes of all views are united *before* score threshold and NMS: the views compete
       like the proposals of one image.
    2) Threshold and NMS as usual, then box voting.
    3) Masks are read for the final boxes in every view and averaged as probabilities.
    """
    refuse_keypoints(model)
    own, _ = views[0]
    features, scores, boxes = [], [], []  # of each view
    for shape, flip in views:
        view = data.resize_image(image, *shape)
        view = view.flip(-1) if flip else view
        batch, sizes = model.batch([view.to(model.image_mean.device)])
        view_features = model.features(batch)
        proposals, valid = model.proposals(view_features, sizes)
        [(view_scores, view_boxes)] = model.box_predictions(view_features, proposals, valid, sizes)
        scores.append(view_scores)  # [P, K + 1]
        moved = data.resize_boxes(view_boxes.flatten(0, 1), shape, own, flip)
        boxes.append(moved.view_as(view_boxes))  # [P, K, 4], of a cascade [P, 1, 4]
        if model.config.masks:  # in float32, 1.8 GB for an image of COCO
            features.append(view_features)
    scores = torch.cat(scores)
    boxes = torch.cat(boxes)

    detections = model.postprocess(scores, boxes)
    detections["boxes"] = vote_boxes(detections, scores, boxes, model.config.box_score_thresh)
    if not model.config.masks:
        return detections

    masks = 0
    for (shape, flip), view_features in zip(views, features):
        moved = data.resize_boxes(detections["boxes"], own, shape, flip)
        [view_masks] = model.mask_probabilities(view_features, [moved], [detections["labels"]])
        masks = masks + (view_masks.flip(-1) if flip else view_masks)
    detections["masks"] = masks / len(views)
    return detections


def refuse_keypoints(model):
    """Raise UserError for a model with keypoints: the paper augments the others (Choice 12)."""
    if model.config.keypoints:
        raise UserError("Keypoint models have no test-time augmentation; leave out --tta.", code=2)


def vote_boxes(detections, scores, boxes, score_threshold):
    """Box voting: each kept box b becomes the mean of the boxes b_i that agree with it.

        b  ->  sum_i s_i b_i / sum_i s_i    over the i of b's class with IoU(b, b_i) >= 0.9 and a
                                            score s_i > score_threshold (only those went into NMS)

    detections: `boxes` [N, 4] and `labels` [N], what NMS kept of the united boxes; scores:
    [P, K + 1] and boxes: [P, K or 1, 4], all of them. Returns [N, 4]; scores do not change.
    """
    voted = detections["boxes"].clone()
    for label in detections["labels"].unique().tolist():
        kept = detections["labels"] == label
        voters = scores[:, label] > score_threshold
        candidates = boxes[voters, min(label, boxes.shape[1]) - 1]  # cascade: one for all classes
        agree = ops.box_iou(voted[kept], candidates) >= TTA_VOTE_IOU
        weights = agree * scores[voters, label]
        total = weights.sum(dim=1, keepdim=True)  # 0: a box without area, of IoU 0 with itself
        with torch.autocast(boxes.device.type, enabled=False):  # bfloat16 rounds to 4 or 8 pixels
            mean = weights @ candidates / total.clamp(min=1e-12)
        voted[kept] = torch.where(total > 0, mean, voted[kept])
    return voted


# ---- Metrics: the results of all images in COCO's format, then average precision (AP) ------------
#
# A detection is right at the IoU threshold t if it overlaps an object of its class, which no
# detection with a higher score has taken, with IoU >= t. Go through the detections of a class in
# all images by falling score; after each,
#
#     precision = right ones so far / detections so far,    recall = right ones so far / objects
#
# AP at t is the area under precision over recall, where precision is the best at this or any higher
# recall. AP50 and AP75: t = 0.5 and 0.75, mean over the classes; COCO's AP: mean over t = 0.5,
# 0.55, ..., 0.95 as well; APs, APm, APl: of objects below 32^2, up to 96^2, and above 96^2 pixels.
# IoU is that of boxes for "bbox" and of masks for "segm"; keypoints have a similarity of their own.


def evaluate(model, dataset, out=None, tta=False, workers=2, per_class=False, amp=False):
    """Metrics of a model on a data set, in percent.

    Where torch.distributed is initialized, every process calls this, takes its share of the images
    and returns the same. model: a MaskRCNN (not wrapped in DDP), in whatever mode; dataset: a
    CocoDataset or VocDataset made for evaluation; out: a folder for `results_bbox.json`,
    `results_segm.json` and `results_keypoints.json` in COCO's submission format, which appear whole
    or not at all; tta: test-time augmentation; workers: processes that decode images, and as many
    that paste masks; amp: bfloat16.

    Returns {"bbox": {"AP", "AP50", "AP75", "APs", "APm", "APl"}}, the same as "segm" for a model
    with masks, {"AP", "AP50", "AP75", "APm", "APl"} as "keypoints"; for VOC {"voc": {"mAP50"}};
    None where there is no object to find. per_class adds {"per_class": {class: AP}} to each.
    Raises UserError where data set and model have different classes.
    """
    distributed = dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    check_classes(model, dataset)
    if rank == 0:
        truth = dataset.coco_gt()  # first: a fault in it should not show up after hours
        if out is not None:  # results of an earlier run must not pass for those of this one
            Path(out).mkdir(parents=True, exist_ok=True)
            for kind in RESULTS:
                Path(out, f"results_{kind}.json").unlink(missing_ok=True)

    positions = range(rank, len(dataset), world_size)
    device = model.image_mean.device.type
    with evaluation_mode(model), torch.autocast(device, torch.bfloat16, enabled=amp):
        share = detect_all(model, dataset, positions, tta, workers, progress=rank == 0)
    shares = [share]
    if distributed:  # not through files: machines need not share a file system
        shares = [None] * world_size if rank == 0 else None
        dist.gather_object(share, shares)
    metrics = [None]
    if rank == 0:
        by_image = {image_id: results for share in shares for image_id, results in share.items()}
        if by_image.keys() != set(dataset.image_ids):
            raise UserError("The processes see different data sets; give them the same --data.")
        # In the data set's order: the files do not depend on the number of processes.
        results = [result for image_id in dataset.image_ids for result in by_image[image_id]]
        metrics = [write_and_measure(model, dataset, truth, results, out, per_class, workers)]
    if distributed:
        dist.broadcast_object_list(metrics)
    return metrics[0]


def check_classes(model, dataset):
    """Raise UserError if the model is for other classes than those of the data set."""
    advice = (
        "metrics need the same ones. To see the detections anyway, use --images; to train for "
        "these classes, use train.py --init"
    )
    named = model.data_settings["classes"] or dataset.classes  # None: weights of other projects
    data.check_classes(dataset, named, "the weights", advice)
    if model.config.num_classes != len(named):
        numbers = f"has {len(named)} classes, the weights have {model.config.num_classes}"
        raise UserError(f"{dataset.annotation_file} {numbers}; {advice}.")


def detect_all(model, dataset, positions, tta, workers, progress):
    """{image id: list of `coco_results`} of the images at `positions` of a data set.

    Three things happen at once: processes decode the next images, the model looks at one, and
    processes paste and encode the masks of the last. It sees one image at a time: in a batch,
    through GroupNorm, the padding would make a result depend on its neighbours.
    """
    images = copy.copy(dataset)
    images.masks = images.keypoints = False  # the objects to find: pycocotools reads them itself
    sizes = {} if tta else {key: model.data_settings[key] for key in ("min_size", "max_size")}
    load = data.Computed(functools.partial(images.load, **sizes))

    def detections():
        for i, (image, _) in zip(positions, data.read_ahead(load, workers, positions)):
            size = int(dataset.heights[i]), int(dataset.widths[i])
            tensors = (
                resize_and_detect(model, image, tta=True) if tta else detect(model, image, size)
            )
            # As numpy: tensors would travel through shared memory, of which there may be little.
            arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
            yield dataset.image_ids[i], arrays, size, dataset.category_ids

    # A key of this "data set" is an image's detections: to ask for the next key runs the model.
    results = data.compute_ahead(data.Computed(coco_results), workers, detections())
    return dict(tqdm(results, "evaluate", len(positions), leave=False, disable=not progress))


def coco_results(item):
    """Detections of one image in COCO's submission format: (image id, a list of dicts).

    item: (image id, detections as from `detect` in numpy, size (H, W), category ids of labels
    1..K). Each dict has `image_id`, `category_id`, `score`, `bbox` [x, y, width, height], and
    `segmentation` (compressed RLE) and `keypoints` [51] where the model has them. Numbers are
    rounded here, once: the metrics are computed from the very values that are written.
    """
    image_id, detections, size, category_ids = item
    results = []
    boxes, scores, labels = (detections[name].tolist() for name in ("boxes", "scores", "labels"))
    for (x1, y1, x2, y2), score, label in zip(boxes, scores, labels):
        result = {"image_id": image_id, "category_id": category_ids[label - 1]}
        result["score"] = round(score, 6)
        result["bbox"] = [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)]
        results.append(result)
    if "masks" in detections:
        for result, mask, box in zip(results, detections["masks"], boxes):
            code = coco_mask.encode(paste_mask(mask, box, *size).view(np.uint8))
            result["segmentation"] = code | {"counts": code["counts"].decode()}
    if "keypoints" in detections:
        # COCO's keypoints are indices of pixels, ours are places: pixel 0 has its centre at 0.5.
        for result, points in zip(results, detections["keypoints"] - np.float32([0.5, 0.5, 0])):
            result["keypoints"] = [round(value, 3) for value in points.flatten().tolist()]
    return image_id, results


RESULTS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}  # kind -> its field


def write_and_measure(model, dataset, truth, results, out, per_class, workers):
    """Write the files of results and compute the metrics, as `evaluate` returns them."""
    metrics = {}
    used = {"bbox": True, "segm": model.config.masks, "keypoints": model.config.keypoints}
    for kind in [kind for kind in RESULTS if used[kind]]:
        others = set(RESULTS.values()) - {RESULTS[kind]}
        chosen = [{k: v for k, v in result.items() if k not in others} for result in results]
        if out is not None:
            with write_whole(Path(out, f"results_{kind}.json")) as file:
                file.write(json.dumps(chosen).encode())
        if dataset.metric == "coco":
            # One process for each core, where there are thousands of results.
            processes = min(len(results) // 5000, os.cpu_count()) if workers else 0
            metrics[kind] = coco_metrics(truth, chosen, kind, dataset, processes)
    if dataset.metric == "voc":
        metrics["voc"] = voc_metrics(truth, results, dataset)
    for values in metrics.values():
        if not per_class:
            del values["per_class"]
    return metrics


def coco_metrics(truth, results, kind, dataset, workers=0):
    """COCO's average precisions, with pycocotools: {"AP": percent, ..., "per_class": {class: AP}}.

    truth: a pycocotools COCO object; results: list of dicts in COCO's submission format; kind:
    "bbox", "segm" or "keypoints"; workers: processes that share the classes. None: no such object.
    """
    by_class = by_category(results, dataset)
    precision_of = functools.partial(class_precision, truth, kind, list(dataset.image_ids))
    precisions = list(data.compute_ahead(data.Computed(precision_of), workers, [*by_class.items()]))
    precision = torch.stack(precisions, dim=2).numpy()  # [IoU thresholds, recalls, classes, areas]
    metrics = {
        "AP": percent(precision[..., 0]),
        "AP50": percent(precision[0, ..., 0]),
        "AP75": percent(precision[5, ..., 0]),
    }
    for area, letter in enumerate("ml" if kind == "keypoints" else "sml", start=1):
        metrics[f"AP{letter}"] = percent(precision[..., area])
    values = [percent(precision[:, :, k, 0]) for k in range(len(by_class))]
    return metrics | {"per_class": dict(zip(dataset.classes, values))}


def class_precision(truth, kind, image_ids, item):
    """COCOeval's precision of one class: [IoU thresholds, recalls, areas (the first: all)].

    item: (category id, its results). COCOeval treats each class as if there were no other.
    """
    category_id, results = item
    with contextlib.redirect_stdout(io.StringIO()):
        if results:  # copies, since loadRes writes into the dicts that it is given
            detections = truth.loadRes([dict(result) for result in results])
        else:
            detections = COCO()  # loadRes cannot read an empty list
            detections.dataset = {**truth.dataset, "annotations": []}
            detections.createIndex()
        scorer = COCOeval(truth, detections, kind)
        scorer.params.imgIds = image_ids
        scorer.params.catIds = [category_id]
        scorer.evaluate()
        scorer.accumulate()
    precision = scorer.eval["precision"][:, :, 0]  # [IoU thresholds, recalls, areas, limits]
    return torch.from_numpy(precision[..., -1])  # the last limit: 100 detections (keypoints: 20)


def by_category(objects, dataset):
    """{category id: its results or annotations} for each category of the data set."""
    by_class = {category_id: [] for category_id in dataset.category_ids}
    for one in objects:
        by_class[one["category_id"]].append(one)
    return by_class


def percent(values):
    """Mean of the values that are defined (pycocotools writes -1 for none) in percent, or None."""
    values = np.asarray(values)
    values = values[values > -1]
    return 100 * float(values.mean()) if values.size else None


def voc_metrics(truth, results, dataset):
    """{"mAP50": mean of `voc_average_precision` over the classes, "per_class": {class: AP50}}."""
    results = by_category(results, dataset)
    objects = by_category(truth.dataset["annotations"], dataset)
    values = [voc_average_precision(results[k], objects[k]) for k in dataset.category_ids]
    per_class = dict(zip(dataset.classes, [percent([value]) for value in values]))
    return {"mAP50": percent(values), "per_class": per_class}


def voc_average_precision(results, objects):
    """PASCAL VOC's average precision of one class in [0, 1]; -1 if no object counts.

    results and objects (annotations with `difficult`) of the class, in COCO's format. The rule (VOC
    development kit, 2010): by falling score, each detection is matched to the object of its image
    that it overlaps most. IoU below 0.5: wrong. Difficult object: ignored. Object matched before:
    wrong. Otherwise: right. AP is the whole area, where COCO reads it at 101 recalls.
    """
    total = sum(not o["difficult"] for o in objects)
    if total == 0:
        return -1
    in_image = defaultdict(list)
    for o in objects:
        in_image[o["image_id"]].append(o)
    taken = set()
    right = []
    for result in sorted(results, key=lambda result: -result["score"]):
        candidates = in_image[result["image_id"]]
        overlaps = ops.box_iou(xyxy([result]), xyxy(candidates))[0].tolist()
        overlap, best = max(zip(overlaps, candidates), key=lambda pair: pair[0], default=(0, None))
        if overlap < 0.5:
            right.append(False)
        elif not best["difficult"]:
            right.append(best["id"] not in taken)
            taken.add(best["id"])
    recall = np.cumsum(right) / total
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    best_precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0) * best_precision))


def xyxy(objects):
    """Boxes [N, 4] float64 (x1, y1, x2, y2) of results or annotations in COCO's format."""
    boxes = torch.tensor([o["bbox"] for o in objects], dtype=torch.float64).reshape(-1, 4)
    return ops.box_convert(boxes, "xywh", "xyxy")


def format_table(metrics):
    """The result of `evaluate` as a table of text: a row for bbox, segm, ...; "-" for None."""
    columns = dict.fromkeys(name for row in metrics.values() for name in row)
    columns = [name for name in columns if name != "per_class"]
    widest = max(map(len, metrics))
    lines = [" " * widest + "".join(f"{column:>11}" for column in columns)]
    for name, row in metrics.items():
        cells = ["-" if row.get(column) is None else f"{row[column]:.1f}" for column in columns]
        lines.append(f"{name:{widest}}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def format_classes(metrics):
    """AP of each class as such a table; for metrics from `evaluate(..., per_class=True)`."""
    by_class = {kind: row["per_class"] for kind, row in metrics.items()}
    names = next(iter(by_class.values()))
    return format_table({name: {kind: by_class[kind][name] for kind in by_class} for name in names})


# ---- Pictures ------------------------------------------------------------------------------------

COLORS = "#ff595e #ffca3a #8ac926 #1fa2ff #c77dff #ff924c #2ec4b6 #f15bb5 #b5e48c #00f5d4".split()
SKELETON = [  # pairs of data.KEYPOINT_NAMES that a line joins
    (0, 1), (0, 2), (1, 3), (2, 4), (5, 6), (5, 7), (7, 9), (6, 8), (8, 10), (5, 11), (6, 12),
    (11, 12), (11, 13), (13, 15), (12, 14), (14, 16),
]  # fmt: skip
PICTURE_SIDES = 480, 1600  # limits of the longer side, so that names fit and memory stays bounded


def draw(image, detections, classes=None, score=0.5):
    """A picture of an image with its detections: masks, boxes, names with scores, keypoints.

    image: [3, H, W] uint8, or float in [0, 1]; detections: as from `predict` or `detect`; classes:
    names of labels 1..K; score: detections below are left out. Returns uint8 [3, H', W'], enlarged
    or shrunk so that the longer side is within PICTURE_SIDES.
    """
    if image.is_floating_point():
        image = (image * 255).round().to(torch.uint8)
    size = tuple(image.shape[1:])
    scale = min(max(max(size), PICTURE_SIDES[0]), PICTURE_SIDES[1]) / max(size)
    height, width = (max(1, round(side * scale)) for side in size)
    picture = data.resize_image(image.cpu(), height, width)
    shown = {name: value[detections["scores"] >= score].cpu() for name, value in detections.items()}
    boxes = data.resize_boxes(shown["boxes"], size, (height, width), flip=False)
    colors = [COLORS[i % len(COLORS)] for i in range(len(boxes))]
    if not colors:
        return picture
    if "masks" in shown:
        masks = shown["masks"]
        if masks.is_floating_point():
            masks = paste_masks(masks, boxes, height, width)
        elif masks.shape[1:] != (height, width):
            masks = torch.nn.functional.interpolate(masks[None].byte(), (height, width))[0].bool()
        picture = drawing.draw_segmentation_masks(picture, masks, 0.4, colors)
    for points, color in zip(shown.get("keypoints", []), colors):
        points = points[None, :, :2] * torch.tensor([width / size[1], height / size[0]])
        picture = drawing.draw_keypoints(picture, points, SKELETON, color, radius=3, width=2)
    picture = drawing.draw_bounding_boxes(picture, boxes, colors=colors, width=2)

    canvas = Image.fromarray(picture.permute(1, 2, 0).numpy())
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(max(14, max(height, width) // 50))
    for i in reversed(range(len(boxes))):  # the best last, so that no other covers its name
        name = f"{class_name(shown['labels'][i], classes)} {100 * shown['scores'][i]:.0f}%"
        x1, y1, _, y2 = boxes[i].tolist()
        x = max(0, min(x1, width - pen.textlength(name, font)))
        place, anchor = (x, y1 - 2), "lb"  # above the object, which it must not cover
        if y1 < font.size + 4:
            place, anchor = (x, min(y2 + 2, height - font.size)), "lt"
        pen.rectangle(pen.textbbox(place, name, font, anchor), fill=colors[i])
        pen.text(place, name, "black", font, anchor)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def class_name(label, classes):
    return classes[label - 1] if classes else f"class {label}"  # None: the weights do not know them


def draw_files(model, paths, out, score=0.5, tta=False):
    """Draw the detections in image files into OUT/NAME_detections.png.

    Yields (path, path of the picture, detections as from `detect`) of each file. A picture is an
    extra: where one fails, a line on stderr says so, and the next one follows.
    """
    taken = {Path(path).resolve() for path in paths}  # a picture must not replace an image
    for path in paths:
        picture = Path(out, f"{Path(path).stem}_detections.png")
        while picture.resolve() in taken:
            picture = picture.with_name(f"{picture.stem}_.png")
        taken.add(picture.resolve())
        try:
            image = data.read_image(path)
            with evaluation_mode(model):  # masks stay small: a huge image's would take gigabytes
                detections = resize_and_detect(model, image, tta=tta)
            pixels = draw(image, detections, model.data_settings["classes"], score)
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(picture)
        except Exception as error:
            print(f"No picture of {path}: {data.first_line(error)}", file=sys.stderr)
        else:
            yield path, picture, detections


def save_pictures(model, dataset, out, count=8):
    """Pictures of the first images of a data set in the folder `out`; returns their paths."""
    names = [dataset.record(i)["file_name"] for i in range(min(count, len(dataset)))]
    paths = [data.image_path(dataset.image_dir, name) for name in names]
    return [picture for _, picture, _ in draw_files(model, paths, out)]


# ---- Command line --------------------------------------------------------------------------------


def main(arguments=None):
    """The command line; returns the exit code: 0, 1 for bad files, 2 for bad use."""
    return run_command("evaluate.py", run, arguments)


def run(arguments):
    """Do what the command line says."""
    args = make_parser().parse_args(arguments)
    if args.workers < 0 or not 0 <= args.score <= 1:
        raise UserError("--workers must be 0 or more, and --score between 0 and 1.", code=2)
    if "" in (args.weights, args.data, args.export, args.out, *(args.images or [])):
        raise UserError("A path of the command line is empty.", code=2)
    if args.export:
        export(args.weights, args.export)
        return
    rank, _, device = start_processes(args.device)
    model = load_model(args.weights).to(device)
    if args.tta:
        refuse_keypoints(model)
    if args.images:
        if rank == 0:
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                detect_in_images(args, model)
        return
    masks, keypoints = model.config.masks, bool(model.config.keypoints)
    dataset = data.open_split(args.data, args.split, masks=masks, keypoints=keypoints)
    with lock_folder(args.out) if args.out and rank == 0 else contextlib.nullcontext():
        settings = {"tta": args.tta, "workers": args.workers, "amp": args.amp}
        metrics = evaluate(model, dataset, args.out, per_class=args.per_class, **settings)
    if rank == 0:
        if args.per_class:
            print(format_classes(metrics) + "\n")
        print(format_table(metrics))
        if args.out:
            print(f"results: {args.out}/results_*.json")


def make_parser():
    """The command line of this file."""
    about = "Evaluate Mask R-CNN. Under torchrun, the processes share the images of --data."
    parser = argparse.ArgumentParser("evaluate.py", description=about)
    one_of = parser.add_mutually_exclusive_group(required=True).add_argument
    one_of("--data", metavar="DIR", help="metrics on a data set in COCO's layout or VOC's")
    one_of("--images", metavar="PATH", nargs="+", help="detections in images, or folders of them")
    one_of("--export", metavar="FILE", help="copy the weights alone into a new file")
    add = parser.add_argument
    add("--weights", metavar="FILE", required=True, help="a checkpoint of train.py")
    add("--out", metavar="DIR", help="folder for results (--data) or pictures (--images: .)")
    add("--split", default="val2017", help="which part of --data (val2017)")
    add("--tta", action="store_true", help="test-time augmentation: 18 views, about 20x the time")
    add("--amp", action="store_true", help="bfloat16: faster on a GPU, slightly different numbers")
    add("--per-class", action="store_true", help="AP of each class of --data, too")
    add("--score", type=float, default=0.5, help="--images: the least score that is shown (0.5)")
    add("--workers", type=int, default=2, help="processes for --data that decode images (2)")
    add("--device", help="cpu, cuda, cuda:1, ... (cuda where there is one, else cpu)")
    return parser


def detect_in_images(args, model):
    """`--images`: a table of detections for each image, and its picture in the folder --out."""
    paths = find_images(args.images)
    drawn = 0
    drawings = draw_files(model, paths, args.out or ".", args.score, args.tta)
    for path, picture, detections in drawings:
        drawn += 1
        print(f"{path} -> {picture}")
        boxes = detections["boxes"].tolist()
        for label, score, box in zip(detections["labels"], detections["scores"], boxes):
            if score >= args.score:
                name = class_name(label, model.data_settings["classes"])
                print(f"  {name:20}{score:6.2f}" + "".join(f"{corner:9.1f}" for corner in box))
    if drawn < len(paths):
        raise UserError(f"{len(paths) - drawn} of {len(paths)} images failed, see above.")


def find_images(paths):
    """The image files of paths and folders, without those that `draw_files` made."""
    formats = Image.registered_extensions()
    files = []
    for path in map(Path, paths):
        inside = sorted(path.iterdir()) if path.is_dir() else []
        inside = [p for p in inside if formats.get(p.suffix.lower()) in data.IMAGE_FORMATS]
        inside = [p for p in inside if not p.stem.rstrip("_").endswith("_detections")]
        if path.is_dir() and not inside:
            raise UserError(f"There is no image in the folder {path}.")
        files += inside or [path]
    return files


def export(weights, output):
    """Copy a checkpoint of train.py without the optimizer's state: half the size, for sharing."""
    if os.path.lexists(output):  # perhaps another checkpoint, which would lose its momentum
        raise UserError(f"{output} exists already; give --export a new name.", code=2)
    checkpoint = read_checkpoint(weights)
    checkpoint.pop("momentum", None)
    with write_whole(output) as file:
        torch.save(checkpoint, file)
    print(output)


# ---- Plumbing, shared with train.py and the tools: processes, lock, errors, memory ---------------


def start_processes(device_name=None):
    """(rank, world_size, device) of this process; joins those that torchrun started with it.

    device_name: "cpu", "cuda", "cuda:1", ...; None: cuda where there is one. Raises UserError for a
    device that is not there, and for stale environment variables: with them, this process would
    wait for others, or take itself for one that writes nothing.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    said = {name: os.environ[name] for name in names if name in os.environ}
    ranks = [int(value) for value in said.values() if value.isdecimal()] if said else [0, 0, 1]
    fit = len(ranks) == 3 and ranks[1] <= ranks[0] < ranks[2]
    if not fit or (ranks[2] > 1 and "MASTER_ADDR" not in os.environ):
        raise UserError(
            f"The environment variables {said} are not what torchrun sets ({', '.join(names)}, "
            "MASTER_ADDR): unset them, or start the processes with torchrun.",
            code=2,
        )
    rank, local_rank, world_size = ranks

    name = device_name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):  # Apple's mps lacks float64
        raise UserError(f"The device {name} is not supported; use cuda or cpu.", code=2)
    if not name.startswith("cuda"):
        device = torch.device("cpu")
        keep_freed_memory()
    else:
        index = str(local_rank) if world_size > 1 else name.partition(":")[2] or "0"
        if index not in map(str, range(torch.cuda.device_count())):
            raise UserError(f"There is no CUDA device {index} here; use --device cpu.", code=2)
        device = torch.device("cuda", int(index))
        torch.cuda.set_device(device)
    if world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        # The others wait while rank 0 computes the metrics: for a large data set, long.
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    return rank, world_size, device


@contextlib.contextmanager
def lock_folder(out):
    """Make the folder `out` and keep other runs and evaluations out of it inside the `with`.

    The lock on OUT/.lock belongs to this process: the system frees it when the process ends, in
    whatever way, and loading processes do not inherit it (as they would that of `flock`). Raises
    UserError where another process has it.
    """
    Path(out).mkdir(parents=True, exist_ok=True)
    with open(Path(out, ".lock"), "a") as file:
        try:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            problem = f"Another run or evaluation is writing to {out}; wait, or give another --out."
            raise UserError(problem, code=2) from None
        except (ImportError, OSError):
            pass  # Windows, or a file system without locks
        yield


def run_command(name, function, arguments=None):
    """Run function(arguments) as the command `name`; returns its exit code (None: 0).

    Errors that the user can fix become one line on stderr; any other exception is a bug.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # for the imports, see the top
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.suppress(AttributeError):  # file names that the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = function(arguments) or 0
        sys.stdout.flush()
        if dist.is_initialized():
            dist.destroy_process_group()
        return code
    except (UserError, WeightsError, ImportError) as error:
        message, code = str(error), getattr(error, "code", 1)
    except torch.cuda.OutOfMemoryError:
        message = "the GPU's memory is too small for this step; use --images-per-gpu 1, --amp or "
        message, code = message + "--recompute, or smaller min_sizes", 1
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except BrokenPipeError:  # the reader of our output, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, a folder that may not be written to
        file = error.filename or "a file"
        message, code = f"{file} cannot be read or written ({error.strerror or error})", 1
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    return code


def keep_freed_memory():
    """Make glibc, where there is one, keep freed memory for the next step.

    A step on the CPU takes and frees the same gigabytes as the one before; getting them from the
    kernel, which clears every page, was a third of its time.
    """
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, TypeError, AttributeError):
        for parameter in (mmap_threshold, trim_threshold):
            ctypes.CDLL(None).mallopt(parameter, 2**31 - 1)


if __name__ == "__main__":
    sys.exit(main())
