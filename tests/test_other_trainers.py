"""examples/: the reward and the problems in other libraries, each in an environment of its own."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from commands import ROOT, Command

from reward_score.countdown import compute_score

PAGES = [ROOT / "docs" / language / "other_trainers.md" for language in ("", "zh")]


@pytest.fixture
def data(small_data):
    """The folder of a small data set."""
    return str(Path(small_data[0].partition("=")[2]).parent)


def python_of(library):
    """The Python of a library's environment; the test is skipped without it. The pages name its version."""
    python = ROOT / f".venv-{library}" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{python} is missing; docs/other_trainers.md says how to make it")
    code = f"from importlib.metadata import version; print(version('{library}'))"
    version = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert all(f"{library}=={version}" in page.read_text(encoding="utf-8") for page in PAGES)
    return str(python)


def output_of(*command):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("name", ["datasets_loader", "trl_reward", "verifiers_environment"])
def test_an_example_is_short(name):
    lines = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").partition('"""\n\n')[2].splitlines()
    assert len(lines) <= 50


def test_the_loader_gives_every_set_with_numbers_and_targets(data, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from datasets_loader import chat_template, load_countdown

    sets = load_countdown(data)
    assert {name: len(rows) for name, rows in sets.items()} == {
        "train": 512,
        "test": 16,
        "ood_5_numbers": 16,
        "ood_needs_product": 16,
    }
    row = sets["test"][0]
    assert str(row["numbers"]) in row["prompt"][0]["content"]
    assert f"equals {row['target']}." in row["prompt"][0]["content"]
    assert chat_template(data).startswith("{% for message")
    with pytest.raises(SystemExit, match="holds no parquet files"):
        load_countdown("learn")


@pytest.mark.slow
def test_trl_trains_two_steps_with_the_reward(data):
    printed = output_of(python_of("trl"), "examples/trl_reward.py", "2", data)
    rewards = [float(text) for text in re.findall(r"'rewards/countdown_reward/mean': '([\d.]+)'", printed)]
    assert len(rewards) == 2
    assert all(0.1 < reward < 0.9 for reward in rewards)


@pytest.mark.long
@pytest.mark.end_to_end
def test_verifiers_scores_what_a_server_of_the_tiny_model_writes(data, tmp_path):
    python_of("verifiers")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    commands = re.findall(r"```bash\n(.+?)```", PAGES[0].read_text(encoding="utf-8"), re.S)
    serve, evaluate = (
        next(each for each in commands if name in each).replace("http://127.0.0.1:8123", address)
        for name in ("vllm serve", "vf-eval")
    )
    serve = serve.replace(".venv/bin/vllm", str(Path(sys.executable).with_name("vllm")))
    server = Command("bash", "-c", serve.replace("8123", address.rpartition(":")[2]))

    def ready():
        try:
            return urllib.request.urlopen(f"{address}/health", timeout=1).status == 200
        except OSError:
            return False

    try:
        server.wait_for(ready, timeout=300)
        options = f" --env.taskset.file {data}/test.parquet"
        output_of("bash", "-c", evaluate.replace("runs/verifiers", str(tmp_path)).rstrip() + options)
    finally:
        os.killpg(server.process.pid, signal.SIGTERM)
        server.process.communicate(timeout=60)
    (file,) = tmp_path.glob("*/traces.jsonl")
    episodes = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    traces = [trace for episode in episodes for trace in episode["traces"]]
    assert len(traces) == 8
    for trace in traces:
        row, reply = trace["task"]["data"], trace["nodes"][-1]["message"]["content"]
        score = compute_score(row["source"], reply, {"numbers": row["numbers"], "target": row["target"]})["score"]
        assert trace["rewards"]["countdown"]["score"] == score
