"""tools/toy_coco.py, examine.py and to_coco.py: generated data, the doctor, other layouts."""

import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torchvision import ops

from data import UserError, open_split
from tools import examine, to_coco, toy_coco

SPLITS = ("train2017", "val2017")


def picture(path, pixels=None, **options):
    """Writes an image of noise, of 40x30, or of the pixels given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if pixels is None:
        rng = np.random.default_rng([ord(letter) for letter in str(path)])
        pixels = rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding)


# -- Generated data --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The root of a tiny generated data set: 24 + 8 images."""
    root = tmp_path_factory.mktemp("data") / "toy"
    toy_coco.make_toy_coco(root, train_images=24, val_images=8)
    return root


def test_toy_has_everything(toy):
    areas = []
    for split in SPLITS:
        dataset = open_split(toy, split)
        annotations = list(dataset.coco_gt().anns.values())
        assert dataset.classes == ["person", "disk", "square", "triangle", "star"]
        assert np.diff(dataset.category_ids).max() > 1  # ids with gaps
        assert any(a["iscrowd"] for a in annotations)
        assert {type(a["segmentation"]) for a in annotations} == {list, dict}
        assert len({a["image_id"] for a in annotations}) < len(dataset)  # one without objects
        areas += [a["area"] for a in annotations if not a["iscrowd"]]
        for _, target in map(dataset.__getitem__, range(len(dataset))):
            assert len(target["masks"]) == 0 or target["masks"].sum(0).max() <= 1
            tight = ops.masks_to_boxes(target["masks"]) + torch.tensor([0, 0, 1, 1])
            assert torch.equal(tight, target["boxes"])
    assert 0.2 < np.mean(np.array(areas) < 32**2) < 0.6 and max(areas) > 96**2


def test_toy_keypoints_are_marked_where_they_are(toy):
    seen = set()
    for split in SPLITS:
        coco = open_split(toy, split, keypoints=True).coco_gt()
        for annotation in coco.anns.values():
            keypoints = np.array(annotation["keypoints"]).reshape(17, 3)
            mask = coco.annToMask(annotation)
            for x, y, v in keypoints.tolist():
                seen.add(v)
                assert v == 0 or mask[y, x] == v - 1  # 2: on the visible figure, 1: hidden
            if (keypoints[[5, 6], 2] > 0).all():
                assert keypoints[5, 0] > keypoints[6, 0]  # frontal: its left is at our right
    assert seen == {0, 1, 2}


def test_toy_is_a_function_of_the_seed_and_written_once(toy, tmp_path):
    def contents(root):
        return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    before = toy.stat().st_mtime_ns
    toy_coco.make_toy_coco(toy, train_images=24, val_images=8)
    toy_coco.main([str(tmp_path / "again"), "--train", "24", "--val", "8"])
    assert contents(tmp_path / "again") == contents(toy) and toy.stat().st_mtime_ns == before
    toy_coco.make_toy_coco(tmp_path / "other", train_images=2, val_images=2, seed=1)
    files = [*contents(toy).items(), *contents(tmp_path / "other").items()]
    assert len({image for path, image in files if path.suffix == ".jpg"}) == 32 + 4
    with pytest.raises(UserError, match="delete it or name another"):
        toy_coco.make_toy_coco(toy, 25, 8)
    patch, _ = toy_coco.ToyPatches(40, seed=3)[7]
    assert torch.equal(patch, toy_coco.ToyPatches(8, seed=3)[7][0])


# -- The doctor ------------------------------------------------------------------------------------


def annotation(i=0, x=5, y=5, w=9, h=9, image_id=0, **changes):
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    o = {"id": i, "image_id": image_id, "category_id": 0, "bbox": [x, y, w, h]}
    return o | {"iscrowd": 0, "area": w * h, "segmentation": [polygon]} | changes


def coco(names, annotations, classes=("cell",), width=40, height=30):
    """The content of a COCO file; ids are from 0."""
    sides = {"width": width, "height": height}
    images = [{"id": i, "file_name": name} | sides for i, name in enumerate(names)]
    categories = [{"id": k, "name": name} for k, name in enumerate(classes)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_images(folder, file, names, objects=None, **options):
    """Images in a folder, and a COCO file; objects: annotations, or one in each image."""
    for name in names:
        picture(folder / name)
    one_each = [annotation(i, image_id=i) for i in range(len(names))]
    write(file, coco(names, one_each if objects is None else objects, **options))


def write_coco(root, train, val=None, **options):
    """A data set of two images (40x30) a split, with the annotations given."""
    for split, objects in zip(SPLITS, (train, train if val is None else val)):
        file = root / "annotations" / f"instances_{split}.json"
        write_images(root / split, file, ("0.png", "1.png"), objects, **options)


def diagnose(root, capsys, *options):
    """-> exit code, what was printed, the lines of what is to be mended."""
    code = examine.main([str(root), *options])
    printed = capsys.readouterr().out
    return code, printed, [line for line in printed.splitlines() if "TO MEND" in line]


def test_doctor_proposes_anchors_by_shape_and_size(tmp_path, capsys):
    def proposed(*box):
        write_coco(tmp_path, [annotation(0, *box)])
        _, printed, _ = diagnose(tmp_path, capsys, "--recipe", "small")  # 30 pixels become 192
        found = re.findall(r"with settings=(.*); larger", printed)
        return [eval(text, {"RECIPES": examine.RECIPES}) for text in found]

    assert proposed(5, 5, 6, 6) == []
    (wide,), (tiny,) = proposed(1, 5, 38, 4), proposed(5, 5, 1, 1)
    assert wide["anchor_ratios"][0] < 0.5 and tiny["anchor_sizes"][0] == (8,)
    boxes = np.array([[9, 9, 32, 32], [0, 0, 48, 48], [5, 5, 64, 32], [5, 5, 8, 128]])
    found = examine.best_iou(boxes, ((32,), (64,)), (1, 0.5))  # height / width
    assert np.allclose(found, [1, (48 / 64) ** 2, 0.5, 8 * 32 / (32 * 32 + 8 * 96)])


def test_doctor_counts_what_is_not_trained_on_or_not_found(tmp_path, capsys):
    objects = [annotation(i, segmentation=[]) for i in range(120)]
    objects += [annotation(200 + i) for i in range(101)]
    write_coco(tmp_path, [*objects, annotation(400, w=0), annotation(401, x=30, w=20)])
    code, printed, _ = diagnose(tmp_path, capsys)
    for said in ("120 objects have no mask", "1 boxes have no area", "1 boxes leave"):
        assert said in printed
    assert code == 0 and "1 images have more than the 100" in printed
    assert "but look at the above" in printed.splitlines()[-1]
    write_coco(tmp_path, [annotation(segmentation=[])])
    _, printed, _ = diagnose(tmp_path, capsys)
    assert printed.endswith("Nothing here would stop or spoil training.\n")


def test_doctor_gives_no_false_all_clear(tmp_path, capsys):
    """Each of these passed once, and cost a run."""
    sound = [annotation()]
    cases = {
        "no annotations": {"train": [], "val": sound},
        "validation without an object": {"train": sound, "val": []},
        "parts of the sides": {"train": [annotation(0, 0.1, 0.1, 0.5, 0.5)]},
        "two classes of one name": {"train": sound, "classes": ("cell", "cell")},
        "masks in one split only": {"train": sound, "val": [annotation(segmentation=[])]},
        "masks outside of their boxes": {"train": [annotation(bbox=[25, 15, 9, 9])]},
        "a mask that is not finite": {"train": [annotation(segmentation=[[float("nan")] * 6])]},
    }
    for name, case in cases.items():
        write_coco(tmp_path, **case)
        code, printed, mended = diagnose(tmp_path, capsys)
        assert code == 1 and mended, name
        assert all(".json" in line and line.endswith(".") for line in mended), name
        assert printed.endswith("to mend would stop or spoil training.\n"), name
    write_coco(tmp_path, sound, classes=("cell", "nut"))
    file = tmp_path / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text().replace("nut", "bolt"))
    assert "bolt" in diagnose(tmp_path, capsys)[2][0]
    file.unlink()
    assert str(file) in diagnose(tmp_path, capsys)[2][0]


def test_doctor_names_every_fault_once(tmp_path, capsys):
    faults = [annotation(1, bbox=[1]), annotation(2), annotation(3, iscrowd="x")]
    write_coco(tmp_path, faults, [annotation()])
    (tmp_path / "val2017" / "0.png").unlink()
    (tmp_path / "val2017" / "1.png").write_bytes(b"no image")
    code, _, mended = diagnose(tmp_path, capsys)
    assert code == 1 and len(mended) == 4
    for line, name in zip(mended, ("annotation 1", "annotation 3", "0.png", "1.png")):
        assert name in line and "tools/to_coco.py" in line
    write_coco(tmp_path, [annotation(i) for i in range(9)], width=40.5)
    _, _, mended = diagnose(tmp_path, capsys)
    assert len(mended) == 4  # the images, and not their annotations
    assert all("40.5" in line and "tools/to_coco.py" in line for line in mended)


def test_doctor_looks_at_images_of_any_split(tmp_path, capsys):
    write_coco(tmp_path, [annotation()])
    picture(tmp_path / "val2017" / "0.png", np.full((30, 40), 3000, np.uint16))
    dark = (np.arange(1200).reshape(30, 40) // 100).astype(np.uint8)  # 12 levels
    picture(tmp_path / "val2017" / "1.png", dark)
    (tmp_path / "images").mkdir()
    (tmp_path / "val2017").rename(tmp_path / "images" / "dev")
    file = tmp_path / "annotations" / "instances_val2017.json"
    file.rename(file.with_name("instances_dev.json"))
    code, printed, mended = diagnose(tmp_path, capsys, "--val-split", "dev")
    assert code == 1 and len(mended) == 1 and "8 bits" in mended[0]
    assert "1 images have fewer than 32 levels" in printed and "dev/1.png" in printed
    twin = tmp_path / "images" / "dev" / "0.png"
    twin.write_bytes((tmp_path / "train2017" / "0.png").read_bytes())
    assert "1 images are in both splits" in diagnose(tmp_path, capsys, "--val-split", "dev")[1]


# -- Other layouts ---------------------------------------------------------------------------------


def convert(root, capsys, *options, source=None):
    """Converts root/in and examines it -> (what was printed, objects and split by file name)."""
    out = root / "out"
    to_coco.main([str(source or root / "in"), str(out), *options])
    printed = capsys.readouterr().out
    code, diagnosis, _ = diagnose(out, capsys)
    assert code == 0, diagnosis
    objects, sides = {}, {}
    for file in sorted((out / "annotations").iterdir()):
        content = json.loads(file.read_text())
        names = {c["id"]: c["name"] for c in content["categories"]}
        files = {image["id"]: image["file_name"] for image in content["images"]}
        objects |= {name: [] for name in files.values()}
        sides |= dict.fromkeys(files.values(), file.stem.removeprefix("instances_"))
        for a in content["annotations"]:
            objects[files[a["image_id"]]].append(a | {"name": names[a["category_id"]]})
    return printed, objects, sides


def of(o):
    """The class, the box and the number of pixels in the mask of an object."""
    mask = o.get("segmentation") or []
    rles = [mask] if isinstance(mask, dict) else mask and coco_mask.frPyObjects(mask, 30, 40)
    return o["name"], o["bbox"], int(coco_mask.area(coco_mask.merge(rles))) if rles else 0


SQUARE = [[2, 3], [12, 3], [12, 13], [2, 13]]
OTHER = [[20, 3], [30, 3], [30, 13], [20, 13]]
A, B = [2, 3, 10, 10], [20, 3, 10, 10]  # their boxes


def write_labelme(root, **images):
    """images: name: [(label, points, kind, group), ...]."""
    for name, shapes in images.items():
        picture(root / f"{name}.jpg")
        keys = "label", "points", "shape_type", "group_id"
        content = {"shapes": [dict(zip(keys, shape)) for shape in shapes]}
        content |= {"imagePath": f"..\\{name}.jpg", "imageWidth": 40, "imageHeight": 30}
        write(root / f"{name}.json", content)


def test_labelme(tmp_path, capsys):
    rectangle = [("r", [[12, 13], [2, 3]], "rectangle")]
    write_labelme(
        tmp_path / "in",
        a=[("a", SQUARE, "polygon", 1), ("a", OTHER, "polygon", 1), ("b", OTHER, "polygon", 1)],
        b=[*rectangle, ("c", [[20, 15], [20, 25]], "circle")],
        c=[("__ignore__", SQUARE, "polygon"), ("a", SQUARE[:2], "line"), ("b", OTHER, "polygon")],
    )
    printed, objects, _ = convert(tmp_path, capsys)
    assert list(map(of, objects["a.jpg"])) == [("a", [2, 3, 28, 10], 200), ("b", B, 100)]
    box, circle = objects["b.jpg"]
    assert of(box) == ("r", A, 100) and abs(of(circle)[2] - 314) < 10
    assert np.allclose(circle["bbox"], [10, 5, 20, 20], atol=0.1)
    assert list(map(of, objects["c.jpg"])) == [("b", B, 100)]
    assert "1 shapes left out: __ignore__" in printed and "1 shapes left out: line" in printed
    write_labelme(tmp_path / "boxes" / "in", a=rectangle, b=rectangle)
    printed, objects, _ = convert(tmp_path / "boxes", capsys)
    assert of(objects["a.jpg"][0]) == ("r", A, 0) and "0 of 2 objects have a mask" in printed


@pytest.mark.parametrize("version", [1, 2])
def test_via(tmp_path, capsys, version):
    (x, y), turn = zip(*SQUARE), np.pi / 2
    drawn = [
        ({"name": "polygon", "all_points_x": x, "all_points_y": y}, {"kind": "a"}),
        ({"name": "polyline", "all_points_x": x, "all_points_y": y}, {"Type": "b", "note": "x"}),
        ({"name": "rect", "x": 20, "y": 3, "width": 10, "height": 10}, {"class": "c"}),
        ({"name": "circle", "cx": 20, "cy": 15, "r": 5}, {}),
        ({"name": "ellipse", "cx": 9, "cy": 9, "rx": 9, "ry": 3, "theta": turn}, {"label": "e"}),
        ({"name": "point", "cx": 1, "cy": 1}, {}),
    ]
    regions = [dict(zip(("shape_attributes", "region_attributes"), pair)) for pair in drawn]
    for split in ("train", "val"):
        entries = {}
        for name, found in ((f"{split}.png", regions), ("empty.png", [])):
            picture(tmp_path / "in" / split / name)
            found = found if version == 2 else dict(enumerate(found))
            entries[f"{name}123"] = {"filename": name, "regions": found}
        content = entries if version == 1 else {"_via_img_metadata": entries}
        write(tmp_path / "in" / split / "via_region_data.json", content)
    printed, objects, sides = convert(tmp_path, capsys, "--class-name", "balloon")
    assert sides == {"train.png": "train2017", "val.png": "val2017"}
    a, b, c, *round_ones = objects["val.png"]
    assert [of(o) for o in (a, b, c)] == [("a", A, 100), ("b", A, 100), ("c", B, 100)]
    boxes = {o["name"]: np.round(o["bbox"]).tolist() for o in round_ones}
    assert boxes == {"balloon": [15, 10, 10, 10], "e": [6, 0, 6, 18]}
    assert "2 regions left out: point" in printed and "2 images left out" in printed


@pytest.mark.parametrize(
    "image, mask, values",
    [
        ("PNGImages/{}.png", "PedMasks/{}_mask.png", np.array([0, 1, 2], np.uint8)),  # Penn-Fudan
        ("images/{}.jpg", "masks/{}.png", np.array([0, 300, 40_000], np.uint16)),
        ("images/{}.jpg", "masks/{}.png", np.array([(0, 0, 0), (0, 9, 0), (9, 0, 0)], np.uint8)),
    ],
)
def test_masks_with_a_number_or_a_colour_for_each_object(tmp_path, capsys, image, mask, values):
    numbers = np.zeros((30, 40), int)
    numbers[3:13, 2:12], numbers[3:13, 20:30] = 1, 2
    for name in "xy":
        picture(tmp_path / "in" / image.format(name))
        picture(tmp_path / "in" / mask.format(name), values[numbers])
    printed, objects, _ = convert(tmp_path, capsys, "--class-name", "person")
    assert len(objects) == 2 and "2 masks read as one object a value" in printed
    for found in objects.values():
        assert sorted(map(of, found)) == [("person", A, 100), ("person", B, 100)]


@pytest.mark.parametrize("form", ["{i}/x.png {i}/masks/{k}.png", "i/{i}.png masks/{i}/{k}.png"])
def test_masks_of_one_file_an_object(tmp_path, capsys, form):
    image, mask_name = form.split()
    for i in range(3):
        picture(tmp_path / "in" / image.format(i=i))
        for k in range(i + 1):  # the masks are named as if they were images 0, 1, 2
            mask = np.pad(np.full((6, 6), 255, np.uint8), ((9 * k, 24 - 9 * k), (3, 31)))
            mask[9 * k, 3] = 20  # a soft edge is no object of its own
            picture(tmp_path / "in" / mask_name.format(i=i, k=k), mask)
    _, objects, _ = convert(tmp_path, capsys)
    assert sorted(map(len, objects.values())) == [1, 2, 3]
    for found in objects.values():
        assert list(map(of, found)) == [("object", [3, 9 * k, 6, 6], 35) for k in range(len(found))]


def write_voc(path, boxes, size=(40, 30)):
    """boxes: (name, x1, y1, x2, y2), and a 1 where the object is difficult."""
    entries = "".join(
        f"<object><name>{name}</name><difficult>{sum(difficult)}</difficult><bndbox><xmin>{x1}"
        f"</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, x1, y1, x2, y2, *difficult in boxes
    )
    size = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    write(path, f"<annotation>{size}{entries}</annotation>")


@pytest.mark.parametrize("with_xml", [True, False])
def test_voc_masks(tmp_path, capsys, with_xml):
    """Masks go to the boxes that they fit, whatever their numbers; 255 is no object."""
    root = tmp_path / "in"
    numbers = np.zeros((30, 40), np.uint8)
    numbers[2:14, 1:13], numbers[3:13, 2:12] = 255, 2  # a border, and the object in it
    numbers[10:20, 8:30] = 1
    for name, split in (("a", "train"), ("b", "val")):
        picture(root / "JPEGImages" / f"{name}.jpg")
        for folder, of_number in (("Object", [0, 1, 2]), ("Class", [0, 15, 7])):
            values = np.where(numbers == 255, 255, np.array(of_number)[numbers % 255])
            picture(root / f"Segmentation{folder}" / f"{name}.png", values.astype(np.uint8))
        boxes = [("x", 3, 4, 12, 13), ("y", 9, 11, 30, 20), ("z", 35, 1, 40, 9)]
        if with_xml:
            write_voc(root / "Annotations" / f"{name}.xml", boxes)
        write(root / "ImageSets" / "Segmentation" / f"{split}.txt", f"{name}\n")
    printed, objects, sides = convert(tmp_path, capsys)
    assert sides == {"a.jpg": "train2017", "b.jpg": "val2017"}
    small, large = ("x", "y") if with_xml else ("class 7", "class 15")
    found = sorted([of(o) for o in objects["a.jpg"] if o["segmentation"]], key=lambda o: o[2])
    assert found == [(small, A, 100 - 4 * 3), (large, [8, 10, 22, 10], 220)]
    assert ("4 of 6 objects" if with_xml else "4 of 4 objects") in printed


def test_voc_devkit_has_the_papers_splits_and_difficult_objects(tmp_path, capsys):
    of_2007 = {"train": "1", "val": "2", "trainval": "1\n2", "test": "3"}
    of_2012 = {"train": "2008_1", "val": "2008_2", "trainval": "2008_1\n2008_2"}
    for year, lists in (("VOC2007", of_2007), ("VOC2012", of_2012)):
        root = tmp_path / "in" / "VOCdevkit" / year
        for name, text in (lists | {"dog_train": "2008_2 -1"}).items():
            write(root / "ImageSets" / "Main" / f"{name}.txt", text)
        for name in " ".join(lists.values()).split():
            picture(root / "JPEGImages" / f"{name}.jpg")
            boxes = [("person", 1, 1, 40, 30), ("dog", 3, 3, 9, 9, 1)]
            write_voc(root / "Annotations" / f"{name}.xml", boxes)
    _, objects, sides = convert(tmp_path, capsys)
    train = dict.fromkeys(("1.jpg", "2.jpg", "2008_1.jpg"), "train2017")
    assert sides == train | {"2008_2.jpg": "val2017", "3.jpg": "test2017"}
    for person, dog in objects.values():
        assert (person["difficult"], person["iscrowd"]) == (0, 0)
        assert (dog["difficult"], dog["iscrowd"]) == (1, 1)
        assert person["bbox"] == [0, 0, 40, 30]  # counted from 1, with the last pixel


def test_voc_with_own_classes_and_what_stays_out(tmp_path, capsys):
    """Two images are turned by their EXIF data; of these, the annotated size tells the way."""
    root, exif = tmp_path / "in", Image.Exif()
    exif[0x0112] = 6
    for name in ("a", "ü", "c", "d", "x/0", "y/0"):
        picture(root / "JPEGImages" / f"{name}.jpg", **({"exif": exif} if name in "aü" else {}))
    for name in ("a", "ü", "gone", "0"):  # there is no image of gone, and there are two of 0
        size = (30, 40) if name == "a" else (40, 30)
        boxes = [("WBC", 1, 1, *size), ("é", 3, 3, 9, 9)]
        write_voc(root / "Annotations" / f"{name}.xml", boxes, size)
    write(root / "Annotations" / "c.xml", "no XML <")
    write(root / "photo.HEIC", "a phone's")
    write(root / "a.txt", "a caption, and no line of YOLO")
    write(root / "ImageSets" / "Main" / "train.txt", "a\nc\n")
    write(root / "ImageSets" / "Main" / "val.txt", "ü\n")
    printed, objects, sides = convert(tmp_path, capsys)
    assert sides == {"a.jpg": "train2017", "ü.jpg": "val2017"}
    assert list(map(of, objects["ü.jpg"])) == [("WBC", [0, 0, 40, 30], 0), ("é", [2, 2, 7, 7], 0)]
    assert objects["a.jpg"][0]["bbox"] == [0, 0, 30, 40]
    assert not {"segmentation", "difficult"} & objects["ü.jpg"][0].keys()
    assert "1 files left out (.HEIC): save it as JPEG; the first" in printed and "c.xml" in printed
    for having in ("several files have", "no image file has"):
        assert f"1 annotated images left out, as {having} their name" in printed


def test_coco_2014_keeps_its_splits(tmp_path, capsys):
    root = tmp_path / "in"
    splits = {"train2014": "train2014", "valminusminival2014": "val2014", "minival2014": "val2014"}
    for split, folder in splits.items():
        names = [f"{split}.jpg"] + ["same.jpg"] * (split != "valminusminival2014")
        file = root / "annotations" / f"instances_{split}.json"
        write_images(root / "images" / folder, file, names)
        write(file.with_name(f"person_keypoints_{split}.json"), json.loads(file.read_text()))
        assert len(open_split(root, split)) == len(names)  # as train.py reads it
    _, _, sides = convert(tmp_path, capsys)
    assert sides.pop("valminusminival2014.jpg") == "train2017" and len(sides) == 4
    for name, side in sides.items():
        kept = root / "images" / side.replace("2017", "2014") / name.removeprefix("5_")
        assert (tmp_path / "out" / side / name).samefile(kept)


def test_roboflows_coco_export(tmp_path, capsys):
    texts = {"bbox": ["5", "5", "9", "9"], "area": "81", "segmentation": []}
    found = [annotation(i, category_id=k, **texts) for i, k in enumerate((1, 2, 3))]
    for split in ("train", "valid", "test"):  # the names of images repeat
        file = tmp_path / "in" / split / "_annotations.coco.json"
        write_images(file.parent, file, ["0.png"], found, classes=("cells", "rbc", "rbc", "cells"))
    printed, objects, sides = convert(tmp_path, capsys)
    assert sorted(sides.values()) == ["test2017", "train2017", "val2017"]
    for found in objects.values():
        assert list(map(of, found)) == [(name, [5, 5, 9, 9], 0) for name in ("rbc", "rbc", "cells")]
    assert "6 classes made of categories with one name" in printed and "--no-masks" in printed


def test_splits_are_drawn_only_where_none_are_named_or_on_request(tmp_path, capsys):
    names = [f"x{i // 2}.rf.{i}.png" for i in range(10)]  # Roboflow's copies of five images
    root = tmp_path / "in"
    write_images(root, root / "val.json", names[:6])
    write_images(root, root / "test.json", names[6:7])
    with pytest.raises(UserError, match="no split for training; give --val-share"):
        to_coco.main([str(root), str(tmp_path / "out")])
    write_images(root, root / "train.json", names[7:])
    _, _, sides = convert(tmp_path, capsys)
    assert [sides[name][:3] for name in names] == ["val"] * 6 + ["tes"] + ["tra"] * 3
    (tmp_path / "out").rename(tmp_path / "named")
    _, _, sides = convert(tmp_path, capsys, "--val-share", "0.4")
    assert list(sides.values()).count("val2017") == 4
    assert len({(name.split(".")[0], side) for name, side in sides.items()}) == 5


PAIRS = [[5, 5], [14, 5], [14, 14], [5, 14]]
RLE = {"size": [30, 40], "counts": "k49e0000000000000000Wh0"}
NAN, BESIDE = float("nan"), [25, 15, 9, 9]


@pytest.mark.parametrize(
    "kind, count, changes, said",
    [
        ("images", 4, {"width": ...}, "4 sizes of images mended"),
        ("images", 4, {"width": -1, "height": -1}, "4 sizes of images mended"),
        ("images", 4, {"width": 40.5}, "4 sizes of images mended"),
        ("images", 1, {"file_name": "0.JPG"}, "1 names of images mended"),
        ("images", 1, {"file_name": "C:\\x\\0.jpg"}, "4 of 4 objects have a mask"),
        ("annotations", 4, {"bbox": ...}, "4 boxes taken from their masks"),
        ("annotations", 2, {"bbox": [5, 5, 0, 9]}, "2 boxes taken from their masks"),
        ("annotations", 4, {"bbox": BESIDE}, "4 boxes taken from their masks"),  # on request
        ("annotations", 4, {"id": ...}, "4 ids of annotations mended"),
        ("annotations", 2, {"id": 0}, "1 ids of annotations mended"),
        ("annotations", 4, {"id": str, "image_id": str, "category_id": str}, "4 ids of anno"),
        ("annotations", 4, {"iscrowd": "0", "area": "81"}, "4 objects mended: a number was text"),
        ("annotations", 2, {"iscrowd": None, "area": None}, "2 objects mended: a number was text"),
        ("annotations", 2, {"segmentation": sum(PAIRS, [])}, "2 masks mended"),
        ("annotations", 2, {"segmentation": [PAIRS]}, "2 masks mended"),
        ("annotations", 2, {"segmentation": PAIRS}, "2 masks mended"),
        ("annotations", 2, {"segmentation": [RLE]}, "2 masks mended"),
        ("new", 1, {"image_id": 99}, "1 objects left out, as their image is not in the file"),
        ("new", 1, {"category_id": 99}, "1 objects left out, as their class is not listed"),
        ("new", 1, {"x": 50}, "1 objects left out, as their box has no area in the image"),
        ("new", 1, {"segmentation": [[1, 2, 3, 4, 5, NAN]]}, "1 objects left out, as their masks"),
        ("new", 1, {"segmentation": RLE | {"counts": "1"}}, "1 objects left out, as their masks"),
    ],
)
def test_small_faults_are_mended_and_counted(tmp_path, capsys, kind, count, changes, said):
    names = [f"{i}.jpg" for i in range(4)]
    file = tmp_path / "in" / "all.json"
    write_images(tmp_path / "in", file, names)
    content = json.loads(file.read_text())
    content["annotations"] += [annotation(90, **changes)] if kind == "new" else []
    for entry in content.get(kind, [])[:count]:
        entry |= {k: str(entry[k]) if value is str else value for k, value in changes.items()}
        for field in [field for field in entry if entry[field] is ...]:
            del entry[field]
    write(file, content, "utf-8-sig")
    options = ["--boxes-from-masks"] * (changes.get("bbox") == BESIDE)
    printed, objects, _ = convert(tmp_path, capsys, *options, source=file)
    assert said in printed and len(objects) == 4
    for (o,) in objects.values():  # as from a sound file
        assert of(o) == ("cell", [5, 5, 9, 9], 81) and (o["area"], o["iscrowd"]) == (81, 0)


@pytest.mark.parametrize(
    "name, names",
    [
        ("data.yaml", "nc: 2\nnames: ['a', \"b, c\"]  # two\nval: x\n"),
        ("data.yaml", "names:\n  0: a\n  1: 'b, c'\nnc: 2\n"),
        ("data.yaml", "names:\n- a\n\n- b, c\n"),
        ("classes.txt", "a\nb, c\n"),
    ],
)
def test_yolo_boxes_and_polygons(tmp_path, capsys, name, names):
    root = tmp_path / "in"
    lines = "0 .5 .5 .25 .2\n1 .1 .1 .5 .1 .5 .5\n\n0 .5 .5 .2\n0 120 3 4 5\nx\n2 .5 .5 .1 .1\n"
    for split in ("train", "val"):
        picture(root / "images" / split / "0.png")
        write(root / "labels" / split / "0.txt", lines)
    picture(root / "images" / "train" / "background.png")
    (root / name).write_text(names)
    printed, objects, sides = convert(tmp_path, capsys)
    assert objects["background.png"] == [] and len(sides) == 3
    a, b = objects["0.png"]
    assert (a["name"], a["bbox"], b["name"]) == ("a", [15, 12, 10, 6], "b, c")
    assert np.allclose(b["segmentation"], [[4, 3, 20, 3, 20, 15]])
    assert "6 lines left out" in printed and "0.txt, line 4" in printed
    assert "2 objects left out, as their class is not listed" in printed


def test_yolo_splits_by_lists(tmp_path, capsys):
    for name in "abc":
        picture(tmp_path / "in" / "obj" / f"{name}.jpg")
        write(tmp_path / "in" / "obj" / f"{name}.txt", "0 .5 .5 .25 .2\n")
    write(tmp_path / "in" / "train.txt", "data/obj/c.jpg\ndata/obj/a.jpg\n")
    write(tmp_path / "in" / "valid.txt", "data\\obj\\b.jpg\n")
    _, _, sides = convert(tmp_path, capsys)
    assert sides == {"a.jpg": "train2017", "b.jpg": "val2017", "c.jpg": "train2017"}


def test_data_sets_of_several_layouts_are_merged_by_way_of_parts(tmp_path, capsys):
    root = tmp_path / "in"
    mask = np.pad(np.full((10, 10), 7, np.uint8), ((3, 17), (2, 28)))
    for split in ("train", "val"):
        picture(root / "voc" / split / "0.png")
        write_voc(root / "voc" / split / "0.xml", [("nut", 0, 1, 19, 9)])  # counted from 0
        picture(root / "masks" / "images" / split / "0.png")  # the data set has a mask's name
        picture(root / "masks" / "masks" / split / "0.png", mask)
    with pytest.raises(UserError, match="VOC, masks; .*parts"):
        to_coco.main([str(root), str(tmp_path / "out")])
    for part in ("voc", "masks"):
        to_coco.main([str(root / part), str(tmp_path / "parts" / part)])
    printed, objects, _ = convert(tmp_path, capsys, source=tmp_path / "parts")
    found = sorted(of(o) for (o,) in objects.values())
    assert found == [("nut", [0, 1, 19, 8], 0)] * 2 + [("object", A, 100)] * 2
    assert "2 of 4 objects have a mask: train with --no-masks" in printed


@pytest.mark.parametrize(
    "files, said",
    [
        ({}, "2 images and 0 files of COCO"),
        ({"a.json": "{"}, "a.json cannot be read as JSON"),
        ({"0.txt": "0 .5 .5\n"}, "do not fit"),
        ({"masks/0.png": "no image"}, "no usable object"),
        ({f"{x}.json": json.dumps(coco(["0.png"], [])) for x in "ab"}, "0.png is annotated in two"),
        ({"data.zip": ""}, "data.zip cannot be read (.zip): unpack it first"),
        ({"a.xml": "<annotations><image/></annotations>"}, "CVAT's XML): export COCO 1.0"),
        ({"0.png.json": '{"objects": [], "size": {}}'}, "Supervisely's JSON): export COCO"),
        ({"a.json": '[{"data": {}, "annotations": []}]'}, "Label Studio's JSON): export COCO"),
    ],
)
def test_what_cannot_be_converted_is_one_sentence(tmp_path, files, said):
    for name in ("0.png", "1.png"):
        picture(tmp_path / "in" / name)
    for name, text in files.items():
        write(tmp_path / "in" / name, text)
    with pytest.raises(UserError) as caught:
        to_coco.main([str(tmp_path / "in"), str(tmp_path / "out")])
    assert re.fullmatch(f".*{re.escape(said)}.*[.]", str(caught.value))
    assert os.listdir(tmp_path) == ["in"]
