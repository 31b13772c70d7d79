"""The command `python -m data_prep` (data_prep/__main__.py): makes a data folder from a configuration."""

import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_prep import datasheet
from data_prep.cli import UserError, as_list, command
from data_prep.engines import Engine, Local, OnRay
from data_prep.folder import replaced
from data_prep.manifest import is_made, write_manifest, written_manifest
from data_prep.prepare import most, prepare
from data_prep.schema import PrepareKeys
from data_prep.sources import ROWS, open_source
from data_prep.split import SIDES
from data_prep.test_set import identity


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar with the time left on a terminal; nothing elsewhere."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bars:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what)
            bars.update(tasks[what], completed=done, total=total)

        yield progress


def write_folder(config: dict[str, Any], out: Path, engine: str, workers: int) -> dict[str, Any] | None:
    """Write the data folder. Returns what `prepare` returned, or None if the folder was already there."""
    written = written_manifest(out)
    for path in as_list(config["source"].get("paths")):
        if Path(path).resolve().is_relative_to(out.resolve()):
            raise UserError(
                f"source.paths: {path} is in out={out}, which would be replaced; name another folder with out="
            )
        if out.resolve().is_relative_to(Path(path).resolve()):  # the next command would read what this one writes
            raise UserError(f"out={out} is in source.paths: {path}, which is read; name another folder with out=")
    source = open_source(config)
    about = {"source": source.about, "configuration": config, "bench": identity()}
    if is_made(out, written, about):
        return None
    with replaced(out) as folder, progress_bars() as progress:
        if source.rows <= ROWS and not config["ood"]["names"]:
            workers = 1  # one batch is finished before other processes could start
        (scratch := folder.parent / "scratch").mkdir()
        runner: Engine = OnRay() if engine == "ray" else Local(workers, scratch)
        Thread(target=import_module, args=("matplotlib.figure",)).start()  # this half a second passes while others work
        with closing(runner):
            result = prepare(config, source, runner, folder, progress)
        datasheet.write(folder, result, config, source.about)
        write_manifest(folder, out, about)
    return result


@command("prepare", PrepareKeys)
def main(cfg: DictConfig) -> None:
    from joblib import cpu_count  # a container's limit counts; not imported for `--help`

    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    out, engine = Path(config.pop("out")), config.pop("engine")
    workers = config.pop("workers") or cpu_count()
    result = write_folder(config, out, engine, workers)
    if result is None:
        print(f"{out}: already there, with this source and configuration")
        return
    rows = result["rows"]
    rest = ", ".join(f"{n:,} {what}" for what, n in rows.items() if n and what not in ("in", *SIDES))
    print(
        f"{out}: {rows['train']:,} training and {rows['test']:,} test problems"
        + (f"; of the source, {rest}" if rest else "")
    )
    for side in SIDES:
        if isinstance(size := config[f"{side}_size"], str) and rows[side] < most(size):
            print(f"{side}_size={size}: only {rows[side]:,} problems are on the {side} side")
