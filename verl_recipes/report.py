"""python -m verl_recipes.report RUN [RUN ...] [out=FILE] [price=P] [currency=C]: a run explains itself on one page.

Writes RUN/report.html, or for several runs `out`: one file that opens from disk and asks no network for anything. On
it: what changed from the base model to the trained one, with intervals; every curve; behaviours over the steps; a
browser of samples; configuration, versions, data sheet, cost, and how to repeat the run. It is made from what the
folder holds, of a run that still goes on or was killed as well, and says what is missing. Runs whose configurations
differ by seed and name alone are drawn as one line with a band from the least to the most.

`price` is that of a GPU-hour, by default `plan.price` of the run's configuration. The page holds a sample of the
samples (PAGE_BYTES) and says of how many; everything else is computed from all of them, but for behaviours, which are
read from BEHAVIOUR_ROWS a step.
"""

import base64
import hashlib
import json
import math
import os
import re
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from data_prep.cli import CONFIGS, UserError
from reward_score.grammar import find_answer
from verl_recipes.measure.behaviours import BEHAVIOURS, behaviours, statements
from verl_recipes.measure.evaluation import figure
from verl_recipes.measure.summary import AGREEMENT

HERE = Path(__file__).resolve().parent / "reporting"
PAGE_BYTES = 4_000_000  # of samples on a page, and
STEP_BYTES = 40_000  # at least for a step that has samples there, so that several long responses fit
SHOWN = 6_000  # characters of one response on the page; its middle is left out
READ = 32_768  # characters of one response in which behaviours are looked for
BEHAVIOUR_ROWS = 64  # responses a step in which they are
POINTS = 1_000  # of a curve

DEGENERATE = ("groups_without_signal", "identical", "repeated", "unparsable")

# Title, unit, and the metrics of verl's and of the run's sampler that a chart shows: patterns of names; "-" excludes
# some, and of "a|b" the first is taken that was recorded.
CHARTS: list[tuple[str, str, list[str]]] = [
    ("Accuracy by test set", "share", ["val-core/*/acc/mean@*"]),
    ("Reward, training batch", "reward", ["reward/score|critic/score/mean"]),
    (
        "Components of the reward",
        "mean",
        ["reward/*", "-reward/*/*", "-reward/score", *(f"-reward/{name}" for name in ("truncated", *DEGENERATE))],
    ),
    ("Reasons of failure", "share of responses", ["reward/reason/*"]),
    ("Response length", "tokens", ["response_length/mean"]),
    ("Truncated responses", "share", ["response_length/clip_ratio"]),
    ("KL divergence", "nats", ["actor/kl_loss", "actor/reward_kl_penalty", "actor/ppo_kl", "rollout_corr/kl"]),
    ("Entropy of the policy", "nats", ["actor/entropy|actor/entropy_loss"]),
    ("Gradient norm", "norm", ["actor/grad_norm", "critic/grad_norm"]),
    (
        "Groups without signal, and degenerate output",
        "share",
        [f"reward/{name}" for name in DEGENERATE],
    ),
    ("Throughput", "tokens a second", ["perf/throughput"]),
    ("Seconds by part of a step", "seconds", ["timing_s/*"]),
    ("Disagreement of rollout and actor", "1 - correlation", ["|".join(f"1 - {name}" for name in AGREEMENT)]),
]
BEHAVIOUR_CHARTS: list[tuple[str, str, list[str]]] = [
    ("Behaviours", "share of responses that show it", list(BEHAVIOURS)),
    ("Candidates tried, and repeated", "mean count", ["candidates", "repeats"]),
    ("True arithmetic", "share of statements", ["true arithmetic"]),
    ("Mixed language and degenerate ends", "share", ["language_mixing", "repetition"]),
]

# What others say their run cost; sources as in docs/report.md.
PUBLISHED = [
    ("TinyZero", "Qwen2.5-3B, 4 × A800, 8 h", 32.0, "224 yuan (Datawhale's figure); under 30 US dollars (its README)"),
    ("mini-r1", "Qwen2.5-3B-Instruct, 4 × H100, 6 h", 24.0, "not stated"),
    ("Datawhale-R1", "Qwen2.5-3B-Instruct, 3 × A800, 20 h", 60.0, "330 to 420 yuan"),
]

# The settings that a reader looks for first; all others are further down on the page.
SETTINGS = {
    "model": "actor_rollout_ref.model.path",
    "reward": "reward.custom_reward_function",
    "algorithm": "algorithm.adv_estimator",
    "learning rate": "actor_rollout_ref.actor.optim.lr",
    "prompts a step": "data.train_batch_size",
    "samples a prompt": "actor_rollout_ref.rollout.n",
    "temperature": "actor_rollout_ref.rollout.temperature",
    "response tokens at most": "data.max_response_length",
    "steps": "trainer.total_training_steps",
    "seed": "seed",
}


def lookup(config: Any, path: str) -> Any:
    """A value of nested dictionaries by its dotted path, None where there is none."""
    for key in path.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def number(value: Any) -> float | None:
    """A finite number as such, None for anything else that a file may hold in its place."""
    try:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    except OverflowError:  # an integer of more than 300 digits
        return None


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; what a killed writer left half-written is no object."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                yield value


def problem_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells problems apart: numbers and target, or the prompt where a row has none."""
    truth = row.get("ground_truth")
    if isinstance(truth, dict) and isinstance(truth.get("numbers"), list) and isinstance(truth.get("target"), int):
        numbers = truth["numbers"]
        if all(isinstance(number, int) for number in numbers):
            return tuple(numbers), truth["target"], str(row.get("data_source", ""))
    return (), None, str(row.get("prompt", ""))[:200]


def clip(text: str, limit: int) -> str:
    """The text with its middle left out where it is longer."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}\n[… {len(text) - limit // 2 * 2:,} characters left out …]\n{text[-(limit // 2) :]}"


def marked(response: str) -> list[list[str]]:
    """A response as pairs of kind and text: `thought`, within it `false` statements, `rest` and `answer`."""
    thought_end, answer = find_answer(response)
    thought = clip(response[:thought_end] if thought_end is not None else response, SHOWN)
    parts, done = [], 0
    for each in statements(thought):
        if not each.true and each.start >= done:
            parts += [["thought", thought[done : each.start]], ["false", thought[each.start : each.end]]]
            done = each.end
    parts.append(["thought", thought[done:]])
    if thought_end is not None:
        start, end = answer or (len(response), len(response))
        parts += [
            ["rest", clip(response[thought_end:start], SHOWN // 4)],
            ["answer", clip(response[start:end], SHOWN // 4)],
            ["rest", clip(response[end:], SHOWN // 4)],
        ]
    return [[kind, text] for kind, text in parts if text]


def behaviour_means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Behaviours over some evenly chosen responses of a step, under the names that BEHAVIOUR_CHARTS has."""
    solvable = [row for row in rows if problem_of(row)[0] and isinstance(row.get("response"), str)]
    chosen = solvable[:: math.ceil(len(solvable) / BEHAVIOUR_ROWS) or 1]
    if not chosen:
        return {}
    found = [behaviours(row["response"][:READ], *problem_of(row)[:2]) for row in chosen]
    means = {name: fmean(each[name] for each in found) for name in found[0]}
    shares = {name: fmean(each[name] > 0 for each in found) for name in BEHAVIOURS}
    stated = sum(each["statements"] for each in found)
    true = {"true arithmetic": sum(each["true_statements"] for each in found) / stated} if stated else {}
    return means | shares | true


def per_problem(rows: Sequence[dict[str, Any]]) -> dict[str, dict[Any, float]]:
    """Of an evaluation: for each figure, its mean for each problem."""
    groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[problem_of(row)].append(row)
    figures: dict[str, dict[Any, float]] = {}
    n = max(map(len, groups.values()), default=0)
    names = {
        "acc": f"mean@{n}",
        "format": "well formed",
        "response_tokens": "response tokens",
        "truncated": "truncated",
    }
    for key, name in names.items():
        of_problem = {
            problem: fmean(values)
            for problem, group in groups.items()
            if (values := [value for row in group if (value := number(row.get(key))) is not None])
        }
        if of_problem:
            figures[name] = of_problem
        if key == "acc" and of_problem and n > 1:
            figures[f"pass@{n}"] = {problem: float(share > 0) for problem, share in of_problem.items()}
    return figures


def headline(base: dict[str, dict[Any, float]], trained: dict[str, dict[Any, float]]) -> list[list[str]]:
    """Rows of figure, base, trained and gain, each with its 95% interval; the gain over the problems of both."""
    rows = []
    for name in base | trained:
        cells = [name]
        digits = 1 if name == "response tokens" else 3
        pairs = [(base[name][key], trained[name][key]) for key in base.get(name, {}) if key in trained.get(name, {})]
        gain = [after - before for before, after in pairs]
        for values in (list(base.get(name, {}).values()), list(trained.get(name, {}).values()), gain):
            if not values:
                cells.append("–")
                continue
            share = values is not gain and name != "response tokens"
            (mean, low, high), sign = figure(values, share=share), "+" if values is gain else ""
            ends = f" ({low:{sign}.{digits}f} to {high:{sign}.{digits}f})" if math.isfinite(low) else ""
            cells.append(f"{mean:{sign}.{digits}f}{ends}")
        rows.append(cells)
    return rows


class Run:
    """All that a page needs of one run folder, and in `missing` what it does not have."""

    def __init__(self, folder: Path, page_bytes: int) -> None:
        self.folder, self.name, self.missing = folder, folder.resolve().name, list[str]()
        config_file = folder / "config.yaml"
        self.config_text = config_file.read_text("utf-8", "replace") if config_file.exists() else ""
        try:
            config = yaml.load(self.config_text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except yaml.YAMLError as error:
            config = None
            self.missing.append(f"config.yaml is not readable: {str(error).splitlines()[0]}")
        self.config: dict[str, Any] = config if isinstance(config, dict) else {}
        if not self.config_text:
            self.missing.append("no config.yaml, so neither settings nor cost are known")
        self.metrics = self.read_metrics()
        self.curves: dict[str, dict[int, float]] = defaultdict(dict)
        for step, data in self.metrics.items():
            for name, value in data.items():
                if (finite := number(value)) is not None:
                    self.curves[name][step] = finite
        for name in AGREEMENT:
            if values := self.curves.pop(name, None):
                self.curves[f"1 - {name}"] = {step: 1 - value for step, value in values.items()}
        self.summary = self.read_json(folder / "summary.json")
        if not self.summary:
            self.missing.append("no summary.json: the run goes on, or was ended before its last step")
        versions = self.summary.get("versions")
        self.versions: dict[str, Any] = versions if isinstance(versions, dict) else {}
        self.on_cpu = lookup(self.config, "trainer.device") == "cpu"
        self.steps = max(self.metrics, default=0)
        self.behaviours: dict[str, dict[int, float]] = defaultdict(dict)
        self.samples: list[dict[str, Any]] = []
        self.all_samples = 0
        self.headline: list[list[str]] = []
        self.validated: list[int] = []
        self.read_samples(page_bytes)
        self.datasheet = self.read_datasheet()

    def read_json(self, path: Path) -> dict[str, Any]:
        """An object in a file, empty where there is none."""
        try:
            value = json.loads(path.read_text("utf-8", "replace"))
        except (OSError, ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}

    def read_metrics(self) -> dict[int, dict[str, Any]]:
        """Metrics by step; those of a run that goes on are in metrics.part.jsonl as well."""
        paths = [path for name in ("metrics", "metrics.part") if (path := self.folder / f"{name}.jsonl").exists()]
        lines = [line for path in paths for line in read_lines(path)]
        metrics = {
            line["step"]: line["data"]
            for line in lines
            if isinstance(line.get("step"), int) and isinstance(line.get("data"), dict)
        }
        if not metrics:
            self.missing.append("no metrics.jsonl with a step in it, so there are no curves")
        return dict(sorted(metrics.items()))

    def read_samples(self, page_bytes: int) -> None:
        """Behaviours and headline from the samples, and as many of them as the page has room for."""
        files = [
            (split, int(path.stem), path)
            for split in ("train", "validation")
            for path in (self.folder / "samples" / split).glob("*.jsonl")
            if path.stem.isdecimal()
        ]
        files.sort(key=lambda each: each[:2])
        evaluations = {}
        if not files:
            self.missing.append("no samples/, so there are neither samples nor behaviours")
        # Evenly chosen steps have room on the page; the first and the last evaluation are always among them.
        ends = [each for each in files if each[0] == "validation"]
        on_page = {*files[:: math.ceil(len(files) / max(page_bytes // STEP_BYTES, 1)) or 1], *ends[:1], *ends[-1:]}
        for split, step, path in files:
            rows = list(read_lines(path))
            self.all_samples += len(rows)
            if split == "train":
                for name, value in behaviour_means(rows).items():
                    self.behaviours[name][step] = value
            else:
                evaluations[step] = per_problem(rows)
            if (split, step, path) not in on_page:
                continue
            # The same problems at every step, with all their samples: those whose hash comes first.
            rows.sort(key=lambda row: zlib.crc32(repr(problem_of(row)).encode("utf-8", "replace")))
            room = page_bytes // len(on_page)
            for row in rows:
                sample = self.sample(row, split, step)
                room -= len(json.dumps(sample))
                if room < 0:
                    break
                self.samples.append(sample)
        self.validated = sorted(evaluations)
        if len(evaluations) > 1:
            self.headline = headline(evaluations[self.validated[0]], evaluations[self.validated[-1]])
        else:
            self.missing.append(
                f"{len(evaluations) or 'no'} validation with samples, so base and trained model are not compared"
            )
            if evaluations:
                self.headline = headline(evaluations[self.validated[0]], {})

    def sample(self, row: dict[str, Any], split: str, step: int) -> dict[str, Any]:
        """What the page shows of one row."""
        numbers, target, other = problem_of(row)
        response = row.get("response")
        return {
            "run": self.name,
            "split": split,
            "step": step,
            "problem": f"{list(numbers)} → {target}" if numbers else clip(other, 80),
            "set": str(row.get("data_source", "")),
            "reason": str(row.get("reason", "right" if row.get("acc") else "unknown"))[:80],
            "right": bool(row.get("acc")),
            "score": number(row.get("score")),
            "tokens": row["response_tokens"] if isinstance(row.get("response_tokens"), int) else None,
            "truncated": bool(row.get("truncated")),
            "parts": marked(response) if isinstance(response, str) else [],
        }

    def read_datasheet(self) -> str:
        """The data folder's datasheet.json, or else its manifest.json, as text."""
        files = lookup(self.config, "data.train_files")
        for file in files if isinstance(files, list) else [files]:
            for root in (Path(), CONFIGS.parent):
                for name in ("datasheet.json", "manifest.json"):
                    if isinstance(file, str) and (sheet := self.read_json((root / file).parent / name)):
                        return json.dumps(sheet, indent=1, ensure_ascii=False)[:200_000]
        self.missing.append(f"no datasheet.json or manifest.json beside the training data ({files})")
        return ""

    def group(self) -> str:
        """Equal for runs that differ by seed and name alone."""
        text = json.dumps(self.config, sort_keys=True, default=str)
        text = re.sub(r'"[a-z_]*seed": (null|\d+)', "", text)
        own = {str(self.config.get("run_dir")), str(self.config.get("name")), self.name} - {"None", ""}
        for name in sorted(own, key=len, reverse=True):
            text = text.replace(name, "")
        return text if self.config else self.name

    def cost(self, price: Any, currency: str | None) -> dict[str, Any]:
        """GPU-hours and money by step and in all; `seconds` is None where no step tells its time."""
        price = lookup(self.config, "plan.price") if price is None else price
        prices = [each for each in map(number, price if isinstance(price, list) else [price]) if each is not None]
        steps = self.curves.get("timing_s/step", {})
        split = lookup(self.config, "trainer.v1.trainer_mode") == "separate_async"  # GPUs that generate and do no more
        gpus = 0
        for place in ("trainer", *(["actor_rollout_ref.rollout"] if split else [])):
            sizes = [lookup(self.config, f"{place}.{name}") for name in ("n_gpus_per_node", "nnodes")]
            gpus += math.prod(size if isinstance(size, int) else 1 for size in sizes)
        total = number(lookup(self.summary, "seconds.total"))
        whole = total is not None and not self.summary.get("resumed_from")
        seconds = (
            total
            if total is not None and whole
            else sum(steps.values()) + sum(self.curves.get("timing_s/testing", {}).values())
        )
        a_step = fmean(steps.values()) if steps else math.nan

        def money(hours: float) -> str:
            return " to ".join(f"{each * hours:.4g}" for each in prices) if hours == hours else ""

        return {
            "device": lookup(self.config, "trainer.device") or "unknown device",
            "gpus": gpus,
            "hours": gpus * seconds / 3600,
            "hours_a_step": gpus * a_step / 3600,
            "basis": "the whole run" if whole else "the steps that are in metrics.jsonl",
            "prices": " to ".join(f"{each:g}" for each in prices),
            "currency": currency or lookup(self.config, "plan.currency") or "",
            "money": money(gpus * seconds / 3600),
            "money_a_step": money(gpus * a_step / 3600),
        }


def thin(points: dict[int, float]) -> list[list[float]]:
    """Steps and values, at most POINTS of them, evenly chosen, with the last one."""
    items = sorted(points.items())
    chosen = items[:: math.ceil(len(items) / POINTS) or 1]
    if items and chosen[-1] != items[-1]:
        chosen.append(items[-1])
    return [[step for step, _ in chosen], [float(f"{value:.6g}") for _, value in chosen]]


def chosen_names(patterns: Sequence[str], names: Iterable[str]) -> list[str]:
    """The names that a pattern matches and none with "-" does, in the order of the patterns."""
    names, excluded = sorted(names), [pattern[1:] for pattern in patterns if pattern.startswith("-")]
    wanted = []
    for pattern in patterns:
        matches = ([name for name in names if fnmatchcase(name, each)] for each in pattern.split("|"))
        wanted += next(filter(None, matches), [])
    return [name for name in dict.fromkeys(wanted) if not any(fnmatchcase(name, pattern) for pattern in excluded)]


def charts(runs: Sequence[Run], missing: list[str]) -> list[dict[str, Any]]:
    """What the page draws; a group of runs that differ by seed alone is one line with a band."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.group()].append(run)
    result = []
    for kind, specifications in (("metric", CHARTS), ("behaviour", BEHAVIOUR_CHARTS)):
        for title, unit, patterns in specifications:
            lines = []
            for number, members in enumerate(groups.values()):
                of_runs = [run.curves if kind == "metric" else run.behaviours for run in members]
                label = members[0].name if len(members) == 1 else f"{members[0].name} and {len(members) - 1} more seeds"
                for name in chosen_names(patterns, {name for each in of_runs for name, curve in each.items() if curve}):
                    values: dict[int, list[float]] = defaultdict(list)
                    for each in of_runs:
                        for step, value in each.get(name, {}).items():
                            values[step].append(value)
                    line: dict[str, Any] = {"name": name, "run": label if len(groups) > 1 or len(members) > 1 else ""}
                    line["group"] = number
                    line["x"], line["y"] = thin({step: fmean(each) for step, each in values.items()})
                    if len(members) > 1:
                        line["low"] = thin({step: min(each) for step, each in values.items()})[1]
                        line["high"] = thin({step: max(each) for step, each in values.items()})[1]
                    lines.append(line)
            if lines:
                result.append({"title": title, "unit": unit, "kind": kind, "lines": lines})
            else:
                missing.append(f"{title}: none of {', '.join(p for p in patterns if p[0] != '-')} was recorded")
    return result


def as_script_data(value: Any) -> Markup:
    """JSON that may stand inside a script element: ASCII, with no `<`, and null for what JSON has no number for."""

    def clean(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: clean(each) for key, each in item.items()}
        if isinstance(item, list):
            return [clean(each) for each in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return Markup(json.dumps(clean(value), separators=(",", ":")).replace("<", "\\u003c"))


def render(runs: Sequence[Run], price: float | None, currency: str | None) -> str:
    """The page."""
    from plotly.offline import get_plotlyjs  # not for those who only import train

    missing = [f"{run.name}: {each}" if len(runs) > 1 else each for run in runs for each in run.missing]
    drawn = charts(runs, missing)
    scripts = [get_plotlyjs().replace("\r", ""), (HERE / "report.js").read_text("utf-8")]
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return page.from_string((HERE / "report.html").read_text("utf-8")).render(
        runs=runs,
        costs=[run.cost(price, currency) for run in runs],
        published=PUBLISHED,
        settings={name: [lookup(run.config, path) for run in runs] for name, path in SETTINGS.items()},
        charts=drawn,
        missing=missing,
        policy=" ".join(f"'sha256-{each}'" for each in hashes),
        style=Markup((HERE / "report.css").read_text("utf-8")),
        scripts=[Markup(script) for script in scripts],
        data=as_script_data({"charts": drawn, "samples": [sample for run in runs for sample in run.samples]}),
        made=time.strftime("%Y-%m-%d %H:%M"),
        behaviour_rows=BEHAVIOUR_ROWS,
    )


def write_report(folders: Sequence[Path], out: Path, price: float | None = None, currency: str | None = None) -> Path:
    """Make the page of these run folders; returns its path.

    Raises:
        UserError: a folder does not exist.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"there is no run folder {folder}")
    page = render([Run(folder, PAGE_BYTES // len(folders)) for folder in folders], price, currency)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    os.replace(partial, out)
    return out


def main(arguments: Sequence[str]) -> None:
    folders = [Path(each) for each in arguments if "=" not in each]
    options = dict(each.split("=", 1) for each in arguments if "=" in each)
    if unknown := options.keys() - {"out", "price", "currency"}:
        raise UserError(f"the report knows no {', '.join(sorted(unknown))}; it knows out, price and currency")
    if not folders or (len(folders) > 1 and "out" not in options):
        raise UserError("name a run folder, or several and out=FILE: python -m verl_recipes.report runs/tiny-seed0")
    try:
        price = float(options["price"]) if "price" in options else None
    except ValueError:
        raise UserError(f"price is a number, not {options['price']!r}") from None
    out = Path(options.get("out", folders[0] / "report.html"))
    print(write_report(folders, out, price, options.get("currency")))


if __name__ == "__main__":
    main(sys.argv[1:])
