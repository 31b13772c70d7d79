"""python docs/recipes_table.py: writes the tables of docs/recipes.md and docs/zh/recipes.md.

They show what the recipes' authors published (docs/recipes_published.yaml), with its line, beside what the composed
configurations hold, and the reason for each difference. A difference without a reason, or a reason without a
difference, is an error.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

import verl_recipes.settings.configuration  # noqa: F401  registers the resolvers
from data_prep.cli import CONFIGS, compose

DOCS = Path(__file__).resolve().parent
HEAD = {"en": ("setting", "published", "at", "here", "why"), "zh": ("设置", "公布的", "出处", "这里的", "原因")}
TRAINED_HEAD_ZH = "| 配方 | 损失 | 梯度 | KL 损失 | 奖励里的 KL | 价值损失 | 重新采样 | 一致程度 | 每步秒数 |"
FILES = {"en": DOCS / "recipes.md", "zh": DOCS / "zh" / "recipes.md"}


def text(value: Any, language: str) -> str:
    """A value as a cell shows it."""
    if isinstance(value, dict):
        return value[language]
    if isinstance(value, list):
        return ", ".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


class Line(NamedTuple):
    """A line of a published source."""

    repository: str
    commit: str
    file: str
    line: int


def lines_of(row: dict[str, Any], entry: dict[str, Any], sources: dict[str, dict[str, str]]) -> list[Line]:
    """Where a row's value was published: `at` is "file:line" in the recipe's source, or "source:file:line"."""
    result = []
    for place in [row["at"]] if isinstance(row["at"], str) else row["at"]:
        *source, file, line = place.split(":")
        result.append(Line(**sources[source[0] if source else entry["source"]], file=file, line=int(line)))
    return result


def link(at: Line) -> str:
    """A line as a link to it."""
    commit = at.commit[:7] if len(at.commit) == 40 else at.commit
    plain = "?plain=1" if at.file.endswith((".md", ".ipynb")) else ""
    address = f"https://github.com/{at.repository}/blob/{commit}/{at.file}{plain}#L{at.line}"
    return f"[{Path(at.file).name}:{at.line}]({address})"


def read_published() -> dict[str, Any]:
    """`sources` and `recipes` of docs/recipes_published.yaml."""
    return OmegaConf.to_container(OmegaConf.load(DOCS / "recipes_published.yaml"))  # type: ignore[return-value]


def tables() -> dict[str, dict[str, str]]:
    """For each recipe, its table in each language."""
    published = read_published()
    result = {}
    for recipe, entry in published["recipes"].items():
        config = compose("train", [f"recipe={recipe}", *entry["with"]])
        rows: dict[str, list[tuple[str, ...]]] = {language: [HEAD[language], ("---",) * 5] for language in HEAD}
        for row in entry["rows"]:
            name, why = f"`{row['key']}`" if "key" in row else row["name"], row.get("why")
            here = OmegaConf.select(config, row["key"]) if "key" in row else row["here"]
            here = list(here) if OmegaConf.is_list(here) else here
            if (here == row["published"]) != (why is None):
                raise ValueError(f"{recipe}, {name}: published {row['published']}, here {here}, reason {why}")
            at = ", ".join(map(link, lines_of(row, entry, published["sources"])))
            for language, lines in rows.items():
                lines.append(tuple(text(cell, language) for cell in (name, row["published"], at, here, why or "")))
        result[recipe] = {
            language: "".join(f"| {' | '.join(cells)} |\n" for cells in lines) for language, lines in rows.items()
        }
    measured = (CONFIGS.parent / "benchmarks" / "recipes_train.md").read_text(encoding="utf-8")
    _, rest = measured.split("\n", 1)
    return result | {"recipes_train": {"en": measured, "zh": f"{TRAINED_HEAD_ZH}\n{rest}"}}


def with_tables(page: str, language: str, made: dict[str, dict[str, str]]) -> str:
    """A page whose tables, each between its two markers, are these."""
    for recipe, table in made.items():
        marks = f"<!-- {recipe} -->\n", f"<!-- /{recipe} -->"
        page = re.sub(
            f"{marks[0]}.*?{marks[1]}", lambda _, t=table, m=marks: f"{m[0]}{t[language]}{m[1]}", page, flags=re.S
        )
    return page


if __name__ == "__main__":
    made = tables()
    for language, file in FILES.items():
        page = file.read_text(encoding="utf-8")
        file.write_text(with_tables(page, language, made), encoding="utf-8")
