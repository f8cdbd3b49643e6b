"""The data set's doctor: what is wrong with a data set in COCO's layout, and what it is like.

  python tools/examine.py DIR [--train-split train2017] [--val-split val2017]
                          [--min-size 800] [--max-size 1333] [--workers 2]

It opens every image and annotation. The exit code is 1 if anything would stop or spoil training.
"""

import argparse
import hashlib
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

MOST_LINES = 20
DETECTIONS = 100  # an image: what COCO's metric and the paper's detector keep
SIZES = (32, 64, 128, 256, 512)  # of the paper's anchors, at strides 4, 8, 16, 32, 64
RATIOS = (0.5, 1, 2)  # height / width
MORE_RATIOS = ((0.25, *RATIOS, 4), (0.1, 0.25, *RATIOS), (*RATIOS, 4, 10))


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
    except (OSError, ValueError, RecursionError, LookupError, AttributeError, TypeError):
        return False  # what is wrong with the file is said when it is opened


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
    """Boxes (x, y, w, h) of the objects to train on, resized as the image is: [N, 4]; counts [K].

    The counts are those of an image each.
    """
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


def best_iou(boxes, sizes, ratios):
    """The IoU of each box (x, y, w, h) with the anchor that fits it best: [N, 4] -> [N]."""
    centers, sides = boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]
    best = np.zeros(len(boxes))
    for level, size in enumerate(sizes):
        stride = 4 * 2**level
        offsets = np.abs(centers - np.round(centers / stride) * stride)  # of the nearest anchor
        for ratio in ratios:
            anchor = np.array([size / math.sqrt(ratio), size * math.sqrt(ratio)])
            right = np.minimum(sides / 2, offsets + anchor / 2)
            left = np.maximum(-sides / 2, offsets - anchor / 2)
            overlap = (right - left).clip(0).prod(1)
            best = np.maximum(best, overlap / (sides.prod(1) + anchor.prod() - overlap))
    return best


def describe_anchors(boxes, min_size):
    """Print how well the paper's anchors fit, and the settings that fit better."""

    def misfits(sizes, ratios, scale):
        best = best_iou(boxes * scale, sizes, ratios)
        return (best < 0.5).mean(), (best < 0.3).mean()

    chosen = {"sizes": SIZES, "ratios": RATIOS, "scale": 1}
    share = misfits(**chosen)
    print("  objects whose best anchor has an IoU below 0.5 (0.3):")
    print(f"    {share[0]:.1%} ({share[1]:.1%}) with the paper's anchors at this size of image")
    smaller = [tuple(size // divisor for size in SIZES) for divisor in (2, 4)]
    choices = {"sizes": smaller, "ratios": MORE_RATIOS, "scale": (1.5, 2)}
    for field, values in choices.items():
        found = {value: misfits(**chosen | {field: value}) for value in values}
        value = min(found, key=found.get)
        if found[value][0] > share[0] - 0.01:
            continue
        share = found[value]
        chosen[field] = value
        setting = {
            "sizes": f"anchor_sizes={tuple((size,) for size in chosen['sizes'])}",
            "ratios": f"anchor_ratios={chosen['ratios']}",
            "scale": f"images of min_size {chosen['scale'] * min_size:.0f}",
        }[field]
        print(f"    {share[0]:.1%} ({share[1]:.1%}) if you also try {setting}")


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
        print("  no segmentations: boxes only, for recipes with masks=False")
    elif dataset.num_without_mask:
        print(f"  {dataset.num_without_mask:,} objects have no mask (no polygon of three points)")
    crowded = (counts > DETECTIONS).sum()
    if crowded:
        print(f"  {crowded:,} images have more than the {DETECTIONS} objects that can be found")
    return boxes


def describe_settings(boxes, colours, min_size, max_size):
    """Print what the settings of a recipe follow from. colours: [N, 2, 3], as of Examination."""
    mean, square = colours.mean(0)
    for name, values in (("mean", mean), ("std", np.sqrt((square - mean**2).clip(0)))):
        print(f"  image_{name}=({', '.join(f'{value:.4f}' for value in values)})")
    low, middle, high = np.percentile(np.sqrt(boxes[:, 2:].prod(1)), [5, 50, 95])
    print(
        f"  objects at {min_size}/{max_size}: 5 % below {low:.0f} pixels (root of the box's area), "
        f"half below {middle:.0f}, 5 % above {high:.0f}"
    )
    describe_anchors(boxes, min_size)


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


def examine(root, splits, kind, min_size, max_size, workers):
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
            describe_settings(boxes, colours, min_size, max_size)
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
    add("--min-size", type=int, default=800, help="shorter side of training images (800)")
    add("--max-size", type=int, default=1333, help="longest side of training images (1333)")
    add("--workers", type=int, default=2, help="processes that decode images (2)")
    args = parser.parse_args(arguments)
    sizes = args.min_size, args.max_size
    if args.workers < 0 or not 0 < args.min_size <= args.max_size:
        raise UserError("Give 0 or more workers, and sizes with 0 < min-size <= max-size.", 2)
    if not args.root or not Path(args.root).is_dir():
        raise UserError(f"The folder {args.root!r} does not exist; name one in COCO's layout.")
    splits = args.train_split, args.val_split
    root = Path(args.root)
    stops = examine(root, splits, "instances", *sizes, args.workers)
    if any((root / "annotations" / f"person_keypoints_{s}.json").exists() for s in splits):
        stops += examine(root, splits, "person_keypoints", *sizes, args.workers)
    print(f"{'Something above' if stops else 'Nothing here'} would stop or spoil training.")
    return int(stops > 0)


if __name__ == "__main__":
    from evaluate import run_command

    sys.exit(run_command("examine.py", main))
