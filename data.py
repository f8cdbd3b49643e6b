"""The data: from the files of COCO to the batches that a detector is trained on.

`CocoDataset` yields pairs (image, target): the image a uint8 RGB tensor [3, H, W], the target a
dict of plain tensors in the pixels of that image. Nothing here knows about the model.

In reading order: COCO's pairs, subsets, transforms, sampler and loader. The end is plumbing, not
the paper: how files are read and checked. Sizes of images are (height, width).

Coordinates are continuous: pixel (row i, column j) covers the square [j, j + 1] x [i, i + 1], and a
box (x1, y1, x2, y2) has the width x2 - x1 without a "+ 1" (Detectron2's convention).
"""

import contextlib
import gc
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import signal
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import ops


class UserError(ValueError):
    """An error the user can fix: one sentence that says what is wrong, where, and what to do."""


CONVERT = "convert a data set of another layout with tools/to_coco.py"
MEND = "correct it, or let tools/to_coco.py mend it"


# -- The pair (image, target) ----------------------------------------------------------------------


class CocoDataset(Dataset):
    """Images and objects of a COCO annotation file; dataset[i] -> (image, target) at full size.

    image: uint8 [3, H, W] RGB. target: `image_id` int; `boxes` [N, 4] float32 xyxy in pixels,
    clipped to the image; `labels` [N] int64, where k means classes[k - 1] (0 is background);
    `iscrowd` [N] bool; with masks, `masks` [N, H, W] uint8; with keypoints (of persons, the file's
    only category), `keypoints` [N, 17, 3] float32 (x, y, v).

    training: leave out objects that `is_usable` refuses, and images in which no object (keypoints:
    no labelled keypoint) remains, as Detectron does: 117,266 of train2017's 118,287 images stay.
    subset: keep that many images.

    Attributes: `image_ids`, `heights`, `widths`; `classes`, `category_ids`; `num_objects`,
    `num_dropped` images. Raises UserError for what is wrong in a file.
    """

    def __init__(
        self, image_dir, annotation_file, training=False, masks=True, keypoints=False, subset=None
    ):
        self.image_dir = os.fspath(image_dir)
        self.annotation_file = os.fspath(annotation_file)
        self.masks = masks
        self.keypoints = keypoints
        if not os.path.isdir(image_dir):
            raise UserError(f"There is no folder {image_dir}; check the split, or {CONVERT}.")
        content = read_coco(annotation_file, masks, keypoints)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.category_ids = [category["id"] for category in categories]
        self.classes = [category["name"] for category in categories]

        # 1) The objects of each image
        labels = {category_id: k for k, category_id in enumerate(self.category_ids, start=1)}
        images = sorted(content["images"], key=lambda image: image["id"])
        objects = {image["id"]: [] for image in images}
        for o in content.pop("annotations"):
            o["label"] = labels[o["category_id"]]
            objects[o["image_id"]].append(o)

        # 2) The images that are used
        records = {}
        for image in images:
            size = image["height"], image["width"]
            chosen = objects.pop(image["id"])  # pop: the rest is freed
            if training:
                chosen = [o for o in chosen if is_usable(o, size, masks)]
                if not chosen or (keypoints and not any(o["num_keypoints"] for o in chosen)):
                    continue
            record = {"file_name": image["file_name"], "size": size, "objects": chosen}
            records[image["id"]] = record
        if not records:
            raise UserError(f"{annotation_file}: none of its {len(images):,} images can be used.")
        self.num_dropped = len(images) - len(records)
        self.image_ids = list(records) if subset is None else choose_subset(records, subset)
        self.heights, self.widths = np.array([records[i]["size"] for i in self.image_ids]).T
        self.num_objects = sum(len(records[i]["objects"]) for i in self.image_ids)
        self._pack(records)

    def record(self, index):
        """An image's `file_name`, `size` (H, W) and `objects`: annotations with their `label`."""
        start = self._ends[index - 1] if index > 0 else 0
        return pickle.loads(self._records[start : self._ends[index]].numpy())

    def __len__(self):
        return len(self.image_ids)

    def __getitem__(self, index):
        return self.load(index)

    def load(self, index, min_size=None, max_size=None, flip=False):
        """dataset[index], mirrored if flip, resized to (min_size, max_size) if given."""
        record, image_id = self.record(index), self.image_ids[index]
        objects, old_size = record["objects"], record["size"]
        new_size = resize_shape(*old_size, min_size, max_size) if min_size else old_size

        image = read_image(os.path.join(self.image_dir, record["file_name"]), old_size)
        if flip:  # before resizing, where there are fewer pixels to move
            image = image.flip(2)
        image = resize_image(image, *new_size)

        boxes = torch.tensor([o["bbox"] for o in objects], dtype=torch.float64).reshape(-1, 4)
        boxes = ops.clip_boxes_to_image(ops.box_convert(boxes, "xywh", "xyxy"), old_size).float()
        target = {
            "image_id": image_id,
            "boxes": move_boxes(boxes, old_size, new_size, flip),
            "labels": torch.tensor([o["label"] for o in objects], dtype=torch.int64),
            "iscrowd": torch.tensor([o["iscrowd"] for o in objects], dtype=torch.bool),
        }
        if self.masks:
            masks = np.zeros((len(objects), *new_size), dtype=np.uint8)
            for mask, o in zip(masks, objects):
                self.check_mask(o, image_id, old_size)
                paint_segmentation(mask, o["segmentation"], old_size, flip)
            target["masks"] = torch.from_numpy(masks)
        if self.keypoints:
            keypoints = torch.tensor([o["keypoints"] for o in objects], dtype=torch.float32)
            keypoints = keypoints.reshape(-1, 17, 3)
            keypoints[:, :, :2] += 0.5  # from the index of a pixel to its centre
            target["keypoints"] = move_keypoints(keypoints, old_size, new_size, flip)
        return image, target

    def coco_gt(self):
        """The annotations as a pycocotools COCO object, for COCOeval; read again from the file.

        Their ids are renumbered from 1, because COCOeval takes the id 0 for "no match".
        """
        coco = COCO()
        coco.dataset = read_coco(self.annotation_file, self.masks, self.keypoints)
        sizes = {image["id"]: (image["height"], image["width"]) for image in coco.dataset["images"]}
        for number, annotation in enumerate(coco.dataset["annotations"], start=1):
            if self.masks:
                image_id = annotation["image_id"]
                self.check_mask(annotation, image_id, sizes[image_id])
            if annotation["segmentation"] == []:
                annotation["segmentation"] = [[0] * 6]  # for pycocotools, a polygon without area
            annotation["id"] = number
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco

    def check_mask(self, annotation, image_id, size):
        """UserError for a wrong segmentation, when it is used: to check all delays every start."""
        problem = segmentation_problem(annotation["segmentation"], size)
        if problem:
            name = f"annotation {annotation.get('id')} of image {image_id}"
            raise UserError(f"{self.annotation_file}: {name} {problem}; {MEND}.")

    def _pack(self, records):
        """Keep {image id: record} as one flat tensor instead of millions of Python objects.

        Workers share its memory; a Python object is copied as soon as its reference count changes.
        """
        self._ends, buffer = [], bytearray()
        for image_id in self.image_ids:
            buffer += pickle.dumps(records.pop(image_id))
            self._ends.append(len(buffer))
        self._records = torch.frombuffer(buffer, dtype=torch.uint8)


def is_usable(o, size, masks):
    """Whether an object (an annotation) of an image of size (H, W) is trained on.

    It must be no crowd, have a box with an area inside the image and, with masks, a mask.
    (Detectron asks for area > 0 and sides > 1 pixel. VOC's difficult objects come as crowds.)
    """
    x, y, w, h = o["bbox"]
    inside_x = min(x + w, size[1]) - max(x, 0)
    inside_y = min(y + h, size[0]) - max(y, 0)
    has_area = min(inside_x, inside_y) >= 1e-3  # pixels; less would vanish in float32
    has_mask = not masks or o["segmentation"] != []
    return has_area and has_mask and not o["iscrowd"]


# -- Splits and subsets ----------------------------------------------------------------------------


def choose_subset(image_ids, count):
    """The `count` image ids with the smallest hashes, in the order given (Sec. 5.2).

    They depend on the ids alone, not on the machine, and are nested: the 1k images are among the
    3.5k. (The paper's own 35k are a split, valminusminival2014.) Raises UserError if there are
    fewer.
    """
    chosen = set(sorted(image_ids, key=lambda i: hashlib.sha1(b"%d" % i).digest())[:count])
    if len(chosen) < count:
        raise UserError(f"There are {len(chosen):,} images to use, not {count:,}; take fewer.")
    return [image_id for image_id in image_ids if image_id in chosen]


def open_split(root, split, keypoints=False, **options):
    """The CocoDataset of a split below the folder `root`; options: its other arguments.

    The files are annotations/instances_SPLIT.json (keypoints: person_keypoints_...) and the images
    in SPLIT/ or images/SPLIT/. The lists of COCO 2014 that the paper's 35k images come from,
    (valminus)minival2014, have theirs in val2014/.
    """
    kind = "person_keypoints" if keypoints else "instances"
    annotation_file = os.path.join(root, "annotations", f"{kind}_{split}.json")
    folder = re.sub("^(valminus)?minival", "val", split)
    image_dir = os.path.join(root, folder)
    if not os.path.isdir(image_dir):
        image_dir = os.path.join(root, "images", folder)
    return CocoDataset(image_dir, annotation_file, keypoints=keypoints, **options)


def check_classes(dataset, classes, source, advice="let tools/to_coco.py mend them"):
    """Raise UserError unless the classes of a data set are these; source: where these are from."""
    if dataset.classes != classes:
        apart = sorted(set(dataset.classes) ^ set(classes)) or ["their order"]
        files = f"{dataset.annotation_file} and {source}"
        raise UserError(f"{files} differ in their classes ({', '.join(apart[:8])}); {advice}.")


# -- Transforms (Sec. 4: shorter side 800, longer at most 1333, horizontal flip) -------------------

KEYPOINT_NAMES = (
    "nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow "
    "right_elbow left_wrist right_wrist left_hip right_hip left_knee right_knee left_ankle "
    "right_ankle"
).split()

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
    """Bilinear resize: [3, H, W] -> [3, height, width], of the same dtype.

    Antialiased when it shrinks, as Detectron2's PIL does and Detectron's cv2.INTER_LINEAR does not.
    """
    if image.shape[1:] == (height, width):
        return image
    resized = F.interpolate(image[None], size=(height, width), mode="bilinear", antialias=True)
    return resized[0]


def move_boxes(boxes, old_size, new_size, flip):
    """Boxes [N, 4] xyxy of an image of old_size (H, W), mirrored if flip, resized to new_size."""
    if flip:
        x1, y1, x2, y2 = boxes.unbind(1)
        boxes = torch.stack([old_size[1] - x2, y1, old_size[1] - x1, y2], dim=1)
    scale_y = new_size[0] / old_size[0]
    scale_x = new_size[1] / old_size[1]
    return boxes * boxes.new_tensor([scale_x, scale_y, scale_x, scale_y])


def move_keypoints(keypoints, old_size, new_size, flip):
    """Keypoints [N, 17, 3] (x, y, v), mirrored if flip (left and right swap), then resized."""
    x, y, v = keypoints.unbind(2)
    if flip:
        x = old_size[1] - x
    x = x * (new_size[1] / old_size[1])
    y = y * (new_size[0] / old_size[0])
    keypoints = torch.stack([x, y, v], dim=2)
    keypoints[v == 0] = 0  # unlabelled ones stay (0, 0, 0)
    return keypoints[:, KEYPOINT_FLIP] if flip else keypoints


def paint_segmentation(mask, segmentation, old_size, flip):
    """Paint a COCO segmentation of an image of old_size (H, W) into mask, mirrored if flip.

    mask: a zero uint8 array [h, w], the image at its new size. segmentation: polygons or RLE in
    which `segmentation_problem` finds nothing wrong, for pycocotools trusts what it is given.
    """
    if not segmentation:
        return
    height, width = mask.shape
    if isinstance(segmentation, list):  # polygons: drawn at the new size, their edges stay sharp
        scale = width / old_size[1], height / old_size[0]
        points = [np.array(polygon).reshape(-1, 2) * scale for polygon in segmentation]
        if flip:
            points = [(width, 0) + polygon * (-1, 1) for polygon in points]
        rles = coco_mask.frPyObjects([polygon.ravel() for polygon in points], height, width)
        mask[:] = coco_mask.decode(coco_mask.merge(rles))
        return
    if isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, *old_size)
    # A target pixel takes the source pixel under its centre ("nearest-exact"), so that every edge
    # stays within half a pixel of where the box's edge goes.
    source = torch.from_numpy(coco_mask.decode(segmentation))
    source = source.flip(1) if flip else source
    mask[:] = F.interpolate(source[None, None], size=mask.shape, mode="nearest-exact")[0, 0].numpy()


# -- Sampler and loader ----------------------------------------------------------------------------

# The route of the seed: train.py --seed -> BatchSampler -> TrainingSet -> model.py. No state of a
# generator is kept: each is made anew, from numbers that say where in the run it is used.
#
#   1) BatchSampler   shuffles each epoch by (seed, epoch), and gives each image of a batch its own
#                     seed: a function of (seed, iteration, position in the whole batch)
#   2) TrainingSet    draws size and flip from the image's seed and passes it on as target["seed"]
#   3) model.py       `generator_of` seeds the choice of the image's anchors and RoIs with it
#
# So a resumed run, a branch of another run and any number of workers make the same choices. With
# another images_per_gpu, the groups and so the batches hold other images.


def seed_of(*numbers):
    """A seed of 63 bits, a function of some numbers: SeedSequence hashes them."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class BatchSampler(Sampler):
    """Yields this process's share of each batch, endlessly: [(index, image seed), ...].

    Images form groups of images_per_gpu of one orientation (w >= h or not: less padding), as in
    Detectron, new ones every epoch. An epoch shows every image at least once: an orientation's last
    group is filled up with images from its first. The groups of all epochs are one stream, of which
    every iteration takes the next world_size groups, one for each rank.
    """

    def __init__(self, dataset, images_per_gpu, seed=0, rank=0, world_size=1, start_iteration=0):
        landscape = np.asarray(dataset.widths) >= np.asarray(dataset.heights)
        self.orientations = [np.flatnonzero(landscape), np.flatnonzero(~landscape)]
        self.images_per_gpu = images_per_gpu
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start_iteration = start_iteration

    def epoch_groups(self, epoch):
        """The groups of an epoch in order: int64 [G, images_per_gpu], indices of images."""
        groups = []
        rng = np.random.default_rng((self.seed, epoch))
        for indices in self.orientations:
            count = math.ceil(len(indices) / self.images_per_gpu)
            order = rng.permutation(indices)
            groups.append(np.resize(order, (count, self.images_per_gpu)))  # the first fill it up
        return rng.permutation(np.concatenate(groups))

    def __iter__(self):
        groups = itertools.chain.from_iterable(map(self.epoch_groups, itertools.count()))
        start = self.start_iteration * self.world_size + self.rank
        own_groups = itertools.islice(groups, start, None, self.world_size)
        first = self.rank * self.images_per_gpu
        own_positions = range(first, first + self.images_per_gpu)  # in the whole batch
        for iteration, group in enumerate(own_groups, start=self.start_iteration):
            seeds = [seed_of(self.seed, iteration, position) for position in own_positions]
            yield list(zip(group.tolist(), seeds))


class TrainingSet(Dataset):
    """A dataset as it is trained on, a batch at a time, transformed by each image's seed.

    training_set[[(index, seed), ...]] -> (images, targets): a list of uint8 tensors [3, h, w] and a
    list of dicts as in `CocoDataset`, with the seed as target["seed"].

    min_sizes: the shorter side is one of these (Sec. 5.1, scale augmentation: from 640 to 800, here
    as in Detectron uniform over the multiples of 32). flip: mirror an image with probability 1/2.
    """

    def __init__(self, dataset, min_sizes=(800,), max_size=1333, flip=True):
        self.dataset = dataset
        self.min_sizes = tuple(min_sizes)
        self.max_size = max_size
        self.flip = flip

    def __getitem__(self, batch):
        images = []
        targets = []
        for index, seed in batch:
            rng = np.random.default_rng(seed)
            min_size, flip = int(rng.choice(self.min_sizes)), self.flip and rng.random() < 0.5
            image, target = self.dataset.load(index, min_size, self.max_size, flip)
            images.append(image)
            targets.append(target | {"seed": seed})
        return images, targets


def read_ahead(dataset, workers, keys):
    """Yields dataset[key] for each key, in order; `workers` processes read ahead.

    Keys may come without end. batch_size=None: an item of a `TrainingSet` is a whole batch already.
    """
    settings = {"num_workers": workers, "worker_init_fn": ignore_interrupts}
    return DataLoader(dataset, sampler=keys, batch_size=None, **settings)


def ignore_interrupts(_):
    """Ctrl-C reaches the whole group of processes: it is the main one that saves and ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# -- Reading and checking: images ------------------------------------------------------------------

warnings.simplefilter("error", Image.DecompressionBombWarning)  # more than 89 megapixels


def first_line(error):
    """What an exception of a library says, to be put into a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def read_image(path, size=None):
    """Read an image file as RGB, uint8 [3, H, W]. UserError if it cannot be read or does not fit.

    An orientation in the file's EXIF data is applied, except when only the image as stored has the
    annotated `size` (H, W).
    """
    advice = f"; {MEND}" if size else ""
    try:
        with Image.open(path) as stored:
            image = ImageOps.exif_transpose(stored)
            if size and (image.height, image.width) != tuple(size):
                image = stored
            is_deep = image.mode.startswith(("I", "F"))
            array = np.array(image.convert("RGB"))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UserError(f"{path} is too large; cut it into tiles.") from None
    except Exception as error:  # a damaged file can make a decoder fail in any way
        raise UserError(f"{path} cannot be used ({first_line(error)}){advice}.") from error
    if is_deep:  # PIL has cut it off at 255
        raise UserError(f"{path} has more than 8 bits a channel; save it with 8.")
    if size and array.shape[:2] != tuple(size):
        stated = f"{array.shape[:2]} pixels (height, width), and {tuple(size)} as annotated"
        raise UserError(f"{path} has {stated}{advice}.")
    return torch.from_numpy(array).permute(2, 0, 1)


# -- Reading and checking: annotations -------------------------------------------------------------


def read_json(file):
    """The content of a JSON file. UserError if there is none."""
    gc.disable()  # the collector would visit millions of new objects again and again: 2.5x the time
    try:
        with open(file, encoding="utf-8-sig") as stream:  # with or without a byte-order mark
            return json.load(stream)
    except FileNotFoundError:
        raise UserError(f"There is no file {file}; check folder and split, or {CONVERT}.") from None
    except (OSError, ValueError) as error:
        problem = f"{file} cannot be read as JSON ({first_line(error)})"
        raise UserError(f"{problem}; download it again, or unpack it first.") from None
    finally:
        gc.enable()


def read_coco(file, masks=False, keypoints=False):
    """The checked content of a COCO annotation file, with what it may leave out.

    A file without "annotations" (COCO's test splits) is one without objects. "iscrowd" is 0 and
    "area" that of the box; "num_keypoints" is counted. Polygons of fewer than three points are left
    out, as in Detectron2, and a segmentation that covers nothing becomes [] (without masks: each).
    Raises UserError for what is wrong.
    """
    content = read_json(file)
    problem = next(coco_problems(content, file, masks, keypoints), None)
    if problem:
        raise UserError(problem)
    content = {"info": {}, "annotations": []} | content
    for annotation in content["annotations"]:
        annotation["iscrowd"] = annotation.get("iscrowd") or 0
        if annotation.get("area") is None:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        segmentation = (masks and annotation.get("segmentation")) or []
        if isinstance(segmentation, list):
            segmentation = [polygon for polygon in segmentation if len(polygon) >= 6]
        elif not any(run_lengths(segmentation)[1::2]):
            segmentation = []
        annotation["segmentation"] = segmentation
        if keypoints:
            annotation["num_keypoints"] = sum(v > 0 for v in annotation["keypoints"][2::3])
    objects = content["annotations"]
    if masks and objects and not any(o["segmentation"] for o in objects):
        raise UserError(f"{file} has no masks; use --no-masks (masks=False).")
    return content


def are_numbers(values, count):
    """Whether a JSON value is a list of `count` numbers that can be pixels of an image."""
    if not isinstance(values, list) or len(values) != count:
        return False
    return all(isinstance(value, (int, float)) and abs(value) < 1e5 for value in values)


def is_segmentation(value):
    """Whether a JSON value is missing, or has the form of an RLE or of polygons: flat lists."""
    if isinstance(value, dict):
        return isinstance(value.get("counts"), (list, str))
    parts = value or []
    are_lists = isinstance(parts, list) and all(isinstance(polygon, list) for polygon in parts)
    return are_lists and not any(isinstance(x, list) for polygon in parts for x in polygon[:1])


# Fields that entries of COCO's lists must have: (name, what it must hold, test)
ID = ("id", "an integer", lambda v: isinstance(v, int))
IMAGE_FIELDS = [
    ID,
    ("file_name", "text", lambda v: isinstance(v, str)),
    ("width", "a positive integer", lambda v: isinstance(v, int) and 0 < v < 2**16),
    ("height", "a positive integer", lambda v: isinstance(v, int) and 0 < v < 2**16),
]
CATEGORY_FIELDS = [ID, ("name", "text", lambda v: isinstance(v, str))]
ANNOTATION_FIELDS = [
    ("bbox", "4 numbers x, y, w, h", lambda v: are_numbers(v, 4)),
    ("iscrowd", "0 or 1", lambda v: v in (None, 0, 1)),
    ("area", "a number", lambda v: v is None or isinstance(v, (int, float))),
]
MASK_FIELDS = [("segmentation", "polygons [[x, y, x, y, ...], ...] or an RLE", is_segmentation)]
KEYPOINT_FIELDS = [("keypoints", "17 times x, y, v", lambda v: are_numbers(v, 51))]


def field_problem(entry, fields):
    """Words for the first field of an entry that does not hold what it must, or None."""
    for name, expected, is_right in fields:
        if not is_right(entry.get(name)):
            return f'must have {expected} as "{name}", not {entry.get(name)!r:.60}'
    return None


def coco_problems(content, file, masks=False, keypoints=False):
    """Yield a sentence for each entry that makes parsed JSON unusable as a COCO annotation file.

    masks, keypoints: whether they are used; `segmentation_problem` looks inside of masks. (Opening
    a data set ends at the first of these sentences, tools/examine.py shows all.)
    """
    if not isinstance(content, dict) or not {"images", "categories"} <= content.keys():
        yield f'{file} is not a COCO annotation file: it needs "images" and "categories".'
        return
    image_ids, class_ids, class_names = set(), set(), set()
    for image in content["images"]:
        problem = field_problem(image, IMAGE_FIELDS)
        if not problem and image["id"] in image_ids:
            problem = "appears twice"
        if problem:
            yield f"{file}: image {image.get('id')} {problem}; {MEND}."
        image_ids.add(image.get("id"))

    for category in content["categories"]:
        points = category.get("keypoints", KEYPOINT_NAMES)
        problem = field_problem(category, CATEGORY_FIELDS)
        if not problem and category["id"] in class_ids:
            problem = "appears twice"
        if not problem and category["name"] in class_names:
            problem = f"has the name of another, {category['name']!r}"
        if not problem and keypoints and points != KEYPOINT_NAMES:
            problem = "has other keypoints than COCO's 17"
        if problem:
            yield f"{file}: category {category.get('id')} {problem}; {MEND}."
        class_ids.add(category.get("id"))
        class_names.add(category.get("name"))

    fields = ANNOTATION_FIELDS + (MASK_FIELDS if masks else [])
    fields += KEYPOINT_FIELDS if keypoints else []
    for o in content.get("annotations", []):
        problem = field_problem(o, fields)
        for name, ids in (("image_id", image_ids), ("category_id", class_ids)):
            if not problem and o.get(name) not in ids:
                problem = f"has {name} {o.get(name)!r}, which is not in the file"
        if problem:
            yield f"{file}: annotation {o.get('id')} {problem}; {MEND}."


def segmentation_problem(segmentation, size):
    """What is wrong with the coordinates of polygons or the runs of an RLE, or None; size: (H, W).

    pycocotools trusts both: it never returns from a polygon with a NaN, and an RLE that is too
    short leaves pixels unset.
    """
    if isinstance(segmentation, list):
        for polygon in segmentation:
            if len(polygon) % 2 or not are_numbers(polygon, len(polygon)):
                return f"has a polygon that is no list of x, y, x, y, ...: {polygon!r:.60}"
        return None
    lengths = run_lengths(segmentation)
    if list(segmentation.get("size", [])) != list(size):
        return f"has an RLE of size {segmentation.get('size')}, not {list(size)}"
    if min(lengths) < 0 or sum(lengths) != math.prod(size):
        return "has an RLE whose runs do not add up to the pixels of the image"
    return None


def run_lengths(rle):
    """The run lengths of an RLE: of background, object, background, ...

    Compressed, each is a little-endian signed number in groups of 5 bits, to which 48 is added, and
    32 where more follow. From the fourth on, it is the difference to the last but one.
    """
    if isinstance(rle["counts"], list):
        return rle["counts"]
    lengths = []
    for number in re.findall("[P-o]*[0-O]", rle["counts"]):  # P..o: more follow; 0..O: the last
        groups = [(ord(character) - 48) & 31 for character in number]
        value = sum(group << 5 * i for i, group in enumerate(groups))
        if groups[-1] & 16:
            value -= 1 << 5 * len(groups)
        lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
    return lengths
