"""The parts of CONTRIBUTING.md and README.md that follow from the code: lines of links, sizes of the cores, both diagrams.

    python bench/guide.py            # after a change of the code: rewrites these parts
    python bench/guide.py --check    # prints what would change, exit status 1 if anything would
"""

from __future__ import annotations

import argparse
import ast
import difflib
import re
import sys
import textwrap
from collections.abc import Iterable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GUIDE, README = ROOT / "CONTRIBUTING.md", ROOT / "README.md"
FILES = ("MODEL", "TOKENIZER", "INFER", "TRAIN", "SFT", "RL", "DISTILL", "QUANT")
LINES_A_MINUTE = 25  # of unknown code, read once with attention
LINK = re.compile(r"\[`(?:[A-Z]+\.(?=[\w.]*\w`))?([\w.]+)`\]\((\w+)\.py#L\d+\)")  # [`MODEL.attend`](MODEL.py#L12)
CORE = re.compile(r"(\[`(\w+)\.py`\]\(\2\.py\)), [\d,]+ lines, \d+ minutes")
ROW = re.compile(r"^(\| `(\w+)\.py` \| .+) \| [\d,]+ \| \d+ \|$", re.M)  # of README's table
DIAGRAM = re.compile(r"(```mermaid\n%% (\w+)\n).*?(```)", re.S)


@cache
def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / f"{file}.py").read_text(encoding="utf-8"))


@cache
def definitions(file: str) -> dict[str, ast.stmt]:
    """{name: statement} of the functions, classes and tables of a file; methods as Class.method."""
    found: dict[str, ast.stmt] = {}
    for node in tree(file).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}": inner for inner in node.body if isinstance(inner, ast.FunctionDef)}
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(target, ast.Name):
                found.setdefault(target.id, node)
    return found


def core_lines(file: str) -> int:
    """Lines above the banner `edges`."""
    lines = (ROOT / f"{file}.py").read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines) if re.fullmatch(r"# =+ edges", line))


def linked(match: re.Match) -> str:
    """The link with the line of the definition that its text names."""
    name, file = match.groups()
    known = definitions(file)
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0)
        sys.exit(f"{GUIDE.name}: {match[0]}: {file}.py defines no {name}; nearest is {near[0]}")
    return re.sub(r"#L\d+", f"#L{known[name].lineno}", match[0])


def sized(match: re.Match) -> str:
    lines, row = core_lines(match[2]), match.re == ROW
    return match[1] + (" | {:,} | {} |" if row else ", {:,} lines, {} minutes").format(lines, round(lines / LINES_A_MINUTE))


# ---------------------------------------------------------------------------------------------------- diagrams


@cache
def imports(file: str) -> tuple[set[str], set[str]]:
    """The files that a file imports: at its top, and inside functions only."""

    def of(nodes: Iterable[ast.AST]) -> set[str]:
        return {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names} & set(FILES)

    return of(tree(file).body), of(ast.walk(tree(file))) - of(tree(file).body)


def draw_imports(text: str) -> str:
    """The files with the names that the guide links as stops, and their imports without those that follow from others."""
    parts = CORE.split(text)  # text, heading, file, text, heading, file, ...
    stops = {file: [name for name, other in LINK.findall(part.partition("\n\n")[0]) if other == file]
             for file, part in zip(parts[2::3], parts[3::3], strict=True)}
    above = {file: imports(file)[0] for file in FILES}
    reached: dict[str, set[str]] = {}
    for file in FILES:  # each imports only files before it
        reached[file] = above[file].union(*(reached[other] for other in above[file]))
    lines = ["flowchart TD"]
    lines += [f'    {file}["<b>{file}.py</b><br>{wrapped(stops[file])}"]' for file in FILES]
    for file in FILES:
        direct = [other for other in FILES if other in above[file]
                  and not any(other in reached[between] for between in above[file])]
        lines += [f"    {other} --> {file}" for other in direct]
    lines += [f"    {other} -.-> {file}" for file in FILES for other in FILES
              if other in imports(file)[1] and other not in reached[file]]
    return "\n".join(lines) + "\n"


def keys_of(file: str, table: str) -> dict[str, ast.expr]:
    """{key: expression} of a table written as a dict."""
    value = definitions(file)[table].value
    return {ast.literal_eval(key): entry for key, entry in zip(value.keys, value.values, strict=True)}


def programs(file: str, function: str) -> list[str]:
    """The programs in the line `Runs in: ...` of a docstring."""
    match = re.search(r"Runs in: (.+)$", ast.get_docstring(definitions(file)[function]) or "", re.M)
    if not match:
        sys.exit(f"{file}.py: the docstring of {function} has no line 'Runs in: PROGRAM, PROGRAM'")
    return match[1].split(", ")


def wrapped(words: Iterable[str]) -> str:
    return "<br>".join(textwrap.wrap(", ".join(words), 27, break_on_hyphens=False))


def draw_places(_: str) -> str:
    """From a trained model to the programs that run it: folders of MODEL.py and QUANT.py, and the exports of QUANT.py."""
    forms = [("MODEL.save with --lora.r", "LoRA adapter", programs("MODEL", "_save_adapter")),
             ("MODEL.save", "Hugging Face<br>" + wrapped(keys_of("MODEL", "FAMILIES")), programs("MODEL", "save")),
             ("MODEL.save of other networks", "model_type custom", ["INFER.py"]),
             ("QUANT.py --method", "compressed-tensors<br>" + wrapped(keys_of("QUANT", "FORMS")),
              programs("QUANT", "hub_config"))]
    forms += [(f"QUANT.py --to {name}", name, programs("QUANT", function.id))
              for name, function in keys_of("QUANT", "EXPORTS").items()]
    lines, drawn = ["flowchart LR", "    model([a trained model])"], {}
    for number, (how, label, opened) in enumerate(forms):
        lines += [f'    form{number}["{label}"]', f'    model -->|"{how}"| form{number}']
        ends = [f"p{drawn[name]}" if name in drawn else f"p{drawn.setdefault(name, len(drawn))}([{name}])" for name in opened]
        lines.append(f"    form{number} --> {' & '.join(ends)}")
    return "\n".join(lines) + "\n"


DRAWINGS = {"imports": draw_imports, "places": draw_places}


def updated(text: str) -> str:
    """The text with everything that follows from the code brought up to date."""
    text = ROW.sub(sized, CORE.sub(sized, LINK.sub(linked, text)))
    return DIAGRAM.sub(lambda match: match[1] + DRAWINGS[match[2]](text) + match[3], text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check, changed = parser.parse_args().check, False
    for path in (GUIDE, README):
        old = path.read_text(encoding="utf-8")
        new = updated(old)
        changed |= new != old
        sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), path.name, path.name, n=0))
        if not check:
            path.write_text(new, encoding="utf-8")
    sys.exit(int(check and changed))
