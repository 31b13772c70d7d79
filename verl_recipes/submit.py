"""python -m verl_recipes.submit ADDRESS [overrides]: `verl_recipes.train` as a job of a Ray cluster (ray_submit.sh).

It ships the packages, configurations and data files of the run (as Ray's runtime_env working_dir), streams the log, and
ends with the job's exit status. `attach=JOB` follows a job that already runs. The overrides are those of `python -m
verl_recipes.train`, whose --help lists them.

    python -m verl_recipes.submit http://HEAD:8265 recipe=mini_r1 model=qwen2.5_3b_instruct hardware=h100 gpus=8 nodes=2
    python -m verl_recipes.submit http://HEAD:8265 attach=raysubmit_ABC
"""

import asyncio
import logging
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omegaconf import OmegaConf

import verl_recipes.settings.configuration  # noqa: F401  registers Hydra's resolvers
from data_prep import SHIPPED
from data_prep.cli import (
    HELP,
    UserError,
    as_list,
    compose,
    in_one_line,
    overrides_of,
    print_version,
    quoted,
    show,
    split_options,
    until_closed,
)
from verl_recipes.run.preflight import command_that_makes
from verl_recipes.run.start import CLEANUP, NOTICE, STOP_WAIT
from verl_recipes.settings.schema import TrainKeys

PACKAGES = ("data_prep", "reward_score", "verl_recipes")
BESIDE = ("configs", "assets", "requirements")  # in a checkout; an installed package has them inside
OWN = "own_configurations_"  # in the job's folder: the folders of --config-dir
PATIENCE = 600  # seconds without the cluster before the command gives up; the job goes on
ENVIRONMENT = (
    *("HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "VERL_USE_MODELSCOPE"),
    *("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_MODE"),
    *("SWANLAB_API_KEY", "SWANLAB_API_HOST", "SWANLAB_MODE"),
    *("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
)
STATUS_OF = {"SUCCEEDED": 0, "FAILED": 1, "STOPPED": 130}


def of_this_machine(cfg: Any) -> dict[str, str]:
    """Overrides by key that give the full paths of the run's folder and of what it reads beside its data files.

    The job's own folder holds none of them, and Ray removes it. What the package ships is in it, under the same name.
    """
    read = ["warm_start" if cfg.warm_start else "actor_rollout_ref.model.path", "reward.custom_reward_function.path"]
    paths = {key: Path(str(OmegaConf.select(cfg, key))) for key in read}
    sent = {key: path for key, path in paths.items() if path.exists() and path.parts[0] not in (*PACKAGES, *BESIDE)}
    sent["run_dir"] = Path(cfg.run_dir)
    if not (checkpoints := Path(cfg.trainer.default_local_dir)).is_relative_to(cfg.run_dir):
        sent["trainer.default_local_dir"] = checkpoints
    return {key: quoted(path.resolve()) for key, path in sent.items()}


def staged(cfg: Any, folder: Path) -> None:
    """Copy the packages and the run's data files, with their manifests, into a folder, at the same relative paths."""
    root = Path(__file__).resolve().parent.parent
    beside = () if SHIPPED.is_relative_to(root / "data_prep") else BESIDE
    for name in (*PACKAGES, *beside):
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for files in (cfg.data.train_files, cfg.data.val_files):
        for name in as_list(files):
            path = Path(name)
            if path.is_absolute():
                continue
            if ".." in path.parts:
                raise UserError(
                    f"{path} lies outside this folder and would not be shipped with the job: give its full path"
                )
            if not path.is_file():
                command = command_that_makes(name, cfg.data.made_by)
                raise UserError(f"{path} does not exist" + (f"; make it with `{command}`" if command else ""))
            (folder / path.parent).mkdir(parents=True, exist_ok=True)
            for source in {path, path.parent / "manifest.json"}:
                if source.is_file():
                    shutil.copy(source, folder / source)


def connect(address: str) -> Any:
    """Ray's client of the cluster's job server. Addresses in the environment are ignored."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")  # a cluster lies before the proxy, not behind it
    os.environ["no_proxy"] = ",".join(filter(None, (direct, urlsplit(address).hostname)))
    try:
        client = JobSubmissionClient(address)
    except AuthenticationError:
        raise UserError(
            f"the Ray cluster at {address} asks for a token: copy its head's ~/.ray/auth_token here and set "
            "RAY_AUTH_MODE=token, or RAY_AUTH_MODE=disabled on all nodes"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:  # requests' are OSErrors, and for a bad address ValueErrors
        raise UserError(
            f"no Ray job server answers at {address}: {str(error).splitlines()[0]}; was its head started with "
            "--dashboard-host=0.0.0.0?"
        ) from None
    logging.getLogger("ray").setLevel(logging.WARNING)
    return client


async def stream(client: Any, job: str, seen: int) -> int:
    """Print a job's log from character `seen` on until it ends or the connection drops; returns the new position."""
    position = 0
    try:
        async for text in client.tail_job_logs(job):
            with until_closed():  # `| head` has read enough; how the job ends is still wanted
                sys.stdout.write(text[max(0, seen - position) :])
            position += len(text)
            seen = max(seen, position)
    except (OSError, RuntimeError):
        pass  # the caller checks whether the job has ended
    except Exception as error:  # aiohttp's errors, without an import of aiohttp
        if not type(error).__module__.startswith("aiohttp"):
            raise
    return seen


def follow(address: str, client: Any, job: str) -> int:
    """Stream a job's log until the job ends, and reconnect if need be; returns the job's exit status.

    SIGTERM, such as a scheduler's notice, is passed on: the job saves the step that it is in and ends.
    """
    seen, last_contact, status, told = 0, time.monotonic(), "PENDING", False

    def terminated(*_: object) -> None:
        nonlocal told
        told = True
        with suppress(OSError, RuntimeError):  # without the cluster the job has no end to wait for
            client.stop_job(job)

    signal.signal(signal.SIGTERM, terminated)
    while True:
        seen = asyncio.run(stream(client, job, seen))
        try:
            info = client.get_job_info(job)
            status, last_contact = str(info.status.value), time.monotonic()
        except (OSError, RuntimeError) as error:
            line = str(error).partition("\n")[0]
            if "status code 404" in line:
                raise UserError(
                    f"the Ray cluster at {address} does not know {job}: its head was started anew, and a job ends with "
                    "its head; the command that submitted it, without fresh=true, goes on after the last checkpoint"
                ) from None
            if time.monotonic() - last_contact > PATIENCE:
                raise UserError(
                    f"{address} has not answered for {PATIENCE} s ({line}); the job may still run: "
                    f"bash launch/ray_submit.sh {address} attach={job}"
                ) from None
            if status:
                print("connection lost; trying again", file=sys.stderr)
            status = ""
        if status in STATUS_OF:
            asyncio.run(stream(client, job, seen))  # the lines of the last second
            if told and status == "STOPPED":
                return 128 + signal.SIGTERM
            return (status == "FAILED" and info.driver_exit_code) or STATUS_OF[status]
        time.sleep(1)


def submit(client: Any, entrypoint: str, folder: Path) -> str:
    """Start a command on the cluster with this folder as its working directory; returns the job's name."""
    variables = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    variables[STOP_WAIT] = os.environ.get(STOP_WAIT) or str(NOTICE + CLEANUP)
    if not variables[STOP_WAIT].isdigit():
        raise UserError(f"{STOP_WAIT}={variables[STOP_WAIT]}: should be a number of seconds")
    environment = {"working_dir": str(folder), "env_vars": variables}
    return str(client.submit_job(entrypoint=entrypoint, runtime_env=environment))


def main(address: str, *overrides: str) -> int:
    job = next((each.removeprefix("attach=") for each in overrides if each.startswith("attach=")), None)
    if job is not None:
        client = connect(address)
        try:
            client.get_job_info(job)
        except RuntimeError as error:
            raise UserError(
                f"attach={job}: {str(error).strip().splitlines()[0]}; `ray job list --address {address}` lists them"
            ) from None
    else:
        cfg = compose("train", overrides_of(overrides), TrainKeys)
        if cfg.seeds:
            raise UserError("seeds= is not for submit, as a job has one run: submit a job for each seed=")
        kept, own, shown = split_options(overrides)
        if shown:
            show(cfg)
            return 0
        client = connect(address)
        here = of_this_machine(cfg)
        kept = [each for each in kept if each.partition("=")[0] not in here]
        options = [f"--config-dir={OWN}{number}" for number in range(len(own))]
        command = ["python", "-m", "verl_recipes.train", *options, *kept, *map("=".join, here.items())]
        with tempfile.TemporaryDirectory() as folder, in_one_line():
            staged(cfg, Path(folder))
            for number, each in enumerate(own):
                shutil.copytree(each, Path(folder) / f"{OWN}{number}")
            job = submit(client, shlex.join(command), Path(folder))
        print(f"job {job} at {address}; to follow it again: bash launch/ray_submit.sh {address} attach={job}")
    try:
        return follow(address, client, job)
    except KeyboardInterrupt:
        print(
            f"\nthe job goes on; follow it: bash launch/ray_submit.sh {address} attach={job}; "
            f"stop it: ray job stop --address {address} {job}",
            file=sys.stderr,
        )
        return 130


if __name__ == "__main__":
    if set(HELP) & set(sys.argv[1:]):
        print((__doc__ or "").strip())
    elif "--version" in sys.argv[1:]:
        print_version()
    elif len(sys.argv) < 2 or not sys.argv[1].startswith("http"):
        raise UserError(
            "the first argument must be the dashboard's address: python -m verl_recipes.submit http://HEAD:8265 ..."
        )
    else:
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        sys.exit(main(*sys.argv[1:]))
