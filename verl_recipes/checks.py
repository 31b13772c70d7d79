"""What can be known to fail before anything heavy starts, each as one line; and why verl stopped, if it did."""

import json
import os
import re
import shutil
import ssl
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from http.client import HTTPException
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import DictConfig, ListConfig, OmegaConf
from safetensors import SafetensorError, safe_open

from data_prep.cli import UserError
from data_prep.sources import file_sha256
from verl_recipes.checkpoints import damage, way_on
from verl_recipes.configuration import check_choice

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
ANSWER_SECONDS = 10  # for a tracker's server, before anything starts
ADDRESS = {  # prints the address of a tracker's server
    "wandb": "import wandb; print(wandb.setup().settings.base_url)",
    "swanlab": "import swanlab; print(swanlab.Settings().api_host)",
}

# What verl and Ray say because something else went wrong before.
CONSEQUENCES = (
    "ray.exceptions.",
    "no materializable trajectories",
    "Received an empty list as keys",
    "Engine core init",
)

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_WHO = re.compile(r"^(?:\([^)]*pid=[^)]*\)\s*)*(?:ERROR [-\d]+ [:\d]+ \[\S+\]\s*)?")  # Ray's and vLLM's prefixes
_EXCEPTION = re.compile(r"^(?:[A-Za-z_]\w*\.)*(?:[A-Z]\w*)?(?:Error|Exception|Interrupt)(?:\(\w+\))?: \S")


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


def has_login(hosts: Sequence[str], *files: str) -> bool:
    """Whether one of these files, below the home directory, holds a login for a host, as `wandb login` leaves it."""
    for file in files:
        with suppress(OSError, NetrcParseError):
            if any(host in machine for machine in netrc(Path.home() / file).hosts for host in hosts):
                return True
    return False


def tracker_server(name: str, environment: Mapping[str, str]) -> str | None:
    """The address that a tracker sends to, as its package reads it from environment and files; None for files."""
    if name == "mlflow" and environment["MLFLOW_TRACKING_URI"].startswith("http"):
        return environment["MLFLOW_TRACKING_URI"]
    if name not in ADDRESS or environment[f"{name.upper()}_MODE"] not in ("online", "shared", "cloud"):
        return None
    # Not in this process: wandb starts its service, which the end of the run would take away from under it.
    asked = subprocess.run([sys.executable, "-P", "-c", ADDRESS[name]], capture_output=True, text=True)
    if asked.returncode:
        raise UserError(f"tracker={name}: its settings cannot be read: {asked.stderr.strip().splitlines()[-1]}")
    return asked.stdout.split()[-1]


def answers(address: str) -> bool:
    """Whether a server answers at all; what it says, and whether its certificate is known here, is not looked at."""
    try:
        urlopen(Request(address, method="HEAD"), timeout=ANSWER_SECONDS).close()
    except (HTTPError, HTTPException):
        pass
    except OSError as error:
        return isinstance(getattr(error, "reason", error), ssl.SSLError)
    return True


def check_trackers(trackers: DictConfig) -> None:
    """Raise UserError where a tracker's package or key is missing, or its server does not answer."""
    for name, tracker in ((str(name), tracker) for name, tracker in trackers.items()):
        if name not in ("console", "file") and find_spec(name) is None:
            raise UserError(f"tracker={name}: the package is not installed; `pip install -e '.[trackers]'`")
        if urlsplit(tracker.environment.get("MLFLOW_TRACKING_URI", "")).password:
            raise UserError(
                "MLFLOW_TRACKING_URI holds a password, which config.yaml and log.txt would hold too; take it out and "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        server = tracker_server(name, tracker.environment)
        if server is None:
            continue
        instead = f"{name.upper()}_MODE=offline and later `{name} sync` (configs/tracker/{name}.yaml)"
        login = {
            # wandb takes a login for its former address too.
            "wandb": has_login((urlsplit(server).hostname or "", "api.wandb.ai"), ".netrc", "_netrc"),
            "swanlab": has_login(("",), ".swanlab/.netrc"),
            "mlflow": True,
        }
        if not login[name] and not os.environ.get(f"{name.upper()}_API_KEY"):
            raise UserError(f"tracker={name}: no key; set {name.upper()}_API_KEY, or {instead}")
        if not answers(server):
            instead = "unset MLFLOW_TRACKING_URI for a file" if name == "mlflow" else f"wait for it, or set {instead}"
            raise UserError(f"tracker={name}: {server} does not answer; {instead}")


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


def reason(log: Path, offset: int = 0) -> str:
    """The last exception that a log tells of, from `offset` bytes on, as one line; the cause, where it tells of one."""
    with log.open(errors="replace") as file:
        file.seek(offset)
        lines = [_WHO.sub("", _COLOUR.sub("", line)).strip() for line in file]
    exceptions = [line for line in lines if _EXCEPTION.match(line)]
    causes = [line for line in exceptions if not any(c in line for c in CONSEQUENCES)]
    return (causes or exceptions or ["it told of no error"])[-1]
