"""The plan of a run, before it is started, and Figure 2 of the paper: how many samples it sees.

  python tools/plan.py --recipe r50-gn --processes 8              without data: COCO's numbers
  python tools/plan.py --recipe small --data DIR --steps 10       times ten steps on this machine

All other arguments are train.py's (python train.py --help).
"""

import argparse
import itertools
import math
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the five modules
import data
import evaluate
import train

# COCO train2017, for a plan without data: images with an object that is no crowd, annotated objects
# an image, and the commonest height and width.
COCO_IMAGES, COCO_OBJECTS, COCO_SHAPE = 117_266, 7.3, (480, 640)


def average_sample(dataset, recipe):
    """What Figure 2 counts: objects an image, and pixels of an image as the loader makes it."""
    objects, shapes = COCO_OBJECTS, [COCO_SHAPE]
    if dataset:
        objects = dataset.num_objects / len(dataset)
        shapes = list(zip(dataset.heights.tolist(), dataset.widths.tolist()))
    pairs = itertools.product(shapes, recipe.min_sizes)
    resized = [data.resize_shape(*shape, size, recipe.max_size) for shape, size in pairs]
    return objects, statistics.mean(map(math.prod, resized))


def describe_samples(recipe, objects, pixels):
    """Figure 2: images, instances and pixels that a run sees, beside pre-training and fine-tuning.

    objects and pixels of an image: `average_sample`. The paper counts 800 x 1333: the last column.
    """

    def seen(images, objects, pixels, counted):
        return images * np.array([1, objects, pixels, counted])

    # 100 epochs of ImageNet's images, 224 x 224, of one object each
    pre_training = seen(100 * 1.28e6, 1, 224**2, 224**2)
    fine_tuning = seen(16 * train.SCHEDULES["2x"], COCO_OBJECTS, 800 * 1067, 800 * 1333)
    rows = {
        "this run": seen(recipe.batch_size * recipe.iterations, objects, pixels, 800 * 1333),
        "ImageNet, 100 epochs": pre_training,
        "  + fine-tuning 2x": pre_training + fine_tuning,
    }
    title = "Samples seen (Figure 2)"
    lines = [f"{title:24}{'images':>10}{'instances':>11}{'pixels':>10}{'at 800x1333':>13}"]
    for name, row in rows.items():
        images, instances, ours, papers = row / (1e6, 1e6, 1e12, 1e12)
        counts = f"{images:>9.1f}M{instances:>10.1f}M{ours:>9.2f}T{papers:>12.2f}T"
        lines.append(f"{name:24}{counts}")
    return "\n".join(lines)


def time_steps(recipe, args, train_set, steps):
    """Seconds of a training step of one process: the median of so many."""
    _, _, device = evaluate.start_processes(args.device)
    still = replace(recipe, learning_rate=0.0)  # the weights stay as they are
    model, optimizer = train.start_model(still, args, None, train_set, device)
    loader = iter(train.make_loader(recipe, args, train_set, 0))
    seconds = []
    for _ in range(2 + steps):  # the first two warm up
        start = time.perf_counter()
        images, targets = train.to_device(*next(loader), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.amp):
            total = sum(model(images, targets).values())
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        total.item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def main(arguments=None):
    formats = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, **formats)
    parser.add_argument("--processes", type=int, default=1, help="of the run that is planned (1)")
    parser.add_argument("--steps", type=int, default=0, help="how many to time, in one process (0)")
    own, others = parser.parse_known_args(arguments)
    args = train.parse_arguments(others)
    recipe = train.make_recipe(args)
    batch, per_gpu = recipe.batch_size, recipe.images_per_gpu
    recipe = train.scale_to_batch(recipe, per_gpu * own.processes)
    train.check(recipe, args)

    of_paper, train_set = not recipe.paper.startswith("("), None
    is_coco = of_paper and not recipe.keypoints and not args.recipe.endswith("-voc")
    if args.data or own.steps or not is_coco:
        train_set, _ = train.make_datasets(recipe, args)
    images = len(train_set) if train_set else recipe.subset or COCO_IMAGES
    print(train.describe(recipe, args, own.processes, images))
    if recipe.batch_size != batch and batch % per_gpu == 0:
        print(f"          the recipe's own batch of {batch}: --processes {batch // per_gpu}")
    if of_paper:
        print(describe_samples(recipe, *average_sample(train_set, recipe)))
    if own.steps:
        seconds = time_steps(recipe, args, train_set, own.steps)
        total = tqdm.format_interval(seconds * recipe.iterations)
        each = f"{seconds:.2f} s a step of {per_gpu} images on this machine"
        print(f"Time      {each}, {total} for the whole run, evaluations not counted")


if __name__ == "__main__":
    sys.exit(evaluate.run_command("plan.py", main))
