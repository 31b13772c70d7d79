"""Launch scripts, doctor, and runs on a Ray cluster of two nodes."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import pytest
from commands import RESUMED, metrics_of
from configurations import compose
from omegaconf import OmegaConf
from pages import commands, printed
from rich.console import Console
from two_nodes import TWO_NODES, running

from data_prep import cli
from data_prep.cli import CONFIGS, UserError
from data_prep.schema import PrepareKeys, TracesKeys
from verl_recipes import doctor, evaluate, fetch, middle_base, submit, train, warm_start
from verl_recipes.reporting.metrics import AGREEMENT
from verl_recipes.run import cluster, machine, preflight, start
from verl_recipes.run.folder import RunFolder, read_lines
from verl_recipes.settings.configuration import check_choice
from verl_recipes.settings.schema import TrainKeys

ROOT = CONFIGS.parent
SCRIPTS = ["a800_x1", "a800_x2", "a800_x3", "a800_x4", "a800_x8", "rtx4090_x1", "cpu"]


def bash(*arguments, **environment):
    return subprocess.run(
        ["bash", *arguments], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_shellcheck_is_clean():
    program = shutil.which("shellcheck") or str(Path(sys.executable).parent / "shellcheck")
    files = [*sorted((ROOT / "launch").iterdir()), ROOT / "tests" / "run.sh"]
    result = subprocess.run([program, *map(str, files)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_begins_with_doctor_and_on_gpus_plan_and_its_overrides_come_last_and_compose(script):
    commands = printed(bash(f"launch/{script}.sh", "seed=5", "name=a b", DRY_RUN="1"))
    modules = [command[2].removeprefix("verl_recipes.") for command in commands]
    expected = ["data_prep", "doctor", "train"] if script == "cpu" else ["doctor", "plan", "train"]
    assert modules == expected
    for command in commands[-2:]:
        overrides = command[3:]
        assert overrides[0] == f"hardware={script}"
        assert overrides[-2:] == ["seed=5", "name=a b"]
    check_choice(compose("train", *overrides[:-1]))


def test_a_ladder_measures_each_rung_with_the_runs_hardware_and_recipe():
    result = bash("launch/ladder.sh", "tiny", "hardware=cpu", "recipe=tiny", "seed=5", DRY_RUN="1", WARM="steps=20")
    commands, measured = printed(result), "evaluate"
    modules = [command[2].rpartition(".")[2] for command in commands]
    assert modules == [
        "data_prep",
        "traces",
        measured,
        "warm_start",
        measured,
        "doctor",
        "train",
        measured,
        measured,
        measured,
        "report",
    ]
    assert all({"hardware=cpu", "recipe=tiny"} <= {*command} for command in commands[2:-3])
    outs = [each.removeprefix("out=") for command in commands for each in command if "out=runs/evaluations" in each]
    assert commands[-1][3:] == ["runs/ladder", *outs]  # base, warm start, trained
    warm = next(command for command in commands if command[2].endswith("warm_start"))
    assert {"steps=20", "seed=5", "actor_rollout_ref.model.path=assets/tiny_base"} <= {*warm}
    anew = printed(bash("launch/ladder.sh", "tiny", "hardware=cpu", "fresh=true", DRY_RUN="1"))
    assert (
        sum("fresh=true" in command for command in anew if command[3:4] != ["compare"]) == 6
    )  # warm, doctor, train, 3 x
    refused = bash("launch/ladder.sh", "hardware=cpu", DRY_RUN="1")
    assert (refused.returncode, refused.stderr.startswith("error: name a model")) == (1, True)
    for name in ("2026_11_29", "1e-4", "a/b", "实验"):  # Hydra takes two of them for numbers
        refused = bash("launch/ladder.sh", "tiny", "hardware=cpu", DRY_RUN="1", NAME=name)
        assert "a letter of ASCII first" in refused.stderr


def test_the_middle_rung_makes_its_base_before_the_ladder_and_trains_as_its_benchmark(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "launch", tmp_path / "launch")  # a folder without models/middle
    commands = printed(bash(tmp_path / "launch" / "middle.sh", "seed=5", DRY_RUN="1"))
    modules = [command[2].rpartition(".")[2] for command in commands]
    assert modules[:6] == ["data_prep", "traces", "middle_base", "data_prep", "traces", "evaluate"]
    assert {*commands[0]} == {*commands[3]}
    assert commands[1] == middle_base.MAKES.split()
    assert modules[-1] == "report"
    warm, run = commands[modules.index("warm_start")], commands[modules.index("train")]
    assert "actor_rollout_ref.model.path=models/middle" in warm
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from benchmarks.middle import commands_of

    warm_start, both, _ = commands_of(5)
    names = {"name=middle-warm-seed5", "name=middle-seed5", "warm_start=runs/middle-warm-seed5"}
    assert {*warm_start[1:]} - names <= {*warm}
    assert {*both[1:]} - names <= {*run}


@pytest.mark.slow
def test_every_command_of_the_page_for_one_card_composes():
    """Each by its own keys; what a ladder hands on from a run's keys is composed once, with the run."""
    found = list(commands("docs/one_card.md"))
    assert found == list(commands("docs/zh/one_card.md"))
    schemas = {
        "data_prep": ("prepare", PrepareKeys, CONFIGS),
        "data_prep.traces": ("traces", TracesKeys, CONFIGS / "commands"),
        "verl_recipes.fetch": ("fetch", fetch.Keys, CONFIGS / "commands"),
        "verl_recipes.evaluate": ("evaluate", evaluate.Keys, CONFIGS / "commands"),
        "verl_recipes.warm_start": ("warm_start", warm_start.Keys, CONFIGS / "commands"),
        "verl_recipes.train": ("train", TrainKeys, CONFIGS),
    }
    others = {"verl_recipes.doctor", "verl_recipes.plan", "verl_recipes.report"}
    assert {module for module, _ in found} == {*schemas, *others}
    for module, overrides in found:
        # Doctor and plan get what train gets; a report and a comparison get folders.
        if module not in schemas or overrides[0] == "compare":
            continue
        config, keys, folder = schemas[module]
        own = [each for each in overrides if folder == CONFIGS or each.partition("=")[0] in keys.model_fields]
        # The command before it makes the folder.
        cfg = cli.compose(config, [each for each in own if not each.startswith("warm_start=")], keys, folder)
        if module == "verl_recipes.train":
            check_choice(cfg)
    plans, trains = ([each for module, each in found if module == f"verl_recipes.{name}"] for name in ("plan", "train"))
    assert all(plan in trains for plan in plans)


def test_a_command_that_fails_stops_those_after_it(tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\necho ran $2\ntest $2 != verl_recipes.plan\n")
    (tmp_path / "python").chmod(0o755)
    result = bash("launch/a800_x1.sh", SETUP="0", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert result.returncode == 1
    assert re.findall("ran (.*)", result.stdout) == ["verl_recipes.doctor", "verl_recipes.plan"]


@pytest.mark.parametrize("call", ["launch", "(launch) || echo told"])
def test_nothing_is_trained_after_a_refusal_even_if_the_caller_checks_the_status(tmp_path, call):
    (tmp_path / "python").write_text("#!/bin/sh\necho ran $2\ntest $2 != verl_recipes.doctor\n")
    (tmp_path / "python").chmod(0o755)
    result = bash("-c", f"source launch/common.sh; {call}", SETUP="0", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert re.findall("ran (.*)", result.stdout) == ["verl_recipes.doctor"]
    assert (result.returncode, "told" in result.stdout) == ((0, True) if "told" in call else (1, False))


def test_data_outside_the_folder_that_is_sent_is_refused(tmp_path):
    cfg = OmegaConf.create({"data": {"train_files": "../x.parquet", "val_files": "y.parquet"}})
    with pytest.raises(UserError, match="give its full path"):
        submit.staged(cfg, tmp_path / "stage")


def test_a_job_is_sent_its_data_with_the_manifest_and_not_without(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data/mine/train.parquet", "data/mine/test.parquet", "data/mine/manifest.json"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name, encoding="utf-8")
    cfg = OmegaConf.create(
        {"data": {"train_files": "data/mine/train.parquet", "val_files": ["data/mine/test.parquet"]}}
    )
    submit.staged(cfg, tmp_path / "stage")
    sent = {str(path.relative_to(tmp_path / "stage")) for path in (tmp_path / "stage" / "data").rglob("*.*")}
    assert sent == {"data/mine/train.parquet", "data/mine/test.parquet", "data/mine/manifest.json"}
    assert {*submit.PACKAGES, *submit.BESIDE} <= {path.name for path in (tmp_path / "stage").iterdir()}
    cfg.data.update({"val_files": "data/none.parquet", "made_by": "make it"})
    with pytest.raises(UserError, match=r"data/none.parquet does not exist"):
        submit.staged(cfg, tmp_path / "again")


def test_a_job_gets_the_full_paths_of_what_it_is_not_sent(tmp_path, monkeypatch):
    here = {
        "actor_rollout_ref.model.path": "models/x",
        "reward.custom_reward_function.path": "my.py",
        "warm_start": "w",
    }
    for each in (*here.values(), "assets/tiny_base"):
        (tmp_path / each).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    cfg = compose("train", "run_dir=out")
    assert submit.of_this_machine(cfg) == {"run_dir": submit.quoted(tmp_path / "out")}
    for key, path in here.items():
        OmegaConf.update(cfg, key, path)
        assert submit.of_this_machine(cfg)[key] == submit.quoted(tmp_path / path)
    assert "actor_rollout_ref.model.path" not in submit.of_this_machine(cfg)  # the warm start's model
    cfg.trainer.default_local_dir = "disk/checkpoints"
    assert submit.of_this_machine(cfg)["trainer.default_local_dir"] == submit.quoted(tmp_path / "disk/checkpoints")


@pytest.mark.slow
def test_a_proxy_does_not_come_between_a_submission_and_its_cluster(monkeypatch):
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            proxied = self.path.startswith("http:")
            body = json.dumps({"ray_version": "2.60.0"}).encode()
            self.send_response(503 if proxied else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("http_proxy", address)
        monkeypatch.setenv("no_proxy", "")
        assert submit.connect(address)
        server.shutdown()


@pytest.mark.slow
def test_a_cluster_that_asks_for_a_token_is_one_line():
    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(401)

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        command = [sys.executable, "-m", "verl_recipes.submit", address, "recipe=tiny"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
        server.shutdown()
    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1), result.stderr
    assert f"error: the Ray cluster at {address} asks for a token" in result.stderr


def test_submission_plans_first_and_follows_no_address_but_its_own():
    commands = printed(bash("launch/ray_submit.sh", "http://head:8265", "nodes=2", DRY_RUN="1", RAY_ADDRESS="x:1"))
    assert [command[2:] for command in commands] == [
        ["verl_recipes.plan", "nodes=2"],
        ["verl_recipes.submit", "http://head:8265", "nodes=2"],
    ]
    attached = printed(bash("launch/ray_submit.sh", "http://head:8265", "attach=job", DRY_RUN="1"))
    assert [command[2] for command in attached] == ["verl_recipes.submit"]
    without = bash("launch/ray_submit.sh", "nodes=2")
    assert (without.returncode, len(without.stderr.splitlines())) == (2, 1)


@pytest.mark.slow
def test_slurms_notice_reaches_the_run_whose_end_is_waited_for_before_rays(tmp_path):
    """The programs of Slurm and Python are stand-ins; what bash does with the signal is real."""
    log = tmp_path / "log"
    say = f'echo "$@" >> {log}'
    trap, loop = f"trap 'sleep 1; echo saved >> {log}; exit 143' TERM", "for i in $(seq 1200); do sleep 0.1; done"
    for name, text in {
        "scontrol": "echo node",
        "srun": f'case "$*" in *hostname*) echo 10.0.0.1;; *"ray start"*) trap "echo ray ends >> {log}; exit" TERM; '
        f"{loop};; esac",
        "python": f'case "$*" in *submit*) {trap}; {say} $RAY_JOB_STOP_WAIT_TIME_S; {loop};; esac',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SETUP": "0", "STACK": "cpu", "SLURM_JOB_NUM_NODES": "1"}
    environment |= {"SLURM_JOB_NODELIST": "node", "SLURM_JOB_ID": "7", "GPUS_ON_NODE": "1"}
    job = subprocess.Popen(["bash", "launch/slurm.sbatch", "recipe=tiny"], cwd=ROOT, env=os.environ | environment)
    try:
        while not log.exists() and job.poll() is None:
            time.sleep(0.05)
        job.terminate()  # the batch shell alone, as Slurm does for B:
        assert job.wait(timeout=60) == 143
    finally:
        job.kill()
    started, *rest = log.read_text(encoding="utf-8").splitlines()
    assert started == "-m verl_recipes.submit http://10.0.0.1:8265 recipe=tiny 240"
    assert rest == ["saved", "ray ends"]


def test_rays_folder_under_slurm_is_closed_to_others_and_leaves_its_sockets_a_short_name(tmp_path):
    """Ray opens its folder to everybody. It refuses a socket of more than 107 bytes, and its own part has up to 64."""
    (line,) = re.findall(r"^start=.*$", (ROOT / "launch" / "slurm.sbatch").read_text(encoding="utf-8"), re.M)
    ray = tmp_path / "ray"
    ray.write_text('#!/bin/sh\nfor last; do :; done\nfolder=${last#*=}\nstat -c "%a $folder" "${folder%/*}"\n')
    ray.chmod(0o755)
    environment = os.environ | {"SLURM_JOB_ID": "12345678", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", "-c", f'{line}\nbash -c "$start" _ --head']
    mode, folder = subprocess.check_output(command, env=environment, text=True).split()
    assert folder.startswith("/tmp/ray-12345678-")
    Path(folder).parent.rmdir()
    assert mode == "700"
    assert len(folder) + 64 <= 107


def test_slurm_signals_the_shell_alone_and_leaves_more_time_than_ray_does():
    script = (ROOT / "launch" / "slurm.sbatch").read_text(encoding="utf-8")
    seconds = int(re.search(r"^#SBATCH --signal=B:TERM@(\d+)$", script, re.M)[1])
    wait = int(re.search(r"RAY_JOB_STOP_WAIT_TIME_S:-(\d+)", script)[1])
    assert seconds - wait >= 60 > start.NOTICE + start.CLEANUP


def test_a_run_gets_the_time_that_a_scheduler_gives_or_that_ray_gives_its_job(monkeypatch):
    monkeypatch.setenv(start.STOP_WAIT, "240")
    assert start.notice() == start.NOTICE
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert start.notice() == 240 - start.CLEANUP
    monkeypatch.setenv(start.STOP_WAIT, "3")
    assert start.notice() == start.NOTICE
    monkeypatch.setenv(start.STOP_WAIT, "4 min")
    with pytest.raises(UserError, match="RAY_JOB_STOP_WAIT_TIME_S=4 min: should be a number of seconds"):
        submit.submit(None, "train", Path())


@pytest.mark.parametrize("script", ["cpu", "a800_x4", "gpu_check", "ray_submit", "setup"])
def test_a_shell_other_than_bash_is_refused_in_one_line(script):
    if (dash := shutil.which("dash")) is None:
        pytest.skip("there is no dash, and sh may be bash")
    command, environment = [dash, f"launch/{script}.sh", "http://head:8265"], os.environ | {"DRY_RUN": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8")
    line = f"error: these scripts need bash: bash launch/{script}.sh\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", line)


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_a_dry_run_is_one_however_it_is_said(tmp_path, value):
    (tmp_path / "python3").write_text("#!/bin/sh\necho installing\n", encoding="utf-8")
    (tmp_path / "python3").chmod(0o755)
    result = bash("launch/cpu.sh", DRY_RUN=value, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert len(printed(result)) == 3  # data, doctor, run: a CPU needs no plan
    assert "installing" not in result.stdout


@pytest.mark.parametrize("script", ["launch/cpu.sh", "launch/setup.sh"])
@pytest.mark.parametrize("name", ["DRY_RUN", "SETUP"])
def test_a_switch_that_is_neither_on_nor_off_is_refused_before_anything_is_installed(script, name):
    result = bash(script, **{name: "maybe"})
    line = f"error: {name}=maybe is neither 1 nor 0\n"
    assert (result.returncode, result.stdout, result.stderr) == (1, "", line)


def test_scripts_bear_blanks_and_chinese_in_their_path_and_overrides(tmp_path):
    checkout = tmp_path / "我的 checkout"
    shutil.copytree(ROOT / "launch", checkout / "launch")
    result = bash(str(checkout / "launch" / "a800_x4.sh"), "name=一 二", DRY_RUN="1")
    assert printed(result)[-1][-1] == "name=一 二"


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_a_checkout_of_another_user_is_named_and_not_its_venv():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's own folders are closed to others
        Path(folder).chmod(0o755)
        for name in ("launch", "requirements"):
            shutil.copytree(ROOT / name, Path(folder) / name)
        (Path(folder) / "python3").write_text("#!/bin/sh\nexit 0\n", encoding="utf-8")
        (Path(folder) / "python3").chmod(0o755)
        result = subprocess.run(
            ["bash", "launch/setup.sh"],
            cwd=folder,
            env={"PATH": f"{folder}:/usr/bin:/bin"},
            user=65534,
            capture_output=True,
            encoding="utf-8",
        )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {folder} belongs to root, and nobody may not write there")
    assert len(result.stderr.splitlines()) == 1


def test_doctor_works_if_nothing_is_installed_and_has_a_fix_for_every_line(tmp_path):
    result = subprocess.run(
        [sys.executable, "-S", "-E", "-m", "verl_recipes.doctor", "hardware=a800_x1"],
        cwd=ROOT,
        env={"PATH": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        encoding="utf-8",
    )
    assert (result.returncode, result.stderr) == (1, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "wrong    configuration: No module named 'omegaconf'"
    assert lines[1] == "         fix: STACK=gpu bash launch/setup.sh"
    for package in machine.TOGETHER:
        assert any(line.startswith(f"wrong    {package} is not installed") for line in lines)
    assert any("nvidia-smi is not installed" in line for line in lines)
    for line, following in pairwise(lines):
        if line.startswith(("wrong", "warning")):
            assert following.startswith("         fix: "), line


@pytest.mark.parametrize(("most", "fix"), [(1048576, "ulimit -n 65536"), (20000, "root may raise it from 20000")])
def test_doctor_advises_ulimit_only_where_it_would_be_allowed(most, fix, monkeypatch):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: (1024, most))
    (line,) = machine.open_files()
    assert line.fix.partition(";")[0] == fix


@pytest.mark.slow
def test_doctor_counts_warnings_at_the_end_and_they_are_not_wrong(monkeypatch, capsys):
    found = [machine.Line("ok", "a"), machine.Line("warning", "b", "c")]
    monkeypatch.setattr(doctor, "findings", lambda *_: found)
    assert doctor.main([]) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1].startswith("doctor: nothing is wrong; warnings, which stop no run: 1")
    )
    found.append(machine.Line("wrong", "d", "e"))
    assert doctor.main([]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("doctor: 1 wrong; warnings, which stop no run: 1")


def test_doctors_answer_to_a_misspelt_key_is_not_an_installation():
    cfg, line = doctor.configuration(["nmae=x"], gpu=False)
    assert (cfg, line.state, "'nmae'" in line.text) == (None, "wrong", True)
    assert "setup.sh" not in line.fix


@pytest.mark.parametrize("name", ["doctor", "submit"])
def test_help_prints_the_docstring_and_starts_nothing(name):
    command = [sys.executable, "-m", f"verl_recipes.{name}", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == sys.modules[f"verl_recipes.{name}"].__doc__.strip() + "\n"


def test_nothing_that_doctor_or_a_page_advises_stops_or_deletes_what_may_be_anothers():
    pages = [ROOT / "docs" / "launch.md", ROOT / "docs" / "zh" / "launch.md", ROOT / "verl_recipes/run/machine.py"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    assert not re.findall(r"ray stop|rm -rf? /tmp|pkill|killall", text)


def test_a_files_maker_is_named_only_if_it_makes_that_file():
    made_by = "python -m data_prep source=hub out=data/mini_r1"
    assert preflight.command_that_makes("data/mini_r1/test.parquet", made_by) == made_by
    assert preflight.command_that_makes("data/tiny/train.parquet", "python -m data_prep") == "python -m data_prep"
    for file in ("mine.parquet", "data/mini_r1/other.parquet", "data/tiny/train.parquet"):
        assert preflight.command_that_makes(file, made_by) == ""
    cfg = compose("train", "data.train_files=mine.parquet")
    (line,) = (each for each in machine.refusals(cfg=cfg) if "mine.parquet" in each.text)
    assert (line.state, line.fix) == ("wrong", "")


@pytest.mark.slow
def test_doctor_asks_for_the_key_of_a_tracker_and_for_data_and_model(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    overrides = ["tracker=[wandb]", "actor_rollout_ref.model.path=none", "data.train_files=none.parquet"]
    cfg = compose("train", *overrides)
    wrong = " ".join(line.text for line in machine.refusals(cfg=cfg) if line.state == "wrong")
    assert all(each in wrong for each in ("tracker=wandb: no key", "none holds no model", "none.parquet"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert machine.Line("ok", "tracker=wandb") in machine.refusals(cfg=cfg)


def test_several_machines_without_a_cluster_are_refused_at_once(monkeypatch):
    monkeypatch.setattr(train, "preflight", lambda cfg, run: None)
    with pytest.raises(UserError, match="nodes=2: this command runs on one machine"):
        train.run_once(compose("train", "hardware=a800_x8_nodes"), Console())


def test_a_cluster_without_enough_nodes_is_recognised():
    def node(gpus, alive=True):
        return {"Alive": alive, "Resources": {"GPU": float(gpus)} if gpus else {}}

    assert cluster.missing_nodes([node(8), node(8), node(0)], 2, 8, 16) == ""
    assert "nodes of [8, 0] GPUs" in cluster.missing_nodes([node(8), node(8, alive=False), node(0)], 2, 8, 16)
    assert cluster.missing_nodes([node(3), node(3)], 2, 2, 6) == ""  # split: two train, one generates
    assert cluster.missing_nodes([node(2), node(2)], 2, 2, 6) != ""


def test_another_run_in_the_cluster_is_known_by_its_queue():
    server, queue = ({"name": "any", "namespace": namespace} for namespace in ("of a job", "transfer_queue"))
    assert cluster.other_run([server]) == ""
    assert "another run is on the Ray cluster" in cluster.other_run([server, queue])


def test_a_node_that_ray_still_calls_alive_must_answer():
    with socket.create_server(("127.0.0.1", 0)) as server:
        node = {"NodeManagerAddress": "127.0.0.1", "NodeManagerPort": server.getsockname()[1]}
        assert cluster.node_answers(node)
    assert not cluster.node_answers(node)


def test_a_node_that_stays_away_ends_the_run_with_one_line_that_says_how_to_go_on(tmp_path, monkeypatch):
    def check_nodes(cfg, patience):
        raise UserError(f"2 nodes are wanted; waited {patience} s")

    monkeypatch.setattr(train, "check_nodes", check_nodes)
    train.await_return(None, RunFolder(tmp_path))  # not in a job
    monkeypatch.setattr(train, "in_job", lambda: True)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("40")
    with pytest.raises(UserError) as error:
        train.await_return(None, RunFolder(tmp_path))
    assert str(error.value) == "error: 2 nodes are wanted; waited 600 s; the same command goes on after step 40"


def test_a_job_joins_its_cluster_with_its_environment():
    config = {
        "ray_kwargs": {"ray_init": {"num_cpus": 16, "num_gpus": 8, "object_store_memory": 1, "log_to_driver": True}}
    }
    cluster.join_cluster(config, {"VERL_PLATFORM": "cpu"})
    expected = {"log_to_driver": True, "runtime_env": {"env_vars": {"VERL_PLATFORM": "cpu"}}}
    assert config["ray_kwargs"]["ray_init"] == expected


# From here on for real, on a cluster of two Ray nodes.


@pytest.fixture(scope="module")
def two_nodes():
    with running() as cluster_of_two:
        yield cluster_of_two


@pytest.fixture(scope="module")
def on_three(two_nodes, small_data, tmp_path_factory):
    """The folder of a run that wants three nodes, and the command that waits for them while other tests go on."""
    run_dir = tmp_path_factory.mktemp("three") / "run"
    command = two_nodes.on(0, *two_nodes.submission("nodes=3", "gpus=1", f"run_dir={run_dir}", *small_data))
    return run_dir, subprocess.Popen(
        command, cwd=ROOT, env=two_nodes.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


FOLLOWED = """
import sys
from pathlib import Path
from verl_recipes import submit
client = submit.connect(sys.argv[1])
sys.exit(submit.follow(sys.argv[1], client, submit.submit(client, sys.argv[3], Path(sys.argv[2]))))
"""  # submits a command in a folder, and follows it


class Relay:
    """Passes connections on to the dashboard, and can cut them all. It runs beside the test, as a process on node 1."""

    code = """
import socket, sys, threading
target, port = sys.argv[1], int(sys.argv[2])
pairs = []
def pump(a, b):
    try:
        while data := a.recv(65536):
            b.sendall(data)
    except OSError:
        pass
    for s in (a, b):
        try: s.shutdown(2)
        except OSError: pass
def cut():
    for line in sys.stdin:
        for s in pairs:
            try: s.shutdown(2)
            except OSError: pass
        print("cut", flush=True)
threading.Thread(target=cut, daemon=True).start()
server = socket.create_server(("127.0.0.1", port))
print("ready", flush=True)
while True:
    a, _ = server.accept()
    b = socket.create_connection((target, 8265))
    pairs += [a, b]
    for x, y in ((a, b), (b, a)):
        threading.Thread(target=pump, args=(x, y), daemon=True).start()
"""


@pytest.mark.end_to_end
def test_a_dropped_connection_is_taken_up_again_and_the_exit_status_is_the_jobs(two_nodes, on_three, tmp_path):
    relay = subprocess.Popen(
        two_nodes.on(0, sys.executable, "-c", Relay.code, two_nodes.ips[0], "8399"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert relay.stdout.readline() == "ready\n"
        job = "for i in $(seq 12); do echo line $i; sleep 0.3; done; exit 7"
        command = two_nodes.on(0, sys.executable, "-c", FOLLOWED, "http://127.0.0.1:8399", str(tmp_path), job)
        client = subprocess.Popen(command, cwd=ROOT, env=two_nodes.environment, stdout=subprocess.PIPE, text=True)
        seen = []
        for line in client.stdout:
            seen.append(line.strip())
            if line.strip() == "line 4":
                relay.stdin.write("\n")
                relay.stdin.flush()
                assert relay.stdout.readline() == "cut\n"
        assert client.wait(timeout=120) == 7
        assert [line for line in seen if line.startswith("line")] == [f"line {i + 1}" for i in range(12)]
    finally:
        relay.kill()


@pytest.mark.end_to_end
def test_a_job_is_told_of_a_signal_and_gets_longer_than_rays_three_seconds_to_save(two_nodes, tmp_path):
    saved, folder = tmp_path / "saved", tmp_path / "sent"
    folder.mkdir()
    saving = f"trap 'sleep 6; touch {saved}; exit 143' TERM; echo ready; for i in $(seq 600); do sleep 0.1; done"
    job = shlex.join(["bash", "-c", saving])
    address = f"http://{two_nodes.ips[0]}:8265"
    command = two_nodes.on(0, sys.executable, "-c", FOLLOWED, address, str(folder), job)
    client = subprocess.Popen(command, cwd=ROOT, env=two_nodes.environment, stdout=subprocess.PIPE, text=True)
    for line in client.stdout:
        if line.strip() == "ready":
            client.terminate()
    assert client.wait(timeout=120) == 143
    assert saved.exists()


@pytest.mark.end_to_end
def test_a_job_that_ended_with_its_head_is_not_waited_for(two_nodes):
    """The head that was started in its place has never heard of it."""
    code = (
        "import sys; from verl_recipes.submit import connect, follow\nfollow(sys.argv[1], connect(sys.argv[1]), 'gone')"
    )
    result = two_nodes.run(sys.executable, "-c", code, f"http://{two_nodes.ips[0]}:8265", timeout=60)
    assert result.returncode == 1
    assert "does not know gone: its head was started anew" in result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr


@pytest.mark.end_to_end
def test_a_job_that_the_cluster_does_not_know_is_one_line(two_nodes):
    unknown = two_nodes.submit("attach=none_such")
    assert (unknown.returncode, len(unknown.stderr.splitlines())) == (1, 1), unknown.stderr


@pytest.mark.end_to_end
def test_a_node_count_that_is_not_met_is_said_within_a_minute(on_three):
    run_dir, command = on_three
    output, _ = command.communicate(timeout=120)
    assert command.returncode != 0
    assert "3 nodes of 1 GPUs (3 in all) are needed, and the Ray cluster has nodes of [1, 1] GPUs" in output
    assert not run_dir.exists()


@pytest.mark.end_to_end
def test_a_cluster_that_another_run_uses_is_refused(two_nodes):
    code = """
import sys, ray
from verl_recipes.run import cluster
ray.init(address=sys.argv[1])
@ray.remote
class Controller: pass
controller = Controller.options(name="TransferQueueController", namespace="transfer_queue").remote()
ray.get(controller.__ray_ready__.remote())
cluster.await_nodes(sys.argv[1], 2, 1, 2, patience=1)
"""
    result = two_nodes.run(sys.executable, "-c", code, f"{two_nodes.ips[0]}:6379")
    assert (result.returncode, result.stderr.splitlines()[-1][:37]) == (1, "error: another run is on the Ray clus")


def steps_of(run_dir):
    """The metrics of every training step that a run has finished, in the order of its files."""
    lines = [line for name in ("metrics.jsonl", "metrics.part.jsonl") for line in metrics_of(run_dir, name)]
    return [line["data"] for line in lines if "training/global_step" in line["data"]]


def samples_of(run_dir, *keys):
    """Of each step, these keys of all responses, sorted."""
    files = [run_dir / "samples" / "train" / f"{step}.jsonl" for step in range(1, len(steps_of(run_dir)) + 1)]
    return [sorted(tuple(row[key] for key in keys) for row in read_lines(file)) for file in files]


@pytest.fixture(scope="module")
def on_two(two_nodes, tmp_path_factory, small_data):
    """The folder of a run of two steps over two nodes, and the command that made it."""
    run_dir = tmp_path_factory.mktemp("two") / "run"
    arguments = [f"run_dir={run_dir}", *TWO_NODES, *RESUMED, *small_data]
    result = two_nodes.submit(*arguments, "trainer.total_training_steps=2")
    assert result.returncode == 0, result.stdout + result.stderr
    return run_dir, arguments


def test_ctrl_c_leaves_the_job_running_and_says_how_to_follow_and_to_stop_it(monkeypatch, capsys):
    asked = []

    class Client:
        def __getattr__(self, name):
            return lambda *_: asked.append(name)

    def follow(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(submit, "connect", lambda address: Client())
    monkeypatch.setattr(submit, "follow", follow)
    assert submit.main("http://head:8265", "attach=job7") == 130
    said = capsys.readouterr().err
    assert "launch/ray_submit.sh http://head:8265 attach=job7" in said
    assert "ray job stop --address http://head:8265 job7" in said
    assert asked == ["get_job_info"]


@pytest.mark.long
@pytest.mark.end_to_end
def test_a_run_over_two_nodes_has_a_rank_on_each_and_steps_as_on_one(two_nodes, on_two, resumed):
    """For as long as the other run was not killed: vLLM's sampling is not in a checkpoint."""
    run_dir, _ = on_two
    for node in (0, 1):
        logs = (two_nodes.folder / str(node)).glob("session_latest/logs/worker-*.out")
        assert any(":actor_name:WorkerDict" in log.read_text() for log in logs), node
    assert len(list((run_dir / "checkpoints/global_step_2/actor").glob("model_world_size_2_rank_*.pt"))) == 2
    assert len(steps_of(run_dir)[:2]) == 2
    for data, there in zip(steps_of(run_dir)[:2], steps_of(resumed["run_dir"])[:2], strict=True):
        assert 0 < data["actor/grad_norm"] == pytest.approx(there["actor/grad_norm"], rel=1e-4)
    assert min(data[name] for data in steps_of(run_dir) for name in AGREEMENT if name in data) >= 0.999
    same = [samples_of(folder, "prompt", "response")[:2] for folder in (run_dir, resumed["run_dir"])]
    assert same[0] == same[1]


@pytest.mark.long
@pytest.mark.end_to_end
def test_a_node_that_dies_is_waited_for_and_no_step_is_lost_or_repeated(two_nodes, on_two, resumed, tmp_path):
    """The run goes on to a fourth step; everything on the second node is killed after the third, and it comes back."""
    (run_dir, arguments), output = on_two, tmp_path / "output.txt"
    command = two_nodes.submission(*arguments, "trainer.restarts=2")

    def wait_for(condition, seconds=600):
        deadline = time.monotonic() + seconds
        while not condition():
            assert client.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.1)

    with output.open("w") as file:
        client = subprocess.Popen(
            two_nodes.on(0, *command), cwd=ROOT, env=two_nodes.environment, stdout=file, stderr=file
        )
    try:
        wait_for(lambda: len(steps_of(run_dir)) == 3)
        two_nodes.kill_node(1)
        wait_for(lambda: "nodes of [1] GPUs; waiting" in output.read_text())
        two_nodes.start(1)
        assert client.wait(timeout=600) == 0, output.read_text()
    finally:
        client.kill()
    assert [data["training/global_step"] for data in steps_of(run_dir)] == [1, 2, 3, 4]
    assert samples_of(run_dir, "prompt") == samples_of(resumed["run_dir"], "prompt")
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 4
