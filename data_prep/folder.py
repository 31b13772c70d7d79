"""A folder that is replaced as a whole: at any moment a reader sees either the old one or the new one.

Everything is written to a hidden folder beside it, which then takes its name in one step of the file system. Two
writers do not disturb each other, and the later one wins. The next writer removes what a killed one left behind.
"""

import ctypes
import errno
import fcntl
import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_prep.cli import UserError

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fs.h
LOCK = "countdown-zero.lock"  # marks a hidden folder as one of ours


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_disk(*paths: Path) -> None:
    """Wait until these files, and all files in these folders, are on the disk: the kernel may take half a minute."""
    for file in (each for path in paths for each in (path, *path.rglob("*")) if each.is_file()):
        with file.open("rb") as content:
            os.fsync(content.fileno())


def exchange(one: Path, other: Path) -> None:
    """Exchange the names of two existing paths in one step (renameat2, Linux)."""
    renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(other))


def renamed_beside(new: Path, out: Path) -> Path:
    """The folder under a name beside `out` that nothing has."""
    return new.rename(tempfile.mkdtemp(prefix=f"{out.name}-", dir=out.parent))


def publish(new: Path, out: Path) -> None:
    """Rename `new` to `out`. If there was an `out`, it becomes `new`.

    Raises:
        UserError: the file system cannot exchange two folders (NFS).
    """
    while True:
        try:
            if out.exists():
                exchange(new, out)
            else:
                new.rename(out)
            return
        except OSError as error:  # another writer made or removed `out` in between
            if error.errno in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                raise UserError(
                    f"{out} is on a file system that cannot replace a folder in one step, and stays as it is; what was "
                    f"made is in {renamed_beside(new, out)}: move it there yourself"
                ) from None
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST) or not new.exists():
                raise


def remove_leftovers(out: Path) -> None:
    """Remove what killed writers of `out` left behind: hidden folders beside it that no process has locked."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}-*"):
        try:
            with (folder / LOCK).open("r+", encoding="utf-8") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # in use, not ours, or on a file system without locks
            continue


def keep_beside(new: Path, out: Path) -> None:
    """Rename `new` to `out`, or to a name beside it if `out` has appeared; then raise UserError."""
    try:
        new.rename(out)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        kept = renamed_beside(new, out)
        raise UserError(f"{out} appeared meanwhile, and stays as it is; what was made is in {kept}") from None


@contextmanager
def replaced(out: Path, new_only: bool = False) -> Iterator[Path]:
    """A folder to write to. It becomes `out` at the end of the block; if the block raises, it is removed.

    If `out` is a symbolic link, the folder that it names is replaced, and not the link.

    Args:
        new_only: nothing is replaced: `out` must not exist.

    Raises:
        UserError: the disk is full, or not writable, or `out` exists.
    """
    if new_only and os.path.lexists(out):
        raise UserError(f"out={out} exists; name a new folder, or move that one away")
    out = out.resolve()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        # The lock is not in the folder that becomes `out`, but in the hidden one around it.
        around = tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent, ignore_cleanup_errors=True)
        with around as hidden, Path(hidden, "lock").open("w", encoding="utf-8") as lock:
            with suppress(OSError):  # without locks, as Lustre without `-o flock`, nobody removes leftovers
                fcntl.flock(lock, fcntl.LOCK_EX)
            Path(hidden, "lock").rename(Path(hidden, LOCK))  # another writer looks for this name: it is locked by now
            new = Path(hidden, "new")
            new.mkdir()
            yield new
            to_disk(new)  # else a power cut could take the old folder and leave empty files
            (keep_beside if new_only else publish)(new, out)
    except OSError as error:
        if error.filename and out.parent not in (place := Path(os.fsdecode(error.filename)).absolute(), *place.parents):
            raise  # the error is about another file, which the block reads
        raise UserError(
            f"{out} could not be written: {error.strerror or error}; what was there before is unchanged"
        ) from error
