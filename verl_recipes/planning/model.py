"""A model's files and size, without torch, for the checks before a run starts."""

import json
import os
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data_prep.cli import CONFIGS, UserError

BYTES = {"fp32": 4, "float32": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2}
OF_MODELSCOPE = "of ModelScope"  # in place of a commit, so that a hub's model is not taken for it


@cache
def facts(name: str) -> dict[str, Any]:
    """The content of configs/facts/<name>.yaml."""
    return OmegaConf.to_container(OmegaConf.load(CONFIGS / "facts" / f"{name}.yaml"))  # type: ignore[return-value]


def uses_modelscope() -> bool:
    """Whether verl fetches models from ModelScope (verl/__init__.py)."""
    return os.environ.get("VERL_USE_MODELSCOPE", "").lower() == "true"


def missing_files(folder: Path) -> str:
    """Which of a model's files a folder lacks, as a clause; "" if it has all."""
    if not (folder / "config.json").is_file():
        return "no config.json"
    index = folder / "model.safetensors.index.json"
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index.is_file() else ()
    except (OSError, ValueError, LookupError, AttributeError):
        listed = ()  # run/model.py reports it
    gone = sorted(name for name in set(listed) if not (folder / name).is_file())
    if gone or not list(folder.glob("*.safetensors")):
        return f"no {gone[0] if gone else '*.safetensors'}"
    return ""


def is_hub_name(path: str) -> bool:
    """Whether it has the form of a model's name on a hub, OWNER/NAME."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path) is not None


def find_model(path: str) -> Path | None:
    """The folder with a model's files: `path`, or one in the Hugging Face cache; None if it has to be downloaded.

    Raises:
        UserError: the model is not here, and cannot be downloaded as far as is known without a network.
    """
    folder = Path(path)
    if folder.exists():
        if missing := missing_files(folder):
            raise UserError(f"{path} holds no model: {missing} in that folder")
        return folder
    if folder.parts[0] == "runs":
        raise UserError(f"there is no {path}; `python -m verl_recipes.runs` lists the runs")
    if folder.parts[0] == "models":  # where `fetch` and launch/middle.sh write; on a hub it is nobody's name
        raise UserError(f"there is no {path}: `bash launch/middle.sh` makes models/middle, verl_recipes.fetch others")
    if not is_hub_name(path):
        known = CONFIGS / "model" / f"{path}.yaml"
        why = f"{path} is a name of configs/model" if known.is_file() else "there is no such folder"
        raise UserError(
            f"{path} holds no model: {why}; a folder is wanted, such as assets/tiny_base, or a hub's OWNER/NAME"
        )
    if uses_modelscope():
        if find_spec("modelscope") is None:
            raise UserError("VERL_USE_MODELSCOPE=true needs the package modelscope: install it, or unset the variable")
        return None  # verl asks ModelScope, which has a cache of its own
    from huggingface_hub import is_offline_mode, try_to_load_from_cache

    found = try_to_load_from_cache(path, "config.json")
    cached = Path(found).parent if isinstance(found, str) else None
    if cached and not missing_files(cached):
        return cached
    if is_offline_mode():
        has = f"has {missing_files(cached)} of it" if cached else "does not hold it"
        raise UserError(
            f"{path} cannot be downloaded: HF_HUB_OFFLINE is set, and the Hugging Face cache (HF_HOME) {has}; unset "
            f"HF_HUB_OFFLINE, or run `hf download {path}` with a network"
        )
    return None


def check_hub(name: str) -> str | None:
    """Raise UserError if the Hugging Face Hub, or the mirror in HF_ENDPOINT, does not answer or lacks the model.

    Returns the model's commit, if the hub says one. ModelScope is not asked, and OF_MODELSCOPE stands for its commit.

    Hugging Face's own libraries would retry silently for minutes.
    """
    if uses_modelscope():
        return OF_MODELSCOPE
    import httpx
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    from data_prep import hub

    try:
        return get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=hub.TIMEOUT).commit_hash
    except HfHubHTTPError as error:
        raise UserError(
            f"{constants.ENDPOINT} refuses {name} ({str(error).splitlines()[0]}): check the name, or log in with "
            "`hf auth login` if the model requires it"
        ) from None
    # The latter three are of a proxy: SOCKS without the package for it, or an address that is none.
    except (OSError, httpx.HTTPError, ImportError, ValueError, httpx.InvalidURL) as error:
        raise UserError(
            f"{constants.ENDPOINT} does not answer, so {name} cannot be downloaded ({hub.in_one_clause(error)}); set "
            "HF_ENDPOINT to a mirror (https://hf-mirror.com in China), or actor_rollout_ref.model.path to a folder"
        ) from None


def count_in_files(folder: Path) -> int:
    """The number of parameters in a folder's safetensors files, from their headers."""
    from huggingface_hub import parse_local_safetensors_file_metadata as header

    return sum(
        sum(header(file).parameter_count.values())
        for file in folder.glob("*.safetensors")
        if file.name != "consolidated.safetensors"  # Mistral's own form of the same weights
    )


def parameter_count(cfg: DictConfig) -> int:
    """The number of parameters of a run's model, from its weights, else from configs/model; 0 for another of a hub."""
    path = cfg.actor_rollout_ref.model.path
    try:
        folder = find_model(path)
    except UserError:  # a checkpoint of verl's
        folder = None
    if folder:
        return count_in_files(folder)
    if cfg.get("architecture"):
        return int(cfg.architecture.parameters)
    return sum(file.stat().st_size for file in Path(path).glob("model_world_size_*.pt")) // 4  # in fp32


def needs_critic(cfg: DictConfig) -> bool:
    """Whether the run trains a critic, as verl decides it (verl.trainer.ppo.utils.need_critic)."""
    enabled = cfg.critic.enable
    return bool(enabled) if enabled is not None else cfg.algorithm.adv_estimator == "gae"
