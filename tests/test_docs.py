"""README.md and docs/: links lead somewhere, commands parse, pieces of code run.

Links to lines of code move when the code is edited. This corrects them, the numbers of lines in
README's table of files, and what docs/pieces.md lists to be copied:

  python tests/test_docs.py
"""

import argparse
import ast
import functools
import importlib
import re
import shlex
import sys
import textwrap
from pathlib import Path
from unittest import mock

import pytest
from PIL import Image
from torch.distributed.run import get_args_parser as torchrun_parser

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tiny_run import NARROW  # noqa: E402

import model as detector  # noqa: E402
import train  # noqa: E402

PATHS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PATHS}
EACH_PAGE = pytest.mark.parametrize("page", PAGES)


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def prose(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def section(page, title):
    return re.search(rf"^## {title}\n.*?(?=^## |\Z)", PAGES[page], re.S | re.M)[0]


# -- Links -----------------------------------------------------------------------------------------


@functools.cache
def definitions(path):
    """Line of every definition: functions, classes, methods, fields, constants, keys, options."""
    lines, owner = {}, ""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if match := re.match(r"(?:class |def )?(\w+)(?=\(|:| = )", line):
            owner = match[1]
            lines[owner] = number
        elif match := re.match(r"    (?:def )?(\w+)(?=\(|:| = )", line):
            lines[f"{owner}.{match[1]}"] = number
        elif match := re.match(r'    "([^"]+)":', line):
            lines[f'{owner}["{match[1]}"]'] = number
        for option in re.findall(r'"(--[\w-]+)"', line):
            lines.setdefault(option, number)
    return lines


def corrected(page):
    """The page with the right line in each link to code; and the names that there are not."""
    folder, missing = (ROOT / page).parent, []

    def link(match):
        name, file = match[1], match[2]
        line = definitions(folder / file).get(name) if (folder / file).exists() else None
        missing.extend([f"{file} {name}"] if line is None else [])
        return f"[`{name}`]({file}#L{line or 1})"

    def length(match):
        return f"{match[1]}{len((folder / match[2]).read_text().splitlines()):,} |"

    text = re.sub(r"\[`([^`]+)`\]\(([^)#]+\.py)#L\d+\)", link, PAGES[page])
    for code in PIECES if page == "docs/pieces.md" else ():
        pattern = rf"^Copy: [^\n]+(\n[^\n]+)*\n\n(?={re.escape(f'```python{chr(10)}{code}```')})"
        text = re.sub(pattern, lambda _: copy_line(code) + "\n\n", text, flags=re.M)  # noqa: B023
    text = re.sub(r"^(\| \[(\w+\.py)\]\(\w+\.py\) \|.*\| )[\d,]+ \|$", length, text, flags=re.M)
    return text, missing


@EACH_PAGE
def test_links_to_code_lead_to_the_definition_that_they_name(page):
    text, missing = corrected(page)
    assert not missing
    assert text == PAGES[page], "run: python tests/test_docs.py"


@EACH_PAGE
def test_links_lead_to_files_and_sections(page):
    for target in re.findall(r"\]\((?!http)([^)\s]+)\)", prose(PAGES[page])):
        file, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / file if file else ROOT / page).resolve()
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            titles = re.findall(r"^#+ (.+)$", path.read_text().lower(), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", t).replace(" ", "-") for t in titles], target


def test_the_map_covers_the_paper_and_readme_shows_rows_of_it():
    rows = [line for line in PAGES["docs/paper-map.md"].splitlines() if ".py#L" in line]
    assert len(rows) > 50
    shown = section("README.md", "The paper beside the code").replace("](", "](../")
    assert "\n".join(rows[1:5]) in shown


@EACH_PAGE
def test_pages_are_short_and_say_what_they_are_for(page):
    text, readme = PAGES[page], PAGES["README.md"]
    assert len(readme.splitlines()) <= 220
    long = [line for line in prose(text).splitlines() if len(line) > 100 and line[0] not in "|!"]
    assert not long
    assert not re.findall(r"{{\w+}}", text)  # numbers that are still to be filled in
    if page != "README.md":
        assert text.split("\n\n")[1].startswith("This page is for")
        assert f"]({page})" in readme


# -- Commands --------------------------------------------------------------------------------------

TORCHRUN = "torchrun --nproc-per-node 8 train.py --data coco"  # what "T" stands for
PROGRAM = re.compile(r"(python|torchrun|pip|pytest|ruff|git) ")


def shell_commands(block):
    """The commands of a block of bash, with continued lines joined."""
    for line in re.sub(r" *\\\n    +", " ", block).splitlines():
        if line and not line.startswith("#"):
            assert PROGRAM.match(line), f"not a command, or a backslash is missing: {line}"
            assert not line.endswith("\\"), f"a backslash too many: {line}"
            yield from re.split(" *&& *", line)


def find_commands(page):
    """Every command of a page: list of (script, words after it, number of processes)."""
    text = PAGES[page]
    found = [c for block in blocks(text, "bash") for c in shell_commands(block)]
    found += re.findall(r"`((?:python|torchrun) [^`]*\.py\b[^`]*|T --[^`]+)`", prose(text))
    commands = []
    for command in filter(TORCHRUN.__ne__, found):
        command = re.sub(r"^T ", f"{TORCHRUN} ", command)
        command = re.sub(r"\b(NAME|RECIPE)\b", "toy", command)
        for n in "2345" if "Nx" in command else "1":  # Nx: 2x to 5x
            words = shlex.split(command.replace("Nx", f"{n}x"), comments=True)
            processes = 1
            if words[0] == "torchrun":
                args = torchrun_parser().parse_args(words[1:])
                words = ["python", args.training_script, *args.training_script_args]
                processes = int(args.nproc_per_node) * int(args.nnodes.split(":")[-1])
            if words[0] == "python" and words[1].endswith(".py") and "tests/" not in words[1]:
                commands.append((words[1], words[2:], processes))
    return commands


class Parsed(BaseException):
    """Raised in place of what a program would do; its argument is the parsed command line."""


def parse(script, words):
    """The command line as the program's own parser understands it, or its error."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(parser, arguments=None):
        raise Parsed(parse_args(parser, arguments))

    program = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            program.main(words)
        except Parsed as parsed:
            return parsed.args[0]
        except (SystemExit, Exception) as error:
            return error


@pytest.fixture(scope="module")
def commands():
    """Every command of every page, parsed: list of (page, script, arguments, processes)."""
    (code,) = blocks(section("docs/own-data.md", "A recipe of your own"), "python")
    with mock.patch.dict(train.RECIPES):
        exec(code, dict(vars(train)))
        parsed = []
        for page in PAGES:
            for script, words, processes in find_commands(page):
                args = parse(script, words)
                assert isinstance(args, argparse.Namespace), (page, script, words, args)
                parsed.append((page, script, args, processes))
        yield parsed


def test_every_command_is_understood(commands):
    assert len(commands) > 80


def test_checkpoints_in_commands_are_those_that_the_runs_end_with(commands):
    last = {}
    for page, script, args, processes in commands:
        if script == "train.py" and not args.list:
            recipe = train.make_recipe(args)
            recipe = train.scale_to_batch(recipe, recipe.images_per_gpu * processes)
            out = args.out or f"runs/{args.recipe}"
            ending = f"{out}/checkpoint_{recipe.iterations:07d}.pth"
            assert last.setdefault(out, ending) == ending, (page, "two runs in one folder")
    for page, _, args, _ in commands:
        for file in (vars(args).get("weights"), vars(args).get("init")):
            out = str(file).rpartition("/")[0]
            assert out not in last or str(file) == last[out], (page, file)


# -- Tables and code -------------------------------------------------------------------------------


def test_every_recipe_and_every_tool_has_a_row():
    words = set(re.findall(r"[\w.-]+", PAGES["docs/experiments.md"]))
    assert train.RECIPES.keys() - {"mine"} <= words
    tools = {path.name for path in (ROOT / "tools").glob("*.py")} - {"__init__.py"}
    assert tools == set(re.findall(r"^\| \[(\w+\.py)\]", PAGES["docs/tools.md"], re.M))


@pytest.mark.parametrize(
    "page, title", [("README.md", "Use it as a library"), ("docs/pieces.md", "As a library")]
)
def test_the_library_is_used_as_shown(page, title, tmp_path, monkeypatch):
    code, *training = blocks(section(page, title), "python")
    weights, image = re.findall(r'"(\w+/[^"]+)"', code)
    for path in (weights, image):
        (tmp_path / path).parent.mkdir(parents=True)
    net = detector.build_model(num_classes=5, **NARROW)
    net.data_settings |= {"classes": list("abcde")}
    net.box_heads[0].classifier.bias.data[3] = 9.0  # sure of everything, and that it is a "c"
    detector.save_model(net, tmp_path / weights)
    Image.new("L", (60, 40)).save(tmp_path / image)  # grey: becomes three channels
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, page, "exec"), names)
    found, sure = names["found"], names["sure"]
    assert sure.any() and found["boxes"].shape == (len(found["labels"]), 4)
    assert found["masks"].shape[1:] == (40, 60)
    assert page != "README.md" or set(names["names"]) == {"c"}
    for code in training:
        assert Path("detections.png").stat().st_size > 0
        exec(compile(code, page, "exec"), names)
        assert all(loss.isfinite() for loss in names["losses"].values())
        assert detector.load_model("squares.pth").data_settings["classes"] == ["square"]


# -- Pieces to copy --------------------------------------------------------------------------------

OWN_IMPORT = re.compile(r"^from (norms|model|data|train) import (.+)$", re.M)
PIECES = [code for code in blocks(PAGES["docs/pieces.md"], "python") if OWN_IMPORT.search(code)]


def needs(code):
    """What a piece needs of the file that it imports: {name: source} and import lines, in order."""
    ((file, taken),) = OWN_IMPORT.findall(code)
    defined, imported = {}, {}
    for node in ast.parse((ROOT / f"{file}.py").read_text()).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = f"from {node.module} " if isinstance(node, ast.ImportFrom) else ""
            for name in node.names:
                line = f"{module}import {ast.unparse(name)}"
                imported[name.asname or name.name.split(".")[0]] = line
        leaves = [leaf for t in getattr(node, "targets", ()) for leaf in ast.walk(t)]
        names = [getattr(node, "name", None)] + [getattr(leaf, "id", None) for leaf in leaves]
        defined |= dict.fromkeys(filter(None, names), node)
    used, waiting = set(), set(taken.split(", ")) - {"Config"}
    while waiting:
        name = waiting.pop()
        used.add(name)
        leaves = ast.walk(defined[name]) if name in defined else ()
        waiting |= {leaf.id for leaf in leaves if isinstance(leaf, ast.Name)} - used
    copied = {name: ast.unparse(node) for name, node in defined.items() if name in used}
    return copied, [line for name, line in imported.items() if name in used]


def copy_line(code):
    """The paragraph of docs/pieces.md that says what to copy for a piece."""
    names, imports = (", ".join(f"`{item}`" for item in items) for items in needs(code))
    line = f"Copy: {OWN_IMPORT.findall(code)[0][0]}.py {names}. Imports: {imports or 'none'}."
    return "\n".join(textwrap.wrap(line, 100, break_long_words=False, break_on_hyphens=False))


@pytest.mark.parametrize("code", PIECES, ids=[re.findall(r"import (\w+)", c)[-1] for c in PIECES])
def test_pieces_run_in_place_and_copied(code):
    exec(compile(code, "pieces.md", "exec"), {})
    copied, imports = needs(code)
    settings = argparse.Namespace(**vars(detector.Config()))  # any object with its fields
    own = OWN_IMPORT.sub("", code)
    piece = "\n".join([*imports, *dict.fromkeys(copied.values()), own])
    exec(compile(piece, "copy", "exec"), {"__name__": "piece", "Config": lambda: settings})


if __name__ == "__main__":
    for name in PAGES:
        text, missing = corrected(name)
        (ROOT / name).write_text(text)
        print(name, *missing, sep="\n  not found: ") if missing else None
