"""data.py: from COCO's files to batches, against PIL, pycocotools and closed forms.

Real images are those of a folder in COCO's layout that the environment variable COCO_DIR names.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import types
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

import data
import evaluate
from data import BatchSampler, CocoDataset, TrainingSet, UserError
from tools.toy_coco import make_toy_coco


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The root of a generated data set with crowds, RLE, keypoints and images without objects."""
    root = tmp_path_factory.mktemp("data") / "toy"
    make_toy_coco(root, train_images=24, val_images=2)
    return root


@contextlib.contextmanager
def refused(*words):
    """What is inside raises a UserError: one sentence with these words."""
    with pytest.raises(UserError) as caught:
        yield
    text = str(caught.value)
    assert "\n" not in text and text.endswith("."), text
    assert all(str(word) in text for word in words), (text, words)


SQUARE = [10, 10, 30, 10, 30, 18, 10, 18]  # 160 pixels
IMAGE = {"id": 7, "file_name": "a.png", "width": 60, "height": 40}
OBJECT = {"id": 5, "image_id": 7, "category_id": 3, "bbox": [10, 10, 20, 8], "area": 160}
OBJECT |= {"iscrowd": 0, "segmentation": [SQUARE]}
RLE = {"size": [40, 60], "counts": [100, 300, 2000]}


def write_coco(folder, **changes):
    """One grey image (id 7) with one object (id 5), or `changes`: CocoDataset's two paths."""
    Image.new("RGB", (60, 40), (90, 90, 90)).save(folder / "a.png")
    content = {"images": [IMAGE], "categories": [{"id": 3, "name": "person"}]}
    content |= {"annotations": [OBJECT]} | changes
    (folder / "coco.json").write_text(json.dumps(content))
    return folder, folder / "coco.json"


def rle_of(mask):
    """A compressed RLE as JSON has it."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return rle | {"counts": rle["counts"].decode()}


# -- Transforms ------------------------------------------------------------------------------------


def test_resize_shape_is_detectron2s():
    for given, expected in (
        ((480, 640, 800, 1333), (800, 1067)),
        ((640, 480, 800, 1333), (1067, 800)),
        ((427, 640, 800, 1333), (800, 1199)),
        ((300, 900, 800, 1333), (444, 1333)),  # the longer side decides
        ((2, 5000, 800, 1333), (1, 1333)),  # never 0
    ):
        assert data.resize_shape(*given) == expected


def test_resize_image_is_pils():
    picture = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    for height, width in ((61, 90), (200, 301)):
        ours = data.resize_image(torch.from_numpy(picture).permute(2, 0, 1), height, width)
        pils = np.array(Image.fromarray(picture).resize((width, height), Image.BILINEAR))
        assert (ours.permute(1, 2, 0).int() - torch.from_numpy(pils)).abs().max() <= 1  # rounding


def extent(mask):
    """The box around what is set in a mask, as a tensor x1, y1, x2, y2."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("min_size", [23, 40, 133])
def test_image_box_mask_and_keypoints_move_together(tmp_path, min_size, flip):
    # A white rectangle on black, off the centre, once as a polygon, once as RLE; its left eye is
    # marked in the upper left pixel, its right one in the lower right.
    x1, y1, x2, y2 = 7, 12, 31, 33
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[y1:y2, x1:x2] = 1
    keypoints = [0, 0, 0, x1, y1, 2, x2 - 1, y2 - 1, 1] + [0] * 42
    thing = OBJECT | {"bbox": [x1, y1, x2 - x1, y2 - y1], "keypoints": keypoints}
    masks = [[x1, y1, x2, y1, x2, y2, x1, y2]], rle_of(mask)
    paths = write_coco(tmp_path, annotations=[thing | {"segmentation": m} for m in masks])
    Image.fromarray(mask * np.uint8(255)).save(tmp_path / "a.png")

    dataset = CocoDataset(*paths, training=True, keypoints=True)
    image, target = dataset.load(0, min_size, 1000, flip)
    scale_y, scale_x = image.shape[1] / 40, image.shape[2] / 60
    new_x1, new_x2 = (60 - x2, 60 - x1) if flip else (x1, x2)
    box = torch.tensor([new_x1 * scale_x, y1 * scale_y, new_x2 * scale_x, y2 * scale_y])
    torch.testing.assert_close(target["boxes"], box.expand(2, 4))
    for seen in (image[0].numpy() > 127, *target["masks"].numpy()):
        assert (extent(seen) - box).abs().max() <= 0.5 + 1e-4  # an edge is rounded to a pixel
        left, top, right, bottom = extent(seen).int().tolist()
        assert seen[top + 1 : bottom - 1, left + 1 : right - 1].all()
    # The eye is in the middle of its pixel; mirrored, at the other side, and the right eye.
    x = box[2] - scale_x / 2 if flip else box[0] + scale_x / 2
    left_eye, right_eye = target["keypoints"][0, [2, 1] if flip else [1, 2]]
    torch.testing.assert_close(left_eye, torch.tensor([x, box[1] + scale_y / 2, 2]))
    assert right_eye[2] == 1
    assert target["keypoints"][0, 3:].abs().max() == 0  # what is not labelled stays 0, 0, 0


def test_keypoint_flip_swaps_left_and_right():
    other = {"left": "right", "right": "left"}
    for name, k in zip(data.KEYPOINT_NAMES, data.KEYPOINT_FLIP):
        side, _, part = name.partition("_")
        assert data.KEYPOINT_NAMES[k] == (f"{other[side]}_{part}" if part else name)


def check_masks(dataset):
    """Every mask is pycocotools' and, flipped, its mirror image. Returns the kinds there are."""
    coco = COCO(dataset.annotation_file)
    kinds = set()
    for index, image_id in enumerate(dataset.image_ids):
        masks, flipped = (dataset.load(index, flip=f)[1]["masks"] for f in (False, True))
        for annotation, mask, mirrored in zip(
            coco.imgToAnns[image_id], masks, flipped, strict=True
        ):
            assert np.array_equal(mask.numpy(), coco.annToMask(annotation))
            pair = torch.stack([mask.flip(1), mirrored])
            differs = pair[0] != pair[1]
            if isinstance(annotation["segmentation"], list):
                kinds.add("polygons")  # mirrored, a pixel on the edge may be decided otherwise
                around = F.pad(pair, (1, 1, 1, 1)).unfold(1, 3, 1).unfold(2, 3, 1)[:, differs]
                assert (around.amin(dim=(2, 3)) < around.amax(dim=(2, 3))).any(dim=0).all()
            else:
                kinds.add(type(annotation["segmentation"]["counts"]).__name__)
                assert not differs.any()
    return kinds


def test_masks_of_generated_images_are_pycocotools(toy):
    assert check_masks(data.open_split(toy, "train2017")) == {"polygons", "str"}


@pytest.mark.skipif("COCO_DIR" not in os.environ, reason="COCO_DIR is not set: no real images")
def test_real_images():
    dataset, training = (
        data.open_split(os.environ["COCO_DIR"], "val2017", training=t) for t in (False, True)
    )
    assert len(dataset.classes) == 80 and dataset.category_ids[-1] == 90
    assert check_masks(dataset) == {"polygons", "list"}  # the counts of an uncompressed RLE
    crowds = sum(o["iscrowd"] for i in range(len(dataset)) for o in dataset.record(i)["objects"])
    assert 0 < crowds == dataset.num_objects - training.num_objects


# -- Images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", "RGB.png RGBA.png P.png CMYK.jpg CMYK.tiff L.png LA.png 1.png".split()
)
def test_every_kind_of_image_becomes_rgb(tmp_path, name):
    mode = name.partition(".")[0]
    grey = {"L": 100, "LA": 100, "1": 255}.get(mode)
    color = (grey,) * 3 if grey else (10, 100, 200)
    image = Image.new("RGB", (16, 20), color)
    image = image.quantize() if mode == "P" else image.convert(mode)
    if mode == "RGBA":
        image.putalpha(30)
    image.save(tmp_path / name)
    read = data.read_image(tmp_path / name, (20, 16))
    expected = torch.tensor(color, dtype=torch.uint8).view(3, 1, 1).expand(3, 20, 16)
    torch.testing.assert_close(read, expected, rtol=0, atol=3 if "jpg" in name else 0)


def test_annotated_size_decides_on_the_exif_orientation(tmp_path):
    image = Image.new("RGB", (30, 20))
    image.paste((255, 255, 255), (0, 0, 30, 8))  # the upper part is white ...
    exif = Image.Exif()
    exif[0x0112] = 6  # ... and shown at the right
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    for stated in ((20, 30), (30, 20), None):  # height, width
        read = data.read_image(tmp_path / "a.jpg", stated)
        assert read.shape[1:] == (stated or (30, 20))
        assert (read[0, 0] > 127).all() == (stated == (20, 30))
        assert (read[0, :, -1] > 127).all() == (stated != (20, 30))


@pytest.mark.parametrize(
    "write, words",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "truncated"),
        (lambda path: path.write_text("hello"), "cannot identify image file"),
        (Path.unlink, "No such file"),
        (lambda path: Image.new("L", (40, 60)).save(path), "(60, 40) pixels (height, width), and"),
        (
            lambda path: Image.new("I;16", (60, 40)).save(path),
            "more than 8 bits a channel; save it",
        ),
        (lambda path: Image.new("F", (60, 40)).save(path, "TIFF"), "save it with 8"),
    ],
)
def test_bad_image_files(tmp_path, write, words):
    dataset = CocoDataset(*write_coco(tmp_path))
    write(tmp_path / "a.png")
    with refused(tmp_path / "a.png", words, "save it" if "8" in words else "tools/to_coco.py"):
        dataset[0]


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")  # as data.py sets it
def test_a_picture_of_90_megapixels_is_too_large(tmp_path):
    Image.new("1", (10_000, 9_000)).save(tmp_path / "a.png")
    with refused(tmp_path / "a.png", "cut it into tiles"):
        data.read_image(tmp_path / "a.png")


# -- Annotations -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, field, value, expected",
    [
        ("image", "id", "7", "an integer"),
        ("image", "file_name", None, "text"),
        ("image", "width", 60.5, "a positive integer"),
        ("image", "height", 0, "a positive integer"),
        ("category", "name", 3, "text"),
        ("annotation", "image_id", "7", "which is not in the file"),
        ("annotation", "category_id", 99, "which is not in the file"),
        ("annotation", "bbox", [1, 2, 3], "4 numbers"),
        ("annotation", "bbox", [1, 2, 3, "4"], "4 numbers"),
        ("annotation", "bbox", [1, 2, 3, float("nan")], "4 numbers"),
        ("annotation", "iscrowd", "0", "0 or 1"),
        ("annotation", "area", "large", "a number"),
        ("annotation", "segmentation", SQUARE, "polygons"),  # a flat list
        ("annotation", "segmentation", [[[10, 10], [30, 10], [30, 18]]], "polygons"),  # pairs
        ("annotation", "segmentation", [RLE], "polygons"),
        ("annotation", "keypoints", [1, 2, 2], "17 times x, y, v"),
    ],
)
def test_wrong_fields(tmp_path, kind, field, value, expected):
    paths = write_coco(tmp_path)
    content = json.loads(paths[1].read_text())
    [entry] = content["categories" if kind == "category" else f"{kind}s"]
    entry[field] = value
    if value is None:  # null and a missing field are the same
        del entry[field]
    paths[1].write_text(json.dumps(content))
    used = {"masks": True, "keypoints": field == "keypoints"}
    named = f"{paths[1]}: {kind} {entry.get('id')} ", field, expected, str(value)[:20]
    with refused(*named, "tools/to_coco.py"):
        CocoDataset(*paths, **used)
    # One mistake is one sentence, whatever refers to the entry.
    assert field == "id" or len(list(data.coco_problems(content, paths[1], **used))) == 1


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"images": [IMAGE, IMAGE]}, "image 7 appears twice"),
        ({"categories": [{"id": k, "name": "dog"} for k in (3, 4)]}, "category 4 has the name"),
        ({"categories": [{"id": 3, "name": "car", "keypoints": ["left_wheel"]}]}, "COCO's 17"),
        ({"annotations": []}, "none of its 1 images can be used"),
        ({"annotations": [OBJECT | {"segmentation": []}]}, "no masks; use --no-masks"),
        (b"PK\3\4\xff\xfe", "unpack it first"),
        (b'{"images": []}', 'needs "images" and "categories"'),
    ],
)
def test_wrong_files(tmp_path, changes, words):
    is_text = isinstance(changes, bytes)
    paths = write_coco(tmp_path, **({} if is_text else changes))
    if is_text:
        paths[1].write_bytes(changes)
    with refused(paths[1], words):
        CocoDataset(*paths, training=True, keypoints="17" in words)


@pytest.mark.parametrize(
    "segmentation, words",
    [
        ([SQUARE + [5]], "polygon"),
        ([[*SQUARE[:-1], float("nan")]], "polygon"),  # pycocotools would never return
        ({**RLE, "size": [60, 40]}, "[40, 60]"),
        ({**RLE, "counts": [100, 300, 1999]}, "do not add up"),  # a pixel would stay unset
        ({**RLE, "counts": [100, -300, 2600]}, "do not add up"),
        (rle_of(np.ones((40, 59))) | {"size": [40, 60]}, "do not add up"),
    ],
)
def test_wrong_masks_are_refused_when_they_are_painted_or_scored(tmp_path, segmentation, words):
    paths = write_coco(tmp_path, annotations=[OBJECT | {"segmentation": segmentation}])
    dataset = CocoDataset(*paths)
    for use in (lambda: dataset[0], dataset.coco_gt):
        with refused(paths[1], "annotation 5 of image 7", words, "tools/to_coco.py"):
            use()
    assert len(CocoDataset(*paths, masks=False)[0][1]["boxes"]) == 1


def test_run_lengths_of_compressed_rle_are_pycocotools():
    rng = np.random.default_rng(0)
    for largest in (3, 300, 30_000):
        counts = rng.integers(1, largest, 101).tolist()
        size = [1, sum(counts)]
        rle = coco_mask.frPyObjects({"size": size, "counts": counts}, *size)
        assert data.run_lengths({"counts": rle["counts"].decode()}) == counts


def test_what_is_accepted_silently_and_right(tmp_path):
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[10:18, 10:30] = 1  # as SQUARE
    counts = [410, *[8, 32] * 19, 8, 1222]
    thing = {"image_id": 0, "category_id": 0, "bbox": [10, 10, 20, 8]}  # no id, area, iscrowd
    objects = [
        thing | {"segmentation": {"size": [40, 60], "counts": counts}},
        thing | {"segmentation": rle_of(mask), "iscrowd": None, "area": None, "id": 9},
        thing | {"segmentation": [SQUARE, [1, 2, 3, 4]], "id": 9, "category_id": 17},
        thing | {"segmentation": [SQUARE], "bbox": [50, 10, 20, 8]},  # sticks out at the right
    ]
    images = [IMAGE | {"id": 0, "file_name": "sub/ünï 图.png", "name": "a"}, IMAGE | {"id": 10**9}]
    categories = [{"id": 17, "name": "Straße"}, {"id": 0, "name": "a"}]
    paths = write_coco(tmp_path, images=images, annotations=objects, categories=categories)
    paths[1].write_text(paths[1].read_text(), encoding="utf-8-sig")  # with a byte-order mark
    (tmp_path / "sub").mkdir()
    shutil.copy(tmp_path / "a.png", tmp_path / images[0]["file_name"])

    dataset = CocoDataset(*paths, training=True)
    assert dataset.image_ids == [0] and dataset.classes == ["a", "Straße"]
    _, target = dataset[0]
    assert target["boxes"].tolist() == [[10, 10, 30, 18]] * 3 + [[50, 10, 60, 18]]
    assert target["labels"].tolist() == [1, 1, 2, 1] and not target["iscrowd"].any()
    assert all(np.array_equal(found, mask) for found in target["masks"].numpy())
    dataset = CocoDataset(*paths)
    assert dataset.image_ids == [0, 10**9] and len(dataset[0][1]["boxes"]) == 4
    truth = dataset.coco_gt()
    assert list(truth.anns) == [1, 2, 3, 4]  # none is lost, and none is COCOeval's "no match"
    assert [truth.anns[k]["area"] for k in (1, 2)] == [160, 160]


def test_training_leaves_out_what_evaluation_keeps(tmp_path):
    good = OBJECT | {"image_id": 6, "category_id": 90}
    objects = [
        good | {"image_id": 4, "iscrowd": 1},
        good | {"image_id": 5, "bbox": [10, 10, 0, 8]},
        good | {"image_id": 5, "bbox": [70, 10, 5, 8]},  # outside
        good | {"iscrowd": 1},
        good,
        good | {"category_id": 2},
    ]
    nothing = [], None, [[1, 2, 3, 4]], {**RLE, "counts": [2400]}
    objects += [good | {"segmentation": segmentation} for segmentation in nothing]
    images = [{**IMAGE, "id": k} for k in (9, 4, 6, 5)]
    categories = [{"id": 90, "name": "z"}, {"id": 2, "name": "b"}, {"id": 17, "name": "c"}]
    paths = write_coco(tmp_path, images=images, annotations=objects, categories=categories)

    training = CocoDataset(*paths, training=True)
    assert training.classes == ["b", "c", "z"] and training.category_ids == [2, 17, 90]
    assert training.image_ids == [6] and training[0][1]["labels"].tolist() == [3, 1]
    assert training.num_dropped == 3
    without_masks = CocoDataset(*paths, training=True, masks=False)
    assert without_masks.num_objects == 6 and "masks" not in without_masks[0][1]
    evaluation = CocoDataset(*paths)
    assert evaluation.image_ids == [4, 5, 6, 9] and evaluation.num_dropped == 0
    assert [len(target["boxes"]) for _, target in evaluation] == [1, 2, 7, 0]
    assert evaluation[2][1]["iscrowd"].tolist() == [True] + [False] * 6
    assert evaluation[2][1]["masks"].sum(dim=(1, 2)).tolist() == [160] * 3 + [0] * 4
    truth = evaluation.coco_gt()
    assert [truth.annToMask(truth.anns[k]).sum() for k in range(4, 11)] == [160] * 3 + [0] * 4


def test_keypoint_training_keeps_images_with_a_labelled_keypoint(toy):
    coco = COCO(toy / "annotations" / "person_keypoints_train2017.json")
    wanted = {a["image_id"] for a in coco.anns.values() if a["num_keypoints"] and not a["iscrowd"]}
    dataset = data.open_split(toy, "train2017", training=True, keypoints=True)
    assert set(dataset.image_ids) == wanted and 0 < len(wanted) < 24
    assert dataset.classes == ["person"]


# -- Splits and subsets ----------------------------------------------------------------------------


def test_splits_are_found_by_their_names(tmp_path):
    (tmp_path / "annotations").mkdir()
    folders = {"train2017": "train2017", "my val": "images/my val"}
    folders |= dict.fromkeys(["minival2014", "valminusminival2014"], "val2014")
    for split, folder in folders.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        _, file = write_coco(tmp_path / folder)
        file.rename(tmp_path / "annotations" / f"instances_{split}.json")
        assert data.open_split(tmp_path, split)[0][0].shape == (3, 40, 60)
    (tmp_path / "test2017").mkdir()  # without annotations
    for split, named in (("test2017", "instances_test2017.json"), ("val2017", "no folder")):
        with refused(tmp_path, named, split, "tools/to_coco.py"):
            data.open_split(tmp_path, split)


def test_classes_of_training_and_validation_must_be_the_same(tmp_path):
    categories = [{"id": 3, "name": "cat"}, {"id": 4, "name": "dog"}]
    dataset = CocoDataset(*write_coco(tmp_path, categories=categories))
    data.check_classes(dataset, ["cat", "dog"], "train.json")
    for names, named in ((["cat"], "dog"), (["cat", "dig"], "dig"), (["dog", "cat"], "order")):
        with refused(tmp_path, "train.json", named, "tools/to_coco.py"):
            data.check_classes(dataset, names, "train.json")


def test_subsets_are_a_function_of_the_ids_alone_and_nested(toy):
    ids = list(range(100, 1100))
    ten, hundred = data.choose_subset(ids, 10), data.choose_subset(ids, 100)
    assert len(hundred) == 100 and set(ten) < set(hundred)
    assert data.choose_subset(ids[::-1], 10) == ten[::-1]
    # Pinned: another subset would be another experiment.
    assert ten == [127, 161, 244, 351, 381, 491, 525, 695, 749, 1021]
    with refused("1,000", "2,000"):
        data.choose_subset(ids, 2000)
    whole, part = (data.open_split(toy, "train2017", subset=count) for count in (None, 5))
    assert part.image_ids == data.choose_subset(whole.image_ids, 5) and len(part) == 5


# -- Sampler and loader ----------------------------------------------------------------------------


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def mixed(landscape, portrait):
    """A data set of so many images of each orientation."""
    order = np.random.default_rng(0).permutation(landscape + portrait)
    widths, heights = np.array([(4, 3)] * landscape + [(3, 4)] * portrait)[order].T
    return types.SimpleNamespace(widths=widths, heights=heights)


@pytest.mark.parametrize("landscape, portrait, count", [(11, 6, 3 + 2), (7, 1, 2 + 1)])
def test_sampler_shows_every_image_in_each_epoch(landscape, portrait, count):
    """In groups of one orientation, that are filled up where an orientation ends."""
    dataset = mixed(landscape, portrait)
    batches = take(BatchSampler(dataset, images_per_gpu=4, seed=3), 2 * count)
    groups = [[index for index, _ in batch] for batch in batches]
    for group in groups:
        assert len(group) == 4 and len(set((dataset.widths >= dataset.heights)[group])) == 1
    epochs = groups[:count], groups[count:]
    for epoch in epochs:
        assert set(itertools.chain(*epoch)) == set(range(landscape + portrait))
    # New groups, not only a new order of the same
    assert set(map(frozenset, epochs[0])) != set(map(frozenset, epochs[1]))
    assert batches != take(BatchSampler(dataset, 4, seed=4), 2 * count)


def test_sampler_is_a_function_of_the_iteration_and_ranks_share_the_batch():
    dataset = mixed(landscape=11, portrait=6)
    one = take(BatchSampler(dataset, 2, seed=1), 60)
    ranks = [take(BatchSampler(dataset, 2, seed=1, rank=r, world_size=3), 20) for r in range(3)]
    together = [list(itertools.chain(*parts)) for parts in zip(*ranks)]
    # The same stream, dealt out: iteration i of three processes is 3i, 3i + 1, 3i + 2 of one.
    for i, batch in enumerate(together):
        assert [k for k, _ in batch] == [k for part in one[3 * i : 3 * i + 3] for k, _ in part]
    # Seeds are those of the iteration and of the position in the whole batch.
    seeds = [[seed for _, seed in batch] for batch in together]
    whole = take(BatchSampler(dataset, 6, seed=1), 20)
    assert seeds == [[seed for _, seed in batch] for batch in whole]
    assert len(set(sum(seeds, []))) == 120 and 0 <= min(map(min, seeds))
    for r in range(3):
        later = BatchSampler(dataset, 2, seed=1, rank=r, world_size=3, start_iteration=7)
        assert take(later, 13) == ranks[r][7:]


def test_training_set_draws_by_the_seed(toy):
    dataset = data.open_split(toy, "train2017", training=True, masks=False)
    training_set = TrainingSet(dataset, min_sizes=(64, 80, 96), max_size=1000)
    images, targets = training_set[[(0, seed) for seed in range(60)]]
    shorter = [min(image.shape[1:]) for image in images]
    assert all(shorter.count(size) > 9 for size in (64, 80, 96))
    straight, _ = dataset.load(0, 64, 1000)
    flips = [not torch.equal(image, straight) for image in images if min(image.shape[1:]) == 64]
    assert 0.2 < np.mean(flips) < 0.8
    assert targets[5]["seed"] == 5 and torch.equal(images[5], training_set[[(0, 5)]][0][0])
    unflipped, _ = TrainingSet(dataset, (64,), 1000, flip=False)[[(0, seed) for seed in range(10)]]
    assert all(torch.equal(image, straight) for image in unflipped)


def test_workers_give_the_same_batches_and_hand_errors_over(toy, tmp_path, capsys):
    root = tmp_path / "toy"
    shutil.copytree(toy, root)
    dataset = data.open_split(root, "train2017", training=True, keypoints=True)
    training_set = TrainingSet(dataset, min_sizes=(64, 96), max_size=128)
    sampler = BatchSampler(dataset, 2, seed=5)
    expected = take(data.read_ahead(training_set, 0, sampler), 3)
    seen = [target["image_id"] for _, targets in expected for target in targets]
    path = root / "train2017" / f"{min(set(dataset.image_ids) - set(seen)):012d}.jpg"
    path.unlink()
    loader = iter(data.read_ahead(training_set, 1, sampler))
    found = take(loader, 1)
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGINT)  # Ctrl-C, of which the main process takes care
    torch.testing.assert_close(found + take(loader, 2), expected, rtol=0, atol=0)
    assert evaluate.run_command("train.py", lambda _: take(loader, 30)) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"train.py: {path} cannot be used (") and error.count("\n") == 1


def test_annotations_do_not_travel_to_the_workers(toy):
    dataset = data.open_split(toy, "train2017", training=True)
    assert dataset._records.numel() > 10_000
    assert len(ForkingPickler.dumps(dataset)) < 4_000
