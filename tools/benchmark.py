"""Speed and memory beside torchvision's and Detectron2's Mask R-CNN of the same architecture.

  python tools/benchmark.py --data coco                             on a CPU: batch 2, fp32
  python tools/benchmark.py --data coco --device cuda --compile     batch 2 and 8; TF32 and bfloat16
  python tools/benchmark.py --data coco --quick                     small: does it run?

All sides are R50-FPN with GroupNorm(32) in backbone, FPN, 4conv1fc box head and mask head, with 80
classes, the same numbers of anchors, proposals and RoIs, 2 x 2 samples a bin of RoIAlign, and the
*same weights*: random, scaled so that there are detections. They see the same real images with
their real objects, resized before, in one process and in turn: A B C, A B C, ... Times are medians.
Detectron2's column is left out where it cannot be imported; its C++ part is not needed.

  train      forward, backward, SGD; ours also in the other memory format, and compiled
  inference  one image, masks pasted to the size of its file; on the CPU at the end
  memory     peak beyond what was there before: on CUDA of each call that is timed, on a CPU of two
             train steps or inferences in a process of their own
  loader     decode, resize, flip, boxes and masks: one process, one thread

The table goes to stdout, progress to stderr.
"""

import argparse
import contextlib
import datetime
import functools
import itertools
import math
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection import maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.rpn import RPNHead
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the five modules
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "tests"))
import make_detectron2_golden
import test_agreement

import data
import evaluate
import model as detector
import train
from tools import convert_weights

try:
    from detectron2.data import DatasetMapper
    from detectron2.data import transforms as T
    from detectron2.data.datasets.coco import load_coco_json
    from detectron2.solver import build_optimizer
    from detectron2.structures import BitMasks, Boxes, Instances
    from detectron2.utils.events import EventStorage
except ImportError as error:
    print(f"Without Detectron2: {error}", file=sys.stderr)
    Instances = None

PARTS = ("train", "inference", "memory", "loader")
RATE = 1e-9  # so small that the weights, and with them the work of a step, stay as they are
QUICK = dict(box_batch_size_per_image=16, rpn_post_nms_top_n_train=50, rpn_post_nms_top_n_test=10)

# -- The sides: bringing a batch to the device is part of a step -----------------------------------


def scaled_model(args):
    """Our model with the weights of test_agreement.py, which give real detections."""
    model = detector.build_model(**(QUICK if args.quick else {}))
    shapes = {name: tuple(t.shape) for name, t in convert_weights.to_detectron2(model).items()}
    weights = test_agreement.golden_weights("gn", shapes)
    found, _ = convert_weights.translate(weights, "detectron2", model)
    model.load_state_dict(found, strict=False)  # all but the image statistics
    return model


def compile_parts(model):
    """torch.compile what has a fixed graph: the parts with convolutions, for images of any size."""
    torch._dynamo.config.recompile_limit = 32  # all heads share one function
    heads = [*model.box_heads, *filter(None, [model.mask_head, model.keypoint_head])]
    for part in filter(None, [model.backbone, model.fpn, *(head.convs for head in heads)]):
        part.compile(dynamic=True)


class Ours:
    """This project, as train.py and evaluate.py use it."""

    def __init__(self, args, compile=False):
        self.device, self.model = args.device, scaled_model(args)
        recipe = replace(train.RECIPES["r50-gn"], learning_rate=RATE)
        train.place(self.model, args.device)
        if compile:
            compile_parts(self.model)
        self.optimizer = train.make_optimizer(self.model, recipe)

    def prepare(self, image, target):
        """What its loader gives."""
        return image, target

    def losses(self, batch):
        return self.model(*train.to_device(*zip(*batch), self.device))

    def detect(self, image, height, width):
        """Masks [N, height, width], of the image's size in its file, on the CPU."""
        [found] = self.model([image.to(self.device)])
        boxes = found["boxes"].float().cpu()
        boxes = data.move_boxes(boxes, image.shape[1:], (height, width), flip=False)
        return evaluate.paste_masks(found["masks"], boxes, height, width)


class Torchvision(Ours):
    """torchvision's model with 4conv1fc, but for its BN and the second layer of its RPN."""

    def __init__(self, args):
        own, self.device = scaled_model(args), args.device
        numbers = {name: getattr(own.config, name) for name in QUICK}
        statistics = {"image_mean": own.config.image_mean, "image_std": own.config.image_std}
        self.model = maskrcnn_resnet50_fpn_v2(num_classes=81, **numbers, **statistics)
        self.model.rpn.head = RPNHead(256, 3)
        for parent in list(self.model.modules()):
            for name, layer in parent.named_children():
                if isinstance(layer, nn.BatchNorm2d):
                    setattr(parent, name, nn.GroupNorm(32, layer.num_features))
        self.model.load_state_dict(self.renamed(own, self.model))
        self.model.transform.resize = lambda image, target: (image, target)  # that is done before
        parameters = self.model.to(args.device).parameters()
        self.optimizer = torch.optim.SGD(parameters, RATE, momentum=0.9, weight_decay=1e-4)

    @staticmethod
    def renamed(model, theirs):
        """Our weights by its names. Outside of the ResNet, the layers have the same order."""
        own, state = model.state_dict(), {}
        others = (t for name, t in own.items() if not name.startswith(("image_", "backbone.")))
        for name, there in theirs.state_dict().items():
            _, is_body, rest = name.rpartition("backbone.body.")
            ours = own[convert_weights.our_name(rest, "torchvision")] if is_body else next(others)
            # Its boxes and masks are those of the background too, before the others.
            rows = there.new_zeros(len(there) - len(ours), *there.shape[1:])
            state[name] = torch.cat([rows, ours])
        return state

    def prepare(self, image, target):
        return image / 255, target

    def detect(self, image, height, width):
        # The steps of its forward, which pastes to the size of what it is given.
        images, _ = self.model.transform([(image / 255).to(self.device)])
        features = self.model.backbone(images.tensors)
        proposals, _ = self.model.rpn(images, features)
        found, _ = self.model.roi_heads(features, proposals, images.image_sizes)
        sizes = images.image_sizes, [(height, width)]
        [found] = self.model.transform.postprocess(found, *sizes)
        return (found["masks"][:, 0] >= 0.5).cpu()


class Detectron2:
    """Detectron2's scratch_mask_rcnn_R_50_FPN_3x_gn, with our pixel mean and RoIAlign samples."""

    def __init__(self, args):
        own = scaled_model(args)
        weights = convert_weights.to_detectron2(own)
        weights = {name: t for name, t in weights.items() if not name.startswith("pixel_")}
        model = make_detectron2_golden.detectron2_model(own.config, weights)
        self.model = model.to(args.device)
        cfg = make_detectron2_golden.detectron2_config(own.config)
        cfg.SOLVER.BASE_LR = RATE
        self.optimizer = build_optimizer(cfg, self.model)

    def prepare(self, image, target):
        instances = Instances(tuple(image.shape[-2:]))
        instances.gt_boxes = Boxes(target["boxes"])
        instances.gt_classes = target["labels"] - 1
        instances.gt_masks = BitMasks(target["masks"])
        return {"image": image.flip(0), "instances": instances}

    def losses(self, batch):
        with EventStorage(0):
            return self.model(batch)

    def detect(self, image, height, width):
        [found] = self.model([{"image": image.flip(0), "height": height, "width": width}])
        return found["instances"].to("cpu").pred_masks


SIDES = {"ours": Ours, "torchvision": Torchvision}
if Instances:
    SIDES["Detectron2"] = Detectron2


def choose_samples(dataset, count, sizes):
    """The largest real images with 3 to 12 objects (COCO's mean is 7.3), w > h, after resizing.

    A list of (image, target, (height, width) of the file).
    """
    shapes = list(zip(dataset.heights.tolist(), dataset.widths.tolist()))
    chosen = [i for i, (h, w) in enumerate(shapes) if w > h]
    chosen = [i for i in chosen if 3 <= len(dataset.record(i)["objects"]) <= 12]
    chosen.sort(key=lambda i: math.prod(data.resize_shape(*shapes[i], *sizes)), reverse=True)
    return [(*dataset.load(i, *sizes), shapes[i]) for i in chosen[:count]]


# -- Time and memory. A row of the table is (title, {side: value}) ---------------------------------


say = functools.partial(print, file=sys.stderr, flush=True)


def train_step(side, batch, args, precision):
    side.model.train()
    with torch.autocast(args.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        losses = side.losses(batch)
        sum(losses.values()).backward()
    side.optimizer.step()
    side.optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def inference(side, sample, args, precision):
    """Detect in an image; how many detections there are."""
    side.model.eval()
    image, _, size = sample
    with torch.autocast(args.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return len(side.detect(image, *size))


def in_turn(title, functions, args):
    """Call the functions {name: f} in turn, after a round to warm up (CUDA: three).

    Returns median seconds {name: s} and, of CUDA, the peak of MiB {name: m}.
    """
    cuda = args.device.type == "cuda"
    times, peaks = ({name: [] for name in functions} for _ in range(2))
    for _ in range((3 if cuda else 1) + args.rounds):
        for name, function in functions.items():
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            function()
            if cuda:
                torch.cuda.synchronize()
                peaks[name].append((torch.cuda.max_memory_allocated() - before) / 2**20)
            times[name].append(time.perf_counter() - start)
    times = {name: seconds[-args.rounds :] for name, seconds in times.items()}
    for name, seconds in times.items():
        say(f"{title}: {name}", *(f"{s:.4g}" for s in seconds))
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return medians, {name: max(values) for name, values in peaks.items()} if cuda else {}


def rows_of(title, functions, args):
    """Rows of `in_turn`. What is no side is a variant of ours: its row has the same peers."""
    for what, values in zip(("s", "peak MiB"), in_turn(title, functions, args)):
        for name in [name for name in values if name == "ours" or name not in SIDES]:
            yield f"{title}, {name}: {what}", values | {"ours": values[name]}


def train_rows(sides, samples, args):
    """Rows of a training step of each batch size and precision, with variants of ours."""
    used = "channels_last" if args.device.type == "cuda" else "contiguous_format"
    [other] = {"channels_last", "contiguous_format"} - {used}
    variant = Ours(args)
    variant.model.to(memory_format=getattr(torch, other))
    sides = sides | {f"ours in {other}": variant}
    if args.compile:
        sides["ours compiled"] = Ours(args, compile=True)
    for size, precision in itertools.product(args.batch, args.precisions):
        steps = {}
        for name, side in sides.items():
            batch = [side.prepare(*pair) for *pair, _ in samples[:size]]
            steps[name] = functools.partial(train_step, side, batch, args, precision)
        yield from rows_of(f"train step of {size} images, {precision}", steps, args)


def inference_rows(sides, samples, args):
    for side in sides.values():
        side.model.to(memory_format=torch.contiguous_format)  # as evaluate.py loads it
    for precision in args.precisions:
        more = samples[0], args, precision
        runs = {name: functools.partial(inference, side, *more) for name, side in sides.items()}
        say("detections:", {name: run() for name, run in runs.items()})
        yield from rows_of(f"inference, {precision}", runs, args)


def resident(field):
    """MiB of this process on Linux: "VmRSS", now, or "VmHWM", the most so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024


def measure_memory(name, part, samples, args):
    """The peak, in MiB beyond the model, of two train steps or inferences on the CPU."""
    prepare_process(args)
    side = SIDES[name](args)
    batch = [side.prepare(*pair) for *pair, _ in samples[: args.batch[0]]]
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is what is now
    before = resident("VmRSS")
    for _ in range(2):  # from the second step on there is momentum
        if part == "train":
            train_step(side, batch, args, "fp32")
        else:
            inference(side, samples[0], args, "fp32")
    return resident("VmHWM") - before


def memory_rows(samples, args):
    for part in ("train", "inference"):
        peaks = {}
        for name in SIDES:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                peaks[name] = process.submit(measure_memory, name, part, samples, args).result()
            say(f"{part}, memory: {name} {peaks[name]:.0f}")
        yield f"{part}: peak MiB beyond the weights", peaks


# -- Loaders ---------------------------------------------------------------------------------------


def torchvision_loader(dataset, sizes):
    transforms = v2.Compose([
        v2.ToImage(), v2.RandomHorizontalFlip(), v2.Resize(sizes[0], max_size=sizes[1]),
        v2.ToDtype(torch.float32, scale=True), v2.SanitizeBoundingBoxes(),
    ])  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):
        images = CocoDetection(dataset.image_dir, dataset.annotation_file, transforms=transforms)
    places = {image_id: place for place, image_id in enumerate(images.ids)}
    images = wrap_dataset_for_transforms_v2(images, ("boxes", "labels", "masks"))
    return lambda i: images[places[dataset.image_ids[i]]]


def detectron2_loader(dataset, sizes):
    records = load_coco_json(dataset.annotation_file, dataset.image_dir)
    records = {record["image_id"]: record for record in records}
    mapper = DatasetMapper(
        is_train=True, augmentations=[T.ResizeShortestEdge(*sizes), T.RandomFlip()],
        image_format="BGR", use_instance_mask=True, instance_mask_format="bitmask",
    )  # fmt: skip
    return lambda i: mapper(records[dataset.image_ids[i]])


def loader_rows(dataset, args):
    training_set = data.TrainingSet(dataset, args.sizes[:1], args.sizes[1])
    loaders = {"ours": lambda i: training_set[[(i, i)]]}
    loaders["torchvision"] = torchvision_loader(dataset, args.sizes)
    if "Detectron2" in SIDES:
        loaders["Detectron2"] = detectron2_loader(dataset, args.sizes)
    count = min(4 if args.quick else 80, len(dataset))

    def read(load):
        for i in range(count):
            load(i)

    torch.set_num_threads(1)
    passes = {name: functools.partial(read, load) for name, load in loaders.items()}
    times, _ = in_turn("loader", passes, args)
    yield "loader: images/s of a core", {name: count / s for name, s in times.items()}


# -- The table -------------------------------------------------------------------------------------


def describe(samples, args):
    """Date, machine, versions and settings, in a sentence."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    machine = torch.cuda.get_device_name() if args.device.type == "cuda" else models[0]
    modules = ["torch", "torchvision", "detectron2"][: len(SIDES)]
    versions = [f"{name} {sys.modules[name].__version__}" for name in modules]
    versions += ["few RoIs"] if args.quick else []
    seen = [f"{i.shape[1]}x{i.shape[2]} with {len(t['boxes'])} objects" for i, t, _ in samples]
    return (
        f"{datetime.date.today()}, {machine}, {torch.get_num_threads()} threads; "
        f"{', '.join(versions)}; medians of {args.rounds} rounds; images: {', '.join(seen)}."
    )


def format_table(rows):
    """Rows as one markdown table; the ratio is ours over the better peer's."""
    lines = [f"| | {' | '.join(SIDES)} | ours / better peer |", "|---" * (len(SIDES) + 2) + "|"]
    for title, values in rows:
        peers = [value for name, value in values.items() if name in SIDES and name != "ours"]
        best = max(peers) if "images/s" in title else min(peers)
        cells = [*map(values.get, SIDES), values["ours"] / best]
        cells = ["-" if v is None else f"{v:.0f}" if v >= 100 else f"{v:.3g}" for v in cells]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="data set, COCO layout; reads train2017")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(cpu)")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="which measurements (all)")
    add("--batch", type=int, nargs="+", help="images in a train step (2; on CUDA 2 8)")
    add("--compile", action="store_true", help="add rows with our parts compiled")
    add("--rounds", type=int, help="measured rounds (5; with --quick 1)")
    add("--quick", action="store_true", help="few RoIs, few images, 128 pixels")
    args = parser.parse_args(arguments)
    args.device = torch.device(args.device)
    is_cuda = args.device.type == "cuda"
    args.batch = args.batch or ([2, 8] if is_cuda else [2])
    args.precisions = ["TF32", "bfloat16"] if is_cuda else ["fp32"]
    args.rounds = args.rounds or (1 if args.quick else 5)
    args.sizes = (128, 213) if args.quick else (800, 1333)
    return args


def prepare_process(args):
    """What train.py does for its own speed, here for all sides."""
    torch.manual_seed(0)
    evaluate.start_processes(str(args.device))
    if args.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32


def main(arguments=None):
    args = parse_arguments(arguments)
    prepare_process(args)
    dataset = data.open_split(args.data, "train2017", training=True)
    samples = choose_samples(dataset, max(args.batch), args.sizes)
    head, rows = describe(samples, args), []
    if {"train", "inference"} & {*args.parts}:
        sides = {name: side(args) for name, side in SIDES.items()}
    if "train" in args.parts:
        rows += train_rows(sides, samples, args)
    if "inference" in args.parts:
        rows += inference_rows(sides, samples, args)
    if "memory" in args.parts and args.device.type == "cpu":
        rows += memory_rows(samples, args)
    if "loader" in args.parts:
        rows += loader_rows(dataset, args)
    print(f"{head}\n\n{format_table(rows)}")


if __name__ == "__main__":
    sys.exit(evaluate.run_command("benchmark.py", main))
