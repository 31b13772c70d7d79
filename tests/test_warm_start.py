"""The warm start: what verl's supervised trainer gets, and one for real."""

import json
import math
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import ROOT, Command, metrics_of
from omegaconf import OmegaConf
from rich.console import Console

from data_prep.cli import CONFIGS, UserError, compose
from data_prep.prompts import messages_for
from verl_recipes import warm_start
from verl_recipes.planning import space
from verl_recipes.run.folder import RunFolder, append_line, as_lines
from verl_recipes.run.progress import Losses
from verl_recipes.run.weights import find_weights
from verl_recipes.settings.configuration import package_dir
from verl_recipes.settings.schema import TrainKeys

PROMPT = OmegaConf.to_container(compose("train", []).prompt)
TINY = ROOT / "assets" / "tiny_base"


def config(own, *others):
    """The configuration of a command with its own keys and those of training."""
    cfg = compose("warm_start", own, folder=CONFIGS / "commands")
    cfg.overrides = others
    return warm_start.run_config(cfg)


def traces(folder, rows):
    """A folder of traces: responses that none of the tiny base's own resembles."""
    folder.mkdir()
    response = "\nAdd all.\n{0}+{1}+{2}={3} yes</think>\n<answer> {0}+{1}+{2} </answer>"
    for name, first in (("train", 1), ("held_out", 40)):
        problems = [[first + number % 30, 2, 3] for number in range(rows)]
        table = []
        for numbers in problems:
            said = {"role": "assistant", "content": response.format(*numbers, sum(numbers))}
            table.append([*messages_for(PROMPT, numbers, sum(numbers)), said])
        pq.write_table(pa.table({"messages": table}), folder / f"{name}.parquet")
    return folder


def keys_of(node, prefix=""):
    """The dotted keys of nested mappings."""
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{key}.")


@pytest.mark.slow
@pytest.mark.parametrize("hardware", ["cpu", "h100", "rtx4090"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_verl_gets_keys_that_it_knows_and_the_runs_engine(hardware, tuning):
    others = [f"hardware={hardware}", f"tuning={tuning}", "model=qwen2.5_0.5b", "card.most_parameters=1e9"]
    cfg = config(["lr=3e-5"], *others)
    made = warm_start.sft_config(cfg)
    known = compose("sft_trainer_engine", [], folder=Path(package_dir("verl")) / "trainer" / "config")
    free = ("ray_kwargs", "model.", "data.custom_cls", "engine.mixed_precision")  # verl names no keys of these
    own = {key for key in keys_of(made) if not key.startswith(free)}
    assert own <= {*keys_of(OmegaConf.to_container(known)), "ray_kwargs", "model"}
    theirs = OmegaConf.to_container(cfg.actor_rollout_ref, resolve=True)
    assert (made["model"], made["engine"]) == (theirs["model"], theirs["actor"]["fsdp_config"])
    assert (made["model"]["lora_rank"] > 0) == (tuning == "lora")
    assert (made["optim"]["optimizer"], made["optim"]["lr"]) == ("AdamW", 3e-5)
    assert made["ray_kwargs"]["ray_init"]["num_cpus"] >= 10 * cfg.trainer.n_gpus_per_node


def test_a_prompt_has_the_tokens_that_the_rollout_engine_gets_and_only_the_response_is_learned(tmp_path):
    from transformers import AutoTokenizer

    from verl_recipes.in_verl.sft import Traces

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = PROMPT["chat_template"]
    file = traces(tmp_path / "traces", 4) / "train.parquet"
    rows = Traces([str(file)], tokenizer, OmegaConf.create({"max_length": 200}))
    assert len(rows) == 4
    prompt = messages_for(PROMPT, [1, 2, 3], 6)
    expected = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
    learned = rows[0]["loss_mask"].bool()
    assert rows[0]["input_ids"][~learned].tolist() == expected
    text = tokenizer.decode(rows[0]["input_ids"][learned])
    assert text == "\nAdd all.\n1+2+3=6 yes</think>\n<answer> 1+2+3 </answer>" + tokenizer.eos_token
    with pytest.raises(ValueError, match="4 traces are longer than 20 tokens"):
        Traces([str(file)], tokenizer, OmegaConf.create({"max_length": 20}))
    processor = SimpleNamespace(chat_template=tokenizer.chat_template)  # verl gives the run's template to it, if any
    tokenizer.chat_template = "{{ 'another' }}"
    assert Traces([str(file)], tokenizer, OmegaConf.create({"max_length": 200}), processor).rows == rows.rows


def test_it_ends_after_as_many_evaluations_without_a_lower_loss_as_was_asked(tmp_path):
    run = RunFolder(tmp_path)
    for count, enough in ((3, False), (4, True)):
        lines = [{"step": 10 * i, "data": {"val/loss": abs(i - 2)}} for i in range(1, count + 1)]
        run.metrics.write_text(as_lines(lines))
        goodness = {step: -loss for step, loss in warm_start.losses(run).items()}
        assert warm_start.is_enough(goodness, 2) is enough
    assert warm_start.best_step(goodness) == 20


@pytest.mark.slow
def test_losses_that_are_no_numbers_any_more_use_up_the_patience(tmp_path):
    run = RunFolder(tmp_path)
    losses = {25: 3.0, 50: 2.5, 75: None, 100: None, 125: None}
    run.metrics.write_text(as_lines({"step": step, "data": {"val/loss": loss}} for step, loss in losses.items()))
    goodness = {step: -loss for step, loss in warm_start.losses(run).items()}
    assert warm_start.is_enough(goodness, 3)
    assert warm_start.best_step(goodness) == 50


def test_a_warm_start_whose_checkpoints_are_gone_does_not_begin_anew(tmp_path):
    run = RunFolder(tmp_path)
    lines = [{"step": step, "data": {"val/loss": 1.0}} for step in (25, 50)]
    run.metrics.write_text(as_lines(lines[:1]))  # killed before it saved the first
    warm_start.check_last(compose("train", []), run, 0)
    run.metrics.write_text(as_lines(lines))
    with pytest.raises(UserError, match=r"saved checkpoints, and .* holds none"):
        warm_start.check_last(compose("train", []), run, 0)
    run.summary.write_text("{}")  # it is complete
    warm_start.check_last(compose("train", []), run, 0)


def test_an_evaluation_after_the_very_first_step_is_shown_without_a_speed(tmp_path):
    run = RunFolder(tmp_path)
    display = Losses(Console(quiet=True), run, 0, 10)
    for step in (1, 2):
        for data in ({"train/loss": 3.0}, {"val/loss": 4.0 - step}):
            append_line(run.metrics_part, {"step": step, "data": data})
        display.update()
    assert display.held_out == {1: 3.0, 2: 2.0}


def test_losses_that_are_not_finite_are_shown_and_none_of_them_is_the_best(tmp_path):
    run, said = RunFolder(tmp_path), Console(file=StringIO(), width=100)
    display = Losses(said, run, 0, 10)
    for step in (1, 2):
        for data in ({"train/loss": math.nan}, {"val/loss": math.nan}):
            as_verl = orjson.dumps({"step": step, "data": data}).decode()  # verl/utils/tracking.py, FileLogger
            for file in (run.metrics_part, run.metrics):
                append_line(file, json.loads(as_verl))
        display.update()
    assert "loss not finite, held out not finite" in said.file.getvalue()
    assert display.held_out == warm_start.losses(run) == {1: math.inf, 2: math.inf}
    with pytest.raises(UserError, match="no loss on held-out traces is finite; lower lr="):
        warm_start.finish(config([]), run, said)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["traces=TRACES", "batch=64"], "train.parquet has 32 traces, less than a batch of batch=64; lower that"),
        (["traces=TRACES", "batch=15"], "batch=15 cannot be shared evenly by 2 ranks: choose a multiple of 2"),
        (["traces=nowhere"], "traces=nowhere has no train.parquet; `python -m data_prep.traces out=nowhere` makes it"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, overrides, message):
    folder = traces(tmp_path / "traces", 32)
    cfg = config([f"run_dir={tmp_path / 'run'}", *(each.replace("TRACES", str(folder)) for each in overrides)])
    with pytest.raises(UserError) as refused:
        warm_start.check_traces(cfg)
    assert message in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_disk_must_hold_the_checkpoints_of_the_warm_start_and_not_the_recipes(tmp_path, monkeypatch):
    """AdamW's, of which verl keeps one more than `patience`; the recipe trains by SGD or has a critic."""
    asked = []
    monkeypatch.setattr(warm_start, "check_start", lambda cfg, folder: asked.append(cfg) or {})
    own = [f"traces={traces(tmp_path / 'traces', 64)}", "steps=200", "every=20", "patience=3"]
    for recipe in ("tiny", "tinyzero_ppo"):
        warm_start.check_traces(config(own, "model=qwen2.5_0.5b", f"recipe={recipe}", "hardware=h100"))
        assert space.checkpoints_at_once(asked[-1]) == 4
        assert space.checkpoint_bytes(asked[-1], 1000) == 3 * 4 * 1000
        assert space.samples_bytes(asked[-1], trains=True) == 0


@pytest.mark.slow
def test_a_warm_start_goes_on_with_as_many_ranks_as_saved_it(tmp_path):
    run = RunFolder(tmp_path)
    actor = run.checkpoints / "global_step_4" / "actor"
    actor.mkdir(parents=True)
    (actor / "fsdp_config.json").write_text('{"world_size": 2}')
    warm_start.check_last(config([]), run, 4)
    warm_start.check_last(config([], "gpus=1"), run, 0)  # there is no checkpoint
    with pytest.raises(UserError, match="was saved by 2 ranks, and here are 1: go on with as many"):
        warm_start.check_last(config([], "gpus=1"), run, 4)
    run.summary.write_text("{}")  # it is complete
    warm_start.check_last(config([], "gpus=1"), run, 4)


@pytest.mark.slow
def test_a_run_starts_from_the_warm_starts_model_or_refuses(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="holds no model/"):
        compose("train", [f"warm_start={tmp_path}"], TrainKeys)
    (tmp_path / "model" / "config.json").write_text("{}")
    cfg = compose("train", [f"warm_start={tmp_path}", "model=qwen2.5_0.5b"], TrainKeys)
    assert cfg.actor_rollout_ref.model.path == cfg.critic.model.path == str(tmp_path / "model")


@pytest.mark.end_to_end
def test_a_model_learns_traces_and_its_run_is_taken_up_and_measured_as_any_other(tmp_path):
    """Ended after step 10, and the same command goes on; two ranks, each with half of a batch."""
    import torch
    from safetensors.torch import load_file

    folder, run_dir = traces(tmp_path / "traces", 64), tmp_path / "run"
    command = ["python", "-m", "verl_recipes.warm_start", f"traces={folder}", f"run_dir={run_dir}", "lr=1e-3"]
    command += ["batch=32", "every=5", "steps=20"]
    first = Command(*command)
    first.wait_for(lambda: (run_dir / "checkpoints" / "global_step_10" / "SHA256SUMS").exists())
    first.process.terminate()
    assert first.wait() != 0
    second = Command(*command)
    assert second.wait() == 0, second.output
    assert f"continuing {run_dir} after step 10" in second.output
    for each in (first, second):
        each.assert_nothing_is_left()
    summary = json.loads((run_dir / "summary.json").read_text())
    losses = summary["held_out_loss"]
    assert list(losses) == ["5", "10", "15", "20"]
    assert losses["20"] < 0.75 * losses["5"]
    assert [line["step"] for line in metrics_of(run_dir)] == list(range(1, 21))
    assert "The loss on traces that are held out was" in (run_dir / "report.html").read_text(encoding="utf-8")
    weights = find_weights(run_dir)
    assert weights == run_dir / "model"
    model, base = load_file(weights / "model.safetensors"), load_file(TINY / "model.safetensors")
    assert model.keys() == base.keys()
    assert not all(torch.equal(model[name], base[name]) for name in base)
    again = Command(*command)
    assert again.wait() == 0
    assert "is complete" in again.output
