"""Damaged files: each is named in one line before anything starts. What kills processes is in benchmarks/faults.py."""

import copy
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from configurations import compose
from omegaconf import OmegaConf
from rich.console import Console

from data_prep.cli import CONFIGS, UserError
from verl_recipes import train
from verl_recipes.run.checkpoints import last_checkpoint
from verl_recipes.run.preflight import (
    FIXED,
    MEASURED,
    check_code,
    check_model,
    check_parquet,
    check_prompt,
    check_resume,
    check_same,
    hashes,
)
from verl_recipes.train import remove_old, whole_lines

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


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_model_that_brings_code_is_refused_unless_it_is_trusted(tmp_path, name):
    model = tmp_path / "model"
    shutil.copytree(ROOT / "assets" / "tiny_base", model)
    content = json.loads((model / name).read_text())
    (model / name).write_text(json.dumps(content | {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}))
    settings = OmegaConf.create({"path": str(model), "trust_remote_code": False})
    with pytest.raises(UserError, match=rf"{name} asks to run code"):
        check_code(settings)
    settings.trust_remote_code = True
    check_code(settings)


def test_a_damaged_manifest_is_named(data):
    file = data / "manifest.json"
    template = json.loads(file.read_text())["configuration"]["prompt"]["chat_template"]
    refusals(file, lambda: check_prompt(str(data / "train.parquet"), template), "foreign")


@pytest.fixture
def cfg():
    return compose("train")


@pytest.fixture(scope="module")
def saved():
    """The configuration in a run's folder, as text: resolving and writing it takes most of a second."""
    cfg = compose("train", "data.train_files=train.parquet")
    return OmegaConf.to_yaml(cfg, resolve=True)


@pytest.fixture
def checkpoints(tmp_path, cfg, saved, monkeypatch):
    """Two of verl's, by their names, in the folder of a run, which is the working folder."""
    import torch

    for step in (4, 8):
        folder = tmp_path / "checkpoints" / f"global_step_{step}"
        (folder / "actor").mkdir(parents=True)
        for name in ("actor/model_world_size_2_rank_0.pt", "actor/model_world_size_2_rank_1.pt", "data.pt"):
            torch.save({"weight": torch.full((64, 64), 0.5)}, folder / name)
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("8")
    monkeypatch.chdir(tmp_path)
    cfg.data.train_files = "train.parquet"
    Path("train.parquet").write_text("data")
    (tmp_path / "data.json").write_text(json.dumps(hashes(cfg.data.train_files)))
    (tmp_path / "config.yaml").write_text(saved)
    return tmp_path / "checkpoints"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flipped", "truncated", "foreign"])
def test_a_damaged_checkpoint_is_named_with_the_way_to_the_one_before(checkpoints, cfg, kind):
    file = checkpoints / "global_step_8" / "actor" / "model_world_size_2_rank_1.pt"
    tensor = b"\x00\x00\x00\x3f" * 64 * 64  # 0.5 in fp32
    start = file.read_bytes().index(tensor)
    refusals(file, lambda: check_resume(cfg, checkpoints.parent, 8), kind, start, start + len(tensor))
    file.write_bytes(b"")
    with pytest.raises(UserError, match=r"echo 4 > \S+latest_checkpointed_iteration.txt` to go on after step 4"):
        check_resume(cfg, checkpoints.parent, 8)


def test_fewer_steps_than_are_done_are_refused(checkpoints, cfg):
    cfg.trainer.total_training_steps = 8
    check_resume(cfg, checkpoints.parent, 8)
    cfg.trainer.total_training_steps = 7
    with pytest.raises(UserError, match="is at step 8 already"):
        check_resume(cfg, checkpoints.parent, 8)


@pytest.mark.parametrize("key", MEASURED)
def test_what_the_first_measurement_was_made_with_cannot_change(tmp_path, cfg, key):
    told = copy.deepcopy(cfg)
    told.data.val_files = [cfg.data.val_files] * cfg.eval_n  # as train.start_verl writes it
    OmegaConf.save(told, tmp_path / "config.yaml", resolve=True)
    (tmp_path / "samples" / "validation").mkdir(parents=True)
    (tmp_path / "samples" / "validation" / "0.jsonl").touch()
    check_same(cfg, tmp_path, MEASURED, "")
    OmegaConf.update(cfg, key, 3 if key == "eval_n" else [cfg.data.train_files, cfg.data.train_files])
    with pytest.raises(UserError, match=f"{key} was .* its measurement before training does not allow"):
        train.train(cfg, tmp_path, Console(quiet=True))


def test_a_checkpoint_that_is_not_there_is_named(checkpoints, cfg):
    shutil.rmtree(checkpoints / "global_step_8")
    with pytest.raises(UserError, match=r"global_step_8\S+ .*go on after step 4"):
        check_resume(cfg, checkpoints.parent, 8)


@pytest.mark.parametrize("text", ["", "eight", "8\x00", "-1"])
def test_a_damaged_number_of_the_last_checkpoint_is_named(checkpoints, text):
    (checkpoints / "latest_checkpointed_iteration.txt").write_text(text)
    (checkpoints / "global_step_8" / "data.pt").unlink()  # so this one is not whole
    with pytest.raises(UserError, match=r"latest_checkpointed_iteration\.txt is damaged; `echo 4 > "):
        last_checkpoint(checkpoints.parent)


@pytest.mark.slow
@pytest.mark.parametrize("key", FIXED)
def test_what_a_checkpoint_depends_on_may_not_change(checkpoints, cfg, key):
    OmegaConf.update(
        cfg, key, not OmegaConf.select(cfg, key) if key in ("data.shuffle", "data.filter_overlong_prompts") else 3
    )
    with pytest.raises(UserError, match=f"{key} was .* and is .* set it back"):
        check_resume(cfg, checkpoints.parent, 8)


@pytest.mark.parametrize("key", ["actor_rollout_ref.actor.optim.lr", "trainer.save_freq", "trainer.restarts"])
def test_the_rest_of_a_configuration_may_change(checkpoints, cfg, key):
    OmegaConf.update(cfg, key, 3)
    check_resume(cfg, checkpoints.parent, 8)


@pytest.mark.parametrize(
    ("counted", "keep", "mode", "left"),
    [
        (8, 2, "auto", {4, 8}),
        (8, 1, "auto", {8}),
        (8, 0, "auto", {4, 8}),  # verl keeps all, and so with -1
        (8, -1, "auto", {4, 8}),
        (8, None, "auto", {4, 8}),
        (4, 1, "auto", {4, 8}),  # half-written or not wanted, the next one takes its place
        (8, 1, "resume_path", {4, 8}),
    ],
)
def test_before_a_resume_what_verl_would_have_removed_goes_and_no_more(checkpoints, cfg, counted, keep, mode, left):
    (checkpoints / "latest_checkpointed_iteration.txt").write_text(str(counted))
    (checkpoints / "global_step_4_good" / "actor").mkdir(parents=True)
    cfg.trainer.max_actor_ckpt_to_keep, cfg.trainer.resume_mode = keep, mode
    remove_old(cfg, checkpoints.parent)
    found = {path.name for path in checkpoints.glob("global_step_*")}
    assert found == {"global_step_4_good"} | {f"global_step_{step}" for step in left}


def test_nothing_is_removed_where_no_checkpoint_counts(checkpoints, cfg):
    (checkpoints / "latest_checkpointed_iteration.txt").unlink()
    cfg.trainer.max_actor_ckpt_to_keep = 1
    remove_old(cfg, checkpoints.parent)
    assert len(list(checkpoints.glob("global_step_*"))) == 2


def test_half_a_line_goes_before_its_file_is_read(tmp_path):
    events = tmp_path / "events.jsonl"
    assert whole_lines(events) == 0
    events.write_text('{"step": 1}\n{"st')
    assert whole_lines(events) == 1
    assert events.read_text() == '{"step": 1}\n'


def test_a_checkpoint_without_the_file_of_a_rank_is_not_whole(checkpoints, cfg):
    for rank in (1, 0):
        (checkpoints / "global_step_8" / "actor" / f"model_world_size_2_rank_{rank}.pt").unlink()
        with pytest.raises(UserError, match=r"_rank_\d.pt is damaged .*go on after step 4"):
            check_resume(cfg, checkpoints.parent, 8)


def test_other_data_under_the_same_name_is_refused(checkpoints, cfg):
    Path(cfg.data.train_files).write_text("made again")
    with pytest.raises(UserError, match=r"not what .* was trained on so far"):
        check_resume(cfg, checkpoints.parent, 8)


@pytest.mark.slow
def test_a_damaged_summary_is_named(tmp_path):
    (tmp_path / "summary.json").write_text('{"steps": 3')
    command = [sys.executable, "-m", "verl_recipes.train", f"run_dir={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    (line,) = result.stderr.strip().splitlines()
    assert f"{tmp_path / 'summary.json'} is damaged" in line
    assert (tmp_path / "summary.json").read_text() == '{"steps": 3'
