"""The folder of a run or an evaluation: the one place that knows its files, and how to read and write them.

run.json            marks the folder as this project's: kind, checkpoints, hashes of model and data, versions
config.yaml         the resolved configuration of the run (run/fingerprint.py compares it)
verl.yaml           what verl was last started with; `python -m verl.trainer.main_ppo` takes it as it is
log.txt             what verl, Ray and vLLM print
metrics.jsonl       verl's metrics, one line a step; those of the present start are in metrics.part.jsonl
samples/            {train,validation}/<step>.jsonl, those of finished training steps compressed (.jsonl.gz), and
                    events.jsonl: what the run is doing
checkpoints/        verl's, unless trainer.default_local_dir names another folder
starts.jsonl        when verl was started and when it ended (run/goodput.py)
model/ summary.json curves.png report.html    made after the last step
lock, stop          locked by the command that uses the folder; written to ask verl to end
"""

import errno
import fcntl
import gzip
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from data_prep.cli import UserError

MARK, MADE_BY = "run.json", "countdown-zero"


def parse_lines(content: bytes, where: object, *, skip_damaged: bool = False) -> list[dict[str, Any]]:
    """The objects of JSON lines. Half a line at the end, which a killed process leaves, is ignored.

    Args:
        content: UTF-8.
        where: names the file in an error.
        skip_damaged: ignore damaged lines instead of raising.

    Raises:
        UserError: a line is damaged.
    """
    rows = []
    lines = content.split(b"\n")  # str.splitlines would also split at a U+2028 inside a response
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            row = number == len(lines)  # half a line
        if isinstance(row, dict):
            rows.append(row)
        elif not (row is None or row is True or skip_damaged):
            raise UserError(f"{where}, line {number} is damaged: a JSON object is expected")
    return rows


def read_lines(path: Path, *, skip_damaged: bool = False) -> list[dict[str, Any]]:
    """`parse_lines` of a file, or of the compressed file that `pack` made of it; empty if there is neither."""
    packed = path if path.suffix == ".gz" else path.with_name(f"{path.name}.gz")
    if path != packed and path.exists():
        return parse_lines(path.read_bytes(), path, skip_damaged=skip_damaged)
    try:
        content = gzip.decompress(packed.read_bytes()) if packed.exists() else b""
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        if not skip_damaged:
            raise UserError(f"{packed} is damaged ({error})") from None
        content = b""
    return parse_lines(content, packed, skip_damaged=skip_damaged)


def pack(path: Path) -> None:
    """Replace a file by its compressed form, for `read_lines` and `zcat`. At every moment one of them is there."""
    write_whole(path.with_name(f"{path.name}.gz"), gzip.compress(path.read_bytes(), compresslevel=6, mtime=0))
    path.unlink()


def as_lines(rows: Iterable[dict[str, Any]], default: Any = None) -> str:
    """Rows as JSON lines; `default` as json.dumps has it."""
    return "".join(json.dumps(row, ensure_ascii=False, default=default) + "\n" for row in rows)


def append_line(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(as_lines([row]))


def cut_half_line(path: Path) -> int:
    """Cut off half a line that a killed process left at the end of a file; returns the number of whole lines."""
    if not path.exists():
        return 0
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
    return content.count(b"\n")


def partial_of(path: Path) -> Path:
    """Where `write_whole` writes before it renames; a kill may leave it there."""
    return path.with_name(f".{path.name}.partial")


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file. At every moment, even after a crash of the machine, either the old or the new one is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    try:
        with partial.open("wb") as file:
            file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def write_json(path: Path, value: Any) -> None:
    """`write_whole` of a value as JSON."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, advice: str) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it is damaged; the message ends with the advice.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); {advice}") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none, or if the file is damaged."""
    try:
        value = json.loads(path.read_text("utf-8", "replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def not_writable(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot write the folder {folder}: {error.strerror}; choose another with run_dir= or out=")


def lock(handle: IO[str]) -> None:
    """Lock a file for this process; BlockingIOError if another holds it.

    Some file systems have no locks, as Lustre without `-o flock`: there it only warns.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        folder = Path(handle.name).parent
        print(f"warning: {folder} is on a file system without locks: start no second command on it", file=sys.stderr)


def mark_of(path: Path) -> dict[str, Any]:
    """The mark of a folder: its kind (run, evaluation or warm_start) and facts; empty if it is not this project's."""
    mark = read_object(path / MARK)
    return mark if mark.get("made_by") == MADE_BY else {}


def why_not_emptied(path: Path, read: Iterable[str] = ()) -> str:
    """Why a folder must not be emptied, as the end of a sentence; "" if it may be (`RunFolder.empty`)."""
    import psutil  # takes a moment, which other commands need not wait for

    if not mark_of(path):
        return f"holds no {MARK} of this project, so it is no run folder"
    real, here, home = path.resolve(), Path.cwd().resolve(), Path.home().resolve()
    if real in (here, *here.parents):
        return "is the current folder or holds it"
    if real in (home, *home.parents):
        return "is your home or holds it"
    if inside := next((each for each in read if Path(each).resolve().is_relative_to(real)), ""):
        return f"holds {inside}, which this command reads"
    mounts = {each.mountpoint for each in psutil.disk_partitions(all=True)}  # with those of the same file system
    for folder, folders, files in os.walk(real):
        folders[:] = [name for name in folders if not (Path(folder) / name).is_symlink()]
        if Path(folder) != real and MARK in files and mark_of(Path(folder)):
            return f"holds another run, {folder}"
        if mounted := [name for name in folders if str(Path(folder) / name) in mounts]:
            return f"holds another file system, {Path(folder) / mounted[0]}"
    return ""


class RunFolder:
    """The paths in one folder, and the operations on the folder."""

    def __init__(self, path: Path | str, checkpoints: Path | str | None = None) -> None:
        """The folder need not exist. `checkpoints` comes from its mark unless it is given."""
        self.path = Path(path)
        self.mark, self.config, self.verl_config = self.path / MARK, self.path / "config.yaml", self.path / "verl.yaml"
        self.log, self.stop, self.starts = self.path / "log.txt", self.path / "stop", self.path / "starts.jsonl"
        self.metrics, self.metrics_part = self.path / "metrics.jsonl", self.path / "metrics.part.jsonl"
        self.samples, self.events = self.path / "samples", self.path / "samples" / "events.jsonl"
        self.model, self.summary = self.path / "model", self.path / "summary.json"
        self.curves, self.report = self.path / "curves.png", self.path / "report.html"
        if checkpoints is None:
            checkpoints = mark_of(self.path).get("checkpoints")
        self.checkpoints = Path(checkpoints or self.path / "checkpoints")
        self.checkpoints_elsewhere = self.checkpoints.absolute() != (self.path / "checkpoints").absolute()

    def samples_of(self, split: str, step: int) -> Path:
        """The file with the samples of a step, for `read_lines`; `split` is train, validation or greedy."""
        return self.samples / split / f"{step}.jsonl"

    def sample_files(self, split: str) -> dict[int, Path]:
        """`samples_of` each step that has samples, in the order of the steps."""
        names = {path.name.split(".")[0] for path in (self.samples / split).glob("*.jsonl*")}
        return {step: self.samples_of(split, step) for step in sorted(int(name) for name in names if name.isdecimal())}

    def is_new(self) -> bool:
        """Whether the folder is missing, or empty but for the lock and what a kill left of the mark."""
        ours = ("lock", partial_of(self.mark).name)
        return not self.path.exists() or all(entry.name in ours for entry in self.path.iterdir())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder, so that a second command fails at once. The lock ends with the process that holds it.

        Checkpoints that lie elsewhere have a lock of their own.

        Raises:
            UserError: another command holds the lock, the folder is not writable, or it is no run's.
        """
        try:
            if not self.is_new() and not mark_of(self.path):
                raise UserError(
                    f"{self.path} holds files that are not of a run (no {MARK} of this project); choose another with "
                    "run_dir= or out="
                )
        except OSError as error:
            raise not_writable(self.path, error) from None
        with ExitStack() as held:
            for folder in (self.path, self.checkpoints) if self.checkpoints_elsewhere else (self.path,):
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    handle = held.enter_context((folder / "lock").open("a", encoding="utf-8"))
                    lock(handle)
                except BlockingIOError:
                    raise UserError(
                        f"another command is using {folder}; wait for it, or choose another folder"
                    ) from None
                except OSError as error:
                    raise not_writable(folder, error) from None
            yield

    def is_locked(self) -> bool:
        """Whether a command is using the folder."""
        try:
            with (self.path / "lock").open(encoding="utf-8") as handle:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no lock, or one that may not be read
            return False
        return False

    def check_kind(self, kind: str) -> None:
        """Raise UserError if the folder is marked as something else: a run must not take an evaluation's samples."""
        if (found := mark_of(self.path).get("kind", kind)) != kind:
            wanted, other = (each.replace("_", " ") for each in (kind, found))
            raise UserError(
                f"{self.path} holds no {wanted}, its {MARK} says: {other}; choose another folder with run_dir= or out="
            )

    def write_mark(self, kind: str, **facts: Any) -> None:
        """Mark the folder as this project's, and record facts about it."""
        place = str(self.checkpoints.absolute()) if self.checkpoints_elsewhere else None
        write_json(self.mark, {"made_by": MADE_BY, "kind": kind, "checkpoints": place} | facts)

    def empty(self, say: Callable[[str], None], read: Iterable[str] = ()) -> None:
        """Delete everything in the folder except the lock. Links are removed, never followed.

        Args:
            say: gets one line, before anything is deleted.
            read: the files and folders that the command reads.

        Raises:
            UserError: the folder is not marked, holds another run, another file system or what the command reads, is
                the current folder, the home or the root or a parent of one, or has its checkpoints elsewhere.
        """
        if self.is_new():
            return
        checkpoints = len(list(self.checkpoints.glob("global_step_*")))
        reason = why_not_emptied(self.path, read)
        for run in (self, RunFolder(self.path)):  # the command's folder of checkpoints, and the recorded one
            if run.checkpoints_elsewhere and any(run.checkpoints.glob("global_step_*")):
                reason = reason or f"has its checkpoints in {run.checkpoints}: remove them yourself first"
        if reason:
            raise UserError(f"{self.path} {reason}; nothing was deleted")
        names = ", ".join(sorted(entry.name for entry in self.path.iterdir() if entry.name != "lock"))
        say(f"fresh=true: deleting everything in {self.path}, {checkpoints} checkpoints included: {names}")
        # If this is interrupted, the same command must be able to delete the rest, and no other one may continue it or
        # take it for complete: the summary goes first.
        order = (self.summary, None, self.config, self.mark)
        for entry in sorted(self.path.iterdir(), key=lambda each: order.index(each if each in order else None)):
            if entry.name == "lock":
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)  # a watched page's partial file comes and goes


def last_samples(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of samples, or of the last evaluation in a folder of a run or an evaluation.

    Raises:
        UserError: there is none, or it is not finished.
    """
    if path.is_dir():
        folder = RunFolder(path)
        files = list(folder.sample_files("validation").values())
        if mark_of(path).get("kind") == "evaluation" and not folder.summary.exists():
            raise UserError(f"{path} holds no finished evaluation; the command that began it goes on with it")
        if not files:
            raise UserError(f"{path} holds no finished evaluation: samples/validation/*.jsonl is expected there")
        path = files[-1]
    elif not path.exists():
        raise UserError(f"{path} does not exist")
    return read_lines(path)


def add_step(metrics: dict[int, dict[str, Any]], step: int, data: dict[str, Any]) -> None:
    """Add a line to metrics by step, which stay in order: later steps go, as a resumed run makes them again."""
    same = metrics.get(step, {})  # a step may have several lines, as an evaluation may be repeated alone
    while metrics and next(reversed(metrics)) >= step:
        metrics.popitem()
    metrics[step] = same | data


def read_metrics(run: RunFolder, holding: bytes = b"") -> dict[int, dict[str, Any]]:
    """The metrics of a run by step, in order, with those of the present start. A step may have several lines.

    Args:
        holding: only lines with this in them are parsed, as those of days take seconds.
    """
    metrics: dict[int, dict[str, Any]] = {}
    for path in (run.metrics, run.metrics_part):
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        for line in parse_lines(b"\n".join(each for each in lines if holding in each), path, skip_damaged=True):
            step, data = line.get("step"), line.get("data")
            if isinstance(step, int) and isinstance(data, dict):
                add_step(metrics, step, data)
    return metrics
