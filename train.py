"""Training Mask R-CNN from random weights (or fine-tuning it): every experiment of the paper.

He, Girshick, Dollar, "Rethinking ImageNet Pre-training" (arXiv 1811.08883), Sec. 4 and 5.

  torchrun --nproc-per-node 8 train.py --recipe r50-gn --data coco   the paper's first row, 6x
  python train.py                                                    generated data, without a GPU

The file in reading order:

  the paper's recipes -> learning rate -> optimizer -> the loop -> cascade switch -> checkpoints
  -> other recipes -> command line

Training from random weights needs two things: a normalization that works with small batches
(norms.py; the fine-tuned baseline has it, too) and more iterations. Besides, no layer is frozen.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
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
from evaluate import gather, rank_and_size

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
    settings: dict = dataclasses.field(default_factory=dict)  # other fields of model.Config
    freeze_at: int = 0  # random layers must not be frozen (Sec. 3.1)
    freeze_at_pretrained: int = 2  # stem and res2, as in Detectron's GN baselines

    # Sec. 4 "Learning rate scheduling"
    iterations: int = SCHEDULES["6x"]  # of this run; here: from random weights
    iterations_pretrained: int = SCHEDULES["2x"]
    one_x: float = SCHEDULES["1x"]  # the length of --schedule 1x
    # "The last 60k and last 20k iterations", *whatever the total*. (Below 1: fractions of it.)
    tails: tuple = (60_000, 20_000)
    drop_factor: float = 0.1  # of the rate at the beginning of each tail

    # Sec. 4 "Hyper-parameters"
    batch_size: int = 16  # images of all GPUs together, for which the numbers here hold
    images_per_gpu: int = 2
    learning_rate: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    bias_rate_factor: float = 2.0  # biases and betas learn at twice the rate (Detectron)
    warmup_iterations: int = 500  # linear, from a third of the rate (Detectron)
    warmup_factor: float = 1 / 3
    amp: bool = False  # convolutions and matrix products in bfloat16; not the paper's

    # Images
    subset: int | None = None  # how many of the training images are used; None: all
    min_sizes: tuple = (800,)  # shorter side: one of these is drawn for each image
    max_size: int = 1333  # longest side allowed
    test_size: int = 800  # shorter side
    flip: bool = True  # the mirror image, with probability 1/2

    # Running it
    eval_every: int = 30_000  # iterations, which scale with the batch
    checkpoint_every: int = 2_500  # the same
    log_every: int = 20  # iterations, which do not

    paper: str = ""  # the paper's AP, shown by --list

    @property
    def drops(self):
        """The iterations at which the rate drops: where each tail begins. 6x: 480,000, 520,000."""
        lengths = [tail * self.iterations if tail < 1 else tail for tail in self.tails]
        return sorted(self.iterations - round(length) for length in lengths)

    @property
    def cascade_start(self):
        """The iteration at which training switches to a cascade; without one, the end."""
        return self.iterations - self.cascade_iterations

    @property
    def first_change(self):
        """Where this schedule first differs from a longer one: branches start here (--from)."""
        return min(self.drops[0], self.cascade_start)


# Train-time scale augmentation (Sec. 5.1): one of these shorter sides for each image, multiples of
# 32 as in Detectron. COCO's subsets (Sec. 5.2) have the wider range.
AUGMENTED = tuple(range(640, 801, 32))
AUGMENTED_MORE = tuple(range(512, 801, 32))

# fmt: off
# Sec. 5.1 "Enhanced baselines"
ENHANCED = dict(
    min_sizes=AUGMENTED, iterations=SCHEDULES["9x"], iterations_pretrained=SCHEDULES["6x"],
)
# The switch to a cascade is 270k iterations before the end, here of fine-tuned runs too.
CASCADE = dict(cascade_iterations=270_000)

# Sec. 5.2: the rates and sizes that the paper found for 35k images. The paper gives totals for 10k;
# those for 35k (9x), 3.5k and 1k are ours. So are the drops of VOC, 10k and less: at 6x's
# proportions, because the shortest of these runs have fewer iterations than 6x's tails.
LESS_DATA = dict(learning_rate=0.04, drop_factor=0.02, min_sizes=AUGMENTED_MORE)
NINTHS = (1 / 9, 1 / 27)

# Every row states only what it changes; --list prints them. AP is bbox / mask.
RECIPES = {
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
    # Figure 6: keypoints (Detectron trains them with scale jitter)
    "r50-gn-keypoints": Recipe(
        masks=False, keypoints=17, iterations=SCHEDULES["2x"], min_sizes=AUGMENTED,
        paper="2x keypoint AP: random 65.6, pre-trained 65.5",
    ),
    # Sec. 5.1 "Models without BN/GN": Faster R-CNN without FPN. Without a norm, images must be
    # divided by their deviation, which model.BACKBONES["vgg16"] says.
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
    # Sec. 5.2: PASCAL VOC, Faster R-CNN, trainval2007 + train2012, tested on val2012; --data is
    # what tools/to_coco.py makes of the devkit
    "r101-gn-voc": Recipe(
        backbone="resnet101", masks=False, min_sizes=AUGMENTED,
        iterations=144_000, iterations_pretrained=18_000, tails=NINTHS,
        paper="mAP at IoU 0.5: random 77.6, pre-trained 82.7",
    ),
}
# fmt: on


def scale_to_batch(recipe, batch_size):
    """The recipe for another batch size, by the linear scaling rule (Goyal et al., 2017).

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
        cascade_iterations=scaled(recipe.cascade_iterations) if recipe.cascade_iterations else 0,
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
    # Warm-up: rate * ((1 - t) / 3 + t), with t from 0 to 1. The first gradients are large and all
    # point the same way, away from random predictions. Momentum adds them up, and full steps would
    # diverge.
    if iteration < recipe.warmup_iterations:
        t = iteration / recipe.warmup_iterations
        rate *= recipe.warmup_factor * (1 - t) + t
    return rate


# -- Optimizer -------------------------------------------------------------------------------------


def make_optimizer(model, recipe):
    """SGD with Detectron's three groups of parameters.

    Weights decay. Gammas of norms do not. Biases and betas do not either, and learn at twice the
    rate.

      momentum <- 0.9 * momentum + gradient + decay * weight
      weight   <- weight - rate * momentum

    The rate is not part of the momentum, so a drop needs no correction. In Caffe2 it is, which
    Detectron's SCALE_MOMENTUM corrects.
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
        {"params": weights, "rate_factor": 1.0, "weight_decay": recipe.weight_decay},
        {"params": gammas, "rate_factor": 1.0, "weight_decay": 0.0},
        {"params": biases, "rate_factor": recipe.bias_rate_factor, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, recipe.learning_rate, recipe.momentum, fused=True)


# -- The loop --------------------------------------------------------------------------------------


def train(recipe, args, checkpoint, train_set, val_set, device):
    """Train by `recipe`, scaled to the batch already; checkpoint: as from `find_checkpoint`."""
    model, optimizer = start_model(recipe, args, checkpoint, train_set, device)
    ddp = wrap(model)
    iteration = checkpoint["iteration"] if checkpoint else 0
    last = min(recipe.iterations, args.stop_after or recipe.iterations)
    loader = iter(make_loader(recipe, args, train_set, iteration))
    log = Log(args.out, iteration, last)
    kept = kept_iterations(recipe)
    signals, stop = watch_signals(), False
    if evaluation_due(iteration, recipe, last):  # perhaps the run was killed while it evaluated
        evaluate_and_log(model, val_set, args, iteration, log)
    with log.bar:
        while iteration < last and not stop:
            # Sec. 5.1: a cascade recipe trains three box heads in its last 270k iterations.
            if iteration >= recipe.cascade_start and not model.config.cascade:
                model, optimizer = grow_to_cascade(model, optimizer, recipe)
                ddp = wrap(model)

            # 1) The next batch, and the learning rate of this iteration (biases: twice as much)
            images, targets = to_device(*next(loader), device)
            rate = learning_rate(iteration, recipe)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["rate_factor"]

            # 2) The losses (what they are at first: model.py, `MaskRCNN.losses`)
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.amp):
                losses = ddp(images, targets)

            # 3) The gradients, averaged over the processes by DDP
            optimizer.zero_grad(set_to_none=True)
            sum(losses.values()).backward()

            # 4) A step of SGD, if all is finite (else: an error). stop: a signal has come.
            stop = check_step(iteration, model, losses, targets, signals)
            optimizer.step()
            iteration += 1

            # 5) A line of the log, a checkpoint, an evaluation
            log.bar.update()
            if iteration % recipe.log_every == 0 or iteration == last:
                log.step(iteration, rate, losses, recipe.batch_size)
            is_due = evaluation_due(iteration, recipe, last)
            if is_due or stop or iteration % recipe.checkpoint_every == 0 or iteration in kept:
                save_checkpoint(model, optimizer, iteration, recipe, args, train_set)
            if is_due and not stop:
                evaluate_and_log(model, val_set, args, iteration, log)
    if stop:
        say(f"Stopped by a signal after step {iteration:,}; --resume continues.")
    else:
        show_results(model, val_set, args)


# -- What the loop calls ---------------------------------------------------------------------------


def evaluation_due(iteration, recipe, last):
    return iteration > 0 and (iteration % recipe.eval_every == 0 or iteration == last)


def check_step(iteration, model, losses, targets, signals):
    """UserError if a loss or gradient of any process is not finite; whether any got a signal.

    All look together, in one all-reduce, and so end together. The weights are still those of before
    the step. Gradients may overflow where the loss does not.
    """
    total = sum(losses.values()).detach()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    is_bad = ~(total + nn.utils.get_total_norm(gradients)).isfinite()
    flags = torch.stack([is_bad, torch.full_like(is_bad, len(signals) > 0)]).int()
    if dist.is_initialized():
        dist.all_reduce(flags)
    any_bad, any_signal = flags.tolist()
    if any_bad:
        values = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
        here = f"{values} (images {', '.join(str(target['image_id']) for target in targets)})"
        bad_losses = filter(None, gather(None if total.isfinite() else here))
        where = " and ".join(bad_losses) or here  # here: only the gradient is bad
        raise UserError(
            f"The loss or gradient of step {iteration:,} is not finite: {where}; look at these "
            "images, or --resume with another --seed or a lower --learning-rate."
        )
    return any_signal > 0


def start_model(recipe, args, checkpoint, train_set, device):
    """The model and its optimizer as the run starts with them: random, pre-trained or resumed."""
    torch.manual_seed(args.seed)  # the same weights on every process
    if checkpoint:
        model = detector.build_model(**checkpoint["config"])
        model.load_state_dict(checkpoint.pop("weights"))
    else:
        settings = {"masks": recipe.masks, "keypoints": recipe.keypoints}
        settings |= {"freeze_at": recipe.freeze_at, "num_classes": len(train_set.classes)}
        if recipe.cascade_iterations:  # from the start, so that stage 1 survives the switch
            settings["box_class_agnostic"] = True
        settings |= recipe.settings
        if args.init != "random":  # pre-trained weights decide where the stride is
            config = detector.read_checkpoint(args.init)["config"]
            settings["stride_in_1x1"] = config["stride_in_1x1"]
        model = detector.build_model(recipe.backbone, recipe.norm, **settings)
        if args.init != "random":
            say(detector.load_weights(model, args.init))
    model.data_settings |= {"min_size": recipe.test_size, "max_size": recipe.max_size}
    model.data_settings |= {"classes": train_set.classes, "category_ids": train_set.category_ids}
    place(model, device)
    optimizer = make_optimizer(model, recipe)
    if checkpoint:
        set_momentum(model, optimizer, checkpoint.pop("momentum"))
    return model, optimizer


def place(model, device):
    """Put the model on its device, in training mode; on a GPU in the format of its convolutions."""
    memory = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    model.to(device, memory_format=memory).train()


def wrap(model):
    """The model in DDP where there are several processes."""
    return DistributedDataParallel(model) if dist.is_initialized() else model


def make_loader(recipe, args, train_set, iteration):
    """The batches of this process from `iteration` on, endlessly."""
    rank, world_size = rank_and_size()
    share = {"rank": rank, "world_size": world_size, "start_iteration": iteration}
    sampler = data.BatchSampler(train_set, recipe.images_per_gpu, args.seed, **share)
    images = data.TrainingSet(train_set, recipe.min_sizes, recipe.max_size, recipe.flip)
    return data.read_ahead(images, args.workers, sampler)


def to_device(images, targets, device):
    """A batch of the loader on the device; what is no tensor stays as it is."""

    def move(value):
        return value.to(device) if torch.is_tensor(value) else value

    targets = [{name: move(value) for name, value in target.items()} for target in targets]
    return [move(image) for image in images], targets


def watch_signals():
    """A list to which SIGTERM and Ctrl-C are added from now on; the second one ends the process."""
    signals = []

    def receive(number, _):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, receive)
    return signals


class Log:
    """OUT/log.jsonl, a JSON object a line, and the progress bar; the first process writes."""

    def __init__(self, out, start, last):
        """Cut the log to `start`: the run repeats what it had logged later."""
        self.path, self.clock = Path(out) / "log.jsonl", (start, time.perf_counter())
        is_first = rank_and_size()[0] == 0
        if is_first:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_text().splitlines(True) if self.path.exists() else []
            records = [json.loads(line) for line in lines if line.endswith("\n")]  # not a half one
            # The step to `start` is in the checkpoint; an evaluation at `start` comes after it.
            kept = [r for r in records if r["iteration"] < start]
            kept += [r for r in records if r["iteration"] == start and "loss" in r]
            text = "".join(json.dumps(record) + "\n" for record in kept)
            detector.write_whole(self.path, text.encode())
        self.bar = tqdm(total=last, initial=start, disable=not is_first, dynamic_ncols=True)

    def write(self, record):
        if rank_and_size()[0] == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
        self.clock = record["iteration"], time.perf_counter()

    def step(self, iteration, rate, losses, batch_size):
        """A record of a training step. Its losses are means over the processes."""
        values = torch.stack([sum(losses.values()), *losses.values()]).detach()
        if dist.is_initialized():
            dist.all_reduce(values)
            values /= dist.get_world_size()
        values = {k: round(v, 6) for k, v in zip(["loss", *losses], values.tolist())}
        before, then = self.clock
        speed = (iteration - before) * batch_size / (time.perf_counter() - then)
        record = {"iteration": iteration, "lr": rate} | values
        record["images_per_second"] = round(speed, 3)
        if torch.cuda.is_available():
            record["peak_memory_mb"] = torch.cuda.max_memory_allocated() >> 20
        self.write(record)
        self.bar.set_postfix_str(f"loss {values['loss']:.3f}, {speed:.1f} images/s")


def evaluate_and_log(model, val_set, args, iteration, log):
    metrics = evaluate.evaluate(model, val_set, args.out, workers=args.workers)
    log.write({"iteration": iteration, **metrics})
    say(f"Iteration {iteration:,}\n{evaluate.format_table(metrics)}")


def show_results(model, val_set, args):
    """The end of a run: pictures, and what to look at next."""
    if rank_and_size()[0] > 0 or not checkpoints_in(args.out):  # (--from may leave no step to make)
        return
    names = [val_set.record(i)["file_name"] for i in range(min(8, len(val_set)))]
    paths = [os.path.join(val_set.image_dir, name) for name in names]
    list(evaluate.predict_files(model, paths, f"{args.out}/pictures"))
    weights = checkpoints_in(args.out)[-1]
    objects = f" --data {args.data}" if args.val_split == "val2017" else ""
    inside = f"--weights {weights}{objects} --image {paths[0]} --out {args.out}/inside"
    print(f"Weights:  {weights}\nLog:      {args.out}/log.jsonl\nPictures: {args.out}/pictures")
    print(f"Curves:   python tools/plot.py {args.out} --out {args.out}/curves.png")
    print(f"Inside:   python tools/look_inside.py {inside}")


def say(text):
    """Print on the first process, above the progress bar."""
    if rank_and_size()[0] == 0:
        tqdm.write(text)


# -- The cascade switch ----------------------------------------------------------------------------


def grow_to_cascade(model, optimizer, recipe):
    """The model as a three-stage cascade, with an optimizer for it (Sec. 5.1 "Enhanced baselines").

    Stages 2 and 3 start as copies of stage 1. Stage s divides its deltas by s * (10, 10, 5, 5)
    (model.py, `box_weights`), so the regressor copied to it is multiplied by s: it then predicts
    the same boxes as stage 1. Parameters that there were before keep their momentum.
    """
    grown = detector.build_model(**dataclasses.asdict(model.config) | {"cascade": True})
    state = model.state_dict()
    for name, tensor in list(state.items()):
        if name.startswith("box_heads.0."):
            for stage in (2, 3):  # box_heads counts from 0
                factor = stage if ".regressor." in name else 1
                state[name.replace("box_heads.0", f"box_heads.{stage - 1}")] = tensor * factor
    grown.load_state_dict(state)
    grown.data_settings = model.data_settings
    place(grown, model.image_mean.device)
    grown_optimizer = make_optimizer(grown, recipe)
    set_momentum(grown, grown_optimizer, momentum_of(model, optimizer))
    return grown, grown_optimizer


# -- Checkpoints: save, resume, branch off another run ---------------------------------------------

# Exact resume needs three things, and nothing else:
#
#               saved by                        restored by
#   weights     save_checkpoint                 start_model
#   momentum    save_checkpoint, momentum_of    start_model, set_momentum
#   iteration   save_checkpoint                 train: rate, cascade, log, the loader's first batch
#
# Which images make a batch, their flips, and the sampling of anchors and RoIs are functions of
# (seed, iteration, position in the batch): data.py, "The route of the seed".
#
# A checkpoint also holds the identity of its run. A run continues from it only if its own is equal.


def identity(recipe, args, train_set):
    """The facts that make a run this run; all its processes must agree on them."""
    facts = dataclasses.asdict(recipe) | {"recipe": args.recipe, "seed": args.seed}
    for name in ("eval_every", "checkpoint_every", "log_every", "paper"):  # change no weight
        del facts[name]
    images = hashlib.sha1(repr(train_set.image_ids).encode()).hexdigest()[:8]
    return facts | {"init": Path(args.init).name, "classes": train_set.classes, "images": images}


def differences(theirs, ours):
    """{name: text} of what differs between the identities of two runs."""
    names = [name for name in ours if theirs.get(name) != ours[name]]
    return {n: f"{n} ({theirs.get(n)!r:.60} there, {ours[n]!r:.60} here)" for n in names}


def momentum_of(model, optimizer):
    """SGD's momentum by parameter name, so that it fits a model that has grown to a cascade."""
    state = {name: optimizer.state.get(p, {}) for name, p in model.named_parameters()}
    return {name: s["momentum_buffer"] for name, s in state.items() if s}


def set_momentum(model, optimizer, momentum):
    """The inverse of `momentum_of`; parameters that `momentum` does not name start with zero.

    A momentum of zero acts like none. Fused SGD wants one for every parameter of a group or none.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            buffer = torch.zeros_like(parameter, requires_grad=False)
            optimizer.state[parameter]["momentum_buffer"] = buffer
            if name in momentum:
                buffer.copy_(momentum[name])


def iteration_of(path):
    return int(path.stem.removeprefix("checkpoint_"))


def checkpoints_in(out):
    """Paths of the checkpoints of a run, oldest first."""
    return sorted(Path(out).glob("checkpoint_*.pth"), key=iteration_of)


def kept_iterations(recipe):
    """Iterations whose checkpoints are kept for good: where the schedule changes, or others branch.

    All schedules of a recipe are the same until their first change. Branched off a run of 6x, 2x to
    5x cost their last 60k iterations each (--from): all five take 780k instead of 1.8M.
    """
    count = math.ceil(recipe.iterations / recipe.one_x)
    shorter = (replace(recipe, iterations=round(n * recipe.one_x)) for n in range(1, count))
    branch_points = {schedule.first_change for schedule in shorter}
    return {*recipe.drops, *branch_points, recipe.cascade_start}


def save_checkpoint(model, optimizer, iteration, recipe, args, train_set):
    """Write a checkpoint; keep the last two and `kept_iterations`. All processes call this."""
    if dist.is_initialized():
        for buffer in model.buffers():  # BN's statistics: the next evaluation uses the saved ones
            dist.broadcast(buffer, 0)
    if rank_and_size()[0] > 0:
        return
    run, momentum = identity(recipe, args, train_set), momentum_of(model, optimizer)
    path = Path(args.out) / f"checkpoint_{iteration:07d}.pth"
    detector.save_model(model, path, momentum=momentum, iteration=iteration, run=run)
    for old in checkpoints_in(args.out)[:-2]:
        if iteration_of(old) not in kept_iterations(recipe):
            old.unlink()


def find_checkpoint(recipe, args, train_set):
    """What the run continues from: its own last checkpoint, another run's, or nothing (None)."""
    found = checkpoints_in(args.out)
    if found and not args.resume:
        there = f"{args.out} has a run already ({found[-1].name})"
        raise UserError(f"{there}; give --resume to continue it, or another --out.")
    if found:
        return read_run(found[-1], identity(recipe, args, train_set), args.may_change)
    return read_branch_point(recipe, args, train_set) if args.source else None


def read_run(path, ours, may_change):
    """A checkpoint to continue from. UserError if its run differs from `ours`, an `identity`."""
    checkpoint = detector.read_checkpoint(path)
    differ = differences(checkpoint.get("run", {}), ours)
    advice = {
        "recipe": "give another --out",
        "init": "give another --out",
        "batch_size": "choose --images-per-gpu and the number of processes so that it stays",
        "iterations": f"branch off it with --from {path.parent} and a new --out",
    }
    for cause in advice:  # other differences follow from these
        if cause in differ:
            raise UserError(f"{path} is of a run with another {differ[cause]}; {advice[cause]}.")
    changes = [differ.pop(name) for name in may_change if name in differ]
    if differ:
        raise UserError(f"{path} is of another run: {', '.join(differ.values())}.")
    return checkpoint | {"path": path, "changes": changes}


def read_branch_point(recipe, args, train_set):
    """The last checkpoint that this schedule shares with the run in the folder --from.

    That run may be longer or shorter than this one, finished or not: the two are the same until
    either of them changes, for nothing before that depends on the total.
    """
    found = checkpoints_in(args.source)
    total = detector.read_checkpoint(found[-1]).get("run", {}).get("iterations", 0) if found else 0
    branch_point = min(recipe.first_change, replace(recipe, iterations=total).first_change)
    shared = [path for path in found if iteration_of(path) <= branch_point]
    if not shared:
        raise UserError(f"--from {args.source}: it has no checkpoint that both schedules share.")
    ours = identity(recipe, args, train_set) | {"iterations": total}  # only the totals differ
    return read_run(shared[-1], ours, args.may_change)


# -- Recipes that are not the paper's: generated data, own data ------------------------------------

# fmt: off
# Generated data: a narrow network on small images, some minutes on two CPU cores
NARROW = dict(
    blocks=(1, 1, 1, 1), stem_width=32, width_per_group=32, fpn_channels=64, box_head_channels=64,
    box_head_fc_channels=256, mask_head_channels=64, keypoint_head_channels=64,
    anchor_sizes=((16,), (32,), (64,), (128,), (256,)),
    rpn_pre_nms_top_n_train=500, rpn_post_nms_top_n_train=250,
    rpn_pre_nms_top_n_test=500, rpn_post_nms_top_n_test=250,
    box_batch_size_per_image=32, roi_sampling_ratio=1,
)
TOY = Recipe(
    settings=NARROW, iterations=800, iterations_pretrained=320, one_x=160, tails=(140, 50),
    batch_size=8, images_per_gpu=8, learning_rate=0.1, warmup_iterations=60,
    min_sizes=(128,), max_size=213, test_size=128,
    eval_every=800, checkpoint_every=160, log_every=10, paper="(generated data)",
)

RECIPES |= {
    # Own pictures, some hundred of them, on a CPU or one GPU (docs/own-data.md)
    "small": replace(
        TOY, settings=NARROW | {"box_batch_size_per_image": 64}, batch_size=4, images_per_gpu=4,
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
    # Generated data
    "toy": TOY,
    "toy-syncbn": replace(TOY, norm="syncbn"),
    "toy-cascade": replace(TOY, cascade_iterations=267),
    # Layers without a norm need a lower rate: those of the keypoint head, and VGG's.
    "toy-keypoints": replace(TOY, masks=False, keypoints=17, learning_rate=0.02),
    "toy-vgg": replace(
        TOY, backbone="vgg16", norm="none", masks=False, learning_rate=0.03, settings=dict(
            stem_width=16, box_head_fc_channels=256, anchor_sizes=((16, 32, 64, 128),),
            box_batch_size_per_image=64)),
}
# fmt: on


# -- Command line ----------------------------------------------------------------------------------


def parse_arguments(arguments):
    # fmt: off
    parser = argparse.ArgumentParser(
        description="Train Mask R-CNN from random weights. Without arguments: the recipe toy, on "
        "data that is generated first. Under torchrun: on all the processes that it starts.")
    add = parser.add_argument
    add("--recipe", default="toy", metavar="R", choices=list(RECIPES), help="see --list (toy)")
    add("--schedule", metavar="Nx", choices=list(SCHEDULES), help="length: N times the recipe's 1x")
    add("--data", metavar="DIR", help="a folder in COCO's layout (toys: generated)")
    add("--train-split", default="train2017", metavar="NAME", help="(train2017)")
    add("--val-split", default="val2017", metavar="NAME", help="(val2017)")
    add("--out", metavar="DIR", help="for checkpoints, log and pictures (runs/RECIPE)")
    add("--init", default="random", metavar="random|PATH", help="weights to start from (random)")
    add("--no-masks", action="store_true", help="train boxes only")
    add("--norm", choices=["gn", "syncbn", "bn", "frozen_bn"], help="instead of the recipe's")
    add("--freeze-at", type=int, choices=range(6), help="freeze so many of stem, res2, res3, ...")
    add("--amp", action="store_true", help="convolutions in bfloat16: faster, not the paper's")
    add("--subset", type=int, metavar="N", help="train on N images, the same on every machine")
    add("--images-per-gpu", type=int, metavar="N", help="rate and schedule scale with the batch")
    add("--learning-rate", type=float, metavar="R", help="the rate at the recipe's own batch size")
    add("--stop-after", type=int, metavar="N", help="stop after iteration N of the schedule")
    add("--eval-every", type=int, metavar="N", help="iterations between evaluations")
    add("--workers", type=int, default=2, metavar="N", help="loader processes per GPU (2)")
    add("--seed", type=int, metavar="N", help="random seed of the whole run (0)")
    add("--device", metavar="D", help="cuda or cpu (cuda if there is one)")
    add("--from", dest="source", metavar="DIR", help="branch off a longer or shorter run of the "
        "same recipe, at the last checkpoint that both schedules share")
    add("--resume", action="store_true", help="continue the run in --out, if there is one; another "
        "--seed or --learning-rate may be given")
    add("--list", action="store_true", help="show the recipes with the paper's AP, and exit")
    # fmt: on
    args = parser.parse_args(arguments)
    args.out = args.out or f"runs/{args.recipe}"
    # A run may go on with these, if they are given, and with another number of images on each GPU.
    given = [name for name in ("seed", "learning_rate") if getattr(args, name) is not None]
    args.may_change = [*given, "images_per_gpu"]
    args.seed = args.seed or 0
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
    for name in ("norm", "freeze_at", "subset", "images_per_gpu", "learning_rate"):
        if getattr(args, name) is not None:
            changes[name] = getattr(args, name)
    switches = {"amp": recipe.amp or args.amp, "masks": recipe.masks and not args.no_masks}
    return replace(recipe, **changes, **switches)


def check(recipe, args):
    """Raise UserError for what cannot work, or would cost AP without a word."""

    def refuse(condition, problem):
        if condition:
            raise UserError(f"{args.recipe}: {problem}.")

    if args.init == "random":
        problem = "frozen BN needs the statistics of a pre-trained model (Sec. 3.1); use --norm gn"
        refuse(recipe.norm == "frozen_bn", problem)
        problem = "frozen random layers cost Detectron 3.3 AP; use --freeze-at 0"
        refuse(recipe.freeze_at > 0, problem)
    problem = f"the rate would drop at {recipe.drops[0]:,}, before the warm-up ends; train longer"
    refuse(recipe.drops[0] < recipe.warmup_iterations, problem)
    refuse(recipe.cascade_start < 0, "the cascade takes longer than the run; train longer")
    if recipe.amp and torch.cuda.is_available():
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        refuse(not has_bfloat16, "this GPU has no bfloat16; leave --amp out")


def make_datasets(recipe, args):
    """Training and validation set, from --data or generated. Raises UserError."""
    if args.data is None:
        if not args.recipe.startswith("toy"):
            raise UserError(f"The recipe {args.recipe} needs --data DIR.")
        from tools.toy_coco import make_toy_coco

        args.data = "toy_coco"
        if rank_and_size()[0] == 0:
            make_toy_coco(args.data)
        gather("generated")  # all wait for the first process
    kind = {"masks": recipe.masks, "keypoints": recipe.keypoints > 0}
    chosen = {"training": True, "subset": recipe.subset}
    train_set = data.open_split(args.data, args.train_split, **chosen, **kind)
    val_set = data.open_split(args.data, args.val_split, **kind)
    data.check_classes(val_set, train_set.classes, train_set.annotation_file)
    return train_set, val_set


def describe(recipe, args, world_size, num_images):
    """The plan of a run as text: iterations, epochs, where the rate drops, the batch."""
    total, batch = recipe.iterations, recipe.batch_size
    epochs, ratio = total * batch / num_images, batch / RECIPES[args.recipe].batch_size
    rates = [f"{learning_rate(drop, recipe):.3g} from {drop:,}" for drop in recipe.drops]
    rates.append(f"linear warm-up over {recipe.warmup_iterations:,}")
    per_gpu = f"{world_size} process(es) x {recipe.images_per_gpu} images"
    lines = [
        f"Schedule  {total:,} iterations of {batch} images: {epochs:.1f} epochs of {num_images:,}",
        f"Rate      {recipe.learning_rate:.3g}, {', '.join(rates)}",
        f"Batch     {per_gpu}, {ratio:g} of the recipe's: rate x {ratio:g}, iterations / {ratio:g}",
    ]
    if recipe.cascade_iterations:
        lines.append(f"Cascade   from {recipe.cascade_start:,}")
    return "\n".join(lines)


def print_header(recipe, args, checkpoint, train_set, val_set, device):
    """What is going to happen, in a few lines."""
    say(
        f"{args.recipe}: {recipe.backbone} {recipe.norm} from {args.init} weights, "
        f"{recipe.freeze_at} stages frozen, seed {args.seed}, on {device}, torch "
        f"{torch.__version__}\n"
        f"{describe(recipe, args, rank_and_size()[1], len(train_set))}\n"
        f"Data      {len(train_set.classes)} classes, {len(train_set):,} training images "
        f"({train_set.num_dropped:,} more have no usable object), {len(val_set):,} for validation\n"
        f"Output    {args.out}"
    )
    if checkpoint:
        changes = ", ".join(checkpoint["changes"]) or "nothing"
        at = f"after iteration {checkpoint['iteration']:,}"
        say(f"Resumes   {checkpoint['path']}, {at}; changed from here on: {changes}")
    if args.workers and os.path.isdir("/dev/shm"):
        size = shutil.disk_usage("/dev/shm").total
        if size < 1e9:
            lack = f"/dev/shm has {size / 1e6:.0f} MB, and loading processes may need 1 GB"
            say(f"Memory    {lack}: use docker run --shm-size=8g, or --workers 0")


def main(arguments=None):
    """The command line. Raises UserError, model.WeightsError and OSError."""
    args = parse_arguments(arguments)
    if args.list:
        for name, recipe in RECIPES.items():
            print(f"{name:24} {recipe.iterations:>9,} iterations   {recipe.paper}")
        return
    _, world_size, device = evaluate.start_processes(args.device)
    recipe = make_recipe(args)
    recipe = scale_to_batch(recipe, recipe.images_per_gpu * world_size)
    recipe = replace(recipe, eval_every=args.eval_every or recipe.eval_every)
    check(recipe, args)
    train_set, val_set = make_datasets(recipe, args)
    checkpoint = find_checkpoint(recipe, args, train_set)
    start = checkpoint["iteration"] if checkpoint else 0
    # Every process against the first: if they differ, they would wait for ever, or train wrongly.
    everywhere = gather(identity(recipe, args, train_set) | {"starts after": start})
    differ = {}
    for theirs in everywhere:
        differ |= differences(theirs, everywhere[0])
    if differ:
        raise UserError(f"The processes differ in {', '.join(differ.values())}; start all alike.")
    print_header(recipe, args, checkpoint, train_set, val_set, device)
    train(recipe, args, checkpoint, train_set, val_set, device)


if __name__ == "__main__":
    sys.exit(evaluate.run_command("train.py", main))
