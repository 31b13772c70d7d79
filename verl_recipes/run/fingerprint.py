"""Compares a command with the run in its folder: everything that the run's numbers depend on, key by key.

The whole resolved configuration is compared with the run's config.yaml, and the hashes of data and model files with its
run.json. A difference ends the command, unless the key is one of MAY_CHANGE.
"""

import platform
import re
import subprocess
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from data_prep.cli import CONFIGS, UserError
from data_prep.folder import file_sha256
from verl_recipes.run.best import best_step, evaluations
from verl_recipes.run.checkpoints import last_checkpoint, old_steps
from verl_recipes.run.folder import RunFolder, mark_of, write_whole
from verl_recipes.run.preflight import Inputs

# Keys that may change when a run continues. They decide how long the run is, what is kept and reported, and how the
# work is spread over the machine; numbers change only by rounding. docs/reliability.md lists them; a test compares.
MAY_CHANGE = (
    *("fresh", "force", "plan.*", "run_dir", "versions.*"),
    *("trainer.total_training_steps", "data.curriculum.steps", "trainer.total_epochs"),
    *("trainer.save_freq", "trainer.test_freq", "keep", "patience", "trainer.v1.sampler.sampler_kwargs.patience"),
    *("trainer.restarts", "trainer.max_*_ckpt_to_keep", "trainer.logger", "trackers.*", "trainer.project_name"),
    *("trainer.default_local_dir", "trainer.v1.sampler.sampler_kwargs.checkpoints_dir"),
    *("trainer.v1.sampler.sampler_kwargs.samples_dir", "trainer.v1.sampler.sampler_kwargs.alarm.*"),
    *("ray_kwargs.*", "transfer_queue.*", "global_profiler.*", "*.profiler.*", "card.*"),
    *("*.param_offload", "*.optimizer_offload", "*.offload_policy", "*.enable_gradient_checkpointing"),
    *("*micro_batch_size*", "*max_token_len_per_gpu", "*.gpu_memory_utilization", "*.max_num_seqs"),
    *("gpus", "nodes", "*.nnodes", "*.n_gpus_per_node", "*.tensor_model_parallel_size"),
    *("*.max_num_batched_tokens", "*.enforce_eager", "*.free_cache_engine", "*.update_weights_bucket_megabytes"),
)
PACKAGES = ("verl", "vllm", "ray", "torch", "transformers", "tensordict")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that the numbers depend on."""
    return {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}


def provenance() -> dict[str, Any]:
    """What produced the numbers: versions, and the commit of this checkout (None without a checkout or without git)."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(CONFIGS.parent), *arguments]
        return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace").stdout.strip()

    try:
        ours = Path(git("rev-parse", "--show-toplevel")).resolve() == CONFIGS.parent  # and not a repository around it
        commit = git("describe", "--always", "--dirty", "--abbrev=40") if ours else None
    except OSError:  # no such program
        commit = None
    return {"versions": versions(), "git_commit": commit or None}


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, each with its dotted key; a list is a leaf."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def comparable(config: dict[str, Any]) -> dict[str, Any]:
    """A resolved configuration by dotted key. Paths below the run's folder are relative, as the folder may be moved."""
    below = re.compile(rf"^(sqlite:///)?{re.escape(str(config.get('run_dir')))}(?=/|$)")
    return {key: below.sub(r"\1${run_dir}", value) if isinstance(value, str) else value for key, value in flat(config)}


def unslashed(value: Any) -> Any:
    """A value without the slash that the Tab key writes after a folder."""
    return value.rstrip("/") if isinstance(value, str) else value


def may_change(key: str) -> bool:
    """Whether a run goes on if this key differs."""
    return any(fnmatchcase(key, pattern) for pattern in MAY_CHANGE)


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A clause for each key that differs and is not one of MAY_CHANGE: its name, the old value and the new one.

    >>> differences({"seed": 0, "fresh": False}, {"seed": 1, "fresh": True})
    ['seed was 0 and is 1 now']
    """
    found = []
    for key in dict.fromkeys([*before, *now]):
        if unslashed(before.get(key)) != unslashed(now.get(key)) and not may_change(key):
            was, becomes = (shortened(side[key]) if key in side else "not set" for side in (before, now))
            found.append(f"{key} was {was} and is {becomes} now")
    return found


def depends_on_steps(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A clause for each number of steps that differs and that every step depends on: by learning rate or curriculum."""
    found, follows = [], False
    was, steps = (side.get("trainer.total_training_steps") for side in (before, now))
    for optim in ("actor_rollout_ref.actor.optim", "critic.optim"):
        # verl's former name of the schedule wins.
        schedule = now.get(f"{optim}.warmup_style") or now.get(f"{optim}.lr_scheduler_type", "constant")
        follows = follows or schedule != "constant" or bool(now.get(f"{optim}.lr_warmup_steps_ratio"))
    if steps != was and follows:
        found.append(f"trainer.total_training_steps was {was} and is {steps} now, and the learning rate depends on it")
    was, steps = (side.get("data.curriculum.steps") for side in (before, now))
    if was and steps != was and now.get("data.curriculum.order") == "easy_to_hard":
        found.append(
            f"data.curriculum.steps was {was} and is {steps} now, and the order of curriculum=easy_to_hard depends on "
            f"it (data.curriculum.steps={was} keeps that order, and later steps take mostly the hardest problems)"
        )
    return found


def removed_by(config: dict[str, Any], folder: RunFolder) -> set[int]:
    """The steps of the checkpoints that a run with this configuration, by dotted key, would remove."""
    best = best_step(evaluations(folder)) if config.get("keep") == "best" else 0
    return set(old_steps(folder.checkpoints, config.get("trainer.max_actor_ckpt_to_keep"), best))


def shortened(value: Any) -> str:
    """A value as text, without its middle if it is longer than 60 characters."""
    text = repr(value) if isinstance(value, str) and not value.strip() else str(value)
    return text if len(text) <= 60 else f"{text[:30]}...{text[-30:]}"


def read_config(path: Path) -> dict[str, Any]:
    """A resolved configuration that a run wrote."""
    config = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return config if isinstance(config, dict) else {}


def reward_of(config: dict[str, Any]) -> dict[str, str]:
    """The SHA-256 of the user's own reward function by its file, {} if the configuration names none."""
    file = (config["reward"]["custom_reward_function"]["path"] or "").removeprefix("file://")
    return {file: file_sha256(Path(file))} if Path(file).is_file() else {}


def facts_of(config: dict[str, Any], inputs: Inputs) -> dict[str, Any]:
    """What the numbers of a run depend on besides its configuration."""
    return {
        "train_files": inputs.train.sha256,
        "val_files": inputs.val.sha256,
        "model": inputs.model,
        "reward": reward_of(config),
        "versions": versions(),
    }


def begin(
    kind: str, cfg: DictConfig, run: RunFolder, inputs: Inputs, say: Callable[[str], None], check: Callable[[int], None]
) -> None:
    """Mark the folder as one of this kind and this command's, or check that it is; fresh=true empties it first.

    Args:
        check: raises UserError if the run cannot go on from its last checkpoint, whose step it gets (0 for none). The
            folder keeps what it recorded then.
    """
    run.check_kind(kind)
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    facts = facts_of(config, inputs)
    if cfg.fresh:
        files = (facts[name] for name in ("train_files", "val_files", "reward"))
        run.empty(say, [cfg.actor_rollout_ref.model.path, *(name for each in files for name in each)])
    check_unchanged(run, config, facts)
    check(last_checkpoint(run.checkpoints))
    run.write_mark(kind, **facts)
    write_whole(run.config, OmegaConf.to_yaml(config))


def check_unchanged(folder: RunFolder, config: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raise UserError if the run in the folder is not the one that the command asks for; the message names each key.

    Args:
        config, facts: the command's resolved configuration, and `facts_of` it.
    """
    if not folder.config.exists():
        return  # it was ended before it wrote one
    before, now = comparable(read_config(folder.config)), comparable(config)
    found = differences(before, now)
    mark = mark_of(folder.path)
    if not (mark.get("model") and facts.get("model")):  # a hub's model whose revision was or is not known
        facts = {name: value for name, value in facts.items() if name != "model"}
    found += differences(*(dict(flat({name: side.get(name, {}) for name in facts})) for side in (mark, facts)))
    found += depends_on_steps(before, now)
    if fewer := removed_by(now, folder) - removed_by(before, folder):
        keys = ("keep", "trainer.max_actor_ckpt_to_keep")
        were, are = (", ".join(f"{key}={side.get(key)}" for key in keys) for side in (before, now))
        steps = ", ".join(map(str, sorted(fewer)))
        found.append(f"its checkpoints were kept by {were}, and {are} would remove those of steps {steps}")
    if found:
        more = f" and {len(found) - 6} more" if len(found) > 6 else ""
        raise UserError(
            f"{folder.path} holds another run: {'; '.join(found[:6])}{more}. Set it back, name=another for a new run, "
            "or fresh=true to start this one anew"
        )
