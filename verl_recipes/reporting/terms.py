"""The glossary, terms.yaml: what the question marks of a report say, and the pages docs/glossary.md and docs/zh/.

python -m verl_recipes.reporting.terms     write both pages anew; a test compares them with the file
"""

from functools import cache
from pathlib import Path

import yaml

from data_prep.cli import CONFIGS

HERE = Path(__file__).parent
SOURCE, COMMAND = "`verl_recipes/reporting/terms.yaml`", "`python -m verl_recipes.reporting.terms`"
INTRODUCTIONS = {
    "en": "# Glossary\n\n[中文](zh/glossary.md)\n\n"
    "The words of this project's pages and of its [reports](report.md), where the question mark beside a word "
    f"explains it. Written by {COMMAND} from {SOURCE}; a test compares.",
    "zh": "# 术语\n\n[English](../glossary.md)\n\n"
    "本项目各页和[报告](report.md)用到的词；报告里词旁的问号给出同样的解释。"
    f"由 {COMMAND} 根据 {SOURCE} 写出，有测试比对。",
}
PAGES = {"en": CONFIGS.parent / "docs" / "glossary.md", "zh": CONFIGS.parent / "docs" / "zh" / "glossary.md"}


@cache
def terms(language: str = "en") -> dict[str, tuple[str, str]]:
    """Name and meaning of each term, by its key."""
    entries = yaml.safe_load((HERE / "terms.yaml").read_text(encoding="utf-8"))
    return {key: (each[language][0], each[language][1]) for key, each in entries.items()}


def page(language: str) -> str:
    """The glossary as Markdown."""
    header = {"en": "| term | meaning |", "zh": "| 术语 | 含义 |"}[language]
    rows = "".join(f"| {name} | {meaning} |\n" for name, meaning in terms(language).values())
    return f"{INTRODUCTIONS[language]}\n\n{header}\n| --- | --- |\n{rows}"


if __name__ == "__main__":
    for language, path in PAGES.items():
        path.write_text(page(language), encoding="utf-8")
