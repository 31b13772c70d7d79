"""Documents say what was measured, and name what exists."""

import re

import pytest

from data_prep.cli import CONFIGS

ROOT = CONFIGS.parent
READMES = ["README.md", "README.zh.md"]
DOCS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
FOLDERS = ["configs", "launch", "tests", "benchmarks", "verl_recipes", "reward_score", "assets", "docs", "requirements"]
MEASURED = ROOT / "benchmarks" / "gain.md"  # written by benchmarks/gain.py


@pytest.mark.parametrize("name", READMES)
def test_the_readme_repeats_the_measured_table(name):
    assert MEASURED.read_text() in (ROOT / name).read_text()


@pytest.mark.parametrize("name", [*READMES, "CONTRIBUTING.md", *DOCS, "assets/tiny_base/README.md"])
def test_paths_that_a_document_names_exist(name):
    text = (ROOT / name).read_text()
    links = set(re.findall(r"\]\(([^)#:]+)\)", text))
    paths = set(re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./]+)`", text))
    folder = (ROOT / name).parent
    assert not {link for link in links if not (folder / link).exists()}
    assert not {path for path in paths if not (ROOT / path).exists()}


@pytest.mark.parametrize("name", READMES)
def test_the_readme_lists_every_option(name):
    text = (ROOT / name).read_text()
    for group in ("data", "model", "reward", "recipe", "hardware"):
        row = next(line for line in text.splitlines() if line.startswith(f"| `{group}` |"))
        assert set(re.findall(r"`(\w+)`", row)) == {group, *(path.stem for path in (CONFIGS / group).glob("*.yaml"))}
