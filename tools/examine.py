"""The data set's doctor: what is wrong with a data set in COCO's layout, and what it is like.

  python tools/examine.py DIR [--recipe r50-gn] [--train-split train2017] [--val-split val2017]

It opens every image and annotation, and compares the objects with the anchors of a recipe of
train.py at its size of image. The exit code is 1 if anything would stop or spoil training.
"""

import argparse
import hashlib
import itertools
import re
import sys
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the five modules
import data
from model import BACKBONES, Config
from tools.to_coco import mend_mask
from train import RECIPES

FEW, MANY = 0.02, 0.25  # of the objects: so few do no harm, so many spoil training
MORE_RATIOS = ((0.25, 0.5, 1, 2, 4), (0.1, 0.25, 0.5, 1, 2), (0.5, 1, 2, 4, 10))  # height / width
APART = "masks do not fit their boxes; tools/to_coco.py --boxes-from-masks mends them"


def look(dataset, index):
    """Image `index` -> (its path, what would stop training or None, what is odd, its hash)."""
    record = dataset.record(index)
    path, (height, width) = Path(dataset.image_dir, record["file_name"]), record["size"]
    odd = []
    try:
        for o in record["objects"]:
            dataset.check_mask(o, dataset.image_ids[index], (height, width))
            x, y, w, h = o["bbox"]
            box = [max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)]
            extent = mend_mask(o["segmentation"], width, height)[1]
            if min(w, h) <= 0:
                odd.append("boxes have no area and are not trained on")
            elif np.abs(np.subtract(box, [x, y, x + w, y + h])).max() > 1:
                odd.append("boxes leave their image and are clipped")
            if extent and np.abs(np.subtract(extent, box)).max() > max(3, 0.1 * max(w, h)):
                odd.append(APART)
        levels = np.bincount(data.read_image(path, (height, width)).flatten())
    except data.UserError as error:
        return path, str(error), odd, None
    if np.count_nonzero(levels) < 32:
        odd.append("images have fewer than 32 levels (were they 16 bits, mostly unused?)")
    return path, None, odd, hashlib.sha1(path.read_bytes()).digest()


def best_iou(boxes, anchor_sizes, anchor_ratios):
    """The IoU of each box with the anchor that fits it best, both centred: [N, 4] -> [N]."""
    sizes = itertools.product(itertools.chain(*anchor_sizes), anchor_ratios)
    anchors = np.array([(size / ratio**0.5, size * ratio**0.5) for size, ratio in sizes])
    overlap = np.minimum(boxes[:, None, 2:], anchors).prod(2)
    return (overlap / (boxes[:, 2:].prod(1)[:, None] + anchors.prod(1) - overlap)).max(1)


def describe_anchors(boxes, recipe):
    """Print how well a recipe's anchors fit and, where there is need, which change helps."""
    settings = RECIPES[recipe].settings
    fields = vars(Config) | BACKBONES[RECIPES[recipe].backbone] | settings
    own = {field: fields[field] for field in ("anchor_sizes", "anchor_ratios")}
    changes = [{}, *({"anchor_ratios": ratios} for ratios in MORE_RATIOS)]
    for n in (2, 4):
        sizes = tuple(tuple(int(size / n) for size in level) for level in own["anchor_sizes"])
        changes.append({"anchor_sizes": sizes})
    low = [(best_iou(boxes, **own | change) < 0.5).mean() for change in changes]
    print("objects to train on whose best anchor has an IoU below 0.5, which are hard to learn:")
    print(f"  {low[0]:.1%} with the anchors of {recipe} (below 2 % there is nothing to do)")
    if low[0] >= FEW:
        best = next((i for i, share in enumerate(low) if share < FEW), int(np.argmin(low)))
        base = f'RECIPES["{recipe}"].settings | ' if settings else ""
        if best > 0:
            print(f"  {low[best]:.1%} with settings={base}{changes[best]}; larger images help, too")


def examine(root, split, masks, recipe, problems, odd):
    """Print the state of a split -> its data set or None, boxes to train on, {hash: image}."""
    kind = "person_keypoints" if recipe.keypoints else "instances"
    file = Path(root, "annotations", f"{kind}_{split}.json")
    print(file)
    try:
        found = list(data.coco_problems(data.read_json(file), file, masks, recipe.keypoints > 0))
        dataset = None if found else data.open_split(root, split, recipe.keypoints > 0, masks=masks)
    except data.UserError as error:
        dataset, found = None, [str(error)]
    problems += found
    if dataset is None:
        return None, [], {}
    labels, boxes, resized, counts, hashes, without_mask = Counter(), [], [], [], {}, 0
    for index in range(len(dataset)):
        objects, (height, width) = map(dataset.record(index).get, ("objects", "size"))
        scale = data.resize_shape(height, width, recipe.test_size, recipe.max_size)[0] / height
        usable = [o["bbox"] for o in objects if data.is_usable(o, (height, width), masks)]
        labels.update(dataset.classes[o["label"] - 1] for o in objects)
        boxes += [o["bbox"] for o in objects]
        resized += [np.multiply(box, scale) for box in usable]
        counts.append(len(usable))
        without_mask += sum(masks and o["segmentation"] == [] for o in objects)
    many = ", ".join(f"{label} {n:,}" for label, n in labels.most_common(12))
    print(f"  {len(dataset):,} images, {len(boxes):,} objects, {len(labels)} classes: {many}")
    unseen = [name for name in dataset.classes if name not in labels]
    for count, text in (
        (len(boxes) - len(resized), "objects are not trained on: crowds, without box or mask"),
        (without_mask, "objects have no mask: background, or --no-masks"),
        (0 if masks else len(boxes), "objects are boxes only: train with --no-masks"),
        (counts.count(0), "images have no object to train on"),
        (sum(n > 100 for n in counts), "images have more than the 100 objects that can be found"),
        (len(unseen), f"classes have no object: {', '.join(unseen[:12])}"),
    ):
        if count:
            print(f"  {count:,} {text}")
    with ThreadPool() as pool:
        looks = pool.imap(lambda index: look(dataset, index), range(len(dataset)))
        for path, problem, oddities, digest in tqdm(looks, total=len(dataset), leave=False):
            problems += [problem] if problem else []
            hashes[digest] = path
            for what in oddities:
                odd.setdefault(f"{what}, in {split}", []).append(path)
    if len(odd.get(f"{APART}, in {split}", ())) > MANY * len(boxes):
        problems.append(f"{file}: many {APART}.")
    if not resized:
        problems.append(f"{file} has no object to learn or to find; add some, or draw new splits.")
    elif np.reshape(boxes, (-1, 2, 2)).sum(1).max() <= 1.01:
        problems.append(f"{file}: all boxes lie within 0..1; multiply them by the image's sides.")
    return dataset, np.reshape(resized, (-1, 4)), hashes


def main(arguments=None):
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("root", metavar="DIR", help="the folder with annotations/, train2017/, val2017/")
    add("--train-split", default="train2017", help="(train2017)")
    add("--val-split", default="val2017", help="(val2017)")
    add("--recipe", default="r50-gn", choices=list(RECIPES), metavar="R", help="(r50-gn)")
    args = parser.parse_args(arguments)
    problems, odd = [], {}
    files = Path(args.root, "annotations").glob(f"*{args.train_split}.json")
    pattern = rb'"segmentation": *[\[{]+ *[^\] }]'
    masks = any(re.search(pattern, file.read_bytes()) for file in files)
    splits, recipe = (args.train_split, args.val_split), RECIPES[args.recipe]
    results = [examine(args.root, split, masks, recipe, problems, odd) for split in splits]
    (train, boxes, hashes), (val, _, others) = results
    if len(boxes):
        describe_anchors(boxes, args.recipe)
    if train and val and train.classes != val.classes:
        apart = ", ".join({*train.classes} ^ {*val.classes}) or "their order"
        problems.append(f"The splits differ in classes ({apart}); let tools/to_coco.py mend them.")
    if shared := (hashes.keys() & others.keys()) - {None}:
        odd["images are in both splits, so that AP will flatter"] = [hashes[d] for d in shared]
    for what, places in odd.items():
        print(f"  worth a look: {len(places):,} {what}; the first: {places[0]}")
    for line in problems[:20]:
        print(f"  TO MEND: {line}")
    verdict = f"The {len(problems):,} to mend" if problems else "Nothing here"
    ending = "training, but look at the above" if odd and not problems else "or spoil training"
    print(f"{verdict} would stop {ending}.")
    return int(bool(problems))


if __name__ == "__main__":
    from evaluate import run_command

    sys.exit(run_command("examine.py", main))
