"""Problems, and the data folder that `python -m data_prep` writes (data_prep/)."""

import csv
import errno
import fcntl
import io
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from configurations import compose
from hub_server import COMMIT, hub
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from data_prep.clean import Batch, clean, fault
from data_prep.cli import UserError, check, in_one_line, quoted
from data_prep.command import write_folder
from data_prep.folder import replaced
from data_prep.generate import generate, reachable_within
from data_prep.schema import PrepareKeys
from data_prep.solver import solve
from data_prep.sources import as_batch, csv_records, load
from data_prep.split import TEST, TRAIN, assign, hash_numbers, is_held_out, make_split, padded

REPO = "Jiayi-Pan/Countdown-Tasks-3to4"
COLUMNS = ("nums", "target")


def prepare(out, *overrides, engine="local", workers=1):
    """What the command does, in this process; what the datasheet says."""
    cfg = compose("prepare", f"out={quoted(out)}", *map(str, overrides))
    check(cfg, PrepareKeys)
    config = OmegaConf.to_container(cfg, resolve=True)
    for key in ("out", "engine", "workers"):
        config.pop(key)
    return write_folder(config, out, engine, workers)


def command(*overrides, **options):
    arguments = [sys.executable, "-m", "data_prep", *map(str, overrides)]
    return subprocess.run(arguments, capture_output=True, text=True, **options)


def rows(path):
    return pq.read_table(path).to_pylist()


def truths(path):
    return [row["reward_model"]["ground_truth"] for row in rows(path)]


def multisets(path):
    return {tuple(sorted(truth["numbers"])) for truth in truths(path)}


def held_out(lists):
    return is_held_out(hash_numbers(*padded(lists)), 0.15)


def hashes(folder):
    return {name: file["sha256"] for name, file in json.loads((folder / "manifest.json").read_text())["files"].items()}


def write_source(path, numbers, targets):
    pq.write_table(pa.table({"target": targets, "nums": numbers}), path)
    return path


def random_source(path, size, seed=0, largest=99):
    rng = np.random.default_rng(seed)
    numbers = [rng.integers(1, largest + 1, rng.integers(3, 5)).tolist() for _ in range(size)]
    return write_source(path, numbers, rng.integers(1, 101, size).tolist())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "small"
    prepare(out, "train_size=400", "test_size=50")
    return out


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return random_source(tmp_path_factory.mktemp("source") / "source.parquet", 3000, largest=12)


# The files


def test_rows_have_verls_schema_and_the_prompt_names_the_problem(folder):
    for i, row in enumerate(rows(folder / "train.parquet")):
        truth = row["reward_model"]["ground_truth"]
        (message,) = row["prompt"]
        assert row["data_source"] == "countdown/3_numbers"
        assert row["ability"] == "math"
        assert row["reward_model"]["style"] == "rule"
        assert (row["extra_info"]["index"], row["extra_info"]["split"]) == (i, "train")
        assert message["role"] == "user"
        content = message["content"]
        assert f"Using the numbers {truth['numbers']}, create an equation that equals {truth['target']}." in content
        assert content.endswith("Let me solve this step by step.\n<think>")


def test_extra_info_says_how_many_solutions_and_how_hard(folder):
    for row in rows(folder / "test.parquet"):
        info, truth = row["extra_info"], row["reward_model"]["ground_truth"]
        assert info["solutions"] == solve(truth["numbers"], truth["target"]).solutions > 0
        assert info["difficulty"] == pytest.approx(np.log10(68 / info["solutions"]))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(folder, tmp_path):
    for seed, same in ((0, True), (1, False)):
        prepare(tmp_path / str(seed), "train_size=400", "test_size=50", f"seed={seed}")
        for name in ("train.parquet", "test.parquet"):
            assert (hashes(tmp_path / str(seed))[name] == hashes(folder)[name]) == same


def test_the_manifest_names_every_file_with_its_hash(folder):
    assert set(hashes(folder)) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"]["train.parquet"]["rows"] == 400
    assert {"source", "configuration", "bench", "files", "versions"} == set(manifest)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_writes_the_same_bytes(tmp_path, source, workers, monkeypatch):
    monkeypatch.setattr("data_prep.sources.ROWS", 500)
    monkeypatch.setattr("data_prep.command.ROWS", 500)
    monkeypatch.setattr("data_prep.prepare.RANGE", 300)
    options = ("source=local", f"source.paths={source}", "test_size=100")
    prepare(tmp_path / "parts", *options, workers=workers)
    monkeypatch.undo()
    prepare(tmp_path / "whole", *options)
    some, others = hashes(tmp_path / "parts"), hashes(tmp_path / "whole")
    assert some == others


# Splits


@pytest.mark.slow
def test_no_multiset_of_numbers_is_on_both_sides_whatever_the_seed(tmp_path, source):
    for seed in range(5):
        out = tmp_path / str(seed)
        prepare(out, "source=local", f"source.paths={source}", "test_size=null", f"seed={seed}", "annotate=false")
        train, test = multisets(out / "train.parquet"), multisets(out / "test.parquet")
        assert train
        assert test
        assert train.isdisjoint(test)


@pytest.mark.slow
def test_order_and_growth_of_the_source_move_no_row_across(tmp_path):
    table = pq.read_table(random_source(tmp_path / "all.parquet", 600))
    pq.write_table(table.take(np.random.default_rng(1).permutation(600)), tmp_path / "shuffled.parquet")
    pq.write_table(table.slice(0, 200), tmp_path / "few.parquet")
    sides = {}
    for name in ("all", "shuffled", "few"):
        prepare(tmp_path / name, "source=local", f"source.paths={tmp_path / name}.parquet", "test_size=null")
        sides[name] = [multisets(tmp_path / name / f"{side}.parquet") for side in ("train", "test")]
    assert sides["all"] == sides["shuffled"]
    for few, everything in zip(sides["few"], sides["all"], strict=True):
        assert few <= everything


def test_the_hash_is_the_one_that_the_tiny_base_was_trained_by():
    assert held_out([[1, 2, 3], [25, 11, 18], [7, 7, 7]]).tolist() == [False, False, False]
    digest = int(hash_numbers(np.array([[11, 18, 25]]), np.array([3]))[0])
    import hashlib

    assert digest == int.from_bytes(hashlib.sha256(b"11,18,25").digest()[:8], "big")


def test_duplicates_are_dropped_and_counted_in_whatever_order_the_numbers_come(tmp_path):
    others = [[i, 50, 60] for i in range(1, 31)]
    source = write_source(tmp_path / "s.parquet", [[1, 2, 3], [3, 2, 1], [1, 2, 3], *others], [6, 6, 7] + [9] * 30)
    result = prepare(tmp_path / "out", "source=local", f"source.paths={source}", "test_size=null")
    assert result["rows"]["duplicates"] == 1
    assert result["rows"]["train"] + result["rows"]["test"] == 32
    kept = truths(tmp_path / "out/train.parquet") + truths(tmp_path / "out/test.parquet")
    assert {"numbers": [1, 2, 3], "target": 6} in kept  # the first of them


@pytest.mark.parametrize("overrides", [(), ("train_size=300", "unsolvable=drop"), ("unsolvable=apart",)])
def test_every_row_of_the_source_is_accounted_for(tmp_path, source, overrides):
    out = tmp_path / "out"
    counts = prepare(out, "source=local", f"source.paths={source}", "test_size=20", *overrides)["rows"]
    assert counts.pop("in") == sum(counts.values())
    for side in ("train", "test"):
        assert len(rows(out / f"{side}.parquet")) == counts[side]


@pytest.mark.slow
def test_unsolvable_problems_are_kept_dropped_or_set_apart(tmp_path, source):
    for rule in ("keep", "drop", "apart"):
        out = tmp_path / rule
        prepare(out, "source=local", f"source.paths={source}", "test_size=20", "train_size=100", f"unsolvable={rule}")
        solvable = [row["extra_info"]["solutions"] > 0 for row in rows(out / "train.parquet")]
        assert len(solvable) == 100
        assert all(solvable) == (rule != "keep")
        assert (out / "unsolvable.parquet").exists() == (rule == "apart")
    apart = rows(tmp_path / "apart" / "unsolvable.parquet")
    assert apart
    assert all(row["extra_info"]["solutions"] == 0 for row in apart)


def test_tinyzeros_split_is_by_place_and_its_leaks_are_counted(tmp_path):
    numbers = [[i % 7 + 1, 2, 3] for i in range(30)]
    source = write_source(tmp_path / "s.parquet", numbers, [6] * 30)
    result = prepare(
        tmp_path / "out", "source=local", f"source.paths={source}", "split=tinyzero", "split.train=20", "split.test=5"
    )
    assert [truth["numbers"] for truth in truths(tmp_path / "out/train.parquet")] == numbers[:20]
    assert [truth["numbers"] for truth in truths(tmp_path / "out/test.parquet")] == numbers[20:25]
    assert result["leaks"]["test"] == {"rows": 5, "numbers_in_training": 5, "problems_in_training": 5}
    assert result["sets"]["train"]["duplicates_kept"] == 13


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), [("mini_r1", 42), ("datawhale_r1", 2025)])
def test_the_shuffled_recipes_take_what_datasets_takes(tmp_path, name, seed):
    from datasets import Dataset

    source = random_source(tmp_path / "s.parquet", 300)
    prepare(
        tmp_path / "out", "source=local", f"source.paths={source}", f"split={name}", "split.train=90", "split.test=10"
    )
    theirs = Dataset.from_parquet(str(source), cache_dir=str(tmp_path)).shuffle(seed=seed).select(range(100))
    ours = truths(tmp_path / "out/train.parquet") + truths(tmp_path / "out/test.parquet")
    key = lambda row: (row["target"], *(row.get("nums") or row["numbers"]))  # noqa: E731
    assert sorted(map(key, ours)) == sorted(map(key, theirs))


@settings(max_examples=20)
@given(st.integers(0, 2**40), st.integers(2, 10_000))
def test_keys_of_one_multiset_differ_by_target(seed, targets):
    split = make_split({"split": {"name": "by_numbers"}, "held_out_share": 0.15, "seed": seed}, 1)
    target = np.arange(1, targets)
    side, key = assign(split, np.full(len(target), 77, np.uint64), target, target)
    assert len(np.unique(key)) == len(target)
    assert len(np.unique(side)) == 1


# Cleaning

FAULTS = [
    (None, 5, "null"),
    ("x", 5, "no list"),
    ([], 5, "an empty list"),
    ([7], 5, "1 numbers, 2 to 6 are expected"),
    ([1] * 7, 5, "7 numbers, 2 to 6 are expected"),
    ([1, 2.5], 5, "a float that is no integer"),
    ([1, float("nan")], 5, "a float that is no integer"),
    ([1, float("inf")], 5, "a float that is no integer"),
    ([1, True], 5, "a bool"),
    ([1, "2"], 5, "not an integer"),
    ([1, None], 5, "null"),
    ([1, 0], 5, "not positive"),
    ([1, -2], 5, "not positive"),
    ([1, 10_001], 5, "larger than 10,000"),
    ([1, 10**30], 5, "larger than 10,000"),
    ([1, 2], None, "null"),
    ([1, 2], 2.5, "a float that is no integer"),
    ([1, 2], 10**7, "larger than 1,000,000"),
]


@pytest.mark.parametrize(("numbers", "target", "reason"), FAULTS)
def test_what_is_no_problem_is_rejected_with_the_reason(numbers, target, reason):
    assert fault(numbers, target)[1] == reason
    line = json.dumps({"nums": numbers, "target": target})
    some, rejected = clean(Batch("jsonl", ['{"nums": [1, 2], "target": 3}', line], "f", 10, 5, 2), COLUMNS)
    assert some.place.tolist() == [10]
    assert [(row["file"], row["row"], row["reason"]) for row in rejected] == [("f", 6, reason)]


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(1, 10_000), min_size=2, max_size=6)
            | st.none()
            | st.lists(st.none() | st.integers(-3, 20_000), max_size=8),
            st.integers(1, 1_000_000) | st.none() | st.integers(-3, 2_000_000),
        ),
        min_size=1,
        max_size=20,
    ),
    st.sampled_from([pa.int64(), pa.int32(), pa.float64()]),
)
def test_a_column_of_lists_is_cleaned_as_its_rows_one_by_one(problems, kind):
    lists = pa.array([numbers for numbers, _ in problems], pa.list_(kind))
    table = pa.record_batch({"nums": lists, "target": pa.array([target for _, target in problems], pa.int64())})
    some, rejected = clean(as_batch(table, COLUMNS, "f", 0, 1), COLUMNS)
    right = [i for i, (numbers, target) in enumerate(problems) if fault(numbers, target) is None]
    assert some.place.tolist() == right
    assert [row["row"] - 1 for row in rejected] == [i for i in range(len(problems)) if i not in right]
    for i, numbers, count, target in zip(
        right, some.numbers.tolist(), some.count.tolist(), some.target.tolist(), strict=True
    ):
        assert (numbers[:count], target) == (problems[i][0], problems[i][1])


@pytest.mark.slow
def test_all_local_formats_give_the_same_files(tmp_path):
    from datasets import Dataset

    table = pq.read_table(random_source(tmp_path / "s.parquet", 200))
    problems = table.to_pylist()
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    (tmp_path / "s.csv").write_text("target,nums\n" + "".join(f'{row["target"]},"{row["nums"]}"\n' for row in problems))
    Dataset.from_list(problems).save_to_disk(tmp_path / "saved")
    (tmp_path / "many").mkdir()
    pq.write_table(table.slice(0, 50), tmp_path / "many/a.parquet")
    pq.write_table(table.slice(50), tmp_path / "many/b.parquet")
    found = []
    for name in ("s.parquet", "s.jsonl", "s.csv", "saved", "[saved]", "many"):
        paths = f"[{tmp_path / 'saved'}]" if name == "[saved]" else tmp_path / name
        prepare(tmp_path / f"out-{name}", "source=local", f"source.paths={paths}", "test_size=null")
        found.append({k: v for k, v in hashes(tmp_path / f"out-{name}").items() if k.endswith(".parquet")})
    assert all(each == found[0] for each in found)


def test_few_rejected_rows_go_to_a_file_and_many_stop_the_run(tmp_path):
    lines = [json.dumps({"nums": [i + 1, 2, 3], "target": 6}) for i in range(99)]
    (tmp_path / "s.jsonl").write_text("\n".join([*lines, '{"nums": [1, 2.5], "target": 3}']))
    options = ("source=local", f"source.paths={tmp_path / 's.jsonl'}", "test_size=null")
    assert prepare(tmp_path / "out", *options)["rejected"] == {"nums: a float that is no integer": 1}
    (rejected,) = map(json.loads, (tmp_path / "out/rejected.jsonl").read_text().splitlines())
    assert (rejected["row"], rejected["column"], rejected["value"]) == (100, "nums", "[1, 2.5]")
    with pytest.raises(UserError, match=r"s\.jsonl row 100, column nums: a float that is no integer: \[1, 2\.5\]"):
        prepare(tmp_path / "none", *options, "max_rejected=0.009")
    assert not (tmp_path / "none").exists()


# Hubs


def served():
    data = io.BytesIO()
    numbers = [[i + 1, j + 1, 9] for i in range(6) for j in range(6)]
    pq.write_table(pa.table({"target": list(range(1, 37)), "nums": numbers}), data)
    return {"data/train-00000-of-00001.parquet": data.getvalue(), "README.md": b"# A data set\n"}


def hub_environment(tmp_path, address):
    return os.environ | {
        "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "MODELSCOPE_ENDPOINT": address, "MODELSCOPE_CACHE": str(tmp_path / "modelscope"),
    }  # fmt: skip


@pytest.mark.slow
def test_the_hub_is_read_through_its_mirror_setting(tmp_path):
    with hub(REPO, served()) as (address, asked):
        environment = hub_environment(tmp_path, address)
        result = command("source=hub", f"out={tmp_path / 'out'}", "test_size=null", env=environment)
        assert result.returncode == 0, result.stderr
        assert any(path.startswith(f"/datasets/{REPO}/resolve/{COMMIT}/data/") for path in asked)
    assert json.loads((tmp_path / "out/manifest.json").read_text())["source"]["snapshot"] == COMMIT


@pytest.mark.slow
@pytest.mark.parametrize("offline", ["1", "0"])
def test_a_folder_in_the_hubs_cache_layout_is_enough(tmp_path, offline):
    cache = tmp_path / "hf/hub" / f"datasets--{REPO.replace('/', '--')}"
    for name, data in served().items():
        (cache / "snapshots" / COMMIT / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / "snapshots" / COMMIT / name).write_bytes(data)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(COMMIT)
    environment = hub_environment(tmp_path, "http://127.0.0.1:9") | {"HF_HUB_OFFLINE": offline}
    result = command("source=hub", f"out={tmp_path / 'out'}", "test_size=null", env=environment)
    assert result.returncode == 0, result.stderr
    assert ("the hub does not answer" in result.stderr and "taken from its cache" in result.stderr) == (offline == "0")


@pytest.mark.end_to_end  # its client takes five seconds to import
def test_modelscope_is_read_through_its_own_client(tmp_path):
    pytest.importorskip("modelscope")
    with hub(REPO, served()) as (address, asked):
        environment = hub_environment(tmp_path, address)
        options = ("source=modelscope", f"source.repo={REPO}", f"out={tmp_path / 'out'}", "test_size=null")
        result = command(*options, env=environment)
        assert result.returncode == 0, result.stderr
        assert f"/api/v1/datasets/{REPO}/repo" in asked


@pytest.mark.slow
def test_a_data_set_that_offline_mode_does_not_have_is_one_line_that_names_the_ways_out(tmp_path):
    environment = hub_environment(tmp_path, "http://127.0.0.1:9") | {"HF_HUB_OFFLINE": "1"}
    result = command("source=hub", f"out={tmp_path / 'out'}", env=environment)
    assert result.returncode != 0
    assert len(result.stderr.strip().splitlines()) == 1
    for part in (REPO, "HF_ENDPOINT", "source=local"):
        assert part in result.stderr


# Generated problems

SMALL = {
    "name": "x",
    "numbers": [1, 9],
    "tiles": False,
    "targets": [1, 50],
    "integers": False,
    "max_intermediate": None,
}


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({}, lambda s: True),
        ({"integers": True}, lambda s: not s.fraction),
        ({"must_use": ["*", "/"]}, lambda s: not s.additive),
        ({"count": [2, 5]}, lambda s: True),
        pytest.param(
            {"tiles": True, "count": [6], "targets": [101, 999], "integers": True},
            lambda s: not s.fraction,
            marks=pytest.mark.end_to_end,  # six numbers take seconds
        ),
    ],
)
def test_generated_problems_have_the_solutions_that_were_asked_for(changes, holds):
    preset = SMALL | {"count": [3, 4], "must_use": []} | changes
    numbers, count, target = generate(preset, np.arange(12 if 6 in preset["count"] else 60), 5)
    assert set(count.tolist()) == set(preset["count"])
    for some, n, goal in zip(numbers.tolist(), count.tolist(), target.tolist(), strict=True):
        assert preset["targets"][0] <= goal <= preset["targets"][1]
        assert holds(solve(some[:n], goal))
        if preset["tiles"]:
            assert all(some.count(tile) <= (1 if tile > 10 else 2) for tile in some)
            assert all(tile in (25, 50, 75, 100) or 1 <= tile <= 10 for tile in some)


def test_a_generated_problem_depends_on_its_number_and_the_seed_alone(monkeypatch):
    preset = SMALL | {"count": [3, 4], "must_use": []}
    whole, part = generate(preset, np.arange(100), 5), generate(preset, np.arange(40, 60), 5)
    assert all((a[40:60] == b).all() for a, b in zip(whole, part, strict=True))
    monkeypatch.setattr("data_prep.generate.CELLS", 500)  # five at a time
    assert all((a == b).all() for a, b in zip(whole, generate(preset, np.arange(100), 5), strict=True))


def test_problems_can_be_generated_for_one_side_of_the_split():
    preset = SMALL | {"count": [3], "must_use": []}
    for side in (TRAIN, TEST):
        numbers, _, _ = generate(preset, np.arange(50), 5, side=side, held_out_share=0.15)
        assert (held_out(numbers[:, :3].tolist()) == (side == TEST)).all()
    numbers, _, _ = generate(preset, np.arange(50), 5, side=TEST, held_out_share=0.005)  # one draw in 200
    assert held_out(numbers[:, :3].tolist()).all()


@settings(max_examples=30)
@given(st.lists(st.integers(1, 25), min_size=2, max_size=4))
def test_integers_within_a_bound_are_reached_by_solutions_without_fractions(numbers):
    for target in sorted(reachable_within(tuple(sorted(numbers)), 100) - {0})[:5]:
        assert not solve(numbers, target).fraction


@pytest.mark.slow
def test_sets_out_of_distribution_are_of_the_test_side_and_have_sources_of_their_own(tmp_path):
    fewer = "ood.names=[5_numbers,large_numbers,needs_product]"  # six numbers take seconds; the test on Ray has them
    result = prepare(tmp_path / "out", "train_size=64", "test_size=16", "ood=standard", "ood.size=6", fewer)
    for name, solved in result["sets"].items():
        assert solved["solver"]["solvable_share"] == 1.0, name
    for path in (tmp_path / "out").glob("ood_*.parquet"):
        name = path.stem.removeprefix("ood_")
        assert {row["data_source"] for row in rows(path)} == {f"countdown/{name}"}
        assert held_out([truth["numbers"] for truth in truths(path)]).all()
    assert len(list((tmp_path / "out").glob("ood_*.parquet"))) == 3
    assert all(leak["numbers_in_training"] == 0 for leak in result["leaks"].values())
    assert all(
        not solve(t["numbers"], t["target"]).additive for t in truths(tmp_path / "out/ood_needs_product.parquet")
    )


# The user's mistakes, and what may happen to a writer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("no_such_key=1", "no_such_key"),
        ("prompt=none_such", "prompt/none_such"),
        ("preset.numbers=[1,2]", "test_size=256, but only"),
        ("preset.numbers=[200,201]", "no targets in"),
        ("preset.count=[9]", "preset.count.0=9: should be less than or equal to 6"),
        ("preset.numbers=[1,10001]", "preset.numbers.1=10001: should be less than or equal to 10000"),
        ("preset.targets=[1,1000001]", "preset.targets.1=1000001: should be less than or equal to 1000000"),
        ("preset.numbers=[9,3]", "preset.numbers=[9, 3]: should be [lowest,highest]"),
        ("preset.rows=0", "preset.rows=0: should be greater than or equal to 1"),
        ("held_out_share=2", "held_out_share=2: should be less than 1"),
        ("unsolvable=burn", "unsolvable=burn: should be 'keep', 'drop' or 'apart'"),
        ("split=tinyzero", "takes 328,704 rows, and the source has 8,192"),
        ("prompt.messages=[]", "prompt.messages=[]: "),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, override, message):
    if override.startswith(("no_such", "prompt=")):
        result = command(f"out={tmp_path / 'out'}", override)
        assert result.returncode != 0
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    else:
        with pytest.raises(UserError) as error:
            prepare(tmp_path / "out", override)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.parquet", b"PAR1 not really", "not a whole parquet file"),
        ("s.csv", b"a,b\n1,2\n", "has no column 'nums' but a, b"),
        ("s.json", b'[{"nums": [1, 2]}]', "one JSON array"),
        ("s.txt", b"", "is or holds no"),
        ("s.jsonl", b"", "has no rows"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        prepare(tmp_path / "out", "source=local", f"source.paths={tmp_path / name}")
    assert name in str(error.value) or "source=local" in str(error.value)


@pytest.mark.parametrize("name", ["s.csv", "s.jsonl"])
def test_a_row_that_no_parser_can_read_is_rejected(name):
    csv.field_size_limit(2**17)  # Python's own; some package raises it
    text = {
        "s.csv": [("nums,target", '"[1, 2]",3'), ("nums,target", f"{'9' * 200_000},6")],
        "s.jsonl": ["{}", "[" * 10**5],
    }
    rows = text[name]
    _, rejected = clean(Batch(name[2:], rows, name, 0, 1, len(rows)), COLUMNS)
    assert rejected[-1]["row"] == 2
    assert re.search("field larger|not JSON", rejected[-1]["reason"])


def test_a_source_that_is_damaged_inside_is_named_and_not_the_folder_to_write(tmp_path):
    path = random_source(tmp_path / "s.parquet", 5000)
    content, file = bytearray(path.read_bytes()), pq.ParquetFile(path)
    column = file.metadata.row_group(0).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + 200] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"s.parquet is damaged near its row 1"):
        prepare(tmp_path / "out", "source=local", f"source.paths={path}")


def test_an_error_of_a_worker_process_is_the_one_that_was_raised():
    assert str(pickle.loads(pickle.dumps(UserError("x")))) == str(UserError("x")) == "error: x"


def test_any_integer_is_a_seed():
    preset = SMALL | {"count": [3], "must_use": []}
    for seed in (-1, 2**64 + 1):
        assert (generate(preset, np.arange(4), seed)[0] == generate(preset, np.arange(4), seed % 2**64)[0]).all()


@pytest.mark.slow
def test_a_folder_that_holds_its_own_source_or_hides_behind_a_missing_one_is_not_replaced(tmp_path):
    out = tmp_path / "data"
    prepare(out, "train_size=64", "test_size=8")
    before = hashes(out)
    with pytest.raises(UserError, match="which is read"):
        prepare(out / "more", "source=local", f"source.paths={out}", "test_size=null")
    own = ("source=local", f"source.paths={out / 'train.parquet'}", "train_size=32", "test_size=4")
    with pytest.raises(UserError, match="which would be replaced"):
        prepare(out, *own)
    with pytest.raises(UserError, match="by way of one that does not exist"):
        prepare(out / "typo" / "..", "seed=5")
    assert hashes(out) == before


def test_a_folder_is_replaced_on_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    for text in ("old", "new"):
        with replaced(tmp_path / "model") as folder:
            (folder / "weights").write_text(text, encoding="utf-8")
    assert (tmp_path / "model" / "weights").read_text(encoding="utf-8") == "new"


def test_a_file_system_that_cannot_exchange_folders_costs_no_work(tmp_path, monkeypatch):
    def exchange(*_):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))  # as NFS does

    monkeypatch.setattr("data_prep.folder.exchange", exchange)
    (tmp_path / "data").mkdir()
    with (
        pytest.raises(UserError, match="stays as it is; what was made is in") as error,
        replaced(tmp_path / "data") as new,
    ):
        (new / "file").write_text("new", encoding="utf-8")
    [kept] = tmp_path.glob("data-*")
    assert (kept / "file").exists()
    assert str(kept) in str(error.value)
    assert not list(tmp_path.glob(".*"))


def test_a_folder_takes_the_place_of_another_only_once_it_is_on_the_disk(tmp_path, monkeypatch):
    def fails(_):
        raise OSError(5, "Input/output error")

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(UserError, match="could not be written"), replaced(tmp_path / "out") as new:
        (new / "a").write_text("new")
    assert (tmp_path / "out" / "a").read_text() == "old"


def test_a_folder_that_data_prep_did_not_write_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="was not written by data_prep"):
        prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_a_folder_of_which_a_file_is_missing_or_damaged_is_made_again(tmp_path):
    prepare(tmp_path / "out", "train_size=64", "test_size=8")
    before, inode = hashes(tmp_path / "out"), (tmp_path / "out").stat().st_ino
    prepare(tmp_path / "out", "train_size=64", "test_size=8")
    assert (tmp_path / "out").stat().st_ino == inode  # nothing to do
    for harm in (Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])):
        harm(tmp_path / "out" / "train.parquet")
        prepare(tmp_path / "out", "train_size=64", "test_size=8")
        assert hashes(tmp_path / "out") == before
        assert whole(tmp_path / "out")


def test_what_appears_while_a_folder_is_made_is_not_replaced(tmp_path):
    from data_prep.folder import replaced
    from data_prep.manifest import write_manifest

    out = tmp_path / "out"

    def make():
        with replaced(out, new_only=True) as folder:
            (folder / "model").write_text("half an hour of training")
            out.mkdir()
            (out / "thesis.txt").write_text("years of work")

    with pytest.raises(UserError, match="out appeared meanwhile, and stays as it is; what was made is in ") as error:
        make()
    kept = Path(error.value.message.rpartition(" is in ")[2])
    assert (kept / "model").read_text() == "half an hour of training"
    assert (out / "thesis.txt").read_text() == "years of work"
    with pytest.raises(UserError, match="exists; name a new folder"), replaced(out, new_only=True):
        pass
    with pytest.raises(UserError, match="was not written by data_prep"), replaced(out) as folder:
        write_manifest(folder, out, {})
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_a_hidden_file_beside_the_folder_is_nobodys_leftover(tmp_path):
    (tmp_path / ".out-notes").write_text("mine")
    prepare(tmp_path / "out", "train_size=64", "test_size=8")
    assert whole(tmp_path / "out")
    assert (tmp_path / ".out-notes").read_text() == "mine"


def whole(folder):
    """Whether a data folder is what its manifest says."""
    import hashlib

    return {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in hashes(folder)} == hashes(folder)


@pytest.mark.slow
def test_a_disk_that_is_full_leaves_the_old_folder(tmp_path):
    prepare(tmp_path / "out", "train_size=64", "test_size=8")
    before = hashes(tmp_path / "out")

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # any larger file: OSError, as on a full disk

    result = command(f"out={tmp_path / 'out'}", preexec_fn=limit)
    assert result.returncode != 0
    assert "could not be written" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert hashes(tmp_path / "out") == before
    assert whole(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_leaves_a_whole_folder_and_the_next_one_sweeps(tmp_path):
    out = tmp_path / "out"
    prepare(out, "train_size=64", "test_size=8")
    for i, delay in enumerate((0, 0.5)):
        overrides = [f"out={out}", "preset=3to4", "preset.rows=140000", "test_size=8", "workers=2", f"seed={i + 1}"]
        process = psutil.Popen([sys.executable, "-m", "data_prep", *overrides], stdout=subprocess.DEVNULL)
        while [path.name for path in tmp_path.iterdir()] == ["out"]:  # until it has begun to write
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(delay)
        workers = process.children()
        process.kill()
        process.wait()
        assert not psutil.wait_procs(workers, timeout=60)[1]
        assert whole(out)
    prepare(out, "train_size=64", "test_size=8", "seed=9")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert whole(out)


@pytest.mark.slow
def test_a_reader_never_misses_the_folder_while_two_writers_replace_it(tmp_path):
    from data_prep.folder import replaced

    out, broken, stop = tmp_path / "out", [], threading.Event()

    def write(name):
        for i in range(60):
            with replaced(out) as new:
                (new / "a").write_text(f"{name}{i}")
                (new / "b").write_text(f"{name}{i}")

    def read():
        while not stop.is_set():
            try:
                handle = os.open(out, os.O_RDONLY)
                os.close(handle)
            except FileNotFoundError:
                broken.append("missing")

    write("first")
    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write, args=(name,)) for name in "xy"]
    for thread in [reader, *writers]:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert not broken
    assert (out / "a").read_text() == (out / "b").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.long
@pytest.mark.end_to_end
def test_ray_writes_the_same_bytes_on_two_nodes(tmp_path, monkeypatch):
    import ray
    from ray.cluster_utils import Cluster

    problems = pq.read_table(random_source(tmp_path / "s.parquet", 4000, largest=25)).to_pylist()
    lines = [json.dumps(row) for row in [*problems, {"nums": [], "target": 1}, {"nums": [1], "target": 1}]]
    (tmp_path / "s.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr("data_prep.sources.ROWS", 700)
    monkeypatch.setattr("data_prep.prepare.RANGE", 2000)
    options = (
        "source=local",
        f"source.paths={tmp_path / 's.jsonl'}",
        "test_size=100",
        "ood=standard",
        "ood.size=4",
        "ood.names=[5_numbers]",
    )
    prepare(tmp_path / "local", *options, "unsolvable=apart")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        assert len(ray.nodes()) == 2
        prepare(tmp_path / "ray", *options, "unsolvable=apart", engine="ray")
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert hashes(tmp_path / "local") == hashes(tmp_path / "ray")


# Files and values as users have them


def source_of(tmp_path, name, content):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return [f"source.paths={quoted(tmp_path / name)}", "source=local", "test_size=null", "annotate=no"]


ROWS = [{"nums": [i + 1, 2, 3], "target": 6} for i in range(40)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("s.csv", "nums,target\n" + "".join(f'"[{i + 1},\r\n2,\n3]",6\r\n' for i in range(40))),
        ("bom.csv", "\ufeffnums,target\n" + "".join(f'"[{i + 1}, 2, 3]",6\n' for i in range(40)) + "\n\n"),
        ("S.CSV", "nums,target\n" + "".join(f'"[{i + 1}, 2, 3]",6\n' for i in range(40))),
        ("bom.jsonl", "\ufeff" + "".join(json.dumps(row) + "\n" for row in ROWS)),
        ("blank.jsonl", "\r\n".join(map(json.dumps, ROWS)) + "\n\n \n"),
        ("数据 [1] (2), a=b~:'\"{}.JSON", "".join(json.dumps(row) + "\n" for row in ROWS)),
    ],
)
def test_a_text_file_is_read_as_spreadsheets_and_editors_write_it(tmp_path, name, content):
    result = prepare(tmp_path / "数 据=[1]", *source_of(tmp_path, name, content))
    assert (result["rows"]["in"], result["rejected"]) == (40, {})
    kept = [truth["numbers"] for side in ("train", "test") for truth in truths(tmp_path / f"数 据=[1]/{side}.parquet")]
    assert sorted(kept) == [row["nums"] for row in ROWS]


def test_a_quotation_mark_out_of_place_takes_few_rows_with_it(tmp_path):
    lines = ["nums,target", *(f'"[{i + 1}, 2, 3]",6' for i in range(40))]
    lines[5] = '"[5, 2, 3,6'
    result = prepare(tmp_path / "out", *source_of(tmp_path, "s.csv", "\n".join(lines)), "max_rejected=0.5")
    assert result["rows"]["in"] >= 39
    assert sum(result["rejected"].values()) <= 2


@settings(max_examples=60)
@given(st.lists(st.tuples(st.text(st.sampled_from('ab,"\n\r ;'), min_size=1), st.integers(1, 9)), max_size=8))
def test_csv_records_are_those_that_pythons_writer_wrote(tmp_path_factory, table):
    path = tmp_path_factory.mktemp("csv") / "s.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("nums", "target"), *table])
    records = list(csv_records(path))
    assert [tuple(next(csv.reader([record]))) for record in records[1:]] == [(a, str(b)) for a, b in table]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "saved"])
def test_a_field_of_a_nested_column_is_a_column(tmp_path, kind):
    nested = [{"metadata": {"numbers": row["nums"]}, "answer": {"numbers": 6, "x": "y"}} for row in ROWS]
    path = tmp_path / f"s.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(nested), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in nested), encoding="utf-8")
    else:
        from datasets import Dataset

        Dataset.from_list(nested).save_to_disk(path)
    columns = ["source.columns.numbers=metadata.numbers", "source.columns.target=answer.numbers"]
    options = ["source=local", f"source.paths={path}", "test_size=null", "annotate=no"]
    result = prepare(tmp_path / "out", *options, *columns)
    assert (result["rows"]["in"], result["rejected"]) == (40, {})
    message = "no 'metadata.x'" if kind == "jsonl" else "metadata, metadata.numbers, answer, answer.numbers, answer.x"
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "none", *options, "source.columns.numbers=metadata.x", columns[1])


@pytest.mark.slow
def test_files_in_a_locale_without_utf8_are_the_same(tmp_path):
    (tmp_path / "in").mkdir()
    source_of(tmp_path / "in", "数据.JSONL", "".join(json.dumps(row) + "\n" for row in ROWS))
    options = [
        "source=local",
        f"source.paths={tmp_path / 'in'}",
        "test_size=null",
        "annotate=no",
        "prompt=datawhale_r1",
    ]
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for _ in range(2):
        result = command(f"out={tmp_path / 'out'}", *options, env=environment)
        assert result.returncode == 0, result.stderr
    assert "already there" in result.stdout
    assert prepare(tmp_path / "out", *options) is None
    manifest = json.loads((tmp_path / "out/manifest.json").read_text(encoding="utf-8"))
    assert manifest["source"]["files"][0]["path"].endswith("数据.JSONL")
    assert command("out=数", env=environment).stderr.count("\n") == 1


def test_a_data_set_with_several_configurations_names_them(tmp_path):
    card = "---\nconfigs:\n" + "".join(f"- {{config_name: {n}, data_files: {n}.jsonl}}\n" for n in "ab") + "---\n"
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    for name in "ab":
        source_of(tmp_path, f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
    for subset in (None, "c"):
        with pytest.raises(UserError, match=r"a, b; name one with source\.subset="):
            load(tmp_path, subset, "hub:x/y")
    assert len(load(tmp_path, "b", "hub:x/y")["train"]) == 40


def test_json_files_of_several_schemas_are_one_line(tmp_path):
    source_of(tmp_path, "a.jsonl", '{"nums": [1, 2], "target": 3}\n')
    source_of(tmp_path, "b.jsonl", '{"question": "x", "answer": {"y": 1}}\n')
    with pytest.raises(UserError, match=r"cannot read its files as one table .* source\.paths=") as error:
        load(tmp_path, None, "hub:x/y")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path):
    path = random_source(tmp_path / "s.parquet", 10)
    path.chmod(0)
    with pytest.raises(PermissionError):
        prepare(tmp_path / "out", "source=local", f"source.paths={path}")


def test_a_data_folder_that_holds_another_file_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    prepare(out, "train_size=64", "test_size=8", "annotate=no")
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"notes\.txt in it was not written by data_prep"):
        prepare(out, "train_size=65", "test_size=8", "annotate=no")
    (tmp_path / "site").mkdir()
    (tmp_path / "site/manifest.json").write_text('{"name": "an app"}', encoding="utf-8")
    with pytest.raises(UserError, match="was not written by data_prep"):
        prepare(tmp_path / "site")
    assert (out / "notes.txt").exists()


@pytest.mark.slow
def test_a_link_to_a_data_folder_stays_a_link(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for size in (64, 65):
        prepare(tmp_path / "out", f"train_size={size}", "test_size=8", "annotate=no")
    assert (tmp_path / "out").is_symlink()
    assert len(rows(tmp_path / "disk/train.parquet")) == 65


def test_booleans_are_read_as_yaml_reads_them(tmp_path):
    for value in ("no", "off", "'false'"):
        cfg = compose("prepare", f"annotate={value}")
        check(cfg, PrepareKeys)
        assert cfg.annotate is False


def own_keys(node, prefix=""):
    """Every key of the data's configuration."""
    for key in node:
        yield f"{prefix}{key}"
        if OmegaConf.is_dict(node[key]):
            yield from own_keys(node[key], f"{prefix}{key}.")


BASES = [(), ("source=hub",), ("source=local", "source.paths=x"), ("split=mini_r1",), ("ood=standard",)]
GROUPS = {"source", "preset", "split", "ood", "prompt"}  # their values are names of options
KEYS = [(base, key) for base in BASES for key in own_keys(compose("prepare", *base)) if key not in GROUPS]
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["5%", "no", "???", "abc", "1e3", "~", "keep", "../x", "*"])
)  # fmt: skip
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=4), v, max_size=2))


@pytest.mark.slow
@settings(max_examples=300)
@given(st.sampled_from(KEYS), VALUES)
@example(((), "split.name"), "abc")
def test_any_value_of_any_key_is_valid_or_refused_in_one_line_that_names_it(base_key, value):
    base, key = base_key
    cfg = compose("prepare", *base)
    OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    said = ""
    try:
        with in_one_line():
            check(cfg, PrepareKeys)
            check(cfg, PrepareKeys)  # what was converted is valid
    except UserError as error:
        said = str(error).removeprefix("error: ")
    assert "\n" not in said
    assert not said or re.search(rf"(^|; ){re.escape(key)}[=:.]", said)


@pytest.mark.slow
def test_a_shuffled_recipes_rows_are_on_the_same_side_each_time(tmp_path):
    source = random_source(tmp_path / "s.parquet", 300)
    options = ("source=local", f"source.paths={source}", "split=mini_r1", "split.train=90", "split.test=10")
    for out in "ab":
        prepare(tmp_path / out, *options, "annotate=no")
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_a_source_in_several_batches_gives_the_rows_that_a_recipe_takes_by_place(tmp_path, monkeypatch):
    from datasets import Dataset

    numbers = [[i + 1, 2, 3] for i in range(30)]
    Dataset.from_dict({"nums": numbers, "target": [6] * 30}).save_to_disk(tmp_path / "saved")
    lines = [json.dumps({"nums": each, "target": 6}) for each in numbers]
    (tmp_path / "s.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr("data_prep.sources.ROWS", 7)
    for name in ("saved", "s.jsonl"):
        split = ("split=tinyzero", "split.train=20", "split.test=5", "annotate=no")
        prepare(tmp_path / f"of-{name}", "source=local", f"source.paths={tmp_path / name}", *split)
        assert [each["numbers"] for each in truths(tmp_path / f"of-{name}" / "train.parquet")] == numbers[:20]


def test_problems_that_share_only_their_numbers_are_not_the_same_problem(tmp_path):
    numbers = [[i % 7 + 1, 2, 3] for i in range(30)]
    source = write_source(tmp_path / "s.parquet", numbers, list(range(1, 31)))
    split = ("split=tinyzero", "split.train=20", "split.test=5", "annotate=no")
    result = prepare(tmp_path / "out", "source=local", f"source.paths={source}", *split)
    assert result["leaks"]["test"] == {"rows": 5, "numbers_in_training": 5, "problems_in_training": 0}
    assert result["sets"]["train"]["duplicates_kept"] == 0


def test_rows_are_numbered_through_all_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.prepare.ROW_GROUP", 10)
    prepare(tmp_path / "out", "train_size=64", "test_size=8", "annotate=no")
    infos = pq.read_table(tmp_path / "out" / "train.parquet")["extra_info"].to_pylist()
    assert [info["index"] for info in infos] == list(range(64))
