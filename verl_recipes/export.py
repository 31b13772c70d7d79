"""python -m verl_recipes.export run=runs/tiny-seed0 dtype=bfloat16: a run's model as a Hugging Face folder to share.

    README.md                  model card, filled from the run: recipe, data, results with intervals, limits
    config.json, *.safetensors the weights in the chosen precision
    generation_config.json     the sampling and the longest response of training
    tokenizer*, chat_template.jinja  with the template that the prompt needs
    prompt.json                the prompt, for verl_recipes.play
    SHA256SUMS                 `sha256sum -c SHA256SUMS` checks the weights and what decides how they are used

transformers and `vllm serve` load it.

    python -m verl_recipes.export run=runs/tiny-seed0
    python -m verl_recipes.export run=runs/tiny-seed0/checkpoints/global_step_20 dtype=float32 out=step20
"""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from pydantic import Field
from rich.console import Console

from data_prep import SHIPPED
from data_prep.cli import Checked, PathText, Text, UserError, as_list, command
from data_prep.folder import replaced
from data_prep.hub import in_one_clause
from reward_score.figures import interval
from verl_recipes.planning.model import is_hub_name
from verl_recipes.run.checkpoints import last_checkpoint
from verl_recipes.run.fingerprint import provenance
from verl_recipes.run.folder import RunFolder, mark_of, read_json, read_lines, read_object
from verl_recipes.run.hashes import deciding_files, write_sums
from verl_recipes.run.preflight import check_export, manifest_beside
from verl_recipes.run.start import say
from verl_recipes.run.weights import find_weights, hugging_face, run_of, step_of

CARD = Path(__file__).parent / "reporting" / "model_card.md.jinja"


class Keys(Checked):
    run: PathText = Field(
        description="a run's folder, or one of its checkpoints: runs/tiny-seed0/checkpoints/global_step_20"
    )
    out: PathText | None = Field(description="folder to write; null: export-<dtype> in the run's folder")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(description="of the weights")
    upload: Text | None = Field(description="a repository of the Hugging Face Hub, name/model; needs `hf auth login`")
    private: bool = Field(description="whether a new repository is private")


def find_run(path: Path) -> tuple[RunFolder, int]:
    """The run and the step that a path belongs to: a run's folder, or one of its checkpoints."""
    run = run_of(path)
    if run is None or mark_of(run.path).get("kind", "run") != "run":
        raise UserError(
            f"run={path} is neither a run's folder nor in one: run.json, config.yaml and samples/ are expected; "
            "model/ of a warm start needs no export"
        )
    step = step_of(path)
    if step is None:  # of a complete run without checkpoints, model/ is the last step
        step = last_checkpoint(run.checkpoints) or read_object(run.summary).get("steps", 0)
    return run, step


def results(run: RunFolder, steps: list[int]) -> dict[int, dict[str, Any]]:
    """The figures of the run's own evaluations, for those steps that have one."""
    from verl_recipes.measure.evaluation import measure

    files = {step: run.samples_of("validation", step) for step in steps}
    return {step: measure(read_lines(file)) for step, file in files.items() if file.exists()}


def data_of(training: DictConfig) -> dict[str, Any]:
    """The manifest of the training data."""
    return {"files": {}, "source": None} | manifest_beside(Path(as_list(training.data.train_files)[0]))


def base_of(path: str) -> dict[str, str | None]:
    """The base model's `name` on a hub, None for a folder; and its `licence`, None if no card at hand has one.

    A folder that has gone has none, and a card that cannot be read tells none: the run's own weights are exported.
    """
    from huggingface_hub import ModelCard, try_to_load_from_cache

    folder = Path(path)
    if folder.resolve() == (SHIPPED / "assets" / "tiny_base").resolve():
        return {"name": None, "licence": "apache-2.0"}  # this project's own
    on_hub = not folder.is_dir() and is_hub_name(path)
    found = try_to_load_from_cache(path, "README.md") if on_hub else folder / "README.md"
    try:
        card = ModelCard.load(found) if isinstance(found, str | Path) and Path(found).exists() else None
    except (OSError, ValueError, yaml.YAMLError):
        card = None
    return {"name": path if on_hub else None, "licence": card.data.license if card else None}


def as_words(value: Any) -> str:
    """A setting as a reader wants it: lists and mappings without Python's brackets and quotes."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {as_words(each)}" for key, each in value.items() if each not in ([], {}))
    if isinstance(value, list):
        return ", ".join(map(as_words, value))
    if value is None:
        return "not set"
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def model_card(run: RunFolder, step: int, training: DictConfig, name: str, dtype: str) -> str:
    """The README.md of an export."""
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"figure": interval, "words": as_words}
    return environment.from_string(CARD.read_text(encoding="utf-8")).render(
        name=name,
        step=step,
        dtype=dtype,
        config=training,
        base=base_of(training.actor_rollout_ref.model.path),
        data=data_of(training),
        results=results(run, sorted({0, step})),
        serve_options=serve_options(training),
        messages=OmegaConf.to_container(training.prompt.messages) if "prompt" in training else [],
        made_with=read_json(run.summary, "the run's command writes it again") if run.summary.exists() else provenance(),
    )


def generation_settings(training: DictConfig) -> dict[str, Any]:
    """The settings with which `generate` samples as training did, instead of the base model's own."""
    rollout = training.actor_rollout_ref.rollout
    return {
        "do_sample": True,
        "temperature": rollout.temperature,
        "top_p": rollout.top_p,
        "top_k": max(rollout.top_k, 0),  # "all tokens" is 0 in transformers, and -1 in vLLM and verl
        "min_p": None,
        "typical_p": None,
        "repetition_penalty": 1.0,  # of every rollout, whatever the configuration says (verl's agent loop)
        "max_new_tokens": training.data.max_response_length,
    }


def serve_options(training: DictConfig) -> str:
    """What `vllm serve` has to be given besides the folder: the options of the prompt's chat template, if any."""
    options = training.data.get("apply_chat_template_kwargs")
    return f" --default-chat-template-kwargs {shlex.quote(json.dumps(dict(options)))}" if options else ""


def export(path: Path, out: Path, dtype: str) -> DictConfig:
    """Write the folder `out`, whole or not at all. Returns the run's configuration."""
    run, step = find_run(path)
    if out.exists():
        raise UserError(f"{out} exists; name another folder with out=")
    training = OmegaConf.load(run.config)
    assert isinstance(training, DictConfig)
    weights = find_weights(path)
    exported = OmegaConf.merge(training, {"actor_rollout_ref": {"model": {"path": str(weights)}}})
    check_export(cast(DictConfig, exported), out, dtype)
    import torch  # not at the top: a mistake in the command should not cost seconds
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with replaced(out, new_only=True) as folder:
        beside = folder.parent  # on the disk of `out`; the next export removes what a killed one left there
        source = hugging_face(weights, beside / "merged", beside / "log.txt")
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=getattr(torch, dtype),
            trust_remote_code=training.actor_rollout_ref.model.get("trust_remote_code", False),
        )
        model.generation_config.update(**generation_settings(training))
        model.save_pretrained(folder)
        # Copied, not saved by transformers: it would write another pre-tokenizer beside a qwen2 model.
        others = ("*.safetensors*", "*.bin*", "config.json", "generation_config.json", "README.md")
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*others), dirs_exist_ok=True)
        texts = {"README.md": model_card(run, step, training, out.name, dtype)}
        if (template := training.actor_rollout_ref.model.custom_chat_template) is not None:
            texts["chat_template.jinja"] = template
        if "prompt" in training:
            prompt = OmegaConf.to_container(training.prompt)
            texts["prompt.json"] = json.dumps(prompt, indent=2, ensure_ascii=False) + "\n"
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        write_sums(folder, deciding_files(folder))
    return training


def upload(folder: Path, repository: str, private: bool) -> str:
    """Upload the folder; returns the address of the model."""
    import httpx
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder).repo_url)
    except (OSError, ValueError, ImportError, httpx.HTTPError, httpx.InvalidURL) as error:  # its own, or of a proxy
        again = f"`hf upload {repository} {folder}{' --private' if private else ''}` tries again"
        raise UserError(
            f"{folder} was written, and upload={repository} failed: {in_one_clause(error)}; {again}"
        ) from None


@command("export", Keys)
def main(cfg: DictConfig) -> None:
    console, path = Console(), Path(cfg.run)
    out = Path(cfg.out) if cfg.out else find_run(path)[0].path / f"export-{cfg.dtype}"
    training = export(path, out, cfg.dtype)
    say(console, f"{out}: {' '.join(sorted(file.name for file in out.iterdir()))}")
    say(console, f"python -m verl_recipes.play model={out}    or    vllm serve {out}{serve_options(training)}")
    if cfg.upload:
        say(console, upload(out, cfg.upload, cfg.private))


if __name__ == "__main__":
    main()
