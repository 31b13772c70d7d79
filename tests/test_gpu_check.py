"""launch/gpu_check.sh without a card: what it prints, what a killed check leaves, and all of it on the CPU platform."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import psutil
import pytest
from configurations import compose

from benchmarks.gpu_check import START, config_of, report
from data_prep.cli import CONFIGS
from verl_recipes.run.model import check_same_model
from verl_recipes.settings.schema import TrainKeys
from verl_recipes.warm_start import Keys

ROOT = CONFIGS.parent
MEASURED = ROOT / "benchmarks" / "results" / "h100"
OF_WARM_STARTS = set(Keys.model_fields) - set(TrainKeys.model_fields)
STAGES = ["card", "tiny", "tinyzero_grpo", "tinyzero_ppo", "lora", "resumed", "warm", "pretrained"]
# In place of a training command: rollouts, three steps as verl's file logger writes them, and then nothing for ever.
TRAINING = """
import json, pathlib, sys, time
run = pathlib.Path(sys.argv[1].partition("=")[2])
(run / "samples").mkdir(parents=True)
time.sleep(0.1)
(run / "config.yaml").write_text("trainer: {device: cpu}")
(run / "samples/events.jsonl").write_text(json.dumps({"event": "generating", "time": time.time()}) + "\\n")
for step in range(4):
    with (run / "metrics.part.jsonl").open("a") as file:
        print(json.dumps({"step": step, "data": {"timing_s/step": 2.0, "reward/acc": step / 4}}), file=file)
print("something", flush=True)
time.sleep(600)
"""


def check(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "benchmarks/gpu_check.py", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def train(file, seconds, steps, run_dir):
    return check("run", file, seconds, steps, sys.executable, "-c", TRAINING, f"run_dir={run_dir}")


def cells(row):
    return tuple(cell.strip() for cell in row.strip("|").split("|"))


def dry_run(*arguments):
    command = ["bash", "launch/gpu_check.sh", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"DRY_RUN": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line[2:]) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("hardware", ["h100", "cpu"])
def test_a_dry_run_prints_every_stage_and_each_training_command_composes(hardware, tmp_path):
    commands = dry_run(f"hardware={hardware}", "seed=7")
    runs = [command for command in commands if command[:3] == ["python", "benchmarks/gpu_check.py", "run"]]
    assert [command[3].rpartition("/")[2].removesuffix(".json") for command in runs] == STAGES[1:]
    [(folder, *shape)] = [command[3:] for command in commands if command[2:3] == ["model"]]  # of random weights
    config_of(shape[0], shape[1:]).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    for command in runs:
        *_, kind = command[8].partition("verl_recipes.")
        assert (command[6:8], kind) == (["python", "-m"], "warm_start" if "traces=" in str(command) else "train")
        given = [each for each in command[9:] if each.partition("=")[0] not in OF_WARM_STARTS]
        cfg = compose("train", *given)
        assert (cfg.seed, cfg.card.name) == (7, hardware)
        assert (cfg.actor_rollout_ref.model.lora_rank > 0) == cfg.run_dir.endswith("lora")
        if cfg.actor_rollout_ref.model.path == folder:
            cfg.actor_rollout_ref.model.path = str(tmp_path)
            check_same_model(cfg)


@pytest.mark.slow
def test_a_check_that_is_killed_leaves_what_was_measured_until_then(tmp_path):
    file = tmp_path / "tiny.json"
    process = train(file, 600, 0, tmp_path / "run")
    try:
        deadline = time.monotonic() + 60
        while not (file.exists() and len(json.loads(file.read_text(encoding="utf-8"))["steps"]) == 4):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        training = psutil.Process(process.pid).children()
        process.kill()
        process.wait()
        for child in training:
            child.kill()
    assert json.loads(file.read_text(encoding="utf-8"))["steps"]["3"]["reward/acc"] == 0.75
    assert report(tmp_path) == 0
    assert "| training steps | 3 |" in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_run_ends_after_its_steps_or_its_seconds_and_an_earlier_runs_steps_do_not_count(tmp_path):
    for name, seconds, steps, ended in (("a", 600, 3, "by its steps"), ("b", 3, 0, "by its seconds")):
        run_dir = tmp_path / name
        process = train(tmp_path / f"{name}.json", seconds, steps, run_dir)
        assert ended in process.communicate()[0]
        assert process.returncode == 0
    # The folder is there already, so the command fails at once, and its steps are those of the earlier run.
    process = train(tmp_path / "c.json", 600, 3, run_dir)
    assert "0 steps" in process.communicate()[0]
    assert process.returncode == 1
    assert json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))["ended"] == "by itself, status 1"


@pytest.mark.slow
def test_a_warm_starts_time_begins_with_its_first_step(tmp_path):
    """It has no rollouts."""
    without = TRAINING.replace('"generating"', '"other"').replace('"time": time.time()', '"time": 0')
    command = ["run", tmp_path / "warm.json", 2, 0, sys.executable, "-c", without, f"run_dir={tmp_path / 'run'}"]
    assert "ended by its seconds" in check(*command).communicate()[0]
    assert (
        json.loads((tmp_path / "warm.json").read_text(encoding="utf-8"))["seconds"] < START
    )  # else it waited for rollouts


def test_a_missing_model_is_said_before_the_first_stage(tmp_path):
    settings = {"SETUP": "0", "MODEL": str(tmp_path / "none"), "OUT": str(tmp_path / "out"), "STAGES": "0 4 report"}
    command = ["bash", "launch/gpu_check.sh", "hardware=h100"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode != 0
    assert not (tmp_path / "out").exists()
    assert f"MODEL={tmp_path}/none is no folder: python -m verl_recipes.fetch" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("page", ["docs/gpu.md", "docs/zh/gpu.md"])
def test_the_page_repeats_what_was_measured_on_a_card(page, tmp_path):
    shutil.copytree(MEASURED, tmp_path, dirs_exist_ok=True)
    assert report(tmp_path) == 0
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text == (MEASURED / "report.md").read_text(encoding="utf-8")
    section = (ROOT / page).read_text(encoding="utf-8").partition("h100/report.md")[2]
    figures = [cells(row)[1:] for row in section.splitlines() if re.match(r"\| .*\d.* \|$", row)]
    assert len(figures) == 32
    assert set(figures) <= {cells(row)[1:] for row in text.splitlines() if row.startswith("| ")}


@pytest.mark.slow
def test_random_weights_have_a_tokenizer_as_large_as_their_vocabulary(tmp_path):
    """verl masks vLLM's logits beyond the tokenizer, and not the actor's."""
    from benchmarks.gpu_check import model

    assert model(tmp_path, "tiny", ["hidden_size=64", "num_hidden_layers=1", "vocab_size=1000"]) == 0
    from transformers import AutoConfig, AutoTokenizer

    assert len(AutoTokenizer.from_pretrained(tmp_path)) == AutoConfig.from_pretrained(tmp_path).vocab_size == 1000


@pytest.mark.long
def test_the_check_goes_to_its_last_line_on_the_cpu_platform(tmp_path):
    """Each stage in its CPU form: verl's own agent loop with eight workers, packed sequences, fused kernels."""
    command = ["bash", "launch/gpu_check.sh", "hardware=cpu"]
    environment = os.environ | {"OUT": str(tmp_path), "WORK": str(tmp_path / "work")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert {file.stem for file in tmp_path.glob("*.json")} == set(STAGES)
    assert (tmp_path / "report.md").exists()
