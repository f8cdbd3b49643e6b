"""Prediction, metrics and pictures: how Mask R-CNN is tested (Sec. 4 and 5 of the paper).

    python evaluate.py --weights FILE --data DIR                COCO's or VOC's metrics
    python evaluate.py --weights FILE --images a.jpg FOLDER     detections as text and as pictures
    python evaluate.py --weights FILE --export SMALL            the weights alone, for sharing

In reading order: prediction on an image (`predict`), test-time augmentation, metrics over all
processes (`evaluate`), pictures (`draw`), the command line. The plumbing at the end (processes,
lock, errors) is train.py's, too.
"""

import signal

if __name__ == "__main__":
    # The imports below take seconds: until `run_command`, Ctrl-C ends the process silently.
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
from PIL import Image, ImageColor, ImageDraw, ImageFont
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader, Dataset
from torchvision import ops
from tqdm import tqdm

import data
from data import UserError
from model import WeightsError, load_model, read_checkpoint, write_whole

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ------------------------------------------------------------------------------------------------
# Prediction on an image
# ------------------------------------------------------------------------------------------------


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
        detections = detect(model, image, size, *input_sizes(model, min_size, max_size), tta)
    if "masks" in detections:
        detections["masks"] = paste_masks(detections["masks"], detections["boxes"], *size)
    return detections


def to_tensor(image):
    """A path, an array [H, W, 3] or a tensor [3, H, W] as a tensor [3, H, W]."""
    if isinstance(image, (str, os.PathLike)):
        return data.read_image(image)
    if not isinstance(image, torch.Tensor):
        # A copy in C's order: torch refuses the negative strides of an array [..., ::-1].
        array = np.array(image, order="C")
        image = torch.from_numpy(np.atleast_3d(array)).permute(2, 0, 1)
    image = image.float() if image.is_floating_point() else image
    if image.ndim != 3 or image.shape[0] != 3 or image.dtype not in (torch.uint8, torch.float32):
        raise ValueError(
            "an image must be an array [H, W, 3] or a tensor [3, H, W], uint8 or float, not "
            f"{image.dtype} of shape {list(image.shape)} (channels first)"
        )
    return image


def input_sizes(model, min_size=None, max_size=None):
    """Shorter and longest side of the network's input: as given, or as the model was trained."""
    min_size = min_size or model.data_settings.get("min_size") or 800
    max_size = max_size or model.data_settings.get("max_size") or 1333
    return min_size, max_size


@contextlib.contextmanager
def evaluation_mode(model, amp=False):
    """Evaluation mode without gradients inside the `with`; then the mode that was before.

    amp: convolutions and matrix products in bfloat16.
    """
    training = model.training
    model.eval()
    device = model_device(model).type
    try:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=amp):
            yield
    finally:
        model.train(training)


def model_device(model):
    """The device on which the weights of a model are."""
    return next(model.parameters()).device


def detect(model, image, size, min_size, max_size, tta=False):
    """Detections in an image of `size` (H, W), as from `to_image`; the model is in eval mode.

    image: [3, H, W], or (without tta) resized to the network's input already.
    """
    if tta:
        detections = detect_augmented(model, image, tta_views(size, min_size, max_size))
    resized = data.resize_shape(*size, min_size, max_size)
    if not tta:
        resized_image = data.resize_image(image, *resized)
        (detections,) = model([resized_image.to(model_device(model))])
    return to_image(detections, resized, size)


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


def interpolate(cells, low, high, length):
    """Bilinear interpolation along one axis of an image of `length` pixels.

    cells: [M, C] float32; the M cells fill [low, high] of the axis. Pixel i has its centre at
    i + 0.5. Zeros around the cells let the mask fade out half a cell outside of the box.
    Returns the first pixel that is touched and the values [n, C] of n pixels from there on.
    """
    count = len(cells)
    fade = (high - low) / (2 * count)
    first = max(0, math.ceil(low - fade - 0.5))
    last = min(length, math.ceil(high + fade - 0.5))
    place = (np.arange(first, last) + 0.5 - low) * (count / (high - low)) + 0.5  # among the cells
    before = np.clip(place.astype(np.int64), 0, count)
    weight = (place - before).astype(np.float32)[:, None]
    padded = np.zeros((count + 2, cells.shape[1]), np.float32)
    padded[1:-1] = cells
    return first, padded[before] + weight * (padded[1:] - padded[:-1])[before]


def paste_window(mask, box, height, width, threshold=0.5):
    """Paste one mask (numpy [M, M] float32) into its `box` (x1, y1, x2, y2) of the image.

    Only the pixels of the box are computed, one axis after the other. The places are Detectron2's
    (`paste_masks_in_image`): continuous boxes, pixel centres at half pixels, zeros around the mask.

    Returns (x, y, inside): the window's first column and row, and bool [columns, rows]: columns
    first, since that is the order of COCO's run-length code.
    """
    left, top, right, bottom = box
    if right <= left or bottom <= top:
        return 0, 0, np.zeros((0, 0), bool)
    y, rows = interpolate(mask, top, bottom, height)
    x, columns = interpolate(rows.T, left, right, width)
    return x, y, columns >= threshold


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


# ------------------------------------------------------------------------------------------------
# Test-time augmentation (Sec. 5.1 and Fig. 5, as in Detectron): every scale, each also mirrored
# ------------------------------------------------------------------------------------------------

TTA_SCALES = (400, 500, 600, 700, 900, 1000, 1100, 1200)  # shorter sides, for a model of 800
TTA_MAX_SIZE = 2000  # longer side at most, for a model of 800
TTA_VOTE_IOU = 0.9


def check_tta(model):
    """Raise UserError for a model with keypoints: the paper augments boxes and masks only."""
    if model.config.keypoints:
        raise UserError(
            "Test-time augmentation is for boxes and masks, and this model has keypoints; evaluate "
            "it without --tta.",
            code=2,
        )


def tta_views(size, min_size, max_size):
    """The 18 views of an image of `size` (H, W): pairs of an input's size (h, w) and "mirrored".

    The model's own size comes first, unmirrored. Scales are relative to it: a model for 160 pixels
    has the scales 80 ... 240.
    """
    limits = [(min_size, max_size)]
    for scale in TTA_SCALES:
        limits.append((round(scale / 800 * min_size), round(TTA_MAX_SIZE / 800 * min_size)))
    shapes = [data.resize_shape(*size, *limit) for limit in limits]
    return [(shape, flip) for shape in shapes for flip in (False, True)]


def detect_augmented(model, image, views):
    """Detections of one image [3, H, W] from many views, as one model call gives them for views[0].

    1) Scores and boxes of all views are united *before* score threshold and NMS, so that the views
       compete like the proposals of one image.
    2) Threshold and NMS as usual, then box voting.
    3) Masks are read for the final boxes in every view, and averaged as probabilities; they become
       bits where they are pasted. Features are computed anew for that: 18 of them fill a GPU.
    """
    check_tta(model)
    own, _ = views[0]
    scores = []
    boxes = []
    for view in views:
        features, sizes = view_features(model, image, view)
        proposals, valid = model.proposals(features, sizes)
        view_scores, view_boxes = model.box_predictions(features, proposals, valid, sizes)[0]
        scores.append(view_scores)  # [P, K + 1]
        boxes.append(from_view(view_boxes, view, own))  # [P, K or 1, 4]
        del features  # before those of the next view are computed
    scores = torch.cat(scores)
    boxes = torch.cat(boxes)

    detections = model.postprocess(scores, boxes)
    detections["boxes"] = vote_boxes(detections, scores, boxes, model.config.box_score_thresh)
    if not model.config.masks:
        return detections

    masks = 0
    for view in views:
        features, _ = view_features(model, image, view)
        view_boxes = to_view(detections["boxes"], own, view)
        view_masks = model.mask_probabilities(features, [view_boxes], [detections["labels"]])[0]
        masks = masks + (view_masks.flip(-1) if view[1] else view_masks)
        del features
    detections["masks"] = masks / len(views)
    return detections


def view_features(model, image, view):
    """Features of one view of an image [3, H, W], and the sizes of that batch of one image."""
    shape, flip = view
    resized = data.resize_image(image, *shape)
    if flip:
        resized = resized.flip(-1)
    batch, sizes = model.batch([resized.to(model_device(model))])
    return model.features(batch), sizes


def to_view(boxes, own, view):
    """Boxes [N, 4] in an input of size `own` (h, w) as boxes in a view of the same image."""
    shape, flip = view
    return data.resize_boxes(boxes, own, shape, flip)


def from_view(boxes, view, own):
    """The inverse of `to_view`, for boxes [P, K, 4]."""
    shape, flip = view
    return data.resize_boxes(boxes.flatten(0, 1), shape, own, flip).view_as(boxes)


def vote_boxes(detections, scores, boxes, score_threshold, iou=TTA_VOTE_IOU):
    """Box voting: each kept box becomes the mean of the boxes that agree with it.

        b  ->  sum_i s_i b_i / sum_i s_i    over the i of b's class with s_i > score_threshold
                                            (only those went into NMS) and IoU(b, b_i) >= iou

    detections: `boxes` [N, 4] and `labels` [N], what NMS kept of the united boxes; scores:
    [P, K + 1] and boxes: [P, K or 1, 4], all of them. Returns [N, 4]; scores do not change.
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


# ------------------------------------------------------------------------------------------------
# Metrics: the results of all images in COCO's format, then average precision (AP)
#
# A detection is right at the IoU threshold t if it overlaps an object of its class, which no
# detection with a higher score has taken, with IoU >= t. Go through the detections of a class in
# all images by falling score; after each,
#
#     precision = right ones so far / detections so far,    recall = right ones so far / objects
#
# AP at t is the area under precision over recall, where precision is the best at this or any higher
# recall. AP50 and AP75: t = 0.5 and 0.75, mean over classes; COCO's AP: mean over t = 0.5, 0.55,
# ..., 0.95 as well; APs, APm, APl: of objects below 32^2, below 96^2 and of more pixels. For "bbox"
# the IoU is that of boxes, for "segm" that of masks; "keypoints" have a similarity in its place.
# ------------------------------------------------------------------------------------------------

COCO_METRICS = {
    "bbox": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "segm": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "keypoints": ("AP", "AP50", "AP75", "APm", "APl"),  # small people have no keypoints in COCO
}
RESULT_FIELDS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}


def evaluate(
    model,
    dataset,
    out=None,
    tta=False,
    workers=2,
    per_class=False,
    amp=False,
    progress=True,
):
    """Metrics of a model on a data set, in percent.

    Where torch.distributed is initialized, every process calls this, takes its share of the images
    and returns the same. model: a MaskRCNN (not wrapped in DDP), in whatever mode; dataset: a
    CocoDataset or VocDataset made for evaluation; tta: test-time augmentation; workers: processes
    that decode images, and as many that paste masks; amp: bfloat16; progress: a bar on rank 0.

    out: a folder for `results_bbox.json`, `results_segm.json`, `results_keypoints.json` in COCO's
    submission format. The metrics are pycocotools' on these files, which appear when complete.

    Returns {"bbox": {"AP", "AP50", "AP75", "APs", "APm", "APl"}, "segm": the same for a model with
    masks, "keypoints": {"AP", "AP50", "AP75", "APm", "APl"} for one with keypoints}, or for VOC
    {"voc": {"mAP50"}}; None where there is no object to find. per_class adds {"per_class": {class:
    AP}} to each. Raises UserError where data set and model have different classes.
    """
    distributed = dist.is_initialized()
    rank = dist.get_rank() if distributed else 0
    world_size = dist.get_world_size() if distributed else 1
    check_fits(model, dataset, tta)
    if rank == 0:
        truth = dataset.coco_gt()  # first: a fault in it should not show up after hours
        if out is not None:
            clear_folder(Path(out))

    positions = range(rank, len(dataset), world_size)
    with evaluation_mode(model, amp):
        results = detect_all(model, dataset, positions, tta, workers, progress and rank == 0)
    if distributed:  # not through files: machines need not share a file system
        shares = [None] * world_size if rank == 0 else None
        dist.gather_object(results, shares)
        if rank == 0:
            results = {image_id: found for share in shares for image_id, found in share.items()}
    metrics = None
    if rank == 0:
        metrics = score(model, dataset, truth, results, out, per_class, workers)
    if distributed:
        message = [metrics]
        dist.broadcast_object_list(message)
        (metrics,) = message
    return metrics


def check_fits(model, dataset, tta):
    """Raise UserError if the model cannot be evaluated on the data set."""
    if tta:
        check_tta(model)
    known = model.config.num_classes
    if known != len(dataset.classes):
        raise UserError(
            f"The weights are for {known} classes, but {dataset.annotation_file} has "
            f"{len(dataset.classes)}."
        )
    for k, (trained, name) in enumerate(
        zip(model.data_settings.get("classes") or [], dataset.classes)
    ):
        if trained != name:
            raise UserError(
                f"Class {k + 1} is {trained!r} in the weights, but {name!r} in "
                f"{dataset.annotation_file}; evaluate on data with the same classes."
            )


def clear_folder(out):
    """Make the folder of results, without those of an earlier run, which must not pass for new."""
    out.mkdir(parents=True, exist_ok=True)
    for kind in COCO_METRICS:
        results_file(out, kind).unlink(missing_ok=True)


def results_file(out, kind):
    """The file of results of a kind: "bbox", "segm" or "keypoints"."""
    return Path(out) / f"results_{kind}.json"


def detect_all(model, dataset, positions, tta, workers, progress):
    """Detect the objects of the images at `positions` of a data set.

    Returns {image id: list of `coco_results`}. Three things happen at once: processes decode the
    next images, the model looks at one, and processes paste and encode the masks of the last.
    """
    sizes = input_sizes(model)
    # One image at a time: in a batch, images are padded to the largest, and through GroupNorm the
    # padding would make a result depend on its neighbours.
    images = data.read_ahead(EvaluationImages(dataset, None if tta else sizes), workers, positions)

    def detections():
        for position, (image, size) in zip(positions, images):
            found = detect(model, image, size, *sizes, tta)
            # As numpy: tensors would travel through shared memory, of which there may be little.
            arrays = {name: value.numpy() for name, value in found.items()}
            yield dataset.image_ids[position], arrays, size, dataset.category_ids

    results = {}
    bar = tqdm(
        total=len(positions), unit="image", desc="evaluate", disable=not progress, leave=False
    )
    with bar:
        for image_id, found in in_workers(results_of_image, detections(), workers):
            results[image_id] = found
            bar.update()
    return results


class EvaluationImages(Dataset):
    """images[i] -> (image uint8 [3, h, w], size (H, W)) of an image of a data set.

    The image is resized for the network if `sizes` (shorter, longer side) is given; `size` is its
    own. A copy of the data set reads no objects: those to find are pycocotools' business.
    """

    def __init__(self, dataset, sizes=None):
        self.dataset = copy.copy(dataset)
        self.dataset.masks = self.dataset.keypoints = False
        self.sizes = sizes

    def __getitem__(self, index):
        image, _ = self.dataset[index]
        size = tuple(image.shape[1:])
        if self.sizes is not None:
            image = data.resize_image(image, *data.resize_shape(*size, *self.sizes))
        return image, size


class Given(Dataset):
    """given[item] is the item itself."""

    def __getitem__(self, item):
        return item


def in_workers(function, items, workers):
    """An iterator over function(item) of the items, in their order, by `workers` processes.

    A DataLoader that is handed the items in place of indices. Items are taken a few ahead, in this
    process: they may come from a generator.
    """
    return iter(
        DataLoader(
            Given(),
            batch_size=None,
            sampler=items,
            collate_fn=function,
            num_workers=workers,
            worker_init_fn=data.worker_init if workers else None,
        )
    )


def results_of_image(item):
    """For `in_workers`: the image's id and its `coco_results`."""
    return item[0], coco_results(*item)


def coco_results(image_id, detections, size, category_ids):
    """Detections of one image in COCO's submission format, one dict for each.

    detections: as from `to_image`, tensors or arrays; size: (H, W) of the image; category_ids:
    those of labels 1..K. Each dict has `image_id`, `category_id`, `score`, `bbox` [x, y, width,
    height], and `segmentation` (compressed RLE) and `keypoints` [51] where the model has them.
    Numbers are rounded here, once: the metrics are computed from the very values that are written.
    """
    results = []
    boxes = detections["boxes"].tolist()
    scores = detections["scores"].tolist()
    labels = detections["labels"].tolist()
    for (x1, y1, x2, y2), confidence, label in zip(boxes, scores, labels):
        results.append(
            {
                "image_id": image_id,
                "category_id": category_ids[label - 1],
                "score": round(confidence, 6),
                "bbox": [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)],
            }
        )
    if "masks" in detections:
        for result, mask, box in zip(results, np.asarray(detections["masks"]), boxes):
            result["segmentation"] = window_rle(*paste_window(mask, box, *size), *size)
    if "keypoints" in detections:
        # COCO's keypoints are indices of pixels, ours are places: pixel 0 has its centre at 0.5.
        keypoints = np.asarray(detections["keypoints"]) - np.float32([0.5, 0.5, 0])
        for result, points in zip(results, keypoints.reshape(len(results), -1).tolist()):
            result["keypoints"] = [round(value, 3) for value in points]
    return results


def window_rle(x, y, inside, height, width):
    """COCO's compressed run-length code of an image in which only a window may be True.

    x, y, inside: as from `paste_window`. Returns {"size": [height, width], "counts": str}, equal to
    pycocotools' encoding of the whole image.
    """
    # Of the whole image, column after column, only the columns of the window.
    columns = np.zeros((inside.shape[0], height), bool)
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

    truth: the data set's `coco_gt()`; results: {image id: `coco_results`} of all its images.
    """
    if any(image_id not in results for image_id in dataset.image_ids):
        raise UserError("The processes see different data sets; give all of them the same --data.")
    # In the data set's order: the files do not depend on the number of processes.
    results = [result for image_id in dataset.image_ids for result in results[image_id]]
    used = {"bbox": True, "segm": model.config.masks, "keypoints": model.config.keypoints}
    by_kind = {}
    for kind in [kind for kind in used if used[kind]]:
        dropped = set(RESULT_FIELDS.values()) - {RESULT_FIELDS[kind]}
        by_kind[kind] = [{k: v for k, v in one.items() if k not in dropped} for one in results]
        if out is not None:
            with write_whole(results_file(out, kind)) as file:
                file.write(json.dumps(by_kind[kind]).encode())
    if dataset.metric == "voc":
        return {"voc": voc_metrics(truth, results, dataset, per_class)}
    # Starting a process pays from some thousand results on.
    workers = min(len(results) // 5000, os.cpu_count() or 1) if workers else 0
    return {
        kind: coco_metrics(truth, results, kind, dataset, per_class, workers)
        for kind, results in by_kind.items()
    }


def coco_metrics(truth, results, kind, dataset, per_class=False, workers=0):
    """COCO's average precisions, computed by pycocotools.

    truth: a pycocotools COCO object; results: list of dicts in COCO's submission format; kind:
    "bbox", "segm" or "keypoints"; dataset: its `image_ids` and `category_ids` are evaluated;
    workers: processes that share the categories.
    Returns a dict of percentages by name; None where no object is of that size, so that it can be
    written as JSON. With per_class also {"per_class": {name of the class: AP}}.
    """
    found = by_category(results, dataset)
    scores = in_workers(
        functools.partial(category_scores, truth, kind, list(dataset.image_ids)),
        found.items(),
        workers,
    )
    # precision: [IoU thresholds, recalls, classes, areas (the first: all), most detections]
    precision, recall = (np.concatenate(part, axis=-3) for part in zip(*scores))
    summary = COCOeval(iouType=kind)
    summary.eval = {"precision": precision, "recall": recall}
    with contextlib.redirect_stdout(io.StringIO()):
        summary.summarize()
    metrics = {name: percent(value) for name, value in zip(COCO_METRICS[kind], summary.stats)}
    if per_class:
        values = [percent(precision[:, :, k, 0, -1]) for k in range(len(found))]
        metrics["per_class"] = dict(zip(class_keys(dataset), values))
    return metrics


def by_category(results, dataset):
    """{category id: its results}, for each category of the data set, in their order."""
    found = {category_id: [] for category_id in dataset.category_ids}
    for result in results:
        found[result["category_id"]].append(result)
    return found


def category_scores(truth, kind, image_ids, item):
    """COCOeval's precision [T, R, 1, A, M] and recall [T, 1, A, M] of one category.

    item: (category id, its results). Categories do not influence each other in COCOeval.
    """
    category_id, results = item
    with contextlib.redirect_stdout(io.StringIO()):
        if results:
            # Copies, since loadRes writes into the dicts it is given.
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
    return scorer.eval["precision"], scorer.eval["recall"]


def percent(values):
    """Mean of the values that are defined (pycocotools writes -1 for none) in percent, or None."""
    values = np.asarray(values)
    values = values[values > -1]
    return 100 * float(values.mean()) if values.size else None


def class_keys(dataset):
    """The names of the classes, with the id where two classes have one name."""
    count = collections.Counter(dataset.classes)
    return [
        name if count[name] == 1 else f"{name} (id {category_id})"
        for name, category_id in zip(dataset.classes, dataset.category_ids)
    ]


def voc_metrics(truth, results, dataset, per_class=False):
    """{"mAP50": mean over the classes of `voc_average_precision`, in percent}."""
    found = by_category(results, dataset)
    objects = by_category(truth.dataset["annotations"], dataset)
    precisions = [voc_average_precision(found[k], objects[k]) for k in dataset.category_ids]
    metrics = {"mAP50": percent([-1 if value is None else value for value in precisions])}
    if per_class:
        values = [None if value is None else 100 * value for value in precisions]
        metrics["per_class"] = dict(zip(class_keys(dataset), values))
    return metrics


def voc_average_precision(found, objects, min_iou=0.5):
    """PASCAL VOC's average precision of one class by the rule of 2010 and later, in [0, 1].

    found: results of this class in COCO's format; objects: annotations of this class in COCO's
    format, each with `difficult`. Boxes are in continuous pixels.

    The rule (VOC development kit, 2010): by falling score, each detection looks at the object of
    its image that it overlaps most. IoU below 0.5: false positive. A difficult object: counts for
    nothing. An object found before: false positive. Otherwise: true positive. AP is the whole area
    under precision over recall, unlike COCO's mean over 101 recalls. None if no object counts.
    """
    total = sum(not o["difficult"] for o in objects)
    if total == 0:
        return None
    in_image = collections.defaultdict(list)
    for o in objects:
        in_image[o["image_id"]].append(o)
    taken = set()
    hits = []
    for result in sorted(found, key=lambda result: -result["score"]):
        candidates = in_image[result["image_id"]]
        overlaps = ops.box_iou(xyxy([result]), xyxy(candidates))[0].tolist()
        overlap, best = max(zip(overlaps, candidates), key=lambda pair: pair[0], default=(0, None))
        if not overlap >= min_iou:
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
    rows = {}
    for kind, values in metrics.items():
        rows[kind] = {name: value for name, value in values.items() if name != "per_class"}
    return table(rows)


def format_classes(metrics):
    """AP of each class as a table of text; for metrics from `evaluate(..., per_class=True)`."""
    rows = collections.defaultdict(dict)
    for kind, values in metrics.items():
        for name, value in values["per_class"].items():
            rows[name][kind] = value
    return table(rows)


def table(rows):
    """{row: {column: number or None}} as text with one decimal."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    widest = max(len(name) for name in [*rows, " " * 8]) + 1
    lines = [" " * widest + "".join(f"{column:>10}" for column in columns)]
    for name, row in rows.items():
        cells = ["-" if row.get(column) is None else f"{row[column]:.1f}" for column in columns]
        lines.append(f"{name:{widest}}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------

COLORS = "#ff595e #ffca3a #8ac926 #1fa2ff #c77dff #ff924c #2ec4b6 #f15bb5 #b5e48c #00f5d4".split()
SKELETON = [  # pairs of data.KEYPOINT_NAMES that a line joins
    (0, 1), (0, 2), (1, 3), (2, 4), (5, 6), (5, 7), (7, 9), (6, 8), (8, 10), (5, 11), (6, 12),
    (11, 12), (11, 13), (13, 15), (12, 14), (14, 16),
]  # fmt: skip
# The longer side of a picture in pixels, at least and at most: names can be read, and a picture of
# a huge image takes no gigabytes.
PICTURE_SIDES = 480, 1600


def draw(image, detections, classes=None, score=0.5):
    """A picture of an image with its detections: masks, boxes, names with scores, keypoints.

    image: [3, H, W] uint8, or float in [0, 1]; detections: as from `predict` or from the model;
    classes: names of labels 1..K; score: detections below are left out. Returns uint8 [3, H', W'],
    enlarged or shrunk so that the longer side is within PICTURE_SIDES.
    """
    if image.is_floating_point():
        image = (image * 255).round().to(torch.uint8)
    size = tuple(image.shape[1:])
    new_size = picture_size(size)
    picture = data.resize_image(image.cpu(), *new_size).permute(1, 2, 0).numpy().copy()
    shown = {name: value[detections["scores"] >= score] for name, value in detections.items()}
    shown = {name: value.cpu() for name, value in shown.items()}
    boxes = data.resize_boxes(shown["boxes"], size, new_size, flip=False)
    colors = [ImageColor.getrgb(COLORS[i % len(COLORS)]) for i in range(len(boxes))]
    if "masks" in shown:
        for mask, box, color in zip(shown["masks"], boxes, colors):
            inside = resize_mask(mask, box, new_size)
            picture[inside] = 0.6 * picture[inside] + 0.4 * np.array(color)

    canvas = Image.fromarray(picture)
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(max(12, max(new_size) // 50))
    scale = torch.tensor([new_size[1] / size[1], new_size[0] / size[0]])
    for i in reversed(range(len(boxes))):  # the best last: nothing covers its name
        box = boxes[i].tolist()
        pen.rectangle(box, outline=colors[i], width=2)
        if "keypoints" in shown:
            draw_keypoints(pen, shown["keypoints"][i, :, :2] * scale, colors[i])
        name = class_name(int(shown["labels"][i]), classes)
        draw_name(pen, f"{name} {100 * shown['scores'][i]:.0f}%", box, colors[i], font, new_size)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def picture_size(size):
    """The size (h, w) of the picture of an image of `size` (H, W)."""
    longer = max(size)
    scale = min(max(longer, PICTURE_SIDES[0]), PICTURE_SIDES[1]) / longer
    return tuple(max(1, round(side * scale)) for side in size)


def resize_mask(mask, box, size):
    """A mask as bool array of `size` (h, w): of an image, bool [H, W], or of its `box`, float."""
    if mask.is_floating_point():
        return paste_masks(mask[None], box[None], *size)[0].numpy()
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, mask.shape))
    return mask.numpy()[np.ix_(rows, columns)]


def draw_keypoints(pen, points, color):
    """Draw keypoints [17, 2] (x, y) and the lines between them."""
    points = [tuple(point) for point in points.tolist()]
    for start, end in SKELETON:
        pen.line([points[start], points[end]], fill=color, width=2)
    for point in points:
        pen.circle(point, 3, fill=color)


def draw_name(pen, text, box, color, font, size):
    """Write a name above its box, or below where there is no room: small objects stay visible."""
    _, _, width, height = pen.textbbox((0, 0), text, font=font)
    x = max(0, min(box[0], size[1] - width))
    y = box[1] - height - 2
    if y < 0:
        y = min(box[3] + 2, size[0] - height)
    pen.rectangle([x, y, x + width, y + height], fill=color)
    pen.text((x, y), text, fill="black", font=font)


def class_name(label, classes):
    """Name of a label 1..K; classes may be None, where a file of weights does not know them."""
    return classes[label - 1] if classes else f"class {label}"


def save_picture(model, image, path, score=0.5, tta=False):
    """Detect the objects of an image [3, H, W], write the picture, return the detections.

    Their masks stay probabilities in the box: pasted into a huge image, they would take gigabytes.
    """
    with evaluation_mode(model):
        found = detect(model, image, tuple(image.shape[1:]), *input_sizes(model), tta)
    picture = draw(image, found, model.data_settings.get("classes"), score)
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)
    return found


def save_pictures(model, dataset, out, count=8, score=0.5):
    """Pictures of the first images of a data set, named after their files; returns their paths.

    Pictures are an extra: where one fails, a line on stderr says so, and the others follow.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    images = EvaluationImages(dataset)
    taken = set()
    paths = []
    for i in range(min(count, len(dataset))):
        try:
            path = picture_path(out, dataset.record(i)["file_name"], taken)
            image, _ = images[i]
            save_picture(model, image, path, score)
            paths.append(path)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"No picture of image {dataset.image_ids[i]}: {reason}", file=sys.stderr)
    return paths


def picture_path(out, image_path, taken):
    """OUT/NAME_detections.png for an image NAME.jpg; never a path in the set `taken`, which grows."""
    path = Path(out) / f"{Path(image_path).stem}_detections.png"
    while path.resolve() in taken:
        path = path.with_name(f"{path.stem}_.png")
    taken.add(path.resolve())
    return path


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


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
    parser = argparse.ArgumentParser(
        description="Evaluate Mask R-CNN, look at its detections, share its weights. With --data "
        "also under torchrun: all processes share the images."
    )
    job = parser.add_mutually_exclusive_group(required=True)
    job.add_argument(
        "--data",
        metavar="DIR",
        type=path_text,
        help="metrics on a data set in COCO's layout: DIR/annotations/instances_val2017.json "
        "(of a keypoint model: person_keypoints_val2017.json) and DIR/val2017/; or a VOC devkit",
    )
    job.add_argument(
        "--images",
        metavar="PATH",
        type=path_text,
        nargs="+",
        help="detections in images, or folders of images, as text and as pictures",
    )
    job.add_argument(
        "--export",
        metavar="FILE",
        type=path_text,
        help="write the weights without the optimizer's state to a new FILE",
    )
    add = parser.add_argument
    add("--weights", metavar="FILE", type=path_text, required=True, help="a checkpoint")
    add(
        "--out",
        "--output",
        metavar="DIR",
        type=path_text,
        help="--data: folder for the results in COCO's format (default: none are kept); --images: "
        "folder for the pictures (default: this one)",
    )
    add("--split", default="val2017", help="--data: which part of it (val2017)")
    add("--tta", action="store_true", help="test-time augmentation: 18 views, about 40x the time")
    add("--amp", action="store_true", help="bfloat16: faster on a GPU, not quite the same numbers")
    add("--per-class", action="store_true", help="--data: AP of each class, too")
    add("--score", type=float, default=0.5, help="--images: show detections from here on (0.5)")
    add("--workers", type=int, default=2, help="--data: image-decoding processes per GPU (2)")
    add("--device", help="cpu, cuda, cuda:1, ... (cuda where there is one, else cpu)")
    args = parser.parse_args(arguments)
    if not 0 <= args.score <= 1:
        parser.error("--score must be between 0 and 1")
    if args.workers < 0:
        parser.error("--workers must not be negative")
    return args


def path_text(text):
    """For argparse: a path, which must not be empty (an unset variable of a shell script)."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def evaluate_data(args, model, rank):
    """`--data`: evaluate on a data set and print the tables on rank 0."""
    masks = model.config.masks
    dataset = data.open_split(
        args.data, args.split, masks=masks, keypoints=bool(model.config.keypoints)
    )
    lock = lock_folder(args.out) if args.out and rank == 0 else contextlib.nullcontext()
    with lock:
        metrics = evaluate(
            model,
            dataset,
            args.out,
            args.tta,
            args.workers,
            args.per_class,
            args.amp,
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
    paths = find_images(args.images)
    taken = {path.resolve() for path in paths}  # a picture must not replace an image
    unreadable = 0
    for path in paths:
        try:
            image = data.read_image(path)
        except UserError as error:
            print(f"evaluate.py: {error}", file=sys.stderr)
            unreadable += 1
            continue
        picture = picture_path(out, path, taken)
        with torch.autocast(model_device(model).type, torch.bfloat16, enabled=args.amp):
            detections = save_picture(model, image, picture, args.score, args.tta)
        print(f"{path} -> {picture}")
        print(format_detections(detections, model.data_settings.get("classes"), args.score))
    if unreadable:
        raise UserError(f"{unreadable} of {len(paths)} images could not be read, see above.")


def find_images(paths):
    """The image files among paths; for a folder, those in it by name."""
    formats = Image.registered_extensions().items()
    suffixes = {suffix for suffix, name in formats if name in data.IMAGE_FORMATS}
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes)
            # Pictures that an earlier run left there are not images to look at.
            inside = [p for p in inside if not p.stem.rstrip("_").endswith("_detections")]
            if not inside:
                raise UserError(f"There is no image in the folder {path}.")
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


def export(weights, output):
    """Copy a checkpoint of train.py without the optimizer's state: half the size, for sharing."""
    if os.path.lexists(output):  # perhaps a checkpoint, whose momentum would be lost
        raise UserError(f"{output} exists already; give --export a new name.", code=2)
    checkpoint = read_checkpoint(weights)
    checkpoint.pop("momentum", None)
    with write_whole(output) as file:
        torch.save(checkpoint, file)
    print(output)


# ------------------------------------------------------------------------------------------------
# Plumbing, shared with train.py and the tools: processes, lock, errors, memory
# ------------------------------------------------------------------------------------------------


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
    if device.type not in ("cpu", "cuda"):
        # On Apple's mps, NMS and RoIAlign in float64 are missing.
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
        # The others wait while rank 0 computes the metrics: for a large data set, long.
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    return rank, world_size, device


def read_ranks():
    """(rank, local rank, world size) as torchrun says them in the environment; alone: (0, 0, 1).

    A variable that is left over from something else would make this process wait for others, or
    work as one that writes nothing: UserError.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    values = {name: os.environ[name] for name in names if name in os.environ}
    if not values:
        return 0, 0, 1
    numbers = [int(value) for value in values.values() if value.isdecimal()]
    fits = len(numbers) == 3 and numbers[1] <= numbers[0] < numbers[2]
    if not fits or (numbers[2] > 1 and "MASTER_ADDR" not in os.environ):
        said = ", ".join(f"{name}={value}" for name, value in values.items())
        raise UserError(
            f"The environment says {said}, which is not what torchrun sets (all of "
            f"{', '.join(names)}, MASTER_ADDR); unset it, or start the processes with torchrun.",
            code=2,
        )
    return tuple(numbers)


@contextlib.contextmanager
def lock_folder(out):
    """Keep other runs and evaluations out of the folder `out`, which is made, inside the `with`.

    The lock lies on OUT/.lock and belongs to this process: the system frees it when the process
    ends, in whatever way, and loading processes do not inherit it (as they would that of flock).
    Raises UserError where another process has it.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "a") as file:
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"Another run or evaluation is writing into {out}; wait for its end, or give "
                "another --out.",
                code=2,
            ) from None
        except OSError:
            pass  # a file system without locks
        yield


def run_command(name, function, arguments=None):
    """Run function(arguments) as the command `name`; returns the exit code.

    What the user can mend becomes one line on stderr; other exceptions, which are our mistakes,
    pass through. The function may return an exit code other than 0.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as set for the imports, see the top
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.suppress(AttributeError):  # a name in other letters than the terminal's
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = function(arguments) or 0
        sys.stdout.flush()
        if dist.is_initialized():
            dist.destroy_process_group()
        return code
    except UserError as error:
        message, code = error, error.code
    except (WeightsError, ImportError) as error:
        message, code = error, 1
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
