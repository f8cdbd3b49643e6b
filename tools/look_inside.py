"""Draw what happens to one image inside the detector, step by step.

  python tools/look_inside.py --weights runs/toy/checkpoint_0000800.pth --data toy_coco \\
      --image toy_coco/val2017/000000500002.jpg --out inside

Writes a picture of every step, and index.md, which shows them in order. Any image will do. --data
is only for an image of a data set: with its objects, the anchors used in training are drawn too,
and one object is followed in numbers.
"""

import argparse
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision import ops
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the five modules

import data
import evaluate
import model as detector

WIDTH = 320  # of a panel, in pixels
COLORS = ["#e6194b", "#f58231", "#2a9d3c", "#4363d8", "#911eb4", "#008b8b", "#9a6324", "#f032e6"]
RED, ORANGE, GREEN, BLUE = COLORS[:4]


def run(model, image, target):
    """The detections, and what the detector computes on the way to them, by its public steps."""
    s = SimpleNamespace(model=model, image=image, target=target, c=model.config)
    s.classes = model.data_settings["classes"]
    s.batch, s.sizes = model.batch([image])
    s.levels = model.features(s.batch)
    s.names = [f"P{i + 2}" for i in range(5)] if model.fpn else ["conv5_3"]
    width = min(480, 1000 // len(s.levels) - 8)  # of a level's panel: all levels in one row
    s.map_size = (width, round(width * s.batch.shape[2] / s.batch.shape[3]))
    s.objectness, s.deltas, s.anchors = model.rpn(s.levels)
    [s.proposals] = model.rpn.proposals(s.objectness, s.deltas, s.anchors, s.sizes)  # [P, 4]
    [(s.scores, s.refined)] = model.box_predictions(s.levels, [s.proposals], s.sizes)
    [s.found] = model([image])
    # The five best detections, and which proposals became their boxes
    best = (s.found["scores"] >= 0.5).nonzero()[:5, 0]
    s.boxes, s.labels = s.found["boxes"][best], s.found["labels"][best]
    became = s.refined.expand(-1, s.c.num_classes, -1)[:, s.labels - 1]  # [P, N, 4]
    s.origin = (became - s.boxes).abs().sum(dim=2).argmin(dim=0)
    return s


def centres(boxes):
    return (boxes[:, :2] + boxes[:, 2:]) / 2


# -- The steps. Each returns panels; its docstring is what index.md says about them ----------------


def network_input(s):
    """The image minus the mean, divided by the standard deviation. Zeros (here in the mean's grey)
    are padded to the right of and below the red frame, up to multiples of 32."""
    shown = (255 * (s.batch[0] * s.model.image_std + s.model.image_mean)).round().clamp(0, 255)
    h, w = s.sizes[0]
    title = f"{h} x {w} pixels, padded to {shown.shape[1]} x {shown.shape[2]}"
    frame = torch.tensor([[0, 0, w, h]]), RED
    return [draw(shown.byte(), title, frame, width=480, faded=False)]


def features(s):
    """The length of the vector of features at each position of each level. Each level has its own
    scale: dark is its least value, yellow its largest."""
    return [
        heat(level[0].norm(dim=0), f"{name}: {level.shape[2]} x {level.shape[3]}", s.map_size)
        for name, level in zip(s.names, s.levels)
    ]


def anchors(s):
    """Every position of a level (dots) has anchors of the same sizes and shapes. Drawn are those of
    one position near the middle."""
    panels, size = [], torch.tensor(s.sizes[0]).flip(0)
    for name, level, boxes, color in zip(s.names, s.levels, s.anchors, COLORS):
        h, w = level.shape[2:]
        boxes = boxes.view(h * w, -1, 4)  # [positions, anchors, 4]
        middle = boxes[h // 2 * w + w // 2]
        outside = max(-middle.min(), (middle[:, 2:] - size).max())
        look = {"width": s.map_size[0], "margin": max(0, float(outside / size[0])) + 0.02}
        layers = (centres(boxes[:, 0]), color), (middle, color)
        panels.append(draw(s.image, f"{name}: {h} x {w} x {len(middle)} anchors", *layers, **look))
    return panels


def training(s):
    """An anchor is positive if its IoU with an object (black) is at least 0.7, or the highest that
    any anchor has with that object; negative if its IoU is below 0.3 with all objects; and not used
    otherwise. The RPN is trained on a random sample of 256, at most half of them positive."""
    if s.target is None:
        return []
    every, objects = torch.cat(s.anchors), (s.target["boxes"], "black")
    _, labels = s.model.rpn.match(every, s.target["boxes"])
    numbers = s.c.rpn_batch_size_per_image, s.c.rpn_positive_fraction
    sampled = detector.sample(labels, *numbers, torch.Generator().manual_seed(0))
    positive, negative = sampled[labels[sampled] == 1], sampled[labels[sampled] == 0]
    unused, p, n = every[labels == -1], (labels == 1).sum(), (labels == 0).sum()
    panels = {
        f"positive: {len(positive)} of {p:,} sampled": (every[positive], GREEN),
        f"negative: {len(negative)} of {n:,} sampled (centres)": (centres(every[negative]), BLUE),
        f"not used: {len(unused):,} (centres)": (centres(unused), ORANGE),
    }
    return [draw(s.image, t, objects, layer, margin=0.1) for t, layer in panels.items()]


def hardest_object(s):
    """Indices of the object whose best anchor has the lowest IoU, and of that anchor."""
    iou, best = ops.box_iou(s.target["boxes"], torch.cat(s.anchors)).max(dim=1)
    return int(iou.argmin()), int(best[iou.argmin()])


def box_coding(s):
    """An object (black) is coded by how an anchor (blue) must change to become it. First the anchor
    moves, by dx times its width and dy times its height (orange). Then its sides are multiplied by
    exp(dw) and exp(dh). Drawn is the object whose best anchor has the lowest IoU."""
    if s.target is None or len(s.target["boxes"]) == 0:
        return []
    i, best = hardest_object(s)
    pair = torch.stack([torch.cat(s.anchors)[best], s.target["boxes"][i]])
    around = (pair[1, 2:] - pair[1, :2]) / 3  # the picture is cut out around the two
    low = (pair[:, :2].amin(dim=0) - around).clamp(min=0).int()
    high = (pair[:, 2:].amax(dim=0) + around).int()
    crop = s.image[:, low[1] : high[1], low[0] : high[0]]
    anchor, truth = pair - low.repeat(2)
    dx, dy, dw, dh = detector.encode_boxes(truth, anchor).tolist()
    start, end = centres(torch.stack([anchor, truth]))
    moved, (x, y) = anchor + (end - start).repeat(2), end.tolist()

    def middles(box):  # of the four sides
        left, top, right, bottom = box.tolist()
        return torch.tensor([[left, y], [right, y], [x, top], [x, bottom]])

    arrows = torch.stack([middles(moved), middles(truth)], dim=1)
    first = (anchor[None], BLUE), (moved[None], ORANGE), (torch.stack([start, end])[None], RED)
    second = (moved[None], ORANGE), (truth[None], "black"), (arrows, RED)
    return [
        draw(crop, f"dx = {dx:.2f}, dy = {dy:.2f}", *first, width=400),
        draw(crop, f"dw = {dw:.2f}, dh = {dh:.2f}", *second, width=400),
    ]


def objectness(s):
    """How sure the RPN is of an object at each position: the sigmoid of the best anchor's logit
    there, dark for 0 and yellow for 1."""
    logits = [x.view(*level.shape[2:], -1) for x, level in zip(s.objectness, s.levels)]
    best = {name: x.amax(dim=2).sigmoid() for name, x in zip(s.names, logits)}
    return [heat(x, f"{n}: maximum {x.max():.2f}", s.map_size, most=1) for n, x in best.items()]


def proposals(s):
    """The RPN moves and resizes its anchors. Within each level, NMS then goes from the best box to
    the worst, and removes a box if its IoU with a box that it has kept is above 0.7."""
    logits, index = torch.cat(s.objectness, dim=1)[0].topk(40)
    level = torch.cat([torch.full((len(a),), i) for i, a in enumerate(s.anchors)])[index]
    best, deltas = torch.cat(s.anchors)[index], torch.cat(s.deltas, dim=1)[0, index]
    boxes = detector.decode_boxes(deltas, best)
    clipped = ops.clip_boxes_to_image(boxes, s.sizes[0])
    kept = clipped[detector.nms(clipped, logits, level, s.c.rpn_nms_thresh, 40)]
    titles = "the 40 best anchors", "the boxes they become", f"the {len(kept)} that NMS keeps"
    pairs = zip(titles, (best, boxes, kept))
    return [draw(s.image, title, (shapes, BLUE), margin=0.1) for title, shapes in pairs]


def roi_levels(s):
    """Each proposal is now an RoI, pooled from one level: a small one from a fine level, a large
    one from a coarse level. Drawn are at most 40 of each level, the best ones."""
    levels = detector.roi_levels(s.proposals, s.model.backbone.strides)
    on_level = [s.proposals[levels == i] for i in range(len(s.model.backbone.strides))]
    return [
        draw(s.image, f"{name}: {len(boxes[:40])} of {len(boxes)} RoIs", (boxes[:40], color))
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
    the level at the red points of the bin. Each is interpolated between the four nearest pixels of
    the level, whose centres are black. The blue square has the four of one point in its corners."""
    box, bins = s.proposals[s.origin[0] if len(s.origin) else 0], s.c.box_roi_size
    level = int(detector.roi_levels(box[None], s.model.backbone.strides))
    stride = s.model.backbone.strides[level]
    points, (nx, ny) = sampling_points(box, bins, s.c.roi_sampling_ratio, stride)
    side, point = (box[2:] - box[:2]) / bins, points[len(points) // 2]
    corners = lattice(box[:2], side, (bins, bins))
    pixels = lattice([stride / 2] * 2, [stride] * 2, s.levels[level].shape[:1:-1])
    nearest = ((point / stride - 0.5).floor() + 0.5) * stride
    low, high = (box[:2] - 1.5 * stride).clamp(min=0).int(), (box[2:] + 1.5 * stride).int()
    layers = {
        "black": pixels - low,
        GREEN: torch.cat([corners, corners + side], dim=1) - low.repeat(2),
        BLUE: torch.cat([nearest, nearest + stride])[None] - low.repeat(2),
        RED: points - low,
    }
    crop = s.image[:, low[1] : high[1], low[0] : high[0]]
    title = f"{s.names[level]}, stride {stride}: {ny} x {nx} points in each bin"
    return [draw(crop, title, *((x, color) for color, x in layers.items()), width=480)]


def refinement(s):
    """The box head moves and resizes each RoI (black; here those of the five best detections).
    Arrows lead from centre to centre. Stages of a cascade start from the previous stage's boxes."""
    if len(s.boxes) == 0:
        return []
    rois, panels = s.proposals[s.origin], []
    for stage, head in enumerate(s.model.box_heads):
        _, deltas = head(s.model.pool(s.levels, [rois], s.c.box_roi_size))
        [boxes] = s.model.refine([rois], deltas, stage, s.sizes)
        boxes = boxes.expand(-1, s.c.num_classes, -1)[torch.arange(len(rois)), s.labels - 1]
        moves = torch.stack([centres(rois), centres(boxes)], dim=1)
        layers = (rois, "black"), (boxes, COLORS), (moves, COLORS)
        title = f"stage {stage + 1}" if s.c.cascade else f"{len(rois)} RoIs and their boxes"
        panels.append(draw(s.image, title, *layers, width=480))
        rois = boxes
    return panels


def scores(s):
    """Every RoI has a score and a box for each class (colours). Scores of 0.05 or less are dropped.
    NMS then removes a box if its IoU with a kept box of its class is above 0.5."""
    scores, found = s.scores[:, 1:], s.found
    roi, label = (scores > s.c.box_score_thresh).nonzero(as_tuple=True)
    above, sure = s.refined.expand(-1, s.c.num_classes, -1)[roi, label], found["scores"] >= 0.5
    panels = {
        f"{len(roi)} of {scores.numel():,} scores > {s.c.box_score_thresh}": (above, label + 1),
        f"{len(sure)} after NMS": (found["boxes"], found["labels"]),
        f"{sure.sum()} with scores >= 0.5": (found["boxes"][sure], found["labels"][sure]),
    }
    return [draw(s.image, t, (b, [COLORS[i % 8] for i in c])) for t, (b, c) in panels.items()]


def masks(s):
    """The mask head predicts 28 x 28 probabilities for each detection (here the five best). They
    are resized to its box and pasted into the image where they are 0.5 or more."""
    if not s.model.mask_head or len(s.boxes) == 0:
        return []
    boxes, maps = s.boxes, s.found["masks"][: len(s.boxes)]
    names = [evaluate.class_name(label, s.classes) for label in s.labels]
    pasted = evaluate.paste_masks(maps, boxes, *s.sizes[0])
    panels = [heat(m, f"{name}: {len(m)} x {len(m)}", most=1) for m, name in zip(maps, names)]
    return [*panels, draw(s.image, "pasted into the image", (pasted, COLORS), (boxes, "black"))]


def keypoints(s):
    """The keypoint head gives a map of 56 x 56 positions for each keypoint of a detection, here the
    best one's; the keypoint is where its map is largest."""
    if not s.model.keypoint_head or len(s.boxes) == 0:
        return []
    [maps] = s.model.keypoint_heatmaps(s.levels, [s.boxes[:1]])
    maps = maps[0].flatten(1).softmax(dim=1).view(maps[0].shape)
    return [heat(one, name, (150, 150)) for name, one in zip(data.KEYPOINT_NAMES, maps)]


def detections(s):
    """The detections with a score of 0.5 or more."""
    return [titled(to_pil_image(evaluate.draw(s.image, s.found, s.classes)), "scores >= 0.5")]


def one_object(s):
    """The object of box_coding's picture in numbers, from its anchor to its box, in markdown."""
    if s.target is None or len(s.target["boxes"]) == 0:
        return ""
    i, a = hardest_object(s)
    truth, label = s.target["boxes"][i], int(s.target["labels"][i])
    best = ops.box_iou(truth[None], s.proposals)[0].argmax()
    proposal = s.proposals[best]
    name = evaluate.class_name(label, s.classes)
    anchor, delta = torch.cat(s.anchors)[a], torch.cat(s.deltas, dim=1)[0, a]
    level = [n for n, anchors in zip(s.names, s.anchors) for _ in anchors][a]
    pooled = int(detector.roi_levels(proposal[None], s.model.backbone.strides))
    refined = s.refined.expand(-1, s.c.num_classes, -1)[best, label - 1]
    objectness = torch.cat(s.objectness, dim=1)[0, a].sigmoid()
    true_delta, moved = detector.encode_boxes(truth, anchor), detector.decode_boxes(delta, anchor)
    rows = {
        f"the object: {name}": (truth, ""),
        f"its best anchor, on {level}": (anchor, f"deltas to the object: {numbers(true_delta, 2)}"),
        "the box that the RPN makes of this anchor": (
            moved,
            f"objectness {objectness:.2f}, predicted deltas: {numbers(delta, 2)}",
        ),
        "the proposal with the highest IoU": (proposal, f"pooled from {s.names[pooled]}"),
        "the box that the box head makes of it": (refined, f"score {s.scores[best, label]:.2f}"),
    }
    table = "| | left, top, right, bottom | IoU with the object | |\n|---|---|---|---|\n"
    for what, (box, more) in rows.items():
        iou = ops.box_iou(truth[None], box[None]).item()
        table += f"| {what} | {numbers(box, 1)} | {iou:.2f} | {more} |\n"
    return f"\n## One object in numbers\n\n{table}"


def numbers(values, digits):
    return ", ".join(f"{value:.{digits}f}" for value in values.tolist())


STEPS = (
    network_input, features, anchors, training, box_coding, objectness, proposals, roi_levels,
    roi_align, refinement, scores, masks, keypoints, detections,
)  # fmt: skip


# -- Panels: an image with shapes on it, a map in colours, and many in a grid ----------------------


def draw(image, caption, *layers, width=WIDTH, margin=0.0, faded=True):
    """A panel: an image [3, h, w], faded, and layers on it in the image's coordinates.

    A layer is a pair of a tensor and a colour, or a list of colours: boxes [N, 4], points [N, 2],
    arrows [N, 2, 2] (from, to), or masks [N, h, w] bool. margin: around it, a share of its width.
    """
    scale = width / image.shape[2] / (1 + 2 * margin)
    border = round(margin * image.shape[2] * scale)
    size = (width - 2 * border, round(image.shape[1] * scale))
    picture = to_pil_image(image).resize(size, Image.BICUBIC)
    if faded:
        picture = ImageOps.posterize(Image.blend(picture, Image.new("RGB", size, "white"), 0.6), 4)
    picture = ImageOps.expand(picture, border, "white")
    pen = ImageDraw.Draw(picture)
    for shapes, colors in layers:
        colors = [colors] * len(shapes) if isinstance(colors, str) else colors
        placed = shapes if shapes.dtype == torch.bool else shapes * scale + border
        for shape, color in reversed(list(zip(placed, colors))):
            if shapes.dtype == torch.bool:
                pen.bitmap((border, border), Image.fromarray(shape.numpy()).resize(size), color)
            elif shape.dim() == 2:
                draw_arrow(pen, *shape, color)
            elif len(shape) == 4:
                pen.rectangle(shape.tolist(), outline=color, width=1 if len(shapes) > 50 else 2)
            else:
                pen.circle(shape.tolist(), 1 if len(shapes) > 500 else 2, color)
    return titled(picture, caption)


def draw_arrow(pen, start, end, color):
    along = 9 * (end - start) / (end - start).norm().clamp(min=9)
    across = along.flip(0) * torch.tensor([0.5, -0.5])
    head = torch.stack([end, end - along + across, end - along - across])
    pen.line([*start.tolist(), *end.tolist()], color, 2)
    pen.polygon(head.flatten().tolist(), color)


def heat(values, caption, size=(WIDTH, WIDTH), most=None):
    """A panel of a map [h, w]: dark is its least value (0 if `most` is given), yellow its most."""
    values = values - (0 if most else values.min())
    gray = (63 * values / (most or values.max())).clamp(0, 63).byte() * 4
    picture = ImageOps.colorize(Image.fromarray(gray.numpy()), "#440154", "#fde725", "#21918c")
    return titled(picture.resize(size, Image.NEAREST), caption)


def titled(picture, caption):
    sheet = Image.new("RGB", (picture.width + 8, picture.height + 26), "white")
    pen = ImageDraw.Draw(sheet)
    pen.fontmode = "1"  # without shades of grey: few colours make a small file
    pen.text((4, 2), caption, "black", ImageFont.load_default(14))
    sheet.paste(picture, (4, 20))
    return sheet


def grid(panels, width=1000):
    """Panels in rows of at most `width` pixels, as one picture."""
    w, h = (max(sides) for sides in zip(*(panel.size for panel in panels)))
    columns = max(1, min(len(panels), width // w))
    sheet = Image.new("RGB", (w * columns, h * -(-len(panels) // columns)), "white")
    for i, panel in enumerate(panels):
        sheet.paste(panel, (i % columns * w, i // columns * h))
    return sheet.quantize(256)


# -- Command line ----------------------------------------------------------------------------------


def find_target(root, image_path, config, sizes):
    """The objects, without crowds, of an image that is found in a data set by its file's name."""
    for split in ("val2017", "train2017"):
        dataset = data.open_split(root, split, masks=False, keypoints=config.keypoints > 0)
        names = [Path(dataset.record(i)["file_name"]).name for i in range(len(dataset))]
        if image_path.name in names:
            _, target = dataset.load(names.index(image_path.name), *sizes)
            return {name: target[name][~target["iscrowd"]] for name in ("boxes", "labels")}
    raise data.UserError(f"{root} has no image {image_path.name} in val2017 or train2017.")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", required=True, help="a checkpoint")
    parser.add_argument("--image", required=True, type=Path, help="any image file")
    parser.add_argument("--data", help="data set that has the image, to show its training targets")
    parser.add_argument("--out", required=True, type=Path, help="folder for the pictures")
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
        page += one_object(seen)
    (args.out / "index.md").write_text(page)
    print(args.out / "index.md")


if __name__ == "__main__":
    sys.exit(evaluate.run_command("look_inside.py", main))
