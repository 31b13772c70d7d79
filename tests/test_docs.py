"""Documents say what was measured, and name what exists."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from configurations import options
from pages import repeats

from benchmarks import gain
from data_prep.cli import CONFIGS
from data_prep.schema import TracesKeys
from reward_score.countdown import COMPONENTS
from reward_score.grammar import REASONS
from reward_score.profiles import PROFILES
from verl_recipes.run.fingerprint import MAY_CHANGE
from verl_recipes.warm_start import Keys as WarmKeys

ROOT = CONFIGS.parent
READMES = ["README.md", "README.zh.md"]
DOCS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
OTHERS = [
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "assets/bench/README.md",
    "assets/tiny_base/README.md",
    "requirements/README.md",
]
FOLDERS = ["configs", "launch", "tests", "benchmarks", "verl_recipes", "reward_score", "assets", "docs", "requirements"]
FOLDERS += ["learn", "examples"]


@pytest.mark.parametrize("name", READMES)
def test_the_readme_repeats_the_measured_table(name):
    measured = gain.table(json.loads(gain.RAW.read_text(encoding="utf-8")))
    assert measured == (ROOT / "benchmarks" / "gain.md").read_text(encoding="utf-8")
    assert repeats(name, (ROOT / name).read_text(), measured)


@pytest.mark.parametrize("folder", ["docs", "docs/zh"])
@pytest.mark.parametrize(
    ("page", "table"),
    [
        *(("performance", "beside"), ("performance", "scale"), ("launch", "plan_sweep"), ("launch", "plan_memory")),
        *(("reliability", "faults"), ("reliability", "endure"), ("reliability", "long_run")),
        ("warm_start", "traces_speed"),
    ],
)
def test_a_page_repeats_the_table_that_its_benchmark_wrote(folder, page, table):
    measured = (ROOT / "benchmarks" / f"{table}.md").read_text()
    assert repeats(folder, (ROOT / folder / f"{page}.md").read_text(), measured)


@pytest.mark.parametrize("name", [*READMES, *OTHERS, *DOCS])
def test_paths_that_a_document_names_exist(name):
    text = (ROOT / name).read_text()
    links = set(re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text))
    paths = set(re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./]+)`", text))
    folder = (ROOT / name).parent
    assert not {link for link in links if not (folder / link).exists()}
    assert not {path for path in paths if not (ROOT / path).exists()}


def shape(name):
    """Headings, rows of tables, items of lists and code blocks of a page, in order."""
    return re.findall(r"^(#+ |\||- |\d+\. |```)", (ROOT / name).read_text(encoding="utf-8"), re.M)


def test_every_page_has_a_twin_of_the_same_shape_in_the_other_language():
    pages = {name.removeprefix("docs/") for name in DOCS if "zh/" not in name}
    assert pages == {name.removeprefix("docs/zh/") for name in DOCS if "zh/" in name}
    assert shape("README.md") == shape("README.zh.md")
    for name in pages:
        assert shape(f"docs/{name}") == shape(f"docs/zh/{name}"), name


def commands(name):
    """What can be typed in the shell blocks of a page, without comments and the language of traces."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.M | re.S)
    lines = "".join(blocks).replace(" language=zh", "").splitlines()
    return [line.partition(" #")[0].rstrip() for line in lines if line[:1] != "#"]


@pytest.mark.parametrize("name", ["README.md", *(name for name in DOCS if "zh/" not in name)])
def test_a_page_and_its_twin_link_to_each_other_and_show_the_same_commands(name):
    page = ROOT / name
    twin = ROOT / ("README.zh.md" if name == "README.md" else name.replace("docs/", "docs/zh/", 1))
    for one, other, language in [(page, twin, "中文"), (twin, page, "English")]:
        head = "\n".join(one.read_text(encoding="utf-8").splitlines()[:3])
        links = re.findall(rf"\[{language}\]\(([^)]+)\)", head)
        assert [(one.parent / link).resolve() for link in links] == [other]
    assert commands(page) == commands(twin)


@pytest.mark.parametrize("name", READMES)
def test_the_readme_lists_every_option(name):
    text = (ROOT / name).read_text()
    for group in ("data", "prompt", "model", "reward", "recipe", "hardware", "topology", "tuning", "tracker"):
        row = next(line for line in text.splitlines() if line.startswith(f"| `{group}` |"))
        assert set(re.findall(r"`([\w.]+)`", row)) == {group, *options(group)}


@pytest.mark.parametrize("name", ["docs/reward.md", "docs/zh/reward.md"])
def test_the_reward_page_lists_what_there_is_and_shows_what_the_command_prints(name):
    text = (ROOT / name).read_text()
    for title in (*REASONS, *COMPONENTS, *PROFILES):
        assert f"\n| `{title}` |" in text
    command, printed = re.search(r"```\n\$ (python .*)\n((?:.+\n)+)```", text).groups()
    _, *arguments = shlex.split(command)
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == printed


@pytest.mark.parametrize("name", ["docs/data.md", "docs/zh/data.md"])
def test_the_data_page_lists_every_option_and_repeats_the_measured_tables(name):
    text = (ROOT / name).read_text()
    for group in ("source", "split", "prompt", "preset", "ood"):
        for option in options(group):
            assert f"`{option}`" in text or f"{group}={option}" in text or option == "none"
    for measured in (ROOT / "benchmarks").glob("data_*.md"):  # written by benchmarks/data_speed.py
        assert repeats(name, text, measured.read_text())


@pytest.mark.parametrize("name", ["docs/warm_start.md", "docs/zh/warm_start.md"])
def test_the_warm_start_page_lists_every_key(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert all(f"\n| `{key}` |" in text for key in TracesKeys.model_fields)
    own = WarmKeys.model_fields.keys() - {"overrides"}
    assert all(re.search(rf"^\| .*`{key}`.* \|", text, re.M) for key in own)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "language"), [("docs/warm_start.md", "en"), ("docs/zh/warm_start.md", "zh")])
def test_the_warm_start_page_shows_what_the_command_prints(name, language, tmp_path):
    command = [sys.executable, "-m"]
    subprocess.run([*command, "data_prep", f"out={tmp_path}/tiny"], cwd=ROOT, capture_output=True, check=True)
    options = [f"data={tmp_path}/tiny", f"out={tmp_path}/traces", f"language={language}"]
    made = subprocess.run(
        [*command, "data_prep.traces", *options], cwd=ROOT, capture_output=True, text=True, check=True
    )
    printed = made.stdout.replace(str(tmp_path), "data")
    assert f"```\n{printed}```\n" in (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_recipe_page_holds_the_generated_tables_and_names_every_recipe(language, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import recipes_table

    text = recipes_table.FILES[language].read_text()
    made = recipes_table.tables()
    assert recipes_table.with_tables(text, language, made) == text
    assert all(f"<!-- {name} -->\n{table[language]}<!-- /{name} -->" in text for name, table in made.items())
    for group in ("recipe", "tracker"):
        assert all(f"`{option}`" in text for option in options(group))


@pytest.mark.parametrize("name", ["docs/reliability.md", "docs/zh/reliability.md"])
def test_the_reliability_page_lists_every_key_that_may_change_and_no_other(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    table = text.partition("`MAY_CHANGE`")[2].partition("\n| --- |")[2].partition("\n\n")[0]
    keys = re.findall(r"`([^`]+)`", "".join(line.split("|")[1] for line in table.splitlines()[1:]))
    assert sorted(keys) == sorted(MAY_CHANGE)
