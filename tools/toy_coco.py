"""A generated data set in COCO's layout, to try everything without a download.

  python tools/toy_coco.py DIR [--train 1000] [--val 160] [--seed 0]

Its images show disks, squares, triangles, stars and human figures on cluttered backgrounds. It has
what COCO has: occlusion, crowds, polygons and RLE, keypoints, images without objects.
"""

import argparse
import json
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the five modules
import evaluate
from data import KEYPOINT_NAMES, UserError, paint_segmentation

# The classes differ in shape alone. Their ids have gaps, as COCO's have.
TOY_CATEGORIES = {1: "person", 3: "disk", 4: "square", 8: "triangle", 11: "star"}
SIZES = [(160, 128), (128, 160), (176, 144), (144, 176), (168, 136), (136, 168)]  # (w, h)
VERSION = 2  # counts changes of the pictures, so that older ones are not reused
SUPERSAMPLING = 3
LEAST_VISIBLE = 0.7  # of an object, however many lie on top of it
SKELETON = [
    [16, 14], [14, 12], [17, 15], [15, 13], [12, 13], [6, 12], [7, 13], [6, 7], [6, 8], [7, 9],
    [8, 10], [9, 11], [2, 3], [1, 2], [1, 3], [2, 4], [3, 5], [4, 6], [5, 7],
]  # fmt: skip


def _noise(rng, height, width, cells):
    """Smooth noise in [0, 1] of cells x cells blotches: float32 [h, w]."""
    grid = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    return np.asarray(grid.resize((width, height), Image.BICUBIC)).clip(0, 1)


def _texture(rng, height, width, color, other):
    """A pattern of two colours [3]: float32 [h, w, 3]."""
    angle = rng.uniform(0, math.pi)
    period = rng.uniform(4, 14)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    u = (x * math.cos(angle) + y * math.sin(angle)) / period
    v = (y * math.cos(angle) - x * math.sin(angle)) / period
    kind = rng.choice(["stripes", "checks", "dots", "blotches"])
    if kind == "stripes":
        weight = 0.5 + 0.5 * np.sin(2 * math.pi * u)
    elif kind == "checks":
        weight = (np.floor(u) + np.floor(v)) % 2
    elif kind == "dots":
        weight = ((u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.08).astype(np.float32)
    else:
        weight = _noise(rng, height, width, rng.integers(3, 14))
    return color.astype(np.float32) + weight[:, :, None] * (other - color).astype(np.float32)


def _background(rng, height, width):
    """A texture, cluttered with blotches and strokes of every colour: float32 [h, w, 3]."""
    color, blotch = rng.uniform(20, 235, (2, 3))
    canvas = _texture(rng, height, width, color, color + rng.normal(0, 20, 3))
    weight = rng.uniform(0.3, 0.9) * _noise(rng, height, width, rng.integers(3, 8))[:, :, None]
    canvas = canvas + weight * (blotch - canvas)
    picture = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    for _ in range(int(rng.integers(6, 17))):
        steps = rng.normal(0, rng.uniform(4, 16), (int(rng.integers(2, 7)), 2))
        points = (rng.uniform((0, 0), (width, height)) + steps.cumsum(0)).ravel().tolist()
        thickness = int(rng.integers(1, 3))
        color = tuple(rng.integers(0, 256, 3).tolist())
        ImageDraw.Draw(picture).line(points, color, thickness)
    return np.array(picture, dtype=np.float32)


def _with_camera_noise(rng, canvas):
    """The finished picture: uint8 [h, w, 3]."""
    noise = 4 * rng.standard_normal(canvas.shape, dtype=np.float32)
    return (canvas + noise).clip(0, 255).astype(np.uint8)


def _circle(count):
    """count points on the unit circle, [count, 2]."""
    angles = 2 * math.pi * np.arange(count) / count
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _swing(joint, length, angle, out):
    """The other end of a bone that hangs on joint, at an angle from straight down."""
    return joint + length * np.array([out * math.sin(angle), math.cos(angle)])


def _bar(start, end, radius):
    """A bar with round ends, as a polygon [14, 2]."""
    direction = math.atan2(end[1] - start[1], end[0] - start[0])
    angles = direction + math.pi * np.linspace(-0.5, 0.5, 7)
    cap = radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return np.concatenate([end + cap, start - cap])


def _figure(rng):
    """A person of unit height around (0, 0), y down -> (polygons, joints [17, 2]).

    It is seen from the front: its left side is at the image's right.
    """
    head = np.array([rng.uniform(-0.02, 0.02), -0.37])
    limbs, sides = [], []
    for out in (1, -1):  # left, right
        arm = rng.uniform(0.25, 2.6)  # angles: radians from hanging down, outwards
        leg = rng.uniform(0.02, 0.6)
        shoulder = np.array([0.14 * out, -0.19])
        elbow = _swing(shoulder, 0.16, arm, out)
        wrist = _swing(elbow, 0.15, arm + rng.uniform(-1, 1), out)
        hip = np.array([0.085 * out, 0.1])
        knee = _swing(hip, 0.19, leg, out)
        ankle = _swing(knee, 0.19, leg + rng.uniform(-0.4, 0.2), out)
        limbs += [_bar(shoulder, elbow, 0.05), _bar(elbow, wrist, 0.045)]
        limbs += [_bar(hip, knee, 0.06), _bar(knee, ankle, 0.052)]
        eye, ear = head + (0.045 * out, -0.02), head + (0.105 * out, 0)
        sides.append([eye, ear, shoulder, elbow, wrist, hip, knee, ankle])
    neck = np.array([(-0.05, -0.3), (0.05, -0.3), (0.05, -0.2), (-0.05, -0.2)])
    torso = np.array([(-0.18, -0.23), (0.18, -0.23), (0.14, 0.13), (-0.14, 0.13)])
    # COCO's order: the nose, then left and right of each pair.
    joints = np.concatenate([[head + (0, 0.02)], np.stack(sides, axis=1).reshape(16, 2)])
    return [*limbs, neck, torso, head + _circle(24) * (0.115, 0.13)], joints


def _shape(rng, category_id, size):
    """A shape around (0, 0), about size pixels long, upright but for up to 20 degrees.

    -> (polygons [K, 2] whose union it is; joints [17, 2], or [0, 2] of others than persons)
    """
    name, angle = TOY_CATEGORIES[category_id], rng.uniform(-0.35, 0.35)
    joints = np.zeros((0, 2))
    if name == "person":
        polygons, joints = _figure(rng)
    elif name == "disk":
        polygons = [_circle(40) * (0.5, rng.uniform(0.42, 0.5))]
    elif name == "square":
        corners = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)])
        polygons = [corners * (1, rng.uniform(0.85, 1))]
    elif name == "triangle":
        polygons = [_circle(3)[:, ::-1] * (0.6 * rng.uniform(0.85, 1.1), -0.6)]  # point up
    else:  # a star: of its ten corners, every second one is nearer to the centre
        polygons = [_circle(10)[:, ::-1] * np.tile([-0.56, -rng.uniform(0.22, 0.26)], 5)[:, None]]
    cos, sin = size * math.cos(angle), size * math.sin(angle)
    turn = np.array([[cos, sin], [-sin, cos]])
    return [polygon @ turn for polygon in polygons], joints @ turn


@dataclass
class Drawn:
    """An object in a picture: what later ones hide of it shrinks `visible`."""

    category_id: int
    mask: np.ndarray  # as drawn, bool [h, w]
    visible: np.ndarray  # bool [h, w]
    polygons: list = None  # the outline; None where something hides it or cuts it off
    joints: np.ndarray = None  # [17, 2]; others than persons: [0, 2]
    iscrowd: int = 0


def _move(shape, center, height, width):
    """A shape at its place -> (polygons, the part of their union inside the image, bool [h, w])."""
    polygons = [(polygon + center).round(2) for polygon in shape]
    mask = np.zeros((height, width), dtype=np.uint8)
    paint_segmentation(mask, polygons, mask.shape, False)
    return polygons, mask.astype(bool)


def _paint(rng, canvas, polygons, mask):
    """Draws polygons into canvas (float32 [h, w, 3]), in a colour unlike what mask covers there."""
    corners = np.concatenate(polygons)
    x1, y1 = np.floor(corners.min(0)).clip(0).astype(int).tolist()
    x2, y2 = np.ceil(corners.max(0)).clip(0, mask.shape[::-1]).astype(int).tolist()
    below = canvas[mask].mean(0)
    color = max(rng.uniform(20, 235, (6, 3)), key=lambda other: np.abs(other - below).sum())
    texture = _texture(rng, y2 - y1, x2 - x1, color, color + rng.normal(0, 15, 3))
    large = ((x2 - x1) * SUPERSAMPLING, (y2 - y1) * SUPERSAMPLING)
    layers = Image.new("RGB", large, (0, 255, 0))  # the channels: cover, shade, nothing
    draw = ImageDraw.Draw(layers)
    for k, polygon in enumerate(polygons):
        # PIL's coordinates are those of pixel centres.
        points = ((polygon - (x1, y1)) * SUPERSAMPLING - 0.5).ravel().tolist()
        # Neighbouring limbs differ in shade, or arms would be lost before the body.
        draw.polygon(points, fill=(255, (255, 215)[k % 2], 0))
    layers = np.asarray(layers.reduce(SUPERSAMPLING), dtype=np.float32) / 255
    cover, shade = layers[:, :, 0:1], layers[:, :, 1:2]
    crop = canvas[y1:y2, x1:x2]  # a view: what is painted here is painted into canvas
    crop += cover * (texture * shade - crop)


def _place_crowd(rng, canvas, placed):
    """Draws a heap of small objects of one class, annotated as one region."""
    height, width = canvas.shape[:2]
    category_id = int(rng.choice(list(TOY_CATEGORIES)))
    heap = rng.uniform((25, 25), (width - 25, height - 25))
    union = np.zeros((height, width), dtype=bool)
    for _ in range(int(rng.integers(10, 16))):
        center = np.clip(rng.normal(heap, (14, 9)), 8, (width - 8, height - 8))
        shape, _ = _shape(rng, category_id, rng.uniform(13, 18))
        polygons, mask = _move(shape, center, height, width)
        _paint(rng, canvas, polygons, mask)
        union |= mask
    placed.append(Drawn(category_id, union, union, joints=np.zeros((0, 2)), iscrowd=1))


def _place(rng, canvas, placed, category_id, size):
    """Draws an object where it hides no earlier one too much, if 50 tries find such a place."""
    height, width = canvas.shape[:2]
    shape, joints = _shape(rng, category_id, size)
    low, high = np.concatenate(shape).min(0), np.concatenate(shape).max(0)
    for _ in range(50):
        center = rng.uniform((0, 0), (width, height))
        inside = np.minimum(high + center, (width, height)) - np.maximum(low + center, 0)
        if inside.prod() < 0.85 * (high - low).prod():
            continue
        polygons, mask = _move(shape, center, height, width)
        left = [o.visible & ~mask for o in placed]
        if all(part.sum() >= LEAST_VISIBLE * o.mask.sum() for part, o in zip(left, placed)):
            break
    else:
        return
    _paint(rng, canvas, polygons, mask)
    for part, o in zip(left, placed):
        o.visible = part
        if (mask & o.mask).any():
            o.polygons = None
    if (low + center < 0).any() or (high + center > (width, height)).any():
        polygons = None
    placed.append(Drawn(category_id, mask, mask, polygons, joints + center))


def _annotation(o):
    """An object as COCO annotates it, without ids: what is visible of it counts."""
    height, width = o.visible.shape
    rle = coco_mask.encode(np.asfortranarray(o.visible, dtype=np.uint8))
    box = coco_mask.toBbox(rle).tolist()
    annotation = {
        "category_id": o.category_id,
        "iscrowd": o.iscrowd,
        "bbox": box,
        "area": int(o.visible.sum()),
        "segmentation": {"size": [height, width], "counts": rle["counts"].decode()},
    }
    if o.polygons is not None:
        annotation["segmentation"] = [polygon.ravel().tolist() for polygon in o.polygons]
    if TOY_CATEGORIES[o.category_id] == "person":
        keypoints = np.zeros((len(KEYPOINT_NAMES), 3), dtype=int)
        # As in COCO, nobody marks the joints of a figure too small to show them.
        if not o.iscrowd and box[3] >= 32:
            x, y = np.floor(o.joints).astype(int).T
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            seen = o.visible[y.clip(0, height - 1), x.clip(0, width - 1)]
            keypoints = np.stack([x, y, 1 + seen], axis=1) * inside[:, None]
        annotation["keypoints"] = keypoints.ravel().tolist()
        annotation["num_keypoints"] = int((keypoints[:, 2] > 0).sum())
    return annotation


def _scene(rng, i):
    """Draws image number i -> (pixels uint8 [h, w, 3], its objects as _annotation gives them).

    Some images have a fixed part, so that even a small split has each: i % 25 == 2 no object,
    i % 16 == 1 a crowd, i % 5 == 3 a large object.
    """
    width, height = SIZES[rng.integers(len(SIZES))]
    canvas = _background(rng, height, width)
    placed = []  # from bottom to top
    if i % 16 == 1:
        _place_crowd(rng, canvas, placed)
    if i % 5 == 3:
        category_id = int(rng.choice([3, 4]))  # the others would not fit at an area above 96^2
        _place(rng, canvas, placed, category_id, rng.uniform(0.9, 1.1) * min(height, width))
    for _ in range(0 if i % 25 == 2 else int(rng.integers(1, 6))):
        category_id = int(rng.choice(list(TOY_CATEGORIES)))
        size = rng.uniform(18, 31) if rng.random() < 0.15 else 36 * (96 / 36) ** rng.random()
        if category_id == 1:
            size *= 1.25  # a figure fills less of its box than the other shapes
        _place(rng, canvas, placed, category_id, size)
    return _with_camera_noise(rng, canvas), [_annotation(o) for o in placed]


def _write_split(root, split, count, seed, first_id):
    """Images and both annotation files of one split; image i is a function of (seed, i)."""
    (root / split).mkdir()
    images, persons, instances = [], [], []
    for i in range(count):
        image_id = first_id + i
        pixels, objects = _scene(np.random.default_rng([*seed, i]), i)
        name = f"{image_id:012d}.jpg"
        Image.fromarray(pixels).save(root / split / name, quality=90)
        height, width = pixels.shape[:2]
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for k, o in enumerate(objects):
            annotation = {"id": 100 * image_id + k, "image_id": image_id, **o}
            if "keypoints" in o:
                persons.append(annotation)
            instances.append({key: annotation[key] for key in annotation if "keypoints" not in key})
    categories = [{"id": k, "name": n, "supercategory": "shape"} for k, n in TOY_CATEGORIES.items()]
    person = {**categories[0], "keypoints": KEYPOINT_NAMES, "skeleton": SKELETON}
    content = {"info": {"description": "generated shapes and figures"}, "licenses": []}
    content |= {"images": images, "annotations": instances, "categories": categories}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    content |= {"annotations": persons, "categories": [person]}
    (root / "annotations" / f"person_keypoints_{split}.json").write_text(json.dumps(content))


def make_toy_coco(root, train_images=1000, val_images=160, seed=0):
    """Writes a generated data set in COCO's layout to the folder root; one that is there is reused.

    The same seed gives the same data; the splits share nothing. The folder appears under its name
    only when complete. UserError if root holds anything else.
    """
    root = Path(root).absolute()
    if min(train_images, val_images) < 1 or max(train_images, val_images) > 500_000:
        raise UserError("Make 1 to 500,000 images of each split.")
    settings = {"version": VERSION, "train": train_images, "val": val_images, "seed": seed}
    marker = root / "toy.json"
    if marker.is_file() and marker.read_text() == json.dumps(settings):
        return
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        problem = f"is not generated data with the settings {settings}"
        raise UserError(f"{root} {problem}; delete it or name another folder.")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{root.name}.unfinished-", dir=root.parent) as folder:
        made = Path(folder) / "made"
        (made / "annotations").mkdir(parents=True)
        _write_split(made, "train2017", train_images, [seed, 0], first_id=1)
        _write_split(made, "val2017", val_images, [seed, 1], first_id=500_001)
        (made / "toy.json").write_text(json.dumps(settings))
        made.rename(root)


class ToyPatches(Dataset):
    """Single shapes to classify: to the generated data what ImageNet is to COCO.

    patches[i] -> (uint8 RGB [3, 64, 64], class 0..4), a function of i and of the seed; `count` of
    them. No image is one of make_toy_coco's.
    """

    def __init__(self, count, seed=0):
        self.count = count
        self.seed = seed

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        rng = np.random.default_rng([self.seed, 2, i])  # make_toy_coco's splits have 0 and 1
        canvas = _background(rng, 64, 64)
        label = int(rng.integers(len(TOY_CATEGORIES)))
        placed = []
        while not placed:
            _place(rng, canvas, placed, list(TOY_CATEGORIES)[label], rng.uniform(24, 56))
        return torch.from_numpy(_with_camera_noise(rng, canvas)).permute(2, 0, 1), label


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("root", metavar="DIR", help="the folder to make")
    add("--train", type=int, default=1000, help="training images (1000)")
    add("--val", type=int, default=160, help="validation images (160)")
    add("--seed", type=int, default=0, help="random seed (0)")
    args = parser.parse_args(arguments)
    make_toy_coco(args.root, args.train, args.val, args.seed)


if __name__ == "__main__":
    sys.exit(evaluate.run_command("toy_coco.py", main))
