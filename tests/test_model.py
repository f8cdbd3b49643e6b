"""model.py against torchvision, float64, loops and closed forms."""

import dataclasses
import errno
import math
import os
import zipfile

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FeaturePyramidNetwork, box_iou, roi_align

import model as detector
from model import build_model

SMALL = dict(
    blocks=(1, 1, 1, 1), stem_width=32, width_per_group=32, fpn_channels=32, box_head_convs=1,
    box_head_channels=32, box_head_fc_channels=64, mask_head_convs=1, mask_head_channels=32,
    keypoint_head_convs=1, keypoint_head_channels=32, num_classes=5,
    rpn_pre_nms_top_n_train=50, rpn_post_nms_top_n_train=30, rpn_post_nms_top_n_test=30,
)  # fmt: skip
EXHAUSTIVE = dict(  # more than there are candidates, of either kind
    rpn_batch_size_per_image=4000, box_batch_size_per_image=800,
    rpn_positive_fraction=0.9, box_positive_fraction=0.9,
)  # fmt: skip


def small_model(seed=0, **hyper):
    torch.manual_seed(seed)
    return build_model(**(SMALL | hyper))


@torch.no_grad()
def predict_always(head, move, bias):
    """The box head predicts these deltas [regressors, 4] and logits for every RoI."""
    head.classifier.weight.zero_()
    head.regressor.weight.zero_()
    head.classifier.bias.copy_(bias)
    head.regressor.bias.copy_(move.flatten())


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_boxes(n, g, size=96.0):
    corners = torch.rand(n, 2, 2, generator=g) * size
    low, high = corners.amin(dim=1), corners.amax(dim=1)
    return torch.cat([low, high + 1], dim=1)


def make_target(boxes, labels, height, width, seed=0, keypoints=True):
    """A target whose masks are the lower triangles of its boxes and whose keypoints lie inside."""
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    y = (torch.arange(height) + 0.5)[:, None]
    x = (torch.arange(width) + 0.5)[None]
    x1, y1, x2, y2 = boxes[:, :, None, None].unbind(1)
    across, down = (x - x1) / (x2 - x1), (y - y1) / (y2 - y1)
    target = {
        "boxes": boxes,
        "labels": torch.tensor(labels, dtype=torch.int64),
        "masks": (across > 0) & (down < 1) & (across < down),
        "seed": seed,
    }
    if keypoints:
        at = torch.rand(len(boxes), 17, 2, generator=generator(seed))
        xy = boxes[:, None, :2] + at * (boxes[:, None, 2:] - boxes[:, None, :2])
        target["keypoints"] = torch.cat([xy, torch.full((len(boxes), 17, 1), 2.0)], dim=2)
    return target


def make_images(*shapes):
    g = generator(0)
    return [torch.randint(256, (3, *s), generator=g).byte() for s in shapes]


# -- Config --------------------------------------------------------------------------------------


SETTINGS = [
    ("anchor_sizes", ((32,), (64,))),  # of a model with five levels
    ("anchor_sizes", ((16, 32), (64,), (128,), (256,), (512,))),
    ("anchor_sizes", (32, 64, 128, 256, 512)),
    ("cascade_fg_iou_thresh", (0.5, 0.6, 0.7)),
    ("box_class_agnostic", False),  # of a cascade
    ("backbone", "transformer"), ("norm", "layer"), ("norm", None), ("no_such_field", 1),
    ("num_classes", 0), ("num_classes", True), ("num_classes", 3.0), ("masks", 1),
    ("image_mean", (122.8, 115.9, 103.0)),  # in 0..255
    ("image_std", (0.0, 1.0, 1.0)), ("image_std", (math.nan, 1.0, 1.0)),
    ("image_std", [0.2, 0.2, 0.2]), ("freeze_at", -1), ("freeze_at", 6), ("rpn_nms_thresh", 7),
    ("box_fg_iou_thresh", 0.0),
    ("box_batch_size_per_image", 10**12),
    ("bbox_reg_weights", (10.0, 10.0, 5.0)), ("bbox_reg_weights", (10.0, 10.0, 5.0, 0.0)),
]  # fmt: skip


@pytest.mark.parametrize("name, value", SETTINGS)
def test_settings_that_cannot_be_meant_are_refused(name, value):
    with pytest.raises(ValueError) as error:
        small_model(**{"cascade": True} | {name: value})
    message = str(error.value)
    assert name in message or "box_class_agnostic" in message
    assert message.endswith(".") and "\n" not in message and len(message) < 200


def test_config_is_what_was_asked_for_and_what_it_implies():
    narrow = {"stem_width": 8, "box_head_fc_channels": 16}  # and so fast to build
    config = build_model("vgg16", "none", 7, masks=False, **narrow).config
    assert (config.num_classes, config.box_head_fcs, config.box_head_convs) == (7, 2, 0)
    assert config.image_std[0] > 0.2  # Choice 8
    assert dataclasses.replace(config, num_classes=3).anchor_sizes == config.anchor_sizes
    assert small_model(cascade=True).config.box_class_agnostic
    assert build_model(norm="frozen_bn", **SMALL).config.box_head_fcs == 2


# -- Boxes ---------------------------------------------------------------------------------------


def test_iou_is_torchvisions_and_zero_for_empty_boxes():
    g = generator(1)
    truth, boxes = random_boxes(7, g), random_boxes(60, g)
    boxes[0] = truth[0]
    boxes[1] = torch.tensor([5.0, 5, 5, 5])
    boxes[2] = torch.tensor([30.0, 10, 20, 40])  # x2 < x1
    truth[1] = boxes[1]  # 0 / 0
    expected = box_iou(truth.double(), boxes.double())
    expected[:, 1:3] = 0
    expected[1] = 0
    torch.testing.assert_close(detector.pairwise_iou(truth[None], boxes[None])[0], expected.float())
    # one set of boxes for all images, as anchors are
    both = detector.pairwise_iou(torch.stack([truth, truth + 3]), boxes[None])
    torch.testing.assert_close(both[1], detector.pairwise_iou(truth[None] + 3, boxes[None])[0])


def test_box_coding_is_torchvisions_and_its_own_inverse():
    weights = (10.0, 9.0, 5.0, 4.0)
    g = generator(2)
    truth, boxes = random_boxes(50, g), random_boxes(50, g)
    coder = BoxCoder(weights)
    deltas = detector.encode_boxes(truth, boxes) * torch.tensor(weights)
    torch.testing.assert_close(deltas, coder.encode_single(truth, boxes), atol=1e-5, rtol=1e-5)
    # coordinates up to 100 with some 6 roundings of 2^-24 relative each: 1e-4
    back = detector.decode_boxes(deltas / torch.tensor(weights), boxes)
    torch.testing.assert_close(back, truth, atol=1e-4, rtol=0)
    deltas = 30 * torch.randn(50, 4, generator=g)  # beyond the clip of dw and dh, log(1000 / 16)
    expected = coder.decode_single(deltas.double(), boxes.double())
    decoded = detector.decode_boxes(deltas / torch.tensor(weights), boxes)
    torch.testing.assert_close(decoded.double(), expected, atol=1e-3, rtol=1e-5)


def test_anchors_in_closed_form():
    shapes, strides, sizes = ((3, 5), (2, 3)), (4, 8), ((32,), (64, 100))
    anchors = detector.make_anchors(shapes, strides, sizes, (0.5, 1.0, 2.0), "cpu")
    for level, (h, w), stride, level_sizes in zip(anchors, shapes, strides, sizes):
        expected = []
        for y in range(h):
            for x in range(w):
                for size in level_sizes:
                    for ratio in (0.5, 1.0, 2.0):
                        half_w = 0.5 * size * ratio**-0.5
                        half_h = 0.5 * size * ratio**0.5
                        cx, cy = x * stride, y * stride
                        expected.append([cx - half_w, cy - half_h, cx + half_w, cy + half_h])
        # float32: coordinates up to 71 are known to 4e-6
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(level.double(), expected, atol=1e-5, rtol=0)


# -- Matching and sampling -----------------------------------------------------------------------


def test_rpn_matching_against_a_loop():
    rpn = small_model().rpn
    g = generator(3)
    anchors = random_boxes(300, g)
    truth = random_boxes(4, g)
    truth[2] += 500  # overlaps no anchor: and so makes none positive
    # The last one's best anchors have IoU 0.5, and there are two of them: both are kept.
    truth[3] = torch.tensor([200.0, 200, 210, 210])
    special = [[200.0, 200, 210, 220], [200, 200, 220, 210], [200, 200, 210, 225]]
    anchors = torch.cat([anchors, torch.tensor(special)])
    # the second image has one object, the third none
    valid = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    matched, labels = rpn.match(anchors, detector.Truth(truth * valid[..., None], None))
    assert labels[:, -3:].tolist() == [[1, 1, -1], [0, 0, 0], [0, 0, 0]]
    for image in range(3):
        objects = [k for k in range(4) if valid[image, k]]
        iou = box_iou(truth, anchors)
        highest = {k: iou[k].max() for k in objects}
        for a in range(len(anchors)):
            best = max([iou[k, a] for k in objects], default=0.0)
            low_quality = any(iou[k, a] == highest[k] > 0 for k in objects)
            expected = 1 if best >= 0.7 or low_quality else 0 if best < 0.3 else -1
            assert labels[image, a] == expected, (image, a)
            if best > 0:
                assert iou[matched[image, a], a] == best and valid[image, matched[image, a]]


def test_sampling_counts_fractions_and_validity():
    labels = torch.full((3, 1000), -1)
    labels[0, :300] = 1
    labels[0, 300:900] = 0
    labels[1, :10] = 2
    labels[1, 500:700] = 0
    labels[2, 7:9] = 0
    seeds = torch.tensor([1, 2, 3])
    index, valid = detector.sample(labels, 100, 0.25, seeds)
    chosen = [labels[i, index[i, valid[i]]] for i in range(3)]
    assert [(c > 0).sum().item() for c in chosen] == [25, 10, 0]
    assert [(c == 0).sum().item() for c in chosen] == [75, 90, 2]
    assert all((c >= 0).all() for c in chosen)
    for i in range(3):
        assert len(index[i, valid[i]].unique()) == valid[i].sum()  # nothing twice
    # a batch size above the number of candidates: all of them
    index, valid = detector.sample(labels, 5000, 0.9, seeds)
    assert valid.sum(dim=1).tolist() == [900, 210, 2]


def test_sampling_is_a_function_of_the_seed_and_uniform():
    # image seeds use all 63 bits
    targets = [{"seed": i * 2**40 + 12345} for i in range(2000)]
    seeds, other_seeds = detector.sampling_seeds(targets, "cpu")  # anchors, RoIs
    labels = torch.zeros(len(seeds), 40, dtype=torch.int64)
    labels[:, :20] = 1
    index, valid = detector.sample(labels, 10, 0.5, seeds)
    torch.manual_seed(1)  # not the state of a generator
    again, _ = detector.sample(labels[5:6], 10, 0.5, seeds[5:6])
    assert valid[:, :5].all() and torch.equal(again[0], index[5])  # nor the place in the batch
    other, _ = detector.sample(labels[5:6], 10, 0.5, other_seeds[5:6])
    assert not torch.equal(other[0], index[5])
    # Every positive is drawn in 5 / 20 of 2000 images: 500 +- sqrt(2000 * 1/4 * 3/4) = 19.4. The
    # sum of 20 squared deviations in these units is chi-square-like: 19 +- 6.2; 50 is 5 sigma.
    # In the order of drawing, the first is uniform over the 20 as well: 100 +- 9.7.
    positive = index[:, :5]
    counts = positive.flatten().bincount(minlength=20).double()
    assert ((counts - 500) / 19.4).square().sum() < 50 and counts[20:].sum() == 0
    first = positive[:, 0].bincount(minlength=20).double()
    assert ((first - 100) / 9.7).square().sum() < 50
    # neighbouring positions and neighbouring seeds do not go together
    keys = detector.random_keys(torch.arange(500), 500).double()
    for a, b in ((keys[:, 1:], keys[:, :-1]), (keys[1:], keys[:-1])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(500 * 499)
    assert not torch.equal(keys[0], keys[1])


# -- Backbone and FPN ----------------------------------------------------------------------------


def randomize_norms(module):
    g = generator(5)
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.GroupNorm):
                m.weight.copy_(0.5 + torch.rand(m.weight.shape, generator=g))
                m.bias.copy_(torch.randn(m.bias.shape, generator=g))


def torchvision_name(name):
    """Our name of a ResNet parameter as torchvision's."""
    parts = name.split(".")
    if parts[0] == "stem":
        return ".".join([{"conv": "conv1", "norm": "bn1"}[parts[1]], parts[2]])
    layer, block, conv, kind, parameter = parts
    if conv == "shortcut":
        theirs = "downsample." + {"conv": "0", "norm": "1"}[kind]
    else:
        theirs = conv if kind == "conv" else conv.replace("conv", "bn")
    return f"layer{int(layer[3:]) - 1}.{block}.{theirs}.{parameter}"


@pytest.mark.parametrize(
    "backbone, groups, width", [("resnet50", 1, 64), ("resnext152_8x32d", 8, 32)]
)
def test_backbone_is_torchvisions_with_group_norm(backbone, groups, width):
    blocks = (3, 4, 6, 3) if groups == 1 else (1, 1, 2, 1)
    torch.manual_seed(0)
    ours = detector.build_model(backbone, blocks=blocks, fpn_channels=32, masks=False).backbone
    randomize_norms(ours)
    theirs = torchvision.models.ResNet(
        Bottleneck, blocks, groups=groups, width_per_group=width,
        norm_layer=lambda channels: nn.GroupNorm(32, channels),
    )  # fmt: skip
    state = {torchvision_name(name): value for name, value in ours.state_dict().items()}
    rest = theirs.load_state_dict(state, strict=False)
    assert rest.missing_keys == ["fc.weight", "fc.bias"] and not rest.unexpected_keys
    ours, theirs = ours.double(), theirs.double()
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64, generator=generator(6))
    with torch.no_grad():
        features = ours(x)
        y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        for i, feature in enumerate(features):
            y = getattr(theirs, f"layer{i + 1}")(y)
            assert feature.shape[-1] * 4 * 2**i == 96
            torch.testing.assert_close(feature, y)


@pytest.mark.parametrize("norm, times", [("gn", 2), ("bn", 1), ("syncbn", 1)])
def test_recompute_computes_the_largest_maps_again_but_never_takes_statistics_twice(norm, times):
    backbone = detector.build_model(norm=norm, **SMALL).backbone.train()
    x = torch.randn(2, 3, 64, 96)
    runs = []
    backbone.res2.register_forward_pre_hook(lambda *_: runs.append(1))

    def gradients():
        backbone.zero_grad()
        sum(level.square().sum() for level in backbone(x)).backward()
        return [p.grad.clone() for p in backbone.parameters()]

    kept = gradients()
    assert len(runs) == 1  # off by default
    backbone.recompute = True
    assert all(torch.equal(a, b) for a, b in zip(kept, gradients()))
    assert len(runs) == 1 + times


@pytest.mark.parametrize("norm", ["gn", "none"])
def test_fpn_is_torchvisions(norm):
    torch.manual_seed(0)
    ours = detector.FPN([32, 64, 128, 256], 32, norm).double()
    randomize_norms(ours)
    theirs = FeaturePyramidNetwork(
        [32, 64, 128, 256], 32, torchvision.ops.feature_pyramid_network.LastLevelMaxPool(),
        norm_layer=(lambda channels: nn.GroupNorm(32, channels)) if norm == "gn" else None,
    ).double()  # fmt: skip
    state = {}
    for name, value in ours.state_dict().items():  # biases of convolutions are there without a norm
        part, i, layer, parameter = name.split(".")
        part = {"lateral": "inner_blocks", "output": "layer_blocks"}[part]
        state[f"{part}.{i}.{ {'conv': 0, 'norm': 1}[layer] }.{parameter}"] = value
    theirs.load_state_dict(state)
    g = generator(7)
    levels = [
        torch.randn(2, 32 * 2**i, 32 // 2**i, 48 // 2**i, dtype=torch.float64, generator=g)
        for i in range(4)
    ]
    expected = theirs({str(i): level for i, level in enumerate(levels)})
    for feature, reference in zip(ours(levels), expected.values(), strict=True):
        torch.testing.assert_close(feature, reference)


def test_padding_is_zero_after_normalization_and_uint8_equals_float():
    model = small_model(image_mean=(0.5, 0.4, 0.3), image_std=(0.2, 0.3, 0.1))
    images = make_images((50, 40), (33, 64))
    batch, sizes = model.batch(images)
    assert batch.shape == (2, 3, 64, 64) and sizes == [(50, 40), (33, 64)]
    for out, image, (h, w) in zip(batch, images, sizes):
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.1)))
        torch.testing.assert_close(out[:, :h, :w], (image / 255 - mean) / std)
        assert out[:, h:].eq(0).all() and out[:, :, w:].eq(0).all()
    floats, _ = model.batch([image / 255 for image in images])
    torch.testing.assert_close(floats, batch)


# -- RoIs ----------------------------------------------------------------------------------------


def test_pooling_is_roi_align_on_the_level_of_the_fpn_paper():
    g = generator(8)
    strides = [4, 8, 16, 32]
    features = [torch.randn(2, 3, 1024 // s, 1024 // s, generator=g) for s in strides]
    sides = [3.0, 111.9, 112, 200, 223.9, 224, 300, 447.9, 448, 900, 60, 1000]
    rois = [[i % 2, 10.5, 20.25, 10.5 + s, 20.25 + s] for i, s in enumerate(sides)]
    rois += [[1, 5, 5, 5, 90], [0, 100, 100, 900, 130], [0, 3, 3, 3, 3]]  # empty, narrow, a point
    rois = torch.tensor(rois)
    pooled = detector.multilevel_roi_align(features, strides, rois, 7, 2)
    levels = []
    for roi, ours in zip(rois, pooled, strict=True):
        x1, y1, x2, y2 = roi[1:].double().tolist()
        side = math.sqrt((x2 - x1) * (y2 - y1))
        level = math.floor(4 + math.log2(side / 224)) if side > 0 else 2
        level = min(max(level, 2), 5) - 2
        levels.append(level)
        expected = roi_align(
            features[level].double(), roi[None].double(), 7, 1 / strides[level], 2, aligned=True
        )[0]
        torch.testing.assert_close(ours.double(), expected, atol=1e-4, rtol=1e-4)
    assert set(levels) == {0, 1, 2, 3}


def test_mask_targets_of_whole_pixels():
    masks = torch.rand(2, 80, 90, generator=generator(9)) < 0.5
    target = {"masks": masks}
    rois = torch.tensor([[0, 10, 20, 38, 48], [0, 5, 3, 61, 59], [1, 30, 40, 58, 68]]).float()
    targets = detector.mask_targets([target, target], rois, torch.tensor([1, 0, 0]), [2, 1], 28)
    # an RoI of 28 x 28 pixels is cut out
    assert torch.equal(targets[0].bool(), masks[1, 20:48, 10:38])
    assert torch.equal(targets[2].bool(), masks[0, 40:68, 30:58])
    # one of 56 x 56 is averaged over 2 x 2 pixels; half of them is foreground
    means = F.avg_pool2d(masks[0, 3:59, 5:61].double()[None], 2)[0]
    assert (means == 0.5).any() and torch.equal(targets[1].bool(), means >= 0.5)


def test_keypoint_targets_in_closed_form():
    box = torch.tensor([[10.0, 20, 66, 132]])  # cells of 1 x 2 pixels
    points = [(10, 20), (10.99, 21.9), (11, 22), (66, 132), (66.01, 30), (30, 19.9), (40, 60)]
    visible = [1, 2, 1, 2, 2, 2, 0]
    keypoints = torch.tensor([[(x, y, v) for (x, y), v in zip(points, visible)]]).float()
    cell, valid = detector.keypoint_targets(keypoints, box, 56)
    assert valid[0].tolist() == [True, True, True, True, False, False, False]
    assert cell[0, :4].tolist() == [0, 0, 57, 56 * 56 - 1]
    assert ((cell >= 0) & (cell < 56 * 56)).all()


def test_keypoints_are_decoded_where_they_were_encoded():
    g = generator(10)
    n, size = 40, 56
    low = torch.rand(n, 2, generator=g) * 100
    boxes = torch.cat([low, low + 56 + torch.rand(n, 2, generator=g) * 200], dim=1)
    at = torch.rand(n, 17, 2, generator=g)
    xy = boxes[:, None, :2] + at * (boxes[:, None, 2:] - boxes[:, None, :2])
    keypoints = torch.cat([xy, torch.ones(n, 17, 1)], dim=2)
    cell, valid = detector.keypoint_targets(keypoints, boxes, size)
    assert valid.all()
    # A peak with falling flanks: half a cell is lost by the floor, as much by bicubic resizing.
    line = torch.arange(size)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)
    centre = torch.stack([cell % size, cell // size], dim=-1)[:, :, None, None]  # [n, 17, 1, 1, 2]
    heatmaps = 10 - (grid - centre).square().sum(dim=-1).float()
    decoded, scores = detector.decode_keypoints(heatmaps, boxes)
    cells = (boxes[:, None, 2:] - boxes[:, None, :2]) / size
    assert ((decoded[..., :2] - xy).abs() <= cells + 1e-3).all()
    assert decoded[..., 2].eq(1).all()
    # On a box of 56 x 56 pixels nothing is resized: the exact centre, the exact softmax.
    box = torch.tensor([[7.5, 3.25, 63.5, 59.25]])
    decoded, scores = detector.decode_keypoints(heatmaps[:1], box)
    torch.testing.assert_close(decoded[0, :, :2], centre[0, :, 0, 0] + 0.5 + box[0, :2])
    expected = heatmaps[0].double().flatten(1).softmax(dim=1).amax(dim=1)
    torch.testing.assert_close(scores[0].double(), expected, atol=0, rtol=1e-4)


# -- Losses --------------------------------------------------------------------------------------


def scene(keypoints=True):
    """Two images of different sizes with 3 and 2 objects."""
    images = make_images((120, 96), (100, 128))
    boxes = [
        [[8, 10, 50, 60], [30, 40, 90, 110], [60, 5, 92, 30]],
        [[5, 5, 100, 90], [70, 60, 120, 95]],
    ]
    targets = [
        make_target(b, k, *image.shape[-2:], seed=i, keypoints=keypoints)
        for i, (b, k, image) in enumerate(zip(boxes, ([1, 3, 5], [2, 3]), images))
    ]
    return images, targets


def test_losses_at_initialization_are_what_theory_says():
    classes = 80
    torch.manual_seed(0)
    model = build_model(
        blocks=(1, 1, 1, 1), num_classes=classes, fpn_channels=64, box_head_channels=64,
        mask_head_channels=64, rpn_post_nms_top_n_train=200, box_head_convs=1,
    ).train()  # fmt: skip
    g = generator(11)
    images = make_images((128, 128), (128, 128))
    targets = []
    for i in range(2):
        boxes = random_boxes(40, g, 120)
        labels = (torch.arange(40) + 40 * i + 1).tolist()
        targets.append(make_target(boxes.tolist(), labels, 128, 128, i))
    with torch.no_grad():
        losses = {name: loss.item() for name, loss in model(images, targets).items()}
    # Logits are small: the classifier's have variance 1024 * 0.01^2 * E[h^2], h <= 1 on average
    # (GN, ReLU, Xavier, ReLU), which adds variance / 2 = 0.05 at most.
    assert abs(losses["loss_classifier"] - math.log(classes + 1)) < 0.1
    # The RPN's: 64 * 0.01^2 * E[h^2], h^2 about 9 * 64 * 0.01^2: 4e-4, / 8.
    assert abs(losses["loss_objectness"] - math.log(2)) < 0.01
    # The mask predictor is He-initialized (fan out: 2 / K); GN and ReLU leave E[x^2] = 1/2, the
    # deconvolution (fan out 4 C) 1/4, ReLU 1/8. So the logits z have variance v = C / (4 K), and
    # E[softplus(z) - z t] = ln 2 + v / 8 at most, + E[z (1/2 - t)]: mean 0, and with 80 classes
    # of independent weights of standard deviation sqrt(v) / 2 / sqrt(80) at most.
    v = 64 / (4 * classes)
    sigma = math.sqrt(v) / 2 / math.sqrt(classes)
    assert math.log(2) - 4 * sigma < losses["loss_mask"] < math.log(2) + v / 8 + 4 * sigma
    # Box targets of the RPN are O(1) for 1 of 9 samples; those of the box head are larger by 5-10.
    assert 0 < losses["loss_rpn_box_reg"] < 1 and 0 < losses["loss_box_reg"] < 1


def test_losses_against_a_reference_per_image():
    # Exhaustive sampling leaves nothing to chance; every image is worked out by itself.
    model = small_model(
        **EXHAUSTIVE | dict(rpn_pre_nms_top_n_train=300, rpn_post_nms_top_n_train=300)
    ).train()
    randomize_norms(model)
    with torch.no_grad():  # predictions that are not nearly zero
        for layer in (model.rpn.objectness, model.rpn.deltas, model.box_heads[0].regressor):
            layer.weight.mul_(30)
    images, targets = scene(keypoints=False)
    with torch.no_grad():
        losses = model(images, targets)
        batch, sizes = model.batch(images)
        features = model.features(batch)
        objectness, deltas, anchors = model.rpn(features)
        proposals, valid = model.rpn.proposals(objectness, deltas, anchors, sizes)
        objectness, deltas, anchors = (
            torch.cat(objectness, 1), torch.cat(deltas, 1), torch.cat(anchors)
        )  # fmt: skip
        sums = {"rpn": 0, "rpn_box": 0, "class": 0, "box": 0, "mask": 0}
        rois_in_all, mask_pixels = 0, 0
        for i, target in enumerate(targets):
            truth = target["boxes"]
            iou, matched = box_iou(truth, anchors).max(dim=0)
            best = box_iou(truth, anchors).max(dim=1, keepdim=True).values
            positive = (iou >= 0.7) | (box_iou(truth, anchors) == best).any(dim=0)
            used = positive | (iou < 0.3)
            p = objectness[i].double().sigmoid()
            sums["rpn"] -= torch.where(positive, p, 1 - p).log()[used].sum()
            goal = BoxCoder((1.0, 1, 1, 1)).encode_single(truth[matched], anchors)
            error = (goal - deltas[i]).abs()[positive].double()
            beta = 1 / 9
            smooth = torch.where(error < beta, 0.5 * error.square() / beta, error - 0.5 * beta)
            sums["rpn_box"] += smooth.sum()

            rois = torch.cat([proposals[i][valid[i]], truth])
            iou, matched = box_iou(truth, rois).max(dim=0)
            labels = torch.where(iou >= 0.5, target["labels"][matched], 0)
            head_input = torch.cat([torch.full((len(rois), 1), float(i)), rois], dim=1)
            logits, box_deltas = model.box_heads[0](model.pool(features, head_input, 7))
            p = logits.double().softmax(dim=1)
            sums["class"] -= p[torch.arange(len(p)), labels].log().sum()
            rois_in_all += len(rois)
            goal = BoxCoder((10.0, 10, 5, 5)).encode_single(truth[matched], rois)
            for r in (labels > 0).nonzero()[:, 0].tolist():
                error = (goal[r] - box_deltas[r, labels[r] - 1]).abs().double()
                sums["box"] += torch.where(error < 1, 0.5 * error.square(), error - 0.5).sum()
                here = head_input[r : r + 1]
                mask = model.mask_head(model.pool(features, here, 14), labels[r : r + 1])
                crop = here.clone()
                crop[:, 0] = 0
                bits = target["masks"][matched[r]][None, None].float()
                bits = roi_align(bits, crop, 28, aligned=True)[0] >= 0.5
                p = mask.double().sigmoid()
                sums["mask"] -= torch.where(bits, p, 1 - p).log().sum()
                mask_pixels += 28 * 28
    expected = {
        "loss_objectness": sums["rpn"] / (4000 * 2),
        "loss_rpn_box_reg": sums["rpn_box"] / (4000 * 2),
        "loss_classifier": sums["class"] / rois_in_all,
        "loss_box_reg": sums["box"] / rois_in_all,
        "loss_mask": sums["mask"] / mask_pixels,
    }
    assert losses.keys() == expected.keys()
    assert mask_pixels > 10 * 28 * 28 and sums["box"] > 0.01
    for name, loss in losses.items():
        torch.testing.assert_close(loss.double(), expected[name], atol=1e-5, rtol=1e-4, msg=name)


def without_proposals(model):
    """Every box is moved far out of the image, where clipping leaves nothing of it."""
    with torch.no_grad():
        model.rpn.deltas.bias[0::4] = 1e4
    return model


@pytest.mark.parametrize("proposals", [True, False])
@pytest.mark.parametrize(
    "objects", ["two empty images", "one empty image", "one-pixel boxes", "boxes without area"]
)
@pytest.mark.parametrize("kind", ["gn", "cascade", "syncbn"])
def test_odd_batches_train_and_predict(kind, objects, proposals):
    norm = kind if kind != "cascade" else "gn"
    model = small_model(norm=norm, cascade=kind == "cascade", keypoints=17)
    if not proposals:
        without_proposals(model)
    images, targets = scene()
    for i, target in enumerate(targets):
        if objects == "one-pixel boxes":
            boxes = [[3, 4, 4, 5], [50, 60, 51, 61]]
            targets[i] = make_target(boxes, [1, 2], *images[i].shape[-2:])
        elif objects == "boxes without area":  # of which half the draws would take one as a RoI
            flat = [[n, 10, n, 20] for n in range(8)]
            target["boxes"][-1:] = torch.tensor([[30.0, 10, 70, 10]])
            more = make_target(flat, [1] * 8, *images[i].shape[-2:])
            targets[i] = {
                k: v if k == "seed" else torch.cat([v, more[k]]) for k, v in target.items()
            }
        elif i == 0 or objects == "two empty images":
            targets[i] = {k: v if k == "seed" else v[:0] for k, v in target.items()}
    losses = model.train()(images, targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name  # DDP would wait for it for ever
        assert parameter.grad.isfinite().all(), name
    detections = model.eval()(images)
    for d in detections:
        n = len(d["boxes"])
        assert d["boxes"].shape == (n, 4) and d["labels"].shape == d["scores"].shape == (n,)
        assert d["masks"].shape == (n, 28, 28) and d["keypoints"].shape == (n, 17, 3)
        assert d["keypoints_scores"].shape == (n, 17)
        assert proposals or n == 0


def test_images_of_a_batch_do_not_influence_one_another():
    # Group normalization sees one image. The tolerance is float32's, for sums in another order.
    model = small_model(keypoints=3, box_score_thresh=0.0, box_detections_per_img=20).eval()
    images = make_images((96, 128), (96, 128))
    with torch.no_grad():
        together = model(images)
        features = model.features(model.batch(images)[0])
        for i, image in enumerate(images):
            for level, own in zip(features, model.features(model.batch([image])[0])):
                torch.testing.assert_close(level[i : i + 1], own, atol=1e-4, rtol=1e-4)
            (alone,) = model([image])
            assert len(alone["boxes"]) == 20
            for name, value in alone.items():
                torch.testing.assert_close(together[i][name], value, atol=2e-3, rtol=1e-3)


def test_labels_count_from_one_and_boxes_belong_to_their_class():
    model = small_model(masks=False).eval()
    # Class 3's box: moved right by its own width, twice as high. The clip to the image applies.
    moves = torch.zeros(5, 4)
    moves[2] = torch.tensor([10.0, 0, 0, 5 * math.log(2)])
    predict_always(
        model.box_heads[0], moves, torch.tensor([0, 0, 0, 9.0, 0, 0])
    )  # background, 1, ...
    with torch.no_grad():
        images = make_images((100, 100))
        proposals = torch.tensor([[[10.0, 10, 30, 30], [10, 40, 30, 60], [70, 70, 95, 90]]])
        features = model.features(model.batch(images)[0])
        valid = torch.tensor([[True, True, True]])
        ((scores, boxes),) = model.box_predictions(features, proposals, valid, [(100, 100)])
        found = model.postprocess(scores, boxes)
    assert found["labels"].tolist() == [3, 3, 3]
    expected = [[30.0, 0, 50, 40], [30, 30, 50, 70], [95, 60, 100, 100]]
    order = found["boxes"][:, 1].argsort()
    torch.testing.assert_close(found["boxes"][order], torch.tensor(expected), atol=1e-4, rtol=0)
    softmax = math.exp(9) / (math.exp(9) + 5)
    torch.testing.assert_close(found["scores"], torch.full((3,), softmax))


def test_masks_are_the_maps_of_their_class():
    model = small_model().eval()
    factor, bias = torch.arange(1.0, 6.0), torch.randn(5, generator=generator(13))
    with torch.no_grad():  # class c's map is c * (the same for all) + the class's own bias
        model.mask_head.predictor.weight.copy_(0.02 * factor.view(5, 1, 1, 1).expand(5, 32, 1, 1))
        model.mask_head.predictor.bias.copy_(bias)
        features = model.features(model.batch(make_images((64, 64), (64, 64)))[0])
        boxes, labels = torch.tensor([[5.0, 5, 40, 30]]), torch.tensor([5, 1, 4, 2, 3])
        both = model.mask_probabilities(
            features, [boxes, boxes.expand(5, 4)], [torch.tensor([1]), labels]
        )
    assert [masks.shape for masks in both] == [(1, 28, 28), (5, 28, 28)]
    logits = both[1].double().logit()
    common = logits[1] - bias[0]
    assert common.max() > 0.1
    for logit, label in zip(logits, labels.tolist()):
        torch.testing.assert_close(
            logit, label * common + bias[label - 1], atol=1e-4, rtol=1e-4, msg=str(label)
        )


# -- Cascade -------------------------------------------------------------------------------------


def test_cascade_stages_start_from_the_boxes_of_the_stage_before(monkeypatch):
    model = small_model(cascade=True, **EXHAUSTIVE).train()
    images, targets = scene(keypoints=False)
    moves = [(1.0, 0.5, 0.2, 0.4), (-1.0, 2.0, 0.3, -0.1)]  # what stages 1 and 2 always predict
    with torch.no_grad():
        for head, move in zip(model.box_heads, moves):
            head.regressor.weight.zero_()
            head.regressor.bias.copy_(torch.tensor(move))
    seen, labels_seen = [], []
    pool, cross_entropy = model.pool, detector.F.cross_entropy

    def record(features, rois, size, *placing):
        seen.append((size, rois.clone()))
        return pool(features, rois, size, *placing)

    def record_labels(logits, labels, **arguments):
        labels_seen.append(labels)
        return cross_entropy(logits, labels, **arguments)

    monkeypatch.setattr(model, "pool", record)
    monkeypatch.setattr(detector.F, "cross_entropy", record_labels)
    losses = model(images, targets)
    names = {f"loss_{kind}_{stage}" for kind in ("classifier", "box_reg") for stage in (1, 2, 3)}
    assert set(losses) == names | {"loss_objectness", "loss_rpn_box_reg", "loss_mask"}
    assert [size for size, _ in seen] == [7, 7, 7, 14]
    for stage in (0, 1):
        before, after = seen[stage][1], seen[stage + 1][1]
        weights = torch.tensor([10.0, 10, 5, 5]) * (stage + 1)
        boxes = BoxCoder(tuple(weights.tolist())).decode_single(
            torch.tensor(moves[stage]).expand(len(before), 4), before[:, 1:]
        )
        limits = torch.tensor([[96.0, 120, 96, 120], [128, 100, 128, 100]])[before[:, 0].long()]
        boxes = torch.minimum(boxes.clamp(min=0), limits)
        filled = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        torch.testing.assert_close(after[:, 0], before[filled, 0])
        torch.testing.assert_close(after[:, 1:], boxes[filled], atol=1e-3, rtol=1e-5)
    for labels, (_, rois), threshold in zip(labels_seen, seen, (0.5, 0.6, 0.7)):
        for i, target in enumerate(targets):
            here = rois[:, 0] == i
            iou, matched = box_iou(target["boxes"], rois[here, 1:]).max(dim=0)
            expected = torch.where(iou >= threshold, target["labels"][matched], 0)
            assert torch.equal(labels[here], expected)
    # the mask head trains on stage 1's foreground
    assert torch.equal(seen[3][1], seen[0][1][labels_seen[0] > 0])


def test_cascade_scales_the_gradient_into_the_pooled_features(monkeypatch):
    model = small_model(cascade=True, masks=False, **EXHAUSTIVE).train()
    images, targets = scene(keypoints=False)
    features = [level.detach() for level in model.features(model.batch(images)[0])]
    sizes = [image.shape[-2:] for image in images]

    def gradient():
        level = features[0].clone().requires_grad_()
        losses = model.losses([level, *features[1:]], sizes, targets)
        total = sum(loss for name, loss in losses.items() if name[-1] in "123")
        model.zero_grad()
        total.backward()
        return level.grad, model.box_heads[2].classifier.weight.grad

    scaled, head = gradient()

    # The hook on the pooled features left out:
    monkeypatch.setattr(torch.Tensor, "register_hook", lambda *_: None)
    full, own_head = gradient()
    assert full.abs().max() > 0
    torch.testing.assert_close(3 * scaled, full)
    torch.testing.assert_close(head, own_head)  # the heads themselves learn at the full rate


def test_cascade_scores_are_averages_and_boxes_the_last_stages():
    model = small_model(cascade=True, masks=False).eval()
    biases = torch.randn(3, 6, generator=generator(12))
    moves = torch.tensor([[1.0, 0, 0, 0], [0, 4, 0, 0], [0, 0, 0, 15 * math.log(1.5)]])
    for head, move, bias in zip(model.box_heads, moves, biases):
        predict_always(head, move, bias)
    with torch.no_grad():
        features = model.features(model.batch(make_images((100, 100)))[0])
        proposals, valid = torch.tensor([[[10.0, 10, 30, 50]]]), torch.tensor([[True]])
        ((scores, boxes),) = model.box_predictions(features, proposals, valid, [(100, 100)])
    torch.testing.assert_close(scores[0], biases.softmax(dim=1).mean(dim=0))
    # right by 1/10 of 20; down by 4/20 of 40; 1.5 times as high around the middle, 38
    torch.testing.assert_close(boxes[0, 0], torch.tensor([12.0, 8, 32, 68]), atol=1e-4, rtol=0)


# -- Freezing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [True, False])  # a new model is in training mode already
def test_frozen_stages_keep_weights_and_statistics(told):
    model = small_model(norm="bn", freeze_at=2, masks=False)
    if told:
        model.train()
    images, targets = scene(keypoints=False)
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    sum(model(images, targets).values()).backward()
    for name, parameter in model.backbone.named_parameters():
        frozen = name.startswith(("stem", "res2"))
        assert (parameter.grad is None) == frozen, name
    for name, value in model.backbone.state_dict().items():
        if "running" in name:
            same = torch.equal(value, before[name])
            assert same == name.startswith(("stem", "res2")), name


# -- At the door ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, make",
    [
        ("boxes", lambda t: t["boxes"].long()),
        ("boxes", lambda t: t["boxes"][:, :3]),
        ("boxes", lambda t: t["boxes"][:, [2, 1, 0, 3]]),  # x2 < x1
        ("boxes", lambda t: t["boxes"] * math.nan),
        ("boxes", lambda t: t["boxes"] + math.inf),
        ("boxes", lambda t: torch.zeros(0)),
        ("boxes", lambda t: torch.tensor(1.0)),
        ("labels", lambda t: t["labels"][:1]),  # one label for several boxes
        ("labels", lambda t: t["labels"] * 0),
        ("labels", lambda t: -t["labels"]),
        ("labels", lambda t: t["labels"] + 5),
        ("labels", lambda t: t["labels"].float()),
        ("masks", lambda t: t["masks"][:1]),  # would be read out of bounds
        ("masks", lambda t: t["masks"][:, :50]),
        ("masks", lambda t: None),
        ("masks", lambda t: t["masks"].numpy()),
        ("keypoints", lambda t: t["keypoints"][:, :, :2]),
    ],
)
def test_targets_that_do_not_fit_are_refused_by_image_and_field(field, make):
    model = small_model(keypoints=17).train()
    images, targets = scene()
    targets[1] = targets[1] | {field: make(targets[1])}
    with pytest.raises(ValueError) as error:
        model(images, targets)
    message = str(error.value)
    others = {"boxes", "labels", "masks", "keypoints"} - {field}
    assert "targets[1]" in message and message.endswith(".") and "\n" not in message
    # Where the number of boxes is wrong, it may be another field that does not fit them.
    assert f"'{field}'" in message or (field == "boxes" and any(o in message for o in others))


NO_IMAGES = [
    torch.zeros(1, 3, 40, 40), torch.zeros(40, 40), torch.zeros(1, 40, 40), torch.zeros(3, 0, 40),
    torch.zeros(3, 40, 40, dtype=torch.int64), torch.full((3, 40, 40), math.nan), [[[0]]],
    torch.full((3, 40, 40), 200.0),  # float in 0..255
]  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
def test_images_and_lists_of_another_form_are_refused(training):
    model = small_model(masks=False).train(training)
    images, targets = scene()
    for image in NO_IMAGES:
        with pytest.raises(ValueError, match=r"images\[1\]"):
            model([images[0], image], targets)
    for nothing in ([], torch.zeros(2, 3, 40, 40)):
        with pytest.raises(ValueError, match="images must be a list"):
            model(nothing, targets)
    for wrong in (None, targets[:1], targets[0]) if training else ():
        with pytest.raises(ValueError, match="targets must be a list of 2"):
            model(images, wrong)


# -- Checkpoints ---------------------------------------------------------------------------------


def same_weights(a, b):
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


@pytest.mark.parametrize("norm", ["gn", "syncbn", "frozen_bn"])
def test_a_saved_model_is_loaded_as_it_was(tmp_path, norm):
    model = small_model(norm=norm, cascade=True, keypoints=3, image_mean=(0.375, 0.5, 0.625))
    model.data_settings |= {"min_size": 96, "classes": list("abcde")}
    detector.save_model(model, tmp_path / "a.pth", iteration=3)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
    loaded = detector.load_model(tmp_path / "a.pth")
    assert loaded.config == model.config and loaded.data_settings == model.data_settings
    assert not loaded.training and same_weights(model, loaded)
    assert detector.read_checkpoint(tmp_path / "a.pth")["iteration"] == 3
    assert loaded.box_heads[0].classifier.weight.requires_grad


def test_weights_of_other_classes_leave_the_predictors_and_name_them(tmp_path, capsys):
    model = small_model(seed=1, image_mean=(0.25, 0.5, 0.75), num_classes=7)
    detector.save_model(model, tmp_path / "a.pth")
    other = small_model(seed=2)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    detector.load_weights(other, tmp_path / "a.pth")
    predictors = ("box_heads.0.classifier", "box_heads.0.regressor", "mask_head.predictor")
    said = capsys.readouterr().out
    assert all(name in said for name in predictors)
    for name, tensor in other.state_dict().items():
        expected = before if name.startswith(predictors) else model.state_dict()
        assert torch.equal(tensor, expected[name]), name
    assert other.config.image_mean == (0.25, 0.5, 0.75) and "image_mean" in said
    assert other.config.num_classes == 5


@pytest.mark.parametrize(
    "theirs, ours, said",
    [
        ({}, {"norm": "syncbn"}, "another norm than this model's: gn there and syncbn here"),
        ({"norm": "frozen_bn"}, {"norm": "bn"}, "norm than this model's: frozen_bn there and bn"),
        ({}, {"norm": "none"}, "gn there and none here"),
        (
            {"stem_width": 64},
            {},
            r"stem.conv.weight is \[64, 3, 7, 7\] there and \[32, 3, 7, 7\] here",
        ),
        ({"stem_width": 64}, {"norm": "bn"}, r"shape .* \[64, 3, 7, 7\] there"),
        ({}, {"blocks": (1, 1, 2, 1)}, r"res4.1.conv1.conv.weight is missing there and \["),
        ({}, {"stride_in_1x1": True}, "stride_in_1x1"),
        ({"image_std": (0.5, 9.0, 0.5)}, {}, "image_std must be from 0.001 to 1"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(tmp_path, theirs, ours, said):
    other = small_model(**{n: v for n, v in theirs.items() if n != "image_std"})
    if "image_std" in theirs:  # Config would refuse it, too
        other.image_std.copy_(torch.tensor(theirs["image_std"]).view(3, 1, 1))
    detector.save_model(other, tmp_path / "a.pth")
    model = small_model(seed=1, **ours)
    config, before = model.config, {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(detector.WeightsError, match=said) as error:
        detector.load_weights(model, tmp_path / "a.pth")
    assert "a.pth" in str(error.value) and str(error.value).endswith(".")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.config == config


def nested(depth=60):
    value = (0, 0)
    for _ in range(depth):
        value = (value, value)
    return value


HOSTILE = [
    {"blocks": (10**9, 1, 1, 1)}, {"blocks": nested()}, {"anchor_sizes": nested()},
    {"stem_width": 10**9}, {"width_per_group": 20_000}, {"image_std": (0.0, 0.0, 0.0)},
    {"num_classes": 20_000},  # in range, but not what the weights have
    {"backbone": "x" * 10**6}, {"x" * 10**6: 1}, {"norm": None}, nested(), None,
]  # fmt: skip


@pytest.mark.parametrize("config", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_config_is_refused_at_once(tmp_path, config):
    content = {"data": {}, "weights": small_model().state_dict()}
    good = dataclasses.asdict(small_model().config)
    content["config"] = good | config if isinstance(config, dict) else config
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(detector.WeightsError) as error:
        detector.load_model(tmp_path / "a.pth")
    message = str(error.value)
    assert "a.pth" in message and "\n" not in message and len(message) < 500


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_files_that_are_no_checkpoints(tmp_path):
    model = small_model()
    path = tmp_path / "a.pth"
    detector.save_model(model, path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"<html>404</html>", whole[:-400] + b"?" * 400):
        path.write_bytes(content)
        check_refused(path)
    ours = {"config": {}, "data": {}}
    for content in (
        [1],
        model.state_dict(),
        {"model": {"conv1.weight": torch.zeros(1)}},
        {"config": os.system},
        ours | {"weights": {"a": 1}},
        ours | {"weights": {"a": torch.eye(3).to_sparse()}},
        ours | {"weights": {"a": torch.zeros(1).expand(10**10)}},  # 40 GB of one number
    ):
        torch.save(content, path)
        check_refused(path)
    check_refused(tmp_path / "missing.pth")
    check_refused(tmp_path)
    # Pickles that would hang their reader: a tuple of two of each tuple before it, and a deep one
    doubled = b"K\x00\x85q\x00" + b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(60))
    for tuples in (doubled, b")" + b"\x85" * 300_000):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02}" + tuples + b"K\x01s.")  # a dict's key
            archive.writestr("archive/version", b"3\n")
        check_refused(path)


def check_refused(path):
    for read in (detector.read_checkpoint, detector.load_model):
        with pytest.raises(detector.WeightsError) as error:
            read(path)
        message = str(error.value)
        assert str(path) in message and message.endswith(".") and "\n" not in message
        assert "weights_only" not in message


def test_write_whole_leaves_the_old_file_or_writes_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "a"
    with detector.write_whole(path) as file:
        file.write(b"old")
    with pytest.raises(ZeroDivisionError), detector.write_whole(path) as file:
        file.write(b"new")
        1 / 0  # noqa: B018
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(detector.os, "fsync", full)
    with pytest.raises(OSError) as error:
        detector.save_model(small_model(), path)
    assert error.value.filename == str(path) and error.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_an_oserror_that_names_the_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    plain_open = open

    def on_a_full_disk(name, mode):
        return plain_open("/dev/full" if mode == "wb" else name, mode)

    monkeypatch.setattr(detector, "open", on_a_full_disk, raising=False)
    with pytest.raises(OSError) as error:
        detector.save_model(small_model(), path)
    assert error.value.filename == str(path) and error.value.errno == errno.ENOSPC
