"""Where problems come from: a hub, local files, or the generator. Each is opened as batches of rows.

`hub` and `modelscope` fetch the snapshot of a data set with the hub's own client, so its mirrors (HF_ENDPOINT,
MODELSCOPE_ENDPOINT), offline mode, revisions, cache and log-in work as usual. The `datasets` library then reads the
snapshot as it would read the hub.
"""

import csv
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.clean import Batch
from data_prep.cli import UserError, as_list
from data_prep.folder import file_sha256
from data_prep.generate import generate
from data_prep.hub import MIRROR, hub_fault, in_one_clause, reports_cache

ROWS = 65_536  # in a batch
FORMATS = (".parquet", ".jsonl", ".json", ".csv")


class Source(NamedTuple):
    """An opened source: what the manifest records of it, its number of rows, and a function that reads them."""

    about: dict[str, Any]
    rows: int
    batches: Callable[[], Iterator[Batch]]


def path_text(path: Path | str) -> str:
    """A path as text that can be written; bytes that are not UTF-8 are shown as \\xe4."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def column_names(schema: pa.Schema) -> list[str]:
    """The columns of a table, and the fields of nested ones as "metadata.numbers"."""

    def names(field: pa.Field, prefix: str) -> Iterator[str]:
        yield prefix + field.name
        if pa.types.is_struct(field.type):
            for inner in field.type:
                yield from names(inner, f"{prefix}{field.name}.")

    return [name for field in schema for name in names(field, "")]


def pick(data: pa.RecordBatch, name: str) -> pa.Array:
    """The column with one of the names of `column_names`."""
    first, *others = [name] if name in data.schema.names else name.split(".")
    return pc.struct_field(data.column(first), others) if others else data.column(first)


def as_batch(data: pa.RecordBatch, columns: tuple[str, str], file: str, first: int, row: int) -> Batch:
    """The two columns of some rows of a table."""
    data = pa.RecordBatch.from_arrays([pick(data, name) for name in columns], names=list(columns))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, data.schema) as writer:
        writer.write_batch(data)
    return Batch("arrow", sink.getvalue().to_pybytes(), file, first, row, len(data))


def check_columns(names: list[str], columns: tuple[str, str], where: str) -> None:
    for column in columns:
        if column not in names:
            encoding = "" if "\ufffd" not in "".join(names) else " (it is not in UTF-8; save it as UTF-8)"
            raise UserError(
                f"{where} has no column {column!r} but {', '.join(names)}{encoding}; name them with "
                "source.columns.numbers= and source.columns.target="
            )
        if names.count(column) > 1:
            raise UserError(f"{where} has {names.count(column)} columns {column!r}; rename all but one")


def from_dataset(dataset: Any, about: dict[str, Any], columns: tuple[str, str], label: str) -> Source:
    """A `datasets.Dataset` as a source."""
    check_columns(column_names(dataset.features.arrow_schema), columns, label)
    outer = {name if name in dataset.column_names else name.split(".")[0]: None for name in columns}
    dataset = dataset.select_columns(list(outer)).with_format("arrow")

    def batches() -> Iterator[Batch]:
        for start in range(0, len(dataset), ROWS):
            table = dataset[start : start + ROWS].combine_chunks()
            yield as_batch(table.to_batches()[0], columns, label, start, start + 1)

    return Source(about, len(dataset), batches)


def one_split(data: Any, name: str, label: str) -> Any:
    """The split of a `datasets.DatasetDict`, or the data set itself."""
    if not isinstance(data, dict):
        return data
    if name not in data:
        raise UserError(f"{label} has no split {name!r} but {', '.join(data)}; name one with source.split=")
    return data[name]


def load(folder: Path, subset: str | None, label: str) -> Any:
    """The snapshot of a data set, read by `datasets`.

    Raises:
        UserError: it has several configurations and `subset` names none of them, or its files are not one table.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        names = datasets.get_dataset_config_names(str(folder))
        if subset not in names and (subset or (len(names) > 1 and "default" not in names)):
            what = f"no configuration {subset!r} but" if subset else "several configurations:"
            raise UserError(f"{label} has {what} {', '.join(names)}; name one with source.subset=")
        return datasets.load_dataset(str(folder), subset)
    except (OSError, ValueError, DatasetsError, pa.ArrowException) as error:
        raise UserError(
            f"{label}: `datasets` cannot read its files as one table ({in_one_clause(error.__cause__ or error)}); "
            f"use source=local and name those to read with source.paths=, in {path_text(folder)}"
        ) from None


def fetch(config: dict[str, Any], download: Callable[[], str], errors: tuple[type[Exception], ...], way: str) -> Source:
    """A data set of a hub: its snapshot, read by `datasets`."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    label = f"{config['name']}:{config['repo']}"
    try:
        folder = Path(download())
    except errors as error:
        raise UserError(
            f"{label}@{config['revision']} cannot be fetched ({in_one_clause(error)}); {way}, or fetch its files "
            "elsewhere and use source=local source.paths=FOLDER"
        ) from None
    about = {name: config[name] for name in ("name", "repo", "revision")} | {
        "snapshot": folder.name,  # on the Hugging Face Hub the commit
        "files": [
            {"path": path_text(path.relative_to(folder)), "sha256": file_sha256(path)}
            for path in sorted(folder.rglob("*"))
            if is_data(path)
        ],
    }
    data = load(folder, config["subset"], label)
    return from_dataset(one_split(data, config["split"], label), about, columns_of(config), label)


def hub(config: dict[str, Any]) -> Source:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()

    def download() -> str:
        repo, revision = config["repo"], config["revision"]
        fault = hub_fault(repo, "dataset", revision)
        with reports_cache(fault, f"hub:{repo}"):
            cached = fault is not None
            return str(snapshot_download(repo, repo_type="dataset", revision=revision, local_files_only=cached))

    return fetch(config, download, (OSError, ValueError, httpx.HTTPError), MIRROR)


def modelscope(config: dict[str, Any]) -> Source:
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


def files_in(folder: Path) -> list[Path]:
    """The files of a folder and its subfolders that have one of FORMATS, in the order of their names."""

    def stop(error: OSError) -> None:  # os.walk would leave out a folder that it may not read
        raise error

    tree = os.walk(folder, onerror=stop)
    return sorted(path for root, _, names in tree for path in map(Path(root).joinpath, names) if is_data(path))


def is_data(path: Path) -> bool:
    return path.suffix.lower() in FORMATS


def files_of(config: dict[str, Any]) -> list[Path]:
    """The files that `paths` names, those of a folder in the order of their names."""
    files: list[Path] = []
    for name in as_list(config["paths"]):
        path = Path(name)
        if not path.exists():
            raise UserError(f"source.paths: {path} does not exist")
        found = files_in(path) if path.is_dir() else [path]
        if not found or not all(map(is_data, found)):
            raise UserError(f"source.paths: {path} is or holds no {', '.join(FORMATS)} file")
        files += found
    return files


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a text file with their line ends. Bytes that are not UTF-8 stay, and the cleaning rejects them."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        yield from file


def csv_records(path: Path) -> Iterator[str]:
    """The records of a CSV file, the header first, as text: a quoted field may have several lines."""
    lines = text_lines(path)
    for line in lines:
        taken = [line]
        if line.count('"') % 2:  # a quoted field may go on in the next line; the parser decides that
            # `strict` ends a record at a misplaced quotation mark, so that few rows are lost with it. The cleaning
            # finds the same error, and rejects the record.
            with suppress(csv.Error):
                next(csv.reader(recorded(lines, taken), strict=True))
        yield "".join(taken).rstrip("\r\n")


def recorded(lines: Iterator[str], taken: list[str]) -> Iterator[str]:
    """Yield what is in `taken`, and then `lines`, which are added to `taken`."""
    yield from list(taken)
    for line in lines:
        taken.append(line)
        yield line


def read_text(path: Path) -> Iterator[str]:
    """The rows of a text file as text, without blank ones; those of CSV begin with the header."""
    records = csv_records(path) if path.suffix.lower() == ".csv" else (line.rstrip("\r\n") for line in text_lines(path))
    return (record for record in records if record and not record.isspace())


def text_batches(path: Path, first: int) -> Iterator[Batch]:
    """JSON lines, or CSV records with the header, in batches."""
    rows: Iterator[Any] = read_text(path)
    kind, row = "jsonl", 1
    if path.suffix.lower() == ".csv":
        kind, header = "csv", next(rows)
        rows = ((header, record) for record in rows)
    while block := list(islice(rows, ROWS)):
        yield Batch(kind, block, path_text(path), first + row - 1, row, len(block))
        row += len(block)


def parquet_batches(path: Path, columns: tuple[str, str], first: int) -> Iterator[Batch]:
    row = 1
    try:
        for data in pq.ParquetFile(path).iter_batches(ROWS, columns=list(columns)):
            yield as_batch(data, columns, path_text(path), first + row - 1, row)
            row += len(data)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # an error of the machine, such as a missing permission
        raise UserError(f"{path} is damaged near its row {row} ({in_one_clause(error)})") from None


def count_rows(path: Path, columns: tuple[str, str]) -> int:
    """The number of rows of a file, after a check of its columns."""
    if path.suffix.lower() == ".parquet":
        with path.open("rb") as file:  # opened by Python, whose errors name the file
            try:
                content = pq.ParquetFile(file)
            except (pa.ArrowInvalid, OSError) as error:
                raise UserError(f"{path} is not a whole parquet file ({in_one_clause(error)})") from None
            check_columns(column_names(content.schema_arrow), columns, str(path))
            return content.metadata.num_rows
    rows, is_csv = read_text(path), path.suffix.lower() == ".csv"
    if (first := next(rows, None)) is None:
        if is_csv:
            raise UserError(f"{path} has no rows")
        return 0
    if is_csv:
        try:
            check_columns(next(csv.reader([first]), []), columns, str(path))
        except csv.Error as error:
            raise UserError(f"{path}: its header cannot be read ({error})") from None
    elif first.lstrip().startswith("["):
        raise UserError(f"{path} is one JSON array; JSON lines are expected, one object a line")
    return sum(1 for _ in rows) + (not is_csv)


def saved(path: str, split: str, columns: tuple[str, str]) -> Source:
    """A folder that `datasets` saved."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        data = one_split(datasets.load_from_disk(path), split, path)
    except (pa.ArrowException, ValueError, KeyError, OSError, DatasetsError) as error:
        if isinstance(error, PermissionError):
            raise
        raise UserError(f"source.paths: `datasets` cannot read {path} ({in_one_clause(error)})") from None
    prints = [{"path": path_text(path), "fingerprint": data._fingerprint, "rows": len(data)}]
    return from_dataset(data, {"name": "local", "files": prints}, columns, path_text(path))


def local(config: dict[str, Any]) -> Source:
    """Files, or a folder that `datasets` saved."""
    columns, (path, *others) = columns_of(config), as_list(config["paths"])
    if not others and any((Path(path) / name).exists() for name in ("state.json", "dataset_dict.json")):
        return saved(path, config["split"], columns)
    files = files_of(config)
    sizes = [count_rows(path, columns) for path in files]
    starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    about = [
        {"path": path_text(path), "rows": rows, "sha256": file_sha256(path)}
        for path, rows in zip(files, sizes, strict=True)
    ]

    def batches() -> Iterator[Batch]:
        for path, start in zip(files, starts, strict=False):
            is_parquet = path.suffix.lower() == ".parquet"
            yield from parquet_batches(path, columns, start) if is_parquet else text_batches(path, start)

    return Source({"name": "local", "files": about}, starts[-1], batches)


def synthetic(preset: dict[str, Any], seed: int) -> Source:
    """Generated problems. A batch only says which problems; a worker makes them."""
    generate(preset, np.arange(4), seed)  # a UserError is raised here, not in a worker
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
