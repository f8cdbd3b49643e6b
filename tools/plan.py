"""The plan of a run, before it is started: train.py --dry-run.

  python train.py --recipe r50-gn --dry-run                       needs no data
  python train.py --recipe small --data DIR --dry-run 10          times ten steps on this machine
  WORLD_SIZE=8 python train.py --recipe r50-gn --dry-run          the plan of eight processes

The plan has the iterations, the epochs, where the learning rate drops, and Figure 2 of the paper:
how many images, instances and pixels the run sees, beside ImageNet pre-training and fine-tuning.
"""

import math
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the five modules
import data
import evaluate
import train

# COCO train2017, for a plan without data: images with an object that is no crowd, annotated objects
# an image, and the commonest height and width.
COCO_IMAGES, COCO_OBJECTS, COCO_SHAPE = 117_266, 7.3, (480, 640)
STEPS_TO_WARM_UP = 2


def show_plan(recipe, args):
    """Print the plan of a run with as many processes as WORLD_SIZE says, otherwise with one.

    recipe: not scaled yet; args: train.py's. Raises UserError for a run that would be refused.
    """
    said = os.environ.get("WORLD_SIZE", "1")
    if not said.isdecimal() or int(said) < 1:
        raise data.UserError(f"WORLD_SIZE is {said!r}; it must be a number of processes.", code=2)
    world_size = int(said)
    if "RANK" not in os.environ:  # not torchrun's: it is for the plan alone
        os.environ.pop("WORLD_SIZE", None)
    own_batch = recipe.batch_size
    recipe = train.scale_to_batch(recipe, recipe.images_per_gpu * world_size)
    train.check(recipe, args)
    of_paper = not recipe.paper.startswith("(")
    images = sample = None
    if args.data is not None:
        train_set, _ = train.make_datasets(recipe, args)
        images = len(train_set)
        sample = average_sample(train_set, recipe.min_sizes, recipe.max_size)
    elif of_paper and not recipe.keypoints and not args.recipe.endswith("-voc"):
        images = recipe.subset or COCO_IMAGES
        shapes = [data.resize_shape(*COCO_SHAPE, s, recipe.max_size) for s in recipe.min_sizes]
        sample = COCO_OBJECTS, statistics.mean(map(math.prod, shapes))
    print(train.describe(recipe, args, world_size, images))
    if recipe.batch_size != own_batch and own_batch % recipe.images_per_gpu == 0:
        processes = own_batch // recipe.images_per_gpu
        print(
            f"          the recipe's batch of {own_batch} takes {processes} process(es) of "
            f"{recipe.images_per_gpu}: WORLD_SIZE={processes} shows that plan"
        )
    if sample and of_paper:
        print(describe_samples(recipe, *sample))
    if args.dry_run > 0:
        if args.data is None:
            raise data.UserError("To time steps, --dry-run STEPS needs --data.", code=2)
        seconds = time_steps(recipe, args, train_set)
        total = tqdm.format_interval(seconds * recipe.iterations)
        each = f" of each of the {world_size} processes, alike," if world_size > 1 else ""
        print(
            f"Time      {seconds:.2f} s a step of {recipe.images_per_gpu} images{each} on this "
            f"machine, {total} for the whole run, evaluations not counted"
        )


def average_sample(dataset, min_sizes, max_size):
    """What Figure 2 counts: objects an image, and pixels of an image as the loader makes it."""
    sizes = list(zip(dataset.heights.tolist(), dataset.widths.tolist()))
    shapes = [data.resize_shape(*size, least, max_size) for size in sizes for least in min_sizes]
    return dataset.num_objects / len(dataset), statistics.mean(map(math.prod, shapes))


def describe_samples(recipe, objects, pixels):
    """Figure 2: images, instances and pixels that a run sees, beside pre-training and fine-tuning.

    objects: instances an image; pixels: of a training image as the loader makes it. The paper
    counts every image as 800 x 1333: the last column.
    """

    def seen(images, objects, pixels, counted):
        return [images, images * objects, images * pixels, images * counted]

    # 100 epochs of ImageNet's images, 224 x 224, of one object each
    pre_training = seen(1.28e6 * 100, 1, 224**2, 224**2)
    fine_tuning = seen(train.SCHEDULES["2x"] * 16, COCO_OBJECTS, 800 * 1067, 800 * 1333)
    rows = {
        "this run": seen(recipe.iterations * recipe.batch_size, objects, pixels, 800 * 1333),
        "ImageNet, 100 epochs": pre_training,
        "  + fine-tuning 2x": [a + b for a, b in zip(pre_training, fine_tuning)],
    }
    title = "Samples seen (Figure 2)"
    lines = [f"{title:24}{'images':>10}{'instances':>11}{'pixels':>10}{'at 800x1333':>13}"]
    for name, (images, instances, ours, papers) in rows.items():
        lines.append(
            f"{name:24}{images / 1e6:>9.1f}M{instances / 1e6:>10.1f}M"
            f"{ours / 1e12:>9.2f}T{papers / 1e12:>12.2f}T"
        )
    return "\n".join(lines)


def time_steps(recipe, args, train_set):
    """Seconds of a training step of one process: the median of `args.dry_run` steps."""
    _, _, device = evaluate.start_processes(args.device)
    args.workers = 2 if args.workers is None else args.workers
    model, optimizer = train.start_model(recipe, args, None, train_set, device)
    loader = train.make_loader(recipe, args, train_set, 0)
    seconds = []
    for _ in range(STEPS_TO_WARM_UP + args.dry_run):
        start = time.perf_counter()
        images, targets = train.to_device(*next(loader), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.amp):
            total = sum(model(images, targets).values())
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(0, recipe) * group["rate"]
        optimizer.step()
        total.item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    loader.close()
    return statistics.median(seconds[STEPS_TO_WARM_UP:])
