"""python -m verl_recipes.evaluate model=PATH data=FOLDER n=8: sample a model and measure it, with intervals.

    runs/evaluations/tiny_seed0-tiny-seed0/
        evaluation.json    what is measured: model, data, sampling
        summary.json       the figures (verl_recipes/measure/evaluation.py), overall and by kinds of problem
        samples/           validation/0.jsonl: n responses to every problem; greedy/0.jsonl: one at temperature 0
        config.yaml, log.txt, metrics.jsonl as in a run's folder

The samples come from verl's own validation, with the rollout engine, the hardware and the reward of training, so a
number from here and one from a run's summary.json mean the same. Every row that verl gets carries its own seed, so the
same model, data and seed give the same responses. Killed and started again, it does what is missing.

    python -m verl_recipes.evaluate compare A B

compares two evaluations, or files of samples, on the same problems.
"""

import json
import re
import shutil
import sys
import zlib
from collections.abc import Sequence
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

import hydra
import pyarrow as pa
import pyarrow.parquet as pq
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from data_prep.cli import CONFIGS, Checked, UserError, command
from data_prep.sources import file_sha256
from verl_recipes.measure.evaluation import CONFIDENCE, OUT, compare, measure
from verl_recipes.measure.summary import read_samples, summarize, write_whole
from verl_recipes.run.checkpoints import last_checkpoint
from verl_recipes.run.preflight import check_code, check_model, check_parquet, check_prompt, check_space, read_json
from verl_recipes.run.supervise import locked
from verl_recipes.train import empty, provenance, start_verl, to_hugging_face

PENDING, ANSWERED = "pending.parquet", "answered.jsonl"
OF_THE_RUN = ("data.max_prompt_length", "data.max_response_length", "actor_rollout_ref.model.custom_chat_template")


def find_weights(path: Path) -> Path:
    """The folder that holds the weights: Hugging Face's, or `actor` of a checkpoint of verl's.

    Args:
        path: a Hugging Face folder, a run's folder (its model/, or else its last checkpoint), a checkpoint
            (global_step_20) or its actor. Anything else is returned as it is.
    """
    step, summary = last_checkpoint(path), path / "summary.json"
    written = read_json(summary, "delete it, and the run's command writes it again") if summary.exists() else {}
    if (path / "model").is_dir() and written.get("steps", 0) >= step:
        return path / "model"
    if step:  # and model/, if there is one, is of the steps before the run went on
        path = path / "checkpoints" / f"global_step_{step}"
    return path / "actor" if (path / "actor").is_dir() else path


def is_checkpoint(path: Path) -> bool:
    """Whether this is the `actor` of a checkpoint of verl's."""
    return (path / "fsdp_config.json").exists()


def hugging_face(path: Path, scratch: Path, log: Path) -> Path:
    """The Hugging Face folder of what `find_weights` found; a checkpoint is merged into `scratch`."""
    if not is_checkpoint(path):
        return path
    if not scratch.exists():
        partial = scratch.with_name(f"{scratch.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        to_hugging_face(path, partial, log)
        partial.rename(scratch)
    return scratch


def find_data(data: str | ListConfig) -> list[Path]:
    """The parquet files of a folder of data_prep (test.parquet, ood_*.parquet), or those that were named."""
    if not isinstance(data, str) or not Path(data).is_dir():
        files = [Path(name) for name in ([data] if isinstance(data, str) else data)]
        if len({file.stem for file in files}) < len(files):
            raise UserError("data: two files have the same name, which is the name of their set in all results")
        return files
    files = [*Path(data).glob("test.parquet"), *sorted(Path(data).glob(f"{OUT}*.parquet"))]
    if not files:
        raise UserError(f"data={data} holds no test.parquet and no {OUT}*.parquet; `python -m data_prep` makes such")
    return files


def identity(cfg: DictConfig, weights: Path, files: Sequence[Path]) -> dict[str, Any]:
    """All that the responses depend on. Of weights, size and time have to do: a checksum takes minutes at 70 GB."""
    tensors = sorted([*weights.glob("*.safetensors"), *weights.glob("*.pt")])
    sizes = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in tensors}
    names = ("model", "n", "temperature", "greedy", "seed", "recipe", "hardware", "overrides")
    return {name: OmegaConf.to_container(cfg)[name] for name in names} | {  # type: ignore[index,call-overload]
        "weights": sizes,
        "data": {str(file): file_sha256(file) for file in files},
    }


def rows_to_answer(files: Sequence[Path], n: int, temperature: float, greedy: bool, seed: int) -> list[dict[str, Any]]:
    """A row for each response that is wanted: sample 1 to n of each problem, and sample 0 at temperature 0."""
    rows = []
    for file in files:
        for index, row in enumerate(pq.read_table(file).to_pylist()):
            for sample in range(0 if greedy else 1, n + 1):
                own_seed = zlib.crc32(f"{seed}/{file.stem}/{index}/{sample}".encode())
                sampling = {"seed": own_seed, "temperature": temperature if sample else 0.0}
                info = {"set": file.stem, "index": index, "sample": sample, "sampling": sampling}
                rows.append(row | {"extra_info": (row.get("extra_info") or {}) | info})
    return rows


def place(row: dict[str, Any]) -> tuple[str, int, int]:
    """What a row to answer, and its response, are known by."""
    info = row["extra_info"]
    return info["set"], info["index"], info["sample"]


def collect(out: Path) -> dict[tuple[str, int, int], dict[str, Any]]:
    """All responses that there are; those of a command that ended are put by, where verl does not write."""
    new, kept = out / "samples" / "validation" / "0.jsonl", out / "samples" / ANSWERED
    rows = {place(row): row for path in (kept, new) if path.exists() for row in read_samples(path)}
    if new.exists():
        write_whole(kept, as_lines(list(rows.values())))
        new.unlink()
    return rows


def as_lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def run_of(path: Path) -> Path | None:
    """The run's folder of a path to it, to its model or to one of its checkpoints; None where it belongs to no run."""
    for folder in (path, *path.parents):
        if (folder / "config.yaml").is_file() and (folder / "samples").is_dir():
            return folder
    return None


def compose(name: str, overrides: list[str]) -> DictConfig:
    """The configuration of another command of this project."""
    GlobalHydra.instance().clear()  # of this command's own configuration folder
    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return hydra.compose(name, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(str(error).strip().splitlines()[0]) from None


def training_config(cfg: DictConfig, weights: Path, out: Path) -> DictConfig:
    """The configuration of a run that only evaluates: verl's trainer stops after its first validation.

    A run's model keeps the run's lengths and chat template, whatever the recipe says.
    """
    model = "tiny" if cfg.recipe == "tiny" else "local"  # the tiny model's file brings its own lengths and prompt
    agent = "actor_rollout_ref.rollout.agent"
    overrides = [
        f"recipe={cfg.recipe}",
        f"model={model}",
        f"actor_rollout_ref.model.path='{weights}'",
        f"hardware={cfg.hardware}",
        f"seed={cfg.seed}",
        f"run_dir='{out}'",
        "eval_n=1",  # each response is a row of its own
        f"actor_rollout_ref.rollout.val_kwargs.temperature={cfg.temperature}",
        f"{agent}.default_agent_loop=row_sampling",
        f"{agent}.agent_loop_config_path='{CONFIGS / 'evaluate' / 'agent_loop.yaml'}'",
        f"data.train_files='{out / PENDING}'",
        f"data.val_files='{out / PENDING}'",
        f"data.val_batch_size={cfg.batch * (cfg.n + cfg.greedy)}",
        "actor_rollout_ref.actor.ppo_mini_batch_size=${data.train_batch_size}",
        "trainer.resume_mode=disable",
    ]
    training = compose("train", [*overrides, *cfg.overrides])
    if (run_dir := run_of(Path(cfg.model))) is not None:
        theirs = OmegaConf.load(run_dir / "config.yaml")
        for key in OF_THE_RUN:
            if not any(override.lstrip("+").startswith(f"{key}=") for override in cfg.overrides):
                OmegaConf.update(training, key, OmegaConf.select(theirs, key))
    training.data.max_prompt_length = max(training.data.max_prompt_length, cfg.max_prompt_length)
    return training


def seconds_of_sampling(out: Path) -> float:
    """Seconds of all batches of verl's that were finished."""
    events = [json.loads(line) for line in (out / "samples" / "events.jsonl").read_text().splitlines()]
    finished = [(a, b) for a, b in pairwise(events) if (a["event"], b["event"]) == ("generating", "generated")]
    return sum(b["time"] - a["time"] for a, b in finished)


def evaluate(cfg: DictConfig, out: Path, console: Console) -> dict[str, Any]:
    """Sample what is missing, score, measure and write; the summary."""
    files, weights = find_data(cfg.data), find_weights(Path(cfg.model))
    names, training = [str(file) for file in files], training_config(cfg, weights, out)
    check_parquet(names, "data")
    check_prompt(names, training.actor_rollout_ref.model.custom_chat_template)
    check_space(training, out, 0 if is_checkpoint(weights) else check_model(str(weights)))
    check_code(training.actor_rollout_ref.model)
    wanted, about = identity(cfg, weights, files), out / "evaluation.json"
    with locked(out):
        if cfg.fresh:
            empty(out)
        theirs = json.loads(about.read_text()) if about.exists() else None
        if theirs != wanted and any(path.name != "lock" for path in out.iterdir()):
            raise UserError(f"{out} holds something else; choose another folder with out=, or fresh=true")
        if (out / "summary.json").exists():
            console.print(f"{out} is complete; fresh=true starts it anew", soft_wrap=True)
            return json.loads((out / "summary.json").read_text())
        rows = rows_to_answer(files, cfg.n, cfg.temperature, cfg.greedy, cfg.seed)
        if answered := collect(out):
            console.print(f"continuing {out}: {len(answered)} of {len(rows)} responses are there", soft_wrap=True)
        missing = [row for row in rows if place(row) not in answered]
        if missing:
            write_whole(about, json.dumps(wanted, indent=2) + "\n")
            pq.write_table(pa.Table.from_pylist(missing), out / PENDING)
            training.actor_rollout_ref.model.path = str(hugging_face(weights, out / "merged", out / "log.txt"))
            training.data.train_batch_size = min(len(missing), 8)  # none is trained, but verl wants a batch
            batches = ceil(len(missing) / training.data.val_batch_size)
            start_verl(training, out, console, batches, val_before_train=True, val_only=True)
            answered = collect(out)
        responses = [answered[place(row)] for row in rows if place(row) in answered]
        if len(responses) < len(rows):
            raise UserError(
                f"verl left {len(rows) - len(responses)} of {len(rows)} rows without a response; see {out}/log.txt"
            )
        return finish(cfg, out, responses)


def finish(cfg: DictConfig, out: Path, responses: list[dict[str, Any]]) -> dict[str, Any]:
    """Write samples/ in order, and summary.json."""
    for row in responses:
        name, index, _ = place(row)
        row |= {"set": name, "prompt_id": f"{name}-{index}"}
    samples = [row for row in responses if row["extra_info"]["sample"]]
    greedy = [row for row in responses if not row["extra_info"]["sample"]]
    inside = [row for row in samples if not row["set"].startswith(OUT)] or samples
    seconds, tokens = seconds_of_sampling(out), sum(row["response_tokens"] for row in responses)
    summary = {
        "model": cfg.model,
        "data": OmegaConf.to_container(cfg)["data"],  # type: ignore[index,call-overload]
        "seed": cfg.seed,
        "temperature": cfg.temperature,
        **summarize(inside),
        **measure(samples, greedy),
        "confidence": CONFIDENCE,
        "cost": {"responses": len(responses), "response tokens": tokens, "seconds of sampling": seconds},
    } | provenance()
    write_whole(out / "samples" / "validation" / "0.jsonl", as_lines(samples))
    if greedy:
        write_whole(out / "samples" / "greedy" / "0.jsonl", as_lines(greedy))
    write_whole(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    for path in (out / "samples" / ANSWERED, out / PENDING):
        path.unlink(missing_ok=True)
    shutil.rmtree(out / "merged", ignore_errors=True)
    return summary


def text(figure: Sequence[float]) -> str:
    """A figure with its interval.

    >>> text([0.5, 0.4375, 0.5625]), text([104.2, 99.0, 109.4])
    ('0.500 (0.438 to 0.562)', '104.2 (99.0 to 109.4)')
    """
    value, low, high = (f"{x:.3f}" if abs(figure[0]) < 10 else f"{x:.1f}" for x in figure)
    return f"{value} ({low} to {high})"


def show(summary: dict[str, Any], out: Path, console: Console) -> None:
    """Two tables: the figures, and the main ones by kinds of problem."""
    table = Table("figure", "95% interval", title=f"{summary['model']}: {summary['problems']} problems")
    for name, value in summary["figures"].items():
        table.add_row(name, text(value))
    for reason, value in summary["reasons"].items():
        if reason != "right" and value[0]:
            table.add_row(f"refused: {reason}", text(value))
    main = [f"mean@{summary['n']}", f"pass@{summary['n']}", "greedy"]
    kinds = Table("kind", "problems", *main)
    for name, values in summary["by"].items():
        for value, figures in values.items():
            cells = (text(figures[key]) if key in figures else "" for key in main)
            kinds.add_row(f"{name}: {value}", str(figures["problems"]), *cells)
    console.print(table, kinds, f"{out}: summary.json samples/ log.txt", sep="\n", highlight=False)


def samples_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of samples, or of the last evaluation in a folder of a run or an evaluation."""
    if path.is_dir():
        steps = [file for file in path.glob("samples/validation/*.jsonl") if file.stem.isdigit()]
        unfinished = (path / "evaluation.json").exists() and not (path / "summary.json").exists()
        if not steps or unfinished:
            raise UserError(f"{path} holds no finished evaluation: samples/validation/*.jsonl is expected there")
        path = max(steps, key=lambda file: int(file.stem))
    try:
        return read_samples(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no file of samples ({str(error).splitlines()[0]})") from None


def show_comparison(first: Path, second: Path, console: Console) -> None:
    """The paired test, a row for each test set."""
    rows = [samples_of(path) for path in (first, second)]
    table = Table("set", "problems", "A", "B", "B - A", "B better, worse", "p", title=f"A: {first}\nB: {second}")
    names = dict.fromkeys(row.get("set", "test") for each in rows for row in each)
    for name in names:
        one, other = ([row for row in each if row.get("set", "test") == name] for each in rows)
        result = compare(one, other)
        figures = (text(result[key]) for key in ("first", "second", "difference"))
        p = f"{result['p']:.4f}" if result["p"] > 0.001 else "< 0.001"
        table.add_row(name, str(result["problems"]), *figures, f"{result['better']}, {result['worse']}", p)
    console.print(table, "mean of the samples of each problem; paired permutation test, two-sided", sep="\n")


@command("config", Checked, CONFIGS / "evaluate")
def main(cfg: DictConfig) -> None:
    if cfg.name is None:
        parts = [cfg.model, Path(cfg.data).stem if isinstance(cfg.data, str) else "files", f"seed{cfg.seed}"]
        cfg.name = "-".join(re.sub(r"\W+", "_", part.removeprefix("runs/").strip("/")) for part in parts)
    console, out = Console(), Path(cfg.out)
    show(evaluate(cfg, out, console), out, console)


if __name__ == "__main__":
    if sys.argv[1:2] == ["compare"]:
        if len(sys.argv) != 4:
            raise UserError("two evaluations are expected: python -m verl_recipes.evaluate compare A B")
        show_comparison(Path(sys.argv[2]), Path(sys.argv[3]), Console())
    else:
        main()
