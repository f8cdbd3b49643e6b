"""Can the detector memorize? Train R50-FPN GN from random weights, and test on the same images.

  python tools/memorize.py --data coco
  python tools/memorize.py --data coco --images 80 --size 800 --batch 8 --rois 512 --steps 4000
  python tools/memorize.py --data coco --keypoints

It takes the first images of train2017, by id, that have at least three objects, writes them as a
data set of their own to OUT/data, and runs train.py without mirror images; its log has the AP. A
detector that cannot memorize has a bug: 28 x 28 masks allow a mask AP of 96 and more. Started
again, it goes on. 8 images at 256 pixels take two hours of one core.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the five modules

import evaluate
import model as detector
import train
from data import UserError


def write_first_images(root, folder, count, keypoints):
    """Write a data set of the first `count` images with three objects to `folder`."""
    name = f"{'person_keypoints' if keypoints else 'instances'}_train2017.json"
    content = json.loads((Path(root) / "annotations" / name).read_text())
    objects = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        if not annotation["iscrowd"] and annotation.get("num_keypoints", 1) > 0:
            objects[annotation["image_id"]].append(annotation)
    chosen = sorted(i for i, found in objects.items() if len(found) >= 3)[:count]
    if not chosen:
        raise UserError(f"{name} has no image with three objects.")
    content["images"] = [image for image in content["images"] if image["id"] in chosen]
    content["annotations"] = [one for i in chosen for one in objects[i]]
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    with detector.write_whole(folder / "annotations" / name) as file:
        file.write(json.dumps(content).encode())
    if not (folder / "train2017").exists():
        (folder / "train2017").symlink_to((Path(root) / "train2017").resolve())


def make_recipe(args):
    # anchors as large beside the objects as the paper's are at 800 pixels
    sizes = tuple((side * args.size / 800,) for side in (32.0, 64.0, 128.0, 256.0, 512.0))
    return replace(
        train.RECIPES["r50-gn"],
        masks=not args.keypoints,
        keypoints=17 if args.keypoints else 0,
        model={"box_batch_size_per_image": args.rois, "anchor_sizes": sizes},
        iterations=args.steps,
        tails=(1 / 4, 1 / 12),
        batch_size=args.batch,
        images_per_gpu=args.batch,
        learning_rate=args.rate,
        warmup_iterations=min(100, args.steps // 10),
        min_sizes=(args.size,),
        max_size=round(args.size * 1333 / 800),
        test_size=args.size,
        flip=False,
        eval_every=args.check,
        checkpoint_every=args.check,
    )


def run(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="data set, COCO layout")
    add("--images", type=int, default=8, help="number of images (8)")
    add("--keypoints", action="store_true", help="keypoints of persons instead of masks")
    add("--size", type=int, default=256, help="shorter side (256)")
    add("--batch", type=int, default=1, help="images per step (1)")
    add("--rate", type=float, default=0.01, help="learning rate (0.01)")
    add("--rois", type=int, default=64, help="RoIs sampled per image (64)")
    add("--steps", type=int, default=2000, help="length of the run (2000)")
    add("--check", type=int, default=200, help="steps between evaluations (200)")
    add("--out", type=Path, default=Path("runs/memorize"), help="output folder (runs/memorize)")
    args = parser.parse_args(arguments)
    write_first_images(args.data, args.out / "data", args.images, args.keypoints)
    train.RECIPES["memorize"] = make_recipe(args)
    options = ["--recipe", "memorize", "--data", args.out / "data", "--out", args.out / "run"]
    options += ["--val-split", "train2017", "--resume"]
    return train.main([str(option) for option in options])


if __name__ == "__main__":
    sys.exit(evaluate.run_command("memorize.py", run))
