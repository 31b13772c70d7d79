"""Problems, and the parquet that verl reads (data_prep/)."""

import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.generate import generate, is_held_out, reachable_targets
from data_prep.solver import solve

SHAPE = {"count": 3, "max_number": 25, "max_target": 100, "held_out_share": 0.15}


def prepare(*overrides):
    return subprocess.run([sys.executable, "-m", "data_prep", *overrides], capture_output=True, text=True)


def rows(path):
    return pq.read_table(path).to_pylist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "small"
    result = prepare(f"out={out}", "train_size=400", "test_size=50")
    assert result.returncode == 0, result.stderr
    return out


def test_no_multiset_of_numbers_is_in_both_splits(folder):
    def multisets(split):
        truths = [row["reward_model"]["ground_truth"] for row in rows(folder / f"{split}.parquet")]
        return {tuple(sorted(truth["numbers"])) for truth in truths}

    assert multisets("train").isdisjoint(multisets("test"))


def test_another_size_or_seed_moves_no_multiset_to_the_other_split():
    for seed, size in ((0, 50), (1, 200)):
        for test in (False, True):
            for problem in generate(size, test=test, seed=seed, **SHAPE):
                assert is_held_out(problem["numbers"], SHAPE["held_out_share"]) == test


def test_every_problem_has_an_exact_solution_and_occurs_once(folder):
    seen = set()
    for split in ("train", "test"):
        for row in rows(folder / f"{split}.parquet"):
            truth = row["reward_model"]["ground_truth"]
            assert solve(truth["numbers"], truth["target"]) is not None
            key = (*sorted(truth["numbers"]), truth["target"])
            assert key not in seen
            seen.add(key)


def test_rows_have_verls_schema_and_the_prompt_names_the_problem(folder):
    row = rows(folder / "train.parquet")[0]
    assert set(row) == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
    truth = row["reward_model"]["ground_truth"]
    content = row["prompt"][0]["content"]
    assert f"Using the numbers {truth['numbers']}, create an equation that equals {truth['target']}." in content
    assert content.endswith("Let me solve this step by step.\n<think>")


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(folder, tmp_path):
    files = json.loads((folder / "manifest.json").read_text())["files"]
    for seed, same in ((0, True), (1, False)):
        out = tmp_path / str(seed)
        prepare(f"out={out}", "train_size=400", "test_size=50", f"seed={seed}")
        assert (json.loads((out / "manifest.json").read_text())["files"] == files) == same


@pytest.mark.parametrize(
    ("override", "message"),
    [("no_such_key=1", "no_such_key"), ("max_number=2", "distinct"), ("prompt=none_such", "prompt/none_such")],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, override, message):
    result = prepare(f"out={tmp_path / 'out'}", override)
    assert result.returncode != 0
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    result = prepare(f"out={tmp_path}")
    assert result.returncode != 0
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_solver_finds_fractions_and_knows_what_cannot_be():
    assert solve([3, 3, 8, 8], 24) is not None  # 8 / (3 - 8 / 3)
    assert solve([1, 1, 1], 100) is None


@given(st.lists(st.integers(1, 25), min_size=3, max_size=3))
def test_targets_called_reachable_are_and_lie_in_range(numbers):
    for target in reachable_targets(tuple(sorted(numbers)), 100)[:3]:
        assert 1 <= target <= 100
        assert solve(numbers, target) is not None
