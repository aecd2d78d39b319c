"""bench/tour.ipynb: its cells run, its assertions hold, and its outputs are those of its code."""

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from conftest import ROOT

NOTEBOOK = ROOT / "bench" / "tour.ipynb"
# Runs the first cells of a notebook in one namespace. Writes for each cell its text, the number of its figures, the lines of its
# assertions, and the lines of the assertions that held. The audit hook sees every file that Python code opens for writing.
RUNNER = r"""
import ast, contextlib, io, json, linecache, os, sys
import matplotlib.pyplot as plt

notebook, root, results, count = sys.argv[1:]
written, passed, found, namespace = set(), set(), [], {"__name__": "__main__", "passed_line": lambda line: passed.add(line)}

def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        written.add(os.path.realpath(arguments[0]))

class Watched(ast.NodeTransformer):
    def visit_Assert(self, node):
        asserts.append(node.lineno)
        return [node, *ast.parse(f"passed_line({node.lineno})").body]

sys.addaudithook(watch)
cells = [cell for cell in json.load(open(notebook))["cells"] if cell["cell_type"] == "code"]
for number, cell in enumerate(cells[: int(count)], 1):
    source, name, asserts = "".join(cell["source"]), f"code cell {number}", []
    linecache.cache[name] = len(source), None, source.splitlines(True), name  # for tracebacks
    code = compile(ast.fix_missing_locations(Watched().visit(ast.parse(source))), name, "exec")
    passed.clear()
    with contextlib.redirect_stdout(io.StringIO()) as text:
        exec(code, namespace)
    found.append({"text": text.getvalue(), "figures": len(plt.get_fignums()), "asserts": asserts, "passed": sorted(passed)})
    plt.close("all")
inside = sorted(path for path in written if path.startswith(os.path.join(os.path.realpath(root), "")))
with open(results, "w") as file:
    json.dump({"cells": found, "written": inside}, file)
"""


def cells() -> list[dict]:
    return [{**cell, "source": "".join(cell["source"])} for cell in json.loads(NOTEBOOK.read_text())["cells"]]


def code_cells() -> list[dict]:
    return [cell for cell in cells() if cell["cell_type"] == "code"]


def run_cells(folder: Path, results: Path, count: int) -> dict:
    """Run the first cells in a new interpreter that starts in `folder`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", RUNNER, str(NOTEBOOK), str(ROOT), str(results), str(count)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(results.read_text())


def words(text: str) -> list[str]:
    """The words of an output. Digits differ between processors, by rounding."""
    return re.sub(r"[-+]?\d[\d.,]*", "#", text).split()


def check_outputs(cell: dict, seen: dict) -> None:
    """After a change: jupyter nbconvert --execute --inplace --ExecutePreprocessor.record_timing=False bench/tour.ipynb"""
    text = "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")
    images = [output for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert len(images) == seen["figures"], cell["source"]
    assert all(output.get("name") == "stdout" or output in images for output in cell["outputs"]), cell["source"]
    if "varies" in cell["metadata"].get("tags", []):  # sampled text
        assert bool(text) == bool(seen["text"]), cell["source"]
    else:
        assert words(text) == words(seen["text"]), cell["source"]


def test_the_notebook_runs_as_committed(tmp_path):
    """All cells run, each assertion is executed, the repository stays unchanged, and the outputs are those of the code. One test,
    because a run takes half a minute."""
    cells = code_cells()
    results = run_cells(ROOT / "bench", tmp_path / "results.json", len(cells))
    assert results["written"] == []
    for number, (cell, seen) in enumerate(zip(cells, results["cells"], strict=True), 1):
        assert seen["passed"] == seen["asserts"], cell["source"]
        assert cell["execution_count"] == number and cell["metadata"].keys() <= {"tags"}
        check_outputs(cell, seen)
    assert sum(len(seen["asserts"]) for seen in results["cells"]) > 55


def test_the_first_cells_run_from_the_repository_root(tmp_path):
    assert len(run_cells(ROOT, tmp_path / "results.json", 2)["cells"]) == 2


def test_every_section_checks_something():
    starts = [i for i, cell in enumerate(cells()) if cell["cell_type"] == "markdown" and cell["source"].startswith("## ")]
    assert [cells()[i]["source"].split(".")[0] for i in starts] == [f"## {number}" for number in range(1, 13)]
    for start, stop in pairwise(starts):
        section = "\n".join(cell["source"] for cell in cells()[start:stop] if cell["cell_type"] == "code")
        assert re.search(r"^\s*assert ", section, re.M), cells()[start]["source"]
    assert NOTEBOOK.stat().st_size < 400_000
