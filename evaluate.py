"""Prediction, metrics and pictures: how Mask R-CNN is tested (Sec. 4 and 5 of the paper).

    python evaluate.py --weights FILE --data DIR                COCO's or VOC's metrics
    python evaluate.py --weights FILE --images a.jpg FOLDER     detections as text and as pictures
    python evaluate.py --weights FILE --export SMALL            the weights alone, for sharing

In reading order: prediction on an image (`predict`), test-time augmentation, metrics over all
processes (`evaluate`), pictures (`draw`), the command line. The plumbing at the end (processes,
lock, errors) is train.py's, too.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the next imports, which take seconds, ends silently
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import collections
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
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader, Dataset
from torchvision import ops
from torchvision import utils as drawing
from tqdm import tqdm

import data
from data import UserError
from model import WeightsError, load_model, read_checkpoint, write_whole

# ---- Prediction on an image ----------------------------------------------------------------------


def predict(model, image, min_size=None, max_size=None, tta=False):
    """Detect the objects of one image.

    model: a MaskRCNN, in whatever mode; image: the path of a file, an array [H, W, 3] or a tensor
    [3, H, W], RGB, uint8 or float in [0, 1]; min_size, max_size: the shorter side that the network
    sees, and the most that the longer one may have (None: what the model was trained for); tta:
    test-time augmentation.

    Returns a dict on the CPU, best score first, all in the pixels of this image: `boxes` [N, 4]
    float xyxy, `labels` [N] int64 (1..K), `scores` [N], `masks` [N, H, W] bool (of a model with
    masks), `keypoints` [N, 17, 3] (x, y, 1) and `keypoints_scores` [N, 17] (with keypoints).
    Raises UserError for a file that cannot be read, ValueError for an array of another shape.
    """
    image = to_tensor(image)
    size = tuple(image.shape[1:])
    with evaluation_mode(model):
        detections = detect(model, image, size, min_size, max_size, tta)
    if "masks" in detections:
        detections["masks"] = paste_masks(detections["masks"], detections["boxes"], *size)
    return detections


def to_tensor(image):
    """An image as `predict` takes it as a tensor [3, H, W], uint8 or float32."""
    if isinstance(image, (str, os.PathLike)):
        return data.read_image(image)
    if not torch.is_tensor(image):
        # A copy in C's order, since torch refuses the negative strides of array[..., ::-1].
        image = torch.from_numpy(np.atleast_3d(np.array(image, order="C"))).permute(2, 0, 1)
    image = image.float() if image.is_floating_point() else image
    if image.ndim != 3 or len(image) != 3 or image.dtype not in (torch.uint8, torch.float32):
        raise ValueError(
            "An image is an array [H, W, 3] or a tensor [3, H, W] of uint8 or float, not "
            f"{image.dtype} {list(image.shape)} (channels first)."
        )
    return image


@contextlib.contextmanager
def evaluation_mode(model, amp=False):
    """Evaluation mode without gradients, then the mode that was before; amp: bfloat16 autocast."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device_of(model).type, torch.bfloat16, enabled=amp):
            yield
    finally:
        model.train(training)


def device_of(model):
    """The device on which the weights of a model are."""
    return next(model.parameters()).device


def detect(model, image, size, min_size=None, max_size=None, tta=False):
    """Detections in an image of `size` (H, W), as from `to_image`; the model is in eval mode.

    image: [3, H, W], or (without tta) already resized for the network.
    """
    sizes = input_sizes(model, min_size, max_size)
    if tta:
        views = tta_views(size, *sizes)
        return to_image(detect_augmented(model, image, views), views[0][0], size)
    resized = data.resize_shape(*size, *sizes)
    image = data.resize_image(image, *resized).to(device_of(model))
    return to_image(model([image])[0], resized, size)


def input_sizes(model, min_size=None, max_size=None):
    """Shorter and longest side of the network's input: as given, or as the model was trained."""
    settings = model.data_settings
    return min_size or settings.get("min_size") or 800, max_size or settings.get("max_size") or 1333


def to_image(detections, resized, size):
    """Detections in an image resized to `resized` (h, w) as detections in the image of `size`.

    Boxes and keypoints are scaled and boxes clipped; boxes without area are dropped. `masks` stay
    the probabilities [N, 28, 28] of the box. Returns tensors on the CPU, float32 also under amp.
    """
    found = {name: value.cpu() for name, value in detections.items()}
    found = {k: v.float() if v.is_floating_point() else v for k, v in found.items()}
    boxes = data.resize_boxes(found["boxes"], resized, size, flip=False)
    found["boxes"] = ops.clip_boxes_to_image(boxes, size)
    if "keypoints" in found:
        scale = torch.tensor([size[1] / resized[1], size[0] / resized[0], 1.0])
        found["keypoints"] = found["keypoints"] * scale
    kept = (found["boxes"][:, 2:] > found["boxes"][:, :2]).all(dim=1)
    return {name: value[kept] for name, value in found.items()}


def paste_masks(masks, boxes, height, width, threshold=0.5):
    """Masks [N, M, M] (probabilities) of boxes [N, 4] as bool [N, height, width] of the image.

    Boxes are xyxy in the image's pixels, also partly outside. A pixel belongs to the object from
    the threshold in (0, 1] on. The values are Detectron2's (`paste_masks_in_image`).
    """
    pasted = np.zeros((len(masks), height, width), bool)
    for image, mask, box in zip(pasted, masks.float().cpu().numpy(), boxes.tolist()):
        x, y, inside = paste_window(mask, box, height, width, threshold)
        image[y : y + inside.shape[1], x : x + inside.shape[0]] = inside.T
    return torch.from_numpy(pasted)


def paste_window(mask, box, height, width, threshold=0.5):
    """The pixels of one mask (numpy [M, M] float32) in its box (x1, y1, x2, y2) of the image.

    Returns (x, y, inside): the window's first column and row, and bool [columns, rows]: columns
    first, since that is the order of COCO's run-length code.
    """
    left, top, right, bottom = box
    if right <= left or bottom <= top:
        return 0, 0, np.zeros((0, 0), bool)
    y, rows = interpolate(mask, top, bottom, height)
    x, columns = interpolate(rows.T, left, right, width)
    return x, y, columns >= threshold


def interpolate(cells, low, high, length):
    """Bilinear interpolation along one axis: M cells fill [low, high] of `length` pixels.

    cells: [M, C] float32. Pixel i has its centre at i + 0.5; zeros around the cells let a mask fade
    out half a cell outside of its box. Returns the first pixel touched and values [n, C] from it.
    """
    count = len(cells)
    fade = (high - low) / (2 * count)
    first = max(0, math.ceil(low - fade - 0.5))
    last = min(length, math.ceil(high + fade - 0.5))
    place = (np.arange(first, last) + 0.5 - low) * (count / (high - low)) + 0.5
    before = np.clip(place.astype(np.int64), 0, count)
    weight = (place - before).astype(np.float32)[:, None]
    padded = np.zeros((count + 2, cells.shape[1]), np.float32)
    padded[1:-1] = cells
    return first, padded[before] + weight * (padded[1:] - padded[:-1])[before]


# ---- Test-time augmentation (Sec. 5.1, Fig. 5, as in Detectron): every scale, also mirrored ----

TTA_SCALES = (400, 500, 600, 700, 900, 1000, 1100, 1200)  # shorter sides, for a model of 800
TTA_MAX_SIZE = 2000  # longer side at most, for a model of 800
TTA_VOTE_IOU = 0.9


def tta_views(size, min_size, max_size):
    """The 18 views of an image of `size` (H, W): pairs of an input's size (h, w) and "mirrored".

    The model's own size comes first. The others are relative to it: a model for 160 pixels has
    views of 80 ... 240.
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
    3) Masks are read for the final boxes in every view and averaged as probabilities. Features are
       computed anew for that, since those of 18 views would fill a GPU.
    """
    check_tta(model)
    own, _ = views[0]
    scores = []
    boxes = []
    for shape, flip in views:
        features, sizes = view_features(model, image, shape, flip)
        proposals, valid = model.proposals(features, sizes)
        view_scores, view_boxes = model.box_predictions(features, proposals, valid, sizes)[0]
        scores.append(view_scores)  # [P, K + 1]
        boxes_in_own = data.resize_boxes(view_boxes.flatten(0, 1), shape, own, flip)
        boxes.append(boxes_in_own.view_as(view_boxes))  # [P, K, 4], of a cascade [P, 1, 4]
        del features  # before those of the next view are computed
    scores = torch.cat(scores)
    boxes = torch.cat(boxes)

    detections = model.postprocess(scores, boxes)
    detections["boxes"] = vote_boxes(detections, scores, boxes, model.config.box_score_thresh)
    if not model.config.masks:
        return detections

    masks = 0
    for shape, flip in views:
        features, _ = view_features(model, image, shape, flip)
        view_boxes = data.resize_boxes(detections["boxes"], own, shape, flip)
        view_masks = model.mask_probabilities(features, [view_boxes], [detections["labels"]])[0]
        masks = masks + (view_masks.flip(-1) if flip else view_masks)
        del features
    detections["masks"] = masks / len(views)
    return detections


def check_tta(model):
    """Raise UserError for a model with keypoints: the paper augments boxes and masks only."""
    if model.config.keypoints:
        raise UserError("Keypoint models have no test-time augmentation; leave out --tta.", code=2)


def view_features(model, image, shape, flip):
    """Features of one view of an image [3, H, W], and the sizes of that batch of one image."""
    resized = data.resize_image(image, *shape)
    if flip:
        resized = resized.flip(-1)
    batch, sizes = model.batch([resized.to(device_of(model))])
    return model.features(batch), sizes


def vote_boxes(detections, scores, boxes, score_threshold, iou=TTA_VOTE_IOU):
    """Box voting: each kept box b becomes the mean of the boxes b_i that agree with it.

        b  ->  sum_i s_i b_i / sum_i s_i     over the i of b's class with IoU(b, b_i) >= iou and a
                                             score s_i > score_threshold (only those went into NMS)

    detections: `boxes` [N, 4] and `labels` [N], what NMS kept of the united boxes; scores:
    [P, K + 1] and boxes: [P, K or 1, 4], all of them. Returns [N, 4]; scores do not change.
    """
    voted = detections["boxes"].clone()
    for label in detections["labels"].unique().tolist():
        kept = detections["labels"] == label
        voters = scores[:, label] > score_threshold
        candidates = boxes[voters, min(label, boxes.shape[1]) - 1]  # cascade: one for all classes
        agree = ops.box_iou(voted[kept], candidates) >= iou
        weights = agree * scores[voters, label]
        total = weights.sum(dim=1, keepdim=True)
        mean = weights @ candidates / total.clamp(min=1e-12)
        voted[kept] = torch.where(total > 0, mean, voted[kept])
    return voted


# ---- Metrics: the results of all images in COCO's format, then average precision (AP) ----
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
# The IoU is that of boxes for "bbox", of masks for "segm"; keypoints have a similarity of their own.

COCO_METRICS = {
    "bbox": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "segm": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "keypoints": ("AP", "AP50", "AP75", "APm", "APl"),  # small people have no keypoints in COCO
}
RESULT_FIELDS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}


def evaluate(
    model, dataset, out=None, tta=False, workers=2, per_class=False, amp=False, progress=True
):
    """Metrics of a model on a data set, in percent.

    Where torch.distributed is initialized, every process calls this, takes its share of the images
    and returns the same. model: a MaskRCNN (not wrapped in DDP), in whatever mode; dataset: a
    CocoDataset or VocDataset made for evaluation; tta: test-time augmentation; workers: processes
    that decode images, and as many that paste masks; amp: bfloat16; progress: a bar on rank 0.

    out: a folder for `results_bbox.json`, `results_segm.json`, `results_keypoints.json` in COCO's
    submission format. They appear whole or not at all; the metrics are pycocotools' on them.

    Returns {"bbox": {"AP", "AP50", "AP75", "APs", "APm", "APl"}, "segm": the same for a model with
    masks, "keypoints": {"AP", "AP50", "AP75", "APm", "APl"} for one with keypoints}, or for VOC
    {"voc": {"mAP50"}}; None where there is no object to find. per_class adds {"per_class": {class:
    AP}} to each. Raises UserError where data set and model have different classes.
    """
    distributed = dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    check_fits(model, dataset, tta)
    if rank == 0:
        truth = dataset.coco_gt()  # first: a fault in it should not show up after hours
        if out is not None:  # results of an earlier run must not pass for those of this one
            Path(out).mkdir(parents=True, exist_ok=True)
            for kind in RESULT_FIELDS:
                Path(out, f"results_{kind}.json").unlink(missing_ok=True)

    positions = range(rank, len(dataset), world_size)
    with evaluation_mode(model, amp):
        results = detect_all(model, dataset, positions, tta, workers, progress and rank == 0)
    if distributed:  # not through files: machines need not share a file system
        shares = [None] * world_size if rank == 0 else None
        dist.gather_object(results, shares)
        if rank == 0:
            results = {image_id: found for share in shares for image_id, found in share.items()}
    metrics = [None]
    if rank == 0:
        metrics = [score(model, dataset, truth, results, out, per_class, workers)]
    if distributed:
        dist.broadcast_object_list(metrics)
    return metrics[0]


def check_fits(model, dataset, tta):
    """Raise UserError if the model cannot be evaluated on the data set."""
    if tta:
        check_tta(model)
    trained = model.data_settings.get("classes") or dataset.classes
    names = dataset.classes
    if model.config.num_classes != len(names) or list(trained) != list(names):
        different = [f"{ours!r} is {own!r}" for own, ours in zip(trained, names) if own != ours]
        raise UserError(
            f"The classes of {dataset.annotation_file} are not those of the weights: "
            f"{len(names)} and {model.config.num_classes} of them; {', '.join(different[:3])}"
        )


def detect_all(model, dataset, positions, tta, workers, progress):
    """{image id: list of `coco_results`} of the images at `positions` of a data set.

    Three things happen at once: processes decode the next images, the model looks at one, and
    processes paste and encode the masks of the last. It sees one image at a time: in a batch,
    through GroupNorm, the padding would make a result depend on its neighbours.
    """
    sizes = input_sizes(model)
    pictures = copy.copy(dataset)
    pictures.masks = pictures.keypoints = False  # the objects to find are pycocotools' business
    read = functools.partial(read_input, pictures, None if tta else sizes)
    inputs = data.read_ahead(Mapped(read), workers, positions)

    def detections():
        for position, (image, size) in zip(positions, inputs):
            found = detect(model, image, size, *sizes, tta)
            # As numpy: tensors would travel through shared memory, of which there may be little.
            arrays = {name: value.numpy() for name, value in found.items()}
            yield dataset.image_ids[position], arrays, size, dataset.category_ids

    results = map_in_workers(coco_results, detections(), workers)
    bar = tqdm(results, "evaluate", len(positions), leave=False, disable=not progress, unit="image")
    return dict(bar)


def read_input(dataset, sizes, index):
    """An image of a data set, resized for the network if `sizes` is given, and its size (H, W)."""
    image, _ = dataset[index]
    size = tuple(image.shape[1:])
    if sizes is not None:
        image = data.resize_image(image, *data.resize_shape(*size, *sizes))
    return image, size


class Mapped(Dataset):
    """mapped[item] is function(item)."""

    def __init__(self, function):
        self.function = function

    def __getitem__(self, item):
        return self.function(item)


def map_in_workers(function, items, workers):
    """function(item) of each item, in order, computed by processes.

    A DataLoader is such a map, if its "indices" are the items. They are taken two a worker ahead,
    in this process, and may come from a generator.
    """
    init = data.worker_init if workers else None
    return DataLoader(
        Mapped(function), batch_size=None, sampler=items, num_workers=workers, worker_init_fn=init
    )


def coco_results(item):
    """Detections of one image in COCO's submission format: (image id, a list of dicts).

    item: (image id, detections as from `to_image` in numpy, size (H, W), category ids of labels
    1..K). Each dict has `image_id`, `category_id`, `score`, `bbox` [x, y, width, height], and
    `segmentation` (compressed RLE) and `keypoints` [51] where the model has them. Numbers are
    rounded here, once: the metrics are computed from the very values that are written.
    """
    image_id, detections, size, category_ids = item
    results = []
    boxes, scores, labels = (detections[name].tolist() for name in ("boxes", "scores", "labels"))
    for (x1, y1, x2, y2), confidence, label in zip(boxes, scores, labels):
        bbox = [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)]
        result = {"image_id": image_id, "category_id": category_ids[label - 1]}
        results.append(result | {"score": round(confidence, 6), "bbox": bbox})
    if "masks" in detections:
        for result, mask, box in zip(results, detections["masks"], boxes):
            result["segmentation"] = window_rle(*paste_window(mask, box, *size), *size)
    if "keypoints" in detections:
        # COCO's keypoints are indices of pixels, ours are places: pixel 0 has its centre at 0.5.
        keypoints = detections["keypoints"] - np.float32([0.5, 0.5, 0])
        for result, points in zip(results, keypoints):
            result["keypoints"] = [round(value, 3) for value in points.flatten().tolist()]
    return image_id, results


def window_rle(x, y, inside, height, width):
    """COCO's run-length code of an image in which only a window (see `paste_window`) may be True.

    Returns {"size": [height, width], "counts": compressed str}, as pycocotools encodes the image.
    """
    columns = np.zeros((inside.shape[0], height), bool)  # those of the window, over all rows
    columns[:, y : y + inside.shape[1]] = inside
    changes = np.flatnonzero(np.diff(columns.ravel(), prepend=False, append=False))
    counts = np.diff(x * height + changes, prepend=0, append=height * width)
    if counts[-1] == 0:  # the image's last pixel is True
        counts = counts[:-1]
    code = {"size": [height, width], "counts": counts.tolist()}
    code = coco_mask.frPyObjects(code, height, width)
    return {"size": [height, width], "counts": code["counts"].decode("ascii")}


def score(model, dataset, truth, results, out, per_class, workers):
    """Write the files of results and compute the metrics, as `evaluate` returns them.

    truth: the data set's `coco_gt()`; results: {image id: results} of all images.
    """
    if any(image_id not in results for image_id in dataset.image_ids):
        raise UserError("The processes see different data sets; give all of them the same data.")
    # In the data set's order: the files do not depend on the number of processes.
    results = [result for image_id in dataset.image_ids for result in results[image_id]]
    used = {"bbox": True, "segm": model.config.masks, "keypoints": model.config.keypoints}
    by_kind = {}
    for kind in [kind for kind in used if used[kind]]:
        dropped = set(RESULT_FIELDS.values()) - {RESULT_FIELDS[kind]}
        by_kind[kind] = [{k: v for k, v in one.items() if k not in dropped} for one in results]
        if out is not None:
            with write_whole(Path(out, f"results_{kind}.json")) as file:
                file.write(json.dumps(by_kind[kind]).encode())
    if dataset.metric == "voc":
        return {"voc": voc_metrics(truth, results, dataset, per_class)}
    # One process for each core, where there are thousands of results.
    processes = min(len(results) // 5000, os.cpu_count()) if workers else 0
    return {
        kind: coco_metrics(truth, found, kind, dataset, per_class, processes)
        for kind, found in by_kind.items()
    }


def coco_metrics(truth, results, kind, dataset, per_class=False, workers=0):
    """COCO's average precisions, computed by pycocotools, in percent by name.

    truth: a pycocotools COCO object; results: list of dicts in COCO's submission format; kind:
    "bbox", "segm" or "keypoints"; workers: processes, each for some of the classes. The value is
    None where no object is of that size. With per_class also {"per_class": {class: AP}}.
    """
    found = by_category(results, dataset)
    score_class = functools.partial(class_scores, truth, kind, list(dataset.image_ids))
    parts = list(map_in_workers(score_class, list(found.items()), workers))
    # precision: [IoU thresholds, recalls, classes, areas (the first: all), most detections]
    precision, recall = (torch.cat(arrays, dim=-3).numpy() for arrays in zip(*parts))
    summary = COCOeval(iouType=kind)
    summary.eval = {"precision": precision, "recall": recall}
    with contextlib.redirect_stdout(io.StringIO()):
        summary.summarize()
    metrics = {name: percent([value]) for name, value in zip(COCO_METRICS[kind], summary.stats)}
    if per_class:
        values = [percent(precision[:, :, k, 0, -1]) for k in range(len(found))]
        metrics["per_class"] = dict(zip(class_keys(dataset), values))
    return metrics


def class_scores(truth, kind, image_ids, item):
    """COCOeval's precision [T, R, 1, A, M] and recall [T, 1, A, M] of one class.

    item: (category id, its results). COCOeval treats each class as if there were no other.
    """
    category_id, results = item
    with contextlib.redirect_stdout(io.StringIO()):
        if results:  # copies, since loadRes writes into the dicts that it is given
            found = truth.loadRes([dict(result) for result in results])
        else:
            found = COCO()  # loadRes cannot read an empty list
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        scorer = COCOeval(truth, found, kind)
        scorer.params.imgIds = image_ids
        scorer.params.catIds = [category_id]
        scorer.evaluate()
        scorer.accumulate()
    return torch.from_numpy(scorer.eval["precision"]), torch.from_numpy(scorer.eval["recall"])


def by_category(objects, dataset):
    """{category id: its results or annotations} for each category of the data set."""
    found = {category_id: [] for category_id in dataset.category_ids}
    for one in objects:
        found[one["category_id"]].append(one)
    return found


def percent(values):
    """Mean of the values that are defined (pycocotools writes -1 for none) in percent, or None."""
    values = np.asarray(values)
    values = values[values > -1]
    return 100 * float(values.mean()) if values.size else None


def class_keys(dataset):
    """The names of the classes, with the id where two classes have one name."""
    count = collections.Counter(dataset.classes)
    pairs = zip(dataset.classes, dataset.category_ids)
    return [f"{name} (id {number})" if count[name] > 1 else name for name, number in pairs]


def voc_metrics(truth, results, dataset, per_class=False):
    """{"mAP50": mean over the classes of `voc_average_precision`, in percent}."""
    found = by_category(results, dataset)
    objects = by_category(truth.dataset["annotations"], dataset)
    values = [voc_average_precision(found[k], objects[k]) for k in dataset.category_ids]
    metrics = {"mAP50": percent(values)}
    if per_class:
        metrics["per_class"] = dict(zip(class_keys(dataset), [percent([v]) for v in values]))
    return metrics


def voc_average_precision(results, objects, min_iou=0.5):
    """PASCAL VOC's average precision of one class in [0, 1]; -1 if no object counts.

    results and objects (annotations with `difficult`) of the class, in COCO's format. The rule (VOC
    development kit, 2010): by falling score, each detection looks at the object of its image that
    it overlaps most. IoU below 0.5: false positive. A difficult object: counts for nothing. One
    found before: false positive. Otherwise: true positive. AP is the whole area under precision
    over recall, where COCO reads it at 101 recalls.
    """
    total = sum(not o["difficult"] for o in objects)
    if total == 0:
        return -1
    in_image = collections.defaultdict(list)
    for o in objects:
        in_image[o["image_id"]].append(o)
    taken = set()
    hits = []
    for result in sorted(results, key=lambda result: -result["score"]):
        candidates = in_image[result["image_id"]]
        overlaps = ops.box_iou(xyxy([result]), xyxy(candidates))[0].tolist()
        overlap, best = max(zip(overlaps, candidates), key=lambda pair: pair[0], default=(0, None))
        if overlap < min_iou:
            hits.append(False)
        elif not best["difficult"]:
            hits.append(best["id"] not in taken)
            taken.add(best["id"])
    recall = np.cumsum(hits) / total
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    best_precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0) * best_precision))


def xyxy(objects):
    """Boxes [N, 4] float64 (x1, y1, x2, y2) of results or annotations in COCO's format."""
    boxes = torch.tensor([o["bbox"] for o in objects], dtype=torch.float64).reshape(-1, 4)
    return ops.box_convert(boxes, "xywh", "xyxy")


def format_table(metrics):
    """The result of `evaluate` as a table of text: a row for bbox, segm, ...; "-" for None."""
    rows = {
        kind: {k: v for k, v in row.items() if k != "per_class"} for kind, row in metrics.items()
    }
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    widest = max(map(len, rows))
    lines = [" " * widest + "".join(f"{column:>11}" for column in columns)]
    for name, row in rows.items():
        cells = ["-" if row.get(column) is None else f"{row[column]:.1f}" for column in columns]
        lines.append(f"{name:{widest}}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def format_classes(metrics):
    """AP of each class as such a table; for metrics from `evaluate(..., per_class=True)`."""
    rows = collections.defaultdict(dict)
    for kind, values in metrics.items():
        for name, value in values["per_class"].items():
            rows[name][kind] = value
    return format_table(rows)


# ---- Pictures ------------------------------------------------------------------------------------

COLORS = "#ff595e #ffca3a #8ac926 #1fa2ff #c77dff #ff924c #2ec4b6 #f15bb5 #b5e48c #00f5d4".split()
SKELETON = [  # pairs of data.KEYPOINT_NAMES that a line joins
    (0, 1), (0, 2), (1, 3), (2, 4), (5, 6), (5, 7), (7, 9), (6, 8), (8, 10), (5, 11), (6, 12),
    (11, 12), (11, 13), (13, 15), (12, 14), (14, 16),
]  # fmt: skip
PICTURE_SIDES = 480, 1600  # longer side, at least and at most: names that fit, no gigabytes


def draw(image, detections, classes=None, score=0.5):
    """A picture of an image with its detections: masks, boxes, names with scores, keypoints.

    image: [3, H, W] uint8, or float in [0, 1]; detections: as from `predict`, or masks as the model
    gives them; classes: names of labels 1..K; score: detections below are left out. Returns uint8
    [3, H', W'], enlarged or shrunk so that the longer side is within PICTURE_SIDES.
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
    if len(boxes) == 0:
        return picture
    if "masks" in shown:
        if shown["masks"].is_floating_point():
            masks = paste_masks(shown["masks"], boxes, height, width)
        else:
            masks = F.interpolate(shown["masks"][None].byte(), (height, width))[0].bool()
        picture = drawing.draw_segmentation_masks(picture, masks, 0.4, colors)
    for points, color in zip(shown.get("keypoints", []), colors):
        points = points[None, :, :2] * torch.tensor([width / size[1], height / size[0]])
        picture = drawing.draw_keypoints(picture, points, SKELETON, color, radius=3, width=2)
    picture = drawing.draw_bounding_boxes(picture, boxes, colors=colors, width=2)

    canvas = Image.fromarray(picture.permute(1, 2, 0).numpy())
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(max(12, max(height, width) // 50))
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
    """Name of a label 1..K; classes may be None, where a file of weights does not know them."""
    return classes[label - 1] if classes else f"class {label}"


def save_picture(model, image, path, score=0.5, tta=False):
    """Detect objects in an image [3, H, W], write the picture of `draw`, return the detections.

    Their masks stay probabilities in the box: pasted into a huge image, they would take gigabytes.
    """
    with evaluation_mode(model):
        detections = detect(model, image, tuple(image.shape[1:]), tta=tta)
    picture = draw(image, detections, model.data_settings.get("classes"), score)
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)
    return detections


def save_pictures(model, dataset, out, count=8, score=0.5):
    """Pictures of the first images of a data set, named after their files; returns their paths.

    Pictures are an extra: where one fails, a line on stderr says so, and the next one follows.
    """
    images = copy.copy(dataset)
    images.masks = images.keypoints = False
    paths = []
    taken = set()
    for i in range(min(count, len(dataset))):
        try:
            Path(out).mkdir(parents=True, exist_ok=True)
            path = picture_path(out, dataset.record(i)["file_name"], taken)
            save_picture(model, images[i][0], path, score)
            paths.append(path)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"No picture of image {dataset.image_ids[i]}: {reason}", file=sys.stderr)
    return paths


def picture_path(out, image_path, taken):
    """OUT/NAME_detections.png for an image NAME.jpg; not one of the set `taken`."""
    picture = Path(out, f"{Path(image_path).stem}_detections.png")
    while picture.resolve() in taken:
        picture = picture.with_name(f"{picture.stem}_.png")
    taken.add(picture.resolve())
    return picture


# ---- Command line --------------------------------------------------------------------------------


def main(arguments=None):
    """The command line; returns the exit code: 0, 1 for bad files, 2 for bad use."""
    return run_command("evaluate.py", run, arguments)


def run(arguments):
    """Do what the command line says."""
    args = parse_arguments(arguments)
    if args.export:
        export(args.weights, args.export)
        return
    rank, _, device = start_processes(args.device)
    model = load_model(args.weights).to(device)
    if args.data:
        evaluate_data(args, model, rank)
    elif rank == 0:
        detect_in_images(args, model)


def parse_arguments(arguments):
    """The command line as `make_parser` has it, with numbers in their ranges."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if not 0 <= args.score <= 1:
        parser.error("--score must be between 0 and 1")
    if args.workers < 0:
        parser.error("--workers must not be negative")
    return args


def make_parser():
    """The command line of this file."""
    parser = argparse.ArgumentParser(
        description="Test Mask R-CNN; under torchrun, --data is shared."
    )
    one_of = parser.add_mutually_exclusive_group(required=True).add_argument
    one_of("--data", metavar="DIR", type=path, help="a data set: COCO's layout or VOC's devkit")
    one_of("--images", metavar="PATH", type=path, nargs="+", help="images, or folders of images")
    one_of("--export", metavar="FILE", type=path, help="a new file, without the optimizer's state")
    add = parser.add_argument
    add("--weights", metavar="FILE", type=path, required=True, help="a checkpoint of train.py")
    add("--out", metavar="DIR", type=path, help="folder for the results or pictures")
    add("--split", default="val2017", help="--data: which part of it (val2017)")
    add("--tta", action="store_true", help="test-time augmentation: 18 views, about 40x the time")
    add("--amp", action="store_true", help="bfloat16: faster on GPUs, slightly other numbers")
    add("--per-class", action="store_true", help="--data: AP of each class, too")
    add("--score", type=float, default=0.5, help="--images: show detections from here on (0.5)")
    add("--workers", type=int, default=2, help="--data: image-decoding processes per GPU (2)")
    add("--device", help="cpu, cuda, cuda:1, ... (cuda where there is one, else cpu)")
    return parser


def path(text):
    """For argparse: text that is not empty, as an unset variable of a shell would be."""
    if not text:
        raise argparse.ArgumentTypeError("a path must not be empty")
    return text


def evaluate_data(args, model, rank):
    """`--data`: evaluate on a data set and print the tables on rank 0."""
    keypoints = bool(model.config.keypoints)
    dataset = data.open_split(args.data, args.split, masks=model.config.masks, keypoints=keypoints)
    with lock_folder(args.out) if args.out and rank == 0 else contextlib.nullcontext():
        metrics = evaluate(
            model, dataset, args.out, args.tta, args.workers, args.per_class, args.amp
        )
    if rank == 0:
        if args.per_class:
            print(format_classes(metrics) + "\n")
        print(format_table(metrics))
        if args.out:
            print(f"results: {args.out}/results_*.json")


def detect_in_images(args, model):
    """`--images`: a table of detections for each image and its picture in the folder --out."""
    out = Path(args.out or ".")
    out.mkdir(parents=True, exist_ok=True)
    images = find_images(args.images)
    taken = {image.resolve() for image in images}  # a picture must not replace an image
    unreadable = 0
    for image_path in images:
        try:
            image = data.read_image(image_path)
        except UserError as error:
            print(f"evaluate.py: {error}", file=sys.stderr)
            unreadable += 1
            continue
        picture = picture_path(out, image_path, taken)
        with torch.autocast(device_of(model).type, torch.bfloat16, enabled=args.amp):
            detections = save_picture(model, image, picture, args.score, args.tta)
        print(f"{image_path} -> {picture}")
        print(format_detections(detections, model.data_settings.get("classes"), args.score))
    if unreadable:
        raise UserError(f"{unreadable} of {len(images)} images could not be read, see above.")


def find_images(paths):
    """The image files among paths; for a folder, those in it by name, without earlier pictures."""
    formats = Image.registered_extensions().items()
    suffixes = {suffix for suffix, name in formats if name in data.IMAGE_FORMATS}
    found = []
    for given in map(Path, paths):
        if not given.is_dir():
            found.append(given)
            continue
        inside = sorted(p for p in given.iterdir() if p.suffix.lower() in suffixes)
        inside = [p for p in inside if not p.stem.rstrip("_").endswith("_detections")]
        if not inside:
            raise UserError(f"There is no image in the folder {given}.")
        found += inside
    return found


def format_detections(detections, classes, score):
    """Detections with at least this score as a table of text, the best first."""
    lines = [f"  {'class':20}{'score':>6}      x1      y1      x2      y2"]
    for label, value, box in zip(*(detections[k].tolist() for k in ("labels", "scores", "boxes"))):
        if value >= score:
            corners = "".join(f"{corner:8.1f}" for corner in box)
            lines.append(f"  {class_name(label, classes):20}{value:6.2f}{corners}")
    return "\n".join(lines) if lines[1:] else f"  nothing with a score of at least {score}"


def export(weights, output):
    """Copy a checkpoint of train.py without the optimizer's state: half the size, for sharing."""
    if os.path.lexists(output):  # perhaps another checkpoint, which would lose its momentum
        raise UserError(f"{output} exists already; give --export a new name.", code=2)
    checkpoint = read_checkpoint(weights)
    checkpoint.pop("momentum", None)
    with write_whole(output) as file:
        torch.save(checkpoint, file)
    print(output)


# ---- Plumbing, shared with train.py and the tools: processes, lock, errors, memory ----


def start_processes(device_name=None):
    """(rank, world_size, device) of this process; joins those that torchrun started with it.

    device_name: "cpu", "cuda", "cuda:1", ...; None: cuda where there is one. Raises UserError.
    """
    rank, local_rank, world_size = read_ranks()
    device_name = device_name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device_name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):  # Apple's mps lacks NMS and RoIAlign in float64
        raise UserError(f"The device {device_name} is not supported; use cuda or cpu.", code=2)
    if device.type == "cuda":
        index = local_rank if world_size > 1 else device.index or 0
        if index >= torch.cuda.device_count():
            raise UserError(f"There is no CUDA device {index} here; use --device cpu.", code=2)
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        # Others wait while rank 0 computes the metrics: for a large data set, long.
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    return rank, world_size, device


def read_ranks():
    """(rank, local rank, world size) as torchrun sets them in the environment; alone: (0, 0, 1).

    With a variable that something else left there, this process would wait for others, or be one
    that writes nothing: UserError.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    said = {name: os.environ[name] for name in names if name in os.environ}
    if not said:
        return 0, 0, 1
    numbers = [int(value) for value in said.values() if value.isdecimal()]
    if len(numbers) == 3:
        rank, local_rank, world_size = numbers
        if local_rank <= rank < world_size and (world_size == 1 or "MASTER_ADDR" in os.environ):
            return rank, local_rank, world_size
    said = ", ".join(f"{name}={value}" for name, value in said.items())
    raise UserError(
        f"The environment variables {said} do not fit together (RANK, LOCAL_RANK, WORLD_SIZE and "
        "MASTER_ADDR do, as torchrun sets them); unset them, or start with torchrun.",
        code=2,
    )


@contextlib.contextmanager
def lock_folder(out):
    """Make the folder `out` and keep other runs and evaluations out of it, as long as the `with`.

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
            raise UserError(
                f"Another run or evaluation is writing into {out}; wait for its end, or give "
                "another --out.",
                code=2,
            ) from None
        except (ImportError, OSError):
            pass  # Windows, or a file system without locks
        yield


def run_command(name, function, arguments=None):
    """Run function(arguments) as the command `name`; returns its exit code (None: 0).

    What the user can mend becomes one line on stderr; any other exception is our mistake.
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
        message, code = error, getattr(error, "code", 1)
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except BrokenPipeError:  # the reader of our output, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, a folder that may not be written to
        file = error.filename or "a file"
        message, code = f"{file} cannot be read or written ({error.strerror or error})", 1
    print(f"{name}: {' '.join(str(message).split())}", file=sys.stderr)
    return code


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


if __name__ == "__main__":
    sys.exit(main())
