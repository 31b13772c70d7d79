"""python benchmarks/scale.py: how a step grows, and rollouts inside verl compared with direct calls of vLLM.

The tiny run has a learning rate of almost 0, so that its responses keep their length: eight steps with the recipe's 32
prompts, three times, of which the median counts, and six with 128, once. After each run of 32, as many vLLM engines as
it had ranks, each in its own process, answer as many prompts of the same file with the same sampling at the same time,
and return only tokens and plain log-probabilities, as those of the run do. Then come models of three sizes with random
weights, which end a response only by chance, and three lengths. Prints and writes the tables of benchmarks/scale.md.
Takes about twenty minutes on two cores, with nothing else running.
"""

import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from datasets import load_dataset
from omegaconf import OmegaConf

from verl_recipes.cpu.platform import PlatformCPU
from verl_recipes.run.folder import read_lines

ROOT = Path(__file__).resolve().parent.parent
BATCHES = 8


def run(name: str, steps: int, *overrides: str) -> tuple[Path, list[dict[str, float]]]:
    """A run that learns nothing, and verl's metrics of its steps but the first, which warms up."""
    run_dir = ROOT / "runs" / "scale" / name
    short = [f"trainer.total_training_steps={steps}", f"trainer.save_freq={steps}", "eval_n=1", *overrides]
    still = ["actor_rollout_ref.actor.optim.lr=1e-12", "fresh=true", f"run_dir={run_dir}"]
    subprocess.run([sys.executable, "-m", "verl_recipes.train", *short, *still], cwd=ROOT, check=True)
    lines = [line["data"] for line in read_lines(run_dir / "metrics.jsonl")]
    return run_dir, [line for line in lines if "timing_s/gen" in line][1:]


def random_model(hidden: int, layers: int) -> tuple[Path, float]:
    """A model like the tiny one with random weights, and its parameters in millions."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny, path = ROOT / "assets" / "tiny_base", ROOT / "runs" / "scale" / "models" / f"{hidden}x{layers}"
    shutil.copytree(tiny, path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(tiny)
    heads = {"num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 64}
    config.update({"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers} | heads)
    config.layer_types = ["full_attention"] * layers
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(path)
    return path, model.num_parameters() / 1e6


def growth() -> str:
    """The table over sizes and lengths."""
    text = "| million parameters | response tokens | a step, s | rollouts | update | vLLM directly to inside verl |\n"
    text += "| --- | --- | --- | --- | --- | --- |\n"
    for hidden, layers, length in ((128, 3, 64), (256, 6, 64), (512, 12, 64), (128, 3, 128), (128, 3, 256)):
        path, parameters = random_model(hidden, layers)
        model = [f"actor_rollout_ref.model.path={path}", f"data.max_response_length={length}"]
        shape = [f"architecture.hidden_size={hidden}", f"architecture.num_hidden_layers={layers}"]
        run_dir, lines = run(f"{hidden}x{layers}-{length}", 4, *model, *shape)
        tokens, step, gen, update = (
            statistics.median(line[name] for line in lines)
            for name in ("response_length/mean", "timing_s/step", "timing_s/gen", "timing_s/update_actor")
        )
        times = direct(run_dir, 4) / inside(run_dir, lines)
        text += f"| {parameters:.1f} | {tokens:.0f} | {step:.1f} | {gen:.1f} | {update:.1f} | {times:.2f} times |\n"
    return text


def engine(rank: int, ranks: int, batches: int, cfg: Any, together: Any, answers: Any) -> None:
    """One vLLM engine; it answers its share of each batch when all engines are ready."""
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    from verl_recipes.cpu.vllm_server import CHEAP

    model, rollout, count = cfg.actor_rollout_ref.model, cfg.actor_rollout_ref.rollout, cfg.data.train_batch_size
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    rows = load_dataset("parquet", data_files=cfg.data.train_files, split="train").select(range(batches * count))
    prompts = [
        tokenizer.apply_chat_template(
            row["prompt"], chat_template=model.custom_chat_template, add_generation_prompt=True, return_dict=False
        )
        for row in rows
    ]
    longest = cfg.data.max_prompt_length + cfg.data.max_response_length
    llm = LLM(
        model.path,
        dtype="float32",
        enforce_eager=True,
        max_model_len=longest,
        max_num_seqs=rollout.max_num_seqs,
        kv_cache_memory_bytes=2**30,
    )
    sampling = SamplingParams(
        n=rollout.n, temperature=1.0, max_tokens=cfg.data.max_response_length, logprobs=0, **CHEAP
    )
    for batch in range(batches):
        share = prompts[batch * count : (batch + 1) * count][rank::ranks]
        together.wait()
        began = time.time()
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in share], sampling, use_tqdm=False)
        together.wait()
        tokens = sum(len(each.token_ids) for output in outputs for each in output.outputs)
        answers.put((batch, time.time() - began, tokens))


def inside(run_dir: Path, lines: list[dict[str, float]]) -> float:
    """Tokens a second of the rollouts of a run, the median over steps."""
    cfg = OmegaConf.load(run_dir / "config.yaml")
    responses = cfg.data.train_batch_size * cfg.actor_rollout_ref.rollout.n
    return statistics.median(responses * line["response_length/mean"] / line["timing_s/gen"] for line in lines)


def direct(run_dir: Path, batches: int = BATCHES) -> float:
    """Tokens a second of the engines called directly, the median over batches but the first."""
    cfg = OmegaConf.load(run_dir / "config.yaml")
    ranks = cfg.trainer.n_gpus_per_node
    spawn = multiprocessing.get_context("spawn")
    together, answers = spawn.Barrier(ranks, timeout=300), spawn.Queue()
    processes = [spawn.Process(target=engine, args=(i, ranks, batches, cfg, together, answers)) for i in range(ranks)]
    with patch.dict(os.environ, PlatformCPU().rollout_env_vars()):  # must be set before a process loads OpenMP
        for process in processes:
            process.start()
    said = [answers.get(timeout=300) for _ in range(ranks * batches)]
    for process in processes:
        process.join()
    rates = []
    for batch in range(1, batches):
        seconds, tokens = zip(*((s, t) for b, s, t in said if b == batch), strict=True)
        rates.append(sum(tokens) / max(seconds))
    return statistics.median(rates)


def main() -> None:
    pairs, steps = [], []
    for _ in range(3):  # the speed of the machine varies
        run_dir, lines = run("32", BATCHES, "prompts=32")
        steps.append(statistics.median(line["timing_s/step"] for line in lines))
        pairs.append((direct(run_dir), inside(run_dir, lines)))
    _, (outside, within), _ = sorted(pairs, key=lambda pair: pair[0] / pair[1])
    larger = statistics.median(line["timing_s/step"] for line in run("128", 6, "prompts=128")[1])
    step = statistics.median(steps)
    text = "| | | | |\n| --- | --- | --- | --- |\n"
    text += f"| rollout tokens a second | vLLM directly {outside:.0f} | inside verl {within:.0f} |"
    text += f" {outside / within:.2f} times |\n"
    text += f"| a step, s | 32 prompts {step:.1f} | 128 prompts {larger:.1f} | {larger / step:.1f} times |\n"
    text += "\n" + growth()
    (ROOT / "benchmarks" / "scale.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
