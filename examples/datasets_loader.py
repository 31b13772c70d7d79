"""The problems as a DatasetDict of Hugging Face's datasets, for any trainer that takes one.

    PYTHONPATH=. python examples/datasets_loader.py data/tiny

A row has `data_source`, `prompt` (messages), `numbers` and `target`; the sets are the folder's files: train, test and,
if the data was made with sets out of distribution, ood_*.
"""

import json
import sys
from pathlib import Path

from datasets import DatasetDict, load_dataset


def load_countdown(folder: str = "data/tiny") -> DatasetDict:
    """The sets that `python -m data_prep` wrote into a folder."""
    files = {path.stem: str(path) for path in sorted(Path(folder).glob("*.parquet"))}
    if not files:
        sys.exit(f"error: {folder} holds no parquet files; make some with `python -m data_prep out={folder}`")
    rows = load_dataset("parquet", data_files=files).map(lambda row: row["reward_model"]["ground_truth"])
    return rows.select_columns(["data_source", "prompt", "numbers", "target"])


def chat_template(folder: str = "data/tiny") -> str | None:
    """The template that goes with the prompts, None for the tokenizer's own; manifest.json records it."""
    manifest = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))
    return manifest["configuration"]["prompt"]["chat_template"]


if __name__ == "__main__":
    print(load_countdown(*sys.argv[1:]))
