"""Recipes train for real on a CPU: PPO with its critic and every tracker, and LoRA.

The others are in benchmarks/recipes_train.py. Left out by `tests/run.sh --fast`.
"""

import json
import math
import shutil
import sqlite3
import sys
from pathlib import Path

import pytest
from commands import ROOT, Command, metrics_of, train
from safetensors.torch import load_file

from verl_recipes.reporting.metrics import AGREEMENT
from verl_recipes.run.folder import read_lines

pytestmark = pytest.mark.end_to_end
SHORT = ["model=tiny", "prompts=8", "data.max_response_length=64", "eval_n=1", "trainer.total_training_steps=2"]
TRACKERS = ("wandb", "swanlab", "tensorboard", "mlflow")
AS_ON_GPUS = (ROOT / "benchmarks" / "as_on_gpus.txt").read_text(encoding="utf-8").split()
KEY = "5ec2e7c0de" * 4
KEYS = ("WANDB_API_KEY", "SWANLAB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN")


def steps_of(run_dir):
    steps = [line["data"] for line in metrics_of(run_dir) if "training/global_step" in line["data"]]
    assert len(steps) == 2
    for step in steps:
        assert all(math.isfinite(value) for value in step.values())
        assert min(step[name] for name in AGREEMENT if name in step) >= 0.999
        assert step["actor/grad_norm"] > 0
    return steps


@pytest.fixture(scope="module")
def ppo(tmp_path_factory, small_data):
    """TinyZero's PPO with a KL loss and a curriculum as well, out of distribution, told to all trackers offline.

    As on a GPU without flash-attn: actor, reference and critic see packed sequences, and eight workers of verl's own
    agent loop answer.
    """
    run_dir, folder = tmp_path_factory.mktemp("runs") / "ppo", Path(small_data[0].partition("=")[2]).parent
    files = ",".join(map(str, sorted(folder.glob("ood_*.parquet"))))
    others = [f"data.train_files=[{files}]", f"data.val_files=[{files}]", "data.max_prompt_length=64"]
    trackers = f"tracker=[{','.join(TRACKERS)}]"
    command = Command(
        *("env", "WANDB_MODE=offline", "SWANLAB_MODE=local", *(f"{name}={KEY}" for name in KEYS)),
        *(sys.executable, "-m", "verl_recipes.train"),
        *(f"run_dir={run_dir}", "recipe=tinyzero_ppo", trackers, *SHORT, *others, *AS_ON_GPUS),
        *("actor_rollout_ref.actor.use_kl_loss=true", "curriculum=adaptive"),
    )
    assert command.wait() == 0, command.output
    command.assert_nothing_is_left()
    assert KEY not in command.output
    return run_dir


def test_no_file_of_a_run_holds_a_key(ppo):
    files = [path for path in ppo.rglob("*") if path.is_file()]
    assert {"config.yaml", "log.txt", "report.html", "mlflow.db"} <= {path.name for path in files}
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_tinyzeros_ppo_trains_its_critic_four_times_a_step(ppo):
    for step in steps_of(ppo):
        assert {"critic/vf_loss", "actor/reward_kl_penalty", "actor/entropy_loss", "critic/lr"} <= step.keys()
        assert step["actor/reward_kl_penalty_coeff"] == pytest.approx(0.001)
        assert (step["actor/lr"], step["critic/lr"]) == (pytest.approx(1e-6), pytest.approx(1e-5))
    assert steps_of(ppo)[0]["actor/kl_loss"] < 1e-6  # before the first update the policy is its own reference


def test_the_sampler_reads_what_verls_own_agent_loop_wrote_each_prompt_once(ppo):
    for step in (1, 2):
        rows = read_lines(ppo / "samples" / "train" / f"{step}.jsonl")
        assert len({row["prompt_id"] for row in rows}) == len(rows) == 8
        assert all({"response", "score", "acc", "reason", "truncated"} <= row.keys() for row in rows)


def test_a_run_trains_and_is_measured_on_several_files(ppo):
    for line in (metrics_of(ppo)[0], metrics_of(ppo)[-1]):
        for name in ("5_numbers", "needs_product"):
            assert f"val-core/countdown/{name}/acc/mean@1" in line["data"]


def wandb_records(path):
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB), after a header of 7 bytes."""
    content, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandbs_file_holds_the_rewards_components(ppo):
    from wandb.proto import wandb_internal_pb2

    values = {}
    for raw in wandb_records(next((ppo / "wandb").glob("offline-run-*/run-*.wandb"))):
        record = wandb_internal_pb2.Record.FromString(raw)
        items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        if "reward/acc" in items:
            step = int(items["_step"]) if "_step" in items else record.history.step.num
            values[step] = json.loads(items["reward/acc"])
    assert [values[step] for step in (1, 2)] == [step["reward/acc"] for step in steps_of(ppo)]


def test_tensorboards_file_holds_the_rewards_components(ppo):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(ppo / "tensorboard")).Reload()
    values = {event.step: event.value for event in events.Scalars("reward/acc")}
    assert [values[step] for step in (1, 2)] == [pytest.approx(step["reward/acc"]) for step in steps_of(ppo)]


def test_mlflows_file_holds_the_rewards_components(ppo):
    with sqlite3.connect(ppo / "mlflow.db") as connection:
        rows = connection.execute("select step, value from metrics where key = 'reward/acc'").fetchall()
    values = dict(rows)
    assert [values[step] for step in (1, 2)] == [step["reward/acc"] for step in steps_of(ppo)]


def test_swanlabs_files_hold_the_rewards_components(ppo):
    (folder,) = (ppo / "swanlab").glob("run-*")
    assert b"reward/acc" in next(folder.glob("*.swanlab")).read_bytes()
    columns = [
        {row["index"]: row["data"] for row in map(json.loads, file.read_text().splitlines())}
        for file in folder.glob("logs/*/*.log")
    ]
    assert {step: row["reward/acc"] for step, row in enumerate(steps_of(ppo), 1)} in columns


def test_lora_trains_and_exports_one_whole_model(small_data, tmp_path):
    """At a rate at which one step changes the samples, so that stale weights would show in the agreement."""
    run_dir = tmp_path / "lora"
    fast = ["actor_rollout_ref.actor.optim.lr=1e-2", "actor_rollout_ref.actor.optim.lr_warmup_steps=-1"]
    # So the first pass after the weights were sent is the reference's, which the guard leaves out.
    bypass = "algorithm.rollout_correction.bypass_mode=true"
    command = train(run_dir, "recipe=mini_r1", "tuning=lora", bypass, *fast, *SHORT, *small_data)
    assert command.wait() == 0, command.output
    command.assert_nothing_is_left()
    first, second = steps_of(run_dir)
    assert all(any(name in step for name in AGREEMENT) for step in (first, second))
    assert first["actor/kl_loss"] < 1e-6  # the adapter starts at zero, and without it the actor is the reference
    assert second["actor/kl_loss"] > 1e-3
    base, model = (load_file(folder / "model.safetensors") for folder in (ROOT / "assets/tiny_base", run_dir / "model"))
    assert model.keys() == base.keys()  # without an adapter beside it


def test_dynamic_sampling_ends_if_no_group_has_both_right_and_wrong_responses(small_data, tmp_path):
    reward = tmp_path / "nothing.py"
    reward.write_text("def compute_score(**_):\n    return {'score': 0.0, 'acc': 0.0}\n", encoding="utf-8")
    none = f"reward.custom_reward_function.path={reward}", "algorithm.filter_groups.max_num_gen_batches=1"
    command = train(tmp_path / "run", "recipe=dapo", *none, *SHORT, *small_data)
    assert command.wait() == 1
    *_, last = command.output.strip().splitlines()
    assert "no signal: the responses of 8 groups of this step were all right or all wrong" in last
    command.assert_nothing_is_left()


def test_responses_that_fail_are_counted_and_end_a_run_with_verls_own_loop(small_data, tmp_path):
    reward = tmp_path / "half.py"
    code = "def compute_score(*, solution_str, extra_info, **_):\n"
    code += "    assert extra_info['split'] == 'test' or len(solution_str) % 2\n    return {'score': 1.0, 'acc': 1.0}\n"
    reward.write_text(code, encoding="utf-8")
    limits = "trainer.v1.sampler.sampler_kwargs.alarm.steps=1", f"reward.custom_reward_function.path={reward}"
    leave_out = "~reward.custom_reward_function.reward_kwargs"
    command = train(tmp_path / "run", "recipe=tiny", leave_out, *limits, *AS_ON_GPUS, *SHORT, *small_data)
    assert command.wait() == 1
    *_, last = command.output.strip().splitlines()
    assert "the output has degenerated: reward/missing was 0.1 or more" in last, command.output
    command.assert_nothing_is_left()


def test_a_merged_model_computes_what_the_model_with_its_adapter_does(tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from verl_recipes.run.merge_lora import merge

    shutil.copytree(ROOT / "assets" / "tiny_base", tmp_path, dirs_exist_ok=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "lora_adapter")
    tokens = torch.arange(20)[None]
    expected = adapted(tokens).logits
    merge(tmp_path)
    assert not (tmp_path / "lora_adapter").exists()
    torch.testing.assert_close(
        AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, expected, rtol=1e-4, atol=1e-4
    )
