"""Speed and memory, beside torchvision's and Detectron2's Mask R-CNN of the same architecture.

  python tests/benchmark.py --data coco
  python tests/benchmark.py --data coco --parts train,floor --repeats 7
  python tests/benchmark.py --data coco --device cuda --batch 8 --amp --compile
  python tests/benchmark.py --data coco --quick --repeats 1     narrow and small: does it run?

All sides are R50-FPN with GroupNorm(32) in backbone, FPN, 4conv1fc box head and mask head, with 80
classes, the same numbers of anchors, proposals and RoIs, 2 x 2 samples a bin of RoIAlign, and the
*same weights*: random, scaled so that there are detections. They see the same real images with
their real objects, resized before, in one process and in turn: A B C, A B C, ... Times are medians.
Detectron2's column stays empty where it cannot be imported.

  train      forward, backward, SGD
  inference  one image at a time, masks pasted to the size of its file; on the CPU at the end
  loader     decode, resize, flip, boxes and masks: one process, one thread
  paste      100 masks an image pasted and run-length coded; COCO's metrics of such images
  memory     peak of two train steps and of two inferences, each side in a process of its own
  growth     time and memory of a step against the number of objects and of images
  floor      multiply-adds of our convolutions and linear layers over the rate of a bare 3x3
             convolution of 256 channels on this machine; also part by part, forward

The table goes to stdout, progress to stderr.
"""

import argparse
import collections
import contextlib
import ctypes
import datetime
import functools
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torchvision
from PIL import Image
from pycocotools import mask as coco_mask
from torch import nn
from torchvision import ops, tv_tensors
from torchvision.models.detection import roi_heads
from torchvision.transforms import v2

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import peer_torchvision  # noqa: E402
import test_agreement  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import model as detector  # noqa: E402
import train  # noqa: E402

TASKS = ("train", "inference", "loader", "paste", "memory", "growth", "floor")
PARTS = ("backbone", "FPN", "RPN", "box head", "mask head")
RATE = 1e-9  # so small that the weights, and with them the work of a step, stay as they are
QUICK = {
    "stem_width": 32, "width_per_group": 32, "fpn_channels": 64, "box_head_channels": 64,
    "box_head_fc_channels": 64, "mask_head_channels": 64,
}  # fmt: skip

# ------------------------------------------------------------------------------------------------
# The sides. Each is a model; the modules of its PARTS; its optimizer; prepare(image, target), what
# its loader would give; losses(list of those); detect(image, height, width), masks [N, H, W] on
# the CPU. Bringing images and targets to the device belongs to the step.
# ------------------------------------------------------------------------------------------------


def scaled_model(args):
    """Our model with the weights of test_agreement.py, which give real detections."""
    model = detector.build_model(**(QUICK if args.quick else {}))
    shapes = {name: tuple(t.shape) for name, t in detector.to_detectron2(model).items()}
    weights = test_agreement.golden_weights("gn", shapes)
    found, _ = detector.translate(weights, "detectron2", model)
    model.load_state_dict(found | {n: getattr(model, n) for n in detector.STATISTICS_NAMES})
    return model


def pinned(tensor):
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def pinned_target(target):
    return {name: pinned(target[name]) for name in ("boxes", "labels", "masks")}


def ours(args):
    """This project, as train.py and evaluate.py use it."""
    model = scaled_model(args).to(args.device)
    recipe = replace(train.RECIPES["r50-gn"], learning_rate=RATE)
    if args.compile:
        train.compile_parts(model)

    def detect(image, height, width):
        found = evaluate.detect(model, image, height, width, *args.sizes)
        return evaluate.paste_masks(found["masks"], found["boxes"], height, width)

    return SimpleNamespace(
        model=model,
        parts=[[m] for m in (model.backbone, model.fpn, model.rpn, model.box_heads[0])]
        + [[model.mask_head]],
        optimizer=train.make_optimizer(model, recipe),
        prepare=lambda image, target: (pinned(image), pinned_target(target)),
        losses=lambda batch: model(*train.to_device(*zip(*batch), args.device)),
        detect=detect,
    )


# Our modules and torchvision's. What follows is the same, but for .conv and .norm: .0 and .1.
TORCHVISION_NAMES = {
    "fpn.lateral": "backbone.fpn.inner_blocks",
    "fpn.output": "backbone.fpn.layer_blocks",
    "rpn.conv": "rpn.head.conv.0.0",
    "rpn.objectness": "rpn.head.cls_logits",
    "rpn.deltas": "rpn.head.bbox_pred",
    "box_heads.0.convs": "roi_heads.box_head",
    "box_heads.0.fcs.0": "roi_heads.box_head.5",
    "box_heads.0.classifier": "roi_heads.box_predictor.cls_score",
    "box_heads.0.regressor": "roi_heads.box_predictor.bbox_pred",
    "mask_head.convs": "roi_heads.mask_head",
    "mask_head.deconv": "roi_heads.mask_predictor.conv5_mask",
    "mask_head.predictor": "roi_heads.mask_predictor.mask_fcn_logits",
}
# It has boxes and masks of the background too, before the others: so many rows.
BACKGROUND = {"box_heads.0.regressor": 4, "mask_head.predictor": 1}


def to_torchvision(model):
    """The weights of our model by the names of torchvision's detector."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("backbone."):
            state["backbone.body." + detector.foreign_name(name, "torchvision")] = tensor
        for module, theirs in TORCHVISION_NAMES.items():
            if name.startswith(module + "."):
                rest = name.removeprefix(module).replace(".conv.", ".0.").replace(".norm.", ".1.")
                rows = torch.zeros_like(tensor[: BACKGROUND.get(module, 0)])
                state[theirs + rest] = torch.cat([rows, tensor])
    return state


def torchvisions(args):
    """torchvision's Mask R-CNN, built of its parts as in peer_torchvision.py."""
    own = scaled_model(args)
    c = {k: v for k, v in own.config.items() if not k.startswith("rpn_") or "_top_n_" in k}
    sizes = {"test_size": args.sizes[0], "max_size": args.sizes[1]}
    recipe = replace(train.RECIPES["r50-gn"], model=c, **sizes)
    model = peer_torchvision.build_peer(recipe, c["num_classes"])
    model.load_state_dict(to_torchvision(own))
    model.transform.resize = lambda image, target: (image, target)  # that was done before
    model.to(args.device)
    heads = model.roi_heads

    def detect(image, height, width):
        # The steps of its forward, which pastes to the size of what it is given.
        images, _ = model.transform([(image.float() / 255).to(args.device)])
        features = model.backbone(images.tensors)
        proposals, _ = model.rpn(images, features)
        found, _ = heads(features, proposals, images.image_sizes)
        found = model.transform.postprocess(found, images.image_sizes, [(height, width)])
        return (found[0]["masks"][:, 0] >= 0.5).cpu()

    return SimpleNamespace(
        model=model,
        parts=[[model.backbone.body], [model.backbone.fpn], [model.rpn.head]]
        + [[heads.box_head, heads.box_predictor], [heads.mask_head, heads.mask_predictor]],
        optimizer=torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=1e-4),
        prepare=lambda image, target: (pinned(image.float() / 255), pinned_target(target)),
        losses=lambda batch: model(*train.to_device(*zip(*batch), args.device)),
        detect=detect,
    )


def detectron2s(args):
    """Detectron2's scratch_mask_rcnn_R_50_FPN_3x_gn, with our pixel mean and RoIAlign samples."""
    import make_detectron2_golden as golden
    from detectron2.solver import build_optimizer
    from detectron2.structures import BitMasks, Boxes, Instances
    from detectron2.utils.events import EventStorage

    own = scaled_model(args)
    weights = detector.to_detectron2(own)
    weights = {name: t for name, t in weights.items() if not name.startswith("pixel_")}
    model = golden.detectron2_model(own.config, weights).to(args.device)
    heads = model.roi_heads
    cfg = golden.detectron2_config(own.config)
    cfg.SOLVER.BASE_LR = RATE

    def prepare(image, target):
        instances = Instances(tuple(image.shape[-2:]))
        instances.gt_boxes = Boxes(target["boxes"])
        instances.gt_classes = target["labels"] - 1
        instances.gt_masks = BitMasks(target["masks"])
        return {"image": pinned(image.flip(0)), "instances": instances}

    def losses(batch):
        with EventStorage(0):
            return model(batch)

    def detect(image, height, width):
        found = model([{"image": image.flip(0), "height": height, "width": width}])
        return found[0]["instances"].to("cpu").pred_masks

    return SimpleNamespace(
        model=model,  # its FPN calls the backbone, its mask head computes targets and loss
        parts=[[model.backbone.bottom_up], [model.backbone], [model.proposal_generator.rpn_head]]
        + [[heads.box_head, heads.box_predictor], [heads.mask_head]],
        optimizer=build_optimizer(cfg, model),
        prepare=prepare,
        losses=losses,
        detect=detect,
    )


SIDES = {"ours": ours, "torchvision": torchvisions, "Detectron2": detectron2s}


def precision(args):
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp)


def prepare_all(side, samples):
    return [side.prepare(image, target) for image, target, _ in samples]


def train_step(side, batch, args):
    side.model.train()
    with precision(args):
        losses = side.losses(batch)
    sum(losses.values()).backward()
    side.optimizer.step()
    side.optimizer.zero_grad(set_to_none=True)


def inference(side, samples, args):
    """Detect in one image after the other; how many detections there are in each."""
    side.model.eval()
    with torch.no_grad(), precision(args):
        return [len(side.detect(image, *size)) for image, _, size in samples]


# ------------------------------------------------------------------------------------------------
# Samples: (image, target, (height, width) of the file)
# ------------------------------------------------------------------------------------------------


def choose_samples(dataset, count, sizes):
    """Real images with 3 to 12 objects (COCO's mean is 7.3), the largest after resizing."""

    def pixels(i):
        return math.prod(data.resize_shape(dataset.heights[i], dataset.widths[i], *sizes))

    samples = []
    landscape = np.flatnonzero(dataset.widths > dataset.heights).tolist()
    for i in sorted(landscape, key=pixels, reverse=True):
        image, target = dataset.load(i, *sizes)
        if 3 <= len(target["boxes"]) <= 12:
            samples.append((image, target, (int(dataset.heights[i]), int(dataset.widths[i]))))
        if len(samples) == count:
            break
    return samples


def with_objects(sample, count):
    """The sample with `count` made-up objects, ellipses from small to large."""
    image, _, size = sample
    h, w = image.shape[-2:]
    random = np.random.RandomState(count)
    y, x = np.ogrid[:h, :w]
    boxes, masks = np.zeros((count, 4), np.float32), np.zeros((count, h, w), np.uint8)
    for box, mask in zip(boxes, masks):
        sides = np.exp(random.uniform(np.log(h / 50), np.log(h / 2), 2))
        x1, y1 = random.uniform(0, (w, h) - sides)
        box[:] = x1, y1, x1 + sides[0], y1 + sides[1]
        mask[:] = (2 * (x - x1) / sides[0] - 1) ** 2 + (2 * (y - y1) / sides[1] - 1) ** 2 < 1
    target = {"boxes": boxes, "labels": random.randint(1, 81, count), "masks": masks}
    return image, {name: torch.from_numpy(value) for name, value in target.items()}, size


# ------------------------------------------------------------------------------------------------
# Time, multiply-adds and memory. A row of the table is (title, {side: value}, floor or None)
# ------------------------------------------------------------------------------------------------


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def clock(args):
    if args.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def set_allocator(name, args):
    """Have malloc behave as in a program that uses this side (the floor: as ours).

    train.py and evaluate.py set it on the CPU (evaluate.keep_freed_memory); the peers have glibc's
    defaults, which are where its adaptive thresholds end: 32 and 64 MB.
    """
    if name not in ("torchvision", "Detectron2") or args.same_malloc:
        evaluate.keep_freed_memory()
        return
    with contextlib.suppress(OSError, TypeError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 * 2**20)
        libc.mallopt(-1, 64 * 2**20)
        libc.malloc_trim(0)


def alternate(title, functions, args):
    """Call the functions {side: f} in turn: {side: median seconds}. The first rounds warm up."""
    warmup = 3 if args.device.type == "cuda" else 1
    times = {name: [] for name in functions}
    for _ in range(warmup + args.repeats):
        for name, function in functions.items():
            set_allocator(name, args)
            start = clock(args)
            function()
            times[name].append(clock(args) - start)
    for name, seconds in times.items():
        del seconds[:warmup]
        say(f"{title}: {name}", *(f"{s:.4g}" for s in seconds))
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def train_row(title, sides, samples, args, floor=None):
    steps = {
        name: functools.partial(train_step, side, prepare_all(side, samples), args)
        for name, side in sides.items()
    }
    return f"{title}: s", alternate(title, steps, args), floor


def inference_row(sides, samples, args, floor=None):
    runs = {name: functools.partial(inference, side, samples, args) for name, side in sides.items()}
    times = alternate("inference", runs, args)
    return "inference: s an image", {k: s / len(samples) for k, s in times.items()}, floor


def convolution_rates(args):
    """Multiply-adds a second of a bare convolution, forward and with backward ("step").

    In the faster one of the two memory formats.
    """
    size = (25, 42) if args.quick else (200, 336)
    rates = collections.Counter()
    for layout in (torch.contiguous_format, torch.channels_last):
        conv = nn.Conv2d(256, 256, 3, padding=1, bias=False).to(args.device, memory_format=layout)
        x = torch.randn(args.batch, 256, *size, device=args.device)
        x = x.to(memory_format=layout).requires_grad_()
        work = x.numel() * conv.weight[0].numel()

        def forward(conv=conv, x=x):
            with precision(args):
                return conv(x)

        grad = torch.randn_like(forward())

        def step(forward=forward, inputs=(x, conv.weight), grad=grad):
            torch.autograd.grad(forward(), inputs, grad)

        times = alternate(f"bare convolution, {layout}", {"forward": forward, "step": step}, args)
        rates |= {"forward": work / times["forward"], "step": 3 * work / times["step"]}  # larger
    say(*(f"{name}: {rate / 1e9:.1f} G multiply-adds a second" for name, rate in rates.items()))
    return rates


def multiply_adds(side, function):
    """Multiply-adds of each of PARTS while function() runs forward; "step": with a backward pass.

    That computes two gradients, each as much work as the forward pass; of the first layer only one.
    The mask head's last layer, a thousandth of it, is no module call and not counted.
    """
    total = collections.Counter()

    def count(part, module, inputs, output):
        of = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
        work = of.numel() * module.weight[0].numel()
        total[part] += work
        total["step"] += (3 if inputs[0].requires_grad else 2) * work

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code has no hooks
        for part, modules in zip(PARTS, side.parts):
            for module in nn.ModuleList(modules).modules():
                if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                    hook = module.register_forward_hook(functools.partial(count, part))
                    stack.callback(hook.remove)
        function()
    return total


def part_times(side, batch, args):
    """Seconds of each of PARTS in the forward pass of a train step, and of "everything else"."""
    times, starts = collections.Counter(), {}

    def begin(module, inputs):
        starts[module] = clock(args)

    def end(part, module, inputs, output):
        times[part] += clock(args) - starts[module]

    side.model.train()
    with contextlib.ExitStack() as stack:
        stack.enter_context(precision(args))
        for part, modules in zip(PARTS, side.parts):
            for module in modules:
                stack.callback(module.register_forward_pre_hook(begin).remove)
                stack.callback(module.register_forward_hook(functools.partial(end, part)).remove)
        start = clock(args)
        side.losses(batch)
        whole = clock(args) - start
    if side.parts[0][0] in side.parts[1][0].modules():  # Detectron2's FPN calls the backbone
        times["FPN"] -= times["backbone"]
    return {part: times[part] for part in PARTS} | {"everything else": whole - times.total()}


def part_rows(sides, samples, work, rates, args):
    batches = {name: prepare_all(side, samples) for name, side in sides.items()}
    found = collections.defaultdict(list)
    for _ in range(1 + args.repeats):
        for name, side in sides.items():
            set_allocator(name, args)
            found[name].append(part_times(side, batches[name], args))
    for part in (*PARTS, "everything else"):
        times = {n: statistics.median(t[part] for t in runs[1:]) for n, runs in found.items()}
        yield f"{part}, forward: s", times, work[part] / rates["forward"] or None


def resident(field):
    """MiB of this process on Linux: "VmRSS", now, or "VmHWM", the most so far.

    Not getrusage's maximum, which begins with that of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024


def measure_memory(name, task, path, args):
    """What a process of its own does: the peak, in MiB, of two train steps or inferences."""
    set_allocator(name, args)
    side = SIDES[name](args)
    samples = torch.load(path)
    batch = prepare_all(side, samples)
    if args.device.type == "cpu":
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the most so far is what is now
        before = resident("VmRSS")
    for _ in range(2):  # from the second step on there is momentum
        if task == "train":
            train_step(side, batch, args)
        else:
            inference(side, samples[:1], args)
    if args.device.type == "cpu":
        return resident("VmHWM") - before
    return torch.cuda.max_memory_allocated() / 2**20


def memory_row(title, names, task, samples, args):
    """The row of `measure_memory`; nan where a side failed."""
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/samples.pth"
        torch.save(samples, path)
        for name in names:
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", name, task, path]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                say(done.stderr[-1000:])
            peaks[name] = math.nan if done.returncode else float(done.stdout.split()[-1])
            say(f"{title}: {name} {peaks[name]:.0f}")
    return title, peaks, None


def growth_rows(sides, samples, args):
    objects = (1, 50) if args.quick else (1, 10, 50, 100, 200)
    images = (1, 2) if args.quick else (1, 2, 4)
    batch = samples[: args.batch]
    cases = {f"step with {n} made-up objects an image": (batch, n) for n in objects}
    cases |= {f"step of {n} real images": (samples[:n], None) for n in images}
    for title, (chosen, count) in cases.items():
        chosen = [with_objects(sample, count) if count else sample for sample in chosen]
        yield train_row(title, sides, chosen, args)
        yield memory_row(f"{title}: peak MiB", sides, "train", chosen, args)


# ------------------------------------------------------------------------------------------------
# Loaders
# ------------------------------------------------------------------------------------------------


def torchvision_loader(dataset, sizes):
    """As torchvision's references: PIL, pycocotools' masks at the size of the file, transforms."""
    coco = dataset.coco_gt()
    transform = v2.Compose([
        v2.ToImage(), v2.RandomHorizontalFlip(), v2.Resize(sizes[0], max_size=sizes[1]),
        v2.ToDtype(torch.float32, scale=True), v2.SanitizeBoundingBoxes(),
    ])  # fmt: skip

    def load(i):
        info = coco.imgs[dataset.image_ids[i]]
        image = Image.open(f"{dataset.image_dir}/{info['file_name']}").convert("RGB")
        objects = [o for o in coco.imgToAnns[info["id"]] if not o["iscrowd"]]
        size = info["height"], info["width"]
        boxes = torch.tensor([o["bbox"] for o in objects])
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYWH", canvas_size=size),
            "labels": torch.tensor([o["category_id"] for o in objects]),
            "masks": tv_tensors.Mask(np.stack([coco.annToMask(o) for o in objects])),
        }
        return transform(image, target)

    return load


def detectron2_loader(dataset, sizes, mask_format):
    from detectron2.data import DatasetMapper
    from detectron2.data import transforms as T
    from detectron2.data.datasets.coco import load_coco_json

    records = load_coco_json(dataset.annotation_file, dataset.image_dir)
    records = {record["image_id"]: record for record in records}
    mapper = DatasetMapper(
        is_train=True, augmentations=[T.ResizeShortestEdge(*sizes), T.RandomFlip()],
        image_format="BGR", use_instance_mask=True, instance_mask_format=mask_format,
    )  # fmt: skip
    return lambda i: mapper(records[dataset.image_ids[i]])


def loader_rows(dataset, names, args):
    training_set = data.TrainingSet(dataset, args.sizes[:1], args.sizes[1])
    loaders = {"ours": lambda i: training_set[i, i]}
    loaders["torchvision"] = torchvision_loader(dataset, args.sizes)
    if "Detectron2" in names:
        loaders["Detectron2"] = detectron2_loader(dataset, args.sizes, "bitmask")
        loaders["polygons"] = detectron2_loader(dataset, args.sizes, "polygon")
    count = min(4 if args.quick else 80, len(dataset))

    def read(load):
        for i in range(count):
            load(i)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    passes = {name: functools.partial(read, load) for name, load in loaders.items()}
    speeds = {name: count / s for name, s in alternate("loader", passes, args).items()}
    torch.set_num_threads(threads)
    polygons = {"ours": speeds["ours"], "Detectron2": speeds.pop("polygons", math.nan)}
    yield "loader, bit masks: images/s of a core", speeds, None
    yield "the same, Detectron2 with polygons: images/s", polygons, None


# ------------------------------------------------------------------------------------------------
# Masks to results, results to metrics
# ------------------------------------------------------------------------------------------------


def made_up_detections(dataset, i, count=100):
    """(detections as from `evaluate.to_image`, height, width): the objects of image i, shifted."""
    image, target = dataset[i]
    size = tuple(image.shape[-2:])
    index = torch.arange(count) % len(target["boxes"])
    boxes = target["boxes"][index]
    noise = torch.randn(count, 4, generator=torch.Generator().manual_seed(i)).clamp(-3, 3)
    boxes = boxes + 0.05 * noise * (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    boxes = ops.clip_boxes_to_image(boxes, size)
    rois = torch.cat([index[:, None], boxes], dim=1)
    masks = ops.roi_align(target["masks"][:, None].float(), rois, 28, aligned=True)[:, 0]
    labels, scores = target["labels"][index], torch.linspace(1, 0.05, count)
    return {"boxes": boxes, "labels": labels, "scores": scores, "masks": masks}, *size


def our_results(image_id, detections, height, width, category_ids):
    detections = {name: value.cpu() for name, value in detections.items()}
    return evaluate.coco_results(image_id, detections, height, width, category_ids)


def torchvision_results(image_id, detections, height, width, category_ids):
    """Its paste and its references' way to encode; without the dicts of the others."""
    masks = detections["masks"][:, None]
    masks = roi_heads.paste_masks_in_image(masks, detections["boxes"], (height, width))
    masks = (masks > 0.5).cpu()
    return [coco_mask.encode(np.array(m[0, :, :, None], np.uint8, order="F"))[0] for m in masks]


def detectron2_results(image_id, detections, height, width, category_ids):
    from detectron2.evaluation.coco_evaluation import instances_to_coco_json
    from detectron2.layers.mask_ops import paste_masks_in_image
    from detectron2.structures import Boxes, Instances

    found = Instances((height, width))
    found.pred_boxes = Boxes(detections["boxes"])
    found.scores, found.pred_classes = detections["scores"], detections["labels"] - 1
    found.pred_masks = paste_masks_in_image(detections["masks"], found.pred_boxes, (height, width))
    return instances_to_coco_json(found.to("cpu"), image_id)


def paste_rows(dataset, names, args):
    chosen = range(min(4 if args.quick else 40, len(dataset)))
    ids = [dataset.image_ids[i] for i in chosen]
    found = [made_up_detections(dataset, i) for i in chosen]
    found = [({k: v.to(args.device) for k, v in d.items()}, *size) for d, *size in found]

    def results(make):
        pairs = zip(ids, found)
        return [make(image_id, *one, dataset.category_ids) for image_id, one in pairs]

    makers = dict(zip(SIDES, (our_results, torchvision_results, detectron2_results)))
    functions = {name: functools.partial(results, makers[name]) for name in names}
    times = alternate("paste and RLE", functions, args)
    milliseconds = {name: 1000 * s / len(ids) for name, s in times.items()}
    yield "paste and RLE of 100 masks: ms an image", milliseconds, None

    truth, final = dataset.coco_gt(), sum(results(our_results), [])
    subset = SimpleNamespace(image_ids=ids, category_ids=dataset.category_ids)

    def score(scorer):
        with mock.patch.object(evaluate, "COCOeval", scorer):
            for kind in ("bbox", "segm"):
                evaluate.coco_metrics(truth, final, kind, subset)

    functions = {"ours": functools.partial(score, evaluate.COCOeval)}
    if "Detectron2" in names:
        from detectron2.evaluation.coco_evaluation import COCOeval_opt  # C++, where it is built

        functions["Detectron2"] = functools.partial(score, COCOeval_opt)
    times = alternate("COCO's metrics", functions, args)
    seconds = {name: 1000 * s / len(ids) for name, s in times.items()}
    yield "COCO's metrics of boxes and masks: s for 1,000 images", seconds, None


# ------------------------------------------------------------------------------------------------
# The table
# ------------------------------------------------------------------------------------------------


def describe(names, args):
    """Date, machine, versions and settings, in a sentence."""
    machine = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        machine = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].partition("\n")[0]
    if args.device.type == "cuda":
        machine = torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    if "Detectron2" in names:
        versions += f", Detectron2 {sys.modules['detectron2'].__version__}"
    number = "bf16 autocast" if args.amp else "TF32" if args.tf32 else "fp32"
    extra = ", ours compiled" * args.compile + ", narrow networks" * args.quick
    extra += ", malloc set alike" * args.same_malloc
    return (
        f"{datetime.date.today()}, {machine}, {torch.get_num_threads()} threads; {versions}; "
        f"{number}{extra}; {args.sizes[0]}x{args.sizes[1]}, {args.batch} images a step; medians of "
        f"{args.repeats} rounds."
    )


def format_value(value):
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def format_table(rows):
    """Rows as one markdown table; the ratio is ours over the better peer's."""
    lines = [f"| | {' | '.join(SIDES)} | ours / better peer | floor | ours: % of the floor |"]
    lines.append("|---" * (len(SIDES) + 4) + "|")
    for title, values, floor in rows:
        own = values.get("ours", math.nan)
        peers = [v for name, v in values.items() if name != "ours" and not math.isnan(v)]
        best = (max if "images/s" in title else min)(peers, default=math.nan)
        share = 100 * floor / own if floor else None
        cells = [*map(values.get, SIDES), own / best, floor, share]
        lines.append(f"| {title} | {' | '.join(map(format_value, cells))} |")
    return "\n".join(lines)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="in COCO's layout; train2017 of it is read")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--parts", default=",".join(TASKS), help="some of the above, with commas (all)")
    add("--repeats", type=int, default=5, help="rounds (5)")
    add("--size", type=int, help="shorter side; the longer is at most 1333/800 of it (800)")
    add("--batch", type=int, default=2, help="images of a train step (2)")
    add("--amp", action="store_true", help="bf16 autocast on all sides")
    add("--tf32", action="store_true", help="TF32 on all sides (it is off otherwise)")
    add("--compile", action="store_true", help="our parts compiled, as train.py --compile")
    add("--same-malloc", action="store_true", help="our setting of malloc for the peers as well")
    add("--quick", action="store_true", help="narrow networks, few images, 128 pixels")
    add("--worker", nargs=3, help=argparse.SUPPRESS)  # see memory_row
    args = parser.parse_args()
    args.parts = set(args.parts.split(","))
    if not args.parts <= set(TASKS):
        parser.error(f"--parts can be {', '.join(TASKS)}")
    args.device = torch.device(args.device)
    size = args.size or (128 if args.quick else 800)
    args.sizes = size, round(size * 1333 / 800)
    return args


def main():
    args = parse_arguments()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    if args.worker:
        print(measure_memory(*args.worker, args))
        return
    names = list(SIDES)
    try:
        import detectron2  # noqa: F401
    except ImportError as error:
        names.remove("Detectron2")
        say(f"Without Detectron2: {error}")

    dataset = data.open_split(args.data, "train2017", training=True)
    samples = choose_samples(dataset, max(args.batch, 4), args.sizes)
    batch = samples[: args.batch]
    seen = [f"{i.shape[1]}x{i.shape[2]} with {len(t['boxes'])}" for i, t, _ in batch]
    notes, rows = [f"Images and objects of a step: {', '.join(seen)}."], []
    train_floor = inference_floor = None
    if args.parts & {"train", "inference", "growth", "floor"}:
        sides = {name: SIDES[name](args) for name in names}
    if "floor" in args.parts:
        rates, own = convolution_rates(args), sides["ours"]
        own_batch = prepare_all(own, batch)
        own.model.train()
        work = multiply_adds(own, lambda: own.losses(own_batch))
        train_floor = work["step"] / rates["step"]
        work_inference = multiply_adds(own, lambda: inference(own, batch, args))
        work_inference = sum(work_inference[part] for part in PARTS) / len(batch)
        inference_floor = work_inference / rates["forward"]
    if "train" in args.parts:
        rows.append(
            train_row(f"train step of {args.batch} images", sides, batch, args, train_floor)
        )
    if "inference" in args.parts:
        counts = {name: inference(side, batch, args) for name, side in sides.items()}
        notes.append(f"Detections: {counts}.")
        rows.append(inference_row(sides, batch, args, inference_floor))
    if "floor" in args.parts and not args.compile:
        rows += part_rows(sides, batch, work, rates, args)
    if "loader" in args.parts:
        rows += loader_rows(dataset, names, args)
    if "paste" in args.parts:
        rows += paste_rows(dataset, names, args)
    if "memory" in args.parts:
        what = "peak MiB" if args.device.type == "cuda" else "peak MiB beyond the weights"
        title = f"train step of {args.batch} images: {what}"
        rows.append(memory_row(title, names, "train", batch, args))
        rows.append(memory_row(f"inference: {what}", names, "inference", batch, args))
    if "growth" in args.parts:
        rows += growth_rows(sides, samples, args)
    print(f"{describe(names, args)} {' '.join(notes)}\n\n{format_table(rows)}")


if __name__ == "__main__":
    main()
