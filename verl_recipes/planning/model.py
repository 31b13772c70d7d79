"""A model's files and size, without torch: `train` asks before it starts anything."""

import json
import os
import re
from functools import cache
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data_prep.cli import CONFIGS, UserError

BYTES = {"fp32": 4, "float32": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2}
ON = ("1", "on", "yes", "true")  # as huggingface_hub reads its environment variables


@cache
def facts(name: str) -> dict[str, Any]:
    """The content of configs/facts/<name>.yaml."""
    return OmegaConf.to_container(OmegaConf.load(CONFIGS / "facts" / f"{name}.yaml"))  # type: ignore[return-value]


def offline() -> bool:
    """Whether Hugging Face's libraries are told not to use the network."""
    return any(os.environ.get(name, "").lower() in ON for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def from_modelscope() -> bool:
    """Whether verl fetches models from ModelScope (verl/__init__.py)."""
    return os.environ.get("VERL_USE_MODELSCOPE", "").lower() == "true"


def missing_files(folder: Path) -> str:
    """What a folder lacks of a model's files, as a clause; "" for nothing."""
    if not (folder / "config.json").is_file():
        return "no config.json"
    index = folder / "model.safetensors.index.json"
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index.is_file() else ()
    except (OSError, ValueError, LookupError, AttributeError):
        listed = ()  # the reader of all JSON files names it
    gone = sorted(name for name in set(listed) if not (folder / name).is_file())
    if gone or not list(folder.glob("*.safetensors")):
        return f"no {gone[0] if gone else '*.safetensors'}"
    return ""


def find_model(path: str) -> Path | None:
    """The folder with a model's files: `path`, or where the Hugging Face cache has it; None if it is to be fetched.

    Raises:
        UserError: it is neither here nor, as far as can be known without a network, to be fetched.
    """
    folder = Path(path)
    if folder.exists():
        if missing := missing_files(folder):
            raise UserError(f"{path} holds no model: {missing} in that folder")
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        raise UserError(f"{path} holds no model: there is no such folder, and OWNER/NAME is the form of a hub's name")
    if from_modelscope():
        if find_spec("modelscope") is None:
            raise UserError("VERL_USE_MODELSCOPE=true needs the package modelscope: install it, or unset the variable")
        return None  # verl asks ModelScope, which has a cache of its own
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, "config.json")
    cached = Path(found).parent if isinstance(found, str) else None
    if cached and not missing_files(cached):
        return cached
    if offline():
        has = f"has {missing_files(cached)} of it" if cached else "does not hold it"
        raise UserError(
            f"{path} cannot be fetched: HF_HUB_OFFLINE is set, and the Hugging Face cache (HF_HOME) {has}; unset "
            f"HF_HUB_OFFLINE, or run `hf download {path}` where there is a network"
        )
    return None


def check_hub(name: str) -> None:
    """Hugging Face's hub, or the mirror that HF_ENDPOINT names, answers and has a model.

    Its libraries would try again and again, and say nothing for minutes.
    """
    if from_modelscope():
        return
    import httpx
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=10)
    except HfHubHTTPError as error:
        raise UserError(
            f"{constants.ENDPOINT} does not give {name} ({str(error).splitlines()[0]}): check the name, or log in with "
            "`hf auth login` if the model asks for that"
        ) from None
    except (OSError, httpx.HTTPError, ImportError) as error:  # ImportError: a SOCKS proxy without the package for it
        raise UserError(
            f"{constants.ENDPOINT} does not answer, and {name} is to be fetched from there ({error}); set HF_ENDPOINT "
            "to a mirror (https://hf-mirror.com in China), or actor_rollout_ref.model.path to a folder"
        ) from None


def count_in_files(folder: Path) -> int:
    """The number of parameters in a folder's safetensors files, from their headers."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as content:
            header = json.loads(content.read(int.from_bytes(content.read(8), "little")))
        count += sum(prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return count


def count_by_shape(shape: Any) -> int:
    """Parameters of a dense decoder by its config.json, biases and norms of heads left out.

    >>> shape = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 10}
    >>> count_by_shape(shape | {"num_hidden_layers": 1, "tie_word_embeddings": True})
    744
    """
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    head = shape.get("head_dim") or hidden // heads
    key_value = shape.get("num_key_value_heads") or heads
    layer = 2 * hidden * head * (heads + key_value) + 3 * hidden * shape["intermediate_size"] + 2 * hidden
    embeddings = shape["vocab_size"] * hidden * (1 if shape.get("tie_word_embeddings") else 2)
    return int(embeddings + shape["num_hidden_layers"] * layer + hidden)


def parameter_count(cfg: DictConfig) -> int:
    """The number of parameters of a run's model; 0 if nothing here says: a hub's model that no file of ours describes.

    From its weights if they are here, else as configs/model records it, else from its config.json.
    """
    path = cfg.actor_rollout_ref.model.path
    try:
        folder = find_model(path)
    except UserError:  # the folder of a checkpoint, which holds a config.json alone
        folder = None
    if folder:
        return count_in_files(folder)
    if cfg.get("architecture"):
        return int(cfg.architecture.parameters)
    file = Path(path) / "config.json"
    try:
        return count_by_shape(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else 0
    except (ValueError, LookupError):
        return 0


def needs_critic(cfg: DictConfig) -> bool:
    enabled = cfg.critic.enable
    return bool(enabled) if enabled is not None else cfg.algorithm.adv_estimator == "gae"
