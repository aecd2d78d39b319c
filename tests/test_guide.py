"""CONTRIBUTING.md: what it takes from the code is up to date, its examples work as printed, its commands are those that pass."""

import ast
import importlib
import inspect
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, launch

import MODEL
import QUANT
import TRAIN
from bench import guide

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
EXAMPLES = dict(re.findall(r"^\*\*An? ([\w ]+)\.\*\*.*?```python\n(.*?)```", TEXT, re.S | re.M))
ADDED = re.findall(r"^\| an? ([\w ]+) \|", TEXT, re.M)  # of the table "to add X, go to Y"


# ---------------------------------------------------------------------------------------------- links and diagrams


def test_the_guide_is_what_its_program_makes_of_it():
    assert guide.updated(TEXT) == TEXT, "run python bench/guide.py"


def test_links_lead_to_the_definitions_that_they_name():
    """Compared with what Python says of the imported objects."""
    links = re.findall(r"\[`([\w.]+)`\]\((\w+)\.py#L(\d+)\)", TEXT)
    assert len(links) > 40
    for name, file, line in links:
        thing = importlib.import_module(file)
        for part in name.removeprefix(f"{file}.").split("."):
            thing = getattr(thing, part)
        source = (ROOT / f"{file}.py").read_text().splitlines()[int(line) - 1]
        last = name.rpartition(".")[2]
        assert re.match(rf"\s*(def|class) {last}\b|{last}\b[^=]*=", source), (name, source)
        if inspect.isfunction(thing) or inspect.isclass(thing):
            lines, first = inspect.getsourcelines(thing)
            assert int(line) in range(first, first + len(lines)), name


def test_each_file_has_stops_in_its_core():
    for file, rest in re.findall(r"^- \[`(\w+)\.py`\](.*?)(?=^- |^\S|\Z)", TEXT[TEXT.index("## Read the code") :], re.M | re.S):
        stops = [int(line) for line in re.findall(rf"{file}\.py#L(\d+)", rest)]
        size = int(re.search(r", ([\d,]+) lines", rest)[1].replace(",", ""))
        assert 3 <= len(stops) <= 6 and stops == sorted(stops) and stops[-1] < size, file
    assert len(re.findall(r"^- \[`\w+\.py`\]", TEXT, re.M)) == 8


def test_the_program_repairs_lines_sizes_and_diagrams_and_names_what_is_gone():
    broken = re.sub(r"#L\d+", "#L7", re.sub(r"[\d,]+ lines, \d+ minutes", "1 lines, 1 minutes", TEXT)).replace(" --> ", " --- ")
    assert broken != TEXT and guide.updated(broken) == TEXT
    with pytest.raises(SystemExit, match=r"MODEL.py defines no rotated; nearest is rotate"):
        guide.updated(TEXT.replace("[`rotate`]", "[`rotated`]"))


def test_the_diagrams_show_the_imports_and_the_tables():
    drawn = dict(re.findall(r"```mermaid\n%% (\w+)\n(.*?)```", TEXT, re.S))
    arrows = re.findall(r"^    (\w+) --> (\w+)$", drawn["imports"], re.M)
    reached: dict[str, set] = {name: set() for name in guide.FILES}
    for name in guide.FILES:
        for other, file in arrows:
            reached[name] |= {other} | reached[other] if file == name else set()
    for name in guide.FILES:
        module = ast.parse((ROOT / f"{name}.py").read_text())
        top = {alias.name for node in module.body if isinstance(node, ast.Import) for alias in node.names} & set(guide.FILES)
        assert top <= reached[name] and (not top) == (not reached[name]), name
    for form in QUANT.EXPORTS:
        assert f'"QUANT.py --to {form}"' in drawn["places"]
    for name in (*MODEL.FAMILIES, *QUANT.FORMS):
        assert re.search(rf'[ >"]{name}[,"]', drawn["places"]), name


# -------------------------------------------------------------------------------------------------- examples


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with the beginnings of the shipped data."""
    folder = tmp_path_factory.mktemp("workshop")
    (folder / "data").mkdir()
    for path in (*ROOT.glob("data/*.jsonl"), ROOT / "data" / "train.txt"):
        lines = path.read_text().splitlines(keepends=True)
        (folder / "data" / path.name).write_text("".join(lines[:400]))
    (folder / "out").mkdir()
    return folder


@pytest.fixture(scope="module")
def trained(workshop):
    """The same with `out`, a model trained for a few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workshop)
        TRAIN.main("--preset llama-225k --batch-size 8 --max-length 128 --max-steps 40 --training.sample_tokens 0".split())
    return workshop


def test_the_table_and_the_examples_name_the_same_additions():
    assert list(EXAMPLES) == ADDED and len(ADDED) >= 9
    for name, code in EXAMPLES.items():
        assert code.count("\n") < 30 and "assert" in code, name


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_works_as_printed(name, workshop, tmp_path, request):
    folder = tmp_path / "fork"
    shutil.copytree(request.getfixturevalue("trained") if "--model out " in EXAMPLES[name] else workshop, folder)
    (folder / "example.py").write_text(EXAMPLES[name])
    process = launch(folder, "example.py", PYTHONPATH=str(ROOT))
    out, log = process.communicate(timeout=300)
    assert process.returncode == 0, out + log


# -------------------------------------------------------------------------------------------------- commands


def test_the_commands_work():
    """pip and pytest are those of .ci/run; the page's command runs in tests/test_serve.py."""
    commands = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
    environment = [re.sub(r" --[\w-]+", "", line) for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    for command in commands:
        if command in ("python bench/guide.py", "ruff check ."):
            words = ["bench/guide.py", "--check"] if "guide" in command else ["-m", *command.split()]
            done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0 and (not done.stdout or "passed" in done.stdout), done.stdout + done.stderr
        elif "streamlit" not in command:
            assert command in environment, command
    assert len(commands) == 5
