"""Prediction on images, COCO and VOC metrics, pictures and curves: the evaluation of Mask R-CNN.

    python evaluate.py --weights FILE --data DIR                COCO's metrics on a data set
    python evaluate.py --weights FILE --images a.jpg FOLDER     detections drawn into pictures
    python evaluate.py --plot runs/a runs/b --out figure.png    curves as in the paper's figures

From the top: masks and boxes back in the image, test-time augmentation (Fig. 5, "+ test aug"),
`predict` for one image, metrics over all processes (`evaluate`), pictures, curves, command line.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import copy
import ctypes
import datetime
import io
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision import ops
from torchvision import utils as drawing
from tqdm import tqdm

import data
import model as detector

# ------------------------------------------------------------------------------------------------
# Masks: from the 28 x 28 probabilities of a box to pixels of the image
# ------------------------------------------------------------------------------------------------


def interpolation(low, high, length, cells):
    """Where the pixels of one axis lie between the cells of a mask, for bilinear interpolation.

    The `cells` cells fill [low, high] of an axis of `length` pixels; pixel i has its centre at
    i + 0.5. A zero cell on either side lets the mask fade out, half a cell outside of the box.

    Returns the first pixel that is touched (int) and for it and its followers the cell before each
    (int [n], 0 is the zero cell) and the weight of the cell after it (float32 [n], in [0, 1)).
    """
    fade = (high - low) / (2 * cells)
    first = max(0, math.ceil(low - fade - 0.5))
    last = min(length, math.ceil(high + fade - 0.5))
    place = (np.arange(first, last) + 0.5 - low) * (cells / (high - low)) + 0.5
    before = np.clip(place.astype(np.int64), 0, cells)
    return first, before, (place - before).astype(np.float32)


def interpolate(values, before, weights):
    """Rows [n, C] at places between the rows [cells + 2, C] of `values`; see `interpolation`."""
    result = (values[1:] - values[:-1])[before]
    result *= weights[:, None]
    result += values[before]
    return result


def paste_window(mask, box, height, width, threshold=0.5):
    """Paste one mask (numpy [M, M] float32) into its `box` (x1, y1, x2, y2) of the image.

    Only the window of the box is computed, one axis after the other. The places are Detectron2's
    (`paste_masks_in_image`): continuous boxes, pixel centres at half pixels, zero around the mask.

    Returns (x, y, inside): the window's first column and row, and bool [columns, rows]: columns
    first, since that is the order of COCO's run-length code.
    """
    left, top, right, bottom = box
    if right <= left or bottom <= top:
        return 0, 0, np.zeros((0, 0), bool)
    x, *across = interpolation(left, right, width, mask.shape[1])
    y, *down = interpolation(top, bottom, height, mask.shape[0])
    framed = np.zeros((mask.shape[0] + 2, mask.shape[1] + 2), np.float32)
    framed[1:-1, 1:-1] = mask
    rows = interpolate(framed, *down)
    return x, y, interpolate(np.ascontiguousarray(rows.T), *across) >= threshold


def paste_masks(masks, boxes, height, width, threshold=0.5):
    """Masks of boxes as masks of the image.

    masks: [N, M, M] probabilities; boxes: [N, 4] xyxy in the image's pixels, also partly outside;
    height, width: of the image; threshold: in (0, 1], a pixel belongs to the object from there on.
    Returns bool [N, height, width] on the CPU. See `paste_window` for where exactly.
    """
    pasted = np.zeros((len(masks), height, width), bool)
    for image, mask, box in zip(pasted, masks.float().cpu().numpy(), boxes.tolist()):
        x, y, inside = paste_window(mask, box, height, width, threshold)
        image[y : y + inside.shape[1], x : x + inside.shape[0]] = inside.T
    return torch.from_numpy(pasted)


def window_rle(x, y, inside, height, width):
    """COCO's compressed run-length code of an image in which only a window may be True.

    x, y, inside: as from `paste_window`. Returns {"size": [height, width], "counts": str}, equal to
    pycocotools' encoding of the whole image, in a time that depends on the window alone.
    """
    columns, rows = inside.shape
    # A False before the first column, and one after each: runs of different columns stay apart.
    flat = np.zeros(1 + columns * (rows + 1), bool)
    flat[1:].reshape(columns, rows + 1)[:, :rows] = inside
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    column, row = np.divmod(changes, rows + 1)
    places = (x + column) * height + y + row
    # Where the window has all rows of the image, a run may end just where the next one starts.
    places, times = np.unique(places, return_counts=True)
    places = places[times == 1]
    counts = np.diff(places, prepend=0, append=height * width)
    if len(places) and counts[-1] == 0:
        counts = counts[:-1]
    code = {"size": [height, width], "counts": counts.tolist()}
    code = coco_mask.frPyObjects(code, height, width)
    return {"size": [height, width], "counts": code["counts"].decode("ascii")}


# ------------------------------------------------------------------------------------------------
# Views of an image
# ------------------------------------------------------------------------------------------------

# What the network looks at: an image resized to `height` x `width` pixels, maybe mirrored. `scale`
# is the shorter side that was asked for (the real one is smaller where the longer is limited).
View = collections.namedtuple("View", "height width flipped scale", defaults=(False, None))


@contextlib.contextmanager
def evaluation_mode(model):
    """Evaluation mode without gradients inside the `with`; then the mode that was before."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def device_of(model):
    """The device on which the weights of a model are."""
    return next(model.parameters()).device


def move_boxes(boxes, source, target):
    """Boxes [..., 4] xyxy from the pixels of one View of an image into those of another."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    if source.flipped != target.flipped:
        x1, x2 = source.width - x2, source.width - x1
    across = target.width / source.width
    down = target.height / source.height
    return torch.stack([x1 * across, y1 * down, x2 * across, y2 * down], dim=-1)


def to_image(detections, view, height, width):
    """Detections of an unflipped View as detections of its image of height x width, on the CPU.

    Boxes and keypoints are scaled and boxes clipped; boxes without area are dropped. The `masks`
    stay the probabilities [N, M, M] of the box.
    """
    detections = {name: value.cpu() for name, value in detections.items()}
    boxes = move_boxes(detections["boxes"].float(), view, View(height, width))
    detections["boxes"] = ops.clip_boxes_to_image(boxes, (height, width))
    if "keypoints" in detections:
        scale = torch.tensor([width / view.width, height / view.height, 1.0])
        detections["keypoints"] = detections["keypoints"] * scale
    sides = detections["boxes"][:, 2:] - detections["boxes"][:, :2]
    kept = (sides > 0).all(dim=1)
    return {name: value[kept] for name, value in detections.items()}


# ------------------------------------------------------------------------------------------------
# Test-time augmentation (Sec. 5.1 and Fig. 5, as in Detectron): every scale, each also mirrored
# ------------------------------------------------------------------------------------------------

TTA_SCALES = (400, 500, 600, 700, 900, 1000, 1100, 1200)  # shorter sides of a model of 800
TTA_MAX_SIZE = 2000  # longer side at most, of a model of 800
TTA_VOTE_IOU = 0.9
TTA_KEYPOINT_SIDE = 150  # pixels of the image; smaller boxes leave out the smaller scales


def tta_views(height, width, min_size, max_size):
    """The 18 Views of an image of height x width pixels: the model's own, unflipped, comes first.

    Scales are relative to the model's own: of a model for 160 pixels the scales are 80 ... 240.
    """
    limits = [(min_size, max_size)]
    for scale in TTA_SCALES:
        limits.append((round(scale / 800 * min_size), round(TTA_MAX_SIZE / 800 * min_size)))
    views = []
    for shorter, longer in limits:
        shape = data.resize_shape(height, width, shorter, longer)
        views.append(View(*shape, flipped=False, scale=shorter))
        views.append(View(*shape, flipped=True, scale=shorter))
    return views


def view_features(model, image, view):
    """Features of one View of an image [3, H, W], and the sizes of that batch of one image."""
    resized = data.resize_image(image, view.height, view.width)
    if view.flipped:
        resized = resized.flip(-1)
    tensor, sizes = model.batch([resized.to(device_of(model))])
    return model.features(tensor), sizes


def vote_boxes(detections, scores, boxes, score_threshold, iou=TTA_VOTE_IOU):
    """Box voting: the kept boxes become means of the boxes that agree with them.

    detections: dict with `boxes` [N, 4] and `labels` [N], what NMS kept of the united boxes;
    scores: [P, K+1] and boxes: [P, K or 1, 4], all of them. For each kept box, the boxes of its
    class with a score above score_threshold (Detectron: only those went into NMS) and an IoU of at
    least `iou` are averaged, weighted by score. Returns [N, 4]; the scores are not changed.
    """
    voted = detections["boxes"].clone()
    for label in detections["labels"].unique().tolist():
        kept = detections["labels"] == label
        voters = scores[:, label] > score_threshold
        # One box for all classes (cascade), or one for each.
        candidates = boxes[voters, min(label, boxes.shape[1]) - 1]
        agree = ops.box_iou(voted[kept], candidates) >= iou
        weights = agree * scores[voters, label]
        total = weights.sum(dim=1, keepdim=True)
        mean = weights @ candidates / total.clamp(min=1e-12)
        voted[kept] = torch.where(total > 0, mean, voted[kept])
    return voted


def keypoint_scale_fits(boxes, image, own, view):
    """Which boxes [N, 4] (in pixels of the View `own`) take keypoints from `view`: [N] of 0 or 1.

    Small boxes, measured in the image itself, leave out the views smaller than the model's own,
    the others leave out the larger ones. Unlike the scales, what is small does not depend on the
    model's own size: neither do the strides of its features, in which a small person blurs.
    """
    in_image = move_boxes(boxes, own, View(*image.shape[-2:]))
    small = ops.box_area(in_image) < TTA_KEYPOINT_SIDE**2
    return torch.where(small, float(view.scale >= own.scale), float(view.scale <= own.scale))


def augmented_detections(model, image, views):
    """Detections of one image [3, H, W] from many Views, as one model call gives them for views[0].

    Boxes first: scores and boxes of all views are united before score threshold and NMS. Masks and
    keypoints are then read for these final boxes, in every view, and averaged: masks as
    probabilities, which become bits only where they are pasted. Features are computed anew for
    that: those of 18 views would not fit into memory.
    """
    own = views[0]
    scores = []
    boxes = []
    for view in views:
        features, sizes = view_features(model, image, view)
        proposals, valid = model.proposals(features, sizes)
        view_scores, view_boxes = model.box_predictions(features, proposals, valid, sizes)[0]
        scores.append(view_scores)
        boxes.append(move_boxes(view_boxes, view, own))
        del features  # before those of the next view are computed
    scores = torch.cat(scores)
    boxes = torch.cat(boxes)
    detections = model.postprocess(scores, boxes)
    threshold = model.config["box_score_thresh"]
    detections["boxes"] = vote_boxes(detections, scores, boxes, threshold)

    with_masks = model.config["masks"]
    with_keypoints = model.config["keypoints"] > 0
    if not (with_masks or with_keypoints):
        return detections
    masks = 0
    heatmaps = 0
    used = 0
    for view in views:
        features, _ = view_features(model, image, view)
        view_boxes = move_boxes(detections["boxes"], own, view)
        if with_masks:
            view_masks = model.mask_probabilities(features, [view_boxes], [detections["labels"]])[0]
            masks = masks + (view_masks.flip(-1) if view.flipped else view_masks)
        if with_keypoints:
            view_maps = model.keypoint_heatmaps(features, [view_boxes])[0]
            if view.flipped:
                # The mirrored left wrist is found as a right wrist.
                view_maps = view_maps.flip(-1)[:, data.KEYPOINT_FLIP]
            use = keypoint_scale_fits(detections["boxes"], image, own, view)
            heatmaps = heatmaps + view_maps * use[:, None, None, None]
            used = used + use
        del features
    if with_masks:
        detections["masks"] = masks / len(views)
    if with_keypoints:
        heatmaps = heatmaps / used[:, None, None, None]  # never 0: the own size fits every box
        keypoints, keypoint_scores = detector.decode_keypoints(heatmaps, detections["boxes"])
        detections["keypoints"] = keypoints
        detections["keypoints_scores"] = keypoint_scores
    return detections


# ------------------------------------------------------------------------------------------------
# Prediction on an image
# ------------------------------------------------------------------------------------------------


def input_sizes(model, min_size=None, max_size=None):
    """Shorter and longest side of inputs in pixels: as asked for, or as the model was trained."""
    min_size = min_size or model.data_settings.get("min_size") or 800
    max_size = max_size or model.data_settings.get("max_size") or 1333
    return min_size, max_size


def detect(model, image, height, width, min_size, max_size, tta=False):
    """Detections in an image of height x width, as from `to_image`; the model is in eval mode.

    image: [3, height, width], or (without tta) resized to the network's size already.
    """
    if tta:
        views = tta_views(height, width, min_size, max_size)
        return to_image(augmented_detections(model, image, views), views[0], height, width)
    view = View(*data.resize_shape(height, width, min_size, max_size))
    resized = data.resize_image(image, view.height, view.width)
    return to_image(model([resized.to(device_of(model))])[0], view, height, width)


def predict(model, image, min_size=None, max_size=None, tta=False):
    """Detect the objects of one image.

    model: a MaskRCNN, in whatever mode; image: [3, H, W] RGB, uint8 or float in [0, 1];
    min_size, max_size: the image is resized so that its shorter side is min_size pixels, unless the
    longer would exceed max_size; None: what the model was trained for; tta: test-time augmentation.

    Returns a dict on the CPU, best score first, all in the pixels of this image: `boxes` [N, 4]
    float xyxy, `labels` [N] int64 (1..K), `scores` [N], `masks` [N, H, W] bool (of a model with
    masks), `keypoints` [N, 17, 3] (x, y, 1) and `keypoints_scores` [N, 17] (with keypoints).
    """
    height, width = image.shape[-2:]
    with evaluation_mode(model):
        sizes = input_sizes(model, min_size, max_size)
        detections = detect(model, image, height, width, *sizes, tta)
    if "masks" in detections:
        boxes = detections["boxes"]
        detections["masks"] = paste_masks(detections["masks"], boxes, height, width)
    return detections


# ------------------------------------------------------------------------------------------------
# Metrics: results of all images in COCO's submission format, then AP (Sec. 5: bbox and mask AP)
# ------------------------------------------------------------------------------------------------

COCO_METRICS = {
    "bbox": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "segm": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "keypoints": ("AP", "AP50", "AP75", "APm", "APl"),  # small people have no keypoints in COCO
}
RESULT_FIELDS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}


class EvaluationImages(torch.utils.data.Dataset):
    """The images of a data set that one process evaluates, for a loader to decode ahead.

    Items are (position in the data set, image uint8 [3, h, w], height, width): the image resized
    for the network if `sizes` (shorter, longer side) is given, and its own height and width.
    """

    def __init__(self, dataset, positions, sizes=None):
        # A copy that reads images only: the objects to find are pycocotools' business.
        self.dataset = copy.copy(dataset)
        self.dataset.masks = False
        self.dataset.keypoints = False
        self.positions = positions
        self.sizes = sizes

    def __len__(self):
        return len(self.positions)

    def __getitem__(self, i):
        try:
            image, _ = self.dataset[self.positions[i]]
        except data.DataError as error:
            # Raised by the reader: from a worker it would come wrapped into a page of traceback.
            return error
        height, width = image.shape[-2:]
        if self.sizes is not None:
            image = data.resize_image(image, *data.resize_shape(height, width, *self.sizes))
        return self.positions[i], image, height, width


def coco_results(image_id, detections, height, width, category_ids):
    """Detections of one image in COCO's submission format, one dict for each.

    detections: as from `to_image`; category_ids: those of labels 1..K. Each dict has `image_id`,
    `category_id`, `score`, `bbox` [x, y, width, height], and `segmentation` (compressed RLE) and
    `keypoints` [51] where the model has them. Numbers are rounded here, once: the metrics are
    computed from the very values that are written.
    """
    results = []
    boxes = detections["boxes"].tolist()
    scores = detections["scores"].tolist()
    labels = detections["labels"].tolist()
    for (x1, y1, x2, y2), score, label in zip(boxes, scores, labels):
        results.append(
            {
                "image_id": image_id,
                "category_id": category_ids[label - 1],
                "score": round(score, 6),
                "bbox": [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)],
            }
        )
    if "masks" in detections:
        masks = detections["masks"].float().numpy()
        for result, mask, box in zip(results, masks, boxes):
            window = paste_window(mask, box, height, width)
            result["segmentation"] = window_rle(*window, height, width)
    if "keypoints" in detections:
        # COCO's keypoints are indices of pixels, ours are places: pixel 0 has its centre at 0.5.
        keypoints = detections["keypoints"] - torch.tensor([0.5, 0.5, 0.0])
        for result, points in zip(results, keypoints.flatten(1).tolist()):
            result["keypoints"] = [round(value, 3) for value in points]
    return results


def percent(values):
    """Mean of the values that are defined (pycocotools writes -1 for none) in percent, or None."""
    values = np.asarray(values)
    values = values[values > -1]
    return 100 * float(values.mean()) if values.size else None


def coco_metrics(truth, results, kind, dataset, per_class=False):
    """COCO's average precisions, computed by pycocotools.

    truth: a pycocotools COCO object; results: list of dicts in COCO's submission format; kind:
    "bbox", "segm" or "keypoints"; dataset: its `image_ids` and `category_ids` are evaluated.
    Returns a dict of percentages by name; None where no object is of that size, so that it can be
    written as JSON. With per_class also {"per_class": {name of the class: AP}}.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        if results:
            # A copy, since loadRes writes into the dicts it is given.
            found = truth.loadRes([dict(result) for result in results])
        else:
            # loadRes cannot read an empty list; a data set without annotations says the same.
            found = COCO()
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        scorer = COCOeval(truth, found, kind)
        scorer.params.imgIds = list(dataset.image_ids)
        scorer.params.catIds = list(dataset.category_ids)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    names = COCO_METRICS[kind]
    metrics = {name: percent([value]) for name, value in zip(names, scorer.stats)}
    if per_class:
        # precision: [IoU thresholds, recalls, classes, areas (the first: all), most detections]
        precision = scorer.eval["precision"]
        names = dict(zip(dataset.category_ids, dataset.classes))
        metrics["per_class"] = {
            names[category]: percent(precision[:, :, k, 0, -1])
            for k, category in enumerate(scorer.params.catIds)
        }
    return metrics


def voc_average_precision(found, truths, min_iou=0.5):
    """PASCAL VOC's average precision of one class by the rule of 2010 and later, in [0, 1].

    found: list of (image id, score, box [4]); truths: dict image id -> (boxes [N, 4], difficult [N]
    bool), numpy, boxes x1, y1, x2, y2 in continuous pixels (VOC's inclusive corners: +1 on x2, y2).

    The rule (VOC development kit, 2010): by falling score, each detection looks at the object of
    its image that it overlaps most. IoU below 0.5: false positive. A difficult object: counts for
    nothing. An object found before: false positive. Otherwise: true positive. AP is the area under
    precision over recall, where precision is the best at this or any higher recall. Returns None
    if no object counts.
    """
    total = sum(int((~difficult).sum()) for _, difficult in truths.values())
    if total == 0:
        return None
    taken = {image_id: np.zeros(len(boxes), bool) for image_id, (boxes, _) in truths.items()}
    hits = []
    for image_id, _, box in sorted(found, key=lambda one: -one[1]):
        boxes, difficult = truths.get(image_id, (np.zeros((0, 4)), None))
        best = -1
        if len(boxes):
            overlap = ops.box_iou(torch.tensor([box]).double(), torch.as_tensor(boxes).double())[0]
            best = int(overlap.argmax())
        if best < 0 or overlap[best] < min_iou:
            hits.append(False)
        elif not difficult[best]:
            hits.append(not taken[image_id][best])
            taken[image_id][best] = True
    true_positives = np.cumsum(hits)
    recall = true_positives / total
    precision = true_positives / np.arange(1, len(hits) + 1)
    best_precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0) * best_precision))


def voc_metrics(dataset, results, per_class=False):
    """{"mAP50": mean over the classes of `voc_average_precision`, in percent}.

    dataset: a VocDataset; results: as from `coco_results`, of all its images.
    """
    found = {category: [] for category in dataset.category_ids}
    for result in results:
        x, y, width, height = result["bbox"]
        box = [x, y, x + width, y + height]
        found[result["category_id"]].append((result["image_id"], result["score"], box))
    truths = dataset.voc_truths()
    precisions = {}
    for name, category in zip(dataset.classes, dataset.category_ids):
        precision = voc_average_precision(found[category], truths[category])
        precisions[name] = None if precision is None else 100 * precision
    defined = [value for value in precisions.values() if value is not None]
    metrics = {"mAP50": sum(defined) / len(defined) if defined else None}
    if per_class:
        metrics["per_class"] = precisions
    return metrics


def format_table(metrics):
    """The result of `evaluate` as a table of text: a row for bbox, segm, ...; "-" for None."""
    names = []
    for row in metrics.values():
        names += [name for name in row if name not in names and name != "per_class"]
    lines = [" " * 9 + "".join(f"{name:>7}" for name in names)]
    for kind, row in metrics.items():
        cells = ["-" if row.get(name) is None else f"{row[name]:.1f}" for name in names]
        lines.append(f"{kind:9}" + "".join(f"{cell:>7}" for cell in cells))
    return "\n".join(lines)


def format_classes(metrics):
    """AP of each class as a table of text; for metrics from `evaluate(..., per_class=True)`."""
    kinds = list(metrics)
    classes = list(metrics[kinds[0]]["per_class"])
    widest = max(len(name) for name in classes)
    lines = [" " * widest + "".join(f"{kind:>11}" for kind in kinds)]
    for name in classes:
        values = [metrics[kind]["per_class"].get(name) for kind in kinds]
        cells = ["-" if value is None else f"{value:.1f}" for value in values]
        lines.append(f"{name:{widest}}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def check_classes(model, dataset):
    """Raise DataError, in one sentence, where the model's classes are not the data set's."""
    known = model.config["num_classes"]
    if known != len(dataset.category_ids):
        raise data.DataError(
            f"the weights are for {known} classes, the data set has {len(dataset.category_ids)}"
        )
    trained = model.data_settings.get("classes")
    if trained is not None and list(trained) != list(dataset.classes):
        raise data.DataError(
            f"the weights are for the classes {', '.join(trained)}; "
            f"the data set has {', '.join(dataset.classes)}"
        )


def write_json(path, value):
    """Write a JSON file under a temporary name, renamed when complete: all of it or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def detect_all(model, dataset, rank, world_size, tta, workers, progress):
    """Yield (image id, list of `coco_results`) for each image of this process's share.

    The model is in evaluation mode; arguments as of `evaluate`.
    """
    sizes = input_sizes(model)
    positions = range(rank, len(dataset), world_size)
    # One image at a time: in a batch, images are padded to the largest, and through GroupNorm the
    # padding would make a result depend on its neighbours.
    images = EvaluationImages(dataset, positions, None if tta else sizes)
    loader = torch.utils.data.DataLoader(
        images,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=data.leave_signals if workers else None,
    )
    bar = tqdm(total=len(dataset), unit="image", desc="evaluate", disable=not progress, leave=False)
    # A thread pastes and encodes the masks of an image while the network looks at the next one.
    with bar, concurrent.futures.ThreadPoolExecutor(1) as thread:
        waiting = None
        for item in loader:
            if isinstance(item, data.DataError):
                raise item
            position, image, height, width = item
            detections = detect(model, image, height, width, *sizes, tta)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            image_id = dataset.image_ids[position]
            task = (image_id, detections, height, width, dataset.category_ids)
            waiting = image_id, thread.submit(coco_results, *task)
            bar.update(min(world_size, len(dataset) - bar.n))
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def evaluate(
    model,
    dataset,
    out=None,
    rank=0,
    world_size=1,
    tta=False,
    workers=2,
    per_class=False,
    progress=True,
):
    """Metrics of a model on a data set, in percent; every process gets the same.

    model: a MaskRCNN (not wrapped in DDP), in whatever mode; dataset: a CocoDataset or VocDataset
    made for evaluation. Process `rank` of `world_size` takes every world_size-th image, rank 0
    gathers and computes; with more than one, torch.distributed must be initialized. tta: test-time
    augmentation; workers: processes that decode images; progress: a bar on rank 0.

    out: a folder for `results_bbox.json`, `results_segm.json`, `results_keypoints.json` in COCO's
    submission format: the metrics are pycocotools' on these files. They appear when complete and
    not before; until then the results are in `results_partial_RANK.jsonl`, a line for each image.

    Returns {"bbox": {"AP", "AP50", "AP75", "APs", "APm", "APl"}, "segm": the same for a model with
    masks, "keypoints": {"AP", "AP50", "AP75", "APm", "APl"} for one with keypoints}, or for VOC
    {"voc": {"mAP50"}}; None where there is no object to find. per_class adds {"per_class": {class:
    AP}} to each. Raises DataError where data set and model have different classes.
    """
    check_classes(model, dataset)
    kinds = ["bbox"]
    if model.config["masks"]:
        kinds.append("segm")
    if model.config["keypoints"]:
        kinds.append("keypoints")

    truth = None  # read first: what is wrong with it should not be said after hours
    if rank == 0 and not hasattr(dataset, "voc_truths"):
        truth = dataset.coco_gt()
    partial = None
    if out is not None:
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            # Results of an earlier run must not pass for those of this one, should it be killed.
            files = [out / f"results_{kind}.json" for kind in RESULT_FIELDS]
            for stale in (*files, *out.glob("results_partial_*.jsonl")):
                stale.unlink(missing_ok=True)
        if world_size > 1:
            dist.barrier()
        partial = out / f"results_partial_{rank}.jsonl"

    lines = []
    progress = progress and rank == 0
    opened = open(partial, "w") if partial else contextlib.nullcontext()
    found = detect_all(model, dataset, rank, world_size, tta, workers, progress)
    with evaluation_mode(model), opened as file, contextlib.closing(found):
        for result in found:
            lines.append(json.dumps(result))
            if file:
                file.write(lines[-1] + "\n")
                file.flush()

    # Through torch.distributed and not through files: machines need not share a file system.
    shares = [lines] * world_size
    if world_size > 1:
        dist.gather_object(lines, shares if rank == 0 else None)
    metrics = {}
    if rank == 0:
        by_image = dict(json.loads(line) for share in shares for line in share)
        # In the data set's order: the files do not depend on the number of processes.
        results = [one for image_id in dataset.image_ids for one in by_image[image_id]]
        for kind in kinds:
            others = [field for key, field in RESULT_FIELDS.items() if key != kind]
            chosen = [{k: v for k, v in one.items() if k not in others} for one in results]
            if out is not None:
                write_json(out / f"results_{kind}.json", chosen)
            if truth is not None:
                metrics[kind] = coco_metrics(truth, chosen, kind, dataset, per_class)
        if truth is None:
            metrics["voc"] = voc_metrics(dataset, results, per_class)
    message = [metrics]
    if world_size > 1:
        dist.broadcast_object_list(message)
    if partial:
        partial.unlink()
    return message[0]


# ------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------

COLORS = [
    "#ff595e", "#ffca3a", "#8ac926", "#1fa2ff", "#c77dff", "#ff924c", "#2ec4b6", "#f15bb5",
    "#b5e48c", "#00f5d4",
]  # fmt: skip
SKELETON = [  # pairs of data.KEYPOINT_NAMES that a line joins
    (0, 1), (0, 2), (1, 3), (2, 4), (5, 6), (5, 7), (7, 9), (6, 8), (8, 10), (5, 11), (6, 12),
    (11, 12), (11, 13), (13, 15), (12, 14), (14, 16),
]  # fmt: skip
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
PICTURE_SIDE = 480  # pixels; smaller images are enlarged, or one could not read the names


def class_name(label, classes):
    """Name of a label 1..K; classes may be None, where a file of weights does not know them."""
    return classes[label - 1] if classes else f"class {label}"


def draw(image, detections, classes=None, score=0.5):
    """A picture of an image with its detections: masks, boxes, names with scores, keypoints.

    image: [3, H, W] uint8, or float in [0, 1]; detections: as from `predict`; classes: names of
    labels 1..K; score: detections below are left out. Returns uint8 [3, H', W'], enlarged by a
    whole number where the image is small.
    """
    if image.is_floating_point():
        image = (image * 255).round().to(torch.uint8)
    zoom = math.ceil(PICTURE_SIDE / max(image.shape[-2:]))
    picture = data.resize_image(image.cpu(), image.shape[-2] * zoom, image.shape[-1] * zoom)
    kept = detections["scores"] >= score
    count = int(kept.sum())
    if count == 0:
        return picture
    colors = [COLORS[i % len(COLORS)] for i in range(count)]
    labels = detections["labels"][kept].tolist()
    scores = detections["scores"][kept].tolist()
    names = [f"{class_name(k, classes)} {100 * value:.0f}%" for k, value in zip(labels, scores)]
    if "masks" in detections:
        masks = detections["masks"][kept]
        masks = masks.repeat_interleave(zoom, dim=1).repeat_interleave(zoom, dim=2)
        picture = drawing.draw_segmentation_masks(picture, masks, alpha=0.4, colors=colors)
    if "keypoints" in detections:
        for points, color in zip(detections["keypoints"][kept], colors):
            picture = drawing.draw_keypoints(
                picture, zoom * points[None, :, :2], SKELETON, colors=color, radius=3, width=2
            )
    # The best detection is drawn last, so that its name is not covered.
    return drawing.draw_bounding_boxes(
        picture,
        zoom * detections["boxes"][kept].flip(0),
        names[::-1],
        colors=colors[::-1],
        width=2,
        fill_labels=True,
    )


def save_picture(model, image, path, score=0.5, tta=False):
    """Predict one image [3, H, W], write the picture of `draw` to path, return the detections."""
    detections = predict(model, image, tta=tta)
    picture = draw(image, detections, model.data_settings.get("classes"), score)
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)
    return detections


def save_pictures(model, dataset, out, count=8, score=0.5):
    """Pictures `OUT/IMAGE_ID.png` of the first images of a data set; returns their paths."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in range(min(count, len(dataset))):
        image, target = dataset[i]
        paths.append(out / f"{target['image_id']}.png")
        save_picture(model, image, paths[-1], score)
    return paths


def find_images(paths):
    """The image files among paths; for a folder, those in it by name. DataError where none is."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            # Pictures that an earlier run left there are not images to look at.
            inside = [p for p in inside if not p.stem.rstrip("_").endswith("_detections")]
            if not inside:
                raise data.DataError(f"there is no image in the folder {path}")
            found += inside
        else:
            found.append(path)
    return found


def format_detections(detections, classes, score):
    """Detections with at least this score as a table of text, the best first."""
    lines = []
    for label, value, box in zip(*(detections[k].tolist() for k in ("labels", "scores", "boxes"))):
        if value >= score:
            corners = "".join(f"{corner:8.1f}" for corner in box)
            lines.append(f"  {class_name(label, classes):20}{value:6.2f}{corners}")
    header = f"  {'class':20}{'score':>6}" + "".join(f"{c:>8}" for c in ("x1", "y1", "x2", "y2"))
    return "\n".join([header, *lines]) if lines else f"  nothing with a score of at least {score}"


# ------------------------------------------------------------------------------------------------
# Curves: validation AP (Figures 1, 3, 4, 7) and training loss (Figure 8) against iteration
# ------------------------------------------------------------------------------------------------

# What is drawn on the left, with the style of its line.
CURVES = {
    ("bbox", "AP"): "-",
    ("segm", "AP"): "--",
    ("keypoints", "AP"): ":",
    ("voc", "mAP50"): "-",
}


def read_log(run):
    """The records (dicts) of RUN/log.jsonl. DataError, in one sentence, where it cannot be read."""
    path = Path(run) / "log.jsonl"
    if not path.is_file():
        raise data.DataError(f"{run} is not the folder of a run: it has no log.jsonl")
    lines = path.read_text().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            # A run that is going on, or was killed, may end in half a line.
            if number < len(lines):
                raise data.DataError(f"{path}: line {number} is not JSON") from None
    return records


def smooth(values, window):
    """Running mean of a list over up to `window` values that end at each."""
    sums = np.cumsum(np.insert(np.asarray(values, float), 0, 0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def plot(runs, output):
    """Draw the curves of runs, overlaid, into one figure.

    runs: folders with a log.jsonl of train.py; output: the figure's file, its suffix says which
    format (.png, .svg, .pdf). On the left validation AP (boxes solid, masks dashed, keypoints
    dotted), on the right the training loss, as a running mean over a fiftieth of the run. Raises
    DataError where a log cannot be read, ImportError where matplotlib is not installed.
    """
    logs = [read_log(run) for run in runs]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (run, records) in enumerate(zip(runs, logs)):
        color = f"C{number}"
        name = Path(run).resolve().name
        for (kind, metric), style in CURVES.items():
            points = [(r["iteration"], r[kind].get(metric)) for r in records if kind in r]
            points = [point for point in points if point[1] is not None]
            if points:
                label = f"{name}, {kind}"
                left.plot(*zip(*points), style, color=color, marker=".", label=label)
        steps = [(r["iteration"], r["loss"]) for r in records if "loss" in r]
        if steps:
            iterations, losses = zip(*steps)
            losses = smooth(losses, max(1, len(losses) // 50))
            right.plot(iterations, losses, color=color, label=name)
    left.set_ylabel("validation AP")
    right.set_ylabel("training loss")
    for axes in (left, right):
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(output, dpi=120)


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


class UsageError(ValueError):
    """A command line that cannot be obeyed; the message is one sentence."""


def export(weights, output):
    """Copy a checkpoint of train.py without the optimizer's state: half the size, for sharing."""
    checkpoint = detector.read_file(weights)
    if "model_config" not in checkpoint:
        raise detector.WeightsError(f"{weights} is not a checkpoint of train.py.")
    checkpoint.pop("momentum", None)
    temporary = Path(f"{output}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
        os.replace(temporary, output)
    except (OSError, RuntimeError) as error:  # torch.save's own writer raises RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(f"{output} could not be written ({str(error).splitlines()[0]})") from None


def keep_freed_memory():
    """Have glibc keep what was freed for the next step, instead of giving it back to the system.

    A step on the CPU takes and frees the same gigabytes as the one before; getting them from the
    kernel, which clears every page, was a third of its time. Where there is no glibc, nothing.
    """
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, TypeError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 2**31 - 1)
        libc.mallopt(trim_threshold, 2**31 - 1)


def start_processes(name=None):
    """Rank, number of processes and device of this process; joins those that torchrun started.

    name: "cpu", "cuda", "cuda:1", ...; None: cuda where there is one. Raises UsageError.
    """
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        # On Apple's mps, NMS and RoIAlign in float64 are missing.
        raise UsageError(f"device {name} is not supported; use cuda or cpu")
    if device.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", device.index or 0))
        if index >= torch.cuda.device_count():
            raise UsageError(f"there is no CUDA device {index} here; use --device cpu")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if world_size > 1:
        # The others wait while rank 0 computes the metrics: for a large data set, long.
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    return rank, world_size, device


def evaluate_command(args, model, rank, world_size):
    """`--data`: evaluate on a data set in COCO's layout and print the tables on rank 0."""
    dataset = data.open_split(
        args.data, args.split, masks=model.config["masks"], keypoints=model.config["keypoints"] > 0
    )
    metrics = evaluate(
        model, dataset, args.out, rank, world_size, args.tta, args.workers, args.per_class
    )
    if rank == 0:
        if args.per_class:
            print(format_classes(metrics) + "\n")
        print(format_table(metrics))
        if args.out:
            print(f"results: {args.out}/results_*.json")


def images_command(args, model):
    """`--images`: a table of detections for each image and its picture in the folder --out."""
    out = Path(args.out or ".")
    out.mkdir(parents=True, exist_ok=True)
    used = set()
    paths = find_images(args.images)
    unreadable = 0
    for path in paths:
        try:
            image = data.read_image(path)
        except data.DataError as error:
            print(f"evaluate.py: {error}", file=sys.stderr)
            unreadable += 1
            continue
        # Never the name of the image itself, nor that of another image's picture.
        name = f"{path.stem}_detections"
        while name in used:
            name += "_"
        used.add(name)
        picture = out / f"{name}.png"
        detections = save_picture(model, image, picture, args.score, args.tta)
        print(f"{path} -> {picture}")
        print(format_detections(detections, model.data_settings.get("classes"), args.score))
    if unreadable:
        raise data.DataError(f"{unreadable} of {len(paths)} images could not be read, see above")


def make_parser():
    """The command line of this file."""
    parser = argparse.ArgumentParser(
        description="Evaluate Mask R-CNN, look at its detections, draw curves, share weights. With "
        "--data also under torchrun: all processes share the images.",
    )
    add_job = parser.add_mutually_exclusive_group(required=True).add_argument
    add_job(
        "--data", metavar="DIR",
        help="metrics on a data set in COCO's layout: DIR/annotations/instances_val2017.json "
        "(of a keypoint model: person_keypoints_val2017.json) and DIR/val2017/",
    )  # fmt: skip
    add_job(
        "--images", nargs="+", metavar="PATH",
        help="detections in images, or folders of images, as text and as pictures",
    )  # fmt: skip
    add_job(
        "--plot", nargs="+", metavar="RUN",
        help="AP and loss of training runs (their folders), overlaid in one figure",
    )  # fmt: skip
    add_job(
        "--export", metavar="FILE", help="write the weights without the optimizer's state to FILE"
    )
    add = parser.add_argument
    add(
        "--weights", metavar="FILE",
        help="a checkpoint: it says which model, sizes and classes; needed by all but --plot",
    )  # fmt: skip
    add(
        "--out", "--output", metavar="PATH",
        help="--data: folder for the results in COCO's format (default: none are kept); --images: "
        "folder for the pictures (default: this one); --plot: the figure's file (curves.png)",
    )  # fmt: skip
    add("--split", default="val2017", help="--data: which part of it (val2017)")
    add("--tta", action="store_true", help="test-time augmentation: 18 views, about 40x the time")
    add("--per-class", action="store_true", help="--data: AP of each class, too")
    add("--score", type=float, default=0.5, help="--images: show detections from here on (0.5)")
    add("--workers", type=int, default=2, help="--data: image-decoding processes per GPU (2)")
    add(
        "--image-mean", nargs=3, type=float, metavar=("R", "G", "B"),
        help="what a public file does not say, see README: the pixel mean it was trained with, in "
        "0..255 (default: that of its kind)",
    )  # fmt: skip
    add("--image-std", nargs=3, type=float, metavar=("R", "G", "B"), help="likewise, the deviation")
    add("--stride-in-1x1", type=int, choices=(0, 1), help="likewise, where the stride is")
    add("--roi-sampling-ratio", type=int, metavar="N", help="likewise, RoIAlign's (0: adaptive)")
    add("--device", help="cpu, cuda, cuda:1, ... (cuda where there is one, else cpu)")
    return parser


def unsaid(args):
    """What the command line says of a public file of weights, as arguments of `build_model`."""
    overrides = {
        "image_mean": args.image_mean and tuple(value / 255 for value in args.image_mean),
        "image_std": args.image_std and tuple(value / 255 for value in args.image_std),
        "stride_in_1x1": None if args.stride_in_1x1 is None else bool(args.stride_in_1x1),
        "roi_sampling_ratio": args.roi_sampling_ratio,
    }
    return {name: value for name, value in overrides.items() if value is not None}


def run_command(args):
    """Do what the parsed command line says."""
    if args.plot:
        output = args.out or "curves.png"
        if Path(output).suffix not in (".png", ".svg", ".pdf"):
            raise UsageError(f"{output} must end in .png, .svg or .pdf")
        plot(args.plot, output)
        print(output)
        return
    if args.export:
        export(args.weights, args.export)
        print(args.export)
        return

    rank, world_size, device = start_processes(args.device)
    try:
        model = detector.load_model(args.weights, rank == 0, **unsaid(args)).to(device)
        if args.data:
            evaluate_command(args, model, rank, world_size)
        elif rank == 0:
            images_command(args, model)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main(arguments=None):
    """The command line; returns the exit code: 0, 1 for bad files, 2 for bad use."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if not args.weights and not args.plot:
        parser.error("--weights FILE is needed")
    if not 0 <= args.score <= 1:
        parser.error("--score must be between 0 and 1")
    if args.workers < 0:
        parser.error("--workers must not be negative")
    try:
        run_command(args)
    except UsageError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    except (data.DataError, detector.WeightsError, ImportError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
