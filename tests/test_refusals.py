"""What the command refuses, each in one line and before it writes anything."""

import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.cli import CONFIGS
from verl_recipes.run import preflight as checks
from verl_recipes.run.folder import RunFolder

ROOT = CONFIGS.parent
pytestmark = pytest.mark.slow


def command(*overrides):
    """verl_recipes.train with overrides that must be refused at once."""
    return subprocess.run(
        [sys.executable, "-m", "verl_recipes.train", *overrides], cwd=ROOT, capture_output=True, text=True
    )


@pytest.fixture
def table(tmp_path):
    """A function that writes columns to a parquet file and returns its path."""

    def write(columns):
        pq.write_table(pa.table(columns), tmp_path / "data.parquet")
        return tmp_path / "data.parquet"

    return write


def refused(tmp_path, message, *overrides):
    run_dir = tmp_path / "run"
    result = command(f"run_dir={run_dir}", *overrides)
    assert result.returncode != 0
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert not run_dir.exists()


def test_an_unknown_key_is_one_line(tmp_path):
    refused(tmp_path, "no_such_key", "no_such_key=1")


def test_a_missing_data_file_is_one_line(tmp_path):
    refused(tmp_path, "does not exist", "data.train_files=nowhere.parquet")


def test_a_file_that_is_no_parquet_is_one_line(tmp_path):
    (tmp_path / "x.parquet").write_text("not parquet")
    refused(tmp_path, "not a whole parquet file", f"data.train_files={tmp_path / 'x.parquet'}")


def test_missing_columns_are_named(tmp_path, table):
    refused(tmp_path, "no column data_source, reward_model", f"data.train_files={table({'prompt': ['x']})}")


def test_an_empty_data_set_is_one_line(tmp_path, table):
    columns = {name: pa.array([], pa.string()) for name in checks.COLUMNS}
    refused(tmp_path, "no rows", f"data.train_files={table(columns)}")


def test_less_than_a_batch_is_one_line(tmp_path, table):
    path = table({name: ["x"] for name in checks.COLUMNS})
    refused(tmp_path, "less than one batch", f"data.train_files={path}", f"data.val_files={path}")


def test_a_run_that_would_save_nothing_is_refused(tmp_path):
    refused(tmp_path, "would leave no checkpoint", "trainer.save_freq=-1")


def test_a_folder_without_a_model_is_one_line(tmp_path, small_data):
    (tmp_path / "model").mkdir()
    refused(tmp_path, "holds no model", f"actor_rollout_ref.model.path={tmp_path / 'model'}", *small_data)


@pytest.fixture
def read_only(tmp_path):
    """A folder that nobody can write to, for which root needs a mount."""
    folder = tmp_path / "read_only"
    folder.mkdir(mode=0o555)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True).returncode == 0
    if os.access(folder, os.W_OK):
        pytest.skip("root, and may not mount")
    yield folder
    if mounted:
        subprocess.run(["umount", folder], check=True)


def test_a_run_folder_that_cannot_be_written_is_one_line(read_only, small_data):
    refused(read_only, f"cannot write the folder {read_only / 'run'}", *small_data)


def test_a_taken_run_folder_is_one_line(tmp_path, small_data):
    with RunFolder(tmp_path / "run").locked():
        result = command(f"run_dir={tmp_path / 'run'}", *small_data)
    assert result.returncode != 0
    assert "another command is using" in result.stderr
