"""manifest.json: what a folder was made from and what it holds. It marks the folder as one that this package wrote."""

import json
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_prep.cli import UserError
from data_prep.folder import file_sha256

MANIFEST = "manifest.json"
PACKAGES = ("countdown-zero", "numpy", "pyarrow", "datasets")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, or None if it is not one that this package wrote."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest if PACKAGES[0] in manifest["versions"] and set(manifest["files"]) else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def written_manifest(out: Path, traces: bool = False) -> dict[str, Any] | None:
    """The manifest of a folder of traces or of problems that may be replaced, or None if the folder does not exist.

    Raises:
        UserError: the folder is not one that this package wrote, or holds other files.
    """
    if not out.exists():
        return None
    manifest = read_manifest(out)
    if manifest is None:
        raise UserError(f"{out} exists and was not written by data_prep; name another folder with out=")
    if ("traces" in manifest) != traces:
        held = "problems and no traces" if traces else "traces of data_prep.traces"
        raise UserError(f"{out} holds {held}; name another folder with out=")
    ours = {MANIFEST, *manifest["files"]}
    if others := sorted(path.name for path in out.iterdir() if path.name not in ours):
        raise UserError(
            f"{out} would be replaced, but {others[0]} in it was not written by data_prep; move it elsewhere"
        )
    return manifest


def changed_files(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """The names of the files that are missing, or not as the folder's manifest records them."""
    for name, file in manifest["files"].items():
        path = folder / name
        if not (path.is_file() and file_sha256(path) == file["sha256"]):
            yield name


def is_made(out: Path, written: dict[str, Any] | None, about: dict[str, Any]) -> bool:
    """Whether `written`, the manifest of `out`, has all of `about`, and every file is as it records."""
    if written is None or {key: written.get(key) for key in about} != about:
        return False
    return not any(changed_files(out, written))


def write_manifest(folder: Path, out: Path, about: dict[str, Any]) -> None:
    """Write `about`, the rows and the SHA-256 of every file in the folder, and the versions.

    The folder is about to become `out`, which may hold other files by now: see `written_manifest`.
    """
    written_manifest(out, traces="traces" in about)
    files = {
        path.name: {"sha256": file_sha256(path)}
        | ({"rows": pq.read_metadata(path).num_rows} if path.suffix == ".parquet" else {})
        for path in sorted(folder.iterdir())
    }
    versions = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    text = json.dumps(about | {"files": files, "versions": versions}, indent=2, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
