"""Converts other people's layouts to COCO's.

  python tools/to_coco.py IN OUT [--val-share 0.2] [--seed 0] [--copy] [--class-name object]

IN is a folder, and what lies in it tells its layout:

  COCO    *.json, such as Roboflow's train/_annotations.coco.json and CVAT's; or one such file
  VOC     *.xml beside the images or in Annotations/, lists in ImageSets/Main/, any classes
  YOLO    *.txt with boxes or polygons, the names of classes in classes.txt or data.yaml
  masks   masks/NAME.png: in the image NAME, each object has a number or a colour of its own;
          masks/NAME/*.png, or images/* and masks/*.png in a folder for each image: a file an object

OUT gets annotations/instances_{train,val}2017.json, train2017/ and val2017/ (and test2017's where
there is a third split). IN's own splits are kept, unless --val-share asks for new ones. It prints
what it leaves out, how much and why. To merge data sets, convert each to parts/NAME, then parts.
"""

import argparse
import functools
import itertools
import json
import os
import random
import re
import shutil
import sys
import tempfile
from pathlib import Path, PureWindowsPath
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the five modules
from data import CocoDataset, UserError, coco_problems, read_image, segmentation_problem

UNREADABLE = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".dng", ".cr2", ".nef", ".arw", ".psd")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
SPLITS = {"train": "train", "training": "train", "trainval": "train", "val": "val"}
SPLITS |= {"valid": "val", "validation": "val", "test": "test", "testing": "test"}


class Source:
    """The files of a data set, and what has been read of them so far.

    pictures: {path: {"size": (w, h), "split": name or None, "objects": [as of make_object]}}.
    classes: names in the order of the data set's own list. notes: {text: [where, ...]}.
    """

    def __init__(self, root, class_name):
        self.root = root
        self.class_name = class_name  # of what masks show
        self.files = sorted(path for path in root.rglob("*") if path.is_file())
        images = self.files_with(*IMAGE_SUFFIXES)
        self.masks = [path for path in images if self.mask_folder(path)]
        self.images = [path for path in images if not self.mask_folder(path)]
        self.named = {}  # images by name, with and without suffix
        for path in self.images:
            for name in (path.name, path.stem):
                self.named.setdefault(name, []).append(path)
        self.classes = []
        self.pictures = {}
        self.notes = {}
        for path in self.files_with(*UNREADABLE):
            self.note("files left out, as their format is not read; save them as JPEG", path)

    def files_with(self, *suffixes):
        return [path for path in self.files if path.suffix.lower() in suffixes]

    def mask_folder(self, path):
        """The folder masks/ of the data set in which a path lies, or None.

        A folder of that name which holds a whole data set is no such folder.
        """
        for folder in path.parents[: len(path.relative_to(self.root).parents) - 1]:
            if folder.name.lower() in ("mask", "masks"):
                holds = [(folder / part).is_dir() for part in ("annotations", "images", "masks")]
                return None if any(holds) else folder
        return None

    def note(self, text, where):
        self.notes.setdefault(text, []).append(where)

    def split_of(self, path):
        """The split that the folders of a path name ("images/val2017/": "val"), or None."""
        return split_of(path.relative_to(self.root).parent)

    def find_image(self, name, near, split=None):
        """The image of a name; of several, the one of that split, beside near, or nearly so."""
        found = self.named.get(name, [])
        places = {*near.parts, "images", "JPEGImages"}
        scores = [
            (self.split_of(p) == split, p.parent == near.parent, len(places.intersection(p.parts)))
            for p in found
        ]
        if not found or scores.count(max(scores)) > 1:
            having = "several files have" if found else "no image file has"
            self.note(f"annotated images left out, as {having} their name", near)
            return None
        return found[scores.index(max(scores))]

    def add(self, path, split, objects, annotated_size=None):
        """Keep an image and those of its objects that can be used.

        objects: a list, or a function that makes it of the image's width and height.
        """
        if path in self.pictures:
            raise UserError(f"{path} is annotated in two files; keep one, or name a file as IN.")
        try:
            height, width = read_image(path, *(annotated_size or ())).shape[1:]
        except UserError as error:
            self.note("images left out", error)
            return
        objects = objects(width, height) if callable(objects) else objects
        kept = [o for o in objects if self.keeps(o, path, width, height)]
        self.pictures[path] = {"size": (width, height), "split": split, "objects": kept}

    def keeps(self, o, path, width, height):
        """Whether an object has a sound shape with an area in its image, to which it is clipped."""
        x, y, w, h = o["bbox"]
        x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
        problem = segmentation_problem(o["segmentation"], {"width": width, "height": height})
        if not min(x2 - x1, y2 - y1) >= 0.01:  # also where a coordinate is not a number
            problem = "has a box without area in the image"
        if problem:
            self.note(f"objects left out, as each {problem}", path)
            return False
        if max(x1 - x, y1 - y, x + w - x2, y + h - y2) > 1:
            self.note("boxes clipped to their image", path)
        o["bbox"] = [x1, y1, x2 - x1, y2 - y1]
        if isinstance(o["segmentation"], list):
            o["segmentation"] = [polygon for polygon in o["segmentation"] if len(polygon) >= 6]
        return True


def split_of(path):
    words = re.split("[^a-z]+", str(path).lower())
    return next((SPLITS[word] for word in reversed(words) if word in SPLITS), None)


def read_text(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except ValueError:
        raise UserError(f"{path} is not text in UTF-8; save it as such.") from None


def make_object(name, x1, y1, x2, y2, segmentation=None, iscrowd=0):
    """An object with a box in pixels and, where there is one, COCO's segmentation."""
    box = [float(x1), float(y1), float(x2) - float(x1), float(y2) - float(y1)]
    return {"name": name, "bbox": box, "segmentation": segmentation or [], "iscrowd": iscrowd}


# --------------------------------------------------------------------------------------------------
# The layouts. Each reader yields (path of an image or None, split, objects, annotated size or None)
# --------------------------------------------------------------------------------------------------


def read_coco(source, files):
    """The JSON files that have annotations; of several kinds, those named instances_*."""
    contents = {}
    for file in files:
        try:
            content = json.loads(read_text(file))
        except (json.JSONDecodeError, RecursionError):
            source.note("files left out, as they are not JSON", file)
            continue
        if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
            contents[file] = content
    instances = [file for file in contents if file.name.startswith("instances")]
    for file in instances or contents:
        yield from read_coco_file(source, file, contents[file])


def read_coco_file(source, file, content):
    for problem in coco_problems(content, file):
        raise UserError(problem)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    names = {category["id"]: category["name"] for category in categories}
    source.classes += [name for name in names.values() if name not in source.classes]
    objects = {image["id"]: [] for image in content["images"]}
    for a in content["annotations"]:
        x, y, w, h = a["bbox"]
        shape = a.get("segmentation"), a.get("iscrowd", 0)
        o = make_object(names[a["category_id"]], x, y, x + w, y + h, *shape)
        objects[a["image_id"]].append(o)
    split = split_of(file.relative_to(source.root))
    for image in content["images"]:
        name = PureWindowsPath(image["file_name"])  # takes both / and \
        path = source.find_image(name.name, file.parent.joinpath(*name.parts), split)
        yield path, split, objects[image["id"]], (image["width"], image["height"])


def read_voc(source, files):
    splits = {}
    for split in ("test", "val", "train", "trainval"):
        for path in source.root.rglob(f"ImageSets/Main/{split}.txt"):
            splits = dict.fromkeys(read_text(path).split(), SPLITS[split]) | splits
    parsed = []
    for file in files:
        try:
            tree = ElementTree.parse(file).getroot()
            size = tuple(int(tree.findtext(f"size/{side}", "0")) for side in ("width", "height"))
            parsed.append((file, size if min(size) > 0 else None, voc_objects(source, file, tree)))
        except (ElementTree.ParseError, LookupError, ValueError):
            source.note("files left out, as they are no annotations of VOC", file)
    # VOC counts pixels from 1 and includes the last one. Some tools count from 0.
    corners = [o["bbox"][:2] for _, _, objects in parsed for o in objects]
    first = 1 if min(map(min, corners), default=1) >= 1 else 0
    for file, size, objects in parsed:
        for o in objects:
            x, y, w, h = o["bbox"]
            o["bbox"] = [x - first, y - first, w + first, h + first]
        split = splits.get(file.stem) if splits else source.split_of(file)
        yield source.find_image(file.stem, file, split), split, objects, size


def voc_objects(source, file, tree):
    objects = []
    for entry in tree.iter("object"):
        corners = [entry.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
        difficult = int(entry.findtext("difficult", "").strip() == "1")
        try:
            objects.append(make_object(entry.findtext("name").strip(), *corners, iscrowd=difficult))
        except (AttributeError, TypeError, ValueError):
            source.note("objects left out, as they have no name or no box", file)
            continue
        if difficult:
            source.note('"difficult" objects: crowds now, neither trained on nor evaluated', file)
    return objects


def read_yolo(source, files):
    """Text files with a line for each object: class, then coordinates in parts of the sides."""
    source.classes = yolo_classes(source)
    for file in files:
        split = source.split_of(file)
        objects = functools.partial(yolo_objects, source, file)
        yield source.find_image(file.stem, file, split), split, objects, None


def yolo_objects(source, file, width, height):
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            k, *values = np.array(line.split(), dtype=np.float64).tolist()
        except ValueError:
            k, values = -1, []
        fine = len(values) >= 4 and len(values) % 2 == 0
        if not fine or k not in range(10_000) or not all(-0.01 <= v <= 1.01 for v in values):
            source.note("lines left out: not a class and 4, 6, 8, ... numbers from 0 to 1", where)
            continue
        if source.classes and k >= len(source.classes):
            count = len(source.classes)
            raise UserError(f"{where} is of class {k:.0f}, but {count} are listed; list them all.")
        name = source.classes[int(k)] if source.classes else f"class {k:.0f}"
        points = np.reshape(values, (-1, 2)) * (width, height)
        if len(points) > 2:
            polygon = points.ravel().tolist()
            yield make_object(name, *points.min(0), *points.max(0), [polygon])
        else:  # a box: its centre and its size
            yield make_object(name, *(points[0] - points[1] / 2), *(points[0] + points[1] / 2))


def yolo_classes(source):
    """The names of the classes, [] if there is no list of them."""
    for path in source.files:
        if path.name == "classes.txt" or path.suffix == ".names":
            return [line.strip() for line in read_text(path).splitlines() if line.strip()]
    for path in source.files_with(".yaml", ".yml"):
        found = re.search(r"^names:(.*(?:\n(?:[ \t\]}-].*)?)*)", read_text(path), re.MULTILINE)
        if found and not yaml_names(found[1]):
            raise UserError(f'{path} has unknown "names"; write them into classes.txt, one a line.')
        if found:
            return yaml_names(found[1])
    return []


def yaml_names(text):
    """YAML's [a, b], {0: a, 1: b} or lines "- a" or "0: a" as a list; None for anything else."""
    text = re.sub(r"(^|\s)#.*", "", text).strip()
    flow = re.fullmatch(r"\[(.*?),?\s*\]|\{(.*?),?\s*\}", text, re.DOTALL)
    entries = (flow[1] or flow[2] or "").split(",") if flow else re.split(r"\n\s*", text)
    names = []
    for entry in entries:
        mark, name = r"(?:-\s+|(\d+)\s*:\s*)", r"""(['"]?)([^'"\\:{}\[\]]+?)\2"""
        found = re.fullmatch(rf"\s*{mark}{'?' if flow else ''}{name}\s*", entry)
        if not found or (found[1] and int(found[1]) != len(names)):
            return None
        names.append(found[3])
    return names


def read_masks(source, files):
    below = {}  # folder: the images in it and below it
    for path in source.images:
        for folder in path.parents:
            below.setdefault(folder, []).append(path)
    masks = {}  # image: its files of masks
    for file in files:
        folder = source.mask_folder(file)
        path, *more = below.get(folder.parent, [None])
        if path is None or more:
            of_folder = file.parent != folder and file.parent.name in source.named
            name = file.parent.name if of_folder else file.stem
            path = source.find_image(name, file, source.split_of(file))
        masks.setdefault(path, []).append(file)
    masks.pop(None, None)
    for path, found in masks.items():
        numbered = len(found) == 1 and found[0].stem == path.stem != found[0].parent.name
        objects = []
        size = None
        for rle in itertools.chain(*(mask_rles(source, file, numbered) for file in found)):
            x, y, w, h = coco_mask.toBbox(rle)
            rle["counts"] = rle["counts"].decode()
            objects.append(make_object(source.class_name, x, y, x + w, y + h, rle))
            size = tuple(rle["size"][::-1])
        yield path, source.split_of(path), objects, size


def mask_rles(source, file, numbered):
    """The objects in an image of masks, as RLEs. numbered: each has a value of its own."""
    try:
        with Image.open(file, formats=("PNG", "BMP", "TIFF", "GIF", "PPM")) as image:
            if image.mode in ("1", "L", "P", "I") or image.mode.startswith("I;16"):
                values = np.asarray(image).astype(np.int32)
            else:
                values = np.asarray(image.convert("RGB")).astype(np.int32) @ (65536, 256, 1)
    except Exception:  # a damaged file can make a decoder fail in any way
        raise UserError(
            f"{file} is no mask that can be read; save it as PNG, or remove its image too."
        ) from None
    if not numbered:
        values = values > values.max() / 2
    numbers = np.unique(values[values > 0])
    if len(numbers) > 5000:
        raise UserError(f"{file} has more than 5,000 values; give each object one number (as PNG).")
    if len(numbers) == 0:
        source.note("masks without an object", file)
    if numbered:
        source.note("masks read as one object a value; if values are classes, this is wrong", file)
    for number in numbers:
        yield coco_mask.encode(np.asfortranarray(values == number, dtype=np.uint8))


# --------------------------------------------------------------------------------------------------
# Splits and output
# --------------------------------------------------------------------------------------------------


def choose_splits(source, val_share, seed):
    """{"train2017": [path, ...], "val2017": [...]}: drawn splits, or the source's own.

    These have "test2017" as well if there are splits for tests and for validation.
    """
    members = {}
    for path, picture in source.pictures.items():
        members.setdefault(picture["split"], []).append(path)
    for missing, other in (("train", None), ("val", "test")):
        if missing not in members and other in members:
            members[missing] = members.pop(other)
    if val_share is None and {"train", "val"} <= members.keys():
        for path in members.pop(None, []):
            source.note("images left out, as they are of no split", path)
        return {f"{split}2017": paths for split, paths in members.items()}
    val_share = 0.2 if val_share is None else val_share
    groups = sorted({group_of(path) for path in source.pictures})
    if len(groups) < 2:
        raise UserError(f"{source.root} has too few images for two splits; add some.")
    random.Random(seed).shuffle(groups)
    chosen = set(groups[: min(max(round(val_share * len(groups)), 1), len(groups) - 1)])
    drawn = {"train2017": [], "val2017": []}
    for path in source.pictures:
        is_val = group_of(path) in chosen
        drawn["val2017" if is_val else "train2017"].append(path)
    print(f"drawn with seed {seed}: {len(drawn['val2017']):,} images for validation")
    return drawn


def group_of(path):
    """The same for images that belong into one split: Roboflow's varied copies NAME.rf.HASH.jpg."""
    name, _, copy = path.name.partition(".rf.")
    return name if copy else str(path)


def write_splits(source, splits, out, copy):
    """Writes the images and the annotation files of all splits to the folder out."""
    pictures = [source.pictures[path] for paths in splits.values() for path in paths]
    all_objects = [o for picture in pictures for o in picture["objects"]]
    without_mask = sum(not o["segmentation"] for o in all_objects)
    has_masks = without_mask < len(all_objects)
    used = {o["name"] for o in all_objects}
    for name in sorted(set(source.classes) - used):
        source.note("classes left out, as no object is of them", name)
    classes = [name for name in source.classes if name in used]
    classes += sorted(used - set(classes))
    categories = [{"id": k, "name": name} for k, name in enumerate(classes, start=1)]
    (out / "annotations").mkdir(parents=True)
    names = set()
    annotation_ids = itertools.count(1)
    for split, paths in splits.items():
        (out / split).mkdir()
        images, annotations = [], []
        for path in sorted(paths):
            image_id = len(names) + 1
            name = path.name.encode("utf-8", "replace").decode()  # not every name is text
            while name.lower() in names:
                name = f"{image_id}_{name}"
            names.add(name.lower())
            place_image(source, path, out / split / name, copy)
            width, height = source.pictures[path]["size"]
            image = {"id": image_id, "file_name": name, "width": width, "height": height}
            images.append(image)
            for o in source.pictures[path]["objects"]:
                o |= {"id": next(annotation_ids), "image_id": image_id}
                o |= {"category_id": classes.index(o.pop("name")) + 1}
                o |= {"area": area_of(o, width, height)}
                if not has_masks:
                    del o["segmentation"]
                annotations.append(o)
        file = out / "annotations" / f"instances_{split}.json"
        content = {"images": images, "annotations": annotations, "categories": categories}
        file.write_text(json.dumps(content))
        CocoDataset(out / split, file, masks=False)  # checks it
        print(f"{split}: {len(images):,} images, {len(annotations):,} objects")
    more = ", ..." if len(classes) > 20 else ""
    print(f"{len(classes)} classes: {', '.join(classes[:20])}{more}")
    if not has_masks:
        print("boxes only: train with --no-masks")
    elif without_mask == 0:
        print("boxes and masks")
    else:
        print(f"boxes and masks, but {without_mask:,} objects have none: train with --no-masks,")
        print("  for with masks these objects count as background")


def place_image(source, path, target, copy):
    """A link to an image (a second name of the same file) or, where there can be none, a copy."""
    if not copy:
        try:
            os.link(path.resolve(), target)
            return
        except OSError:
            source.note("images copied, as they cannot be linked from there", path)
    shutil.copyfile(path, target)


def area_of(o, width, height):
    rle = o["segmentation"]
    if not rle:
        return o["bbox"][2] * o["bbox"][3]
    if isinstance(rle, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(rle, height, width))
    elif isinstance(rle["counts"], list):
        rle = coco_mask.frPyObjects(rle, height, width)
    return int(coco_mask.area(rle))


def read(source, root):
    """Reads the pictures of a source: those of its one layout, or of the COCO file root."""
    texts = source.files_with(".txt")
    texts = [p for p in texts if p.stem in source.named or p.parent.name == "labels"]
    layouts = {  # name: (reader, files)
        "COCO": (read_coco, source.files_with(".json")),
        "VOC": (read_voc, source.files_with(".xml")),
        "YOLO": (read_yolo, texts if any(map(has_yolo_line, texts)) else []),
        "masks": (read_masks, source.masks),
    }
    if not root.is_dir():
        layouts = {"COCO": (read_coco, [root])}
    found = {}  # layout: what its reader yields of images that are there, and the classes
    for name, (reader, files) in layouts.items():
        source.classes = []
        entries = tqdm(reader(source, files), unit="image", leave=False) if files else ()
        entries = [entry for entry in entries if entry[0]]
        if entries:
            found[name] = entries, source.classes
    if len(found) > 1:
        raise UserError(
            f"{root} has annotations in the layouts {', '.join(found)}; put each into a folder "
            "of its own, convert them to parts/NAME, and merge these: to_coco.py parts OUT."
        )
    if not found:
        for path in source.images:
            if path.stem.endswith("_mask") and path.stem.removesuffix("_mask") in source.named:
                problem = f"{path} is a semantic mask: its values are classes and not objects"
                raise UserError(f"{problem}; export polygons or boxes in COCO's format instead.")
        counts = ", ".join(f"{len(files)} of {name}" for name, (_, files) in layouts.items())
        problem = f"{root} has {len(source.images)} images and these files: {counts}"
        raise UserError(f"{problem}; none of them fit together (see --help).")
    ((name, (entries, source.classes)),) = found.items()
    print(f"{root}: layout {name}")
    for path, split, objects, size in entries:
        source.add(path, split, objects, size)
    is_kept = name in ("YOLO", "masks")  # an image without a file of its own has no objects there
    for path in sorted(set(source.images) - {entry[0] for entry in entries}):
        source.note("images without annotations, " + ("kept" if is_kept else "left out"), path)
        if is_kept:
            source.add(path, source.split_of(path), [])


def has_yolo_line(file):
    text = file.read_text(encoding="utf-8", errors="replace")
    return re.search(r"^[ \t]*\d+([ \t]+[-+.\deE]+){4,}[ \t]*$", text, re.MULTILINE)


def convert(root, out, val_share=None, seed=0, copy=False, class_name="object"):
    """Converts the data set below root (or the COCO file root) to the new folder out."""
    root, out = Path(root).absolute(), Path(out).absolute()
    if not root.exists():
        raise UserError(f"{root} does not exist; name a folder or a COCO file.", 2)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; delete it or name another folder.", 2)
    if val_share is not None and not 0 < val_share < 1:
        raise UserError(f"--val-share must lie between 0 and 1, not be {val_share:g}.", 2)
    source = Source(root if root.is_dir() else root.parent, class_name)
    try:
        read(source, root)
        if not any(picture["objects"] for picture in source.pictures.values()):
            raise UserError(f"{root} has no usable object; see what was left out, and --help.")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as folder:
            made = Path(folder) / "made"
            write_splits(source, choose_splits(source, val_share, seed), made, copy)
            made.rename(out)
    finally:
        for text, places in source.notes.items():
            print(f"  {len(places):,} {text}; the first: {places[0]}")
    print(f"Now examine it: python tools/examine.py {out} --recipe small")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("root", metavar="IN", help="the folder of a data set, or a COCO file")
    add("out", metavar="OUT", help="the folder to make")
    add("--val-share", type=float, help="draw new splits, with this share for validation")
    add("--seed", type=int, default=0, help="random seed of the new splits (0)")
    add("--copy", action="store_true", help="copy the images instead of linking them")
    add("--class-name", default="object", help="class of masks (object)")
    args = parser.parse_args(arguments)
    convert(args.root, args.out, args.val_share, args.seed, args.copy, args.class_name)


if __name__ == "__main__":
    from evaluate import run_command

    sys.exit(run_command("to_coco.py", main))
