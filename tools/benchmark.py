"""Speed and memory beside torchvision's and Detectron2's Mask R-CNN of the same architecture.

  python tools/benchmark.py --data coco                              on the CPU: batch 2, fp32
  python tools/benchmark.py --data coco --device cuda                batch 2 and 8; fp32, TF32, bf16
  python tools/benchmark.py --data coco --parts train --batch 8 --precision tf32 amp --compile
  python tools/benchmark.py --data coco --quick                      narrow and small: does it run?

All sides are R50-FPN with GroupNorm(32) in backbone, FPN, 4conv1fc box head and mask head, with 80
classes, the same numbers of anchors, proposals and RoIs, 2 x 2 samples a bin of RoIAlign, and the
*same weights*: random, scaled so that there are detections. They see the same real images with
their real objects, resized before, in one process and in turn: A B C, A B C, ... Times are medians.
Detectron2's column stays empty where it cannot be imported; its C++ part is not needed.

  train      forward, backward, SGD
  inference  one image at a time, masks pasted to the size of its file; on the CPU at the end
  switches   our train step with each change for speed switched off, or on, in turn
  memory     peak of two train steps and of two inferences, each side in a process of its own (on
             CUDA: beside the times, beyond what was there before)
  loader     decode, resize, flip, boxes and masks: one process, one thread
  paste      100 masks an image pasted and run-length coded; COCO's metrics of such images

The table goes to stdout, progress to stderr.
"""

import argparse
import contextlib
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the five modules
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "tests"))

import test_agreement

import data
import evaluate
import model as detector
import norms
import train
from tools import convert_weights, make_detectron2_golden, peer_torchvision

TASKS = ("train", "inference", "switches", "memory", "loader", "paste")
RATE = 1e-9  # so small that the weights, and with them the work of a step, stay as they are
QUICK = {
    "stem_width": 32, "width_per_group": 32, "fpn_channels": 64, "box_head_channels": 64,
    "box_head_fc_channels": 64, "mask_head_channels": 64,
}  # fmt: skip

# ------------------------------------------------------------------------------------------------
# The sides. Each is a model; its optimizer; prepare(image, target), what its loader would give;
# losses(list of those); detect(image, height, width), masks [N, H, W] on the CPU. Bringing images
# and targets to the device belongs to the step.
# ------------------------------------------------------------------------------------------------


def scaled_model(args):
    """Our model with the weights of test_agreement.py, which give real detections."""
    model = detector.build_model(**(QUICK if args.quick else {}))
    shapes = {name: tuple(t.shape) for name, t in convert_weights.to_detectron2(model).items()}
    weights = test_agreement.golden_weights("gn", shapes)
    found, _ = convert_weights.translate(weights, "detectron2", model)
    model.load_state_dict(found, strict=False)  # all but the image statistics
    return model


def pinned(tensor):
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def pinned_target(target):
    return {name: pinned(target[name]) for name in ("boxes", "labels", "masks")}


def ours(args):
    """This project, as train.py and evaluate.py use it."""
    model = scaled_model(args)
    model.data_settings |= {"min_size": args.sizes[0], "max_size": args.sizes[1]}
    recipe = replace(train.RECIPES["r50-gn"], learning_rate=RATE)
    train.place(model, recipe, args.device)

    def detect(image, height, width):
        found = evaluate.detect(model, image, (height, width))
        return evaluate.paste_masks(found["masks"], found["boxes"], height, width)

    return SimpleNamespace(
        model=model,
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


def to_torchvision(model, theirs):
    """The weights of our model by the names of `theirs`, torchvision's detector."""
    own = model.state_dict()
    state = {}
    for name in theirs.state_dict():
        if name.startswith("backbone.body."):
            ours = convert_weights.our_name(name.removeprefix("backbone.body."), "torchvision")
            state[name] = own[ours]
    for name, tensor in own.items():
        for module, there in TORCHVISION_NAMES.items():
            if name.startswith(module + "."):
                rest = name.removeprefix(module).replace(".conv.", ".0.").replace(".norm.", ".1.")
                rows = torch.zeros_like(tensor[: BACKGROUND.get(module, 0)])
                state[there + rest] = torch.cat([rows, tensor])
    return state


def torchvisions(args):
    """torchvision's Mask R-CNN, built of its parts as in peer_torchvision.py."""
    own = scaled_model(args)
    model = peer_torchvision.build_peer(own.config, *args.sizes)
    model.load_state_dict(to_torchvision(own, model))
    model.transform.resize = lambda image, target: (image, target)  # that was done before
    model.to(args.device)

    def detect(image, height, width):
        # The steps of its forward, which pastes to the size of what it is given.
        images, _ = model.transform([(image.float() / 255).to(args.device)])
        features = model.backbone(images.tensors)
        proposals, _ = model.rpn(images, features)
        found, _ = model.roi_heads(features, proposals, images.image_sizes)
        found = model.transform.postprocess(found, images.image_sizes, [(height, width)])
        return (found[0]["masks"][:, 0] >= 0.5).cpu()

    return SimpleNamespace(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=1e-4),
        prepare=lambda image, target: (pinned(image.float() / 255), pinned_target(target)),
        losses=lambda batch: model(*train.to_device(*zip(*batch), args.device)),
        detect=detect,
    )


def detectron2s(args):
    """Detectron2's scratch_mask_rcnn_R_50_FPN_3x_gn, with our pixel mean and RoIAlign samples."""
    from detectron2.solver import build_optimizer
    from detectron2.structures import BitMasks, Boxes, Instances
    from detectron2.utils.events import EventStorage

    own = scaled_model(args)
    weights = convert_weights.to_detectron2(own)
    weights = {name: t for name, t in weights.items() if not name.startswith("pixel_")}
    model = make_detectron2_golden.detectron2_model(own.config, weights).to(args.device)
    cfg = make_detectron2_golden.detectron2_config(own.config)
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
        model=model,
        optimizer=build_optimizer(cfg, model),
        prepare=prepare,
        losses=losses,
        detect=detect,
    )


SIDES = {"ours": ours, "torchvision": torchvisions, "Detectron2": detectron2s}


@contextlib.contextmanager
def precision(name, device):
    """fp32: strict float32; tf32: CUDA's shorter products; amp: bfloat16 autocast, and TF32."""
    allowed = name != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    with torch.autocast(device.type, torch.bfloat16, enabled=name == "amp"):
        yield


def prepare_all(side, samples):
    return [side.prepare(image, target) for image, target, _ in samples]


def train_step(side, batch, args, number):
    side.model.train()
    with precision(number, args.device):
        losses = side.losses(batch)
        sum(losses.values()).backward()
    side.optimizer.step()
    side.optimizer.zero_grad(set_to_none=True)


def inference(side, samples, args, number):
    """Detect in one image after the other; how many detections there are in each."""
    side.model.eval()
    with torch.no_grad(), precision(number, args.device):
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


# ------------------------------------------------------------------------------------------------
# Time and memory. A row of the table is (title, {side: value})
# ------------------------------------------------------------------------------------------------


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def clock(args):
    if args.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def alternate(title, functions, args):
    """Call the functions {side: f} in turn, after a round to warm up (CUDA: three): rows of median
    seconds and, on CUDA, of the peak of memory beyond what was there before the call."""
    cuda = args.device.type == "cuda"
    times, peaks = ({name: [] for name in functions} for _ in range(2))
    for _ in range((3 if cuda else 1) + args.repeats):
        for name, function in functions.items():
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = clock(args)
            function()
            times[name].append(clock(args) - start)
            if cuda:
                peaks[name].append((torch.cuda.max_memory_allocated() - before) / 2**20)
    for name, seconds in times.items():
        del seconds[: -args.repeats]
        say(f"{title}: {name}", *(f"{s:.4g}" for s in seconds))
    rows = [(f"{title}: s", {name: statistics.median(x) for name, x in times.items()})]
    if cuda:
        rows.append((f"{title}: peak MiB", {name: max(x) for name, x in peaks.items()}))
    return rows


def train_rows(sides, samples, args):
    for size in args.batch:
        steps = [(number, sides) for number in args.precision]
        if args.compile:
            compiled = SIDES["ours"](args)
            train.compile_parts(compiled.model)
            steps.append((args.precision[-1], {"ours": compiled}))
        for number, some in steps:
            functions = {
                n: functools.partial(
                    train_step, side, prepare_all(side, samples[:size]), args, number
                )
                for n, side in some.items()
            }
            title = f"train step of {size} images, {number}"
            title += ", ours compiled" * (some is not sides)
            yield from alternate(title, functions, args)


def inference_rows(sides, samples, args):
    for side in sides.values():
        side.model.to(memory_format=torch.contiguous_format)  # as evaluate.py loads it
    for number in args.precision:
        image = samples[:1]
        say("detections:", {n: inference(side, image, args, number) for n, side in sides.items()})
        runs = {n: functools.partial(inference, s, image, args, number) for n, s in sides.items()}
        yield from alternate(f"inference, {number}", runs, args)


def switch_rows(side, samples, args):
    """Our step with one thing changed: {title: what changes it while it is entered}."""
    number = "tf32" if "tf32" in args.precision else args.precision[0]
    side.model.to(memory_format=torch.channels_last)  # as train.py places it

    @contextlib.contextmanager
    def contiguous():
        side.model.to(memory_format=torch.contiguous_format)
        side.optimizer.state.clear()  # fused SGD wants the momentum in the same format
        yield
        side.model.to(memory_format=torch.channels_last)
        side.optimizer.state.clear()

    kernel, formula = nn.GroupNorm.forward, norms.GroupNorm.written_out
    rounds, single = detector.nms_in_rounds, detector.nms_one_by_one

    @contextlib.contextmanager
    def not_fused():
        with contextlib.ExitStack() as stack:
            for group in side.optimizer.param_groups:
                stack.enter_context(mock.patch.dict(group, fused=False))
            yield

    switches = {
        "as it is": contextlib.nullcontext(),
        "channels_last off": contiguous(),
        "GroupNorm by torch's kernel": mock.patch.object(norms.GroupNorm, "forward", kernel),
        "GroupNorm written out": mock.patch.object(norms.GroupNorm, "forward", formula),
        "NMS one box after the other": mock.patch.object(detector, "nms_in_rounds", single),
        "NMS in rounds": mock.patch.object(detector, "nms_one_by_one", rounds),
        "stem and res2 recomputed": mock.patch.object(side.model.backbone, "recompute", True),
        "SGD not fused": not_fused(),
    }
    batch = prepare_all(side, samples[: args.batch[0]])
    step = {"ours": functools.partial(train_step, side, batch, args, number)}
    for title, change in switches.items():
        with change:
            yield from alternate(f"{number}, {title}", step, args)


def resident(field):
    """MiB of this process on Linux: "VmRSS", now, or "VmHWM", the most so far.

    Not getrusage's maximum, which begins with that of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024


def measure_memory(name, task, path, args):
    """What a process of its own does: the peak, in MiB, of two train steps or inferences."""
    side = SIDES[name](args)
    samples = torch.load(path, weights_only=True)
    if task == "inference":
        side.model.to(memory_format=torch.contiguous_format)  # as evaluate.py loads it
    batch = prepare_all(side, samples)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the most so far is what is now
    before = resident("VmRSS")
    for _ in range(2):  # from the second step on there is momentum
        if task == "train":
            train_step(side, batch, args, args.precision[-1])
        else:
            inference(side, samples[:1], args, args.precision[-1])
    return resident("VmHWM") - before


def memory_row(title, names, task, samples, args):
    """The row of `measure_memory`; nothing where a side failed."""
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
    return title, peaks


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


def detectron2_loader(dataset, sizes):
    from detectron2.data import DatasetMapper
    from detectron2.data import transforms as T
    from detectron2.data.datasets.coco import load_coco_json

    records = load_coco_json(dataset.annotation_file, dataset.image_dir)
    records = {record["image_id"]: record for record in records}
    mapper = DatasetMapper(
        is_train=True, augmentations=[T.ResizeShortestEdge(*sizes), T.RandomFlip()],
        image_format="BGR", use_instance_mask=True, instance_mask_format="bitmask",
    )  # fmt: skip
    return lambda i: mapper(records[dataset.image_ids[i]])


def loader_rows(dataset, names, args):
    training_set = data.TrainingSet(dataset, args.sizes[:1], args.sizes[1])
    loaders = {"ours": lambda i: training_set[[(i, i)]]}
    loaders["torchvision"] = torchvision_loader(dataset, args.sizes)
    if "Detectron2" in names:
        loaders["Detectron2"] = detectron2_loader(dataset, args.sizes)
    count = min(4 if args.quick else 80, len(dataset))

    def read(load):
        for i in range(count):
            load(i)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    passes = {name: functools.partial(read, load) for name, load in loaders.items()}
    [(_, times), *_] = alternate("loader", passes, args)
    speeds = {name: count / seconds for name, seconds in times.items()}
    torch.set_num_threads(threads)
    yield "loader, bit masks: images/s of a core", speeds


# ------------------------------------------------------------------------------------------------
# Masks to results, results to metrics
# ------------------------------------------------------------------------------------------------


def made_up_detections(dataset, i, count=100):
    """(detections as from `evaluate.detect`, height, width): the objects of image i, shifted."""
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
    detections = {name: value.cpu().numpy() for name, value in detections.items()}
    return evaluate.coco_results((image_id, detections, (height, width), category_ids))[1]


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
    [(_, times), *_] = alternate("paste and RLE", functions, args)
    milliseconds = {name: 1000 * s / len(ids) for name, s in times.items()}
    yield "paste and RLE of 100 masks: ms an image", milliseconds

    truth, final = dataset.coco_gt(), sum(results(our_results), [])
    kept = {"category_ids": dataset.category_ids, "classes": dataset.classes}
    subset = SimpleNamespace(image_ids=ids, **kept)

    def score(scorer):
        with mock.patch.object(evaluate, "COCOeval", scorer):
            for kind in ("bbox", "segm"):
                evaluate.coco_metrics(truth, final, kind, subset)

    functions = {"ours": functools.partial(score, evaluate.COCOeval)}
    with contextlib.suppress(ImportError, AttributeError):
        from detectron2 import _C  # noqa: F401 (its C++ part, where it is built)
        from detectron2.evaluation.coco_evaluation import COCOeval_opt

        functions["Detectron2"] = functools.partial(score, COCOeval_opt)
    [(_, times), *_] = alternate("COCO's metrics", functions, args)
    seconds = {name: 1000 * s / len(ids) for name, s in times.items()}
    yield "COCO's metrics of boxes and masks: s for 1,000 images", seconds


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
    extra = ", narrow networks" * args.quick + ", glibc's own malloc" * args.default_malloc
    return (
        f"{datetime.date.today()}, {machine}, {torch.get_num_threads()} threads; {versions}"
        f"{extra}; "
        f"{args.sizes[0]}x{args.sizes[1]}; medians of {args.repeats} rounds."
    )


def format_value(value):
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def format_table(rows):
    """Rows as one markdown table; the ratio is ours over the better peer's."""
    lines = [f"| | {' | '.join(SIDES)} | ours / better peer |", "|---" * (len(SIDES) + 2) + "|"]
    for title, values in rows:
        own = values.get("ours", math.nan)
        peers = [v for name, v in values.items() if name != "ours" and not math.isnan(v)]
        best = (max if "images/s" in title else min)(peers, default=math.nan)
        cells = [*map(values.get, SIDES), own / best]
        lines.append(f"| {title} | {' | '.join(map(format_value, cells))} |")
    return "\n".join(lines)


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="data set, COCO layout; reads train2017")
    add("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    add("--parts", nargs="+", choices=TASKS, default=TASKS, help="which measurements (all)")
    add("--batch", type=int, nargs="+", help="images in a train step (2; on CUDA 2 8)")
    add("--precision", nargs="+", choices=("fp32", "tf32", "amp"), help="(fp32; on CUDA all)")
    add("--compile", action="store_true", help="add a row with our parts compiled")
    add("--repeats", type=int, help="measured rounds (5; with --quick 1)")
    add("--size", type=int, help="shorter side; longer side at most 1333/800 of it (800)")
    add("--default-malloc", action="store_true", help="glibc's own settings for all sides")
    add("--quick", action="store_true", help="narrow networks, few images, 128 pixels")
    add("--worker", nargs=3, help=argparse.SUPPRESS)  # see memory_row
    args = parser.parse_args(arguments)
    args.device = torch.device(args.device)
    on_cuda = args.device.type == "cuda"
    args.batch = args.batch or ([2, 8] if on_cuda else [2])
    args.precision = args.precision or (["fp32", "tf32", "amp"] if on_cuda else ["fp32"])
    args.repeats = args.repeats or (1 if args.quick else 5)
    size = args.size or (128 if args.quick else 800)
    args.sizes = size, round(size * 1333 / 800)
    return args


def main(arguments):
    args = parse_arguments(arguments)
    torch.manual_seed(0)
    if args.device.type == "cpu" and not args.default_malloc:
        evaluate.keep_freed_memory()  # as train.py and evaluate.py do, here for all sides
    if args.worker:
        print(measure_memory(*args.worker, args))
        return
    names = list(SIDES)
    try:
        import detectron2.modeling  # noqa: F401
    except ImportError as error:
        names.remove("Detectron2")
        say(f"Without Detectron2: {error}")

    dataset = data.open_split(args.data, "train2017", training=True)
    samples = choose_samples(dataset, max(*args.batch, 4), args.sizes)
    batch = samples[: args.batch[0]]
    seen = [f"{i.shape[1]}x{i.shape[2]} with {len(t['boxes'])}" for i, t, _ in batch]
    rows = []
    if {"train", "inference", "switches"} & set(args.parts):
        sides = {name: SIDES[name](args) for name in names}
    if "train" in args.parts:
        rows += train_rows(sides, samples, args)
    if "inference" in args.parts:
        rows += inference_rows(sides, samples, args)
    if "switches" in args.parts:
        rows += switch_rows(sides["ours"], samples, args)
    if "loader" in args.parts:
        rows += loader_rows(dataset, names, args)
    if "paste" in args.parts:
        rows += paste_rows(dataset, names, args)
    if "memory" in args.parts and args.device.type == "cpu":
        for task, some in (("train", batch), ("inference", batch[:1])):
            rows.append(memory_row(f"{task}: peak MiB beyond the weights", names, task, some, args))
    print(f"{describe(names, args)} Images and objects of a step: {', '.join(seen)}.\n")
    print(format_table(rows))


if __name__ == "__main__":
    sys.exit(evaluate.run_command("benchmark.py", main))
