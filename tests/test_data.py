"""data.py: geometry, reading, bad input, sampler, loader, worker processes, real COCO images."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import types
import zlib
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

import data
from data import CocoDataset, TrainingSet, UserError
from tools.toy_coco import make_toy_coco

SPLITS = ("train", "val")


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The root of a tiny generated data set: 24 + 8 images."""
    root = tmp_path_factory.mktemp("data") / "toy"
    make_toy_coco(root, train_images=24, val_images=8)
    return root


def open_split(root, split="train", kind="instances", **options):
    annotation_file = root / "annotations" / f"{kind}_{split}2017.json"
    return CocoDataset(root / f"{split}2017", annotation_file, **options)


@pytest.fixture(scope="session")
def coco_mini():
    if "COCO_DIR" not in os.environ:
        pytest.skip("COCO_DIR is not set: no real COCO images to test with")
    return Path(os.environ["COCO_DIR"])


def check_sentence(caught, *named):
    """An error for users is one sentence that names the file, the id, the field."""
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and "Traceback" not in text, text
    assert all(name in text for name in named), (text, named)
    assert caught.value.code == 1


def write_coco(folder, width=60, height=40, **changes):
    """A data set of one grey image (id 7) with one object (id 5) -> CocoDataset's two paths."""
    Image.new("RGB", (width, height), (90, 90, 90)).save(folder / "a.png")
    thing = {"id": 5, "image_id": 7, "category_id": 3, "bbox": [10, 10, 20, 8], "area": 160}
    thing |= {"iscrowd": 0, "segmentation": [[10, 10, 30, 10, 30, 18, 10, 18]]}
    content = {
        "images": [{"id": 7, "file_name": "a.png", "width": width, "height": height}],
        "categories": [{"id": 3, "name": "person"}],
        "annotations": [thing],
    }
    (folder / "coco.json").write_text(json.dumps(content | changes))
    return folder, folder / "coco.json"


# ---- Transforms


def test_resize_shape_is_detectron2s():
    for given, expected in (
        ((480, 640, 800, 1333), (800, 1067)),
        ((640, 480, 800, 1333), (1067, 800)),
        ((427, 640, 800, 1333), (800, 1199)),
        ((300, 900, 800, 1333), (444, 1333)),  # the longer side decides
        ((500, 500, 640, 640), (640, 640)),
        ((1200, 1600, 400, 2000), (400, 533)),
        ((2, 5000, 800, 1333), (1, 1333)),  # never 0
    ):
        assert data.resize_shape(*given) == expected


@pytest.mark.parametrize("size", [(61, 90), (200, 301)])
def test_resize_image_is_pils(size):
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    picture = np.array(coarse.resize((160, 120), Image.BICUBIC))
    ours = data.resize_image(torch.from_numpy(picture).permute(2, 0, 1), *size)
    pils = Image.fromarray(picture).resize(size[::-1], Image.BILINEAR)
    difference = ours.permute(1, 2, 0).numpy().astype(int) - np.asarray(pils)
    assert ours.dtype == torch.uint8 and np.abs(difference).max() <= 1


def extent(mask):
    """The box of a mask's pixels above 1/2, as a tensor x1, y1, x2, y2."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("min_size", [23, 40, 57, 133])
def test_image_box_mask_and_keypoints_move_together(tmp_path, min_size, flip):
    # A white rectangle on black, off the centre, once as a polygon, once as RLE; its left eye in
    # the upper left pixel, its right one in the lower right.
    width, height = 64, 40
    x1, y1, x2, y2 = 7, 12, 31, 33
    mask = np.zeros((height, width), dtype=np.uint8, order="F")
    mask[y1:y2, x1:x2] = 1
    rle = coco_mask.encode(mask)
    rle["counts"] = rle["counts"].decode()
    polygon = [[x1, y1, x2, y1, x2, y2, x1, y2]]
    thing = {"image_id": 7, "category_id": 3, "bbox": [x1, y1, x2 - x1, y2 - y1]}
    thing["keypoints"] = [0, 0, 0, x1, y1, 2, x2 - 1, y2 - 1, 1] + [0] * 42
    objects = [{"id": k, "segmentation": s} | thing for k, s in enumerate((polygon, rle))]
    paths = write_coco(tmp_path, width, height, annotations=objects)
    Image.fromarray(mask * np.uint8(255)).save(tmp_path / "a.png")

    dataset = CocoDataset(*paths, training=True, keypoints=True)
    image, target = dataset.load(0, min_size, 1000, flip)
    scale_y, scale_x = image.shape[1] / height, image.shape[2] / width
    new_x1, new_x2 = (width - x2, width - x1) if flip else (x1, x2)
    box = torch.tensor([new_x1 * scale_x, y1 * scale_y, new_x2 * scale_x, y2 * scale_y])
    assert torch.allclose(target["boxes"], box.expand(2, 4), atol=1e-4)
    for seen in (image[0].numpy() > 127, *target["masks"].numpy()):
        assert (extent(seen) - box).abs().max() <= 0.5 + 1e-4
        left, top, right, bottom = extent(seen).int().tolist()
        assert seen[top + 1 : bottom - 1, left + 1 : right - 1].all()
    # The eye marked in the upper left pixel is a half pixel inside that corner; mirrored, it is in
    # the upper right one and has become the right eye.
    upper = 2 if flip else 1
    half = torch.tensor([scale_x, scale_y]) / 2
    corner = torch.tensor([box[2] - half[0] if flip else box[0] + half[0], box[1] + half[1]])
    points = target["keypoints"][0]
    assert torch.allclose(points[upper, :2], corner, atol=1e-4)
    assert points[upper, 2] == 2 and points[3 - upper, 2] == 1
    assert points[[0, *range(3, 17)]].abs().max() == 0  # what is not labelled stays 0, 0, 0


def test_keypoint_flip_swaps_left_and_right():
    other = {"left": "right", "right": "left"}
    for name, k in zip(data.KEYPOINT_NAMES, data.KEYPOINT_FLIP):
        side, _, part = name.partition("_")
        assert data.KEYPOINT_NAMES[k] == (f"{other[side]}_{part}" if part else name)


def check_masks(dataset):
    """Every mask at full size is the one pycocotools makes; every flipped one nearly its mirror."""
    coco = dataset.coco_gt()
    kinds = set()
    for index, image_id in enumerate(dataset.image_ids):
        _, target = dataset[index]
        _, mirrored = dataset.load(index, flip=True)
        annotations = coco.imgToAnns[image_id]
        assert len(annotations) == len(target["masks"])
        for annotation, mask, flipped in zip(annotations, target["masks"], mirrored["masks"]):
            assert np.array_equal(mask.numpy(), coco.annToMask(annotation))
            # A rasterizer may decide otherwise for a pixel whose centre is on the edge.
            differs = mask.flip(1) != flipped
            assert differs.sum() <= 0.1 * mask.sum() + 8
            segmentation = annotation["segmentation"]
            polygons = isinstance(segmentation, list)
            kinds.add("polygons" if polygons else type(segmentation["counts"]))
    return kinds


def test_masks_of_generated_images_are_pycocotools(toy):
    assert check_masks(open_split(toy)) == {"polygons", str}


# ---- Reading images


@pytest.mark.parametrize(
    "name",
    "RGB.png RGBA.png P.png CMYK.jpg CMYK.tiff L.png L.jpg LA.png 1.png I16.png I16.tiff".split(),
)
def test_every_kind_of_image_becomes_rgb(tmp_path, name):
    mode = name.partition(".")[0]
    image, color = Image.new("RGB", (16, 16), (10, 100, 200)), (10, 100, 200)
    if mode in ("L", "LA", "I16"):
        image, color = Image.new("L", (16, 16), 100), (100, 100, 100)
    if mode == "1":
        image, color = Image.new("1", (16, 16), 1), (255, 255, 255)
    elif mode == "I16":
        image = Image.fromarray(np.full((16, 16), 100 * 257, dtype=np.uint16))
    else:
        image = image.quantize() if mode == "P" else image.convert(mode)
    if mode == "RGBA":
        image.putalpha(30)
    image.save(tmp_path / name)
    read = data.read_image(tmp_path / name, 16, 16)
    assert read.dtype == torch.uint8 and read.shape == (3, 16, 16)
    error = (read.int() - torch.tensor(color)[:, None, None]).abs().max()
    assert error <= 3  # JPEG


def test_annotated_size_decides_on_the_exif_orientation(tmp_path):
    path = tmp_path / "a.jpg"
    image = Image.new("RGB", (30, 20))
    image.paste((255, 255, 255), (0, 0, 30, 8))  # the upper part is white ...
    exif = Image.Exif()
    exif[0x0112] = 6  # ... and shown at the right
    image.save(path, exif=exif, quality=95)
    for stated in ((30, 20), (20, 30), (None, None)):
        read = data.read_image(path, *stated)
        assert read.shape[1:] == ((20, 30) if stated == (30, 20) else (30, 20))
        assert (read[0, 0] > 127).all() == (stated == (30, 20))
        assert (read[0, :, -1] > 127).all() == (stated != (30, 20))
    with pytest.raises(UserError) as caught:
        data.read_image(path, 40, 30, image_id=1)
    check_sentence(caught, str(path), "image 1", "(30, 20)", "(40, 30)")


def make_bad_image(folder, kind):
    """Puts an unreadable a.png into folder -> the file name to annotate."""
    path = folder / "a.png"
    outside = folder.parent / f"{folder.name}-outside.png"
    if kind == "truncated":
        noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:-3000])
    elif kind == "bomb":  # a header that promises 10,000 x 10,000 pixels, of which PIL only warns
        Image.new("1", (8, 8)).save(path)
        header = bytearray(path.read_bytes())
        header[16:24] = (10_000).to_bytes(4, "big") * 2
        header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
        path.write_bytes(header)
    elif kind == "noimage":
        path.write_text("hello")
    elif kind == "postscript":
        path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 40\nshowpage\n")
    elif kind == "missing":
        path.unlink()
    elif kind == "link":
        path.rename(outside)
        path.symlink_to(outside)
    elif kind == "dots":
        path.rename(outside)
        return f"../{outside.name}"
    return {"absolute": "/etc/hostname", "null": "a\0.png"}.get(kind, "a.png")


@pytest.mark.parametrize(
    "kind", "truncated noimage bomb postscript missing link dots absolute null".split()
)
def test_bad_image_files(tmp_path, kind):
    write_coco(tmp_path)
    name = make_bad_image(tmp_path, kind)
    image = {"id": 7, "file_name": name, "width": 60, "height": 40}
    (tmp_path / "coco.json").write_text(json.dumps({"images": [image], "categories": []}))
    reason = {"bomb": "pixels", "link": "lies outside", "dots": "lies outside", "null": "file_name"}
    with pytest.raises(UserError) as caught:
        CocoDataset(tmp_path, tmp_path / "coco.json")[0]
    check_sentence(caught, str(tmp_path), "mage 7", reason.get(kind, ""))


# ---- COCO


DELETE = object()
OBJECT = ("annotations", 0)
RLE = {"size": [40, 60], "counts": [100, 300, 2000]}


@pytest.mark.parametrize(
    "path, value, named",
    [
        (("images",), DELETE, "images"),
        (("categories",), DELETE, "categories"),
        (("images",), {}, "images"),
        (("images", 0), [], "id"),
        (("images", 0, "id"), "7", "id"),
        (("images", 0, "id"), 2**63, "image 9223372036854775808 id"),
        (("images", 0, "file_name"), DELETE, "image 7 file_name"),
        (("images", 0, "file_name"), "\ud800.png", "image 7 file_name"),
        (("images", 0, "width"), 0, "image 7 width"),
        (("images", 0, "width"), 10**6, "image 7 width"),
        (("images", 0, "height"), 40.5, "image 7 height"),
        (("images", 0, "width"), 61, "image 7 (60, 40) (61, 40)"),
        (("images",), [{"id": 7, "file_name": "a.png", "width": 60, "height": 40}] * 2, "twice"),
        (("categories", 0, "name"), "\ud800", "category 3 name"),
        (("categories",), [{"id": 3, "name": "dog"}, {"id": 4, "name": "dog"}], "category 4 dog"),
        (("annotations",), DELETE, "0 objects"),
        ((*OBJECT, "id"), DELETE, "annotation image 7 id"),
        ((*OBJECT, "image_id"), 8, "annotation 5 of image 8"),
        ((*OBJECT, "image_id"), [7], "annotation 5 image_id"),
        ((*OBJECT, "category_id"), 99, "annotation 5 of image 7 category_id 99"),
        ((*OBJECT, "category_id"), DELETE, "annotation 5 of image 7 category_id"),
        ((*OBJECT, "bbox"), DELETE, "annotation 5 of image 7 bbox"),
        ((*OBJECT, "bbox"), [1, 2, 3], "annotation 5 bbox"),
        ((*OBJECT, "bbox"), [1, 2, 3, float("nan")], "annotation 5 bbox nan"),
        ((*OBJECT, "bbox"), [1, 2, 3, "4"], "annotation 5 bbox"),
        ((*OBJECT, "bbox"), [1, 2, 3, 1e300], "annotation 5 bbox"),
        ((*OBJECT, "iscrowd"), 2, "annotation 5 iscrowd"),
        ((*OBJECT, "area"), "large", "annotation 5 area"),
        ((*OBJECT, "segmentation"), "x", "annotation 5 [40, 60]"),
        ((*OBJECT, "segmentation"), [[1, 2, 3, 4, 5, 6, 7]], "annotation 5 polygon"),
        ((*OBJECT, "segmentation"), [[1, 2, 3, 4, 5, None]], "annotation 5 polygon"),
        ((*OBJECT, "segmentation"), [[1, 2, 3, 4, 5, 1e300]], "annotation 5 polygon"),
        ((*OBJECT, "segmentation"), [1, 2, 3, 4, 5, 6], "annotation 5 polygon"),
        ((*OBJECT, "segmentation"), {**RLE, "size": [60, 40]}, "annotation 5 [40, 60]"),
        ((*OBJECT, "segmentation"), {**RLE, "counts": [100, 300, 2001]}, "annotation 5 counts"),
        ((*OBJECT, "segmentation"), {**RLE, "counts": [100, -300, 2600]}, "annotation 5 counts"),
        ((*OBJECT, "segmentation"), {**RLE, "counts": "oooooo"}, "annotation 5 counts"),
        ((*OBJECT, "segmentation"), {**RLE, "counts": "é"}, "annotation 5 counts"),
        ((*OBJECT, "segmentation"), {**RLE, "counts": None}, "annotation 5 counts"),
        ((*OBJECT, "segmentation"), DELETE, "masks=False"),
        ((*OBJECT, "segmentation"), [], "masks=False"),
        ((*OBJECT, "segmentation"), [[1, 2, 3, 4]], "masks=False"),
        ((*OBJECT, "segmentation"), {**RLE, "counts": [2400]}, "masks=False"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_bad_annotations(tmp_path, path, value, named, training):
    folder, annotation_file = write_coco(tmp_path)
    content = part = json.loads(annotation_file.read_text())
    for key in path[:-1]:
        part = part[key]
    if value is DELETE:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    annotation_file.write_text(json.dumps(content))
    if "objects" in named and not training:  # as COCO's test splits
        assert CocoDataset(folder, annotation_file).num_objects == 0
        return
    with pytest.raises(UserError) as caught:
        dataset = CocoDataset(folder, annotation_file, training=training)
        assert "pixels" in named or "(60, 40)" in named  # all else is found when the file is opened
        dataset[0]
    check_sentence(caught, str(folder), *named.split())


def test_run_lengths_of_compressed_rle_are_pycocotools():
    rng = np.random.default_rng(0)
    for size in ((3, 4), (40, 60), (700, 500)):
        for fill in (0.001, 0.3, 0.999):
            mask = np.asfortranarray(rng.random(size) < fill, dtype=np.uint8)
            rle = coco_mask.encode(mask)
            rle["counts"] = rle["counts"].decode()
            flat = mask.ravel(order="F")
            edges = np.flatnonzero(np.diff(flat, prepend=0))
            expected = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
            assert [n for n in data.run_lengths(rle) if n] == [n for n in expected if n]


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", "[" * 100_000, "null"])
def test_no_coco_json(tmp_path, text):
    (tmp_path / "coco.json").write_text(text)
    with pytest.raises(UserError) as caught:
        CocoDataset(tmp_path, tmp_path / "coco.json")
    check_sentence(caught, str(tmp_path / "coco.json"))


def test_splits_are_known_by_their_names_and_other_layouts_referred_to_the_converter(tmp_path):
    for split in ("train", "my val"):
        (tmp_path / split).mkdir()
        (tmp_path / "annotations").mkdir(exist_ok=True)
        _, annotation_file = write_coco(tmp_path / split)
        annotation_file.rename(tmp_path / "annotations" / f"instances_{split}.json")
        assert len(data.open_split(tmp_path, split)) == 1
    voc = tmp_path / "voc"  # VOC's layout without its years
    (voc / "Annotations").mkdir(parents=True)
    for root in (tmp_path, voc, ""):
        with pytest.raises(UserError) as caught:
            data.open_split(root, "train2017")
        check_sentence(caught, "instances_train2017.json", "tools/to_coco.py")


def test_classes_of_training_and_validation_must_be_the_same(tmp_path):
    categories = [{"id": 3, "name": "cat"}, {"id": 4, "name": "dog"}]
    dataset = CocoDataset(*write_coco(tmp_path, categories=categories))
    data.check_classes(dataset, ["cat", "dog"], "train.json")
    for names, named in ((["cat"], "dog"), (["cat", "dig"], "dig"), (["dog", "cat"], "order")):
        with pytest.raises(UserError) as caught:
            data.check_classes(dataset, names, "train.json")
        check_sentence(caught, str(tmp_path), "train.json", named)


def test_training_leaves_out_what_evaluation_keeps(tmp_path):
    images = [{"id": k, "file_name": "a.png", "width": 60, "height": 40} for k in (9, 4, 6, 5)]
    good = {"bbox": [50, 10, 20, 8], "category_id": 90, "iscrowd": 0}  # sticks out at the right
    objects = [
        {"image_id": 4, **good, "iscrowd": 1},
        {"image_id": 5, **good, "bbox": [10, 10, 0, 8]},
        {"image_id": 5, **good, "bbox": [70, 10, 5, 8]},
        {"image_id": 6, **good, "iscrowd": 1},
        {"image_id": 6, **good},
        {"image_id": 6, **good, "category_id": 2},
    ]
    objects = [{"id": k, **o} for k, o in enumerate(objects, start=1)]
    categories = [{"id": 90, "name": "z"}, {"id": 2, "name": "b"}, {"id": 17, "name": "c"}]
    paths = write_coco(tmp_path, images=images, annotations=objects, categories=categories)

    training = CocoDataset(*paths, training=True, masks=False)
    assert training.classes == ["b", "c", "z"] and training.category_ids == [2, 17, 90]
    assert training.image_ids == [6] and training.num_dropped == 3
    _, target = training[0]
    assert target["labels"].tolist() == [3, 1] and target["image_id"] == 6
    assert target["boxes"].tolist() == [[50, 10, 60, 18]] * 2  # clipped to the image
    assert "masks" not in target and "keypoints" not in target

    evaluation = CocoDataset(*paths, masks=False)
    assert evaluation.image_ids == [4, 5, 6, 9] and evaluation.num_dropped == 0
    assert [len(target["boxes"]) for _, target in evaluation] == [1, 2, 3, 0]
    assert evaluation[2][1]["iscrowd"].tolist() == [True, False, False]
    assert evaluation[3][1]["boxes"].shape == (0, 4)
    assert sorted(evaluation.coco_gt().anns) == [1, 2, 3, 4, 5, 6]
    # Image 9 has no annotation at all; the others have some that are not to be learned.
    with_empty = CocoDataset(*paths, training=True, masks=False, keep_empty=True)
    assert with_empty.image_ids == [6, 9] and with_empty.num_dropped == 2
    assert with_empty[1][1]["boxes"].shape == (0, 4)


def test_objects_without_a_mask_are_left_out_of_training_and_counted(tmp_path):
    square = [[10, 10, 30, 10, 30, 18, 10, 18]]
    nothing = [[], [[1, 2, 3, 4]], {**RLE, "counts": [2400]}, DELETE]
    objects = [
        {"id": k, "image_id": 7, "category_id": 3, "bbox": [10, 10, 20, 8], "segmentation": given}
        for k, given in enumerate([square, [*square, [1, 2, 3, 4]], *nothing])
    ]
    del objects[-1]["segmentation"]
    paths = write_coco(tmp_path, annotations=objects)
    training = CocoDataset(*paths, training=True)
    assert training.num_without_mask == 4 and training.num_objects == 2
    masks = training[0][1]["masks"]
    assert len(masks) == 2 and masks[0].sum() == 160 and torch.equal(masks[0], masks[1])
    evaluation = CocoDataset(*paths)
    assert evaluation.num_without_mask == 4 and evaluation.num_objects == 6
    truth = evaluation.coco_gt()
    # Numbered from 1: COCOeval takes the id 0 for "no match".
    assert [truth.annToMask(truth.anns[k]).sum() for k in range(1, 7)] == [160, 160, 0, 0, 0, 0]
    assert CocoDataset(*paths, training=True, masks=False).num_objects == 6
    paths = write_coco(tmp_path, annotations=[objects[0] | {"iscrowd": 1}, objects[2]])
    with pytest.raises(UserError, match="2 objects in 1 images, 1 are crowds and 1 have no mask"):
        CocoDataset(*paths, training=True)


def test_large_images_with_many_objects_are_painted_at_the_size_needed(tmp_path):
    """400 masks of 9000 x 9000 pixels would take 30 GiB."""
    square = [100, 100, 8100, 100, 8100, 8100, 100, 8100]
    thing = {"image_id": 7, "category_id": 3, "bbox": [100, 100, 8000, 8000]}
    objects = [{"id": k, **thing, "segmentation": [square]} for k in range(400)]
    image = {"id": 7, "file_name": "a.png", "width": 9000, "height": 9000}
    paths = write_coco(tmp_path, images=[image], annotations=objects)
    Image.new("L", (9000, 9000)).save(tmp_path / "a.png")
    tracemalloc.start()
    dataset = CocoDataset(*paths)
    dataset.coco_gt()
    _, target = dataset.load(0, 90, 90)
    assert target["masks"].shape == (400, 90, 90)
    assert tracemalloc.get_traced_memory()[1] < 1e9
    tracemalloc.stop()


def test_keypoint_training_keeps_images_with_a_labelled_keypoint(toy):
    coco = open_split(toy, kind="person_keypoints").coco_gt()
    wanted = {a["image_id"] for a in coco.anns.values() if a["num_keypoints"] and not a["iscrowd"]}
    dataset = open_split(toy, kind="person_keypoints", training=True, keypoints=True)
    assert set(dataset.image_ids) == wanted and 0 < len(wanted) < 24
    assert dataset.classes == ["person"] and dataset.keypoints
    _, target = dataset[0]
    assert target["keypoints"].shape == (len(target["boxes"]), 17, 3)
    with pytest.raises(UserError) as caught:
        open_split(toy, keypoints=True)
    check_sentence(caught, str(toy), "keypoints")


# ---- Sampler and loader


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def sizes(landscape, portrait):
    """A data set of so many images of each orientation, mixed."""
    mixed = [(4, 3), (3, 4)] * min(landscape, portrait)
    mixed += [(4, 3)] * (landscape - portrait) + [(3, 4)] * (portrait - landscape)
    widths, heights = np.array(mixed).T
    return types.SimpleNamespace(widths=widths, heights=heights)


def test_the_hash_is_fixed():
    seeds = {data.hash_of(*key) for key in itertools.product(range(5), range(40), range(40))}
    assert len(seeds) == 5 * 40 * 40
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Written down once: another value would change every run that is resumed.
    assert data.hash_of(0, 0, 0) == 1279368494785126216


def test_sampler_shows_every_image_once_an_epoch_in_groups_of_one_orientation():
    dataset = sizes(landscape=11, portrait=6)
    landscape = dataset.widths >= dataset.heights
    batches = take(data.BatchSampler(dataset, images_per_gpu=4, seed=3), 2 * 5)  # 3 + 2 groups
    epochs = []
    for epoch in (batches[:5], batches[5:]):
        indices = [[index for index, _ in batch] for batch in epoch]
        for group in indices:
            assert len(group) == 4 and len({bool(landscape[index]) for index in group}) == 1
        flat = sorted(itertools.chain(*indices))
        assert set(flat) == set(range(17)) and len(flat) == 20  # 3 to top two groups up
        epochs.append(indices)
    # New groups, not only a new order of the same.
    assert set(map(frozenset, epochs[0])) != set(map(frozenset, epochs[1]))
    assert batches != take(data.BatchSampler(dataset, 4, seed=4), 10)


def test_sampler_is_a_function_of_the_iteration_and_ranks_share_the_batch():
    dataset = sizes(landscape=11, portrait=6)
    whole = take(data.BatchSampler(dataset, 2, seed=1), 60)
    ranks = [
        take(data.BatchSampler(dataset, 2, seed=1, rank=r, world_size=3), 20) for r in range(3)
    ]
    for i in range(20):
        # The same stream, dealt out: iteration i of three processes is 3i, 3i + 1, 3i + 2 of one.
        together = [index for r in range(3) for index, _ in ranks[r][i]]
        assert together == [index for batch in whole[3 * i : 3 * i + 3] for index, _ in batch]
        # The random numbers depend on the place in the whole batch.
        seeds = [seed for r in range(3) for _, seed in ranks[r][i]]
        assert seeds == [data.hash_of(1, i, position) for position in range(6)]
    for r in range(3):
        later = data.BatchSampler(dataset, 2, seed=1, rank=r, world_size=3, start_iteration=7)
        assert take(later, 13) == ranks[r][7:]


def test_sampler_with_fewer_images_than_a_group():
    groups = take(data.BatchSampler(sizes(landscape=2, portrait=1), images_per_gpu=4), 2)
    groups = sorted(sorted(index for index, _ in group) for group in groups)
    assert groups == [[0, 0, 2, 2], [1, 1, 1, 1]]


def test_training_set_draws_by_the_seed(toy):
    dataset = open_split(toy, training=True, masks=False)
    training_set = TrainingSet(dataset, min_sizes=(64, 80, 96), max_size=1000)
    images, targets = training_set[[(0, seed) for seed in range(60)]]
    shorter = [min(image.shape[1:]) for image in images]
    assert {shorter.count(size) > 9 for size in (64, 80, 96)} == {True}
    straight, _ = dataset.load(0, 64, 1000)
    flips = [not torch.equal(image, straight) for image in images if min(image.shape[1:]) == 64]
    assert 0.2 < np.mean(flips) < 0.8
    assert targets[5]["seed"] == 5
    unflipped, _ = TrainingSet(dataset, (64,), 1000, flip=False)[[(0, seed) for seed in range(10)]]
    assert all(torch.equal(image, straight) for image in unflipped)
    assert torch.equal(images[5], training_set[[(0, 5)]][0][0])


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def test_spawned_workers_load_the_same_batches_and_hand_errors_over(toy, tmp_path):
    # Of 24 images, one that the first batches do not need is removed: batches, then the error.
    root = tmp_path / "toy"
    shutil.copytree(toy, root)
    dataset = open_split(root, kind="person_keypoints", training=True, keypoints=True)
    training_set = TrainingSet(dataset, min_sizes=(64, 96), max_size=128)
    sampler = data.BatchSampler(dataset, 2, seed=5)
    expected = take(data.read_ahead(training_set, 0, sampler), 3)
    images, targets = expected[0]
    assert [image.dtype for image in images] == [torch.uint8] * 2
    assert targets[0]["masks"].shape[1:] == images[0].shape[1:]

    sampled = [dataset.image_ids[index] for batch in take(sampler, 3) for index, _ in batch]
    assert sampled == [target["image_id"] for _, targets in expected for target in targets]
    missing = next(i for i in dataset.image_ids if i not in sampled)
    (root / "train2017" / f"{missing:012d}.jpg").unlink()
    try:
        torch.multiprocessing.set_start_method("spawn", force=True)
        loader = data.read_ahead(training_set, 1, sampler)
        assert same(take(loader, 3), expected)
        with pytest.raises(UserError) as caught:
            take(loader, 30)
    finally:
        torch.multiprocessing.set_start_method("fork", force=True)
    check_sentence(caught, f"image {missing}", str(root))


def test_annotations_do_not_travel_to_the_workers(toy):
    dataset = open_split(toy, training=True)
    assert dataset._records.numel() > 10_000
    assert len(ForkingPickler.dumps(dataset)) < 4_000


# ---- Worker processes

LOADING = """
import multiprocessing, os, resource, sys
import data
root, images_per_gpu, min_size, *limits = sys.argv[1], *map(int, sys.argv[2:])
for files in limits:  # of open files: each in a process of its own
    if os.fork() == 0:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        break
else:
    if limits:
        sys.exit([os.wait() for _ in limits] == [])
dataset = data.open_split(root, "train2017", training=True)
sampler = data.BatchSampler(dataset, images_per_gpu)
loader = data.read_ahead(data.TrainingSet(dataset, [min_size]), 2, sampler)
kept = []
try:
    for _ in range(3):
        kept.append(next(loader))
except data.UserError as error:
    sys.exit(f"UserError: {error}")
print(*[process.pid for process in multiprocessing.active_children()], flush=True)
for _ in range(int(sys.stdin.readline())):
    next(loader)
"""


def start_loading(root, images_per_gpu, min_size, *limits, before=()):
    arguments = map(str, (root, images_per_gpu, min_size, *limits))
    command = [*before, sys.executable, "-c", LOADING, *arguments]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, **pipes, text=True)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until_gone(pids):
    deadline = time.monotonic() + 30
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, "a loading process stays"
        time.sleep(0.1)


def test_little_shared_memory_is_an_error_and_no_hang(toy):
    """64 MB is what Docker gives."""
    mount = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
    before = ["unshare", "-m", "sh", "-c", mount, "sh"]
    if subprocess.run([*before, "true"], capture_output=True).returncode:
        pytest.skip("no mounts allowed: /dev/shm cannot be made small")
    run = start_loading(toy, 8, 800, before=before)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 1 and errors.count("\n") == 1, errors
    assert "--shm-size" in errors and "--workers 0" in errors


def test_few_file_descriptors_are_an_error_and_no_hang(toy):
    run = start_loading(toy, 8, 100, 14, 20, 40, 64)  # at the start; in a worker; in the reader
    _, errors = run.communicate(timeout=100)
    assert errors.count("UserError") == 4, errors
    assert errors.count("ulimit -n") == errors.count("--workers 0") == 4


def test_workers_blocked_on_a_full_pipe_end_with_a_killed_main_process(toy):
    run = start_loading(toy, 100, 32)
    workers = list(map(int, run.stdout.readline().split()))
    time.sleep(2)  # their queue fills
    assert len(workers) == 2 and all(map(alive, workers))
    run.kill()
    run.communicate()
    wait_until_gone(workers)


def test_workers_leave_signals_to_the_main_process_and_end_with_it(toy):
    run = start_loading(toy, 2, 32)
    workers = list(map(int, run.stdout.readline().split()))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        for pid in workers:
            os.kill(pid, number)
    _, errors = run.communicate("20\n", timeout=60)  # so many batches more; the loader stays open
    assert run.returncode == 0, errors
    wait_until_gone(workers)


# ---- Real images


def test_real_images_and_all_kinds_of_masks(coco_mini):
    dataset = open_split(coco_mini, "val")
    assert len(dataset) == 79 and len(dataset.classes) == 80 and dataset.category_ids[-1] == 90
    assert check_masks(dataset) == {"polygons", list}  # list: the counts of an uncompressed RLE


def test_real_images_to_train_on(coco_mini):
    dataset = open_split(coco_mini, "train", "person_keypoints", training=True, keypoints=True)
    batches = data.read_ahead(TrainingSet(dataset), 0, data.BatchSampler(dataset, 2))
    distances = []
    hits = []
    for images, targets in take(batches, 8):
        for image, target in zip(images, targets):
            height, width = image.shape[1:]
            assert min(height, width) == 800 or max(height, width) == 1333
            assert target["masks"].shape == (len(target["labels"]), height, width)
            boxes, keypoints = target["boxes"], target["keypoints"]
            assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] > boxes[:, :2]).all()
            for mask, box, points in zip(target["masks"].numpy(), boxes, keypoints):
                distances += (extent(mask) - box).abs().tolist()
                x, y = points[points[:, 2] == 2, :2].floor().int().T.tolist()
                hits += mask[y, x].tolist()
    # Real annotations are not exact: most boxes are their masks', most visible keypoints on them.
    assert np.median(distances) < 0.6
    assert np.mean(hits) > 0.8


# ---- PASCAL VOC and subsets


def make_voc(root, objects, split="trainval", folder="VOC2007", name="000012"):
    base = root / folder
    for sub in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (base / sub).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 40)).save(base / "JPEGImages" / f"{name}.jpg")
    (base / "ImageSets/Main" / f"{split}.txt").write_text(name + "\n")
    entries = "".join(
        f"<object><name>{kind}</name><difficult>{difficult}</difficult><bndbox><xmin>{box[0]}</xmin>"
        f"<ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
        for kind, difficult, box in objects
    )
    path = base / "Annotations" / f"{name}.xml"
    path.write_text(
        f"<annotation><size><width>60</width><height>40</height></size>{entries}</annotation>"
    )
    return path


def test_voc_boxes_include_their_last_pixel_and_difficult_ones_only_count_for_nothing(tmp_path):
    objects = [("dog", 0, (1, 1, 60, 40)), ("cat", 1, (11, 6, 20, 15))]
    make_voc(tmp_path, objects)
    splits = [("VOC2007", "trainval")]
    training = data.VocDataset(tmp_path, splits, training=True)
    image, target = training[0]
    assert image.shape == (3, 40, 60) and training.image_ids == [12]
    assert target["boxes"].tolist() == [[0, 0, 60, 40]]  # the whole image, in continuous pixels
    assert [training.classes[label - 1] for label in target["labels"]] == ["dog"]
    evaluation = data.VocDataset(tmp_path, splits)
    assert evaluation.metric == "voc" and evaluation.num_objects == 2
    truth = evaluation.coco_gt().anns
    assert [truth[k]["difficult"] for k in (1, 2)] == [0, 1]
    assert truth[2]["bbox"] == [10, 5, 10, 10]
    assert data.VOC_CLASSES[truth[2]["category_id"] - 1] == "cat"


@pytest.mark.parametrize(
    "old, new, named",
    [
        ("</annotation>", "", ""),
        ("<size>", "<sizes>", ""),
        ("dog", "WBC", "'WBC' tools/to_coco.py"),
        ("<xmin>1<", "<xmin>nan<", "bbox"),
        ("<xmin>1<", "<xmin>left<", "'left'"),
        ("<width>60<", "<width>0<", "width"),
    ],
)
def test_bad_voc_files(tmp_path, old, new, named):
    path = make_voc(tmp_path, [("dog", 0, (1, 1, 60, 40))])
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError) as caught:
        data.VocDataset(tmp_path, [("VOC2007", "trainval")])
    check_sentence(caught, str(tmp_path), "12", *named.split())


def test_voc_reads_the_split_that_was_asked_for(tmp_path):
    dog = [("dog", 0, (1, 1, 60, 40))]
    make_voc(tmp_path, dog)
    make_voc(tmp_path, dog, "train", "VOC2012", "2008_000002")
    make_voc(tmp_path, dog, "val", "VOC2012", "2008_000005")
    for training in (False, True):
        options = dict(training=training, masks=False)
        assert data.open_split(tmp_path, "train2017", **options).image_ids == [12, 2008000002]
        assert data.open_split(tmp_path, "val2017", **options).image_ids == [2008000005]
        assert data.open_split(tmp_path, "train", **options).image_ids == [2008000002]
    for split, masks, named in (("test", False, "test.txt"), ("val2017", True, "masks=False")):
        with pytest.raises(UserError) as caught:
            data.open_split(tmp_path, split, masks=masks)
        check_sentence(caught, str(tmp_path), named)
    make_voc(tmp_path, dog, "val", "VOC2012", "IMG_7")
    with pytest.raises(UserError) as caught:
        data.open_split(tmp_path, "val2017", masks=False)
    check_sentence(caught, "IMG_7.xml", "tools/to_coco.py")


def test_subsets_are_a_function_of_the_ids_alone_and_nested():
    ids = list(range(100, 1100))
    ten, hundred = data.choose_subset(ids, 10), data.choose_subset(ids, 100)
    assert len(ten) == 10 and len(hundred) == 100 and set(ten) < set(hundred)
    assert sorted(data.choose_subset(ids[::-1], 10)) == ten
    assert ten != ids[:10] and abs(sum(hundred) / 100 - 600) < 100  # spread over all the ids
    # Pinned: another subset would be another experiment.
    assert ten == [161, 218, 275, 316, 400, 555, 579, 646, 847, 912]
    with pytest.raises(UserError) as caught:
        data.choose_subset(ids, 2000)
    check_sentence(caught, "1,000", "2,000")
