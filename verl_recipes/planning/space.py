"""The memory and disk that a run needs, compared with what is free. Both train and doctor use this estimate."""

import math
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
from omegaconf import DictConfig

from verl_recipes.planning.model import BYTES, facts, find_model, needs_critic, parameter_count, uses_modelscope
from verl_recipes.settings.configuration import gpus_of, needs_reference

GIB = 2**30


class Need(NamedTuple):
    """How much of a resource a run needs and how much is free, in bytes."""

    what: str
    need: float
    free: float
    of: str = ""  # what the need consists of

    def __str__(self) -> str:
        of = f" ({self.of})" if self.of else ""
        free = f"{self.free / GIB:.1f} GiB of {self.what} are free"
        return f"{free}, and about {self.need / GIB:.1f} are needed{of}"


def free_memory(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that programs can still allocate: by the kernel's estimate, and the limits of a container or a job.

    Args:
        groups: where the control groups are, version 2, or in memory/ version 1.
        own: names this process's group of version 2 (0::/path).
    """
    free = int(psutil.virtual_memory().available)
    path = re.search(r"^0::/(.*)$", own.read_text(encoding="utf-8") if own.exists() else "", re.M)
    mine = groups / (path[1] if path else "")
    names = ("memory.max", "memory.current", "inactive_file")
    limits = [(each, *names) for each in (mine, *mine.parents) if each.is_relative_to(groups)]
    limits.append((groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))
    for group, limit, used, cache in limits:
        with suppress(OSError, ValueError):  # there is no such file, or "max" in it: no limit
            most, held = (int((group / name).read_text(encoding="utf-8")) for name in (limit, used))
            droppable = re.search(rf"^{cache} (\d+)$", (group / "memory.stat").read_text(encoding="utf-8"), re.M)
            free = min(free, most - held + (int(droppable[1]) if droppable else 0))
    return free


def free_disk(folder: Path) -> int:
    """Bytes free in the file system where a folder is, or will be."""
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    return next(each for each in (folder, *folder.resolve().parents) if each.exists())


def _held(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_symlink() and file.is_file())


def _trained(cfg: DictConfig, count: int) -> Iterator[tuple[DictConfig, DictConfig, bool, float, float]]:
    """Of actor and critic: configuration, engine, whether only an adapter trains, bytes of weights, and of moments."""
    models = cfg.actor_rollout_ref
    sides = [(models.actor, models.actor.fsdp_config, models.model.lora_rank > 0)]
    if needs_critic(cfg):
        sides.append((cfg.critic, cfg.critic.fsdp, False))
    for worker, engine, lora in sides:
        weights = float(count * BYTES[engine.model_dtype or "fp32"])
        no_moments = lora or worker.optim.get("optimizer", "AdamW") == "SGD"  # those of an adapter count as 0
        yield worker, engine, lora, weights, 0.0 if no_moments else 2 * weights  # Adam's, in the type of the weights


def checkpoint_bytes(cfg: DictConfig, count: int) -> float:
    """Bytes of one checkpoint of a model with so many parameters, with the critic."""
    total = 0.0
    for worker, _, _, weights, moments in _trained(cfg, count):
        saved = worker.checkpoint.save_contents
        total += weights * (("model" in saved) + ("hf_model" in saved)) + moments * ("optimizer" in saved)
    return total


def checkpoints_at_once(cfg: DictConfig) -> int:
    """The most checkpoints that are on the disk at once: those that are kept, and one that is being written."""
    saves = math.ceil(cfg.trainer.total_training_steps / cfg.trainer.save_freq)
    keep = cfg.trainer.max_actor_ckpt_to_keep
    return min(keep + 1 + (cfg.get("keep") == "best"), saves) if keep and keep > 0 else saves


def samples_bytes(cfg: DictConfig, trains: bool) -> float:
    """What all samples of a run take on the disk; those of an evaluation are part of what logs take."""
    assumed, steps = facts("assumptions"), cfg.trainer.total_training_steps
    mean = cfg.plan.response_tokens or assumed["time"]["response_share"] * cfg.data.max_response_length
    each = assumed["disk"]["sample_bytes"] + assumed["disk"]["token_bytes"] * mean
    return trains * steps * cfg.data.train_batch_size * cfg.actor_rollout_ref.rollout.n * each


def disks(cfg: DictConfig, run_dir: Path, count: int, trains: bool) -> list[Need]:
    """What a run needs of each file system that it writes to, without what its folder already holds."""
    samples = max(0.0, samples_bytes(cfg, trains) - _held(run_dir / "samples"))
    wanted: list[tuple[Path, float, str]] = [(run_dir, GIB + samples, "")]  # 1 GiB is for logs
    if trains:
        one, number = checkpoint_bytes(cfg, count), checkpoints_at_once(cfg)
        folder = Path(cfg.trainer.default_local_dir)
        text = f"{number} checkpoints of {one / GIB:.1f} GiB"
        wanted.append((folder, max(0.0, number * one - _held(folder)), text if one > GIB else ""))
        width = 4 if "hf_model" in cfg.actor_rollout_ref.actor.checkpoint.save_contents else 2  # verl's merger: bf16
        wanted.append((run_dir, max(0.0, count * width - _held(run_dir / "model")), ""))
    if not uses_modelscope() and count and find_model(cfg.actor_rollout_ref.model.path) is None:
        from huggingface_hub.constants import HF_HUB_CACHE

        text = f"{2 * count / GIB:.1f} GiB of it for the model in {HF_HUB_CACHE}"
        wanted.append((Path(HF_HUB_CACHE), 2.0 * count, text))
    systems: dict[int, list[tuple[Path, float, str]]] = {}
    for each in wanted:
        systems.setdefault(_existing(each[0]).stat().st_dev, []).append(each)
    result = []
    for parts in systems.values():
        folders, sizes, texts = zip(*parts, strict=True)
        where, text = f"disk at {_existing(folders[0])}", ", ".join(filter(None, texts))
        result.append(Need(where, sum(sizes), free_disk(folders[0]), text))
    return result


def memory(cfg: DictConfig, count: int, trains: bool) -> Need:
    """What a run needs of the machine's memory.

    On a CPU, all states of training and a copy of the weights for each vLLM. On GPUs, the states that are offloaded,
    with another copy of a base that LoRA merges an adapter into. If they need more, the whole models of the start: verl
    loads one in each process if input and output share an embedding, else one.
    """
    assumed, models, nodes = facts("assumptions")["machine"], cfg.actor_rollout_ref, cfg.trainer.nnodes
    here = math.ceil(sum(gpus_of(cfg)) / nodes)
    on_cpu, lora = cfg.trainer.device == "cpu", models.model.lora_rank > 0
    states = 0.0
    for _, engine, frozen, weights, moments in _trained(cfg, count):
        if on_cpu:
            states += weights + trains * ((0 if frozen else weights) + moments)
        else:
            states += weights * bool(engine.param_offload or engine.offload_policy)
            states += moments * bool(engine.optimizer_offload or engine.offload_policy)
    if needs_reference(cfg) and not lora and (on_cpu or models.ref.fsdp_config.param_offload):
        states += count * BYTES[models.ref.fsdp_config.model_dtype or "fp32"]
    if on_cpu:
        processes = (assumed["cpu_gib"] + max(0, here - 2)) * GIB + here * count * BYTES[models.rollout.dtype]
    else:
        processes = assumed["gpu_gib"] * here * GIB
        weights = count * BYTES[models.actor.fsdp_config.model_dtype or "fp32"]
        states += weights * (lora and bool(models.actor.fsdp_config.param_offload))
        is_tied = (cfg.architecture or {}).get("tie_word_embeddings")
        states = max(states, weights * (gpus_of(cfg)[0] if is_tied else nodes))
    return Need("memory", processes + states / nodes, free_memory())


def needs(cfg: DictConfig, run_dir: Path, trains: bool = True) -> list[Need]:
    """Everything that a run needs of this machine; `trains` is false for a run that only evaluates."""
    count = parameter_count(cfg)
    return [memory(cfg, count, trains), *disks(cfg, run_dir, count, trains)]


def export_needs(cfg: DictConfig, out: Path, dtype: str) -> list[Need]:
    """What a copy of a run's model in another precision needs of the disk, where a checkpoint is merged, too."""
    actor = Path(cfg.actor_rollout_ref.model.path)
    copied = any(actor.glob("huggingface/*.safetensors"))  # of hf_model; verl's merger writes bfloat16
    merged = BYTES["float32" if copied else "bfloat16"] if any(actor.glob("model_world_size_*.pt")) else 0
    need = float(parameter_count(cfg) * (BYTES[dtype] + merged))
    return [Need(f"disk at {_existing(out)}", need, free_disk(out))]
