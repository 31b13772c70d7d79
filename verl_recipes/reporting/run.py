"""Everything that a report shows of a run's folder, and what is missing there."""

import json
import math
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml

from data_prep.cli import CONFIGS, UserError
from verl_recipes.measure.behaviours import BEHAVIOURS, behaviours, statements
from verl_recipes.measure.comparison import difference_of
from verl_recipes.measure.evaluation import (
    COUNTED,
    NO_SHARES,
    Groups,
    PerProblem,
    accuracies,
    format_and_length,
    what_is_missing,
)
from verl_recipes.measure.intervals import Figure, figure
from verl_recipes.measure.problems import (
    Key,
    Row,
    answer_of,
    by_problem,
    finite,
    in_distribution,
    least_samples,
    numbers_and_target,
    problem_key,
    set_name,
)
from verl_recipes.reporting.metrics import Curve, curves_of, seconds_of
from verl_recipes.run.fingerprint import read_config
from verl_recipes.run.folder import RunFolder, last_samples, mark_of, read_lines, read_metrics, read_object

STEP_BYTES = 40_000  # the least room on the page for a step's samples: several long responses
SHOWN = 6_000  # characters of one response on the page; the middle of a longer one is left out
READ = 32_768  # characters of one response that are searched for behaviours
READ_STEPS = 500  # steps whose samples are read, as 1,024 long responses take over a second
BEHAVIOUR_ROWS = 64  # responses of each step that are searched
NAMES = {"format": "well formed", "response_tokens": "response tokens", "score": "reward"}  # of figures, on the page


def lookup(config: Any, path: str) -> Any:
    """A value of nested dictionaries by its dotted path; None if there is none."""
    for key in path.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def clip(text: str, limit: int) -> str:
    """The text, without its middle if it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}\n[… {len(text) - limit // 2 * 2:,} characters left out …]\n{text[-(limit // 2) :]}"


def marked(row: Row) -> list[list[str]]:
    """A response as pairs of kind and text. Kinds: `thought`, `false` statements in it, `rest` and `answer`."""
    response = row.get("response")
    if not isinstance(response, str):
        return []
    thought_end, answer = answer_of(row)
    start, end = answer or (len(response), len(response))
    thought_end = min(len(response) if thought_end is None else thought_end, start)
    thought = clip(response[:thought_end], SHOWN)
    parts, done = [], 0
    for each in statements(thought):
        if not each.true and each.start >= done:
            parts += [["thought", thought[done : each.start]], ["false", thought[each.start : each.end]]]
            done = each.end
    parts += [
        ["thought", thought[done:]],
        ["rest", clip(response[thought_end:start], SHOWN // 4)],
        ["answer", clip(response[start:end], SHOWN // 4)],
        ["rest", clip(response[end:], SHOWN // 4)],
    ]
    return [[kind, text] for kind, text in parts if text]


def found_in(rows: Sequence[Row], most: int | None = None) -> list[dict[str, float]]:
    """What rules find in responses to problems of Countdown, at most this many and evenly chosen."""
    solvable = [
        (row["response"], *problem)
        for row in rows
        if (problem := numbers_and_target(row)) and isinstance(row.get("response"), str)
    ]
    chosen = solvable[:: math.ceil(len(solvable) / (most or len(solvable) or 1)) or 1]
    return [behaviours(response[:READ], numbers, target) for response, numbers, target in chosen]


def behaviour_means(rows: Sequence[Row]) -> dict[str, float]:
    """Behaviours in evenly chosen responses of a step, by the names in BEHAVIOUR_CHARTS."""
    found = found_in(rows, BEHAVIOUR_ROWS)
    if not found:
        return {}
    means = {name: fmean(each[name] for each in found) for name in found[0]}
    shares = {name: fmean(each[name] > 0 for each in found) for name in BEHAVIOURS}
    stated = sum(each["statements"] for each in found)
    true = {"true arithmetic": sum(each["true_statements"] for each in found) / stated} if stated else {}
    return means | shares | true


def evaluation_figures(groups: Groups) -> PerProblem:
    """The figures of an evaluation for the headline, at each problem."""
    n = least_samples(groups.values())
    done = {key: found for key, rows in groups.items() if (found := found_in(rows[:COUNTED]))}
    tried = {"candidates": {key: fmean(each["candidates"] for each in found) for key, found in done.items()}}
    shares = {
        name: {key: fmean(each[name] > 0 for each in found) for key, found in done.items()} for name in BEHAVIOURS
    }
    return accuracies(groups, n, {n} - {1}) | format_and_length(groups) | (tried | shares if done else {})


def cell(values: Collection[float], name: str, sign: str = "") -> str:
    """The mean of a figure over problems with its 95% interval, shares of 100; `sign` is "+" for gains."""
    if not values:
        return ""
    digits, scale = (3, 1) if name == "score" else (1, 1 if name in NO_SHARES else 100)
    is_share = name not in NO_SHARES
    of_few = sign and is_share and len(values) > 1
    found = difference_of(list(values)) if of_few else figure(values, share=is_share and not sign)
    mean, low, high = (scale * each for each in found)
    ends = f" ({low:{sign}.{digits}f} to {high:{sign}.{digits}f})" if math.isfinite(low) else ""
    return f"{mean:{sign}.{digits}f}{ends}"


def headline(evaluations: Sequence[PerProblem]) -> list[list[str]]:
    """Rows with a figure's name, its cell for each evaluation, and each gain over the one before on common problems."""
    rows = []
    for name in dict.fromkeys(name for figures in evaluations for name in figures):
        at_problems = [figures.get(name, {}) for figures in evaluations]
        if not any(at_problems):
            continue
        cells = [NAMES.get(name, name), *(cell(each.values(), name) for each in at_problems)]
        rows.append([*cells, *(cell(gains(*pair), name, "+") for pair in pairwise(at_problems))])
    return rows


def gains(before: Mapping[Key, float], after: Mapping[Key, float]) -> list[float]:
    """The differences at the problems that both have."""
    return [after[key] - before[key] for key in before if key in after]


def labels(keys: Mapping[Key, Row]) -> dict[Key, str]:
    """The page's name for each problem, given one of its rows. It has the test set if two sets share the problem."""
    short = {}
    for key, row in keys.items():
        problem = numbers_and_target(row)
        short[key] = f"{sorted(problem[0])} → {problem[1]}" if problem else clip(str(row.get("prompt", "")), 80)
    count = Counter(short.values())
    sets = {key: f"{set_name(row)}, {str(row.get('data_source', ''))[:80]}" for key, row in keys.items()}
    return {key: f"{label} ({sets[key]})" if count[label] > 1 else label for key, label in short.items()}


def duration(seconds: float | None) -> str:
    """Seconds as a person says them; "" for None.

    >>> duration(296.1), duration(8040), duration(7)
    ('4 min 56 s', '2 h 14 min', '7 s')
    """
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def read_settings(folder: RunFolder) -> tuple[dict[str, Any], str]:
    """The content of config.yaml, and what is wrong with the file, "" for nothing."""
    if not folder.config.exists():
        return {}, "no config.yaml, so neither settings nor cost are known"
    try:
        return read_config(folder.config), ""
    except (OSError, ValueError, yaml.YAMLError) as error:
        return {}, f"config.yaml is not readable: {str(error).splitlines()[0]}"


def read_summary(folder: RunFolder, config: dict[str, Any]) -> tuple[dict[str, Any], str, int]:
    """What summary.json says of a run, and what the run is doing.

    Returns:
        The summary, empty unless the state is "complete"; the state, as the end of a sentence: "complete", "goes on" or
        "ended early"; and the planned steps, 0 if they are not known.
    """
    warm_start = "sft" in config
    known = lookup(config, "sft.steps" if warm_start else "trainer.total_training_steps")
    planned = known if isinstance(known, int) else 0
    summary = read_object(folder.summary)
    steps = summary.get("steps")
    # A summary of fewer steps is that of an earlier end, unless the run ended early by itself. A warm start has none
    # before it has ended.
    fewer = not warm_start and isinstance(steps, int) and steps < planned
    if summary and (summary.get("early_end") or not fewer):
        return summary, "complete", planned
    return {}, "goes on" if folder.is_locked() else "ended early", planned


def not_finite(metrics: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Lines on metrics of steps that were NaN or infinite, which verl's file logger writes as null."""
    lost = Counter(name for data in metrics.values() for name, value in data.items() if value is None)
    return [f"{name}: no finite number at {count} steps, which are not drawn" for name, count in lost.items()]


class SampleFile(NamedTuple):
    """A file of samples/."""

    split: str
    step: int
    path: Path


class Run:
    """Everything that a page shows of one run or warm start; `missing` lists what the folder lacks."""

    def __init__(self, folder: Path, page_bytes: int, measured: Sequence[Path] = ()) -> None:
        """Read the folder of a run, complete or not.

        Args:
            folder: of the run.
            page_bytes: room for samples on the page; 0: no sample is read.
            measured: folders of evaluations that are compared, in this order, instead of the run's first and last test.
        """
        self.folder, self.name, self.missing = RunFolder(folder), folder.resolve().name, list[str]()
        config = self.folder.config
        self.config_text = config.read_text("utf-8", "replace") if config.is_file() else ""
        self.config, unread = read_settings(self.folder)
        self.missing += [unread] if unread else []
        if lookup(self.config, "algorithm.filter_groups.enable"):
            self.missing.append("groups that dynamic sampling dropped: training figures are of the others")
        metrics = read_metrics(self.folder)
        if not metrics:
            self.missing.append("no metrics.jsonl with a step in it, so there are no curves")
        self.curves, self.steps = curves_of(metrics), max(metrics, default=0)
        self.missing += not_finite(metrics)
        self.is_warm_start = "sft" in self.config
        self.is_evaluation = mark_of(folder).get("kind") == "evaluation"
        self.summary, self.state, self.planned = read_summary(self.folder, self.config)
        self.read_warm_start()
        if not self.summary:
            self.missing.append("no summary.json of the last step: the run goes on, or ended before it")
        starts = read_lines(self.folder.starts, skip_damaged=True)
        began = [each for each in starts if each.get("event") == "began"]
        self.commands = list(dict.fromkeys(str(each["command"]) for each in began if "command" in each))
        self.machine = next((str(each["machine"]) for each in reversed(began) if "machine" in each), "")
        times = [at for each in began if (at := finite(each.get("time"))) is not None]
        self.began = time.strftime("%-d %B %Y, %H:%M", time.localtime(times[0])) if times else ""
        self.seconds = seconds_of(self.summary)
        described = str(self.summary.get("git_commit") or "")
        self.commit, self.changed = described.removesuffix("-dirty"), described.endswith("-dirty")
        parts: Any = self.summary.get("goodput")
        known = isinstance(parts, dict) and "share" in parts and None not in map(finite, parts.values())
        self.goodput: dict[str, float] = parts if known else {}
        versions = self.summary.get("versions")
        self.versions: dict[str, Any] = versions if isinstance(versions, dict) else {}
        self.on_cpu = lookup(self.config, "trainer.device") == "cpu"
        self.behaviours: dict[str, Curve] = defaultdict(dict)
        self.samples: list[dict[str, Any]] = []
        self.all_samples = 0
        self.training: dict[int, Figure] = {}  # the main figure of each step's batch, over its problems
        self.tests: dict[str, dict[int, Figure]] = defaultdict(dict)  # and of each test, by test set
        self.judged: set[str] = set()  # the names that the main figure has
        self.evaluated: list[int] = []  # the steps of the first and the last test
        self.evaluations: list[Groups] = []  # the samples by problem of what is compared
        self.called: list[str] = []  # in words, whose they are
        self.read_samples(page_bytes)
        self.measured = [path.name for path in measured]
        if measured:
            self.read_evaluations(measured)
        elif len(self.evaluations) < 2 and not self.is_warm_start and not self.is_evaluation:
            what = f"one test, at step {self.evaluated[0]}" if self.evaluated else "no validation with samples"
            self.missing.append(f"{what}, so base and trained model are not compared")
        self.figures = [evaluation_figures(groups) for groups in self.evaluations]
        self.headline = headline(self.figures)
        self.datasheet = self.read_datasheet()

    def read_warm_start(self) -> None:
        """The folder of the warm start that the run begins with, or is, and its curves."""
        named = self.folder.path if self.is_warm_start else lookup(self.config, "warm_start")
        self.warm_start = RunFolder(named) if named else None
        self.warm_curves = curves_of(read_metrics(self.warm_start)) if self.warm_start else {}
        if self.warm_start and not self.warm_curves:
            self.missing.append(f"no metrics of the warm start in {named}, so its loss is not drawn")

    def whose(self, models: Sequence[str]) -> list[str]:
        """What each measured model is to this run, by its path."""
        before = read_settings(self.warm_start)[0] if self.warm_start else self.config
        known = {
            "after reinforcement learning": None if self.is_warm_start else self.config.get("run_dir"),
            "after the warm start": self.config.get("run_dir" if self.is_warm_start else "warm_start"),
            "base model": lookup(before, "actor_rollout_ref.model.path"),
        }
        places = [(words, Path(at).resolve()) for words, at in known.items() if at]
        return [
            next((words for words, at in places if Path(model).resolve().is_relative_to(at)), f"with {model}")
            for model in models
        ]

    def read_evaluations(self, measured: Sequence[Path]) -> None:
        """Compare these evaluations instead of the run's own tests.

        Raises:
            UserError: one is not finished, or they are not of the same problems.
        """
        self.evaluations = [in_distribution(by_problem(last_samples(path))) for path in measured]
        models = [str(read_object(RunFolder(path).summary).get("model", path)) for path in measured]
        self.called = self.whose(models)
        for path, groups in zip(measured, self.evaluations, strict=True):
            if groups.keys() != self.evaluations[0].keys():
                raise UserError(f"{measured[0]} and {path} were not measured on the same problems")
        if len({*zip(self.called, models, strict=True)}) > len({*self.called}):  # two checkpoints of one run
            self.called = [f"{each} ({model})" for each, model in zip(self.called, models, strict=True)]
        temperatures = [read_object(RunFolder(path).summary).get("temperature") for path in measured]
        if len(set(temperatures)) > 1:
            self.called = [f"{each} (temperature {t})" for each, t in zip(self.called, temperatures, strict=True)]

    def read_samples(self, page_bytes: int) -> None:
        """Read figures and behaviours from the samples of READ_STEPS steps, and keep as many as fit on the page."""
        if not page_bytes:
            return
        files = list[SampleFile]()
        for split in ("train", "validation"):
            found = [SampleFile(split, *each) for each in self.folder.sample_files(split).items()]
            if len(found) > READ_STEPS:
                self.missing.append(f"{split} samples of {len(found):,} steps: those of {READ_STEPS} were read")
                found = [found[round(i * (len(found) - 1) / (READ_STEPS - 1))] for i in range(READ_STEPS)]
            files += found
        if not files and not self.is_warm_start:
            self.missing.append("no samples/, so there are neither samples nor behaviours")
        # Only evenly chosen steps are on the page, but always the first and the last evaluation.
        evaluated = [file for file in files if file.split == "validation"]
        spacing = math.ceil(len(files) / max(page_bytes // STEP_BYTES, 1)) or 1
        on_page = {*files[::spacing], *evaluated[:1], *evaluated[-1:]}
        rows = list[dict[str, Any]]()
        problems: dict[Key, Row] = {}  # a row of each problem on the page
        for file in files:
            rows = read_lines(file.path, skip_damaged=True)
            self.all_samples += len(rows)
            groups = by_problem(rows)
            self.judge(file, groups)
            if file.split == "train":
                for name, value in behaviour_means(rows).items():
                    self.behaviours[name][file.step] = value
            elif file in (evaluated[0], evaluated[-1]) and rows:
                self.evaluated.append(file.step)
                self.evaluations.append(in_distribution(groups))
                start = "after the warm start" if self.warm_start else "before training"
                start = "the measured model" if self.is_evaluation else start
                self.called.append(f"after step {file.step}" if file.step else start)
            if file in on_page:
                for row, sample in self.fitting(rows, file, page_bytes // len(on_page)):
                    problems[sample["problem"]] = row
                    self.samples.append(sample)
        self.missing += what_is_missing(rows)
        called = labels(problems)
        for sample in self.samples:
            sample["problem"] = called[sample["problem"]]

    def judge(self, file: SampleFile, groups: Groups) -> None:
        """Add the main figure of a file to the curve that it belongs to: mean@n, or the reward without any verdict."""
        [(name, each)] = accuracies(groups, least_samples(groups.values()), ()).items()
        if not each:
            return
        scored = name == "score"
        self.judged.add("score" if scored else "acc")
        if file.split == "train":
            self.training[file.step] = figure(each.values(), share=not scored)
            return
        for source in {key[1] for key in each}:
            of_set = (value for key, value in each.items() if key[1] == source)
            self.tests[source][file.step] = figure(of_set, share=not scored)

    def fitting(self, rows: list[dict[str, Any]], file: SampleFile, room: int) -> Iterator[tuple[Row, dict[str, Any]]]:
        """Rows with what the page shows of them, as many as fit into `room` bytes.

        The problems with the lowest hashes come first, so they are the same problems at every step.
        """
        rows.sort(key=lambda row: zlib.crc32(repr(problem_key(row)).encode("utf-8", "replace")))
        for row in rows:
            sample = self.sample(row, file)
            room -= len(json.dumps(sample, ensure_ascii=False).encode("utf-8", "replace"))
            if room < 0:
                return
            yield row, sample

    def sample(self, row: Row, file: SampleFile) -> dict[str, Any]:
        """What the page shows of one row, with its problem's key; `right` is None if the reward gives no `acc`."""
        verdict, tokens = finite(row.get("acc")), row.get("response_tokens")
        return {
            "run": self.name,
            "split": file.split,
            "step": file.step,
            "problem": problem_key(row),
            "set": str(row.get("data_source", "")),
            "reason": str(row.get("reason", "right" if verdict == 1 else "unknown"))[:80],
            "right": None if verdict is None else verdict == 1,
            "score": finite(row.get("score")),
            "tokens": tokens if isinstance(tokens, int) else None,
            "truncated": bool(row.get("truncated")),
            "parts": marked(row),
        }

    def read_datasheet(self) -> str:
        """The data folder's datasheet.json, or else its manifest.json, as text."""
        traces = lookup(self.config, "sft.traces")
        files = f"{traces}/train.parquet" if traces else lookup(self.config, "data.train_files")
        for file in files if isinstance(files, list) else [files]:
            for root in (Path(), CONFIGS.parent):
                for name in ("datasheet.json", "manifest.json"):
                    if isinstance(file, str) and (sheet := read_object((root / file).parent / name)):
                        return json.dumps(sheet, indent=1, ensure_ascii=False)[:200_000]
        self.missing.append(f"no datasheet.json or manifest.json beside the training data ({files})")
        return ""

    def devices(self) -> int:
        """How many GPUs, or ranks on a CPU, the run uses."""
        generates_apart = lookup(self.config, "trainer.v1.trainer_mode") == "separate_async"
        sizes = [
            [lookup(self.config, f"{place}.{name}") for name in ("n_gpus_per_node", "nnodes")]
            for place in ("trainer", *(["actor_rollout_ref.rollout"] if generates_apart else []))
        ]
        return sum(math.prod(size if isinstance(size, int) else 1 for size in each) for each in sizes)

    def cost(self, price: Any = None, currency: str | None = None, until: float = math.inf) -> dict[str, Any]:
        """Device-hours and money, for a step and in all.

        Args:
            price: of a GPU-hour, or [low, high]; None for that of the run's configuration.
            currency: None for that of the run's configuration.
            until: the last step that counts.
        """
        price = lookup(self.config, "plan.price") if price is None else price
        prices = [each for each in map(finite, price if isinstance(price, Sequence) else [price]) if each is not None]
        steps, tests = (
            {step: value for step, value in self.curves.get(f"timing_s/{name}", {}).items() if step <= until}
            for name in ("step", "testing")
        )
        gpus, seconds, whole = self.devices(), self.seconds, True
        if seconds is None or until < self.steps or (self.summary.get("resumed_from") and not self.goodput):
            seconds, whole = sum(steps.values()) + sum(tests.values()), False
        hours, hours_a_step = (gpus * each / 3600 for each in (seconds, fmean(steps.values()) if steps else math.nan))

        def money(hours: float) -> str:
            amounts = [each * hours for each in prices if not math.isnan(hours)]
            return " to ".join(f"{each:.4g}" if each < 9_999.5 else f"{each:,.0f}" for each in amounts)

        return {
            "device": lookup(self.config, "trainer.device") or "unknown device",
            "gpus": gpus,
            "hours": hours,
            "hours_a_step": hours_a_step,
            "basis": "the whole run" if whole else "the steps that are in metrics.jsonl",
            "prices": " to ".join(f"{each:g}" for each in prices),
            "currency": currency or lookup(self.config, "plan.currency") or "",
            "money": money(hours),
            "money_a_step": money(hours_a_step),
        }
