"""Where problems come from: a hub, local files, or the generator. Each is opened as batches of rows.

`hub` and `modelscope` fetch the snapshot of a data set with the hub's own client, so its mirrors (HF_ENDPOINT,
MODELSCOPE_ENDPOINT), offline mode, revisions, cache and log-in are what people know; the `datasets` library then reads
the snapshot as it would read the hub.
"""

import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.clean import Batch
from data_prep.cli import UserError
from data_prep.folder import file_sha256
from data_prep.generate import check, generate

ROWS = 65_536  # in a batch
FORMATS = (".parquet", ".jsonl", ".json", ".csv")


class Source(NamedTuple):
    """An opened source: what the manifest says of it, how many rows it has, and its rows, again at each call."""

    about: dict[str, Any]
    rows: int
    batches: Callable[[], Iterator[Batch]]


def as_batch(data: pa.RecordBatch, file: str, first: int, row: int) -> Batch:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, data.schema) as writer:
        writer.write_batch(data)
    return Batch("arrow", sink.getvalue().to_pybytes(), file, first, row, len(data))


def check_columns(names: list[str], columns: tuple[str, str], where: str) -> None:
    for column in columns:
        if column not in names:
            raise UserError(
                f"{where} has no column {column!r} but {', '.join(names)}; name them with source.columns.numbers= and "
                "source.columns.target="
            )


def from_dataset(dataset: Any, about: dict[str, Any], columns: tuple[str, str], label: str) -> Source:
    """A `datasets.Dataset` as a source."""
    check_columns(dataset.column_names, columns, label)
    dataset = dataset.select_columns(list(columns)).with_format("arrow")

    def batches() -> Iterator[Batch]:
        for start in range(0, len(dataset), ROWS):
            table = dataset[start : start + ROWS].combine_chunks()
            yield as_batch(table.to_batches()[0], label, start, start + 1)

    return Source(about, len(dataset), batches)


def one_split(data: Any, name: str, label: str) -> Any:
    """The split of a `datasets.DatasetDict`, or the data set itself."""
    if not isinstance(data, dict):
        return data
    if name not in data:
        raise UserError(f"{label} has no split {name!r} but {', '.join(data)}; name one with source.split=")
    return data[name]


def fetch(config: dict[str, Any], download: Callable[[], str], errors: tuple[type[Exception], ...], way: str) -> Source:
    """A data set of a hub: its snapshot, read by `datasets`."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    label = f"{config['name']}:{config['repo']}"
    try:
        folder = Path(download())
        data = datasets.load_dataset(str(folder), config["subset"])
    except errors as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{label}@{config['revision']} cannot be had ({why}); {way}, or fetch its files elsewhere and use "
            "source=local source.paths=FOLDER"
        ) from None
    about = {name: config[name] for name in ("name", "repo", "revision")} | {
        "snapshot": folder.name,  # on the Hugging Face Hub the commit
        "files": [
            {"path": str(path.relative_to(folder)), "sha256": file_sha256(path)}
            for path in sorted(folder.rglob("*"))
            if path.suffix in FORMATS
        ],
    }
    return from_dataset(one_split(data, config["split"], label), about, columns_of(config), label)


def hub(config: dict[str, Any]) -> Source:
    """A data set of the Hugging Face Hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    return fetch(
        config,
        lambda: snapshot_download(config["repo"], repo_type="dataset", revision=config["revision"]),
        (OSError, ValueError),
        "set HF_ENDPOINT to a mirror, unset HF_HUB_OFFLINE",
    )


def modelscope(config: dict[str, Any]) -> Source:
    """A data set of ModelScope."""
    try:
        from modelscope.hub.snapshot_download import dataset_snapshot_download
        from modelscope_hub.errors import HubError
    except ImportError:
        raise UserError("source=modelscope needs ModelScope's client: pip install -e '.[modelscope]'") from None
    return fetch(
        config,
        lambda: dataset_snapshot_download(config["repo"], revision=config["revision"]),
        (OSError, ValueError, HubError),
        "set MODELSCOPE_ENDPOINT to a mirror",
    )


def columns_of(config: dict[str, Any]) -> tuple[str, str]:
    return config["columns"]["numbers"], config["columns"]["target"]


def files_of(config: dict[str, Any]) -> list[Path]:
    """The files that `paths` names, those of a folder in the order of their names."""
    paths = config["paths"]
    files: list[Path] = []
    for name in [paths] if isinstance(paths, str) else paths:
        path = Path(name)
        if not path.exists():
            raise UserError(f"source.paths: {path} does not exist")
        found = sorted(each for each in path.rglob("*") if each.suffix in FORMATS) if path.is_dir() else [path]
        if not found or any(each.suffix not in FORMATS for each in found):
            raise UserError(f"source.paths: {path} is or holds no {', '.join(FORMATS)} file")
        files += found
    return files


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a text file; a line that is no UTF-8 is left for the cleaning to reject."""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for line in file:
            yield line.rstrip("\r\n")


def read_text(path: Path, first: int) -> Iterator[Batch]:
    """JSON lines, or CSV whose lines go with the header, in batches."""
    kind = "csv" if path.suffix == ".csv" else "jsonl"
    lines = text_lines(path)
    header = next(lines) if kind == "csv" else ""
    block: list[Any] = []
    row = 1
    for line in lines:
        block.append((header, line) if kind == "csv" else line)
        if len(block) == ROWS:
            yield Batch(kind, block, str(path), first, row, len(block))
            first, row, block = first + ROWS, row + ROWS, []
    if block:
        yield Batch(kind, block, str(path), first, row, len(block))


def read_parquet(path: Path, columns: tuple[str, str], first: int) -> Iterator[Batch]:
    row = 1
    try:
        for data in pq.ParquetFile(path).iter_batches(ROWS, columns=list(columns)):
            yield as_batch(data, str(path), first + row - 1, row)
            row += len(data)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged near its row {row} ({str(error).splitlines()[0]})") from None


def count_rows(path: Path, columns: tuple[str, str]) -> int:
    """Rows of a file, after a look at its columns."""
    if path.suffix == ".parquet":
        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path} is not a whole parquet file ({str(error).splitlines()[0]})") from None
        check_columns(file.schema_arrow.names, columns, str(path))
        return file.metadata.num_rows
    lines = text_lines(path)
    first = next(lines, "")
    if path.suffix == ".csv":
        check_columns(next(csv.reader([first]), []), columns, str(path))
    elif first.lstrip().startswith("["):
        raise UserError(f"{path} is one JSON array; JSON lines are expected, one object a line")
    return sum(1 for _ in lines) + (path.suffix != ".csv" and path.stat().st_size > 0)


def local(config: dict[str, Any]) -> Source:
    """Files, or a folder that `datasets` saved."""
    columns, paths = columns_of(config), config["paths"]
    if isinstance(paths, str) and (Path(paths) / "state.json").exists() | (Path(paths) / "dataset_dict.json").exists():
        import datasets

        data = one_split(datasets.load_from_disk(paths), config["split"], paths)
        prints = [{"path": paths, "fingerprint": data._fingerprint, "rows": len(data)}]
        return from_dataset(data, {"name": "local", "files": prints}, columns, paths)
    files = files_of(config)
    sizes = [count_rows(path, columns) for path in files]
    starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    about = [
        {"path": str(path), "rows": rows, "sha256": file_sha256(path)} for path, rows in zip(files, sizes, strict=True)
    ]

    def batches() -> Iterator[Batch]:
        for path, start in zip(files, starts, strict=False):
            yield from read_parquet(path, columns, start) if path.suffix == ".parquet" else read_text(path, start)

    return Source({"name": "local", "files": about}, starts[-1], batches)


def synthetic(preset: dict[str, Any], seed: int) -> Source:
    """Problems that the generator makes; a batch says which, and whoever works on it makes them."""
    check(preset)
    generate(preset, np.arange(4), seed)  # raises UserError here, and not in some worker, where no target is reachable
    rows = preset["rows"]

    def batches() -> Iterator[Batch]:
        for start in range(0, rows, ROWS):
            stop = min(start + ROWS, rows)
            yield Batch("synthetic", (preset, seed, start, stop), "synthetic", start, start + 1, stop - start)

    return Source({"name": "synthetic", "preset": preset}, rows, batches)


def open_source(config: dict[str, Any]) -> Source:
    """The source that a configuration names (configs/source)."""
    source = config["source"]
    if source["name"] == "synthetic":
        opened = synthetic(config["preset"], config["seed"])
    else:
        opened = {"hub": hub, "modelscope": modelscope, "local": local}[source["name"]](source)
    if not opened.rows:
        raise UserError(f"source={source['name']} has no rows")
    return opened
