"""Weights equal, our numbers are Detectron2's: checked against golden_*.npz, without Detectron2.

make_detectron2_golden.py made these files with Detectron2's own code. Weights, images and targets
are functions of seeds, shared by both; the files hold only what came out. The networks are narrow
but otherwise the published ones: R50-FPN with GN, SyncBN, frozen BN, cascade, keypoints.

Why the tolerances: both sides compute the same expressions in float32, but sums run in another
order, here and from one CPU to the next. That is some 1e-6 of a value's scale in each layer, and
adds up over 60 of them: `close` allows 1e-4 of the largest value, where a mistake in the model
makes 1e-2 and more. What follows from proposals (scores, masks, heatmaps) is allowed ten times as
much, since a box that moves by 1e-4 pixels moves all its samples. NMS and top-k compare such
numbers: where two are as close as that, a box may come or go, or two change places. So lists of
boxes are compared by partners, and one in a hundred may be without.
"""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import model as detector
from tools import convert_weights

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

# Weights of the predicting layers, in units of 1 / sqrt(inputs): about what makes their outputs
# spread by 2 (objectness, masks), 3 (classes), 0.3 and 0.5 (boxes).
PREDICTORS = (
    "objectness_logits", "anchor_deltas", "cls_score", "bbox_pred", "predictor", "score_lowres"
)  # fmt: skip
GAINS = {
    "gn": dict(zip(PREDICTORS, (2.2, 0.4, 6.3, 1.0, 6.5))),
    "syncbn": dict(zip(PREDICTORS, (1.2, 0.23, 12, 1.9, 3.9))),
    "frozen_bn": dict(zip(PREDICTORS, (1.5, 0.28, 2.7, 0.43, 5.4))),
    "cascade": dict(zip(PREDICTORS, (1.5, 0.28, 2.4, 0.39, 5.3))),
    "keypoints": dict(zip(PREDICTORS, (1.5, 0.28, 3.2, 0.5, 0, 5.8))),
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
            # Without a mean: what all positions share would grow from layer to layer, and make all
            # detections ones of the same class.
            noise = noise - noise.mean(tuple(range(1, len(shape))), keepdims=True)
            value = noise * gain / np.prod(shape[1:]) ** 0.5
        elif parameter == "running_var":
            value = np.exp(0.2 * noise)
            if "stem" in layer and CASES[case].get("image_std") is None:
                value *= 5000  # of an image in 0..255
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
            image[:, y : y + random.randint(20, 90), x : x + random.randint(20, 90)] = (
                random.randint(0, 256, (3, 1, 1))
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
    """At most `most` numbers of an array, evenly spread (an odd step meets every channel)."""
    flat = np.asarray(array).reshape(-1)
    step = max(len(flat) // most, 1)
    return flat[:: step + (step % 2 == 0)][:most]


# -- The tests -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=CASES)
def golden(request):
    """(case, our model with Detectron2's weights, Detectron2's numbers)."""
    case = request.param
    model = detector.build_model(**golden_arguments(case))
    plain = convert_weights.to_detectron2(model)
    weights = golden_weights(case, {name: tuple(t.shape) for name, t in plain.items()})
    found, unused = convert_weights.translate(weights, "detectron2", model)
    missing = model.load_state_dict(found, strict=False).missing_keys
    assert not unused
    assert all(name.startswith("image_") or "num_batches" in name for name in missing)
    with np.load(Path(__file__).parent / f"golden_{case}.npz") as file:
        return case, model.eval(), dict(file)


def close(ours, theirs, tolerance=1e-4):
    """Equal up to `tolerance` of the largest value; see the top of the file."""
    ours = np.asarray(ours.numpy(force=True) if torch.is_tensor(ours) else ours)
    assert ours.shape == theirs.shape
    scale = max(np.abs(theirs).max(), 1e-12)
    difference = np.abs(ours - theirs).max() / scale
    assert difference < tolerance, f"differs by {difference:.1e} of the largest value, {scale:.3g}"


def partners(boxes, labels, their_boxes, their_labels, distance=0.05):
    """For each of their boxes the index of ours: same label, within `distance` pixels; or -1."""
    gap = np.abs(np.asarray(boxes)[None] - their_boxes[:, None]).max(2)
    gap[np.asarray(labels)[None] != their_labels[:, None]] = np.inf
    return np.where(gap.min(1) < distance, gap.argmin(1), -1)


@pytest.mark.parametrize("i", [0, 1])
@torch.no_grad()
def test_steps(golden, i):
    case, model, theirs = golden
    theirs = {name[2:]: value for name, value in theirs.items() if name.startswith(f"{i}/")}
    batch, sizes = model.batch([golden_images()[i]])
    features = model.features(batch)
    for level, name in zip(features, ("p2", "p3", "p4", "p5", "p6")):
        close(subsample(level), theirs[name])
    objectness, deltas, anchors = model.rpn(features)
    close(subsample(torch.cat(anchors)), theirs["anchors"], 1e-6)
    close(subsample(torch.cat(objectness, dim=1)), theirs["objectness"])
    close(subsample(torch.cat(deltas, dim=1)), theirs["rpn_deltas"])

    (boxes,), expected = model.proposals(features, sizes), theirs["proposals"]
    assert len(boxes) == len(expected) == 200
    none = np.zeros(200)
    partner = partners(boxes, none, expected, none)
    assert (partner < 0).mean() <= 0.01
    assert np.abs(partner - np.arange(200))[partner >= 0].max() <= 2, "in another order"

    # Class logits and deltas, of every stage, for Detectron2's own proposals.
    pooled = model.pool(features, [torch.from_numpy(expected[:: -(-200 // 25)])], 7)
    for stage, head in enumerate(model.box_heads):
        logits, deltas = head(pooled)
        close(logits.roll(-1, dims=1), theirs[f"class_logits_{stage}"])  # background last
        close(deltas.flatten(1), theirs[f"box_deltas_{stage}"])


@pytest.mark.parametrize("i", [0, 1])
@torch.no_grad()
def test_detections(golden, i):
    case, model, theirs = golden
    image = golden_images()[i]
    theirs = {name[2:]: value for name, value in theirs.items() if name.startswith(f"{i}/")}
    assert len(theirs["boxes"]) >= 50
    assert len(np.unique(theirs["labels"])) >= (1 if case == "keypoints" else 10)

    ours = model([image])[0]
    partner = partners(ours["boxes"], ours["labels"], theirs["boxes"], theirs["labels"])
    found = partner >= 0
    assert len(ours["boxes"]) == len(theirs["boxes"]) and (~found).mean() <= 0.01
    close(ours["scores"][partner[found]], theirs["scores"][found], 1e-3)

    if "masks" in theirs:
        close(ours["masks"][partner[found]][:, 1::3, 1::3], theirs["masks"][found], 2e-3)
        # Pasted into an image of another size
        h, w = image.shape[-2:]
        size = [round(side * OUTPUT_SCALE) for side in (h, w)]
        boxes = ours["boxes"] * torch.tensor([size[1] / w, size[0] / h]).repeat(2)
        # A pixel within 0.002 of the threshold, the masks' tolerance, may fall on either side.
        pair = [evaluate.paste_masks(ours["masks"] + e, boxes, *size) for e in (-2e-3, 2e-3)]
        low, high = (masks.numpy()[partner] for masks in pair)  # [their detections, h, w]
        area = theirs["final_areas"][found]
        assert (low[found].sum((1, 2)) <= area).all() and (area <= high[found].sum((1, 2))).all()
        bits = np.unpackbits(theirs["final_masks"])[: len(found[::10]) * size[0] * size[1]]
        bits = bits.reshape(-1, *size).astype(bool)  # of every tenth
        assert ((low[::10] <= bits) & (bits <= high[::10]))[found[::10]].all()
    if "keypoints" in theirs:
        features = model.features(model.batch([image])[0])
        heatmaps = model.keypoint_heatmaps(features, [ours["boxes"]])[0]
        close(heatmaps[partner[found]][:, ::4, 3::8, 3::8], theirs["heatmaps"][found], 1e-3)
        # A heatmap is resized to the box in whole pixels: of a side of 77.0000, to 77 or 78.
        sides = theirs["boxes"][:, 2:] - theirs["boxes"][:, :2]
        found &= (np.abs(sides - sides.round()) > 1e-3).all(1)
        expected = theirs["keypoints"][found]
        gap = np.abs(ours["keypoints"][partner[found]].numpy() - expected)[..., :2].max(2)
        # The highest of 56 x 56 places: where two are equally high, it may be the other one.
        assert (gap > 0.05).mean() < 0.01
        close(ours["keypoints_scores"][partner[found]], expected[..., 2], 1e-3)


LOSSES = {
    "loss_objectness": "loss_rpn_cls", "loss_rpn_box_reg": "loss_rpn_loc", "loss_mask": "loss_mask",
    "loss_keypoint": "loss_keypoint", "loss_classifier": "loss_cls", "loss_box_reg": "loss_box_reg",
} | {f"loss_classifier_{k + 1}": f"loss_cls_stage{k}" for k in range(3)} | {
    f"loss_box_reg_{k + 1}": f"loss_box_reg_stage{k}" for k in range(3)
}  # fmt: skip


def test_losses_and_gradients(golden, monkeypatch):
    """Every loss, and the norm of every parameter's gradient, with sampling made exhaustive.

    Detectron2 trains the masks of a cascade on the first stage's foreground: so do we, here.
    """
    case, model, theirs = golden
    state = {name: value.clone() for name, value in model.state_dict().items()}
    box_losses = model.box_losses

    def of_the_first_stage(features, samples, targets, sizes):
        losses, _ = box_losses(features, samples, targets, sizes)
        return losses, samples

    monkeypatch.setattr(model, "box_losses", of_the_first_stage)
    model.train()
    losses = model(golden_images(), golden_targets(case))
    sum(losses.values()).backward()
    model.eval()
    norms = {n: p.grad.norm() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    model.load_state_dict(state)  # SyncBN's running statistics

    expected = {name[5:]: value for name, value in theirs.items() if name.startswith("loss/")}
    assert {LOSSES[name] for name in losses} == expected.keys()
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[LOSSES[name]], rel=1e-4), name
    their_norms = {name[5:]: value for name, value in theirs.items() if name.startswith("norm/")}
    expected = {convert_weights.our_name(n, "detectron2"): v for n, v in their_norms.items()}
    assert norms.keys() == expected.keys()
    # Looser: where |x| (the L1 loss) or ReLU has its corner, a value next to it may fall on either
    # side, and the gradient jumps.
    largest = max(expected.values())
    for name, norm in norms.items():
        assert abs(norm.item() - expected[name]) < 1e-2 * expected[name] + 1e-5 * largest, name
