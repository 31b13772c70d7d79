"""What docs/recipes_published.yaml ascribes to a source stands there: in a line of tests/published_facts.yaml."""

import copy
import math
import re
import sys

import pytest
import yaml

from data_prep.cli import CONFIGS

ROOT = CONFIGS.parent
sys.path.insert(0, str(ROOT / "docs"))
import recipes_table  # noqa: E402

PUBLISHED = recipes_table.read_published()
FACTS = yaml.safe_load((ROOT / "tests" / "published_facts.yaml").read_text(encoding="utf-8"))
ROWS = [
    pytest.param(entry, row, id=f"{recipe}-{row.get('key') or row['name']['en']}")
    for recipe, entry in PUBLISHED["recipes"].items()
    for row in entry["rows"]
]
NUMBER = re.compile(r"(?<![\w.])-?[0-9]+\.?[0-9]*(?:e-?[0-9]+)?(?![\w.])")


def texts(value):
    """Every text of the file with its two languages."""
    if isinstance(value, dict) and "en" in value:
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from texts(each)


def test_a_text_has_its_two_languages_and_nothing_else():
    found = list(texts(PUBLISHED))
    assert len(found) > 50
    assert not [each for each in found if set(each) != {"en", "zh"}]


def quoted(at):
    """The line of a source."""
    return FACTS[f"{at.repository}@{at.commit}"][at.file][at.line]


def value_of(line):
    """The value that a line ends with, before its comment: a number, true or false, else its text."""
    text = re.split(r"\s+#", line)[0]
    words = re.findall(r"\b(?:true|false)\b", text, re.IGNORECASE)
    numbers = NUMBER.findall(text)
    return words[-1].lower() == "true" if words else float(numbers[-1]) if numbers else text


def ascribed(row, lines):
    """Whether these lines hold what a row says that they do."""
    if "says" in row:
        says = [row["says"]] if isinstance(row["says"], str) else row["says"]
        return len(says) == len(lines) and all(text in line for text, line in zip(says, lines, strict=True))
    published = row["published"]
    if isinstance(published, str):
        return len(lines) == 1 and re.search(rf"(?<![\w.-]){re.escape(published)}(?![\w.-])", lines[0]) is not None
    if isinstance(published, bool):
        return [value_of(line) for line in lines] == [published]
    if not isinstance(published, int | float):
        return False  # words need `says`
    values = [value_of(line) for line in lines]
    if any(isinstance(value, str | bool) for value in values):
        return False
    product = math.prod(values)
    return published == (product if len(lines) == 1 or product == int(product) else math.ceil(product))


@pytest.mark.parametrize(("entry", "row"), ROWS)
def test_a_published_value_has_a_commit_and_a_line_that_holds_it(entry, row):
    places = recipes_table.lines_of(row, entry, PUBLISHED["sources"])
    assert places
    for at in places:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", at.repository)
        assert re.fullmatch(r"[0-9a-f]{40}|v[0-9]+\.[0-9]+\.[0-9]+", at.commit)
        assert at.line > 0
    assert ascribed(row, [quoted(at) for at in places])


def test_every_quoted_line_is_of_a_row():
    used = {
        (f"{at.repository}@{at.commit}", at.file, at.line)
        for entry in PUBLISHED["recipes"].values()
        for row in entry["rows"]
        for at in recipes_table.lines_of(row, entry, PUBLISHED["sources"])
    }
    kept = {(source, file, line) for source, files in FACTS.items() for file in files for line in files[file]}
    assert used == kept


@pytest.mark.parametrize(("entry", "row"), ROWS)
def test_another_value_than_the_sources_would_be_noticed(entry, row):
    lines = [quoted(at) for at in recipes_table.lines_of(row, entry, PUBLISHED["sources"])]
    wrong = copy.deepcopy(row)
    if "says" in row:
        says = [row["says"]] if isinstance(row["says"], str) else row["says"]
        wrong["says"] = [*says[:-1], f"{says[-1]}0"]
    else:
        value = row["published"]
        other = f"{value}x" if isinstance(value, str) else not value if isinstance(value, bool) else value * 2 + 1
        wrong["published"] = other
    assert not ascribed(wrong, lines)


@pytest.mark.parametrize("missing", ["at", "commit", "line"])
def test_a_value_without_a_line_or_a_commit_is_an_error_of_the_table(missing):
    entry, row = copy.deepcopy(ROWS[0].values)
    sources = copy.deepcopy(PUBLISHED["sources"])
    if missing == "at":
        del row["at"]
    elif missing == "line":
        row["at"] = "README.md"
    else:
        del sources[entry["source"]]["commit"]
    with pytest.raises((KeyError, TypeError, ValueError)):
        recipes_table.lines_of(row, entry, sources)


def test_tinyzeros_recipes_are_of_one_commit():
    for recipe in ("tinyzero_ppo", "tinyzero_grpo"):
        entry = PUBLISHED["recipes"][recipe]
        places = [at for row in entry["rows"] for at in recipes_table.lines_of(row, entry, PUBLISHED["sources"])]
        assert {(at.repository, at.commit[:7]) for at in places} == {("Jiayi-Pan/TinyZero", "b19c457")}
