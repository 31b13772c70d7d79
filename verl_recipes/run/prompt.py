"""The prompt that a model was trained with."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data_prep.cli import compose
from verl_recipes.run.fingerprint import read_config
from verl_recipes.run.folder import read_json
from verl_recipes.run.weights import run_of


def find_prompt(name: str | None, model: Path, weights: Path) -> dict[str, Any]:
    """The prompt of that name. Without a name: the one beside an exported model, the run's, or tinyzero_base."""
    if name is None and (weights / "prompt.json").exists():
        return read_json(weights / "prompt.json", "export the model again")
    run = run_of(model)
    if name is None and run and "prompt" in (config := read_config(run.config)):
        return dict(config["prompt"])
    cfg = compose("render", [f"prompt={name or 'tinyzero_base'}", "tokenizer=none"])
    return OmegaConf.to_container(cfg.prompt, resolve=True)  # type: ignore[return-value]
