"""A model's weights and prompt: found in a Hugging Face folder, a run or a checkpoint of verl's; weights converted."""

import re
import shutil
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data_prep.cli import UserError, compose
from data_prep.folder import replaced
from verl_recipes.run.checkpoints import actor_identity, last_checkpoint
from verl_recipes.run.fingerprint import read_config
from verl_recipes.run.folder import RunFolder, mark_of, read_json
from verl_recipes.run.hashes import DECIDING, SUMS, deciding_files, is_checkpoint, write_sums
from verl_recipes.run.log import last_error
from verl_recipes.run.supervise import protect


def run_of(path: Path) -> RunFolder | None:
    """The run that a path belongs to (its folder, its model or one of its checkpoints), or None."""
    for folder in (path, *path.absolute().parents, *path.resolve().parents):  # a link's place, and its target's
        if mark_of(folder) or ((folder / "config.yaml").is_file() and (folder / "samples").is_dir()):
            return RunFolder(folder)
    return None


def step_of(path: Path) -> int | None:
    """The step of the checkpoint that a path names or lies in, also through a link; None if there is none."""
    steps = re.findall(r"/global_step_(\d+)(?=/|$)", str(path.resolve()))
    return int(steps[-1]) if steps else None


def find_weights(path: Path) -> Path:
    """The folder that holds the weights: Hugging Face's, or `actor` of a checkpoint of verl's.

    Args:
        path: a Hugging Face folder, a run's folder (its model/, or else its last checkpoint), a checkpoint
            (global_step_20) or its actor. Anything else is returned as it is.
    """
    run = RunFolder(path)
    step = last_checkpoint(run.checkpoints)
    written = read_json(run.summary, "delete it, and the run's command writes it again") if run.summary.exists() else {}
    if run.model.is_dir() and written.get("steps", 0) >= step:
        return run.model
    if step:  # a model/ is then older than the last checkpoint
        path = run.checkpoints / f"global_step_{step}"
    return path / "actor" if (path / "actor").is_dir() else path


def check_replaced(model: Path) -> None:
    """Raise UserError if a run that goes on would delete something in its `model` folder that it did not write."""
    if model.is_symlink():
        raise UserError(f"{model} is a link, and the run would replace what it names: remove the link")
    ours = (*DECIDING, SUMS, "*.txt", "*.model", "*.md")
    if others := [each for each in model.glob("*") if not any(fnmatchcase(each.name, pattern) for pattern in ours)]:
        raise UserError(f"{others[0]} is not of the run, which would replace the folder: move it elsewhere")


def to_hugging_face(actor: Path, model: Path, log: Path) -> None:
    """Write the actor of a checkpoint of verl's to the folder `model` in Hugging Face's format, whole or not at all."""
    actor_identity(actor)
    with replaced(model) as folder:
        lora = (actor / "lora_train_meta.json").exists()
        if lora or not list((actor / "huggingface").glob("*.safetensors")):
            merge(actor, folder, log, lora)
        else:  # save_contents has hf_model
            shutil.copytree(actor / "huggingface", folder, dirs_exist_ok=True)
        write_sums(folder, deciding_files(folder))


def merge(actor: Path, folder: Path, log: Path, lora: bool) -> None:
    """Fill a folder with the merged weights of all ranks, and of a LoRA adapter and its base."""
    calls = [["verl.model_merger", "merge", "--backend=fsdp", f"--local_dir={actor}", f"--target_dir={folder}"]]
    calls += [["verl_recipes.run.merge_lora", str(folder)]] if lora else []
    for call in calls:
        with log.open("a", encoding="utf-8") as output:
            command = [sys.executable, "-m", *call]  # it ends with this process, else it would write where nobody looks
            if subprocess.run(command, stdout=output, stderr=output, preexec_fn=protect).returncode:
                raise UserError(f"{call[0]} failed on {actor}: {last_error(log)}")


def hugging_face(path: Path, scratch: Path, log: Path) -> Path:
    """The Hugging Face folder of the weights at `path`; a checkpoint of verl's is merged into `scratch`."""
    if not is_checkpoint(path):
        return path
    if not scratch.exists():
        to_hugging_face(path, scratch, log)
    return scratch


def find_prompt(name: str | None, model: Path, weights: Path) -> dict[str, Any]:
    """The prompt of that name. Without a name: the one beside an exported model, the run's, or tinyzero_base."""
    if name is None and (weights / "prompt.json").exists():
        return read_json(weights / "prompt.json", "export the model again")
    run = run_of(model)
    if name is None and run and run.config.exists() and "prompt" in (config := read_config(run.config)):
        return dict(config["prompt"])
    cfg = compose("render", [f"prompt={name or 'tinyzero_base'}", "tokenizer=none"])
    return OmegaConf.to_container(cfg.prompt, resolve=True)  # type: ignore[return-value]
