"""Weights equal, our numbers are Detectron2's: checked against golden_*.npz, without Detectron2.

make_detectron2_golden.py made these files with Detectron2's own code. Weights, images and targets
are functions of seeds, shared by both; the files hold only what came out. The networks are narrow
but otherwise the published ones: R50-FPN with GN, SyncBN, frozen BN, cascade, keypoints.

Why the tolerances: both sides compute the same expressions in float32, but sums run in another
order wherever the code differs (one convolution against another layout, fused or not), and a CPU
differs from the next. That is some 1e-6 of a value's scale for each layer and adds up over 60 of
them: `close` allows 1e-4 of the largest value, where a mistake in the model makes 1e-2 and more. NMS
and top-k compare such numbers, so where two are as close as that, an object may come or go, or two
change places: lists of boxes are compared by partners, and one in a hundred may be without.
"""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import model as detector

WIDTHS = dict(
    num_classes=20, stem_width=32, width_per_group=32, fpn_channels=64, box_head_channels=64,
    box_head_fc_channels=64, mask_head_channels=64, keypoint_head_channels=64,
    rpn_pre_nms_top_n_train=500, rpn_post_nms_top_n_train=200,
    rpn_pre_nms_top_n_test=500, rpn_post_nms_top_n_test=200,
    # More than there are candidates: all of them are used, and nothing is random.
    rpn_batch_size_per_image=20000, box_batch_size_per_image=2000,
    roi_sampling_ratio=0, rpn_smooth_l1_beta=0.0, box_smooth_l1_beta=0.0,
    image_mean=(123.675 / 255, 116.28 / 255, 103.53 / 255), image_std=(1 / 255, 1 / 255, 1 / 255),
)  # fmt: skip

# Arguments of build_model
CASES = {
    "gn": dict(norm="gn", roi_sampling_ratio=2, rpn_smooth_l1_beta=1 / 9, box_smooth_l1_beta=1.0),
    "syncbn": dict(norm="syncbn", image_std=(58.395 / 255, 57.12 / 255, 57.375 / 255)),
    "frozen_bn": dict(norm="frozen_bn", stride_in_1x1=True),
    "cascade": dict(norm="frozen_bn", stride_in_1x1=True, cascade=True),
    "keypoints": dict(
        norm="frozen_bn", stride_in_1x1=True, num_classes=1, masks=False, keypoints=17,
        box_smooth_l1_beta=0.5,
    ),
}  # fmt: skip

# Weights of the predicting layers, in units of 1 / sqrt(inputs): about what makes their outputs spread
# by 2 (objectness, masks), 3 (classes), 0.3 and 0.5 (boxes).
GAINS = {
    "gn": dict(objectness_logits=2.2, anchor_deltas=0.4, cls_score=4.6, bbox_pred=0.7, predictor=6.0),
    "syncbn": dict(
        objectness_logits=0.33, anchor_deltas=0.045, cls_score=1.1, bbox_pred=0.17, predictor=0.33
    ),
    "frozen_bn": dict(
        objectness_logits=0.5, anchor_deltas=0.07, cls_score=0.4, bbox_pred=0.06, predictor=1.2
    ),
    "cascade": dict(
        objectness_logits=0.5, anchor_deltas=0.07, cls_score=0.43, bbox_pred=0.07, predictor=1.8
    ),
    "keypoints": dict(
        objectness_logits=0.5, anchor_deltas=0.07, cls_score=0.6, bbox_pred=0.035, score_lowres=0.6
    ),
}
SIZES = [(192, 250), (230, 160)]  # height, width
OUTPUT_SCALE = 1.5  # detections are mapped to an image of this size, and masks pasted there


def golden_arguments(case):
    return WIDTHS | CASES[case]


def golden_weights(case, shapes):
    """Tensors of these shapes for Detectron2's names, each drawn from a seed made of its name.

    Scaled so that activations neither vanish nor explode and there are detections of many classes.
    numpy's RandomState: its numbers are the same for ever.
    """
    weights = {}
    for name, shape in shapes.items():
        layer, _, parameter = name.rpartition(".")
        noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        if name.startswith("pixel_") or parameter == "num_batches_tracked":
            continue
        if len(shape) > 1:
            gain = GAINS[case].get(layer.rpartition(".")[2], 2**0.5)
            value = noise * gain / np.prod(shape[1:]) ** 0.5
            # What is the same in all RoIs must not decide the class: only patterns within them.
            if layer.endswith("fc1"):
                patterns = value.reshape(len(value), -1, 49)
                value = (patterns - patterns.mean(2, keepdims=True)).reshape(shape)
            elif layer.endswith("cls_score"):
                value = value - value.mean(1, keepdims=True)
        elif parameter == "running_var":
            value = np.exp(0.2 * noise)
            if "stem" in layer and CASES[case].get("image_std") is None:
                value *= 7200  # of an image in 0..255
        elif layer.endswith(".norm") and parameter == "weight":
            value = 1 + 0.1 * noise
            if "conv3" in layer:  # 16 sums of residuals do not explode then
                value *= 0.3
        else:
            value = 0.1 * noise
        weights[name] = torch.from_numpy(np.asarray(value, np.float32))
    return weights


def golden_images():
    """Two uint8 images [3, h, w], RGB: rectangles and noise; integers only."""
    images = []
    for seed, (h, w) in enumerate(SIZES):
        random = np.random.RandomState(seed)
        coarse = random.randint(0, 200, (3, h // 16 + 1, w // 16 + 1))
        image = np.kron(coarse, np.ones((1, 16, 16), int))[:, :h, :w]
        image = image + random.randint(0, 56, (3, h, w))
        for _ in range(12):
            x, y = random.randint(0, w - 30), random.randint(0, h - 30)
            image[:, y : y + random.randint(20, 90), x : x + random.randint(20, 90)] = random.randint(
                0, 256, (3, 1, 1)
            )
        images.append(torch.from_numpy(image.astype(np.uint8)))
    return images


def golden_targets(case):
    """For each image boxes, labels 1..K, elliptic masks and keypoints; integers and halves only."""
    arguments = golden_arguments(case)
    targets = []
    for seed, (h, w) in enumerate(SIZES):
        random = np.random.RandomState(100 + seed)
        boxes, masks, keypoints = [], [], []
        for _ in range(6 + seed):
            width, height = random.randint(16, 120, 2)
            x, y = random.randint(0, w - width), random.randint(0, h - height)
            boxes.append([x, y, x + width, y + height])
            rows, columns = np.mgrid[:h, :w]
            dx, dy = 2 * (columns - x) + 1 - width, 2 * (rows - y) + 1 - height
            masks.append((dx * height) ** 2 + (dy * width) ** 2 < (width * height) ** 2)
            points = random.randint(0, (w, h, 3), (17, 3)).astype(np.float32)
            points[:, :2] = np.clip(points[:, :2], (x, y), (x + width, y + height)) + 0.5
            keypoints.append(points * (points[:, 2:] > 0))
        targets.append({
            "boxes": torch.tensor(boxes, dtype=torch.float32),
            "labels": torch.from_numpy(random.randint(1, arguments["num_classes"] + 1, len(boxes))),
            "masks": torch.from_numpy(np.stack(masks)),
            "keypoints": torch.from_numpy(np.stack(keypoints)),
        })  # fmt: skip
    return targets


def subsample(array, most=600):
    """At most `most` numbers of an array, evenly spread (by a step that is no divisor of its sides)."""
    flat = np.asarray(array).reshape(-1)
    step = max(len(flat) // most, 1)
    return flat[:: step + (step % 2 == 0)]
