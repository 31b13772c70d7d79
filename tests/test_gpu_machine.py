"""A machine with a GPU, as far as it can be seen without one: what is looked at first, and what is fetched."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
from configurations import compose

from data_prep.cli import CONFIGS
from verl_recipes.planning import space
from verl_recipes.run import machine
from verl_recipes.run.folder import RunFolder
from verl_recipes.run.start import environment_of

ROOT = CONFIGS.parent


def program(folder, name, text):
    """A program of this name in a folder, as a shell script."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def cards(folder, *lines):
    program(folder, "nvidia-smi", "\n".join(f"echo '{line}'" for line in lines))


LOOKS = (*machine.OF_THE_MACHINE, machine.cards)  # what asks it
A800 = "NVIDIA A800-SXM4-80GB, 81920, 5, 535.104.05, Default"


def test_doctor_finds_cards_too_few_and_memory_in_use(tmp_path, monkeypatch):
    cards(tmp_path, A800.replace(" 5,", " 5000,"))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    cfg = compose("train", "hardware=a800_x2")
    lines = {line.text: line for line in machine.cards(gpu=True, cfg=cfg, smi=machine.nvidia_smi())}
    few = next(line for text, line in lines.items() if "this run wants 2" in text)
    assert (few.state, few.fix) == ("wrong", "gpus=1 among the overrides, and plan again")
    assert next(line for text, line in lines.items() if "other programs" in text).state == "warning"


def test_a_card_for_one_process_alone_is_warned_of(tmp_path, monkeypatch):
    cards(tmp_path, A800, A800.replace("Default", "Exclusive_Process"))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (line,) = (
        each for each in machine.cards(gpu=True, cfg=None, smi=machine.nvidia_smi()) if "one process" in each.text
    )
    assert (line.state, line.text[:5]) == ("warning", "GPU 1")


def test_only_the_cards_that_may_be_used_are_counted(tmp_path, monkeypatch):
    program(tmp_path, "nvidia-smi", f"echo \"$@\" > '{tmp_path / 'log'}'; echo '{A800}'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert len(machine.nvidia_smi()[1]) == 1
    assert (tmp_path / "log").read_text(encoding="utf-8").startswith("-i 2 --query")


def test_nvidia_smi_is_asked_once_for_all_that_is_said_of_the_machine(tmp_path, monkeypatch):
    program(tmp_path, "nvidia-smi", f"echo asked >> '{tmp_path / 'log'}'; echo '{A800}'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for times, look in enumerate([machine.main, lambda: list(machine.findings(True, None, LOOKS))], 1):
        look()
        assert (tmp_path / "log").read_text(encoding="utf-8") == "asked\n" * times


@pytest.mark.parametrize(
    ("version", "served", "state"),
    [
        ("535.104.05", (12, 2), "wrong"),
        ("535.104.05", None, "wrong"),
        ("535.104.05", (13, 0), "ok"),  # with the forward-compatibility package
        ("580.65.06", (13, 0), "ok"),
    ],
)
def test_a_driver_too_old_for_the_packages_is_the_first_thing_said_with_the_ways_on(
    tmp_path, monkeypatch, version, served, state
):
    cards(tmp_path, A800.replace("535.104.05", version))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(machine, "cuda_of_driver", lambda: served)
    for cuda in ("", "13.0"):  # before the packages are there, and afterwards
        monkeypatch.setattr(machine, "cuda_of_torch", lambda cuda=cuda: cuda)
        line = next(machine.findings(True, None))
        assert (line.state, version in line.text) == (state, True)
        if state == "wrong":
            assert all(each in line.text for each in ("CUDA 13.0", "580"))
            assert all(each in line.fix for each in ("cuda-compat-13-0", "CUDA 12", "docs/gpu.md"))


def test_there_is_no_cuda_in_a_driver_that_is_not_there():
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is one")
    assert machine.cuda_of_driver() is None


def test_a_compiler_and_pythons_headers_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    lines = list(machine.compiler(gpu=True))
    assert [line.state for line in lines] == ["wrong", "wrong"]
    assert f"python3.{sys.version_info[1]}-dev" in lines[1].fix
    program(tmp_path, "gcc", "")
    (tmp_path / "Python.h").touch()
    assert [line.state for line in machine.compiler(gpu=True)] == ["ok", "ok"]
    assert list(machine.compiler(gpu=False)) == []


def test_few_cpus_and_little_shared_memory_are_warnings_with_what_to_do(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=64, f_frsize=2**20))
    cfg = compose("train", "hardware=a800_x4")
    (few,), (little,) = machine.cores(gpu=True, cfg=cfg), machine.shared_memory(gpu=True)
    assert (few.state, "2 CPUs; 12 processes" in few.text) == ("warning", True)
    assert (little.state, "--shm-size" in little.fix) == ("warning", True)
    assert [line.state for line in machine.cores(gpu=False, cfg=cfg)] == ["ok"]


@pytest.mark.slow
def test_cupy_is_asked_for_where_some_gpus_only_generate():
    def names(*overrides):
        lines = machine.packages(gpu=True, cfg=compose("train", "hardware=a800_x4", *overrides))
        return {line.text.split()[0] for line in lines}

    assert "cupy-cuda13x" in names("topology=split") - names()
    assert "flash-attn" not in names("topology=split")


def test_a_package_that_verl_does_not_find_is_wrong(monkeypatch):
    def line():
        return [line for line in machine.packages(gpu=False, cfg=None) if "plug-in" in line.text or line.fix][-1]

    assert line().state == "ok"
    monkeypatch.setattr(machine.metadata, "entry_points", machine.metadata.EntryPoints)
    assert (line().state, "pip install" in line().fix) == ("wrong", True)


@pytest.mark.parametrize("hardware", ["cpu", "a800_x1"])
def test_neither_ray_nor_vllm_tells_its_makers_of_a_run(hardware, tmp_path):
    environment = environment_of(compose("train", f"hardware={hardware}"), RunFolder(tmp_path))
    assert environment["VLLM_NO_USAGE_STATS"] == "1"


@pytest.fixture
def checkout(tmp_path):
    """What launch/setup.sh reads, and a folder of programs that stand before the machine's."""
    for name in ("launch", "requirements", "data_prep", "verl_recipes/run"):
        shutil.copytree(ROOT / name, tmp_path / "checkout" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "verl_recipes/__init__.py"):
        shutil.copy(ROOT / name, tmp_path / "checkout" / name)
    (tmp_path / "bin").mkdir()
    return tmp_path / "checkout"


def test_an_environment_that_setup_did_not_make_is_not_deleted(checkout):
    (checkout / ".venv" / "lib").mkdir(parents=True)
    (checkout / ".venv" / "lib" / "mine.txt").touch()
    result = setup(checkout, STACK="cpu")
    assert result.returncode
    assert ".venv was not made by this script" in result.stderr
    assert (checkout / ".venv" / "lib" / "mine.txt").exists()


def setup(checkout, command=("bash", "launch/setup.sh"), **environment):
    environment = {"PATH": f"{checkout.parent / 'bin'}:{os.environ['PATH']}", "STACK": "gpu", **environment}
    environment = {key: value for key, value in os.environ.items() if key != "FLASH_ATTN"} | environment
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, encoding="utf-8", timeout=120)


def venv_of_nothing(checkout):
    """A python3 whose environments have a pip that fetches nothing and notes what it was asked for; those notes."""
    notes = checkout.parent / "pip.txt"
    pip = program(checkout.parent, "pip", f"echo \"$@\" >> '{notes}'")
    make = f'mkdir -p "$3/bin"; cp \'{pip}\' "$3/bin/pip"; cp /bin/true "$3/bin/python"; exit'
    rest = f"exec '{sys.executable}' \"$@\""
    program(checkout.parent / "bin", "python3", f'[ "$1 $2" != "-m venv" ] || {{ {make}; }}\n{rest}')
    # Room, however full this disk is.
    program(checkout.parent / "bin", "df", "echo; echo disk 99999999 0 99999999 1% /")
    return notes


@pytest.mark.slow
def test_an_environment_whose_making_was_cut_short_is_made_anew(checkout):
    notes = venv_of_nothing(checkout)
    with_venv = (checkout.parent / "bin" / "python3").read_text(encoding="utf-8")
    program(checkout.parent / "bin", "python3", with_venv.replace("mkdir -p", "exit 1; mkdir -p"))
    assert "could not make .venv" in setup(checkout, STACK="cpu").stderr
    program(checkout.parent / "bin", "python3", with_venv)
    assert setup(checkout, STACK="cpu").returncode == 0
    assert notes.exists()


def test_a_machine_that_would_fail_is_refused_before_anything_is_fetched(checkout):
    notes = venv_of_nothing(checkout)
    cards(checkout.parent / "bin", A800)
    result = setup(checkout)
    assert result.returncode == 1
    assert result.stdout.startswith("wrong    driver 535.104.05; packages built for CUDA 13.0 need 580 or later\n")
    assert result.stderr.startswith("error: nothing was fetched yet")
    assert not notes.exists()
    assert not (checkout / ".venv-gpu").exists()


def test_a_disk_too_small_is_named_with_what_is_written_to_it(checkout):
    notes = venv_of_nothing(checkout)
    real, free = shutil.which("stat"), "9000000000*1"
    program(checkout.parent / "bin", "stat", f'case $1 in -f) echo "{free}";; *) exec {real} "$@";; esac')
    result = setup(checkout, HOME=str(checkout.parent), TMPDIR=str(checkout.parent))
    line = result.stderr.splitlines()[-1]
    assert (result.returncode, notes.exists()) == (1, False)
    assert line.startswith("error: making .venv-gpu needs 18000 MB of free disk at . ")
    assert line.endswith("where 9000 are free")


def test_an_installation_that_fails_is_said_by_every_script(checkout):
    """They end at the first command that fails, pip's too."""
    venv_of_nothing(checkout)
    program(checkout.parent, "pip", "echo 'ERROR: no such package'; exit 1")
    program(checkout.parent / "bin", "nvidia-smi", "echo no device; exit 9")
    result = setup(checkout, command=["bash", "-c", "source launch/common.sh"])
    assert result.returncode == 1
    assert result.stderr.startswith("ERROR: no such package\nerror: installation failed; the whole output is in")


def test_flash_attn_is_installed_if_it_is_asked_for_and_only_once(checkout):
    notes = venv_of_nothing(checkout)
    program(checkout.parent / "bin", "nvidia-smi", "echo no device; exit 9")

    def asked():
        done = notes.read_text(encoding="utf-8") if notes.exists() else ""
        notes.unlink(missing_ok=True)
        return [line.split()[-1] for line in done.splitlines()]

    result = setup(checkout)
    assert result.returncode == 0, result.stderr
    assert "nvidia-smi: no device" in result.stdout  # a warning: a login node makes it for the others
    assert asked() == ["requirements/gpu.txt", "."]
    for _ in range(2):
        assert setup(checkout).returncode == 0
        assert asked() == []
    assert setup(checkout, FLASH_ATTN="flash.whl").returncode == 0
    assert asked() == ["flash.whl"]
    assert setup(checkout, FLASH_ATTN="flash.whl").returncode == 0
    assert asked() == []
    assert setup(checkout, FLASH_ATTN="flash-attn==2.8.3").returncode == 0
    assert asked() == ["wheel", "flash-attn==2.8.3"]


@pytest.mark.slow
def test_a_copied_checkout_makes_an_environment_of_its_own(checkout):
    notes = venv_of_nothing(checkout)
    assert setup(checkout, STACK="cpu").returncode == 0
    notes.unlink()
    copied = shutil.copytree(checkout, checkout.parent / "copied", symlinks=True)
    assert setup(copied, STACK="cpu").returncode == 0
    assert notes.exists()


def test_a_python_that_fits_is_found_beside_one_that_does_not(checkout):
    notes = venv_of_nothing(checkout)
    (checkout.parent / "bin" / "python3").rename(checkout.parent / "bin" / "python3.12")
    program(checkout.parent / "bin", "python3", "exit 1")
    assert setup(checkout, STACK="cpu").returncode == 0
    assert notes.exists()


@pytest.mark.parametrize(
    ("system", "machine", "said"), [("Darwin", "arm64", "Linux is needed"), ("Linux", "aarch64", "are for x86-64")]
)
def test_a_machine_that_the_packages_are_not_for_is_one_line(checkout, system, machine, said):
    notes = venv_of_nothing(checkout)
    program(checkout.parent / "bin", "uname", f'[ "$1" = -m ] && echo {machine} || echo {system}')
    refused = setup(checkout, STACK="cpu")
    assert (refused.returncode, notes.exists()) == (1, False)
    assert said in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_packages_go_into_the_environment_whatever_pip_is_told_elsewhere(checkout):
    notes = venv_of_nothing(checkout)
    pip = checkout.parent / "pip"
    program(pip.parent, "pip", f'echo "${{PIP_TARGET:-none}} $PIP_USER" >> {notes}')
    assert setup(checkout, STACK="cpu", PIP_TARGET="/x", PIP_USER="1").returncode == 0
    assert {*notes.read_text(encoding="utf-8").splitlines()} == {"none 0"}


def test_doctor_lets_a_run_start_that_is_forced(monkeypatch):
    monkeypatch.setattr(space, "free_memory", lambda: 7 * 2**30)
    states = [next(machine.space(compose("train", *force))).state for force in ((), ("force=true",))]
    assert states == ["wrong", "warning"]


USED = """
import mmap, sys, time
with open(sys.argv[1], "rb") as file:
    library = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
print("loaded", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("typed", [False, True])
def test_an_environment_that_a_run_uses_is_not_made_anew(checkout, typed):
    """verl's processes have its path in their command lines; a `python` that was typed has loaded its libraries."""
    notes = venv_of_nothing(checkout)
    program(checkout.parent / "bin", "nvidia-smi", "echo no device; exit 9")
    assert setup(checkout).returncode == 0
    (checkout / "requirements" / "gpu.txt").write_text("numpy==1.0\n", encoding="utf-8")
    notes.unlink()
    python = checkout / ".venv-gpu" / "bin" / "python"
    command, program_ = (
        (["python", "-c", USED, str(python)], sys.executable) if typed else ([str(python), "600"], "sleep")
    )
    with subprocess.Popen(command, executable=program_, stdout=subprocess.PIPE, text=True) as run:
        try:
            assert not typed or run.stdout.readline() == "loaded\n"
            refused = setup(checkout)
        finally:
            run.kill()
    assert f"error: .venv-gpu has to be made anew, and process {run.pid} uses it" in refused.stderr
    assert (refused.returncode, notes.exists()) == (1, False)
    assert setup(checkout).returncode == 0
    assert notes.exists()


def test_what_is_installed_unasked_comes_as_wheels():
    """flash-attn is the package that would be compiled."""
    for name in ("gpu", "gpu-run"):
        text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
        assert not re.findall(r"^flash-attn", text, re.M)
        assert {"setuptools==80.9.0", "cupy-cuda13x==14.0.1"} <= set(text.splitlines())
