"""python -m verl_recipes.warm_start [overrides]: teaches a model to search, on traces, before a run of train.

    runs/warm-seed0/
        run.json, config.yaml, verl.yaml, log.txt    as of a run
        metrics.jsonl  verl's metrics, one line a step: train/loss, and val/loss of the traces that are held out
        checkpoints/   verl's; the same command again continues from the last one
        model/         the model of the step with the least loss on what is held out, in Hugging Face's format
        summary.json   that loss at each evaluation, the step that was kept, seconds, versions
        curves.png     both losses over the steps
        report.html    all of it on one page (verl_recipes/report.py)

    python -m verl_recipes.warm_start                                      on data/traces, from the tiny base model
    python -m verl_recipes.warm_start model=qwen2.5_0.5b hardware=h100 lr=2e-5 steps=200

The trainer is verl's own for supervised training, on Ray, with the engine of a run of the same model and hardware. It
ends early if the loss on held-out traces does not fall any more. `python -m verl_recipes.train warm_start=runs/NAME`
goes on from the model; `python -m data_prep.traces` writes the traces.
"""

import math
import shlex
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pydantic import Field
from rich.console import Console

from data_prep.cli import (
    CONFIGS,
    Checked,
    Count,
    PathText,
    Positive,
    Seed,
    Text,
    UserError,
    command,
    compose,
    quoted,
    refuse,
)
from verl_recipes.run.best import best_step, is_enough
from verl_recipes.run.checkpoints import last_checkpoint
from verl_recipes.run.fingerprint import begin, provenance
from verl_recipes.run.folder import RunFolder, cut_half_line, read_json, read_metrics, write_json
from verl_recipes.run.goodput import recorded, sessions
from verl_recipes.run.preflight import (
    Inputs,
    check_parquet,
    check_place,
    check_prompt,
    check_start,
    check_trackers,
    other_ranks,
)
from verl_recipes.run.start import merge_metrics, say, start_sft
from verl_recipes.run.weights import check_replaced, to_hugging_face
from verl_recipes.settings.configuration import gpus_of, longest, package_dir
from verl_recipes.settings.schema import Name, TrainKeys

CPUS = 10  # that verl's supervised trainer asks Ray for, for each rank (RayResourcePool, max_colocate_count)


class Keys(Checked):
    traces: PathText = Field(description="a folder of data_prep.traces")
    name: Name = Field(description="of the warm start")
    run_dir: PathText = Field(description="its folder")
    seed: Seed = Field(description="of the data's order")
    fresh: bool = Field(description="empty that folder first, instead of continuing")
    steps: Count = Field(description="at most")
    batch: Count = Field(description="traces a step")
    lr: Positive = Field(description="learning rate: up within the first 5% of the steps, then a cosine to a tenth")
    every: Count = Field(description="steps between evaluations on held-out traces, each with a checkpoint")
    patience: Count = Field(description="evaluations without a lower loss after which it ends")
    overrides: list[Text] = Field(description="keys and groups of training; those of the command line are added")


def run_config(cfg: DictConfig) -> DictConfig:
    """The configuration of a run of the same model, hardware and lengths; `sft` has the keys of this command."""
    refuse(cfg.overrides, ["seeds"], "a warm start has one seed, seed=N")
    named = [f"{key}={quoted(cfg[key])}" for key in ("name", "run_dir", "seed", "fresh")]
    training = compose("train", [*named, *cfg.overrides], TrainKeys)
    own = {key: cfg[key] for key in ("traces", "steps", "batch", "lr", "every", "patience")}
    OmegaConf.update(training, "sft", own, force_add=True)
    return training


def sft_config(cfg: DictConfig) -> dict[str, Any]:
    """What verl's supervised trainer gets: its own defaults, and of a run's configuration what both trainers have."""
    folder, sft = Path(package_dir("verl")) / "trainer" / "config", cfg.sft
    config: dict[str, Any] = OmegaConf.to_container(compose("sft_trainer_engine", [], folder=folder), resolve=True)  # type: ignore[assignment]
    run: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    models, ranks = run["actor_rollout_ref"], cfg.trainer.n_gpus_per_node
    actor = models["actor"]
    schedule = {"lr": sft.lr, "lr_scheduler_type": "cosine", "lr_warmup_steps_ratio": 0.05, "min_lr_ratio": 0.1}
    cpus = run["ray_kwargs"]["ray_init"]["num_cpus"]
    run["ray_kwargs"]["ray_init"]["num_cpus"] = cpus and max(cpus, CPUS * ranks + 8)
    return config | {
        "model": models["model"],
        "engine": actor["fsdp_config"],
        "optim": config["optim"] | schedule,  # AdamW, whatever the recipe's is
        "checkpoint": config["checkpoint"]
        | {"save_contents": actor["checkpoint"]["save_contents"]}
        | {"load_contents": ["model", "optimizer", "extra"]},
        "ray_kwargs": run["ray_kwargs"],
        "data": config["data"]
        | {
            "train_files": f"{cfg.sft.traces}/train.parquet",
            "val_files": f"{cfg.sft.traces}/held_out.parquet",
            "train_batch_size": sft.batch,
            "apply_chat_template_kwargs": run["data"]["apply_chat_template_kwargs"],
            "max_length": longest(cfg),
            "max_token_len_per_gpu": max(actor["ppo_max_token_len_per_gpu"], longest(cfg)),
            "custom_cls": {"path": "pkg://verl_recipes.in_verl.sft", "name": "Traces"},
        },
        "trainer": config["trainer"]
        | {name: run["trainer"][name] for name in ("default_local_dir", "project_name", "experiment_name", "logger")}
        | {name: run["trainer"][name] for name in ("device", "nnodes", "n_gpus_per_node")}
        | {"total_epochs": 1_000_000, "total_training_steps": sft.steps, "seed": cfg.seed}
        | {"save_freq": sft.every, "test_freq": sft.every, "max_ckpt_to_keep": sft.patience + 1},
    }


def check_traces(cfg: DictConfig) -> Inputs:
    """Raise UserError for what would fail later; returns what the warm start reads."""
    folder, found = cfg.sft.traces, []
    if cfg.sft.batch % (ranks := gpus_of(cfg)[0]):
        raise UserError(f"batch={cfg.sft.batch} cannot be shared evenly by {ranks} ranks: choose a multiple of {ranks}")
    made_by = f"python -m data_prep.traces out={folder}"
    for name in ("train.parquet", "held_out.parquet"):
        file = f"{folder}/{name}"
        if not Path(file).is_file():
            raise UserError(f"traces={folder} has no {name}; `{made_by}` makes it")
        found.append(check_parquet(file, f"traces={folder}", made_by, {"messages"}))
        check_prompt(file, cfg)
        if (rows := found[-1].rows) < cfg.sft.batch:
            raise UserError(
                f"{file} has {rows} traces, less than a batch of batch={cfg.sft.batch}; lower that, or make more "
                "traces (count=, held_out_share=)"
            )
    train, held_out = found
    own = cfg.copy()  # this trainer's checkpoints, not the recipe's; verl removes an old one before it saves the next
    own.trainer.update({"total_training_steps": cfg.sft.steps, "save_freq": cfg.sft.every})
    own.trainer.max_actor_ckpt_to_keep, own.data.train_batch_size = cfg.sft.patience, 0  # it has no samples
    own.actor_rollout_ref.actor.optim.optimizer, own.critic.enable = "AdamW", False
    return Inputs(train, held_out, check_start(own, Path(cfg.run_dir)))


def losses(run: RunFolder) -> dict[int, float]:
    """The loss on held-out traces, by step; infinite if it was no number."""
    found = {step: data["val/loss"] for step, data in read_metrics(run).items() if "val/loss" in data}
    return {step: math.inf if loss is None else loss for step, loss in found.items()}


def write_page(run: RunFolder) -> None:
    """report.html."""
    from verl_recipes.reporting.page import write_report

    write_report([run.path], run.report)


def finish(cfg: DictConfig, run: RunFolder, console: Console) -> None:
    """model/, curves.png if there is matplotlib, summary.json, which says that all is there, and a page of it all."""
    from verl_recipes.reporting.charts import WARM_START

    merge_metrics(run)  # of a start that was killed in its last seconds
    found = {step: loss for step, loss in losses(run).items() if loss < math.inf}
    last = last_checkpoint(run.checkpoints)
    if not found:
        raise UserError(f"{run.path}: no loss on held-out traces is finite; lower lr=, and fresh=true starts anew")
    best = best_step({step: -loss for step, loss in found.items() if step <= last})
    to_hugging_face(run.checkpoints / f"global_step_{best}" / "actor", run.model, run.log)
    try:
        from verl_recipes.reporting.draw import picture

        picture(run, f"{cfg.name}: loss on held-out traces {found[best]:.3f} at step {best}", [WARM_START])
    except ModuleNotFoundError as error:
        say(console, f"{error.name} is not installed, so there is no {run.curves}")
    about = {"name": cfg.name, "steps": last, "seed": cfg.seed, "best_step": best, "held_out_loss": found}
    seconds = sum(ended - began for began, ended, _ in sessions(*recorded(run)))  # of all starts
    write_json(run.summary, about | {"seconds": {"total": seconds}} | provenance())
    write_page(run)


def show(keys: DictConfig, run: RunFolder, console: Console) -> None:
    """The end's lines."""
    summary = read_json(run.summary, "delete it, and the same command writes it again")
    found, best = summary["held_out_loss"], summary["best_step"]
    first = next(iter(found))
    say(console, f"loss on held-out traces: {found[first]:.3f} at step {first}, {found[str(best)]:.3f} at step {best}")
    pages = "".join(f"{each.name} " for each in (run.report, run.curves) if each.exists())
    say(console, f"{run.path}: {pages}model/ (of step {best}) summary.json log.txt")
    after = [f"name=after-{run.path.name}", f"warm_start={run.path}", *keys.overrides]
    say(
        console,
        f"next: python -m verl_recipes.train {shlex.join(after)}, or measure it: "
        f"python -m verl_recipes.evaluate model={run.path}",
    )


def check_last(cfg: DictConfig, run: RunFolder, step: int) -> None:
    """Raise UserError if the warm start is not complete and cannot go on from its last checkpoint.

    Another number of ranks saved it, and each rank has its own place in the traces. Or a loss was measured, which comes
    before each save, and no checkpoint is there: `step` is 0.
    """
    if run.summary.exists():
        return
    if not step and len(losses(run)) > 1:
        raise UserError(
            f"{run.path} saved checkpoints, and {run.checkpoints} holds none: put them back, or fresh=true starts anew"
        )
    checkpoint = run.checkpoints / f"global_step_{step}"
    if before := other_ranks(cfg, checkpoint):
        raise UserError(f"{checkpoint} was saved by {before} ranks, and here are {gpus_of(cfg)[0]}: go on with as many")


@command("warm_start", Keys, CONFIGS / "commands", others="overrides")
def main(keys: DictConfig) -> None:
    cfg, console = run_config(keys), Console()
    run = RunFolder(cfg.run_dir, cfg.trainer.default_local_dir)
    check_place(run)
    check_trackers(cfg.trackers)
    inputs = check_traces(cfg)
    with run.locked():
        begin("warm_start", cfg, run, inputs, partial(say, console), partial(check_last, cfg, run))
        if run.summary.exists():
            if not run.report.exists():  # the command was ended before it was written
                write_page(run)
            say(console, f"{run.path} is complete; fresh=true starts it anew")
            show(keys, run, console)
            return
        check_replaced(run.model)
        done = last_checkpoint(run.checkpoints)
        cut_half_line(run.metrics_part)
        if done:
            say(console, f"continuing {run.path} after step {done}")
        earlier = losses(run)

        def enough(since: dict[int, float]) -> bool:
            found = earlier | since
            good = {step: -loss for step, loss in found.items()}
            return is_enough(good, cfg.sft.patience) and last_checkpoint(run.checkpoints) >= max(found)

        if done < cfg.sft.steps and not enough({}):
            start_sft(cfg, run, console, sft_config(cfg), enough)
        finish(cfg, run, console)
        show(keys, run, console)


if __name__ == "__main__":
    main()
