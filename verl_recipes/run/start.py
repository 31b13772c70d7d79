"""One start of verl in the folder of a run: the configuration that verl gets, its end, and its metrics."""

import glob
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from data_prep.cli import UserError, as_list, same_command
from verl_recipes.measure.batch import component_metrics
from verl_recipes.run.best import best_step, early_end, evaluations
from verl_recipes.run.checkpoints import RESHARDED, last_checkpoint, remove_old, sealing
from verl_recipes.run.cluster import in_job, join_cluster
from verl_recipes.run.folder import RunFolder, add_step, append_line, as_lines, cut_half_line, read_lines, write_whole
from verl_recipes.run.log import last_error
from verl_recipes.run.machine import hardware
from verl_recipes.run.progress import Losses, Progress
from verl_recipes.run.supervise import SFT, run_verl, size_of
from verl_recipes.settings.configuration import KEPT, STALENESS, is_split, kept_of, user_cache

NOTICE = 25  # seconds between SIGTERM and the end, for a checkpoint; schedulers commonly give 30
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"  # Ray's: the seconds between a job's SIGTERM and SIGKILL, 3 unless it is set
CLEANUP = 15  # of these are for what follows the checkpoint
SENDING = 120  # seconds after its last step in which verl may send what is left to the trackers' servers, and end
NOT_STARTED = "The current node timed out during startup"  # Ray 2.60 gives a node 30 seconds, whatever is set
LATER = "`wandb sync` and `swanlab sync` send what a server missed"


class VerlStoppedError(UserError):
    """verl ended before its last step."""


class EnoughError(Exception):
    """verl has done what is wanted of it and is ended."""


def say(console: Console, line: str) -> None:
    """Print a line without wrapping it and without markup: names may contain square brackets."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def merge_metrics(run: RunFolder) -> None:
    """Move what verl's file logger has written into metrics.jsonl. A repeated step replaces the old one.

    verl logs a step last: after it has saved it, sent its weights to the engines and evaluated. If verl was killed in
    between, the step's line is made from the step's samples.
    """
    by_step: dict[int, dict[str, Any]] = {}
    for entry in read_lines(run.metrics) + read_lines(run.metrics_part, skip_damaged=True):  # a full disk cuts lines
        add_step(by_step, entry["step"], entry["data"])
    saved = last_checkpoint(run.checkpoints)
    if "training/global_step" not in by_step.get(saved, {}) and (rows := read_lines(run.samples_of("train", saved))):
        known = {"training/global_step": saved} | component_metrics(rows)
        by_step[saved] = known | by_step.get(saved, {})
    write_whole(run.metrics, as_lines({"step": step, "data": data} for step, data in sorted(by_step.items())))
    run.metrics_part.unlink(missing_ok=True)


def typed() -> str:
    """The command that a person typed, as a shell takes it."""
    return shlex.join(["python", "-m", f"verl_recipes.{Path(sys.argv[0]).stem}", *sys.argv[1:]])


def as_pattern(file: str) -> str:
    """A data file for verl's reader (`datasets`), which takes `[`, `*` and `?` in its full path for a pattern."""
    full = os.path.abspath(file)
    return file if glob.escape(full) == full else glob.escape(full)


def as_verl_wants(cfg: DictConfig, trainer: dict[str, Any]) -> dict[str, Any]:
    """A run's resolved configuration, with these keys of `trainer` set.

    n samples of a test problem become n prompts with one sample each. If a prompt has several samples, verl bootstraps
    best@k and worst@k of every key of the reward, which takes 25 s for 256 problems; summary.json has the exact pass@k.
    """
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    # `start_verl` removes old checkpoints (run/checkpoints.py, remove_old).
    config["trainer"] |= trainer | {"max_actor_ckpt_to_keep": None, "max_critic_ckpt_to_keep": None}
    config["trainer"]["remove_previous_ckpt_in_save"] = False
    data, validation = config["data"], config["actor_rollout_ref"]["rollout"]["val_kwargs"]
    data |= {key: [as_pattern(file) for file in as_list(data[key])] for key in ("train_files", "val_files")}
    data["val_files"] *= validation["n"]
    validation["n"] = 1
    return config


def environment_of(cfg: DictConfig, run: RunFolder) -> dict[str, str]:
    """Environment variables that verl and all its processes get in addition."""
    environment = {"VERL_FILE_LOGGER_PATH": str(run.metrics_part.resolve())}
    environment |= {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}  # verl opens files without an encoding
    environment["VLLM_NO_USAGE_STATS"] = "1"
    if is_split(cfg):  # verl 0.9.1 crashes on a message at level INFO (trainer_separate_async.py, flush=True)
        environment["VERL_LOGGING_LEVEL"] = "WARNING"
    rollout = cfg.actor_rollout_ref.rollout
    environment[KEPT] = str(kept_of(rollout.top_p, rollout.top_k))
    if cfg.staleness:
        environment[STALENESS] = str(cfg.staleness)
    for tracker in cfg.trackers.values():
        environment |= tracker.environment
    if environment.get("SWANLAB_MODE") in ("offline", "local", "disabled"):
        environment["SWANLAB_API_KEY"] = ""  # with a key verl logs in, even if nothing is sent
    return environment | ({"VERL_PLATFORM": "cpu"} if cfg.trainer.device == "cpu" else on_gpus())


def on_gpus() -> dict[str, str]:
    """Environment variables on GPUs; what this process has set stays.

    Compiled kernels outlive a run. verl turns vLLM's cache off, as engines that started together once wrote over each
    other's files; since torch 2.10 each is written whole. Inductor's cache would lie in the scratch folder; vLLM's and
    Triton's lie below the home. And vLLM 0.24 samples a Llama's tokens by FlashInfer unless told not to, and ends if
    that is not installed.
    """
    wanted = {"VLLM_DISABLE_COMPILE_CACHE": "0", "TORCHINDUCTOR_CACHE_DIR": str(user_cache("inductor"))}
    if not find_spec("flashinfer"):
        wanted["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def notice() -> int:
    """Seconds between SIGTERM and the end, for a checkpoint: NOTICE, or more in a job that Ray gives more."""
    return max(NOTICE, int(os.environ.get(STOP_WAIT, "0")) - CLEANUP) if in_job() else NOTICE


def run_until_end(run: RunFolder, console: Console, *args: Any, **options: Any) -> str:
    """run_verl, and once more if Ray did not start in time. Returns why verl failed, "" if it did not."""
    for again in (False, True):
        already = size_of(run.log)
        if not run_verl(run, *args, **options):
            break
        why = last_error(run.log, already)
        if again or NOT_STARTED not in why:
            return f"{why} (everything it printed: {run.log})"
        say(console, "Ray did not start within its 30 seconds, as happens on a busy machine; starting it once more")
    return ""


@contextmanager
def start_of(
    cfg: DictConfig, run: RunFolder, config: dict[str, Any], tidy: Callable[[], None] = lambda: None
) -> Iterator[dict[str, str]]:
    """Write what verl gets, yield the environment of all its processes, and record when it began and ended.

    Meanwhile finished checkpoints are sealed, and `tidy` is called.
    """
    environment = environment_of(cfg, run)
    for left in run.checkpoints.glob(f"{RESHARDED}*"):  # by a start that was killed while it read one
        shutil.rmtree(left, ignore_errors=True)
    if in_job():
        join_cluster(config, environment)
    write_whole(run.verl_config, OmegaConf.to_yaml(config))
    facts = {"command": typed(), "machine": hardware(cfg.trainer.device != "cpu")}
    append_line(run.starts, {"event": "began", "time": time.time()} | facts)
    try:
        with sealing(run.checkpoints, tidy):
            yield environment
    finally:
        append_line(run.starts, {"event": "ended", "time": time.time()})
        merge_metrics(run)


def start_verl(cfg: DictConfig, run: RunFolder, console: Console, batches: int = 1, **trainer: Any) -> None:
    """Run verl's trainer once, with these keys of `trainer` set, until it ends.

    Args:
        batches: how many batches an evaluation has, for the progress display.

    Raises:
        VerlStoppedError: verl ended before its last step.
    """
    merge_metrics(run)

    seen = -1

    def tidy() -> None:  # reads the metrics once a step, although it is asked every second
        nonlocal seen
        before, seen = seen, size_of(run.metrics_part)
        if before != seen:
            best = best_step(evaluations(run)) if cfg.get("keep") == "best" else 0
            remove_old(run.checkpoints, cfg.trainer.max_actor_ckpt_to_keep, best)

    tidy()
    cut_half_line(run.events)
    config = as_verl_wants(cfg, trainer)
    first, steps = last_checkpoint(run.checkpoints), cfg.trainer.total_training_steps
    try:
        with start_of(cfg, run, config, tidy) as environment, Progress(console, run, first, steps, batches) as progress:

            def watch() -> None:
                progress.update()
                if progress.done and time.monotonic() - progress.done > SENDING:
                    raise EnoughError

            wait = 0 if config["trainer"].get("val_only") else notice()
            why = run_until_end(run, console, environment, watch, wait)
            progress.update()
    except EnoughError:
        line = f"verl was ended: it still ran {SENDING} s after its last step, as if a tracker's server hangs"
        say(console, f"{line}; {LATER}")
        return
    except SystemExit as error:
        if error.code == 128 + signal.SIGTERM:
            step = last_checkpoint(run.checkpoints)  # an evaluation has none
            say(console, f"ended by a signal; {same_command()} goes on" + (f" after step {step}" if step else ""))
        raise
    if why and (config["trainer"].get("val_only") or not early_end(cfg, run)):
        if not progress.done:
            raise VerlStoppedError(f"verl stopped: {why}")
        say(console, f"verl's last step is done, but then: {why}; {LATER}")


def start_sft(
    cfg: DictConfig,
    run: RunFolder,
    console: Console,
    config: dict[str, Any],
    enough: Callable[[dict[int, float]], bool],
) -> None:
    """Run verl's supervised trainer until it ends, or until `enough`.

    Args:
        enough: asked with the losses on held-out traces since this start, by step.

    Raises:
        VerlStoppedError: verl ended before its last step.
    """
    merge_metrics(run)
    remove_old(run.checkpoints, config["trainer"]["max_ckpt_to_keep"])
    first, steps = last_checkpoint(run.checkpoints), config["trainer"]["total_training_steps"]
    try:
        with start_of(cfg, run, config) as environment, Losses(console, run, first, steps) as progress:

            def watch() -> None:
                progress.update()
                if enough(progress.held_out):
                    raise EnoughError

            why = run_until_end(run, console, environment, watch, trainer=SFT)
            progress.update()
    except EnoughError:
        return
    if why:
        raise VerlStoppedError(f"verl stopped: {why}")
