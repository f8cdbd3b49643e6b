"""Damaged annotation files: each loads to what an independent reading of it gives, or is refused.

pytest tests/test_fuzz.py               120 mutations
pytest -m long tests/test_fuzz.py -s    2,000, with counts
"""

import copy
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

import data
from tools.toy_coco import make_toy_coco

STRANGE = (
    None, True, False, 0, 1, -1, 2, 0.5, 1e-9, -1e9, 10**30, 2**31, float("nan"), float("inf"), "",
    "x", "é", "\x00", "../../etc/passwd", "/etc/passwd", [], {}, [[]], [{}], {"a": []}, [1, 2],
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Four small images and their annotations, crowds, RLE and keypoints among them."""
    root = tmp_path_factory.mktemp("fuzz")
    if "COCO_DIR" in os.environ:
        folder, split = Path(os.environ["COCO_DIR"]), "val"
    else:
        folder, split = root / "toy", "train"
        make_toy_coco(folder, train_images=24, val_images=4)
    texts = {}
    for kind in ("instances", "person_keypoints"):
        content = json.loads((folder / f"annotations/{kind}_{split}2017.json").read_text())
        objects = {}
        for annotation in content["annotations"]:
            objects.setdefault(annotation["image_id"], []).append(annotation)
        crowded = [i for i, found in objects.items() if any(a["iscrowd"] for a in found)]
        small = sorted(objects, key=lambda i: len(objects[i]))
        chosen = set(crowded[:1] + [i for i in small if i not in crowded][3:6])
        texts[kind] = {
            "images": [image for image in content["images"] if image["id"] in chosen],
            "categories": content["categories"][:20],
            "annotations": [a for i in chosen for a in objects[i]],
        }
        known = {category["id"] for category in texts[kind]["categories"]}
        texts[kind]["annotations"] = [
            a for a in texts[kind]["annotations"] if a["category_id"] in known
        ]
        for image in texts[kind]["images"]:
            blank = Image.new("RGB", (image["width"], image["height"]), (image["id"] % 256, 0, 0))
            blank.save(root / image["file_name"], "BMP")
    return root, texts


def places(tree, path=()):
    """The path of every value in a tree of JSON."""
    yield path
    if isinstance(tree, (dict, list)):
        children = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, child in children:
            yield from places(child, (*path, key))


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def mutate(content, rng):
    """The text of an annotation file with one to three things wrong in it."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        # Coordinates are nearly all of a file: choose the part first, for the others' sake.
        found = [path for path in places(content) if path]
        if not found:
            break
        depth = rng.choice(sorted({len(path) for path in found}))
        path = rng.choice([p for p in found if len(p) == depth])
        parent, key = at(content, path[:-1]), path[-1]
        value, how = parent[key], rng.randrange(6)
        if how == 0:
            del parent[key]
        elif how == 1:
            parent[key] = rng.choice(STRANGE)
        elif how == 2:  # something else of the same file
            parent[key] = copy.deepcopy(at(content, rng.choice(found)))
        elif how == 3 and isinstance(parent, list):
            parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(value))
        elif isinstance(value, (int, float)):
            parent[key] = rng.choice((value + 1, -value, value * 1000, value / 3, str(value)))
        else:
            parent[key] = rng.choice(STRANGE)
    text = json.dumps(content)
    if rng.random() < 0.1:
        place = rng.randrange(len(text))
        damage = rng.choice(("", chr(rng.randrange(1, 256)), "]", '"'))
        text = text[:place] + (damage + text[place + 1 :] if rng.random() < 0.7 else "")
    return text


def read_independently(text, kind):
    """image id -> (file name, [(box, label, mask, keypoints)]), in plain Python and pycocotools."""
    content = json.loads(text)
    categories = [c["id"] for c in content["categories"]]
    if kind == "person_keypoints":
        categories = [c["id"] for c in content["categories"] if c["name"] == "person"]
    images = {}
    for image in sorted(content["images"], key=lambda image: image["id"]):
        width, height = image["width"], image["height"]
        objects, labelled = [], False
        for a in content.get("annotations", []):
            if a["image_id"] != image["id"] or a["category_id"] not in categories:
                continue
            x, y, w, h = a["bbox"]
            box = [min(max(v, 0), limit) for v, limit in
                   ((x, width), (y, height), (x + w, width), (y + h, height))]  # fmt: skip
            sides = w, h, box[2] - box[0], box[3] - box[1]
            if a.get("iscrowd", 0) or min(sides) < 1e-3:
                continue
            segmentation = a.get("segmentation", [])
            label = 1 + sorted(categories).index(a["category_id"])
            if isinstance(segmentation, list):
                polygons = [p for p in segmentation if len(p) >= 6]
                mask = np.zeros((height, width), bool)
                for rle in coco_mask.frPyObjects(polygons, height, width) if polygons else ():
                    mask |= coco_mask.decode(rle).astype(bool)
            else:
                rle = segmentation
                if isinstance(rle["counts"], list):
                    rle = coco_mask.frPyObjects(rle, height, width)
                mask = coco_mask.decode(rle).astype(bool)
            # An object without a polygon of three points, or whose RLE has no pixel, has no mask.
            if not (polygons if isinstance(segmentation, list) else mask.any()):
                continue
            points = []
            if kind == "person_keypoints":
                points = np.array(a["keypoints"], float).reshape(17, 3)
                labelled |= bool((points[:, 2] > 0).any())
                points = [(x + 0.5, y + 0.5, v) if v else (0, 0, 0) for x, y, v in points.tolist()]
            objects.append((box, label, mask, points))
        if objects and (labelled or kind == "instances"):
            images[image["id"]] = image["file_name"], objects
    return images


def check_mutations(source, tmp_path, count):
    root, contents = source
    rng = random.Random(0)
    loaded = refused = 0
    reasons = set()
    for i in range(count):
        kind = rng.choice(("instances", "instances", "person_keypoints"))
        text = mutate(contents[kind], rng)
        path = tmp_path / "annotations.json"
        path.write_text(text, encoding="utf-8")
        try:
            dataset = data.CocoDataset(
                root, path, training=True, keypoints=kind == "person_keypoints"
            )
            items = [dataset[k] for k in range(len(dataset))]
        except data.UserError as error:  # and nothing else may come
            message = str(error)
            assert message.count("\n") == 0 and message.endswith("."), message
            assert str(tmp_path) in message or str(root) in message or "mage" in message, message
            reasons.add(" ".join(w for w in message.split() if w.isalpha())[:60])
            refused += 1
            continue
        loaded += 1
        expected = read_independently(text, kind)
        assert list(expected) == dataset.image_ids, (i, text[:2000])
        for (image, target), (name, objects) in zip(items, expected.values()):
            assert np.array_equal(np.asarray(Image.open(root / name)), image.permute(1, 2, 0)), i
            boxes, labels, masks, points = zip(*objects)
            assert torch.allclose(target["boxes"], torch.tensor(boxes).float(), rtol=1e-6), i
            assert target["labels"].tolist() == list(labels), i
            assert np.array_equal(target["masks"].bool(), np.stack(masks)), i
            if kind == "person_keypoints":
                close = torch.allclose(target["keypoints"], torch.tensor(points).float(), rtol=1e-6)
                assert close, i
    print(f"{count} mutations: {loaded} loaded right, {refused} refused, "
          f"{len(reasons)} kinds of reasons")  # fmt: skip
    assert loaded > count / 20 and refused > count / 20


def test_a_damaged_annotation_file_loads_right_or_is_refused(source, tmp_path):
    check_mutations(source, tmp_path, 120)


@pytest.mark.long
def test_two_thousand_damaged_annotation_files(source, tmp_path):
    check_mutations(source, tmp_path, 2000)
