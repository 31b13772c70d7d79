"""What in_verl/trainer_link.py takes for granted of verl's trainer, asked of verl itself."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from configurations import compose

from verl_recipes.in_verl.trainer_link import TrainerLink
from verl_recipes.run.folder import RunFolder, read_lines

pytestmark = pytest.mark.slow


class Recording:
    """In place of the replay buffer: what verl gives it."""

    def __init__(self, **arguments):
        self.arguments = arguments


@pytest.fixture(scope="module")
def trainer():
    """verl's synchronous trainer, with nothing but the replay buffer that it makes by itself."""
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    trainer = object.__new__(PPOTrainerSync)
    sampler = "trainer.v1.sampler.custom_sampler"
    trainer.config = compose("train", f"{sampler}.path=pkg://test_trainer_link", f"{sampler}.name=Recording")
    trainer.trainer_mode = "sync"
    return trainer


def test_a_tests_further_batches_are_added_to_its_file_and_not_kept(tmp_path):
    """An evaluation may have gigabytes of responses; a training step's are few, and its metrics are of all."""
    from verl_recipes.in_verl.sampler import CountdownReplayBuffer

    buffer = object.__new__(CountdownReplayBuffer)
    buffer.run, buffer.rows = RunFolder(tmp_path), {}
    for split, step, kept in (("validation", 0, 0), ("train", 1, 3), ("validation", 1, 0), ("train", 2, 3)):
        rows = [{"response": f"{number} \ud800"} for number in range(3)]
        for batch in (rows[:2], rows[2:]):
            buffer.write(batch, split, step)
        assert [row["response"][0] for row in read_lines(buffer.run.samples_of(split, step))] == ["0", "1", "2"]
        assert len(buffer.rows[split, step]) == kept
    assert buffer.run.samples_of("train", 1).with_suffix(".jsonl.gz").exists()


def test_a_rewards_keys_replace_no_column_and_numpys_numbers_are_pythons():
    from verl_recipes.in_verl.sampler import CountdownReplayBuffer, as_float

    buffer = object.__new__(CountdownReplayBuffer)
    buffer.tokenizer = SimpleNamespace(decode=lambda *_, **__: "text")
    buffer.sampler_kwargs = {"response_length": 9}
    verdict = {"score": 1.0, "response": None, "truncated": 1.0, "format": np.float32(0.5)}
    fields = {"prompts": [1], "responses": [1], "reward_model": {"ground_truth": {}}, "data_source": "c"}
    fields |= {"extra_info": {}, "extra_fields": {"reward_extra_info": verdict}, "rm_scores": torch.ones(1)}
    row = buffer.row(fields)
    assert (row["response"], row["truncated"], row["score"], row["format"]) == ("text", False, 1.0, 0.5)
    found = [as_float(each) for each in (np.float32(0.5), np.int64(3), np.bool_(True), "x")]
    assert [(type(each), each) for each in found] == [(float, 0.5), (float, 3.0), (bool, True), (str, "x")]


def test_patience_is_asked_once_after_each_test(monkeypatch, tmp_path):
    from verl_recipes.in_verl import sampler

    asked, buffer = [], object.__new__(sampler.CountdownReplayBuffer)
    monkeypatch.setattr(sampler, "evaluations", lambda run: asked.append(run) or {})
    buffer.run, buffer.sampler_kwargs = RunFolder(tmp_path), {"patience": 2}
    for split in ("train", "train", "validation", "train", "train"):
        buffer.end_if_asked(split)
    assert len(asked) == 2


def test_a_batch_is_in_the_order_of_its_prompts_not_in_that_in_which_responses_ended(monkeypatch):
    from verl.trainer.ppo.v1 import replay_buffer

    from verl_recipes.in_verl.sampler import CountdownReplayBuffer

    monkeypatch.setattr(replay_buffer.tq, "kv_clear", lambda **_: None)
    buffer = object.__new__(CountdownReplayBuffer)
    buffer.prompt_global_steps = {"train": {"b": 1, "a": 1, "c": 1}}
    ended = ["c_0_0", "a_1_0", "b_1_0", "a_0_0", "b_0_0"]
    batch = buffer._materialize_batch("train", ["a", "b"], {key: {"key": key} for key in ended})
    assert batch.keys == ["b_1_0", "b_0_0", "a_1_0", "a_0_0"]
    assert batch.tags == [{"key": key} for key in batch.keys]


def test_the_replay_buffer_gets_a_method_of_the_trainer(trainer):
    link = TrainerLink(trainer._build_replay_buffer().arguments)
    assert link.trainer is trainer


def test_the_trainer_reads_save_freq_after_each_step_and_keeps_its_agent_loop_manager(trainer):
    fit = inspect.getsource(type(trainer).fit)
    assert "self.global_steps % self.config.trainer.save_freq == 0" in fit
    assert "self.agent_loop_manager = agent_loop_manager" in fit


def test_the_link_waits_saves_and_ends(trainer):
    link = TrainerLink(trainer._build_replay_buffer().arguments)
    calls = []
    trainer.agent_loop_manager = SimpleNamespace(wait=lambda: calls.append("waited"))
    link.wait_for_rollouts()
    trainer.agent_loop_manager = SimpleNamespace()
    link.wait_for_rollouts()  # verl's own has no such method
    assert calls == ["waited"]
    assert link.responses_to(3) == 3 * trainer.config.actor_rollout_ref.rollout.n > 3
    trainer.local_trigger_step = 0
    assert not link.is_saved("train")
    link.save_this_step()
    assert link.is_saved("train")
    assert "self.local_trigger_step = trigger_idx" in inspect.getsource(type(trainer).step)
    trainer.local_trigger_step = 1  # with topology=split and several updates: the step has batches to come
    assert not link.is_saved("train")
    assert link.is_saved("validation")  # it comes after the step
    with pytest.raises(RuntimeError, match="ended by SIGTERM"):
        link.stop("by SIGTERM")


@pytest.fixture
def told(monkeypatch, tmp_path):
    """What the replay buffer asks of verl's trainer in a training step, in order."""
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    from verl_recipes.in_verl.sampler import CountdownReplayBuffer

    calls, row = [], {"prompt_id": "a", "response": "x", "score": 1.0, "acc": 1.0}

    class Link:
        def __getattr__(self, name):
            return lambda *_: calls.append(name) or 1

    monkeypatch.setattr(ReplayBuffer, "sample", lambda *_: calls.append("sample") or (None, {}))
    monkeypatch.setattr(CountdownReplayBuffer, "read", lambda *_: [row])
    buffer = object.__new__(CountdownReplayBuffer)
    buffer.link, buffer.run, buffer.trainer_mode = Link(), RunFolder(tmp_path), "sync"
    buffer.rows, buffer.history = {}, {}
    alarm = {"steps": 5, "limits": {}}
    buffer.sampler_kwargs = {"patience": None, "alarm": alarm, "checkpoints_dir": str(tmp_path)}
    buffer.sample(1, "train", 1)
    return calls


def test_trackers_are_shielded_from_the_first_batch_on(told):
    assert told.index("shield_trackers") < told.index("sample")


def test_the_curriculum_is_told_how_each_training_step_came_out(told):
    assert told.count("learn") == 1


def test_every_run_looks_for_actors_that_have_died(trainer, monkeypatch):
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    from verl_recipes.in_verl import dead_actors, sampler

    def watch():
        raise EOFError

    monkeypatch.setattr(ReplayBuffer, "__init__", lambda self, *_, **__: None)
    monkeypatch.setattr(dead_actors, "watch", watch)
    with pytest.raises(EOFError):
        sampler.CountdownReplayBuffer(**trainer._build_replay_buffer().arguments)


def test_a_table_that_fails_ends_no_run(trainer):
    """verl sends its tables of samples and of dropped groups to trackers by itself."""

    class Broken:
        def log(self, *_):
            raise ConnectionResetError

    link = TrainerLink(trainer._build_replay_buffer().arguments)
    trainer.logger = SimpleNamespace(logger={})
    trainer.validation_generations_logger = trainer.dapo_filtered_reward_logger = Broken()
    for _ in range(2):  # as at every batch
        link.shield_trackers()
    for name in ("validation_generations_logger", "dapo_filtered_reward_logger"):
        assert f"self.{name}" in inspect.getsource(inspect.getmodule(type(trainer).__mro__[1]))
        getattr(trainer, name).log(["wandb"], {}, 1)
