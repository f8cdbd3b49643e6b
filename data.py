"""The data: from the files of COCO or PASCAL VOC to the batches that a detector is trained on.

Everything here yields the same pair, (image, target): the image a uint8 RGB tensor [3, H, W], the
target a dict of plain tensors in the pixels of that image. Nothing here knows about the model.

In reading order: COCO's pairs; subsets and VOC; transforms; sampler and loader, where the route
of the random seed is told. The second half is plumbing, not the paper: worker processes, and how
images and annotations are read and checked.

Coordinates are continuous: pixel (row i, column j) covers the square [j, j + 1] x [i, i + 1], and a
box (x1, y1, x2, y2) has the width x2 - x1 without a "+ 1" (Detectron2's convention).
"""

import contextlib
import io
import itertools
import json
import math
import multiprocessing.queues
import os
import re
import signal
import sys
import threading
import warnings
from xml.etree import ElementTree

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import ops

# ---- The pair (image, target): COCO --------------------------------------------------------------


class CocoDataset(Dataset):
    """Images and objects of a COCO annotation file; dataset[i] -> (image, target) at full size.

    image: uint8 [3, H, W] RGB. target: `image_id` int; `boxes` [N, 4] float32 xyxy in pixels,
    clipped to the image; `labels` [N] int64, where k means classes[k - 1] (0 is background);
    `iscrowd` [N] bool; with masks, `masks` [N, H, W] uint8; with keypoints (of persons, the file's
    only category), `keypoints` [N, 17, 3] float32 (x, y, v).

    training: leave out objects that `is_usable` refuses, and images in which no object (keypoints:
    no labelled keypoint) remains, as Detectron does: 117,266 of train2017's 118,287 images stay.
    keep_empty: keep images without any annotation, as background. subset: keep that many images.

    Attributes: `image_ids`, `widths`, `heights`; `classes`, `category_ids`; `num_objects`,
    `num_dropped` images, `num_without_mask` objects. Raises UserError for what is wrong in a file.
    """

    metric = "coco"

    def __init__(
        self,
        image_dir,
        annotation_file,
        training=False,
        masks=True,
        keypoints=False,
        subset=None,
        keep_empty=False,
    ):
        self.image_dir = os.fspath(image_dir)
        self.annotation_file = os.fspath(annotation_file)
        self.training = training
        self.masks = masks
        self.keypoints = keypoints
        for path in (annotation_file, image_dir):
            if not os.path.exists(path):
                raise UserError(f"{path} does not exist; check folder and split, or {CONVERT}.")
        self._index(subset, keep_empty)

    def _read(self):
        """The data set as the content of a COCO annotation file."""
        return read_coco(self.annotation_file, self.masks, self.keypoints)

    def _index(self, subset, keep_empty):
        """Choose images and objects, and store what `load` needs of them."""
        content = self._read()
        images, annotations = content["images"], content["annotations"]
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.category_ids = [category["id"] for category in categories]
        self.classes = [category["name"] for category in categories]
        self.num_without_mask = 0
        objects = {image["id"]: [] for image in images}
        for annotation in annotations:
            annotation["label"] = self.category_ids.index(annotation["category_id"]) + 1
            objects[annotation["image_id"]].append(annotation)
            self.num_without_mask += annotation.get("segmentation") == []

        records = {}
        for image in sorted(images, key=lambda image: image["id"]):
            size = image["width"], image["height"]
            chosen = objects[image["id"]]
            if self.training and (chosen or not keep_empty):
                chosen = [o for o in chosen if is_usable(o, *size, self.masks)]
                labelled = not self.keypoints or any(any(o["keypoints"][2::3]) for o in chosen)
                if not chosen or not labelled:
                    continue
            record = {"file_name": image["file_name"], "size": size, "objects": chosen}
            records[image["id"]] = record
        if self.masks and self.num_without_mask == len(annotations) > 0:
            raise UserError(f"{self.annotation_file} has no masks; use --no-masks (masks=False).")
        if not records:
            crowds = sum(annotation["iscrowd"] for annotation in annotations)
            raise UserError(
                f"{self.annotation_file} has no image to use: of {len(annotations):,} objects in "
                f"{len(images):,} images, {crowds:,} are crowds and {self.num_without_mask:,} have "
                "no mask; correct it or choose another."
            )
        self.num_dropped = len(objects) - len(records)
        self.image_ids = list(records) if subset is None else choose_subset(records, subset)
        records = [records[image_id] for image_id in self.image_ids]
        self.widths, self.heights = np.array([record["size"] for record in records]).T
        self.num_objects = sum(len(record["objects"]) for record in records)
        # One flat tensor instead of millions of Python objects: workers share its memory, whether
        # spawned or forked (a Python object is copied as soon as its reference count changes).
        records = [json.dumps(record).encode() for record in records]
        self._offsets = torch.tensor([0] + [len(record) for record in records]).cumsum(0)
        self._records = torch.frombuffer(bytearray(b"".join(records)), dtype=torch.uint8)

    def record(self, index):
        """An image's `file_name`, `size` (w, h) and `objects`: annotations with their `label`."""
        start, end = self._offsets[index].item(), self._offsets[index + 1].item()
        return json.loads(self._records[start:end].numpy().tobytes())

    def __len__(self):
        return len(self.image_ids)

    def __getitem__(self, index):
        return self.load(index)

    def load(self, index, min_size=None, max_size=None, flip=False):
        """dataset[index], mirrored if flip, resized to (min_size, max_size) if given."""
        record = self.record(index)
        objects = record["objects"]
        image_id = self.image_ids[index]
        width, height = record["size"]
        old_size = new_size = height, width
        if min_size is not None:
            new_size = resize_shape(height, width, min_size, max_size)

        path = image_path(self.image_dir, record["file_name"], image_id)
        image = read_image(path, width, height, image_id)
        if flip:  # before resizing, where there are fewer pixels to move
            image = image.flip(2)
        image = resize_image(image, *new_size)

        boxes = torch.tensor([o["bbox"] for o in objects], dtype=torch.float64).reshape(-1, 4)
        boxes = ops.clip_boxes_to_image(ops.box_convert(boxes, "xywh", "xyxy"), old_size).float()
        target = {
            "image_id": image_id,
            "boxes": resize_boxes(boxes, old_size, new_size, flip),
            "labels": torch.tensor([o["label"] for o in objects], dtype=torch.int64),
            "iscrowd": torch.tensor([o["iscrowd"] for o in objects], dtype=torch.bool),
        }
        if self.masks:
            masks = np.zeros((len(objects), *new_size), dtype=np.uint8)
            for mask, o in zip(masks, objects):
                paint_segmentation(mask, o["segmentation"], old_size, flip)
            target["masks"] = torch.from_numpy(masks)
        if self.keypoints:
            keypoints = torch.tensor([o["keypoints"] for o in objects], dtype=torch.float32)
            keypoints = keypoints.reshape(-1, len(KEYPOINT_NAMES), 3)
            keypoints[:, :, :2] += 0.5  # from the index of a pixel to its centre
            target["keypoints"] = resize_keypoints(keypoints, old_size, new_size, flip)
        return image, target

    def coco_gt(self):
        """The annotations as a pycocotools COCO object, for COCOeval; read again from the files.

        Their ids are renumbered from 1, because COCOeval takes the id 0 for "no match".
        """
        coco = COCO()
        coco.dataset = self._read()
        for number, annotation in enumerate(coco.dataset["annotations"], start=1):
            annotation["id"] = number
            if annotation.get("segmentation") == []:
                annotation["segmentation"] = [[0] * 6]  # for pycocotools, a polygon without area
            if self.keypoints:
                labelled = sum(v > 0 for v in annotation["keypoints"][2::3])
                annotation.setdefault("num_keypoints", labelled)
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco


def is_usable(annotation, width, height, masks):
    """Whether an object of an image of width x height is trained on.

    It must be no crowd, have a box with an area inside the image and, with masks, a mask. Detectron
    differs (Choice 10): it asks for area > 0 and sides > 1 pixel, and a proposal with IoU >= 0.5 to
    a crowd is foreground of the crowd's class there. Here, as in Detectron2, crowds are no targets.
    """
    x, y, w, h = annotation["bbox"]
    inside_x = min(x + w, width) - max(x, 0)
    inside_y = min(y + h, height) - max(y, 0)
    has_area = min(w, h, inside_x, inside_y) >= 1e-3  # pixels; less would vanish in float32
    has_mask = not masks or annotation["segmentation"] != []
    return has_area and has_mask and not annotation["iscrowd"]


# ---- Subsets of COCO and PASCAL VOC (Sec. 5.2) ---------------------------------------------------


def choose_subset(image_ids, count):
    """`count` of the image ids, in their order: those whose hash (seed 0) is smallest.

    A function of the ids alone, the same on every machine, and nested: the 1k images are among the
    3.5k. Raises UserError if there are fewer.
    """
    chosen = set(sorted(image_ids, key=lambda image_id: hash_of(0, image_id, 0))[:count])
    if len(chosen) < count:
        raise UserError(f"There are {len(chosen):,} images to use, not {count:,}; take fewer.")
    return [image_id for image_id in image_ids if image_id in chosen]


VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
).split()

# The default names of splits are COCO's. For VOC they mean what the paper trains and tests on:
# trainval2007 + train2012, and val2012.
VOC_SPLITS = {
    "train2017": [("VOC2007", "trainval"), ("VOC2012", "train")],
    "val2017": [("VOC2012", "val")],
}


class VocDataset(CocoDataset):
    """PASCAL VOC's devkit as it unpacks; the same pairs as CocoDataset's, boxes only.

    root: the folder with VOC2007/ and VOC2012/. splits: (folder, list of ImageSets/Main), as in
    VOC_SPLITS. "Difficult" objects are crowds here: neither trained on nor counted in the metric.
    An image's id is its name as a number (2008_000002: 2008000002).
    """

    metric = "voc"

    def __init__(self, root, splits, training=False, subset=None, keep_empty=False):
        self.splits = splits
        choice = {"subset": subset, "keep_empty": keep_empty}
        super().__init__(root, root, training, masks=False, **choice)

    def _read(self):
        return read_voc(self.image_dir, self.splits)


def open_split(
    root, split, training=False, masks=True, keypoints=False, subset=None, keep_empty=False
):
    """The data set of a split below the folder `root`, in COCO's layout or VOC's.

    COCO's: annotations/instances_SPLIT.json (keypoints: person_keypoints_...) and SPLIT/. VOC's is
    known by its VOC2012/, possibly inside VOCdevkit/; its splits are VOC_SPLITS and the lists of
    VOC2012. The other arguments are CocoDataset's. Raises UserError for any other layout.
    """
    root = os.fspath(root)
    for devkit in (root, os.path.join(root, "VOCdevkit")):
        if os.path.isdir(os.path.join(devkit, "VOC2012")):
            if masks or keypoints:
                raise UserError(f"{root} has VOC's boxes only; use --no-masks (masks=False).")
            lists = VOC_SPLITS.get(split, [("VOC2012", split)])
            return VocDataset(devkit, lists, training, subset, keep_empty)
    kind = "person_keypoints" if keypoints else "instances"
    annotation_file = os.path.join(root, "annotations", f"{kind}_{split}.json")
    image_dir = os.path.join(root, split)
    return CocoDataset(image_dir, annotation_file, training, masks, keypoints, subset, keep_empty)


def check_classes(dataset, classes, source, advice="correct one of them"):
    """Raise UserError unless the classes of a data set are these; source: where these are from."""
    if dataset.classes != classes:
        apart = sorted(set(dataset.classes) ^ set(classes)) or ["their order"]
        files = f"{dataset.annotation_file} and {source}"
        raise UserError(f"{files} differ in their classes ({', '.join(apart[:8])}); {advice}.")


# ---- Transforms (Sec. 4: shorter side 800, longer at most 1333, horizontal flip) -----------------

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
    """Bilinear resize: uint8 [3, H, W] -> uint8 [3, height, width].

    Antialiased when it shrinks, as Detectron2's PIL does and Detectron's cv2.INTER_LINEAR does not
    (Choice 10). torch is within one grey level of PIL, and takes less than half the time.
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


def paint_segmentation(mask, segmentation, old_size, flip):
    """Paint a COCO segmentation of an image of old_size (H, W) into mask, mirrored if flip.

    mask: a zero uint8 array [h, w], the image at its new size. segmentation: polygons or RLE in
    which `segmentation_problem` finds nothing wrong, for pycocotools trusts what it is given.
    """
    if isinstance(segmentation, list):
        return paint_polygons(mask, segmentation, old_size, flip)
    if isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, *old_size)
    # A target pixel takes the source pixel under its centre ("nearest-exact"), so that every edge
    # stays within half a pixel of where the box's edge goes.
    source = torch.from_numpy(coco_mask.decode(segmentation))
    if flip:
        source = source.flip(1)
    if source.shape != mask.shape:
        source = F.interpolate(source[None, None], size=mask.shape, mode="nearest-exact")[0, 0]
    mask[:] = source.numpy()


def paint_polygons(mask, polygons, old_size, flip):
    """Paint the union of polygons as `paint_segmentation` does.

    Rasterizing at the target's resolution keeps the edges sharp. Only a crop around the object is
    rasterized, for speed: most of an image is not object. The result is the whole image's.
    """
    if not polygons:
        return
    height, width = mask.shape
    scale = width / old_size[1], height / old_size[0]
    points = [np.array(polygon, dtype=np.float64).reshape(-1, 2) * scale for polygon in polygons]
    if flip:
        points = [(width, 0) + polygon * (-1, 1) for polygon in points]
    everything = np.concatenate(points)
    x1, y1 = np.clip(np.floor(everything.min(0)) - 1, 0, (width, height)).astype(int).tolist()
    x2, y2 = np.clip(np.ceil(everything.max(0)) + 1, 0, (width, height)).astype(int).tolist()
    if x1 >= x2 or y1 >= y2:
        return
    # pycocotools rounds to fifths of a pixel; + 1e-9: the shift must not turn a tie the other way.
    parts = [(polygon - (x1, y1) + 1e-9).ravel() for polygon in points]
    rles = coco_mask.frPyObjects(parts, y2 - y1, x2 - x1)
    mask[y1:y2, x1:x2] = coco_mask.decode(coco_mask.merge(rles))


# ---- Sampler and loader --------------------------------------------------------------------------

# The route of the seed: train.py --seed -> BatchSampler -> TrainingSet -> model.py. No generator
# keeps a state: every random choice is a function of the seed, the iteration and the place.
#
#   1) BatchSampler   shuffles each epoch by hash_of(seed, epoch, -1), and gives each image of a
#                     batch its own seed: hash_of(seed, iteration, its position in the whole batch)
#   2) TrainingSet    draws size and flip from the image's seed and passes it on as target["seed"]
#   3) model.py       `sampling_seeds` makes two seeds of it, for the anchors and for the RoIs;
#                     `random_keys` gives every candidate a number by which `sample` chooses
#
# So a resumed run, a shared trunk and any number of workers make the same choices. Another split of
# the batch over GPUs does not: its groups hold other images.


def hash_of(a, b, c):
    """A hash of three integers, in [0, 2**63).

    SplitMix64's mixing function (Steele et al., 2014), applied to one number after the other.
    """
    value = 0
    for number in (a, b, c):
        value = (value + number + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        value ^= value >> 31
    return value >> 1


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
        rng = np.random.default_rng(hash_of(self.seed, epoch, -1))
        for indices in self.orientations:
            count = math.ceil(len(indices) / self.images_per_gpu)
            order = rng.permutation(indices)
            groups.append(np.resize(order, (count, self.images_per_gpu)))  # repeats at the end
        return rng.permutation(np.concatenate(groups))

    def __iter__(self):
        stream = itertools.chain.from_iterable(map(self.epoch_groups, itertools.count()))
        first_group = self.start_iteration * self.world_size + self.rank
        groups = itertools.islice(stream, first_group, None, self.world_size)
        first = self.rank * self.images_per_gpu
        positions = range(first, first + self.images_per_gpu)  # in the whole batch
        for iteration, group in enumerate(groups, start=self.start_iteration):
            seeds = [hash_of(self.seed, iteration, position) for position in positions]
            yield list(zip(group.tolist(), seeds))


class TrainingSet(Dataset):
    """A dataset as it is trained on, a batch at a time, transformed by each image's seed.

    training_set[[(index, seed), ...]] -> (images, targets): a list of uint8 tensors [3, h, w] and a
    list of dicts as in `CocoDataset`, with the seed as target["seed"].

    min_sizes: the shorter side is one of these (Sec. 5.1, scale augmentation: uniform over the
    multiples of 32 from 640 to 800, Choice 4). flip: mirror an image with probability 1/2.
    """

    def __init__(self, dataset, min_sizes=(800,), max_size=1333, flip=True):
        self.dataset = dataset
        self.min_sizes = tuple(min_sizes)
        self.max_size = max_size
        self.flip = flip

    def __getitem__(self, keys):
        images = []
        targets = []
        for index, seed in keys:
            # Hashed once more, so that what else the seed decides is independent of these draws.
            min_size = self.min_sizes[hash_of(seed, 0, 0) % len(self.min_sizes)]
            flip = self.flip and hash_of(seed, 0, 1) % 2 == 1
            image, target = self.dataset.load(index, min_size, self.max_size, flip)
            images.append(image)
            targets.append(target | {"seed": seed})
        return images, targets


def read_ahead(dataset, workers, keys):
    """An iterator over dataset[key] for each of the keys, which `workers` processes compute ahead.

    The memory is pinned where there is CUDA. Raises UserError in this process if a worker cannot
    read an item, or lacks shared memory or file descriptors.
    """
    loader = compute_ahead(dataset, workers, keys, pin=torch.cuda.is_available())
    try:
        yield from loader
    except (OSError, RuntimeError, UserError) as error:
        error.with_traceback(None)  # which would keep the workers alive
        if not workers or isinstance(error, UserError) or str(error).startswith("Caught"):
            raise
        raise UserError(TOO_LITTLE.format(first_line(error))) from error


# ---- Worker processes ----------------------------------------------------------------------------

TOO_LITTLE = (
    "The loading processes have failed ({}); give them more shared memory (docker run "
    "--shm-size=8g) or file descriptors (ulimit -n), or do without them (--workers 0)."
)


class Computed(Dataset):
    """computed[key] is function(key)."""

    def __init__(self, function):
        self.function = function

    def __getitem__(self, key):
        return self.function(key)


def compute_ahead(dataset, workers, keys, pin=False):
    """dataset[key] of each key, in order, computed by `workers` processes.

    Keys are taken two a worker ahead, in this process, and may come from a generator. An item may
    be a whole batch: hence no batch_size.
    """
    settings = {"num_workers": workers, "pin_memory": pin, "worker_init_fn": worker_init}
    return DataLoader(dataset, batch_size=None, sampler=keys, **settings)


def worker_init(_):
    """Prepare a worker process: for `worker_init_fn` of a DataLoader.

    Signals to the whole process group are left to the main process, which shuts down the workers. A
    worker whose main process is gone ends, even if it is waiting for a full pipe.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    multiprocessing.queues.Queue._on_queue_feeder_error = _send_error


def _end_with_parent():
    """End this worker when the main process is gone or sends a SIGTERM, and by no other SIGTERM."""
    parent = multiprocessing.parent_process()
    if sys.platform != "linux":
        parent.join()
    while parent.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, 1)  # seconds
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)


def _send_error(queue, error, item):
    """Send an error in place of a batch that cannot be sent, for which the reader would wait."""
    problem = UserError(TOO_LITTLE.format(first_line(error)))
    queue.put((item[0], ExceptionWrapper((UserError, problem, None), "in a loading process")))


# ---- Reading and checking: images ----------------------------------------------------------------


class UserError(ValueError):
    """An error the user can fix: one sentence that says what is wrong, where, and what to do.

    code: the exit code of a command that ends with it, 1 for bad files or data, 2 for bad use.
    """

    def __init__(self, message, code=1):
        # A DataLoader re-raises a worker's error with its traceback before the message.
        super().__init__(message.rpartition("UserError: ")[2].rstrip())
        self.code = code


def first_line(error):
    """What an exception of a library says, to be put into a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


# Formats that hold photographs. Others stay shut: PIL hands EPS to an interpreter, for one.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")


def image_path(image_dir, file_name, image_id=None):
    """The path of file_name in image_dir; UserError if it leads out of it, even through a link."""
    root = os.path.realpath(image_dir)
    path = os.path.realpath(os.path.join(root, file_name))
    if os.path.commonpath([root, path]) != root:
        raise UserError(f"Image {image_id}: {file_name!r} lies outside {image_dir}; move it there.")
    return path


def read_image(path, width=None, height=None, image_id=None):
    """Read an image file as RGB, uint8 [3, H, W].

    Grey, palette, CMYK and 16-bit images become 8-bit RGB; transparency is ignored. An orientation
    in the file's EXIF data is applied, except when only the image as stored has the annotated width
    and height. UserError if it fits neither way, is missing, damaged, or too large to be decoded.
    """
    where = str(path) if image_id is None else f"{path} (image {image_id})"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # PIL only warns of an image that would take gigabytes: not decoding it is safer.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=IMAGE_FORMATS) as stored:
                image = ImageOps.exif_transpose(stored)
                if width is not None and image.size != (width, height):
                    image = stored
                    if image.size != (width, height):
                        raise ValueError(f"{image.size} pixels, not {(width, height)} as annotated")
                array = np.array(_to_rgb(image))
    except Exception as error:  # a damaged file can make a decoder fail in any way
        problem = f"{where} cannot be used ({first_line(error)})"
        raise UserError(f"{problem}; replace the file or remove its entry.") from None
    return torch.from_numpy(array).permute(2, 0, 1)


def _to_rgb(image):
    """A PIL image of any mode as RGB, 8 bits each."""
    if image.mode.startswith("I"):  # 16 bits; PIL's own conversion would cut them off at 255
        array = np.asarray(image).astype(np.int64)
        if array.min() < 0 or array.max() > 65535:
            raise ValueError("it has more than 16 bits a pixel")
        return Image.fromarray(((array + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("it has floating-point pixels")
    return image.convert("RGB")


# ---- Reading and checking: annotations -----------------------------------------------------------

CONVERT = "convert a data set of another layout with tools/to_coco.py"


def read_coco(file, masks=False, keypoints=False):
    """The content of a COCO annotation file, as `complete_coco` returns it."""
    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream)
    except (OSError, ValueError, RecursionError) as error:
        problem = f"{file} cannot be read as JSON ({first_line(error)})"
        raise UserError(f"{problem}; check the data folder or download it again.") from None
    return complete_coco(content, file, masks, keypoints)


def read_voc(root, splits):
    """Lists and annotations of VOC's devkit in the form of a COCO file, by `complete_coco`."""
    images = []
    annotations = []
    try:
        for folder, split in splits:
            path = os.path.join(root, folder, "ImageSets", "Main", f"{split}.txt")
            with open(path, encoding="utf-8") as file:
                names = file.read().split()
            for name in names:
                path = os.path.join(root, folder, "Annotations", f"{name}.xml")
                tree = ElementTree.parse(path).getroot()
                image = {side: int(tree.findtext(f"size/{side}")) for side in ("width", "height")}
                image["id"] = int(name.replace("_", ""))
                image["file_name"] = f"{folder}/JPEGImages/{name}.jpg"
                images.append(image)
                for entry in tree.iter("object"):
                    ids = {"id": len(annotations) + 1, "image_id": image["id"]}
                    annotations.append(ids | voc_object(entry))
    except (OSError, ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
        problem = f"{path} is no file of VOC's devkit ({first_line(error)})"
        raise UserError(f"{problem}; unpack it whole, or {CONVERT}.") from None
    categories = [{"id": k, "name": name} for k, name in enumerate(VOC_CLASSES, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return complete_coco(content, root)


def voc_object(entry):
    """An <object> of VOC's XML as a COCO annotation, with the field "difficult" besides."""
    sides = ("xmin", "ymin", "xmax", "ymax")
    x1, y1, x2, y2 = (float(entry.findtext(f"bndbox/{side}")) for side in sides)
    x1, y1 = x1 - 1, y1 - 1  # VOC counts pixels from 1 and includes the last one
    difficult = int(entry.findtext("difficult", "0").strip() == "1")
    return {
        "category_id": VOC_CLASSES.index(entry.findtext("name").strip()) + 1,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "iscrowd": difficult,
        "difficult": difficult,
    }


def complete_coco(content, file, masks=False, keypoints=False):
    """Check the content of a COCO annotation file and return it with what it may leave out.

    A file without "annotations" (COCO's test splits) is one without objects. "iscrowd" is 0 and
    "area" that of the box. Polygons of fewer than three points are left out, as in Detectron2, and
    a segmentation that covers nothing becomes [].
    """
    for problem in coco_problems(content, file, masks, keypoints):
        raise UserError(problem)
    content = {"info": {}, "annotations": []} | content
    for annotation in content["annotations"]:
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
        shape = annotation.pop("segmentation", [])
        if masks and isinstance(shape, list):
            annotation["segmentation"] = [polygon for polygon in shape if len(polygon) >= 6]
        elif masks:
            annotation["segmentation"] = shape if any(run_lengths(shape)[1::2]) else []
    return content


MAX_SIDE = 65_535  # pixels; beyond it, pycocotools' integers overflow


def _is_id(value):
    """Whether a JSON value is an integer that numpy can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_text(value):
    """Whether a JSON value can be printed: JSON can spell null bytes and lone surrogates."""
    return isinstance(value, str) and not re.search("[\0\ud800-\udfff]", value)


def _are_numbers(values, count=None, most=100_000):
    """Whether a JSON value is a list of (count) numbers that can be pixels of an image."""
    if not isinstance(values, list) or count not in (None, len(values)):
        return False
    return all(isinstance(value, (int, float)) and -most < value < most for value in values)


# What the entries of COCO's lists must hold: (kind of entry, field, in words, a test).
COCO_LISTS = {"image": "images", "category": "categories", "annotation": "annotations"}
COCO_FIELDS = [
    ("image", "id", "an integer of 64 bits", _is_id),
    ("image", "file_name", "text", _is_text),
    ("image", "width", "a positive integer", lambda v: _is_id(v) and 0 < v <= MAX_SIDE),
    ("image", "height", "a positive integer", lambda v: _is_id(v) and 0 < v <= MAX_SIDE),
    ("category", "id", "an integer of 64 bits", _is_id),
    ("category", "name", "text", _is_text),
    ("annotation", "id", "an integer of 64 bits", _is_id),
    ("annotation", "image_id", "the id of an image", _is_id),
    ("annotation", "category_id", "the id of a category", _is_id),
    ("annotation", "bbox", "4 numbers x, y, w, h", lambda v: _are_numbers(v, 4)),
    ("annotation", "iscrowd", "0 or 1", lambda v: v in (0, 1)),
    ("annotation", "area", "a number", lambda v: _are_numbers([v], 1, 1e15)),
]
OPTIONAL = {"iscrowd": 0, "area": 0}


def coco_problems(content, file, masks=False, keypoints=False):
    """Yield a sentence for everything that makes parsed JSON unusable as a COCO annotation file.

    masks, keypoints: whether they are used. What is checked here is not checked again.
    """
    if not isinstance(content, dict) or not {"images", "categories"} <= content.keys():
        yield f'{file} is not a COCO annotation file: it needs "images" and "categories".'
        return
    known = {kind: {} for kind in COCO_LISTS}  # sound entries by id
    for kind, key in COCO_LISTS.items():
        entries = content.get(key, [])
        if not isinstance(entries, list):
            yield f'{file} has no list of entries as "{key}"; correct the file.'
            return
        for entry in entries:
            entry = entry if isinstance(entry, dict) else {}
            problem = _entry_problem(kind, entry, known, masks, keypoints)
            if problem is None:
                known[kind][entry["id"]] = entry
                continue
            of_image = f" of image {entry.get('image_id')!r:.30}" if kind == "annotation" else ""
            name = f"{kind} {entry.get('id')!r:.30}{of_image}"
            yield f"{file}: {name} {problem}; correct the file."


def _entry_problem(kind, entry, known, masks, keypoints):
    """What is wrong with an entry of one of COCO's three lists, or None."""
    for owner, field, expected, test in COCO_FIELDS:
        if owner == kind and not test(entry.get(field, OPTIONAL.get(field))):
            return f'must have {expected} as "{field}", not {entry.get(field)!r:.60}'
    if entry["id"] in known[kind]:
        return "appears twice"
    if kind == "category":
        if entry["name"] in [category["name"] for category in known["category"].values()]:
            return f"has the name of another, {entry['name']!r}"
        names = entry.get("keypoints", KEYPOINT_NAMES)
        if keypoints and (entry["name"] != "person" or names != KEYPOINT_NAMES):
            return 'is not "person" with the 17 keypoints of COCO'
    if kind != "annotation":
        return None
    for other in ("image", "category"):
        if entry[f"{other}_id"] not in known[other]:
            return f"has {other}_id {entry[f'{other}_id']}, which is not in the file"
    points = entry.get("keypoints")
    if keypoints and not (_are_numbers(points, 51) and set(points[2::3]) <= {0, 1, 2}):
        return 'must have 17 times x, y, v as "keypoints", v being 0, 1 or 2'
    image = known["image"][entry["image_id"]]
    return segmentation_problem(entry.get("segmentation", []), image) if masks else None


def segmentation_problem(segmentation, image):
    """What is wrong with a COCO segmentation in an image (an entry of the file), or None.

    Checked with care: pycocotools writes out of bounds where an RLE does not fit its image.
    """
    if isinstance(segmentation, list):
        sound = all(_are_numbers(polygon) and len(polygon) % 2 == 0 for polygon in segmentation)
        return None if sound else "has a malformed polygon"
    size = [image["height"], image["width"]]
    if not isinstance(segmentation, dict) or segmentation.get("size") != size:
        return f"has a segmentation that is neither polygons nor an RLE of size {size}"
    counts = run_lengths(segmentation)
    if not counts or min(counts) < 0 or sum(counts) != math.prod(size):
        return "has an RLE whose counts do not add up to the pixels of the image"
    return None


def run_lengths(rle):
    """The run lengths of an RLE, of background, object, background, ...; [] for no RLE.

    Compressed, each is a little-endian signed number in groups of 5 bits, to which 48 is added, and
    32 where more follow. From the fourth on, it is the difference to the last but one.
    """
    counts = rle.get("counts")
    if isinstance(counts, list):
        return counts if all(map(_is_id, counts)) else []
    if not isinstance(counts, str) or not re.fullmatch("([P-o]{0,6}[0-O])*", counts):
        return []
    lengths = []
    for number in re.findall("[P-o]*[0-O]", counts):
        groups = [(ord(character) - 48) & 31 for character in number]
        value = sum(group << 5 * i for i, group in enumerate(groups))
        if groups[-1] & 16:
            value -= 1 << 5 * len(groups)
        lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
    return lengths
