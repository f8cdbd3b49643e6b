"""Training Mask R-CNN from random weights (or fine-tuning it): every experiment of the paper.

He, Girshick, Dollar, "Rethinking ImageNet Pre-training" (arXiv 1811.08883), Sec. 4 and 5.

  python train.py                                                    generated data, without a GPU
  torchrun --nproc-per-node 8 train.py --recipe r50-gn --data coco   the paper's first row, 6x

The file in reading order:

  recipes -> learning rate -> optimizer -> the loop -> cascade switch -> checkpoints -> command line

Training from random weights needs two things: a normalization that works with small batches
(norms.py) and more iterations. Nothing else of the fine-tuning baseline changes.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    # Ctrl-C during the imports below, which take seconds, ends the process silently.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import evaluate
import model as detector
from data import UserError

# -- Recipes ---------------------------------------------------------------------------------------

# "1x" is 90,000 iterations of 16 images: 12.3 epochs of the usable images of train2017.
SCHEDULES = {f"{n}x": n * 90_000 for n in range(1, 12)}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One experiment. The defaults are the paper's baseline: R50-FPN, GN, random weights, 6x."""

    # Sec. 4 "Architecture"
    backbone: str = "resnet50"
    norm: str = "gn"
    masks: bool = True
    keypoints: int = 0  # how many
    cascade_iterations: int = 0  # how many of the last iterations train a cascade
    model: dict = dataclasses.field(default_factory=dict)  # further fields of model.Config
    freeze_at: int = 0  # random layers must not be frozen (Sec. 3.1)
    freeze_at_pretrained: int = 2  # stem and res2, as in Detectron's GN baselines (Choice 9)

    # Sec. 4 "Learning rate scheduling"
    iterations: int = SCHEDULES["6x"]  # from random weights
    iterations_pretrained: int = SCHEDULES["2x"]
    one_x: float = SCHEDULES["1x"]  # iterations that --schedule counts in
    # "The last 60k and last 20k iterations", *whatever the total*. Below 1: shares of the total.
    tails: tuple = (60_000, 20_000)
    drop_factor: float = 0.1  # of the rate at the beginning of each tail

    # Sec. 4 "Hyper-parameters"
    batch_size: int = 16  # images of all GPUs together, for which the numbers here hold
    images_per_gpu: int = 2
    learning_rate: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    bias_rate: float = 2.0  # biases and betas learn at twice the rate (Choice 2)
    warmup_iterations: int = 500  # linear, from a third of the rate (Detectron)
    warmup_factor: float = 1 / 3
    clip_gradient: float = 0.0  # largest gradient norm; 0: no clipping, as in the paper
    amp: bool = False  # convolutions and matrix products in bfloat16; not the paper's
    compile: bool = False  # torch.compile, for CUDA

    # Images
    subset: int | None = None  # how many of the training images are used; None: all
    keep_empty: bool = False  # train on images without objects too; the paper does not
    min_sizes: tuple = (800,)  # shorter side: one of these is drawn for each image
    max_size: int = 1333  # longest side allowed
    test_size: int = 800  # shorter side
    flip: bool = True  # the mirror image, with probability 1/2

    # Running it
    eval_every: int = 30_000  # iterations of batch_size images
    checkpoint_every: int = 2_500  # the same
    log_every: int = 20  # iterations of whatever size

    paper: str = ""  # the paper's AP, shown by --list

    @property
    def drops(self):
        """The iterations at which the rate drops: where each tail begins. 6x: 480,000, 520,000."""
        lengths = [tail * self.iterations if tail < 1 else tail for tail in self.tails]
        return sorted(self.iterations - round(length) for length in lengths)


# Train-time scale augmentation (Sec. 5.1): one of these shorter sides for each image, multiples of
# 32 as in Detectron (Choice 4). COCO's subsets (Sec. 5.2) have the wider range.
AUGMENTED = tuple(range(640, 801, 32))
AUGMENTED_MORE = tuple(range(512, 801, 32))

# fmt: off
# Sec. 5.1 "Enhanced baselines"
ENHANCED = dict(
    min_sizes=AUGMENTED, iterations=SCHEDULES["9x"], iterations_pretrained=SCHEDULES["6x"],
)
# The switch to a cascade is 270k iterations before the end, of fine-tuned runs too (Choice 10).
# Boxes are class-agnostic from the start (Choice 6): the stages of a cascade hand on one box for
# each RoI, so stage 1 must have learnt one to survive the switch.
CASCADE = dict(cascade_iterations=270_000, model={"box_class_agnostic": True})

# Sec. 5.2: the rates and sizes that the paper found for 35k images. The paper gives totals for 10k;
# those for 35k (9x), 3.5k and 1k are ours. So are the drops below 35k: at 6x's own proportions, for
# these runs are shorter than 6x's tails (Choice 7).
LESS_DATA = dict(learning_rate=0.04, drop_factor=0.02, min_sizes=AUGMENTED_MORE)
NINTHS = (1 / 9, 1 / 27)

# The whole path in six minutes on two CPU cores: a narrow network on small, generated images.
NARROW = dict(
    blocks=(1, 1, 1, 1), stem_width=32, width_per_group=32, fpn_channels=64, box_head_channels=64,
    box_head_fc_channels=256, mask_head_channels=64, keypoint_head_channels=64,
    anchor_sizes=((16,), (32,), (64,), (128,), (256,)),
    rpn_pre_nms_top_n_train=500, rpn_post_nms_top_n_train=250,
    rpn_pre_nms_top_n_test=500, rpn_post_nms_top_n_test=250,
    box_batch_size_per_image=32, roi_sampling_ratio=1,
)
TOY = Recipe(
    model=NARROW, iterations=800, iterations_pretrained=320, one_x=160, tails=(140, 50),
    batch_size=8, images_per_gpu=8, learning_rate=0.1, warmup_iterations=60,
    min_sizes=(128,), max_size=213, test_size=128,
    eval_every=800, checkpoint_every=160, log_every=10, paper="(generated data)",
)
NARROW_VGG = dict(
    stem_width=16, box_head_fc_channels=256, anchor_sizes=((16, 32, 64, 128),),
    box_batch_size_per_image=64,
)

# Every row states only what it changes; --list prints them. AP is bbox / mask.
RECIPES = {
    "toy": TOY,
    "toy-syncbn": replace(TOY, norm="syncbn"),
    "toy-cascade": replace(TOY, cascade_iterations=267, model=NARROW | CASCADE["model"]),
    # The heatmaps' loss is ln 3136 at first and its eight layers have no norm: a lower rate.
    "toy-keypoints": replace(TOY, masks=False, keypoints=17, learning_rate=0.02),
    "toy-vgg": replace(TOY, backbone="vgg16", norm="none", masks=False, model=NARROW_VGG),
    # Own pictures, some hundred of them, on a CPU or one GPU (docs/own-data.md)
    "small": replace(
        TOY, model=NARROW | {"box_batch_size_per_image": 64}, batch_size=4, images_per_gpu=4,
        learning_rate=0.05, iterations=2000, iterations_pretrained=1000, one_x=500,
        tails=(0.2, 0.07), eval_every=500, checkpoint_every=250, warmup_iterations=50,
        min_sizes=(160, 176, 192, 208, 224), max_size=320, test_size=192, paper="(your own data)",
    ),
    # Own pictures, from public weights, on one GPU: 100 epochs of 240 images (docs/own-data.md)
    "finetune": Recipe(
        batch_size=2, learning_rate=0.0025, iterations=36_000, iterations_pretrained=12_000,
        one_x=6_000, tails=NINTHS, eval_every=2_000, checkpoint_every=1_000,
        min_sizes=AUGMENTED, paper="(your own data)",
    ),
    # Tables 1 and 2, Figures 1 and 3
    "r50-gn": Recipe(paper="6x random 41.3 / 36.6; pre-trained 2x 40.3, 6x 41.1 / 36.4"),
    "r101-gn": Recipe(
        backbone="resnet101", paper="6x random 42.7 / 37.6; pre-trained 2x 41.8, 3x 42.3 / 37.2",
    ),
    # Figure 4
    "r50-syncbn": Recipe(norm="syncbn", paper="Figure 4's curves"),
    # Figure 5 and Table 3: enhanced baselines. --tta is an option of evaluate.py.
    "r50-gn-aug": Recipe(**ENHANCED, paper="a bar of Figure 5"),
    "r101-gn-aug": Recipe(backbone="resnet101", **ENHANCED, paper="random 45.0 / 39.5"),
    "r50-gn-aug-cascade": Recipe(
        **ENHANCED, **CASCADE, paper="with --tta: random mask 41.6, pre-trained 40.9",
    ),
    "r101-gn-aug-cascade": Recipe(
        backbone="resnet101", **ENHANCED, **CASCADE,
        paper="random about 47.4 / 40.5; with --tta: mask 42.5, pre-trained 41.9",
    ),
    "x152-gn-aug": Recipe(
        backbone="resnext152_8x32d", **ENHANCED, paper="random 46.4 / 40.5",
    ),
    "x152-gn-aug-cascade": Recipe(
        backbone="resnext152_8x32d", **ENHANCED, **CASCADE,
        paper="random 48.6 / 41.4; with --tta 50.9 / 43.2, pre-trained 50.3 / 42.5",
    ),
    # Figure 6: keypoints (Detectron trains them with scale jitter). They have no --tta (Choice 12).
    "r50-gn-keypoints": Recipe(
        masks=False, keypoints=17, iterations=SCHEDULES["2x"], min_sizes=AUGMENTED,
        paper="2x keypoint AP: random 65.6, pre-trained 65.5",
    ),
    # Sec. 5.1 "Models without BN/GN": Faster R-CNN without FPN. Without a norm, images must be
    # divided by their deviation, which model.BACKBONES["vgg16"] says (Choice 8).
    "vgg16": Recipe(
        backbone="vgg16", norm="none", masks=False, min_sizes=AUGMENTED,
        iterations=SCHEDULES["11x"], iterations_pretrained=SCHEDULES["9x"],
        paper="bbox: random 35.2, pre-trained 35.6",
    ),
    # Sec. 5.2, Figures 7 and 8: less data
    "r50-gn-35k": Recipe(
        subset=35_000, iterations=SCHEDULES["9x"], iterations_pretrained=SCHEDULES["6x"],
        **LESS_DATA, paper="bbox: random 36.3, pre-trained 36.3",
    ),
    "r50-gn-10k": Recipe(
        subset=10_000, iterations=220_000, iterations_pretrained=60_000, tails=NINTHS,
        **LESS_DATA, paper="bbox: random 25.9, pre-trained 26.0",
    ),
    "r50-gn-3.5k": Recipe(
        subset=3_500, iterations=100_000, iterations_pretrained=30_000, tails=NINTHS,
        **LESS_DATA, paper="bbox: random 9.3, pre-trained 16.0",
    ),
    "r50-gn-1k": Recipe(
        subset=1_000, iterations=40_000, iterations_pretrained=10_000, tails=NINTHS,
        **LESS_DATA, paper="bbox: random 3.5, pre-trained 9.9",
    ),
    # Sec. 5.2: PASCAL VOC, Faster R-CNN, trainval2007 + train2012, tested on val2012
    "r101-gn-voc": Recipe(
        backbone="resnet101", masks=False, min_sizes=AUGMENTED,
        iterations=144_000, iterations_pretrained=18_000, tails=NINTHS,
        paper="mAP at IoU 0.5: random 77.6, pre-trained 82.7",
    ),
}

# The smallest and the largest value of each number in a recipe; of the others, 0 and 1e9
RANGES = dict.fromkeys(("drop_factor", "momentum", "weight_decay", "warmup_factor"), (0, 1))
RANGES |= dict.fromkeys(("freeze_at", "freeze_at_pretrained"), (0, 5))
RANGES |= dict.fromkeys(
    ("iterations", "iterations_pretrained", "one_x", "batch_size", "images_per_gpu", "subset",
     "min_sizes", "max_size", "test_size", "eval_every", "checkpoint_every", "log_every"), (1, 1e9),
)
# fmt: on


def scale_to_batch(recipe, batch_size):
    """The recipe for another batch size, by the linear scaling rule (Goyal et al., 2017; Choice 5).

    A batch k times as large averages k times as many gradients: one of its steps at k times the
    rate goes about as far as k steps of the small batch, and 1/k of the steps see the same images.
    The warm-up is never shortened: at twice the rate, half of it would be four times as steep.
    """
    ratio = batch_size / recipe.batch_size

    def scaled(iterations):
        return max(1, round(iterations / ratio))

    return replace(
        recipe,
        batch_size=batch_size,
        learning_rate=recipe.learning_rate * ratio,
        iterations=scaled(recipe.iterations),
        tails=tuple(tail if tail < 1 else scaled(tail) for tail in recipe.tails),
        cascade_iterations=recipe.cascade_iterations and scaled(recipe.cascade_iterations),
        one_x=recipe.one_x / ratio,
        warmup_iterations=max(recipe.warmup_iterations, scaled(recipe.warmup_iterations)),
        eval_every=scaled(recipe.eval_every),
        checkpoint_every=scaled(recipe.checkpoint_every),
    )


# -- Learning rate ---------------------------------------------------------------------------------


def learning_rate(iteration, recipe):
    """The learning rate of the step after `iteration` steps; `recipe` fits the batch already.

    Sec. 4: "we always reduce the learning rate by 10x in the last 60k and last 20k iterations
    respectively, no matter how many total iterations". 6x: 0.02 up to 479,999, 0.002 from 480,000
    and 0.0002 from 520,000. A longer schedule spends all its extra iterations at the full rate, so
    all schedules of a recipe are identical until their first drop.
    """
    rate = recipe.learning_rate
    for drop in recipe.drops:
        if iteration >= drop:
            rate *= recipe.drop_factor
    # Warm-up, linear from a third of the rate: the first gradients are large and all point the same
    # way, away from random predictions. Momentum adds them up, and full steps would diverge.
    if iteration < recipe.warmup_iterations:
        progress = iteration / recipe.warmup_iterations
        rate *= recipe.warmup_factor * (1 - progress) + progress
    return rate


# -- Optimizer -------------------------------------------------------------------------------------


def make_optimizer(model, recipe):
    """SGD with Detectron's three groups of parameters (Choice 2); "rate" multiplies the rate.

    Weights decay. Gammas of norms do not: decay would pull a layer's output to 0 instead of
    regularizing the convolution before it, whose scale the norm removes. Biases and betas do not
    either, and learn at twice the rate.

      momentum <- 0.9 * momentum + gradient + decay * weight
      weight   <- weight - rate * momentum

    The rate is not part of the momentum, so a drop needs no correction. In Caffe2 it is, which
    Detectron's SCALE_MOMENTUM corrects (Choice 11).
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
    return torch.optim.SGD(groups, recipe.learning_rate, recipe.momentum, fused=True)


# -- The loop --------------------------------------------------------------------------------------


def train(recipe, args, checkpoint, train_set, val_set, device):
    """Train by `recipe`, scaled to the batch already, from `checkpoint` on (None: the start)."""
    model, optimizer = start_model(recipe, args, checkpoint, train_set, device)
    ddp = wrap(model)
    iteration = checkpoint["iteration"] if checkpoint else 0
    last = min(recipe.iterations, args.iterations or recipe.iterations)
    kept = milestones(recipe)
    print_header(recipe, args, checkpoint, model, train_set, val_set, device)
    loader = make_loader(recipe, args, train_set, iteration)
    log = Log(recipe, args, checkpoint, last, device)
    with contextlib.closing(loader), contextlib.closing(log.bar), Alarm() as alarm:
        # Checkpoints are saved before they are evaluated. So a resumed run, whose log was cut
        # there, evaluates its checkpoint first.
        if evaluation_due(iteration, recipe, last):
            evaluate_and_log(model, val_set, args, iteration, log)
        while iteration < last and not alarm.stop:
            # Sec. 5.1: a cascade recipe trains three box heads in its last 270k iterations.
            in_cascade = iteration >= recipe.iterations - recipe.cascade_iterations
            if in_cascade and not model.config.cascade:
                model, optimizer = grow_to_cascade(model, optimizer, recipe)
                ddp = wrap(model)

            # 1) The next batch, and the learning rate of this iteration (biases: twice as much)
            images, targets = to_device(*next(loader), device)
            rate = learning_rate(iteration, recipe)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["rate"]

            # 2) The losses (what they are at first: model.py, `MaskRCNN.losses`)
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.amp):
                losses = ddp(images, targets)
            total = sum(losses.values())
            alarm.read()  # about the previous step: this does not make a GPU wait

            # 3) The gradients, averaged over the processes by DDP, and a step along them
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            if recipe.clip_gradient > 0:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_gradient)
            optimizer.step()
            alarm.set(iteration, losses, targets)
            iteration += 1

            # 4) A line of the log, a checkpoint, an evaluation
            log.bar.update()
            if iteration % recipe.log_every == 0 or iteration == last:
                alarm.read()  # about this step: the log waits for its losses in any case
                log.step(iteration, rate, losses)
            evaluates = evaluation_due(iteration, recipe, last)
            saves = evaluates or iteration % recipe.checkpoint_every == 0 or iteration in kept
            if saves or alarm.stop:
                alarm.read()  # about this step: its weights are to be saved and evaluated
                save_checkpoint(model, optimizer, iteration, recipe, args, len(train_set), log)
            if evaluates and not alarm.stop:
                evaluate_and_log(model, val_set, args, iteration, log)
    if alarm.stop:
        name = alarm.signals[0] if alarm.signals else "a signal to another process"
        say(f"\nStopped by {name} after step {iteration:,}; --resume continues.")
    else:
        show_results(model, val_set, args.out)


def evaluation_due(iteration, recipe, last):
    return iteration > 0 and (iteration % recipe.eval_every == 0 or iteration == last)


# What the loop is made of, in its order


def start_model(recipe, args, checkpoint, train_set, device):
    """The model and its optimizer as the run starts with them: random, pre-trained or resumed."""
    torch.manual_seed(args.seed)  # the same weights on every process
    if checkpoint:
        model = detector.build_model(**checkpoint["config"])
        model.load_state_dict(checkpoint.pop("weights"))
    elif args.init == "random":
        model = make_model(recipe, len(train_set.classes))
    else:
        config = detector.read_checkpoint(args.init)["config"]
        stride = config.get("stride_in_1x1", False)  # pre-trained weights decide where it is
        model = make_model(recipe, len(train_set.classes), stride_in_1x1=stride)
        detector.load_weights(model, args.init, verbose=rank_and_size()[0] == 0)
    sizes = {"min_size": recipe.test_size, "max_size": recipe.max_size}
    classes = {"classes": train_set.classes, "category_ids": train_set.category_ids}
    model.data_settings = sizes | classes
    model.backbone.recompute = args.recompute
    place(model, recipe, device)
    optimizer = make_optimizer(model, recipe)
    if checkpoint:
        set_momentum(model, optimizer, checkpoint.pop("momentum"))
    return model, optimizer


def make_model(recipe, num_classes, **settings):
    """The recipe's model with random weights. Raises UserError where its settings do not fit."""
    named = {"masks": recipe.masks, "keypoints": recipe.keypoints, "freeze_at": recipe.freeze_at}
    settings = named | recipe.model | settings
    try:
        return detector.build_model(recipe.backbone, recipe.norm, num_classes, **settings)
    except ValueError as error:
        raise UserError(f"The model cannot be built: {error}", code=2) from None


def place(model, recipe, device):
    """Put the model on its device, in training mode, in channels_last: faster convolutions."""
    model.to(device, memory_format=torch.channels_last).train()
    if recipe.compile:
        compile_parts(model)


def wrap(model):
    """The model in DDP where there are several processes."""
    if not dist.is_initialized():
        return model
    # The newest torch renames broadcast_buffers, to a name that older ones do not know.
    warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
    return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def compile_parts(model):
    """torch.compile what has a fixed graph: the parts with convolutions, for images of any size."""
    torch._dynamo.config.recompile_limit = 32  # all heads share one function
    heads = [*model.box_heads, *filter(None, [model.mask_head, model.keypoint_head])]
    for part in filter(None, [model.backbone, model.fpn, *(head.convs for head in heads)]):
        part.compile(dynamic=True)


def make_loader(recipe, args, train_set, iteration):
    """The batches of this process from `iteration` on, without end."""
    rank, world_size = rank_and_size()
    share = {"rank": rank, "world_size": world_size, "start_iteration": iteration}
    sampler = data.BatchSampler(train_set, recipe.images_per_gpu, args.seed, **share)
    images = data.TrainingSet(train_set, recipe.min_sizes, recipe.max_size, recipe.flip)
    return data.read_ahead(images, args.workers, sampler)


def to_device(images, targets, device):
    """A batch of the loader on the device; what is no tensor stays as it is."""
    images = [image.to(device, non_blocking=True) for image in images]
    targets = [
        {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in target.items()}
        for target in targets
    ]
    return images, targets


class Alarm:
    """What all processes must agree on after a step: has its loss exploded, has a signal come?

    The answer is read one step late, when it has long arrived: to wait for it at once would leave a
    GPU idle. So a bad step does change the weights, but these are never saved or evaluated. Inside
    of `with Alarm()`, SIGTERM, SIGINT (Ctrl-C) and SIGHUP no longer end the process by themselves.
    """

    MOST = 1000.0  # no healthy loss comes near this; beyond it, the next one is often NaN

    def __init__(self):
        self.signals = []  # that this process has received
        self.stop = False  # the run ends here: some process has received a signal
        self.flags = None

    def __enter__(self):
        numbers = [getattr(signal, name, None) for name in ("SIGTERM", "SIGINT", "SIGHUP")]
        handlers = {number: signal.getsignal(number) for number in numbers if number}
        # What is ignored stays ignored: SIGHUP under nohup.
        self.handlers = {n: handler for n, handler in handlers.items() if handler != signal.SIG_IGN}
        for number in self.handlers:
            signal.signal(number, self.receive)
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def receive(self, number, _):
        self.signals.append(signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C interrupts

    def set(self, iteration, losses, targets):
        """Ask about the step `iteration`, which had these losses (a dict) on these targets."""
        total = sum(losses.values()).detach()
        exploded = 1 - (total <= self.MOST).float()  # also where it is NaN
        flags = torch.stack([exploded, torch.full_like(total, bool(self.signals))])
        if dist.is_initialized():
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        # Copied to pinned memory; the event lets read() wait for this copy alone.
        self.flags = flags.to("cpu", non_blocking=True)
        self.arrived = torch.cuda.current_stream().record_event() if flags.is_cuda else None
        image_ids = [target.get("image_id") for target in targets]
        self.step = iteration, {k: v.detach() for k, v in losses.items()}, image_ids

    def read(self):
        """Update `stop`. Raises UserError if the loss of any process has exploded."""
        if self.flags is None:
            return
        if self.arrived:
            self.arrived.synchronize()
        exploded, stop = map(bool, self.flags.tolist())
        if exploded:
            iteration, losses, image_ids = self.step
            values = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
            raise UserError(
                f"The loss of step {iteration} is not finite or above {self.MOST:g} (here: {values}"
                f"; images {', '.join(map(str, image_ids))}); checkpoints are from before: look at "
                "these images, or lower the learning rate."
            )
        self.stop = self.stop or stop


class Log:
    """OUT/log.jsonl, a JSON object a line, and the progress bar; the first process writes."""

    def __init__(self, recipe, args, checkpoint, last, device):
        """Cut the log to its length at the checkpoint: what was logged later comes again."""
        self.path, self.recipe, self.device = Path(args.out) / "log.jsonl", recipe, device
        self.start = checkpoint["iteration"] if checkpoint else 0
        first = rank_and_size()[0] == 0
        if first and self.path.exists():
            length = checkpoint["log_bytes"] if checkpoint else 0
            os.truncate(self.path, min(length, self.path.stat().st_size))
        self.bar = tqdm(total=last, initial=self.start, disable=not first, dynamic_ncols=True)
        self.clock = self.start, time.perf_counter()

    def write(self, record):
        if rank_and_size()[0] == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
        self.clock = record["iteration"], time.perf_counter()

    def step(self, iteration, rate, losses):
        """A record of a training step. Its losses are means over the processes."""
        values = torch.stack([sum(losses.values()), *losses.values()]).detach()
        if dist.is_initialized():
            dist.all_reduce(values)
            values /= dist.get_world_size()
        values = {k: round(v, 6) for k, v in zip(["loss", *losses], values.tolist())}
        (before, then), now = self.clock, time.perf_counter()
        speed = (iteration - before) * self.recipe.batch_size / (now - then)
        record = {"iteration": iteration, "lr": rate} | values
        record["images_per_second"] = round(speed, 3)
        if self.device.type == "cuda":
            record["peak_memory_mb"] = torch.cuda.max_memory_allocated() >> 20
        self.write(record)
        self.bar.set_postfix_str(f"loss {values['loss']:.3f}, {speed:.1f} images/s")
        # The first steps were slower, while everything warmed up.
        if before < self.start + max(10, 2 * self.recipe.log_every) <= iteration:
            seconds = (self.bar.total - iteration) * self.recipe.batch_size / speed
            say(f"Time      {tqdm.format_interval(seconds)} to go, evaluations not counted")

    def sync(self):
        """Put the log onto the disk; returns its length, which a checkpoint remembers."""
        with open(self.path, "ab") as file:
            os.fsync(file.fileno())
            return file.tell()


def evaluate_and_log(model, val_set, args, iteration, log):
    metrics = evaluate.evaluate(model, val_set, args.out, workers=args.workers)
    log.write({"iteration": iteration, **metrics})
    say(f"Iteration {iteration:,}\n{evaluate.format_table(metrics)}")


def show_results(model, val_set, out):
    """The end of a run: pictures and curves, and what to look at next."""
    if rank_and_size()[0] > 0:
        return
    weights = checkpoints_in(out)[-1]
    print(f"\nWeights:  {weights}\nLog:      {out}/log.jsonl")
    try:  # a picture that cannot be drawn must not cost anything else
        evaluate.save_pictures(model, val_set, f"{out}/pictures", count=8)
        print(f"Pictures: {out}/pictures")
        from tools.plot import plot

        plot([out], f"{out}/curves.png")
        print(f"Curves:   {out}/curves.png")
    except Exception as error:
        print(f"Not drawn: {data.first_line(error)}")
    image = os.path.join(val_set.image_dir, val_set.record(0)["file_name"])
    inside = f"--weights {weights} --image {image} --out {out}/inside"
    print(f"Inside:   python tools/look_inside.py {inside}")


def rank_and_size():
    """The number of this process and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def say(text):
    """Print on the first process, above the progress bar."""
    if rank_and_size()[0] == 0:
        tqdm.write(text)


# -- The cascade switch ----------------------------------------------------------------------------


def grow_to_cascade(model, optimizer, recipe):
    """The model as a three-stage cascade, with an optimizer for it (Sec. 5.1 "Enhanced baselines").

    Stages 2 and 3 start as copies of stage 1. Stage s divides its deltas by s * (10, 10, 5, 5)
    (model.py, `box_weights`), so the regressor copied to it is multiplied by s: it then predicts
    the same boxes as stage 1 (Choice 13). Parameters that there were before keep their momentum.
    """
    grown = detector.build_model(**dataclasses.asdict(model.config) | {"cascade": True})
    state = model.state_dict()
    for name, tensor in list(state.items()):
        if name.startswith("box_heads.0."):
            for stage in (2, 3):
                factor = stage if ".regressor." in name else 1
                state[name.replace("box_heads.0", f"box_heads.{stage - 1}")] = tensor * factor
    grown.load_state_dict(state)
    grown.data_settings = model.data_settings
    grown.backbone.recompute = model.backbone.recompute
    place(grown, recipe, model.image_mean.device)
    grown_optimizer = make_optimizer(grown, recipe)
    set_momentum(grown, grown_optimizer, momentum_of(model, optimizer))
    return grown, grown_optimizer


# -- Checkpoints: save, resume, branch off a trunk -------------------------------------------------

# Exact resume needs four things, and nothing else:
#
#               saved by                        restored by
#   weights     save_checkpoint                 start_model
#   momentum    save_checkpoint, momentum_of    start_model, set_momentum
#   iteration   save_checkpoint                 train: rate, cascade, the loader's first batch
#   log_bytes   save_checkpoint, Log.sync       Log.__init__, which cuts the log to this length
#
# Which images make a batch, their flips, and the sampling of anchors and RoIs are functions of
# (seed, iteration, position in the batch): data.py, above `hash_of`.


def momentum_of(model, optimizer):
    """SGD's momentum by parameter name, so that it fits a model that has grown to a cascade."""
    state = {name: optimizer.state.get(p, {}) for name, p in model.named_parameters()}
    return {name: s["momentum_buffer"] for name, s in state.items() if s}


def set_momentum(model, optimizer, momentum):
    """The inverse of `momentum_of`; parameters that `momentum` does not name start with zero.

    A momentum of zero acts like none, but fused SGD needs one for all of a group or for none.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            buffer = torch.zeros_like(parameter, requires_grad=False)
            optimizer.state[parameter]["momentum_buffer"] = buffer
            if name in momentum:
                buffer.copy_(momentum[name])


def checkpoint_path(out, iteration):
    return Path(out) / f"checkpoint_{iteration:07d}.pth"


def iteration_of(path):
    return int(path.stem.removeprefix("checkpoint_"))


def checkpoints_in(out):
    """Paths of the complete checkpoints of a run, oldest first."""
    paths = Path(out).glob("checkpoint_*.pth")
    numbered = [path for path in paths if path.stem.removeprefix("checkpoint_").isdecimal()]
    return sorted(numbered, key=iteration_of)


def milestones(recipe):
    """Iterations whose checkpoints are kept for good.

    Where the rate drops, where shorter schedules leave this one (they share it until their own
    first drop), and where a cascade begins (without one: the end).
    """
    count = math.ceil(recipe.iterations / recipe.one_x)
    shorter = (replace(recipe, iterations=round(n * recipe.one_x)) for n in range(1, count))
    branches = {schedule.drops[0] for schedule in shorter}
    return {*recipe.drops, *branches, recipe.iterations - recipe.cascade_iterations}


def save_checkpoint(model, optimizer, iteration, recipe, args, num_images, log):
    """Write a checkpoint; keep only the last two and the milestones. All processes call this."""
    rank, world_size = rank_and_size()
    if recipe.norm == "bn" and world_size > 1:
        # BN's running statistics are each process's own: the first one's are evaluated and kept.
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    if rank > 0:
        return
    detector.save_model(
        model,
        checkpoint_path(args.out, iteration),
        momentum=momentum_of(model, optimizer),
        recipe=dataclasses.asdict(recipe) | {"name": args.recipe},
        init=args.init,
        seed=args.seed,
        iteration=iteration,
        world_size=world_size,
        num_images=num_images,
        log_bytes=log.sync(),  # before the checkpoint says that these records need not come again
    )
    for path in checkpoints_in(args.out)[:-2]:
        if iteration_of(path) not in milestones(recipe):
            path.unlink()


def read_checkpoint(path, recipe, args, train_set, may_differ=()):
    """A checkpoint to continue from. Raises UserError if it is one of another run."""
    checkpoint = detector.read_checkpoint(path)
    if "momentum" not in checkpoint:
        raise UserError(f"{path} has no momentum, so it cannot be resumed; use --init.")
    batch, (_, world_size) = checkpoint["recipe"]["batch_size"], rank_and_size()
    if batch != recipe.batch_size:
        keep = f"give --images-per-gpu {batch // world_size}"
        if batch % world_size:
            keep = f"use a number of processes that divides {batch}"
        raise UserError(f"{path} is of a run with {batch} images a batch; {keep}.", code=2)
    theirs = checkpoint["recipe"] | checkpoint["data"]
    theirs |= {"seed": checkpoint["seed"], "init": Path(checkpoint["init"]).name}
    ours = dataclasses.asdict(recipe) | {"name": args.recipe, "classes": train_set.classes}
    ours |= {"seed": args.seed, "init": Path(args.init).name}
    # These may differ. (images_per_gpu changes which images share a batch; the header says so.)
    may_differ = {"images_per_gpu", "compile", "eval_every", "paper", *may_differ}
    differ = [key for key in ours if key not in may_differ and theirs.get(key) != ours[key]]
    if differ:
        values = ", ".join(f"{k} ({theirs.get(k)} there, {ours[k]} here)" for k in differ)
        raise UserError(f"{path} is of another run, which differs in {values}.", code=2)
    if (args.iterations or recipe.iterations) < checkpoint["iteration"]:
        raise UserError(f"--iterations {args.iterations:,} is before {path}.", code=2)
    return checkpoint | {"path": path}


def find_checkpoint(recipe, args, train_set):
    """What the run continues from: its own last checkpoint, a trunk's, or nothing (None)."""
    out = Path(args.out)
    found = checkpoints_in(out)
    begun = [*found[-1:], *out.glob("log.jsonl")]
    # torchrun --max-restarts starts a failed run again with the same arguments.
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if begun and not (args.resume or restarted):
        there = f"{out} has a run already ({begun[0].name})"
        raise UserError(f"{there}; give --resume to continue it, or another --out.", code=2)
    for stale in out.glob(".*.tmp"):  # of a run that was killed while it wrote
        stale.unlink(missing_ok=True)
    if not found:
        return read_trunk(recipe, args, train_set) if args.trunk else None
    try:
        return read_checkpoint(found[-1], recipe, args, train_set)
    except detector.WeightsError as error:
        if len(found) == 1:
            raise
        say(f"{error} The one before it is used: {found[-2].name}.")
    checkpoint = read_checkpoint(found[-2], recipe, args, train_set)
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        found[-1].rename(found[-1].with_suffix(".broken"))
    return checkpoint


def read_trunk(recipe, args, train_set):
    """The last checkpoint that this schedule shares with the longer run in the folder --from.

    All schedules of a recipe are the same run until their own first drop: nothing before it depends
    on the total. Raises UserError where that is not so.
    """
    if recipe.cascade_iterations:
        # A shorter cascade run switches earlier, and shares nothing with its trunk from there on.
        raise UserError(f"--from: the cascade {args.recipe} cannot branch off a trunk.", code=2)
    shared = [path for path in checkpoints_in(args.trunk) if iteration_of(path) <= recipe.drops[0]]
    if not shared:
        drop = f"the first drop of this schedule, {recipe.drops[0]:,}"
        raise UserError(f"--from {args.trunk}: it has no checkpoint before {drop}.", code=2)
    checkpoint = read_checkpoint(shared[-1], recipe, args, train_set, may_differ=("iterations",))
    if checkpoint["iteration"] == args.iterations:
        raise UserError(f"--iterations {args.iterations:,} is where {shared[-1]} is.", code=2)
    theirs = replace(recipe, iterations=checkpoint["recipe"]["iterations"])
    if checkpoint["iteration"] > theirs.drops[0]:
        raise UserError(f"--from {args.trunk} is the shorter run; branch off a longer one.", code=2)
    return checkpoint | {"log_bytes": 0}  # the branch has a log of its own


# -- Command line ----------------------------------------------------------------------------------


def parse_arguments(arguments):
    # fmt: off
    parser = argparse.ArgumentParser(
        description="Train Mask R-CNN from random weights. Without arguments: the recipe toy, on "
        "data that is generated first. Under torchrun: on all the processes that it starts.")
    add = parser.add_argument
    add("--recipe", default="toy", metavar="R", choices=list(RECIPES), help="see --list (toy)")
    add("--schedule", metavar="Nx", choices=list(SCHEDULES), help="length: N times the recipe's 1x")
    add("--data", metavar="DIR", help="in COCO's layout, or VOC's devkit (toys: generated)")
    add("--train-split", default="train2017", metavar="NAME", help="(train2017)")
    add("--val-split", default="val2017", metavar="NAME", help="(val2017)")
    add("--out", metavar="DIR", help="for checkpoints, log and pictures (runs/RECIPE)")
    add("--init", default="random", metavar="random|PATH", help="weights to start from (random)")
    add("--no-masks", action="store_true", help="train boxes only")
    add("--norm", choices=["gn", "syncbn", "bn", "frozen_bn"], help="instead of the recipe's")
    add("--freeze-at", type=int, metavar="N", help="freeze the first N of stem, res2, res3, ...")
    add("--amp", action="store_true", help="convolutions in bfloat16: faster, not the paper's")
    add("--compile", action="store_true", help="torch.compile, for CUDA; minutes to start")
    add("--recompute", action="store_true", help="recompute stem and res2 in backward: less memory")
    add("--subset", type=int, metavar="N", help="train on N images, the same on every machine")
    add("--images-per-gpu", type=int, metavar="N", help="rate and schedule scale with the batch")
    add("--iterations", type=int, metavar="N", help="stop after N; never changes the schedule")
    add("--eval-every", type=int, metavar="N", help="iterations between evaluations")
    add("--workers", type=int, metavar="N", help="loader processes per GPU (CPU: 2)")
    add("--seed", type=int, default=0, metavar="N", help="random seed of the whole run (0)")
    add("--device", metavar="D", help="cuda or cpu (cuda if there is one)")
    add("--from", dest="trunk", metavar="DIR", help="branch off a longer run of the same recipe at "
        "its last checkpoint before this schedule's first drop")
    add("--resume", action="store_true", help="continue the run in --out, if there is one")
    add("--list", action="store_true", help="show the recipes with the paper's AP, and exit")
    add("--dry-run", nargs="?", type=int, const=0, metavar="STEPS",
        help="show the plan, and exit; with STEPS and --data, time so many steps")
    # fmt: on
    args = parser.parse_args(arguments)
    smallest = {"seed": 0, "workers": 0, "dry_run": 0, "iterations": 1, "eval_every": 1}
    for name, value in vars(args).items():
        option = "--" + name.replace("_", "-").replace("trunk", "from")
        if isinstance(value, str) and not value.strip():
            parser.error(f"{option} must not be empty")
        if name in smallest and value is not None and not smallest[name] <= value < 2**63:
            parser.error(f"{option} must be {smallest[name]} or more, not {value}")
    args.out = args.out or f"runs/{args.recipe}"
    return args


def make_recipe(args):
    """The recipe with what the command line changes in it, for the recipe's own batch size."""
    recipe = RECIPES[args.recipe]
    changes = {}
    if args.init != "random":
        changes["iterations"] = recipe.iterations_pretrained
        changes["freeze_at"] = recipe.freeze_at_pretrained
    if args.schedule:
        changes["iterations"] = int(args.schedule[:-1]) * recipe.one_x
    for name in ("norm", "freeze_at", "subset", "images_per_gpu"):
        if getattr(args, name) is not None:
            changes[name] = getattr(args, name)
    for name in ("amp", "compile"):
        changes[name] = getattr(recipe, name) or getattr(args, name)
    return replace(recipe, **changes, masks=recipe.masks and not args.no_masks)


def problems(recipe, args):
    """Yield, in a sentence each, what cannot work."""
    kinds = {int: int, int | None: int, float: (int, float), tuple: (int, float)}
    for field in dataclasses.fields(recipe):
        name, value = field.name, getattr(recipe, field.name)
        if field.type not in kinds or (name, value) == ("subset", None):
            continue
        low, high = RANGES.get(name, (0, 1e9))
        is_tuple = field.type is tuple
        numbers = value if isinstance(value, tuple) else (value,)
        valid = isinstance(value, tuple) == is_tuple and len(numbers) > 0
        valid &= all(isinstance(n, kinds[field.type]) and low <= n <= high for n in numbers)
        if not valid:
            needed = "a tuple of numbers" if is_tuple else "a number"
            yield f"{name} is {value!r}; it must be {needed} from {low} to {high:g}"
    if args.init == "random" and recipe.norm == "frozen_bn":
        yield "Frozen BN has no statistics without a pre-trained model (Sec. 3.1); use --norm gn"
    if args.init == "random" and recipe.freeze_at > 0:
        # It cost Detectron 3.3 AP.
        yield f"freeze_at {recipe.freeze_at} would freeze random layers; use --freeze-at 0"
    if recipe.drops[0] < recipe.warmup_iterations:
        yield f"the rate would drop at {recipe.drops[0]:,}, before the warm-up ends; train longer"
    if recipe.iterations < recipe.cascade_iterations:
        yield f"the cascade takes {recipe.cascade_iterations:,} iterations; train longer"
    if recipe.norm == "syncbn" and recipe.compile and rank_and_size()[1] > 1:
        yield "SyncBN over several processes cannot be compiled; leave --compile out"
    if recipe.norm in ("syncbn", "bn") and args.recompute:
        yield "--recompute would take the statistics of BN twice; use it with --norm gn"


def check(recipe, args):
    """Refuse what cannot work, before anything is run. Raises UserError."""
    for problem in problems(recipe, args):
        raise UserError(f"{args.recipe}: {problem}.", code=2)


def make_datasets(recipe, args):
    """Training and validation set, from --data or generated. Raises UserError."""
    root = args.data
    if root is None:
        if not args.recipe.startswith("toy"):
            raise UserError(f"The recipe {args.recipe} needs --data DIR.", code=2)
        from tools.toy_coco import make_toy_coco

        root = "toy_coco"
        if rank_and_size()[0] == 0:
            make_toy_coco(root)
        if dist.is_initialized():
            dist.barrier()
    kind = {"masks": recipe.masks, "keypoints": recipe.keypoints > 0}
    chosen = {"subset": recipe.subset, "keep_empty": recipe.keep_empty}
    train_set = data.open_split(root, args.train_split, training=True, **kind, **chosen)
    val_set = data.open_split(root, args.val_split, **kind)
    data.check_classes(val_set, train_set.classes, train_set.annotation_file)
    iterations = min(recipe.iterations, args.iterations or recipe.iterations)
    epochs = round(iterations * recipe.batch_size / len(train_set))
    if epochs > 3000:  # the most of a recipe for COCO are r50-gn-1k's 640
        what = f"{epochs:,} epochs of {len(train_set):,} images are more than 3,000"
        advice = "give --schedule, or a recipe for few images (small; finetune with --init FILE)"
        raise UserError(f"{what}; {advice}.", code=2)
    return train_set, val_set


def describe(recipe, args, world_size, num_images):
    """The plan of a run as text: iterations, epochs, where the rate drops, the batch."""
    rates = [f"{learning_rate(drop, recipe):.3g} from {drop:,}" for drop in recipe.drops]
    lines = [
        f"Schedule  {recipe.iterations:,} iterations of {recipe.batch_size} images",
        f"Rate      {recipe.learning_rate:.3g}, {', '.join(rates)}; "
        f"linear warm-up over {recipe.warmup_iterations:,}",
        f"Batch     {world_size} process(es) x {recipe.images_per_gpu} images",
    ]
    if num_images:
        epochs = recipe.iterations * recipe.batch_size / num_images
        lines[0] += f": {epochs:.1f} epochs of {num_images:,} images"
    ratio = recipe.batch_size / RECIPES[args.recipe].batch_size
    if ratio != 1:
        lines[2] += f", {ratio:g} of the recipe's: rate x {ratio:g}, iterations x {1 / ratio:g}"
    if recipe.cascade_iterations:
        lines.append(f"Cascade   from {recipe.iterations - recipe.cascade_iterations:,}")
    return "\n".join(lines)


def print_header(recipe, args, checkpoint, model, train_set, val_set, device):
    """What is going to happen, in a few lines."""
    rank, world_size = rank_and_size()
    if rank > 0:
        return
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    start = "random weights" if args.init == "random" else args.init
    mean, std = model.config.image_mean, model.config.image_std  # of images in [0, 1]
    mean, std = (", ".join(f"{255 * value:.2f}" for value in values) for values in (mean, std))
    print(
        f"{args.recipe}: {recipe.backbone} {recipe.norm}, {parameters:.1f} M parameters, from "
        f"{start}, {recipe.freeze_at} stages frozen\n"
        f"{describe(recipe, args, world_size, len(train_set))}\n"
        f"Data      {train_set.annotation_file}: {len(train_set):,} training images "
        f"({train_set.num_dropped:,} without a usable object left out), "
        f"{len(train_set.classes)} classes, {len(val_set):,} validation images\n"
        f"Images    minus {mean}, divided by {std} (RGB, 0 to 255)\n"
        f"Device    {device}, torch {torch.__version__}, seed {args.seed}, {args.workers} loading "
        f"processes; everything goes to {args.out}"
    )
    if args.iterations and args.iterations < recipe.iterations:
        print(f"Stops     after {args.iterations:,} iterations")
    if checkpoint:
        print(f"Resumes   {checkpoint['path']}, after iteration {checkpoint['iteration']:,}")
        then = checkpoint["world_size"], checkpoint["num_images"]
        if then != (world_size, len(train_set)):
            text = f"written by {then[0]} process(es) with {then[1]:,} images: from here on, other"
            print(f"          {text} images share a batch than in an undisturbed run")


def compare_processes(**facts):
    """Refuse, on every process, facts that must be the same on all of them and are not."""
    everywhere = [facts]
    if dist.is_initialized():
        everywhere = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, facts)
    for name in facts:
        values = [theirs[name] for theirs in everywhere]
        if any(value != values[0] for value in values):
            seen = f"{name} ({', '.join(map(str, values))})"
            raise UserError(f"The processes differ in {seen}; start all of them alike.", code=2)


def run(arguments):
    """The command line. Raises UserError, model.WeightsError and OSError."""
    args = parse_arguments(arguments)
    if args.list:
        for name, recipe in RECIPES.items():
            print(f"{name:24} {recipe.iterations:>9,} iterations   {recipe.paper}")
        return
    recipe = make_recipe(args)
    check(recipe, args)
    if args.dry_run is not None:
        from tools.plan import show_plan

        return show_plan(recipe, args)

    rank, world_size, device = evaluate.start_processes(args.device)
    if args.workers is None:  # a GPU gets its share of the cores; on a CPU, these train
        share = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.workers = 2 if device.type == "cpu" else min(max(share, 2), 16)
    recipe = scale_to_batch(recipe, recipe.images_per_gpu * world_size)
    recipe = replace(recipe, eval_every=args.eval_every or recipe.eval_every)
    check(recipe, args)  # again, with the numbers of this batch
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 in fc layers, too
    train_set, val_set = make_datasets(recipe, args)
    with evaluate.lock_folder(args.out) if rank == 0 else contextlib.nullcontext():
        checkpoint = find_checkpoint(recipe, args, train_set)
        compare_processes(
            **dataclasses.asdict(recipe) | {"recipe": args.recipe, "seed": args.seed},
            init=Path(args.init).name,
            stop=args.iterations,
            classes=train_set.classes,
            images=hash(tuple(train_set.image_ids)),
            checkpoint=checkpoint["iteration"] if checkpoint else 0,
        )
        train(recipe, args, checkpoint, train_set, val_set, device)


def main(arguments=None):
    return evaluate.run_command("train.py", run, arguments)


if __name__ == "__main__":
    sys.exit(main())
