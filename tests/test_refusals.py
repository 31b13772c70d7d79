"""What the command refuses, each in one line and before it writes anything."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from configurations import compose
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from omegaconf import flag_override
from omegaconf.errors import OmegaConfBaseException
from test_reporting import make_run

from data_prep.cli import CONFIGS, Checked, UserError, check, in_one_line, quoted
from verl_recipes import train
from verl_recipes.run import preflight as checks
from verl_recipes.run.folder import RunFolder
from verl_recipes.settings.schema import TrainKeys

ROOT = CONFIGS.parent


@pytest.fixture
def table(tmp_path):
    """A function that writes columns to a parquet file and returns its path."""

    def write(columns):
        pq.write_table(pa.table(columns), tmp_path / "data.parquet")
        return tmp_path / "data.parquet"

    return write


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """A function that types the command, which must refuse it in one line that holds a text, and write nothing."""

    def refuse(message, *overrides, run_dir=tmp_path / "run"):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(
            sys, "argv", ["train", f"run_dir={quoted(run_dir)}", "force=true", *overrides]
        )  # however full it is
        with pytest.raises(UserError) as error:
            train.main()
        assert message in str(error.value)
        assert str(error.value).startswith("error: ")
        assert len(str(error.value).splitlines()) == 1
        assert not run_dir.exists()

    return refuse


def command(*overrides):
    """The command as it is typed."""
    return subprocess.run(
        [sys.executable, "-m", "verl_recipes.train", *overrides], cwd=ROOT, capture_output=True, encoding="utf-8"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [(["no_such_key=1"], "no_such_key"), (["data.train_files=nowhere.parquet"], "nowhere.parquet does not exist")],
)
def test_a_person_sees_one_line_and_a_failed_exit(tmp_path, overrides, message):
    result = command(f"run_dir={tmp_path / 'run'}", *overrides)
    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fresh=maybe"], "fresh=maybe: should be a valid boolean"),
        (["name=.."], "name=..: should be one name of a folder"),
        (["name=../../x", "fresh=true"], "name=../../x: should be one name of a folder"),
        (["name=", "fresh=true"], "name=: should have at least 1 character"),
        (["eval_n=0"], "eval_n=0: should be greater than or equal to 1"),
        (["seed=abc"], "seed=abc: should be a valid integer"),
        (["seed=true"], "seed=True: should be a number"),
        (
            ["actor_rollout_ref.actor.optim.lr=1e-6x"],
            "actor_rollout_ref.actor.optim.lr=1e-6x: should be a valid number",
        ),
        (["trainer.total_training_steps=0"], "trainer.total_training_steps=0: "),
        (["actor_rollout_ref.rollout.val_kwargs=null"], "actor_rollout_ref.rollout.val_kwargs=null: it is a section"),
        (["data=null"], "data=null: it is a section of settings"),
        (["trainer.total_training_steps=null"], "trainer.total_training_steps=null: should be a valid integer"),
        (["trainer.save_freq=null"], "trainer.save_freq=null: should be a valid integer"),
        (["trainer.restarts=-1"], "trainer.restarts=-1: "),
        (["data.train_batch_size=0"], "data.train_batch_size=0: "),
        (["data.train_batch_size=9", "actor_rollout_ref.rollout.n=3"], "data.train_batch_size=9"),
        (["trainer=3"], "trainer=3: should be a valid dictionary"),
        (["prompts=many"], "prompts=many: should be a valid integer"),
        (["reward=nope"], "Could not find 'reward/nope'"),
        (["name=a b=(c"], "quote its value: 'name=\"a b=(c\"'"),
        (["name"], "KEY=VALUE is expected"),
        (["--multirun"], "there is no option --multirun"),
        (["trainer.logger=[console,wandb]"], "tracker=[console,wandb]"),
        (["trainer.val_before_train=false"], "a run always measures the model first"),
        (["trainer.resume_mode=disable"], "a run resumes by itself"),
        (["trainer.default_local_dir="], "trainer.default_local_dir=: should have at least 1 character"),
        (["trainer.default_local_dir=null"], "trainer.default_local_dir=null: should be a valid string"),
        (["actor_rollout_ref.actor.checkpoint.save_contents=[hf_model]"], "lack extra, model, optimizer"),
        (["critic.checkpoint.load_contents=[model]"], "critic.checkpoint: save_contents and load_contents lack extra"),
        (["actor_rollout_ref.actor.checkpoint.async_save=true"], "async_save=true"),
        (["trainer.v1.sampler.sampler_kwargs.samples_dir=runs/other/samples"], "are in its own folder"),
        (["run_dir=tests/nowhere/.."], "names an existing folder by way of one that does not exist"),
        (["trainer.total_epochs=1", "trainer.total_training_steps=1000"], "end before trainer.total_training_steps"),
        (["data.train_max_samples=8"], "8 rows of data.train_max_samples=8 are less than a batch"),
        (["data.train_files=tests"], "data.train_files: tests"),
        (["data.max_response_length=481"], "are more than the 512 positions of assets/tiny_base"),
        (["algorithm.adv_estimator=gropo"], "=gropo: verl has none of that name; did you mean grpo"),
        (["actor_rollout_ref.actor.policy_loss.loss_mode=gsspo"], "none of that name; did you mean gspo"),
        (["curriculum=balanced", "data.curriculum.order=hard"], "data.curriculum.order=hard: should be"),
        (["data.val_max_samples=16"], "data.val_max_samples=16: verl would take so many responses"),
        (["trainer.val_only=true"], "trainer.val_only=true: a run trains"),
        (["trainer.use_v1=false"], "trainer.use_v1=false: verl's former trainer"),
        (
            ["actor_rollout_ref.actor.strategy=fsdp"],
            "actor_rollout_ref.actor.strategy=fsdp: this project has engines for fsdp2 alone",
        ),
        (["actor_rollout_ref.rollout.val_kwargs.n=4"], "val_kwargs.n=4: write eval_n=4"),
        (["actor_rollout_ref.rollout.val_kwargs.do_sample=false"], "do_sample=false: verl 0.9.1 does not read it"),
        (["custom_reward_function.path=my.py"], "does not read it; write reward.custom_reward_function.path="),
        (["actor_rollout_ref.rollout.max_model_len=x"], "max_model_len=x: should be"),
        (["actor_rollout_ref.ref.ulysses_sequence_parallel_size=x"], "ulysses_sequence_parallel_size=x: should be"),
        (["reward_model.reward_loop_source=x"], "does not read it; write reward.reward_manager.source="),
        (["reward_model.reward_manager=dapo"], "does not read it; write reward.reward_manager.name="),
        (["actor_rollout_ref.rollout.max_model_len=128"], "max_model_len=128 is less than the 288 tokens"),
        (["actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent"], "needs verl's own manager"),
        (["actor_rollout_ref.rollout.agent.agent_loop_manager_class=null"], "add reward.num_workers=1"),
        (["trainer.logger=null"], "trainer.logger=null: should be a valid list"),
    ],
)
def test_what_cannot_end_well_is_refused_before_the_start(refused, small_data, overrides, message):
    refused(message, *small_data, *overrides)


def test_a_path_of_another_model_than_the_name_says_is_refused(tmp_path, refused, small_data):
    """Sizes, prompt and data would be the tiny model's."""
    (tmp_path / "config.json").write_text('{"vocab_size": 151936}', encoding="utf-8")
    (tmp_path / "model.safetensors").touch()
    refused("add model=local", *small_data, f"actor_rollout_ref.model.path={quoted(tmp_path)}")


@pytest.mark.slow
def test_a_value_is_read_as_yaml_reads_it():
    cfg = compose("train")
    for value, meant in (("no", False), ("off", False), ("n", False), ("false", False), ("yes", True), (0, False)):
        cfg.fresh = value
        check(cfg, TrainKeys)
        assert cfg.fresh is meant
    cfg.trainer.total_training_steps = 1e2
    check(cfg, TrainKeys)
    assert cfg.trainer.total_training_steps == 100


def keys_of(schema, prefix=""):
    """The dotted keys of a schema."""
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Checked):
            yield from keys_of(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def refusal(function):
    """The line with which a function refuses; "" if it does not."""
    try:
        with in_one_line():
            function()
    except UserError as error:
        return str(error).removeprefix("error: ")
    return ""


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)


@pytest.mark.slow
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(sorted(keys_of(TrainKeys))), value=VALUES)
@example(key="trainer.n_gpus_per_node", value=1.0)
@example(key="actor_rollout_ref.rollout.n", value=8.0)
@example(key="actor_rollout_ref.model.path", value=None)
def test_any_value_of_any_key_is_taken_or_refused_in_one_line_that_names_the_key(tmp_path, small_data, key, value):
    """And never after something was written."""
    cfg = compose("train", f"run_dir={quoted(tmp_path / 'run')}", *small_data)
    *path, last = key.split(".")
    node = cfg
    for part in path:
        node = node[part]
    with flag_override(cfg, "struct", False):
        try:
            node[last] = value
        except OmegaConfBaseException:  # of verl's own types; Hydra refuses it
            assume(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        line = refusal(lambda: check(cfg, TrainKeys))
        assert not line or re.search(rf"(^|; ){re.escape(key)}[=:.]", line)
        # Later checks compare several keys.
        line = line or refusal(lambda: checks.preflight(cfg, RunFolder(cfg.run_dir, cfg.trainer.default_local_dir)))
        assert not line or re.search(r"\w+[=:]", line)
        assert len(line.splitlines()) <= 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_file_that_is_no_parquet_is_one_line(tmp_path, refused):
    (tmp_path / "x.parquet").write_text("not parquet")
    refused("not a whole parquet file", f"data.train_files={tmp_path / 'x.parquet'}")


@pytest.mark.slow
def test_missing_columns_are_named(refused, table):
    refused("no column data_source, reward_model", f"data.train_files={table({'prompt': ['x']})}")


@pytest.mark.slow
def test_an_empty_data_set_is_one_line(refused, table):
    columns = {name: pa.array([], pa.string()) for name in checks.COLUMNS}
    refused("no rows", f"data.train_files={table(columns)}")


@pytest.mark.slow
def test_less_than_a_batch_is_one_line(refused, table):
    path = table({name: [["x"]] for name in checks.COLUMNS})
    refused("less than a batch", f"data.train_files={path}", f"data.val_files={path}")


@pytest.mark.slow
def test_a_run_that_would_save_nothing_is_refused(refused):
    refused("trainer.save_freq=-1: should be greater than or equal to 1", "trainer.save_freq=-1")


@pytest.mark.slow
def test_a_folder_without_a_model_is_one_line(tmp_path, refused, small_data):
    (tmp_path / "model").mkdir()
    refused("holds no model", f"actor_rollout_ref.model.path={tmp_path / 'model'}", *small_data)
    refused("actor_rollout_ref.model.path=null: name the model's folder", "model=local", *small_data)


@pytest.fixture
def read_only(tmp_path):
    """A folder that nobody can write to, for which root needs a mount."""
    folder = tmp_path / "read_only"
    folder.mkdir(mode=0o555)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True).returncode == 0
    if os.access(folder, os.W_OK):
        pytest.skip("root, and may not mount")
    yield folder
    if mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_run_folder_that_cannot_be_written_is_one_line(read_only, refused, small_data):
    refused(f"cannot write the folder {read_only / 'run'}", *small_data, run_dir=read_only / "run")


@pytest.mark.slow
def test_a_run_folder_that_another_command_uses_is_one_line(tmp_path, small_data, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train", f"run_dir={tmp_path / 'run'}", "force=true", *small_data])
    with RunFolder(tmp_path / "run").locked(), pytest.raises(UserError, match="another command is using"):
        train.main()


@pytest.mark.slow
def test_each_of_several_seeds_has_a_folder_of_its_own():
    cfg = compose("train", "seeds=[0,1,2]")
    each = train.of_seeds(cfg, ["seeds=[0,1,2]", "seed=7", "learning_rate=0.1"])
    assert [(one.seed, one.run_dir, one.seeds) for one in each] == [(k, f"runs/tiny-seed{k}", None) for k in range(3)]
    assert {one.learning_rate for one in each} == {0.1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seeds=[0,1]", "name=mine"], "two runs have one folder; write name='mine-${seed}'"),
        (["seeds=[0,1]", "run_dir=/disk/x"], "two runs have one folder; write run_dir='/disk/x-${seed}'"),
        (["seeds=[0,0]"], "a seed occurs twice"),
    ],
)
def test_several_seeds_in_one_folder_are_refused(overrides, message):
    with pytest.raises(UserError) as error:
        train.of_seeds(compose("train", *overrides), overrides)
    assert message in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "page"),
    [
        ("seed=0", "runs/tiny-seeds.html"),
        ("name='low-${seed}'", "runs/low-seeds.html"),
        ("run_dir='/disk/mine_${seed}'", "/disk/mine_seeds.html"),
    ],
)
def test_a_set_of_seeds_has_a_page_called_as_its_runs_are(override, page):
    cfg = train.compose("train", ["seeds=[8,9]", override], TrainKeys)
    assert train.page_of_seeds(cfg, Path(cfg.run_dir).parent) == Path(page)


@pytest.mark.slow
def test_seeds_are_a_run_each_and_one_page_for_all(monkeypatch, tmp_path):
    begun = []

    def run_once(cfg, console):
        begun.append((cfg.seed, cfg.seeds))
        make_run(Path(cfg.run_dir), steps=1, seed=cfg.seed)

    monkeypatch.setattr(train, "run_once", run_once)
    monkeypatch.setattr(sys, "argv", ["train", "seeds=[3,4]", f"run_dir='{tmp_path}/a-seed${{seed}}'"])
    train.main()
    assert begun == [(3, None), (4, None)]
    assert "mean of 2 seeds" in (tmp_path / "a-seeds.html").read_text("utf-8")
