"""README.md: its map names what exists, its links lead somewhere, its pieces of code run."""

import re
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def section(title):
    return re.search(rf"^## {title}\n.*?(?=^## |\Z)", README, re.S | re.M)[0]


def test_the_map_names_what_exists():
    rows = [line for line in section("Read it beside the paper").splitlines() if ".py `" in line]
    assert len(rows) > 50
    sources = {path.name: path.read_text() for path in ROOT.glob("*.py")}
    for row in rows:
        code = row.split("|")[2]
        file = None
        for word in re.findall(r"\w+\.py|`[^`]+`", code):
            file = word if word in sources else file
            if word in sources or word.startswith("`--"):
                continue
            name = re.findall(r"[\w-]+", word)  # `MaskRCNN.losses`, `DEFAULTS["anchor_sizes"]`
            assert all(part in sources[file] for part in name), (file, word, row)


def test_the_links_of_the_contents_lead_to_sections():
    anchors = {
        re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", README, re.M)
    }
    links = re.findall(r"\]\(#([\w-]+)\)", README)
    assert len(links) > 10 and set(links) <= anchors


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", section("Copy a piece"), re.S))
def test_pieces_run_as_they_stand(code):
    exec(compile(code, "README.md", "exec"), {})


def test_every_recipe_is_in_the_table_of_the_paper():
    told = section("Every experiment of the paper") + section("Try it")
    missing = [name for name in train.RECIPES if name not in told]
    assert not missing, missing


def test_the_example_row_of_ones_own_data_is_a_recipe():
    (code,) = re.findall(r"```python\n(.*?)```", section("Your own data"), re.S)
    row = eval("{" + code + "}", vars(train))["mine"]
    train.check(row, from_random=True)
    assert set(row.model) <= set(train.detector.DEFAULTS)
