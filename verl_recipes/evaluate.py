"""python -m verl_recipes.evaluate model=PATH data=PARQUET n=8: sample a model and count what is right.

The samples come from verl's own validation, with vLLM, and are scored by the reward of training, so a number from here
and one from a run's summary.json mean the same. Written to `out`: samples/ (every response) and summary.json.
"""

import json
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from data_prep.cli import CONFIGS, run
from verl_recipes.checks import check_parquet, preflight
from verl_recipes.summary import read_samples, summarize
from verl_recipes.supervise import locked
from verl_recipes.train import empty, provenance, start_verl


def training_config(cfg: DictConfig, model: Path) -> DictConfig:
    """The configuration of a run that only evaluates: verl's trainer stops after its first validation."""
    overrides = [
        f"recipe={cfg.recipe}",
        f"hardware={cfg.hardware}",
        f"seed={cfg.seed}",
        f"run_dir='{cfg.out}'",
        f"eval_n={cfg.n}",
        f"actor_rollout_ref.model.path='{model}'",
        f"actor_rollout_ref.rollout.val_kwargs.temperature={cfg.temperature}",
        f"data.train_files='{cfg.data}'",
        f"data.val_files='{cfg.data}'",
        f"data.train_batch_size={min(check_parquet(cfg.data, 'data'), 8)}",  # none is trained, but verl wants a batch
        "trainer.resume_mode=disable",
    ]
    GlobalHydra.instance().clear()  # of this command's own configuration folder
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose("train", [*overrides, *cfg.overrides])


def evaluate(cfg: DictConfig, out: Path, console: Console) -> dict[str, Any]:
    """Sample, score, summarize and write."""
    model = Path(cfg.model)
    training = training_config(cfg, model / "model" if (model / "model").is_dir() else model)
    preflight(training, out)
    with locked(out):
        empty(out)
        start_verl(training, out, console, val_before_train=True, val_only=True)
        samples = read_samples(out / "samples" / "validation" / "0.jsonl")
        summary = {
            "model": cfg.model,
            "data": cfg.data,
            "n": cfg.n,
            "seed": cfg.seed,
            **summarize(samples),
        } | provenance()
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


@hydra.main(config_path=str(CONFIGS / "evaluate"), config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> None:
    console, out = Console(), Path(cfg.out)
    summary = evaluate(cfg, out, console)
    table = Table(title=f"{cfg.model} on {cfg.data}", show_header=False)
    for name, value in summary.items():
        if isinstance(value, float):
            table.add_row(name, f"{value:.3f}" if value < 10 else f"{value:.1f}")
    console.print(table)
    console.print(f"{out}: summary.json samples/ log.txt", highlight=False)


if __name__ == "__main__":
    run(main)
