"""The page of one or several runs: one HTML file that holds everything it shows and loads nothing."""

import base64
import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.cli import UserError
from verl_recipes.reporting.charts import charts
from verl_recipes.reporting.run import BEHAVIOUR_ROWS, Run, lookup
from verl_recipes.run.folder import write_whole

if TYPE_CHECKING:
    from markupsafe import Markup

HERE = Path(__file__).parent
PAGE_BYTES = 4_000_000  # of samples on a page

# The cost of published runs, by their authors (docs/recipes.md names the sources).
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


def as_script_data(value: Any) -> "Markup":
    """JSON that is safe inside a script element: ASCII, without `<`, and with null for numbers that are not finite."""
    from markupsafe import Markup

    def clean(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: clean(each) for key, each in item.items()}
        if isinstance(item, list):
            return [clean(each) for each in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return Markup(json.dumps(clean(value), separators=(",", ":")).replace("<", "\\u003c"))


def render(runs: Sequence[Run], price: Any, currency: str | None) -> str:
    """The page."""
    import jinja2  # not at the top: train imports this module long before it writes a report
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    missing = [f"{run.name}: {each}" if len(runs) > 1 else each for run in runs for each in run.missing]
    drawn = charts(runs, missing)
    scripts = [get_plotlyjs().replace("\r", ""), (HERE / "report.js").read_text(encoding="utf-8")]
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return page.from_string((HERE / "report.html").read_text(encoding="utf-8")).render(
        runs=runs,
        costs=[run.cost(price, currency) for run in runs],
        published=PUBLISHED,
        settings={name: [lookup(run.config, path) for run in runs] for name, path in SETTINGS.items()},
        charts=drawn,
        missing=missing,
        policy=" ".join(f"'sha256-{each}'" for each in hashes),
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        data=as_script_data({"charts": drawn, "samples": [sample for run in runs for sample in run.samples]}),
        made=time.strftime("%Y-%m-%d %H:%M"),
        behaviour_rows=BEHAVIOUR_ROWS,
    )


def write_report(folders: Sequence[Path], out: Path, price: Any = None, currency: str | None = None) -> Path:
    """Make the page of these run folders; returns its path.

    Args:
        folders: of runs, complete or not.
        out: the file to write; it is whole at every moment, the old one or the new.
        price, currency: of a GPU-hour, a number or [low, high]; None for those of each run's configuration.

    Raises:
        UserError: a folder does not exist.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"there is no run folder {folder}")
    page = render([Run(folder, PAGE_BYTES // len(folders)) for folder in folders], price, currency)
    write_whole(out, page.encode("utf-8", "xmlcharrefreplace").decode())  # a response may hold half a character
    return out
