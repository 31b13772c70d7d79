"""python -m verl_recipes.train [overrides]: one run, from a base model to a trained one and the numbers of both.

    runs/tiny-seed0/
        data.json      the hashes of the training data
        config.yaml    the resolved configuration; `python -m verl.trainer.main_ppo` takes it as it is
        log.txt        what verl, Ray and vLLM print
        metrics.jsonl  verl's metrics, one line a step
        samples/       every response with all that the reward said of it (verl_recipes/in_verl/sampler.py)
        checkpoints/   verl's; the same command again continues from the last one
        model/         the trained model in Hugging Face's format
        summary.json   base and trained model side by side, seconds by stage, versions
        curves.png     reward, accuracy, length and agreement over the steps
        report.html    all of it on one page (verl_recipes/report.py)

The trainer is verl's own, in a process of its own (run/supervise.py). It evaluates the base model before the
first step and the trained one after the last, on the test problems, with the sampler and the reward of training.
"""

import json
import platform
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from data_prep.cli import CONFIGS, UserError, command
from verl_recipes.in_verl.alarms import DegenerateOutputError, component_metrics
from verl_recipes.measure.summary import read_samples, summarize, write_whole
from verl_recipes.report import write_report
from verl_recipes.reporting.curves import draw
from verl_recipes.run.checkpoints import checkpoint_steps, last_checkpoint
from verl_recipes.run.cluster import RETURN, check_nodes, in_job, join
from verl_recipes.run.log import reason
from verl_recipes.run.preflight import MEASURED, check_parquet, check_resume, check_same, hashes, preflight, read_json
from verl_recipes.run.progress import Progress
from verl_recipes.run.supervise import locked, run_verl
from verl_recipes.settings.schema import TrainKeys

NOTICE = 25  # seconds between SIGTERM and the end, for a checkpoint; schedulers commonly give 30
TELLING = 120  # seconds that verl gets after its last step, to tell the trackers' servers and to end
LATER = "`wandb sync` and `swanlab sync` send what a server missed"
PACKAGES = ("verl", "vllm", "ray", "torch", "transformers", "tensordict")


class VerlStoppedError(UserError):
    """verl ended before its last step."""


class StillTellingError(Exception):
    """verl's last step is done, and it does not end."""


def empty(run_dir: Path) -> None:
    """Delete what is in a run folder, but for the lock that this process holds."""
    entries = [path for path in run_dir.iterdir() if path.name != "lock"]
    if entries and not (run_dir / "config.yaml").exists():
        raise UserError(f"{run_dir} holds no config.yaml, so it is no run folder; nothing was deleted")
    for path in entries:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def merge_metrics(run_dir: Path) -> None:
    """Move what verl's file logger wrote since its start into metrics.jsonl; a step done again replaces the old.

    verl saves a step, sends its weights to the engines, evaluates, and logs the step last. Of one that was killed in
    between, the line holds what the step's samples tell.
    """
    metrics, part = run_dir / "metrics.jsonl", run_dir / "metrics.part.jsonl"
    text = "".join(path.read_text() for path in (metrics, part) if path.exists())
    by_step: dict[int, dict[str, Any]] = {}
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):  # a killed run may leave half a line
            entry = json.loads(line)
            step, same = entry["step"], by_step.get(entry["step"], {})  # the evaluation alone may be done again
            by_step = {done: kept for done, kept in by_step.items() if done < step} | {step: same | entry["data"]}
    saved = last_checkpoint(run_dir)
    samples = run_dir / "samples" / "train" / f"{saved}.jsonl"
    if samples.exists() and "training/global_step" not in by_step.get(saved, {}):
        told = {"training/global_step": saved} | component_metrics(read_samples(samples), "reward")
        by_step[saved] = told | by_step.get(saved, {})
    lines = (json.dumps({"step": step, "data": data}) + "\n" for step, data in sorted(by_step.items()))
    write_whole(metrics, "".join(lines))
    part.unlink(missing_ok=True)


def remove_old(cfg: DictConfig, run_dir: Path) -> None:
    """Remove checkpoints that verl's earlier processes left: each counts its own alone when it keeps the newest few."""
    keep, counted, folder = cfg.trainer.max_actor_ckpt_to_keep, last_checkpoint(run_dir), run_dir / "checkpoints"
    older = [step for step in checkpoint_steps(folder) if step <= counted]
    if keep and keep > 0 and cfg.trainer.resume_mode == "auto":
        for step in older[keep:]:
            shutil.rmtree(folder / f"global_step_{step}", ignore_errors=True)


def whole_lines(file: Path) -> int:
    """The number of lines of a file, after half a line at its end, of a process that was killed, is cut off."""
    if not file.exists():
        return 0
    with file.open("rb+") as lines:
        content = lines.read()
        lines.truncate(content.rfind(b"\n") + 1)
    return content.count(b"\n")


def is_measured(file: Path, responses: int) -> bool:
    """Whether all responses of an evaluation are there: with data.val_batch_size they come batch by batch."""
    return file.exists() and whole_lines(file) >= responses


def start_verl(cfg: DictConfig, run_dir: Path, console: Console, batches: int = 1, **trainer: Any) -> None:
    """Run verl's trainer once on the run's configuration, with these keys of `trainer` set, until it ends.

    `batches`: of an evaluation, for the progress that is shown.
    """
    merge_metrics(run_dir)
    remove_old(cfg, run_dir)
    whole_lines(run_dir / "samples" / "events.jsonl")
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    config["trainer"] |= trainer
    # n samples a test problem as n prompts of one: for a prompt with several, verl bootstraps best@k and worst@k of
    # every key of the reward, 25 s on 256 problems, where summary.json has the exact pass@k.
    files, validation = config["data"]["val_files"], config["actor_rollout_ref"]["rollout"]["val_kwargs"]
    config["data"]["val_files"] = ([files] if isinstance(files, str) else files) * validation["n"]
    validation["n"] = 1
    environment = {"VERL_FILE_LOGGER_PATH": str(run_dir.resolve() / "metrics.part.jsonl"), "PYTHONUNBUFFERED": "1"}
    for tracker in cfg.trackers.values():
        environment |= tracker.environment
    if environment.get("SWANLAB_MODE") in ("offline", "local", "disabled"):
        environment["SWANLAB_API_KEY"] = ""  # with one verl logs in, although nothing is to be sent
    if cfg.trainer.device == "cpu":
        environment["VERL_PLATFORM"] = "cpu"
    if in_job():
        join(config, environment)
    write_whole(run_dir / "config.yaml", OmegaConf.to_yaml(config))
    log = run_dir / "log.txt"
    already = log.stat().st_size if log.exists() else 0
    try:
        with Progress(
            console, run_dir, last_checkpoint(run_dir), cfg.trainer.total_training_steps, batches
        ) as progress:

            def watch() -> None:
                progress.update()
                if progress.done and time.monotonic() - progress.done > TELLING:
                    raise StillTellingError

            notice = 0 if config["trainer"].get("val_only") else NOTICE
            status = run_verl(run_dir, log, environment, watch, notice)
            progress.update()
    except StillTellingError:
        line = f"verl has not ended {TELLING} s after its last step, as where a tracker's server hangs: it was ended"
        console.print(f"{line}; {LATER}", soft_wrap=True)
        return
    except SystemExit as error:
        if error.code == 128 + signal.SIGTERM:
            console.print(
                f"ended by SIGTERM; the same command goes on after step {last_checkpoint(run_dir)}", soft_wrap=True
            )
        raise
    finally:
        merge_metrics(run_dir)
    if status and progress.done:
        line = f"verl's last step is done, and after it: {reason(log, already)} (everything it printed: {log}); {LATER}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    elif status:
        raise VerlStoppedError(f"verl stopped: {reason(log, already)} (everything it printed: {log})")


def to_hugging_face(actor: Path, model: Path, log: Path) -> None:
    """Write the actor of a checkpoint of verl's to the new folder `model` in Hugging Face's format."""
    lora = (actor / "lora_train_meta.json").exists()
    if not lora and list((actor / "huggingface").glob("*.safetensors")):  # save_contents holds hf_model: there, in fp32
        shutil.copytree(actor / "huggingface", model)
        return
    calls = [["verl.model_merger", "merge", "--backend=fsdp", f"--local_dir={actor}", f"--target_dir={model}"]]
    calls += [["verl_recipes.run.merge_lora", str(model)]] if lora else []
    for call in calls:
        with log.open("a") as output:
            if subprocess.run([sys.executable, "-m", *call], stdout=output, stderr=output).returncode:
                raise UserError(f"{call[0]} failed on {actor}; see {log}")


def export(run_dir: Path, step: int) -> None:
    """Write the actor of a run's checkpoint to model/."""
    shutil.rmtree(run_dir / "model", ignore_errors=True)
    actor = run_dir / "checkpoints" / f"global_step_{step}" / "actor"
    to_hugging_face(actor, run_dir / "model", run_dir / "log.txt")


def stage_seconds(events: list[dict[str, Any]], started: float) -> dict[str, float]:
    """Seconds by stage since `started`, as the events since then tell."""
    seconds: dict[str, float] = {}
    stage, since = "start", started
    for event in events:
        if event["event"] == "generating":
            seconds[stage] = seconds.get(stage, 0) + event["time"] - since
            stage, since = {"validation": "evaluate", "train": "train"}[event["split"]], event["time"]
    seconds[stage] = seconds.get(stage, 0) + time.time() - since
    return seconds


def provenance() -> dict[str, Any]:
    """What made the numbers: versions, Python, and the commit of this checkout where it is one."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=CONFIGS, capture_output=True, text=True
    )
    return {
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "git_commit": git.stdout.strip() or None,
    }


def show(summary: dict[str, Any], run_dir: Path, console: Console) -> None:
    """The final table."""
    table = Table("", "base", f"after {summary['steps']} steps", title=str(run_dir))
    for name, base in summary["base"].items():
        table.add_row(
            name, *(f"{value:.3f}" if value < 10 else f"{value:.1f}" for value in (base, summary["trained"][name]))
        )
    seconds = ", ".join(f"{stage} {value:.0f}" for stage, value in summary["seconds"].items())
    console.print(
        table,
        f"seconds: {seconds}",
        f"{run_dir}: report.html model/ summary.json curves.png samples/ log.txt",
        sep="\n",
    )


def await_return(cfg: DictConfig, run_dir: Path) -> None:
    """In a job: wait for a node that the run lost; without it verl would not start, or wait for it and say nothing."""
    if in_job():
        try:
            check_nodes(cfg, RETURN)
        except UserError as error:
            again = f"the same command goes on after step {last_checkpoint(run_dir)}"
            raise UserError(f"{str(error).removeprefix('error: ')}; {again}") from None


def train(cfg: DictConfig, run_dir: Path, console: Console) -> dict[str, Any]:
    """Bring the run to its last step, from wherever it is, and return its summary."""
    started, steps, resumed_from = time.time(), cfg.trainer.total_training_steps, last_checkpoint(run_dir)
    events = run_dir / "samples" / "events.jsonl"
    earlier = whole_lines(events)
    responses = cfg.eval_n * check_parquet(cfg.data.val_files, "data.val_files") if cfg.data.val_batch_size else 1
    base, trained = (run_dir / "samples" / "validation" / f"{step}.jsonl" for step in (0, steps))
    if base.exists():
        check_same(cfg, run_dir, MEASURED, "its measurement before training does not allow")
    if resumed_from:
        check_resume(cfg, run_dir, resumed_from)
        console.print(f"continuing {run_dir} after step {resumed_from}", soft_wrap=True)
    else:
        write_whole(run_dir / "data.json", json.dumps(hashes(cfg.data.train_files), indent=2) + "\n")
    for left in reversed(range(cfg.trainer.restarts + 1)):
        if last_checkpoint(run_dir) >= steps:
            break
        try:
            start_verl(cfg, run_dir, console, val_before_train=not is_measured(base, responses))
            break
        except VerlStoppedError as error:
            if not left or DegenerateOutputError.__name__ in str(error):  # which would only happen again
                raise
            line = f"{str(error).removeprefix('error: ')}; starting it again (trainer.restarts: {left - 1} left)"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            await_return(cfg, run_dir)
    if not is_measured(trained, responses):  # the run was ended between its last step and the evaluation of it
        start_verl(cfg, run_dir, console, val_before_train=True, val_only=True)
    seconds = stage_seconds(read_samples(events)[earlier:], started)
    export_started = time.time()
    export(run_dir, last_checkpoint(run_dir))
    summary = {
        "name": cfg.name,
        "steps": last_checkpoint(run_dir),
        "seed": cfg.seed,
        "base": summarize(read_samples(base)),
        "trained": summarize(read_samples(trained)),
        "resumed_from": resumed_from,
        "seconds": seconds | {"export": time.time() - export_started, "total": time.time() - started},
    }
    mean = f"mean@{cfg.eval_n}"
    draw(
        run_dir,
        f"{cfg.name}: {mean} on the test problems {summary['base'][mean]:.3f} to {summary['trained'][mean]:.3f}",
    )
    summary |= provenance()
    write_whole(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    try:
        write_report([run_dir], run_dir / "report.html")
    except Exception as error:  # the run is whole without it
        line = f"no report.html: {error!r}; `python -m verl_recipes.report {run_dir}` tries again"
        console.print(line, markup=False, soft_wrap=True)
    return summary


@command("train", TrainKeys)
def main(cfg: DictConfig) -> None:
    console, run_dir = Console(), Path(cfg.run_dir)
    preflight(cfg, run_dir)
    if in_job():
        check_nodes(cfg)
    with locked(run_dir):
        if cfg.fresh:
            empty(run_dir)
        summary_file = run_dir / "summary.json"
        again = "delete it, and the same command writes it again"
        summary = read_json(summary_file, again) if summary_file.exists() else None
        if summary and summary["steps"] >= cfg.trainer.total_training_steps:
            line = f"{run_dir} is complete; fresh=true starts it anew, trainer.total_training_steps=N goes on"
            console.print(line, soft_wrap=True)
        else:
            summary = train(cfg, run_dir, console)
        show(summary, run_dir, console)


if __name__ == "__main__":
    main()
