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
import runpy
import shlex
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from PIL import Image
from torch.distributed.run import get_args_parser as torchrun_parser

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model as detector  # noqa: E402
import train  # noqa: E402
from tools.toy_coco import make_toy_coco  # noqa: E402

PATHS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PATHS}
EACH_PAGE = pytest.mark.parametrize("page", PAGES)


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def section(page, title):
    return re.search(rf"^## {title}\n.*?(?=^## |\Z)", PAGES[page], re.S | re.M)[0]


# ------------------------------------------------------------------------------------------------
# Links
# ------------------------------------------------------------------------------------------------


@functools.cache
def definitions(path):
    """Line of every definition: functions, classes, methods, fields, constants, keys, options."""
    text = path.read_text()
    lines = {}

    def visit(body, prefix):
        for node in body:
            names = [node.name] if hasattr(node, "name") else []
            targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
            lines.update({prefix + name: node.lineno for name in names})
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            if isinstance(getattr(node, "value", None), ast.Dict):
                for key in node.value.keys:
                    if isinstance(key, ast.Constant):
                        lines[f'{names[0]}["{key.value}"]'] = key.lineno

    visit(ast.parse(text).body, "")
    for number, line in enumerate(text.splitlines(), 1):
        for option in re.findall(r'"(--[\w-]+)"', line):
            lines.setdefault(option, number)
    return lines


OWN_IMPORT = re.compile(r"^from (norms|model|data|train) import (.+)$", re.M)
PIECES = [code for code in blocks(PAGES["docs/pieces.md"], "python") if OWN_IMPORT.search(code)]


def needs(code):
    """What a piece needs of the file that it imports: {name: source} in order, {import: line}."""
    ((file, taken),) = OWN_IMPORT.findall(code)
    names = set(taken.split(", ")) - {"Config"}
    source = (ROOT / f"{file}.py").read_text()
    defined, imported = {}, {}
    for node in ast.parse(source).body:
        targets = [leaf for t in getattr(node, "targets", ()) for leaf in ast.walk(t)]
        own = [getattr(node, "name", None)] + [getattr(leaf, "id", None) for leaf in targets]
        defined |= dict.fromkeys(filter(None, own), node)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = f"from {node.module} " if isinstance(node, ast.ImportFrom) else ""
            for name in node.names:
                code = f"{module}import {ast.unparse(name)}"
                imported[name.asname or name.name.split(".")[0]] = ast.unparse(name), code
    used, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        if name not in used:
            used.add(name)
            leaves = ast.walk(defined[name]) if name in defined else ()
            waiting += [leaf.id for leaf in leaves if isinstance(leaf, ast.Name)]
    copied = {name: ast.unparse(node) for name, node in defined.items() if name in used}
    return copied, dict(imported[name] for name in imported if name in used)


def copy_line(code):
    """The paragraph of docs/pieces.md that says what to copy for a piece."""
    copied, imports = needs(code)
    names = ", ".join(f"`{name}`" for name in copied)
    lines = ", ".join(f"`{line}`" for line in imports.values())
    line = f"Copy: {OWN_IMPORT.findall(code)[0][0]}.py {names}. Imports: {lines or 'none'}."
    return "\n".join(textwrap.wrap(line, 100, break_long_words=False, break_on_hyphens=False))


def corrected(page):
    """The page with the right line in each link to code; and the names that there are not."""
    folder = (ROOT / page).parent
    missing = []

    def link(match):
        name, file = match[1], match[2]
        line = definitions(folder / file).get(name) if (folder / file).exists() else None
        if line is None:
            missing.append(f"{file} {name}")
            return match[0]
        return f"[`{name}`]({file}#L{line})"

    def length(match):
        return f"{match[1]}{len((folder / match[2]).read_text().splitlines()):,} |"

    text = re.sub(r"\[`([^`]+)`\]\(([^)#]+\.py)#L\d+\)", link, PAGES[page])
    for code in PIECES if page == "docs/pieces.md" else ():
        code_block = re.escape(f"```python\n{code}```")
        pattern = rf"^Copy: [^\n]+(\n[^\n]+)*\n\n(?={code_block})"
        text = re.sub(pattern, lambda _: copy_line(code) + "\n\n", text, flags=re.M)  # noqa: B023
    text = re.sub(r"^(\| \[(\w+\.py)\]\(\w+\.py\) \|.*\| )[\d,]+ \|$", length, text, flags=re.M)
    return text, missing


@EACH_PAGE
def test_links_to_code_lead_to_the_definition_that_they_name(page):
    text, missing = corrected(page)
    assert not missing
    assert text == PAGES[page], "run: python tests/test_docs.py"


def test_the_map_covers_the_paper():
    rows = [line for line in PAGES["docs/paper-map.md"].splitlines() if ".py#L" in line]
    assert len(rows) > 50
    first = [line for line in PAGES["README.md"].splitlines() if line.startswith("| **Sec. 3.1**")]
    assert first[0].replace("](", "](../") == rows[0]


def anchors(text):
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


@EACH_PAGE
def test_links_lead_to_files_and_sections(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / file if file else ROOT / page).resolve()
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path.read_text()), target


def test_pages_are_short_and_say_what_they_are_for():
    readme = PAGES["README.md"]
    assert len(readme.splitlines()) <= 250
    for page, text in PAGES.items():
        prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
        long = [line for line in prose.splitlines() if len(line) > 100 and line[0] not in "|!"]
        assert not long, (page, long)
        assert "@@" not in text, (page, re.findall(r"@@\w*@@", text))
        if page != "README.md":
            assert text.split("\n\n")[1].startswith("This page is for"), page
            assert f"]({page})" in readme, page


# ------------------------------------------------------------------------------------------------
# Commands
# ------------------------------------------------------------------------------------------------

TORCHRUN = "torchrun --nproc-per-node 8 train.py --data coco"  # what "T" stands for
PROGRAM = re.compile(r"(?:[A-Z_]+=\w+ )?(?:python|torchrun|pip|pytest) ")


def shell_commands(block, page):
    """The commands of a block of bash, with continued lines joined."""
    lines = block.splitlines()
    commands = []
    while lines:
        line = lines.pop(0)
        if not line or line.startswith("#"):
            continue
        assert PROGRAM.match(line), f"{page}: not a command, or a backslash is missing: {line}"
        while line.endswith("\\"):
            assert lines and lines[0].startswith("    "), f"{page}: a backslash too many: {line}"
            line = line[:-1] + lines.pop(0).strip()
        commands += line.split("&&")
    return commands


def find_commands(page):
    """Every command of a page: list of (script, words after it, number of processes)."""
    text = PAGES[page]
    found = [c for block in blocks(text, "bash") for c in shell_commands(block, page)]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    found += re.findall(r"`((?:python|torchrun) [^`]*\.py\b[^`]*|T --[^`]+)`", prose)
    commands = []
    for command in found:
        if command == TORCHRUN:  # where T is defined
            continue
        command = re.sub(r"^T ", f"{TORCHRUN} ", command)
        command = re.sub(r"\b(NAME|RECIPE)\b", "toy", command)
        for n in "2345" if "Nx" in command else "1":
            words = shlex.split(command.replace("Nx", f"{n}x"), comments=True)
            words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
            processes = 1
            if words[0] == "torchrun":
                args = torchrun_parser().parse_args(words[1:])
                words = ["python", args.training_script, *args.training_script_args]
                processes = int(args.nproc_per_node) * int(args.nnodes.split(":")[-1])
            if words[0] == "python" and words[1].endswith(".py"):
                commands.append((words[1], words[2:], processes))
    return commands


class Parsed(BaseException):
    """Raised in place of what a program would do; its argument is the parsed command line."""


PARSE = argparse.ArgumentParser.parse_args


def parse(script, words):
    """The command line as the program's own parser understands it."""

    def stop(parser, arguments=None, namespace=None):
        raise Parsed(PARSE(parser, arguments, namespace))

    argv = [str(ROOT / script), *words]
    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop):
        with mock.patch.object(sys, "argv", argv):
            try:
                if script in ("train.py", "evaluate.py"):
                    importlib.import_module(script[:-3]).main(words)
                else:
                    runpy.run_path(argv[0], run_name="__main__")
            except Parsed as parsed:
                return parsed.args[0]
            except (SystemExit, Exception) as error:
                return error


def example_row():
    """The row of docs/own-data.md, as a Recipe."""
    (code,) = blocks(section("docs/own-data.md", "A recipe of your own"), "python")
    names = vars(train) | {"RECIPES": dict(train.RECIPES)}
    exec(compile(code, "own-data.md", "exec"), names)
    return names["RECIPES"]["mine"]


@pytest.fixture(scope="module")
def commands():
    """Every command of every page, parsed: list of (page, script, arguments, processes)."""
    with mock.patch.dict(train.RECIPES, mine=example_row()):
        found, refused = [], []
        for page in PAGES:
            for script, words, processes in find_commands(page):
                args = parse(script, words)
                if isinstance(args, argparse.Namespace):
                    found.append((page, script, args, processes))
                else:
                    refused.append(f"{page}: {script} {shlex.join(words)}: {args!r}")
    assert not refused, "\n" + "\n".join(refused)
    return found


def test_every_command_is_understood(commands):
    assert len(commands) > 80


def plan(args, processes):
    """What distinguishes the run of a command of train.py, and its last iteration."""
    recipe = {**train.RECIPES, "mine": example_row()}[args.recipe]
    iterations = recipe.iterations if args.init == "random" else recipe.iterations_pretrained
    if args.schedule:
        iterations = int(args.schedule[:-1]) * recipe.one_x
    batch = processes * (args.images_per_gpu or recipe.images_per_gpu)
    last = round(iterations * recipe.batch_size / batch)
    run = (args.recipe, last, args.init, args.norm, args.freeze_at, args.subset, args.seed)
    return run, last


def test_commands_agree_about_the_runs_that_they_name(commands):
    runs, last = {}, {}  # by folder
    converted = set()
    for page, script, args, processes in commands:
        if script == "tools/convert_weights.py":
            converted.add(args.target)
        if script == "train.py" and args.dry_run is None and not args.list:
            out = args.out or f"runs/{args.recipe}"
            run, iterations = plan(args, processes)
            assert runs.setdefault(out, run) == run, (page, out)
            last[out] = iterations
    for page, script, args, _ in commands:
        for option in ("weights", "init"):
            file = vars(args).get(option)
            if file in (None, "random", "FILE"):
                continue
            out, _, name = str(file).rpartition("/")
            if out in last:
                assert name == f"checkpoint_{last[out]:07d}.pth", (page, file)
            else:
                assert file in converted or out == "runs/toy-pretrain", (page, script, file)
        if vars(args).get("trunk"):
            assert args.trunk in runs, (page, args.trunk)


def test_runs_that_are_drawn_exist(commands):
    miniature = runpy.run_path(str(ROOT / "tools" / "miniature.py"))["RUNS"]
    outs = {args.out or f"runs/{args.recipe}" for _, s, args, _ in commands if s == "train.py"}
    drawn = [run for _, script, args, _ in commands if "plot" in script for run in args.runs]
    assert len(drawn) > 10
    for run in drawn:
        name = re.fullmatch(r"runs/miniature/(.+)-seed\d", run)
        assert name[1] in miniature if name else run in outs, run


# ------------------------------------------------------------------------------------------------
# Tables and code
# ------------------------------------------------------------------------------------------------


def test_every_recipe_is_in_the_table_of_experiments():
    told = PAGES["docs/experiments.md"]
    missing = [name for name in train.RECIPES if not re.search(rf"(?<![\w-]){name}(?![\w-])", told)]
    assert not missing, missing


def test_every_tool_has_a_row():
    tools = {path.name for path in (ROOT / "tools").glob("*.py")} - {"__init__.py"}
    assert tools == set(re.findall(r"^\| \[(\w+\.py)\]", PAGES["docs/tools.md"], re.M))


def test_the_plans_of_ones_own_data_are_not_refused(commands, tmp_path, capsys):
    """Every command of the page, for 240 images of three classes."""
    make_toy_coco(tmp_path, train_images=1, val_images=1)
    row = example_row()
    with (
        mock.patch.dict(train.RECIPES, mine=row),
        mock.patch.object(train.data.CocoDataset, "__len__", lambda _: 240),
    ):
        planned = set()
        for page, script, args, _ in commands:
            if (page, script) == ("docs/own-data.md", "train.py"):
                words = ["--recipe", args.recipe, "--init", args.init, "--data", str(tmp_path)]
                assert train.main([*words, "--dry-run"]) == 0, capsys.readouterr().err
                planned.add(args.recipe)
    assert planned == {"small", "finetune", "mine"}
    net = detector.build_model(**row.model)
    assert net.config.anchor_ratios == row.model["anchor_ratios"]


@pytest.mark.parametrize(
    "page, title", [("README.md", "Use it as a library"), ("docs/pieces.md", "As a library")]
)
def test_the_library_is_used_as_shown(page, title, tmp_path, monkeypatch):
    from tiny_run import NARROW

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
    monkeypatch.syspath_prepend(ROOT)
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


def test_the_picture_of_readme_is_made_as_shown(tmp_path, monkeypatch):
    (code,) = blocks(PAGES["docs/tools.md"], "python")
    for folder in ("runs/toy/pictures", "docs"):
        (tmp_path / folder).mkdir(parents=True)
    for i in range(8):
        Image.new("RGB", (60, 40 + i)).save(tmp_path / "runs/toy/pictures" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "tools.md", "exec"), {})
    assert Image.open("docs/detections.png").size == (1200, 640)


@pytest.mark.parametrize("code", PIECES, ids=[re.findall(r"import (\w+)", c)[-1] for c in PIECES])
def test_pieces_run_in_place_and_copied(code):
    exec(compile(code, "pieces.md", "exec"), {})

    copied, imports = needs(code)
    settings = SimpleNamespace(**vars(detector.Config()))  # any object with its attributes will do
    own = OWN_IMPORT.sub("", code)
    piece = "\n".join([*imports.values(), *dict.fromkeys(copied.values()), own])
    exec(compile(piece, "copy", "exec"), {"__name__": "piece", "Config": lambda: settings})


if __name__ == "__main__":
    for name in PAGES:
        text, missing = corrected(name)
        (ROOT / name).write_text(text)
        print(name, *missing, sep="\n  not found: ") if missing else None
