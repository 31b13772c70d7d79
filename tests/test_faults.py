"""Damaged files: each is named in one line before anything starts. What kills processes is in benchmarks/faults.py."""

import json
import os
import random
import shutil
import subprocess
import sys
from contextlib import suppress
from threading import Event

import pytest
from configurations import compose
from omegaconf import OmegaConf

from data_prep.cli import CONFIGS, UserError, quoted
from verl_recipes.run import machine
from verl_recipes.run.checkpoints import (
    TRACKER,
    checkpoint_error,
    how_to_continue,
    last_checkpoint,
    old_steps,
    remove_old,
    sealing,
)
from verl_recipes.run.folder import RunFolder, cut_half_line
from verl_recipes.run.hashes import SUMS, deciding_files, seal, write_sums
from verl_recipes.run.model import check_code, check_model, check_tags
from verl_recipes.run.preflight import check_parquet, check_prompt, check_resume, check_start
from verl_recipes.run.weights import to_hugging_face

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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"]
)
def test_a_flipped_bit_in_a_model_with_recorded_hashes_is_named(tmp_path, name):
    """A run's model/ and an export have them."""
    model = tmp_path / "model"
    shutil.copytree(ROOT / "assets" / "tiny_base", model)
    write_sums(model, deciding_files(model))
    refusals(model / name, lambda: check_model(str(model)), "flipped")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("inside", [".", "huggingface", "actor/huggingface"])
def test_a_model_that_brings_code_is_refused_unless_it_is_trusted(tmp_path, inside, name):
    """Of a checkpoint of verl's, the folder or its actor."""
    model = tmp_path / "model" / inside
    shutil.copytree(ROOT / "assets" / "tiny_base", model)
    content = json.loads((model / name).read_text())
    (model / name).write_text(json.dumps(content | {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}))
    settings = OmegaConf.create({"path": str(tmp_path / "model"), "trust_remote_code": False})
    with pytest.raises(UserError, match=rf"{name} asks to run code"):
        check_code(settings)
    settings.trust_remote_code = True
    check_code(settings)


def test_a_model_whose_tags_are_special_tokens_is_refused_with_the_way_out(tmp_path):
    """verl removes special tokens before it scores: every reward would be 0."""
    model = tmp_path / "model"
    shutil.copytree(ROOT / "assets" / "tiny_base", model)
    check_tags(str(model))
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    for token in tokenizer["added_tokens"]:
        token["special"] |= token["content"] in ("</think>", "<answer>")
    (model / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(UserError, match=r'^error: </think>, <answer> are special tokens of .*"special": false'):
        check_tags(str(model))
    lines = machine.refusals(cfg=compose("train", f"actor_rollout_ref.model.path={model}"))  # doctor
    assert "wrong" in {line.state for line in lines if "</think>, <answer> are special tokens" in line.text}


def test_a_damaged_manifest_is_named(data):
    file = data / "manifest.json"
    refusals(file, lambda: check_prompt(str(data / "train.parquet"), compose("train")), "foreign")


@pytest.fixture
def cfg():
    return compose("train")


@pytest.fixture
def checkpoints(tmp_path):
    """Two of verl's, by their names, in the folder of a run."""
    import torch

    for step in (4, 8):
        folder = tmp_path / "checkpoints" / f"global_step_{step}"
        (folder / "actor").mkdir(parents=True)
        for name in ("actor/model_world_size_2_rank_0.pt", "actor/model_world_size_2_rank_1.pt", "data.pt"):
            torch.save({"weight": torch.full((64, 64), 0.5)}, folder / name)
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("8")
    return tmp_path / "checkpoints"


def test_an_older_checkpoint_stays_until_the_newest_is_on_the_disk(checkpoints, monkeypatch):
    def fails(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output"):
        remove_old(checkpoints, 1)
    assert (checkpoints / "global_step_4").exists()


@pytest.mark.parametrize("is_there", [True, False])
def test_a_checkpoint_that_is_cut_short_gets_no_hashes_and_costs_no_older_one(checkpoints, capsys, is_there):
    file = checkpoints / "global_step_8" / "actor" / "model_world_size_2_rank_0.pt"
    (checkpoints / TRACKER).write_text("4")
    with sealing(checkpoints, lambda: remove_old(checkpoints, 1)):
        content = file.read_bytes()
        file.unlink()
        if is_there:
            file.write_bytes(content[:-30])
        (checkpoints / TRACKER).write_text("8")
    assert checkpoint_error(file.parent.parent)
    assert (checkpoints / "global_step_4").exists()
    assert f"warning: {file} is missing or cut short; older checkpoints stay" in capsys.readouterr().err


def test_a_save_that_a_kill_ended_takes_no_place_of_a_whole_checkpoint(checkpoints):
    half, whole = checkpoints / "global_step_10", checkpoints / "global_step_9"
    for folder in (half, whole):  # a user made the run go on from step 8
        shutil.copytree(checkpoints / "global_step_8", folder)
    (half / "data.pt").unlink()
    with sealing(checkpoints):
        pass
    assert (half.exists(), whole.exists()) == (False, True)
    shutil.copytree(whole, checkpoints / "global_step_12")
    (checkpoints / TRACKER).write_text("12")
    assert old_steps(checkpoints, 2) == [8, 4]


@pytest.mark.slow
@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit])
def test_hashes_do_not_keep_a_run_from_ending_in_time(checkpoints, monkeypatch, signal):
    """Those of a large checkpoint take longer than the seconds between SIGTERM and SIGKILL; the next start goes on."""
    begun, go_on, done = Event(), Event(), Event()
    monkeypatch.setattr("verl_recipes.run.checkpoints.seal", lambda _: (begun.set(), go_on.wait(60), done.set()))
    with suppress(signal), sealing(checkpoints):
        assert begun.wait(30)
        raise signal
    assert not done.is_set()
    go_on.set()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flipped", "truncated", "foreign"])
def test_a_damaged_checkpoint_is_named_with_the_way_to_the_one_before(checkpoints, cfg, kind):
    file = checkpoints / "global_step_8" / "actor" / "model_world_size_2_rank_1.pt"
    tensor = b"\x00\x00\x00\x3f" * 64 * 64  # 0.5 in fp32
    start = file.read_bytes().index(tensor)
    refusals(file, lambda: check_resume(cfg, RunFolder(checkpoints.parent), 8), kind, start, start + len(tensor))
    file.write_bytes(b"")
    with pytest.raises(UserError, match=r"echo 4 > \S+latest_checkpointed_iteration.txt` to go on after step 4"):
        check_resume(cfg, RunFolder(checkpoints.parent), 8)


def test_a_flipped_bit_anywhere_in_torchs_file_is_named_or_harmless(checkpoints):
    """Without hashes only what the file's own checksums cover is found; nothing comes of it but a sentence."""
    file, dice = checkpoints / "global_step_8" / "actor" / "model_world_size_2_rank_1.pt", random.Random(0)
    whole, named = file.read_bytes(), 0
    for _ in range(20 * TIMES):
        file.write_bytes(damaged(whole, "flipped", dice))
        said = checkpoint_error(file.parent.parent)
        assert not said or str(file) in said
        named += bool(said)
    assert named > 10 * TIMES  # most of the file is covered
    file.write_bytes(whole)


KINDS = [  # of files in a checkpoint of verl's
    *("actor/model_world_size_2_rank_0.pt", "actor/optim_world_size_2_rank_1.pt"),
    *("actor/extra_state_world_size_2_rank_0.pt", "actor/fsdp_config.json", "actor/huggingface/config.json"),
    *("actor/huggingface/model.safetensors", "critic/model_world_size_2_rank_0.pt", "data.pt"),
]


@pytest.fixture
def sealed(tmp_path):
    """Two checkpoints with a file of each kind, small and of random bytes, and their recorded hashes."""
    dice = random.Random(0)
    for step in (4, 8):
        for name in KINDS:
            file = tmp_path / "checkpoints" / f"global_step_{step}" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b'{"world_size": 2}' if file.name == "fsdp_config.json" else dice.randbytes(1000))
        seal(tmp_path / "checkpoints" / f"global_step_{step}")
    (tmp_path / "checkpoints" / TRACKER).write_text("8")
    return tmp_path / "checkpoints"


@pytest.mark.parametrize("name", KINDS)
def test_a_flipped_bit_in_any_file_of_a_checkpoint_ends_a_resume_with_the_way_to_the_one_before(sealed, cfg, name):
    run, file = RunFolder(sealed.parent), sealed / "global_step_8" / name
    refusals(file, lambda: check_resume(cfg, run, 8), "flipped")
    file.unlink()
    with pytest.raises(UserError, match=rf"{name} is missing; `echo 4 > .* to go on after step 4"):
        check_resume(cfg, run, 8)


@pytest.mark.parametrize("name", KINDS)
def test_a_flipped_bit_in_what_an_evaluation_or_an_export_takes_is_named_with_the_checkpoint_before(sealed, name):
    """Of the optimizer and the critic they take nothing, and read nothing."""
    actor, file = sealed / "global_step_8" / "actor", sealed / "global_step_8" / name
    before, content = check_model(str(actor)), file.read_bytes()
    file.write_bytes(damaged(content, "flipped", random.Random(0)))
    if any(part in name for part in ("optim", "extra", "critic", "data.pt")):
        assert check_model(str(actor)) == before
        return
    with pytest.raises(UserError, match=rf"{name} is damaged .*; take the checkpoint before, \S+/global_step_4$"):
        check_model(str(actor))
    with pytest.raises(UserError, match=rf"{name} is damaged"):
        to_hugging_face(actor, sealed.parent / "model", sealed.parent / "log.txt")
    assert not (sealed.parent / "model").exists()


def test_only_whole_fsdp2_shards_go_on_with_another_number_of_ranks(sealed):
    run, fewer = RunFolder(sealed.parent), compose("train", "gpus=1")
    check_resume(fewer, run, 8)
    fewer.actor_rollout_ref.actor.fsdp_config.fsdp_size = 1
    with pytest.raises(UserError, match=r"was saved by 2 ranks and would go on with 1, for which .*fsdp_size=-1"):
        check_resume(fewer, run, 8)


def test_a_damaged_list_of_hashes_is_named(sealed, cfg):
    sums = sealed / "global_step_8" / SUMS
    sums.write_text("nonsense\n" + sums.read_text())
    with pytest.raises(UserError, match=r"SHA256SUMS, line 1 is damaged; delete that file"):
        check_resume(cfg, RunFolder(sealed.parent), 8)


def test_a_damaged_list_of_hashes_further_back_is_passed_over(sealed):
    shutil.copytree(sealed / "global_step_4", sealed / "global_step_6")
    (sealed / "global_step_6" / SUMS).write_text("nonsense")
    (sealed / "global_step_8" / "data.pt").unlink()
    assert how_to_continue(sealed).endswith("to go on after step 4")


def test_the_hashes_are_those_that_sha256sum_checks(sealed):
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS], cwd=sealed / "global_step_8", check=True)


def test_hashes_are_written_while_verl_runs_of_what_counts_and_anew_of_what_is_saved_again(checkpoints):
    """And a half-written file of the last step, or a checkpoint that verl removes, does not end that."""
    again, new = checkpoints / "global_step_8", checkpoints / "global_step_12"
    seal(again)
    (checkpoints / TRACKER).write_text("4")
    with sealing(checkpoints):
        assert not (again / SUMS).exists()
        shutil.copy(again / "actor" / "model_world_size_2_rank_0.pt", again / "data.pt")  # of the step done again
        shutil.copytree(again, new)
        (checkpoints / TRACKER).write_text("")
        (checkpoints / TRACKER).write_text("8")
    assert checkpoint_error(again) == ""
    assert (again / SUMS).exists()
    assert not (new / SUMS).exists()


@pytest.mark.parametrize("kind", ["flipped", "truncated", "foreign"])
def test_a_checkpoint_that_was_damaged_before_its_hashes_were_written_gets_none(checkpoints, kind):
    """Its run was killed in between; hashes of what is damaged would call it whole."""
    file = checkpoints / "global_step_4" / "actor" / "model_world_size_2_rank_0.pt"
    content = file.read_bytes()
    file.write_bytes(damaged(content, kind, random.Random(0), content.index(b"\x00\x00\x00\x3f" * 64)))
    with sealing(checkpoints):
        pass
    assert [(checkpoints / f"global_step_{step}" / SUMS).exists() for step in (4, 8)] == [False, True]


def test_weights_that_were_never_downloaded_are_one_line_before_anything_is_counted_in_them(tmp_path):
    model = shutil.copytree(ROOT / "assets" / "tiny_base", tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    (model / SUMS).unlink(missing_ok=True)
    with pytest.raises(UserError, match="is damaged"):
        check_start(compose("train", f"actor_rollout_ref.model.path={quoted(model)}"), tmp_path / "run")


def test_what_identifies_a_model_is_its_content_and_no_date(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(ROOT / "assets" / "tiny_base", model)
    before, file = check_model(str(model)), model / "model.safetensors"
    os.utime(file, ns=(0, 0))
    assert check_model(str(model)) == before
    date, content = file.stat(), file.read_bytes()
    file.write_bytes(damaged(content, "flipped", random.Random(0), len(content) // 2))
    os.utime(file, ns=(date.st_atime_ns, date.st_mtime_ns))
    differ = {name for name, digest in check_model(str(model)).items() if before[name] != digest}
    assert differ == {"model.safetensors"}


def test_fewer_steps_than_are_done_are_refused(checkpoints, cfg):
    cfg.trainer.total_training_steps = 8
    check_resume(cfg, RunFolder(checkpoints.parent), 8)
    cfg.trainer.total_training_steps = 7
    with pytest.raises(UserError, match="is already at step 8"):
        check_resume(cfg, RunFolder(checkpoints.parent), 8)


def test_a_checkpoint_that_is_not_there_is_named(checkpoints, cfg):
    shutil.rmtree(checkpoints / "global_step_8")
    with pytest.raises(UserError, match=r"global_step_8\S+ .*go on after step 4"):
        check_resume(cfg, RunFolder(checkpoints.parent), 8)


@pytest.mark.parametrize("text", ["", "eight", "8\x00", "-1"])
def test_a_damaged_number_of_the_last_checkpoint_is_named(checkpoints, text):
    (checkpoints / "latest_checkpointed_iteration.txt").write_text(text)
    (checkpoints / "global_step_8" / "data.pt").unlink()  # so this one is not whole
    with pytest.raises(UserError, match=r"latest_checkpointed_iteration\.txt is damaged; `echo 4 > "):
        last_checkpoint(checkpoints)


@pytest.mark.parametrize(
    ("counted", "keep", "left"),
    [
        (8, 2, {4, 8}),
        (8, 1, {8}),
        (8, 0, {4, 8}),  # verl keeps all, and so with -1
        (8, -1, {4, 8}),
        (8, None, {4, 8}),
        (4, 1, {4, 8}),  # half-written or not wanted, the next one takes its place
    ],
)
def test_a_resume_removes_only_the_checkpoints_that_verl_would_have_removed(checkpoints, counted, keep, left):
    (checkpoints / "latest_checkpointed_iteration.txt").write_text(str(counted))
    (checkpoints / "global_step_4_good" / "actor").mkdir(parents=True)
    remove_old(checkpoints, keep)
    found = {path.name for path in checkpoints.glob("global_step_*")}
    assert found == {"global_step_4_good"} | {f"global_step_{step}" for step in left}


def test_nothing_is_removed_without_a_recorded_checkpoint(checkpoints):
    (checkpoints / "latest_checkpointed_iteration.txt").unlink()
    remove_old(checkpoints, 1)
    assert len(list(checkpoints.glob("global_step_*"))) == 2


def test_half_a_line_goes_before_its_file_is_read(tmp_path):
    events = tmp_path / "events.jsonl"
    assert cut_half_line(events) == 0
    events.write_text('{"step": 1}\n{"st')
    assert cut_half_line(events) == 1
    assert events.read_text() == '{"step": 1}\n'


def test_a_checkpoint_without_the_file_of_a_rank_is_not_whole(checkpoints, cfg):
    for rank in (1, 0):
        (checkpoints / "global_step_8" / "actor" / f"model_world_size_2_rank_{rank}.pt").unlink()
        with pytest.raises(UserError, match=r"_rank_\d.pt is damaged .*go on after step 4"):
            check_resume(cfg, RunFolder(checkpoints.parent), 8)
