"""Mask R-CNN with FPN, written to be trained from random weights.

He, Girshick, Dollar, "Rethinking ImageNet Pre-training" (arXiv 1811.08883), Sec. 4 "Architecture".
The file follows an image through the detector:

  boxes and sampling -> backbone -> FPN -> RPN -> RoI heads -> MaskRCNN -> weights in and out

Conventions are torchvision's. Boxes are [x1, y1, x2, y2] in continuous pixel coordinates: a pixel
is the unit square, the whole image is [0, 0, width, height] and nothing ever adds 1. Label 0 is
background, 1..K are the classes. In shape comments, B: images of the batch, A: anchors of an image,
G: ground-truth objects of the image that has most, P: proposals, R: RoIs of all images, K: classes.
"""

import itertools
import math
import pickle
import re

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import batched_nms, roi_align

from norms import make_norm

# ------------------------------------------------------------------------------------------------
# Boxes: overlap, coding, clipping
# ------------------------------------------------------------------------------------------------

# A predicted box is at most 1000/16 times as large as its anchor: exp() of a wild early prediction
# would overflow. (Detectron: BBOX_XFORM_CLIP)
MAX_LOG_SCALE = math.log(1000.0 / 16)


def pairwise_iou(truth, boxes):
    """Intersection over union of ground truth [B, G, 4] and boxes [B or 1, N, 4]: [B, G, N].

    Batched over images; in-place where it can be, for N is 270,000 anchors. A box without area has
    IoU 0 with everything.
    """
    t = truth[:, :, None]  # [B, G, 1, 4]
    b = boxes[:, None]  # [B or 1, 1, N, 4]
    width = torch.minimum(t[..., 2], b[..., 2]).sub_(torch.maximum(t[..., 0], b[..., 0]))
    height = torch.minimum(t[..., 3], b[..., 3]).sub_(torch.maximum(t[..., 1], b[..., 1]))
    intersection = width.clamp_(min=0).mul_(height.clamp_(min=0))
    areas = [(x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (t, b)]
    union = torch.add(areas[0], areas[1], out=height).sub_(intersection)
    return intersection.div_(union).nan_to_num_(nan=0.0)  # 0 / 0: neither has an area


def encode_boxes(truth, boxes, weights):
    """Regression targets (dx, dy, dw, dh) that turn `boxes` into `truth`; all [..., 4].

    The parametrization of R-CNN; `weights` multiply the four (Detectron: BBOX_REG_WEIGHTS).
    """
    size = boxes[..., 2:] - boxes[..., :2]
    centre = boxes[..., :2] + 0.5 * size
    truth_size = truth[..., 2:] - truth[..., :2]
    truth_centre = truth[..., :2] + 0.5 * truth_size
    dx, dy = ((truth_centre - centre) / size).unbind(dim=-1)
    dw, dh = torch.log(truth_size / size).unbind(dim=-1)
    wx, wy, ww, wh = weights  # as numbers: a tensor of them would have to travel to the device
    return torch.stack([dx * wx, dy * wy, dw * ww, dh * wh], dim=-1)


def decode_boxes(deltas, boxes, weights):
    """The inverse of `encode_boxes`: deltas [..., 4] applied to boxes [..., 4] (broadcast)."""
    dx, dy, dw, dh = (d / w for d, w in zip(deltas.unbind(dim=-1), weights))
    size = boxes[..., 2:] - boxes[..., :2]
    centre = boxes[..., :2] + 0.5 * size + torch.stack([dx, dy], dim=-1) * size
    half = 0.5 * size * torch.stack([dw, dh], dim=-1).clamp(max=MAX_LOG_SCALE).exp()
    return torch.cat([centre - half, centre + half], dim=-1)


def clip_boxes(boxes, limits):
    """Boxes [..., 4] clipped to [0, w] x [0, h]; `limits` (w, h, w, h), broadcast against them."""
    return torch.minimum(boxes.clamp(min=0), limits)


def image_limits(sizes, device):
    """(w, h, w, h) of every image as a float tensor [B, 1, 4], for `clip_boxes`."""
    limits = torch.tensor([(w, h, w, h) for h, w in sizes], dtype=torch.float32)
    return limits[:, None].to(device, non_blocking=True)


# ------------------------------------------------------------------------------------------------
# Matching and sampling
# ------------------------------------------------------------------------------------------------


def pad_targets(targets, device):
    """Targets of a batch as padded tensors: boxes [B, G, 4], labels [B, G], valid [B, G] bool.

    G is at least 1, so that a batch without any object needs no case of its own. A box without
    area is not valid: there is no regression from or to it.
    """
    most = max([1] + [len(t["boxes"]) for t in targets])
    boxes = torch.zeros(len(targets), most, 4, device=device)
    labels = torch.zeros(len(targets), most, dtype=torch.int64, device=device)
    for i, target in enumerate(targets):
        n = len(target["boxes"])
        boxes[i, :n] = target["boxes"]
        labels[i, :n] = target["labels"]
    return boxes, labels, (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)


def sampling_seeds(targets, device):
    """An int64 seed per image [B]: the target's "seed", or torch's generator where it has none."""
    seeds = [t["seed"] if "seed" in t else int(torch.randint(2**62, ())) for t in targets]
    return torch.tensor(seeds, dtype=torch.int64).to(device, non_blocking=True)


def random_keys(seeds, n, salt):
    """[B, n] int64 keys in 1..2^32, as a function of (seed of the image, salt, position) alone.

    0 is left to `sample`, for what is no candidate.

    A counter-based generator: an integer hash (two rounds of multiply and xor-shift) of the
    position. No state, hence the same on every device, for every number of workers and after a
    resume.
    """
    mask = 0xFFFFFFFF
    start = (seeds ^ (seeds >> 32)) + salt * 0x632BE5AB
    x = (start[:, None] + torch.arange(n, device=seeds.device) * 0x9E3779B9).bitwise_and_(mask)
    for multiplier in (0x7FEB352D, 0x846CA68B):
        x.bitwise_xor_(x >> 16).mul_(multiplier).bitwise_and_(mask)
    return x.bitwise_xor_(x >> 16).add_(1)


def sample(labels, batch_size, positive_fraction, seeds, salt):
    """Choose up to `batch_size` candidates per image, at most `positive_fraction` of them positive.

    labels: [B, N] int64; > 0 positive, 0 negative, < 0 never chosen. Positives that are missing
    are made up for by negatives. Returns index [B, S] into N and valid [B, S] bool, at most
    `batch_size` of them True: S has slots for the most positives and for `batch_size` negatives, so
    that shapes are static and nothing waits for the device.
    """
    keys = random_keys(seeds, labels.shape[1], salt)
    most_positive = min(int(batch_size * positive_fraction), labels.shape[1])
    key, positive = torch.where(labels > 0, keys, 0).topk(most_positive)
    positive_valid = key > 0
    key, negative = torch.where(labels == 0, keys, 0).topk(min(batch_size, labels.shape[1]))
    room = batch_size - positive_valid.sum(dim=1, keepdim=True)  # [B, 1]
    negative_valid = (key > 0) & (torch.arange(key.shape[1], device=key.device) < room)
    index = torch.cat([positive, negative], dim=1)
    return index, torch.cat([positive_valid, negative_valid], dim=1)


def take(x, index):
    """Rows of x [B, N, ...] at index [B, S]: [B, S, ...]."""
    for _ in range(x.dim() - 2):
        index = index[..., None]
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))


def nms_mask(boxes, scores, groups, valid, threshold):
    """Non-maximum suppression of all images and groups in one call: bool [B, N], True for the kept.

    boxes [B, N, 4], scores [B, N], groups [N] (boxes of different groups or images never suppress
    one another), valid [B, N] bool: the others are left out.
    """
    image = torch.arange(len(boxes), device=boxes.device)[:, None]
    group = image * (groups.max() + 1) + groups
    candidates = valid.flatten().nonzero()[:, 0]
    # batched_nms may move the groups apart by an offset, which in float32 would round the boxes.
    kept = batched_nms(
        boxes.flatten(0, 1)[candidates].double(),
        scores.flatten()[candidates].double(),
        group.flatten()[candidates],
        threshold,
    )
    mask = torch.zeros_like(valid.flatten())
    mask[candidates[kept]] = True
    return mask.view_as(valid)


# ------------------------------------------------------------------------------------------------
# Backbones
# ------------------------------------------------------------------------------------------------


class ConvNorm(nn.Module):
    """Convolution, normalization, and ReLU unless `relu=False`.

    A convolution that is followed by a normalization has no bias: the norm would remove it.
    """

    def __init__(self, inputs, outputs, kernel, norm, stride=1, groups=1, relu=True):
        super().__init__()
        bias = norm == "none"
        padding = kernel // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, 1, groups, bias)
        self.norm = make_norm(norm, outputs)
        self.relu = relu

    def forward(self, x):
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

    def forward(self, x):
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
    """ResNet or ResNeXt; returns res2..res5, at strides 4, 8, 16, 32.

    `blocks`: bottlenecks of each of the four stages. `groups` is the same in all of them,
    `width_per_group` is res2's and doubles from stage to stage (1 and 64 for ResNet; 32 and 8 for
    ResNeXt 32x8d). `stem_width`, 64 in every published model, sets the stem and the outputs of the
    stages, 4, 8, 16 and 32 times it; a narrow network has a smaller `width_per_group` as well.
    """

    def __init__(self, blocks, groups, width_per_group, stem_width, norm, freeze_at, stride_in_1x1):
        super().__init__()
        self.strides = [4, 8, 16, 32]
        self.stem = ConvNorm(3, stem_width, 7, norm, stride=2)
        inputs = stem_width
        self.channels = []
        for i, count in enumerate(blocks):
            outputs = stem_width * 4 * 2**i
            width = groups * width_per_group * 2**i
            stage = nn.Sequential()
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                block = Bottleneck(inputs, width, outputs, norm, stride, groups, stride_in_1x1)
                stage.append(block)
                inputs = outputs
            setattr(self, f"res{i + 2}", stage)
            self.channels.append(outputs)
        self.freeze([self.stem, self.res2, self.res3, self.res4, self.res5], freeze_at)
        # The maps of stem and res2 are a quarter of the memory of a training step and 2 % of its
        # work: rather than kept, they are computed again in the backward pass. Not with statistics
        # of the batch, which would then be taken twice.
        self.recompute = norm in ("gn", "none")

    def forward(self, x):  # [B, 3, H, W]
        if self.training and self.recompute:
            res2 = checkpoint(self.to_res2, x, use_reentrant=False, preserve_rng_state=False)
        else:
            res2 = self.to_res2(x)
        res3 = self.res3(res2)
        res4 = self.res4(res3)
        return [res2, res3, res4, self.res5(res4)]

    def to_res2(self, x):
        x = F.max_pool2d(self.stem(x), kernel_size=3, stride=2, padding=1)
        return self.res2(x)


class VGG16(Backbone):
    """VGG-16 up to conv5_3 at stride 16, its only level (Sec. 5.1 "Models without BN/GN")."""

    def __init__(self, stem_width, norm, freeze_at):
        super().__init__()
        self.strides = [16]
        self.channels = [8 * stem_width]
        inputs = 3
        for i, (count, multiple) in enumerate([(2, 1), (2, 2), (3, 4), (3, 8), (3, 8)]):
            stage = nn.Sequential()
            for _ in range(count):
                stage.append(ConvNorm(inputs, multiple * stem_width, 3, norm))
                inputs = multiple * stem_width
            setattr(self, f"conv{i + 1}", stage)
        self.freeze([self.conv1, self.conv2, self.conv3, self.conv4, self.conv5], freeze_at)

    def forward(self, x):  # [B, 3, H, W]
        x = self.conv1(x)
        for stage in (self.conv2, self.conv3, self.conv4, self.conv5):
            x = stage(F.max_pool2d(x, 2))
        return [x]


# ------------------------------------------------------------------------------------------------
# FPN (Lin et al., CVPR 2017)
# ------------------------------------------------------------------------------------------------


class FPN(nn.Module):
    """res2..res5 to P2..P6, all with `channels` channels.

    With "gn", "syncbn" or "bn" the lateral and the output convolutions are normalized, without
    ReLU. P6, for the RPN's largest anchors, is every second pixel of the (normalized) P5.
    """

    def __init__(self, inputs, channels, norm):
        super().__init__()
        lateral = [ConvNorm(c, channels, 1, norm, relu=False) for c in inputs]
        output = [ConvNorm(channels, channels, 3, norm, relu=False) for _ in inputs]
        self.lateral, self.output = nn.ModuleList(lateral), nn.ModuleList(output)

    def forward(self, levels):  # res2..res5
        top_down = self.lateral[-1](levels[-1])
        pyramid = [self.output[-1](top_down)]
        for i in reversed(range(len(levels) - 1)):
            upsampled = F.interpolate(top_down, scale_factor=2, mode="nearest")
            top_down = self.lateral[i](levels[i]) + upsampled
            pyramid.insert(0, self.output[i](top_down))
        return pyramid + [pyramid[-1][:, :, ::2, ::2]]


# ------------------------------------------------------------------------------------------------
# RPN
# ------------------------------------------------------------------------------------------------


def make_anchors(shapes, strides, sizes, ratios, device):
    """Anchors of one image per level: list of [h * w * len(sizes) * len(ratios), 4].

    shapes: (h, w) of each level; sizes: a tuple of sqrt(area) in pixels per level; ratios: h / w.
    Centred on (x * stride, y * stride), unrounded, and kept when they cross the image border, as
    in Detectron2. Order: row, column, size, ratio.
    """
    anchors = []
    for (h, w), stride, level_sizes in zip(shapes, strides, sizes):
        wh = [(s / math.sqrt(r), s * math.sqrt(r)) for s in level_sizes for r in ratios]
        half = torch.tensor(wh).to(device, non_blocking=True) / 2  # [cell, 2]
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
        cell = len(config["anchor_sizes"][0]) * len(config["anchor_ratios"])
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, cell, 1)
        self.deltas = nn.Conv2d(channels, cell * 4, 1)

    def forward(self, features):
        """Per level: objectness logits [B, A_l], box deltas [B, A_l, 4], anchors [A_l, 4]."""
        objectness, deltas = [], []
        for level in features:
            x = self.conv(level).relu_()
            objectness.append(self.objectness(x).permute(0, 2, 3, 1).flatten(1).float())
            level_deltas = self.deltas(x).permute(0, 2, 3, 1)  # [B, h, w, cell * 4]
            deltas.append(level_deltas.reshape(len(x), -1, 4).float())
        shapes = [level.shape[-2:] for level in features]
        sizes, ratios = self.config["anchor_sizes"], self.config["anchor_ratios"]
        anchors = make_anchors(shapes, self.strides, sizes, ratios, features[0].device)
        return objectness, deltas, anchors

    @torch.no_grad()
    def proposals(self, objectness, deltas, anchors, sizes):
        """Boxes [B, P, 4] in order of objectness, and which of them are valid [B, P].

        P is the same for all images. sizes: (h, w) of the unpadded images, for clipping.
        """
        mode = "train" if self.training else "test"
        before = self.config[f"rpn_pre_nms_top_n_{mode}"]
        after = self.config[f"rpn_post_nms_top_n_{mode}"]
        boxes, scores, levels = [], [], []
        for level_objectness, level_deltas, level_anchors in zip(objectness, deltas, anchors):
            score, index = level_objectness.topk(min(before, level_objectness.shape[1]))
            chosen = take(level_deltas, index)
            boxes.append(decode_boxes(chosen, level_anchors[index], (1.0, 1.0, 1.0, 1.0)))
            levels.append(torch.full_like(index[0], len(scores)))
            scores.append(score)
        scores = torch.cat(scores, dim=1)
        boxes = clip_boxes(torch.cat(boxes, dim=1), image_limits(sizes, scores.device))
        # A box outside the image is clipped to nothing; one that is not a number compares as False.
        valid = (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
        kept = nms_mask(boxes, scores, torch.cat(levels), valid, self.config["rpn_nms_thresh"])
        score, index = scores.masked_fill(~kept, -math.inf).topk(min(after, scores.shape[1]))
        return take(boxes, index), score > -math.inf

    def losses(self, objectness, deltas, anchors, truth, truth_valid, seeds):
        """loss_objectness and loss_rpn_box_reg, both divided by 256 * images (of this process)."""
        c = self.config
        objectness, deltas = torch.cat(objectness, dim=1), torch.cat(deltas, dim=1)
        anchors = torch.cat(anchors)
        with torch.no_grad():
            matched, labels = self.match(anchors, truth, truth_valid)
            batch_size, fraction = c["rpn_batch_size_per_image"], c["rpn_positive_fraction"]
            index, valid = sample(labels, batch_size, fraction, seeds, salt=1)
            positive = take(labels, index).eq(1) & valid
            # Slots that are not positive get their own anchor as target: finite, and then masked.
            boxes = anchors[index]
            box_truth = take(truth, take(matched, index))  # [B, S, 4]
            box_truth = torch.where(positive[..., None], box_truth, boxes)
            box_targets = encode_boxes(box_truth, boxes, (1.0, 1.0, 1.0, 1.0))
        logits = take(objectness, index)
        loss = F.binary_cross_entropy_with_logits(logits, positive.float(), reduction="none")
        box_loss = F.smooth_l1_loss(
            take(deltas, index), box_targets, reduction="none", beta=c["rpn_smooth_l1_beta"]
        )
        denominator = batch_size * len(truth)  # 256 anchors an image, also where fewer were drawn
        return {
            "loss_objectness": (loss * valid).sum() / denominator,
            "loss_rpn_box_reg": (box_loss * positive[..., None]).sum() / denominator,
        }

    def match(self, anchors, truth, truth_valid):
        """For anchors [A, 4]: index of the best object [B, A], label [B, A]: 1, 0, -1 (ignored).

        Positive: IoU >= 0.7 with an object, or no anchor overlaps some object more (Faster R-CNN's
        "low-quality matches"). Such an anchor still regresses to the object that it overlaps most
        itself, which may be another one (Detectron, Detectron2). Negative: below 0.3 with all.
        """
        iou = pairwise_iou(truth, anchors[None])  # [B, G, A]
        iou.masked_fill_(~truth_valid[..., None], -1)
        best, matched = iou.max(dim=1)
        labels = torch.full_like(matched, -1)
        labels[best < self.config["rpn_bg_iou_thresh"]] = 0
        labels[best >= self.config["rpn_fg_iou_thresh"]] = 1
        highest = iou.max(dim=2, keepdim=True).values.clamp_(min=1e-6)  # [B, G, 1]
        labels[(iou >= highest).any(dim=1)] = 1
        return matched, labels


# ------------------------------------------------------------------------------------------------
# RoI heads
# ------------------------------------------------------------------------------------------------


def to_rois(boxes, valid=None):
    """RoIs [R, 5], (image, x1, y1, x2, y2), from a list of [N, 4] or from [B, P, 4] and valid."""
    if valid is not None:
        image = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)
        image = image[:, None, None].expand(-1, boxes.shape[1], 1)
        return torch.cat([image, boxes], dim=2)[valid]
    return torch.cat([F.pad(b, (1, 0), value=i) for i, b in enumerate(boxes)])


def pool(features, strides, rois, size, sampling_ratio):
    """RoIAlign over levels: [R, C, size, size] from P2..P5 (or one level) and rois [R, 5].

    An RoI of 224^2 pixels, ImageNet's crop, goes to P4, one of half that side to P3, and so on
    (Eq. 1 of the FPN paper). One call of RoIAlign per level for all images; pixel centres are at
    half-integers (`aligned`).
    """

    def align(feature, rois, stride):
        return roi_align(feature.float(), rois, size, 1 / stride, sampling_ratio, aligned=True)

    if len(features) == 1:
        return align(features[0], rois, strides[0])
    side = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).clamp(min=0).sqrt()
    lowest, highest = int(math.log2(strides[0])), int(math.log2(strides[-1]))
    level = torch.floor(4 + torch.log2(side / 224 + 1e-8))  # 1e-8: an empty box has no log
    level = level.clamp(lowest, highest) - lowest
    order = level.argsort(stable=True)
    levels = torch.arange(len(features), device=level.device)
    counts = (level[:, None] == levels).sum(dim=0).tolist()
    pooled = [align(f, r, s) for f, r, s in zip(features, rois[order].split(counts), strides)]
    return torch.cat(pooled)[order.argsort()]


class BoxHead(nn.Module):
    """Pooled RoIs to class logits [R, K + 1] and box deltas [R, K or 1, 4].

    4 conv 3x3 + 1 fc where there is a norm ("4conv1fc" of the GN paper), 2 fc where there is none.
    """

    def __init__(self, config, channels, norm):
        super().__init__()
        self.convs = nn.Sequential()
        for _ in range(config["box_head_convs"]):
            self.convs.append(ConvNorm(channels, config["box_head_channels"], 3, norm))
            channels = config["box_head_channels"]
        width = channels * config["box_roi_size"] ** 2
        self.fcs = nn.ModuleList()
        for _ in range(config["box_head_fcs"]):
            self.fcs.append(nn.Linear(width, config["box_head_fc_channels"]))
            width = config["box_head_fc_channels"]
        regressors = 1 if config["box_class_agnostic"] else config["num_classes"]
        self.classifier = nn.Linear(width, config["num_classes"] + 1)
        self.regressor = nn.Linear(width, regressors * 4)

    def forward(self, x):  # [R, C, 7, 7]
        x = self.convs(x).flatten(1)
        for fc in self.fcs:
            x = fc(x).relu_()
        deltas = self.regressor(x).float().unflatten(1, (-1, 4))
        return self.classifier(x).float(), deltas


class MaskHead(nn.Module):
    """Pooled RoIs [R, C, 14, 14] and their classes [R] to mask logits [R, 28, 28] of that class."""

    def __init__(self, config, channels, norm):
        super().__init__()
        self.convs = nn.Sequential()
        for _ in range(config["mask_head_convs"]):
            self.convs.append(ConvNorm(channels, config["mask_head_channels"], 3, norm))
            channels = config["mask_head_channels"]
        self.deconv = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.predictor = nn.Conv2d(channels, config["num_classes"], 1)

    def forward(self, x, labels):
        x = self.deconv(self.convs(x)).relu_()
        # Only the map of class `labels` is ever looked at, in the loss and at test time: apply that
        # class's row of the 1x1 convolution to each RoI instead of all K rows.
        weight = self.predictor.weight.flatten(1)[labels - 1]  # [R, C]
        bias = self.predictor.bias[labels - 1]
        logits = torch.matmul(weight[:, None].to(x.dtype), x.flatten(2)).float()
        return (logits + bias[:, None, None]).view(len(x), *x.shape[-2:])


class KeypointHead(nn.Module):
    """Pooled RoIs [R, C, 14, 14] to heatmap logits [R, keypoints, 56, 56] (Mask R-CNN, Sec. 5)."""

    def __init__(self, config, channels):
        super().__init__()
        self.convs = nn.Sequential()
        for _ in range(config["keypoint_head_convs"]):
            self.convs.append(ConvNorm(channels, config["keypoint_head_channels"], 3, "none"))
            channels = config["keypoint_head_channels"]
        self.deconv = nn.ConvTranspose2d(channels, config["keypoints"], 4, stride=2, padding=1)

    def forward(self, x):
        x = self.deconv(self.convs(x)).float()
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def mask_targets(targets, rois, matched, size):
    """The part of each object's mask inside its RoI, at size x size: float 0/1 [R, size, size].

    RoIAlign of the bit mask, then a threshold, like Detectron2's BitMasks.crop_and_resize. rois
    [R, 5] are in order of images; matched [R] is the object's index within its image.
    """
    boxes = torch.cat([matched[:, None].to(rois.dtype), rois[:, 1:]], dim=1)
    crops = []
    for target, here in zip(targets, boxes.split(roi_counts(rois, len(targets)))):
        masks = target["masks"]
        if len(masks) == 0:
            masks = masks.new_zeros(1, *masks.shape[1:])  # no object, hence no RoI either
        crop = roi_align(masks[:, None].float(), here, size, 1.0, 0, aligned=True)
        crops.append(crop[:, 0] >= 0.5)
    return torch.cat(crops).float()


def roi_counts(rois, images):
    """How many of the rois [R, 5] each image has: a list of int; waits for the device."""
    return (rois[:, 0] == torch.arange(images, device=rois.device)[:, None]).sum(dim=1).tolist()


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
    softmax, normalized over the 56 x 56 map. The loop is over the detections of one image: every
    box has a size of its own, and one box's maps at a time bound the memory.
    """
    points = heatmaps.new_ones(*heatmaps.shape[:2], 3)
    scores = heatmaps.new_zeros(heatmaps.shape[:2])
    sizes = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    for i, (w, h) in enumerate(sizes.ceil().long().tolist()):
        maps = F.interpolate(heatmaps[i, None], size=(h, w), mode="bicubic", align_corners=False)[0]
        value, index = maps.flatten(1).max(dim=1)  # [17]
        cell = torch.stack([index % w, index // w], dim=1) + 0.5
        points[i, :, :2] = boxes[i, :2] + cell * sizes[i] / cell.new_tensor([w, h])
        scores[i] = 1 / (heatmaps[i].flatten(1) - value[:, None]).exp().sum(dim=1)
    return points, scores


# ------------------------------------------------------------------------------------------------
# Mask R-CNN
# ------------------------------------------------------------------------------------------------


class ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by `scale`."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.scale, None


class MaskRCNN(nn.Module):
    """The detector; made by `build_model`, whose arguments it remembers as the dict `config`.

    The steps that `forward` is made of can be used alone: `batch`, `features`, `proposals`,
    `box_predictions`, `postprocess`, `mask_probabilities`, `keypoint_heatmaps`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        # What the weights were trained on; filled in by training, and by loading a checkpoint.
        self.data_settings = {"min_size": 800, "max_size": 1333}
        self.data_settings |= {"classes": None, "category_ids": None}
        for name in ("image_mean", "image_std"):
            value = torch.tensor(config[name], dtype=torch.float32).view(3, 1, 1)
            self.register_buffer(name, value)

        c, norm = config, config["norm"]
        # A frozen-BN detector has its affine maps in the backbone only, as in Detectron.
        head_norm = "none" if norm == "frozen_bn" else norm
        if c["backbone"] == "vgg16":
            self.backbone = VGG16(c["stem_width"], norm, c["freeze_at"])
            self.fpn = None
            channels, strides = self.backbone.channels[0], self.backbone.strides
        else:
            self.backbone = ResNet(
                c["blocks"], c["groups"], c["width_per_group"], c["stem_width"], norm,
                c["freeze_at"], c["stride_in_1x1"],
            )  # fmt: skip
            self.fpn = FPN(self.backbone.channels, c["fpn_channels"], head_norm)
            channels, strides = c["fpn_channels"], self.backbone.strides + [64]
        if len(c["anchor_sizes"]) != len(strides):
            raise ValueError(
                f"anchor_sizes has {len(c['anchor_sizes'])} levels but the features have "
                f"{len(strides)}; give one tuple of sizes for each of the strides {strides}."
            )
        if len({len(sizes) for sizes in c["anchor_sizes"]}) != 1:
            raise ValueError(
                f"anchor_sizes {c['anchor_sizes']} has more sizes on one level than on another; "
                "give each level as many, since all share the RPN's convolutions."
            )
        if len(c["cascade_fg_iou_thresh"]) != 2:
            raise ValueError(
                f"cascade_fg_iou_thresh {c['cascade_fg_iou_thresh']} needs two values, for stages "
                "2 and 3; stage 1 has box_fg_iou_thresh."
            )
        self.rpn = RPN(c, channels, strides)
        stages = 3 if c["cascade"] else 1
        self.box_heads = nn.ModuleList(BoxHead(c, channels, head_norm) for _ in range(stages))
        self.mask_head = MaskHead(c, channels, head_norm) if c["masks"] else None
        self.keypoint_head = KeypointHead(c, channels) if c["keypoints"] else None
        self.init_weights()

    def init_weights(self):
        """Initialize from nothing: convolutions He et al.'s, FPN and fc layers Caffe2's Xavier.

        That is Detectron2's (Detectron's own backbone had Xavier). The layers that predict start
        near zero, all but the masks'. Every gamma starts at 1 (zero for the last one of a block,
        usual in ImageNet training, hurts GN detectors from scratch, notes Detectron2), every bias
        and beta at 0.
        """
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                # (of a deconvolution, torch takes the input channels for "out"; so does Detectron2)
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.kaiming_uniform_(module.weight, a=1)  # U(+-sqrt(3 / fan_in))
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        for module in self.fpn.modules() if self.fpn else ():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
        for layer in (self.rpn.conv, self.rpn.objectness, self.rpn.deltas):
            nn.init.normal_(layer.weight, std=0.01)
        for head in self.box_heads:
            nn.init.normal_(head.classifier.weight, std=0.01)
            nn.init.normal_(head.regressor.weight, std=0.001)

    # -- The steps -------------------------------------------------------------------------------

    def batch(self, images):
        """Normalize and pad: a list of [3, h, w] to [B, 3, H, W] and the sizes [(h, w), ...].

        RGB; uint8, or float in [0, 1]. Padding is zero *after* normalization, on the right and at
        the bottom, to a multiple of 32. That is why the mean cannot be folded into a bias of conv1:
        conv(x - mean) is conv(x) - conv(mean) only where the window does not reach into padding,
        this one or conv1's own.
        """
        sizes = [tuple(image.shape[-2:]) for image in images]
        h, w = (math.ceil(max(side) / 32) * 32 for side in zip(*sizes))
        batch = self.image_mean.new_zeros(len(images), 3, h, w)
        for out, image, (h, w) in zip(batch, images, sizes):
            scale = 1.0 if image.is_floating_point() else 255.0
            out = out[:, :h, :w]
            torch.sub(image, self.image_mean * scale, out=out).div_(self.image_std * scale)
        return batch, sizes

    def features(self, batch):
        """Feature levels [B, C, h, w] of a batch [B, 3, H, W]: P2..P6, or VGG's one level."""
        levels = self.backbone(batch)
        return self.fpn(levels) if self.fpn else levels

    def proposals(self, features, sizes):
        """The RPN's proposals: boxes [B, P, 4], best first, and which are valid [B, P]."""
        return self.rpn.proposals(*self.rpn(features), sizes)

    def pool(self, features, rois, size):
        """RoIAlign of rois [R, 5] from the levels that have RoIs (P6 is the RPN's alone)."""
        strides = self.backbone.strides
        ratio = self.config["roi_sampling_ratio"]
        return pool(features[: len(strides)], strides, rois, size, ratio)

    def box_weights(self, stage):
        """Box-coding weights of a cascade stage: (10, 10, 5, 5), then 2 and 3 times as large."""
        return [w * (stage + 1) for w in self.config["bbox_reg_weights"]]

    def box_predictions(self, features, boxes, valid, sizes):
        """Class scores and boxes of proposals, *before* threshold and NMS.

        boxes [B, P, 4] and valid [B, P] as `proposals` gives them. Returns per image a pair, for
        its p valid proposals: scores [p, K + 1] (softmax; column 0 is background) and clipped
        boxes [p, K, 4] ([p, 1, 4] if class-agnostic). Cascade: each stage refines the boxes of the
        one before; scores are averaged over the stages.
        """
        rois = to_rois(boxes, valid)
        image = rois[:, 0].long()
        limits = image_limits(sizes, rois.device)[image]  # [R, 1, 4]
        scores = 0
        for stage, head in enumerate(self.box_heads):
            logits, deltas = head(self.pool(features, rois, self.config["box_roi_size"]))
            scores = scores + logits.softmax(dim=1) / len(self.box_heads)
            decoded = decode_boxes(deltas, rois[:, None, 1:], self.box_weights(stage))
            decoded = clip_boxes(decoded, limits)  # [R, K or 1, 4]
            # for the next stage: a cascade is class-agnostic
            rois = torch.cat([rois[:, :1], decoded[:, 0]], dim=1)
        counts = valid.sum(dim=1).tolist()
        return list(zip(scores.split(counts), decoded.split(counts)))

    def postprocess(self, scores, boxes):
        """Detections of one image: score threshold, NMS per class, the best 100.

        scores [P, K + 1], boxes [P, K or 1, 4], as from `box_predictions`. Returns a dict of boxes
        [N, 4], labels [N] and scores [N], best first.
        """
        proposal, label = (scores[:, 1:] > self.config["box_score_thresh"]).nonzero(as_tuple=True)
        scores = scores[proposal, label + 1]
        boxes = boxes[proposal, label if boxes.shape[1] > 1 else 0]
        kept = batched_nms(boxes.double(), scores.double(), label, self.config["box_nms_thresh"])
        kept = kept[: self.config["box_detections_per_img"]]
        return {"boxes": boxes[kept], "labels": label[kept] + 1, "scores": scores[kept]}

    def mask_probabilities(self, features, boxes, labels):
        """Masks of given boxes and labels (lists of [N, 4], [N]): a list of [N, 28, 28] in 0..1."""
        pooled = self.pool(features, to_rois(boxes), self.config["mask_roi_size"])
        masks = self.mask_head(pooled, torch.cat(labels)).sigmoid()
        return list(masks.split([len(b) for b in boxes]))

    def keypoint_heatmaps(self, features, boxes):
        """Keypoint logits of given boxes (list of [N, 4]): a list of [N, 17, 56, 56]."""
        pooled = self.pool(features, to_rois(boxes), self.config["keypoint_roi_size"])
        return list(self.keypoint_head(pooled).split([len(b) for b in boxes]))

    # -- Training --------------------------------------------------------------------------------

    def sample_rois(self, boxes, valid, truth, truth_labels, truth_valid, seeds):
        """512 RoIs an image, at most a quarter of them foreground (IoU >= 0.5 with an object).

        The ground truth joins the proposals, so that there is foreground from the first iteration.
        Returns rois [R, 5], labels [R], matched [R] (index of the object within its image).
        """
        c = self.config
        boxes = torch.cat([boxes, truth], dim=1)
        valid = torch.cat([valid, truth_valid], dim=1)
        threshold = c["box_fg_iou_thresh"]
        matched, labels = self.match_rois(boxes, truth, truth_labels, truth_valid, threshold)
        labels = labels.masked_fill(~valid, -1)
        batch_size, fraction = c["box_batch_size_per_image"], c["box_positive_fraction"]
        index, chosen = sample(labels, batch_size, fraction, seeds, salt=2)
        image, slot = chosen.nonzero(as_tuple=True)  # waits for the device: how many?
        index = index[image, slot]
        rois = torch.cat([image[:, None].to(boxes.dtype), boxes[image, index]], dim=1)
        return rois, labels[image, index], matched[image, index]

    def match_rois(self, boxes, truth, truth_labels, truth_valid, threshold):
        """Boxes [B, P, 4] to the object they overlap most: its index [B, P], and its label or 0."""
        iou = pairwise_iou(truth, boxes).masked_fill_(~truth_valid[..., None], -1)
        best, matched = iou.max(dim=1)
        return matched, torch.where(best >= threshold, take(truth_labels, matched), 0)

    def box_losses(self, features, rois, labels, matched, padded, sizes):
        """Classification and box losses of every stage, for the sampled RoIs.

        Stages 2 and 3 take the boxes that the stage before made of the same RoIs: nothing is
        sampled again, no ground truth added again, and boxes that became empty are dropped.
        """
        truth = padded[0]
        stages = len(self.box_heads)
        losses = {}
        for stage, head in enumerate(self.box_heads):
            name = f"_{stage + 1}" if stages > 1 else ""
            pooled = self.pool(features, rois, self.config["box_roi_size"])
            if stages > 1:  # they share the features (Detectron2)
                pooled = ScaleGradient.apply(pooled, 1 / stages)
            logits, deltas = head(pooled)
            with torch.no_grad():
                foreground = labels > 0
                boxes = rois[:, 1:]
                box_truth = truth[rois[:, 0].long(), matched]
                box_truth = torch.where(foreground[:, None], box_truth, boxes)
                box_targets = encode_boxes(box_truth, boxes, self.box_weights(stage))
            column = (labels - 1).clamp(min=0) if deltas.shape[1] > 1 else torch.zeros_like(labels)
            chosen = take(deltas, column[:, None])[:, 0]  # [R, 4]
            loss = F.smooth_l1_loss(
                chosen, box_targets, reduction="none", beta=self.config["box_smooth_l1_beta"]
            )
            # Without any RoI, a loss of zero still has a graph.
            count = max(len(labels), 1)
            class_loss = F.cross_entropy(logits, labels, reduction="sum")
            losses["loss_classifier" + name] = class_loss / count
            losses["loss_box_reg" + name] = (loss * foreground[:, None]).sum() / count
            if stage + 1 < stages:
                rois, labels, matched = self.next_rois(rois, deltas, stage, padded, sizes)
        return losses

    @torch.no_grad()
    def next_rois(self, rois, deltas, stage, padded, sizes):
        """What a cascade's stage hands to the next: its boxes [R', 5], labels and matched [R']."""
        truth, truth_labels, truth_valid = padded
        boxes = decode_boxes(deltas[:, 0], rois[:, 1:], self.box_weights(stage))
        boxes = clip_boxes(boxes, image_limits(sizes, boxes.device)[rois[:, 0].long(), 0])
        filled = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        rois = torch.cat([rois[:, :1], boxes], dim=1)[filled]
        image = rois[:, 0].long()
        threshold = self.config["cascade_fg_iou_thresh"][stage]
        # Every RoI as an "image" of one box, against the objects of its own image.
        matched, labels = self.match_rois(
            rois[:, None, 1:], truth[image], truth_labels[image], truth_valid[image], threshold
        )
        return rois, labels[:, 0], matched[:, 0]

    def mask_loss(self, features, rois, labels, matched, targets):
        """Cross-entropy of the true class's mask, mean over foreground RoIs and 28 x 28 pixels."""
        size = self.config["mask_roi_size"]
        # before the head: it waits for the device, which then has little left to do
        truth = mask_targets(targets, rois, matched, 2 * size)
        logits = self.mask_head(self.pool(features, rois, size), labels)
        # With no foreground at all the sum is zero but still depends on every parameter of the
        # head, so that the process takes part in all-reduces of SyncBN and of the gradients.
        loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="sum")
        return {"loss_mask": loss / max(logits.numel(), 1)}

    def keypoint_loss(self, features, rois, matched, targets):
        """Cross-entropy over the 56 x 56 positions, sum / labelled keypoints in the RoIs.

        The RoIs are the foreground of the sampled ones, as in Detectron2; Detectron draws anew.
        """
        chosen = matched.split(roi_counts(rois, len(targets)))  # rois are in order of images
        truth = torch.cat([t["keypoints"][index] for t, index in zip(targets, chosen)]).float()
        size = 4 * self.config["keypoint_roi_size"]
        cell, valid = keypoint_targets(truth, rois[:, 1:], size)
        useful = valid.any(dim=1)  # RoIs without a labelled keypoint inside are left out
        cell, valid = cell[useful], valid[useful]
        pooled = self.pool(features, rois[useful], self.config["keypoint_roi_size"])
        heatmaps = self.keypoint_head(pooled)
        loss = F.cross_entropy(heatmaps.flatten(0, 1).flatten(1), cell.flatten(), reduction="none")
        return {"loss_keypoint": (loss * valid.flatten()).sum() / valid.sum().clamp(min=1)}

    def losses(self, features, sizes, targets):
        """All losses of a batch, as a dict of scalars (see `forward`).

        Divided by: 256 x images (both of the RPN), all sampled RoIs (both of a box head, so that
        each sample counts the same: Fast R-CNN), foreground RoIs x 28^2 (masks), labelled
        keypoints. Each is this process's own number; DDP then averages over the processes. All
        losses have weight 1.
        """
        device = features[0].device
        padded = pad_targets(targets, device)  # boxes, labels, which are valid
        seeds = sampling_seeds(targets, device)

        objectness, deltas, anchors = self.rpn(features)
        losses = self.rpn.losses(objectness, deltas, anchors, padded[0], padded[2], seeds)

        boxes, valid = self.rpn.proposals(objectness, deltas, anchors, sizes)
        rois, labels, matched = self.sample_rois(boxes, valid, *padded, seeds)
        losses |= self.box_losses(features, rois, labels, matched, padded, sizes)

        foreground = (labels > 0).nonzero()[:, 0]
        rois, labels, matched = rois[foreground], labels[foreground], matched[foreground]
        if self.mask_head:
            losses |= self.mask_loss(features, rois, labels, matched, targets)
        if self.keypoint_head:
            losses |= self.keypoint_loss(features, rois, matched, targets)
        return losses

    # -- The whole -------------------------------------------------------------------------------

    def forward(self, images, targets=None):
        """Losses in training mode, detections in evaluation mode.

        images: list of [3, h, w] RGB tensors, uint8 or float in [0, 1], of any sizes.
        targets (training): list of dicts with `boxes` [N, 4] float xyxy, `labels` [N] int64 in
        1..K, `masks` [N, h, w] bool or uint8 (if the model has masks), `keypoints` [N, 17, 3]
        (x, y, v), and optionally `seed` (int), of which the random sampling is then a function.

        Training returns loss_objectness, loss_rpn_box_reg, loss_classifier, loss_box_reg,
        loss_mask, loss_keypoint (cascade: loss_classifier_1..3, loss_box_reg_1..3). Evaluation
        returns per image a dict of `boxes`, `labels`, `scores`, `masks` [N, 28, 28] (probabilities
        inside the box), `keypoints` [N, 17, 3] (x, y, 1) and `keypoints_scores` [N, 17], in pixels
        of the given image.
        """
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


# Every argument of the model with the paper's value, in the order of the detector.
DEFAULTS = {
    "backbone": "resnet50",
    "norm": "gn",
    "num_classes": 80,
    "masks": True,
    "keypoints": 0,
    "cascade": False,
    # Detectron's pixel mean (122.7717, 115.9465, 102.9801) and no division, for images in [0, 1].
    "image_mean": (122.7717 / 255, 115.9465 / 255, 102.9801 / 255),
    "image_std": (1 / 255, 1 / 255, 1 / 255),
    # Backbone and FPN
    "blocks": None,  # bottlenecks per stage; None: what the name of the backbone says
    "groups": 1,
    "width_per_group": 64,
    "stem_width": 64,
    "stride_in_1x1": False,
    "freeze_at": 0,
    "fpn_channels": 256,
    # RPN
    "anchor_sizes": ((32,), (64,), (128,), (256,), (512,)),
    "anchor_ratios": (0.5, 1.0, 2.0),
    "rpn_pre_nms_top_n_train": 2000,  # per level
    "rpn_pre_nms_top_n_test": 1000,
    "rpn_post_nms_top_n_train": 1000,  # per image, as in Detectron2; Detectron: 2000 per 2 images
    "rpn_post_nms_top_n_test": 1000,
    "rpn_nms_thresh": 0.7,
    "rpn_fg_iou_thresh": 0.7,
    "rpn_bg_iou_thresh": 0.3,
    "rpn_batch_size_per_image": 256,
    "rpn_positive_fraction": 0.5,
    "rpn_smooth_l1_beta": 1 / 9,  # this one and the box head's: Detectron; Detectron2 has 0
    # RoI heads
    "roi_sampling_ratio": 2,  # 0: as many samples as the bin has pixels, as Detectron2's models
    "box_roi_size": 7,
    "box_head_convs": None,  # None: 4 conv + 1 fc with a norm, 2 fc without
    "box_head_channels": 256,
    "box_head_fcs": None,
    "box_head_fc_channels": 1024,
    "box_class_agnostic": False,
    "box_fg_iou_thresh": 0.5,
    "cascade_fg_iou_thresh": (0.6, 0.7),  # of stages 2 and 3; the first has the one above
    "box_batch_size_per_image": 512,
    "box_positive_fraction": 0.25,
    "bbox_reg_weights": (10.0, 10.0, 5.0, 5.0),
    "box_smooth_l1_beta": 1.0,
    "box_score_thresh": 0.05,
    "box_nms_thresh": 0.5,
    "box_detections_per_img": 100,
    "mask_roi_size": 14,
    "mask_head_convs": 4,
    "mask_head_channels": 256,
    "keypoint_roi_size": 14,
    "keypoint_head_convs": 8,
    "keypoint_head_channels": 512,
}

# What a backbone changes. The paper's "ResNeXt-152 8x32d" has 8 groups of 32; Detectron's
# pre-trained X-152 has 32 groups of 8.
BACKBONES = {
    "resnet50": {"blocks": (3, 4, 6, 3)},
    "resnet101": {"blocks": (3, 4, 23, 3)},
    "resnext101_32x8d": {"blocks": (3, 4, 23, 3), "groups": 32, "width_per_group": 8},
    "resnext152_8x32d": {"blocks": (3, 8, 36, 3), "groups": 8, "width_per_group": 32},
    "resnext152_32x8d": {"blocks": (3, 8, 36, 3), "groups": 32, "width_per_group": 8},
    # Faster R-CNN without FPN: Detectron's anchors and numbers of proposals off FPN, VGG's two fc.
    "vgg16": {
        "anchor_sizes": ((64, 128, 256, 512),),
        "rpn_pre_nms_top_n_train": 12000,
        "rpn_post_nms_top_n_train": 2000,
        "rpn_pre_nms_top_n_test": 6000,
        "box_head_convs": 0,
        "box_head_fcs": 2,
        "box_head_fc_channels": 4096,
    },
}


def build_model(
    backbone="resnet50", norm="gn", num_classes=80, masks=True, keypoints=0, cascade=False, **hyper
):
    """A MaskRCNN with random weights; any name in DEFAULTS can be given as an argument.

    backbone: a name in BACKBONES. norm: "gn", "syncbn", "bn", "frozen_bn" or "none". num_classes
    does not count background. keypoints: their number, or 0. cascade: three box stages
    (class-agnostic). Widths and depths are arguments too, for small models that run the same code.

    Raises ValueError for a name or a combination that there is not.
    """
    if backbone not in BACKBONES:
        raise ValueError(f"Unknown backbone {backbone!r}; choose one of {', '.join(BACKBONES)}.")
    unknown = sorted(set(hyper) - set(DEFAULTS))
    if unknown:
        raise ValueError(f"Unknown argument {unknown[0]!r} of build_model; see model.DEFAULTS.")
    named = {"backbone": backbone, "norm": norm, "num_classes": num_classes}
    named |= {"masks": masks, "keypoints": keypoints, "cascade": cascade}
    config = DEFAULTS | BACKBONES[backbone] | named | hyper
    if config["blocks"] is None:
        config["blocks"] = BACKBONES[backbone].get("blocks")
    normalized = norm in ("gn", "syncbn", "bn")
    if config["box_head_convs"] is None:
        config["box_head_convs"] = 4 if normalized else 0
    if config["box_head_fcs"] is None:
        config["box_head_fcs"] = 1 if normalized else 2
    if cascade:
        config["box_class_agnostic"] = True  # a stage hands one box per RoI to the next
    return MaskRCNN(config)


# ------------------------------------------------------------------------------------------------
# Weights in and out
# ------------------------------------------------------------------------------------------------


class WeightsError(ValueError):
    """A file of weights that cannot be used; the message is one sentence."""


# Our modules, and what they are called in three public worlds (None: there is no such thing): the
# one table for reading their files and for writing Detectron2's. i, j, k are numbers, i_1 is i - 1,
# j1 is j + 1, abc is the letter of k; {stage} is ".0", ".1", ".2" in a cascade, otherwise nothing.
NAMES = (
    # here, Detectron2, torchvision (classification), Detectron (as `caffe2_name` spells it)
    ("backbone.stem.conv", "backbone.bottom_up.stem.conv1", "conv1", "conv1"),
    ("backbone.stem.norm", "backbone.bottom_up.stem.conv1.norm", "bn1", "conv1_norm"),
    ("backbone.res{i}.{j}.conv{k}.conv", "backbone.bottom_up.res{i}.{j}.conv{k}",
     "layer{i_1}.{j}.conv{k}", "res{i}_{j}_branch2{abc}"),
    ("backbone.res{i}.{j}.conv{k}.norm", "backbone.bottom_up.res{i}.{j}.conv{k}.norm",
     "layer{i_1}.{j}.bn{k}", "res{i}_{j}_branch2{abc}_norm"),
    ("backbone.res{i}.{j}.shortcut.conv", "backbone.bottom_up.res{i}.{j}.shortcut",
     "layer{i_1}.{j}.downsample.0", "res{i}_{j}_branch1"),
    ("backbone.res{i}.{j}.shortcut.norm", "backbone.bottom_up.res{i}.{j}.shortcut.norm",
     "layer{i_1}.{j}.downsample.1", "res{i}_{j}_branch1_norm"),
    ("backbone.conv{i}.{j}.conv", None, "features.{vgg}", "conv{i}_{j1}"),
    ("fpn.lateral.{i}.conv", "backbone.fpn_lateral{i2}", None, None),
    ("fpn.lateral.{i}.norm", "backbone.fpn_lateral{i2}.norm", None, None),
    ("fpn.output.{i}.conv", "backbone.fpn_output{i2}", None, None),
    ("fpn.output.{i}.norm", "backbone.fpn_output{i2}.norm", None, None),
    ("rpn.conv", "proposal_generator.rpn_head.conv", None, None),
    ("rpn.objectness", "proposal_generator.rpn_head.objectness_logits", None, None),
    ("rpn.deltas", "proposal_generator.rpn_head.anchor_deltas", None, None),
    ("box_heads.{i}.convs.{j}.conv", "roi_heads.box_head{stage}.conv{j1}", None, None),
    ("box_heads.{i}.convs.{j}.norm", "roi_heads.box_head{stage}.conv{j1}.norm", None, None),
    ("box_heads.{i}.fcs.{j}", "roi_heads.box_head{stage}.fc{j1}", "classifier.{j3}", "fc{j6}"),
    ("box_heads.{i}.classifier", "roi_heads.box_predictor{stage}.cls_score", None, None),
    ("box_heads.{i}.regressor", "roi_heads.box_predictor{stage}.bbox_pred", None, None),
    ("mask_head.convs.{i}.conv", "roi_heads.mask_head.mask_fcn{i1}", None, None),
    ("mask_head.convs.{i}.norm", "roi_heads.mask_head.mask_fcn{i1}.norm", None, None),
    ("mask_head.deconv", "roi_heads.mask_head.deconv", None, None),
    ("mask_head.predictor", "roi_heads.mask_head.predictor", None, None),
    ("keypoint_head.convs.{i}.conv", "roi_heads.keypoint_head.conv_fcn{i1}", None, None),
    ("keypoint_head.deconv", "roi_heads.keypoint_head.score_lowres", None, None),
)  # fmt: skip
FORMATS = {"detectron2": 1, "torchvision": 2, "caffe2": 3}
STATISTICS_NAMES = {"image_mean": "pixel_mean", "image_std": "pixel_std"}  # here, Detectron2

# Mean and deviation of images, RGB in [0, 1], that go with the weights of each format where the
# file does not say. Detectron2's scratch 9x models and X-101 were trained with other deviations.
STATISTICS = {
    "detectron2": ([123.675 / 255, 116.28 / 255, 103.53 / 255], [1 / 255] * 3),
    "torchvision": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "caffe2": ([122.7717 / 255, 115.9465 / 255, 102.9801 / 255], [1 / 255] * 3),
}


def foreign_name(name, kind, cascade=False):
    """The name of one of our parameters in another format, or None if it has none there."""
    module, _, parameter = name.rpartition(".")
    for row in NAMES:
        match = re.fullmatch(re.sub(r"\{(\w)\}", r"(?P<\1>\\d+)", row[0]), module)
        template = row[FORMATS[kind]]
        if match and template:
            n = {"i": 0, "j": 0, "k": 1} | {key: int(n) for key, n in match.groupdict().items()}
            i, j, k = n["i"], n["j"], n["k"]
            foreign = template.format(
                **n, i_1=i - 1, i1=i + 1, i2=i + 2, j1=j + 1, j3=3 * j, j6=j + 6, abc="abc"[k - 1],
                vgg={1: 0, 2: 5, 3: 10, 4: 17, 5: 24}.get(i, 0) + 2 * j,
                stage=f".{i}" if cascade else "",
            )  # fmt: skip
            return f"{foreign}.{parameter}"
    return None


def caffe2_name(name):
    """Detectron's names in one spelling: res_conv1_bn_s and conv1_gn_s are conv1_norm.weight."""
    for pattern, replacement in (
        (r"^res_conv1_", "conv1_"),
        (r"_[bg]n_", "_norm_"),
        (r"_(w|s|gamma)$", ".weight"),
        (r"_(b|beta)$", ".bias"),
        (r"_(rm|running_mean)$", ".running_mean"),
        (r"_(riv|running_var)$", ".running_var"),
    ):
        name = re.sub(pattern, replacement, name)
    return name


def convert(name, tensor, kind, forward=True):
    """A tensor of another format as ours (forward), or ours as theirs. Exact both ways.

    Detectron and Detectron2 read BGR, we RGB. Detectron2's background is the last class, ours the
    first; box deltas and masks have no background in either.
    """
    first = name in ("backbone.stem.conv.weight", "backbone.conv1.0.conv.weight")
    if first and kind in ("detectron2", "caffe2"):
        return tensor.flip(1)
    if kind == "detectron2" and ".classifier." in name:
        return tensor.roll(1 if forward else -1, dims=0)
    return tensor


def to_detectron2(model):
    """The model's weights with Detectron2's names and conventions: a dict of tensors."""
    state = {}
    for name, tensor in model.state_dict().items():
        foreign = foreign_name(name, "detectron2", model.config["cascade"])
        if foreign is not None:
            state[foreign] = convert(name, tensor, "detectron2", forward=False).clone()
    for ours, theirs in STATISTICS_NAMES.items():
        state[theirs] = getattr(model, ours).double().flip(0) * 255
    return state


class PickledNames(dict):
    """What an OrderedDict in a pickle becomes; attributes (torch hangs some on) are left out."""

    def __setstate__(self, attributes):
        pass


class PickledType:
    """What a numpy dtype in a pickle becomes: `dtype`, a type of number."""

    def __init__(self, code, *_):
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biufc":
            raise pickle.UnpicklingError(f"it holds an array of type {code!r}, not of numbers")

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class PickledArray:
    """What a numpy array in a pickle becomes: `value`, made here and not by numpy's unpickling."""

    def __setstate__(self, state):
        _, shape, kind, fortran, data = state
        data = data.encode("latin1") if isinstance(data, str) else data  # a string of Python 2
        array = np.frombuffer(data, kind.dtype).reshape(shape, order="F" if fortran else "C")
        self.value = array.astype(kind.dtype.newbyteorder("="))

    @classmethod
    def make(cls, data, kind, shape, order="C"):
        array = cls()
        array.__setstate__((1, shape, kind, order == "F", data))
        return array


class RestrictedUnpickler(pickle.Unpickler):
    """Reads numpy arrays and scalars, numbers, strings and containers; refuses everything else.

    A pickle is a program: whatever it names is imported, and what it names can be called. So only
    the names below exist for it, and they are classes and functions of ours that can do no harm.
    """

    ALLOWED = {
        "numpy.core.multiarray._reconstruct": lambda *_: PickledArray(),
        "numpy.core.numeric._frombuffer": PickledArray.make,
        "numpy.core.multiarray.scalar": lambda kind, data: PickledArray.make(data, kind, ()).value,
        "numpy.ndarray": None,  # an argument of _reconstruct, never called
        "numpy.dtype": PickledType,
        "_codecs.encode": lambda text, encoding: text.encode("latin1"),
        "collections.OrderedDict": PickledNames,
    }

    def find_class(self, module, name):
        full = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if full not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no weights need")
        return self.ALLOWED[full]


def read_file(path):
    """What a .pth or .pkl file holds, with nothing in it executed. Raises WeightsError."""
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"PK"
            file.seek(0)
            content = None if zipped else RestrictedUnpickler(file, encoding="latin1").load()
        if zipped or isinstance(content, int):  # torch's own format, or the one before it
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"There is no file {path}.") from None
    except IsADirectoryError:
        raise WeightsError(f"{path} is a folder; name the file of weights in it.") from None
    except Exception as error:  # whatever a truncated, foreign or malicious file brings about
        reason = f"{error}".partition("\n")[0][:200].rstrip(".") or type(error).__name__
        named = re.search(r"GLOBAL (\S+)", f"{error}")
        if named:  # torch's own message goes on to say how to execute it all the same
            reason = f"it names {named[1]}, which no weights need"
        raise WeightsError(f"{path} cannot be read as weights: {reason}.") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise WeightsError(f"{path} cannot be read as weights: it holds a {kind}, not tensors.")
    return content


def read_weights(path):
    """Tensors of a file by their names there, its format ("own" or of FORMATS), and all of it."""
    content = read_file(path)
    state = content
    for key in ("model", "blobs"):
        if isinstance(content.get(key), dict):
            state = content[key]
    try:
        arrays = {
            name: torch.from_numpy(value.value)
            for name, value in state.items()
            if isinstance(value, PickledArray)
        }
    except (AttributeError, TypeError) as error:  # an array without data, or of a type torch lacks
        raise WeightsError(f"{path} holds an array that is no tensor: {error}.") from None
    state = {n: v for n, v in (state | arrays).items() if isinstance(n, str) and torch.is_tensor(v)}
    if any("conv2_offset" in name for name in state):
        raise WeightsError(f"{path} has deformable convolutions, which this project does not have.")
    if "model_config" in content:
        return state, "own", content
    signs = {
        "proposal_generator.rpn_head.conv.weight": "detectron2",
        "layer1.0.conv1.weight": "torchvision",
        "features.0.weight": "torchvision",
        "res2_0_branch2a_w": "caffe2",
        "conv1_1_w": "caffe2",
    }
    for sign, kind in signs.items():
        if sign in state:
            return state, kind, content
    raise WeightsError(
        f"{path} holds weights, but with the names of no model known here (train.py, Detectron2's "
        "FPN detectors, torchvision's classification, Detectron's ImageNet models)."
    )


def translate(state, kind, model):
    """A state dict of another format with our names, and the names in it that were not used.

    Only names that the model has are translated; shapes are checked by `fill`.
    """
    if kind == "own":
        return dict(state), []
    if kind == "caffe2":
        folded = any(name.endswith("_bn_s") for name in state)
        state = {caffe2_name(name): tensor for name, tensor in state.items()}
        if folded:  # MSRA's files have BN's statistics folded into its scale and shift
            norms = [m for m in model.backbone.modules() if hasattr(m, "running_var")]
            if any(norm.weight.requires_grad for norm in norms):  # a frozen layer's does not
                raise WeightsError("This file has BN's scale and shift but not its statistics, "
                                   "which only fits a model with norm frozen_bn.")  # fmt: skip
            for name in [name for name in state if name.endswith("_norm.weight")]:
                module = name.removesuffix(".weight")
                state[f"{module}.running_mean"] = torch.zeros_like(state[name])
                state[f"{module}.running_var"] = torch.ones_like(state[name]) - 1e-5  # + eps is 1
    found, used = {}, set()
    for name in model.state_dict():
        foreign = foreign_name(name, kind, model.config["cascade"])
        if foreign in state:
            found[name] = convert(name, state[foreign], kind)
            used.add(foreign)
    for (ours, theirs), default in zip(STATISTICS_NAMES.items(), STATISTICS[kind]):
        value = torch.tensor(default, dtype=torch.float64)
        if theirs in state:
            value = state[theirs].double().flatten().flip(0) / 255
            used.add(theirs)
        found[ours] = value.view(3, 1, 1)
    return found, sorted(set(state) - used)


def fill(model, found, unused, path, verbose):
    """Copy tensors into the model, by our names, and say what was filled and what was not."""
    own = model.state_dict()
    counted = [name for name in own if not name.endswith("num_batches_tracked")]
    filled = [name for name in counted if name in found]
    left = [name for name in counted if name not in found]
    unused = unused + [name for name in found if name not in own]
    backbone = f"{model.config['backbone']} with norm {model.config['norm']}"
    if not any(name.startswith("backbone.") for name in filled):
        raise WeightsError(f"{path} has no weights for the backbone of this model, {backbone}.")
    for name in left:
        if name.startswith("backbone."):
            raise WeightsError(f"{path} is of another backbone than {backbone}: it has no {name}.")
    for name in unused:
        # E.g. of a deeper ResNet, or statistics of BN where the model has GN.
        if re.match(r"(backbone\.(?!fpn)|layer\d|features|res\d)(?!.*num_batches_tracked)", name):
            raise WeightsError(f"{path} is of another backbone than {backbone}: it has {name}.")
    for name in filled:
        theirs, ours = tuple(found[name].shape), tuple(own[name].shape)
        if theirs != ours:
            raise WeightsError(f"{path} does not fit this model: {name} has shape {theirs} in the "
                               f"file and {ours} in the model.")  # fmt: skip
    model.load_state_dict(found, strict=False)
    for name in STATISTICS_NAMES:  # a checkpoint made from here on tells of them
        loaded = getattr(model, name).flatten().tolist()
        if loaded != torch.tensor(model.config[name]).tolist():
            model.config[name] = tuple(loaded)
    if verbose:
        print(f"Weights   {path}: {len(filled)} tensors loaded, "
              f"{len(left)} left at their initialization{summary(left)}, "
              f"{len(unused)} in the file not used{summary(unused)}")  # fmt: skip


def summary(names):
    """The modules that names belong to, in a few words: " (rpn, box_heads, mask_head)"."""
    modules = list(dict.fromkeys(name.split(".")[0] for name in names))
    shown = ", ".join(modules[:4]) + (", ..." if len(modules) > 4 else "")
    return f" ({shown})" if modules else ""


def load_weights(model, path, verbose=True):
    """Fill a model from a file: our checkpoints, Detectron2's detectors (.pkl, .pth), torchvision's
    classification weights or Detectron's ImageNet pickles (the backbone); told by their contents.

    The image statistics that belong to the weights are set as well. A classifier for other classes
    is an error. Raises WeightsError naming the parameter where a shape does not fit, and where the
    file does not fill the backbone. Nothing in the file is executed.
    """
    state, kind, _ = read_weights(path)
    found, unused = translate(state, kind, model)
    fill(model, found, unused, path, verbose)


def infer_config(state):
    """The arguments of `build_model` for a detector in Detectron2's names, from names and shapes.

    Raises KeyError with the name of a parameter that a detector must have.
    """
    cascade = "roi_heads.box_head.0.fc1.weight" in state

    def named(name):
        return foreign_name(name, "detectron2", cascade)

    def count(name):
        return next(n for n in itertools.count() if named(name.format(n)) not in state)

    outputs, inputs = state[named("backbone.res2.0.conv2.conv.weight")].shape[:2]
    body = {
        "blocks": tuple(count(f"backbone.res{i}.{{}}.conv1.conv.weight") for i in (2, 3, 4, 5)),
        "groups": outputs // inputs,
        "width_per_group": inputs,
    }
    backbone = "resnet50"  # also for widths that have no name
    for name, changes in BACKBONES.items():
        if body.items() <= (DEFAULTS | changes).items():
            backbone = name
    norm = "frozen_bn"
    if named("fpn.lateral.0.norm.weight") in state:
        norm = "syncbn" if named("fpn.lateral.0.norm.running_mean") in state else "gn"
    classes = len(state[named("box_heads.0.classifier.weight")]) - 1
    deltas = len(state[named("box_heads.0.regressor.weight")])
    keypoints = state.get(named("keypoint_head.deconv.weight"))
    config = {
        "backbone": backbone,
        "norm": norm,
        "num_classes": classes,
        "masks": named("mask_head.predictor.weight") in state,
        "keypoints": 0 if keypoints is None else keypoints.shape[1],
        "cascade": cascade,
        **body,
        "box_head_convs": count("box_heads.0.convs.{}.conv.weight"),
        "box_head_fcs": count("box_heads.0.fcs.{}.weight"),
        "mask_head_convs": count("mask_head.convs.{}.conv.weight"),
        "keypoint_head_convs": count("keypoint_head.convs.{}.conv.weight"),
        "box_class_agnostic": deltas < 4 * classes,
        # Not in the file: what Detectron2's configurations for such models say.
        "stride_in_1x1": norm == "frozen_bn" and body["groups"] == 1,
        "roi_sampling_ratio": 0,
        "rpn_smooth_l1_beta": 0.0,
        "box_smooth_l1_beta": 0.0 if keypoints is None else 0.5,
    }
    for width, name in (
        ("stem_width", "backbone.stem.conv.weight"),
        ("fpn_channels", "fpn.lateral.0.conv.weight"),
        ("box_head_channels", "box_heads.0.convs.0.conv.weight"),
        ("box_head_fc_channels", "box_heads.0.fcs.0.weight"),
        ("mask_head_channels", "mask_head.convs.0.conv.weight"),
        ("keypoint_head_channels", "keypoint_head.convs.0.conv.weight"),
    ):
        if named(name) in state:
            config[width] = len(state[named(name)])
    return config


def load_model(path, verbose=True, **overrides):
    """Build the model that a file is of, and fill it; in evaluation mode.

    A checkpoint of train.py says everything, its `data_settings` included. For a detector of
    Detectron2 the architecture is inferred from names and shapes; what the file does not say is
    assumed (image_mean, image_std, stride_in_1x1, roi_sampling_ratio; printed), and can be given in
    `overrides` like any other argument of `build_model`. Raises WeightsError.
    """
    state, kind, content = read_weights(path)
    if kind not in ("own", "detectron2"):
        raise WeightsError(f"{path} is a backbone for fine-tuning ({kind}), not a detector; give "
                           "it to train.py --init, or to load_weights.")  # fmt: skip
    try:
        config = content["model_config"] if kind == "own" else infer_config(state)
        model = build_model(**config | overrides)
        model.data_settings = content["data"] if kind == "own" else model.data_settings
    except KeyError as error:
        raise WeightsError(f"{path} looks like a detector but has no {error}.") from None
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path} describes a model that cannot be built: {error}") from None
    found, unused = translate(state, kind, model)
    missing = [n for n in model.state_dict() if n not in found and "num_batches_tracked" not in n]
    if missing:
        raise WeightsError(f"{path} has no {missing[0]}; it is of another model, or incomplete.")
    for name in STATISTICS_NAMES:
        if name in overrides:
            found[name] = torch.tensor(overrides[name]).view(3, 1, 1)
    fill(model, found, unused, path, verbose)
    if kind == "detectron2" and verbose:
        known = [name for name, theirs in STATISTICS_NAMES.items() if theirs in state]
        inferred = ("backbone", "norm", "num_classes", "masks", "keypoints", "cascade")
        assumed = ("stride_in_1x1", "roi_sampling_ratio", "image_mean", "image_std")
        for title, names in (("Inferred ", inferred), ("Assumed  ", assumed)):
            names = [name for name in names if name not in overrides and name not in known]
            print(title, ", ".join(f"{name}={model.config[name]}" for name in names))
    return model.eval()
