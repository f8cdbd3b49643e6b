"""Convert weights of other projects to a checkpoint of this one, and back to Detectron2.

  python tools/convert_weights.py model_final_f10217.pkl mask_rcnn_r50.pth
  python tools/convert_weights.py resnet50-0676ba61.pth r50.pth --norm syncbn
  python tools/convert_weights.py --to-detectron2 runs/r50-gn/checkpoint_0540000.pth d2.pth

It reads Detectron2's detectors with FPN (.pkl, .pth) and, as backbones for `train.py --init`,
torchvision's classification models (.pth) and the ImageNet models of Detectron and MSRA (.pkl).
What a file does not say is assumed, printed, and written into the checkpoint; options state it
instead. Nothing in a file is executed.
"""

import argparse
import dataclasses
import io
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the five modules
import evaluate
import model as detector
from model import WeightsError

# -- Names -----------------------------------------------------------------------------------------

# Our layers and Detectron2's; {i}, {j}, {k} are numbers and {i+2} is i + 2. Of those with a norm,
# `layer.conv` and `layer.norm` are `layer` and `layer.norm` there.
# fmt: off
WITH_NORM = {
    "backbone.stem": "backbone.bottom_up.stem.conv1",
    "backbone.res{i}.{j}.conv{k}": "backbone.bottom_up.res{i}.{j}.conv{k}",
    "backbone.res{i}.{j}.shortcut": "backbone.bottom_up.res{i}.{j}.shortcut",
    "backbone.conv{i}.{j}": "backbone.bottom_up.conv{i}_{j+1}",  # VGG; not in Detectron2
    "fpn.lateral.{i}": "backbone.fpn_lateral{i+2}",
    "fpn.output.{i}": "backbone.fpn_output{i+2}",
    "box_heads.{i}.convs.{j}": "roi_heads.box_head.{i}.conv{j+1}",
    "mask_head.convs.{i}": "roi_heads.mask_head.mask_fcn{i+1}",
    "keypoint_head.convs.{i}": "roi_heads.keypoint_head.conv_fcn{i+1}",
}
WITHOUT = {
    "rpn.conv": "proposal_generator.rpn_head.conv",
    "rpn.objectness": "proposal_generator.rpn_head.objectness_logits",
    "rpn.deltas": "proposal_generator.rpn_head.anchor_deltas",
    "box_heads.{i}.fcs.{j}": "roi_heads.box_head.{i}.fc{j+1}",
    "box_heads.{i}.classifier": "roi_heads.box_predictor.{i}.cls_score",
    "box_heads.{i}.regressor": "roi_heads.box_predictor.{i}.bbox_pred",
    "mask_head.deconv": "roi_heads.mask_head.deconv",
    "mask_head.predictor": "roi_heads.mask_head.predictor",
    "keypoint_head.deconv": "roi_heads.keypoint_head.score_lowres",
}
NAMES = [*WITHOUT.items()]
NAMES += [(f"{a}.{part}", b + there) for a, b in WITH_NORM.items()
          for part, there in (("conv", ""), ("norm", ".norm"))]

# What turns the names of a format into those of Detectron2's cascades: (pattern, replacement).
BODY = (r"^(stem|res\d|conv\d_\d)", r"backbone.bottom_up.\1")
VGG = {0: "1_1", 2: "1_2", 5: "2_1", 7: "2_2", 10: "3_1", 12: "3_2", 14: "3_3", 17: "4_1",
       19: "4_2", 21: "4_3", 24: "5_1", 26: "5_2", 28: "5_3"}
SPELLING = {
    "detectron2": [(r"(box_head|box_predictor)\.(?=[a-z])", r"\1.0.")],
    "torchvision": [
        (r"^(conv|bn)1", r"stem.\g<0>"), (r"\bbn(\d)", r"conv\1.norm"), (r"^layer1", "res2"),
        (r"^layer2", "res3"), (r"^layer3", "res4"), (r"^layer4", "res5"),
        (r"downsample\.0", "shortcut"), (r"downsample\.1", "shortcut.norm"),
        (r"^classifier\.0", "roi_heads.box_head.0.fc1"),
        (r"^classifier\.3", "roi_heads.box_head.0.fc2"),
        *((rf"^features\.{n}\.", f"conv{name}.") for n, name in VGG.items()), BODY,
    ],
    "caffe2": [
        (r"^(res_)?conv1_(?!\d)", "stem.conv1_"), (r"^res(\d)_(\d+)_branch", r"res\1.\2."),
        (r"\.2a", ".conv1"), (r"\.2b", ".conv2"), (r"\.2c", ".conv3"), (r"\.1_", ".shortcut_"),
        (r"_[bg]n_", ".norm_"), (r"_(w|s|gamma)$", ".weight"), (r"_(b|beta)$", ".bias"),
        (r"_(rm|running_mean)$", ".running_mean"), (r"_(riv|running_var)$", ".running_var"),
        ("^fc6", "roi_heads.box_head.0.fc1"), ("^fc7", "roi_heads.box_head.0.fc2"), BODY,
    ],
}
# fmt: on
FIRST = {"backbone.stem.conv.weight", "backbone.conv1.0.conv.weight"}  # sees the image

# Mean and standard deviation that belong to the weights of a format where the file does not say
# them: RGB, for images in [0, 1]. Detectron2's scratch 9x models and X-101 have other deviations.
STATISTICS = {
    "detectron2": ((123.675 / 255, 116.28 / 255, 103.53 / 255), (1 / 255,) * 3),
    "torchvision": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "caffe2": ((122.7717 / 255, 115.9465 / 255, 102.9801 / 255), (1 / 255,) * 3),
}
STATISTICS_NAMES = {"image_mean": "pixel_mean", "image_std": "pixel_std"}  # here, Detectron2


def rename(name, source, target):
    """A parameter's name of one side of NAMES (0: ours, 1: Detectron2's) on the other, or None."""
    layer, _, parameter = name.rpartition(".")
    for row in NAMES:
        match = re.fullmatch(re.sub(r"\{(\w)(\+\d)?\}", r"(?P<\1>\\d+)", row[source]), layer)
        if match:
            shifts = dict(re.findall(r"\{(\w)(\+\d)?\}", row[source]))
            numbers = {n: int(v) - int(shifts[n] or 0) for n, v in match.groupdict().items()}
            numbers |= {f"{n}+{by}": v + by for n, v in numbers.items() for by in (1, 2)}
            return row[target].format(**numbers) + "." + parameter
    return None


def our_name(name, kind):
    """Our name of a parameter of another format, a key of SPELLING; None if there is none."""
    for pattern, replacement in SPELLING[kind]:
        name = re.sub(pattern, replacement, name)
    return rename(name, 1, 0)


def convert_tensor(name, tensor, kind, forward=True):
    """A tensor of another format as ours (forward), or ours as theirs. Exact both ways.

    Detectron and Detectron2 read BGR, we RGB. Detectron2's background is the last class, ours the
    first; box deltas and masks have no background in either.
    """
    if name in FIRST and kind in ("detectron2", "caffe2"):
        return tensor.flip(1)
    if kind == "detectron2" and ".classifier." in name:
        return tensor.roll(1 if forward else -1, dims=0)
    return tensor


def translate(state, kind, model):
    """Tensors of another format that `model` has, by our names, and the names of the others."""
    found, unused = {}, []
    own = model.state_dict().keys()
    for name, tensor in state.items():
        ours = our_name(name, kind)
        if ours in own:
            found[ours] = convert_tensor(ours, tensor, kind)
        elif name not in STATISTICS_NAMES.values():
            unused.append(name)
    return found, sorted(unused)


def to_detectron2(model):
    """The model's weights with Detectron2's names and conventions: a dict of tensors."""
    state = {}
    for name, tensor in model.state_dict().items():
        theirs = rename(name, 0, 1)
        if theirs and not model.config.cascade:
            theirs = re.sub(r"(box_head|box_predictor)\.0\.", r"\1.", theirs)
        if theirs:
            state[theirs] = convert_tensor(name, tensor, "detectron2", forward=False).clone()
    for ours, theirs in STATISTICS_NAMES.items():
        state[theirs] = getattr(model, ours).double().flip(0) * 255
    return state


# -- Reading a file without executing it -----------------------------------------------------------


def make_array(data, kind, shape, order="C"):
    data = data.encode("latin1") if isinstance(data, str) else data  # a string of Python 2
    # (np.frombuffer refuses types of objects, and gives an array that cannot be written to)
    return np.frombuffer(data, kind.dtype).reshape(shape, order=order).copy()


class PickledArray:
    """What a numpy array in a pickle becomes: `value`, made here and not by numpy's unpickling."""

    def __setstate__(self, state):
        _, shape, kind, fortran, data = state
        self.value = make_array(data, kind, shape, "F" if fortran else "C")


class PickledType:
    """What a numpy dtype in a pickle becomes."""

    def __init__(self, code, *_):
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class RestrictedUnpickler(pickle.Unpickler):
    """Reads arrays, numbers, strings and containers, and refuses every name but these few.

    A pickle is a program: what it names is imported, and what it names can be called.
    """

    ALLOWED = {
        "numpy.core.multiarray._reconstruct": lambda *_: PickledArray(),
        "numpy.core.numeric._frombuffer": make_array,
        "numpy.core.multiarray.scalar": lambda kind, data: make_array(data, kind, ()),
        "numpy.ndarray": None,  # an argument of _reconstruct, never called
        "numpy.dtype": PickledType,
        "_codecs.encode": lambda text, encoding: text.encode("latin1"),
        "collections.OrderedDict": OrderedDict,
    }

    def find_class(self, module, name):
        full = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if full not in self.ALLOWED:
            raise pickle.UnpicklingError(f"weights do not need {module}.{name}")
        return self.ALLOWED[full]


def read_tensors(path):
    """The tensors of a .pkl or .pth file by their names there. Raises WeightsError, or OSError."""
    try:
        content = 0
        if not zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                content = RestrictedUnpickler(file, encoding="latin1").load()
        if isinstance(content, int):  # torch's format, or its older one, which starts with a number
            content = torch.load(path, map_location="cpu", weights_only=True)
        content = content.get("model", content.get("blobs", content))
        arrays = {name: getattr(value, "value", value) for name, value in content.items()}
        kinds = np.ndarray | torch.Tensor
        return {n: torch.as_tensor(a) for n, a in arrays.items() if isinstance(a, kinds)}
    except OSError:
        raise
    except Exception as error:  # whatever a truncated, foreign or malicious file brings about
        reason = "it is damaged, or holds more than tensors, numbers and text"
        raise WeightsError(f"{path} cannot be read as weights: {reason}.") from error


# -- Conversion ------------------------------------------------------------------------------------

# Fields of Config that are the first dimension of a tensor.
WIDTHS = {
    "stem_width": "backbone.stem.conv.weight",
    "fpn_channels": "fpn.lateral.0.conv.weight",
    "box_head_channels": "box_heads.0.convs.0.conv.weight",
    "box_head_fc_channels": "box_heads.0.fcs.0.weight",
    "mask_head_channels": "mask_head.convs.0.conv.weight",
    "keypoint_head_channels": "keypoint_head.convs.0.conv.weight",
}


def infer_config(state, kind="detectron2"):
    """Arguments of `build_model` for the tensors of a file, from their names and shapes.

    What these do not tell (stride_in_1x1, roi_sampling_ratio, betas) is as in the public files.
    Raises KeyError with our name of a parameter that is missing.
    """
    shapes = {our_name(name, kind) or name: tensor.shape for name, tensor in state.items()}
    widths = {field: shapes[name][0] for field, name in WIDTHS.items() if name in shapes}
    if "backbone.conv1.0.conv.weight" in shapes:
        widths["stem_width"] = shapes["backbone.conv1.0.conv.weight"][0]
        return {"backbone": "vgg16", "norm": "none", "masks": False, **widths}

    def count(modules):  # the different numbers behind this name
        return len({n[len(modules) :].split(".")[0] for n in shapes if n.startswith(modules)})

    outputs, inputs = shapes["backbone.res2.0.conv2.conv.weight"][:2]
    blocks = tuple(count(f"backbone.res{i}.") for i in (2, 3, 4, 5))
    body = {"blocks": blocks, "groups": outputs // inputs, "width_per_group": inputs}
    config = {"backbone": "resnet50", "norm": "gn", **body, **widths}
    for name, changes in detector.BACKBONES.items():
        if body.items() <= ({"groups": 1, "width_per_group": 64} | changes).items():
            config["backbone"] = name  # a body without a name of its own stays a resnet50
    if "backbone.stem.norm.running_mean" in shapes or any("_bn_" in name for name in state):
        config["norm"] = "bn" if kind == "torchvision" else "frozen_bn"
    if "fpn.lateral.0.norm.running_mean" in shapes:
        config["norm"] = "syncbn"
    # The ResNets with frozen BN go back to MSRA's, which have the stride on the 1x1.
    config["stride_in_1x1"] = config["norm"] == "frozen_bn" and body["groups"] == 1
    if kind != "detectron2":
        return config
    classes = shapes["box_heads.0.classifier.weight"][0] - 1
    keypoints = shapes.get("keypoint_head.deconv.weight", (0, 0))[1]
    return config | {
        "num_classes": classes,
        "masks": "mask_head.predictor.weight" in shapes,
        "keypoints": keypoints,
        "cascade": "box_heads.1.classifier.weight" in shapes,
        "box_class_agnostic": shapes["box_heads.0.regressor.weight"][0] < 4 * classes,
        "box_head_convs": count("box_heads.0.convs."),
        "box_head_fcs": count("box_heads.0.fcs."),
        "mask_head_convs": count("mask_head.convs."),
        "keypoint_head_convs": count("keypoint_head.convs."),
        "roi_sampling_ratio": 0,
        "rpn_smooth_l1_beta": 0.0,
        "box_smooth_l1_beta": 0.5 if keypoints else 0.0,
    }


def fit(state, kind, model):
    """A file's tensors by our names, in the model's types, and the names that were not used.

    Raises ValueError unless the file has all tensors of the model, or of its backbone.
    """
    found, unused = translate(state, kind, model)
    for name in unused:  # e.g. statistics of BN where the model has GN
        if re.match(r"(backbone|layer\d|features|res\d)(?!.*num_batches_tracked)", name):
            raise ValueError(f"{name} is in the file only")
    absent = {"num_batches_tracked": 0}
    if kind == "caffe2" and model.config.norm == "frozen_bn":  # BN folded into scale and shift
        absent |= {"running_mean": 0, "running_var": 1 - 1e-5}  # + eps is 1
    weights = {}
    for name, own in model.state_dict().items():
        if name in found:
            weights[name] = found[name].to(own.dtype, copy=True)
            if weights[name].shape != own.shape:
                raise ValueError(f"{name} has shape {tuple(found[name].shape)} in the file")
        elif name in STATISTICS_NAMES:
            weights[name] = torch.tensor(getattr(model.config, name)).view(own.shape)
        elif kind == "detectron2" or name.startswith("backbone."):
            value = absent.get(name.rpartition(".")[2])
            if value is None:
                raise ValueError(f"{name} is not in the file")
            weights[name] = torch.full(own.shape, value, dtype=own.dtype)
    return weights, unused


def read_state(path):
    """The tensors of a foreign file by their names there, and its format, a key of SPELLING."""
    tensors = read_tensors(path)
    for kind in SPELLING:
        if FIRST & {our_name(name, kind) for name in tensors}:
            return tensors, kind
    known = "a classification model of torchvision's or a detector of Detectron2's with FPN"
    raise WeightsError(f"{path} has the names of no model known here; take {known}.")


def convert(source, target, **given):
    """Write the checkpoint `target` from another project's file `source`; print what is assumed.

    given: fields of Config that replace what is inferred or assumed: norm, stride_in_1x1,
    roi_sampling_ratio, image_mean, image_std. Raises WeightsError.
    """
    state, kind = read_state(source)
    for name, theirs in STATISTICS_NAMES.items():
        if theirs in state:  # BGR, for images in 0..255
            statistics = (state[theirs].double().flatten().flip(0) / 255).tolist()
            given = {name: tuple(statistics)} | given
    try:
        inferred = infer_config(state, kind)
        if "norm" in given and "gn" in (given["norm"], inferred["norm"]):
            raise ValueError(f"its norm is {inferred['norm']}")
        fields = dict(zip(STATISTICS_NAMES, STATISTICS[kind])) | inferred | given
        with torch.device("meta"):  # names and shapes alone
            model = detector.build_model(**fields)
        weights, unused = fit(state, kind, model)
    except KeyError as error:
        raise WeightsError(f"{source} cannot be converted: it has no {error}.") from None
    except ValueError as error:
        raise WeightsError(f"{source} cannot be converted: {str(error).rstrip('.')}.") from None
    config = dataclasses.asdict(model.config)
    if kind != "detectron2":  # of a backbone, nothing is said that belongs to a detector
        config = {name: config[name] for name in ("stride_in_1x1", *fields)}
    settings = {"min_size": 800, "max_size": 1333, "classes": None, "category_ids": None}
    if config.get("num_classes") == 80 or config.get("keypoints"):  # COCO's, or its person
        names = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]  # by category id
        ids = [i for i, name in enumerate(names) if i and name != "N/A"][: config["num_classes"]]
        settings |= {"classes": [names[i] for i in ids], "category_ids": ids}
    save({"config": config, "data": settings, "weights": weights}, target)
    print(f"Weights   {len(weights)} tensors of {source}; not used: {', '.join(unused) or 'none'}")
    shown = ("backbone", "norm", "num_classes", "masks", "keypoints", "cascade")
    assumed = ("stride_in_1x1", "roi_sampling_ratio", *STATISTICS_NAMES)
    for title, names in (("Inferred", shown), ("Assumed ", assumed)):
        told = [f"{name}={config[name]}" for name in names if name in config.keys() - given]
        print(f"{title}  {', '.join(told)}")
    print(f"Written   {target}")


def save(content, target):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    detector.write_whole(target, buffer.getbuffer())


def export(source, target):
    """Write a checkpoint of ours as Detectron2 reads it, a .pth file."""
    model = detector.load_model(source)
    save({"model": to_detectron2(model)}, target)
    names = ("norm", "stride_in_1x1", "roi_sampling_ratio", *STATISTICS_NAMES)
    told = ", ".join(f"{name}={getattr(model.config, name)}" for name in names)
    print(f"Written   {target}; to be said by Detectron2's configuration: {told}")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", metavar="IN", help="the file to convert")
    add("target", metavar="OUT", help="the file to write")
    add("--to-detectron2", action="store_true", help="convert a checkpoint of this project")
    rgb = {"nargs": 3, "type": float, "metavar": ("R", "G", "B")}
    add("--image-mean", **rgb, help="for images in [0, 1], such as 0.485 0.456 0.406")
    add("--image-std", **rgb, help="for images in [0, 1], such as 0.229 0.224 0.225")
    add("--stride-in-1x1", type=int, choices=(0, 1), help="1: the stride is on the first 1x1")
    add("--roi-sampling-ratio", type=int, metavar="N", help="RoIAlign's; 0: adaptive")
    add("--norm", choices=("gn", "syncbn", "bn", "frozen_bn"), help="the norm to use it with")
    given = vars(parser.parse_args(arguments))
    source, target = given.pop("source"), given.pop("target")
    if given.pop("to_detectron2"):
        return export(source, target)
    given = {n: tuple(v) if isinstance(v, list) else v for n, v in given.items() if v is not None}
    convert(source, target, **given)


if __name__ == "__main__":
    sys.exit(evaluate.run_command("convert_weights.py", main))
