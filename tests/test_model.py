"""model.py's parts. What the whole computes, losses and gradients: see test_agreement.py."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou, nms, roi_align

import model as detector
from model import build_model

SMALL = dict(
    blocks=(1, 1, 1, 1), stem_width=32, width_per_group=32, fpn_channels=32, box_head_convs=1,
    box_head_channels=32, box_head_fc_channels=64, mask_head_convs=1, mask_head_channels=32,
    keypoint_head_convs=1, keypoint_head_channels=32, num_classes=5, box_detections_per_img=10,
    rpn_pre_nms_top_n_train=50, rpn_post_nms_top_n_train=30, rpn_post_nms_top_n_test=30,
)  # fmt: skip
EXHAUSTIVE = dict(box_batch_size_per_image=800, box_positive_fraction=0.9)  # all are drawn


def small_model(seed=0, **settings):
    torch.manual_seed(seed)
    return build_model(**(SMALL | settings))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_boxes(n, g, size=96.0):
    corners = torch.rand(n, 2, 2, generator=g) * size
    low, high = corners.amin(dim=1), corners.amax(dim=1)
    return torch.cat([low, high + 1], dim=1)


def make_target(boxes, labels, height, width, seed=0):
    """A target whose masks are the lower triangles of its boxes and whose keypoints lie inside."""
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    y = (torch.arange(height) + 0.5)[:, None]
    x = (torch.arange(width) + 0.5)[None]
    x1, y1, x2, y2 = boxes[:, :, None, None].unbind(1)
    across, down = (x - x1) / (x2 - x1), (y - y1) / (y2 - y1)
    at = torch.rand(len(boxes), 17, 2, generator=seeded(seed))
    xy = boxes[:, None, :2] + at * (boxes[:, None, 2:] - boxes[:, None, :2])
    return {
        "boxes": boxes,
        "labels": torch.tensor(labels, dtype=torch.int64),
        "masks": (across > 0) & (down < 1) & (across < down),
        "keypoints": torch.cat([xy, torch.full((len(boxes), 17, 1), 2.0)], dim=2),
        "seed": seed,
    }


def make_images(*shapes):
    g = seeded()
    return [torch.randint(256, (3, *s), generator=g).byte() for s in shapes]


def scene():
    """Two images of different sizes with 3 and 2 objects."""
    first = make_target([[8, 10, 50, 60], [30, 40, 90, 110], [60, 5, 92, 30]], [1, 3, 5], 120, 96)
    second = make_target([[5, 5, 100, 90], [70, 60, 120, 95]], [2, 3], 100, 128, seed=1)
    return make_images((120, 96), (100, 128)), [first, second]


# -- Config ----------------------------------------------------------------------------------------


SETTINGS = [
    ({"cascade": True, "box_class_agnostic": False}, "box_class_agnostic"),
    ({"image_mean": (122.8, 115.9, 103.0)}, "image_mean"),  # in 0..255
    ({"backbone": "transformer"}, "resnet50, resnet101"),
]  # fmt: skip


@pytest.mark.parametrize("settings, said", SETTINGS)
def test_settings_that_cannot_be_meant_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        small_model(**settings)


# -- Boxes -----------------------------------------------------------------------------------------


def test_box_coding_is_torchvisions():
    weights = (10.0, 9.0, 5.0, 4.0)
    g = seeded(2)
    truth, boxes = random_boxes(50, g), random_boxes(50, g)
    coder = BoxCoder(weights)
    deltas = detector.encode_boxes(truth, boxes) * torch.tensor(weights)
    torch.testing.assert_close(deltas, coder.encode_single(truth, boxes), atol=1e-5, rtol=1e-5)
    deltas = 30 * torch.randn(50, 4, generator=g)  # beyond the clip of dw and dh, log(1000 / 16)
    expected = coder.decode_single(deltas.double(), boxes.double())
    decoded = detector.decode_boxes(deltas / torch.tensor(weights), boxes)
    torch.testing.assert_close(decoded.double(), expected, atol=1e-3, rtol=1e-5)


def test_nms_is_exact_within_each_group_and_returns_the_best_first():
    # On a grid of 2^-10 pixels every overlap is exact, and many are 1/2, the threshold. Beside the
    # shifts that keep 80 groups apart, float32 cannot hold such boxes. (Of more than 1,000 boxes,
    # torchvision takes one group after the other.)
    g = seeded(4)
    corner = 1200 + torch.randint(16, (1000, 2), generator=g) / 1024
    size = 2 ** torch.randint(4, (1000, 2), generator=g) / 1024
    boxes, scores = torch.cat([corner, corner + size], dim=1), torch.rand(1000, generator=g)
    groups = torch.randint(80, (1000,), generator=g)
    kept = []
    for group in range(80):
        here = (groups == group).nonzero()[:, 0]
        kept.append(here[nms(boxes[here].double(), scores[here].double(), 0.5)])
    kept = torch.cat(kept)
    kept = kept[scores[kept].argsort(descending=True)]
    assert torch.equal(detector.nms(boxes, scores, groups, 0.5, 2000), kept)
    assert torch.equal(detector.nms(boxes, scores, groups, 0.5, 7), kept[:7])


# -- Matching and sampling -------------------------------------------------------------------------


@pytest.mark.parametrize("objects", [4, 1, 0])
def test_rpn_matching_against_a_loop(objects):
    rpn = small_model().rpn
    g = seeded(3)
    anchors, truth = random_boxes(300, g), random_boxes(4, g)
    truth[1] = torch.tensor([50.0, 10, 50, 90])  # has no area, and so makes no anchor positive
    truth[2] += 500  # overlaps no anchor, likewise
    # The last one's best anchors have IoU 0.5, and there are two of them: both are positive.
    truth[3] = torch.tensor([200.0, 200, 210, 210])
    special = [[200.0, 200, 210, 220], [200, 200, 220, 210], [200, 200, 210, 225]]
    anchors, truth = torch.cat([anchors, torch.tensor(special)]), truth[:objects]
    matched, labels = rpn.match(anchors, truth)
    assert labels[-3:].tolist() == ([1, 1, -1] if objects == 4 else [0, 0, 0])
    iou = box_iou(truth, anchors)
    for a in range(len(anchors)):
        best = max([iou[k, a] for k in range(objects)], default=0.0)
        low_quality = any(iou[k, a] == iou[k].max() > 0 for k in range(objects))
        expected = 1 if best >= 0.7 or low_quality else 0 if best < 0.3 else -1
        assert labels[a] == expected, a
        assert best == 0 or iou[matched[a], a] == best


def test_sampling_draws_at_most_the_fraction_and_negatives_make_up_for_positives():
    def draw(positives, negatives, batch_size, fraction):
        labels = torch.full((1000,), -1)
        labels[:positives] = torch.arange(positives) % 3 + 1  # any class
        labels[500 : 500 + negatives] = 0
        index = detector.sample(labels, batch_size, fraction, seeded())
        assert len(index.unique()) == len(index)  # nothing twice
        return [(labels[index] > 0).sum().item(), (labels[index] == 0).sum().item(), len(index)]

    assert draw(300, 400, 100, 0.25) == [25, 75, 100]
    assert draw(10, 200, 100, 0.25) == [10, 90, 100]
    assert draw(300, 2, 100, 0.25) == [25, 2, 27]  # positives do not make up for negatives
    assert draw(0, 400, 100, 0.25) == [0, 100, 100]
    assert draw(100, 200, 5000, 0.9) == [100, 200, 300]  # all there are
    assert draw(0, 0, 100, 0.25) == [0, 0, 0]


def test_samples_are_a_function_of_an_images_seed_and_of_nothing_else(monkeypatch):
    model = small_model(rpn_batch_size_per_image=16, box_batch_size_per_image=8).train()
    images = make_images((96, 96), (96, 96), (96, 96))
    targets = [
        make_target([[8, 10, 50, 60], [30, 40, 90, 90]], [1, 2], 96, 96, i) for i in range(3)
    ]
    del targets[2]["seed"]
    drawn, sample = [], detector.sample
    monkeypatch.setattr(detector, "sample", lambda *a: drawn.append(sample(*a)) or drawn[-1])

    def draw(order, torch_seed):
        drawn.clear()
        torch.manual_seed(torch_seed)
        model([images[i] for i in order], [targets[i] for i in order])
        return list(drawn)  # anchors of each image, RoIs of each image

    first, again = draw([0, 1, 2], 0), draw([1, 0, 2], 1)
    for one, other in ((0, 1), (1, 0), (3, 4), (4, 3)):  # neither the place in the batch counts,
        assert torch.equal(first[one], again[other])  # nor the state of torch's own generator
    assert not torch.equal(first[0], first[1])
    # Without a seed, torch's generator decides.
    assert not torch.equal(first[2], again[2])
    assert torch.equal(first[2], draw([0, 1, 2], 0)[2])


def test_rois_are_proposals_and_objects_of_enough_overlap():
    model = small_model(box_batch_size_per_image=12)
    target = make_target([[10, 10, 50, 50], [60, 60, 60, 90]], [4, 2], 96, 96)
    proposals = [[10.0, 10, 50, 29], [10, 10, 50, 31]]  # IoU 0.475, 0.525
    proposals += [[20, 20, 20, 40]] + 20 * [[70, 70, 90, 90]]  # one without area, as an object is
    proposals = torch.tensor(proposals)
    (samples,) = model.sample_rois([proposals], [target], [seeded()])
    assert len(samples.boxes) == 12 and detector.has_area(samples.boxes).all()
    found = samples.boxes[samples.labels > 0]  # 2 of the 3 that a quarter of 12 could be
    expected = torch.stack([target["boxes"][0], proposals[1]])  # (the object, and one proposal)
    assert torch.equal(found[found[:, 3].argsort(descending=True)], expected)
    assert set(samples.labels.tolist()) == {0, 4}
    assert (samples.matched[samples.labels > 0] == 0).all()


# -- Batch and backbone ----------------------------------------------------------------------------


def test_frozen_stages_keep_weights_and_statistics():
    model = small_model(norm="bn", freeze_at=2, masks=False).train()
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    sum(model(*scene()).values()).backward()
    for name, parameter in model.backbone.named_parameters():
        assert (parameter.grad is None) == name.startswith(("stem", "res2")), name
    for name, value in model.backbone.state_dict().items():
        if "running" in name:
            assert torch.equal(value, before[name]) == name.startswith(("stem", "res2")), name


# -- RoIs ------------------------------------------------------------------------------------------


def test_pooling_is_roi_align_on_the_level_of_the_fpn_paper():
    g = seeded(8)
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
        levels.append(min(max(level, 2), 5) - 2)
        feature, scale = features[levels[-1]].double(), 1 / strides[levels[-1]]
        expected = roi_align(feature, roi[None].double(), 7, scale, 2, aligned=True)[0]
        torch.testing.assert_close(ours.double(), expected, atol=1e-4, rtol=1e-4)
    assert set(levels) == {0, 1, 2, 3}


def test_mask_targets_of_whole_pixels():
    masks = torch.rand(2, 80, 90, generator=seeded(9)) < 0.5
    boxes = torch.tensor([[10.0, 20, 38, 48], [5, 3, 61, 59]])
    targets = detector.mask_targets(masks, torch.tensor([1, 0]), boxes, 28).bool()
    # a RoI of 28 x 28 pixels is cut out
    assert torch.equal(targets[0], masks[1, 20:48, 10:38])
    # one of 56 x 56 is averaged over 2 x 2 pixels; half of them is foreground
    means = F.avg_pool2d(masks[0, 3:59, 5:61].double()[None], 2)[0]
    assert (means == 0.5).any() and torch.equal(targets[1], means >= 0.5)


def test_keypoint_targets_in_closed_form():
    box = torch.tensor([[10.0, 20, 66, 132]])  # cells of 1 x 2 pixels
    points = [(10, 20), (10.99, 21.9), (11, 22), (66, 132), (66.01, 30), (30, 19.9), (40, 60)]
    visible = [1, 2, 1, 2, 2, 2, 0]
    keypoints = torch.tensor([[(x, y, v) for (x, y), v in zip(points, visible)]]).float()
    cell, valid = detector.keypoint_targets(keypoints, box, 56)
    assert valid[0].tolist() == [True, True, True, True, False, False, False]
    assert cell[0, :4].tolist() == [0, 0, 57, 56 * 56 - 1]
    assert ((cell >= 0) & (cell < 56 * 56)).all()


# -- Losses ----------------------------------------------------------------------------------------


def test_first_weights_and_losses_are_what_theory_says():
    torch.manual_seed(0)
    narrow = dict(fpn_channels=64, box_head_channels=64, mask_head_channels=64)
    model = build_model(blocks=(1, 1, 1, 1), **narrow).train()
    deviations = {
        "backbone.res2.0.conv2.conv": (2 / (64 * 9)) ** 0.5,  # He et al., fan out
        "mask_head.predictor": (2 / 80) ** 0.5,
        "fpn.output.0.conv": (64 * 9) ** -0.5,  # Xavier of Caffe2, fan in
        "box_heads.0.fcs.0": (64 * 49) ** -0.5,
        "rpn.conv": 0.01, "rpn.objectness": 0.01, "rpn.deltas": 0.01,
        "box_heads.0.classifier": 0.01, "box_heads.0.regressor": 0.001,
    }  # fmt: skip
    for name, deviation in deviations.items():
        weight = model.get_parameter(f"{name}.weight")
        relative_error = 1 / math.sqrt(2 * weight.numel())
        assert abs(weight.std() / deviation - 1) < 5 * relative_error, name
    assert all(
        p.eq("bias" not in name).all() for name, p in model.named_parameters() if p.dim() == 1
    )
    losses = model(*scene())
    # GN, ReLU, fc, ReLU leave E[x^2] = 1/4: the classifier's logits deviate by 0.01 (1024 / 4)^.5,
    assert abs(losses["loss_classifier"].item() - math.log(81)) < 4 * 0.16
    # the RPN's, behind a convolution of 64 * 9 inputs and a ReLU, by 0.01^2 (64 * 64 * 9 / 2)^.5.
    assert abs(losses["loss_objectness"].item() - math.log(2)) < 4 * 0.014


def test_losses_of_a_batch_are_means_over_what_they_count():
    # Each image's own losses tell what those of both must be. float32 sums: 1e-5.
    model = small_model(keypoints=17, **EXHAUSTIVE).train()
    for m in model.modules():
        if isinstance(m, nn.GroupNorm):
            m.bias.data.normal_(generator=seeded(5))
    images = make_images((96, 128), (96, 128))
    boxes = [[8, 10, 50, 60], [60, 5, 92, 30]]
    targets = [make_target(boxes, [1, 3], 96, 128), make_target([], [], 96, 128)]
    with torch.no_grad():
        both = model(images, targets)
        proposals = model.proposals(model.features(model.batch(images)[0]), [(96, 128)] * 2)
        counts = [len(p) + len(t["boxes"]) for p, t in zip(proposals, targets)]
        first, second = (model([image], [target]) for image, target in zip(images, targets))
    share = counts[0] / sum(counts)
    for name in ("loss_objectness", "loss_rpn_box_reg"):  # per anchor
        torch.testing.assert_close(both[name], (first[name] + second[name]) / 2, rtol=1e-5, atol=0)
    for name in ("loss_classifier", "loss_box_reg"):  # per RoI
        expected = share * first[name] + (1 - share) * second[name]
        torch.testing.assert_close(both[name], expected, rtol=1e-5, atol=0)
    for name in ("loss_mask", "loss_keypoint"):  # per foreground RoI and visible keypoint
        assert second[name] == 0 < first[name]
        torch.testing.assert_close(both[name], first[name], rtol=1e-5, atol=0)


@pytest.mark.parametrize("objects", ["none", "in one image", "without area", "none, nor proposals"])
@pytest.mark.parametrize("kind", ["gn", "syncbn", "bn", "frozen_bn", "cascade"])
def test_odd_batches_train_and_predict(kind, objects):
    settings = {"cascade": True} if kind == "cascade" else {"norm": kind}
    model = small_model(keypoints=17, **settings)
    if objects == "none, nor proposals":  # every box leaves the image: clipping leaves nothing
        model.rpn.deltas.bias.data[0::4] = 1e4
    images, targets = scene()
    for i, (target, image) in enumerate(zip(targets, images)):
        if objects == "without area":
            flat = [[n, 10, n, 20] for n in range(8)] + [[30, 10, 70, 10], [3, 4, 4, 5]]
            targets[i] = make_target(flat, [1] * 10, *image.shape[-2:])
        elif i == 0 or objects != "in one image":
            targets[i] = {k: v if k == "seed" else v[:0] for k, v in target.items()}
    losses = model.train()(images, targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name  # DDP would wait for it for ever
        assert parameter.grad.isfinite().all(), name
        if objects.startswith("none") and ("mask_head" in name or "regressor" in name):
            assert parameter.grad.eq(0).all(), name
    for found in model.eval()(images):
        n = len(found["boxes"])
        assert found["boxes"].shape == (n, 4) and found["scores"].shape == (n,)
        assert found["masks"].shape == (n, 28, 28) and found["keypoints"].shape == (n, 17, 3)
        assert objects != "none, nor proposals" or n == 0


# -- Detections ------------------------------------------------------------------------------------


def test_images_of_a_batch_do_not_influence_one_another():
    # Group normalization sees one image. The tolerance is float32's, for sums in another order.
    model = small_model(keypoints=3, box_score_thresh=0.0, box_detections_per_img=20).eval()
    images = make_images((96, 128), (96, 128))
    with torch.no_grad():
        for image, together in zip(images, model(images)):
            (alone,) = model([image])
            assert len(alone["boxes"]) == 20
            for name, value in alone.items():
                torch.testing.assert_close(together[name], value, atol=2e-3, rtol=1e-3)


# -- Cascade ---------------------------------------------------------------------------------------


def test_the_mask_head_of_a_cascade_trains_on_the_last_stages_foreground(monkeypatch):
    model = small_model(cascade=True, **EXHAUSTIVE).train()
    for head in model.box_heads:  # all move right, stage 1 by 0.1 and stage 2 by 0.05 of the width
        head.regressor.weight.data.zero_()
        head.regressor.bias.data[0] = 1
    pooled, pool = [], model.pool

    def record(features, boxes, size):
        pooled.append((size, boxes))
        return pool(features, boxes, size)

    monkeypatch.setattr(model, "pool", record)
    images, targets = scene()
    losses = model(images, targets)
    names = {f"loss_{kind}_{stage}" for kind in ("classifier", "box_reg") for stage in (1, 2, 3)}
    assert set(losses) == names | {"loss_objectness", "loss_rpn_box_reg", "loss_mask"}
    assert [size for size, _ in pooled] == [7, 7, 7, 14]
    stages = [boxes for _, boxes in pooled]
    for target, first, last, of_masks in zip(targets, stages[0], stages[2], stages[3]):
        best = box_iou(target["boxes"], last).amax(dim=0)
        assert torch.equal(of_masks, last[best >= 0.7]) and len(of_masks) > 0
        best = box_iou(target["boxes"], first).amax(dim=0)
        assert not torch.equal(of_masks, first[best >= 0.5])


def test_a_cascade_drops_boxes_that_leave_the_image():
    model, target = small_model(cascade=True), make_target([[40, 10, 50, 20]], [3], 96, 96)
    boxes = torch.tensor([[80.0, 10, 90, 20], [10, 10, 20, 20]])
    right = torch.tensor([30.0, 0, 0, 0]).expand(2, 1, 4)  # by three times the width
    (samples,) = model.next_rois([boxes], right, 0, [target], [(96, 96)])
    torch.testing.assert_close(samples.boxes, target["boxes"])
    assert samples.labels.tolist() == [3]


# -- At the door -----------------------------------------------------------------------------------

TARGETS = [
    ("boxes", lambda boxes: boxes[:, [2, 1, 0, 3]]),  # x2 < x1
    ("boxes", lambda boxes: boxes * math.nan),
    ("boxes", lambda boxes: boxes + torch.tensor([0, 0, math.inf, 0])),
    ("labels", lambda labels: labels[:1]),  # one label for several boxes
    ("labels", lambda labels: labels - 2),  # 0
    ("labels", lambda labels: labels + 5),
    ("masks", lambda masks: masks[:1]),  # would be read out of bounds
    ("masks", lambda masks: masks[:, :50]),
    ("keypoints", lambda keypoints: keypoints[:, :, :2]),
]


@pytest.mark.parametrize("field, change", TARGETS)
def test_targets_that_do_not_fit_are_refused_by_image_and_field(field, change):
    model = small_model(keypoints=17).train()
    images, targets = scene()
    targets[1] = targets[1] | {field: change(targets[1][field])}
    with pytest.raises(ValueError, match=rf"targets\[1\]\['{field}'\] must .*\.$"):
        model(images, targets)


def test_images_of_another_form_are_refused_and_named():
    model, (image, _) = small_model(masks=False).eval(), scene()[0]
    grey, integers, unscaled = image[:1], image.long(), image.float()
    for wrong in (grey, image[0], image[None], integers, unscaled, image / 255 * math.nan):
        with pytest.raises(ValueError, match=r"images\[1\] must be a \[3, h, w\] tensor"):
            model([image, wrong])


# -- Files of weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["gn", "syncbn", "frozen_bn"])
def test_a_saved_model_is_loaded_as_it_was(tmp_path, norm):
    model = small_model(norm=norm, cascade=True, keypoints=3, image_mean=(0.375, 0.5, 0.625))
    model.data_settings |= {"min_size": 96, "classes": list("abcde")}
    detector.save_model(model, tmp_path / "a.pth", iteration=3)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
    loaded = detector.load_model(tmp_path / "a.pth")
    assert loaded.config == model.config and loaded.data_settings == model.data_settings
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert not loaded.training and loaded.box_heads[0].classifier.weight.requires_grad
    assert detector.read_checkpoint(tmp_path / "a.pth")["iteration"] == 3


def test_weights_of_other_classes_leave_the_predictors_and_name_them(tmp_path):
    other = small_model(1, image_mean=(0.25, 0.5, 0.75), num_classes=7)
    detector.save_model(other, tmp_path / "a.pth")
    model = small_model(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    said = detector.load_weights(model, tmp_path / "a.pth").partition("left as they were: ")[2]
    predictors = ("box_heads.0.classifier", "box_heads.0.regressor", "mask_head.predictor")
    assert said.split(", ") == list(predictors)
    for name, tensor in model.state_dict().items():
        expected = before if name.startswith(predictors) else other.state_dict()
        assert torch.equal(tensor, expected[name]), name
    assert model.config.image_mean == (0.25, 0.5, 0.75) and model.config.num_classes == 5


@pytest.mark.parametrize("theirs, ours", [("bn", "frozen_bn"), ("syncbn", "bn"), ("bn", "syncbn")])
def test_the_norms_with_the_same_tensors_take_each_others_weights(tmp_path, theirs, ours):
    other, model = small_model(1, norm=theirs), small_model(2, norm=ours)
    for layer in other.backbone.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
    detector.save_model(other, tmp_path / "a.pth")
    detector.load_weights(model, tmp_path / "a.pth")
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, other.backbone.state_dict()[name]), name


MISFITS = [
    ({}, {"norm": "syncbn"}, "the norm gn, and this model has syncbn"),
    ({"norm": "frozen_bn"}, {"norm": "bn"}, "the norm frozen_bn, and this model has bn"),
    ({}, {"stride_in_1x1": True}, "another stride_in_1x1"),
    ({"stem_width": 64}, {}, "another backbone .* backbone.stem.conv.weight"),
    ({}, {"blocks": (1, 1, 2, 1)}, "another backbone .* backbone.res4.1.conv1.conv.weight"),
    ({"blocks": (1, 1, 2, 1)}, {}, "another backbone .* backbone.res4.1.conv1.conv.weight"),
]


@pytest.mark.parametrize("theirs, ours, said", MISFITS)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(tmp_path, theirs, ours, said):
    detector.save_model(small_model(**theirs), tmp_path / "a.pth")
    model = small_model(seed=1, **ours)
    config, before = model.config, {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(detector.WeightsError, match=f"a.pth has {said}"):
        detector.load_weights(model, tmp_path / "a.pth")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.config == config


class Malicious:
    """A pickle of it is a program that makes the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_files_that_are_no_checkpoints_are_refused_and_nothing_in_them_is_executed(tmp_path):
    path, trace = tmp_path / "a.pth", tmp_path / "executed"

    def check_refused():
        with pytest.raises(detector.WeightsError, match=r"a\.pth is [^\n]*\.$"):
            detector.load_model(path)

    detector.save_model(small_model(), path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"<html>404</html>"):
        path.write_bytes(content)
        check_refused()
    for content in ([1], {"model": {"conv1.weight": torch.zeros(1)}}):
        torch.save(content, path)
        check_refused()
    torch.save({"config": Malicious(trace), "data": {}, "weights": {}}, path)
    check_refused()
    assert not trace.exists()
    torch.load(path, weights_only=False)  # the test is worth something: this does execute it
    assert trace.exists()
    with pytest.raises(OSError, match="missing.pth"):
        detector.load_model(tmp_path / "missing.pth")
