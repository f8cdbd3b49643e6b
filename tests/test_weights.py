"""Other projects' weights: files with the names and shapes of the public ones, and bad files.

The names are made here by rule, on their own, and not from convert_weights.py's table: a mistake
in that table shows. What Detectron2 computes with such weights is tested in test_agreement.py.
"""

import os
import pickle
import re
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import evaluate
import model as detector
from tools import convert_weights
from tools.read_tensors import read_tensors

ROOT = Path(__file__).parent.parent
BLOCKS = {"R50": (3, 4, 6, 3), "R101": (3, 4, 23, 3)}

# ------------------------------------------------------------------------------------------------
# The names and shapes of public files
# ------------------------------------------------------------------------------------------------


def bottlenecks(blocks, stem, groups, per_group):
    """(stage, block, part, shape) of every convolution; part 0 is the shortcut."""
    inputs = stem
    for i, count in enumerate(blocks):
        width, outputs = groups * per_group * 2**i, 4 * stem * 2**i
        for j in range(count):
            if j == 0:
                yield i + 2, j, 0, (outputs, inputs, 1, 1)
            yield i + 2, j, 1, (width, inputs, 1, 1)
            yield i + 2, j, 2, (width, width // groups, 3, 3)
            yield i + 2, j, 3, (outputs, width, 1, 1)
            inputs = outputs


def caffe2_shapes(depth, kind, stem=64):
    """Names and shapes of Detectron's R-50-GN.pkl, ... (kind: "gn", "affine", "unfolded")."""
    suffixes = {
        "gn": ("gn_s", "gn_b"),
        "affine": ("bn_s", "bn_b"),
        "unfolded": ("bn_gamma", "bn_beta", "bn_running_mean", "bn_running_var"),
    }[kind]
    shapes = {"conv1_w": (stem, 3, 7, 7)}
    first = "conv1" if kind == "gn" else "res_conv1"
    shapes |= {f"{first}_{suffix}": (stem,) for suffix in suffixes}
    for i, j, part, shape in bottlenecks(BLOCKS[depth], stem, 1, stem):
        name = f"res{i}_{j}_branch" + ("1", "2a", "2b", "2c")[part]
        shapes[f"{name}_w"] = shape
        shapes |= {f"{name}_{suffix}": shape[:1] for suffix in suffixes}
    if kind == "gn":
        return shapes | {"pred_w": (1000, 32 * stem), "pred_b": (1000,)}
    return shapes | {"fc1000_w": (1000, 32 * stem), "fc1000_b": (1000,), "conv1_b": (stem,)}


def detectron2_shapes(
    depth, norm, groups=1, per_group=None, stem=64, channels=256, fc=1024, classes=80,
    masks=True, keypoints=0, cascade=False, keypoint_channels=512,
):  # fmt: skip
    """Names and shapes of a detector of Detectron2 (norm: "GN", "SyncBN", "FrozenBN")."""
    shapes = {}
    statistics = {
        "GN": ("weight", "bias"),
        "SyncBN": ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"),
        "FrozenBN": ("weight", "bias", "running_mean", "running_var"),
    }[norm]

    def norm_shapes(name, width):
        return {
            f"{name}.norm.{s}": () if s == "num_batches_tracked" else (width,) for s in statistics
        }

    def layer(name, shape, normalized=norm != "FrozenBN", bias=None):
        shapes[f"{name}.weight"] = shape
        if normalized:
            shapes.update(norm_shapes(name, shape[0]))
        else:
            shapes[f"{name}.bias"] = (bias or shape[0],)

    def plain(name, shape, bias=None):
        layer(name, shape, normalized=False, bias=bias)

    body = "backbone.bottom_up."
    layer(body + "stem.conv1", (stem, 3, 7, 7), True)
    for i, j, part, shape in bottlenecks(BLOCKS[depth], stem, groups, per_group or stem):
        layer(f"{body}res{i}.{j}." + ("shortcut", "conv1", "conv2", "conv3")[part], shape, True)
    for i in (2, 3, 4, 5):
        layer(f"backbone.fpn_lateral{i}", (channels, stem * 2**i, 1, 1))
        layer(f"backbone.fpn_output{i}", (channels, channels, 3, 3))
    plain("proposal_generator.rpn_head.conv", (channels, channels, 3, 3))
    plain("proposal_generator.rpn_head.objectness_logits", (3, channels, 1, 1))
    plain("proposal_generator.rpn_head.anchor_deltas", (12, channels, 1, 1))
    for stage in (".0", ".1", ".2") if cascade else ("",):
        head = f"roi_heads.box_head{stage}."
        if norm == "FrozenBN":
            plain(head + "fc1", (fc, channels * 49))
            plain(head + "fc2", (fc, fc))
        else:
            for k in (1, 2, 3, 4):
                layer(f"{head}conv{k}", (channels, channels, 3, 3))
            plain(head + "fc1", (fc, channels * 49))
        predictor = f"roi_heads.box_predictor{stage}."
        plain(predictor + "cls_score", (classes + 1, fc))
        plain(predictor + "bbox_pred", (4 if cascade else 4 * classes, fc))
    if masks:
        for k in (1, 2, 3, 4):
            layer(f"roi_heads.mask_head.mask_fcn{k}", (channels, channels, 3, 3))
        plain("roi_heads.mask_head.deconv", (channels, channels, 2, 2))
        plain("roi_heads.mask_head.predictor", (classes, channels, 1, 1))
    if keypoints:
        inputs = channels
        for k in range(1, 9):
            plain(f"roi_heads.keypoint_head.conv_fcn{k}", (keypoint_channels, inputs, 3, 3))
            inputs = keypoint_channels
        name = "roi_heads.keypoint_head.score_lowres"
        plain(name, (keypoint_channels, keypoints, 4, 4), bias=keypoints)
    return shapes


# The public detectors: what of them can be told from names and shapes, and what that is.
PUBLIC = {
    # GN: scratch 3x and 9x, and fine-tuned; SyncBN: scratch 9x, and fine-tuned
    "R50 GN": (dict(depth="R50", norm="GN"), dict(norm="gn")),
    "R50 SyncBN": (dict(depth="R50", norm="SyncBN"), dict(norm="syncbn")),
    "R50 FrozenBN": (dict(depth="R50", norm="FrozenBN"), dict(stride_in_1x1=True)),
    "R101 FrozenBN": (
        dict(depth="R101", norm="FrozenBN"),
        dict(backbone="resnet101", stride_in_1x1=True),
    ),
    "X101 FrozenBN": (
        dict(depth="R101", norm="FrozenBN", groups=32, per_group=8),
        dict(backbone="resnext101_32x8d"),
    ),
    "R50 keypoints": (
        dict(depth="R50", norm="FrozenBN", masks=False, keypoints=17, classes=1),
        dict(box_smooth_l1_beta=0.5, stride_in_1x1=True, masks=False, keypoints=17, num_classes=1),
    ),
    "R50 cascade": (
        dict(depth="R50", norm="FrozenBN", cascade=True),
        dict(box_class_agnostic=True, stride_in_1x1=True, cascade=True),
    ),
}
UNSAID = dict(
    backbone="resnet50", norm="frozen_bn", stride_in_1x1=False, box_class_agnostic=False,
    box_smooth_l1_beta=0.0, rpn_smooth_l1_beta=0.0, roi_sampling_ratio=0, num_classes=80,
    masks=True, keypoints=0, cascade=False,
)  # fmt: skip
NARROW = dict(stem=32, channels=32, fc=32, keypoint_channels=32)


def filled(shapes, seed=0):
    """Arrays of these shapes: every number is another, variances are positive."""
    random = np.random.default_rng(seed)
    arrays = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            arrays[name] = np.array(7, np.int64)
            continue
        array = random.normal(0, 0.1, shape).astype(np.float32)
        if name.endswith(("running_var", "gamma", "_s", "norm.weight")):
            array = np.abs(array) + 0.5
        arrays[name] = array.astype(np.float32)
    return arrays


class Python2Pickler(pickle._Pickler):
    """Writes as Python 2 and its numpy did: protocol 2, arrays as byte strings, numpy.core."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, text):
        text_bytes = text.encode("ascii") if isinstance(text, str) else text
        self.write(pickle.BINSTRING + struct.pack("<i", len(text_bytes)) + text_bytes)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_string

    def save_global(self, obj, name=None):
        module = obj.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{name or obj.__name__}\n".encode())
        self.memoize(obj)


def write_python2(path, content):
    with open(path, "wb") as file:
        Python2Pickler(file, protocol=2).dump(content)
    return path


def write_pickle(path, content, protocol=2):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def small_model(norm="gn", **arguments):
    """A narrow detector with nothing left at 0 or 1, so that every mistake shows."""
    widths = dict(
        num_classes=5, blocks=(1, 2, 1, 1), stem_width=32, width_per_group=32, fpn_channels=32,
        box_head_channels=32, box_head_fc_channels=32, mask_head_channels=32,
        keypoint_head_channels=32, box_score_thresh=0.0, box_detections_per_img=30,
        image_std=(0.25, 0.26, 0.27),
    )  # fmt: skip
    torch.manual_seed(0)
    model = detector.build_model(norm=norm, **widths | arguments)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("running_var"):
            value.data.uniform_(0.5, 1.5)
        elif value.is_floating_point() and not name.startswith("image_"):
            value.data.add_(0.05 * torch.randn_like(value))
    return model.eval()


def outputs(model):
    generator = torch.Generator().manual_seed(1)
    images = [
        torch.rand(3, 90, 120, generator=generator),
        torch.rand(3, 128, 70, generator=generator),
    ]
    with torch.no_grad():
        return model(images)


def assert_same(first, second):
    """Equal to the bit, and not because there is nothing."""
    assert len(first) == len(second) and len(first[0]["boxes"]) > 0
    for a, b in zip(first, second):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), name


def converted(path, **given):
    """The checkpoint made of a foreign file, beside it."""
    out = path.with_name(path.name + ".converted.pth")
    convert_weights.convert(path, out, **given)
    return out


# ------------------------------------------------------------------------------------------------
# torchvision
# ------------------------------------------------------------------------------------------------


def torchvision_resnet(groups=1, width_per_group=64):
    """A torchvision ResNet of little depth with trained-looking batch norms."""
    torch.manual_seed(0)
    block = torchvision.models.resnet.Bottleneck
    theirs = torchvision.models.ResNet(
        block, [2, 1, 1, 1], groups=groups, width_per_group=width_per_group
    ).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean):
                value.data.add_(0.2 * torch.randn_like(value))
            module.running_var.uniform_(0.5, 2)
    return theirs


@pytest.mark.parametrize("norm, zipped", [("bn", True), ("syncbn", False), ("frozen_bn", False)])
def test_torchvision_resnet(tmp_path, norm, zipped):
    groups = {"groups": 32, "width_per_group": 8} if zipped else {}
    theirs = torchvision_resnet(**groups)
    path = tmp_path / "resnet.pth"
    torch.save(theirs.state_dict(), path, _use_new_zipfile_serialization=zipped)
    small = dict(fpn_channels=32, box_head_fc_channels=8, mask_head_channels=32, num_classes=2)
    ours = detector.build_model(norm=norm, blocks=(2, 1, 1, 1), **groups, **small).eval()
    detector.load_weights(ours, converted(path, norm=norm))
    image = torch.rand(3, 64, 96)
    with torch.no_grad():
        batch, _ = ours.batch([image])
        mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        torch.testing.assert_close(batch[0], (image - mean) / std)
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(batch))))
        for level, stage in zip(ours.backbone(batch), ("layer1", "layer2", "layer3", "layer4")):
            x = getattr(theirs, stage)(x)
            torch.testing.assert_close(level, x, rtol=1e-4, atol=1e-4 * x.abs().max().item())


def test_torchvision_vgg16(tmp_path):
    width, fc = 8, 16
    plan = [1, 1, "M", 2, 2, "M", 4, 4, 4, "M", 8, 8, 8, "M", 8, 8, 8, "M"]
    layers = torchvision.models.vgg.make_layers([n if n == "M" else n * width for n in plan])
    state = {f"features.{name}": value for name, value in layers.state_dict().items()}
    fcs = {0: nn.Linear(8 * width * 49, fc), 3: nn.Linear(fc, fc), 6: nn.Linear(fc, 1000)}
    for i, layer in fcs.items():
        state |= {f"classifier.{i}.{name}": value for name, value in layer.state_dict().items()}
    path = tmp_path / "vgg16.pth"
    torch.save(state, path)
    sizes = dict(stem_width=width, box_head_fc_channels=fc, num_classes=2)
    ours = detector.build_model("vgg16", "none", masks=False, **sizes)
    detector.load_weights(ours, converted(path))
    x = torch.rand(2, 3, 64, 96)
    torch.testing.assert_close(ours.backbone(x)[0], layers[:-1](x))
    pooled = torch.rand(3, 8 * width, 7, 7)
    hidden = fcs[3](fcs[0](pooled.flatten(1)).relu()).relu()
    torch.testing.assert_close(ours.box_heads[0](pooled)[0], ours.box_heads[0].classifier(hidden))


@pytest.mark.parametrize("name", ["resnet50", "resnet101", "resnext101_32x8d", "vgg16"])
def test_torchvision_names_and_shapes(name):
    """Every name and shape of the real files, without their numbers."""
    with torch.device("meta"):
        state = torchvision.models.get_model(name, weights=None).state_dict()
        config = convert_weights.infer_config(state, "torchvision")
        model = detector.build_model(**config)
        weights, unused = convert_weights.fit(state, "torchvision", model)
    assert config["backbone"] == name and config["norm"] == ("none" if name == "vgg16" else "bn")
    assert {n for n in model.state_dict() if n.startswith("backbone.")} <= weights.keys()
    last = "classifier.6" if name == "vgg16" else "fc"
    assert unused == [f"{last}.bias", f"{last}.weight"]


# ------------------------------------------------------------------------------------------------
# Detectron's ImageNet pickles
# ------------------------------------------------------------------------------------------------


def our_convs(model):
    """(ConvNorm, Caffe2 name) of a ResNet's layers, by rule."""
    yield model.backbone.stem, "conv1"
    for i in (2, 3, 4, 5):
        for j, block in enumerate(getattr(model.backbone, f"res{i}")):
            if block.shortcut is not None:
                yield block.shortcut, f"res{i}_{j}_branch1"
            for letter, conv in zip("abc", (block.conv1, block.conv2, block.conv3)):
                yield conv, f"res{i}_{j}_branch2{letter}"


@pytest.mark.parametrize(
    "depth, kind, norm",
    [
        ("R50", "gn", "gn"),
        ("R50", "affine", "frozen_bn"),
        ("R50", "unfolded", "frozen_bn"),
        ("R50", "unfolded", "syncbn"),
    ],
)
def test_detectron_pickles(tmp_path, capsys, depth, kind, norm):
    blobs = filled(caffe2_shapes(depth, kind, stem=32))
    content = {
        "gn": {"blobs": blobs, "cfg": "MODEL: {}"},
        "affine": blobs,  # flat, as some of Detectron's own
        "unfolded": {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True},
    }[kind]
    path = write_python2(tmp_path / "weights.pkl", content)
    stride = kind != "gn"  # what is assumed of such files
    model = small_model(norm, blocks=BLOCKS[depth], stride_in_1x1=stride)
    rpn = model.rpn.conv.weight.clone()
    given = {} if kind == "gn" else {"norm": norm}
    checkpoint = converted(path, **given)
    assert f"stride_in_1x1={stride}" in re.search("Assumed.*", capsys.readouterr().out)[0]
    detector.load_weights(model, checkpoint)
    assert torch.equal(model.rpn.conv.weight, rpn)
    mean = torch.tensor([122.7717, 115.9465, 102.9801]) / 255
    torch.testing.assert_close(model.image_mean.flatten(), mean)
    torch.testing.assert_close(model.image_std.flatten(), torch.full((3,), 1 / 255))
    for layer, name in our_convs(model):
        weight = torch.from_numpy(blobs[f"{name}_w"])
        if name == "conv1":
            weight = weight[:, [2, 1, 0]]  # BGR
        assert torch.equal(layer.conv.weight, weight), name
        if name == "conv1" and kind != "gn":
            name = "res_conv1"
        x = torch.randn(2, len(weight), 2, 3)
        blob = {n.removeprefix(f"{name}_"): torch.from_numpy(v)[:, None, None]
                for n, v in blobs.items() if n.startswith(f"{name}_") and v.ndim == 1}  # fmt: skip
        if kind == "gn":
            scale, shift = blob["gn_s"].flatten(), blob["gn_b"].flatten()
            expected = nn.functional.group_norm(x, 32, scale, shift)
        elif kind == "affine":
            expected = x * blob["bn_s"] + blob["bn_b"]
        else:
            expected = (x - blob["bn_running_mean"]) / (blob["bn_running_var"] + 1e-5).sqrt()
            expected = expected * blob["bn_gamma"] + blob["bn_beta"]
        torch.testing.assert_close(layer.norm(x), expected)


@pytest.mark.parametrize("depth", ["R50", "R101"])
@pytest.mark.parametrize("kind", ["gn", "affine", "unfolded"])
def test_detectron_names_and_shapes(depth, kind):
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in caffe2_shapes(depth, kind).items()}
        config = convert_weights.infer_config(state, "caffe2")
        model = detector.build_model(**config)
        weights, unused = convert_weights.fit(state, "caffe2", model)
    assert config["backbone"] == {"R50": "resnet50", "R101": "resnet101"}[depth]
    assert config["norm"] == ("gn" if kind == "gn" else "frozen_bn")
    assert {n for n in model.state_dict() if n.startswith("backbone.")} <= weights.keys()
    assert len(unused) == (2 if kind == "gn" else 3)


def test_folded_statistics_need_a_frozen_norm(tmp_path):
    """MSRA's file has no statistics of BN, without which a norm that learns cannot start."""
    path = write_python2(tmp_path / "R-50.pkl", filled(caffe2_shapes("R50", "affine", stem=32)))
    for norm in ("syncbn", "bn", "gn"):
        with pytest.raises(detector.WeightsError, match="running_mean|bn"):
            converted(path, norm=norm)
    frozen = converted(path)
    with pytest.raises(detector.WeightsError):
        detector.load_weights(small_model("syncbn", blocks=BLOCKS["R50"]), frozen)


# ------------------------------------------------------------------------------------------------
# Detectron2's detectors
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLIC)
def test_detectron2_names_and_shapes(name):
    """At the real widths: the architecture is inferred, and every tensor finds its place."""
    arguments, expected = PUBLIC[name]
    shapes = detectron2_shapes(**arguments)
    with torch.device("meta"):
        state = {n: torch.empty(shape) for n, shape in shapes.items()}
        model = detector.build_model(**convert_weights.infer_config(state))
        # Nothing but what the file does not say differs from the model that build_model makes.
        keys = ("backbone", "norm", "num_classes", "masks", "keypoints", "cascade")
        plain = detector.build_model(**{key: getattr(model.config, key) for key in keys}).config
    expected = UNSAID | expected
    assert {key: getattr(model.config, key) for key in expected} == expected
    differ = {key for key, value in vars(plain).items() if value != getattr(model.config, key)}
    assert differ <= {"stride_in_1x1", "roi_sampling_ratio", "rpn_smooth_l1_beta",
                      "box_smooth_l1_beta", "mask_head_convs", "keypoint_head_convs"}  # fmt: skip
    found, unused = convert_weights.translate(state, "detectron2", model)
    ours = model.state_dict()
    assert not unused and found.keys() == ours.keys() - {"image_mean", "image_std"}
    assert all(found[n].shape == ours[n].shape for n in found)
    back = convert_weights.to_detectron2(model)
    assert back.keys() - {"pixel_mean", "pixel_std"} == shapes.keys()


@pytest.mark.parametrize(
    "name, suffix",
    [
        ("R50 GN", ".pkl"),
        ("R50 GN", ".pth"),
        ("R50 SyncBN", ".pth"),
        ("R101 FrozenBN", ".pkl"),
        ("R50 keypoints", ".pkl"),
        ("R50 cascade", ".pkl"),
    ],
)
def test_detectron2_files(tmp_path, capsys, name, suffix):
    arguments, _ = PUBLIC[name]
    shapes = detectron2_shapes(**arguments | NARROW)
    # The zoo's files of 2019 and 2020 hold the anchors, too.
    for i in range(5):
        shapes[f"proposal_generator.anchor_generator.cell_anchors.{i}"] = (3, 4)
    arrays = filled(shapes)
    path = tmp_path / f"model_final{suffix}"
    if suffix == ".pkl":
        write_pickle(path, {"model": OrderedDict(arrays), "__author__": "Detectron2 Model Zoo"})
    else:
        tensors = OrderedDict((n, torch.from_numpy(a)) for n, a in arrays.items())
        torch.save({"model": tensors, "optimizer": {}, "scheduler": {}, "iteration": 269999}, path)
    model = detector.load_model(converted(path))
    said = capsys.readouterr().out
    assert said.count("cell_anchors") == 5 and f"norm={model.config.norm}" in said
    assert "stride_in_1x1=" in re.search("Assumed.*", said)[0]
    assert len(model.data_settings["classes"]) == model.config.num_classes
    assert model.data_settings["category_ids"][-1] == (1 if model.config.keypoints else 90)
    assert not model.training
    outputs(model)

    # By hand, where a conversion takes place.
    stem = torch.from_numpy(arrays["backbone.bottom_up.stem.conv1.weight"])
    assert torch.equal(model.backbone.stem.conv.weight.flip(1), stem)
    stage = ".2" if model.config.cascade else ""
    head = model.box_heads[-1]
    scores = arrays[f"roi_heads.box_predictor{stage}.cls_score.weight"]
    assert np.array_equal(head.classifier.weight[1:].numpy(force=True), scores[:-1])
    assert np.array_equal(head.classifier.weight[0].numpy(force=True), scores[-1])
    biases = arrays[f"roi_heads.box_predictor{stage}.cls_score.bias"]
    assert np.array_equal(head.classifier.bias.numpy(force=True), np.roll(biases, 1))
    deltas = arrays[f"roi_heads.box_predictor{stage}.bbox_pred.weight"]
    assert np.array_equal(head.regressor.weight.numpy(force=True), deltas)
    if model.mask_head:
        masks = arrays["roi_heads.mask_head.predictor.weight"]
        assert np.array_equal(model.mask_head.predictor.weight.numpy(force=True), masks)
    mean = torch.tensor([123.675, 116.28, 103.53]) / 255
    torch.testing.assert_close(model.image_mean.flatten(), mean)
    torch.testing.assert_close(model.image_std.flatten(), torch.full((3,), 1 / 255))


def test_what_a_file_does_not_say_can_be_given(tmp_path, capsys):
    shapes = detectron2_shapes("R50", "GN", **NARROW, classes=5)
    path = write_pickle(tmp_path / "a.pkl", {"model": filled(shapes), "__author__": "me"})
    out = tmp_path / "a.pth"
    arguments = [str(path), str(out), "--image-std", "0.25", "0.5", "0.125"]
    arguments += ["--stride-in-1x1", "1", "--roi-sampling-ratio", "2"]
    assert evaluate.run_command("convert_weights.py", convert_weights.main, arguments) == 0
    model = detector.load_model(out)
    assert tuple(model.image_std.flatten().tolist()) == (0.25, 0.5, 0.125)
    assert model.config.image_std == (0.25, 0.5, 0.125)
    assert model.config.stride_in_1x1 is True and model.config.roi_sampling_ratio == 2
    assumed = re.search("Assumed.*", capsys.readouterr().out)[0]
    assert "image_mean" in assumed and "image_std" not in assumed and "stride" not in assumed
    # Files of 2020 and later may hold the statistics (BGR, 0..255); they count then.
    arrays = filled(shapes)
    arrays["pixel_mean"] = np.float32([[[103.53]], [[116.28]], [[123.675]]])
    arrays["pixel_std"] = np.float32([[[57.375]], [[57.12]], [[58.395]]])
    path = write_pickle(tmp_path / "b.pkl", {"model": arrays, "__author__": "me"})
    model = detector.load_model(converted(path))
    std = torch.tensor([58.395, 57.12, 57.375]) / 255
    torch.testing.assert_close(model.image_std.flatten(), std)
    torch.testing.assert_close(torch.tensor(model.config.image_std), std)
    assert "image_" not in re.search("Assumed.*", capsys.readouterr().out)[0]
    for wrong in (["--image-mean", "123", "116", "103"], ["--norm", "frozen_bn"]):
        assert evaluate.run_command("c", convert_weights.main, [str(path), str(out), *wrong]) == 1
    assert evaluate.run_command("c", convert_weights.main, [str(path), str(path)]) == 2


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickle_protocols_and_attributes(tmp_path, protocol):
    """Files that people make themselves: newer protocols, a state dict's _metadata, old numpy."""
    arrays = filled(detectron2_shapes("R50", "SyncBN", **NARROW, classes=5))
    state = OrderedDict(arrays)
    state._metadata = OrderedDict([("", {"version": 1})])
    extra = {"iteration": np.int64(3), "lr": np.float32(0.5), "names": ["a", ("b", None)]}
    swapped = {n: a.astype(a.dtype.newbyteorder(">")) for n, a in arrays.items()}
    files = [
        write_pickle(tmp_path / "a.pkl", {"model": state, "__author__": "me", **extra}, protocol),
        write_python2(tmp_path / "b.pkl", {"model": arrays, "__author__": "me"}),
        write_pickle(tmp_path / "c.pkl", {"model": swapped, "__author__": "me"}, protocol),
    ]
    for path in files:
        found = read_tensors(path)
        assert found.keys() == arrays.keys()
        assert all(np.array_equal(found[name].numpy(), array) for name, array in arrays.items())


# ------------------------------------------------------------------------------------------------
# Round trips
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize(
    "norm, arguments",
    [
        ("gn", {}),
        ("syncbn", {"image_std": (0.2, 0.3, 0.4), "image_mean": (0.1, 0.2, 0.7)}),
        ("frozen_bn", {"stride_in_1x1": True}),
        ("frozen_bn", {"cascade": True}),
        ("gn", {"keypoints": 17, "masks": False, "num_classes": 1}),
    ],
)
def test_round_trip_through_detectron2(tmp_path, norm, arguments, suffix):
    """Our model in Detectron2's names and back: the same outputs to the bit."""
    model = small_model(norm, box_score_thresh=0.05, box_detections_per_img=100, **arguments)
    for head in model.box_heads:
        head.classifier.bias.data[0] -= 5  # so that there are detections
    expected = outputs(model)
    detector.save_model(model, tmp_path / "a.pth")
    there, back = tmp_path / f"b{suffix}", tmp_path / "c.pth"
    assert convert_weights.main(["--to-detectron2", str(tmp_path / "a.pth"), str(there)]) is None
    given = {"roi_sampling_ratio": 2, "stride_in_1x1": model.config.stride_in_1x1}
    convert_weights.convert(there, back, **given)
    assert_same(outputs(detector.load_model(back)), expected)
    if suffix == ".pkl":  # as Detectron2 itself reads it
        with open(there, "rb") as file:
            assert all(type(array) is np.ndarray for array in pickle.load(file)["model"].values())


def test_a_backbone_is_no_detector(tmp_path):
    path = write_python2(tmp_path / "R-50-GN.pkl", filled(caffe2_shapes("R50", "gn", stem=32)))
    checkpoint = converted(path)
    with pytest.raises(detector.WeightsError) as error:
        detector.load_model(checkpoint)
    assert_one_sentence(str(error.value), checkpoint)
    # train.py builds the model with the stride that the weights have
    assert detector.read_checkpoint(checkpoint)["config"]["stride_in_1x1"] is False
    with pytest.raises(detector.WeightsError) as error:
        converted(checkpoint)
    assert_one_sentence(str(error.value), checkpoint)


# ------------------------------------------------------------------------------------------------
# Files that must not load
# ------------------------------------------------------------------------------------------------


def assert_one_sentence(message, path):
    assert str(path) in message and "\n" not in message and message.endswith(".")
    assert ".." not in message.replace(str(path), "") and len(message) < len(str(path)) + 250


class Malicious:
    """A pickle of it is a program that makes the file `path`."""

    def __init__(self, path, function=os.system):
        self.path, self.function = path, function

    def __reduce__(self):
        if self.function is os.system:
            return os.system, (f"touch {self.path}",)
        return self.function, (f"open({str(self.path)!r}, 'w')",)


def malicious_contents(path):
    bad = Malicious(path)
    hidden = np.empty(2, object)
    hidden[:] = [bad, 0]
    record = np.zeros(1, [("a", "f4"), ("b", "O")])
    record["b"][0] = bad
    return {
        "plain": {"model": bad},
        "builtin eval": {"model": {"a": Malicious(path, eval)}},
        "as a key": {"model": {"a": np.zeros(2, np.float32)}, "cfg": [bad]},
        "in an object array": {"model": {"a": hidden}},
        "in a record array": {"blobs": {"a": record}},
        "not in a dict": bad,
    }


@pytest.mark.parametrize("kind", malicious_contents(Path()))
@pytest.mark.parametrize("protocol", [2, 4])
def test_malicious_pickles_are_refused(tmp_path, kind, protocol):
    trace = tmp_path / "executed"
    content = malicious_contents(trace)[kind]
    files = [
        write_pickle(tmp_path / "a.pkl", content, protocol),
        tmp_path / "b.pth",
        tmp_path / "c.pth",
    ]
    torch.save(content, files[1])
    torch.save(content, files[2], _use_new_zipfile_serialization=False)
    for path in files:
        with pytest.raises(detector.WeightsError) as error:
            read_tensors(path)
        assert_one_sentence(str(error.value), path)
        assert not trace.exists()
    with open(files[0], "rb") as file:  # the test is worth something: pickle does execute it
        pickle.load(file)
    assert trace.exists()


def test_malicious_pickles_behind_numpy_are_refused(tmp_path):
    trace = tmp_path / "executed"
    reconstruct = np.zeros(1).__reduce__()[0]
    programs = {
        "_reconstruct of a function": (reconstruct, (os.system, f"touch {trace}")),
        "_reconstruct of a class": (reconstruct, (subprocess.Popen, ["touch", str(trace)])),
        "ndarray called": (np.ndarray, ((2,), "O")),
        "dtype of objects": (np.dtype, ("O",)),
        "dtype with a field of objects": (np.dtype, ([("a", "O")],)),
        "scalar of objects": (np.float64(1).__reduce__()[0], (np.dtype("O"), b"")),
    }
    for kind, (function, arguments) in programs.items():

        class Program:
            def __reduce__(self, program=(function, arguments)):  # noqa: B039
                return program

        path = write_pickle(tmp_path / "a.pkl", {"model": {"a": Program()}})
        with pytest.raises(detector.WeightsError) as error:
            read_tensors(path)
        assert_one_sentence(str(error.value), path)
        assert not trace.exists(), kind
    # numpy's own functions that read files, import, or run code.
    for name in (
        b"cnumpy\nload\n",
        b"cnumpy.core.multiarray\nfromfile\n",
        b"cbuiltins\ngetattr\n",
        b"c__builtin__\nexec\n",
        b"cnumpy.core.multiarray\n_reconstruct.__globals__\n",
    ):
        path = tmp_path / "b.pkl"
        path.write_bytes(b"\x80\x02" + name + b".")
        with pytest.raises(detector.WeightsError, match="which no weights need"):
            read_tensors(path)


def pickle_of_tuples(levels, shared):
    """A pickle of a dict whose key is a tuple in a tuple in a tuple ..., or of two of each."""
    content = b"\x80\x02}N\x85q\x00"
    for i in range(levels):
        content += b"h%c\x86q%c" % (i, i + 1) if shared else b"\x85"
    return content + b"K\x01s."


def as_archive(path, content):
    """A file of torch's whose pickle is `content`."""
    torch.save({"a": torch.zeros(3)}, path)
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, old in files.items():
            archive.writestr(name, content if name.endswith("data.pkl") else old)
    return path


def test_work_is_bounded(tmp_path):
    """Files of some hundred bytes that would take for ever, all memory, or the whole process."""
    started = time.perf_counter()
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # torch's older format
    for name, content in {
        "shared": pickle_of_tuples(60, shared=True),
        "deep": pickle_of_tuples(300_000, shared=False),
        "memo": b"\x80\x02}r\xff\xff\xff\x7f.",
        "bytes": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
        "text": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b".",
    }.items():
        path = tmp_path / name
        for write in (Path.write_bytes, as_archive):
            write(path, content)
            with pytest.raises(detector.WeightsError) as error:
                read_tensors(path)
            assert_one_sentence(str(error.value), path)
        path.write_bytes(magic + magic + content)
        with pytest.raises(detector.WeightsError):
            read_tensors(path)
    torch.save({"conv1.weight": torch.zeros(1).expand(10**6, 10**6)}, path)
    with pytest.raises(detector.WeightsError, match="more numbers than bytes"):
        read_tensors(path)
    shared = np.zeros(100_000, np.float32)
    write_pickle(path, {"model": {f"a{i}": shared for i in range(1000)}})
    with pytest.raises(detector.WeightsError, match="more numbers than bytes"):
        read_tensors(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    with pytest.raises(detector.WeightsError, match="compressed"):
        read_tensors(path)
    assert time.perf_counter() - started < 30


def bad_files(folder):
    """{name: words of the message} of files, written to the folder, that cannot be converted."""
    good = {"model": small_model().state_dict()}
    torch.save(good, folder / "good.pt")
    whole = (folder / "good.pt").read_bytes()
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    torch.save(good, folder / "old.pt", _use_new_zipfile_serialization=False)
    (folder / "truncated_old.pt").write_bytes((folder / "old.pt").read_bytes()[:200_000])
    blobs = filled(caffe2_shapes("R50", "gn", stem=32))
    pickled = write_python2(folder / "good.pkl", blobs).read_bytes()
    (folder / "truncated.pkl").write_bytes(pickled[: len(pickled) // 2])
    (folder / "text.pth").write_text("<html>404: not found</html>\n")
    (folder / "empty.pkl").write_bytes(b"")
    write_pickle(folder / "list.pkl", [1, 2])
    write_pickle(folder / "number.pkl", 5)
    write_pickle(folder / "nothing.pkl", {})
    torch.save({"state_dict": {"encoder.weight": torch.zeros(3)}}, folder / "other.pth")
    torch.save({"model": nn.Linear(2, 3).state_dict()}, folder / "linear.pth")
    torch.save({"backbone.body.conv1.weight": torch.zeros(64, 3, 7, 7)}, folder / "maskrcnn.pth")
    write_pickle(folder / "quadruple.pkl", {"model": {"conv1_1_w": np.zeros(2, np.longdouble)}})
    deformable = detectron2_shapes("R50", "FrozenBN", **NARROW)
    deformable["backbone.bottom_up.res3.0.conv2_offset.weight"] = (18, 64, 3, 3)
    write_pickle(folder / "X152.pkl", {"model": filled(deformable), "__author__": "me"})
    complete = filled(detectron2_shapes("R50", "GN", **NARROW))

    def without(name, word):
        left = {n: a for n, a in complete.items() if word not in n}
        write_pickle(folder / name, {"model": left, "__author__": "me"})

    without("C4.pkl", "box_predictor")
    without("incomplete.pkl", "mask_fcn3.norm.bias")
    complete["roi_heads.mask_head.mask_fcn2.weight"] = np.zeros((32, 5, 3, 3), np.float32)
    without("shape.pkl", "nothing")
    return {
        "missing.pth": "No such file",
        "": "directory",
        "truncated.pt": "",
        "truncated_old.pt": "",
        "truncated.pkl": "",
        "text.pth": "",
        "empty.pkl": "",
        "list.pkl": "list",
        "number.pkl": "",
        "nothing.pkl": "no model known",
        "other.pth": "no model known",
        "linear.pth": "no model known",
        "maskrcnn.pth": "a detector of torchvision's",
        "quadruple.pkl": "longdouble|float128",
        "X152.pkl": "deformable convolutions",
        "C4.pkl": "box_heads.0.classifier.weight",
        "incomplete.pkl": "mask_head.convs.2.norm.bias",
        "shape.pkl": "mask_head.convs.1.conv.weight",
    }


def test_bad_files_are_one_sentence(tmp_path, capsys):
    """Exit code 1 and a sentence without a traceback; nothing is written."""
    for name, words in bad_files(tmp_path).items():
        path = tmp_path / name
        arguments = [str(path), str(tmp_path / "out.pth")]
        assert evaluate.run_command("convert_weights.py", convert_weights.main, arguments) == 1
        said = capsys.readouterr().err
        assert said.startswith("convert_weights.py: ") and said.count("\n") == 1, name
        assert re.search(words, said), said
        assert_one_sentence(said.removeprefix("convert_weights.py: ").rstrip("\n"), path)
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize(
    "file, arguments",
    [
        ("gn.pkl", dict(norm="syncbn")),  # no running_mean
        ("gn.pkl", dict(blocks=(3, 4, 5, 3))),  # res4.5 too many
        ("gn.pkl", dict(stem_width=64)),  # other shapes
        ("affine.pkl", dict(norm="gn")),  # has running_mean
        ("resnet.pth", dict(norm="none", stem_width=64, blocks=(2, 1, 1, 1))),
        ("resnet.pth", dict(norm="none", backbone="vgg16", stem_width=64)),
    ],
)
def test_weights_that_do_not_fit(tmp_path, file, arguments):
    """A backbone of another architecture: one sentence, and the model is left as it was."""
    path = tmp_path / file
    if file.endswith(".pkl"):
        write_python2(path, filled(caffe2_shapes("R50", path.stem, stem=32)))
    else:
        torch.save(torchvision_resnet().state_dict(), path)
    body = {} if arguments.get("backbone") == "vgg16" else {"blocks": (3, 4, 6, 3)}
    model = small_model(**body | arguments | {"masks": arguments.get("backbone") != "vgg16"})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    checkpoint = converted(path)
    with pytest.raises(detector.WeightsError) as error:
        detector.load_weights(model, checkpoint)
    assert_one_sentence(str(error.value), checkpoint)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()), "half loaded"


def test_other_programs_execute_nothing(tmp_path):
    """A malicious file at the command line: a sentence, exit code 1, nothing executed."""
    trace = tmp_path / "executed"
    path = write_pickle(tmp_path / "bad.pkl", {"model": Malicious(trace)})
    for command in (
        ["evaluate.py", "--weights", path, "--images", tmp_path],
        ["tools/convert_weights.py", path, tmp_path / "out.pth"],
    ):
        done = subprocess.run(
            [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 1 and not trace.exists() and "Traceback" not in done.stderr
        assert str(path) in done.stderr.splitlines()[-1]
