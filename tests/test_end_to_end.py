"""The real thing: verl, Ray, FSDP and vLLM on this machine. Left out by `tests/run.sh --fast`.

One short run serves most tests: it is killed in the middle and continued. Every test that starts something checks that
nothing is left of it afterwards.
"""

import json
import re
import signal
import sys
from collections import defaultdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import ROOT, SHORT, Command, metrics_of, titles, train

from reward_score.countdown import compute_score
from reward_score.grammar import REASONS
from verl_recipes.reporting.metrics import AGREEMENT
from verl_recipes.run.folder import read_lines

pytestmark = pytest.mark.end_to_end


def agreement(lines):
    """The correlation of rollout and actor in every line of metrics that has it."""
    return [line[name] for line in lines for name in AGREEMENT if name in line]


def test_a_killed_run_continues_after_its_last_checkpoint_and_ends_at_the_asked_step(resumed):
    assert "after step 2" in resumed["second"].output
    lines = metrics_of(resumed["run_dir"])
    assert [line["step"] for line in lines if "training/global_step" in line["data"]] == [1, 2, 3, 4]
    assert json.loads((resumed["run_dir"] / "summary.json").read_text())["steps"] == 4


def test_a_run_whose_worker_is_killed_starts_again_by_itself_as_often_as_was_asked(resumed):
    (line,) = (line for line in resumed["second"].output.splitlines() if "trainer.restarts: 0 left" in line)
    assert line.startswith("verl stopped: ray.exceptions.ActorDiedError: The actor died unexpectedly")


def test_the_workers_of_a_run_are_forks(resumed):
    assert str(ROOT / "verl_recipes/cpu/forkserver.py") in resumed["parent"]


def test_processes_say_what_they_are(resumed):
    assert {"ray::TaskRunnerV1", "ray::WorkerDict", "VLLM::EngineCore"} <= resumed["names"]


def test_nothing_listens_beyond_loopback_but_torchs_store(resumed):
    """torch.distributed's TCPStore, one for each group of ranks, has no setting for its address."""
    assert resumed["listening"]
    outside = [
        name for name, address in resumed["listening"] if address not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
    ]
    assert outside == ["ray::WorkerDict"]


def test_no_prompt_is_repeated_or_left_out_where_a_run_is_resumed_at_an_epochs_end(resumed):
    folder = resumed["run_dir"] / "samples" / "train"
    prompts = {step: {row["prompt"] for row in read_lines(folder / f"{step}.jsonl")} for step in (1, 2, 3, 4)}
    assert {len(each) for each in prompts.values()} == {8}
    assert len(prompts[1] | prompts[2]) == 16
    assert prompts[3] | prompts[4] == prompts[1] | prompts[2]


def test_nothing_is_left_of_a_killed_or_a_finished_run(resumed):
    for command in (resumed["first"], resumed["second"]):
        command.assert_nothing_is_left()


def test_a_complete_run_says_so_and_starts_nothing(resumed):
    again = train(resumed["run_dir"], *resumed["arguments"])
    assert again.wait(timeout=60) == 0
    assert "complete" in again.output


def test_rollout_and_actor_agree_on_every_step(resumed):
    values = agreement(line["data"] for line in metrics_of(resumed["run_dir"]))
    assert len(values) == 4
    assert min(values) >= 0.999


def test_samples_hold_every_component_of_the_reward_and_whole_groups(resumed):
    train, validation = ("prompt_id", 8, 8), ("prompt", 16, 2)
    files = {("train", 1): train, ("train", 4): train, ("validation", 0): validation, ("validation", 4): validation}
    assert (resumed["run_dir"] / "samples" / "train" / "1.jsonl.gz").exists()  # compressed, as it is finished
    for (split, step), (group, problems, n) in files.items():
        groups = defaultdict(list)
        for row in read_lines(resumed["run_dir"] / "samples" / split / f"{step}.jsonl"):
            assert {"response", "response_tokens", "ground_truth", "truncated", "repeated"} <= row.keys()
            scored = compute_score("", row["response"], row["ground_truth"])
            assert scored == {name: row[name] for name in scored}
            groups[row[group]].append(row)
        assert [len(group) for group in groups.values()] == [n] * problems


def test_the_components_and_the_share_of_every_reason_are_metrics_of_training_and_validation(resumed):
    parts = ["acc", "format", *(f"reason/{reason}" for reason in REASONS)]
    shares = ["truncated", "unparsable", "repeated", "identical", "groups_without_signal"]
    for line in metrics_of(resumed["run_dir"]):
        data = line["data"]
        if "training/global_step" in data:
            assert {f"reward/{name}" for name in [*parts, *shares]} <= data.keys()
            assert data["reward/score"] == pytest.approx(data["critic/score/mean"], abs=1e-6)
            assert sum(data[f"reward/reason/{reason}"] for reason in REASONS) == pytest.approx(1 - data["reward/acc"])
        if line["step"] in (0, 4):
            assert {
                f"val-{'core' if name == 'acc' else 'aux'}/countdown/3_numbers/{name}/mean@1" for name in parts
            } <= data.keys()


def test_the_run_folder_is_whole(resumed):
    run_dir = resumed["run_dir"]
    summary = json.loads((run_dir / "summary.json").read_text())
    for model in ("base", "trained"):
        assert {"mean@2", "pass@2", "response_tokens"} <= summary[model].keys()
    assert summary["versions"]["verl"] == "0.9.1"
    assert {"start", "train", "evaluate", "export", "total"} <= summary["seconds"].keys()
    good = summary["goodput"]
    assert 0 < good["share"] == good["steps"] / sum(value for name, value in good.items() if name != "share") < 1
    assert good["lost"] > 0  # step 3 was done twice
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "of 100 test responses right after 4 steps" in (run_dir / "report.html").read_text()
    assert "WorkerDict" in (run_dir / "log.txt").read_text()
    assert "WorkerDict" not in resumed["second"].output  # verl's flood is not on the screen


def test_the_exported_model_holds_the_weights_of_the_last_checkpoint(resumed, tmp_path, monkeypatch):
    """verl's own merger, on the same checkpoint, writes them in bf16."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file
    from verl.model_merger.__main__ import main

    actor = resumed["run_dir"] / "checkpoints" / "global_step_4" / "actor"
    arguments = ["merge", "--backend=fsdp", f"--local_dir={actor}", f"--target_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["merger", *arguments])
    main()
    merged, exported = (load_file(folder / "model.safetensors") for folder in (tmp_path, resumed["run_dir"] / "model"))
    base = load_file(ROOT / "assets" / "tiny_base" / "model.safetensors")
    assert merged.keys() == exported.keys() == base.keys()
    assert all(torch.equal(merged[name], exported[name].bfloat16()) for name in merged)
    assert any(not torch.equal(base[name], exported[name]) for name in base)


@pytest.mark.long
def test_somebody_elses_data_and_reward_train_on_the_stock_command(tmp_path):
    """verl's own main_ppo and agent loop; of this project only the platform and its list of settings."""
    question = [{"role": "user", "content": "Say a number:"}]
    row = {"data_source": "numbers", "prompt": question, "ability": "x", "reward_model": {"ground_truth": "7"}}
    pq.write_table(
        pa.Table.from_pylist([row | {"extra_info": {"index": i}} for i in range(16)]), tmp_path / "d.parquet"
    )
    (tmp_path / "reward.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):\n"
        "    return float(ground_truth in solution_str)\n"
    )
    command = Command(
        *("env", "VERL_PLATFORM=cpu", f"VERL_FILE_LOGGER_PATH={tmp_path}/metrics.jsonl", "RAY_ADDRESS=local"),
        *(sys.executable, "-m", "verl.trainer.main_ppo", "--config-dir=configs", "+hardware=cpu"),
        *("actor_rollout_ref.rollout.agent.agent_loop_manager_class=null", "reward.num_workers=1"),
        *("actor_rollout_ref.rollout.agent.num_workers=1", "actor_rollout_ref.model.path=assets/tiny_base"),
        *("actor_rollout_ref.model.enable_gradient_checkpointing=false", "actor_rollout_ref.rollout.n=2"),
        *(f"data.train_files={tmp_path}/d.parquet", f"data.val_files={tmp_path}/d.parquet", "data.train_batch_size=4"),
        *("data.max_prompt_length=32", "data.max_response_length=16", "data.dataloader_num_workers=0"),
        *("actor_rollout_ref.actor.ppo_mini_batch_size=4", "algorithm.adv_estimator=grpo"),
        *(f"reward.custom_reward_function.path={tmp_path}/reward.py", "trainer.logger=[console,file]"),
        *("trainer.total_training_steps=2", "trainer.val_before_train=false", f"hydra.run.dir={tmp_path}"),
        "trainer.n_gpus_per_node=1",  # nothing is forked here: each rank and engine imports for 20 s
    )
    assert command.wait() == 0, command.output[-3000:]
    steps = [line["data"] for line in metrics_of(tmp_path) if "training/global_step" in line["data"]]
    assert len(steps) == 2
    assert min(agreement(steps)) >= 0.999


@pytest.mark.long
def test_a_run_that_fails_says_why_in_one_line_and_leaves_nothing(small_data, tmp_path):
    failing = "reward.custom_reward_function.path=tests/failing_reward.py"
    command = train(tmp_path / "run", *SHORT, *small_data, "trainer.total_training_steps=2", failing)
    assert command.wait() != 0
    last = command.output.strip().splitlines()[-1]
    assert last.startswith("error: verl stopped: ")
    assert "no verdict is possible" in last
    assert "Traceback" not in command.output
    command.assert_nothing_is_left()


def test_a_run_with_stale_weights_ends_and_one_that_is_interrupted_as_it_starts_again_leaves_nothing(
    small_data, tmp_path
):
    run_dir = tmp_path / "run"
    stale = "+actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls=stale_worker.StaleWorker"
    command = train(run_dir, *SHORT, *small_data, "trainer.total_training_steps=2", stale, "trainer.restarts=1")

    def starts():
        return [line for line in read_lines(run_dir / "starts.jsonl") if line["event"] == "began"]

    command.wait_for(lambda: len(starts()) == 2 and "ray::TaskRunnerV1" in titles(command).values())
    command.process.send_signal(signal.SIGINT)
    assert command.wait(timeout=90) != 0
    (again,) = (line for line in command.output.splitlines() if line.endswith("(trainer.restarts: 0 left)"))
    assert re.match("verl stopped: .*disagree.*; starting it again", again)
    assert command.output.strip().splitlines()[-1] == "interrupted"
    assert "Traceback" not in command.output
    command.assert_nothing_is_left()


def test_a_run_that_a_scheduler_ends_saves_the_step_that_it_is_in(small_data, tmp_path):
    """SIGTERM comes to every process of the run, as from Slurm or systemd.

    Of its two ranks one trains and one generates, by weights that are up to one step old; the other tests have two that
    do both in turn.
    """
    run_dir = tmp_path / "run"
    steps = ["trainer.total_training_steps=1000", "trainer.save_freq=500"]
    command = train(run_dir, *SHORT, *small_data, *steps, "topology=split_async")
    command.wait_for(lambda: metrics_of(run_dir, "metrics.part.jsonl")[1:])
    for process in sorted(command.processes(), key=lambda each: each.pid, reverse=True):  # the command itself last
        process.terminate()
    assert command.wait(timeout=90) == 128 + signal.SIGTERM
    lines = metrics_of(run_dir)
    saved = int((run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert 1 <= saved == lines[-1]["step"]
    assert len(list((run_dir / f"checkpoints/global_step_{saved}/actor").glob("model_world_size_1_rank_*.pt"))) == 1
    data = [line["data"] for line in lines if "training/global_step" in line["data"]]
    assert [step["training/off_policy/trajectory_staleness/max"] for step in data] == [0] + [1] * (saved - 1)
    values = agreement(data)
    assert len(values) == saved
    assert (values[0] >= 0.999, min(values) >= 0.99) == (True, True)
    assert f"ended by a signal; the same command goes on after step {saved}" in command.output
    assert not (run_dir / "stop").exists()
    command.assert_nothing_is_left()


def test_the_one_command_teaches_the_model(tmp_path):
    """README's first command, whole: a person would see a base model of at most 0.25 end at 0.55 or more."""
    command = Command("bash", "launch/cpu.sh", f"run_dir={tmp_path / 'run'}", "seed=0")
    assert command.wait(timeout=1800) == 0, command.output
    command.assert_nothing_is_left()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["base"]["problems"] == 256
    assert summary["base"]["mean@8"] <= 0.25
    assert summary["trained"]["mean@8"] >= 0.55
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
