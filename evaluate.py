"""Prediction, metrics and pictures: how Mask R-CNN is tested (Sec. 4 and 5 of the paper).

    python evaluate.py --weights FILE --data DIR                   COCO's or VOC's metrics
    python evaluate.py --weights FILE --images a.jpg DIR --out DIR detections as JSON and pictures

In reading order: prediction on an image (`predict_image`), test-time augmentation, metrics over all
processes (`evaluate`), pictures (`draw`), command line, and plumbing that train.py uses too.
"""

import argparse
import contextlib
import copy
import ctypes
import datetime
import io
import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision import ops
from torchvision import utils as drawing
from tqdm import tqdm

import data
from data import UserError
from model import WeightsError, check_images, has_area, load_model, write_whole

# -- Prediction on an image ------------------------------------------------------------------------


def predict_image(model, image, min_size=None, max_size=None, tta=False):
    """Detect the objects of one image [3, H, W] with a model in evaluation mode.

    min_size, max_size: what the network sees has a shorter side of min_size pixels, unless the
    longer one exceeds max_size (None: the sizes stored with the weights); tta: test-time
    augmentation. Returns the dict of `MaskRCNN.forward` on the CPU, best score first, in the pixels
    of this image; `masks` are the probabilities [N, 28, 28] inside of each box.
    """
    size = tuple(image.shape[1:])
    min_size = min_size or model.data_settings["min_size"]
    max_size = max_size or model.data_settings["max_size"]
    if tta:
        views = tta_views(size, min_size, max_size)
        input_size, _ = views[0]
        detections = predict_views(model, image, views)
    else:
        input_size = data.resize_shape(*size, min_size, max_size)
        view = data.resize_image(image, *input_size)
        [detections] = model([view.to(model.image_mean.device)])

    # On the CPU, in the pixels of the image
    found = {name: value.cpu() for name, value in detections.items()}
    boxes = data.move_boxes(found["boxes"], input_size, size, flip=False)
    found["boxes"] = ops.clip_boxes_to_image(boxes, size)
    if "keypoints" in found:
        found["keypoints"] *= torch.tensor([size[1] / input_size[1], size[0] / input_size[0], 1])
    kept = has_area(found["boxes"])
    return {name: value[kept] for name, value in found.items()}


def predict(model, image, min_size=None, max_size=None, tta=False):
    """`predict_image` for users: any kind of image, a model in whatever mode, whole masks.

    image: the path of a file, an array [H, W, 3] or a tensor [3, H, W], RGB, uint8 or float in
    [0, 1]; the other arguments: as for `predict_image`.

    Returns a dict on the CPU, best score first, all in the pixels of this image: `boxes` [N, 4]
    float xyxy, `labels` [N] int64 (1..K), `scores` [N], `masks` [N, H, W] bool (of a model with
    masks), `keypoints` [N, 17, 3] (x, y, 1) and `keypoints_scores` [N, 17] (with keypoints).
    Raises UserError for a file that cannot be read, ValueError for another kind of array.
    """
    if isinstance(image, (str, os.PathLike)):
        image = data.read_image(image)
    elif not torch.is_tensor(image):
        array = np.array(image)  # a copy, since torch refuses the strides of bgr[..., ::-1]
        if array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(f"image must be [H, W, 3], one RGB image, and is {array.shape}.")
        image = torch.from_numpy(array).permute(2, 0, 1)
    check_images([image])
    with evaluation_mode(model):
        detections = predict_image(model, image, min_size, max_size, tta)
    if "masks" in detections:
        masks, boxes = detections["masks"], detections["boxes"]
        detections["masks"] = paste_masks(masks, boxes, *image.shape[1:])
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


def paste_masks(masks, boxes, height, width):
    """Masks [N, M, M] (probabilities) of boxes [N, 4] as bool [N, height, width] of the image."""
    pairs = zip(masks.float().cpu(), boxes.tolist())
    pasted = [paste_mask(mask, box, height, width) for mask, box in pairs]
    return torch.stack(pasted) if pasted else torch.zeros(0, height, width, dtype=torch.bool)


def paste_mask(mask, box, height, width):
    """One mask [M, M] of a box (x1, y1, x2, y2) as bool [height, width], as Detectron2 pastes it.

    Bilinear interpolation at the centres of pixels, i + 0.5, with zeros around the mask. Outside of
    the box the result is below 0.5, so only the pixels inside are computed.
    """
    x1, y1, x2, y2 = box
    left, top, right, bottom = round(x1), round(y1), round(x2), round(y2)
    x = (torch.arange(left, right) + 0.5 - x1) * 2 / (x2 - x1) - 1  # -1 .. 1 across the box
    y = (torch.arange(top, bottom) + 0.5 - y1) * 2 / (y2 - y1) - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # [rows, columns, 2]
    pasted = torch.zeros(height, width, dtype=torch.bool)
    if grid.numel() > 0:
        inside = F.grid_sample(mask[None, None], grid[None], align_corners=False)
        pasted[top:bottom, left:right] = inside[0, 0] >= 0.5
    return pasted


# -- Test-time augmentation (Sec. 5.1, Fig. 5, as in Detectron): every scale, also mirrored --------

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


def predict_views(model, image, views):
    """Detections of one image [3, H, W] from many views, in the pixels of views[0].

    1) Scores and boxes of all views are united *before* score threshold and NMS: the views compete
       like the proposals of one image.
    2) Threshold and NMS as usual, then box voting.
    3) Masks are predicted for the final boxes in every view and averaged as probabilities.
    """
    if model.config.keypoints:  # the paper augments boxes and masks only
        raise UserError("Keypoint models have no test-time augmentation; leave out --tta.")
    own_size, _ = views[0]
    features, scores, boxes = [], [], []  # of each view
    for size, flip in views:
        view = data.resize_image(image, *size)
        view = view.flip(-1) if flip else view
        batch, sizes = model.batch([view.to(model.image_mean.device)])
        view_features = model.features(batch)
        proposals = model.proposals(view_features, sizes)
        [(view_scores, view_boxes)] = model.box_predictions(view_features, proposals, sizes)
        scores.append(view_scores)  # [P, K + 1]
        own_boxes = data.move_boxes(view_boxes.flatten(0, 1), size, own_size, flip)
        boxes.append(own_boxes.view_as(view_boxes))  # [P, K, 4], of a cascade [P, 1, 4]
        if model.config.masks:  # kept for the masks: 1.8 GB for an image of COCO
            features.append(view_features)
    scores = torch.cat(scores)
    boxes = torch.cat(boxes)

    detections = model.postprocess(scores, boxes)
    detections["boxes"] = vote_boxes(detections, scores, boxes, model.config.box_score_thresh)
    if not model.config.masks:
        return detections

    masks = 0
    for (size, flip), view_features in zip(views, features):
        view_boxes = data.move_boxes(detections["boxes"], own_size, size, flip)
        [view_masks] = model.mask_probabilities(view_features, [view_boxes], [detections["labels"]])
        masks = masks + (view_masks.flip(-1) if flip else view_masks)
    detections["masks"] = masks / len(views)
    return detections


def vote_boxes(detections, scores, boxes, score_threshold):
    """Box voting: each kept box b becomes the mean of the boxes b_i that agree with it.

        b  ->  sum_i s_i b_i / sum_i s_i    over the i of b's class with IoU(b, b_i) >= 0.9 and a
                                            score s_i > score_threshold (only those went into NMS)

    detections: `boxes` [N, 4] and `labels` [N], what NMS kept of the united boxes; scores:
    [P, K + 1] and boxes: [P, K or 1, 4], all of them. Returns [N, 4]; scores do not change.
    """
    voted = detections["boxes"].clone()
    boxes = boxes.expand(-1, scores.shape[1] - 1, -1)  # [P, K, 4]
    for label in detections["labels"].unique().tolist():
        kept = detections["labels"] == label
        voters = scores[:, label] > score_threshold
        candidates = boxes[voters, label - 1]
        agree = ops.box_iou(voted[kept], candidates) >= TTA_VOTE_IOU
        weights = agree * scores[voters, label]
        total = weights.sum(dim=1, keepdim=True)  # 0: a box without area, of IoU 0 with itself
        mean = weights @ candidates / total.clamp(min=1e-12)
        voted[kept] = torch.where(total > 0, mean, voted[kept])
    return voted


# -- Metrics: the results of all images in COCO's format, then average precision (AP) --------------
#
# A detection is right at the IoU threshold t if it overlaps an object of its class, which no
# detection with a higher score has taken, with IoU >= t. Go through the detections of a class in
# all images by falling score; after each,
#
#     precision = right ones so far / detections so far,    recall = right ones so far / objects
#
# AP at t is the area under precision over recall, where precision is the best at this or any higher
# recall (COCO reads it at 101 recalls). AP50 is the mean over the classes at t = 0.5, AP75 at 0.75.
# COCO's AP is the mean over the classes and over t = 0.5, 0.55, ..., 0.95. APs, APm and APl are AP
# of objects below 32^2, up to 96^2, above 96^2 pixels. Of a class, an image's best 100 detections
# (keypoints: 20) count, but for those that match a crowd. IoU is of boxes (bbox) or masks (segm).


def evaluate(model, dataset, out=None, tta=False, workers=2, metric=None):
    """Metrics of a model on a data set, in percent.

    Where torch.distributed is initialized, every process calls this, takes its share of the images
    and returns the same. model: a MaskRCNN (not wrapped in DDP), in whatever mode; dataset: a
    CocoDataset made for evaluation; out: a folder for `results_bbox.json`, `results_segm.json` and
    `results_keypoints.json` in COCO's submission format; tta: test-time augmentation; workers:
    processes that read images; metric: "coco" or "voc" (None: VOC's if annotations have its field
    "difficult").

    Returns {"bbox": {"AP", "AP50", "AP75", "APs", "APm", "APl"}}, the same as "segm" for a model
    with masks, {"AP", "AP50", "AP75", "APm", "APl"} as "keypoints"; for VOC {"voc": {"mAP50"}};
    None where there is no object to find. Each has "per_class", too: {class: AP}. Raises UserError
    where data set and model have different classes.
    """
    advice = "metrics need equal ones; see detections with --images, or train with train.py --init"
    named = model.data_settings["classes"] or dataset.classes  # (converted weights: perhaps None)
    data.check_classes(dataset, named, "the weights", advice)
    truth = dataset.coco_gt()  # first: a fault in it should not show up after hours
    rank, world_size = rank_and_size()
    indices = range(rank, len(dataset), world_size)
    with evaluation_mode(model):
        share = predict_dataset(model, dataset, indices, tta, workers, progress=rank == 0)
    by_image = {}
    for their_share in gather(share):
        by_image |= their_share
    # In the data set's order, whatever the number of processes
    results = [result for image_id in dataset.image_ids for result in by_image[image_id]]
    if metric is None:
        is_voc = any("difficult" in annotation for annotation in truth.dataset["annotations"])
        metric = "voc" if is_voc else "coco"
    return write_and_measure(model, dataset, truth, results, out, metric)


def predict_dataset(model, dataset, indices, tta, workers, progress):
    """{image id: results in COCO's submission format} of the images at these indices.

    One image at a time: in a batch, through GroupNorm, the padding would make a result depend on
    its neighbours.
    """
    images = copy.copy(dataset)
    images.masks = images.keypoints = False  # only the images are needed here
    loader = data.read_ahead(images, workers, indices)
    bar = tqdm(loader, "evaluate", len(indices), leave=False, disable=not progress)
    results = {}
    for image, target in bar:
        detections = predict_image(model, image, tta=tta)
        found = results[target["image_id"]] = []
        for label, result in to_results(detections, image.shape[1:]):
            ids = {"image_id": target["image_id"], "category_id": dataset.category_ids[label - 1]}
            found.append(ids | result)
    return results


def to_results(detections, size):
    """Pairs (label, dict in COCO's submission format but for its ids) of an image's detections.

    detections: as from `predict_image`; size: (H, W). A dict has `score`, `bbox` [x, y, width,
    height], and `segmentation` (compressed RLE) and `keypoints` [51] where the model has them.
    Numbers are rounded here, once: the metrics use exactly the numbers in the file.
    """

    def rounded(values):
        return values.double().round(decimals=3).tolist()

    pairs = []
    for i, label in enumerate(detections["labels"].tolist()):
        box = detections["boxes"][i]
        result = {"score": round(detections["scores"][i].item(), 6)}
        result["bbox"] = rounded(torch.cat([box[:2], box[2:] - box[:2]]))
        if "masks" in detections:
            mask = paste_mask(detections["masks"][i], box.tolist(), *size)
            code = coco_mask.encode(np.asfortranarray(mask, np.uint8))
            result["segmentation"] = code | {"counts": code["counts"].decode()}
        if "keypoints" in detections:
            # COCO's keypoints are indices of pixels, ours are places: pixel 0 is centred at 0.5.
            points = detections["keypoints"][i] - torch.tensor([0.5, 0.5, 0])
            result["keypoints"] = rounded(points.flatten())
        pairs.append((label, result))
    return pairs


def write_and_measure(model, dataset, truth, results, out, metric):
    """Write the files of results and compute the metrics, as `evaluate` returns them."""
    # pycocotools takes the kind of a result from its fields, so each kind has one of its own.
    field_of = {"bbox": "bbox"}
    if model.config.masks:
        field_of["segm"] = "segmentation"
    if model.config.keypoints:
        field_of["keypoints"] = "keypoints"
    by_kind = {}
    for kind in field_of:
        fields = ("image_id", "category_id", "score", field_of[kind])
        by_kind[kind] = [{name: result[name] for name in fields} for result in results]
    if out is not None and rank_and_size()[0] == 0:
        Path(out).mkdir(parents=True, exist_ok=True)
        for kind, kind_results in by_kind.items():
            write_whole(Path(out, f"results_{kind}.json"), json.dumps(kind_results).encode())
    if metric == "voc":
        return {"voc": voc_metrics(truth, results, dataset)}
    return {kind: coco_metrics(truth, by_kind[kind], kind, dataset) for kind in by_kind}


def coco_metrics(truth, results, kind, dataset):
    """COCO's average precisions, by pycocotools: {"AP": percent, ..., "per_class": {class: AP}}.

    truth: a pycocotools COCO object; results: a list of dicts in COCO's submission format, which
    loadRes writes into; kind: "bbox", "segm" or "keypoints". None: there is no such object.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        detections = truth.loadRes(results) if results else COCO()
        scorer = COCOeval(truth, detections, kind)
        scorer.params.imgIds = list(dataset.image_ids)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    names = ["AP", "AP50", "AP75", *([] if kind == "keypoints" else ["APs"]), "APm", "APl"]
    metrics = {name: percent(value) for name, value in zip(names, scorer.stats)}
    precision = scorer.eval["precision"][..., 0, -1]  # [IoU thresholds, recalls, classes]
    per_class = [percent(precision[:, :, k]) for k in range(len(dataset.classes))]
    return metrics | {"per_class": dict(zip(dataset.classes, per_class))}


def percent(values):
    """Mean of the values that are defined (pycocotools writes -1 for none) in percent, or None."""
    values = np.asarray(values)
    values = values[values > -1]
    return 100 * float(values.mean()) if values.size else None


def voc_metrics(truth, results, dataset):
    """{"mAP50": mean of `voc_average_precision` over the classes, "per_class": {class: AP50}}."""
    values = []
    for category_id in dataset.category_ids:
        found = [result for result in results if result["category_id"] == category_id]
        objects = [o for o in truth.dataset["annotations"] if o["category_id"] == category_id]
        values.append(voc_average_precision(found, objects))
    per_class = dict(zip(dataset.classes, [percent([value]) for value in values]))
    return {"mAP50": percent(values), "per_class": per_class}


def voc_average_precision(results, objects):
    """PASCAL VOC's average precision of one class in [0, 1]; -1 if no object counts.

    results and objects (annotations, some `difficult`) of the class are in COCO's format. The rule
    (VOC development kit, 2010): by falling score, each detection is matched to the object of its
    image that it overlaps most. IoU below 0.5: wrong. Difficult object: ignored. Object matched
    before: wrong. Otherwise: right. AP is the whole area, where COCO reads it at 101 recalls.
    """
    total = sum(not o.get("difficult") for o in objects)
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
        elif not best.get("difficult"):  # (one that matches a difficult object: no entry)
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
    """The AP of each class as such a table: a row for each class, a column for bbox, segm, ..."""
    by_class = {kind: row["per_class"] for kind, row in metrics.items()}
    names = next(iter(by_class.values()))
    return format_table({name: {kind: by_class[kind][name] for kind in by_class} for name in names})


# -- Pictures --------------------------------------------------------------------------------------

COLORS = "#ff595e #ffca3a #8ac926 #1fa2ff #c77dff #ff924c #2ec4b6 #f15bb5 #b5e48c #00f5d4".split()
SKELETON = [  # pairs of data.KEYPOINT_NAMES that a line joins
    (0, 1), (0, 2), (1, 3), (2, 4), (5, 6), (5, 7), (7, 9), (6, 8), (8, 10), (5, 11), (6, 12),
    (11, 12), (11, 13), (13, 15), (12, 14), (14, 16),
]  # fmt: skip
PICTURE_SIDES = 480, 1600  # limits of a picture's longer side, so that names fit


def draw(image, detections, classes=None, score=0.5):
    """A picture of an image with its detections: masks, boxes, names with scores, keypoints.

    image: [3, H, W] uint8, or float in [0, 1]; detections: as from `predict` or `predict_image`;
    classes: names of labels 1..K; score: detections below are left out. Returns uint8 [3, H', W'],
    enlarged or shrunk to PICTURE_SIDES.
    """
    if image.is_floating_point():
        image = (image * 255).round().to(torch.uint8)
    size = tuple(image.shape[1:])
    scale = min(max(max(size), PICTURE_SIDES[0]), PICTURE_SIDES[1]) / max(size)
    new_size = height, width = [max(1, round(scale * side)) for side in size]
    picture = data.resize_image(image.cpu(), *new_size)
    # Drawn from the worst to the best, so that no other covers the best one's name
    order = [i for i, s in enumerate(detections["scores"].tolist()) if s >= score][::-1]
    if not order:
        return picture
    shown = {name: value[order].cpu() for name, value in detections.items()}
    boxes = data.move_boxes(shown["boxes"], size, new_size, flip=False)
    colors = [COLORS[i % len(COLORS)] for i in order]
    if "masks" in shown:
        masks = shown["masks"]
        if masks.is_floating_point():  # as from `predict_image`
            masks = paste_masks(masks, boxes, height, width)
        else:
            masks = F.interpolate(masks[None].byte(), new_size)[0].bool()
        picture = drawing.draw_segmentation_masks(picture, masks, 0.4, colors)
    for points, color in zip(shown.get("keypoints", []), colors):
        points = points[None, :, :2] * torch.tensor([width / size[1], height / size[0]])
        picture = drawing.draw_keypoints(picture, points, SKELETON, color, radius=3, width=2)
    picture = drawing.draw_bounding_boxes(picture, boxes, colors=colors, width=2)
    canvas = Image.fromarray(picture.permute(1, 2, 0).numpy())
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(max(13, max(new_size) // 60))
    corners = boxes[:, :2].tolist()
    for label, s, (x, y), color in zip(shown["labels"], shown["scores"], corners, colors):
        name = f"{class_name(label, classes)} {100 * s:.0f}%"
        _, _, w, h = pen.textbbox((0, 0), name, font)
        x, y = max(0, min(x, width - w)), max(0, y - h)  # above the box where there is room
        pen.rectangle((x, y, x + w, y + h), color)
        pen.text((x, y), name, "black", font)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def class_name(label, classes):
    return classes[label - 1] if classes else f"class {label}"  # None: the weights do not know them


def predict_files(model, paths, out, score=0.5, tta=False):
    """Detections in image files: a picture of each, and all together in OUT/detections.json.

    Yields (path, path of the picture, detections as from `predict_image`) of each file. The JSON is
    a list of dicts: `file_name`, `class`, and what `to_results` gives; with scores of `score` and
    more, as in the pictures.
    """
    Path(out).mkdir(parents=True, exist_ok=True)
    classes, results = model.data_settings["classes"], []
    for path in paths:
        picture = Path(out, f"{Path(path).stem}_detections.png")
        image = data.read_image(path)
        with evaluation_mode(model):
            detections = predict_image(model, image, tta=tta)
        good = detections["scores"] >= score
        detections = {name: value[good] for name, value in detections.items()}
        pixels = draw(image, detections, classes, score)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(picture)
        for label, result in to_results(detections, image.shape[1:]):
            names = {"file_name": str(path), "class": class_name(label, classes)}
            results.append(names | result)
        yield path, picture, detections
    write_whole(Path(out, "detections.json"), json.dumps(results).encode())


# -- Command line ----------------------------------------------------------------------------------


def main(arguments=None):
    """The command line. Raises UserError, model.WeightsError and OSError."""
    args = make_parser().parse_args(arguments)
    rank, _, device = start_processes(args.device)
    model = load_model(args.weights).to(device)
    if args.images:
        if rank == 0:
            paths, out = find_images(args.images), args.out or "."
            for path, picture, found in predict_files(model, paths, out, args.score, args.tta):
                print(f"{path}: {len(found['scores'])} detections, {picture}")
            print(f"{out}/detections.json")
        return
    masks, keypoints = model.config.masks, bool(model.config.keypoints)
    dataset = data.open_split(args.data, args.split, masks=masks, keypoints=keypoints)
    metrics = evaluate(model, dataset, args.out, args.tta, args.workers, args.metric)
    if rank == 0:
        if args.per_class:
            print(format_classes(metrics) + "\n")
        print(format_table(metrics))


def make_parser():
    """The command line of this file."""
    about = "Evaluate Mask R-CNN. Under torchrun, the processes share the images of --data."
    parser = argparse.ArgumentParser("evaluate.py", description=about)
    one_of = parser.add_mutually_exclusive_group(required=True).add_argument
    one_of("--data", metavar="DIR", help="metrics on a data set in COCO's layout")
    one_of("--images", metavar="PATH", nargs="+", help="detections in images, or folders of them")
    add = parser.add_argument
    add("--weights", metavar="FILE", required=True, help="a checkpoint of train.py")
    add("--out", metavar="DIR", help="folder for results (--data), or pictures and JSON (--images)")
    add("--split", default="val2017", help="which part of --data (val2017)")
    add("--metric", choices=["coco", "voc"], help="(voc where annotations have VOC's difficult)")
    add("--tta", action="store_true", help="test-time augmentation: 18 views, about 20x the time")
    add("--per-class", action="store_true", help="AP of each class of --data, too")
    add("--score", type=float, default=0.5, help="--images: the least score that is shown (0.5)")
    add("--workers", type=int, default=2, help="processes that read the images of --data (2)")
    add("--device", help="cpu, cuda, cuda:1, ... (cuda where there is one, else cpu)")
    return parser


def find_images(paths):
    """The image files of paths and folders, without the pictures that `predict_files` made."""
    files = []
    for path in map(Path, paths):
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        files += [p for p in inside if p.suffix.lower() in Image.registered_extensions()]
    files = [file for file in files if not file.stem.endswith("_detections")]
    if not files:
        raise UserError("--images names no image, and no folder with images.")
    if len({file.stem for file in files}) < len(files):
        raise UserError("Two of the images have the same name; draw them into different --out.")
    return files


# -- Plumbing, for train.py and the tools too: processes, errors -----------------------------------


def start_processes(device_name=None):
    """(rank, world_size, device) of this process; joins those that torchrun started with it.

    device_name: "cpu", "cuda", "cuda:1", ...; None: cuda where there is one.
    """
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(device_name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        count = torch.cuda.device_count()
        if device.index >= count:
            advice = f"start at most {count} processes (--nproc-per-node), or use --device cpu"
            raise UserError(f"There is no {device}: {advice}.")
        torch.cuda.set_device(device)
    else:  # glibc keeps freed memory: to ask for it again took a third of a step on the CPU
        with contextlib.suppress(OSError, TypeError, AttributeError):
            for parameter in (-3, -1):  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
                ctypes.CDLL(None).mallopt(parameter, 2**31 - 1)
    if world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        # Shares of an evaluation do not take equally long: more than the default of 10 minutes
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    return rank, world_size, device


def rank_and_size():
    """The number of this process and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value):
    """A list of what `value` is in each process."""
    everywhere = [value]
    if dist.is_initialized():
        everywhere = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, value)
    return everywhere


def run_command(name, function, arguments=None):
    """Run function(arguments) as the command `name`; returns its exit code (None: 0).

    An error that the user can fix becomes one line on stderr; any other exception is a bug.
    """
    try:
        code = function(arguments) or 0
        if dist.is_initialized():
            dist.destroy_process_group()
        return code
    except (UserError, WeightsError, OSError) as error:
        message = str(error).rpartition("UserError: ")[2].strip()  # without a worker's traceback
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        message = f"{data.first_line(error)}: memory is short, perhaps; use fewer --workers."
    print(f"{name}: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(run_command("evaluate.py", main))
