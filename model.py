"""Mask R-CNN with FPN, made to be trained from random weights.

He, Girshick, Dollar, "Rethinking ImageNet Pre-training" (arXiv 1811.08883), Sec. 4 "Architecture".
The file follows an image through the detector:

  Config -> boxes, matching, sampling -> backbone -> FPN -> RPN -> RoI heads -> MaskRCNN
  -> initialization -> checkpoints

Conventions are torchvision's. Boxes are [x1, y1, x2, y2] in continuous pixel coordinates: a pixel
is a unit square, the whole image is [0, 0, width, height], and nothing ever adds 1. Label 0 is
background, 1..K are the classes. In shape comments, B: images of the batch, A: anchors of an image,
G: ground-truth objects of the image that has most, N: boxes of an image, P: proposals of an image,
S: slots for samples of an image, R: RoIs of all images together, C: channels, K: classes.
"Choice 1" and so on are decisions where the paper is silent: docs/paper-map.md.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import pickletools
import zipfile
from errno import EINVAL, ENOMEM
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import roi_align

from norms import NORMS, make_norm


def require(condition, message):
    if not condition:
        raise ValueError(message)


# -- Every number of the detector ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the detector. Defaults: the paper's R50-FPN with GN, as Detectron has it.

    `build_model` makes it and adds what the names imply: Config(backbone="resnet101") alone has
    ResNet-50's blocks. Raises ValueError, naming the field, for a value out of range (RANGES).
    """

    backbone: str = "resnet50"  # a name in BACKBONES; build_model adds what it changes
    norm: str = "gn"  # "gn", "syncbn", "bn", "frozen_bn", "none" (norms.py)
    num_classes: int = 80  # without background
    masks: bool = True
    keypoints: int = 0  # how many an object has; COCO's person: 17
    cascade: bool = False  # three box stages (Sec. 5.1 "Enhanced baselines")
    # Of RGB images in [0, 1]: Detectron's pixel mean, and no division by a deviation.
    image_mean: tuple = (122.7717 / 255, 115.9465 / 255, 102.9801 / 255)
    image_std: tuple = (1 / 255, 1 / 255, 1 / 255)

    # Backbone and FPN
    blocks: tuple = (3, 4, 6, 3)  # bottlenecks in res2..res5
    groups: int = 1  # ResNeXt: cardinality
    width_per_group: int = 64  # channels of a group in res2; they double from stage to stage
    stem_width: int = 64  # smaller in the narrow networks of tests and of the generated data
    stride_in_1x1: bool = False  # MSRA's weights and many of Detectron2's have it there
    freeze_at: int = 0  # number of frozen stages; 2 (stem, res2) for fine-tuning (Choice 9)
    fpn_channels: int = 256

    # RPN: anchors of one size for each of P2..P6
    anchor_sizes: tuple = ((32.0,), (64.0,), (128.0,), (256.0,), (512.0,))  # sqrt(area) in pixels
    anchor_ratios: tuple = (0.5, 1.0, 2.0)  # height / width
    rpn_pre_nms_top_n_train: int = 2000  # of each level
    rpn_pre_nms_top_n_test: int = 1000
    rpn_post_nms_top_n_train: int = 1000  # of each image (Detectron2); Detectron: 2000 of 2 images
    rpn_post_nms_top_n_test: int = 1000
    rpn_nms_thresh: float = 0.7
    rpn_fg_iou_thresh: float = 0.7  # an anchor with at least this IoU is positive,
    rpn_bg_iou_thresh: float = 0.3  # one below this is negative, one in between is not used
    rpn_batch_size_per_image: int = 256
    rpn_positive_fraction: float = 0.5  # at most
    rpn_smooth_l1_beta: float = 1 / 9  # both betas are Detectron's; Detectron2 has 0 (Choice 2)

    # RoI heads
    roi_sampling_ratio: int = 2  # Detectron; 0: as many samples as pixels (Detectron2, Choice 1)
    box_roi_size: int = 7
    box_head_convs: int = 4  # "4conv1fc" (Sec. 4); build_model: 0 and 2 fc, if heads have no norm
    box_head_channels: int = 256
    box_head_fcs: int = 1
    box_head_fc_channels: int = 1024
    box_class_agnostic: bool = False  # one box for all classes; a cascade needs it (Choice 6)
    box_fg_iou_thresh: float = 0.5
    cascade_fg_iou_thresh: tuple = (0.6, 0.7)  # of stages 2 and 3
    box_batch_size_per_image: int = 512
    box_positive_fraction: float = 0.25  # at most
    bbox_reg_weights: tuple = (10.0, 10.0, 5.0, 5.0)  # see encode_boxes
    box_smooth_l1_beta: float = 1.0
    box_score_thresh: float = 0.05
    box_nms_thresh: float = 0.5
    box_detections_per_img: int = 100
    mask_roi_size: int = 14  # masks are twice as large: 28 x 28
    mask_head_convs: int = 4
    mask_head_channels: int = 256
    keypoint_roi_size: int = 14  # heatmaps are four times as large: 56 x 56
    keypoint_head_convs: int = 8
    keypoint_head_channels: int = 512

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_form(field.name, getattr(self, field.name), field.default)
        require(self.backbone in BACKBONES, f"backbone must be one of {', '.join(BACKBONES)}.")
        require(self.norm in NORMS, f"norm must be one of {', '.join(NORMS)}.")
        levels = 1 if self.backbone == "vgg16" else 5
        is_right = len(self.anchor_sizes) == levels and len(set(map(len, self.anchor_sizes))) == 1
        require(is_right, f"anchor_sizes must be {levels} tuples of equal length, one a level.")
        is_right = self.box_class_agnostic or not self.cascade
        require(is_right, "cascade needs box_class_agnostic: stages hand on one box of each RoI.")


# What a name of a backbone changes. The paper's "ResNeXt-152 8x32d" has 8 groups of 32 (4.24 times
# ResNet-101's multiply-adds, its "about 4x"); Detectron's pre-trained X-152 has 32 groups of 8.
BACKBONES = {
    "resnet50": {"blocks": (3, 4, 6, 3)},
    "resnet101": {"blocks": (3, 4, 23, 3)},
    "resnext101_32x8d": {"blocks": (3, 4, 23, 3), "groups": 32, "width_per_group": 8},
    "resnext152_8x32d": {"blocks": (3, 8, 36, 3), "groups": 8, "width_per_group": 32},
    "resnext152_32x8d": {"blocks": (3, 8, 36, 3), "groups": 32, "width_per_group": 8},
    # Faster R-CNN without FPN and norm (Sec. 5.1 "Models without BN/GN", Choice 8): Detectron's
    # anchors and numbers of proposals off FPN, VGG's two fc layers. Its images are divided by their
    # deviation: otherwise, with no norm to rescale inputs of RMS 59, the recipe diverges within
    # five steps from random weights.
    "vgg16": {
        "anchor_sizes": ((64.0, 128.0, 256.0, 512.0),),
        "rpn_pre_nms_top_n_train": 12000,
        "rpn_post_nms_top_n_train": 2000,
        "rpn_pre_nms_top_n_test": 6000,
        "box_head_convs": 0,
        "box_head_fcs": 2,
        "box_head_fc_channels": 4096,
        "image_std": (58.395 / 255, 57.12 / 255, 57.375 / 255),
    },
}

# The range of a field, or of each number in its tuple. Fields that are not listed: 0 to 1 for a
# float, 1 to 20,000 for an int.
RANGES = {
    "image_std": (0.001, 1), "bbox_reg_weights": (0.01, 1000), "blocks": (1, 100),
    "anchor_sizes": (1, 10_000), "anchor_ratios": (0.01, 100), "freeze_at": (0, 5),
    "keypoints": (0, 1000), "roi_sampling_ratio": (0, 16), "box_head_fcs": (0, 16),
    "box_head_convs": (0, 16), "mask_head_convs": (0, 16), "keypoint_head_convs": (0, 16),
    "box_roi_size": (1, 64), "mask_roi_size": (1, 64), "keypoint_roi_size": (1, 64),
    # At 0, the padding of an image without objects would be an object.
    "rpn_fg_iou_thresh": (0.01, 1), "rpn_bg_iou_thresh": (0.01, 1),
    "box_fg_iou_thresh": (0.01, 1), "cascade_fg_iou_thresh": (0.01, 1),
}  # fmt: skip


def check_form(name, value, default):
    """ValueError, naming the field, unless `value` has the default's types, lengths and range.

    A value may come from a file: no more of it is looked at than the form of the default allows.
    """
    if type(default) is tuple:
        lengths = range(1, 21) if "anchor" in name else [len(default)]
        is_right = type(value) is tuple and len(value) in lengths
        require(is_right, f"{name} must be of the form {default}.")
        for part in value:
            check_form(name, part, default[0])
        return
    kinds = (int, float) if type(default) is float else (type(default),)
    require(type(value) in kinds, f"{name} must be of the form {default!r}.")
    if type(default) in (int, float):
        low, high = RANGES.get(name, (0, 1) if type(default) is float else (1, 20_000))
        require(low <= value <= high, f"{name} must be from {low:,} to {high:,}.")


# -- Boxes: overlap, coding, clipping, suppression -------------------------------------------------

# A predicted box is at most 1000/16 times as wide and as high as its anchor: exp() of a wild early
# prediction would overflow. (Detectron: BBOX_XFORM_CLIP)
MAX_LOG_SCALE = math.log(1000.0 / 16)


def box_areas(boxes):  # [..., 4] -> [...]
    return (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)


def has_area(boxes):  # [..., 4] -> [...] bool; False where a coordinate is not a number
    return (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)


def pairwise_iou(truth, boxes):
    """Intersection over union of truth [B, G, 4] with boxes [B or 1, N, 4]: [B, G, N].

    A box without area has IoU 0 with everything.
    """
    t, b = truth[:, :, None], boxes[:, None]  # [B, G, 1, 4], [B or 1, 1, N, 4]
    low = torch.maximum(t[..., :2], b[..., :2])  # the left and upper corner of the intersection
    high = torch.minimum(t[..., 2:], b[..., 2:])
    width, height = (high - low).clamp_(min=0).unbind(dim=-1)  # [B, G, N]
    intersection = width * height
    union = box_areas(t) + box_areas(b) - intersection
    return (intersection / union).nan_to_num_(nan=0.0)  # 0 / 0: neither has an area


def encode_boxes(truth, boxes):
    """Regression targets (dx, dy, dw, dh) that turn `boxes` into `truth`; all [..., 4].

    R-CNN's parametrization. With centre (x, y) and size (w, h) of a box, and * for the truth:

        dx = (x* - x) / w    dy = (y* - y) / h    dw = log(w* / w)    dh = log(h* / h)

    which scaling the image does not change. The box head's targets are multiplied by weights of one
    over their usual spread, so that all four count alike in the loss: the centre of a proposal is
    off by about 0.1 of its size, and its size by a factor of about e^0.2, hence 10, 10, 5, 5.
    """
    size = boxes[..., 2:] - boxes[..., :2]
    centre = boxes[..., :2] + 0.5 * size
    truth_size = truth[..., 2:] - truth[..., :2]
    truth_centre = truth[..., :2] + 0.5 * truth_size
    return torch.cat([(truth_centre - centre) / size, torch.log(truth_size / size)], dim=-1)


def decode_boxes(deltas, boxes):
    """The inverse of `encode_boxes`: deltas [..., 4] applied to boxes [..., 4] (broadcast)."""
    size = boxes[..., 2:] - boxes[..., :2]
    half = 0.5 * size
    centre = boxes[..., :2] + half + deltas[..., :2] * size
    half = half * deltas[..., 2:].clamp(max=MAX_LOG_SCALE).exp()
    return torch.cat([centre - half, centre + half], dim=-1)


def image_limits(sizes, device):
    """(w, h, w, h) of every image as a float tensor [B, 1, 4], to clip boxes to."""
    limits = torch.tensor([(w, h, w, h) for h, w in sizes], dtype=torch.float32)
    return limits[:, None].to(device, non_blocking=True)


def take(x, index):
    """Rows of x [B, N, ...] at index [B, S]: [B, S, ...]."""
    for _ in range(x.dim() - 2):
        index = index[..., None]
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))


def to_lists(*tensors):
    """Integer or bool tensors [n] as lists, for which the host waits for the device only once."""
    numbers = iter(torch.cat(tensors).tolist())
    return [list(itertools.islice(numbers, len(tensor))) for tensor in tensors]


def nms(boxes, scores, groups, threshold, most):
    """Non-maximum suppression: the up to `most` best boxes of each image that survive it.

    From best to worst, a box is kept unless its IoU with an already kept box of the same group is
    above `threshold`. boxes [B, N, 4]; scores [B, N], -inf for a box that is no candidate; groups
    [B, N] int64. Returns index [B, min(most, N)] into N, best first, which of them are valid
    [B, min(most, N)], and how many are, as a list.
    """
    n = scores.shape[1]
    sorted_scores, order = scores.sort(dim=1, descending=True, stable=True)
    boxes, groups, candidate = take(boxes, order), take(groups, order), sorted_scores > -math.inf
    # 1) The best boxes alone: none of them depends on a worse one, and they nearly always hold
    #    enough survivors (on COCO, 1,000 survivors are among the best 1,100 to 2,500).
    first = min(n, max(3 * most, 1000))
    suppress = nms_in_rounds if boxes.is_cuda else nms_one_by_one
    keep, settled = suppress(boxes[:, :first], groups[:, :first], candidate[:, :first], threshold)
    counts, more, settled = to_lists(keep.sum(dim=1), candidate[:, first - 1], settled)
    # 2) All boxes, where that was not enough, or took too many rounds.
    too_few = first < n and any(c < most and others for c, others in zip(counts, more))
    if too_few or not all(settled):
        keep, _ = nms_one_by_one(boxes, groups, candidate, threshold)
        counts = keep.sum(dim=1).tolist()
    # 3) The best survivors, by their places in the boxes as they were given.
    keep = torch.zeros_like(candidate).scatter(1, order[:, : keep.shape[1]], keep)
    kept_scores, index = scores.masked_fill(~keep, -math.inf).topk(min(most, n))
    return index, kept_scores > -math.inf, [min(count, most) for count in counts]


def nms_one_by_one(boxes, groups, candidate, threshold):
    """Which sorted boxes [B, N, 4] are kept [B, N] bool, and True [B]: every image is settled."""
    keep = torch.zeros_like(candidate)
    ranks = -torch.arange(boxes.shape[1], device=boxes.device, dtype=boxes.dtype)
    for i in range(len(boxes)):
        for group in groups[i].unique():
            here = ((groups[i] == group) & candidate[i]).nonzero()[:, 0]
            kept = torchvision.ops.nms(boxes[i, here], ranks[here], threshold)
            keep[i, here[kept]] = True
    return keep, candidate.new_ones(len(boxes))


def nms_in_rounds(boxes, groups, candidate, threshold, rounds=12):
    """The same for a GPU, which would go through boxes slowly and wait for the host in each group.

    At first no box is dropped. In each round, a box is dropped if a better box of its group
    overlaps it and was not itself dropped in the round before. The best box is right from the
    start, and each round settles at least one more; images of COCO need 3 to 10. An image is
    settled if the last round changed nothing.
    """
    same_group = groups[:, :, None] == groups[:, None]
    suppresses = (pairwise_iou(boxes, boxes) > threshold) & same_group
    suppresses = suppresses.triu(diagonal=1)  # [B, N, N]: the better box, the worse one
    before = dropped = torch.zeros_like(candidate)
    for _ in range(rounds):
        # (of bools, a > b is "a and not b", in one kernel instead of two)
        before, dropped = dropped, (suppresses > dropped[:, :, None]).any(dim=1)
    return candidate > dropped, (dropped == before).all(dim=1)


# -- Matching and sampling -------------------------------------------------------------------------


class Truth(NamedTuple):
    """The objects of a batch, padded to G objects an image."""

    boxes: torch.Tensor  # [B, G, 4]; padding is zero, a box without area: its IoU is 0
    labels: torch.Tensor  # [B, G] int64


class Samples(NamedTuple):
    """The RoIs that a head is trained on, in order of images."""

    rois: torch.Tensor  # [R, 5]: image, x1, y1, x2, y2
    labels: torch.Tensor  # [R]; 0 is background
    matched: torch.Tensor  # [R]: index of the object within its image
    # The level of each RoI [R] (`roi_levels`), and how many RoIs each level has. Nobody has counted
    # those of stages 2 and 3 of a cascade.
    levels: tuple = (None, None)
    image_counts: list | None = None  # how many of the RoIs are in each image


def pad_targets(targets, device):
    """Targets of a batch (see `MaskRCNN.forward`) as Truth."""
    # at least 1, so that a batch without any object needs no case of its own
    most = max([1] + [len(target["boxes"]) for target in targets])
    boxes = torch.zeros(len(targets), most, 4, device=device)
    labels = torch.ones(len(targets), most, dtype=torch.int64, device=device)
    for i, target in enumerate(targets):
        n = len(target["boxes"])
        boxes[i, :n] = target["boxes"]
        labels[i, :n] = target["labels"]
    return Truth(boxes, labels)


def match_boxes(truth, boxes, threshold):
    """Boxes [B, N, 4] to the object that each overlaps most: its index [B, N] and label [B, N].

    The label is 0, background, where the IoU is below the threshold.
    """
    best, matched = pairwise_iou(truth.boxes, boxes).max(dim=1)  # of [B, G, N]
    return matched, take(truth.labels, matched).masked_fill_(best < threshold, 0)


ANCHOR_SALT, ROI_SALT = 0x632BE5AB, 2 * 0x632BE5AB  # any two numbers: they make two seeds of one


def sampling_seeds(targets, device):
    """A seed of 32 bits for the anchors and one for the RoIs of each image: two of [B] int64.

    The route of the seed is told in data.py, above `hash_of`. A target without one gets one from
    torch's generator.
    """
    seeds = [t["seed"] if "seed" in t else int(torch.randint(2**62, ())) for t in targets]
    folded = [seed ^ (seed >> 32) for seed in seeds]  # all 63 bits have a say in the lower 32
    salted = [[(seed + salt) & 0xFFFFFFFF for seed in folded] for salt in (ANCHOR_SALT, ROI_SALT)]
    return torch.tensor(salted).to(device, non_blocking=True).unbind()


def random_keys(seeds, n):
    """Uniform int64 numbers [B, n] in 0..2^32 - 1, a function of (seed [B], position) alone.

    A counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"): it
    hashes the position, and has no state. The hash is C. Wellons's lowbias32 ("Prospecting for hash
    functions", nullprogram.com) with shifts of 16; 0x9E3779B9 is 2^32 over the golden ratio.
    """
    mask = 0xFFFFFFFF  # the arithmetic is modulo 2^32
    position = torch.arange(n, device=seeds.device)
    x = torch.add(seeds[:, None], position, alpha=0x9E3779B9) & mask  # seed + alpha * position
    for multiplier in (0x7FEB352D, 0x846CA68B):
        x = ((x ^ (x >> 16)) * multiplier) & mask
    return x ^ (x >> 16)


def sample(labels, batch_size, positive_fraction, seeds):
    """Choose up to `batch_size` candidates of each image, at most `positive_fraction` positive.

    labels: [B, N] int64; > 0 positive, 0 negative, < 0 never chosen. Negatives make up for missing
    positives; both are drawn without replacement (Choice 10: Detectron's negatives with).

    Returns index [B, S] into N and valid [B, S] bool, at most `batch_size` of them True. S has
    slots for the most positives and then for `batch_size` negatives: shapes are static, so that
    nothing waits for the device.
    """
    keys = random_keys(seeds, labels.shape[1])
    most_positive = min(int(batch_size * positive_fraction), labels.shape[1])
    # The candidates with the largest keys are chosen; -1 marks what is none.
    key, positive = keys.masked_fill(labels <= 0, -1).topk(most_positive)
    positive_valid = key >= 0
    key, negative = keys.masked_fill(labels != 0, -1).topk(min(batch_size, labels.shape[1]))
    room = batch_size - positive_valid.sum(dim=1, keepdim=True)  # [B, 1]
    negative_valid = (key >= 0) & (torch.arange(key.shape[1], device=key.device) < room)
    index = torch.cat([positive, negative], dim=1)
    return index, torch.cat([positive_valid, negative_valid], dim=1)


# -- Backbones -------------------------------------------------------------------------------------


class ConvNorm(nn.Module):
    """Convolution, normalization, and ReLU unless `relu=False` (Sec. 3.1).

    A convolution that is followed by a normalization has no bias: the norm would remove it.
    """

    def __init__(self, inputs, outputs, kernel, norm, stride=1, groups=1, relu=True):
        super().__init__()
        bias = norm == "none"
        padding = kernel // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, 1, groups, bias)
        self.norm = make_norm(norm, outputs)
        self.relu = relu

    def forward(self, x):  # [N, C, H, W] -> [N, C', H / stride, W / stride]
        x = self.norm(self.conv(x))
        return x.relu_() if self.relu else x


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with a shortcut; the stride is on the 3x3 (MSRA's weights have it on the 1x1).

    ResNeXt: `groups` is the cardinality, `width` the channels of all groups together.
    """

    def __init__(self, inputs, width, outputs, norm, stride, groups, stride_in_1x1):
        super().__init__()
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.shortcut = None
        if inputs != outputs or stride != 1:
            self.shortcut = ConvNorm(inputs, outputs, 1, norm, stride, relu=False)
        self.conv1 = ConvNorm(inputs, width, 1, norm, stride_1x1)
        self.conv2 = ConvNorm(width, width, 3, norm, stride_3x3, groups)
        self.conv3 = ConvNorm(width, outputs, 1, norm, relu=False)

    def forward(self, x):  # [B, inputs, H, W] -> [B, outputs, H / stride, W / stride]
        shortcut = x if self.shortcut is None else self.shortcut(x)
        x = self.conv3(self.conv2(self.conv1(x)))
        return x.add_(shortcut).relu_()


class Backbone(nn.Module):
    """What ResNet and VGG share: stages in order, of which the first `freeze_at` are not trained.

    `freeze_at` counts as Detectron's FREEZE_AT does: 1 is the stem, 2 is stem and res2. From random
    weights it must be 0: frozen random layers cost 3.3 AP (R50, 3x).
    """

    recompute = False  # of ResNet: see its forward

    def freeze(self, stages, freeze_at):
        self.frozen = stages[:freeze_at]
        for stage in self.frozen:
            stage.requires_grad_(False).eval()

    def train(self, mode=True):
        super().train(mode)
        for stage in self.frozen:
            stage.eval()  # BN of a frozen stage keeps its statistics as well
        return self


class ResNet(Backbone):
    """ResNet or ResNeXt; res2..res5, at strides 4, 8, 16, 32."""

    def __init__(self, config):
        super().__init__()
        self.norm = config.norm
        self.strides = [4, 8, 16, 32]
        self.channels = [config.stem_width * 4 * 2**i for i in range(4)]
        self.stem = ConvNorm(3, config.stem_width, 7, config.norm, stride=2)
        inputs = config.stem_width
        for i, outputs in enumerate(self.channels):
            stage = nn.Sequential()
            width = config.groups * config.width_per_group * 2**i
            for j in range(config.blocks[i]):
                stride = 2 if i > 0 and j == 0 else 1
                convs = (inputs, width, outputs, config.norm, stride)
                stage.append(Bottleneck(*convs, config.groups, config.stride_in_1x1))
                inputs = outputs
            setattr(self, f"res{i + 2}", stage)
        stages = [self.stem, self.res2, self.res3, self.res4, self.res5]
        self.freeze(stages, config.freeze_at)

    def forward(self, x):  # [B, 3, H, W]
        # Stem and res2 take a quarter of a step's memory. With `recompute`, their maps are not kept
        # but computed again in the backward pass, which adds 2 % to a step's work. BN would update
        # its running statistics twice.
        if self.training and self.recompute and self.norm not in ("bn", "syncbn"):
            res2 = checkpoint(self.to_res2, x, use_reentrant=False, preserve_rng_state=False)
        else:
            res2 = self.to_res2(x)  # [B, 256, H / 4, W / 4]
        res3 = self.res3(res2)  # [B, 512, H / 8, W / 8]
        res4 = self.res4(res3)  # [B, 1024, H / 16, W / 16]
        res5 = self.res5(res4)  # [B, 2048, H / 32, W / 32]
        return [res2, res3, res4, res5]

    def to_res2(self, x):
        x = self.stem(x)  # [B, 64, H / 2, W / 2]
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)  # [B, 64, H / 4, W / 4]
        return self.res2(x)


class VGG16(Backbone):
    """VGG-16 up to conv5_3 at stride 16, its only level (Sec. 5.1 "Models without BN/GN").

    From random weights all of it is trained (Choice 8: Detectron's stops gradients at pool2).
    """

    def __init__(self, config):
        super().__init__()
        self.strides = [16]
        self.channels = [8 * config.stem_width]
        inputs = 3
        for i, (count, multiple) in enumerate([(2, 1), (2, 2), (3, 4), (3, 8), (3, 8)]):
            stage = nn.Sequential()
            for _ in range(count):
                stage.append(ConvNorm(inputs, multiple * config.stem_width, 3, config.norm))
                inputs = multiple * config.stem_width
            setattr(self, f"conv{i + 1}", stage)
        self.freeze([self.conv1, self.conv2, self.conv3, self.conv4, self.conv5], config.freeze_at)

    def forward(self, x):  # [B, 3, H, W]
        x = self.conv1(x)  # [B, 64, H, W]
        for stage in (self.conv2, self.conv3, self.conv4, self.conv5):
            x = stage(F.max_pool2d(x, 2))
        return [x]  # [B, 512, H / 16, W / 16]


# -- FPN -------------------------------------------------------------------------------------------


class FPN(nn.Module):
    """res2..res5 to P2..P6, all with `channels` channels (Lin et al., CVPR 2017).

    The lateral and the output convolutions are normalized ("gn", "syncbn", "bn"), without ReLU.
    P6, for the RPN's largest anchors, is every second pixel of the normalized P5. The RoI heads do
    not use it: `MaskRCNN.pool` leaves it out.
    """

    def __init__(self, inputs, channels, norm):
        super().__init__()
        lateral = [ConvNorm(c, channels, 1, norm, relu=False) for c in inputs]
        output = [ConvNorm(channels, channels, 3, norm, relu=False) for _ in inputs]
        self.lateral, self.output = nn.ModuleList(lateral), nn.ModuleList(output)

    def forward(self, levels):  # res2..res5: [B, 256..2048, H / 4..32, W / 4..32]
        top_down = self.lateral[-1](levels[-1])  # [B, 256, H / 32, W / 32]
        pyramid = [self.output[-1](top_down)]  # P5
        for i in reversed(range(len(levels) - 1)):
            upsampled = F.interpolate(top_down, scale_factor=2, mode="nearest")
            top_down = self.lateral[i](levels[i]) + upsampled
            pyramid.insert(0, self.output[i](top_down))  # P4, P3, P2
        return pyramid + [pyramid[-1][:, :, ::2, ::2]]  # P2..P6: [B, 256, H / 4..64, W / 4..64]


# -- RPN -------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=32)  # 270,000 boxes for an image of 800 x 1333: 4 MB
def make_anchors(shapes, strides, sizes, ratios, device):
    """Anchors of one image for each level: a list of [h * w * len(sizes) * len(ratios), 4].

    shapes: (h, w) of each level; sizes: sqrt(area) in pixels of each level; ratios: h / w; tuples.
    Centred on (x * stride, y * stride), unrounded, and kept when they cross the image border
    (Choice 1, Detectron2). Order: row, column, size, ratio.
    """
    anchors = []
    for (h, w), stride, level_sizes in zip(shapes, strides, sizes):
        wh = [(s / math.sqrt(r), s * math.sqrt(r)) for s in level_sizes for r in ratios]
        half = torch.tensor(wh).to(device, non_blocking=True) / 2  # [sizes * ratios, 2]
        y, x = (torch.arange(n, device=device) * stride for n in (h, w))
        y, x = torch.meshgrid(y, x, indexing="ij")
        centre = torch.stack([x, y], dim=-1).view(-1, 1, 2)  # [h * w, 1, 2]
        anchors.append(torch.cat([centre - half, centre + half], dim=-1).view(-1, 4))
    return anchors


class RPN(nn.Module):
    """Region proposal network: objectness and a box for every anchor. No norm here (Detectron)."""

    def __init__(self, config, channels, strides):
        super().__init__()
        self.config = config
        self.strides = tuple(strides)
        per_location = len(config.anchor_sizes[0]) * len(config.anchor_ratios)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, per_location, 1)
        self.deltas = nn.Conv2d(channels, per_location * 4, 1)

    def forward(self, features):
        """For each level: objectness logits [B, A_l], box deltas [B, A_l, 4], anchors [A_l, 4]."""
        objectness, deltas = [], []
        for level in features:  # [B, C, h, w]
            x = self.conv(level).relu_()
            # In float32 under autocast too: in bfloat16 many anchors would have the same logit.
            with torch.autocast(x.device.type, enabled=False):
                level_objectness = self.objectness(x.float()).permute(0, 2, 3, 1)  # [B, h, w, 3]
                level_deltas = self.deltas(x.float()).permute(0, 2, 3, 1)  # [B, h, w, 3 * 4]
            objectness.append(level_objectness.flatten(1))
            deltas.append(level_deltas.reshape(len(x), -1, 4))
        shapes = tuple(tuple(level.shape[-2:]) for level in features)
        c, device = self.config, features[0].device
        anchors = make_anchors(shapes, self.strides, c.anchor_sizes, c.anchor_ratios, device)
        return objectness, deltas, anchors

    @torch.no_grad()
    def proposals(self, objectness, deltas, anchors, sizes):
        """Boxes [B, P, 4], best first, and which are valid [B, P]; sizes: (h, w), unpadded."""
        c = self.config
        before, after = c.rpn_pre_nms_top_n_test, c.rpn_post_nms_top_n_test
        if self.training:
            before, after = c.rpn_pre_nms_top_n_train, c.rpn_post_nms_top_n_train
        # 1) the best anchors of each level, as indices into all levels together
        best = [x.topk(min(before, x.shape[1])) for x in objectness]
        scores = torch.cat([b.values for b in best], dim=1)  # [B, N]
        levels = torch.cat([torch.full_like(b.indices, i) for i, b in enumerate(best)], dim=1)
        starts = itertools.accumulate((x.shape[1] for x in objectness), initial=0)
        index = torch.cat([b.indices + start for b, start in zip(best, starts)], dim=1)
        # 2) their boxes; one outside the image is clipped to nothing (Detectron also leaves out
        #    those with their centre outside: Choice 10)
        deltas = take(torch.cat(deltas, dim=1), index)  # [B, N, 4]
        boxes = decode_boxes(deltas, torch.cat(anchors)[index])
        boxes = torch.minimum(boxes.clamp(min=0), image_limits(sizes, boxes.device))
        scores = scores.masked_fill(~has_area(boxes), -math.inf)
        # 3) those that survive NMS, which runs within each level
        index, valid, _ = nms(boxes, scores, levels, c.rpn_nms_thresh, after)  # [B, P]
        return take(boxes, index), valid

    def losses(self, objectness, deltas, anchors, truth, seeds):
        """loss_objectness and loss_rpn_box_reg of 256 anchors an image, scalars."""
        c = self.config
        objectness, deltas = torch.cat(objectness, dim=1), torch.cat(deltas, dim=1)
        anchors = torch.cat(anchors)
        matched, labels = self.match(anchors, truth)
        batch_size, fraction = c.rpn_batch_size_per_image, c.rpn_positive_fraction
        index, valid = sample(labels, batch_size, fraction, seeds)  # [B, S]
        positive = take(labels, index).eq(1) & valid
        # Other slots get their own anchor as target: a finite error, which the loss leaves out.
        boxes = anchors[index]  # [B, S, 4]
        box_truth = take(truth.boxes, take(matched, index))
        box_truth = torch.where(positive[..., None], box_truth, boxes)
        box_targets = encode_boxes(box_truth, boxes)
        logits = take(objectness, index)  # [B, S]
        loss = F.binary_cross_entropy_with_logits(
            logits, positive.float(), weight=valid.float(), reduction="sum"
        )
        # Smooth L1 of an error d: d^2 / (2 beta) below beta, |d| - beta / 2 above; far off, a box
        # has a gradient of 1 at most. These targets have no weights, hence a smaller beta.
        x, beta = take(deltas, index), c.rpn_smooth_l1_beta
        box_loss = F.smooth_l1_loss(x, box_targets, reduction="none", beta=beta)  # [B, S, 4]
        denominator = batch_size * len(index)  # 256 anchors an image, also where fewer were drawn
        return {
            "loss_objectness": loss / denominator,
            "loss_rpn_box_reg": (box_loss * positive[..., None]).sum() / denominator,
        }

    def match(self, anchors, truth):
        """For anchors [A, 4]: index of the best object [B, A], label [B, A]: 1, 0, -1 (not used).

        Positive: IoU >= 0.7 with an object, or the highest IoU that any anchor has with it. Without
        these "low-quality matches" (Faster R-CNN, Sec. 3.1.2) some objects would have no positive
        anchor. Such an anchor still regresses to the object that it overlaps most itself, which may
        be another one (Detectron, Detectron2). Negative: IoU below 0.3 with all objects.
        """
        iou = pairwise_iou(truth.boxes, anchors[None])  # [B, G, A]
        best, matched = iou.max(dim=1)
        labels = torch.full_like(matched, -1)
        labels[best < self.config.rpn_bg_iou_thresh] = 0
        labels[best >= self.config.rpn_fg_iou_thresh] = 1
        highest = iou.max(dim=2, keepdim=True).values.clamp_(min=1e-6)  # [B, G, 1]
        labels[(iou >= highest).any(dim=1)] = 1
        return matched, labels


# -- RoI heads -------------------------------------------------------------------------------------


def roi_levels(boxes, strides):
    """The index of the level that each box [..., 4] is pooled from: [...] int64.

    A box of 224^2 pixels, ImageNet's crop, goes to P4, one of half that side to P3, and so on:
    k = floor(4 + log2(sqrt(w h) / 224)), clipped to P2..P5 (Eq. 1 of the FPN paper).
    """
    side = box_areas(boxes).clamp(min=0).sqrt()
    level = torch.floor(4 + torch.log2(side / 224 + 1e-8))  # 1e-8: an empty box has no log
    lowest, highest = (int(math.log2(s)) for s in (strides[0], strides[-1]))  # P_k: stride 2^k
    return level.clamp(lowest, highest).long() - lowest


def multilevel_roi_align(features, strides, rois, size, sampling_ratio, levels=None, counts=None):
    """RoIAlign over levels: [R, C, size, size] from P2..P5 (or one level) and rois [R, 5].

    RoIAlign (Mask R-CNN, Sec. 3) divides a box into size x size bins and averages each over
    sampling_ratio^2 points (0: as many as the bin has pixels), which it interpolates between the
    four pixels around a point: nothing is rounded to whole pixels. `aligned`: the value of pixel i
    is that at i + 1/2, its centre, as everywhere in this file.

    levels [R]: the level of each RoI (`roi_levels`); counts: how many RoIs each level has. In
    training, `MaskRCNN.sample_rois` hands them on. Without them, both are computed here, and the
    host waits for the device.
    """
    if levels is None:
        levels = roi_levels(rois[:, 1:], strides)
        every_level = torch.arange(len(strides), device=levels.device)
        counts = (levels[:, None] == every_level).sum(dim=0).tolist()
    order = levels.argsort(stable=True)
    pooled = [
        roi_align(feature.float(), boxes, size, 1 / stride, sampling_ratio, aligned=True)
        for feature, boxes, stride in zip(features, rois[order].split(counts), strides)
    ]
    pooled = torch.cat(pooled)
    return torch.empty_like(pooled).index_copy_(0, order, pooled)  # back in the order of rois


def to_rois(boxes):
    """Boxes [N, 4] of each image (a list, or [B, N, 4]) as [R, 5]: image, x1, y1, x2, y2."""
    return torch.cat([F.pad(b, (1, 0), value=i) for i, b in enumerate(boxes)])


def conv_stack(count, inputs, width, norm):
    """`count` 3x3 convolutions with norm and ReLU, and how many channels come out."""
    convs = [ConvNorm(width if i else inputs, width, 3, norm) for i in range(count)]
    return nn.Sequential(*convs), width if count else inputs


class BoxHead(nn.Module):
    """Pooled RoIs to class logits [R, K + 1] and box deltas [R, K or 1, 4].

    4 conv 3x3 + 1 fc where there is a norm ("4conv1fc", Sec. 4 "Architecture" and the GN paper), 2
    fc where there is none (`build_model` chooses). The classifier is a softmax over background and
    the classes.
    """

    def __init__(self, config, channels, norm):
        super().__init__()
        convs = (config.box_head_convs, channels, config.box_head_channels, norm)
        self.convs, channels = conv_stack(*convs)
        width = channels * config.box_roi_size**2
        self.fcs = nn.ModuleList()
        for _ in range(config.box_head_fcs):
            self.fcs.append(nn.Linear(width, config.box_head_fc_channels))
            width = config.box_head_fc_channels
        regressors = 1 if config.box_class_agnostic else config.num_classes
        self.classifier = nn.Linear(width, config.num_classes + 1)
        self.regressor = nn.Linear(width, regressors * 4)

    def forward(self, x):  # [R, C, 7, 7]
        x = self.convs(x).flatten(1)  # [R, 256 * 7 * 7]
        for fc in self.fcs:
            x = fc(x).relu_()  # [R, 1024]
        deltas = self.regressor(x).float().unflatten(1, (-1, 4))
        return self.classifier(x).float(), deltas


class MaskHead(nn.Module):
    """Pooled RoIs [R, C, 14, 14] and their classes [R] to mask logits [R, 28, 28] of that class.

    Each class has a mask of its own, and each pixel a sigmoid, not a softmax over the classes: what
    the object is, the classifier has decided already (Mask R-CNN, Table 2b).
    """

    def __init__(self, config, channels, norm):
        super().__init__()
        convs = (config.mask_head_convs, channels, config.mask_head_channels, norm)
        self.convs, channels = conv_stack(*convs)
        self.deconv = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.predictor = nn.Conv2d(channels, config.num_classes, 1)

    def forward(self, x, labels):
        x = self.convs(x)  # [R, 256, 14, 14]
        x = self.deconv(x).relu_()  # [R, 256, 28, 28]
        # This is self.predictor(x)[range(R), labels - 1] without computing the other K - 1 maps:
        # each RoI is multiplied by that row of the 1x1 convolution that belongs to its class.
        row = labels - 1
        weight, bias = self.predictor.weight.flatten(1)[row], self.predictor.bias[row]  # [R, 256]
        logits = torch.matmul(weight[:, None].to(x.dtype), x.flatten(2)).float()  # [R, 1, 28 * 28]
        return (logits + bias[:, None, None]).view(len(x), *x.shape[-2:])


class KeypointHead(nn.Module):
    """Pooled RoIs [R, C, 14, 14] to heatmap logits [R, 17, 56, 56] (Mask R-CNN, Sec. 5)."""

    def __init__(self, config, channels):
        super().__init__()
        convs = (config.keypoint_head_convs, channels, config.keypoint_head_channels, "none")
        self.convs, channels = conv_stack(*convs)
        self.deconv = nn.ConvTranspose2d(channels, config.keypoints, 4, stride=2, padding=1)

    def forward(self, x):
        x = self.convs(x)  # [R, 512, 14, 14]
        x = self.deconv(x).float()  # [R, 17, 28, 28]
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def mask_targets(targets, rois, matched, image_counts, size):
    """The part of each object's mask inside its RoI, at size x size: float 0/1 [R, size, size].

    RoIAlign of the matched object's bit mask, then a threshold, as Detectron2's
    BitMasks.crop_and_resize (Choice 10: Detectron draws polygons, of the object whose polygons' box
    overlaps most). rois [R, 5] in order of images, matched [R] within the image.
    """
    boxes = torch.cat([matched[:, None].to(rois.dtype), rois[:, 1:]], dim=1)
    crops = []
    for target, here in zip(targets, boxes.split(image_counts)):
        masks = target["masks"][:, None].float()
        crops.append(roi_align(masks, here, size, 1.0, 0, aligned=True))
    return (torch.cat(crops)[:, 0] >= 0.5).float()


def keypoint_targets(keypoints, boxes, size):
    """Heatmap cell of every keypoint: cell [R, 17] in 0..size^2 - 1, and valid [R, 17] bool.

    keypoints [R, 17, 3] (x, y, v), boxes [R, 4]. The cell is the floor of the position scaled to
    the box; the right and the bottom edge belong to the last cell (Detectron). Valid: labelled
    (v > 0) and inside the box.
    """
    xy = keypoints[..., :2]
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    cell = ((xy - low) * (size / (high - low))).floor()
    cell = torch.where(xy == high, size - 1, cell)
    valid = ((cell >= 0) & (cell < size)).all(dim=-1) & (keypoints[..., 2] > 0)
    cell = torch.where(valid[..., None], cell, 0).long()
    return cell[..., 1] * size + cell[..., 0], valid


def decode_keypoints(heatmaps, boxes):
    """Heatmaps [N, 17, 56, 56] (logits) of boxes [N, 4] to keypoints [N, 17, 3] and scores [N, 17].

    Detectron's rule: resize the map to the box's size in whole pixels (bicubic), take the largest
    value, return the middle of its pixel, scaled back; third column 1. The score is the value's
    softmax, normalized over the 56 x 56 map. Every box has a size of its own: one after the other.
    """
    points = heatmaps.new_ones(*heatmaps.shape[:2], 3)
    scores = heatmaps.new_zeros(heatmaps.shape[:2])
    sizes = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    for i, (w, h) in enumerate(sizes.ceil().long().tolist()):
        maps = F.interpolate(heatmaps[i, None], size=(h, w), mode="bicubic", align_corners=False)[0]
        value, index = maps.flatten(1).max(dim=1)  # [17]
        pixel = torch.stack([index % w, index // w], dim=1) + 0.5
        points[i, :, :2] = boxes[i, :2] + pixel * sizes[i] / pixel.new_tensor([w, h])
        scores[i] = 1 / (heatmaps[i].flatten(1) - value[:, None]).exp().sum(dim=1)
    return points, scores


# -- Mask R-CNN ------------------------------------------------------------------------------------


class MaskRCNN(nn.Module):
    """The detector; made by `build_model`. `config`: its Config.

    The steps that `forward` is made of can be used alone: `batch`, `features`, `proposals`,
    `box_predictions`, `postprocess`, `mask_probabilities`, `keypoint_heatmaps`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        # Sizes to test at, and classes; set by training and by loading a checkpoint.
        self.data_settings = {"min_size": 800, "max_size": 1333}
        self.data_settings |= {"classes": None, "category_ids": None}
        for name, value in (("image_mean", config.image_mean), ("image_std", config.image_std)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32).view(3, 1, 1))

        # A frozen-BN detector has its affine maps in the backbone only, as in Detectron.
        head_norm = "none" if config.norm == "frozen_bn" else config.norm
        if config.backbone == "vgg16":
            self.backbone, self.fpn = VGG16(config), None
            channels, strides = self.backbone.channels[0], self.backbone.strides
        else:
            self.backbone = ResNet(config)
            self.fpn = FPN(self.backbone.channels, config.fpn_channels, head_norm)
            channels, strides = config.fpn_channels, self.backbone.strides + [64]
        self.rpn = RPN(config, channels, strides)
        stages = 3 if config.cascade else 1
        self.box_heads = nn.ModuleList(BoxHead(config, channels, head_norm) for _ in range(stages))
        self.mask_head = MaskHead(config, channels, head_norm) if config.masks else None
        self.keypoint_head = KeypointHead(config, channels) if config.keypoints else None
        initialize(self)

    def forward(self, images, targets=None):
        """Losses in training mode, detections in evaluation mode.

        images: list of [3, h, w] RGB tensors, uint8 or float in [0, 1], of any sizes.
        targets (training): list of dicts with `boxes` [N, 4] float xyxy, `labels` [N] int64 in
        1..K, `masks` [N, h, w] bool or uint8 (if the model has masks), `keypoints` [N, 17, 3]
        (x, y, v; if it has keypoints), and optionally `seed` (int), of which the random sampling is
        then a function.

        Training returns loss_objectness, loss_rpn_box_reg, loss_classifier, loss_box_reg,
        loss_mask, loss_keypoint (cascade: loss_classifier_1..3, loss_box_reg_1..3). Evaluation
        returns for each image a dict of `boxes`, `labels`, `scores`, `masks` [N, 28, 28]
        (probabilities inside the box), `keypoints` [N, 17, 3] (x, y, 1) and `keypoints_scores`
        [N, 17], in pixels of the given image. Raises ValueError, naming image and field, for
        arguments that do not fit.
        """
        check_images(images)
        if self.training:
            check_targets(images, targets, self.config)
        batch, sizes = self.batch(images)
        features = self.features(batch)
        if self.training:
            return self.losses(features, sizes, targets)

        boxes, valid = self.proposals(features, sizes)
        predictions = self.box_predictions(features, boxes, valid, sizes)
        detections = [self.postprocess(*prediction) for prediction in predictions]
        boxes = [d["boxes"] for d in detections]
        if self.mask_head:
            labels = [d["labels"] for d in detections]
            for d, masks in zip(detections, self.mask_probabilities(features, boxes, labels)):
                d["masks"] = masks
        if self.keypoint_head:
            for d, heatmaps in zip(detections, self.keypoint_heatmaps(features, boxes)):
                d["keypoints"], d["keypoints_scores"] = decode_keypoints(heatmaps, d["boxes"])
        return detections

    # -- The steps -------------------------------------------------------------------------------

    def batch(self, images):
        """Normalize and pad: a list of [3, h, w] to [B, 3, H, W] and the sizes [(h, w), ...].

        Padding is zero *after* normalization, on the right and at the bottom, to a multiple of 32.
        That is why the mean cannot be folded into a bias of conv1: conv(x - mean) is conv(x) -
        conv(mean) only where the window does not reach into padding, this one or conv1's own.
        """
        sizes = [tuple(image.shape[-2:]) for image in images]
        height, width = (math.ceil(max(side) / 32) * 32 for side in zip(*sizes))
        batch = self.image_mean.new_zeros(len(images), 3, height, width)
        of_float = self.image_mean, self.image_std
        of_uint8 = self.image_mean * 255.0, self.image_std * 255.0
        for padded, image, (h, w) in zip(batch, images, sizes):
            mean, std = of_float if image.is_floating_point() else of_uint8
            torch.sub(image, mean, out=padded[:, :h, :w]).div_(std)
        return batch, sizes

    def features(self, batch):
        """Feature levels [B, C, h, w] of a batch [B, 3, H, W]: P2..P6, or VGG's one level."""
        levels = self.backbone(batch)
        return self.fpn(levels) if self.fpn else levels

    def proposals(self, features, sizes):
        """The RPN's proposals: boxes [B, P, 4], best first, and which are valid [B, P]."""
        return self.rpn.proposals(*self.rpn(features), sizes)

    def pool(self, features, rois, size, levels=None, counts=None):
        """RoIAlign of rois [R, 5], each from one of P2..P5: see `multilevel_roi_align`."""
        strides, ratio = self.backbone.strides, self.config.roi_sampling_ratio
        used = features[: len(strides)]  # P6 is the RPN's alone
        return multilevel_roi_align(used, strides, rois, size, ratio, levels, counts)

    def refine(self, rois, deltas, stage, sizes):
        """The boxes [R, K or 1, 4] that a stage's deltas [R, K or 1, 4] make of rois, clipped."""
        limits = image_limits(sizes, rois.device)[rois[:, 0].long()]  # [R, 1, 4]
        decoded = decode_boxes(deltas / self.box_weights(stage), rois[:, None, 1:])
        return torch.minimum(decoded.clamp(min=0), limits)

    def box_weights(self, stage):
        """(10, 10, 5, 5), in stages 2 and 3 of a cascade 2 and 3 times as large.

        A later stage's RoIs are closer to the objects: the spread of its targets is smaller.
        (Growing a cascade out of stage 1 has to make up for it: Choice 13, in train.py.) `stage`
        counts from 0, the names of losses from 1, as in the paper.
        """
        weights = torch.tensor([w * (stage + 1) for w in self.config.bbox_reg_weights])
        return weights.to(self.image_mean.device, non_blocking=True)

    def box_predictions(self, features, boxes, valid, sizes):
        """Class scores and boxes of proposals, *before* threshold and NMS.

        boxes [B, P, 4] and valid [B, P] as `proposals` gives them. Returns for each image a pair:
        scores [P, K + 1] (softmax; column 0 is background; all 0 for what is not valid) and clipped
        boxes [P, K, 4] ([P, 1, 4] if class-agnostic).

        Cascade: each stage refines the boxes of the one before. The scores are averaged: each stage
        has learned at another IoU to tell objects from background.
        """
        rois = to_rois(boxes)  # [B * P, 5]
        scores = 0
        for stage, head in enumerate(self.box_heads):
            logits, deltas = head(self.pool(features, rois, self.config.box_roi_size))
            scores = scores + logits.softmax(dim=1) / len(self.box_heads)  # [B * P, K + 1]
            decoded = self.refine(rois, deltas, stage, sizes)  # [B * P, K or 1, 4]
            if stage + 1 < len(self.box_heads):  # a cascade has one box for all classes
                rois = torch.cat([rois[:, :1], decoded[:, 0]], dim=1)
        scores = scores * valid.flatten()[:, None]
        return list(zip(scores.split(boxes.shape[1]), decoded.split(boxes.shape[1])))

    @torch.no_grad()
    def postprocess(self, scores, boxes):
        """Detections of one image: score threshold, NMS of each class, the best 100.

        scores [P, K + 1], boxes [P, K or 1, 4], as from `box_predictions`. Returns a dict of boxes
        [N, 4], labels [N] and scores [N], best first.
        """
        c = self.config
        scores = scores[:, 1:]  # [P, K]
        boxes = boxes.expand(-1, scores.shape[1], -1).flatten(0, 1)[None]  # [1, P * K, 4]
        labels = torch.arange(1, scores.shape[1] + 1, device=scores.device)
        labels = labels.expand_as(scores).flatten()[None]
        scores = scores.masked_fill(scores <= c.box_score_thresh, -math.inf).flatten()[None]
        most = c.box_detections_per_img
        index, _, (count,) = nms(boxes, scores, labels, c.box_nms_thresh, most)
        found = {"boxes": boxes, "labels": labels, "scores": scores}
        return {name: take(value, index[:, :count])[0] for name, value in found.items()}

    def mask_probabilities(self, features, boxes, labels):
        """Masks of given boxes and labels (lists of [N, 4], [N]): a list of [N, 28, 28] in 0..1."""
        pooled = self.pool(features, to_rois(boxes), self.config.mask_roi_size)
        masks = self.mask_head(pooled, torch.cat(labels)).sigmoid()
        return list(masks.split([len(b) for b in boxes]))

    def keypoint_heatmaps(self, features, boxes):
        """Keypoint logits of given boxes (list of [N, 4]): a list of [N, 17, 56, 56]."""
        pooled = self.pool(features, to_rois(boxes), self.config.keypoint_roi_size)
        return list(self.keypoint_head(pooled).split([len(b) for b in boxes]))

    # -- Training --------------------------------------------------------------------------------

    def losses(self, features, sizes, targets):
        """All losses of a batch, as a dict of scalars; all have weight 1.

                                divided by                             first, from random weights
            loss_objectness     256 * images, even if fewer are drawn  ln 2 = 0.69
            loss_rpn_box_reg    256 * images                           small
            loss_classifier     all sampled RoIs                       ln 81 = 4.39 (80 classes)
            loss_box_reg        all sampled RoIs                       small (little foreground)
            loss_mask           foreground RoIs * 28^2                 above ln 2: 0.7 to 0.8
            loss_keypoint       labelled keypoints inside their RoIs   ln 56^2 = 8.05

        These numbers are counted in this process's own batch. DDP then averages the gradients over
        the processes: a sample counts for less in a process that has many, as in Detectron. To
        divide by sums over all processes would be another loss.
        """
        device = features[0].device
        truth = pad_targets(targets, device)
        anchor_seeds, roi_seeds = sampling_seeds(targets, device)
        # 1) RPN
        objectness, deltas, anchors = self.rpn(features)
        losses = self.rpn.losses(objectness, deltas, anchors, truth, anchor_seeds)
        # 2) RoIs: proposals and ground truth, sampled
        boxes, valid = self.rpn.proposals(objectness, deltas, anchors, sizes)
        samples, foreground = self.sample_rois(boxes, valid, truth, roi_seeds)
        # 3) heads. RoIAlign needs float32 in the usual memory format: converted once, for all heads
        features = [level.float().contiguous() for level in features]
        losses |= self.box_losses(features, samples, truth, sizes)
        if self.mask_head:
            losses |= self.mask_loss(features, foreground, targets)
        if self.keypoint_head:
            losses |= self.keypoint_loss(features, foreground, targets)
        return losses

    @torch.no_grad()
    def sample_rois(self, boxes, valid, truth, seeds):
        """512 RoIs an image, at most a quarter of them foreground: Samples, and the foreground's.

        Foreground: IoU >= 0.5 with an object. The ground truth joins the proposals, so that there
        is foreground from the first iteration. (Choice 10: crowds are no foreground.)
        """
        c, strides = self.config, self.backbone.strides
        # 1) candidates, and the object that each overlaps most
        boxes = torch.cat([boxes, truth.boxes], dim=1)  # [B, P + G, 4]
        valid = torch.cat([valid, has_area(truth.boxes)], dim=1)
        matched, labels = match_boxes(truth, boxes, c.box_fg_iou_thresh)
        labels = labels.masked_fill(~valid, -1)
        # 2) the sampled ones, in slots
        batch_size, fraction = c.box_batch_size_per_image, c.box_positive_fraction
        index, sampled = sample(labels, batch_size, fraction, seeds)  # [B, S]
        boxes, labels, matched = (take(x, index) for x in (boxes, labels, matched))
        foreground = sampled & (labels > 0)
        # 3) as RoIs [R, 5] of the whole batch
        image = torch.arange(len(boxes), device=boxes.device)[:, None, None].expand(*index.shape, 1)
        rois = torch.cat([image, boxes], dim=2)  # [B, S, 5]
        levels = roi_levels(boxes, strides)
        slots = rois, labels, matched, levels
        picked = torch.stack([sampled, foreground])
        # The host has to wait for these counts, so the targets are checked here, too.
        counts = count_and_check(picked, levels, len(strides), truth, c.num_classes)
        return [select_samples(slots, which, *count) for which, count in zip(picked, counts)]

    def box_losses(self, features, samples, truth, sizes):
        """Classification and box losses of every stage, for the sampled RoIs.

        Stages 2 and 3 of a cascade take the boxes that the previous stage made of the same RoIs,
        with IoU thresholds of 0.6 and 0.7 instead of 0.5: a head that is trained at an IoU improves
        boxes near that IoU most. RoIs are not sampled again, ground truth is not added again.
        """
        c, stages = self.config, len(self.box_heads)
        losses = {}
        for stage, head in enumerate(self.box_heads):
            rois, labels = samples.rois, samples.labels
            pooled = self.pool(features, rois, c.box_roi_size, *samples.levels)  # [R, 256, 7, 7]
            if stages > 1 and pooled.requires_grad:  # the stages share the features (Detectron2)
                pooled.register_hook(lambda grad: grad * (1 / stages))
            logits, deltas = head(pooled)  # [R, K + 1], [R, K or 1, 4]
            is_object = labels > 0
            # Background gets its own box as target: a finite error, which the loss leaves out.
            box_truth = truth.boxes[rois[:, 0].long(), samples.matched]  # [R, 4]
            box_truth = torch.where(is_object[:, None], box_truth, rois[:, 1:])
            box_targets = encode_boxes(box_truth, rois[:, 1:]) * self.box_weights(stage)
            column = (labels - 1).clamp(min=0) if deltas.shape[1] > 1 else torch.zeros_like(labels)
            deltas_of_class = take(deltas, column[:, None])[:, 0]  # [R, 4]
            beta = c.box_smooth_l1_beta
            box_loss = F.smooth_l1_loss(deltas_of_class, box_targets, reduction="none", beta=beta)
            class_loss = F.cross_entropy(logits, labels, reduction="sum")
            count = max(len(labels), 1)  # *all* sampled RoIs: each counts the same (Fast R-CNN)
            name = f"_{stage + 1}" if stages > 1 else ""
            losses["loss_classifier" + name] = class_loss / count
            losses["loss_box_reg" + name] = (box_loss * is_object[:, None]).sum() / count
            if stage + 1 < stages:
                samples = self.next_samples(rois, deltas, stage, truth, sizes)
        return losses

    @torch.no_grad()
    def next_samples(self, rois, deltas, stage, truth, sizes):
        """What a cascade's stage hands to the next: its boxes, matched anew; empty ones dropped."""
        boxes = self.refine(rois, deltas, stage, sizes)[:, 0]  # [R, 4]
        rois = torch.cat([rois[:, :1], boxes], dim=1)[has_area(boxes)]  # [R', 5]
        # Every RoI as an "image" of one box, against the objects of its own image.
        own_truth = Truth(*(x[rois[:, 0].long()] for x in truth))
        threshold = self.config.cascade_fg_iou_thresh[stage]
        matched, labels = match_boxes(own_truth, rois[:, None, 1:], threshold)  # [R', 1] each
        return Samples(rois, labels[:, 0], matched[:, 0])

    def mask_loss(self, features, foreground, targets):
        """Binary cross-entropy of the true class's mask, at each of 28 x 28 pixels."""
        rois, size = foreground.rois, self.config.mask_roi_size
        matched, counts = foreground.matched, foreground.image_counts
        masks = mask_targets(targets, rois, matched, counts, 2 * size)  # [R, 28, 28]
        pooled = self.pool(features, rois, size, *foreground.levels)  # [R, 256, 14, 14]
        logits = self.mask_head(pooled, foreground.labels)  # [R, 28, 28]
        # Without foreground the sum is 0 but still depends on every parameter of the head, so that
        # the process takes part in all-reduces of SyncBN and of the gradients (all heads do this).
        loss = F.binary_cross_entropy_with_logits(logits, masks, reduction="sum")
        return {"loss_mask": loss / max(logits.numel(), 1)}  # / (foreground RoIs * 28^2)

    def keypoint_loss(self, features, foreground, targets):
        """Cross-entropy of each keypoint, a softmax over the 56 x 56 positions.

        The RoIs are the sampled foreground with a labelled keypoint inside (Choice 10: Detectron
        draws up to 128 such RoIs anew).
        """
        rois, size = foreground.rois, self.config.keypoint_roi_size
        matched = foreground.matched.split(foreground.image_counts)
        points = torch.cat([t["keypoints"][index] for t, index in zip(targets, matched)]).float()
        cell, valid = keypoint_targets(points, rois[:, 1:], 4 * size)  # [R, 17]
        useful = valid.any(dim=1)
        cell, valid = cell[useful].flatten(), valid[useful].flatten()
        heatmaps = self.keypoint_head(self.pool(features, rois[useful], size))  # [R', 17, 56, 56]
        loss = F.cross_entropy(heatmaps.flatten(0, 1).flatten(1), cell, reduction="none")
        # / labelled keypoints inside their RoIs
        return {"loss_keypoint": (loss * valid).sum() / valid.sum().clamp(min=1)}


def count_and_check(picked, levels, num_levels, truth, num_classes):
    """How many picked RoIs are on each level, and in each image: two lists for both of [2, B, S].

    The host waits for the device here, once. So this is also where targets with impossible values
    are found: ValueError, naming image and field.
    """
    on_level = levels == torch.arange(num_levels, device=levels.device)[:, None, None]  # [L, B, S]
    level_counts = (picked[:, None] & on_level).sum(dim=(2, 3))  # [2, L]
    image_counts = picked.sum(dim=2)  # [2, B]
    size = truth.boxes[..., 2:] - truth.boxes[..., :2]  # [B, G, 2]; inf - inf is not a number
    wrong_boxes = (size != size.clamp(0, 1e6)).flatten(1).any(dim=1)  # [B]
    wrong_labels = (truth.labels != truth.labels.clamp(1, num_classes)).any(dim=1)
    wrong_boxes, wrong_labels, levels_1, levels_2, images_1, images_2 = to_lists(
        wrong_boxes, wrong_labels, *level_counts, *image_counts
    )
    for i, (boxes, labels) in enumerate(zip(wrong_boxes, wrong_labels)):
        require(not boxes, f"targets[{i}]['boxes'] must be finite, with x1 <= x2 and y1 <= y2.")
        require(not labels, f"targets[{i}]['labels'] must be in 1..{num_classes}.")
    return (levels_1, images_1), (levels_2, images_2)


def select_samples(slots, picked, level_counts, image_counts):
    """The picked [B, S] of the slots (rois, labels, matched, levels: [B, S, ...]) as Samples."""
    # picked.nonzero() would wait for the device again: the True are sorted to the front instead.
    index = picked.flatten().argsort(descending=True, stable=True)[: sum(image_counts)]
    *parts, levels = (slot.flatten(0, 1).index_select(0, index) for slot in slots)
    return Samples(*parts, (levels, level_counts), image_counts)


def check_images(images):
    """ValueError, naming the image, unless all are [3, h, w], uint8 or float in [0, 1]."""
    is_list = isinstance(images, (list, tuple)) and len(images) > 0
    require(is_list, "images must be a list of at least one [3, h, w] tensor.")
    for i, image in enumerate(images):
        is_image = torch.is_tensor(image) and image.dim() == 3 and len(image) == 3
        require(is_image and image.numel() > 0, f"images[{i}] must be a [3, h, w] tensor, RGB.")
        is_float = image.is_floating_point()
        in_range = is_float or image.dtype == torch.uint8
        if is_float and image.device.type == "cpu":  # (a GPU would have to be waited for)
            low, high = image.aminmax()
            in_range = low >= -0.2 and high <= 1.2  # resizing may overshoot
        require(in_range, f"images[{i}] must be uint8, or float in [0, 1] and not normalized.")


def check_targets(images, targets, config):
    """ValueError, naming image and field, for targets of wrong form (values: `count_and_check`)."""
    is_list = isinstance(targets, (list, tuple)) and len(targets) == len(images)
    require(is_list, f"targets must be a list of {len(images)} dicts, one for each image.")
    for i, (image, target) in enumerate(zip(images, targets)):
        fields = {"boxes": (4,), "labels": ()}
        fields |= {"masks": tuple(image.shape[1:])} if config.masks else {}
        fields |= {"keypoints": (config.keypoints, 3)} if config.keypoints else {}
        for name, shape in fields.items():
            where = f"targets[{i}][{name!r}]"
            require(torch.is_tensor(target.get(name)), f"{where} is missing, or is no tensor.")
            found, shape = tuple(target[name].shape), (*target["boxes"].shape[:1], *shape)
            require(found == shape, f"{where} must be {shape} for these boxes, and is {found}.")
        require(target["boxes"].is_floating_point(), f"targets[{i}]['boxes'] must be float.")
        require(target["labels"].dtype == torch.int64, f"targets[{i}]['labels'] must be int64.")


def build_model(backbone="resnet50", norm="gn", num_classes=80, **settings):
    """A MaskRCNN with random weights; any field of Config can be given as an argument.

    What backbone (BACKBONES), norm and cascade imply, `settings` can override. Raises ValueError
    for an unknown name, and for a value or a combination that cannot be.
    """
    fields = {field.name for field in dataclasses.fields(Config)}
    for name in settings:
        require(name in fields, f"Unknown argument {name!r} of build_model; see model.Config.")
    implied = {"backbone": backbone, "norm": norm, "num_classes": num_classes}
    if norm in ("frozen_bn", "none"):
        implied |= {"box_head_convs": 0, "box_head_fcs": 2}
    if settings.get("cascade"):
        implied |= {"box_class_agnostic": True}
    return MaskRCNN(Config(**implied | BACKBONES.get(backbone, {}) | settings))


# -- Initialization --------------------------------------------------------------------------------


def initialize(model):
    """Random weights (Choice 3): convolutions He et al.'s, FPN and fc layers Caffe2's Xavier.

    That is Detectron2's (Detectron's own backbone had Xavier). The layers that predict start near
    zero, all but the masks'. Every gamma starts at 1 (zero for the last one of a block, usual in
    ImageNet training, hurts GN detectors from scratch, notes Detectron2), every bias and beta at 0.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            # N(0, 2 / fan_out). (A deconvolution's weight is [in, out, k, k]: its "fan_out" is that
            # of the inputs, in Detectron2 as well.)
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=1)  # U(+-sqrt(3 / fan_in))
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    for module in model.fpn.modules() if model.fpn else ():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=1)
    for layer in (model.rpn.conv, model.rpn.objectness, model.rpn.deltas):
        nn.init.normal_(layer.weight, std=0.01)
    for head in model.box_heads:
        nn.init.normal_(head.classifier.weight, std=0.01)
        nn.init.normal_(head.regressor.weight, std=0.001)


# -- Checkpoints -----------------------------------------------------------------------------------


class WeightsError(ValueError):
    """A checkpoint that cannot be used; the message is one sentence that names the file."""


@contextlib.contextmanager
def write_whole(path):
    """A binary file to write, which appears at `path` whole or not at all, even after a kill.

    It is written beside it under a name of this process's own, synced, renamed, and the folder
    synced. Raises OSError with the path.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # (torch.save turns the OSError of a full disk into a RuntimeError.)
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from None
        raise


def save_model(model, path, **more):
    """Write a checkpoint: config, data settings, weights, and `more` (plain data and tensors)."""
    content = {"config": dataclasses.asdict(model.config), "data": model.data_settings}
    with write_whole(path) as file:
        torch.save(content | {"weights": model.state_dict()} | more, file)


def check_archive(file):
    """ValueError for a file in torch's format (a zip) whose pickle would take boundless work."""
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename} in it is compressed")
            if entry.filename.endswith(".pkl"):
                check_pickle(archive.open(entry))


def check_pickle(file):
    """Refuse a pickle whose objects cost far more to visit than to write; moves `file` on.

    With t1 = (t0, t0), t2 = (t1, t1), ... four bytes double the work of hashing the last tuple, and
    deep nesting overflows C's stack. So the opcodes are first run on the objects' numbers of
    elements instead of the objects, a tuple's largest element counted twice.
    """
    mark, memo, stack = 0, {}, []
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name.endswith("PUT") or opcode.name == "MEMOIZE":
            size = len(memo) if argument is None else argument  # C has an array as long
            memo[size] = stack[-1]
        elif opcode.name.endswith("GET"):
            size = memo[argument]
            stack.append(size)
        else:
            taken = []
            for kind in reversed(opcode.stack_before):
                while kind is pickletools.stackslice and stack[-1] != mark:
                    taken.append(stack.pop())
                if kind is not pickletools.stackslice:
                    taken.append(stack.pop())
            size = 1 + sum(taken) + max(taken, default=0) * opcode.name.startswith("TUPLE")
            stack += [mark if k is pickletools.markobject else size for k in opcode.stack_after]
        if size > 10_000_000:
            raise ValueError("its objects hold one another without measure")


def read_checkpoint(path):
    """The dict in a file of `save_model`, on the CPU. Nothing in the file is executed.

    Raises WeightsError if there is no such file, if it is damaged, or if it is none of ours, and
    OSError if the disk fails or memory is short.
    """
    try:
        with open(path, "rb") as file:
            is_zip = file.read(2) == b"PK"
        content = {}
        if is_zip:
            check_archive(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError):
        raise WeightsError(f"There is no file {path}.") from None
    except Exception as error:  # whatever a truncated, foreign or malicious file brings about
        # A healthy file must not be called damaged because the disk fails or memory is short.
        code = getattr(error, "errno", None)
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            code = ENOMEM
        if code not in (None, EINVAL):  # EINVAL: a damaged zip points to before its beginning
            raise OSError(code, os.strerror(code), str(path)) from None
        raise WeightsError(
            f"{path} is damaged or incomplete, or holds more than plain data and tensors: use the "
            "checkpoint before it, or copy the file again."
        ) from None
    content = content if isinstance(content, dict) else {}
    parts = [content.get(name) for name in ("config", "data", "weights")]
    if not all(isinstance(part, dict) for part in parts):
        hint = f"convert another project's weights with tools/convert_weights.py {path} OUT"
        if any(str(name).startswith(("backbone.res2.", "backbone.conv1.")) for name in content):
            hint = "it is a bare state dict; write config and classes too, with model.save_model"
        raise WeightsError(f"{path} is no checkpoint of this project: {hint}.")
    for name, tensor in parts[2].items():
        right = type(name) is str and torch.is_tensor(tensor) and tensor.layout == torch.strided
        # (With a stride of 0 a tensor can claim any shape.)
        if not right or tensor.untyped_storage().nbytes() < tensor.nbytes:
            raise WeightsError(f"{path} is no checkpoint of this project: its weights are damaged.")
    return content


def load_model(path):
    """The model of a checkpoint, on the CPU and in evaluation mode. Raises WeightsError.

    The config in the file is not trusted: the model gets memory only if the file has all of it.
    """
    content = read_checkpoint(path)
    weights = content["weights"]
    try:
        with torch.device("meta"):  # no memory
            model = MaskRCNN(Config(**content["config"]))
    except (TypeError, ValueError) as error:
        reason = str(error)[:200].rstrip(".")
        raise WeightsError(f"{path} describes a model that cannot be built: {reason}.") from None
    for name, tensor in model.state_dict().items():
        if name not in weights or weights[name].shape != tensor.shape:
            what = f"{name} of shape {list(tensor.shape)}"
            raise WeightsError(f"{path} has no {what}: it is incomplete, or of another model.")
    model.to_empty(device="cpu").load_state_dict(weights, strict=False)
    model.data_settings |= content["data"]
    return model.eval()


def load_weights(model, path, verbose=True):
    """Fill a model from a checkpoint, as far as tensors of the same name have the same shape.

    The backbone must fit. The rest need not: the file may hold a backbone alone, or a detector of
    other classes; what does not fit stays as it is, and is named. The image statistics that belong
    to the weights are set too. Raises WeightsError, and leaves the model unchanged then.
    """
    content, own = read_checkpoint(path), model.state_dict()
    weights = content["weights"]
    fitting = {n: t for n, t in weights.items() if n in own and t.shape == own[n].shape}
    left = [name for name in own if name not in fitting]
    unused = [name for name in weights if name not in own]
    check_backbone(path, content, model, left + unused)
    said = [f"{len(fitting)} tensors loaded"]
    for what, names in (("left as they were", left), ("not used", unused)):
        modules = dict.fromkeys(name.rpartition(".")[0] for name in names)
        said += [f"{what}: {', '.join(modules)}"] if names else []
    statistics = {}
    for name in ("image_mean", "image_std"):
        old, new = (tensors[name].flatten().tolist() for tensors in (own, own | fitting))
        if new != old:
            statistics[name] = tuple(new)
            said.append(f"{name} of the file: {', '.join(f'{v:.4f}' for v in new)}")
    try:
        model.config = dataclasses.replace(model.config, **statistics)
    except ValueError as error:
        raise WeightsError(f"The weights in {path} cannot be used: {error}") from None
    model.load_state_dict(fitting, strict=False)
    if verbose:
        print(f"Weights   {path}: {'; '.join(said)}")


def check_backbone(path, content, model, misfits):
    """WeightsError if the backbone of a checkpoint is another; misfits: names of misfit tensors."""
    theirs, ours = content["config"], model.config
    misfits = [n for n in misfits if n.startswith("backbone.") and "num_batches" not in n]
    convolutions = [name for name in misfits if name.endswith("conv.weight")]
    # A norm shows in the names of its tensors, but "frozen_bn" has those of "bn". The statistics of
    # MSRA's files are folded into their weights: a norm that is trained cannot go on from them,
    # unless the whole backbone, 5 stages, is frozen.
    norm = str(theirs.get("norm", ours.norm))[:20]
    folded = norm == "frozen_bn" and ours.norm != "frozen_bn" and ours.freeze_at < 5
    other = None
    if theirs.get("stride_in_1x1", ours.stride_in_1x1) != ours.stride_in_1x1:
        other = "stride_in_1x1 than this model's"
    elif folded or (misfits and norm != ours.norm and not convolutions):
        other = f"norm than this model's: {norm} there and {ours.norm} here"
    elif misfits:
        name = (convolutions + misfits)[0]
        tensors = (content["weights"].get(name), model.state_dict().get(name))
        there, here = ("missing" if t is None else list(t.shape) for t in tensors)
        other = f"shape than this model's: {name} is {there} there and {here} here"
    if other:
        raise WeightsError(f"{path} has a backbone of another {other}.")
