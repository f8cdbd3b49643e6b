"""The data: from the files of COCO or PASCAL VOC to the batches that a detector is trained on.

Everything here yields the same pair, (image, target): the image a uint8 RGB tensor [3, H, W], the
target a dict of plain tensors in the pixels of that image. Nothing here knows about the model.

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
import signal
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

# --------------------------------------------------------------------------------------------------
# The pair (image, target): COCO
# --------------------------------------------------------------------------------------------------


class CocoDataset(Dataset):
    """Images and objects of a COCO annotation file; dataset[i] -> (image, target) at full size.

    image: uint8 [3, H, W] RGB. target: `image_id` int; `boxes` [N, 4] float32 xyxy in pixels,
    clipped to the image; `labels` [N] int64, where k means classes[k - 1] (0 is background);
    `iscrowd` [N] bool; with masks, `masks` [N, H, W] uint8; with keypoints, `keypoints` [N, 17, 3]
    float32 (x, y, v). COCO's keypoints are indices of pixels: half a pixel makes them coordinates.

    training: leave out objects that `is_usable` refuses, and images in which no object (keypoints:
    no labelled keypoint) remains, as Detectron does: 117,266 of train2017's 118,287 images stay.
    keep_empty: keep images that have no annotation at all, as background.
    keypoints: the category "person" only.
    subset: keep that many images only (Sec. 5.2), see `choose_subset`.

    Attributes: `image_ids`, `widths` and `heights` of the images; `classes` and `category_ids` of
    labels 1, 2, ...; `num_objects`; `num_dropped` images left out; `num_without_mask` objects whose
    segmentation covers nothing.

    Raises UserError for every problem in the annotation file here, and in an image at dataset[i].
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
        for path in (self.annotation_file, self.image_dir):
            if not os.path.exists(path):
                raise UserError(
                    f"{path} does not exist; check the data folder and the name of the split, or "
                    "convert a data set of another layout with tools/to_coco.py."
                )
        self._index(subset, keep_empty)

    def _content(self):
        """The data set as the content of a COCO annotation file, checked."""
        return read_coco(self.annotation_file, self.masks, self.keypoints)

    def _index(self, subset, keep_empty):
        """Choose the images and objects, and store what `load` needs of them."""
        content = self._content()
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.category_ids = [category["id"] for category in categories]
        self.classes = [category["name"] for category in categories]
        labels = {category_id: k for k, category_id in enumerate(self.category_ids, start=1)}

        annotations = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            annotations[annotation["image_id"]].append(annotation)

        records = {}
        for image in sorted(content["images"], key=lambda image: image["id"]):
            width, height = image["width"], image["height"]
            objects = annotations[image["id"]]
            if self.training and not (keep_empty and not objects):
                objects = [o for o in objects if is_usable(o, width, height, self.masks)]
                labelled = not self.keypoints or any(any(o["keypoints"][2::3]) for o in objects)
                if not objects or not labelled:
                    continue
            objects = [self._stored(o, labels[o["category_id"]]) for o in objects]
            file_name = image["file_name"]
            records[image["id"]] = {
                "file_name": file_name,
                "size": (width, height),
                "objects": objects,
            }
        if not records:
            purpose = " to train on" if self.training else ""
            raise UserError(f"{self.annotation_file} has no image{purpose}; choose another file.")
        self.num_dropped = len(content["images"]) - len(records)
        self.num_without_mask = 0
        if self.masks:
            self.num_without_mask = sum(not o["segmentation"] for o in content["annotations"])

        self.image_ids = list(records) if subset is None else choose_subset(records, subset)
        records = [records[image_id] for image_id in self.image_ids]
        self.widths, self.heights = np.array([record["size"] for record in records]).T
        self.num_objects = sum(len(record["objects"]) for record in records)
        # One flat tensor instead of millions of Python objects: workers share its memory, whether
        # spawned or forked (a Python object is copied as soon as its reference count changes).
        records = [json.dumps(record).encode() for record in records]
        self._offsets = torch.tensor([0] + [len(record) for record in records]).cumsum(0)
        self._records = torch.frombuffer(bytearray(b"".join(records)), dtype=torch.uint8)

    def _stored(self, annotation, label):
        """What is kept of an annotation."""
        names = ["id", "bbox", "iscrowd"]
        names += ["segmentation"] * self.masks + ["keypoints"] * self.keypoints
        return {"label": label} | {name: annotation[name] for name in names}

    def record(self, index):
        """What is annotated of an image: a dict of `file_name`, `size` (w, h) and `objects`.

        An object is a dict of COCO's `id`, `bbox` (x, y, w, h), `iscrowd`, `segmentation` and
        `keypoints`, and of its `label`.
        """
        start, end = self._offsets[index : index + 2].tolist()
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
        old_size = height, width
        new_size = old_size if min_size is None else resize_shape(*old_size, min_size, max_size)

        path = image_path(self.image_dir, record["file_name"], image_id)
        image = read_image(path, width, height, image_id)
        if flip:  # before resizing, where there are fewer pixels to move
            image = image.flip(2)
        image = resize_image(image, *new_size)

        boxes = to_xyxy([o["bbox"] for o in objects], width, height)
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
            keypoints[:, :, :2] += 0.5
            target["keypoints"] = resize_keypoints(keypoints, old_size, new_size, flip)
        return image, target

    def coco_gt(self):
        """The annotations as a pycocotools COCO object, for COCOeval; read again from the files.

        Their ids are renumbered from 1, because COCOeval takes the id 0 for "no match". Masks that
        training leaves out are empty, and "num_keypoints" is counted where the file lacks it.
        """
        coco = COCO()
        coco.dataset = self._content()
        sizes = {image["id"]: (image["height"], image["width"]) for image in coco.dataset["images"]}
        for number, annotation in enumerate(coco.dataset["annotations"], start=1):
            annotation["id"] = number
            if self.masks and not annotation["segmentation"]:
                height, width = sizes[annotation["image_id"]]
                annotation["segmentation"] = {"size": [height, width], "counts": [height * width]}
            if self.keypoints:
                labelled = sum(v > 0 for v in annotation["keypoints"][2::3])
                annotation.setdefault("num_keypoints", labelled)
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco


def is_usable(annotation, width, height, masks):
    """Whether an object of an image of width x height is trained on.

    It must be no crowd, have a box with an area inside the image and, with masks, a mask. Detectron
    differs: it asks for area > 0 and sides > 1 pixel, and a proposal with IoU >= 0.5 to a crowd is
    foreground of the crowd's class there. Here, as in Detectron2, crowds are no targets.
    """
    x, y, w, h = annotation["bbox"]
    inside_x = min(x + w, width) - max(x, 0)
    inside_y = min(y + h, height) - max(y, 0)
    least = 1e-3  # pixels; less would vanish in float32
    if annotation["iscrowd"] or min(w, h, inside_x, inside_y) < least:
        return False
    return not masks or bool(annotation["segmentation"])


def to_xyxy(boxes, width, height):
    """COCO's boxes (x, y, w, h) -> float32 [N, 4] (x1, y1, x2, y2), clipped to the image."""
    boxes = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes[:, 0::2] = boxes[:, 0::2].clamp(0, width)
    boxes[:, 1::2] = boxes[:, 1::2].clamp(0, height)
    return boxes.float()


# --------------------------------------------------------------------------------------------------
# PASCAL VOC and subsets of COCO (Sec. 5.2), a data set by its folder
# --------------------------------------------------------------------------------------------------

VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
).split()

# The paper trains on trainval2007 + train2012 and tests on val2012.
VOC_SPLITS = {
    "train2017": [("VOC2007", "trainval"), ("VOC2012", "train")],
    "val2017": [("VOC2012", "val")],
}


class VocDataset(CocoDataset):
    """PASCAL VOC's devkit as it unpacks; the same pairs as CocoDataset's, boxes only.

    root: the folder with VOC2007/ and VOC2012/, or with VOCdevkit/. splits: (folder, list of
    ImageSets/Main), as in VOC_SPLITS. "Difficult" objects are crowds here: they are not trained on,
    and count for nothing in the evaluation, as VOC's protocol has it. An image's id is its name as
    a number (2008_000002: 2008000002).
    """

    metric = "voc"

    def __init__(self, root, splits, training=False, subset=None, keep_empty=False):
        root = os.fspath(root)
        devkit = os.path.join(root, "VOCdevkit")
        self.image_dir = self.annotation_file = devkit if os.path.isdir(devkit) else root
        self.splits = splits
        self.training = training
        self.masks = self.keypoints = False
        self._index(subset, keep_empty)

    def _content(self):
        return read_voc(self.image_dir, self.splits)


def open_split(
    root, split, training=False, masks=True, keypoints=False, subset=None, keep_empty=False
):
    """The data set of a split (such as "train2017") below the folder `root`.

    COCO's layout: annotations/instances_train2017.json (keypoints: person_keypoints_...) and
    train2017/. VOC's devkit is known by its VOC2012/: "train2017" and "val2017" are the lists in
    VOC_SPLITS. Other arguments as of CocoDataset. Raises UserError for any other layout.
    """
    root = os.fspath(root)
    if not os.path.isdir(root):
        raise UserError(f"The data folder {root!r} does not exist; check --data.")
    if any(os.path.isdir(os.path.join(root, folder)) for folder in ("VOCdevkit", "VOC2012")):
        if masks or keypoints:
            raise UserError(
                f"{root} is a VOC devkit, which has boxes only; use a recipe with masks=False and "
                "without keypoints, such as r101-gn-voc."
            )
        if split not in VOC_SPLITS:
            raise UserError(f"{root} is a VOC devkit; its splits are {' and '.join(VOC_SPLITS)}.")
        return VocDataset(root, VOC_SPLITS[split], training, subset, keep_empty)
    kind = "person_keypoints" if keypoints else "instances"
    annotation_file = os.path.join(root, "annotations", f"{kind}_{split}.json")
    image_dir = os.path.join(root, split)
    return CocoDataset(image_dir, annotation_file, training, masks, keypoints, subset, keep_empty)


def check_same_classes(train_set, val_set):
    """Raise UserError if a model trained on train_set would mistake the classes of val_set."""
    if train_set.classes != val_set.classes:
        differences = sorted(set(train_set.classes) ^ set(val_set.classes))
        difference = ", ".join(differences[:8]) or "the order of their ids"
        raise UserError(
            f"{train_set.annotation_file} and {val_set.annotation_file} differ in their classes "
            f"({difference}); correct one of them."
        )


def choose_subset(image_ids, count):
    """`count` of the image ids, in their order: those whose hash (seed 0) is smallest.

    A function of the ids alone, the same on every machine, and nested: the 1k images are among the
    3.5k. Raises UserError if there are fewer.
    """
    image_ids = list(image_ids)
    if len(image_ids) < count:
        raise UserError(
            f"A subset of {count:,} images is asked for, but there are {len(image_ids):,} with "
            "usable objects; choose a smaller one."
        )
    chosen = set(sorted(image_ids, key=lambda image_id: image_seed(0, image_id, 0))[:count])
    return [image_id for image_id in image_ids if image_id in chosen]


def average_sample(dataset, min_sizes, max_size):
    """What Figure 2 counts: objects an image, and pixels of an image as the loader makes it."""
    pixels = [
        math.prod(resize_shape(height, width, min_size, max_size))
        for height, width in zip(dataset.heights.tolist(), dataset.widths.tolist())
        for min_size in min_sizes
    ]
    return dataset.num_objects / len(dataset), sum(pixels) / len(pixels)


# --------------------------------------------------------------------------------------------------
# Transforms (Sec. 4, "Hyper-parameters": shorter side 800, longer at most 1333, horizontal flip)
# --------------------------------------------------------------------------------------------------

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

    Antialiased when it shrinks, as Detectron2's PIL does and Detectron's cv2.INTER_LINEAR does not.
    torch does this on bytes within one grey level of PIL, and in less than half the time.
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

    mask: a zero uint8 array [h, w], the image at its new size. segmentation: polygons or RLE that
    `segmentation_problem` has found to be sound, for pycocotools trusts what it is given.
    """
    if isinstance(segmentation, list):
        polygons = [np.array(polygon, dtype=np.float64) for polygon in segmentation]
        scale_y = mask.shape[0] / old_size[0]
        scale_x = mask.shape[1] / old_size[1]
        paint_polygons(mask, polygons, scale_x, scale_y, flip)
        return
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


def paint_polygons(mask, polygons, scale_x, scale_y, flip):
    """Paint the union of polygons into mask (a zero uint8 array [h, w]), scaled and mirrored first.

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


# --------------------------------------------------------------------------------------------------
# Sampler and loader
# --------------------------------------------------------------------------------------------------

# The route of the seed. Every random choice about an image is a function of
#
#   image_seed(the run's seed, iteration, position of the image in the whole batch)
#
# and never the state of a generator. `BatchSampler` computes this number, `TrainingSet` draws the
# image's size and flip from it and hands it on as target["seed"], and the model draws the anchors
# and RoIs that count in the losses from that (model.py `sample`). So a run that is resumed, a trunk
# that is shared, any number of workers and any split of the batch over GPUs see the same choices.


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


class BatchSampler(Sampler):
    """Yields without end this process's share of each batch: [(index, image seed), ...].

    Images form groups of images_per_gpu of one orientation (w >= h or not: less padding), as in
    Detectron, new ones every epoch. An epoch shows every image once; an orientation's last group is
    topped up with images from its first. The groups of all epochs are one stream, of which every
    iteration takes the next world_size groups, one for each rank.
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
        rng = np.random.default_rng(image_seed(self.seed, epoch, -1))
        for indices in self.orientations:
            count = math.ceil(len(indices) / self.images_per_gpu)
            order = rng.permutation(indices)
            groups.append(np.resize(order, (count, self.images_per_gpu)))  # repeats at the end
        return rng.permutation(np.concatenate(groups))

    def __iter__(self):
        groups_per_epoch = len(self.epoch_groups(0))
        known_epoch = None
        for iteration in itertools.count(self.start_iteration):
            epoch, place = divmod(iteration * self.world_size + self.rank, groups_per_epoch)
            if epoch != known_epoch:
                groups = self.epoch_groups(epoch)
                known_epoch = epoch
            first = self.rank * self.images_per_gpu
            yield [
                (index, image_seed(self.seed, iteration, first + j))
                for j, index in enumerate(groups[place].tolist())
            ]


class TrainingSet(Dataset):
    """A dataset as it is trained on, a batch at a time, transformed by each image's seed.

    training_set[[(index, seed), ...]] -> (images, targets): a list of uint8 tensors [3, h, w] and a
    list of dicts as of `CocoDataset`, with the seed as target["seed"].

    min_sizes: the shorter side is one of these (Sec. 5.1, scale augmentation: uniform over the
    multiples of 32 from 640 to 800, as in Detectron). flip: mirror every second image, by chance.
    """

    def __init__(self, dataset, min_sizes=(800,), max_size=1333, flip=True):
        self.dataset = dataset
        self.min_sizes = tuple(min_sizes)
        self.max_size = max_size
        self.flip = flip

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, keys):
        images, targets = zip(*(self.load(index, seed) for index, seed in keys))
        return list(images), list(targets)

    def load(self, index, seed):
        """One image of the batch and its target."""
        # Hashed once more, so that whatever else the seed decides is independent of these draws.
        min_size = self.min_sizes[image_seed(seed, 0, 0) % len(self.min_sizes)]
        flip = self.flip and image_seed(seed, 0, 1) % 2 == 1
        image, target = self.dataset.load(index, min_size, self.max_size, flip)
        target["seed"] = seed
        return image, target


def training_loader(
    dataset,
    images_per_gpu,
    seed=0,
    rank=0,
    world_size=1,
    workers=2,
    start_iteration=0,
    min_sizes=(800,),
    max_size=1333,
    flip=True,
    start_method=None,
):
    """An endless iterator over this process's batches (images, targets), as of `TrainingSet`.

    Images are decoded ahead by `workers` processes, whose start_method is "fork", "spawn" or None,
    the system's. The memory is pinned where there is CUDA.
    """
    return read_ahead(
        TrainingSet(dataset, min_sizes, max_size, flip),
        workers,
        BatchSampler(dataset, images_per_gpu, seed, rank, world_size, start_iteration),
        start_method,
    )


def read_ahead(dataset, workers, sampler=None, start_method=None):
    """An iterator over dataset[key] for each key of the sampler (without one: 0, 1, 2, ...).

    Raises UserError, in this process, for what a worker could not read, and where the system gives
    too little for the workers.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context=start_method if workers else None,
        worker_init_fn=worker_init if workers else None,
    )
    try:
        yield from loader
    except (OSError, RuntimeError, UserError) as error:
        error.with_traceback(None)  # which would keep the workers alive
        if not workers or isinstance(error, UserError) or str(error).startswith("Caught"):
            raise
        raise UserError(f"The loading processes failed ({first_line(error)}); {NEEDED}.") from error


NEEDED = (
    "give them more shared memory (docker run --shm-size=8g) or file descriptors (ulimit -n), or "
    "load without them (--workers 0)"
)


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def worker_init(_):
    """Prepare a worker process: for `worker_init_fn` of a DataLoader.

    Signals that reach the whole group of processes are the main process's to answer: it ends the
    workers in order. A worker whose main process is gone ends, even if it waits for a full pipe.
    """
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # on Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    multiprocessing.queues.Queue._on_queue_feeder_error = _send_error


def _end_with_parent():
    """End this worker when the main process is gone or sends a SIGTERM, and by no other SIGTERM."""
    parent = multiprocessing.parent_process()
    if not hasattr(signal, "sigtimedwait"):
        parent.join()
    while parent.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, 1)  # seconds
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)


def _send_error(queue, error, item):
    """Send an error in place of a batch that cannot be sent, for which the reader would wait."""
    message = f"A loading process cannot hand over its images ({first_line(error)}); {NEEDED}."
    sent = ExceptionWrapper((UserError, UserError(message), None), "in a loading process")
    queue.put((item[0], sent))


# --------------------------------------------------------------------------------------------------
# Reading and checking: images
# --------------------------------------------------------------------------------------------------


class UserError(ValueError):
    """What the user can mend: one sentence that says what is wrong, where, and what to do.

    code: the exit code of a command that ends with it, 1 for bad files or data, 2 for bad use.
    """

    def __init__(self, message, code=1):
        # A DataLoader raises a worker's error again, the worker's traceback before its sentence.
        super().__init__(message.rpartition("UserError: ")[2].rstrip())
        self.code = code


# Formats that hold photographs. Others stay shut: PIL hands EPS to an interpreter, for one.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
EXIF_ORIENTATION = 0x0112


def image_path(image_dir, file_name, image_id=None):
    """The path of file_name in image_dir; UserError if it leaves that folder, be it by a link."""
    root = os.path.realpath(image_dir)
    try:
        path = os.path.realpath(os.path.join(root, file_name))
        inside = os.path.commonpath([root, path]) == root
    except ValueError:  # a null byte, or another drive
        inside = False
    if not inside:
        raise UserError(
            f"Image {image_id}: the file name {file_name!r} leads out of {image_dir}; image files "
            "must lie in that folder."
        )
    return path


def read_image(path, width=None, height=None, image_id=None):
    """Read an image file as RGB, uint8 [3, H, W].

    Grey, palette, CMYK and 16-bit images become 8-bit RGB; transparency is ignored. An orientation
    in the file's EXIF data is applied, except when only the image as stored has the annotated width
    and height. UserError if it fits neither way, is missing, damaged, or too large to be decoded.
    """
    where = f"{path} (image {image_id})" if image_id is not None else str(path)
    if not os.path.isfile(path):
        raise UserError(f"{where} does not exist; check the image folder.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # PIL only warns of an image that would take gigabytes: not decoding it is safer.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                image = _orient(image, width, height, where)
                array = np.array(_to_rgb(image, where))
    except UserError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = Image.MAX_IMAGE_PIXELS
        raise UserError(f"{where} has more than {limit} pixels; shrink or remove it.") from None
    except Exception as error:  # a damaged file can make a decoder fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{where} cannot be read as an image ({reason}); replace or remove it."
        ) from None
    return torch.from_numpy(array).permute(2, 0, 1)


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
    raise UserError(
        f"{where} is {image.size[0]}x{image.size[1]} pixels but annotated as {width}x{height}; "
        "correct the annotation or the file."
    )


def _to_rgb(image, where):
    """A PIL image of any mode as RGB, 8 bits each."""
    if image.mode.startswith("I"):  # 16 bits; PIL's own conversion would cut them off at 255
        array = np.asarray(image).astype(np.int64)
        if array.min() < 0 or array.max() > 65535:
            raise UserError(f"{where} has more than 16 bits a pixel; convert it to 8 bits.")
        return Image.fromarray(((array + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UserError(f"{where} has floating-point pixels; convert it to 8 bits.")
    return image.convert("RGB")


# --------------------------------------------------------------------------------------------------
# Reading and checking: annotations
# --------------------------------------------------------------------------------------------------

MAX_SIDE = 65_535  # pixels; beyond it, pycocotools' integers overflow
MAX_COORDINATE = 100_000


def _is_id(value, known=None):
    """Whether a JSON value is an integer that numpy can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_text(value, known):
    """Whether a JSON value is text that can be printed: JSON can spell lone surrogates."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _is_side(value, known):
    return _is_id(value) and 0 < value <= MAX_SIDE


def _are_coordinates(values, count=None):
    """Whether a JSON value is a list of (count) numbers that can be coordinates in an image."""
    if not isinstance(values, list) or (count is not None and len(values) != count):
        return False
    try:
        array = np.array(values)
    except ValueError:  # lists of different lengths
        return False
    if array.ndim != 1 or array.dtype.kind not in "if":
        return False
    return bool((np.abs(array.astype(np.float64)) < MAX_COORDINATE).all())  # False for NaN


# The fields of COCO's lists: field -> (what it must be, a test of its value). The tests see the ids
# known so far, too.
COCO_FIELDS = {
    "images": {
        "id": ("an integer of 64 bits", _is_id),
        "file_name": ("text", _is_text),
        "width": ("a positive integer", _is_side),
        "height": ("a positive integer", _is_side),
    },
    "categories": {
        "id": ("an integer of 64 bits", _is_id),
        "name": ("text", _is_text),
    },
    "annotations": {
        "id": ("an integer of 64 bits", _is_id),
        "image_id": ("an image of the file", lambda v, known: _is_id(v) and v in known["images"]),
        "category_id": (
            "a category of the file",
            lambda v, known: _is_id(v) and v in known["categories"],
        ),
        "bbox": ("4 numbers x, y, width, height", lambda v, known: _are_coordinates(v, 4)),
        "iscrowd": ("0 or 1", lambda v, known: v in (0, 1)),
        "area": ("a number", lambda v, known: isinstance(v, (int, float)) and abs(v) < 1e15),
    },
}
OPTIONAL = ("iscrowd", "area")
SINGULAR = {"images": "image", "categories": "category", "annotations": "annotation"}


def coco_problems(content, file, masks=False, keypoints=False):
    """Yield a sentence for everything that makes parsed JSON unusable as a COCO annotation file.

    masks, keypoints: whether segmentations and keypoints are to be used. What is checked here need
    not be checked again: pycocotools trusts what it is given.
    """
    if not isinstance(content, dict) or "images" not in content or "categories" not in content:
        yield f'{file} is not a COCO annotation file ("images" or "categories" is missing).'
        return
    known = {}  # by list and id: the entry, or None for a malformed one
    for key, fields in COCO_FIELDS.items():
        known[key] = {}
        entries = content.get(key, [])
        if not isinstance(entries, list):
            yield f'{file} has something else than a list as "{key}"; correct the file.'
            return
        for entry in entries:
            problem = _field_problem(entry, fields, known)
            if problem is None and entry["id"] in known[key]:
                problem = "appears twice"
            if problem is None and key == "annotations":
                problem = _shape_problem(entry, known, masks, keypoints)
            entry_id = entry.get("id") if isinstance(entry, dict) else None
            if _is_id(entry_id):
                known[key][entry_id] = entry if problem is None else None
            if problem is not None:
                of_image = (
                    f" of image {entry.get('image_id')!r:.30}" if key == "annotations" else ""
                )
                name = f"{SINGULAR[key]} {entry_id!r:.30}{of_image}"
                yield f"{file}: {name} {problem}; correct the file."
        if key == "categories":
            yield from _category_problems(known["categories"].values(), file, keypoints)


def _category_problems(categories, file, keypoints):
    """Yield what is wrong with all categories together."""
    categories = [category for category in categories if category is not None]
    names = [category["name"] for category in categories]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"{file} has two categories with the name {name!r}; rename one of them."
    if keypoints:
        persons = [category for category in categories if category["name"] == "person"]
        if [person.get("keypoints", KEYPOINT_NAMES) for person in persons] != [KEYPOINT_NAMES]:
            yield f'{file} has no category "person" with COCO\'s 17 keypoints; choose another file.'


def _field_problem(entry, fields, known):
    """What is wrong with an entry of one of COCO's lists, or None."""
    if not isinstance(entry, dict):
        return "is no object with fields"
    for field, (expected, test) in fields.items():
        if field in OPTIONAL and field not in entry:
            continue
        if not test(entry.get(field), known):
            return f'must have {expected} as "{field}", not {entry.get(field)!r:.60}'
    return None


def _shape_problem(annotation, known, masks, keypoints):
    """What is wrong with the segmentation or the keypoints of an annotation, or None."""
    image = known["images"][annotation["image_id"]]
    category = known["categories"][annotation["category_id"]]
    if image is None or category is None or (keypoints and category["name"] != "person"):
        return None
    if keypoints:
        values = annotation.get("keypoints")
        if not _are_coordinates(values, 51) or not set(values[2::3]) <= {0, 1, 2}:
            return 'must have 17 times x, y, v as "keypoints", v being 0, 1 or 2'
    if masks:
        return segmentation_problem(annotation.get("segmentation", []), image)
    return None


def segmentation_problem(segmentation, image):
    """What is wrong with a COCO segmentation in an image (an entry of the file), or None.

    Checked with care: pycocotools writes out of bounds where an RLE does not fit its image.
    """
    if isinstance(segmentation, list):
        if all(_are_coordinates(polygon) and len(polygon) % 2 == 0 for polygon in segmentation):
            return None
        return "has a malformed polygon"
    size = [image["height"], image["width"]]
    if not isinstance(segmentation, dict) or segmentation.get("size") != size:
        return f"has a segmentation that is neither polygons nor an RLE of size {size}"
    counts = _run_lengths(segmentation)
    if not counts or min(counts) < 0 or sum(counts) != math.prod(size):
        return "has an RLE whose counts do not add up to the pixels of the image"
    return None


def _run_lengths(rle):
    """The run lengths of an RLE: of background, object, background, ...; None for no RLE.

    In compressed form each is a little-endian signed number in groups of 5 bits, a sixth bit saying
    that more follows, 48 added to make it printable; from the fourth on, it is the difference to
    the last but one.
    """
    text = rle.get("counts")
    if isinstance(text, list):
        return text if all(map(_is_id, text)) else None
    if not isinstance(text, str):
        return None
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


def _without_slivers(segmentation):
    """A sound segmentation without what covers nothing; [] if nothing is left.

    Polygons of fewer than three points have no area, as in Detectron2.
    """
    if isinstance(segmentation, list):
        return [polygon for polygon in segmentation if len(polygon) >= 6]
    return segmentation if any(_run_lengths(segmentation)[1::2]) else []


def complete_coco(content, file, masks=False, keypoints=False):
    """Check the content of a COCO annotation file and return it with what it may leave out.

    A file without "annotations" (COCO's test splits) is one without objects. "iscrowd" is 0 and
    "area" that of the box. Segmentations that cover nothing become []. keypoints: only the category
    "person" is kept. Raises UserError for the first of `coco_problems`.
    """
    for problem in coco_problems(content, file, masks, keypoints):
        raise UserError(problem)
    annotations = content.get("annotations", [])
    categories = content["categories"]
    if keypoints:
        categories = [category for category in categories if category["name"] == "person"]
        annotations = [a for a in annotations if a["category_id"] == categories[0]["id"]]
    for annotation in annotations:
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
        if masks:
            annotation["segmentation"] = _without_slivers(annotation.get("segmentation", []))
    if masks and annotations and not any(a["segmentation"] for a in annotations):
        raise UserError(f"{file} has boxes but no masks; choose a recipe with masks=False.")
    new = {"categories": categories, "annotations": annotations}
    return {"info": {}} | content | new


def read_coco(file, masks=False, keypoints=False):
    """The content of a COCO annotation file, as of `complete_coco`."""
    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream)
    except OSError as error:
        raise UserError(f"{file} cannot be opened ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({first_line(error)}); download it again.") from None
    return complete_coco(content, file, masks, keypoints)


def read_voc(root, splits):
    """Lists and annotations of VOC's devkit as the content of a COCO file, as of `complete_coco`.

    Annotations have one field more than COCO's: "difficult".
    """
    images = []
    annotations = []
    for folder, split in splits:
        listed = os.path.join(root, folder, "ImageSets", "Main", f"{split}.txt")
        try:
            with open(listed, encoding="utf-8") as file:
                names = file.read().split()
        except (OSError, ValueError):
            raise UserError(f"{listed} cannot be read; unpack VOC's devkit into {root}.") from None
        for name in names:
            path = os.path.join(root, folder, "Annotations", f"{name}.xml")
            try:
                image, objects = _read_voc_image(path, name)
            except OSError:
                raise UserError(f"{path} cannot be read; unpack VOC's devkit whole.") from None
            except (ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
                raise UserError(
                    f"{path} is no annotation of VOC ({first_line(error)}); data sets in VOC's "
                    "layout with other names and classes are converted with tools/to_coco.py."
                ) from None
            images.append(image | {"file_name": f"{folder}/JPEGImages/{name}.jpg"})
            for annotation in objects:
                annotations.append(annotation | {"id": len(annotations) + 1})
    categories = [{"id": k, "name": name} for k, name in enumerate(VOC_CLASSES, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return complete_coco(content, root)


def _read_voc_image(path, name):
    """One XML file of VOC -> (image, annotations), as entries of a COCO file."""
    tree = ElementTree.parse(path).getroot()
    width, height = (int(tree.findtext(f"size/{side}")) for side in ("width", "height"))
    image = {"id": int(name.replace("_", "")), "width": width, "height": height}
    annotations = []
    for entry in tree.iter("object"):
        class_name = entry.findtext("name").strip()
        if class_name not in VOC_CLASSES:
            raise ValueError(f"{class_name!r} is none of its classes")
        corners = [entry.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
        x1, y1, x2, y2 = (float(corner) for corner in corners)
        x1, y1 = x1 - 1, y1 - 1  # VOC counts pixels from 1 and includes the last one
        bbox = [x1, y1, x2 - x1, y2 - y1]
        if not _are_coordinates(bbox):
            raise ValueError(f"the box {corners} is none")
        difficult = int(entry.findtext("difficult", "0").strip() == "1")
        annotations.append(
            {
                "image_id": image["id"],
                "category_id": VOC_CLASSES.index(class_name) + 1,
                "bbox": bbox,
                "iscrowd": difficult,
                "difficult": difficult,
            }
        )
    return image, annotations
