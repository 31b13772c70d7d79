"""Checks of a model before anything heavy starts: its files, its tokenizer, its kind and its size."""

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from safetensors import SafetensorError, safe_open

from data_prep.cli import UserError
from data_prep.hub import MIRROR, in_one_clause
from verl_recipes.planning.model import check_hub, find_model, uses_modelscope
from verl_recipes.run.checkpoints import actor_identity
from verl_recipes.run.folder import read_json, read_object
from verl_recipes.run.hashes import SUMS, compared, is_checkpoint
from verl_recipes.settings.configuration import longest

# verl 0.9.1 reads num_key_value_heads of every model (models/transformers/monkey_patch.py); these have none.
UNKNOWN = ("bloom", "falcon", "gpt2", "gpt_neox", "gptj", "mpt", "opt", "persimmon", "xglm")


def check_readable(file: Path) -> None:
    """Raise UserError if this user may not read a file, which would else be called damaged."""
    if not os.access(file, os.R_OK):
        raise UserError(f"{file} cannot be read by this user: give yourself read permission (chmod, or its owner)")


def check_model(path: str) -> dict[str, str]:
    """Raise UserError if a file of the model is damaged, or if no hub that answers has the model.

    Args:
        path: a folder, the `actor` of a checkpoint of verl's, or a hub's name.

    Returns:
        What identifies the model: the SHA-256 of its files, or the commit of a hub's, {} if that is not known.
    """
    if is_checkpoint(Path(path)):
        return actor_identity(Path(path))
    folder = find_model(path)
    if folder is None:
        commit = check_hub(path)
        return {"revision": commit} if commit else {}
    for file in [*folder.glob("*.json"), *folder.glob("*.safetensors")]:
        check_readable(file)
    for file in folder.glob("*.json"):
        read_json(file, "fetch or export the model again")
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "numpy"):
                pass
        except SafetensorError as error:
            raise UserError(f"{file} is damaged ({error}); fetch or export the model again") from None
    if not Path(path).exists():
        return {"revision": folder.name}  # a snapshot of the cache
    hashes, wrong = compared(folder)
    if wrong:
        raise UserError(f"{wrong}; fetch or export the model again, or delete {SUMS} if you changed it yourself")
    return hashes


def tokenizer_folder(path: str) -> Path | None:
    """The folder with the tokenizer of a model, as `check_model` takes it; None if it is not on this machine."""
    return Path(path) / "huggingface" if is_checkpoint(Path(path)) else find_model(path)


def small_files(model: Path) -> Path:
    """The folder with a model's configuration and tokenizer; those of a hub's model are fetched, without its weights.

    Raises:
        UserError: a hub does not have them, or does not answer.
    """
    if folder := tokenizer_folder(str(model)):
        return folder
    wanted, commit = ["*.json", "*.jinja", "*.model", "*.txt"], check_hub(str(model))
    try:
        if uses_modelscope():
            from modelscope.hub.snapshot_download import snapshot_download as of_modelscope

            return Path(of_modelscope(str(model), allow_patterns=wanted))
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(model), revision=commit, allow_patterns=wanted))
    except Exception as error:  # the clients raise whatever their parts do
        raise UserError(f"the tokenizer of {model} cannot be fetched ({in_one_clause(error)}); {MIRROR}") from None


def check_tags(path: str) -> None:
    """Raise UserError if a tag of the prompts is a special token: verl removes those before it scores a response."""
    from data_prep.render import TAGS, special_tags_advice

    folder = tokenizer_folder(path)
    file = folder / "tokenizer.json" if folder else None
    if file is None or not file.is_file():
        return  # loading the tokenizer itself would take seconds
    added = read_json(file, "fetch or export the model again").get("added_tokens") or []
    special = {token.get("content") for token in added if token.get("special")}
    if tags := [tag for tag in TAGS if tag in special]:
        raise UserError(special_tags_advice(tags, path))


def check_code(model: DictConfig) -> None:
    """Raise UserError if the model brings code that the configuration does not trust.

    verl's reward worker loads tokenizers with trust_remote_code=True all the same. In a checkpoint of verl's, the files
    are in actor/huggingface.
    """
    folder = Path(model.path)
    if not folder.exists():
        folder = find_model(model.path) or folder
    for file in [*folder.glob("*.json"), *folder.glob("huggingface/*.json"), *folder.glob("actor/huggingface/*.json")]:
        if "auto_map" in read_json(file, "fetch or export the model again") and not model.trust_remote_code:
            raise UserError(
                f"{file} asks to run code that comes with the model (auto_map): read it, and if you trust it, add "
                "actor_rollout_ref.model.trust_remote_code=true"
            )


def config_of(folder: Path) -> dict[str, Any]:
    """The config.json of a model or checkpoint, {} without one; the keys of a `text_config` in it come first."""
    config = read_object((folder / "huggingface" if is_checkpoint(folder) else folder) / "config.json")
    return config | (config.get("text_config") or {})


def check_kind(model: DictConfig) -> None:
    """Raise UserError for a model that verl 0.9.1 cannot train, which it would say after the start or not at all."""
    folder = tokenizer_folder(model.path)
    config = config_of(folder) if folder else {}
    if (kind := config.get("model_type")) in UNKNOWN:
        raise UserError(f"{model.path} is a {kind}, which verl 0.9.1 cannot train: take a newer kind, such as Qwen's")
    if quantized := config.get("quantization_config"):
        raise UserError(
            f"{model.path} is quantized ({quantized.get('quant_method')}), and verl trains no such weights: take the "
            "model in 16 bits that it was made from"
        )
    kinds = config.get("layer_types")  # if it is there, it decides: Granites without such layers have Mamba's keys, too
    mixes = {"conv", "mamba"} & {*kinds} if kinds else any(key.startswith("mamba_") for key in config)
    if model.use_remove_padding and mixes:
        raise UserError(
            f"{model.path} has convolutions or Mamba's layers, which read on into the next of packed sequences: add "
            "actor_rollout_ref.model.use_remove_padding=false, and critic.model.use_remove_padding=false with PPO"
        )


def check_beginning(model: DictConfig) -> None:
    """Raise UserError if the model's texts begin with a token that the prompt's chat template does not write."""
    template, folder = model.custom_chat_template, tokenizer_folder(model.path)
    file = folder / "tokenizer.json" if folder else None
    if template is None or "bos_token" in template or file is None or not file.is_file():
        return
    if read_object(file.with_name("tokenizer_config.json")).get("add_bos_token") is False:
        return  # transformers then leaves out what tokenizer.json adds
    steps = read_json(file, "fetch or export the model again").get("post_processor") or {}
    firsts = [(step.get("single") or [{}])[0] for step in steps.get("processors", [steps])]
    token = next((each["SpecialToken"]["id"] for each in firsts if "SpecialToken" in each), None)
    if token and token not in template:
        raise UserError(
            f"texts of {model.path} begin with {token}, which the prompt's chat template does not write: take a prompt "
            "that does, such as prompt=tinyzero_base_bos, and make the data with it"
        )


def positions_of(folder: Path) -> int | None:
    """The tokens of the longest sequence of a model or checkpoint; None if it does not say.

    verl 0.9.1 takes no more than the configuration says, even if the model stretches its positions
    (workers/rollout/utils.py).
    """
    return config_of(folder).get("max_position_embeddings")


def check_context(cfg: DictConfig) -> None:
    """Raise UserError if the model has no positions for the longest sequence: vLLM would end responses there."""
    path = cfg.actor_rollout_ref.model.path
    folder = tokenizer_folder(path)
    most = positions_of(folder) if folder else None
    if most and longest(cfg) > most:
        raise UserError(
            f"data.max_prompt_length={cfg.data.max_prompt_length} and data.max_response_length="
            f"{cfg.data.max_response_length} are more than the {most} positions of {path}: lower one of them"
        )
    if (room := cfg.actor_rollout_ref.rollout.get("max_model_len")) and room < longest(cfg):
        raise UserError(
            f"actor_rollout_ref.rollout.max_model_len={room} is less than the {longest(cfg)} tokens of "
            "data.max_prompt_length and data.max_response_length: vLLM would end responses there; raise it, or lower "
            "one of them"
        )


def check_same_model(cfg: DictConfig) -> None:
    """Raise UserError if the path is of another model than `model=`, whose sizes, prompt and data the run has."""
    path, known = cfg.actor_rollout_ref.model.path, cfg.architecture
    if not known:
        return
    try:
        folder = tokenizer_folder(path)
    except UserError:  # `check_weights` says so, and a plan needs no model
        return
    config = config_of(folder) if folder else {}
    sizes = {key: config[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers") if key in config}
    is_on_no_hub = known.parameters < 1e7  # the tiny and the middle model
    if any(size != known.get(key) for key, size in sizes.items()) or (not folder and is_on_no_hub):
        raise UserError(
            f"actor_rollout_ref.model.path={path} is not the model that model= names, whose sizes, prompt and data the "
            "run would have: add model=local, or that model's name"
        )


def check_weights(model: DictConfig) -> dict[str, str]:
    """Raise UserError if the model is unusable; returns its identity (`check_model`)."""
    check_code(model)
    check_tags(model.path)
    return check_model(model.path)
