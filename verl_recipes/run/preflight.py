"""What can be known to fail before anything heavy starts, each as one line."""

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import DictConfig, ListConfig, OmegaConf
from safetensors import SafetensorError, safe_open

from data_prep.cli import UserError
from data_prep.sources import file_sha256
from verl_recipes.run.checkpoints import damage, way_on
from verl_recipes.run.trackers import check_trackers
from verl_recipes.settings.configuration import check_choice

COLUMNS = {"data_source", "prompt", "reward_model"}
CPU_MEMORY_GIB = 8  # what the tiny run takes at its peak with its two ranks, rounded up (README.md)
GIB = 2**30
# What may not change between the measurement before training and the one after it.
MEASURED = ("eval_n", "data.val_files")
# What may not change between a checkpoint and a resume: the model's parts and how they are sharded, the optimizer's
# kind, and the order of the data.
FIXED = (
    "actor_rollout_ref.model.path",
    "actor_rollout_ref.model.lora_rank",
    "actor_rollout_ref.model.lora_alpha",
    "actor_rollout_ref.model.target_modules",
    "actor_rollout_ref.actor.strategy",
    "actor_rollout_ref.actor.optim.optimizer",
    "algorithm.adv_estimator",
    "trainer.n_gpus_per_node",
    "trainer.nnodes",
    "trainer.v1.trainer_mode",
    "data.train_files",
    "data.train_max_samples",
    "data.max_prompt_length",
    "data.filter_overlong_prompts",
    "data.train_batch_size",
    "data.shuffle",
    "data.seed",
)


def check_parquet(files: str | Sequence[str] | None, key: str, made_by: str = "python -m data_prep") -> int:
    """Number of rows in the parquet files of a configuration key, after checking that verl can read them.

    Args:
        files: one or several.
        key: names them in an error.
        made_by: the command that writes them.
    """
    rows = 0
    for name in [files] if isinstance(files, str) else files or []:
        path = Path(name)
        if not path.is_file():
            raise UserError(f"{key}: {path} does not exist; make it with `{made_by}`")
        try:
            metadata = pq.read_metadata(path)
            columns = set(pq.read_schema(path).names)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{key}: {path} is not a whole parquet file ({str(error).splitlines()[0]})") from None
        said = manifest_beside(path).get("files", {}).get(path.name, {}).get("sha256")
        if said and said != file_sha256(path):
            raise UserError(
                f"{key}: {path} is not the file that its manifest.json tells of; make it again with `{made_by}`, or "
                "delete the manifest if you changed the data yourself"
            )
        if missing := COLUMNS - columns:
            raise UserError(f"{key}: {path} has no column {', '.join(sorted(missing))}; it has {', '.join(columns)}")
        rows += metadata.num_rows
    if rows == 0:
        raise UserError(f"{key}: no rows in {files}")
    return rows


def read_json(path: Path, advice: str) -> Any:
    """What a JSON file holds; UserError with this advice where it is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); {advice}") from None


def manifest_beside(path: Path) -> dict[str, Any]:
    """The manifest of the folder that a data file lies in, where it has one (data_prep/command.py)."""
    manifest = path.parent / "manifest.json"
    return read_json(manifest, "make the data again") if manifest.exists() else {}


def check_prompt(files: str | Sequence[str] | None, template: str | None) -> None:
    """The chat template of the run is that of the prompt which the data was made with, as its manifest says."""
    for name in [files] if isinstance(files, str) else files or []:
        made = manifest_beside(Path(name)).get("configuration", {}).get("prompt")
        if made and made.get("chat_template") != template:
            raise UserError(
                f"{name} was made with prompt={made['name']}, which has another chat template; add that here too"
            )


def check_model(path: str) -> int:
    """Size in bytes of the weights in a local model folder; 0 for the name of a model on a hub."""
    folder = Path(path)
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", path) and os.environ.get("HF_HUB_OFFLINE") != "1":
        return 0
    weights = list(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not weights:
        raise UserError(f"{path} holds no model: config.json and *.safetensors are expected in that folder")
    for file in folder.glob("*.json"):
        read_json(file, "fetch or export the model again")
    for file in weights:
        try:
            with safe_open(file, "numpy"):
                pass
        except SafetensorError as error:
            raise UserError(f"{file} is damaged ({error}); fetch or export the model again") from None
    return sum(file.stat().st_size for file in weights)


def check_code(model: DictConfig) -> None:
    """A model folder that brings code is trusted: verl's reward worker loads tokenizers with trust_remote_code=True."""
    for file in Path(model.path).glob("*.json"):
        if "auto_map" in read_json(file, "fetch or export the model again") and not model.trust_remote_code:
            raise UserError(
                f"{file} asks to run code that comes with the model (auto_map): read it, and if you trust it, add "
                "actor_rollout_ref.model.trust_remote_code=true"
            )


def hashes(files: str | Sequence[str]) -> dict[str, str]:
    """The hash of each data file."""
    return {name: file_sha256(Path(name)) for name in ([files] if isinstance(files, str) else files)}


def check_same(cfg: DictConfig, run_dir: Path, keys: Sequence[str], why: str) -> None:
    """These keys are what they were when the run began."""
    before = OmegaConf.load(run_dir / "config.yaml")

    def values(value: Any) -> list[Any]:  # verl is told of the test files once a sample (verl_recipes/train.py)
        return list(dict.fromkeys(value)) if isinstance(value, ListConfig) else [value]

    for key in keys:
        was, now = OmegaConf.select(before, key), OmegaConf.select(cfg, key)
        if values(was) != values(now):
            raise UserError(
                f"{key} was {was} in {run_dir} and is {now} now, which {why}: set it back, or "
                "name=another for a new run (verl_recipes.export gives it this one's model)"
            )


def check_resume(cfg: DictConfig, run_dir: Path, step: int) -> None:
    """The run can go on after a step: its checkpoint is whole, and what the checkpoint depends on is as it was."""
    if step > cfg.trainer.total_training_steps:
        raise UserError(
            f"{run_dir} is at step {step} already: ask for as many with trainer.total_training_steps, or more"
        )
    checkpoints = run_dir / "checkpoints"
    if damaged := damage(checkpoints / f"global_step_{step}"):
        raise UserError(f"{damaged}; {way_on(checkpoints, below=step)}")
    check_same(cfg, run_dir, FIXED, "its checkpoint does not allow")
    if read_json(run_dir / "data.json", "fresh=true to start anew") != hashes(cfg.data.train_files):
        raise UserError(
            f"data.train_files are not what {run_dir} was trained on so far, so their order cannot go on: bring them "
            "back, or name=another for a new run"
        )


def check_space(cfg: DictConfig, run_dir: Path, weights: int) -> None:
    """Enough memory (on a CPU) and disk for a model whose weights have this many bytes."""
    ranks = cfg.trainer.n_gpus_per_node * cfg.trainer.nnodes
    # Beside what the processes themselves take: parameters, gradients and two Adam moments, and vLLM's own copy.
    memory = CPU_MEMORY_GIB * GIB + max(0, ranks - 2) * GIB + 5 * weights
    available = psutil.virtual_memory().available
    if cfg.trainer.device == "cpu" and available < memory:
        raise UserError(f"{available / GIB:.1f} GiB of memory are free, and this run needs about {memory / GIB:.1f}")
    checkpoints = cfg.trainer.max_actor_ckpt_to_keep or 1
    disk = GIB + (checkpoints + 1) * 4 * weights  # one more while it is written
    parent = next(folder for folder in (run_dir, *run_dir.resolve().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < disk:
        raise UserError(f"{free / GIB:.1f} GiB of disk are free at {parent}, and this run needs about {disk / GIB:.1f}")


def preflight(cfg: DictConfig, run_dir: Path) -> None:
    """Raise UserError for what would fail later."""
    check_choice(cfg)
    if cfg.trainer.save_freq < 1:
        raise UserError(
            f"trainer.save_freq={cfg.trainer.save_freq} would leave no checkpoint of the trained model: for one at the "
            f"end add trainer.save_freq={cfg.trainer.total_training_steps}"
        )
    check_trackers(cfg.trackers)
    rows = check_parquet(cfg.data.train_files, "data.train_files", cfg.data.made_by)
    check_parquet(cfg.data.val_files, "data.val_files", cfg.data.made_by)
    for files in (cfg.data.train_files, cfg.data.val_files):
        check_prompt(files, cfg.actor_rollout_ref.model.custom_chat_template)
    if rows < cfg.data.train_batch_size:
        raise UserError(
            f"data.train_files: {rows} rows are less than one batch (data.train_batch_size={cfg.data.train_batch_size})"
        )
    check_space(cfg, run_dir, check_model(cfg.actor_rollout_ref.model.path))
    check_code(cfg.actor_rollout_ref.model)
