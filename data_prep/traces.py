"""python -m data_prep.traces [overrides]: solutions of a data folder's problems in words, for a warm start.

    data/traces/
        train.parquet, held_out.parquet   a row for each trace; no numbers are in both
        manifest.json                     configuration, shares of the styles, rows and SHA-256 of every file, versions

    python -m data_prep.traces
    python -m data_prep.traces data=data/mine out=data/mine-traces count=20000 tokenizer=assets/tiny_base max_tokens=256

A row has verl's `messages` for supervised training: the messages of the problem's prompt, and the assistant's response.
The problems are those of train.parquet that have a solution and whose numbers occur in no test set of that folder.
Wording: data_prep/wording.py. The folder appears, or is replaced, as a whole. If the data and the configuration have
not changed, nothing is done.
"""

import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import DictConfig, OmegaConf

from data_prep.cli import CONFIGS, UserError, command
from data_prep.command import progress_bars
from data_prep.engines import Local
from data_prep.folder import replaced
from data_prep.manifest import changed_files, is_made, read_manifest, write_manifest, written_manifest
from data_prep.prepare import ROW_GROUP
from data_prep.render import load_tokenizer, render, response_begins
from data_prep.schema import TracesKeys
from data_prep.search import solution_steps
from data_prep.solver import Array, Flat, flat, solutions_of, solve_many
from data_prep.split import hash_numbers, is_below, mix, padded, reserved_hashes
from data_prep.wording import STYLES, write_trace

CHUNK = 1024  # problems that a worker solves and writes about at once
ATTEMPTS = 8  # draws of a trace that differs from the problem's others
OPEN = "<think>"
COLUMNS = ["data_source", "prompt", "reward_model", "extra_info"]
USABLE, UNSOLVABLE, IN_A_TEST_SET = range(3)
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])


class Job(NamedTuple):
    """What a worker needs to know: the usable problems, the traces to write in all, what is `before` each response
    (see `opening`), the shares of STYLES as `weights`, and keys of the configuration.
    """

    usable: int
    total: int
    before: str
    weights: tuple[float, ...]
    stop: float
    most: int
    language: str
    tokenizer: str | None
    max_tokens: int | None
    held_out_share: float
    seed: int


class Trace(NamedTuple):
    """A trace: the place of its problem in the chunk, the response without "<think>", and what it holds."""

    place: int
    text: str
    style: str
    tries: int
    tokens: int = 0  # of the response, with a tokenizer


class Traced(NamedTuple):
    """The traces of a chunk: tables of train.parquet and held_out.parquet, lengths in tokens, what was left out."""

    tables: tuple[pa.Table, pa.Table]
    lengths: list[int]
    skipped: Counter[str]


@cache
def tokenizer_of(path: str) -> Any:
    """A tokenizer; the main process loads it, and its forks have it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are processes
    return load_tokenizer(path, {"chat_template": ""})  # whatever its chat template is, it is not used


def opening(prompt: dict[str, Any], path: str | None) -> str:
    """What a response to the data's prompt begins with: "<think>", or "" if the prompt ends with it.

    Raises:
        UserError: the chat template is the tokenizer's own, and there is no tokenizer.
    """
    text = prompt["messages"][-1]["content"]
    if prompt.get("chat_template") is None:
        if path is None:
            raise UserError(
                f"prompt={prompt['name']} of the data uses the tokenizer's own chat template, which may open the "
                "thought: name a tokenizer with tokenizer=PATH"
            )
        text, _ = render(load_tokenizer(path, prompt), prompt["messages"], **prompt.get("template_options", {}))
    return "" if response_begins(text) == "inside a thought" else OPEN


@lru_cache(1 << 16)
def tree_of(k: int, function: int) -> Flat:
    return flat(k, function, range(k))


def truths(batch: pa.RecordBatch) -> tuple[list[list[int]], Array]:
    """Numbers and targets of rows in verl's format."""
    found = [row["ground_truth"] for row in batch["reward_model"].to_pylist()]
    return [truth["numbers"] for truth in found], np.array([truth["target"] for truth in found], np.int64)


def batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    yield from pq.ParquetFile(path).iter_batches(CHUNK, columns=columns, use_threads=False)


def hashes_of_tests(folder: Path) -> Array:
    """The hashes of the numbers of all test sets in a data folder and of the frozen one, sorted.

    A recipe's split may share some with its training rows, and a folder of an older version some of the frozen set.
    """
    paths = [path for path in sorted(folder.glob("*.parquet")) if path.stem == "test" or path.stem.startswith("ood_")]
    found = [hash_numbers(*padded(truths(batch)[0])) for path in paths for batch in batches(path, ["reward_model"])]
    return np.unique(np.concatenate([reserved_hashes(), *found]))


def usable(batch: pa.RecordBatch, tests: Array) -> Array:
    """For each problem USABLE or the reason why not. Problems that the data folder did not annotate are solved."""
    lists, targets = truths(batch)
    numbers, count = padded(lists)
    solutions = np.array([info["solutions"] for info in batch["extra_info"].to_pylist()], float)  # null: nan
    for n in np.unique(count[np.isnan(solutions)]):
        some = np.flatnonzero(np.isnan(solutions) & (count == n))
        solutions[some] = solve_many(np.array([lists[i] for i in some]), targets[some]).solutions
    shared = np.isin(hash_numbers(numbers, count), tests)
    return np.where(shared, IN_A_TEST_SET, np.where(solutions > 0, USABLE, UNSOLVABLE)).astype(np.uint8)


def functions_of(lists: list[list[int]], targets: Array) -> list[list[int]]:
    """The solutions of each problem, as functions of the sorted numbers; with a fraction only if all need one."""
    found: list[list[int]] = [[] for _ in lists]
    count = np.array([len(numbers) for numbers in lists])
    for n in np.unique(count):
        some = np.flatnonzero(count == n)
        problem, function, whole = solutions_of(np.array([lists[i] for i in some]), targets[some])
        ends = np.searchsorted(problem, np.arange(len(some) + 1))
        for i, start, end in zip(some.tolist(), ends, ends[1:], strict=False):
            part = whole[start:end]
            found[i] = function[start:end][part if part.any() else slice(None)].tolist()
    return found


def trace_row(
    numbers: list[int], target: int, functions: list[int], place: int, row: int, most: int, attempt: int, job: Job
) -> Trace:
    """The trace of a row, which depends only on the seed, the row, the attempt and the most wrong tries."""
    rng = random.Random(f"{job.seed} {row} {attempt}")
    (style,) = rng.choices(STYLES, job.weights)
    # The first of a problem's solutions is drawn, and its next traces take the next ones in turn.
    first = random.Random(f"{job.seed} {row % job.usable}").randrange(len(functions))
    function = functions[(first + row // job.usable) % len(functions)]
    steps = solution_steps(tree_of(len(numbers), function), sorted(numbers), rng)
    tries = 1
    while tries < job.most and rng.random() >= job.stop:
        tries += 1
    text, used = write_trace(
        numbers, target, steps, style=style, tries=min(tries, most), language=job.language, rng=rng
    )
    return Trace(place, text, style, used)


def token_counts(texts: list[str], path: str) -> list[int]:
    """The lengths of responses in tokens, the end token included."""
    return [len(ids) + 1 for ids in tokenizer_of(path)(texts, add_special_tokens=False)["input_ids"]] if texts else []


def trace_rows(
    problems: list[tuple[list[int], int, list[int]]], rows: list[tuple[int, int]], job: Job
) -> tuple[list[Trace], Counter[str]]:
    """The traces of a chunk's rows; those that are too long lose wrong tries, and those of one problem differ.

    Args:
        problems: numbers, target, solutions.
        rows: row and place of its problem.

    Returns:
        The traces in the order of `rows`, how many were left out and why.
    """
    done: dict[int, Trace] = {}
    skipped: Counter[str] = Counter()
    seen: dict[int, set[str]] = defaultdict(set)
    pending = [(row, place, job.most, 0) for row, place in rows]
    while pending:
        drawn = [trace_row(*problems[place], place, row, most, attempt, job) for row, place, most, attempt in pending]
        texts = [job.before + each.text for each in drawn]
        lengths = token_counts(texts, job.tokenizer) if job.tokenizer else [0] * len(drawn)
        again = []
        for (row, place, _, attempt), each, length in zip(pending, drawn, lengths, strict=True):
            if job.max_tokens and length > job.max_tokens:
                if each.tries:
                    again.append((row, place, min(each.tries - 1, each.tries * job.max_tokens // length), attempt))
                else:
                    skipped["too_long"] += 1
            elif each.text not in seen[place]:
                seen[place].add(each.text)
                done[row] = each._replace(tokens=length)
            elif attempt < ATTEMPTS:
                again.append((row, place, job.most, attempt + 1))
            else:
                skipped["repeated"] += 1
        pending = again
    return [done[row] for row, _ in rows if row in done], skipped


def trace_chunk(batch: pa.RecordBatch, first: int, job: Job) -> Traced:
    """The traces of a chunk of usable problems.

    Args:
        batch: the problems, as rows of train.parquet.
        first: how many usable problems come before them; problem i has the rows i, i + usable, i + 2 * usable, ...
    """
    lists, targets = truths(batch)
    prompts = batch["prompt"].to_pylist()
    functions = functions_of(lists, targets)
    problems = list(zip(lists, targets.tolist(), functions, strict=True))
    starts = range(0, job.total - first, job.usable)
    rows = [(start + first + i, i) for start in starts for i in range(len(lists)) if start + first + i < job.total]
    solved = [(row, i) for row, i in rows if functions[i]]  # the folder's annotation may be wrong
    made, skipped = trace_rows(problems, solved, job)
    skipped["unsolvable"] += len(rows) - len(solved)
    salt = mix(np.array([job.seed], np.uint64))
    held_out = is_below(mix(hash_numbers(*padded(lists)) ^ salt), job.held_out_share)
    sides = [[each for each in made if held_out[each.place] == side] for side in (False, True)]
    tables = [as_table(some, batch, prompts, job.before) for some in sides]
    return Traced((tables[0], tables[1]), [each.tokens for each in made if job.tokenizer], skipped)


def as_table(some: list[Trace], batch: pa.RecordBatch, prompts: list[list[dict[str, str]]], before: str) -> pa.Table:
    """Traces as rows for supervised training, beside the columns of their problems."""
    places = pa.array([each.place for each in some], pa.int64())
    index = batch["extra_info"].field("index").take(places)
    messages = [[*prompts[each.place], {"role": "assistant", "content": before + each.text}] for each in some]
    styles = pa.array([each.style for each in some], pa.string())
    tries = pa.array([each.tries for each in some], pa.int64())
    return pa.table(
        {
            "messages": pa.array(messages, pa.list_(MESSAGE)),
            "data_source": batch["data_source"].take(places),
            "reward_model": batch["reward_model"].take(places),
            "extra_info": pa.StructArray.from_arrays([index, styles, tries], ["index", "style", "tries"]),
        }
    )


def opened(folder: Path) -> dict[str, Any]:
    """The manifest of a data folder.

    Raises:
        UserError: the folder does not exist, is not one that `python -m data_prep` wrote, or has changed since.
    """
    if folder.is_file():
        raise UserError(f"data={folder} is a file; name its folder: data={folder.parent}")
    if not folder.is_dir():
        raise UserError(f"data={folder}: there is no such folder; python -m data_prep out={folder} makes one")
    manifest = read_manifest(folder)
    made_by = manifest.get("configuration", {}) if manifest else {}
    if not manifest or "prompt" not in made_by or "styles" in made_by or "train.parquet" not in manifest["files"]:
        raise UserError(f"data={folder} holds no problems of data_prep; name a folder that python -m data_prep wrote")
    for name in changed_files(folder, manifest):
        if name.endswith(".parquet"):
            raise UserError(f"{folder / name} is not the file that manifest.json records; make the folder again")
    return manifest


def summary(styles: Counter[str], tries: int, lengths: list[Array], skipped: Counter[str]) -> dict[str, Any]:
    """What the manifest says about the traces: shares, wrong tries a trace, tokens a response, what was left out."""
    total = styles.total()
    found: dict[str, Any] = {
        "styles": {style: round(styles[style] / total, 4) for style in STYLES},
        "wrong_tries": round(tries / total, 3),
        "skipped": {reason: number for reason, number in sorted(skipped.items()) if number},
    }
    if lengths:
        tokens = np.concatenate(lengths)
        found["tokens"] = {"mean": round(float(tokens.mean()), 1), "p95": int(np.percentile(tokens, 95))}
        found["tokens"] |= {"least": int(tokens.min()), "most": int(tokens.max())}
    return found


def write_all(folder: Path, chunks: Iterator[Traced], skipped: Counter[str], total: int) -> dict[str, Any]:
    """Write the parquet files, and return `summary`.

    Raises:
        UserError: no trace is left, or all are held out.
    """
    held_out, styles, tries, lengths, writer = [], Counter[str](), 0, [], None
    path = folder / "train.parquet"
    with progress_bars() as progress, ExitStack() as files:
        for chunk in chunks:
            train, held = chunk.tables
            for table in chunk.tables:
                info = table["extra_info"].combine_chunks()
                styles.update(info.field("style").to_pylist())
                tries += sum(info.field("tries").to_pylist())
            lengths += [np.array(chunk.lengths)] if chunk.lengths else []
            skipped += chunk.skipped
            held_out.append(held)
            if len(train):
                writer = writer or files.enter_context(pq.ParquetWriter(path, train.schema, compression="zstd"))
                writer.write_table(train)
            progress("traces", styles.total(), total)
    if not styles:
        raise UserError(f"no trace fits: all {skipped['too_long']:,} are longer; raise max_tokens")
    if not writer:
        raise UserError("all traces are held out; lower held_out_share, or raise count")
    if rows := pa.concat_tables(held_out):
        pq.write_table(rows, folder / "held_out.parquet", compression="zstd", row_group_size=ROW_GROUP)
    return summary(styles, tries, lengths, skipped)


def write_traces(config: dict[str, Any], data: Path, out: Path, workers: int) -> dict[str, Any] | None:
    """Write the folder of traces. Returns its manifest, or None if it was already there."""
    manifest = opened(data)
    files = manifest["files"]
    config = config | {"prompt": manifest["configuration"]["prompt"]}  # a warm start compares it with its own
    source = {"folder": str(data), "files": {name: file for name, file in files.items() if name.endswith(".parquet")}}
    if out.resolve() == data.resolve():
        raise UserError(f"out={out} is the folder of the problems; name another one")
    written = written_manifest(out, traces=True)
    about = {"source": source, "configuration": config}
    if is_made(out, written, about):
        return None
    before = opening(config["prompt"], config["tokenizer"])
    if config["tokenizer"]:
        tokenizer_of(config["tokenizer"])
    train = data / "train.parquet"
    with replaced(out) as folder, closing(Local(workers, folder.parent)) as pool:
        tests = hashes_of_tests(data)
        columns = ["reward_model", "extra_info"]
        states = list(pool.map(usable, ((batch, tests) for batch in batches(train, columns))))
        reasons = np.bincount(np.concatenate(states), minlength=3)
        if not reasons[USABLE]:
            raise UserError(f"data={data}: none of its {sum(reasons):,} training problems has a solution")
        weights = tuple(config["styles"][style] for style in STYLES)
        keys = {key: config[key] for key in Job._fields if key in config} | {"weights": weights, "before": before}
        job = Job(**keys | {"usable": int(reasons[USABLE]), "total": config["count"] or int(reasons[USABLE])})
        firsts = np.cumsum([0] + [int((state == USABLE).sum()) for state in states]).tolist()
        chosen = (
            (batch.filter(pa.array(state == USABLE)), first, job)
            for batch, state, first in zip(batches(train, COLUMNS), states, firsts, strict=False)
            if first < job.total and (state == USABLE).any()
        )
        skipped = Counter(unsolvable=int(reasons[UNSOLVABLE]), in_a_test_set=int(reasons[IN_A_TEST_SET]))
        about["traces"] = write_all(folder, pool.map(trace_chunk, chosen), skipped, job.total)
        if opened(data)["files"] != files:
            raise UserError(f"data={data} was made anew meanwhile; the same command reads it as it is now")
        write_manifest(folder, out, about)
    return read_manifest(out)


def examples(path: Path) -> dict[str, str]:
    """The first response of each style in the first rows of a file."""
    rows = pq.ParquetFile(path).read_row_group(0).to_pylist()
    found = {row["extra_info"]["style"]: row["messages"][-1]["content"].strip() for row in reversed(rows)}
    return {style: found[style] for style in STYLES if style in found}


@command("traces", TracesKeys, CONFIGS / "commands")
def main(cfg: DictConfig) -> None:
    from joblib import cpu_count  # a container's limit counts; not imported for `--help`

    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    data, out = Path(config.pop("data")), Path(config.pop("out"))
    workers = config.pop("workers") or cpu_count()
    manifest = write_traces(config, data, out, workers)
    if manifest is None:
        print(f"{out}: already there, with this data and configuration")
        return
    made, rows = manifest["traces"], {name: file["rows"] for name, file in manifest["files"].items()}
    reasons = ", ".join(f"{number:,} {reason.replace('_', ' ')}" for reason, number in made["skipped"].items())
    print(f"{out}: {rows['train.parquet']:,} traces, {rows.get('held_out.parquet', 0):,} held out", end="")
    print(f"; left out: {reasons}" if reasons else "")
    for style, text in examples(out / "train.parquet").items():
        print(f"\n{style}, {made['styles'][style]:.0%}:\n{text}")


if __name__ == "__main__":
    main()
