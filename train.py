"""Training Mask R-CNN from random weights (or fine-tuning it): every experiment of the paper.

He, Girshick, Dollar, "Rethinking ImageNet Pre-training" (arXiv 1811.08883), Sec. 4 and 5.

  python train.py                                                 generated data, 6 minutes, no GPU
  torchrun --nproc-per-node 8 train.py --recipe r50-gn --schedule 6x --data coco      the paper's

In reading order: the recipes, the learning rate, the optimizer, checkpoints, the loop, the command
line. Training from random weights asks for two things: a normalization that works with small
batches (norms.py; the paper's fine-tuned models have it, too), and more iterations.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import signal
import statistics
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import evaluate
import model as detector
from evaluate import UsageError

# ------------------------------------------------------------------------------------------------
# Recipes
# ------------------------------------------------------------------------------------------------

# "1x" is 90,000 iterations of 16 images: 12.3 epochs of COCO train2017.
SCHEDULES = {f"{n}x": n * 90_000 for n in range(1, 12)}
# train2017, of which a plan without data speaks: images with an object that is no crowd, annotated
# objects an image, and the commonest height and width.
COCO_IMAGES, COCO_OBJECTS, COCO_SHAPE = 117_266, 7.3, (480, 640)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One experiment. The defaults: the paper's baseline, R50-FPN with GN, random weights, 6x."""

    # Sec. 4 "Architecture"
    backbone: str = "resnet50"
    norm: str = "gn"
    masks: bool = True
    keypoints: int = 0  # how many
    cascade_iterations: int = 0  # so many last iterations as a cascade; 0: none
    model: dict = dataclasses.field(default_factory=dict)  # further arguments of build_model
    freeze_at: int = 0  # with random weights nothing may be frozen
    freeze_at_pretrained: int = 2  # stem and res2, the default of Detectron's GN baselines

    # Sec. 4 "Learning rate scheduling"
    iterations: int = SCHEDULES["6x"]  # from random weights
    iterations_pretrained: int = SCHEDULES["2x"]
    one_x: int = SCHEDULES["1x"]  # iterations that --schedule counts in
    tails: tuple = (60_000, 20_000)  # the last iterations, at reduced rates, *whatever the total*
    tails_pretrained: tuple = (60_000, 20_000)
    drop_factor: float = 0.1  # of the rate at the beginning of each tail

    # Sec. 4 "Hyper-parameters"
    batch_size: int = 16  # images of all GPUs together, for which the numbers here hold
    images_per_gpu: int = 2
    learning_rate: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    bias_rate: float = 2.0  # biases and betas learn at twice the rate, without decay (Detectron)
    warmup_iterations: int = 500  # linear, from a third of the rate (Detectron)
    warmup_factor: float = 1 / 3
    clip_gradient: float = 0.0  # largest gradient norm; 0: no clipping, as in the paper
    amp: bool = False  # convolutions and matrix products in bfloat16; not the paper's
    compile: bool = False  # torch.compile, for CUDA: fuses norms, ReLUs and additions

    classify: bool = False  # pre-train the backbone on single shapes, the toy's ImageNet
    subset: int | None = None  # how many of the training images are used; None: all

    # Images: shorter side (one of these is drawn for each image) and longest side allowed
    min_sizes: tuple = (800,)
    max_size: int = 1333
    test_size: int = 800
    flip: bool = True  # the mirror image, with probability 1/2

    # Running it
    eval_every: int = 30_000  # iterations of batch_size images
    checkpoint_every: int = 2_500  # the same
    log_every: int = 20  # iterations of whatever size

    paper: str = ""  # the paper's AP, shown by --list


# Train-time scale augmentation (Sec. 5.1): one of these shorter sides for each image; multiples of
# 32 as in Detectron. COCO's subsets (Sec. 5.2) have the wider range.
AUGMENTED = tuple(range(640, 801, 32))
AUGMENTED_MORE = tuple(range(512, 801, 32))


def ninths(iterations):
    """Tails in 6x's own proportions, for runs that are shorter than 6x's tails."""
    return (iterations // 9, iterations // 27)


def small(subset, random, pretrained, paper):
    """A row of Sec. 5.2: few images, the rates and sizes that the paper found for 35k of them.

    The paper says totals for 10k images; those for 3.5k and 1k are ours, and all drops.
    """
    return Recipe(
        subset=subset,
        iterations=random,
        iterations_pretrained=pretrained,
        tails=ninths(random),
        tails_pretrained=ninths(pretrained),
        learning_rate=0.04,
        drop_factor=0.02,
        min_sizes=AUGMENTED_MORE,
        paper=paper,
    )


# Sec. 5.1 "Enhanced baselines"
ENHANCED = {
    "min_sizes": AUGMENTED,
    "iterations": SCHEDULES["9x"],
    "iterations_pretrained": SCHEDULES["6x"],
}
# Class-agnostic from the start: the stages of a cascade hand on one box for each RoI, so stage 1
# must have learnt one to survive the switch.
CASCADE = {"cascade_iterations": 270_000, "model": {"box_class_agnostic": True}}
X152 = {"backbone": "resnext152_8x32d", **ENHANCED}

# The whole path in six minutes on two CPU cores: generated shapes and a narrow network through the
# same code.
TOY_MODEL = {
    "blocks": (1, 1, 1, 1),
    "stem_width": 32,
    "width_per_group": 32,
    "fpn_channels": 64,
    "box_head_channels": 64,
    "box_head_fc_channels": 256,
    "mask_head_channels": 64,
    "keypoint_head_channels": 64,
    "anchor_sizes": ((16,), (32,), (64,), (128,), (256,)),
    "rpn_pre_nms_top_n_train": 500,
    "rpn_post_nms_top_n_train": 250,
    "rpn_pre_nms_top_n_test": 500,
    "rpn_post_nms_top_n_test": 250,
    "box_batch_size_per_image": 32,
    "roi_sampling_ratio": 1,
}
TOY = Recipe(
    model=TOY_MODEL,
    iterations=1250,
    iterations_pretrained=500,
    one_x=250,
    tails=(220, 80),
    tails_pretrained=(220, 80),
    batch_size=4,
    images_per_gpu=4,
    learning_rate=0.05,
    warmup_iterations=50,
    min_sizes=(128,),
    max_size=213,
    test_size=128,
    eval_every=1250,
    checkpoint_every=250,
    log_every=10,
    paper="(generated data)",
)

# Every row states only what it changes; --list prints them. AP is bbox / mask.
RECIPES = {
    "toy": TOY,
    "toy-syncbn": replace(TOY, norm="syncbn"),
    # The backbone alone, classifying shapes; then --init runs/toy-pretrain/checkpoint_0000600.pth
    "toy-pretrain": replace(
        TOY, classify=True, iterations=600, batch_size=64, images_per_gpu=64, learning_rate=0.02
    ),
    "toy-cascade": replace(
        TOY, cascade_iterations=416, model=TOY_MODEL | {"box_class_agnostic": True}
    ),
    # the heatmaps' loss is ln 3136 at first and its eight layers have no norm: a lower rate
    "toy-keypoints": replace(TOY, masks=False, keypoints=17, learning_rate=0.02),
    "toy-vgg": replace(
        TOY,
        backbone="vgg16",
        norm="none",
        masks=False,
        model={
            "stem_width": 16,
            "anchor_sizes": ((16, 32, 64, 128),),
            "box_head_fc_channels": 256,
            "box_batch_size_per_image": 64,
        },
    ),
    # Tables 1 and 2, Figures 1 and 3
    "r50-gn": Recipe(paper="6x random 41.3 / 36.6, pre-trained 41.1 / 36.4"),
    "r101-gn": Recipe(backbone="resnet101", paper="6x random 42.7 / 37.6, pre-trained 42.3 / 37.2"),
    # Figure 4
    "r50-syncbn": Recipe(norm="syncbn", paper="Figure 4's curves"),
    # Figure 5 and Table 3: enhanced baselines
    "r50-gn-aug": Recipe(**ENHANCED, paper="a bar of Figure 5"),
    "r101-gn-aug": Recipe(backbone="resnet101", **ENHANCED, paper="random 45.0 / 39.5"),
    "r50-gn-aug-cascade": Recipe(
        **ENHANCED, **CASCADE, paper="with --tta: random mask 41.6, pre-trained 40.9"
    ),
    "r101-gn-aug-cascade": Recipe(
        backbone="resnet101",
        **ENHANCED,
        **CASCADE,
        paper="random about 47.4 / 40.5; with --tta: mask 42.5, pre-trained 41.9",
    ),
    "x152-gn-aug": Recipe(**X152, paper="random 46.4 / 40.5"),
    "x152-gn-aug-cascade": Recipe(
        **X152,
        **CASCADE,
        paper="random 48.6 / 41.4; with --tta 50.9 / 43.2, pre-trained 50.3 / 42.5",
    ),
    # Figure 6: keypoints (Detectron trains them with scale jitter)
    "r50-gn-keypoints": Recipe(
        masks=False,
        keypoints=17,
        iterations=SCHEDULES["2x"],
        min_sizes=AUGMENTED,
        paper="2x keypoint AP: random 65.6, pre-trained 65.5",
    ),
    # Sec. 5.1 "Models without BN/GN": Faster R-CNN, no FPN
    "vgg16": Recipe(
        backbone="vgg16",
        norm="none",
        masks=False,
        iterations=SCHEDULES["11x"],
        iterations_pretrained=SCHEDULES["9x"],
        min_sizes=AUGMENTED,
        paper="bbox: random 35.2, pre-trained 35.6",
    ),
    # Sec. 5.2, Figures 7 and 8: less data
    "r50-gn-35k": Recipe(
        subset=35_000,
        iterations=SCHEDULES["9x"],
        iterations_pretrained=SCHEDULES["6x"],
        learning_rate=0.04,
        drop_factor=0.02,
        min_sizes=AUGMENTED_MORE,
        paper="bbox: random 36.3, pre-trained 36.3",
    ),
    "r50-gn-10k": small(10_000, 220_000, 60_000, "bbox: random 25.9, pre-trained 26.0"),
    "r50-gn-3.5k": small(3_500, 100_000, 30_000, "bbox: random 9.3, pre-trained 16.0"),
    "r50-gn-1k": small(1_000, 40_000, 10_000, "bbox: random 3.5, pre-trained 9.9"),
    # Sec. 5.2: PASCAL VOC, Faster R-CNN, trainval2007 + train2012, tested on val2012
    "r101-gn-voc": Recipe(
        backbone="resnet101",
        masks=False,
        iterations=144_000,
        iterations_pretrained=18_000,
        tails=ninths(144_000),
        tails_pretrained=ninths(18_000),
        min_sizes=AUGMENTED,
        paper="mAP at IoU 0.5: random 77.6, pre-trained 82.7",
    ),
}


def scale_to_batch(recipe, batch_size):
    """The recipe for another batch size, by the linear scaling rule (Goyal et al., 2017).

    The rate is multiplied by batch / recipe's batch and what is counted in iterations is divided by
    it, so that the number of images seen stays the same. Only the warm-up is never shortened: at
    twice the rate, half of it would be four times as steep. The `_pretrained` fields stay:
    `make_recipe` has put them in place before.
    """
    ratio = batch_size / recipe.batch_size

    def scaled(iterations):
        return max(1, round(iterations / ratio))

    return replace(
        recipe,
        batch_size=batch_size,
        learning_rate=recipe.learning_rate * ratio,
        iterations=scaled(recipe.iterations),
        tails=tuple(scaled(tail) for tail in recipe.tails),
        cascade_iterations=recipe.cascade_iterations and scaled(recipe.cascade_iterations),
        one_x=scaled(recipe.one_x),
        warmup_iterations=max(recipe.warmup_iterations, scaled(recipe.warmup_iterations)),
        eval_every=scaled(recipe.eval_every),
        checkpoint_every=scaled(recipe.checkpoint_every),
    )


def check(recipe, from_random):
    """Refuse what cannot work, before anything is run. Raises UsageError."""
    if from_random and recipe.norm == "frozen_bn":
        raise UsageError(
            "Frozen BN cannot be trained from random weights: it applies the statistics of a "
            "pre-trained model, which there is not (Sec. 3.1); use --norm gn or syncbn, or "
            "--init PATH."
        )
    if from_random and recipe.freeze_at > 0:
        raise UsageError(
            f"freeze_at {recipe.freeze_at} would keep the first layers at their random weights for "
            "ever (Sec. 3.1; it costs Detectron 3.3 AP); use --freeze-at 0, or --init PATH."
        )
    if recipe.iterations < recipe.tails[0]:
        raise UsageError(
            f"{recipe.iterations:,} iterations are fewer than the tail of {recipe.tails[0]:,} that "
            "are to run at the reduced learning rates; choose a longer schedule."
        )
    if recipe.iterations < recipe.cascade_iterations:
        raise UsageError(
            f"{recipe.iterations:,} iterations are fewer than the {recipe.cascade_iterations:,} "
            "that are to run as a cascade; choose a longer schedule."
        )
    if recipe.warmup_iterations > recipe.iterations - recipe.tails[0]:
        raise UsageError(
            f"The warm-up of {recipe.warmup_iterations:,} iterations would not end before the rate "
            f"drops at {recipe.iterations - recipe.tails[0]:,}; choose a longer schedule."
        )


# ------------------------------------------------------------------------------------------------
# Learning rate and optimizer
# ------------------------------------------------------------------------------------------------


def learning_rate(iteration, recipe):
    """The rate of step `iteration` (from 0): linear warm-up, then constant, then the tails.

    Sec. 4: "we always reduce the learning rate by 10x in the last 60k and last 20k iterations
    respectively, no matter how many total iterations". 6x: 0.02 at 479,999 and 0.002 at 480,000.
    Long schedules so spend their additional iterations at the full rate. `recipe`: scaled to the
    batch already.
    """
    rate = recipe.learning_rate
    for tail in recipe.tails:
        if recipe.iterations - iteration <= tail:
            rate *= recipe.drop_factor
    if iteration < recipe.warmup_iterations:
        progress = iteration / recipe.warmup_iterations
        rate *= recipe.warmup_factor * (1 - progress) + progress
    return rate


def make_optimizer(model, recipe):
    """SGD with Detectron's three groups of parameters; "rate" multiplies the learning rate.

    weights: decayed. Gammas of norms: not decayed, as that would pull the output of a layer to 0
    instead of regularizing the convolution before it, whose scale the norm removes. Biases and
    betas: twice the rate, not decayed.
    """
    norms = (nn.GroupNorm, nn.BatchNorm2d)  # norms.py's trained layers derive from these two
    of_norms = {m.weight for m in model.modules() if isinstance(m, norms)}
    weights, gammas, biases = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith(".bias"):
            biases.append(parameter)
        elif parameter in of_norms:
            gammas.append(parameter)
        else:
            weights.append(parameter)
    groups = [
        {"params": weights, "rate": 1.0, "weight_decay": recipe.weight_decay},
        {"params": gammas, "rate": 1.0, "weight_decay": 0.0},
        {"params": biases, "rate": recipe.bias_rate, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum)


# ------------------------------------------------------------------------------------------------
# Checkpoints and the log
# ------------------------------------------------------------------------------------------------


def momentum_of(model, optimizer):
    """SGD's momentum by parameter name, so that it fits a model that has grown to a cascade."""
    state = optimizer.state
    return {
        name: state[p]["momentum_buffer"]
        for name, p in model.named_parameters()
        if p in state and state[p].get("momentum_buffer") is not None
    }


def set_momentum(model, optimizer, momentum):
    """The inverse of `momentum_of`; parameters that it does not name start without momentum."""
    for name, parameter in model.named_parameters():
        if name in momentum:
            buffer = momentum[name].to(parameter.device, copy=True)
            optimizer.state[parameter]["momentum_buffer"] = buffer


def checkpoint_path(out, iteration):
    return Path(out) / f"checkpoint_{iteration:07d}.pth"


def iteration_of(path):
    return int(path.stem.removeprefix("checkpoint_"))


def checkpoints_in(out):
    """Paths of the complete checkpoints of a run, oldest first."""
    paths = Path(out).glob("checkpoint_*.pth")
    numbered = [path for path in paths if path.stem.removeprefix("checkpoint_").isdecimal()]
    return sorted(numbered, key=iteration_of)


class Stopped(Exception):
    """The run ends early and in order; the message says why. `code` is the exit code."""

    def __init__(self, message, code):
        super().__init__(message)
        self.code = code


def save_checkpoint(path, checkpoint):
    """Write atomically: a file of that name is always complete, whatever dies at whatever moment.

    Raises Stopped when it cannot be written; earlier checkpoints stay as they are.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)  # the renaming itself, should the machine die
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch.save's own writer raises RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink()
        cause = error if isinstance(error, OSError) else error.__context__
        reason = getattr(cause, "strerror", None) or str(error).splitlines()[0]
        raise Stopped(
            f"The checkpoint {path} could not be written ({reason}); the ones before it are "
            "intact: make room and --resume.",
            code=1,
        ) from None


def milestones(recipe, last):
    """Iterations whose checkpoints are kept for good; `last` is the run's end.

    Where the rate drops, where shorter schedules leave this one (they share it until their own
    first drop), the switch to the cascade, the end.
    """
    drops = {recipe.iterations - tail for tail in recipe.tails}
    shorter = range(recipe.one_x, recipe.iterations, recipe.one_x)
    branches = {iterations - recipe.tails[0] for iterations in shorter}
    return drops | branches | {recipe.iterations - recipe.cascade_iterations, last}


def prune(out, iteration, kept):
    """Leave the last two checkpoints of a run that is at `iteration`, and those of `kept`."""
    for path in checkpoints_in(out):
        # Left by a resume with a larger batch: there, the same images are fewer iterations.
        if iteration_of(path) > iteration:
            path.rename(path.with_suffix(".replaced"))
    for path in checkpoints_in(out)[:-2]:
        if iteration_of(path) not in kept:
            path.unlink()


class Log:
    """OUT/log.jsonl: a line of JSON per logged step and per evaluation. Only rank 0 has one."""

    def __init__(self, path, images):
        """Keep what was logged before the checkpoint at `images` images; later records come again.

        Images, not iterations: those of a run that is resumed with another batch are others.
        """
        self.path = path
        kept = []
        for line in path.read_text().splitlines() if path.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed run
                record = json.loads(line)
                is_step = "loss" in record  # before the checkpoint; an evaluation comes after it
                if record["images"] < images or (is_step and record["images"] == images):
                    kept.append(line + "\n")
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, path)

    def write(self, record):
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")

    def sync(self):
        """Onto the disk, before a checkpoint says that these records need not come again."""
        if self.path.exists():
            with open(self.path, "a") as file:
                os.fsync(file.fileno())


# ------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------


class StopRequest:
    """SIGTERM and SIGINT as a flag that the loop reads; a second SIGINT interrupts at once."""

    def __init__(self):
        self.name = None

    def __enter__(self):
        self.before = {
            number: signal.signal(number, self.handle) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        self.name = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclasses.dataclass
class Run:
    """What `train` is told beside the recipe: the command line's settings of one run."""

    name: str  # the recipe's
    settings: dict  # the recipe, before it was scaled to the batch
    data: str | None  # folder with the data set
    out: str  # folder for checkpoints, log and pictures
    init: str  # "random", or a file of weights
    seed: int
    workers: int  # loading processes
    stop: int | None = None  # end after so many iterations, the schedule unchanged
    resume: dict | None = None  # the checkpoint to continue from, and its "path"
    stop_request: StopRequest = dataclasses.field(default_factory=StopRequest)


def to_device(images, targets, device):
    """A batch of the loader on the device; what is no tensor stays as it is."""
    images = [image.to(device, non_blocking=True) for image in images]
    targets = [
        {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in target.items()}
        for target in targets
    ]
    return images, targets


def peak_memory(device):
    """The largest memory use so far in MiB: of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def make_datasets(recipe, root):
    """Training and validation set below the folder `root`."""
    kind = {"masks": recipe.masks, "keypoints": bool(recipe.keypoints)}
    train_set = data.open_split(root, "train2017", training=True, subset=recipe.subset, **kind)
    return train_set, data.open_split(root, "val2017", **kind)


def make_model(recipe, num_classes, cascade=False):
    """The recipe's model with random weights (every process has seeded torch alike)."""
    return detector.build_model(
        recipe.backbone,
        recipe.norm,
        num_classes,
        masks=recipe.masks,
        keypoints=recipe.keypoints,
        cascade=cascade,
        freeze_at=recipe.freeze_at,
        **recipe.model,
    )


def start_model(recipe, run, train_set, device, verbose):
    """The model and its optimizer as the run starts with them: random, pre-trained or resumed."""
    cascade = bool(run.resume) and run.resume["model_config"]["cascade"]
    model = make_model(recipe, len(train_set.classes), cascade)
    model.data_settings = {
        "min_size": recipe.test_size,
        "max_size": recipe.max_size,
        "classes": train_set.classes,
        "category_ids": train_set.category_ids,
    }
    if run.resume:
        detector.fill(model, run.resume["model"], unused=[], path=run.resume["path"], verbose=False)
    elif run.init != "random":
        detector.load_weights(model, run.init, verbose)
    model.to(device).train()
    optimizer = make_optimizer(model, recipe)
    if run.resume:
        set_momentum(model, optimizer, run.resume["momentum"])
        del run.resume["model"], run.resume["momentum"]  # gigabytes that the run would carry along
    return model, optimizer


def grow_to_cascade(model, optimizer, recipe):
    """The model as a three-stage cascade, with an optimizer for it (Sec. 5.1 "Enhanced baselines").

    Stages 2 and 3 start as copies of stage 1; momentum is kept for everything but them.
    """
    grown = make_model(recipe, model.config["num_classes"], cascade=True)
    state = model.state_dict()
    for name in list(state):
        if name.startswith("box_heads.0."):
            for stage in (1, 2):
                state[name.replace("box_heads.0", f"box_heads.{stage}")] = state[name]
    grown.load_state_dict(state)
    grown.data_settings = model.data_settings
    grown.to(model.image_mean.device).train()
    grown_optimizer = make_optimizer(grown, recipe)
    set_momentum(grown, grown_optimizer, momentum_of(model, optimizer))
    return grown, grown_optimizer


def describe_schedule(recipe, run, world_size, num_images):
    """The plan as text: iterations, epochs, where the rate drops, the batch and its scaling."""
    drops = [recipe.iterations - tail for tail in recipe.tails]
    rates = ", ".join(f"{learning_rate(drop, recipe):.3g} from {drop:,}" for drop in drops)
    epochs = ""
    if num_images:
        count = recipe.iterations * recipe.batch_size / num_images
        epochs = f": {count:.1f} epochs of {num_images:,} images"
    own = RECIPES[run.name].batch_size
    if recipe.batch_size == own:
        scaling = ", the recipe's own batch"
    else:
        ratio = recipe.batch_size / own
        scaling = (
            f": {ratio:g} of the recipe's {own}, so the rate is multiplied and the numbers of "
            f"iterations are divided by {ratio:g}"
        )
    lines = [
        f"Schedule  {recipe.iterations:,} iterations of {recipe.batch_size} images{epochs}",
        f"Rate      {recipe.learning_rate:.3g}, {rates}; "
        f"linear warm-up over {recipe.warmup_iterations:,}",
        f"Batch     {world_size} process{'es' if world_size > 1 else ''} x "
        f"{recipe.images_per_gpu} images{scaling}",
    ]
    if recipe.cascade_iterations:
        switch = recipe.iterations - recipe.cascade_iterations
        lines.append(f"Cascade   from iteration {switch:,}")
    counted = {"bn": recipe.images_per_gpu, "syncbn": recipe.batch_size}.get(recipe.norm, 16)
    if counted < 16:
        lines.append(
            f"Norm      {recipe.norm} has the statistics of {counted} images only, the paper's "
            "SyncBN those of 16: expect less, or use --norm gn"
        )
    if run.stop is not None and run.stop < recipe.iterations:
        lines.append(
            f"Stops     after iteration {run.stop:,} (--iterations), the schedule unchanged"
        )
    return "\n".join(lines)


def describe_samples(recipe, objects, pixels):
    """Figure 2: images, instances and pixels that a run sees, beside pre-training and fine-tuning.

    objects: instances an image; pixels: of a training image as the loader makes it. The paper
    counts every image as 800 x 1333: the last column.
    """

    def seen(images, objects, pixels, counted):
        return [images, images * objects, images * pixels, images * counted]

    # 100 epochs of ImageNet's images, 224 x 224, of one object each
    pre_training = seen(1.28e6 * 100, 1, 224**2, 224**2)
    fine_tuning = seen(2 * SCHEDULES["1x"] * 16, COCO_OBJECTS, 800 * 1067, 800 * 1333)
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


def print_header(recipe, run, model, train_set, val_set, world_size, device):
    """What is going to happen, in a few lines."""
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    start = "random weights" if run.init == "random" else run.init
    frozen = f", first {recipe.freeze_at} stages frozen" if recipe.freeze_at else ""
    print(
        f"{run.name}: {recipe.backbone} {recipe.norm}, {parameters:.1f} M parameters, "
        f"from {start}{frozen}"
    )
    print(describe_schedule(recipe, run, world_size, len(train_set)))
    print(
        f"Data      {run.data}: {len(train_set):,} training images ({train_set.num_dropped:,} "
        f"without a usable object left out), {len(train_set.classes)} classes, "
        f"{len(val_set):,} validation images"
    )
    if run.resume:
        there = run.resume
        print(f"Resumes   {there['path']}, after iteration {there['iteration']:,}")
        if (there["batch_size"], there["world_size"]) != (recipe.batch_size, world_size):
            print(
                f"          written by {there['world_size']} process(es) with "
                f"{there['batch_size']} images a batch: the images seen, the rate and the weights "
                "continue; which images share a batch, and so the weights from here on, are no "
                "longer those of an undisturbed run"
            )
        if there.get("num_images", len(train_set)) != len(train_set):
            print(
                f"          written with {there['num_images']:,} training images: the order of all "
                "images is another one from here on"
            )
    print(
        f"Device    {device}, torch {torch.__version__}, seed {run.seed}; "
        f"everything goes to {run.out}"
    )


def compile_parts(model):
    """torch.compile what has a fixed graph: the parts with convolutions, for images of any size."""
    heads = [*model.box_heads, *filter(None, [model.mask_head, model.keypoint_head])]
    for part in filter(None, [model.backbone, model.fpn, *(head.convs for head in heads)]):
        part.compile(dynamic=True)


def wrap(model, recipe, device, world_size):
    """DDP where there are several processes: `backward` averages the gradients over them.

    All start with the same weights (DDP makes sure of it); no step broadcasts buffers.
    """
    if recipe.compile:
        compile_parts(model)
    if world_size == 1:
        return model
    ids = [device.index] if device.type == "cuda" else None
    with warnings.catch_warnings():
        # The newest torch renames broadcast_buffers, to a name that older ones do not know.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )


class Alarm:
    """What all processes must agree on after a step: is a loss not finite, is the run to stop.

    The flags are read one step late, when they have long arrived: waiting for them at once would
    leave a GPU idle. A bad step does change the weights, but those are never saved or evaluated.
    """

    def __init__(self):
        self.flags = None

    def set(self, iteration, losses, total, targets, stop_requested, world_size):
        self.own_finite = torch.isfinite(total.detach())
        stop_requested = torch.full_like(self.own_finite, stop_requested)
        flags = torch.stack([~self.own_finite, stop_requested]).float()
        if world_size > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        # To pinned memory, with a mark behind it: the next forward pass is not waited for.
        self.flags = flags.to("cpu", non_blocking=True)
        self.arrived = torch.cuda.current_stream().record_event() if flags.is_cuda else None
        image_ids = [target.get("image_id") for target in targets]
        self.step = iteration, {k: v.detach() for k, v in losses.items()}, image_ids

    def read(self):
        """Whether to stop; raises Stopped if a loss of the step was not finite on any process."""
        if self.flags is None:
            return False
        if self.arrived:
            self.arrived.synchronize()
        not_finite, stop = self.flags.tolist()
        if not_finite and not self.own_finite:
            iteration, losses, image_ids = self.step
            values = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
            ids = ", ".join(map(str, image_ids))
            raise Stopped(
                f"The loss of step {iteration} is not finite ({values}) on images {ids}; the last "
                "checkpoint is from before; look at these images, or lower the learning rate.",
                code=1,
            )
        if not_finite:
            raise Stopped("Another process met a loss that is not finite.", code=1)
        return bool(stop)


def train(recipe, run, rank=0, world_size=1, device=torch.device("cpu")):  # noqa: B008
    """Train by `recipe`, which is scaled to the batch already; returns the final metrics.

    Raises data.DataError, model.WeightsError, UsageError and Stopped, each with a sentence for the
    user.
    """
    main = rank == 0
    out = Path(run.out)
    torch.manual_seed(run.seed)  # the same initial weights on every process

    train_set, val_set = make_datasets(recipe, run.data)
    if run.resume and run.resume["data"]["classes"] != train_set.classes:
        raise UsageError(
            f"{run.resume['path']} was trained on other classes than those of {run.data}; give the "
            "same --data, or another --out."
        )
    model, optimizer = start_model(recipe, run, train_set, device, verbose=main)
    iteration = first_image = 0
    if run.resume:
        # With another batch size: as many iterations of it as make the images seen so far.
        first_image = run.resume["iteration"] * run.resume["batch_size"]
        iteration = first_image // recipe.batch_size
    ddp = wrap(model, recipe, device, world_size)

    last = recipe.iterations if run.stop is None else min(run.stop, recipe.iterations)
    if last < iteration:
        raise UsageError(
            f"--iterations {last:,} is before the checkpoint to resume from, {iteration:,}."
        )
    if main:
        out.mkdir(parents=True, exist_ok=True)
        log = Log(out / "log.jsonl", first_image)
        print_header(recipe, run, model, train_set, val_set, world_size, device)
    loader = data.training_loader(
        train_set,
        recipe.images_per_gpu,
        run.seed,
        rank,
        world_size,
        run.workers,
        start_iteration=iteration,
        first_image=first_image,
        min_sizes=recipe.min_sizes,
        max_size=recipe.max_size,
        flip=recipe.flip,
    )

    kept = milestones(recipe, last)
    if run.resume and run.resume["batch_size"] != recipe.batch_size:
        # those of the other batch, whose iterations are other ones
        kept |= {iteration_of(path) for path in checkpoints_in(out)}

    # These functions see the iteration and the model of the moment, also after the switch.

    def agree_on_buffers():
        """BN's running statistics are each process's own: rank 0's are evaluated and kept."""
        if world_size > 1 and recipe.norm == "bn":
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def save():
        checkpoint = {
            "model_config": model.config,
            "model": model.state_dict(),
            "momentum": momentum_of(model, optimizer),
            "data": model.data_settings,
            "recipe": run.settings | {"name": run.name},
            "iteration": iteration,
            "batch_size": recipe.batch_size,
            "world_size": world_size,
            "num_images": len(train_set),
            "seed": run.seed,
            "versions": {"python": sys.version.split()[0]}
            | {module.__name__: str(module.__version__) for module in (torch, torchvision, np)},
        }
        log.sync()
        save_checkpoint(checkpoint_path(out, iteration), checkpoint)
        prune(out, iteration, kept)

    def evaluate_now():
        metrics = evaluate.evaluate(
            model, val_set, out, rank, world_size, workers=run.workers, progress=main
        )
        model.train()
        if main:
            log.write({"iteration": iteration, "images": iteration * recipe.batch_size, **metrics})
            for kind, values in metrics.items():
                values = "  ".join(f"{k} {v:.1f}" for k, v in values.items() if v is not None)
                tqdm.write(f"iteration {iteration:,}  {kind}: {values}")
        return metrics

    alarm = Alarm()
    metrics = None
    logged_at, logged_time = iteration, time.perf_counter()
    progress = tqdm(total=last, initial=iteration, disable=not main, unit="it", dynamic_ncols=True)
    with contextlib.closing(loader), progress as bar:  # whatever happens, no worker stays behind
        while True:
            # First, so that a run killed while it evaluates comes back here from its checkpoint.
            if iteration > 0 and (iteration % recipe.eval_every == 0 or iteration == last):
                alarm.read()  # never evaluate weights that a loss has ruined
                agree_on_buffers()
                metrics = evaluate_now()
                logged_at, logged_time = iteration, time.perf_counter()
            if iteration >= last:
                break
            remaining = recipe.iterations - iteration
            # (never without a cascade: then cascade_iterations is 0)
            if remaining <= recipe.cascade_iterations and not model.config["cascade"]:
                model, optimizer = grow_to_cascade(model, optimizer, recipe)
                ddp = wrap(model, recipe, device, world_size)

            rate = learning_rate(iteration, recipe)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["rate"]
            images, targets = to_device(*next(loader), device)
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.amp):
                losses = ddp(images, targets)
            total = sum(losses.values())
            stop = alarm.read()  # of the step before; a GPU is busy with the forward pass meanwhile
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            if recipe.clip_gradient > 0:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_gradient)
            optimizer.step()
            stop_requested = run.stop_request.name is not None
            alarm.set(iteration, losses, total, targets, stop_requested, world_size)
            iteration += 1
            bar.update()

            if iteration % recipe.log_every == 0 or iteration == last:
                values = torch.stack([total.detach(), *(v.detach() for v in losses.values())])
                if world_size > 1:
                    dist.all_reduce(values)
                    values /= world_size
                values = {k: round(v, 6) for k, v in zip(["loss", *losses], values.tolist())}
                now = time.perf_counter()
                speed = (iteration - logged_at) * recipe.batch_size / (now - logged_time)
                logged_at, logged_time = iteration, now
                if main:
                    memory = peak_memory(device)
                    machine = {"images_per_second": round(speed, 3), "peak_memory_mb": memory}
                    images_seen = iteration * recipe.batch_size
                    record = {"iteration": iteration, "images": images_seen, "lr": rate}
                    log.write(record | values | machine)
                    bar.set_postfix_str(f"loss {values['loss']:.3f}, {speed:.1f} images/s")

            due = iteration % recipe.checkpoint_every == 0 or iteration % recipe.eval_every == 0
            if stop or due or iteration in kept:  # before an evaluation too
                stop = alarm.read() or stop  # now of this step: an evaluation takes minutes
                agree_on_buffers()
                if main:
                    save()
            if stop:
                name = run.stop_request.name or "another process's signal"
                raise Stopped(
                    f"Stopped by {name} after step {iteration:,}; --resume continues.", code=0
                )
    if main:
        evaluate.save_pictures(model, val_set, out / "pictures", count=8)
        print()
        print(evaluate.format_table(metrics))
        print(f"\nWeights:  {checkpoint_path(out, iteration)}")
        print(f"Log:      {out / 'log.jsonl'}")
        print(f"Pictures: {out / 'pictures'}")
    return metrics


def pretrain(recipe, run, device):
    """Pre-train the backbone as on ImageNet, on single shapes instead, for Figure 1 in miniature.

    Average pooling and a linear classifier on res5; the checkpoint, for --init, has the backbone.
    """
    out = Path(run.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(run.seed)
    model = make_model(recipe, len(data.TOY_CATEGORIES))
    classifier = nn.Linear(model.backbone.channels[-1], len(data.TOY_CATEGORIES))
    network = nn.ModuleDict({"backbone": model.backbone, "classifier": classifier}).to(device)
    model.to(device).train()
    optimizer = make_optimizer(network, recipe)
    last = recipe.iterations if run.stop is None else min(run.stop, recipe.iterations)
    held_out = 500
    patches = data.ToyPatches(held_out + last * recipe.batch_size, run.seed)

    def classify(images):  # uint8 [B, 3, 64, 64]
        features = model.backbone(model.batch(images.to(device))[0])[-1]
        return classifier(features.mean(dim=(2, 3)))

    batches = torch.utils.data.DataLoader(
        torch.utils.data.Subset(patches, range(held_out, len(patches))),
        recipe.batch_size,
        num_workers=run.workers,
    )
    print(f"{run.name}: {last:,} iterations of {recipe.batch_size} single shapes")
    bar = tqdm(batches, unit="it", dynamic_ncols=True)
    for iteration, (images, labels) in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(iteration, recipe) * group["rate"]
        loss = nn.functional.cross_entropy(classify(images), labels.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if iteration % recipe.log_every == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        images, labels = zip(*(patches[i] for i in range(held_out)))
        right = classify(torch.stack(images)).argmax(dim=1).cpu() == torch.tensor(labels)
    weights = {n: t for n, t in model.state_dict().items() if n.startswith(("backbone.", "image_"))}
    checkpoint = {"model_config": model.config, "model": weights, "data": model.data_settings}
    save_checkpoint(checkpoint_path(out, last), checkpoint)
    print(f"Accuracy on {held_out} other shapes: {100 * right.float().mean():.1f} %")
    print(f"Backbone: {checkpoint_path(out, last)}")


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return value


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        description="Train Mask R-CNN from random weights. Without arguments: the recipe toy, on "
        "data that is generated first. Under torchrun: on all the processes that it starts.",
    )
    add = parser.add_argument
    # fmt: off
    add("--recipe", default="toy", metavar="R", help="which experiment; --list shows them (toy)")
    add("--schedule", metavar="Nx",
        help="length in units of the recipe's 1x (on COCO 90k iterations), 1x to 11x (default: the "
        "recipe's)")
    add("--data", metavar="DIR",
        help="folder in COCO's layout: annotations/instances_train2017.json, train2017/, ... "
        "(default: generated data, for the toy recipes)")
    add("--out", metavar="DIR",
        help="folder for checkpoints, log and pictures (default: runs/RECIPE)")
    add("--init", default="random", metavar="random|PATH",
        help="random weights, or a file of weights to fine-tune")
    add("--norm", choices=["gn", "syncbn", "bn", "frozen_bn"],
        help="another normalization than the recipe's")
    add("--freeze-at", type=int, metavar="N",
        help="train nothing in the first N of stem, res2, res3, ... "
        "(default: 0 from random weights, 2 when fine-tuning)")
    add("--stride-in-1x1", type=int, choices=(0, 1),
        help="1: bottlenecks with the stride in the first 1x1, as the MSRA weights for --init (0)")
    add("--amp", action="store_true",
        help="convolutions and matrix products in bfloat16: faster, and not the paper's numbers")
    add("--compile", action="store_true",
        help="torch.compile backbone, FPN and heads; for CUDA, the first steps take minutes")
    add("--subset", type=positive, metavar="N",
        help="train on N images only: the same ones on every machine")
    add("--images-per-gpu", type=positive, metavar="N",
        help="images per process; the rate and the schedule are scaled with the batch "
        "(default: the recipe's, 2 on COCO)")
    add("--iterations", type=positive, metavar="N",
        help="stop after N of this run's iterations; never changes the schedule")
    add("--eval-every", type=positive, metavar="N",
        help="iterations between evaluations (default: the recipe's)")
    add("--workers", type=int, default=2, metavar="N",
        help="processes that load images, for each GPU (2)")
    add("--seed", type=int, default=0, metavar="N",
        help="of weights, order of images, flips, sampling (0)")
    add("--device", metavar="D", help="cuda or cpu (default: cuda if there is one)")
    add("--from", dest="trunk", metavar="DIR",
        help="branch off a longer run of the same recipe: continue its checkpoint from before the "
        "first drop of this schedule, through this schedule's own tails")
    add("--resume", action="store_true",
        help="continue the run in --out, or start it if there is none")
    add("--list", action="store_true", help="show the recipes with the paper's AP, and exit")
    add("--dry-run", action="store_true", help="show the plan, and exit; needs no data")
    # fmt: on
    args = parser.parse_args(arguments)
    if args.recipe not in RECIPES:
        parser.error(f"unknown recipe {args.recipe!r}; choose one of {', '.join(RECIPES)}")
    if args.schedule is not None and args.schedule not in SCHEDULES:
        parser.error(f"unknown schedule {args.schedule!r}; choose one of {', '.join(SCHEDULES)}")
    if args.workers < 0:
        parser.error("--workers must be 0 or more")
    return args


def make_recipe(args):
    """The recipe with what the command line changes in it, for the recipe's own batch size."""
    recipe = RECIPES[args.recipe]
    changes = {}
    if args.init != "random":
        changes["iterations"] = recipe.iterations_pretrained
        changes["tails"] = recipe.tails_pretrained
        changes["freeze_at"] = recipe.freeze_at_pretrained
    if args.schedule:
        changes["iterations"] = int(args.schedule[:-1]) * recipe.one_x
    if args.amp:
        changes["amp"] = True
    if args.compile:
        changes["compile"] = True
    if args.stride_in_1x1 is not None:
        changes["model"] = recipe.model | {"stride_in_1x1": bool(args.stride_in_1x1)}
    for name in ("norm", "freeze_at", "subset", "images_per_gpu"):
        if getattr(args, name) is not None:
            changes[name] = getattr(args, name)
    return replace(recipe, **changes)


def read_checkpoint(path, run, may_differ=()):
    """The checkpoint to resume from. Raises UsageError if it is one of another run."""
    _, kind, checkpoint = detector.read_weights(path)
    if kind != "own" or "recipe" not in checkpoint:
        raise detector.WeightsError(
            f"{path} is not a checkpoint that a run can continue; for its weights alone: --init."
        )
    theirs = checkpoint["recipe"] | {"seed": checkpoint["seed"]}
    ours = run.settings | {"name": run.name, "seed": run.seed}
    # How many processes share a batch is no setting, nor is how the code is run. In JSON, a tuple
    # equals a list.
    may_differ = {"images_per_gpu", "compile", *may_differ}
    compared = [key for key in ours if key not in may_differ]
    differ = [key for key in compared if json.dumps(theirs.get(key)) != json.dumps(ours[key])]
    if differ:
        values = ", ".join(f"{k} ({theirs.get(k)} there, {ours[k]} here)" for k in differ)
        raise UsageError(
            f"{path} is a checkpoint of another run, which differs in {values}; give the same "
            "arguments, or another --out."
        )
    return checkpoint | {"path": path}


def read_trunk(trunk, run, recipe):
    """The last checkpoint that this schedule shares with the longer run in the folder `trunk`.

    All schedules of a recipe are one until their own first drop, for the tails have the same length
    whatever the total. Raises UsageError where that is not so.
    """
    if recipe.cascade_iterations:
        raise UsageError(
            f"{run.name} cannot branch off a trunk: it is switched to a cascade a fixed time "
            "before its end, which is earlier than the trunk's; train it from the start."
        )
    found = checkpoints_in(trunk)
    if not found:
        raise UsageError(f"--from {trunk}: there is no checkpoint in that folder.")
    first_drop = recipe.iterations - recipe.tails[0]
    shared = [path for path in found if iteration_of(path) <= first_drop]
    if not shared:
        raise UsageError(
            f"--from {trunk}: its first checkpoint, {iteration_of(found[0]):,}, is after the first "
            f"drop of this schedule at {first_drop:,}."
        )
    checkpoint = read_checkpoint(shared[-1], run, may_differ=("iterations",))
    if checkpoint["batch_size"] != recipe.batch_size:
        raise UsageError(
            f"--from {trunk}: it was trained with {checkpoint['batch_size']} images a batch, this "
            f"run has {recipe.batch_size}; use the same."
        )
    theirs = checkpoint["recipe"]  # not scaled to the batch, as `recipe` is; one_x says by how much
    trunk_iterations = round(theirs["iterations"] * recipe.one_x / theirs["one_x"])
    if iteration_of(shared[-1]) > trunk_iterations - recipe.tails[0]:
        raise UsageError(f"--from {trunk}: it is the shorter run; branch off a longer one.")
    return checkpoint


def dry_run(recipe, run):
    """Print the plan of a run, as on as many processes as make the recipe's batch."""
    processes = max(1, recipe.batch_size // recipe.images_per_gpu)
    world_size = int(os.environ.get("WORLD_SIZE", processes))
    scaled = scale_to_batch(recipe, recipe.images_per_gpu * world_size)
    check(scaled, from_random=run.init == "random")
    images = recipe.subset
    sample = None
    if run.data is not None:
        train_set, _ = make_datasets(recipe, run.data)
        images = len(train_set)
        sample = data.average_sample(train_set, recipe.min_sizes, recipe.max_size)
    elif not (recipe.keypoints or run.name.startswith("toy") or run.name.endswith("-voc")):
        images = images or COCO_IMAGES
        shapes = [data.resize_shape(*COCO_SHAPE, s, recipe.max_size) for s in recipe.min_sizes]
        sample = COCO_OBJECTS, statistics.mean(map(math.prod, shapes))
    print(describe_schedule(scaled, run, world_size, images))
    if sample:
        print(describe_samples(scaled, *sample))


def run_command(args):
    recipe = make_recipe(args)
    check(recipe, from_random=args.init == "random")
    run = Run(
        name=args.recipe,
        settings=dataclasses.asdict(recipe),
        data=args.data,
        out=args.out or f"runs/{args.recipe}",
        init=args.init,
        seed=args.seed,
        workers=args.workers,
        stop=args.iterations,
    )
    if args.dry_run:
        dry_run(recipe, run)
        return

    rank, world_size, device = evaluate.start_processes(args.device)
    recipe = scale_to_batch(recipe, recipe.images_per_gpu * world_size)
    check(recipe, from_random=args.init == "random")  # again, with the numbers of this batch
    if args.eval_every:
        recipe = replace(recipe, eval_every=args.eval_every)
    found = checkpoints_in(run.out)
    if recipe.classify:
        if world_size > 1 or args.resume:
            raise UsageError(f"{run.name} runs in one process and in one go: no --resume.")
        if found:
            raise UsageError(f"{run.out} holds a backbone already ({found[-1].name}): --out.")
        return pretrain(recipe, run, device)
    # torchrun --max-restarts starts a failed run again with the same arguments.
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if found and not args.resume and not restarted:
        raise UsageError(
            f"{run.out} holds a run already ({found[-1].name}); give --resume to continue it, "
            "or another --out."
        )
    if found:
        run.resume = read_checkpoint(found[-1], run)
    elif args.trunk:
        run.resume = read_trunk(args.trunk, run, recipe)
    if run.data is None:
        if not run.name.startswith("toy"):
            raise UsageError(f"The recipe {run.name} needs --data DIR, a folder in COCO's layout.")
        run.data = "toy_coco"
        if rank == 0:
            data.make_toy_coco(run.data)
        if world_size > 1:
            dist.barrier()
    if world_size > 1:  # machines that do not share --out would resume different things
        start = torch.tensor([run.resume["iteration"] if run.resume else 0], device=device)
        starts = [torch.zeros_like(start) for _ in range(world_size)]
        dist.all_gather(starts, start)
        if len({int(x) for x in starts}) > 1:
            raise UsageError(
                f"The processes do not see the same checkpoints in {run.out}; it must be a folder "
                "that all machines share."
            )
    with run.stop_request:
        train(recipe, run, rank, world_size, device)
    if world_size > 1:
        dist.destroy_process_group()


def main(arguments=None):
    args = parse_arguments(arguments)
    if args.list:
        for name, recipe in RECIPES.items():
            print(f"{name:24} {recipe.iterations:>9,} iterations   {recipe.paper}")
        return 0
    try:
        run_command(args)
    except Stopped as stop:
        print(f"\n{stop}", file=sys.stderr)
        return stop.code
    except UsageError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except (data.DataError, detector.WeightsError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output, `head` for one, has seen enough
        sys.stderr.close()
        return 1
    except OSError as error:  # a full disk, a folder that may not be written to
        print(
            f"train.py: {error.filename or 'a file'} could not be read or written "
            f"({error.strerror or error}); checkpoints so far are intact: mend it and --resume.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
