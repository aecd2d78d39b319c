"""The files around the code: continuous integration, issue forms, citation, hooks and the stated versions of packages."""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.version import Version

import MODEL

FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
STATED = ("requirements.txt", "requirements-extras.txt", "requirements-dev.txt")


def requirements(name: str) -> list[Requirement]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-r")]


def stated(package: str) -> Requirement:
    [found] = [requirement for name in STATED for requirement in requirements(name) if requirement.name == package]
    return found


# -------------------------------------------------------------------------------------------------- integration


def test_the_workflow_runs_the_scripts_of_ci():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    events = workflow[True]  # YAML 1.1 reads `on` as a truth value
    assert {"push", "pull_request"} <= set(events) and workflow["permissions"] == {"contents": "read"}
    commands = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in workflow["jobs"].items()}
    assert commands == {"newest": [".ci/run"], "lowest": [".ci/lowest"]}
    for [command] in commands.values():
        assert os.access(ROOT / command, os.X_OK)
        assert subprocess.run(["bash", "-n", ROOT / command]).returncode == 0
    for job in workflow["jobs"].values():
        assert job["runs-on"] and job["timeout-minutes"] and job["steps"][0]["uses"].startswith("actions/checkout@")
    # The oldest Python that pyproject.toml allows is tested.
    [oldest] = re.findall(r'^requires-python = ">=([\d.]+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    pythons = workflow["jobs"]["newest"]["strategy"]["matrix"]["python"]
    assert oldest in pythons and all(isinstance(python, str) for python in pythons)  # 3.10 without quotes is the number 3.1


def test_each_package_has_a_lower_bound_that_the_installed_one_satisfies():
    for name in STATED:
        for requirement in requirements(name):
            kinds = [clause.operator for clause in requirement.specifier]
            assert kinds == ["=="] or sorted(kinds) in ([">="], ["<", ">="]), str(requirement)
            try:
                assert requirement.specifier.contains(version(requirement.name).partition("+")[0]), str(requirement)
            except PackageNotFoundError:
                assert name != "requirements.txt", f"{requirement.name} is not installed"


def test_transformers_ends_before_its_next_major_version():
    major = Version(version("transformers")).major
    assert not stated("transformers").specifier.contains(f"{major + 1}.0.0")


def test_the_lowest_versions_are_those_of_the_requirements():
    """The constraints that `.ci/lowest` writes, beside the clauses as `packaging` reads them."""
    [command] = re.findall(r"^(sed .*) > ", (ROOT / ".ci" / "lowest").read_text(), re.M)
    made = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    pins = [Requirement(line.partition("#")[0]) for line in made.splitlines() if line.partition("#")[0].strip()]
    lowest = {requirement.name: [f"=={clause.version}" for clause in requirement.specifier if clause.operator in ("==", ">=")]
              for name in STATED[:2] for requirement in requirements(name)}
    assert {pin.name: [str(pin.specifier)] for pin in pins} == lowest


# ------------------------------------------------------------------------------------------------- contributors


def test_the_versions_agree():
    numbered = re.findall(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    [packaged] = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert numbered[0] == str(cited) == packaged == MODEL.VERSION
    assert numbered == sorted(numbered, key=Version, reverse=True)


def test_the_citation_has_what_its_format_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"message", "title", "authors"} <= set(citation)
    assert (citation["cff-version"], citation["type"]) == ("1.2.0", "software")
    [holder] = re.findall(r"^Copyright \(c\) \d+ (.+)$", (ROOT / "LICENSE").read_text(), re.M)
    assert [author["name"] for author in citation["authors"]] == [holder] and citation["license"] == "MIT"


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_has_what_github_requires(path):
    form = yaml.safe_load(path.read_text())
    assert all(isinstance(text, str) and text for text in (form["name"], form["description"], *form["labels"]))
    fields = [element for element in form["body"] if element["type"] != "markdown"]
    assert fields and all(element["type"] in ("textarea", "input", "dropdown", "checkboxes") for element in fields)
    ids, labels = [field["id"] for field in fields], [field["attributes"]["label"] for field in fields]
    assert len(set(ids)) == len(set(labels)) == len(fields) and all(re.fullmatch(r"[\w-]+", name) for name in ids)
    assert all(isinstance(field.get("validations", {}).get("required", False), bool) for field in fields)


def test_issues_ask_for_what_reproduces_them():
    assert {path.stem for path in FORMS} == {"bug", "feature"}
    bug = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    assert [field["id"] for field in bug["body"]] == ["command", "settings", "output", "versions"]
    versions = bug["body"][-1]["attributes"]["description"]
    assert all(command in versions for command in ("python MODEL.py --version", "python -V", "pip freeze | grep"))
    config = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml").read_text())
    assert set(config) <= {"blank_issues_enabled", "contact_links"}


def test_the_hooks_run_ruff_as_the_requirements_state_it():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert all(set(repository) >= {"repo", "hooks"} and all("id" in hook for hook in repository["hooks"]) for repository in hooks)
    assert all("rev" in repository for repository in hooks if repository["repo"] != "local")
    [local] = [repository for repository in hooks if repository["repo"] == "local"]
    [ruff] = local["hooks"]
    assert {"name", "entry", "language"} <= set(ruff) and ruff["additional_dependencies"] == [str(stated("ruff"))]
    command = [sys.executable, "-m", *ruff["entry"].split(), "--no-cache", "MODEL.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_text_files_end_with_one_line_end_and_no_blanks():
    """What the hooks of pre-commit would change."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git repository")
    for name in done.stdout.splitlines():
        data = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        if data and b"\0" not in data:
            assert data.endswith(b"\n") and not data.endswith(b"\n\n") and not re.search(rb"[ \t]+$", data, re.M), name
