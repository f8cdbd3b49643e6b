"""Speed and memory, beside torchvision's and Detectron2's Mask R-CNN of the same architecture.

  python tests/benchmark.py --data coco                                 everything, in hours on a CPU
  python tests/benchmark.py --data coco --parts train,floor --repeats 7
  python tests/benchmark.py --data coco --device cuda --batch 8 --amp --compile
  python tests/benchmark.py --data coco --quick --repeats 1             does it run? narrow, 128 pixels

All are R50-FPN with GroupNorm in backbone, FPN, 4conv1fc box head and mask head, 80 classes, the
same numbers of anchors, proposals and RoIs, RoIAlign with 2 x 2 samples a bin, and the *same
weights*: random ones, scaled so that there are detections (test_agreement.py has them). They see
the same real images with their real objects, already resized, in one process and in turn: A B C,
A B C, ... Times are medians over the rounds. Detectron2's column stays empty where it cannot be
imported.

The parts: train (forward, backward, SGD); inference (one image at a time, masks pasted to the
image's own size, on the CPU at the end); loader (decode, resize, flip, boxes and masks: images/s of
one core); paste (100 masks pasted and run-length coded; COCO's metrics); memory (peak of a step and
of an inference, each in a process of its own); growth (a step against the number of objects and of
images); floor: the multiply-adds of our convolutions and matrix products over the rate of a bare
3x3 convolution of 256 channels on this machine, which no step can beat by much.

The table goes to stdout, progress to stderr.
"""

import argparse
import collections
import contextlib
import datetime
import functools
import importlib.metadata
import io
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

import numpy as np
import torch
import torchvision
from PIL import Image
from pycocotools import mask as coco_mask
from torch import nn
from torchvision import ops, tv_tensors
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.transforms import v2

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import peer_torchvision  # noqa: E402
import test_agreement  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import model as detector  # noqa: E402
import train  # noqa: E402

PARTS = ("train", "inference", "loader", "paste", "memory", "growth", "floor")
RATE = 1e-9  # so small that the weights, and with them the work of a step, stay as they are
NARROW = {
    "stem_width": 32, "width_per_group": 32, "fpn_channels": 64, "box_head_channels": 64,
    "box_head_fc_channels": 64, "mask_head_channels": 64,
}  # fmt: skip


def say(*words):
    print(*words, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------
# The three sides: each has model, mask_head, optimizer, and can make a batch of samples (image,
# target, (height, width) of the file), compute the losses of a batch, and detect. A batch is on
# the CPU (pinned where there is CUDA): bringing it to the device belongs to the step.
# ------------------------------------------------------------------------------------------------


def scaled_model(args):
    """Our model with random weights that give real detections; see test_agreement.py."""
    model = detector.build_model(**(NARROW if args.quick else {}))
    shapes = {name: tuple(t.shape) for name, t in detector.to_detectron2(model).items()}
    weights = test_agreement.golden_weights("gn", shapes)
    found, unused = detector.translate(weights, "detectron2", model)
    for name in ("image_mean", "image_std"):
        found[name] = getattr(model, name)
    detector.fill(model, found, unused, "gn", verbose=False)
    return model


def pinned(tensor):
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


class Ours:
    """This project: train.py's optimizer and way to the device, evaluate.py's way to the masks."""

    def __init__(self, args):
        self.device, self.sizes = args.device, args.sizes
        self.model = scaled_model(args).to(self.device).train()
        self.mask_head = self.model.mask_head
        recipe = replace(train.RECIPES["r50-gn"], learning_rate=RATE)
        self.optimizer = train.make_optimizer(self.model, recipe)
        if args.compile:
            self.model.backbone.compile()
            self.model.fpn.compile()

    def batch(self, samples):
        kept = ("boxes", "labels", "masks")
        return (
            [pinned(image) for image, _, _ in samples],
            [{name: pinned(target[name]) for name in kept} for _, target, _ in samples],
        )

    def losses(self, batch):
        return self.model(*train.to_device(*batch, self.device))

    def detect(self, image, height, width):
        """Masks [N, height, width] of the detections."""
        found = evaluate.detect(self.model, image, height, width, *self.sizes)
        return evaluate.paste_masks(found["masks"], found["boxes"], height, width)


# Our modules and torchvision's; what follows these is the same but for .conv and .norm: .0 and .1.
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


def to_torchvision(model):
    """The weights of our model with the names of torchvision's detector."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("backbone."):
            name = "backbone.body." + detector.foreign_name(name, "torchvision")
        for ours, theirs in TORCHVISION_NAMES.items():
            if name.startswith(ours + "."):
                rest = name.removeprefix(ours)
                name = theirs + rest.replace(".conv.", ".0.").replace(".norm.", ".1.")
        # It has a box and a mask for the background too, the first of all.
        rows = 4 if "bbox_pred" in name and "roi_heads" in name else "mask_fcn_logits" in name
        state[name] = torch.cat([torch.zeros_like(tensor[:rows]), tensor]) if rows else tensor
    return {name: tensor for name, tensor in state.items() if not name.startswith("image_")}


class Torchvision:
    """torchvision's Mask R-CNN, built of its parts as in peer_torchvision.py."""

    def __init__(self, args):
        self.device = args.device
        ours = scaled_model(args)
        config = {k: v for k, v in ours.config.items() if not k.startswith("rpn_") or "_top_n" in k}
        recipe = replace(
            train.RECIPES["r50-gn"], model=config, test_size=args.sizes[0], max_size=args.sizes[1]
        )
        self.model = peer_torchvision.build_peer(recipe, ours.config["num_classes"])
        self.model.load_state_dict(to_torchvision(ours))
        # The images are resized already; it would resize them once more.
        self.model.transform.resize = lambda image, target: (image, target)
        self.model.to(self.device).train()
        self.mask_head = self.model.roi_heads.mask_head
        self.optimizer = torch.optim.SGD(self.model.parameters(), RATE, 0.9, weight_decay=1e-4)

    def batch(self, samples):
        kept = ("boxes", "labels", "masks")
        return (
            [pinned(image.float() / 255) for image, _, _ in samples],
            [{name: pinned(target[name]) for name in kept} for _, target, _ in samples],
        )

    def losses(self, batch):
        return self.model(*train.to_device(*batch, self.device))

    def detect(self, image, height, width):
        # The steps of its forward, which knows the original size only where it resizes itself.
        model = self.model
        images, _ = model.transform([image.to(self.device)])
        features = model.backbone(images.tensors)
        proposals, _ = model.rpn(images, features)
        found, _ = model.roi_heads(features, proposals, images.image_sizes)
        found = model.transform.postprocess(found, images.image_sizes, [(height, width)])[0]
        return (found["masks"][:, 0] >= 0.5).cpu()


class Detectron2:
    """Detectron2's scratch GN model, with our pixel mean and number of RoIAlign samples."""

    def __init__(self, args):
        import detectron2
        from detectron2.config import get_cfg
        from detectron2.modeling import build_model
        from detectron2.solver import build_optimizer

        ours = scaled_model(args)
        c = ours.config
        cfg = get_cfg()
        configs = Path(detectron2.__file__).parent / "model_zoo" / "configs"
        cfg.merge_from_file(configs / "Misc" / "scratch_mask_rcnn_R_50_FPN_3x_gn.yaml")
        options = {
            "MODEL.DEVICE": str(args.device),
            "MODEL.PIXEL_MEAN": (ours.image_mean.flatten().flip(0) * 255).tolist(),  # BGR
            "MODEL.RESNETS.STEM_OUT_CHANNELS": c["stem_width"],
            "MODEL.RESNETS.RES2_OUT_CHANNELS": 4 * c["stem_width"],
            "MODEL.RESNETS.WIDTH_PER_GROUP": c["width_per_group"],
            "MODEL.FPN.OUT_CHANNELS": c["fpn_channels"],
            "MODEL.ROI_BOX_HEAD.CONV_DIM": c["box_head_channels"],
            "MODEL.ROI_BOX_HEAD.FC_DIM": c["box_head_fc_channels"],
            "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": c["roi_sampling_ratio"],
            "MODEL.ROI_MASK_HEAD.CONV_DIM": c["mask_head_channels"],
            "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": c["roi_sampling_ratio"],
            "INPUT.MASK_FORMAT": "bitmask",
            "SOLVER.BASE_LR": RATE,
        }
        for name, value in options.items():
            cfg.merge_from_list([name, value])
        self.model = build_model(cfg).train()
        missing = self.model.load_state_dict(detector.to_detectron2(ours), strict=False)[0]
        assert not missing, missing
        self.mask_head = self.model.roi_heads.mask_head
        self.optimizer = build_optimizer(cfg, self.model)

    def batch(self, samples):
        from detectron2.structures import BitMasks, Boxes, Instances

        batch = []
        for image, target, _ in samples:
            instances = Instances(tuple(image.shape[-2:]))
            instances.gt_boxes = Boxes(target["boxes"])
            instances.gt_classes = target["labels"] - 1
            instances.gt_masks = BitMasks(target["masks"])
            batch.append({"image": pinned(image.flip(0)), "instances": instances})
        return batch

    def losses(self, batch):
        from detectron2.utils.events import EventStorage

        with EventStorage(0):
            return self.model(batch)

    def detect(self, image, height, width):
        found = self.model([{"image": image.flip(0), "height": height, "width": width}])
        return found[0]["instances"].to("cpu").pred_masks


SIDES = {"ours": Ours, "torchvision": Torchvision, "detectron2": Detectron2}


def train_step(side, batch, args):
    with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
        losses = side.losses(batch)
    sum(losses.values()).backward()
    side.optimizer.step()
    side.optimizer.zero_grad(set_to_none=True)


def inference(side, samples, args):
    """Detect in every image, one after the other; returns the number of detections of each."""
    side.model.eval()
    with torch.no_grad(), torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
        image_of = 0 if isinstance(side, Torchvision) else None
        counts = []
        for sample in samples:
            image = sample[0] if image_of is None else side.batch([sample])[0][0]
            counts.append(len(side.detect(image, *sample[2])))
    side.model.train()
    return counts


# ------------------------------------------------------------------------------------------------
# Samples
# ------------------------------------------------------------------------------------------------


def choose_samples(dataset, count, sizes):
    """Real images with 3 to 12 objects (COCO has 7.3 an image), those nearest to the full size."""

    def missing_pixels(i):
        side = data.resize_shape(int(dataset.heights[i]), int(dataset.widths[i]), *sizes)
        return math.prod(sizes) - math.prod(side) if side[1] > side[0] else math.inf

    samples = []
    for i in sorted(range(len(dataset)), key=missing_pixels):
        if 3 <= len(dataset._record(i)["objects"]) <= 12:
            size = int(dataset.heights[i]), int(dataset.widths[i])
            samples.append((*dataset.load(i, *sizes), size))
            if len(samples) == count:
                break
    return samples


def with_objects(sample, count):
    """The image of a sample with `count` made-up objects, elliptic and of all sizes."""
    image, _, size = sample
    h, w = image.shape[-2:]
    random = np.random.RandomState(count)
    y, x = np.ogrid[:h, :w]
    boxes, masks = np.zeros((count, 4), np.float32), np.zeros((count, h, w), np.uint8)
    for box, mask in zip(boxes, masks):
        sides = np.exp(random.uniform(np.log(h / 50), np.log(h / 2), 2))
        x1, y1 = random.uniform(0, (w, h) - sides)
        box[:] = x1, y1, *((x1, y1) + sides)
        mask[:] = (2 * (x - x1) / sides[0] - 1) ** 2 + (2 * (y - y1) / sides[1] - 1) ** 2 < 1
    labels = torch.from_numpy(random.randint(1, 81, count))
    target = {"boxes": torch.from_numpy(boxes), "labels": labels, "masks": torch.from_numpy(masks)}
    return image, target, size


# ------------------------------------------------------------------------------------------------
# Time, multiply-adds and memory
# ------------------------------------------------------------------------------------------------


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def alternate(title, functions, args):
    """Call the functions {name: f} in turn; the median seconds of each. First rounds are warm-up."""
    warmup = 3 if args.device.type == "cuda" else 1
    times = collections.defaultdict(list)
    for _ in range(warmup + args.repeats):
        for name, function in functions.items():
            start = clock(args.device)
            function()
            times[name].append(clock(args.device) - start)
    counted = {name: seconds[warmup:] for name, seconds in times.items()}
    for name, seconds in counted.items():
        say(f"{title}: {name}", *(f"{s:.4g}" for s in seconds))
    return {name: statistics.median(seconds) for name, seconds in counted.items()}


def multiply_adds(model, function):
    """Multiply-adds while function() runs: forward {part: n}, and forward and backward together.

    A backward pass computes two gradients, each as much work as the forward, but for the first
    layer, whose input has none. The mask predictor, of which we apply one row, is left out.
    """
    forward, total = collections.Counter(), collections.Counter()

    def count(part, module, inputs, output):
        work = output.numel() * module.weight[0].numel()
        if isinstance(module, nn.ConvTranspose2d):
            work = inputs[0].numel() * module.weight[0].numel()
        forward[part] += work
        total[part] += (3 if inputs[0].requires_grad else 2) * work

    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    handles = [
        module.register_forward_hook(functools.partial(count, name.partition(".")[0]))
        for name, module in layers
    ]
    with torch.compiler.set_stance("force_eager"):
        function()
    for handle in handles:
        handle.remove()
    return forward, sum(total.values())


def convolution_rates(args):
    """Multiply-adds a second of a bare convolution: forward, and forward with backward.

    Of the two memory formats, the faster one.
    """
    height, width = (25, 42) if args.quick else (200, 336)
    best = {"forward": 0, "step": 0}
    for layout in (torch.contiguous_format, torch.channels_last):
        conv = nn.Conv2d(256, 256, 3, padding=1, bias=False)
        conv = conv.to(args.device, memory_format=layout)
        x = torch.randn(args.batch, 256, height, width, device=args.device)
        x = x.to(memory_format=layout).requires_grad_()
        grad = torch.randn_like(x)

        def forward(conv=conv, x=x):
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
                return conv(x)

        def step(forward=forward, grad=grad):
            y = forward()
            y.backward(grad.to(y.dtype))

        times = alternate(f"bare convolution, {layout}", {"forward": forward, "step": step}, args)
        work = args.batch * height * width * conv.weight.numel()
        best["forward"] = max(best["forward"], work / times["forward"])
        best["step"] = max(best["step"], 3 * work / times["step"])
    return best


def resident(field):
    """MiB of this process: "VmRSS" now, "VmHWM" the most so far.

    Not getrusage's maximum: that starts at the peak of the process which started this one.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024


def measure_memory(name, task, path, args):
    """In a process of its own: the peak, in MiB, of two train steps or an inference."""
    samples = torch.load(path)
    side = SIDES[name](args)
    batch = side.batch(samples)
    if args.device.type == "cpu":
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before = resident("VmRSS")
    for _ in range(2):  # in the second step there is momentum
        if task == "train":
            train_step(side, batch, args)
        else:
            inference(side, samples[:1], args)
    if args.device.type == "cpu":
        return resident("VmHWM") - before
    return torch.cuda.max_memory_allocated() / 2**20


def memory(title, names, task, samples, args):
    """{name: MiB} of `measure_memory`; not a number where a process failed."""
    if args.device.type == "cpu" and not Path("/proc/self/status").exists():
        say("Peak memory on the CPU is measured on Linux only.")
        return {}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.pth"
        torch.save([(image, target, size) for image, target, size in samples], path)
        for name in names:
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", name, task, str(path)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                say(done.stderr[-500:])
            found[name] = math.nan if done.returncode else float(done.stdout.split()[-1])
            say(f"{title}: {name} {found[name]:.0f} MiB")
    return found


# ------------------------------------------------------------------------------------------------
# Loaders
# ------------------------------------------------------------------------------------------------


def torchvision_loader(dataset, sizes):
    """As in torchvision's references: PIL, masks at the file's size by pycocotools, transforms v2."""
    coco = dataset.coco_gt()
    transform = v2.Compose([
        v2.ToImage(), v2.RandomHorizontalFlip(), v2.Resize(sizes[0], max_size=sizes[1]),
        v2.ToDtype(torch.float32, scale=True), v2.SanitizeBoundingBoxes(),
    ])  # fmt: skip

    def load(i):
        info = coco.imgs[dataset.image_ids[i]]
        image = Image.open(Path(dataset.image_dir) / info["file_name"]).convert("RGB")
        objects = [o for o in coco.imgToAnns[info["id"]] if not o["iscrowd"]]
        boxes = torch.tensor([o["bbox"] for o in objects])
        canvas = info["height"], info["width"]
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYWH", canvas_size=canvas),
            "labels": torch.tensor([o["category_id"] for o in objects]),
            "masks": tv_tensors.Mask(np.stack([coco.annToMask(o) for o in objects])),
        }
        return transform(image, target)

    return load


def detectron2_loader(dataset, sizes, mask_format):
    """Detectron2's own mapper."""
    from detectron2.data import DatasetMapper
    from detectron2.data import transforms as T
    from detectron2.data.datasets.coco import load_coco_json

    records = load_coco_json(dataset.annotation_file, dataset.image_dir)
    records = {record["image_id"]: record for record in records}
    mapper = DatasetMapper(
        is_train=True,
        augmentations=[T.ResizeShortestEdge(*sizes), T.RandomFlip()],
        image_format="BGR",
        use_instance_mask=True,
        instance_mask_format=mask_format,
    )
    return lambda i: mapper(records[dataset.image_ids[i]])


def loader_part(dataset, names, args):
    """Rows of images/s, of one process with one thread."""
    our_loader = data.TrainingSet(dataset, args.sizes[:1], args.sizes[1])
    loaders = {
        "ours": lambda i: our_loader[i, i],
        "torchvision": torchvision_loader(dataset, args.sizes),
    }
    if "detectron2" in names:
        loaders["detectron2"] = detectron2_loader(dataset, args.sizes, "bitmask")
        loaders["polygons"] = detectron2_loader(dataset, args.sizes, "polygon")
    count = min(4 if args.quick else 80, len(dataset))

    def read(loader):
        for i in range(count):
            loader(i)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    passes = {name: functools.partial(read, loader) for name, loader in loaders.items()}
    speeds = {name: count / s for name, s in alternate("loader", passes, args).items()}
    torch.set_num_threads(threads)
    polygons = speeds.pop("polygons", None)
    yield "loader, bit masks: images/s of a core", speeds, None
    if polygons:
        both = {"ours": speeds["ours"], "detectron2": polygons}
        yield "the same, Detectron2 with polygons", both, None


# ------------------------------------------------------------------------------------------------
# Masks to results, results to metrics
# ------------------------------------------------------------------------------------------------


def made_up_detections(dataset, i, count=100):
    """`count` detections of image i, as from `evaluate.to_image`: its objects, moved a little."""
    image, target = dataset[i]
    size = tuple(image.shape[-2:])
    index = torch.arange(count) % len(target["boxes"])
    boxes = target["boxes"][index]
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    noise = torch.randn(count, 4, generator=torch.Generator().manual_seed(i)).clamp(-3, 3)
    boxes = ops.clip_boxes_to_image(boxes + 0.05 * sides * noise, size)
    rois = torch.cat([index[:, None], boxes], dim=1)
    masks = ops.roi_align(target["masks"][:, None].float(), rois, 28, aligned=True)[:, 0]
    labels, scores = target["labels"][index], torch.linspace(1, 0.05, count)
    return {"boxes": boxes, "labels": labels, "scores": scores, "masks": masks}, *size


def our_results(image_id, detections, height, width, category_ids):
    detections = {name: value.cpu() for name, value in detections.items()}
    return evaluate.coco_results(image_id, detections, height, width, category_ids)


def torchvision_results(image_id, detections, height, width, category_ids):
    """Its paste and, as in its references' coco_eval.py, pycocotools' encoding of every mask."""
    masks = paste_masks_in_image(detections["masks"][:, None], detections["boxes"], (height, width))
    codes = [
        coco_mask.encode(np.array(mask[0, :, :, None], dtype=np.uint8, order="F"))[0]
        for mask in (masks > 0.5).cpu().numpy()
    ]
    for code in codes:
        code["counts"] = code["counts"].decode("utf-8")
    return codes


def detectron2_results(image_id, detections, height, width, category_ids):
    """Its paste, and the results of its evaluator."""
    from detectron2.evaluation.coco_evaluation import instances_to_coco_json
    from detectron2.layers.mask_ops import paste_masks_in_image as paste
    from detectron2.structures import Boxes, Instances

    found = Instances((height, width))
    found.pred_boxes = Boxes(detections["boxes"])
    found.scores, found.pred_classes = detections["scores"], detections["labels"] - 1
    found.pred_masks = paste(detections["masks"], found.pred_boxes, (height, width))
    return instances_to_coco_json(found.to("cpu"), image_id)


def fast_metrics(truth, results, kind, image_ids):
    """Detectron2's COCO metrics, in C++ where that is built."""
    from detectron2.evaluation.coco_evaluation import COCOeval_opt

    with contextlib.redirect_stdout(io.StringIO()):
        scorer = COCOeval_opt(truth, truth.loadRes([dict(r) for r in results]), kind)
        scorer.params.imgIds = image_ids
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()


def paste_part(dataset, names, args):
    """Rows of ms for an image with 100 masks, and of s for the metrics of 1,000 such images."""
    chosen = range(min(4 if args.quick else 40, len(dataset)))
    found = [made_up_detections(dataset, i) for i in chosen]
    there = [({k: v.to(args.device) for k, v in d.items()}, *size) for d, *size in found]
    ids = [dataset.image_ids[i] for i in chosen]
    ways = {
        "ours": our_results, "torchvision": torchvision_results, "detectron2": detectron2_results,
    }  # fmt: skip

    def write(way):
        for image_id, (detections, height, width) in zip(ids, there):
            way(image_id, detections, height, width, dataset.category_ids)

    functions = {name: functools.partial(write, ways[name]) for name in names}
    times = alternate("paste and RLE", functions, args)
    milliseconds = {name: 1000 * s / len(ids) for name, s in times.items()}
    yield "paste and RLE of 100 masks: ms an image", milliseconds, None

    subset = SimpleNamespace(image_ids=ids, category_ids=dataset.category_ids)
    truth = dataset.coco_gt()
    results = []
    for image_id, (detections, height, width) in zip(ids, found):
        results += our_results(image_id, detections, height, width, dataset.category_ids)

    def score(metrics, images):
        for kind in ("bbox", "segm"):
            metrics(truth, results, kind, images)

    functions = {"ours": functools.partial(score, evaluate.coco_metrics, subset)}
    if "detectron2" in names:
        functions["detectron2"] = functools.partial(score, fast_metrics, ids)
    times = alternate("COCO metrics", functions, args)
    seconds = {name: 1000 * s / len(ids) for name, s in times.items()}
    yield "COCO metrics of boxes and masks: s for 1,000 images", seconds, None


# ------------------------------------------------------------------------------------------------
# The network's rows; a row is (title, {side: value}, seconds of the floor or None)
# ------------------------------------------------------------------------------------------------


def train_part(sides, samples, args, floor):
    batches = {name: side.batch(samples) for name, side in sides.items()}
    steps = {name: functools.partial(train_step, s, batches[name], args) for name, s in sides.items()}
    yield f"train step of {len(samples)} images: s", alternate("train step", steps, args), floor


def inference_part(sides, samples, args, floor):
    runs = {name: functools.partial(inference, s, samples, args) for name, s in sides.items()}
    times = alternate("inference", runs, args)
    yield "inference: s an image", {k: s / len(samples) for k, s in times.items()}, floor


def memory_part(names, samples, args):
    without = "" if args.device.type == "cuda" else ", weights left out"
    for task, title in (("train", "a train step"), ("inference", "an inference")):
        title = f"peak memory of {title}{without}: MiB"
        yield title, memory(title, names, task, samples, args), None


def growth_part(sides, samples, args):
    """A train step against the number of objects, with args.batch images, and of images."""
    objects = (1, 50) if args.quick else (1, 10, 50, 100, 200)
    images = (1, 2) if args.quick else (1, 2, 4)
    cases = [(f"{n} objects an image", [with_objects(s, n) for s in samples[: args.batch]])
             for n in objects]  # fmt: skip
    cases += [(f"{n} real images", samples[:n]) for n in images]
    for title, chosen in cases:
        yield from train_part(sides, chosen, args, None)
        found = memory(title, list(sides), "train", chosen, args)
        yield f"the same, {title}: peak MiB", found, None


def floor_part(side, samples, args):
    """Seconds of the floor of a train step and of an inference, and rows of our parts alone."""
    rates = convolution_rates(args)
    say(*(f"{kind}: {rate / 1e9:.1f} G multiply-adds/s" for kind, rate in rates.items()))
    batch = side.batch(samples)
    _, work = multiply_adds(side.model, functools.partial(side.losses, batch))
    floors = {"train": work / rates["step"]}
    seen, _ = multiply_adds(side.model, functools.partial(inference, side, samples[:1], args))
    floors["inference"] = sum(seen.values()) / rates["forward"]

    model = side.model
    rows = []
    with torch.no_grad(), torch.autocast(args.device.type, torch.bfloat16, enabled=args.amp):
        images, targets = train.to_device(*batch, args.device)
        tensor, sizes = model.batch(images)
        levels = model.backbone(tensor)
        features = model.fpn(levels)
        maps = model.rpn(features)
        boxes, valid = model.rpn.proposals(*maps, sizes)
        c = model.config
        count = c["box_batch_size_per_image"]
        rois = detector.to_rois(boxes[:, :count], valid[:, :count])
        pooled = model.pool(features, rois, c["box_roi_size"])
        count = int(count * c["box_positive_fraction"])
        fore = detector.to_rois(boxes[:, :count], valid[:, :count])
        fore_pooled = model.pool(features, fore, c["mask_roi_size"])
        labels = torch.ones(len(fore), dtype=torch.int64, device=args.device)
        matched = torch.zeros_like(labels)
        parts = {
            "backbone": lambda: model.backbone(tensor),
            "FPN": lambda: model.fpn(levels),
            "RPN": lambda: model.rpn(features),
            f"box head, {len(rois)} RoIs": lambda: model.box_heads[0](pooled),
            f"mask head, {len(fore)} RoIs": lambda: model.mask_head(fore_pooled, labels),
            "normalize and pad": lambda: model.batch(images),
            "proposals": lambda: model.rpn.proposals(*maps, sizes),
            "RPN losses": lambda: model.rpn.losses(
                *maps, *detector.pad_targets(targets, args.device)[::2],
                detector.sampling_seeds(targets, args.device),
            ),
            f"RoIAlign 7x7, {len(rois)} RoIs": lambda: model.pool(features, rois, 7),
            f"RoIAlign 14x14, {len(fore)} RoIs": lambda: model.pool(features, fore, 14),
            "mask targets": lambda: detector.mask_targets(targets, fore, matched, 28),
            "SGD": None,
        }  # fmt: skip
        parts.pop("SGD")
        for part, function in parts.items():
            forward, _ = multiply_adds(model, function)
            seconds = sum(forward.values()) / rates["forward"]
            title = f"our {part}, forward: s"
            rows.append((title, alternate(title, {"ours": function}, args), seconds or None))
    return floors, rows


def mask_rois(side, function):
    """How many RoIs the mask head of a side sees while function() runs."""
    counts = []
    hook = side.mask_head.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0])))
    function()
    hook.remove()
    return sum(counts)


# ------------------------------------------------------------------------------------------------
# The table
# ------------------------------------------------------------------------------------------------


def machine(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError, IndexError):
        text = Path("/proc/cpuinfo").read_text()
        return text.partition("model name")[2].split(":")[1].split("\n")[0].strip()
    return platform.processor() or platform.machine()


def number(value):
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def format_table(rows, args):
    """Rows as one markdown table; ratios are ours over the better peer's."""
    lines = [
        f"| | {' | '.join(SIDES)} | ours / better peer | floor | ours: % of the floor |",
        "|---" * (len(SIDES) + 4) + "|",
    ]
    for title, values, floor in rows:
        peers = [v for k, v in values.items() if k != "ours" and not math.isnan(v)]
        best = (max if "images/s" in title else min)(peers) if peers else math.nan
        ours = values.get("ours", math.nan)
        cells = [title, *(number(values.get(name)) for name in SIDES), number(ours / best)]
        cells += [number(floor), number(100 * floor / ours) if floor else "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def describe(names, args):
    versions = [f"torch {torch.__version__}", f"torchvision {torchvision.__version__}"]
    if "detectron2" in names:
        import detectron2

        versions.append(f"Detectron2 {detectron2.__version__}")
    versions.append(f"pycocotools {importlib.metadata.version('pycocotools')}")
    precision = "bf16 autocast" if args.amp else "fp32" + (" (TF32)" if args.tf32 else "")
    extra = ", ours compiled" if args.compile else ""
    return (
        f"{datetime.date.today()}, {machine(args.device)}, {torch.get_num_threads()} threads; "
        f"{', '.join(versions)}; {precision}{extra}, {args.sizes[0]}x{args.sizes[1]}, "
        f"{args.batch} images a step, medians of {args.repeats} rounds"
        + (", narrow networks" if args.quick else "")
    )


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="a data set in COCO's layout; train2017 of it")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--parts", default=",".join(PARTS), help="which of these, with commas (all)")
    add("--repeats", type=int, default=5, help="rounds (5)")
    add("--size", type=int, help="shorter side; the longer is at most 1333/800 of it (800)")
    add("--batch", type=int, default=2, help="images of a train step (2)")
    add("--amp", action="store_true", help="all sides in bfloat16 where autocast has it so")
    add("--tf32", action="store_true", help="allow TF32 in convolutions and products, on all sides")
    add("--compile", action="store_true", help="torch.compile for our backbone and FPN, ours alone")
    add("--quick", action="store_true", help="narrow networks, few and small images: does it run?")
    add("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.device = torch.device(args.device)
    args.parts = args.parts.split(",")
    if set(args.parts) - set(PARTS):
        parser.error(f"--parts are {', '.join(PARTS)}")
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
    names = ["ours", "torchvision"]
    try:
        import detectron2  # noqa: F401

        names.append("detectron2")
    except ImportError as error:
        say(f"without Detectron2: {error}")

    dataset = data.open_split(args.data, "train2017", training=True)
    samples = choose_samples(dataset, max(args.batch, 4), args.sizes)
    notes, rows, floors = [], [], {}
    if "loader" in args.parts:
        rows += loader_part(dataset, names, args)
    if "paste" in args.parts:
        rows += paste_part(dataset, names, args)
    if "memory" in args.parts:
        rows += memory_part(names, samples[: args.batch], args)
    if {"train", "inference", "growth", "floor"} & set(args.parts):
        sides = {name: SIDES[name](args) for name in names}
        batch = samples[: args.batch]
        for image, target, _ in batch:
            notes.append(f"{'x'.join(map(str, image.shape[1:]))} with {len(target['boxes'])}")
        notes = [f"Images and objects of a step: {', '.join(notes)}."]
        if "floor" in args.parts:
            floors, floor_rows = floor_part(sides["ours"], batch, args)
            rows += floor_rows
        if "train" in args.parts:
            rois = [mask_rois(s, functools.partial(train_step, s, s.batch(batch), args))
                    for s in sides.values()]  # fmt: skip
            notes.append(f"RoIs in the mask head: {', '.join(map(str, rois))}.")
            rows += train_part(sides, batch, args, floors.get("train"))
        if "inference" in args.parts:
            counts = [inference(s, batch, args) for s in sides.values()]
            notes.append(f"Detections an image: {', '.join(map(str, counts))}.")
            rows += inference_part(sides, batch, args, floors.get("inference"))
        if "growth" in args.parts:
            rows += growth_part(sides, samples, args)
    print(f"{describe(names, args)}. {' '.join(notes)}\n\n{format_table(rows, args)}")


if __name__ == "__main__":
    main()
