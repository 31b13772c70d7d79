"""Whether weights are what they were: the SHA-256 of every file of a checkpoint, a model or an export, kept beside it.

    runs/x/checkpoints/global_step_20/SHA256SUMS   all files below it; written once verl has saved the checkpoint
    runs/x/model/SHA256SUMS, an export's           the files that decide what the model computes

The form is that of coreutils: `sha256sum -c SHA256SUMS` in that folder does the same without this project.
"""

import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path

from data_prep.cli import UserError
from data_prep.folder import file_sha256
from verl_recipes.run.folder import write_whole

SUMS = "SHA256SUMS"
DECIDING = ("*.safetensors", "*.bin", "*.json", "*.jinja", "model_world_size_*.pt")  # optimizer states decide nothing


def sha256_of(files: Iterable[Path]) -> dict[Path, str]:
    """The SHA-256 of each file. Several are read at once, as one core hashes slower than many disks read."""
    files = list(files)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return dict(zip(files, threads.map(file_sha256, files), strict=True))


def is_checkpoint(path: Path) -> bool:
    """Whether this is the `actor` of a checkpoint of verl's."""
    return (path / "fsdp_config.json").exists()


def deciding_files(folder: Path, among: Iterable[Path] | None = None) -> list[Path]:
    """The files of a model, or of the `actor` of a checkpoint, that decide what it computes.

    `among`: files, which need not exist, instead of those that are there.
    """
    folders = (folder, folder / "huggingface") if is_checkpoint(folder) else (folder,)
    files = (file for each in folders for file in each.glob("*")) if among is None else among
    decide = (file for file in files if any(fnmatchcase(file.name, pattern) for pattern in DECIDING))
    return sorted(file for file in decide if file.parent in folders)


def write_sums(folder: Path, files: Iterable[Path]) -> None:
    """Write SHA256SUMS of these files, which are in the folder or below it."""
    hashes = sha256_of(sorted(files))
    write_whole(folder / SUMS, "".join(f"{hashes[file]}  {file.relative_to(folder)}\n" for file in hashes))


def read_sums(folder: Path) -> dict[Path, str]:
    """The hashes that SHA256SUMS records, by file; empty if there is no such list."""
    if not (folder / SUMS).is_file():
        return {}
    found = {}
    for number, line in enumerate((folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not (parts := re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)):
            raise UserError(f"{folder / SUMS}, line {number} is damaged; delete that file to do without its hashes")
        found[folder / parts[2]] = parts[1]
    return found


def difference(recorded: Mapping[Path, str], now: Mapping[Path, str]) -> str:
    """Which recorded file is missing or has another hash, as a clause; "" for none."""
    for file, digest in recorded.items():
        if file not in now:
            return f"{file} is missing"
        if now[file] != digest:
            return f"{file} is damaged (its hash is not the one that {SUMS} records)"
    return ""


def changed(folder: Path) -> str:
    """Which file of a folder is not what its SHA256SUMS records, as a clause; "" for none, or if there is no list."""
    recorded = read_sums(folder)
    return difference(recorded, sha256_of(file for file in recorded if file.is_file()))


def compared(folder: Path) -> tuple[dict[str, str], str]:
    """The hash of each of `deciding_files`, by its name in the folder, and `difference` of them."""
    now = sha256_of(deciding_files(folder))
    recorded = read_sums(folder.parent if is_checkpoint(folder) else folder)
    wrong = difference({file: recorded[file] for file in deciding_files(folder, recorded)}, now)
    return {str(file.relative_to(folder)): digest for file, digest in now.items()}, wrong


def seal(checkpoint: Path) -> None:
    """Write the hashes of all files of a checkpoint of verl's that is whole."""
    write_sums(checkpoint, (file for file in checkpoint.rglob("*") if file.is_file() and file.name != SUMS))
