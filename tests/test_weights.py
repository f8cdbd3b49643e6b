"""Other projects' weights: files with the names and shapes of the public ones, and bad files.

The names are made here by rule, on their own, and not from convert_weights.py's table: a mistake
in that table shows. What Detectron2 computes with such weights is tested in test_agreement.py.
"""

import pickle
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import model as detector
from tools import convert_weights

BLOCKS = {"R50": (3, 4, 6, 3), "R101": (3, 4, 23, 3), "short": (1, 2, 1, 1)}

# -- The names and shapes of public files ----------------------------------------------------------


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
    depth="R50", norm="FrozenBN", groups=1, per_group=None, stem=64, channels=256, fc=1024,
    classes=80, masks=True, keypoints=0, cascade=False, keypoint_channels=512,
):  # fmt: skip
    """Names and shapes of a detector of Detectron2 (norm: "GN", "SyncBN", "FrozenBN")."""
    shapes = {}
    statistics = ["weight", "bias"]
    if norm != "GN":
        statistics += ["running_mean", "running_var"]
    if norm == "SyncBN":
        statistics += ["num_batches_tracked"]

    def plain(name, shape, bias=None):
        shapes.update({f"{name}.weight": shape, f"{name}.bias": (bias or shape[0],)})

    def normalized(name, shape):
        shapes[f"{name}.weight"] = shape
        for part in statistics:
            shapes[f"{name}.norm.{part}"] = () if part == "num_batches_tracked" else shape[:1]

    layer = plain if norm == "FrozenBN" else normalized
    body = "backbone.bottom_up."
    normalized(body + "stem.conv1", (stem, 3, 7, 7))
    for i, j, part, shape in bottlenecks(BLOCKS[depth], stem, groups, per_group or stem):
        normalized(f"{body}res{i}.{j}." + ("shortcut", "conv1", "conv2", "conv3")[part], shape)
    for i in (2, 3, 4, 5):
        layer(f"backbone.fpn_lateral{i}", (channels, stem * 2**i, 1, 1))
        layer(f"backbone.fpn_output{i}", (channels, channels, 3, 3))
    plain("proposal_generator.rpn_head.conv", (channels, channels, 3, 3))
    plain("proposal_generator.rpn_head.objectness_logits", (3, channels, 1, 1))
    plain("proposal_generator.rpn_head.anchor_deltas", (12, channels, 1, 1))
    for stage in (".0", ".1", ".2") if cascade else ("",):
        head = f"roi_heads.box_head{stage}."
        for k in range(1, 5) if norm != "FrozenBN" else ():
            layer(f"{head}conv{k}", (channels, channels, 3, 3))
        plain(head + "fc1", (fc, channels * 49))
        if norm == "FrozenBN":
            plain(head + "fc2", (fc, fc))
        predictor = f"roi_heads.box_predictor{stage}."
        plain(predictor + "cls_score", (classes + 1, fc))
        plain(predictor + "bbox_pred", (4 if cascade else 4 * classes, fc))
    if masks:
        for k in range(1, 5):
            layer(f"roi_heads.mask_head.mask_fcn{k}", (channels, channels, 3, 3))
        plain("roi_heads.mask_head.deconv", (channels, channels, 2, 2))
        plain("roi_heads.mask_head.predictor", (classes, channels, 1, 1))
    if keypoints:
        name, width = "roi_heads.keypoint_head.", keypoint_channels
        for k in range(1, 9):
            plain(f"{name}conv_fcn{k}", (width, channels if k == 1 else width, 3, 3))
        plain(f"{name}score_lowres", (width, keypoints, 4, 4), bias=keypoints)
    return shapes


# The public detectors: what of them can be told from names and shapes, and what that is.
PUBLIC = {
    "R50 GN": (dict(norm="GN"), dict(norm="gn")),
    "R50 SyncBN": (dict(norm="SyncBN"), dict(norm="syncbn")),
    "R101": (dict(depth="R101"), dict(backbone="resnet101", stride_in_1x1=True)),
    "X101": (dict(depth="R101", groups=32, per_group=8), dict(backbone="resnext101_32x8d")),
    "R50 keypoints": (
        dict(masks=False, keypoints=17, classes=1),
        dict(box_smooth_l1_beta=0.5, stride_in_1x1=True, masks=False, keypoints=17, num_classes=1),
    ),
    "R50 cascade": (dict(cascade=True), dict(cascade=True, stride_in_1x1=True)),
}  # fmt: skip
UNSAID = dict(
    backbone="resnet50", norm="frozen_bn", stride_in_1x1=False, box_smooth_l1_beta=0.0,
    rpn_smooth_l1_beta=0.0, roi_sampling_ratio=0, num_classes=80, masks=True, keypoints=0,
    cascade=False,
)  # fmt: skip
NARROW = dict(depth="short", stem=32, channels=32, fc=32, keypoint_channels=32)


def filled(shapes):
    """Arrays of these shapes: every number is another, variances are positive."""
    random = np.random.default_rng(0)
    arrays = {}
    for name, shape in shapes.items():
        arrays[name] = random.normal(0, 0.1, shape).astype(np.float32)
        if name.endswith(("running_var", "gamma", "_s", "norm.weight")):
            arrays[name] = np.abs(arrays[name]) + np.float32(0.5)
        elif name.endswith("num_batches_tracked"):
            arrays[name] = np.array(7, np.int64)
    return arrays


def write_pickle(path, content, protocol=2):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def small_model(norm="gn", **arguments):
    """A narrow detector with nothing left at 0 or 1, so that every mistake shows."""
    widths = dict(
        num_classes=5, blocks=(1, 2, 1, 1), stem_width=32, width_per_group=32, fpn_channels=32,
        box_head_channels=32, box_head_fc_channels=32, mask_head_channels=32,
        keypoint_head_channels=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = detector.build_model(norm=norm, **widths | arguments)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("running_var"):
            value.data.uniform_(0.5, 1.5)
        elif value.is_floating_point() and not name.startswith("image_"):
            value.data.add_(0.05 * torch.randn_like(value))
    return model.eval()


def converted(path, **given):
    """The checkpoint made of a foreign file, beside it."""
    out = path.with_name(path.name + ".converted.pth")
    convert_weights.convert(path, out, **given)
    return out


# -- torchvision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm, zipped", [("bn", True), ("frozen_bn", False)])
def test_torchvision_resnet(tmp_path, norm, zipped):
    groups = {"groups": 32, "width_per_group": 8} if zipped else {}
    torch.manual_seed(0)
    bottleneck = torchvision.models.resnet.Bottleneck
    theirs = torchvision.models.ResNet(bottleneck, [2, 1, 1, 1], **groups).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean):
                value.data.add_(0.2 * torch.randn_like(value))
            module.running_var.uniform_(0.5, 2)
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


# -- Detectron's ImageNet pickles ------------------------------------------------------------------


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
    "kind, norm",
    [("gn", "gn"), ("affine", "frozen_bn"), ("unfolded", "frozen_bn"), ("unfolded", "syncbn")],
)
def test_detectron_pickles(tmp_path, capsys, kind, norm):
    blobs = filled(caffe2_shapes("R50", kind, stem=32))
    content = {
        "gn": {"blobs": blobs, "cfg": "MODEL: {}"},
        "affine": blobs,  # flat, as some of Detectron's own
        "unfolded": {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True},
    }[kind]
    path = write_pickle(tmp_path / "weights.pkl", content)
    stride = kind != "gn"  # what is assumed of such files
    model = small_model(norm, blocks=BLOCKS["R50"], stride_in_1x1=stride)
    checkpoint = converted(path, **({} if kind == "gn" else {"norm": norm}))
    said = capsys.readouterr().out
    assert f"stride_in_1x1={stride}" in re.search("Assumed.*", said)[0] and "=resnet50" in said
    assert ("fc1000_w" if kind != "gn" else "pred_w") in re.search("not used:.*", said)[0]
    rpn = model.rpn.conv.weight.clone()
    detector.load_weights(model, checkpoint)
    assert torch.equal(model.rpn.conv.weight, rpn)
    mean = torch.tensor([122.7717, 115.9465, 102.9801]) / 255
    torch.testing.assert_close(model.image_mean.flatten(), mean)
    torch.testing.assert_close(model.image_std.flatten(), torch.full((3,), 1 / 255))
    for layer, name in our_convs(model):
        weight = torch.from_numpy(blobs[f"{name}_w"])
        if name == "conv1":
            weight = weight[:, [2, 1, 0]]  # BGR
            name = "conv1" if kind == "gn" else "res_conv1"
        assert torch.equal(layer.conv.weight, weight), name
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


@pytest.mark.parametrize("kind, norm", [
    ("affine", "syncbn"), ("affine", "gn"), ("unfolded", "gn"), ("gn", "frozen_bn"),
])  # fmt: skip
def test_a_norm_that_the_weights_do_not_have_is_refused(tmp_path, kind, norm):
    """MSRA's file has BN folded into a scale and a shift: nothing that a norm can learn from."""
    path = write_pickle(tmp_path / "R-50.pkl", filled(caffe2_shapes("R50", kind, stem=32)))
    with pytest.raises(detector.WeightsError, match="running_mean is not|its norm is"):
        converted(path, norm=norm)


# -- Detectron2's detectors ------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLIC)
def test_detectron2_names_and_shapes(name):
    """At the real widths: the architecture is inferred, and every tensor finds its place."""
    arguments, expected = PUBLIC[name]
    shapes = detectron2_shapes(**arguments)
    with torch.device("meta"):
        state = {n: torch.empty(shape) for n, shape in shapes.items()}
        model = detector.build_model(**convert_weights.infer_config(state))
    expected = UNSAID | expected
    assert {key: getattr(model.config, key) for key in expected} == expected
    found, unused = convert_weights.translate(state, "detectron2", model)
    ours = model.state_dict()
    assert not unused and found.keys() == ours.keys() - {"image_mean", "image_std"}
    assert all(found[n].shape == ours[n].shape for n in found)
    back = convert_weights.to_detectron2(model)
    assert back.keys() - {"pixel_mean", "pixel_std"} == shapes.keys()


@pytest.mark.parametrize("name", ["R50 GN", "R50 keypoints"])
def test_what_a_file_of_the_model_zoo_does_not_say_is_assumed_and_printed(tmp_path, capsys, name):
    arguments, _ = PUBLIC[name]
    shapes = detectron2_shapes(**arguments | NARROW)
    for i in range(5):  # the zoo's files of 2019 and 2020 hold the anchors, too
        shapes[f"proposal_generator.anchor_generator.cell_anchors.{i}"] = (3, 4)
    content = {"model": OrderedDict(filled(shapes)), "__author__": "Detectron2 Model Zoo"}
    model = detector.load_model(converted(write_pickle(tmp_path / "a.pkl", content)))
    said = capsys.readouterr().out
    assert said.count("cell_anchors") == 5 and f"norm={model.config.norm}" in said
    assert "stride_in_1x1=" in re.search("Assumed.*", said)[0]
    assert len(model.data_settings["classes"]) == model.config.num_classes
    assert model.data_settings["category_ids"][-1] == (1 if model.config.keypoints else 90)
    mean = torch.tensor([123.675, 116.28, 103.53]) / 255
    torch.testing.assert_close(model.image_mean.flatten(), mean)
    torch.testing.assert_close(model.image_std.flatten(), torch.full((3,), 1 / 255))


def test_what_a_file_does_not_say_can_be_given(tmp_path, capsys):
    arrays = filled(detectron2_shapes(norm="GN", **NARROW, classes=5))
    path = write_pickle(tmp_path / "a.pkl", {"model": arrays, "__author__": "me"})
    arguments = "--image-std 0.25 0.5 0.125 --stride-in-1x1 1 --roi-sampling-ratio 2".split()
    convert_weights.main([str(path), str(tmp_path / "a.pth"), *arguments])
    model = detector.load_model(tmp_path / "a.pth")
    assert tuple(model.image_std.flatten().tolist()) == model.config.image_std == (0.25, 0.5, 0.125)
    assert model.config.stride_in_1x1 == 1 and model.config.roi_sampling_ratio == 2
    assumed = re.search("Assumed.*", capsys.readouterr().out)[0]
    assert "image_mean" in assumed and "image_std" not in assumed and "stride" not in assumed
    # Files of 2020 and later may hold the statistics (BGR, 0..255); they count then.
    arrays["pixel_mean"] = np.float32([[[103.53]], [[116.28]], [[123.675]]])
    arrays["pixel_std"] = np.float32([[[57.375]], [[57.12]], [[58.395]]])
    path = write_pickle(tmp_path / "b.pkl", {"model": arrays, "__author__": "me"})
    model = detector.load_model(converted(path))
    std = torch.tensor([58.395, 57.12, 57.375]) / 255
    torch.testing.assert_close(model.image_std.flatten(), std)
    assert "image_" not in re.search("Assumed.*", capsys.readouterr().out)[0]


@pytest.mark.parametrize(
    "norm, arguments",
    [
        ("gn", {}),
        ("syncbn", {"image_std": (0.2, 0.3, 0.4), "image_mean": (0.1, 0.2, 0.7)}),
        ("frozen_bn", {"stride_in_1x1": True, "cascade": True}),
        ("gn", {"keypoints": 17, "masks": False, "num_classes": 1}),
    ],
)
def test_round_trip_through_detectron2(tmp_path, norm, arguments):
    """Our model in Detectron2's names and back: the same weights to the bit, the same config."""
    model = small_model(norm, **arguments)
    detector.save_model(model, tmp_path / "a.pth")
    there, back = tmp_path / "b.pth", tmp_path / "c.pth"
    convert_weights.main(["--to-detectron2", str(tmp_path / "a.pth"), str(there)])
    convert_weights.convert(there, back, stride_in_1x1=model.config.stride_in_1x1)
    again = detector.load_model(back)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    for field in ("blocks", "norm", "num_classes", "masks", "keypoints", "cascade"):
        assert getattr(again.config, field) == getattr(model.config, field)


# -- Files of all kinds ----------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickle_protocols_and_attributes(tmp_path, protocol):
    """Files that people make themselves: with newer protocols, and a state dict's _metadata."""
    arrays = filled(detectron2_shapes(norm="SyncBN", **NARROW, classes=5))
    state = OrderedDict(arrays)
    state._metadata = OrderedDict([("", {"version": 1})])
    content = {"model": state, "iteration": np.int64(3), "names": ["a", ("b", None)]}
    found = convert_weights.read_tensors(write_pickle(tmp_path / "a.pkl", content, protocol))
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[name].numpy(), array) for name, array in arrays.items())


def test_pickles_of_python_2(tmp_path):
    """{"blobs": {"a": [[1, 2]]}} as Detectron's files have it: strings of bytes, numpy.core."""
    (tmp_path / "a.pkl").write_bytes(
        b"\x80\x02}T\x05\x00\x00\x00blobs}T\x01\x00\x00\x00acnumpy.core.multiarray\n_reconstruct\n"
        b"cnumpy\nndarray\nK\x00\x85T\x01\x00\x00\x00b\x87R(K\x01K\x01K\x02\x86cnumpy\ndtype\n"
        b"T\x02\x00\x00\x00f4\x89\x88\x87R(K\x03T\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
        b"K\x00tb\x89T\x08\x00\x00\x00\x00\x00\x80?\x00\x00\x00@tbss."
    )
    assert convert_weights.read_tensors(tmp_path / "a.pkl")["a"].tolist() == [[1.0, 2.0]]


class Program:
    """A pickle of it calls function(*arguments)."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("kind", ["touch", "object array", "_reconstruct", "name"])
@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".old.pth"])
def test_nothing_in_a_file_is_executed(tmp_path, kind, suffix):
    trace, path = tmp_path / "executed", tmp_path / f"a{suffix}"
    touch = Program(Path.touch, trace)
    hidden = np.empty(2, object)
    hidden[0] = touch
    content = {
        "touch": touch,
        "object array": hidden,
        "_reconstruct": Program(np.zeros(1).__reduce__()[0], Path, str(trace)),  # of any class
        "name": np.load,  # would be called by a longer file
    }[kind]
    content = {"model": {"conv1.weight": content}}
    if suffix == ".pkl":
        write_pickle(path, content)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=suffix == ".pth")
    with pytest.raises(detector.WeightsError, match="cannot be read as weights: it is damaged, or"):
        convert_weights.read_tensors(path)
    assert not trace.exists()
    if kind == "touch" and suffix == ".pkl":  # the test is worth something
        pickle.loads(path.read_bytes())
        assert trace.exists()


def test_bad_files_are_refused_in_a_sentence_and_nothing_is_written(tmp_path):
    complete = filled(detectron2_shapes(norm="GN", **NARROW))
    other = {"roi_heads.mask_head.mask_fcn2.weight": np.zeros((32, 5, 3, 3))}
    deformable = {"backbone.bottom_up.res3.0.conv2_offset.weight": np.zeros(3)}
    contents = [  # and words of the message
        ([1, 2], "damaged"),
        ({}, "no model known"),
        ({"model": {"encoder.weight": np.zeros(3)}}, "no model known"),
        ({n: a for n, a in complete.items() if "box_pred" not in n}, "no 'box_heads.0.classifier"),
        ({n: a for n, a in complete.items() if "mask_fcn3.norm" not in n}, "convs.2.norm.weight"),
        (complete | other, "mask_head.convs.1.conv.weight has shape"),
        (complete | deformable, "conv2_offset.weight is in the file only"),
    ]
    whole = pickle.dumps(complete)
    files = [(pickle.dumps(content), words) for content, words in contents]
    files += [(whole[: len(whole) // 2], "damaged"), (b"<html>404: not found</html>", "damaged")]
    for content, words in files:
        (tmp_path / "a.pkl").write_bytes(content)
        with pytest.raises(detector.WeightsError, match=rf"a\.pkl .*{words}.*\.$"):
            convert_weights.convert(tmp_path / "a.pkl", tmp_path / "out.pth")
    torch.save(small_model().state_dict(), tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(detector.WeightsError, match=r"a\.pth .*damaged.*\.$"):
        convert_weights.convert(tmp_path / "a.pth", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()
