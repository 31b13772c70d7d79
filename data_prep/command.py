"""The command `python -m data_prep` (data_prep/__main__.py): configuration in, data folder out."""

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow.parquet as pq
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_prep import datasheet
from data_prep.cli import Checked, UserError, command
from data_prep.engines import Engine, Local, OnRay
from data_prep.folder import file_sha256, replaced
from data_prep.generate import check as check_preset
from data_prep.prepare import prepare
from data_prep.prompts import check_prompt
from data_prep.sources import ROWS, open_source

PACKAGES = ("countdown-zero", "numpy", "pyarrow", "datasets")


@contextmanager
def shown() -> Iterator[Callable[[str, int, int], None]]:
    """A bar with the time left on a terminal, else silence."""
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


def check_config(config: dict[str, Any]) -> None:
    """Raise UserError for what no step would notice in time."""
    check_prompt(config["prompt"])
    for name in config["ood"]["names"]:
        if name not in config["ood"]["sets"]:
            raise UserError(f"ood.names: {name} is none of {', '.join(config['ood']['sets'])}")
        check_preset(config["preset"] | config["ood"]["sets"][name] | {"name": f"ood.sets.{name}"})
    if config["unsolvable"] not in ("keep", "drop", "apart"):
        raise UserError(f"unsolvable={config['unsolvable']}: keep, drop or apart are possible")
    if config["unsolvable"] != "keep" and not config["annotate"]:
        raise UserError(f"unsolvable={config['unsolvable']} needs the solver: annotate=true")
    if config["engine"] not in ("local", "ray"):
        raise UserError(f"engine={config['engine']}: local or ray are possible")


def write_folder(config: dict[str, Any], out: Path, engine: str, workers: int) -> dict[str, Any] | None:
    """Make the data folder; what `prepare` returned, or None where it was there already."""
    source = open_source(config)
    manifest = out / "manifest.json"
    about = {"source": source.about, "configuration": config}
    if manifest.exists():
        written = json.loads(manifest.read_text())
        if {key: written.get(key) for key in about} == about:
            return None
    elif out.exists():
        raise UserError(f"{out} exists and was not written by data_prep; name another folder with out=")
    with replaced(out) as folder, shown() as progress:
        if source.rows <= ROWS and not config["ood"]["names"]:
            workers = 1  # one batch is sooner done than other processes have started
        (scratch := folder.parent / "scratch").mkdir()
        runner: Engine = OnRay() if engine == "ray" else Local(workers, scratch)
        Thread(target=import_module, args=("matplotlib.figure",)).start()  # half a second while others work
        try:
            result = prepare(config, source, runner, folder, progress)
        finally:
            runner.close()
        datasheet.write(folder, result, config, source.about)
        files = {
            path.name: {"sha256": file_sha256(path)}
            | ({"rows": pq.read_metadata(path).num_rows} if path.suffix == ".parquet" else {})
            for path in sorted(folder.iterdir())
        }
        versions = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
        text = json.dumps(about | {"files": files, "versions": versions}, indent=2, ensure_ascii=False)
        (folder / "manifest.json").write_text(text + "\n")
    return result


@command("prepare", Checked)
def main(cfg: DictConfig) -> None:
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    check_config(config)
    out, engine = Path(config.pop("out")), config.pop("engine")
    workers = config.pop("workers") or len(os.sched_getaffinity(0))
    result = write_folder(config, out, engine, workers)
    if result is None:
        print(f"{out}: already there, with this source and configuration")
        return
    rows = result["rows"]
    others = {"rejected", "duplicates", "unsolvable", "not selected"}
    rest = ", ".join(f"{n:,} {what}" for what, n in rows.items() if n and what in others)
    print(
        f"{out}: {rows['train']:,} training and {rows['test']:,} test problems"
        + (f"; of the source, {rest}" if rest else "")
    )
