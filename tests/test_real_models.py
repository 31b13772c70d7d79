"""Models of the common architectures, with a vocabulary of real size, on the CPU platform: `model=local` and a path."""

import json
import shutil
import sys

import pytest
from commands import ROOT, Command, metrics_of, train

from verl_recipes.reporting.metrics import AGREEMENT
from verl_recipes.run.checkpoints import checkpoint_steps

pytestmark = pytest.mark.end_to_end
VOCABULARY = 150_000  # with 128 columns in fp32 the embedding has 77 MB, more than a bucket of weights


# With a window of 8 tokens in one of two layers; a window one token off lets the agreement fall to 0.92.
GEMMA = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.fixture(
    params=["llama", *(pytest.param(name, marks=pytest.mark.long) for name in ("qwen2", "qwen3", "gemma3_text"))]
)
def model(request, tmp_path):
    """A folder with a random model, saved in bf16 as most are; Llama's head is not tied to its embedding."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        request.param,
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=request.param != "llama",
        eos_token_id=261,
        pad_token_id=262,
        bos_token_id=None,
        **(GEMMA if request.param == "gemma3_text" else {}),
    )
    folder = tmp_path / request.param
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ROOT / "assets" / "tiny_base" / name, folder)
    return folder


def test_a_model_with_a_large_vocabulary_trains_and_is_evaluated_with_nothing_but_its_path(model, small_data, tmp_path):
    named, run_dir = ["model=local", f"actor_rollout_ref.model.path={model}"], tmp_path / "run"
    short = ["data.train_batch_size=2", "data.max_response_length=8", "eval_n=1", "trainer.total_training_steps=4"]
    # It is never right, so the second test is no better than the first and ends the run.
    tests = [
        "trainer.save_freq=1",
        "trainer.test_freq=1",
        "patience=1",
        "keep=best",
        "trainer.max_actor_ckpt_to_keep=1",
    ]
    command = train(run_dir, *named, *short, *small_data, "actor_rollout_ref.rollout.n=2", *tests)
    assert command.wait() == 0, command.output
    assert "the run ends after step 2" in command.output
    assert checkpoint_steps(run_dir / "checkpoints") == [2, 1]  # the last and the best
    assert json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))["steps"] == 2
    steps = [line["data"] for line in metrics_of(run_dir) if "training/global_step" in line["data"]]
    assert len(steps) == 2
    assert all(min(step[name] for name in AGREEMENT if name in step) >= 0.99 for step in steps)
    if model.name != "qwen3":
        return  # the run has measured itself twice, by what evaluate does; one goes on to the command
    test_set = small_data[1].removeprefix("data.val_files=")
    command = Command(
        *(sys.executable, "-m", "verl_recipes.evaluate", f"model={model}", f"data={test_set}", "n=1", "greedy=false"),
        *(f"out={tmp_path / 'out'}", "data.max_response_length=8"),
    )
    assert command.wait() == 0, command.output
    assert json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))["problems"] == 16
