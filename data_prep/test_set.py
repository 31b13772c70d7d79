"""The frozen test set: its problems, and its hash.

assets/bench/v1.json holds 1,024 problems (assets/bench/README.md), whose numbers no training split may hold
(data_prep/split.py). The file never changes: other problems are another version, beside this one.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from data_prep import SHIPPED
from data_prep.cli import UserError
from data_prep.folder import file_sha256

FOLDER = SHIPPED / "assets" / "bench"
VERSION = "v1"
SUMS = "SHA256SUMS"


def read_problems(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """The problems in the order of the file: `id`, `stratum`, `numbers`, `target`, and what the solver says of them.

    Raises:
        UserError: the file is not the one that SHA256SUMS records.
    """
    path, sums = folder / f"{VERSION}.json", folder / SUMS
    content = path.read_bytes()
    if f"{hashlib.sha256(content).hexdigest()}  {path.name}" not in sums.read_text(encoding="utf-8").splitlines():
        raise UserError(f"{path} is not the file that {SUMS} beside it records; restore both, as by git checkout")
    return json.loads(content)["problems"]


def identity() -> dict[str, str]:
    """What a manifest records of the test set: version and SHA-256."""
    return {"version": VERSION, "sha256": file_sha256(FOLDER / f"{VERSION}.json")}
