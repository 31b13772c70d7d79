"""Damaged files: each is named in one line before anything starts. What kills processes is in benchmarks/faults.py."""

import json
import random
import shutil
import subprocess
import sys

import pytest

from data_prep.cli import CONFIGS, UserError
from verl_recipes.checks import check_checkpoint, check_model, check_parquet, check_prompt
from verl_recipes.train import last_checkpoint

ROOT = CONFIGS.parent
TIMES = 25


def damaged(content, kind, dice, start=0):
    """A file's bytes with one bit flipped from `start` on, cut short anywhere, or something else in their place."""
    if kind == "flipped":
        at = dice.randrange(start, len(content))
        return content[:at] + bytes([content[at] ^ 1 << dice.randrange(8)]) + content[at + 1 :]
    return content[: dice.randrange(len(content))] if kind == "truncated" else b"something else\n" * 100


def refusals(file, check, kind, start=0, end=None):
    """Damage a file TIMES times; each time the check must refuse it and name it."""
    whole, dice = file.read_bytes(), random.Random(0)
    check()
    for _ in range(TIMES):
        middle = whole[:end] if kind == "flipped" else whole
        file.write_bytes(damaged(middle, kind, dice, start) + (whole[end:] if kind == "flipped" and end else b""))
        with pytest.raises(UserError) as error:
            check()
        assert str(file) in str(error.value)
        assert "\n" not in str(error.value)
    file.write_bytes(whole)
    check()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "small"
    command = [sys.executable, "-m", "data_prep", f"out={out}", "train_size=64", "test_size=16"]
    subprocess.run(command, cwd=ROOT, check=True)
    return out


@pytest.mark.parametrize("kind", ["flipped", "truncated", "foreign"])
def test_a_damaged_data_file_is_named(data, kind):
    file = data / "train.parquet"
    refusals(file, lambda: check_parquet(str(file), "data.train_files"), kind)


@pytest.mark.parametrize("kind", ["truncated", "foreign"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_damaged_file_of_a_model_is_named(tmp_path, name, kind):
    model = tmp_path / "model"
    shutil.copytree(ROOT / "assets" / "tiny_base", model)
    refusals(model / name, lambda: check_model(str(model)), kind)


def test_a_damaged_manifest_is_named(data):
    file = data / "manifest.json"
    template = json.loads(file.read_text())["configuration"]["prompt"]["chat_template"]
    refusals(file, lambda: check_prompt(str(data / "train.parquet"), template), "foreign")


@pytest.fixture
def checkpoints(tmp_path):
    """Two of verl's, by their names, and where the tensors of a file begin and end."""
    import torch

    for step in (4, 8):
        actor = tmp_path / "checkpoints" / f"global_step_{step}" / "actor"
        actor.mkdir(parents=True)
        for rank in (0, 1):
            torch.save({"weight": torch.full((64, 64), 0.5)}, actor / f"model_world_size_2_rank_{rank}.pt")
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("8")
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("kind", ["flipped", "truncated", "foreign"])
def test_a_damaged_checkpoint_is_named_with_the_way_to_the_one_before(checkpoints, kind):
    file = checkpoints / "global_step_8" / "actor" / "model_world_size_2_rank_1.pt"
    tensor = b"\x00\x00\x00\x3f" * 64 * 64  # 0.5 in fp32
    start = file.read_bytes().index(tensor)
    refusals(file, lambda: check_checkpoint(checkpoints, 8), kind, start, start + len(tensor))
    file.write_bytes(b"")
    with pytest.raises(UserError, match=r"echo 4 > \S+latest_checkpointed_iteration.txt` to go on after step 4"):
        check_checkpoint(checkpoints, 8)


def test_a_checkpoint_that_is_not_there_is_named(checkpoints):
    shutil.rmtree(checkpoints / "global_step_8")
    with pytest.raises(UserError, match=r"global_step_8 .*go on after step 4"):
        check_checkpoint(checkpoints, 8)


@pytest.mark.parametrize("text", ["", "eight", "8\x00", "-1"])
def test_a_damaged_number_of_the_last_checkpoint_is_named(checkpoints, text):
    (checkpoints / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(UserError, match=r"latest_checkpointed_iteration\.txt is damaged"):
        last_checkpoint(checkpoints.parent)


def test_a_damaged_summary_is_named(tmp_path):
    (tmp_path / "summary.json").write_text('{"steps": 3')
    command = [sys.executable, "-m", "verl_recipes.train", f"run_dir={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    (line,) = result.stderr.strip().splitlines()
    assert f"{tmp_path / 'summary.json'} is damaged" in line
    assert (tmp_path / "summary.json").read_text() == '{"steps": 3'
