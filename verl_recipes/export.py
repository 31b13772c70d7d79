"""python -m verl_recipes.export run=runs/tiny-seed0 dtype=bfloat16: a checkpoint as a Hugging Face folder to give away.

    README.md                  model card, filled from the run: recipe, data, results with intervals, limits
    config.json, *.safetensors the weights in the asked precision
    generation_config.json     the sampling of training, and its longest response
    tokenizer*, chat_template.jinja  with the template that the prompt needs
    prompt.json                the prompt's messages, for verl_recipes.play

It loads in transformers and in `vllm serve`.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import HfApi
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from data_prep.cli import Checked, UserError, command
from data_prep.folder import replaced
from verl_recipes.evaluate import find_weights, hugging_face, run_of, text
from verl_recipes.measure.evaluation import measure
from verl_recipes.measure.summary import read_samples
from verl_recipes.run.checkpoints import last_checkpoint
from verl_recipes.run.preflight import check_model
from verl_recipes.train import provenance

DTYPES = ("bfloat16", "float16", "float32")
CARD = Path(__file__).parent / "reporting" / "model_card.md.jinja"


def find_run(path: Path) -> tuple[Path, int]:
    """The run's folder and the step of a path to it or to one of its checkpoints."""
    if (run_dir := run_of(path)) is None:
        raise UserError(f"run={path} is neither a run's folder nor in one: config.yaml and samples/ are expected there")
    steps = [int(part.removeprefix("global_step_")) for part in path.parts if part.startswith("global_step_")]
    return run_dir, steps[0] if steps else last_checkpoint(run_dir)


def results(run_dir: Path, steps: list[int]) -> dict[int, dict[str, Any]]:
    """What the run's own evaluations say, of those steps that have one."""
    files = {step: run_dir / "samples" / "validation" / f"{step}.jsonl" for step in steps}
    return {step: measure(read_samples(file)) for step, file in files.items() if file.exists()}


def data_of(training: DictConfig) -> dict[str, Any]:
    """What the data folder's manifest says of it."""
    files = training.data.train_files
    manifest = Path(files if isinstance(files, str) else files[0]).parent / "manifest.json"
    return {"files": {}, "source": None} | (json.loads(manifest.read_text()) if manifest.exists() else {})


def model_card(run_dir: Path, step: int, training: DictConfig, name: str, dtype: str) -> str:
    """README.md of the export."""
    summary = run_dir / "summary.json"
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["figure"] = text
    return environment.from_string(CARD.read_text()).render(
        name=name,
        step=step,
        dtype=dtype,
        config=training,
        data=data_of(training),
        results=results(run_dir, sorted({0, step})),
        messages=OmegaConf.to_container(training.prompt.messages) if "prompt" in training else [],
        made_with=json.loads(summary.read_text()) if summary.exists() else provenance(),
    )


def export(path: Path, out: Path, dtype: str) -> None:
    """Write the folder `out`, whole or not at all."""
    run_dir, step = find_run(path)
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype}: one of {', '.join(DTYPES)} is possible")
    if out.exists():
        raise UserError(f"{out} exists; name another folder with out=")
    import torch  # not above: a mistake in the command need not wait for them
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    training = OmegaConf.load(run_dir / "config.yaml")
    assert isinstance(training, DictConfig)
    with replaced(out) as folder, tempfile.TemporaryDirectory() as scratch:
        source = hugging_face(find_weights(path), Path(scratch) / "merged", Path(scratch) / "log.txt")
        check_model(str(source))
        model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
        rollout = training.actor_rollout_ref.rollout
        model.generation_config.update(
            do_sample=True,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_new_tokens=training.data.max_response_length,
        )
        model.save_pretrained(folder)
        # As they are: what transformers reads beside a qwen2 model and writes again has another pre-tokenizer.
        weights = shutil.ignore_patterns(
            "*.safetensors*", "*.bin*", "config.json", "generation_config.json", "README.md"
        )
        shutil.copytree(source, folder, ignore=weights, dirs_exist_ok=True)
        if (template := training.actor_rollout_ref.model.custom_chat_template) is not None:
            (folder / "chat_template.jinja").write_text(template)
        if "prompt" in training:
            prompt = json.dumps(OmegaConf.to_container(training.prompt), indent=2, ensure_ascii=False)
            (folder / "prompt.json").write_text(prompt + "\n")
        (folder / "README.md").write_text(model_card(run_dir, step, training, out.name, dtype))


def upload(folder: Path, repository: str, private: bool) -> str:
    """Upload the folder; the address of the model."""
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder).repo_url)
    except (OSError, ValueError) as error:  # huggingface_hub's errors are both, or one of them
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder} was written, and upload={repository} failed: {reason}") from None


@command("export", Checked)
def main(cfg: DictConfig) -> None:
    console, path = Console(), Path(cfg.run)
    out = Path(cfg.out) if cfg.out else find_run(path)[0] / f"export-{cfg.dtype}"
    export(path, out, cfg.dtype)
    console.print(f"{out}: {' '.join(sorted(file.name for file in out.iterdir()))}", highlight=False, soft_wrap=True)
    console.print(f"python -m verl_recipes.play model={out}    or    vllm serve {out}", highlight=False, soft_wrap=True)
    if cfg.upload:
        console.print(upload(out, cfg.upload, cfg.private), highlight=False)


if __name__ == "__main__":
    main()
