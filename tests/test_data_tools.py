"""tools/toy_coco.py, examine.py and to_coco.py: generated data, the doctor, other layouts."""

import itertools
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from data import CocoDataset, UserError
from model import Config
from tools import examine, to_coco, toy_coco
from train import RECIPES

SPLITS = ("train2017", "val2017")


def open_split(root, split="train2017", kind="instances", **options):
    return CocoDataset(root / split, root / "annotations" / f"{kind}_{split}.json", **options)


def picture(path, width=40, height=30, grey=None, **options):
    """Writes an image of noise, or of one grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([ord(letter) for letter in str(path)])
    pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
    if grey is not None:
        pixels[:] = grey
    Image.fromarray(pixels).save(path, **options)


def is_one_sentence(message):
    return "\n" not in message and message.endswith(".")


# --------------------------------------------------------------------------------------------------
# Generated data
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The root of a tiny generated data set: 24 + 8 images."""
    root = tmp_path_factory.mktemp("data") / "toy"
    toy_coco.make_toy_coco(root, train_images=24, val_images=8)
    return root


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
        for i in range(len(dataset)):
            _, target = dataset[i]
            assert len(target["masks"]) == 0 or target["masks"].sum(0).max() <= 1
            for mask, box in zip(target["masks"], target["boxes"]):
                rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
                tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert torch.stack(tight).tolist() == box.tolist()
    areas = np.array(areas)
    assert len(file_names) == 24 + 8
    assert 0.2 < np.mean(areas < 32**2) < 0.6
    assert np.mean(areas > 96**2) > 0.01


def test_toy_keypoints_are_marked_where_they_are(toy):
    seen = set()
    for split in SPLITS:
        texts = [
            (toy / "annotations" / f"{kind}_{split}.json").read_text()
            for kind in ("instances", "person_keypoints")
        ]
        instances, persons = (json.loads(text)["annotations"] for text in texts)
        boxes = {a["id"]: a["bbox"] for a in instances}
        coco = open_split(toy, split, "person_keypoints", keypoints=True).coco_gt()
        assert [a["bbox"] for a in persons] == [boxes[a["id"]] for a in persons]
        for annotation in coco.anns.values():
            keypoints = np.array(annotation["keypoints"]).reshape(17, 3)
            assert annotation["num_keypoints"] == (keypoints[:, 2] > 0).sum()
            mask = coco.annToMask(annotation)
            for x, y, v in keypoints.tolist():
                seen.add(v)
                assert v == 0 or mask[y, x] == v - 1  # 2: on the visible figure, 1: hidden
            if (keypoints[[5, 6], 2] > 0).all():
                assert keypoints[5, 0] > keypoints[6, 0]  # frontal: its left is at our right
    assert seen == {0, 1, 2}


def test_toy_is_a_function_of_the_seed_and_written_once(toy, tmp_path):
    def contents(root):
        files = [path for path in root.rglob("*") if path.is_file()]
        return {path.relative_to(root): path.read_bytes() for path in files}

    before = {path: path.stat().st_mtime_ns for path in toy.rglob("*")}
    toy_coco.make_toy_coco(toy, train_images=24, val_images=8)
    assert before == {path: path.stat().st_mtime_ns for path in toy.rglob("*")}
    again, other = tmp_path / "again", tmp_path / "other"
    again.mkdir()  # an empty folder is as good as none
    toy_coco.main([str(again), "--train", "24", "--val", "8"])
    assert contents(again) == contents(toy)
    toy_coco.make_toy_coco(other, train_images=2, val_images=2, seed=1)
    images = [path.read_bytes() for root in (toy, other) for path in root.rglob("*.jpg")]
    assert len(set(images)) == 32 + 4  # no image twice, in either split, of either seed
    for settings in ((toy, 25, 8), (toy / "toy.json", 1, 1), (tmp_path / "x", 0, 1)):
        with pytest.raises(UserError) as caught:
            toy_coco.make_toy_coco(*settings)
        assert is_one_sentence(str(caught.value))
    assert sorted(os.listdir(tmp_path)) == ["again", "other"]


@pytest.mark.parametrize("owner, function", [(json, "dumps"), (Path, "rename")])
def test_toy_interrupted_leaves_nothing(tmp_path, monkeypatch, owner, function):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, interrupt)
        with pytest.raises(KeyboardInterrupt):
            toy_coco.make_toy_coco(tmp_path / "toy", 1, 1)
    assert list(tmp_path.iterdir()) == []
    toy_coco.make_toy_coco(tmp_path / "toy", 1, 1)
    assert len(open_split(tmp_path / "toy")) == 1


def test_toy_patches_are_a_function_of_the_index():
    patches = toy_coco.ToyPatches(40, seed=3)
    image, label = patches[7]
    assert image.shape == (3, 64, 64) and image.dtype == torch.uint8
    assert torch.equal(image, toy_coco.ToyPatches(8, seed=3)[7][0])
    assert not torch.equal(image, toy_coco.ToyPatches(8, seed=4)[7][0])
    assert {patches[i][1] for i in range(40)} == {0, 1, 2, 3, 4}


# --------------------------------------------------------------------------------------------------
# The doctor
# --------------------------------------------------------------------------------------------------


def write_coco(root, train, val=None, categories=("cell",)):
    """A data set of two grey images (200x100) a split, with the annotations given."""
    for split, annotations in zip(SPLITS, (train, train if val is None else val)):
        images = []
        for i, grey in enumerate((51, 204)):  # 0.2 and 0.8: mean 0.5, deviation 0.3
            picture(root / split / f"{i}.png", 200, 100, grey + (split == "val2017"))
            images.append({"id": i, "file_name": f"{i}.png", "width": 200, "height": 100})
        listed = [{"id": k, "name": name} for k, name in enumerate(categories)]
        content = {"images": images, "annotations": annotations, "categories": listed}
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def annotation(i=0, x=10, y=10, w=40, h=40, image_id=0, **changes):
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    o = {"id": i, "image_id": image_id, "category_id": 0, "bbox": [x, y, w, h]}
    return o | {"iscrowd": 0, "area": w * h, "segmentation": [polygon]} | changes


def diagnose(root, capsys, *options):
    code = examine.main([str(root), "--workers", "0", *options])
    return code, capsys.readouterr().out


def mended(printed):
    return [line for line in printed.splitlines() if "TO MEND" in line]


def test_doctor_measures(tmp_path, capsys):
    """Statistics of two images that can be worked out by hand."""
    crowd = annotation(1, w=190, h=80, iscrowd=1)
    write_coco(tmp_path, [annotation(), crowd, annotation(2, image_id=1)])
    code, printed = diagnose(tmp_path, capsys, "--min-size", "50")
    assert code == 0 and mended(printed) == []
    assert "image_mean=(0.5000, 0.5000, 0.5000)" in printed
    assert "image_std=(0.3000, 0.3000, 0.3000)" in printed
    assert "5 % below 20" in printed and "5 % above 20" in printed  # without the crowd
    boxes_only = annotation()
    del boxes_only["segmentation"]
    write_coco(tmp_path, [boxes_only])
    code, printed = diagnose(tmp_path, capsys)
    assert code == 0 and "boxes only" in printed


@pytest.mark.parametrize("recipe", ["r50-gn", "toy-vgg"])
def test_best_iou_is_that_of_all_anchors_of_the_model(recipe):
    """Against every anchor of every level in the image, written out."""
    rng = np.random.default_rng(0)
    boxes = np.concatenate([rng.uniform(300, 500, (40, 2)), 2 ** rng.uniform(3, 8, (40, 2))], 1)
    expected = np.zeros(40)
    sizes, ratios = examine.anchors_of(RECIPES[recipe]).values()
    for stride, level in zip((4, 8, 16, 32, 64) if len(sizes) > 1 else (16,), sizes):
        x, y = (axis.ravel() for axis in np.meshgrid(*[np.arange(0, 1024, stride)] * 2))
        for size, ratio in itertools.product(level, ratios):
            w, h = size / ratio**0.5, size * ratio**0.5
            anchors = np.stack([x - w / 2, y - h / 2, np.full(x.shape, w), np.full(x.shape, h)], 1)
            ious = coco_mask.iou(boxes, anchors, np.zeros(len(anchors), dtype=np.uint8))
            expected = np.maximum(expected, ious.max(1))
    found = examine.best_iou(boxes, sizes, ratios)
    assert np.allclose(found, expected, atol=1e-9)


def test_doctor_proposes_anchors_by_shape_and_size(tmp_path, capsys):
    wide = [annotation(i, 5, 10 * i, 100, 10) for i in range(8)]
    write_coco(tmp_path, wide)
    _, printed = diagnose(tmp_path, capsys, "--min-size", "400")
    assert 'with model={"anchor_ratios": (0.1' in printed
    write_coco(tmp_path, [annotation(i, 10 * i, 10, 4, 4) for i in range(8)])
    _, printed = diagnose(tmp_path, capsys, "--min-size", "200")
    (setting,) = re.findall(r"with model=(.*)", printed)
    assert "100.0%" in printed and Config(**eval(setting)).anchor_sizes[0] == (8,)
    # anchors and size of image are those of the recipe: 8 pixels are 15 at 192
    write_coco(tmp_path, [annotation(i, 8 * i, 8, 8, 8) for i in range(8)])
    _, printed = diagnose(tmp_path, capsys, "--recipe", "small")
    assert "at 192/320" in printed and "below 2 %, nothing to do" in printed
    _, printed = diagnose(tmp_path, capsys, "--min-size", "192")
    assert "with the anchors of r50-gn" in printed and "model={" in printed
    _, printed = diagnose(tmp_path, capsys, "--recipe", "small", "--min-size", "100")
    (setting,) = re.findall(r"with model=(.*)", printed)
    assert eval(setting).keys() > {"anchor_sizes", "blocks"}  # beside the row's own fields


def test_doctor_counts_what_is_not_trained_on_or_not_found(tmp_path, capsys):
    many = [annotation(i, segmentation=[]) for i in range(120)]
    many += [annotation(200 + i) for i in range(101)]
    write_coco(tmp_path, [*many, annotation(400, w=0), annotation(401, x=150, w=90)])
    code, printed = diagnose(tmp_path, capsys)
    assert code == 0 and "120 objects have no mask" in printed
    assert "1 images have more than the 100" in printed
    assert "1 boxes without area" in printed and "1 boxes that leave" in printed
    assert len(printed.splitlines()) < 30


def test_doctor_refuses_what_stops_or_spoils_training(tmp_path, capsys):
    """Each of these passed once, and cost a run."""
    sound = [annotation()]
    cases = {
        "no annotations": {"train": [], "val": sound},
        "parts of the sides": {"train": [annotation(0, 0.1, 0.1, 0.5, 0.5)]},
        "two classes of one name": {"train": sound, "categories": ("cell", "cell")},
        "masks in one split only": {"train": sound, "val": [annotation(segmentation=[])]},
    }
    for name, case in cases.items():
        write_coco(tmp_path, **case)
        code, printed = diagnose(tmp_path, capsys)
        assert code == 1 and mended(printed), name
        assert all(".json" in line and is_one_sentence(line) for line in mended(printed)), name
    write_coco(tmp_path, sound, categories=("cell", "nut"))
    file = tmp_path / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text().replace("nut", "bolt"))
    code, printed = diagnose(tmp_path, capsys)
    assert code == 1 and "bolt" in mended(printed)[0]
    file.unlink()
    code, printed = diagnose(tmp_path, capsys)
    assert code == 1 and str(file) in mended(printed)[0]


def test_doctor_lists_every_problem_of_a_file_and_of_images(tmp_path, capsys):
    bad = [annotation(category_id=99), annotation(7), annotation(7), annotation(3, bbox=[1])]
    write_coco(tmp_path, bad, [annotation()])
    (tmp_path / "val2017" / "0.png").unlink()
    (tmp_path / "val2017" / "1.png").write_bytes(b"no image")
    code, printed = diagnose(tmp_path, capsys)
    assert code == 1 and len(mended(printed)) == 5
    for number, name in enumerate(("0.png", "1.png")):
        assert name in mended(printed)[3 + number]


def test_doctor_tells_of_images_in_both_splits_and_takes_any_split(tmp_path, capsys):
    write_coco(tmp_path, [annotation()])
    code, printed = diagnose(tmp_path, capsys)
    assert "share" not in printed
    content = (tmp_path / "train2017" / "0.png").read_bytes()
    (tmp_path / "val2017" / "0.png").write_bytes(content)
    code, printed = diagnose(tmp_path, capsys)
    assert code == 0 and "share 1 images" in printed
    for path in [*tmp_path.glob("val2017"), *tmp_path.glob("*/*val2017.json")]:
        path.rename(path.parent / path.name.replace("val2017", "dev"))
    code, printed = diagnose(tmp_path, capsys, "--val-split", "dev")
    assert code == 0 and "instances_dev.json" in printed


def test_doctor_needs_no_memory_for_masks(tmp_path, capsys, monkeypatch):
    """9000x9000 pixels and 400 objects are 30 GiB of masks."""

    def decode(*arguments):
        raise AssertionError("a mask is painted")

    whole = {"size": [100, 200], "counts": [0, 20_000]}
    write_coco(tmp_path, [annotation(), annotation(1, segmentation=whole)])
    monkeypatch.setattr(coco_mask, "decode", decode)
    code, printed = diagnose(tmp_path, capsys)
    assert code == 0 and "1 masks that do not fit their boxes" in printed


@pytest.mark.parametrize(
    "arguments, code", [([""], 1), (["nowhere"], 1), ([".", "--workers", "-1"], 2)]
)
def test_doctor_refuses_bad_use(arguments, code):
    with pytest.raises(UserError) as caught:
        examine.main(arguments)
    assert caught.value.code == code and is_one_sentence(str(caught.value))


def test_doctor_survives_every_damaged_field(tmp_path, capsys):
    write_coco(tmp_path, [annotation()])
    file = tmp_path / "annotations" / "instances_train2017.json"
    sound = file.read_text()
    for key, entries in json.loads(sound).items():
        for field in (None, *entries[0]):
            for value in (
                None,
                True,
                -1,
                1e30,
                "x",
                [],
                [[]],
                {},
                [None] * 4,
                [1, 2, 3, float("nan")],
            ):
                content = json.loads(sound)
                if field is None:
                    content[key] = value
                else:
                    content[key][0][field] = value
                file.write_text(json.dumps(content))
                assert diagnose(tmp_path, capsys)[0] in (0, 1), (key, field, value)


# --------------------------------------------------------------------------------------------------
# Other layouts
# --------------------------------------------------------------------------------------------------


def convert(root, capsys, *options, source=None):
    """Converts root/in and examines it -> (what was printed, objects and split by file name)."""
    out = root / "out"
    to_coco.main([str(source or root / "in"), str(out), *options])
    printed = capsys.readouterr().out
    code, diagnosis = diagnose(out, capsys)
    assert code == 0, diagnosis
    objects, sides = {}, {}
    for split in SPLITS:
        dataset = open_split(out, split, masks=False)
        content = json.loads(Path(dataset.annotation_file).read_text())
        names = {c["id"]: c["name"] for c in content["categories"]}
        files = {image["id"]: image["file_name"] for image in content["images"]}
        for image in content["images"]:
            objects[image["file_name"]] = []
            sides[image["file_name"]] = split
        for a in content["annotations"]:
            objects[files[a["image_id"]]].append((names[a["category_id"]], a))
    return printed, objects, sides


def write_voc(path, boxes, size=(40, 30)):
    entries = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax>"
        f"<ymax>{y2}</ymax></bndbox></object>"
        for name, x1, y1, x2, y2 in boxes
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    size = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    path.write_text(f"<annotation>{size}{entries}</annotation>", encoding="utf-8")


def test_voc_with_own_classes_and_lists(tmp_path, capsys):
    root = tmp_path / "in"
    for name in ("a", "ü", "c", "d"):
        picture(root / "JPEGImages" / f"{name}.jpg")
        write_voc(root / "Annotations" / f"{name}.xml", [("WBC", 1, 1, 40, 30), ("é", 3, 3, 9, 9)])
    (root / "Annotations" / "c.xml").write_text("no XML <")
    write_voc(root / "Annotations" / "gone.xml", [("WBC", 1, 1, 9, 9)])
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\nc\n")
    (root / "ImageSets" / "Main" / "val.txt").write_text("ü\n", encoding="utf-8")
    printed, objects, sides = convert(tmp_path, capsys)
    assert sides == {"a.jpg": "train2017", "ü.jpg": "val2017"}
    (first, a), (second, b) = objects["ü.jpg"]
    assert (first, second) == ("WBC", "é")
    assert a["bbox"] == [0, 0, 40, 30] and b["bbox"] == [2, 2, 7, 7]  # the last pixel included
    assert "segmentation" not in a
    for name in ("c.xml", "gone.xml", "c.jpg", "d.jpg"):
        assert name in printed  # each left out, each said


def test_voc_boxes_fit_an_image_that_exif_turns(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, size in (("turned", (30, 40)), ("stored", (40, 30)), ("neither", (80, 60))):
        picture(tmp_path / "in" / f"{name}.jpg", exif=exif)
        write_voc(tmp_path / "in" / f"{name}.xml", [("a", 0, 0, *size)], size)
    printed, objects, _ = convert(tmp_path, capsys)
    assert objects["turned.jpg"][0][1]["bbox"] == [0, 0, 30, 40]  # counted from 0 here
    assert objects["stored.jpg"][0][1]["bbox"] == [0, 0, 40, 30]
    assert "neither.jpg" not in objects and "neither.jpg" in printed


def test_roboflows_coco_export(tmp_path, capsys):
    listed = [
        {"id": 0, "name": "cells", "supercategory": "none"},
        {"id": 1, "name": "rbc", "supercategory": "cells"},
    ]
    for split in ("train", "valid", "test"):
        picture(tmp_path / "in" / split / "0.png")  # names repeat
        image = {"id": 0, "file_name": "0.png", "width": 40, "height": 30}
        a = annotation(0, 5, 5, 10, 10, category_id=1, segmentation=[])
        content = {"images": [image], "annotations": [a], "categories": listed}
        (tmp_path / "in" / split / "_annotations.coco.json").write_text(json.dumps(content))
    printed, objects, sides = convert(tmp_path, capsys)
    assert sorted(sides.values()) == ["train2017", "val2017"]
    (((name, a),), _) = objects.values()
    assert name == "rbc" and a["id"] > 0 and "segmentation" not in a
    assert "cells" in printed and "train with --no-masks" in printed
    for split in ("train2017", "test2017"):  # the third split is kept for evaluate.py --split
        dataset = open_split(tmp_path / "out", split, masks=False)
        assert dataset.classes == ["rbc"] and dataset.num_objects == len(dataset) == 1


def test_cvats_coco_export_finds_each_image_in_its_own_split(tmp_path, capsys):
    (tmp_path / "in" / "annotations").mkdir(parents=True)
    for split, x in (("Train", 1), ("Validation", 9)):
        picture(tmp_path / "in" / "images" / split / "0.png")
        image = {"id": 1, "file_name": "0.png", "width": 40, "height": 30}
        listed = [{"id": 0, "name": "cell"}]
        content = {"images": [image], "annotations": [annotation(1, x, image_id=1)]}
        file = tmp_path / "in" / "annotations" / f"instances_{split}.json"
        file.write_text(json.dumps(content | {"categories": listed}))
    _, objects, sides = convert(tmp_path, capsys)
    found = {sides[name]: a["bbox"][0] for name, ((_, a),) in objects.items()}
    assert found == {"train2017": 1, "val2017": 9}
    for split, folder in zip(SPLITS, ("Train", "Validation")):
        (image,) = (tmp_path / "out" / split).iterdir()
        assert image.samefile(tmp_path / "in" / "images" / folder / "0.png")


def test_a_single_coco_file_is_split_by_image(tmp_path, capsys):
    images, annotations = [], []
    for i in range(10):
        name = f"x{i // 2}.rf.{i}.png"  # Roboflow's name of one of two copies
        picture(tmp_path / "in" / "images" / "sub" / name)
        images.append({"id": i, "file_name": f"sub\\{name}", "width": 40, "height": 30})
        annotations.append(annotation(i, 5, 5, 10, 10, i))
    annotations[0]["segmentation"] = [[1, 2, 3, 4]]
    annotations.append(annotation(98, 50, 50, 5, 5))
    annotations.append(annotation(99, segmentation={"size": [1, 1], "counts": "1"}))
    content = {"images": images, "annotations": annotations, "categories": [{"id": 0, "name": "q"}]}
    file = tmp_path / "in" / "all.json"
    file.write_text(json.dumps(content))
    options = ("--val-share", "0.4", "--copy")
    printed, objects, sides = convert(tmp_path, capsys, *options, source=file)
    assert list(sides.values()).count("val2017") == 4
    assert len({(name.split(".")[0], side) for name, side in sides.items()}) == 5
    assert sum(map(len, objects.values())) == 10 and printed.count("1 objects left out") == 2
    assert {a["area"] for _, a in sum(objects.values(), [])} == {100}
    (tmp_path / "out").rename(tmp_path / "before")
    assert convert(tmp_path, capsys, *options, source=file)[2] == sides


@pytest.mark.parametrize(
    "name, names",
    [
        ("data.yaml", "nc: 2\nnames: ['a', \"b c\"]  # two\nval: x\n"),
        ("data.yaml", "names:\n  0: a\n  1: 'b c'\nnc: 2\n"),
        ("data.yaml", "names:\n- a\n\n- b c\n"),
        ("data.yml", "names: {0: a, 1: b c}\n"),
        ("data.yaml", "names: [\n  a,\n  b c,\n]\n"),
        ("classes.txt", "a\nb c\n"),
    ],
)
def test_yolo_boxes_and_polygons(tmp_path, capsys, name, names):
    root = tmp_path / "in"
    for split in ("train", "val"):
        picture(root / "images" / split / "0.png")
        (root / "labels" / split).mkdir(parents=True)
        lines = "0 .5 .5 .25 .2\n1 .1 .1 .5 .1 .5 .5\n\n0 .5 .5 .2\n0 120 3 4 5\nx\n"
        (root / "labels" / split / "0.txt").write_text(lines)
    picture(root / "images" / "train" / "background.png")
    (root / name).write_text(names)
    printed, objects, sides = convert(tmp_path, capsys)
    assert objects["background.png"] == [] and len(sides) == 3
    (first, a), (second, b) = objects["0.png"]
    assert (first, second) == ("a", "b c")
    assert a["bbox"] == [15, 12, 10, 6] and np.allclose(b["bbox"], [4, 3, 16, 12])
    assert np.allclose(b["segmentation"], [[4, 3, 20, 3, 20, 15]])
    assert "6 lines left out" in printed and "0.txt, line 4" in printed


def test_masks_numbered_in_16_bits_or_by_colour(tmp_path, capsys):
    root = tmp_path / "in"
    for i, kind in enumerate((np.uint16, np.uint8)):
        picture(root / "images" / f"{i}.jpg")
        mask = np.zeros((30, 40) if i == 0 else (30, 40, 3), kind)
        mask[2:8, 3:9] = 300 if i == 0 else (0, 9, 0)
        mask[10:20, 10:30] = 40_000 if i == 0 else (9, 0, 0)
        (root / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(root / "masks" / f"{i}.png")
    _, objects, _ = convert(tmp_path, capsys, "--class-name", "cell")
    for found in objects.values():
        assert [name for name, _ in found] == ["cell"] * 2
        assert [a["bbox"] for _, a in found] == [[3, 2, 6, 6], [10, 10, 20, 10]]
        assert [a["area"] for _, a in found] == [36, 200]


@pytest.mark.parametrize(
    "form", ["{i}/images/x.png {i}/masks/{k}.png", "i/{i}.png masks/{i}/{k}.png"]
)
def test_masks_of_one_file_an_object(tmp_path, capsys, form):
    image, mask_name = form.split()
    for i in range(3):
        picture(tmp_path / "in" / image.format(i=i))
        for k in range(i + 1):  # the masks are named as if they were images 0, 1, 2
            mask = np.zeros((30, 40), np.uint8)
            mask[9 * k : 9 * k + 6, 3:9] = 255
            mask[9 * k, 3] = 20  # a soft edge is no object of its own
            path = tmp_path / "in" / mask_name.format(i=i, k=k)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(path)
    _, objects, _ = convert(tmp_path, capsys)
    assert sorted(map(len, objects.values())) == [1, 2, 3]
    for found in objects.values():
        assert [a["bbox"] for _, a in found] == [[3, 9 * k, 6, 6] for k in range(len(found))]
        assert {a["area"] for _, a in found} == {35}


def test_images_of_one_name_stay_apart_and_are_never_changed(tmp_path, capsys):
    for folder in ("a", "b"):
        picture(tmp_path / "in" / folder / "0.png")
        write_voc(tmp_path / "in" / folder / "0.xml", [(folder, 1, 1, 9, 9)])
    files = [path for path in (tmp_path / "in").rglob("*.png")]
    before = {path: path.read_bytes() for path in files}
    _, objects, _ = convert(tmp_path, capsys)
    assert sorted(found[0][0] for found in objects.values()) == ["a", "b"]
    made = {path.read_bytes(): path for path in (tmp_path / "out").rglob("*.png")}
    assert set(made) == set(before.values()) == {path.read_bytes() for path in files}
    assert all(made[content].samefile(path) for path, content in before.items())  # linked


def test_data_sets_of_several_layouts_are_merged_by_way_of_parts(tmp_path, capsys):
    """Converted together they would hide each other's pictures, so that is refused."""
    root = tmp_path / "in"
    for split in ("train", "val"):
        picture(root / "voc" / split / "0.png")
        write_voc(root / "voc" / split / "0.xml", [("cell", 1, 1, 9, 9), ("nut", 11, 1, 19, 9)])
        picture(root / "masks" / "images" / split / "0.png")  # the data set has a mask's name
        mask = np.zeros((30, 40), np.uint8)
        mask[10:20, 10:30] = 7
        (root / "masks" / "masks" / split).mkdir(parents=True)
        Image.fromarray(mask).save(root / "masks" / "masks" / split / "0.png")
    with pytest.raises(UserError, match="VOC, masks; .*parts") as caught:
        to_coco.convert(root, tmp_path / "out")
    assert is_one_sentence(str(caught.value)) and not (tmp_path / "out").exists()
    for part in ("voc", "masks"):
        source, out = str(root / part), str(tmp_path / "parts" / part)
        to_coco.main([source, out, "--class-name", "cell"])
    printed, objects, sides = convert(tmp_path, capsys, source=tmp_path / "parts")
    assert sorted(sides.values()) == ["train2017"] * 2 + ["val2017"] * 2
    found = sorted([(name, a["bbox"], a["area"]) for name, a in o] for o in objects.values())
    of_voc = [("cell", [0, 0, 9, 9], 81), ("nut", [10, 0, 9, 9], 81)]
    assert found == [of_voc] * 2 + [[("cell", [10, 10, 20, 10], 200)]] * 2
    assert "4 objects have none: train with --no-masks" in printed
    assert open_split(tmp_path / "out", training=True).num_objects == 1  # the one with a mask


def test_what_stays_out_is_told_by_its_reason(tmp_path, capsys):
    for name in ("a/0.png", "b/0.png", "1.png", "2.png"):
        picture(tmp_path / "in" / name)
    for name in ("xml/0", "1", "2", "photo", "gone"):  # 0: two files have the name
        write_voc(tmp_path / "in" / f"{name}.xml", [("x", 1, 1, 9, 9)])
    (tmp_path / "in" / "photo.HEIC").write_bytes(b"a phone's")
    (tmp_path / "in" / "1.txt").write_text("a caption, and no line of YOLO")
    printed, objects, _ = convert(tmp_path, capsys)
    assert sorted(objects) == ["1.png", "2.png"]
    assert "1 files left out, as their format is not read" in printed and "photo.HEIC" in printed
    assert "1 annotated images left out, as several files have their name" in printed
    assert "2 annotated images left out, as no image file has their name" in printed


def semantic_case(root):
    picture(root / "train" / "0.jpg")
    picture(root / "train" / "0_mask.png")


def yolo_case(lines, yaml=None):
    def write(root):
        for i in range(2):
            picture(root / f"{i}.png")
            (root / f"{i}.txt").write_text(lines)
        if yaml is not None:
            (root / "data.yaml").write_bytes(yaml)

    return write


def mask_case(content):
    def write(root):
        picture(root / "images" / "0.png")
        (root / "masks").mkdir()
        (root / "masks" / "0.png").write_bytes(content)

    return write


def twice(root):
    picture(root / "0.png")
    image = {"id": 0, "file_name": "0.png", "width": 40, "height": 30}
    content = {"images": [image], "annotations": [], "categories": []}
    for name in ("a.json", "b.json"):
        (root / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    "write, named",
    [
        (lambda root: None, "in"),  # an empty folder
        (lambda root: picture(root / "0.png"), "in"),  # nothing annotated
        (lambda root: (root / "a.json").write_bytes(b"\xff"), "a.json"),
        (lambda root: (root / "a.json").write_text("[" * 100_000), "in"),
        (yolo_case("0 .5 .5\n"), "in"),  # nothing usable
        (yolo_case("2 .5 .5 .2 .2\n", b"names: [a, b]\n"), "0.txt, line 1"),  # a class unlisted
        (yolo_case("0 .5 .5 .2 .2\n", b"names: &x [*y]\n"), "data.yaml"),
        (yolo_case("0 .5 .5 .2 .2\n", b"names: [\xff]\n"), "data.yaml"),
        (mask_case(b"no image"), "masks/0.png"),
        (semantic_case, "0_mask.png is a semantic mask"),
        (twice, "0.png"),
    ],
)
def test_what_cannot_be_converted_is_one_sentence(tmp_path, write, named):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in")
    with pytest.raises(UserError) as caught:
        to_coco.convert(tmp_path / "in", tmp_path / "out")
    assert is_one_sentence(str(caught.value)) and named in str(caught.value)
    assert os.listdir(tmp_path) == ["in"]
