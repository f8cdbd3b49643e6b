"""Mask R-CNN with FPN, made to be trained from random weights.

He, Girshick, Dollar, "Rethinking ImageNet Pre-training" (arXiv 1811.08883), Sec. 4 "Architecture".
The file follows an image through the detector:

  Config -> boxes, matching, sampling -> backbone -> FPN -> RPN -> RoI heads -> MaskRCNN
  -> initialization -> files of weights

Conventions are torchvision's. Boxes are [x1, y1, x2, y2] in continuous pixel coordinates: a pixel
is a unit square, the whole image is [0, 0, width, height], and nothing ever adds 1. Label 0 is
background, 1..K are the classes. In shape comments, B: images of the batch, A: anchors of an image,
G: ground-truth objects of an image, P: proposals of an image, S: samples of an image, R: RoIs of
all images together, C: channels, K: classes, N: any number. Where the paper is silent and its code
bases differ, a comment says what is done here; docs/paper-map.md has the list.
"""

import dataclasses
import io
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import ops

from norms import NORMS


def require(condition, message):
    if not condition:
        raise ValueError(message)


# -- Every number of the detector ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Every number of the detector. Defaults: the paper's R50-FPN with GN, as Detectron has it.

    It is made by `build_model` (below), which adds what the names of backbone and norm imply.
    """

    backbone: str = "resnet50"  # a name in BACKBONES
    norm: str = "gn"  # "gn", "syncbn", "bn", "frozen_bn", "none" (norms.py)
    num_classes: int = 80  # without background
    masks: bool = True
    keypoints: int = 0  # how many an object has; COCO's person: 17
    cascade: bool = False  # three box stages (Sec. 5.1 "Enhanced baselines")
    # Of RGB images in [0, 1]: Detectron's pixel mean; dividing by 1/255 makes it 0..255 again.
    image_mean: tuple = (122.7717 / 255, 115.9465 / 255, 102.9801 / 255)
    image_std: tuple = (1 / 255, 1 / 255, 1 / 255)

    # Backbone and FPN
    blocks: tuple = (3, 4, 6, 3)  # bottlenecks in res2..res5
    groups: int = 1  # ResNeXt: cardinality
    width_per_group: int = 64  # channels of a group in res2; they double from stage to stage
    stem_width: int = 64  # channels of the stem; res2 has 4 times as many, res3 8 times, ...
    stride_in_1x1: bool = False  # MSRA's weights and many of Detectron2's have it there
    freeze_at: int = 0  # number of frozen stages; 2 (stem, res2) when fine-tuning
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
    rpn_smooth_l1_beta: float = 1 / 9  # both betas are Detectron's; Detectron2 has 0

    # RoI heads
    roi_sampling_ratio: int = 2  # Detectron; 0: as many samples as pixels (Detectron2)
    box_roi_size: int = 7
    box_head_convs: int = 4  # "4conv1fc" (Sec. 4); see BoxHead
    box_head_channels: int = 256
    box_head_fcs: int = 1
    box_head_fc_channels: int = 1024
    box_class_agnostic: bool = False  # one box for all classes; a cascade needs it
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
        is_right = self.box_class_agnostic or not self.cascade
        require(is_right, "cascade needs box_class_agnostic: stages hand on one box of each RoI.")
        require(max(self.image_mean) <= 1, "image_mean is that of images in [0, 1].")


# What a name of a backbone changes. The paper's "ResNeXt-152 8x32d" has 8 groups of 32 (4.24 times
# ResNet-101's multiply-adds, its "about 4x"); Detectron's pre-trained X-152 has 32 groups of 8.
BACKBONES = {
    "resnet50": {"blocks": (3, 4, 6, 3)},
    "resnet101": {"blocks": (3, 4, 23, 3)},
    "resnext101_32x8d": {"blocks": (3, 4, 23, 3), "groups": 32, "width_per_group": 8},
    "resnext152_8x32d": {"blocks": (3, 8, 36, 3), "groups": 8, "width_per_group": 32},
    "resnext152_32x8d": {"blocks": (3, 8, 36, 3), "groups": 32, "width_per_group": 8},
    # Faster R-CNN without FPN and norm (Sec. 5.1 "Models without BN/GN"): Detectron's anchors and
    # numbers of proposals for models without FPN, and VGG's two fc layers. The images are divided
    # by their deviation. Otherwise, with no norm to rescale inputs of RMS 59, the recipe diverges
    # from random weights within five steps.
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


def build_model(backbone="resnet50", norm="gn", num_classes=80, **settings):
    """A MaskRCNN with random weights; any field of Config can be given as an argument.

    What backbone (BACKBONES), norm and cascade imply, `settings` can override.
    """
    require(backbone in BACKBONES, f"backbone must be one of {', '.join(BACKBONES)}.")
    implied = {"backbone": backbone, "norm": norm, "num_classes": num_classes}
    if norm in ("frozen_bn", "none"):
        implied |= {"box_head_convs": 0, "box_head_fcs": 2}
    if settings.get("cascade"):
        implied |= {"box_class_agnostic": True}
    return MaskRCNN(Config(**implied | BACKBONES[backbone] | settings))


# -- Boxes: overlap, coding, clipping, suppression -------------------------------------------------

# A predicted box is at most 1000/16 times as wide and as high as its anchor: exp() of a wild early
# prediction would overflow. (Detectron: BBOX_XFORM_CLIP)
MAX_LOG_SCALE = math.log(1000.0 / 16)


def has_area(boxes):  # [..., 4] -> [...] bool; False where a coordinate is not a number
    return (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)


def encode_boxes(truth, boxes):
    """Regression targets (dx, dy, dw, dh) that turn `boxes` into `truth`; all [..., 4].

    R-CNN's parametrization. With centre (x, y) and size (w, h) of a box, and * for the truth:

        dx = (x* - x) / w    dy = (y* - y) / h    dw = log(w* / w)    dh = log(h* / h)

    They do not change when the image is scaled. The box head's targets are multiplied by weights,
    1 / (their usual spread), so that all four count alike in the loss: the centre of a proposal is
    off by about 0.1 of its size, and its size by a factor of about e^0.2, hence 10, 10, 5, 5.
    """
    size = boxes[..., 2:] - boxes[..., :2]
    centre = boxes[..., :2] + 0.5 * size
    truth_size = truth[..., 2:] - truth[..., :2]
    truth_centre = truth[..., :2] + 0.5 * truth_size
    return torch.cat([(truth_centre - centre) / size, torch.log(truth_size / size)], dim=-1)


def decode_boxes(deltas, boxes):
    """The inverse of `encode_boxes`: deltas [..., 4] applied to boxes [..., 4] (broadcast).

    x* = x + dx w    y* = y + dy h    w* = w exp(dw)    h* = h exp(dh)
    """
    size = boxes[..., 2:] - boxes[..., :2]
    centre = boxes[..., :2] + 0.5 * size + deltas[..., :2] * size
    size = size * deltas[..., 2:].clamp(max=MAX_LOG_SCALE).exp()
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], dim=-1)


def nms(boxes, scores, groups, threshold, most):
    """Non-maximum suppression: indices of the up to `most` best boxes that survive it, best first.

    From best to worst, a box is kept unless its IoU with an already kept box of the same group is
    above `threshold`. boxes [N, 4], scores [N], groups [N] int64.
    """
    # float64: batched_nms adds an offset to each group's boxes, which costs float32 its digits.
    return ops.batched_nms(boxes.double(), scores.double(), groups, threshold)[:most]


# -- Matching and sampling -------------------------------------------------------------------------


class Samples(NamedTuple):
    """The RoIs of an image that a head is trained on."""

    boxes: torch.Tensor  # [S, 4]
    labels: torch.Tensor  # [S] int64; 0 is background
    matched: torch.Tensor  # [S]: index of the object that each overlaps most, or of none: G


def overlaps(truth, boxes):
    """IoU, intersection over union, of objects [G, 4] with boxes [N, 4]: [G + 1, N].

    The last row is that of an added object without area, so that there is a maximum over the
    objects even in an image that has none.
    """
    return ops.box_iou(F.pad(truth, (0, 0, 0, 1)), boxes)


def match_boxes(target, boxes, threshold):
    """Boxes [N, 4] to the object that each overlaps most: its index [N] and label [N].

    The label is 0, background, where the IoU is below the threshold.
    """
    iou, matched = overlaps(target["boxes"], boxes).max(dim=0)
    labels = F.pad(target["labels"], (0, 1))[matched]
    return matched, labels.masked_fill(iou < threshold, 0)


def sample(labels, batch_size, positive_fraction, generator):
    """Choose up to `batch_size` candidates, at most `positive_fraction` positive: index [S].

    labels: [N] int64; > 0 positive, 0 negative, < 0 never chosen. Negatives make up for missing
    positives. Both are drawn without replacement, as in Detectron2 (Detectron's negatives: with).
    """
    order = torch.randperm(len(labels), generator=generator, device=labels.device)
    positive = order[labels[order] > 0][: int(batch_size * positive_fraction)]
    negative = order[labels[order] == 0][: batch_size - len(positive)]
    return torch.cat([positive, negative])


def generator_of(target, device):
    """The random generator of an image's samples, seeded by its target["seed"] if it has one."""
    seed = target["seed"] if "seed" in target else int(torch.randint(2**62, ()))
    return torch.Generator(device).manual_seed(seed)


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
        self.norm = NORMS[norm](outputs)
        self.relu = relu

    def forward(self, x):  # [N, C, H, W] -> [N, C', H / stride, W / stride]
        x = self.norm(self.conv(x))
        return x.relu_() if self.relu else x


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with a shortcut; the stride is on the 3x3 (MSRA's weights have it on the 1x1).

    ResNeXt: `config.groups` is the cardinality, `width` the channels of all groups together.
    """

    def __init__(self, config, inputs, width, outputs, stride):
        super().__init__()
        norm = config.norm
        stride_1x1, stride_3x3 = (stride, 1) if config.stride_in_1x1 else (1, stride)
        self.shortcut = None
        if inputs != outputs or stride != 1:
            self.shortcut = ConvNorm(inputs, outputs, 1, norm, stride, relu=False)
        self.conv1 = ConvNorm(inputs, width, 1, norm, stride_1x1)
        self.conv2 = ConvNorm(width, width, 3, norm, stride_3x3, config.groups)
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
        self.strides = [4, 8, 16, 32]
        self.channels = [config.stem_width * 4 * 2**i for i in range(4)]
        self.stem = ConvNorm(3, config.stem_width, 7, config.norm, stride=2)
        inputs = config.stem_width
        for i, outputs in enumerate(self.channels):
            stage = nn.Sequential()
            width = config.groups * config.width_per_group * 2**i
            for j in range(config.blocks[i]):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(Bottleneck(config, inputs, width, outputs, stride))
                inputs = outputs
            setattr(self, f"res{i + 2}", stage)
        stages = [self.stem, self.res2, self.res3, self.res4, self.res5]
        self.freeze(stages, config.freeze_at)

    def forward(self, x):  # [B, 3, H, W]
        x = self.stem(x)  # [B, 64, H / 2, W / 2]
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)  # [B, 64, H / 4, W / 4]
        res2 = self.res2(x)  # [B, 256, H / 4, W / 4]
        res3 = self.res3(res2)  # [B, 512, H / 8, W / 8]
        res4 = self.res4(res3)  # [B, 1024, H / 16, W / 16]
        res5 = self.res5(res4)  # [B, 2048, H / 32, W / 32]
        return [res2, res3, res4, res5]


class VGG16(Backbone):
    """VGG-16 up to conv5_3 at stride 16, its only level (Sec. 5.1 "Models without BN/GN").

    From random weights all of it is trained (Detectron's stops gradients at pool2).
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


def make_anchors(shapes, strides, anchor_sizes, ratios, device):
    """Anchors of one image for each level: a list of [h * w * sizes * ratios, 4].

    shapes: (h, w) of each level; anchor_sizes: sqrt(area) in pixels of each level; ratios: h / w.
    Centred on (x * stride, y * stride), unrounded, and kept when they cross the image border
    (Detectron2). Order: row, column, size, ratio.
    """
    anchors = []
    for (h, w), stride, sizes in zip(shapes, strides, anchor_sizes, strict=True):
        wh = [(s / math.sqrt(r), s * math.sqrt(r)) for s in sizes for r in ratios]
        half = torch.tensor(wh, device=device) / 2  # [sizes * ratios, 2]
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
        self.strides = strides
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
        shapes = [level.shape[-2:] for level in features]
        c, device = self.config, features[0].device
        anchors = make_anchors(shapes, self.strides, c.anchor_sizes, c.anchor_ratios, device)
        return objectness, deltas, anchors

    @torch.no_grad()
    def proposals(self, objectness, deltas, anchors, sizes):
        """Boxes [P, 4] of each image, best first; sizes: (h, w) of the images, unpadded."""
        c = self.config
        before, after = c.rpn_pre_nms_top_n_test, c.rpn_post_nms_top_n_test
        if self.training:
            before, after = c.rpn_pre_nms_top_n_train, c.rpn_post_nms_top_n_train
        proposals = []
        for i, size in enumerate(sizes):
            # 1) the best anchors of each level, and their boxes
            boxes, scores, levels = [], [], []
            for k, logits in enumerate(objectness):
                best, index = logits[i].topk(min(before, logits.shape[1]))
                boxes.append(decode_boxes(deltas[k][i, index], anchors[k][index]))
                scores.append(best)
                levels.append(torch.full_like(index, k))
            scores, levels = torch.cat(scores), torch.cat(levels)
            # 2) clipped; one outside the image has no area left (Detectron also leaves out those
            #    with their centre outside)
            boxes = ops.clip_boxes_to_image(torch.cat(boxes), size)
            inside = has_area(boxes)
            boxes, scores, levels = boxes[inside], scores[inside], levels[inside]
            # 3) those that survive NMS, which runs within each level
            proposals.append(boxes[nms(boxes, scores, levels, c.rpn_nms_thresh, after)])
        return proposals

    def match(self, anchors, truth):
        """For anchors [A, 4]: index of the best object [A], and label [A]: 1, 0, -1 (not used).

        Positive: IoU >= 0.7 with an object, or the highest IoU that any anchor has with it. Without
        these "low-quality matches" (Faster R-CNN, Sec. 3.1.2) some objects would have no positive
        anchor. Such an anchor still regresses to the object that it overlaps most itself, which may
        be another one (Detectron, Detectron2). Negative: IoU below 0.3 with all objects.
        """
        iou = overlaps(truth, anchors)  # [G + 1, A]
        best, matched = iou.max(dim=0)
        labels = torch.full_like(matched, -1)
        labels[best < self.config.rpn_bg_iou_thresh] = 0
        labels[best >= self.config.rpn_fg_iou_thresh] = 1
        highest = iou.max(dim=1, keepdim=True).values.clamp(min=1e-6)  # [G + 1, 1]; never IoU 0
        labels[(iou >= highest).any(dim=0)] = 1
        return matched, labels

    def losses(self, objectness, deltas, anchors, targets, generators):
        """loss_objectness and loss_rpn_box_reg of 256 anchors an image, scalars."""
        c = self.config
        objectness, deltas = torch.cat(objectness, dim=1), torch.cat(deltas, dim=1)
        anchors = torch.cat(anchors)
        loss = box_loss = 0
        for i, (target, generator) in enumerate(zip(targets, generators)):
            matched, labels = self.match(anchors, target["boxes"])
            batch_size, fraction = c.rpn_batch_size_per_image, c.rpn_positive_fraction
            index = sample(labels, batch_size, fraction, generator)  # [S]
            logits, is_object = objectness[i, index], labels[index].float()
            loss += F.binary_cross_entropy_with_logits(logits, is_object, reduction="sum")
            # Smooth L1 of an error d: d^2 / (2 beta) below beta, |d| - beta / 2 above; far off, a
            # box has a gradient of 1 at most. (The box head's larger targets have a larger beta.)
            positive = index[labels[index] == 1]
            box_targets = encode_boxes(target["boxes"][matched[positive]], anchors[positive])
            predicted, beta = deltas[i, positive], c.rpn_smooth_l1_beta
            box_loss += F.smooth_l1_loss(predicted, box_targets, reduction="sum", beta=beta)
        denominator = c.rpn_batch_size_per_image * len(targets)  # also where fewer were drawn
        return {"loss_objectness": loss / denominator, "loss_rpn_box_reg": box_loss / denominator}


# -- RoI heads -------------------------------------------------------------------------------------


def roi_levels(boxes, strides):
    """The index of the level that each box [R, 4] is pooled from: [R] int64.

    A box of 224^2 pixels, ImageNet's crop, goes to P4, one of half that side to P3, and so on:
    k = floor(4 + log2(sqrt(w h) / 224)), clipped to P2..P5 (Eq. 1 of the FPN paper).
    """
    side = ops.box_area(boxes).clamp(min=0).sqrt()
    level = torch.floor(4 + torch.log2(side / 224 + 1e-8))  # 1e-8: an empty box has no log
    lowest, highest = (int(math.log2(s)) for s in (strides[0], strides[-1]))  # P_k: stride 2^k
    return level.clamp(lowest, highest).long() - lowest


def multilevel_roi_align(features, strides, rois, bins, sampling_ratio):
    """RoIAlign over levels: [R, C, bins, bins] from P2..P5 (or one level) and rois [R, 5].

    RoIAlign (Mask R-CNN, Sec. 3) divides a box into bins x bins parts and averages each over
    sampling_ratio^2 points (0: as many as the bin has pixels), which it interpolates between the
    four pixels around a point: nothing is rounded to whole pixels. `aligned`: the value of pixel i
    is that at i + 1/2, its centre.
    """
    levels = roi_levels(rois[:, 1:], strides)
    pooled = rois.new_zeros(len(rois), features[0].shape[1], bins, bins)
    for i, (feature, stride) in enumerate(zip(features, strides)):
        here, scale = (levels == i).nonzero()[:, 0], 1 / stride
        pooled[here] = ops.roi_align(
            feature.float(), rois[here], bins, scale, sampling_ratio, aligned=True
        )
    return pooled


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
        count, width = config.box_head_convs, config.box_head_channels
        self.convs, channels = conv_stack(count, channels, width, norm)
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
        count, width = config.mask_head_convs, config.mask_head_channels
        self.convs, channels = conv_stack(count, channels, width, norm)
        self.deconv = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.predictor = nn.Conv2d(channels, config.num_classes, 1)

    def forward(self, x, labels):
        x = self.convs(x)  # [R, 256, 14, 14]
        x = self.deconv(x).relu_()  # [R, 256, 28, 28]
        maps = self.predictor(x).float()  # [R, K, 28, 28]
        return maps[torch.arange(len(x), device=x.device), labels - 1]


class KeypointHead(nn.Module):
    """Pooled RoIs [R, C, 14, 14] to heatmap logits [R, 17, 56, 56] (Mask R-CNN, Sec. 5).

    It has no norm, in Detectron's GN models either.
    """

    def __init__(self, config, channels):
        super().__init__()
        count, width = config.keypoint_head_convs, config.keypoint_head_channels
        self.convs, channels = conv_stack(count, channels, width, "none")
        self.deconv = nn.ConvTranspose2d(channels, config.keypoints, 4, stride=2, padding=1)

    def forward(self, x):
        x = self.convs(x)  # [R, 512, 14, 14]
        x = self.deconv(x).float()  # [R, 17, 28, 28]
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def mask_targets(masks, matched, boxes, bins):
    """The part of each object's mask inside its RoI, as 0 and 1: float [S, bins, bins].

    RoIAlign of the matched object's bit mask, then a threshold, as Detectron2's
    BitMasks.crop_and_resize (Detectron draws polygons, of the object whose polygons' box overlaps
    most). masks [G, H, W], matched [S], boxes [S, 4].
    """
    rois = torch.cat([matched[:, None].to(boxes.dtype), boxes], dim=1)
    crops = ops.roi_align(masks[:, None].float(), rois, bins, aligned=True)
    return (crops[:, 0] >= 0.5).float()


def keypoint_targets(keypoints, boxes, side):
    """Heatmap cell of every keypoint: cell [R, 17] in 0..side^2 - 1, and valid [R, 17] bool.

    keypoints [R, 17, 3] (x, y, v), boxes [R, 4]. The cell is the floor of the position scaled to
    the box; the right and the bottom edge belong to the last cell (Detectron). Valid: labelled
    (v > 0) and inside the box.
    """
    xy = keypoints[..., :2]
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    cell = ((xy - low) * (side / (high - low))).floor()
    cell = torch.where(xy == high, side - 1, cell)
    valid = ((cell >= 0) & (cell < side)).all(dim=-1) & (keypoints[..., 2] > 0)
    cell = torch.where(valid[..., None], cell, 0).long()
    return cell[..., 1] * side + cell[..., 0], valid


def decode_keypoints(heatmaps, boxes):
    """Heatmaps [N, 17, 56, 56] (logits) of boxes [N, 4] to keypoints [N, 17, 3] and scores [N, 17].

    Detectron's rule: resize the map to the box's size in whole pixels (bicubic), take the largest
    value v, return the middle of its pixel, scaled back; third column 1. The score is Detectron2's:
    exp(v) / sum of exp over the 56 x 56 map. Every box has a size of its own: one after the other.
    """
    points = heatmaps.new_ones(*heatmaps.shape[:2], 3)
    scores = heatmaps.new_zeros(heatmaps.shape[:2])
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    for i, (w, h) in enumerate(sides.ceil().long().tolist()):
        maps = F.interpolate(heatmaps[i, None], size=(h, w), mode="bicubic", align_corners=False)[0]
        value, index = maps.flatten(1).max(dim=1)  # [17]
        pixel = torch.stack([index % w, index // w], dim=1) + 0.5
        points[i, :, :2] = boxes[i, :2] + pixel * sides[i] / pixel.new_tensor([w, h])
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
        # Not the network's, but stored with it: sizes to test at, names and ids of the classes.
        self.data_settings = {"min_size": 800, "max_size": 1333}
        self.data_settings |= {"classes": None, "category_ids": None}
        for name, value in (("image_mean", config.image_mean), ("image_std", config.image_std)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32).view(3, 1, 1))

        # Frozen BN is in the backbone only: FPN and heads have no norm then, as in Detectron.
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

        predictions = self.box_predictions(features, self.proposals(features, sizes), sizes)
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

        Padding is zero *after* normalization, on the right and at the bottom, to a multiple of 32:
        each level of the FPN up to stride 32 is then exactly twice as large as the next one.
        """
        sizes = [tuple(image.shape[-2:]) for image in images]
        height, width = (math.ceil(max(side) / 32) * 32 for side in zip(*sizes))
        batch = self.image_mean.new_zeros(len(images), 3, height, width)
        for padded, image, (h, w) in zip(batch, images, sizes):
            image = image if image.is_floating_point() else image / 255
            padded[:, :h, :w] = (image - self.image_mean) / self.image_std
        return batch, sizes

    def features(self, batch):
        """Feature levels [B, C, h, w] of a batch [B, 3, H, W]: P2..P6, or VGG's one level."""
        levels = self.backbone(batch)
        return self.fpn(levels) if self.fpn else levels

    def proposals(self, features, sizes):
        """The RPN's proposals: boxes [P, 4] of each image, best first."""
        return self.rpn.proposals(*self.rpn(features), sizes)

    def pool(self, features, boxes, bins):
        """RoIAlign of boxes (a list of [N, 4]), each from one of P2..P5: [R, C, bins, bins]."""
        strides, ratio = self.backbone.strides, self.config.roi_sampling_ratio
        used = features[: len(strides)]  # P6 is the RPN's alone
        return multilevel_roi_align(used, strides, to_rois(boxes), bins, ratio)

    def refine(self, boxes, deltas, stage, sizes):
        """What a stage's deltas [R, K or 1, 4] make of boxes: a list of [N, K or 1, 4], clipped."""
        deltas = (deltas / self.box_weights(stage)).split([len(b) for b in boxes])
        decoded = [decode_boxes(d, b[:, None]) for d, b in zip(deltas, boxes)]
        return [ops.clip_boxes_to_image(d, size) for d, size in zip(decoded, sizes)]

    def box_weights(self, stage):
        """(10, 10, 5, 5), in stages 2 and 3 of a cascade 2 and 3 times as large.

        A later stage's RoIs are closer to the objects: the spread of its targets is smaller.
        `stage` counts from 0; the names of losses count from 1, as the paper does.
        """
        return self.image_mean.new_tensor(self.config.bbox_reg_weights) * (stage + 1)

    def box_predictions(self, features, boxes, sizes):
        """Class scores and boxes of proposals, *before* threshold and NMS.

        boxes: a list of [P, 4], as `proposals` gives them. Returns for each image a pair: scores
        [P, K + 1] (softmax; column 0 is background) and clipped boxes [P, K, 4] ([P, 1, 4] if
        class-agnostic).

        Cascade: each stage refines the boxes of the one before. The scores are averaged: each stage
        has learned at another IoU to tell objects from background.
        """
        scores, counts = 0, [len(b) for b in boxes]
        for stage, head in enumerate(self.box_heads):
            logits, deltas = head(self.pool(features, boxes, self.config.box_roi_size))
            scores = scores + logits.softmax(dim=1) / len(self.box_heads)  # [R, K + 1]
            refined = self.refine(boxes, deltas, stage, sizes)  # [P, K or 1, 4] of each image
            boxes = [r[:, 0] for r in refined]  # for a next stage, which has one for all classes
        return list(zip(scores.split(counts), refined))

    @torch.no_grad()
    def postprocess(self, scores, boxes):
        """Detections of one image: score threshold, NMS of each class, the best 100.

        scores [P, K + 1], boxes [P, K or 1, 4], as from `box_predictions`. Returns a dict of boxes
        [N, 4], labels [N] and scores [N], best first.
        """
        c = self.config
        row, labels = (scores[:, 1:] > c.box_score_thresh).nonzero(as_tuple=True)  # [N] each
        scores = scores[row, labels + 1]
        boxes = boxes.expand(-1, c.num_classes, -1)[row, labels]
        keep = nms(boxes, scores, labels, c.box_nms_thresh, c.box_detections_per_img)
        return {"boxes": boxes[keep], "labels": labels[keep] + 1, "scores": scores[keep]}

    def mask_probabilities(self, features, boxes, labels):
        """Masks of given boxes and labels (lists of [N, 4], [N]): a list of [N, 28, 28] in 0..1."""
        pooled = self.pool(features, boxes, self.config.mask_roi_size)
        masks = self.mask_head(pooled, torch.cat(labels)).sigmoid()
        return list(masks.split([len(b) for b in boxes]))

    def keypoint_heatmaps(self, features, boxes):
        """Keypoint logits of given boxes (list of [N, 4]): a list of [N, 17, 56, 56]."""
        pooled = self.pool(features, boxes, self.config.keypoint_roi_size)
        return list(self.keypoint_head(pooled).split([len(b) for b in boxes]))

    # -- Training --------------------------------------------------------------------------------

    def losses(self, features, sizes, targets):
        """All losses of a batch, as a dict of scalars; all have weight 1.

                                divided by                             at the first step
            loss_objectness     256 * images, even if fewer are drawn  ln 2 = 0.69
            loss_rpn_box_reg    256 * images                           small
            loss_classifier     all sampled RoIs                       ln 81 = 4.39 (80 classes)
            loss_box_reg        all sampled RoIs                       small (little foreground)
            loss_mask           foreground RoIs * 28^2                 above ln 2: 0.7 to 0.8
            loss_keypoint       labelled keypoints inside their RoIs   about ln 56^2 = 8.05

        These numbers are counted in this process's own batch. DDP then averages the gradients over
        the processes: a sample counts for less in a process that has many, as in Detectron.
        Dividing by totals over all processes would give a different loss.
        """
        generators = [generator_of(target, features[0].device) for target in targets]
        # 1) RPN
        outputs = self.rpn(features)  # objectness, deltas, anchors
        losses = self.rpn.losses(*outputs, targets, generators)
        # 2) RoIs: proposals and ground truth, sampled
        proposals = self.rpn.proposals(*outputs, sizes)
        samples = self.sample_rois(proposals, targets, generators)
        # 3) heads
        of_boxes, last_samples = self.box_losses(features, samples, targets, sizes)
        losses |= of_boxes
        foreground = []
        for s in last_samples:
            index = s.labels.nonzero()[:, 0]
            foreground.append(Samples(s.boxes[index], s.labels[index], s.matched[index]))
        if self.mask_head:
            losses |= self.mask_loss(features, foreground, targets)
        if self.keypoint_head:
            losses |= self.keypoint_loss(features, foreground, targets)
        return losses

    @torch.no_grad()
    def sample_rois(self, proposals, targets, generators):
        """512 RoIs an image, at most a quarter of them foreground: a list of Samples.

        Foreground: IoU >= 0.5 with an object. The ground truth joins the proposals, so that there
        is foreground from the first iteration. Crowds are no foreground, as in Detectron2.
        """
        c, samples = self.config, []
        for boxes, target, generator in zip(proposals, targets, generators):
            boxes = torch.cat([boxes, target["boxes"]])
            boxes = boxes[has_area(boxes)]  # [P + G, 4]
            matched, labels = match_boxes(target, boxes, c.box_fg_iou_thresh)
            batch_size, fraction = c.box_batch_size_per_image, c.box_positive_fraction
            index = sample(labels, batch_size, fraction, generator)
            samples.append(Samples(boxes[index], labels[index], matched[index]))
        return samples

    def box_losses(self, features, samples, targets, sizes):
        """Classification and box losses of every stage, and the last stage's samples.

        Stages 2 and 3 of a cascade take the boxes that the previous stage made of the same RoIs,
        with IoU thresholds of 0.6 and 0.7 instead of 0.5: a head that is trained at an IoU improves
        boxes near that IoU most. RoIs are not sampled again, ground truth is not added again.

        The masks are trained on the last stage's foreground: the paper adds "a mask head to the
        last stage" (Sec. 5.1). Detectron2 and tensorpack take the first stage's.
        """
        c, stages = self.config, len(self.box_heads)
        losses = {}
        for stage, head in enumerate(self.box_heads):
            boxes = [s.boxes for s in samples]
            pooled = self.pool(features, boxes, c.box_roi_size)  # [R, 256, 7, 7]
            if stages > 1 and pooled.requires_grad:  # features get the stages' mean gradient
                pooled.register_hook(lambda grad: grad * (1 / stages))
            logits, deltas = head(pooled)  # [R, K + 1], [R, K or 1, 4]
            labels = torch.cat([s.labels for s in samples])  # [R]
            class_loss = F.cross_entropy(logits, labels, reduction="sum")
            # Only foreground [F] has boxes to learn, each those of its own class.
            is_foreground = labels > 0
            truth = [t["boxes"][s.matched[s.labels > 0]] for t, s in zip(targets, samples)]
            box_targets = encode_boxes(torch.cat(truth), torch.cat(boxes)[is_foreground])  # [F, 4]
            box_targets = box_targets * self.box_weights(stage)
            column = 0 if c.box_class_agnostic else labels[is_foreground] - 1
            predicted, beta = deltas[is_foreground, column], c.box_smooth_l1_beta
            box_loss = F.smooth_l1_loss(predicted, box_targets, reduction="sum", beta=beta)
            count = max(len(labels), 1)  # *all* RoIs: however few are foreground, each counts alike
            name = f"_{stage + 1}" if stages > 1 else ""
            losses["loss_classifier" + name] = class_loss / count
            losses["loss_box_reg" + name] = box_loss / count
            if stage + 1 < stages:
                samples = self.next_rois(boxes, deltas, stage, targets, sizes)
        return losses, samples

    @torch.no_grad()
    def next_rois(self, boxes, deltas, stage, targets, sizes):
        """What a cascade's stage hands to the next: its boxes, matched anew; empty ones dropped."""
        samples, threshold = [], self.config.cascade_fg_iou_thresh[stage]  # of the next stage
        for refined, target in zip(self.refine(boxes, deltas, stage, sizes), targets):
            refined = refined[:, 0]  # [S, 1, 4] -> [S, 4]
            refined = refined[has_area(refined)]  # [S', 4]
            matched, labels = match_boxes(target, refined, threshold)
            samples.append(Samples(refined, labels, matched))
        return samples

    def mask_loss(self, features, foreground, targets):
        """Binary cross-entropy of the true class's mask, at each of 28 x 28 pixels."""
        size = self.config.mask_roi_size
        pairs = zip(targets, foreground)
        masks = [mask_targets(t["masks"], s.matched, s.boxes, 2 * size) for t, s in pairs]
        pooled = self.pool(features, [s.boxes for s in foreground], size)  # [R, 256, 14, 14]
        logits = self.mask_head(pooled, torch.cat([s.labels for s in foreground]))  # [R, 28, 28]
        # Without foreground the sum is 0 but still depends on every parameter of the head, so that
        # the process takes part in all-reduces of SyncBN and of the gradients (all heads do this).
        loss = F.binary_cross_entropy_with_logits(logits, torch.cat(masks), reduction="sum")
        return {"loss_mask": loss / max(logits.numel(), 1)}  # / (foreground RoIs * 28^2)

    def keypoint_loss(self, features, foreground, targets):
        """Cross-entropy of each keypoint, a softmax over the 56 x 56 positions.

        The RoIs are the sampled foreground with a labelled keypoint inside (Detectron draws up to
        128 such RoIs anew).
        """
        size, boxes, cells, valids = self.config.keypoint_roi_size, [], [], []
        for target, s in zip(targets, foreground):
            points = target["keypoints"][s.matched].float()
            cell, valid = keypoint_targets(points, s.boxes, 4 * size)  # [S, 17]
            useful = valid.any(dim=1)
            boxes.append(s.boxes[useful])
            cells.append(cell[useful].flatten())
            valids.append(valid[useful].flatten())
        cell, valid = torch.cat(cells), torch.cat(valids)
        heatmaps = self.keypoint_head(self.pool(features, boxes, size))  # [R, 17, 56, 56]
        loss = F.cross_entropy(heatmaps.flatten(0, 1).flatten(1), cell, reduction="none")
        # / labelled keypoints inside their RoIs
        return {"loss_keypoint": (loss * valid).sum() / valid.sum().clamp(min=1)}


def check_images(images):
    """ValueError, naming the image, unless all are [3, h, w], uint8 or float in [0, 1]."""
    for i, image in enumerate(images):
        fits = torch.is_tensor(image) and image.dim() == 3 and len(image) == 3
        if fits and image.dtype != torch.uint8:
            fits = image.is_floating_point() and image.abs().max() <= 1.2  # bicubic may overshoot
        require(fits, f"images[{i}] must be a [3, h, w] tensor, RGB, uint8 or float in [0, 1].")


def check_targets(images, targets, config):
    """ValueError, naming image and field, for targets that are not what `forward` expects."""
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        n, num_classes = len(target["boxes"]), config.num_classes
        shapes = {"boxes": (n, 4), "labels": (n,)}
        shapes |= {"masks": (n, *image.shape[1:])} if config.masks else {}
        shapes |= {"keypoints": (n, config.keypoints, 3)} if config.keypoints else {}
        for field, shape in shapes.items():
            found = tuple(target[field].shape)
            require(found == shape, f"targets[{i}][{field!r}] must be {shape}, and is {found}.")
        size = target["boxes"][:, 2:] - target["boxes"][:, :2]
        fits = ((size >= 0) & size.isfinite()).all()
        require(fits, f"targets[{i}]['boxes'] must be finite, with x1 <= x2 and y1 <= y2.")
        fits = ((target["labels"] >= 1) & (target["labels"] <= num_classes)).all()
        require(fits, f"targets[{i}]['labels'] must be in 1..{num_classes}.")


# -- Initialization --------------------------------------------------------------------------------


def initialize(model):
    """Random weights: He et al.'s for convolutions, Caffe2's Xavier, U(+-sqrt(3 / fan_in)), for FPN
    and fc layers (a=1 below). This is Detectron2's, but for the mask predictor (Detectron).

    (Detectron's own backbone had Xavier, too.) The RPN and the layers that predict classes and
    boxes start near zero. Every gamma starts at 1. (Zero for the last one of a block is usual in
    ImageNet training, but hurts GN detectors from scratch, notes Detectron2.)
    Every bias and beta starts at 0.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            # N(0, 2 / fan_out). (A deconvolution's weight is [in, out, k, k]: its "fan_out" is that
            # of the inputs, in Detectron2 as well.)
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=1)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    for module in model.fpn.modules() if model.fpn else []:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=1)
    for layer in (model.rpn.conv, model.rpn.objectness, model.rpn.deltas):
        nn.init.normal_(layer.weight, std=0.01)
    for head in model.box_heads:
        nn.init.normal_(head.classifier.weight, std=0.01)
        nn.init.normal_(head.regressor.weight, std=0.001)


# -- Files of weights ------------------------------------------------------------------------------


class WeightsError(ValueError):
    """A file of weights that cannot be used; the message is one sentence that names the file."""


def write_whole(path, content):
    """Write bytes to a file that appears at `path` whole or not at all, even after a kill."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_model(model, path, **more):
    """Write a checkpoint: config, data settings, weights, and `more` (plain data and tensors)."""
    content = {"config": dataclasses.asdict(model.config), "data": model.data_settings}
    buffer = io.BytesIO()  # (given the file itself, torch hides that a disk is full)
    torch.save(content | {"weights": model.state_dict()} | more, buffer)
    write_whole(path, buffer.getbuffer())


def read_checkpoint(path):
    """The dict in a file of `save_model`, on the CPU. Nothing in the file is executed.

    Raises WeightsError if it is damaged or none of ours, and OSError if it cannot be read.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch has no common type for what a damaged file brings about
        raise WeightsError(f"{path} is damaged, or no file of weights: copy it again.") from error
    if not isinstance(content, dict) or not {"config", "data", "weights"} <= content.keys():
        hint = f"convert another project's weights with tools/convert_weights.py {path} OUT"
        raise WeightsError(f"{path} is no checkpoint of this project: {hint}.")
    return content


def load_model(path):
    """The model of a checkpoint, on the CPU and in evaluation mode. Raises as `read_checkpoint`."""
    content = read_checkpoint(path)
    model = MaskRCNN(Config(**content["config"]))
    model.load_state_dict(content["weights"])
    model.data_settings |= content["data"]
    return model.eval()


def load_weights(model, path):
    """Fill a model from a checkpoint, as far as tensors of the same name have the same shape.

    The backbone must fit. The rest need not: the file may hold a backbone alone, or a detector of
    other classes; what does not fit stays as it is, and is named. The image statistics that belong
    to the weights are set too. Raises WeightsError. Returns a sentence about what was loaded.
    """
    content, own = read_checkpoint(path), model.state_dict()
    theirs, weights, ours = content["config"], content["weights"], model.config
    # All kinds of BN have the same tensors. But the statistics of a frozen one may be folded into
    # its scale and shift, from which no trained BN can go on.
    is_bn = theirs["norm"] in ("bn", "syncbn") and ours.norm in ("bn", "syncbn", "frozen_bn")
    if theirs["norm"] != ours.norm and not is_bn:
        raise WeightsError(f"{path} has the norm {theirs['norm']}, and this model has {ours.norm}.")
    if theirs["stride_in_1x1"] != ours.stride_in_1x1:
        raise WeightsError(f"{path} has another stride_in_1x1 than this model.")
    fitting = {n: t for n, t in weights.items() if n in own and t.shape == own[n].shape}
    left = [name for name in own if name not in fitting]
    unused = [name for name in weights if name not in own]
    misfits = [n for n in left + unused if n.startswith("backbone.") and "num_batches" not in n]
    if misfits:
        raise WeightsError(f"{path} has another backbone than this model: see {misfits[0]}.")
    statistics = {name: theirs[name] for name in ("image_mean", "image_std")}
    model.config = dataclasses.replace(ours, **statistics)  # as the buffers that are loaded now
    model.load_state_dict(fitting, strict=False)
    layers = dict.fromkeys(name.rpartition(".")[0] for name in left)
    return f"{path}: {len(fitting)} tensors loaded; left as they were: {', '.join(layers) or '-'}"
