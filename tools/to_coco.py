"""Converts other people's layouts to COCO's.

  python tools/to_coco.py IN OUT [--val-share 0.2] [--class-name object] [--boxes-from-masks]

IN is a folder, and what lies in it tells its layout:

  COCO     *.json with images and annotations: COCO's, Roboflow's, CVAT's; or one such file
  labelme  a JSON beside each image
  VIA      a JSON for a folder of images, of VIA 1 or 2
  VOC      *.xml beside the images or in Annotations/, masks in SegmentationObject/, any classes
  YOLO     *.txt with boxes or polygons, the names of classes in classes.txt or data.yaml
  masks    masks/NAME.png, PedMasks/NAME_mask.png or SegmentationObject/NAME.png with a number or a
           colour for each object; masks/NAME/*.png, or images/* and masks/*.png in a folder for
           each image, with a file for each object

OUT gets annotations/instances_{train,val}2017.json, train2017/ and val2017/ (and perhaps test2017).
IN's own splits are kept, unless --val-share asks for new ones. Small faults are mended. It prints
what it mends and leaves out, and why. To merge data sets, convert each to parts/NAME, then parts.
"""

import argparse
import functools
import itertools
import json
import random
import re
import shutil
import sys
from collections import Counter
from pathlib import Path, PureWindowsPath
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the five modules
from data import MEND, UserError, read_image, read_json, segmentation_problem

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
SPLITS = {"train": "train", "training": "train", "trainval": "train", "val": "val"}
SPLITS |= {"valid": "val", "validation": "val", "test": "test", "testing": "test"}
SPLITS |= {"valminusminival": "train", "minival": "val"}  # of COCO 2014; COCO 2017 has them so
VOID = (255, 224 << 16 | 224 << 8 | 192)  # VOC's borders between objects: a number, or a colour
TEXT = {"encoding": "utf-8-sig", "errors": "replace"}
FOREIGN = dict.fromkeys((".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"), "unpack it first")  # unread
FOREIGN |= dict.fromkeys((".heic", ".heif", ".avif", ".jp2", ".dng", ".psd"), "save it as JPEG")
JSON_FIELDS = {"COCO": {"images", "annotations", "categories"}, "labelme": {"shapes"}}
JSON_FIELDS |= {"VIA": {"_via_img_metadata"}, "Label Studio's JSON": {"data", "annotations"}}
JSON_FIELDS |= {"Supervisely's JSON": {"objects", "size"}}  # by which JSON files are known


class Source:
    """The files of a data set, and what has been read of them so far.

    pictures: {path: {"size": (w, h), "split": name or None, "objects": [as of mend]}}.
    classes: names in the order of the data set's own list. notes: {text: [where, ...]}.
    """

    def __init__(self, root, options):
        self.root, self.options = root, options
        self.classes, self.pictures, self.notes, self.foreign = [], {}, {}, []
        self.files = sorted(path for path in root.rglob("*") if path.is_file())
        for path in self.files_with(*FOREIGN):
            self.note_foreign(path, path.suffix, FOREIGN[path.suffix.lower()])
        self.mask_folders = {path for path in root.rglob("*") if is_mask_folder(path)}
        images = self.files_with(*IMAGE_SUFFIXES)
        self.masks = [path for path in images if self.mask_folders & {*path.parents}]
        self.images = sorted({*images} - {*self.masks})
        self.named = {}  # images by name in small letters, with and without suffix
        for path in self.images:
            for name in {path.name.lower(), path.stem.lower()}:
                self.named.setdefault(name, []).append(path)
        self.listed = self.read_lists()

    def files_with(self, *suffixes):
        return [path for path in self.files if path.suffix.lower() in suffixes]

    def note(self, text, where):
        self.notes.setdefault(text, []).append(where)

    def note_foreign(self, path, kind, advice):
        self.foreign.append(f"{path} cannot be read ({kind}): {advice}.")
        self.note(f"files left out ({kind}): {advice}", path)

    def read_lists(self):
        """{stem of an image: split}, by VOC's or YOLO's lists train.txt, val.txt, ...

        Those of VOC's whole devkit are the paper's: trainval2007 + train2012, and val2012.
        """
        has_2012 = any("VOC2012" in path.parts for path in self.images)
        found = {"Main": {}, "Segmentation": {}, "": {}}
        for name in ("test", "val", "valid", "train", "trainval"):  # the first with an image counts
            for path in self.files_with(".txt"):
                of_2007 = has_2012 and "VOC2007" in path.parts and name in ("train", "val")
                if path.stem.rstrip("0123456789") == name and not of_2007:
                    of_folder = found.get(path.parent.name, found[""])
                    for line in path.read_text(**TEXT).lower().splitlines():
                        for image in self.named.get(PureWindowsPath(line).name, []):
                            of_folder.setdefault(image.stem, SPLITS[name])
        return found["Main"] or found["Segmentation"] or found[""]

    def split_of(self, path):
        """The split of an image or its annotations: that of the lists, or of its folders' names."""
        if self.listed:
            return self.listed.get(path.stem)
        words = re.split("[^a-z]+", str(path.relative_to(self.root).parent).lower())
        return next((SPLITS[word] for word in reversed(words) if word in SPLITS), None)

    def find_image(self, name, near):
        """The image of a name that may have folders; None, with a note, if there is not one.

        Of several, it is the one in the folder of that name, of near's split, or nearest to near.
        """
        *folders, last = PureWindowsPath(name).parts or [""]  # takes both / and \
        found = self.named.get(last.lower(), [])
        places = {*near.parts, "images", "JPEGImages"}

        def score(path):
            in_split = self.split_of(path) == self.split_of(near)
            nearness = path.parent == near.parent, len(places.intersection(path.parts))
            return path.parent.name in folders[-1:], in_split, *nearness, path.name == last

        scores = list(map(score, found))
        if not found or scores.count(max(scores)) > 1:
            having = "several files have" if found else "no image file has"
            self.note(f"annotated images left out, as {having} their name", f"{name} of {near}")
            return None
        path = found[scores.index(max(scores))]
        if last not in (path.name, path.stem):
            self.note("names of images mended: their capital letters differ", path)
        return path

    def add(self, path, split, objects, size):
        """Keep an image and those of its objects that can be used. The rest is a reader's."""
        if path in self.pictures:
            raise UserError(f"{path} is annotated in two files; keep one, or name a file as IN.")
        sides = [number(side) for side in size or ()]
        if not all(side and side > 0 and side == int(side) for side in sides):
            self.note("sizes of images mended: missing, or no whole numbers", path)
            sides = []
        try:
            height, width = read_image(path, list(map(int, sides))[::-1]).shape[1:]
            objects = objects(width, height) if callable(objects) else objects
            kept = [mend(self, o, path, width, height) for o in objects]
        except UserError as error:
            return self.note("images left out", str(error).replace(f"; {MEND}", ""))
        kept = [o for o in kept if o]
        self.pictures[path] = {"size": (width, height), "split": split, "objects": kept}


def is_mask_folder(path):
    """Whether a path is a folder of masks by its name, and holds no whole data set."""
    if not path.name.lower().endswith(("mask", "masks", "segmentationobject")):
        return path.name == "SegmentationClass"
    inside = {path.name.lower() for path in path.rglob("*") if path.is_dir()}
    return path.is_dir() and not inside & {"annotations", "images", "jpegimages", "mask", "masks"}


def number(value):
    """A number, which may be written as text; None for anything else."""
    try:
        return float(value) if np.isfinite(float(value)) else None
    except (TypeError, ValueError):
        return None


# -- The layouts -----------------------------------------------------------------------------------
# A reader yields for each image: its name or its path; a path that tells its split and place; its
# objects; the size (w, h) that the annotations name, or None. An object is an annotation of COCO
# that may need mending, with the name of its class. A function (w, h) may make the list of them.


def read_coco(source, contents):
    for file, content in contents.items():
        names = {str(c.get("id")): str(c.get("name")).strip() for c in content["categories"]}
        for name, count in Counter(names.values()).items():
            if count > 1:
                source.note("classes made of categories with one name", f"{name} of {file}")
        source.classes = [*dict.fromkeys([*source.classes, *names.values()])]
        images = Counter(str(image.get("id")) for image in content["images"])
        objects = {image_id: [] for image_id, count in images.items() if count == 1}
        ids = set()
        for a in content["annotations"]:
            image_id, name = str(a.get("image_id")), names.get(str(a.get("category_id")))
            where = f"annotation {a.get('id')} of {file}"
            if image_id not in objects:
                source.note("objects left out, as their image is not in the file", where)
                continue
            if not isinstance(a.get("id"), int) or a["id"] in ids:
                source.note("ids of annotations mended: text, missing or repeated", where)
            ids.add(a.get("id"))
            objects[image_id].append({"bbox": None} | a | {"name": name})
        for image in content["images"]:
            name, image_id = str(image.get("file_name")), str(image.get("id"))
            if images[image_id] > 1:
                source.note("images left out, as others have their id", f"{name} of {file}")
                continue
            size = [*map(image.get, ("width", "height"))]
            yield name, file.with_suffix("") / "image", objects[image_id], size


def read_labelme(source, contents):
    """A JSON for each image. Shapes of one label with one group_id are the parts of an object."""
    for file, content in contents.items():
        objects = {}
        for index, shape in enumerate(content["shapes"]):
            name, kind = str(shape["label"]), shape.get("shape_type", "polygon")
            kind = name if name in ("__ignore__", "_background_") else kind
            if kind not in ("polygon", "rectangle", "circle"):
                source.note(f"shapes left out: {kind}", file)
                continue
            group = shape.get("group_id")
            o = {"name": name, "segmentation": [], "rectangle": kind == "rectangle"}
            o = objects.setdefault(index if group is None else (name, group), o)
            o["segmentation"].append(outline(kind, shape["points"]))
        name = PureWindowsPath(content.get("imagePath") or "").name
        name = name if name.lower() in source.named else file.stem  # renamed after it was drawn in
        size = [*map(content.get, ("imageWidth", "imageHeight"))]
        yield name, file, [*objects.values()], size


def outline(kind, points, angle=0.0):
    """The flat polygon of a drawn shape: of corners, of a centre and a point, or and two radii."""
    points = np.array(points, dtype=float)
    if kind == "rectangle":
        (x1, y1), (x2, y2) = points.min(0), points.max(0)
        points = np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)])
    elif kind in ("circle", "ellipse"):
        width, height = points[1] if kind == "ellipse" else [np.hypot(*(points[1] - points[0]))] * 2
        turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        around = (width * np.cos(turn) + 1j * height * np.sin(turn)) * np.exp(1j * angle)
        points = points[0] + np.stack([around.real, around.imag], axis=1)
    return points.ravel().tolist()


def read_via(source, contents):
    """A JSON for a folder, with an entry for each image; those of VIA 2 are a level further in."""
    for file, content in contents.items():
        for entry in content.get("_via_img_metadata", content).values():
            regions = entry.get("regions") or []
            regions = regions.values() if isinstance(regions, dict) else regions
            objects = [via_object(source, file, region) for region in regions]
            if objects:
                yield entry["filename"], file, [o for o in objects if o], None
            else:  # VIA lists every image that was opened
                source.note("images left out, as nothing is drawn in them", entry["filename"])


def via_object(source, file, region):
    shape, kind = region["shape_attributes"], region["shape_attributes"]["name"]
    if kind in ("polygon", "polyline"):
        drawn = "polygon", [*zip(shape["all_points_x"], shape["all_points_y"])]
    elif kind == "rect":
        x, y, w, h = (shape[field] for field in ("x", "y", "width", "height"))
        drawn = "rectangle", [(x, y), (x + w, y + h)]
    elif kind in ("circle", "ellipse"):
        radii = shape.get("rx", shape.get("r")), shape.get("ry", shape.get("r"))
        drawn = "ellipse", [(shape["cx"], shape["cy"]), radii], shape.get("theta", 0.0)
    else:
        return source.note(f"regions left out: {kind}", file)
    fields = {k.lower(): v for k, v in (region.get("region_attributes") or {}).items()}
    chosen = fields if len(fields) == 1 else ("name", "class", "label", "type")
    name = next((fields[field] for field in chosen if fields.get(field)), None)
    if name is None:
        name = source.options.class_name
        source.note(f"regions without a class: now {name!r} (--class-name)", file)
    return {"name": str(name), "segmentation": [outline(*drawn)], "rectangle": kind == "rect"}


def read_voc(source, files):
    """XML files. A mask of SegmentationObject/ is that of the object whose box fits it best."""
    masks = {path.stem: path for path in source.masks if path.parent.name == "SegmentationObject"}
    # VOC counts pixels from 1 and includes the last one. Some tools count from 0.
    from_0 = any(re.search(r"<[xy]min>\s*(-|0+[.<\s]|\.)", f.read_text(**TEXT)) for f in files)
    is_devkit = any({"VOC2007", "VOC2012"} & {*file.parts} for file in files)
    first = int(is_devkit or not from_0)
    for file in files:
        try:
            tree = ElementTree.parse(file).getroot()
        except ElementTree.ParseError:
            source.note("files left out, as they are no XML", file)
            continue
        if tree.tag == "annotations":
            source.note_foreign(file, "CVAT's XML", "export COCO 1.0 there")
        if tree.tag != "annotation":
            continue
        objects = []
        for entry in tree.iter("object"):
            sides = ("xmin", "ymin", "xmax", "ymax")
            x1, y1, x2, y2 = box = [number(entry.findtext(f"bndbox/{side}")) for side in sides]
            if None not in box:
                box = [x1 - first, y1 - first, x2 - x1 + first, y2 - y1 + first]
            o = {"name": entry.findtext("name"), "difficult": entry.findtext("difficult")}
            objects.append(o | {"bbox": box})
        size = tree.findtext("size/width"), tree.findtext("size/height")
        give = functools.partial(give_masks, source, objects, masks.get(file.stem))
        yield file.stem, file, give, size


def give_masks(source, objects, file, width, height):
    """The objects, with the masks of a file (None: there are none) that fit their boxes best."""
    boxed = [o for o in objects if None not in o["bbox"]]
    masks = mask_objects(source, [file] if file else [], True, width, height)
    masks = [o["segmentation"] for o in masks]
    if boxed and masks:
        extents = np.array([coco_mask.toBbox(mask) for mask in masks])
        iou = coco_mask.iou(np.array([o["bbox"] for o in boxed]), extents, [0] * len(masks))
        while iou.max() > 0:
            best, k = np.unravel_index(iou.argmax(), iou.shape)
            boxed[best]["segmentation"] = masks[k]
            iou[best], iou[:, k] = 0, 0
    return objects


def read_yolo(source, files):
    """Text files with a line for each object: class, then coordinates in parts of the sides."""
    for path in source.files_with(".yaml", ".yml"):
        text = re.sub(r"(^|\s)#.*", "", path.read_text(**TEXT))
        found = re.search(r"^names:(.*(?:\n(?:[ \t\]}-].*)?)*)", text, re.MULTILINE)
        if found:  # [a, b], {0: a, 1: b}, or lines "- a" or "0: a"
            end = r",\n" if found[1].strip()[:1] in ("[", "{") else r"\n"
            name = rf"""(?:-\s+)?(?:\d+\s*:\s*)?("[^"\n]*"|'[^'\n]*'|[^\s{end}][^{end}]*)"""
            names = re.findall(name, found[1].strip(" \n[]{}"))
            source.classes = [name.strip(" '\"") for name in names]
    for path in source.files:
        if path.name == "classes.txt" or path.suffix == ".names":
            source.classes = [line for line in path.read_text(**TEXT).splitlines() if line.strip()]
    for file in files:
        yield file.stem, file, functools.partial(yolo_objects, source, file), None


def yolo_objects(source, file, width, height):
    classes = source.classes or [f"class {k}" for k in range(1000)]
    for index, line in enumerate(file.read_text(**TEXT).splitlines(), start=1):
        k, *values = map(number, line.split() or [None])
        is_sound = len(values) >= 4 and len(values) % 2 == 0 and None not in (k, *values)
        if is_sound and k >= 0 and k % 1 == 0 and min(values) >= -0.01 and max(values) <= 1.01:
            o = {"name": classes[int(k)] if k < len(classes) else None}
            points = np.reshape(values, (-1, 2)) * (width, height)
            if len(points) > 2:
                yield o | {"segmentation": [points.ravel().tolist()]}
            else:  # a box: its centre and its size
                yield o | {"bbox": [*(points[0] - points[1] / 2), *points[1]]}
        elif line.strip():
            text = "lines left out: not a class and 4, 6, 8, ... numbers from 0 to 1"
            source.note(text, f"{file}, line {index}")


def read_masks(source, files):
    """Images of masks: each object has a number or a colour, or a file of its own."""
    below = {}  # folder: the images in it and below it
    for path in source.images:
        for folder in path.parents:
            below.setdefault(folder, []).append(path)
    masks = {}  # image: its files of masks
    for file in files:
        folder = next(path for path in file.parents if path in source.mask_folders)
        path, *more = below.get(folder.parent, [None])
        if path is None or more:
            of_folder = file.parent != folder and file.parent.name.lower() in source.named
            name = file.parent.name if of_folder else file.stem
            name = name if name.lower() in source.named else re.sub("_masks?$", "", name)
            path = source.find_image(name, file)
        masks.setdefault(path, []).append(file)
    masks.pop(None, None)
    for path, found in masks.items():
        own = re.sub("_masks?$", "", found[0].stem) == path.stem != found[0].parent.name
        objects = functools.partial(mask_objects, source, found, len(found) == 1 and own)
        yield path, path, objects, None


def mask_objects(source, files, is_numbered, width, height):
    """The objects in the files of masks of an image: one a number, or one a file."""
    for file in files:
        values, classes = mask_values(file), None
        if values.shape != (height, width):
            raise UserError(f"{file} has {values.shape[::-1]} pixels, its image {width, height}.")
        if not is_numbered:
            values = values > values.max() / 2
        elif file.parent.name == "SegmentationObject":
            values[np.isin(values, VOID)] = 0
            classes = file.parent.parent / "SegmentationClass" / file.name
            classes = mask_values(classes) if classes.exists() else None
        else:
            source.note("masks read as one object a value; wrong if values are classes", file)
        numbers = np.unique(values[values > 0])
        if len(numbers) > 5000:
            raise UserError(f"{file} has more than 5,000 values; give each object a number.")
        for n in numbers:
            name = source.options.class_name
            if classes is not None:
                kinds, counts = np.unique(classes[values == n], return_counts=True)
                name = f"class {kinds[counts.argmax()]}"
            rle = coco_mask.encode(np.asfortranarray(values == n, dtype=np.uint8))
            yield {"name": name, "segmentation": rle | {"counts": rle["counts"].decode()}}


def mask_values(file):
    """The numbers in an image of masks, int32 [H, W]; a colour is a number."""
    try:
        with Image.open(file, formats=("PNG", "BMP", "TIFF", "GIF", "PPM")) as image:
            if image.mode in ("1", "L", "P", "I") or image.mode.startswith("I;16"):
                return np.asarray(image).astype(np.int32)
            return np.asarray(image.convert("RGB")).astype(np.int32) @ (65536, 256, 1)
    except Exception:  # a damaged file can make a decoder fail in any way
        raise UserError(f"{file} is no mask that can be read; save it as PNG.") from None


# -- Mending ---------------------------------------------------------------------------------------


def mend(source, o, path, width, height):
    """An object in COCO's form, clipped to its image; None, with a note, if it cannot be used."""
    try:
        mask, extent, area = mend_mask(o.get("segmentation") or [], width, height)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return source.note("objects left out, as their masks are broken", f"{path} ({error})")
    if not o["name"]:
        return source.note("objects left out, as their class is not listed", path)
    if mask != (o.get("segmentation") or []):
        source.note("masks mended: a flat polygon, pairs of points, or an RLE in a list", path)
    given = o.get("bbox") or []
    values = [*given, o.get("iscrowd", 0), o.get("area", 0)]
    if any(value is None or isinstance(value, str) for value in values):
        source.note("objects mended: a number was text or null", path)
    numbers = [number(value) for value in given]
    x, y, w, h = numbers if len(numbers) == 4 and None not in numbers else [0] * 4
    x1, y1, x2, y2 = box = [max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)]
    if max(x1 - x, y1 - y, x + w - x2, y + h - y2) > 1:
        source.note("boxes clipped to their image", path)
    if extent and (source.options.boxes_from_masks or min(x2 - x1, y2 - y1) < 0.01):
        x1, y1, x2, y2 = box = extent
        if "bbox" in o:
            source.note("boxes taken from their masks", path)
    if min(x2 - x1, y2 - y1) < 0.01:
        return source.note("objects left out, as their box has no area in the image", path)
    if extent and np.abs(np.subtract(extent, box)).max() > max(3, 0.1 * max(x2 - x1, y2 - y1)):
        source.note("boxes that do not fit their masks; --boxes-from-masks mends them", path)
    difficult = int(number(o.get("difficult")) == 1)
    crowd = int(difficult or number(o.get("iscrowd")) == 1)
    o = {"name": o["name"], "rectangle": o.get("rectangle", False), "difficult": difficult}
    o |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": area or (x2 - x1) * (y2 - y1)}
    return o | {"segmentation": mask, "iscrowd": crowd}


def mend_mask(mask, width, height):
    """A segmentation as COCO has it, the box (x1, y1, x2, y2) around it, and its area.

    [], None and 0 if it covers nothing. Raises ValueError (or others) if it is broken.
    """
    if isinstance(mask, list) and len(mask) == 1 and isinstance(mask[0], dict):
        mask = mask[0]
    if isinstance(mask, list) and mask:
        is_one = np.ndim(mask[0]) == 0 or all(np.shape(point) == (2,) for point in mask)
        polygons = [mask] if is_one else mask
        mask = [np.array(polygon, dtype=float).ravel().tolist() for polygon in polygons]
    problem = segmentation_problem(mask, (height, width))
    if problem:
        raise ValueError(problem)
    if isinstance(mask, list):
        mask = [polygon for polygon in mask if len(polygon) >= 6]
    if not mask:
        return [], None, 0
    if isinstance(mask, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(mask, height, width))
        points = np.concatenate(mask).reshape(-1, 2).clip(0, (width, height))
        x1, y1, x2, y2 = *points.min(0).tolist(), *points.max(0).tolist()
    else:
        is_list = isinstance(mask["counts"], list)
        rle = coco_mask.frPyObjects(mask, height, width) if is_list else mask
        x1, y1, w, h = coco_mask.toBbox(rle).tolist()
        x2, y2 = x1 + w, y1 + h
    area = int(coco_mask.area(rle))
    return (mask, [x1, y1, x2, y2], area) if area else ([], None, 0)


# -- Splits and output -----------------------------------------------------------------------------


def choose_splits(source, val_share):
    """{"train2017": [path, ...], "val2017": [...]}, and perhaps "test2017": IN's own, or drawn."""
    members = {}
    for path, picture in source.pictures.items():
        members.setdefault(picture["split"] if val_share is None else None, []).append(path)
    for missing, other in (("train", None), ("val", "test")):
        if missing not in members and other in members:
            members[missing] = members.pop(other)
    for path in members.pop(None, ()):
        source.note("images left out, as they are of no split", path)
    if "train" not in members:
        raise UserError(f"{source.root} has no split for training; give --val-share 0.2.")
    if "val" not in members:
        # Roboflow's varied copies NAME.rf.HASH.jpg of an image stay together.
        group = {path: str(path).split(".rf.")[0] for path in members["train"]}
        groups = sorted({*group.values()})
        if len(groups) < 2:
            raise UserError(f"{source.root} has too few images for two splits; add some.")
        count = min(max(round((val_share or 0.2) * len(groups)), 1), len(groups) - 1)
        random.Random(0).shuffle(groups)
        chosen = {*groups[:count]}
        members |= {"train": [p for p in group if group[p] not in chosen]}
        members |= {"val": [p for p in group if group[p] in chosen]}
        print(f"drawn at random: {len(members['val']):,} images for validation")
    return {f"{name}2017": members[name] for name in ("train", "val", "test") if name in members}


def write_splits(source, splits, out):
    """Writes the images and the annotation files of all splits to the folder out."""
    objects = [o for paths in splits.values() for p in paths for o in source.pictures[p]["objects"]]
    # Drawn rectangles are masks only beside other masks; "difficult" asks for VOC's metric.
    has_masks = any(o["segmentation"] and not o["rectangle"] for o in objects)
    fields = ["bbox", "area", "iscrowd"] + ["segmentation"] * has_masks
    fields += ["difficult"] * any(o["difficult"] for o in objects)
    used = {o["name"] for o in objects}
    for name in sorted({*source.classes} - used):
        source.note("classes left out, as no object is of them", name)
    classes = [name for name in source.classes if name in used]
    classes += sorted(used - {*classes})
    categories = [{"id": k, "name": name} for k, name in enumerate(classes, start=1)]
    (out / "annotations").mkdir(parents=True)
    names, annotation_ids = set(), itertools.count(1)
    for split, paths in splits.items():
        (out / split).mkdir()
        images, annotations = [], []
        for path in sorted(paths):
            image_id = len(names) + 1
            name = path.name
            while name.lower() in names:
                name = f"{image_id}_{name}"
            names.add(name.lower())
            try:  # a link: a second name of the same file
                (out / split / name).hardlink_to(path.resolve())
            except OSError:
                shutil.copyfile(path, out / split / name)
            width, height = source.pictures[path]["size"]
            image = {"id": image_id, "file_name": name, "width": width, "height": height}
            images.append(image)
            for o in source.pictures[path]["objects"]:
                ids = {"id": next(annotation_ids), "image_id": image_id}
                ids["category_id"] = classes.index(o["name"]) + 1
                annotations.append(ids | {field: o[field] for field in fields})
        file = out / "annotations" / f"instances_{split}.json"
        content = {"images": images, "annotations": annotations, "categories": categories}
        file.write_text(json.dumps(content))
        print(f"{split}: {len(images):,} images, {len(annotations):,} objects")
    print(f"{len(classes)} classes: {', '.join(classes[:20])}{', ...' * (len(classes) > 20)}")
    masks = sum(bool(o["segmentation"]) for o in objects) if has_masks else 0
    advice = ": train with --no-masks" if masks < len(objects) else ""
    print(f"{masks:,} of {len(objects):,} objects have a mask{advice}")


def read_jsons(source, files):
    """{layout: {file: content}}; of COCO's files of several kinds, those of instances."""
    contents = {"COCO": {}, "labelme": {}, "VIA": {}}
    instances = [file for file in files if file.name.startswith("instances_")]
    for file in instances or files:
        try:
            content = read_json(file)
        except UserError as error:
            source.foreign.append(str(error))
            source.note("files left out", error)
            continue
        first = content[0] if isinstance(content, list) and content else content
        fields = first if isinstance(first, dict) else {}
        layout = next((k for k, needed in JSON_FIELDS.items() if needed <= fields.keys()), None)
        if not layout and any("regions" in e for e in fields.values() if isinstance(e, dict)):
            layout = "VIA"
        if layout in contents:
            contents[layout][file] = content
        elif layout:
            source.note_foreign(file, layout, "export COCO there")
    return contents


def read(source, root):
    """Reads the pictures of a source: those of its one layout, or of the JSON file root."""
    contents = read_jsons(source, source.files_with(".json") if root.is_dir() else [root])
    layouts = {"COCO": read_coco, "labelme": read_labelme, "VIA": read_via}
    if root.is_dir():
        texts = [p for p in source.files_with(".txt") if p.stem.lower() in source.named]
        line = re.compile(r"^[ \t]*\d+([ \t]+[-+.\deE]+){4,}[ \t]*$", re.MULTILINE)
        is_yolo = any(line.search(path.read_text(**TEXT)) for path in texts)
        xml = source.files_with(".xml")
        others = ("SegmentationClass", "SegmentationObject" if xml else "")
        masks = [path for path in source.masks if path.parent.name not in others]
        contents |= {"VOC": xml, "YOLO": texts if is_yolo else [], "masks": masks}
        layouts |= {"VOC": read_voc, "YOLO": read_yolo, "masks": read_masks}
    found = {}  # layout: what its reader yields of images that are there, and the classes
    for name, reader in layouts.items():
        source.classes, entries = [], []
        for place, near, objects, size in reader(source, contents[name]):
            path = place if isinstance(place, Path) else source.find_image(place, near)
            if path:
                split = source.split_of(path if source.listed else near)
                entries.append((path, split, objects, size))
        if entries:
            found[name] = entries, source.classes
    if len(found) > 1:
        problem = f"{root} has the layouts {', '.join(found)}; convert each to parts/NAME"
        raise UserError(f"{problem}, and then the folder parts.")
    if not found:
        counts = ", ".join(f"{len(files)} files of {name}" for name, files in contents.items())
        problem = f"{root}: {len(source.images)} images and {counts} do not fit together (--help)."
        raise UserError(source.foreign[0] if source.foreign else problem)
    ((name, (entries, source.classes)),) = found.items()
    print(f"{root}: layout {name}")
    for entry in tqdm(entries, unit="image", leave=False):
        source.add(*entry)
    is_kept = name in ("YOLO", "masks")  # an image without a file of its own has no objects there
    for path in sorted({*source.images} - {entry[0] for entry in entries}):
        source.note("images without annotations, " + ("kept" if is_kept else "left out"), path)
        if is_kept:
            source.add(path, source.split_of(path), [], None)


def main(arguments=None):
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("root", metavar="IN", help="the folder of a data set, or a JSON file")
    add("out", metavar="OUT", help="the folder to make")
    add("--val-share", type=float, help="draw new splits, with this share for validation")
    add("--class-name", default="object", help="class of objects without one (object)")
    add("--boxes-from-masks", action="store_true", help="take the boxes from the masks")
    args = parser.parse_args(arguments)
    root, out = Path(args.root).absolute(), Path(args.out).absolute()
    if not root.exists():
        raise UserError(f"{root} does not exist; name a folder or a JSON file.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; delete it or name another folder.")
    if args.val_share is not None and not 0 < args.val_share < 1:
        raise UserError(f"--val-share must lie between 0 and 1, not be {args.val_share:g}.")
    source = Source(root if root.is_dir() else root.parent, args)
    try:
        read(source, root)
        if not any(picture["objects"] for picture in source.pictures.values()):
            raise UserError(f"{root} has no usable object; see what was left out, and --help.")
        write_splits(source, choose_splits(source, args.val_share), out)
    finally:
        for text, places in source.notes.items():
            print(f"  {len(places):,} {text}; the first: {places[0]}")
    print(f"Now examine it: python tools/examine.py {out} --recipe small")


if __name__ == "__main__":
    from evaluate import run_command

    sys.exit(run_command("to_coco.py", main))
