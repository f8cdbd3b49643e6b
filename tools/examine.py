"""The data set's doctor: what is wrong with a data set in COCO's layout, and what it is like.

  python tools/examine.py DIR [--recipe r50-gn] [--train-split train2017] [--val-split val2017]
                          [--min-size N] [--max-size N] [--workers 2]

It opens every image and annotation, and compares the objects with the anchors of a recipe of
train.py at its size of image. The exit code is 1 if anything would stop or spoil training.
"""

import argparse
import hashlib
import itertools
import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask
from torch.utils.data import Dataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the five modules
import data
from data import UserError
from model import BACKBONES, Config
from train import RECIPES

MOST_LINES = 20
DETECTIONS = 100  # an image: what COCO's metric and the paper's detector keep
FEW = 0.02  # objects with a low IoU: that many do no harm
MORE_RATIOS = ((0.25, 0.5, 1, 2, 4), (0.1, 0.25, 0.5, 1, 2), (0.5, 1, 2, 4, 10))  # height / width


class Examination(Dataset):
    """Item i: (the problem with the file of image i or "", remarks, hash of the file, colours).

    remarks: [(kind, where), ...] on its objects. colours: [2, 3], the means of the pixels in [0, 1]
    and of their squares by channel.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        dataset = self.dataset
        image_id = dataset.image_ids[index]
        record = dataset.record(index)
        found = [(odd_shape(o, *record["size"]), o["id"]) for o in record["objects"]]
        remarks = [(kind, f"annotation {i} of image {image_id}") for kind, i in found if kind]
        try:
            path = data.image_path(dataset.image_dir, record["file_name"], image_id)
            image = data.read_image(path, *record["size"], image_id)
            digest = hashlib.sha1(Path(path).read_bytes()).hexdigest()
        except UserError as error:
            return str(error), remarks, "", np.zeros((2, 3))
        step = math.ceil(math.sqrt(image[0].numel() / 1e6))  # a million pixels tell enough
        pixels = image[:, ::step, ::step].double().flatten(1) / 255
        return "", remarks, digest, np.stack([pixels.mean(1), pixels.square().mean(1)])


def odd_shape(o, width, height):
    """What is odd about the box or mask of an object, or None. Paints no mask, however large."""
    x, y, w, h = o["bbox"]
    if w <= 0 or h <= 0:
        return "boxes without area, which are not trained on"
    if min(x, y) < -1 or x + w > width + 1 or y + h > height + 1:
        return "boxes that leave their image and are clipped"
    segmentation = o.get("segmentation")
    if not segmentation:
        return None
    if isinstance(segmentation, list):
        points = np.concatenate(segmentation).reshape(-1, 2).clip(0, (width, height))
        extent = [*points.min(0), *points.max(0)]
    else:
        if isinstance(segmentation["counts"], list):
            segmentation = coco_mask.frPyObjects(segmentation, height, width)
        extent = coco_mask.toBbox(segmentation)
        extent[2:] += extent[:2]
    box = [max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)]
    apart = np.abs(np.subtract(extent, box)).max()
    return "masks that do not fit their boxes" if apart > max(3, 0.1 * max(w, h)) else None


def has_masks(file):
    """Whether any object of an annotation file has a segmentation."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return any(a.get("segmentation") for a in content["annotations"])
    except Exception:  # what is wrong with the file is said when it is opened
        return False


def open_split(image_dir, file, training, masks, keypoints, problems):
    """The data set of a split, or None; appends what is wrong with its file to problems."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = list(data.coco_problems(content, file, masks, keypoints))
        problems += found
        if found:
            return None
    except (OSError, ValueError, RecursionError):
        pass  # CocoDataset says what is wrong
    try:
        if training:  # there must be something to train on
            data.CocoDataset(image_dir, file, True, masks, keypoints)
        return data.CocoDataset(image_dir, file, False, masks, keypoints)
    except UserError as error:
        problems.append(str(error))
    return None


def usable_boxes(dataset, min_size, max_size):
    """Boxes (x, y, w, h) of what is trained on, resized: [N, 4]; their number in each image."""
    boxes, counts = [np.zeros((0, 4))], []
    for index in range(len(dataset)):
        record = dataset.record(index)
        width, height = record["size"]
        scale = data.resize_shape(height, width, min_size, max_size)[0] / height
        usable = [
            o["bbox"] for o in record["objects"] if data.is_usable(o, width, height, dataset.masks)
        ]
        boxes.append(np.reshape(usable, (-1, 4)) * scale)
        counts.append(len(usable))
    return np.concatenate(boxes), np.array(counts)


def best_iou(boxes, anchor_sizes, ratios):
    """The IoU of each box (x, y, w, h) with the anchor that fits it best: [N, 4] -> [N].

    anchor_sizes, ratios: as model.Config's anchor_sizes and anchor_ratios.
    """
    centers, sides = boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]
    best = np.zeros(len(boxes))
    for level, sizes in enumerate(anchor_sizes):
        stride = 4 * 2**level if len(anchor_sizes) > 1 else 16  # FPN's, or VGG's only one
        offsets = np.abs(centers - np.round(centers / stride) * stride)  # of the nearest anchor
        for size, ratio in itertools.product(sizes, ratios):
            anchor = np.array([size / math.sqrt(ratio), size * math.sqrt(ratio)])
            right = np.minimum(sides / 2, offsets + anchor / 2)
            left = np.maximum(-sides / 2, offsets - anchor / 2)
            overlap = (right - left).clip(0).prod(1)
            best = np.maximum(best, overlap / (sides.prod(1) + anchor.prod() - overlap))
    return best


def anchors_of(recipe):
    """The fields of model.Config that make the anchors of a recipe."""
    fields = BACKBONES[recipe.backbone] | recipe.model
    names = ("anchor_sizes", "anchor_ratios")
    return {name: fields.get(name, getattr(Config, name)) for name in names}


def describe_anchors(boxes, recipe, min_size):
    """Print how well a recipe's anchors fit and, where there is need, which change helps."""

    def misfits(anchor_sizes, anchor_ratios, scale):
        best = best_iou(boxes * scale, anchor_sizes, anchor_ratios)
        return (best < 0.5).mean(), (best < 0.3).mean()

    own = anchors_of(RECIPES[recipe]) | {"scale": 1}
    share = misfits(**own)
    print("  objects whose best anchor has an IoU below 0.5 (0.3), which are hard to learn:")
    verdict = ": below 2 %, nothing to do" if share[0] < FEW else ""
    print(f"    {share[0]:.1%} ({share[1]:.1%}) with the anchors of {recipe}{verdict}")
    if verdict:
        return
    sizes = own["anchor_sizes"]
    smaller = [tuple(tuple(int(size / n) for size in level) for level in sizes) for n in (2, 4)]
    choices = {"anchor_sizes": smaller, "anchor_ratios": MORE_RATIOS, "scale": (1.5, 2, 4)}
    changes = [(field, value) for field, values in choices.items() for value in values]
    shares = {(field, value): misfits(**own | {field: value}) for field, value in changes}
    enough = [change for change in changes if shares[change][0] < FEW]
    field, value = change = (enough or sorted(changes, key=shares.get))[0]
    base = f'RECIPES["{recipe}"].model | ' if RECIPES[recipe].model else ""
    setting = f'model={base}{{"{field}": {value}}}'
    if field == "scale":
        setting = f"min_sizes, max_size and test_size {value} times as large"
    print(f"    {shares[change][0]:.1%} ({shares[change][1]:.1%}) with {setting}")


def describe(dataset, min_size, max_size):
    """Print what a split holds -> its boxes, as of usable_boxes."""
    boxes, counts = usable_boxes(dataset, min_size, max_size)
    labels = Counter()
    for index in range(len(dataset)):
        labels.update(o["label"] for o in dataset.record(index)["objects"])
    found = ", ".join(f"{dataset.classes[k - 1]} {n:,}" for k, n in labels.most_common(12))
    print(
        f"  {len(dataset):,} images, {dataset.num_objects:,} objects "
        f"({dataset.num_objects - len(boxes):,} not to train on: crowds, without box or mask), "
        f"{len(dataset.classes)} classes: {found}{', ...' if len(labels) > 12 else ''}"
    )
    unseen = [name for k, name in enumerate(dataset.classes, start=1) if k not in labels]
    if unseen:
        print(f"  {len(unseen)} classes without an object: {', '.join(unseen[:12])}")
    if (counts == 0).any():
        print(f"  {(counts == 0).sum():,} images without an object to train on")
    if not dataset.masks:
        print("  no segmentations: boxes only: train with --no-masks")
    elif dataset.num_without_mask:
        print(f"  {dataset.num_without_mask:,} objects have no mask: background, or --no-masks")
    crowded = (counts > DETECTIONS).sum()
    if crowded:
        print(f"  {crowded:,} images have more than the {DETECTIONS} objects that can be found")
    return boxes


def describe_settings(boxes, colours, recipe, min_size, max_size):
    """Print what the settings of a recipe follow from. colours: [N, 2, 3], as of Examination."""
    mean, square = colours.mean(0)
    for name, values in (("mean", mean), ("std", np.sqrt((square - mean**2).clip(0)))):
        print(f"  image_{name}=({', '.join(f'{value:.4f}' for value in values)})")
    low, middle, high = np.percentile(np.sqrt(boxes[:, 2:].prod(1)), [5, 50, 95])
    print(
        f"  objects at {min_size}/{max_size}: 5 % below {low:.0f} pixels (root of the box's area), "
        f"half below {middle:.0f}, 5 % above {high:.0f}"
    )
    describe_anchors(boxes, recipe, min_size)


def examine_images(dataset, workers, problems):
    """Open all images -> (hashes of their files, colours [N, 2, 3]); print remarks on objects."""
    digests, colours, remarks = set(), [], {}
    items = data.read_ahead(Examination(dataset), workers, range(len(dataset)))
    for problem, found, digest, image_colours in tqdm(items, total=len(dataset), leave=False):
        for remark, where in found:
            remarks.setdefault(remark, []).append(where)
        if problem:
            problems.append(problem)
        else:
            digests.add(digest)
            colours.append(np.asarray(image_colours))
    for remark, places in remarks.items():
        print(f"  worth a look: {len(places):,} {remark}; the first is {places[0]}")
    return digests, np.array(colours)


def in_parts(dataset):
    """Whether all boxes are given in parts of their image's sides, as YOLO gives them."""
    records = map(dataset.record, range(len(dataset)))
    boxes = np.reshape([o["bbox"] for record in records for o in record["objects"]], (-1, 4))
    return len(boxes) > 0 and (boxes[:, :2] + boxes[:, 2:]).max() <= 1.01


def examine(root, splits, kind, recipe, min_size, max_size, workers):
    """Print the state of a data set's annotations of a kind; returns the number of stops."""
    problems, datasets, digests = [], [], []
    keypoints = kind == "person_keypoints"
    files = [root / "annotations" / f"{kind}_{split}.json" for split in splits]
    masks = any(has_masks(file) for file in files)
    for split, file in zip(splits, files):
        print(file)
        is_train = split == splits[0]
        dataset = open_split(root / split, file, is_train, masks, keypoints, problems)
        if dataset is None:
            continue
        datasets.append(dataset)
        boxes = describe(dataset, min_size, max_size)
        if in_parts(dataset):
            problems.append(
                f"{dataset.annotation_file}: all boxes lie within 0..1; multiply them by the width "
                "and height of their image."
            )
        images, colours = examine_images(dataset, workers, problems)
        digests.append(images)
        if is_train and len(colours) and len(boxes):
            describe_settings(boxes, colours, recipe, min_size, max_size)
    if len(datasets) == 2:
        try:
            data.check_classes(datasets[1], datasets[0].classes, datasets[0].annotation_file)
        except UserError as error:
            problems.append(str(error))
        shared = len(digests[0] & digests[1])
        if shared:
            print(f"  worth a look: the splits share {shared:,} images, so that AP will flatter")
    for line in problems[:MOST_LINES]:
        print(f"  TO MEND: {line}")
    if len(problems) > MOST_LINES:
        print(f"  ... and {len(problems) - MOST_LINES:,} more to mend")
    return len(problems)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("root", metavar="DIR", help="the folder with annotations/, train2017/, val2017/")
    add("--train-split", default="train2017", help="(train2017)")
    add("--val-split", default="val2017", help="(val2017)")
    add("--recipe", default="r50-gn", choices=list(RECIPES), metavar="R", help="(r50-gn)")
    add("--min-size", type=int, help="shorter side of an image (the recipe's test_size)")
    add("--max-size", type=int, help="longest side of an image (the recipe's)")
    add("--workers", type=int, default=2, help="processes that decode images (2)")
    args = parser.parse_args(arguments)
    recipe = RECIPES[args.recipe]
    sizes = args.min_size or recipe.test_size, args.max_size or recipe.max_size
    if args.workers < 0 or not 0 < sizes[0] <= sizes[1]:
        raise UserError("Give 0 or more workers, and sizes with 0 < min-size <= max-size.", 2)
    if not args.root or not Path(args.root).is_dir():
        raise UserError(f"The folder {args.root!r} does not exist; name one in COCO's layout.")
    splits = args.train_split, args.val_split
    root = Path(args.root)
    settings = args.recipe, *sizes, args.workers
    stops = examine(root, splits, "instances", *settings)
    if any((root / "annotations" / f"person_keypoints_{s}.json").exists() for s in splits):
        stops += examine(root, splits, "person_keypoints", *settings)
    print(f"{'Something above' if stops else 'Nothing here'} would stop or spoil training.")
    return int(stops > 0)


if __name__ == "__main__":
    from evaluate import run_command

    sys.exit(run_command("examine.py", main))
