"""docs/exercises.md: every patch applies to the code as it is, is shown as it is, and trains."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.toy_coco import make_toy_coco

ROOT = Path(__file__).resolve().parent.parent
PATCHES = sorted((ROOT / "docs" / "exercises").glob("*.patch"))
PAGE = (ROOT / "docs" / "exercises.md").read_text()


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    root = tmp_path_factory.mktemp("exercises") / "coco"
    make_toy_coco(root, train_images=110, val_images=1)
    return root


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_every_exercise_applies_and_makes_two_steps(patch, coco, tmp_path):
    assert f"```diff\n{patch.read_text()}```" in PAGE
    changed = [line for line in patch.read_text().splitlines() if re.match(r"[+-](?![+-])", line)]
    assert len(changed) <= 6
    for name in ("norms", "model", "data", "train", "evaluate"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    subprocess.run(["git", "apply", str(patch)], cwd=tmp_path, check=True)
    (command,) = re.findall(rf"^python (train\.py .*--out runs/{patch.stem})$", PAGE, re.M)
    words = shlex.split(command) + ["--data", str(coco), "--workers", "0", "--device", "cpu"]
    words += ["--stop-after", "2"]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
    if patch.stem == "no-norm" and "is not finite" in done.stderr:  # as the page says
        return
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "runs" / patch.stem / "log.jsonl").read_text().splitlines()
    assert json.loads(log[0])["iteration"] == 2 and "bbox" in log[1]


def test_what_is_to_be_written_has_tests_that_check_it():
    rows = re.findall(r"\| `pytest (tests/\w+\.py) -k (\w+)` \|", PAGE)
    assert len(rows) == 6
    for file, word in rows:
        assert re.search(rf"^def test_\w*{word}", (ROOT / file).read_text(), re.M), word


def test_the_tour_runs_without_jupyter(tmp_path):
    """Its code cells in order but the first, which installs, with two steps on a few images."""
    cells = json.loads((ROOT / "docs" / "tour.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(cells) <= 25 and "pip" in code[0]
    program = "\n".join(code[1:])
    for whole, tiny in (
        ("train_images=1000, val_images=160", "train_images=12, val_images=5"),
        ("else 0.1", "else 0.0025"),
    ):
        program = program.replace(whole, tiny)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "a part of the schedule 2" in done.stdout
