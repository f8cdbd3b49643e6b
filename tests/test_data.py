"""data.py: geometry, reading, bad input, sampler, loader, generated data, real COCO images."""

import copy
import io
import itertools
import json
import os
import shutil
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
from data import CocoDataset, DataError, TrainingSet

SPLITS = ("train", "val")


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The root of a tiny generated data set: 24 + 8 images."""
    root = tmp_path_factory.mktemp("data") / "toy"
    data.make_toy_coco(root, train_images=24, val_images=8)
    return root


def open_split(root, split="train", kind="instances", **options):
    annotation_file = root / "annotations" / f"{kind}_{split}2017.json"
    return CocoDataset(root / f"{split}2017", annotation_file, **options)


@pytest.fixture(scope="session")
def coco_mini():
    if "COCO_DIR" not in os.environ:
        pytest.skip("COCO_DIR is not set: no real COCO images to test with")
    return Path(os.environ["COCO_DIR"])


def write_coco(folder, width=60, height=40, **changes):
    """A data set of one grey image (id 7) with one object (id 5) -> CocoDataset's two paths."""
    Image.new("RGB", (width, height), (90, 90, 90)).save(folder / "a.png")
    content = {
        "images": [{"id": 7, "file_name": "a.png", "width": width, "height": height}],
        "categories": [{"id": 3, "name": "person"}],
        "annotations": [
            {
                "id": 5,
                "image_id": 7,
                "category_id": 3,
                "bbox": [10, 10, 20, 8],
                "area": 160,
                "iscrowd": 0,
                "segmentation": [[10, 10, 30, 10, 30, 18, 10, 18]],
            }
        ],
    }
    content.update(copy.deepcopy(changes))
    (folder / "coco.json").write_text(json.dumps(content))
    return folder, folder / "coco.json"


# ------------------------------------------------------------------------------------------------
# Transforms
# ------------------------------------------------------------------------------------------------


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
    keypoints = [0, 0, 0, x1, y1, 2, x2 - 1, y2 - 1, 1] + [0] * 42
    objects = [
        {
            "id": k,
            "image_id": 7,
            "category_id": 3,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "keypoints": keypoints,
            "segmentation": segmentation,
        }
        for k, segmentation in enumerate((polygon, rle))
    ]
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
    names = [data.KEYPOINT_NAMES[k] for k in data.KEYPOINT_FLIP]
    swapped = [
        name.replace("left", "L").replace("right", "left").replace("L", "right")
        for name in data.KEYPOINT_NAMES
    ]
    assert names == swapped


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


# ------------------------------------------------------------------------------------------------
# Reading images
# ------------------------------------------------------------------------------------------------


def picture(mode):
    """A 16 x 16 image of a mode that should be read as the colour given with it."""
    if mode == "I;16":
        return Image.fromarray(np.full((16, 16), 100 * 257, dtype=np.uint16)), (100, 100, 100)
    if mode in ("L", "LA"):
        return Image.new("L", (16, 16), 100).convert(mode), (100, 100, 100)
    if mode == "1":
        return Image.new("1", (16, 16), 1), (255, 255, 255)
    if mode == "RGBA":
        return Image.new("RGBA", (16, 16), (10, 100, 200, 30)), (10, 100, 200)
    image = Image.new("RGB", (16, 16), (10, 100, 200))
    return image.quantize() if mode == "P" else image.convert(mode), (10, 100, 200)


@pytest.mark.parametrize(
    "mode, suffix",
    [
        ("RGB", "png"),
        ("L", "png"),
        ("LA", "png"),
        ("1", "png"),
        ("P", "png"),
        ("RGBA", "png"),
        ("I;16", "png"),
        ("I;16", "tiff"),
        ("CMYK", "jpg"),
        ("CMYK", "tiff"),
        ("L", "jpg"),
    ],
)
def test_every_kind_of_image_becomes_rgb(tmp_path, mode, suffix):
    image, color = picture(mode)
    path = tmp_path / f"image.{suffix}"
    image.save(path)
    read = data.read_image(path, 16, 16)
    assert read.dtype == torch.uint8 and read.shape == (3, 16, 16)
    error = (read.int() - torch.tensor(color)[:, None, None]).abs().max()
    assert error <= 3  # JPEG


def test_annotated_size_decides_on_the_exif_orientation(tmp_path):
    path = tmp_path / "a.jpg"
    image = Image.new("RGB", (30, 20))
    image.paste((255, 255, 255), (0, 0, 30, 8))  # the upper part is white ...
    exif = Image.Exif()
    exif[data.EXIF_ORIENTATION] = 6  # ... and shown at the right
    image.save(path, exif=exif, quality=95)
    for stated in ((30, 20), (20, 30), (None, None)):
        read = data.read_image(path, *stated)
        assert read.shape[1:] == ((20, 30) if stated == (30, 20) else (30, 20))
        assert (read[0, 0] > 127).all() == (stated == (30, 20))
        assert (read[0, :, -1] > 127).all() == (stated != (30, 20))
    with pytest.raises(DataError, match="30x20 pixels but annotated as 40x30"):
        data.read_image(path, 40, 30, image_id=1)


def make_bad_image(folder, kind):
    """Puts an unreadable a.png into folder -> the file name to annotate."""
    path = folder / "a.png"
    if kind == "truncated":
        noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(noise).save(stream, "PNG")
        path.write_bytes(stream.getvalue()[:-3000])
    elif kind == "no image":
        path.write_text("hello")
    elif kind == "bomb":  # a header that promises 10,000 x 10,000 pixels, of which PIL only warns
        stream = io.BytesIO()
        Image.new("1", (8, 8)).save(stream, "PNG")
        header = bytearray(stream.getvalue())
        header[16:24] = (10_000).to_bytes(4, "big") * 2
        header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
        path.write_bytes(header)
    elif kind == "postscript":
        path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 40\nshowpage\n")
    elif kind == "missing":
        path.unlink()
    elif kind == "link":
        outside = folder.parent / (folder.name + "-outside.png")
        path.rename(outside)
        path.symlink_to(outside)
    elif kind == "dots":
        (folder.parent / (folder.name + "-b.png")).write_bytes(path.read_bytes())
        return f"../{folder.name}-b.png"
    elif kind == "absolute":
        return "/etc/hostname"
    elif kind == "null":
        return "a\0.png"
    return "a.png"


@pytest.mark.parametrize(
    "kind, message",
    [
        ("truncated", "truncated"),
        ("no image", "cannot be read"),
        ("bomb", "pixels"),
        ("postscript", "cannot identify"),
        ("missing", "does not exist"),
        ("link", "leads out of"),
        ("dots", "leads out of"),
        ("absolute", "leads out of"),
        ("null", "leads out of"),
    ],
)
def test_bad_image_files(tmp_path, kind, message):
    write_coco(tmp_path)
    name = make_bad_image(tmp_path, kind)
    (tmp_path / "coco.json").write_text(
        json.dumps(
            {"images": [{"id": 7, "file_name": name, "width": 60, "height": 40}], "categories": []}
        )
    )
    dataset = CocoDataset(tmp_path, tmp_path / "coco.json")
    with pytest.raises(DataError, match=message) as caught:
        dataset[0]
    text = str(caught.value)
    assert "7" in text and "\n" not in text and text.endswith(".")
    assert str(tmp_path) in text


# ------------------------------------------------------------------------------------------------
# COCO
# ------------------------------------------------------------------------------------------------


def changed(path, value):
    """A function that sets content[path[0]][path[1]]... to value, or deletes it for DELETE."""

    def change(content):
        for key in path[:-1]:
            content = content[key]
        if value is DELETE:
            del content[path[-1]]
        else:
            content[path[-1]] = value

    return change


DELETE = object()
OBJECT = ("annotations", 0)
RLE = {"size": [40, 60], "counts": [100, 300, 2000]}


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("images",), DELETE, "not a COCO annotation file"),
        (("categories",), DELETE, "not a COCO annotation file"),
        (("images",), {}, "list"),
        (("images", 0), [], "without an integer id"),
        (("images", 0, "id"), "7", "without an integer id"),
        (("images", 0, "file_name"), DELETE, "image 7.*file_name"),
        (("images", 0, "width"), 0, "image 7.*width"),
        (("images", 0, "height"), 40.5, "image 7.*height"),
        (("images", 0, "width"), 61, "60x40 pixels but annotated as 61x40"),
        (("images",), [{"id": 7, "file_name": "a.png", "width": 60, "height": 40}] * 2, "twice"),
        (("annotations",), DELETE, "no image to train on"),
        ((*OBJECT, "id"), DELETE, "without an integer id"),
        ((*OBJECT, "image_id"), 8, "annotation 5 of image 8 belongs to no image"),
        ((*OBJECT, "image_id"), [7], "belongs to no image"),
        ((*OBJECT, "category_id"), 99, "annotation 5 of image 7 has category 99"),
        ((*OBJECT, "category_id"), DELETE, "has category None"),
        ((*OBJECT, "bbox"), DELETE, "bbox"),
        ((*OBJECT, "bbox"), [1, 2, 3], "bbox"),
        ((*OBJECT, "bbox"), [1, 2, 3, float("nan")], "bbox"),
        ((*OBJECT, "bbox"), [1, 2, 3, "4"], "bbox"),
        ((*OBJECT, "iscrowd"), 2, "iscrowd"),
        ((*OBJECT, "segmentation"), DELETE, "segmentation"),
        ((*OBJECT, "segmentation"), "x", "neither polygons nor an RLE"),
        ((*OBJECT, "segmentation"), [[1, 2, 3, 4, 5, 6, 7]], "malformed polygon"),
        ((*OBJECT, "segmentation"), [[1, 2, 3, 4, 5, None]], "malformed polygon"),
        ((*OBJECT, "segmentation"), [[1, 2, 3, 4, 5, 1e300]], "malformed polygon"),
        ((*OBJECT, "segmentation"), [1, 2, 3, 4, 5, 6], "malformed polygon"),
        ((*OBJECT, "segmentation"), {**RLE, "size": [60, 40]}, r"size \[40, 60\]"),
        ((*OBJECT, "segmentation"), {**RLE, "counts": [100, 300, 2001]}, "counts"),
        ((*OBJECT, "segmentation"), {**RLE, "counts": [100, -300, 2600]}, "counts"),
        ((*OBJECT, "segmentation"), {**RLE, "counts": "oooooo"}, "counts"),
        ((*OBJECT, "segmentation"), {**RLE, "counts": "é"}, "counts"),
        ((*OBJECT, "segmentation"), {**RLE, "counts": None}, "counts"),
    ],
)
def test_bad_annotations(tmp_path, path, value, message):
    folder, annotation_file = write_coco(tmp_path)
    content = json.loads(annotation_file.read_text())
    changed(path, value)(content)
    annotation_file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        CocoDataset(folder, annotation_file, training=True)[0]
    text = str(caught.value)
    assert str(folder) in text and "\n" not in text and text.endswith(".")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", "[" * 100_000, "null"])
def test_no_coco_json(tmp_path, text):
    (tmp_path / "coco.json").write_text(text)
    with pytest.raises(DataError, match="coco.json is not"):
        CocoDataset(tmp_path, tmp_path / "coco.json")
    with pytest.raises(DataError, match="cannot be opened"):
        CocoDataset(tmp_path, tmp_path / "other.json")
    with pytest.raises(DataError, match="folder .* does not exist"):
        CocoDataset(tmp_path / "images", tmp_path / "coco.json")


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


def test_keypoint_training_keeps_images_with_a_labelled_keypoint(toy):
    coco = open_split(toy, kind="person_keypoints").coco_gt()
    wanted = {a["image_id"] for a in coco.anns.values() if a["num_keypoints"] and not a["iscrowd"]}
    dataset = open_split(toy, kind="person_keypoints", training=True, keypoints=True)
    assert set(dataset.image_ids) == wanted and 0 < len(wanted) < 24
    assert dataset.classes == ["person"] and dataset.keypoints
    _, target = dataset[0]
    assert target["keypoints"].shape == (len(target["boxes"]), 17, 3)
    with pytest.raises(DataError, match='needs "keypoints"'):
        open_split(toy, keypoints=True)


# ------------------------------------------------------------------------------------------------
# Sampler and loader
# ------------------------------------------------------------------------------------------------


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def sizes(landscape, portrait):
    return types.SimpleNamespace(
        widths=np.array([4, 3] * 3 + [4] * (landscape - 3) + [3] * (portrait - 3)),
        heights=np.array([3, 4] * 3 + [3] * (landscape - 3) + [4] * (portrait - 3)),
    )


def test_image_seed_is_a_fixed_hash():
    seeds = {data.image_seed(*key) for key in itertools.product(range(5), range(40), range(40))}
    assert len(seeds) == 5 * 40 * 40
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Written down once: another value would change every run that is resumed.
    assert data.image_seed(0, 0, 0) == 1279368494785126216


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
        assert seeds == [data.image_seed(1, i, position) for position in range(6)]
    for r in range(3):
        later = data.BatchSampler(dataset, 2, seed=1, rank=r, world_size=3, start_iteration=7)
        assert take(later, 13) == ranks[r][7:]
    # Resumed at iteration 7 by two processes instead of three, the stream goes on where it was.
    resumed = data.BatchSampler(dataset, 2, seed=1, world_size=2, start_iteration=7, first_image=42)
    assert [index for index, _ in next(iter(resumed))] == [index for index, _ in whole[21]]


def test_sampler_with_fewer_images_than_a_group():
    dataset = types.SimpleNamespace(widths=np.array([4, 4, 3]), heights=np.array([3, 3, 4]))
    groups = take(data.BatchSampler(dataset, images_per_gpu=4), 2)
    assert sorted(sorted(index for index, _ in group) for group in groups) == [
        [0, 0, 1, 1],
        [2, 2, 2, 2],
    ]


def test_training_set_draws_by_the_seed(toy):
    dataset = open_split(toy, training=True, masks=False)
    training_set = TrainingSet(dataset, min_sizes=(64, 80, 96), max_size=1000)
    drawn = [training_set[0, seed] for seed in range(60)]
    shorter = [min(image.shape[1:]) for image, _ in drawn]
    assert {shorter.count(size) > 9 for size in (64, 80, 96)} == {True}
    straight, _ = dataset.load(0, 64, 1000)
    flips = [not torch.equal(image, straight) for image, _ in drawn if min(image.shape[1:]) == 64]
    assert 0.2 < np.mean(flips) < 0.8
    assert drawn[5][1]["seed"] == 5
    unflipped = TrainingSet(dataset, min_sizes=(64,), max_size=1000, flip=False)
    assert all(torch.equal(unflipped[0, seed][0], straight) for seed in range(10))
    assert torch.equal(drawn[5][0], training_set[0, 5][0])


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def test_spawned_workers_load_the_same_batches_and_hand_errors_over(toy, tmp_path):
    # Of 24 images, those of the first epoch's later half are removed: batches, then the error.
    root = tmp_path / "toy"
    shutil.copytree(toy, root)
    dataset = open_split(root, kind="person_keypoints", training=True, keypoints=True)
    options = dict(images_per_gpu=2, seed=5, min_sizes=(64, 96), max_size=128)
    expected = take(data.training_loader(dataset, workers=0, **options), 3)
    images, targets = expected[0]
    assert [image.dtype for image in images] == [torch.uint8] * 2
    assert targets[0]["masks"].shape[1:] == images[0].shape[1:]

    sampled = [
        dataset.image_ids[index]
        for batch in take(data.BatchSampler(dataset, 2, 5), 3)
        for index, _ in batch
    ]
    assert sampled == [target["image_id"] for _, targets in expected for target in targets]
    missing = next(i for i in dataset.image_ids if i not in sampled)
    (root / "train2017" / f"{missing:012d}.jpg").unlink()
    loader = data.training_loader(dataset, workers=2, start_method="spawn", **options)
    assert same(take(loader, 3), expected)
    with pytest.raises(DataError, match=f"image {missing}. does not exist") as caught:
        take(loader, 30)
    assert "Traceback" not in str(caught.value)


def test_annotations_do_not_travel_to_the_workers(toy):
    dataset = open_split(toy, training=True)
    assert dataset._records.numel() > 10_000
    assert len(ForkingPickler.dumps(dataset)) < 4_000


# ------------------------------------------------------------------------------------------------
# Generated data
# ------------------------------------------------------------------------------------------------


def test_toy_has_everything(toy):
    file_names = set()
    areas = []
    for split in SPLITS:
        dataset = open_split(toy, split)
        coco = dataset.coco_gt()
        annotations = list(coco.anns.values())
        assert dataset.classes == ["person", "disk", "square", "triangle", "star"]
        assert np.diff(dataset.category_ids).max() > 1  # ids with gaps
        assert any(a["iscrowd"] for a in annotations)
        assert {type(a["segmentation"]) for a in annotations} == {list, dict}
        assert len({a["image_id"] for a in annotations}) < len(dataset)  # one without objects
        assert len(set(dataset.widths >= dataset.heights)) == 2
        areas += [a["area"] for a in annotations if not a["iscrowd"]]
        file_names |= {image["file_name"] for image in coco.imgs.values()}
        for _, target in dataset:
            assert target["masks"].sum(0).max() <= 1 if len(target["masks"]) else True
            for mask, box in zip(target["masks"], target["boxes"]):
                assert (extent(mask.numpy()) - box).abs().max() == 0
    areas = np.array(areas)
    assert len(file_names) == 24 + 8
    assert 0.2 < np.mean(areas < 32**2) < 0.6
    assert np.mean(areas > 96**2) > 0.01


def test_toy_keypoints_are_marked_where_they_are(toy):
    seen = set()
    for split in SPLITS:
        instances = open_split(toy, split).coco_gt().anns
        coco = open_split(toy, split, "person_keypoints", keypoints=True).coco_gt()
        for annotation_id, annotation in coco.anns.items():
            keypoints = np.array(annotation["keypoints"]).reshape(17, 3)
            assert annotation["num_keypoints"] == (keypoints[:, 2] > 0).sum()
            assert annotation["bbox"] == instances[annotation_id]["bbox"]
            mask = coco.annToMask(annotation)
            for x, y, v in keypoints.tolist():
                seen.add(v)
                assert v == 0 or mask[y, x] == v - 1  # 2: on the visible figure, 1: hidden
            if (keypoints[[5, 6], 2] > 0).all():
                assert keypoints[5, 0] > keypoints[6, 0]  # frontal: its left is at our right
    assert seen == {0, 1, 2}


def test_toy_is_a_function_of_the_seed_and_written_once(toy, tmp_path):
    def contents(root):
        return {
            path.relative_to(root): path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }

    before = {path: path.stat().st_mtime_ns for path in toy.rglob("*")}
    data.make_toy_coco(toy, train_images=24, val_images=8)
    assert before == {path: path.stat().st_mtime_ns for path in toy.rglob("*")}
    again, other = tmp_path / "again", tmp_path / "other"
    again.mkdir()  # an empty folder is as good as none
    data.make_toy_coco(again, train_images=24, val_images=8)
    assert contents(again) == contents(toy)
    data.make_toy_coco(other, train_images=2, val_images=2, seed=1)
    images = [path.read_bytes() for root in (toy, other) for path in root.rglob("*.jpg")]
    assert len(set(images)) == 32 + 4  # no image twice, in either split, of either seed
    with pytest.raises(DataError, match="something else"):
        data.make_toy_coco(toy, train_images=25, val_images=8)
    assert not [path for path in tmp_path.iterdir() if "unfinished" in path.name]


@pytest.mark.parametrize("module, function", [(json, "dump"), (os, "rename")])
def test_toy_interrupted_leaves_nothing(tmp_path, monkeypatch, module, function):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, function, interrupt)
        with pytest.raises(KeyboardInterrupt):
            data.make_toy_coco(tmp_path / "toy", 1, 1)
    assert list(tmp_path.iterdir()) == []
    data.make_toy_coco(tmp_path / "toy", 1, 1)
    assert len(open_split(tmp_path / "toy")) == 1


# ------------------------------------------------------------------------------------------------
# Real images
# ------------------------------------------------------------------------------------------------


def test_real_images_and_all_kinds_of_masks(coco_mini):
    dataset = open_split(coco_mini, "val")
    assert len(dataset) == 79 and len(dataset.classes) == 80 and dataset.category_ids[-1] == 90
    assert check_masks(dataset) == {"polygons", list}  # list: the counts of an uncompressed RLE


def test_real_images_to_train_on(coco_mini):
    dataset = open_split(coco_mini, "train", "person_keypoints", training=True, keypoints=True)
    batches = data.training_loader(dataset, images_per_gpu=2, workers=0)
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


# ---- The doctor


def test_doctor_lists_everything(tmp_path, capsys):
    data.make_toy_coco(tmp_path / "toy", train_images=6, val_images=2)
    root = tmp_path / "toy"
    assert data.main([str(root), "--workers", "0"]) == 0
    assert "Nothing here would stop training" in capsys.readouterr().out

    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    sound = json.dumps(content)
    first, second, third = content["images"][:3]
    (root / "train2017" / first["file_name"]).unlink()
    image = root / "train2017" / second["file_name"]
    image.write_bytes(image.read_bytes()[:500])
    third["width"] += 1
    path.write_text(json.dumps(content))
    assert data.main([str(root), "--workers", "0"]) == 1
    printed = capsys.readouterr().out
    for entry in (first, second, third):
        assert any(entry["file_name"] in line for line in printed.splitlines()), entry

    content = json.loads(sound)
    content["annotations"][0]["category_id"] = 99
    content["annotations"][1]["id"] = content["annotations"][2]["id"]
    path.write_text(json.dumps(content))
    assert data.main([str(root), "--workers", "0"]) == 1
    printed = capsys.readouterr().out
    assert "category 99" in printed and "appears twice" in printed


def test_doctor_counts_and_measures(tmp_path, capsys):
    """Statistics of two images that can be worked out by hand."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train2017").mkdir()
    images, annotations = [], []
    for i, grey in enumerate((51, 204)):  # 0.2 and 0.8: mean 0.5, deviation 0.3
        Image.new("RGB", (200, 100), (grey,) * 3).save(tmp_path / "train2017" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 200, "height": 100})
        annotations.append(
            {
                "id": i,
                "image_id": i,
                "category_id": 7,
                "bbox": [10, 10, 40, 40],
                "area": 1600,
                "iscrowd": 0,
                "segmentation": [[10, 10, 50, 10, 50, 50, 10, 50]],
            }
        )
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 7, "name": "cell"}],
    }
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    assert data.main([str(tmp_path), "--workers", "0", "--min-size", "50"]) == 0
    printed = capsys.readouterr().out
    assert "2 objects (0 crowds), 1 classes: cell 2" in printed
    assert "image_mean=(0.5000, 0.5000, 0.5000), image_std=(0.3000, 0.3000, 0.3000)" in printed
    assert "half below 20" in printed  # 40 pixels at half the size
    for annotation in annotations:
        del annotation["segmentation"]
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    assert data.main([str(tmp_path), "--workers", "0"]) == 0
    assert "boxes only" in capsys.readouterr().out


def test_polygons_without_area_are_left_out():
    square = [0.0, 0.0, 4.0, 0.0, 4.0, 4.0, 0.0, 4.0]
    assert len(data.parse_segmentation([square, [1, 2, 3, 4]], 8, 8, "here")) == 1


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
    path = make_voc(tmp_path, objects)
    splits = [("VOC2007", "trainval")]
    training = data.VocDataset(tmp_path, splits, training=True)
    image, target = training[0]
    assert image.shape == (3, 40, 60) and training.image_ids == [12]
    assert target["boxes"].tolist() == [[0, 0, 60, 40]]  # the whole image, in continuous pixels
    assert [training.classes[label - 1] for label in target["labels"]] == ["dog"]
    truths = data.VocDataset(tmp_path, splits).voc_truths()
    boxes, difficult = truths[data.VOC_CLASSES.index("cat") + 1][12]
    assert boxes.tolist() == [[10, 5, 20, 15]] and difficult.tolist() == [True]

    for broken in (
        "<annotation>",
        "<annotation></annotation>",
        path.read_text().replace("dog", "dragon"),
    ):
        path.write_text(broken)
        with pytest.raises(DataError, match="000012.xml"):
            data.VocDataset(tmp_path, splits)
    with pytest.raises(DataError, match="trainval.txt"):
        data.VocDataset(tmp_path / "nothing", splits)
    with pytest.raises(DataError, match="no split 'test2007'"):
        make_voc(tmp_path, objects, "val", "VOC2012")
        data.open_split(tmp_path, "test2007", masks=False)
    with pytest.raises(DataError, match="boxes only"):
        data.open_split(tmp_path, "val2017")


def test_subsets_are_a_function_of_the_ids_alone_and_nested():
    ids = list(range(100, 1100))
    ten, hundred = data.choose_subset(ids, 10), data.choose_subset(ids, 100)
    assert len(ten) == 10 and len(hundred) == 100 and set(ten) < set(hundred)
    assert sorted(data.choose_subset(ids[::-1], 10)) == ten
    assert ten != ids[:10] and abs(sum(hundred) / 100 - 600) < 100  # spread over all the ids
    # Pinned: another subset would be another experiment.
    assert ten == [161, 218, 275, 316, 400, 555, 579, 646, 847, 912]
    with pytest.raises(DataError, match="smaller"):
        data.choose_subset(ids, 2000)
