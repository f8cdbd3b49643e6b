"""README.md: its map names what exists, its links lead somewhere, its pieces of code run."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_train import NARROW

import evaluate
import model as detector
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def section(title):
    return re.search(rf"^## {title}\n.*?(?=^## |\Z)", README, re.S | re.M)[0]


def names_in(tree):
    """What a file defines: functions, classes, arguments, variables, attributes, keys of dicts."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            names.add(getattr(node, "id", None) or node.attr)
        elif isinstance(node, ast.Dict):
            names |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
    return names


def test_the_map_names_what_exists():
    rows = [line for line in section("Read it beside the paper").splitlines() if ".py `" in line]
    assert len(rows) > 50
    sources = {path.name: names_in(ast.parse(path.read_text())) for path in ROOT.glob("*.py")}
    for row in rows:
        code = row.split("|")[2]
        file = None
        for word in re.findall(r"\w+\.py|`[^`]+`", code):
            file = word if word in sources else file
            if word in sources or word.startswith("`--"):
                continue
            name = re.findall(r"[\w-]+", word)  # `MaskRCNN.losses`, `DEFAULTS["anchor_sizes"]`
            assert set(name) <= sources[file] | {"True", "False"}, (file, word, row)


def test_the_links_of_the_contents_lead_to_sections():
    anchors = {
        re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", README, re.M)
    }
    links = re.findall(r"\]\(#([\w-]+)\)", README)
    assert len(links) > 10 and set(links) <= anchors


PIECE = re.compile(r"^\*\*(.+?)\*\*: (.*?)```python\n(.*?)```", re.S | re.M)
PIECES = PIECE.findall(section("Copy a piece"))
IMPORTS = {
    "math": "import math", "torch": "import torch", "torch.nn": "from torch import nn",
    "torch.nn.functional as F": "import torch.nn.functional as F",
    "numpy as np": "import numpy as np",
    "torch.distributed as dist": "import torch.distributed as dist", "torch.utils.data": "",
    "Sampler": "from torch.utils.data import Sampler", "make_norm": "from norms import make_norm",
    "batched_nms": "from torchvision.ops import batched_nms",
    "roi_align": "from torchvision.ops import roi_align",
}  # fmt: skip


@pytest.mark.parametrize("name, text, code", PIECES, ids=[piece[0] for piece in PIECES])
def test_pieces_run_in_place_and_copied_with_the_imports_that_are_listed(name, text, code):
    exec(compile(code, "README.md", "exec"), {})

    ((file, taken),) = re.findall(r"^from (norms|model|data|train) import (.+)$", code, re.M)
    definitions, _, imports = text.replace("\n", " ").partition("imports ")
    imports = re.findall(r"`([^`]+)`", imports.split(". ")[0])
    source = (ROOT / f"{file}.py").read_text()
    lines = {}  # of each definition at the top level of the file
    for node in ast.parse(source).body:
        names = [node.name] if hasattr(node, "name") else []
        names += [target.id for target in getattr(node, "targets", ()) if hasattr(target, "id")]
        lines |= dict.fromkeys(names, ast.get_source_segment(source, node))
    copied = [word for word in re.findall(r"`(\w+)`", definitions) if word in lines]
    assert copied == sorted(copied, key=list(lines).index)
    copied += ["DEFAULTS"] if "DEFAULTS" in taken else []
    piece = [IMPORTS[word] for word in imports] + [lines[word] for word in copied]
    own = re.sub(r"^from (norms|model|data|train) import .+$", "", code, flags=re.M)
    exec(compile("\n".join(piece) + "\n" + own, name, "exec"), {"__name__": "piece"})


def test_every_recipe_is_in_the_table_of_the_paper():
    told = section("Every experiment of the paper") + section("Try it")
    missing = [name for name in train.RECIPES if not re.search(rf"(?<![\w-]){name}(?![\w-])", told)]
    assert not missing, missing


def test_every_command_of_the_readme_is_understood():
    """No option, recipe or schedule that does not exist; "..." stands for anything."""
    text = README.replace("`T --", "`train.py --data coco --").replace("\\\n", " ")
    commands = re.findall(r"(train|evaluate)\.py ((?:--|\.\.\. --)[^`\n#|]+)", text)
    assert len(commands) > 30
    for program, arguments in commands:
        arguments = re.sub(r"\b(NAME|mine)\b", "toy", arguments.replace("Nx", "2x"))
        words = [word for word in shlex.split(arguments) if word not in ("...", "&&")]
        if program == "train":
            train.parse_arguments(words)
        else:
            evaluate.make_parser().parse_args(words)


def test_the_library_is_used_as_shown(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", section("As a library"), re.S)
    weights, image = re.findall(r'"(.+/.+)"', code)
    for path in (weights, image):
        (tmp_path / path).parent.mkdir(parents=True)
    net = detector.build_model(num_classes=5, **NARROW)
    checkpoint = {"model_config": net.config, "model": net.state_dict(), "data": net.data_settings}
    torch.save(checkpoint, tmp_path / weights)
    Image.new("L", (60, 40)).save(tmp_path / image)  # grey: becomes three channels
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    found = names["found"]
    assert found["boxes"].shape == (len(found["labels"]), 4)
    assert found["masks"].shape[1:] == (40, 60)


def test_the_example_row_of_ones_own_data_is_a_recipe():
    (code,) = re.findall(r"```python\n(.*?)```", section("Your own data"), re.S)
    row = eval("{" + code + "}", vars(train))["mine"]
    train.check(row, from_random=True)
    assert set(row.model) <= set(train.detector.DEFAULTS)
