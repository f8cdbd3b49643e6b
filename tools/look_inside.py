"""Draw what happens to one image inside the detector, step by step.

  python tools/look_inside.py --weights runs/toy/checkpoint_0001250.pth --data toy_coco \\
      --image toy_coco/val2017/000000500005.jpg --out inside

Writes a picture of every step and index.md, which shows them in order. With --data, the data set
that the image is from, it also shows which anchors are positive and which are drawn for training.
"""

import argparse
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the five modules

import data
import evaluate
import model as detector
from tools.panels import WIDTH, draw, grid, heat, titled, to_picture

COLORS = ["#e6194b", "#f58231", "#2a9d3c", "#4363d8", "#911eb4", "#008b8b", "#9a6324", "#f032e6"]
RED, ORANGE, GREEN, BLUE = COLORS[:4]


def run(model, image, target):
    """What the detector computes on the way to its detections, by its public steps."""
    s = SimpleNamespace(model=model, image=image, target=target, c=model.config)
    s.classes = model.data_settings["classes"]
    s.batch, s.sizes = model.batch([image])
    s.levels = model.features(s.batch)
    s.names = [f"P{i + 2}" for i in range(5)] if model.fpn else ["conv5_3"]
    s.map_size = (WIDTH, round(WIDTH * s.batch.shape[2] / s.batch.shape[3]))
    s.objectness, s.deltas, s.anchors = model.rpn(s.levels)
    boxes, valid = model.rpn.proposals(s.objectness, s.deltas, s.anchors, s.sizes)
    s.proposals = boxes[0][valid[0]]  # [P, 4]
    [(s.scores, s.refined)] = model.box_predictions(s.levels, boxes, valid, s.sizes)
    s.found = model.postprocess(s.scores, s.refined)
    found, labels = [s.found["boxes"]], [s.found["labels"]]
    if model.mask_head and len(labels[0]):
        [s.found["masks"]] = model.mask_probabilities(s.levels, found, labels)
    if model.keypoint_head and len(labels[0]):
        [maps] = model.keypoint_heatmaps(s.levels, found)
        s.found["keypoints"], _ = detector.decode_keypoints(maps, *found)
    # The best detections, and which proposals became their boxes
    best = (s.found["scores"] >= 0.5).nonzero()[:8, 0]
    s.boxes, s.labels = s.found["boxes"][best], s.found["labels"][best]
    became = s.refined.expand(-1, s.c.num_classes, -1)[:, s.labels - 1]  # [P, N, 4]
    s.origin = (became - s.boxes).abs().sum(dim=2).argmin(dim=0)
    return s


def centres(boxes):
    return (boxes[:, :2] + boxes[:, 2:]) / 2


# ------------------------------------------------------------------------------------------------
# The steps. Each returns panels; its docstring is what index.md says about them
# ------------------------------------------------------------------------------------------------


def network_input(s):
    """The image minus the mean, divided by the standard deviation, and padded with zeros (here in
    the colour of the mean) on the right and at the bottom to multiples of 32."""
    shown = (255 * (s.batch[0] * s.model.image_std + s.model.image_mean)).round().clamp(0, 255)
    (h, w), (_, padded_h, padded_w) = s.sizes[0], shown.shape
    picture = to_picture(shown.byte()).resize((480, round(480 * padded_h / padded_w)))
    return [titled(picture, f"{w} x {h} pixels, padded to {padded_w} x {padded_h}")]


def features(s):
    """The norm over the channels at each position of each level. Fine levels respond to edges and
    small objects, coarse levels to large ones."""
    sizes = [
        f"{name}: {level.shape[3]} x {level.shape[2]}" for name, level in zip(s.names, s.levels)
    ]
    return [heat(level[0].norm(dim=0), t, s.map_size) for t, level in zip(sizes, s.levels)]


def anchors(s):
    """Every position of a level (dots) has anchors of the same sizes and shapes. Drawn are those of
    a position in the middle."""
    panels = []
    for name, level, color in zip(s.names, s.anchors, COLORS):
        away = (centres(level) - torch.tensor(s.sizes[0]).flip(0) / 2).norm(dim=1)
        middle = level[(centres(level) == centres(level)[away.argmin()]).all(dim=1)]
        layers = (centres(level).unique(dim=0), color), (middle, color)
        panels.append(draw(s.image, f"{name}: {len(level):,} anchors", *layers, margin=0.5))
    return panels


def training(s):
    """In training, an anchor is positive if its IoU with an object (black) is at least 0.7 or if no
    other anchor's is larger; negative if it is below 0.3 with all objects; and not used otherwise.
    The RPN learns from 256 of them, at most half of them positive, drawn at random."""
    if s.target is None:
        return []
    every = torch.cat(s.anchors)
    _, [labels] = s.model.rpn.match(every, detector.pad_targets([s.target], every.device))
    numbers = s.c.rpn_batch_size_per_image, s.c.rpn_positive_fraction
    seeds, _ = detector.sampling_seeds([{"seed": data.image_seed(0, 0, 0)}], every.device)
    [index], [valid] = detector.sample(labels[None], *numbers, seeds)
    drawn, objects = index[valid], (s.target["boxes"], "black")
    positive, negative = drawn[labels[drawn] == 1], drawn[labels[drawn] == 0]
    panels = {
        f"positive: {(labels == 1).sum():,}": (every[labels == 1], GREEN),
        f"not used: {(labels == -1).sum():,} (centres)": (centres(every[labels == -1]), ORANGE),
        f"drawn: {len(positive)} positive": (every[positive], GREEN),
        f"drawn: {len(negative)} of {(labels == 0).sum():,} negative": (every[negative], BLUE),
    }
    return [draw(s.image, t, objects, layer, margin=0.1) for t, layer in panels.items()]


def objectness(s):
    """How sure the RPN is of an object at each position: the sigmoid of the best anchor there, dark
    for 0 and yellow for 1. Each level answers for objects of its own size."""
    panels = []
    for name, level, logits in zip(s.names, s.levels, s.objectness):
        best = logits.view(*level.shape[2:], -1).max(dim=2).values.sigmoid()
        panels.append(heat(best, f"{name}: at most {best.max():.2f}", s.map_size, most=1))
    return panels


def proposals(s):
    """The RPN moves and resizes its anchors. NMS then keeps the best box, drops all boxes of its
    level that overlap it by more than 0.7, goes on with the best of the rest, and so on."""
    index = torch.cat(s.objectness, dim=1)[0].topk(40).indices
    best, deltas = torch.cat(s.anchors)[index], torch.cat(s.deltas, dim=1)[0, index]
    decoded = detector.decode_boxes(deltas, best)
    return [
        draw(s.image, "the 40 best anchors", (best, BLUE)),
        draw(s.image, "the boxes that they become", (decoded, BLUE)),
        draw(s.image, f"the 40 best of {len(s.proposals)} after NMS", (s.proposals[:40], BLUE)),
    ]


def roi_levels(s):
    """Each proposal is now an RoI, pooled from one level: a small one from a fine level, a large
    one from a coarse level. Drawn are the 40 best of each level."""
    levels = detector.roi_levels(s.proposals, s.model.backbone.strides)
    on_level = [s.proposals[levels == i] for i in range(len(s.model.backbone.strides))]
    return [
        draw(s.image, f"{name}: {len(boxes)} RoIs", (boxes[:40], color))
        for name, boxes, color in zip(s.names, on_level, COLORS)
        if len(boxes)
    ]


def lattice(start, step, counts):  # (x, y) each
    return torch.cartesian_prod(*(a + b * torch.arange(n) for a, b, n in zip(start, step, counts)))


def sampling_points(box, bins, ratio, stride):
    """The points [N, 2] at which RoIAlign reads a level, and how many a bin has along x and y."""
    side = (box[2:] - box[:2]) / bins
    per_bin = [ratio or int(n) for n in (side / stride).ceil()]
    step = side / torch.tensor(per_bin)
    return lattice(box[:2] + step / 2, step, [bins * n for n in per_bin]), per_bin


def roi_align(s):
    """RoIAlign of the best detection's RoI: the value of each of 7 x 7 bins (green) is the mean of
    the level at the red points. Each is interpolated between the four nearest pixels of the level,
    whose centres are black; nothing is rounded."""
    box, bins = s.proposals[s.origin[0] if len(s.origin) else 0], s.c.box_roi_size
    stride = s.model.backbone.strides[detector.roi_levels(box, s.model.backbone.strides)]
    points, (nx, ny) = sampling_points(box, bins, s.c.roi_sampling_ratio, stride)
    corners = lattice(box[:2], (box[2:] - box[:2]) / bins, (bins, bins))
    squares = torch.cat([corners, corners + (box[2:] - box[:2]) / bins], dim=1)
    low = (box[:2] - 1.5 * stride).clamp(min=0).long()
    high = (box[2:] + 1.5 * stride).ceil().long()
    crop = s.image[:, low[1] : high[1], low[0] : high[0]]
    counts = [s.batch.shape[3] // stride, s.batch.shape[2] // stride]
    pixels = lattice((stride / 2, stride / 2), (stride, stride), counts)
    layers = (
        (pixels - low, "black"),
        (squares - low.repeat(2), GREEN),
        (points - low, RED),
    )
    return [draw(crop, f"{nx} x {ny} points a bin, stride {stride}", *layers, width=480)]


def refinement(s):
    """The box head moves each RoI (black) to its object. Drawn are the RoIs that became the best
    detections; arrows lead from centre to centre. Each stage of a cascade starts from the boxes of
    the stage before."""
    if len(s.boxes) == 0:
        return []
    rois, panels = detector.to_rois([s.proposals[s.origin]]), []
    for stage, head in enumerate(s.model.box_heads):
        _, deltas = head(s.model.pool(s.levels, rois, s.c.box_roi_size))
        boxes = s.model.refine(rois, deltas, stage, s.sizes).expand(-1, s.c.num_classes, -1)
        boxes = boxes[torch.arange(len(rois)), s.labels - 1]
        moves = torch.stack([centres(rois[:, 1:]), centres(boxes)], dim=1)
        layers = (rois[:, 1:], "black"), (boxes, COLORS), (moves, COLORS)
        panels.append(draw(s.image, f"stage {stage + 1}", *layers, width=480))
        rois = torch.cat([rois[:, :1], boxes], dim=1)
    return panels


def scores(s):
    """Every RoI has a score and a box for each class. Those with a score of at most 0.05 are
    dropped; then NMS drops what overlaps a better box of the same class by more than 0.5."""
    boxes = s.refined.expand(-1, s.c.num_classes, -1)
    color = [COLORS[label % len(COLORS)] for label in range(s.c.num_classes)]
    every = s.scores[:, 1:].argmax(dim=1)
    roi, above = (s.scores[:, 1:] > s.c.box_score_thresh).nonzero(as_tuple=True)
    kept = s.found["labels"] - 1
    panels = {
        f"{len(every)} RoIs, each in its best class": (
            boxes[torch.arange(len(every)), every],
            every,
        ),
        f"{len(roi)} above the threshold": (boxes[roi, above], above),
        f"{len(kept)} after NMS": (s.found["boxes"], kept),
    }
    return [draw(s.image, t, (b, [color[i] for i in c])) for t, (b, c) in panels.items()]


def masks(s):
    """The mask head gives 28 x 28 probabilities for each detection, which are resized to its box,
    pasted, and cut at one half."""
    if "masks" not in s.found or len(s.boxes) == 0:
        return []
    boxes, maps = s.boxes[:5], s.found["masks"][:5]
    names = [evaluate.class_name(label, s.classes) for label in s.labels]
    pasted = evaluate.paste_masks(maps, boxes, *s.sizes[0])
    panels = [heat(m, f"{name}, in its box", most=1) for m, name in zip(maps, names)]
    return [*panels, draw(s.image, "pasted", (pasted, COLORS), (boxes, "black"))]


def keypoints(s):
    """The keypoint head gives a map of 56 x 56 positions for each keypoint of a detection, here the
    best one's; the keypoint is where its map is largest."""
    if "keypoints" not in s.found or len(s.boxes) == 0:
        return []
    [maps] = s.model.keypoint_heatmaps(s.levels, [s.boxes[:1]])
    names = data.KEYPOINT_NAMES if maps.shape[1] == 17 else range(maps.shape[1])
    return [
        heat(one.flatten().softmax(0).view(one.shape), f"{name}", (150, 150))
        for name, one in zip(names, maps[0])
    ]


def detections(s):
    """What is left, with its class and its score."""
    return [titled(to_picture(evaluate.draw(s.image, s.found, s.classes)), "scores from 0.5")]


STEPS = (
    network_input, features, anchors, training, objectness, proposals, roi_levels, roi_align,
    refinement, scores, masks, keypoints, detections,
)  # fmt: skip


def find_target(root, image_path, config, sizes):
    """The objects, without crowds, of an image that is found in a data set by its file's name."""
    for split in ("val2017", "train2017"):
        dataset = data.open_split(root, split, masks=False, keypoints=config.keypoints > 0)
        for i in range(len(dataset)):
            if Path(dataset.record(i)["file_name"]).name == image_path.name:
                _, target = dataset.load(i, *sizes)
                keep = ~target["iscrowd"]
                return {name: target[name][keep] for name in ("boxes", "labels")}
    raise data.UserError(f"{root} has no image {image_path.name} in val2017 or train2017.")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", required=True, help="a checkpoint")
    parser.add_argument("--image", required=True, type=Path)
    parser.add_argument("--data", help="the data set that the image is from, with its objects")
    parser.add_argument("--out", required=True, type=Path, help="a folder, which is made")
    args = parser.parse_args(arguments)
    model = detector.load_model(args.weights)
    image = data.read_image(args.image)
    sizes = model.data_settings["min_size"], model.data_settings["max_size"]
    target = find_target(args.data, args.image, model.config, sizes) if args.data else None
    image = data.resize_image(image, *data.resize_shape(*image.shape[1:], *sizes))
    args.out.mkdir(parents=True, exist_ok=True)
    page = f"# {args.image.name} inside the detector\n"
    with torch.no_grad():
        seen = run(model, image, target)
        for step in STEPS:
            panels = step(seen)
            if panels:
                name = step.__name__
                grid(panels).save(args.out / f"{name}.png", optimize=True)
                title, text = name.replace("_", " ").capitalize(), inspect.cleandoc(step.__doc__)
                page += f"\n## {title}\n\n{text}\n\n![{title}]({name}.png)\n"
    (args.out / "index.md").write_text(page)
    print(args.out / "index.md")


if __name__ == "__main__":
    sys.exit(evaluate.run_command("look_inside.py", main))
