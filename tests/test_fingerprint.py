"""A run is what its folder says: whoever asks for another one under its name is told so, key by key."""

import copy
import subprocess
from fnmatch import fnmatchcase

import pytest
from configurations import compose, options
from omegaconf import OmegaConf

from data_prep.cli import UserError, quoted
from verl_recipes.run import fingerprint
from verl_recipes.run.checkpoints import TRACKER
from verl_recipes.run.fingerprint import MAY_CHANGE, check_unchanged, comparable, differences, facts_of, flat
from verl_recipes.run.folder import RunFolder, append_line, write_whole
from verl_recipes.run.preflight import DataFiles, Inputs

FACTS = {
    "train_files": {"a": "1"},
    "val_files": {"b": "2"},
    "model": {"model.safetensors": "3"},
    "versions": {"verl": "0.9.1"},
}


@pytest.fixture(scope="module")
def config():
    return OmegaConf.to_container(compose("train"), resolve=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory, config):
    run = RunFolder(tmp_path_factory.mktemp("run"))
    write_whole(run.config, OmegaConf.to_yaml(config))
    run.write_mark("run", **FACTS)
    return run


def changed(config, key):
    """The configuration with another value at a dotted key."""
    config = copy.deepcopy(config)
    *path, last = key.split(".")
    node = config
    for part in path:
        node = node[part]
    value = node[last]
    node[last] = not value if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else "another"
    return config


def test_the_same_command_is_the_same_run(run, config):
    check_unchanged(run, copy.deepcopy(config), copy.deepcopy(FACTS))


@pytest.mark.slow
def test_fresh_empties_a_run_of_another_configuration_and_begins_anew(tmp_path):
    run = RunFolder(tmp_path / "run")
    begun(run)
    (run.checkpoints / "global_step_4").mkdir(parents=True)
    with pytest.raises(UserError, match="or fresh=true to start this one anew"):
        begun(run, "eval_n=3")
    begun(run, "eval_n=3", "fresh=true")
    assert {path.name for path in run.path.iterdir()} == {"run.json", "config.yaml"}
    assert OmegaConf.load(run.config).eval_n == 3


def test_every_key_of_the_whole_configuration_is_refused_or_may_change(config):
    before = comparable(config)
    for key, value in before.items():
        now = before | {key: not value if isinstance(value, bool) else "another"}
        may_change = any(fnmatchcase(key, pattern) for pattern in MAY_CHANGE)
        found = differences(before, now)
        assert found == [] if may_change else len(found) == 1 and found[0].startswith(f"{key} was "), key
    assert len(before) > 500


def test_the_sampler_gets_no_key_that_runs_begun_earlier_lack(config):
    """A key that is new may be there only if it is in the list of what may change; this one is not."""
    own = {"filter_groups", "train_batch_size", "samples_dir", "tokenizer", "response_length", "checkpoints_dir"}
    assert config["trainer"]["v1"]["sampler"]["sampler_kwargs"].keys() == own | {"patience", "alarm"}


def test_what_may_change_is_a_list_of_keys_that_there_are(config):
    """But for what other recipes and hardware have."""
    keys = [key for key, _ in flat(config)] + ["versions.verl", "data.curriculum.steps"]
    keys += ["actor_rollout_ref.actor.fsdp_config.offload_policy"]
    unknown = [pattern for pattern in MAY_CHANGE if not any(fnmatchcase(key, pattern) for key in keys)]
    assert unknown == []


@pytest.mark.parametrize(
    "key",
    [
        "actor_rollout_ref.model.path",
        "actor_rollout_ref.actor.optim.lr",
        "actor_rollout_ref.rollout.n",
        "actor_rollout_ref.rollout.temperature",
        "actor_rollout_ref.rollout.val_kwargs.temperature",
        "reward.custom_reward_function.reward_kwargs.profile",
        "data.max_response_length",
        "data.train_files",
        "data.seed",
        "eval_n",
        "algorithm.adv_estimator",
        "data.train_batch_size",
    ],
)
def test_what_numbers_depend_on_may_not_change(run, config, key):
    with pytest.raises(UserError, match=rf"holds another run: {key} was .* and is .* now\. Set it back, name=another"):
        check_unchanged(run, changed(config, key), FACTS)


@pytest.mark.parametrize(
    "key", ["trainer.save_freq", "trainer.total_training_steps", "trainer.restarts", "plan.currency", "fresh"]
)
def test_what_does_not_touch_the_numbers_may_change(run, config, key):
    check_unchanged(run, changed(config, key), FACTS)


def test_a_folder_with_the_slash_that_the_tab_key_writes_is_the_same():
    assert differences({"model": "runs/x/"}, {"model": "runs/x"}) == []


@pytest.mark.parametrize("name", ["train_files", "val_files", "model"])
def test_other_content_under_the_same_name_is_refused(run, config, name):
    ((key, _),) = FACTS[name].items()
    with pytest.raises(UserError, match=rf"{name}\.{key} was . and is other now"):
        check_unchanged(run, config, FACTS | {name: {key: "other"}})


def test_a_hubs_model_of_another_revision_is_refused_if_both_are_known(tmp_path, config):
    run = RunFolder(tmp_path)
    write_whole(run.config, OmegaConf.to_yaml(config))
    known, other, unknown = (
        FACTS | {"model": {"revision": "a"}},
        FACTS | {"model": {"revision": "b"}},
        FACTS | {"model": {}},
    )
    for before, now in ((known, known), (known, unknown), (unknown, known)):
        run.write_mark("run", **before)
        check_unchanged(run, config, now)
    run.write_mark("run", **known)
    with pytest.raises(UserError, match=r"model\.revision was a and is b now"):
        check_unchanged(run, config, other)


@pytest.mark.parametrize(
    ("worker", "key", "value"),
    [
        ("actor", "lr_scheduler_type", "cosine"),
        ("actor", "warmup_style", "cosine"),  # verl's former name
        ("critic", "lr_warmup_steps_ratio", 0.1),
    ],
)
def test_more_steps_are_refused_if_a_learning_rate_follows_them(run, config, worker, key, value):
    cosine = changed(config, "trainer.total_training_steps")
    (cosine["critic"] if worker == "critic" else cosine["actor_rollout_ref"]["actor"])["optim"][key] = value
    with pytest.raises(UserError, match="the learning rate depends on it"):
        check_unchanged(run, cosine, FACTS)


@pytest.mark.slow
@pytest.mark.parametrize("order", options("curriculum"))
def test_a_run_with_a_curriculum_goes_on_with_more_steps_unless_its_order_follows_them(tmp_path, order):
    cfg = compose("train", f"curriculum={order}")
    run, steps = RunFolder(tmp_path), cfg.trainer.total_training_steps
    write_whole(run.config, OmegaConf.to_yaml(cfg, resolve=True))
    run.write_mark("run", **FACTS)
    cfg.trainer.total_training_steps = steps + 10
    if order == "easy_to_hard":
        with pytest.raises(UserError, match=rf"curriculum.steps was {steps} and is {steps + 10} now, and the order of"):
            check_unchanged(run, OmegaConf.to_container(cfg, resolve=True), FACTS)
        cfg.data.curriculum.steps = steps  # the line's advice
    check_unchanged(run, OmegaConf.to_container(cfg, resolve=True), FACTS)


def begun(run, *overrides, check=lambda step: None, files=()):
    """`begin` of a run in this folder with these overrides."""
    cfg = compose("train", f"run_dir={quoted(run.path)}", *overrides)
    inputs = Inputs(DataFiles(1, dict.fromkeys(files, "1")), DataFiles(1, {}), {})
    fingerprint.begin("run", cfg, run, inputs, print, check)


@pytest.mark.slow
@pytest.mark.parametrize("inside", ["model", "data/train.parquet"])
def test_fresh_does_not_delete_what_the_command_reads(tmp_path, inside):
    run = RunFolder(tmp_path / "run")
    begun(run)
    read = run.path / inside
    read.mkdir(parents=True)
    model = [f"actor_rollout_ref.model.path={quoted(read)}"] if inside == "model" else []
    files = [] if model else [str(read)]
    with pytest.raises(UserError, match=f"holds {read}, which this command reads; nothing was deleted"):
        begun(run, "fresh=true", *model, files=files)
    assert read.is_dir()


@pytest.mark.slow
def test_a_command_that_may_not_go_on_changes_nothing_in_the_folder(tmp_path):
    run = RunFolder(tmp_path)
    begun(run)
    before = run.config.read_bytes(), run.mark.read_bytes()

    def refuses(step):
        raise UserError("no")

    with pytest.raises(UserError, match=r"^error: no$"):
        begun(run, "trainer.save_freq=7", check=refuses)
    assert (run.config.read_bytes(), run.mark.read_bytes()) == before


@pytest.mark.slow
def test_a_run_does_not_lose_checkpoints_that_it_was_to_keep(tmp_path):
    run, keep_all = RunFolder(tmp_path), "trainer.max_actor_ckpt_to_keep=null"
    begun(run, "keep=best")
    for step in (2, 4, 6):
        (run.checkpoints / f"global_step_{step}" / "actor").mkdir(parents=True)
        right = {"val-core/countdown/acc/mean@8": 1 / step}
        append_line(run.metrics, {"step": step, "data": right})
    (run.checkpoints / TRACKER).write_text("6")
    begun(run, "keep=best")
    with pytest.raises(UserError, match=r"would remove those of steps 2\. Set it back"):
        begun(run)
    begun(run, keep_all)
    with pytest.raises(UserError, match=r"kept by keep=last, trainer\.max_actor_ckpt_to_keep=None"):
        begun(run)


@pytest.mark.slow
def test_a_run_may_be_moved():
    there, here = (
        OmegaConf.to_container(compose("train", f"run_dir={quoted(path)}", "name=x"), resolve=True)
        for path in ("/elsewhere/中 [文]", "runs/x")
    )
    assert there["trainer"]["default_local_dir"] == "/elsewhere/中 [文]/checkpoints"
    assert differences(comparable(here), comparable(there)) == []


def test_the_recorded_commit_is_this_checkouts_and_no_surrounding_repositorys(tmp_path, monkeypatch):
    """And None if there is no git."""
    for command in (
        ["init", "-q"],
        ["-c", "user.name=x", "-c", "user.email=x@y", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    (tmp_path / "package" / "configs").mkdir(parents=True)
    monkeypatch.setattr(fingerprint, "CONFIGS", tmp_path / "package" / "configs")
    assert fingerprint.provenance()["git_commit"] is None
    monkeypatch.setattr(fingerprint, "CONFIGS", tmp_path / "configs")
    assert len(fingerprint.provenance()["git_commit"]) >= 40
    monkeypatch.setenv("PATH", "/nowhere")
    assert fingerprint.provenance()["git_commit"] is None


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_users_own_reward_that_was_edited_is_another_run(config, tmp_path, scheme):
    own, inputs = tmp_path / "my.py", Inputs(DataFiles(1, {"a": "1"}), DataFiles(1, {"b": "2"}), FACTS["model"])
    own.write_text("one", encoding="utf-8")
    config = copy.deepcopy(config)
    config["reward"]["custom_reward_function"]["path"] = f"{scheme}{own}"
    before = facts_of(config, inputs)
    own.write_text("two", encoding="utf-8")
    assert before["reward"] != facts_of(config, inputs)["reward"] != {}
