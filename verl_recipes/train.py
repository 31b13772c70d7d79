"""python -m verl_recipes.train [overrides]: one run, from a base model to a trained one and the numbers of both.

    runs/tiny-seed0/
        run.json       marks the folder as a run; hashes of data and model, versions
        config.yaml    the resolved configuration
        verl.yaml      the configuration that verl was last started with; `python -m verl.trainer.main_ppo` takes it
        log.txt        what verl, Ray and vLLM print
        metrics.jsonl  verl's metrics, one line a step
        samples/       every response with each component of its reward (verl_recipes/in_verl/sampler.py)
        checkpoints/   verl's; the same command again continues from the last one
        model/         the trained model in Hugging Face's format
        summary.json   base and trained model side by side, seconds by stage, versions
        curves.png     reward, accuracy, length and agreement over the steps
        report.html    all of it on one page (verl_recipes/report.py)

    python -m verl_recipes.train                                           the tiny run: two cores, five minutes
    python -m verl_recipes.train seeds=[0,1,2]                             three of them, and one page for all
    python -m verl_recipes.train recipe=mini_r1 model=qwen2.5_3b_instruct hardware=h100 gpus=4

The trainer is verl's own, in a process of its own (run/supervise.py). It evaluates the base model before the first step
and the trained one after the last, on the test problems, with the sampler and the reward of training.
"""

import math
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_prep.cli import UserError, command, compose, overrides_of, same_command
from verl_recipes.run.best import best_step, early_end, evaluations, last_step
from verl_recipes.run.checkpoints import last_checkpoint
from verl_recipes.run.cluster import RETURN, check_nodes, in_job
from verl_recipes.run.fingerprint import begin, depends_on_steps, flat, provenance
from verl_recipes.run.folder import (
    RunFolder,
    cut_half_line,
    read_json,
    read_lines,
    read_metrics,
    read_object,
    write_json,
)
from verl_recipes.run.goodput import goodput
from verl_recipes.run.preflight import check_resume, preflight
from verl_recipes.run.start import VerlStoppedError, merge_metrics, say, start_verl
from verl_recipes.run.weights import check_replaced, to_hugging_face
from verl_recipes.settings.schema import TrainKeys


def await_return(cfg: DictConfig, run: RunFolder) -> None:
    """In a job: wait for a lost node. Without it verl would not start, or would wait and say nothing."""
    if in_job():
        try:
            check_nodes(cfg, RETURN)
        except UserError as error:
            step = last_checkpoint(run.checkpoints)
            raise UserError(f"{error.message}; {same_command()} goes on after step {step}") from None


def lacks_test(cfg: DictConfig, run: RunFolder) -> bool:
    """Whether the last checkpoint's test is still to be made: verl saves a step first, and then tests it."""
    done, each = last_checkpoint(run.checkpoints), cfg.trainer.get("test_freq", 0)
    return done > 0 < each and done % each == 0 and done not in evaluations(run)


def train(cfg: DictConfig, run: RunFolder, console: Console, problems: int) -> None:
    """Continue the run up to its last step, and measure the model of that step on the `problems` of the test set."""
    done, responses = last_checkpoint(run.checkpoints), cfg.eval_n * problems if cfg.data.val_batch_size else 1
    if 0 < done < last_step(cfg, run):
        say(console, f"continuing {run.path} after step {done}")
    for left in reversed(range(cfg.trainer.restarts + 1)):
        if last_checkpoint(run.checkpoints) >= last_step(cfg, run):
            break
        if read_object(run.summary).get("early_end"):  # it would say that the run is complete
            run.summary.unlink()
        try:
            base = run.samples_of("validation", 0)
            untested = lacks_test(cfg, run) or cut_half_line(base) < responses
            start_verl(cfg, run, console, val_before_train=untested)
            break
        except VerlStoppedError as error:
            if not left or "DegenerateOutputError" in str(error):  # it would only happen again
                raise
            say(console, f"{error.message}; starting it again (trainer.restarts: {left - 1} left)")
            await_return(cfg, run)
    if early := early_end(cfg, run):
        say(console, f"{cfg.patience} tests in a row brought nothing better: the run ends after step {early}")
    trained = run.samples_of("validation", last_step(cfg, run))
    if cut_half_line(trained) < responses:  # the run was ended before the last evaluation
        run.summary.unlink(missing_ok=True)  # of other responses, if there is one
        start_verl(cfg, run, console, val_before_train=True, val_only=True)
    merge_metrics(run)  # of a start that was killed in its last seconds


def stage_seconds(events: list[dict[str, Any]], started: float, ended: float) -> dict[str, float]:
    """The seconds that each stage took between two times, from the events in between."""
    seconds: dict[str, float] = {}
    stage, since = "start", started
    for event in events:
        if event["event"] == "generating":
            seconds[stage] = seconds.get(stage, 0) + event["time"] - since
            stage, since = {"validation": "evaluate", "train": "train"}[event["split"]], event["time"]
    seconds[stage] = seconds.get(stage, 0) + ended - since
    return seconds


def write_summary(cfg: DictConfig, run: RunFolder, spent: dict[str, Any]) -> None:
    """summary.json: base and trained model side by side."""
    from verl_recipes.measure.evaluation import summarize, what_is_missing

    steps = last_step(cfg, run)
    base, trained = (read_lines(run.samples_of("validation", step)) for step in (0, steps))
    about = {"name": cfg.name, "steps": steps, "seed": cfg.seed, "base": summarize(base), "trained": summarize(trained)}
    about |= {"best_step": best_step(evaluations(run)), "early_end": bool(early_end(cfg, run))}
    about |= {"missing": what_is_missing(trained), "goodput": goodput(run)}
    write_json(run.summary, about | spent | provenance())


def write_curves(cfg: DictConfig, run: RunFolder, console: Console) -> None:
    """curves.png. A machine without matplotlib lacks the picture, and its run is none the worse."""
    figures = read_object(run.summary)
    mean = f"mean@{cfg.eval_n}"
    gain = [f"{figures[side][mean]:.3f}" for side in ("base", "trained") if mean in figures.get(side, {})]
    try:
        from verl_recipes.reporting.draw import picture

        picture(run, f"{cfg.name}: {mean} on the test problems {' to '.join(gain)}" if gain else cfg.name)
    except ModuleNotFoundError as error:
        say(console, f"{error.name} is not installed, so there is no {run.curves} and the report has no pictures")


def write_report(folders: list[Path], out: Path) -> None:
    """The page of one run or of several."""
    from verl_recipes.reporting import page

    page.write_report(folders, out)


def finish(cfg: DictConfig, run: RunFolder, console: Console, spent: Callable[[float], dict[str, Any]]) -> bool:
    """Write what follows the last step; returns whether all of it succeeded. One failure does not stop the rest.

    Args:
        spent: a function from the time at which training ended to what summary.json records of this command.
    """
    trained, step = time.time(), last_step(cfg, run)
    stages: dict[Path, Callable[[], None]] = {
        run.model: lambda: to_hugging_face(run.checkpoints / f"global_step_{step}" / "actor", run.model, run.log),
        run.summary: lambda: write_summary(cfg, run, spent(trained)),
        run.curves: lambda: write_curves(cfg, run, console),
        run.report: lambda: write_report([run.path], run.report),
    }
    stale = read_object(run.summary).get("steps") != step
    if stale:  # a failure must leave nothing of an earlier step
        if not run.model.is_symlink():  # of a link nothing is removed here
            check_replaced(run.model)  # again, as the training took its time
        shutil.rmtree(run.model, ignore_errors=True)
        for old in (run.summary, run.curves, run.report):
            old.unlink(missing_ok=True)
    failed = False
    for made, stage in stages.items():
        # The summary's seconds are those of the training. An earlier model/ may be a link, which is still there.
        if made in (run.model, run.summary) and made.exists() and not stale:
            continue
        try:
            stage()
        except (Exception, UserError) as error:
            failed = True
            what = error.message if isinstance(error, UserError) else repr(error)
            say(console, f"{made} could not be made: {what}; {same_command()} tries again")
    return not failed


def show(run: RunFolder, console: Console) -> None:
    summary = read_json(run.summary, "delete it, and the same command writes it again")
    table = Table("", "base", f"after {summary['steps']} steps", title=Text(str(run.path)))
    for name in summary["base"] | summary["trained"]:
        values = (summary[side].get(name, math.nan) for side in ("base", "trained"))
        table.add_row(name, *(f"{value:.1f}" if value >= 10 else f"{value:.3f}" for value in values))
    console.print(table)
    for each in summary.get("missing", []):
        say(console, each)
    say(console, "seconds: " + ", ".join(f"{stage} {value:.0f}" for stage, value in summary["seconds"].items()))
    best = run.checkpoints / f"global_step_{summary.get('best_step')}"
    if summary.get("best_step") != summary["steps"] and best.exists():
        say(console, f"the best test was that of step {summary['best_step']}: python -m verl_recipes.export run={best}")
    if good := summary.get("goodput"):
        parts = ", ".join(f"{name} {value:.0f}" for name, value in good.items() if name != "share" and value)
        say(console, f"goodput: {good['share']:.0%} of the seconds of all starts ({parts})")
    curves = "curves.png " if run.curves.exists() else ""
    say(console, f"{run.path}: report.html model/ summary.json {curves}samples/ log.txt")


def is_complete(cfg: DictConfig, run: RunFolder) -> bool:
    """Whether the last step is done and measured, and everything that this machine makes of it exists."""
    step = last_step(cfg, run)
    made = [run.summary, run.model, run.report, run.samples_of("validation", step)]
    made += [run.curves] if find_spec("matplotlib") else []
    # Whoever has removed all checkpoints wants their room, and not the training once more.
    if 0 < last_checkpoint(run.checkpoints) < step or not all(path.exists() for path in made):
        return False
    return bool(read_json(run.summary, "delete it, and the same command writes it again").get("steps") == step)


def of_seeds(cfg: DictConfig, arguments: list[str]) -> list[DictConfig]:
    """The configuration of each of `seeds`, composed anew from the command line, as other values may depend on it."""
    each = [compose("train", [*overrides_of(arguments), "seeds=null", f"seed={seed}"], TrainKeys) for seed in cfg.seeds]
    if len(set(cfg.seeds)) < len(cfg.seeds):
        raise UserError(f"seeds={list(cfg.seeds)}: a seed occurs twice")
    if len({one.run_dir for one in each}) < len(each):
        key, value = ("name", cfg.name) if Path(cfg.run_dir).name == cfg.name else ("run_dir", cfg.run_dir)
        raise UserError(f"seeds={list(cfg.seeds)}: two runs have one folder; write {key}='{value}-${{seed}}'")
    if len({one.trainer.default_local_dir for one in each}) < len(each):
        raise UserError(
            f"trainer.default_local_dir={cfg.trainer.default_local_dir}: all seeds would have one folder of "
            "checkpoints; put '${seed}' into it"
        )
    return each


def page_of_seeds(cfg: DictConfig, folder: Path) -> Path:
    """The page of all `seeds`, called as their folders are: tiny-seeds.html for tiny-seed0 and tiny-seed1."""
    named = Path(OmegaConf.merge(cfg, {"seed": "seeds"}).run_dir).name
    return folder / f"{named.replace('seedseeds', 'seeds')}.html"


def check_last(cfg: DictConfig, run: RunFolder, step: int) -> None:
    """Raise UserError if the run is not complete and cannot go on from its last checkpoint, of this step or of none."""
    if is_complete(cfg, run):
        return
    if step:
        check_resume(cfg, run, step)
        return
    saved = max((each for each, data in read_metrics(run).items() if "timing_s/save_checkpoint" in data), default=0)
    if saved:
        raise UserError(
            f"{run.path} saved a checkpoint at step {saved}, and {run.checkpoints} holds none: put it back, name its "
            "folder by trainer.default_local_dir=, or fresh=true starts the run anew"
        )


def run_once(cfg: DictConfig, console: Console) -> None:
    """One run, from where it stands to its report."""
    run = RunFolder(cfg.run_dir, cfg.trainer.default_local_dir)
    inputs = preflight(cfg, run)
    if in_job():
        check_nodes(cfg)
    elif cfg.trainer.nnodes > 1 and cfg.trainer.device != "cpu":
        raise UserError(
            f"nodes={cfg.trainer.nnodes}: this command runs on one machine; several are a Ray cluster "
            "(bash launch/ray_submit.sh) or Slurm's (launch/slurm.sbatch): docs/launch.md"
        )
    with run.locked():
        begin("run", cfg, run, inputs, partial(say, console), partial(check_last, cfg, run))
        if is_complete(cfg, run):
            now = dict(flat(OmegaConf.to_container(cfg, resolve=True)))
            more = {"trainer.total_training_steps": None, "data.curriculum.steps": None}
            fixed = depends_on_steps(now, now | more)
            longer = "" if fixed else ", trainer.total_training_steps=N goes on"
            longer = ", a larger patience goes on" if early_end(cfg, run) else longer
            say(console, f"{run.path} is complete; fresh=true starts it anew{longer}")
            show(run, console)
            return
        check_replaced(run.model)
        started, begun, earlier = time.time(), time.monotonic(), cut_half_line(run.events)
        resumed_from = last_checkpoint(run.checkpoints)
        train(cfg, run, console, inputs.val.rows)

        def spent(trained: float) -> dict[str, Any]:
            seconds = stage_seconds(read_lines(run.events)[earlier:], started, trained)
            seconds |= {"export": time.time() - trained, "total": time.monotonic() - begun}
            return {"resumed_from": resumed_from, "seconds": seconds}

        whole = finish(cfg, run, console, spent)
        if run.summary.exists():
            show(run, console)
        if not whole:
            raise SystemExit(1)


@command("train", TrainKeys)
def main(cfg: DictConfig) -> None:
    console = Console()
    if not cfg.seeds:
        run_once(cfg, console)
        return
    from verl_recipes.reporting.page import check_out

    configurations = of_seeds(cfg, sys.argv[1:])
    folders = [Path(each.run_dir) for each in configurations]
    check_out(together := page_of_seeds(cfg, folders[0].parent))
    for each in configurations:
        run_once(each, console)
    write_report(folders, together)
    say(console, f"{together}: all seeds on one page")


if __name__ == "__main__":
    main()
