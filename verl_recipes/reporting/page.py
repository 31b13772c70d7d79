"""The page of one or several runs: one HTML file that holds everything it shows and loads nothing."""

import base64
import gzip
import hashlib
import json
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from data_prep.cli import UserError
from verl_recipes.reporting.charts import REASONS, SHOWN, charts, in_groups, number, of_right, of_warm_starts
from verl_recipes.reporting.listing import listing
from verl_recipes.reporting.run import BEHAVIOUR_ROWS, Run, duration, lookup
from verl_recipes.reporting.story import example, stories
from verl_recipes.reporting.terms import terms
from verl_recipes.run.fingerprint import flat
from verl_recipes.run.folder import MADE_BY, RunFolder, mark_of, write_whole

HERE = Path(__file__).parent
PAGE_BYTES = 4_000_000  # of samples on a page, before they are compressed
HIDDEN = re.compile(
    "[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)

# The cost of published runs, by their authors (docs/recipes.md names the sources).
PUBLISHED = [
    ("TinyZero", "Qwen2.5-3B, 4 × A800, 8 h", 32.0, "224 yuan (Datawhale's figure); under 30 US dollars (its README)"),
    ("mini-r1", "Qwen2.5-3B-Instruct, 4 × H100, 6 h", 24.0, "not stated"),
    ("Datawhale-R1", "Qwen2.5-3B-Instruct, 3 × A800, 20 h", 60.0, "330 to 420 yuan"),
]

# The settings that a reader looks for first, with the term that explains each; all others are further down on the page.
SETTINGS = {
    "recipe": ("recipe", "recipe_name"),
    "model": ("base_model", "actor_rollout_ref.model.path"),
    "reward": ("reward", "reward.custom_reward_function"),
    "training problems": ("", "data.train_files"),
    "test problems": ("test_problems", "data.val_files"),
    "algorithm": ("algorithm", "algorithm.adv_estimator"),
    "learning rate": ("learning_rate", "actor_rollout_ref.actor.optim.lr"),
    "prompts a step": ("prompt", "data.train_batch_size"),
    "responses a prompt": ("group", "actor_rollout_ref.rollout.n"),
    "temperature": ("temperature", "actor_rollout_ref.rollout.temperature"),
    "response tokens at most": ("truncated", "data.max_response_length"),
    "steps": ("step", "trainer.total_training_steps"),
    "seed": ("seed", "seed"),
}
OF_WARM_START = {  # the same of a warm start
    "model": ("base_model", "actor_rollout_ref.model.path"),
    "traces": ("", "sft.traces"),
    "learning rate": ("learning_rate", "sft.lr"),
    "traces a step": ("", "sft.batch"),
    "steps at most": ("step", "sft.steps"),
    "seed": ("seed", "seed"),
}
# The figures of a test in words, with the term that explains each.
FIGURES = {
    "mean": ("right at the first try", "first_try"),
    "pass": ("right at least once", "pass_at_k"),
    "well formed": ("well formed", "well_formed"),
    "truncated": ("cut off", "truncated"),
    "response tokens": ("response length, tokens", "response_tokens"),
    "candidates": ("equations tried", "equations_tried"),
    "reward": ("reward, points", "reward"),
} | {name: (words, name) for name, words in SHOWN.items()}
COLUMN_TERMS = {
    "recipe": "recipe",
    "seed": "seed",
    "steps": "step",
    "before": "first_try",
    "gain": "gain",
    "equations": "equations_tried",
}
SIZE, MAIN_SIZE = (4.6, 2.4), (5.6, 3.3)  # of a chart, in inches of 72 units


def clean_json(value: Any) -> str:
    """JSON in ASCII, with null for numbers that are not finite."""
    finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(finite, separators=(",", ":"))


def as_script_data(value: Any) -> Markup:
    """`clean_json` that is safe inside a script element: without `<`."""
    return Markup(clean_json(value).replace("<", "\\u003c"))


def packed(value: Any) -> str:
    """JSON, compressed, in base64: samples take an eighth of their room."""
    return base64.b64encode(gzip.compress(clean_json(value).encode(), 9, mtime=0)).decode()


def visible(text: str) -> str:
    """Control characters, and those that turn the direction of text, by their code (report.js has the same)."""
    return HIDDEN.sub(lambda each: f"⟨U+{ord(each[0]):04X}⟩", text)


def in_words(name: str) -> tuple[str, str]:
    """A figure's name on the page, and its term."""
    kind, _, k = name.partition("@")
    words, term = FIGURES.get(kind, (name, "test_problems"))
    return f"{words} in {k}" if kind == "pass" else words, term


def description(chart: dict[str, Any]) -> str:
    """What a chart shows, for who does not see it."""
    ends = [
        f"{each['label']}{each['run'] and ', ' + each['run']} from {number(each['y'][0])} at step {each['x'][0]} "
        f"to {number(each['y'][-1])} at step {each['x'][-1]}"
        for each in chart["lines"][:6]
    ]
    return f"Chart of {chart['title']}, {chart['unit']}: {'; '.join(ends)}. The table below has all values."


def with_pictures(drawn: list[dict[str, Any]], missing: list[str]) -> None:
    """Draw the charts. Without matplotlib they have their tables alone, and `missing` says so."""
    for chart in drawn:
        chart |= {"svg": None, "box": None, "description": description(chart)}
    try:
        from verl_recipes.reporting.draw import looks, svg
    except ModuleNotFoundError as error:
        missing.append(f"{error.name} is not installed, so charts have a table and no picture")
        return
    for i, chart in enumerate(drawn):
        for line in chart["lines"]:
            line["look"] = looks(chart, line)
        if chart["lines"]:
            picture = svg(chart, i, MAIN_SIZE if chart["kind"] in ("right", "warm") else SIZE)
            chart |= {"svg": Markup(picture["svg"]), "box": picture["box"]}


def about(run: Run) -> list[str]:
    """What the line below the title says of a run."""
    if run.is_evaluation:
        return ["an evaluation"]
    planned = "" if run.state == "complete" else f" of {run.planned or '?'}"
    done = f"{run.steps}{planned} step{'s' * (planned != '' or run.steps != 1)}"
    took = f"{run.state}{', ' if run.seconds else ''}{duration(run.seconds)}"
    return [each for each in (done, took, run.machine, run.began) if each]


def render(runs: Sequence[Run], price: Any, currency: str | None, refresh: int = 0) -> str:
    """The page. `refresh`: the seconds after which a browser loads it again; 0 for never."""
    import jinja2  # not at the top: train imports this module long before it writes a report

    missing = [f"{run.name}: {each}" if len(runs) > 1 else each for run in runs for each in run.missing]
    warm = all(run.is_warm_start for run in runs)
    drawn = [of_right(runs), of_warm_starts(runs), *([] if warm else charts(runs, missing))]
    with_pictures(drawn, missing)
    sentences, sure = stories(runs)
    wanted = OF_WARM_START if warm else SETTINGS
    script = (HERE / "report.js").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters["visible"] = visible
    page.globals["made_by"] = MADE_BY
    plain = [{key: value for key, value in each.items() if key not in ("svg", "description")} for each in drawn]
    return page.from_string((HERE / "report.html").read_text(encoding="utf-8")).render(
        runs=runs,
        about=about,
        sentences=sentences,
        sure=sure,
        warm=warm,
        repeats=by_command(runs),
        example=next(filter(None, map(example, runs)), None),
        listing=listing([run.folder.path for run in runs]) if len(runs) > 1 else None,
        column_terms=COLUMN_TERMS,
        seeds=len(runs) > len(in_groups(runs)),
        in_words=in_words,
        reasons=defaultdict(str, REASONS),
        terms=terms(),
        costs=[run.cost(price, currency) for run in runs],
        published=PUBLISHED,
        settings=[(name, term, [setting(run, path) for run in runs]) for name, (term, path) in wanted.items()],
        charts=drawn,
        missing=missing,
        policy=f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'",
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        data=as_script_data({"charts": plain, "reasons": REASONS}),
        packed=packed([sample for run in runs for sample in run.samples]),
        made=time.strftime("%Y-%m-%d %H:%M"),
        refresh=refresh,
        behaviour_rows=BEHAVIOUR_ROWS,
    )


def by_command(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that the same commands made of the same commit stand together."""
    groups: dict[Any, list[Run]] = defaultdict(list)
    for run in runs:
        groups[(*run.commands, run.commit, run.changed) if run.commands else run.folder.path].append(run)
    return list(groups.values())


def setting(run: Run, path: str) -> str:
    """A setting in words."""
    value = lookup(run.config, path)
    if isinstance(value, dict):
        named = [(key.rpartition(".")[2], each) for key, each in flat(value) if each not in (None, {}, "")]
        return ", ".join(f"{key} {each}" for key, each in named)
    return "not recorded" if value is None else str(value)


def apart(folders: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Runs, and the evaluations that the page of the only run compares. Without a run, each evaluation is shown as one.

    Raises:
        UserError: there are evaluations and several runs, or only one evaluation.
    """
    measured = [folder for folder in folders if mark_of(folder).get("kind") == "evaluation"]
    runs = [folder for folder in folders if folder not in measured]
    if not runs or not measured:
        return list(folders), []
    if len(runs) > 1:
        raise UserError(
            f"{measured[0]} is an evaluation, and only the page of one run compares evaluations; name one run, or "
            "leave the evaluation out"
        )
    if len(measured) == 1:
        raise UserError(
            f"{measured[0]} is compared with nothing; name the evaluation of another model too, or leave it out"
        )
    return runs, measured


def check_out(out: Path) -> None:
    """Raise UserError if there is something that is no page of this project's."""
    if out.is_dir():
        raise UserError(f"out={out} is a folder: name a file in it")
    if out.exists() and f'content="{MADE_BY}"' not in out.read_text("utf-8", "replace")[:1000]:
        raise UserError(f"out={out} exists and is no report of this project: name another file, or move that one away")


def write_report(
    folders: Sequence[Path],
    out: Path,
    price: Any = None,
    currency: str | None = None,
    refresh: int = 0,
    measured: Sequence[Path] = (),
) -> Path:
    """Make the page of these folders; returns its path.

    Args:
        folders: of runs and warm starts, complete or not.
        out: the file to write; it is whole at every moment, the old one or the new.
        price, currency: of a GPU-hour, a number or [low, high]; None for those of each run's configuration.
        refresh: the seconds after which a browser loads the page again; 0 for never.
        measured: evaluations that are compared, in this order, instead of the tests of the only run.

    Raises:
        UserError: a folder does not exist or holds nothing of a run, or the evaluations cannot be compared.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"there is no run folder {folder}")
        run = RunFolder(folder)
        if not any(each.exists() for each in (run.mark, run.config, run.log, run.metrics, run.samples, run.summary)):
            raise UserError(f"{folder} holds no run; python -m verl_recipes.runs folder={folder} lists those below it")
    once = list({folder.resolve(): folder for folder in folders}.values())  # a run named twice is one run
    page = render([Run(folder, PAGE_BYTES // len(once), measured) for folder in once], price, currency, refresh)
    write_whole(out, page.encode("utf-8", "xmlcharrefreplace").decode())  # a response may hold half a character
    return out
