"""The data: transforms, COCO and PASCAL VOC, sampler and loader, generated data, and a doctor.

  python data.py DIR      examines a data set in COCO's layout before you train on it

Everything here yields the same pair, (image, target): the image a uint8 RGB tensor [3, H, W], the
target a dict of plain tensors in the pixels of that image. Nothing here knows about the model.

Coordinates are continuous: pixel (row i, column j) covers the square [j, j + 1] x [i, i + 1], a box
(x1, y1, x2, y2) has the width x2 - x1 without a "+ 1" (Detectron2's convention).
"""

import argparse
import contextlib
import glob
import io
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import warnings
from xml.etree import ElementTree

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm


class DataError(ValueError):
    """A problem in the user's data: one sentence with what is wrong, where, and what to do."""


# ------------------------------------------------------------------------------------------------
# Transforms (Sec. 4, "Hyper-parameters": shorter side 800, longer at most 1333, horizontal flip)
# ------------------------------------------------------------------------------------------------

KEYPOINT_NAMES = [
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder",
    "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip",
    "left_knee", "right_knee", "left_ankle", "right_ankle",
]

# KEYPOINT_FLIP[k] is what keypoint k turns into in a mirror image: left and right change places.
KEYPOINT_FLIP = [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]


def resize_shape(height, width, min_size, max_size):
    """The size (h, w) in pixels at which an image of height x width enters the network.

    The shorter side becomes min_size, unless the longer one would then exceed max_size. Rounded as
    in Detectron2's ResizeShortestEdge.
    """
    scale = min_size / min(height, width)
    if height < width:
        new_height, new_width = min_size, scale * width
    else:
        new_height, new_width = scale * height, min_size
    if max(new_height, new_width) > max_size:
        scale = max_size / max(new_height, new_width)
        new_height *= scale
        new_width *= scale
    return max(int(new_height + 0.5), 1), max(int(new_width + 0.5), 1)


def resize_image(image, height, width):
    """Bilinear resize, antialiased when it shrinks: uint8 [3, H, W] -> uint8 [3, height, width].

    torch does this on bytes within one grey level of PIL, and faster: 480x640 to 800x1067 takes
    3 ms on one core, against PIL's 8 ms.
    """
    if image.shape[1:] == (height, width):
        return image
    resized = F.interpolate(image[None], size=(height, width), mode="bilinear", antialias=True)
    return resized[0]


def resize_boxes(boxes, old_size, new_size, flip):
    """Boxes [N, 4] xyxy of an image of old_size (H, W), mirrored if flip, resized to new_size."""
    if flip:
        x1, y1, x2, y2 = boxes.unbind(1)
        boxes = torch.stack([old_size[1] - x2, y1, old_size[1] - x1, y2], dim=1)
    scale_y = new_size[0] / old_size[0]
    scale_x = new_size[1] / old_size[1]
    return boxes * boxes.new_tensor([scale_x, scale_y, scale_x, scale_y])


def resize_keypoints(keypoints, old_size, new_size, flip):
    """Keypoints [N, 17, 3] (x, y, v), mirrored if flip (left and right swap), then resized."""
    x, y, v = keypoints.unbind(2)
    if flip:
        x = old_size[1] - x
    x = x * (new_size[1] / old_size[1])
    y = y * (new_size[0] / old_size[0])
    keypoints = torch.stack([x, y, v], dim=2)
    keypoints[v == 0] = 0  # unlabelled ones stay (0, 0, 0)
    return keypoints[:, KEYPOINT_FLIP] if flip else keypoints


def paint_polygons(mask, polygons, scale_x, scale_y, flip):
    """Fills the union of polygons into mask (a zero uint8 array [h, w]), scaled and mirrored first.

    Rasterizing at the target's resolution keeps the edges sharp. Only a crop around the object is
    rasterized, for speed: most of an image is not object. The result is the whole image's.
    """
    if not polygons:
        return
    height, width = mask.shape
    points = [polygon.reshape(-1, 2) * (scale_x, scale_y) for polygon in polygons]
    if flip:
        points = [(width, 0) + polygon * (-1, 1) for polygon in points]
    everything = np.concatenate(points)
    x1, y1 = np.clip(np.floor(everything.min(0)) - 1, 0, (width, height)).astype(int).tolist()
    x2, y2 = np.clip(np.ceil(everything.max(0)) + 1, 0, (width, height)).astype(int).tolist()
    if x1 >= x2 or y1 >= y2:
        return
    # pycocotools rounds to fifths of a pixel; with 1e-9, ties fall as they do without the shift.
    parts = [(polygon - (x1, y1) + 1e-9).ravel() for polygon in points]
    rles = coco_mask.frPyObjects(parts, y2 - y1, x2 - x1)
    mask[y1:y2, x1:x2] = coco_mask.decode(coco_mask.merge(rles))


def paint_rle(mask, rle, flip):
    """Copies an RLE of another size into mask (a zero uint8 array [h, w]), mirrored if flip.

    A target pixel takes the source pixel under its centre ("nearest-exact"), so that every edge
    stays within half a pixel of where the box's edge goes.
    """
    source = torch.from_numpy(coco_mask.decode(rle))
    if flip:
        source = source.flip(1)
    if source.shape != mask.shape:
        source = F.interpolate(source[None, None], size=mask.shape, mode="nearest-exact")[0, 0]
    mask[:] = source.numpy()


# ------------------------------------------------------------------------------------------------
# Reading images
# ------------------------------------------------------------------------------------------------

# Formats that hold photographs. Others stay shut: PIL hands EPS to an interpreter, for one.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
EXIF_ORIENTATION = 0x0112


def image_path(image_dir, file_name, image_id=None):
    """The path of file_name in image_dir; DataError if it leaves that folder, be it by a link."""
    root = os.path.realpath(image_dir)
    try:
        path = os.path.realpath(os.path.join(root, file_name))
        inside = os.path.commonpath([root, path]) == root
    except ValueError:  # a null byte, or another drive
        inside = False
    if not inside:
        raise DataError(f"Image {image_id}: the file name {file_name!r} leads out of {image_dir}; "
                        "image files must lie in that folder.")
    return path


def _to_rgb(image, where):
    """A PIL image of any mode as RGB, 8 bits each."""
    if image.mode.startswith("I"):  # 16 bits; PIL's own conversion would cut them off at 255
        array = np.asarray(image).astype(np.int64)
        if array.min() < 0 or array.max() > 65535:
            raise DataError(f"{where} has more than 16 bits a pixel; convert it to 8 bits.")
        return Image.fromarray(((array + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DataError(f"{where} has floating-point pixels; convert it to 8 bits.")
    return image.convert("RGB")


def _orient(image, width, height, where):
    """Applies the EXIF orientation of a PIL image or not, by the annotated size."""
    shown = image.size
    orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    if orientation in (5, 6, 7, 8):  # those that swap the sides
        shown = image.size[::-1]
    if width is None or shown == (width, height):
        return ImageOps.exif_transpose(image) if orientation != 1 else image
    if image.size == (width, height):
        return image
    raise DataError(f"{where} is {image.size[0]}x{image.size[1]} pixels but annotated as "
                    f"{width}x{height}; correct the annotation or the file.")


def read_image(path, width=None, height=None, image_id=None):
    """Reads an image file as RGB, uint8 [3, H, W].

    Grey, palette, CMYK and 16-bit images become 8-bit RGB; transparency is ignored. An orientation
    in the file's EXIF data is applied, except when only the image as stored has the annotated width
    and height. DataError if it fits neither way, is missing, damaged, or too large to be decoded.
    """
    where = f"{path} (image {image_id})" if image_id is not None else str(path)
    if not os.path.isfile(path):
        raise DataError(f"{where} does not exist; check the image folder.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # PIL only warns of an image that would take gigabytes: not decoding it is safer.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                image = _orient(image, width, height, where)
                array = np.array(_to_rgb(image, where))
    except DataError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise DataError(f"{where} has more than {Image.MAX_IMAGE_PIXELS} pixels; shrink it or "
                        "remove it.") from None
    except Exception as error:  # a damaged file can make a decoder fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{where} cannot be read as an image ({reason}); replace it or remove "
                        "it.") from None
    return torch.from_numpy(array).permute(2, 0, 1)


# ------------------------------------------------------------------------------------------------
# COCO's annotation files, checked: pycocotools trusts what it is given
# ------------------------------------------------------------------------------------------------

MAX_COORDINATE = 1e5  # pixels; beyond it, pycocotools' integers overflow


def _check(condition, where, problem):
    if not condition:
        raise DataError(f"{where} {problem}; correct the file.")


def _is_integer(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _numbers(values, count=None):
    """A JSON list of (count) finite numbers as a float64 array, or None if it is anything else."""
    if not isinstance(values, list) or (count is not None and len(values) != count):
        return None
    try:
        array = np.array(values)
    except ValueError:  # lists of different lengths
        return None
    if array.ndim != 1 or array.dtype.kind not in "if" or not np.isfinite(array).all():
        return None
    return array.astype(np.float64)


def _entry_problem(entry, kind, ids):
    """What is wrong with an entry, or None; ids: those known of images and categories."""
    if kind == "image":
        if not isinstance(entry.get("file_name"), str):
            return 'needs a "file_name"'
        for side in ("width", "height"):
            if not _is_integer(entry.get(side)) or entry[side] <= 0:
                return f'needs a positive integer "{side}"'
    elif kind == "category":
        if not isinstance(entry.get("name"), str):
            return 'needs a "name"'
    else:
        category_id, box = entry.get("category_id"), entry.get("bbox")
        if not _is_integer(entry.get("image_id")) or entry["image_id"] not in ids["image"]:
            return "belongs to no image of the file"
        if not _is_integer(category_id) or category_id not in ids["category"]:
            return f"has category {category_id!r}, which the file does not list"
        if _numbers(box, 4) is None:
            return f'needs a "bbox" of 4 numbers, not {box!r:.60}'
        if entry.get("iscrowd", 0) not in (0, 1):
            return 'has an "iscrowd" that is neither 0 nor 1'
        if _numbers([entry.get("area", 0)], 1) is None:
            return 'has an "area" that is no number'
    return None


def coco_problems(content, annotation_file):
    """Everything that makes parsed JSON unusable as a COCO annotation file, a sentence each.

    Segmentations and keypoints are looked at when they are used (`parse_segmentation`).
    """
    if not isinstance(content, dict) or "images" not in content or "categories" not in content:
        yield (f'{annotation_file} is not a COCO annotation file ("images" or "categories" is '
               "missing); choose another.")
        return
    ids = {}
    keys = {"image": "images", "category": "categories", "annotation": "annotations"}
    for kind, key in keys.items():
        ids[kind] = set()
        entries = content.get(key, [])
        if not isinstance(entries, list):
            yield f"{annotation_file} has no list of entries for {kind}; correct the file."
            continue
        for entry in entries:
            if not isinstance(entry, dict) or not _is_integer(entry.get("id")):
                yield (f"{annotation_file} has an entry for {kind} without an integer id: "
                       f"{entry!r:.60}; correct the file.")
                continue
            problem = _entry_problem(entry, kind, ids)
            if entry["id"] in ids[kind]:
                problem = "appears twice"
            ids[kind].add(entry["id"])
            if problem is not None:
                of_image = f" of image {entry.get('image_id')}" if kind == "annotation" else ""
                yield (f"{annotation_file}: {kind} {entry['id']}{of_image} {problem}; "
                       "correct the file.")


def read_coco(annotation_file):
    """Reads and checks a COCO annotation file -> pycocotools' COCO object, without its prints.

    A file without "annotations" (COCO's test splits) is one without objects. "iscrowd" and "area"
    are filled in where a file lacks them: 0, and the area of the box. DataError on anything else.
    """
    try:
        with open(annotation_file, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise DataError(f"Annotation file {annotation_file} cannot be opened ({error.strerror}); "
                        "check the data folder.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{annotation_file} is not JSON ({error}); download it again.") from None
    for problem in coco_problems(content, annotation_file):
        raise DataError(problem)
    content.setdefault("annotations", [])
    content.setdefault("info", {})
    for annotation in content["annotations"]:
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])

    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _decode_counts(text):
    """The run lengths of COCO's compressed RLE, or None if text is none.

    Each is a little-endian signed number in groups of 5 bits, a sixth bit saying that more follows,
    48 added to make it printable; from the fourth on, it is the difference to the last but one.
    """
    counts = []
    value = 0
    shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = 0
        shift = 0
    return counts if shift == 0 else None


def parse_segmentation(segmentation, height, width, where):
    """Checks a COCO segmentation -> polygons (a list of float64 arrays x, y, x, y, ...) or an RLE.

    height, width: of the image, which an RLE must cover. Checked with care, because pycocotools
    trusts what it is given and writes out of bounds if that is wrong. Polygons of fewer than three
    points have no area and are left out, as in Detectron2.
    """
    if isinstance(segmentation, list):
        polygons = [_numbers(polygon) for polygon in segmentation]
        for polygon in polygons:
            fine = polygon is not None and len(polygon) % 2 == 0
            _check(fine and np.abs(polygon).max(initial=0) < MAX_COORDINATE, where,
                   "has a malformed polygon")
        return [polygon for polygon in polygons if len(polygon) >= 6]
    _check(isinstance(segmentation, dict) and segmentation.get("size") == [height, width], where,
           f"has a segmentation that is neither polygons nor an RLE of size {[height, width]}")
    counts = segmentation.get("counts")
    compressed = isinstance(counts, str)
    if compressed:
        counts = _decode_counts(counts)
    fine = isinstance(counts, list) and len(counts) > 0 and all(map(_is_integer, counts))
    _check(fine and min(counts) >= 0 and sum(counts) == height * width, where,
           "has an RLE whose counts do not add up to the image's pixels")
    return segmentation if compressed else coco_mask.frPyObjects(segmentation, height, width)


# ------------------------------------------------------------------------------------------------
# COCO's images and objects, all of them or a subset (Sec. 5.2)
# ------------------------------------------------------------------------------------------------


def image_seed(seed, iteration, position):
    """The seed of one image of the batch: a hash, int in [0, 2**63).

    position: of the image in the whole batch, rank * images_per_gpu + j. SplitMix64's mixing
    function (Steele et al., 2014), applied to one number after the other.
    """
    value = 0
    for number in (seed, iteration, position):
        value = (value + number + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        value ^= value >> 31
    return value >> 1


def choose_subset(image_ids, count):
    """`count` of the image ids, in their order: those whose hash (seed 0) is smallest.

    A function of the ids alone, the same on every machine, and nested: the 1k images are among the
    3.5k. Raises DataError if there are fewer.
    """
    image_ids = list(image_ids)
    if len(image_ids) < count:
        raise DataError(f"A subset of {count:,} images is asked for, but there are "
                        f"{len(image_ids):,} with usable objects; choose a smaller one.")
    chosen = set(sorted(image_ids, key=lambda image_id: image_seed(0, image_id, 0))[:count])
    return [image_id for image_id in image_ids if image_id in chosen]


def _keypoint_categories(categories, annotation_file):
    """The one category with keypoints: the person, with COCO's 17."""
    persons = [category for category in categories if category["name"] == "person"]
    _check(len(persons) == 1, annotation_file, 'has no category "person" with keypoints')
    _check(persons[0].get("keypoints", KEYPOINT_NAMES) == KEYPOINT_NAMES, annotation_file,
           "lists other keypoints than COCO's 17")
    return persons


def _is_usable(o, width, height):
    """Whether an object is trained on: no crowd, and a box with an area inside the image."""
    x, y, w, h = o["bbox"]
    inside_x = min(x + w, width) - max(x, 0)
    inside_y = min(y + h, height) - max(y, 0)
    least = 1e-3  # pixels; less would vanish in float32
    return not o["iscrowd"] and min(w, h, inside_x, inside_y) >= least


def _xyxy(boxes, width, height):
    """COCO's boxes (x, y, w, h) -> float32 [N, 4] (x1, y1, x2, y2), clipped to the image."""
    boxes = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes[:, 0::2] = boxes[:, 0::2].clamp(0, width)
    boxes[:, 1::2] = boxes[:, 1::2].clamp(0, height)
    return boxes.float()


class CocoDataset(Dataset):
    """Images and objects of a COCO annotation file; dataset[i] -> (image, target) at full size.

    image: uint8 [3, H, W] RGB. target: `image_id` int; `boxes` [N, 4] float32 xyxy in pixels,
    clipped to the image; `labels` [N] int64, k meaning classes[k - 1] (0 is background); `iscrowd`
    [N] bool; with masks, `masks` [N, H, W] uint8; with keypoints, `keypoints` [N, 17, 3] float32
    (x, y, v). COCO's keypoints are indices of pixels: half a pixel makes them coordinates.

    training leaves out crowds, boxes without area, and images in which nothing (keypoints: no
    labelled keypoint) remains, `num_dropped` in number, as Detectron does: of train2017's 118,287
    images 117,266 are left. keypoints: only the category "person".
    subset: keep that many images only (Sec. 5.2), see `choose_subset`.

    DataError (here or at dataset[i]) for any problem in the files.
    """

    def __init__(self, image_dir, annotation_file, training=False, masks=True, keypoints=False,
                 subset=None):
        if not os.path.isdir(image_dir):
            raise DataError(f"Image folder {image_dir} does not exist; check the data folder.")
        self.image_dir = os.fspath(image_dir)
        self.annotation_file = os.fspath(annotation_file)
        self.training = training
        self.masks = masks
        self.keypoints = keypoints

        coco = read_coco(annotation_file)
        categories = [coco.cats[category_id] for category_id in sorted(coco.cats)]
        if keypoints:
            categories = _keypoint_categories(categories, annotation_file)
        self.category_ids = [category["id"] for category in categories]
        self.classes = [category["name"] for category in categories]
        labels = {category_id: k for k, category_id in enumerate(self.category_ids, start=1)}

        records = {}
        for image_id in sorted(coco.imgs):
            image = coco.imgs[image_id]
            objects = [self._object(annotation, labels[annotation["category_id"]])
                       for annotation in coco.imgToAnns.get(image_id, [])
                       if annotation["category_id"] in labels]
            if training:
                objects = [o for o in objects if _is_usable(o, image["width"], image["height"])]
                if not objects or (keypoints and not any(any(o["v"]) for o in objects)):
                    continue
            records[image_id] = {"file_name": image["file_name"], "objects": objects,
                                 "size": (image["width"], image["height"])}
        self.num_dropped = len(coco.imgs) - len(records)
        self._store(records, subset)

    def _store(self, records, subset=None):
        """Keep the records: {image id: {"file_name", "size": (w, h), "objects"}}."""
        if not records:
            purpose = " to train on" if self.training else ""
            raise DataError(f"{self.annotation_file} has no image{purpose}; choose another file.")
        self.image_ids = list(records) if subset is None else choose_subset(records, subset)
        records = [records[image_id] for image_id in self.image_ids]
        self.widths, self.heights = np.array([record["size"] for record in records]).T
        self.num_objects = sum(len(record["objects"]) for record in records)
        records = [json.dumps(record).encode() for record in records]
        # One flat tensor instead of millions of Python objects: workers share its memory, whether
        # spawned or forked (a Python object is copied as soon as its reference count changes).
        self._offsets = torch.tensor([0] + [len(record) for record in records]).cumsum(0)
        self._records = torch.frombuffer(bytearray(b"".join(records)), dtype=torch.uint8)

    def _object(self, annotation, label):
        """What is kept of an annotation: only what dataset[i] needs."""
        kept = {"id": annotation["id"], "label": label, "bbox": annotation["bbox"],
                "iscrowd": annotation["iscrowd"]}
        where = self._where(annotation)
        if self.masks:
            _check("segmentation" in annotation, where, 'has no "segmentation"')
            kept["segmentation"] = annotation["segmentation"]
        if self.keypoints:
            keypoints = _numbers(annotation.get("keypoints"), 3 * len(KEYPOINT_NAMES))
            _check(keypoints is not None and np.isin(keypoints[2::3], (0, 1, 2)).all(), where,
                   'needs "keypoints": 17 times x, y, v with v of 0, 1 or 2')
            kept["keypoints"] = annotation["keypoints"]
            kept["v"] = keypoints[2::3].tolist()
        return kept

    def coco_gt(self):
        """The annotation file as a pycocotools COCO object, read again, for COCOeval.

        With what pycocotools trusts to be there: masks are checked, those of polygons that training
        leaves out are empty, and "num_keypoints" is counted where the file lacks it.
        """
        coco = read_coco(self.annotation_file)
        for annotation in coco.dataset["annotations"]:
            if annotation["category_id"] not in self.category_ids:
                continue
            if self.masks:
                image = coco.imgs[annotation["image_id"]]
                size = image["height"], image["width"]
                where = self._where(annotation)
                mask = parse_segmentation(annotation["segmentation"], *size, where)
                if isinstance(mask, list):
                    empty = {"size": list(size), "counts": [size[0] * size[1]]}
                    annotation["segmentation"] = [p.tolist() for p in mask] or empty
            if self.keypoints:
                labelled = sum(v > 0 for v in annotation["keypoints"][2::3])
                annotation.setdefault("num_keypoints", labelled)
        return coco

    def _where(self, annotation):
        """The beginning of an error about an annotation."""
        return (f"{self.annotation_file}: annotation {annotation['id']} of image "
                f"{annotation['image_id']}")

    def __len__(self):
        return len(self.image_ids)

    def __getitem__(self, index):
        return self.load(index)

    def _record(self, index):
        start, end = self._offsets[index].item(), self._offsets[index + 1].item()
        return json.loads(self._records[start:end].numpy().tobytes())

    def load(self, index, min_size=None, max_size=None, flip=False):
        """dataset[index], mirrored if flip, resized to (min_size, max_size) if given."""
        record = self._record(index)
        objects = record["objects"]
        image_id = self.image_ids[index]
        old_size = int(self.heights[index]), int(self.widths[index])
        new_size = old_size if min_size is None else resize_shape(*old_size, min_size, max_size)

        path = image_path(self.image_dir, record["file_name"], image_id)
        image = read_image(path, old_size[1], old_size[0], image_id)
        if flip:  # before resizing, where there are fewer pixels to move
            image = image.flip(2)
        image = resize_image(image, *new_size)

        boxes = _xyxy([o["bbox"] for o in objects], old_size[1], old_size[0])
        target = {
            "image_id": image_id,
            "boxes": resize_boxes(boxes, old_size, new_size, flip),
            "labels": torch.tensor([o["label"] for o in objects], dtype=torch.int64),
            "iscrowd": torch.tensor([o["iscrowd"] for o in objects], dtype=torch.bool),
        }
        if self.masks:
            target["masks"] = self._masks(objects, image_id, old_size, new_size, flip)
        if self.keypoints:
            keypoints = torch.tensor([o["keypoints"] for o in objects], dtype=torch.float32)
            keypoints = keypoints.reshape(-1, len(KEYPOINT_NAMES), 3)
            keypoints[:, :, :2] += 0.5
            target["keypoints"] = resize_keypoints(keypoints, old_size, new_size, flip)
        return image, target

    def _masks(self, objects, image_id, old_size, new_size, flip):
        """The objects' bit masks, uint8 [N, h, w] at new_size."""
        masks = np.zeros((len(objects), *new_size), dtype=np.uint8)
        for mask, o in zip(masks, objects):
            where = f"{self.annotation_file}: annotation {o['id']} of image {image_id}"
            segmentation = parse_segmentation(o["segmentation"], *old_size, where)
            if isinstance(segmentation, list):
                scale_y = new_size[0] / old_size[0]
                scale_x = new_size[1] / old_size[1]
                paint_polygons(mask, segmentation, scale_x, scale_y, flip)
            else:
                paint_rle(mask, segmentation, flip)
        return torch.from_numpy(masks)


# ------------------------------------------------------------------------------------------------
# PASCAL VOC (Sec. 5.2)
# ------------------------------------------------------------------------------------------------

VOC_CLASSES = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
]


def read_voc(path):
    """One XML file of VOC: {"size": (w, h), "objects": [{"id", "label", "bbox", ...}]}."""
    try:
        tree = ElementTree.parse(path).getroot()
        size = tuple(int(tree.find("size").find(side).text) for side in ("width", "height"))
        objects = []
        for i, entry in enumerate(tree.iter("object")):
            name = entry.find("name").text.strip()
            if name not in VOC_CLASSES:
                raise DataError(f"{path}: object {i} is a {name!r}, which is no class of VOC.")
            box = entry.find("bndbox")
            x1, y1, x2, y2 = (float(box.find(c).text) for c in ("xmin", "ymin", "xmax", "ymax"))
            x1, y1 = x1 - 1, y1 - 1  # VOC counts pixels from 1 and includes the last one
            difficult = entry.find("difficult")
            objects.append({
                "id": i, "label": VOC_CLASSES.index(name) + 1, "bbox": [x1, y1, x2 - x1, y2 - y1],
                "iscrowd": 0, "difficult": difficult is not None and difficult.text.strip() == "1",
            })
    except OSError:
        raise DataError(f"{path} cannot be read; unpack VOC's devkit whole.") from None
    except DataError:
        raise
    except (ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no annotation of VOC ({error}).") from None
    return {"size": size, "objects": objects}


class VocDataset(CocoDataset):
    """PASCAL VOC's devkit as it unpacks; the same pairs as CocoDataset, boxes only.

    root: the folder with VOC2007/ and VOC2012/, or with VOCdevkit/. splits: (folder, list of
    ImageSets/Main), e.g. [("VOC2007", "trainval"), ("VOC2012", "train")]. "Difficult" objects are
    not trained on, and count for nothing in the evaluation, as VOC's protocol has it. An image's id
    is its name as a number (2008_000002: 2008000002).

    DataError for a missing or malformed file.
    """

    def __init__(self, root, splits, training=False, subset=None):
        root = os.fspath(root)
        if os.path.isdir(os.path.join(root, "VOCdevkit")):
            root = os.path.join(root, "VOCdevkit")
        self.image_dir = self.annotation_file = root
        self.training = training
        self.masks = self.keypoints = False
        self.classes = VOC_CLASSES
        self.category_ids = list(range(1, len(VOC_CLASSES) + 1))
        records = {}
        listed_images = 0
        for folder, split in splits:
            listed = os.path.join(root, folder, "ImageSets", "Main", f"{split}.txt")
            try:
                with open(listed) as file:
                    names = file.read().split()
            except OSError:
                raise DataError(f"{listed} cannot be read; unpack VOC's devkit into "
                                f"{root}.") from None
            listed_images += len(names)
            for name in names:
                record = read_voc(os.path.join(root, folder, "Annotations", f"{name}.xml"))
                record["file_name"] = f"{folder}/JPEGImages/{name}.jpg"
                if training:
                    record["objects"] = [o for o in record["objects"]
                                         if not o["difficult"] and _is_usable(o, *record["size"])]
                if record["objects"] or not training:
                    records[int(name.replace("_", ""))] = record
        self.num_dropped = listed_images - len(records)
        self._store(records, subset)

    def voc_truths(self):
        """For the metric: {category id: {image id: (boxes [N, 4] xyxy, difficult [N] bool)}}."""
        truths = {category: {} for category in self.category_ids}
        for index, image_id in enumerate(self.image_ids):
            objects = self._record(index)["objects"]
            for category in {o["label"] for o in objects}:
                chosen = [o for o in objects if o["label"] == category]
                boxes = np.array([o["bbox"] for o in chosen], dtype=np.float64)
                boxes[:, 2:] += boxes[:, :2]
                difficult = np.array([o["difficult"] for o in chosen], dtype=bool)
                truths[category][image_id] = boxes, difficult
        return truths


# ------------------------------------------------------------------------------------------------
# A data set by its folder, COCO's or VOC's
# ------------------------------------------------------------------------------------------------


def open_split(root, split, training=False, masks=True, keypoints=False, subset=None):
    """The data set of a split ("train2017" or "val2017") below the folder `root`.

    COCO's layout: annotations/instances_train2017.json (keypoints: person_keypoints_...),
    train2017/, ... VOC's devkit is known by its VOC2012/: training is trainval2007 + train2012 and
    validation val2012, as in the paper; it has no masks and no keypoints.
    """
    root = os.fspath(root)
    if any(os.path.isdir(os.path.join(root, folder)) for folder in ("VOCdevkit", "VOC2012")):
        if masks or keypoints:
            raise DataError(f"{root} is a VOC devkit, which has boxes only; use a recipe without "
                            "masks and keypoints, such as r101-gn-voc.")
        if split not in ("train2017", "val2017"):
            raise DataError(f"{root} is a VOC devkit, which has no split {split!r}; leave it out.")
        if training:
            return VocDataset(root, [("VOC2007", "trainval"), ("VOC2012", "train")], True, subset)
        return VocDataset(root, [("VOC2012", "val")])
    kind = "person_keypoints" if keypoints else "instances"
    annotations = os.path.join(root, "annotations", f"{kind}_{split}.json")
    return CocoDataset(os.path.join(root, split), annotations, training, masks, keypoints, subset)


def average_sample(dataset, min_sizes, max_size):
    """What Figure 2 counts: objects an image, and pixels of an image as the loader makes it."""
    pixels = [math.prod(resize_shape(height, width, min_size, max_size))
              for height, width in zip(dataset.heights.tolist(), dataset.widths.tolist())
              for min_size in min_sizes]
    return dataset.num_objects / len(dataset), sum(pixels) / len(pixels)


# ------------------------------------------------------------------------------------------------
# Sampler and loader
# ------------------------------------------------------------------------------------------------

# Which image comes when is a function of the seed and of the place in an endless stream of epochs;
# how it is changed, of (seed, iteration, position in the batch). Nothing is the state of a
# generator: a run resumed at any iteration, with any number of workers, sees the same images.


class TrainingSet(Dataset):
    """A dataset as it is trained on: training_set[index, seed] -> (image, target), transformed.

    The shorter side is drawn from min_sizes (scale jitter: several), the mirror image with
    probability 1/2 (with flip=False never), both by the image's seed, which goes along as
    target["seed"].
    """

    def __init__(self, dataset, min_sizes=(800,), max_size=1333, flip=True):
        self.dataset = dataset
        self.min_sizes = tuple(min_sizes)
        self.max_size = max_size
        self.flip = flip

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        index, seed = key
        # Hashed once more, so that whatever else the seed decides is independent of these draws.
        min_size = self.min_sizes[image_seed(seed, 0, 0) % len(self.min_sizes)]
        flip = self.flip and image_seed(seed, 0, 1) % 2 == 1
        image, target = self.dataset.load(index, min_size, self.max_size, flip)
        target["seed"] = seed
        return image, target


class BatchSampler(Sampler):
    """Yields without end this process's share of each batch: [(index, image seed), ...].

    Images form groups of images_per_gpu of one orientation (w >= h or not: less padding), as in
    Detectron, new ones every epoch. An epoch shows every image once; an orientation's last group is
    topped up with images from its first. The groups of all epochs are one stream, of which every
    iteration takes the next world_size groups, one for each rank.

    first_image: the place in that stream, in images, at which start_iteration begins. By default
    where the iterations before it have ended; to resume with another batch size, say it.
    """

    def __init__(self, dataset, images_per_gpu, seed=0, rank=0, world_size=1, start_iteration=0,
                 first_image=None):
        landscape = np.asarray(dataset.widths) >= np.asarray(dataset.heights)
        self.orientations = [np.flatnonzero(landscape), np.flatnonzero(~landscape)]
        self.images_per_gpu = images_per_gpu
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start_iteration = start_iteration
        if first_image is None:
            first_image = start_iteration * world_size * images_per_gpu
        self.first_group = first_image // images_per_gpu

    def epoch_groups(self, epoch):
        """The groups of an epoch in order: int64 [G, images_per_gpu], indices of images."""
        groups = []
        rng = np.random.default_rng(image_seed(self.seed, epoch, -1))
        for indices in self.orientations:
            count = math.ceil(len(indices) / self.images_per_gpu)
            order = rng.permutation(indices)
            groups.append(np.resize(order, (count, self.images_per_gpu)))  # repeats at the end
        return rng.permutation(np.concatenate(groups))

    def __iter__(self):
        iteration = self.start_iteration
        group = self.first_group + self.rank
        groups_per_epoch = len(self.epoch_groups(0))
        known_epoch = None
        while True:
            epoch, place = divmod(group, groups_per_epoch)
            if epoch != known_epoch:
                groups = self.epoch_groups(epoch)
                known_epoch = epoch
            first = self.rank * self.images_per_gpu
            yield [(index, image_seed(self.seed, iteration, first + j))
                   for j, index in enumerate(groups[place].tolist())]
            iteration += 1
            group += self.world_size


class _Batches(Dataset):
    """What the workers run: a whole batch at a time, [(index, seed), ...] -> (images, targets).

    A DataError is returned, not raised: the DataLoader would bury it in the worker's traceback.
    """

    def __init__(self, training_set):
        self.training_set = training_set

    def __getitem__(self, keys):
        try:
            pairs = [self.training_set[key] for key in keys]
        except DataError as error:
            return error
        images, targets = zip(*pairs)
        return list(images), list(targets)


def _unchanged(batch):
    return batch


def leave_signals(_):
    """In a worker: SIGINT and SIGTERM, which also reach it, are the main process's to answer.

    To a SIGTERM a worker gives an hour, in which its main process, be it after an evaluation, ends
    it in order.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # not on Windows, where SIGTERM cannot be caught
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(3600))


def training_loader(dataset, images_per_gpu, seed=0, rank=0, world_size=1, workers=2,
                    start_iteration=0, min_sizes=(800,), max_size=1333, flip=True,
                    first_image=None, start_method=None):
    """An endless iterator over this process's batches, decoded ahead by worker processes.

    Yields (images, targets): a list of uint8 tensors [3, h, w] and a list of dicts, as TrainingSet.
    The memory is pinned where there is CUDA. start_method: "fork", "spawn" or None, the system's.
    DataError, in this process, for what a worker could not read.
    """
    loader = DataLoader(
        _Batches(TrainingSet(dataset, min_sizes, max_size, flip)),
        batch_size=None,  # the sampler's keys are whole batches
        sampler=BatchSampler(dataset, images_per_gpu, seed, rank, world_size, start_iteration,
                             first_image),
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context=start_method if workers else None,
        worker_init_fn=leave_signals if workers else None,
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch


# ------------------------------------------------------------------------------------------------
# Generated data: shapes and figures in COCO's layout, for trying everything without a download
# ------------------------------------------------------------------------------------------------

# Classes differ in shape alone; the ids have gaps, as COCO's own.
TOY_CATEGORIES = {1: "person", 3: "disk", 4: "square", 8: "triangle", 11: "star"}
TOY_SIZES = [(160, 128), (128, 160), (176, 144), (144, 176), (168, 136), (136, 168)]  # (w, h)
TOY_VERSION = 2  # counts changes of the pictures, so that older ones are not reused
SUPERSAMPLING = 3
LEAST_VISIBLE = 0.7  # of an object, however many lie on top of it

COCO_SKELETON = [[16, 14], [14, 12], [17, 15], [15, 13], [12, 13], [6, 12], [7, 13], [6, 7], [6, 8],
                 [7, 9], [8, 10], [9, 11], [2, 3], [1, 2], [1, 3], [2, 4], [3, 5], [4, 6], [5, 7]]


def _noise(rng, height, width, cells):
    """Smooth noise in [0, 1] of cells x cells blotches: float32 [h, w]."""
    grid = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    return np.asarray(grid.resize((width, height), Image.BICUBIC)).clip(0, 1)


def _toy_texture(rng, height, width, color, other):
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


def _toy_background(rng, height, width):
    """A texture, cluttered with blotches and strokes of every colour: float32 [h, w, 3]."""
    color, blotch = rng.uniform(20, 235, (2, 3))
    canvas = _toy_texture(rng, height, width, color, color + rng.normal(0, 20, 3))
    weight = rng.uniform(0.3, 0.9) * _noise(rng, height, width, rng.integers(3, 8))[:, :, None]
    canvas = canvas + weight * (blotch - canvas)
    picture = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    for _ in range(int(rng.integers(6, 17))):
        steps = rng.normal(0, rng.uniform(4, 16), (int(rng.integers(2, 7)), 2))
        points = rng.uniform((0, 0), (width, height)) + steps.cumsum(0)
        ImageDraw.Draw(picture).line(points.ravel().tolist(), width=int(rng.integers(1, 3)),
                                     fill=tuple(rng.integers(0, 256, 3).tolist()))
    return np.array(picture, dtype=np.float32)


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


def _toy_figure(rng):
    """A person of unit height seen from the front, so that its left is at the image's right.

    -> (polygons, joints [17, 2]) around (0, 0), y down.
    """
    head = np.array([rng.uniform(-0.02, 0.02), -0.37])
    joints = {"nose": head + (0, 0.02)}
    limbs = []
    for side, out in (("left", 1), ("right", -1)):
        arm = rng.uniform(0.25, 2.6)  # angles: radians from hanging down, outwards
        leg = rng.uniform(0.02, 0.6)
        eye = head + (0.045 * out, -0.02)
        ear = head + (0.105 * out, 0)
        shoulder = np.array([0.14 * out, -0.19])
        elbow = _swing(shoulder, 0.16, arm, out)
        wrist = _swing(elbow, 0.15, arm + rng.uniform(-1, 1), out)
        hip = np.array([0.085 * out, 0.1])
        knee = _swing(hip, 0.19, leg, out)
        ankle = _swing(knee, 0.19, leg + rng.uniform(-0.4, 0.2), out)
        limbs += [_bar(shoulder, elbow, 0.05), _bar(elbow, wrist, 0.045)]
        limbs += [_bar(hip, knee, 0.06), _bar(knee, ankle, 0.052)]
        joints |= {f"{side}_eye": eye, f"{side}_ear": ear, f"{side}_shoulder": shoulder,
                   f"{side}_elbow": elbow, f"{side}_wrist": wrist, f"{side}_hip": hip,
                   f"{side}_knee": knee, f"{side}_ankle": ankle}
    neck = np.array([(-0.05, -0.3), (0.05, -0.3), (0.05, -0.2), (-0.05, -0.2)])
    torso = np.array([(-0.18, -0.23), (0.18, -0.23), (0.14, 0.13), (-0.14, 0.13)])
    polygons = [*limbs, neck, torso, head + _circle(24) * (0.115, 0.13)]
    return polygons, np.array([joints[name] for name in KEYPOINT_NAMES])


def _toy_shape(rng, category_id, size):
    """A shape around (0, 0), about size pixels long, upright but for up to 20 degrees.

    -> (polygons, each [K, 2], of which it is the union; joints [17, 2] of a figure, or None).
    """
    name = TOY_CATEGORIES[category_id]
    angle = rng.uniform(-0.35, 0.35)
    joints = None
    if name == "person":
        polygons, joints = _toy_figure(rng)
    elif name == "disk":
        polygons = [_circle(40) * (0.5, rng.uniform(0.42, 0.5))]
    elif name == "square":
        polygons = [np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)])
                    * (1, rng.uniform(0.85, 1))]
    elif name == "triangle":
        polygons = [_circle(3)[:, ::-1] * (0.6 * rng.uniform(0.85, 1.1), -0.6)]  # point up
    else:  # a star: of its ten corners, every second one is nearer to the centre
        polygons = [_circle(10)[:, ::-1] * np.tile([-0.56, -rng.uniform(0.22, 0.26)], 5)[:, None]]
    cos, sin = size * math.cos(angle), size * math.sin(angle)
    turn = np.array([[cos, sin], [-sin, cos]])
    return [polygon @ turn for polygon in polygons], None if joints is None else joints @ turn


def _mask_of(polygons, height, width):
    """The part of a union of polygons [K, 2] inside the image, bool [h, w]."""
    mask = np.zeros((height, width), dtype=np.uint8)
    paint_polygons(mask, polygons, 1, 1, False)
    return mask.astype(bool)


def _paint(rng, canvas, polygons, mask):
    """Draws polygons into canvas (float32 [h, w, 3]), in a colour unlike what mask covers there."""
    height, width = mask.shape
    corners = np.concatenate(polygons)
    x1, y1 = np.floor(corners.min(0)).clip(0).astype(int).tolist()
    x2, y2 = np.ceil(corners.max(0)).clip(0, (width, height)).astype(int).tolist()
    crop = canvas[y1:y2, x1:x2]  # a view: what is painted here is painted into canvas

    below = canvas[mask].mean(0)
    color = max(rng.uniform(20, 235, (6, 3)), key=lambda other: np.abs(other - below).sum())
    texture = _toy_texture(rng, y2 - y1, x2 - x1, color, color + rng.normal(0, 15, 3))
    large = ((x2 - x1) * SUPERSAMPLING, (y2 - y1) * SUPERSAMPLING)
    cover = Image.new("L", large)
    shade = Image.new("L", large, 255)
    for k, polygon in enumerate(polygons):
        # PIL's coordinates are those of pixel centres.
        points = ((polygon - (x1, y1)) * SUPERSAMPLING - 0.5).ravel().tolist()
        ImageDraw.Draw(cover).polygon(points, fill=255)
        # Neighbouring limbs differ in shade, or arms would be lost before the body.
        ImageDraw.Draw(shade).polygon(points, fill=(255, 215)[k % 2])
    cover = np.asarray(cover.reduce(SUPERSAMPLING), dtype=np.float32)[:, :, None] / 255
    shade = np.asarray(shade.reduce(SUPERSAMPLING), dtype=np.float32)[:, :, None] / 255
    crop += cover * (texture * shade - crop)


def _place_crowd(rng, canvas, placed):
    """Draws a heap of small objects of one class, annotated as one region.

    What is kept of an object in placed, here and in _place: its mask as drawn, what of it is still
    visible, the least of it that must stay so, and whether it is whole (nothing hidden or cut off).
    """
    height, width = canvas.shape[:2]
    category_id = int(rng.choice(list(TOY_CATEGORIES)))
    heap = rng.uniform((25, 25), (width - 25, height - 25))
    union = np.zeros((height, width), dtype=bool)
    for _ in range(int(rng.integers(10, 16))):
        center = np.clip(rng.normal(heap, (14, 9)), 8, (width - 8, height - 8))
        shape, _ = _toy_shape(rng, category_id, rng.uniform(13, 18))
        polygons = [(polygon + center).round(2) for polygon in shape]
        mask = _mask_of(polygons, height, width)
        _paint(rng, canvas, polygons, mask)
        union |= mask
    placed.append({"category_id": category_id, "mask": union, "joints": None, "visible": union,
                   "whole": False, "iscrowd": 1, "least": LEAST_VISIBLE * union.sum()})


def _place(rng, canvas, placed, category_id, size):
    """Draws an object where it hides no earlier one too much, if 50 tries find such a place."""
    height, width = canvas.shape[:2]
    shape, joints = _toy_shape(rng, category_id, size)
    low, high = np.concatenate(shape).min(0), np.concatenate(shape).max(0)
    for _ in range(50):
        center = rng.uniform((0, 0), (width, height))
        inside = np.minimum(high + center, (width, height)) - np.maximum(low + center, 0)
        if inside.prod() < 0.85 * (high - low).prod():
            continue
        polygons = [(polygon + center).round(2) for polygon in shape]
        mask = _mask_of(polygons, height, width)
        left = [o["visible"] & ~mask for o in placed]
        if all(part.sum() >= o["least"] for part, o in zip(left, placed)):
            break
    else:
        return
    _paint(rng, canvas, polygons, mask)
    for part, o in zip(left, placed):
        o["visible"] = part
        o["whole"] = o["whole"] and not (mask & o["mask"]).any()
    whole = bool((low + center >= 0).all() and (high + center <= (width, height)).all())
    placed.append({"category_id": category_id, "polygons": polygons, "mask": mask,
                   "joints": None if joints is None else joints + center, "visible": mask,
                   "whole": whole, "iscrowd": 0, "least": LEAST_VISIBLE * mask.sum()})


def _annotation(o):
    """An object as COCO annotates it: (instance fields, keypoint fields), without ids.

    What is visible counts, as polygons where that is the whole outline, as RLE otherwise.
    """
    visible = o["visible"]
    height, width = visible.shape
    rle = coco_mask.encode(np.asfortranarray(visible, dtype=np.uint8))
    if o["whole"]:
        segmentation = [polygon.ravel().tolist() for polygon in o["polygons"]]
    else:
        segmentation = {"size": [height, width], "counts": rle["counts"].decode()}
    box = coco_mask.toBbox(rle).tolist()
    annotation = {"category_id": o["category_id"], "iscrowd": o["iscrowd"], "bbox": box,
                  "area": int(visible.sum()), "segmentation": segmentation}
    keypoints = np.zeros((len(KEYPOINT_NAMES), 3), dtype=int)
    # As in COCO, nobody marks the joints of a figure too small to show them.
    if o["joints"] is not None and box[3] >= 32:
        x, y = np.floor(o["joints"]).astype(int).T
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        seen = visible[y.clip(0, height - 1), x.clip(0, width - 1)]
        keypoints = np.stack([x, y, 1 + seen], axis=1) * inside[:, None]
    return annotation, {"keypoints": keypoints.ravel().tolist(),
                        "num_keypoints": int((keypoints[:, 2] > 0).sum())}


def _toy_scene(rng, i):
    """Draws image number i -> (pixels uint8 [h, w, 3], its objects as _annotation gives them).

    Some images have a fixed part, so that even a small split has each: i % 25 == 2 no object,
    i % 16 == 1 a crowd, i % 5 == 3 a large object.
    """
    width, height = TOY_SIZES[rng.integers(len(TOY_SIZES))]
    canvas = _toy_background(rng, height, width)
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
    noise = 4 * rng.standard_normal(canvas.shape, dtype=np.float32)  # of the camera
    return (canvas + noise).clip(0, 255).astype(np.uint8), [_annotation(o) for o in placed]


def _write_toy_split(root, split, count, seed, first_id):
    """Images and both annotation files of one split; image i is a function of (seed, i)."""
    folder = os.path.join(root, f"{split}2017")
    os.mkdir(folder)
    images, instances, persons = [], [], []
    for i in range(count):
        pixels, objects = _toy_scene(np.random.default_rng([*seed, i]), i)
        image = {"id": first_id + i, "file_name": f"{first_id + i:012d}.jpg",
                 "width": pixels.shape[1], "height": pixels.shape[0]}
        Image.fromarray(pixels).save(os.path.join(folder, image["file_name"]), quality=90)
        images.append(image)
        for k, (annotation, keypoints) in enumerate(objects):
            annotation = {"id": 100 * image["id"] + k, "image_id": image["id"], **annotation}
            instances.append(annotation)
            if annotation["category_id"] == 1:
                persons.append({**annotation, **keypoints})
    categories = [{"id": category_id, "name": name, "supercategory": "shape"}
                  for category_id, name in TOY_CATEGORIES.items()]
    person = {**categories[0], "keypoints": KEYPOINT_NAMES, "skeleton": COCO_SKELETON}
    for name, annotations, listed in (("instances", instances, categories),
                                      ("person_keypoints", persons, [person])):
        content = {"info": {"description": "generated shapes and figures"}, "licenses": [],
                   "images": images, "annotations": annotations, "categories": listed}
        path = os.path.join(root, "annotations", f"{name}_{split}2017.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(content, file)


def _is_toy(root, settings):
    """True: root holds this generated data set. False: nothing. DataError: something else."""
    if not os.path.exists(root) or (os.path.isdir(root) and not os.listdir(root)):
        return False
    try:
        with open(os.path.join(root, "toy.json"), encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        found = None
    if found != settings:
        raise DataError(f"{root} holds something else than generated data with the settings "
                        f"{settings}; delete it or name another folder.")
    return True


def make_toy_coco(root, train_images=1000, val_images=160, seed=0):
    """Writes a generated data set in COCO's layout to the folder root; one that is there is reused.

    annotations/{instances,person_keypoints}_{train,val}2017.json, train2017/*.jpg, val2017/*.jpg.
    The same seed gives the same data; the splits share nothing. The folder appears under its name
    only when complete. DataError if root holds anything else.
    """
    root = os.path.abspath(root)
    settings = {"version": TOY_VERSION, "train": train_images, "val": val_images, "seed": seed}
    if _is_toy(root, settings):
        return
    parent, name = os.path.split(root)
    os.makedirs(parent, exist_ok=True)
    unfinished = tempfile.mkdtemp(prefix=name + ".unfinished-", dir=parent)
    try:
        os.mkdir(os.path.join(unfinished, "annotations"))
        _write_toy_split(unfinished, "train", train_images, [seed, 0], first_id=1)
        _write_toy_split(unfinished, "val", val_images, [seed, 1], first_id=500_001)
        with open(os.path.join(unfinished, "toy.json"), "w", encoding="utf-8") as file:
            json.dump(settings, file)
        os.chmod(unfinished, 0o755)  # mkdtemp's folders are private
        if os.path.isdir(root):
            os.rmdir(root)  # _is_toy has found it empty
        os.rename(unfinished, root)
    except OSError:
        if not _is_toy(root, settings):  # another process may have been faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


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
        canvas = _toy_background(rng, 64, 64)
        label = int(rng.integers(len(TOY_CATEGORIES)))
        placed = []
        while not placed:
            _place(rng, canvas, placed, list(TOY_CATEGORIES)[label], rng.uniform(24, 56))
        canvas = canvas + 4 * rng.standard_normal(canvas.shape, dtype=np.float32)
        return torch.from_numpy(canvas.clip(0, 255).astype(np.uint8)).permute(2, 0, 1), label


# ------------------------------------------------------------------------------------------------
# The data set's doctor: python data.py DIR
# ------------------------------------------------------------------------------------------------


class _Examination(Dataset):
    """Item i: what is wrong with image i of a CocoDataset and its objects, and its colours.

    (problems that stop training, remarks, sum and sum of squares of the pixels in [0, 1] by
    channel, number of pixels)
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        dataset = self.dataset
        objects = dataset._record(index)["objects"]
        names = [f"image {dataset.image_ids[index]}: annotation {o['id']}" for o in objects]
        height, width = int(dataset.heights[index]), int(dataset.widths[index])
        remarks = []
        for name, o in zip(names, objects):
            x, y, w, h = o["bbox"]
            if w <= 0 or h <= 0:
                remarks.append(f"{name}: its box has no area; it is not trained on")
            elif min(x, y) < -1 or x + w > width + 1 or y + h > height + 1:
                remarks.append(f"{name}: its box {o['bbox']} leaves the image of {width}x{height}; "
                               "it is clipped")
        try:
            image, target = dataset.load(index)
        except DataError as error:
            return [str(error)], remarks, np.zeros((2, 3)), 0
        masks = target.get("masks", ())  # none: a data set of boxes only
        for name, o, mask, box in zip(names, objects, masks, target["boxes"].tolist()):
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            if len(rows) == 0:
                remarks.append(f"{name}: its mask is empty")
                continue
            tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            apart = max(abs(float(a) - b) for a, b in zip(tight, box))
            if apart > max(3, 0.1 * max(o["bbox"][2:])):
                remarks.append(f"{name}: mask and box lie up to {apart:.0f} pixels apart")
        colours = image.float().div_(255).flatten(1).double()
        sums = np.stack([colours.sum(1).numpy(), colours.square().sum(1).numpy()])
        return [], remarks, sums, height * width


def _describe(dataset, sums, pixels, min_size, max_size):
    """Print the statistics of a data set, and the settings of a recipe that follow from them.

    sums [2, 3]: of the pixels and their squares, by channel; pixels: how many there are.
    """
    counts = dict.fromkeys(dataset.classes, 0)
    sides, crowds = [], 0
    for index in range(len(dataset)):
        height, width = int(dataset.heights[index]), int(dataset.widths[index])
        scale = resize_shape(height, width, min_size, max_size)[0] / height
        for o in dataset._record(index)["objects"]:
            crowds += o["iscrowd"]
            counts[dataset.classes[o["label"] - 1]] += 1
            sides.append(scale * math.sqrt(max(0, o["bbox"][2] * o["bbox"][3])))
    common = sorted(counts.items(), key=lambda item: -item[1])[:12]
    print(f"  {len(dataset):,} images, {len(sides):,} objects ({crowds:,} crowds), "
          f"{len(counts)} classes: " + ", ".join(f"{name} {count:,}" for name, count in common)
          + (", ..." if len(counts) > 12 else ""))
    if not dataset.masks:
        print("  no segmentations: boxes only, for recipes with masks=False")
    mean = sums[0] / pixels
    deviation = np.sqrt(np.maximum(sums[1] / pixels - mean**2, 0))
    print(f"  image_mean=({', '.join(f'{x:.4f}' for x in mean)}), "
          f"image_std=({', '.join(f'{x:.4f}' for x in deviation)})")
    if not sides:
        return
    low, middle, high = np.percentile(sides, [5, 50, 95])
    print(f"  objects at {min_size}/{max_size}: 5 % below {low:.0f} pixels (root of the box's "
          f"area), half below {middle:.0f}, 5 % above {high:.0f}")
    if low >= 16 and high <= 1024:
        print("  the anchors of COCO, 32 to 512, cover these sizes")
        return
    smallest = 2 ** max(3, round(math.log2(max(low, 8) * 1.5)))  # 1.5 times COCO's own 21 is 32
    anchors = tuple((smallest * 2**i,) for i in range(5))
    print(f"  the anchors of COCO, 32 to 512, do not cover these sizes: try anchor_sizes={anchors}")


def examine(root, split, keypoints, min_size, max_size, workers, most=20):
    """Print what is wrong with a split and what it is like; returns whether training would stop."""
    kind = "person_keypoints" if keypoints else "instances"
    annotation_file = os.path.join(root, "annotations", f"{kind}_{split}.json")
    print(f"\n{annotation_file}")
    masks = True
    try:
        with open(annotation_file, encoding="utf-8") as file:
            content = json.load(file)
        stops = list(coco_problems(content, annotation_file))
        if not stops and content.get("annotations"):
            masks = any("segmentation" in annotation for annotation in content["annotations"])
    except (OSError, ValueError, RecursionError):
        stops = []  # CocoDataset, which reads it too, says what is wrong
    remarks, dataset = [], None
    sums, pixels = np.zeros((2, 3)), 0
    if not stops:
        try:
            dataset = CocoDataset(os.path.join(root, split), annotation_file, masks=masks,
                                  keypoints=keypoints)
        except DataError as error:
            stops.append(str(error))
    if dataset is not None:
        loader = DataLoader(_Examination(dataset), batch_size=None, num_workers=workers,
                            collate_fn=_unchanged)
        examined = tqdm(loader, unit="image", leave=False)
        for image_stops, image_remarks, image_sums, image_pixels in examined:
            stops += image_stops
            remarks += image_remarks
            sums += image_sums
            pixels += image_pixels
    for title, found in (("To mend, as they stop training", stops), ("Worth a look", remarks)):
        if found:
            print(f"  {title}: {len(found):,}")
            print("".join(f"    {line}\n" for line in found[:most]), end="")
            if len(found) > most:
                print(f"    ... and {len(found) - most:,} more")
    if dataset is not None and not stops:
        _describe(dataset, sums, pixels, min_size, max_size)
    return bool(stops)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description="Examine a data set in COCO's layout: open every image and annotation, list "
        "what is wrong, and describe the data set. Exit code 1 if anything would stop training."
    )
    add = parser.add_argument
    add("root", metavar="DIR", help="the folder with annotations/, train2017/, val2017/")
    add("--min-size", type=int, default=800, help="shorter side of training images (800)")
    add("--max-size", type=int, default=1333, help="longest side of training images (1333)")
    add("--workers", type=int, default=2, help="processes that decode images (2)")
    args = parser.parse_args(arguments)
    found = sorted(glob.glob(os.path.join(glob.escape(args.root), "annotations", "*_*2017.json")))
    if not found:
        print(f"data.py: {args.root} has no annotations/instances_train2017.json; name a folder in "
              "COCO's layout.", file=sys.stderr)
        return 1
    stops = False
    for path in found:
        kind, _, split = os.path.basename(path)[: -len(".json")].rpartition("_")
        if kind in ("instances", "person_keypoints"):
            keypoints = kind == "person_keypoints"
            stops |= examine(args.root, split, keypoints, args.min_size, args.max_size,
                             args.workers)
    print(f"\n{'Something above' if stops else 'Nothing here'} would stop training.")
    return int(stops)


if __name__ == "__main__":
    sys.exit(main())
