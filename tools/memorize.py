"""Can the detector memorize? R50-FPN GN from random weights, until AP on its own images is high.

  python tests/memorize.py --data coco                (8 images at 256 pixels: 2 hours of one core)
  python tests/memorize.py --data coco --images 80 --goal 80 --size 800 --batch 8 --rois 512

Takes the first images of train2017, by id, that have at least three objects that are no crowds. No
flips: the images of training are exactly those of the evaluation, which is train.py's. A detector
that cannot memorize has a bug; 28 x 28 masks allow a mask AP of 96 and more.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import evaluate
import train


class FirstImages(data.CocoDataset):
    """The first `count` images, by id, with at least three objects."""

    def __init__(self, root, count, training):
        self.count = count
        annotations = f"{root}/annotations/instances_train2017.json"
        super().__init__(f"{root}/train2017", annotations, training)

    def _read(self):
        content = super()._read()
        objects = [a["image_id"] for a in content["annotations"] if not a["iscrowd"]]
        chosen = sorted(i for i in set(objects) if objects.count(i) >= 3)[: self.count]
        for key, field in (("images", "id"), ("annotations", "image_id")):
            content[key] = [entry for entry in content[key] if entry[field] in chosen]
        return content


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--rois", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--check", type=int, default=200, help="steps between evaluations")
    parser.add_argument("--goal", type=float, default=70)
    parser.add_argument("--out", default="runs/memorize")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    train_set = FirstImages(args.data, args.images, training=True)
    test_set = FirstImages(args.data, args.images, training=False)
    assert train_set.image_ids == test_set.image_ids
    recipe = replace(
        train.RECIPES["r50-gn"],
        # anchors as large beside the objects as the paper's are at 800 pixels
        model={
            "box_batch_size_per_image": args.rois,
            "anchor_sizes": tuple((a * args.size / 800,) for a in (32, 64, 128, 256, 512)),
        },
        learning_rate=args.rate,
        iterations=args.steps,
        tails=(args.steps // 4, args.steps // 12),
        warmup_iterations=min(100, args.steps // 10),
    )
    max_size = round(args.size * 1333 / 800)
    model = train.make_model(recipe, len(train_set.classes)).to(device).train()
    model.data_settings = {
        "min_size": args.size,
        "max_size": max_size,
        "classes": train_set.classes,
        "category_ids": train_set.category_ids,
    }
    optimizer = train.make_optimizer(model, recipe)
    first, path = 0, Path(args.out) / "memorized.pth"
    if path.exists():  # go on
        checkpoint = torch.load(path, weights_only=True)
        model.load_state_dict(checkpoint["model"])
        train.set_momentum(model, optimizer, checkpoint["momentum"])
        first = checkpoint["iteration"]
        print(f"continues after step {first}")
    samples = [train_set.load(i, args.size, max_size) for i in range(len(train_set))]
    print(f"{len(samples)} images: {train_set.image_ids}")
    start = time.perf_counter()
    order = torch.Generator().manual_seed(0)
    queue = []
    for iteration in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(iteration, recipe) * group["rate"]
        if len(queue) < args.batch:
            queue += torch.randperm(len(samples), generator=order).tolist()
        chosen, queue = queue[: args.batch], queue[args.batch :]
        if iteration < first:
            continue
        batch = train.to_device(
            [samples[i][0] for i in chosen], [samples[i][1] for i in chosen], device
        )
        for i, target in enumerate(batch[1]):
            target["seed"] = data.image_seed(0, iteration, i)
        losses = model(*batch)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done = iteration + 1
        if done % 25 == 0:
            seconds = (time.perf_counter() - start) / (done - first)
            print(f"step {done}: loss {loss.item():.3f}, {seconds:.2f} s a step", flush=True)
        if done % args.check == 0 or done == args.steps:
            metrics = evaluate.evaluate(model, test_set, args.out, workers=0, progress=False)
            model.train()
            bbox, segm = metrics["bbox"]["AP"], metrics["segm"]["AP"]
            print(f"step {done}: bbox AP {bbox:.1f}, mask AP {segm:.1f}", flush=True)
            checkpoint = {
                "model_config": model.config,
                "model": model.state_dict(),
                "momentum": train.momentum_of(model, optimizer),
                "data": model.data_settings,
                "iteration": done,
            }
            train.save_checkpoint(path, checkpoint)
            if min(bbox, segm) > args.goal:
                return


if __name__ == "__main__":
    main()
