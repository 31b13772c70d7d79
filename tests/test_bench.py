"""The frozen test set (assets/bench): what it holds, that no training split holds its numbers, figures, the board."""

import hashlib
import json
import random
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations, islice
from statistics import fmean

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from configurations import compose, options
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from scipy.special import stdtrit
from scipy.stats import hypergeom
from test_data import multisets, prepare, rows, truths, write_source
from test_reporting import make_run
from transformers import AutoTokenizer

from data_prep import split as splits
from data_prep import traces
from data_prep.bench import write_bench
from data_prep.cli import CONFIGS, UserError
from data_prep.generate import distinct
from data_prep.prompts import messages_for
from data_prep.solver import expressions, solve, solve_many
from data_prep.split import TRAIN, assign, hash_numbers, is_below, is_reserved, make_split, padded
from data_prep.test_set import FOLDER, SUMS, identity, read_problems
from reward_score import bench
from reward_score.figures import t_quantile
from verl_recipes import bench as command
from verl_recipes import tiny_base
from verl_recipes.measure.intervals import figure
from verl_recipes.run.folder import RunFolder, as_lines, write_whole

ROOT = CONFIGS.parent
FROZEN = "f51a055105ff04ac782fe64c20d8c34749a62cc85006b75add11265494ed43a4"
PROBLEMS = read_problems()
EXPRESSIONS = {3: 68, 4: 1170, 5: 27142, 6: 793002}  # as tests/test_solver.py counts them
RESERVED = {tuple(sorted(row["numbers"])) for row in PROBLEMS}
OTHERS = [[i, j, 60] for i in range(1, 31) for j in range(31, 51)]  # multisets for both sides of a split
OTHERS = [numbers for numbers in OTHERS if tuple(sorted(numbers)) not in RESERVED]


# What it holds


def test_the_file_is_the_frozen_one_and_stays_small():
    content = (FOLDER / "v1.json").read_bytes()
    assert hashlib.sha256(content).hexdigest() == identity()["sha256"] == FROZEN
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1_000_000
    assert FROZEN in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_ids_are_stable_strata_equal_and_no_numbers_occur_twice():
    assert [row["id"] for row in PROBLEMS] == [f"v1-{i:04}" for i in range(1024)]
    assert set(Counter(row["stratum"] for row in PROBLEMS).values()) == {64}
    assert len({row["stratum"] for row in PROBLEMS}) == 16
    assert len(RESERVED) == 1024


@pytest.mark.parametrize(("count", "step"), [(3, 1), (4, 1), (5, 1), pytest.param(6, 16, marks=pytest.mark.slow)])
def test_the_solver_says_what_the_file_says(count, step):
    """Of six numbers, for which the solver takes long, every sixteenth problem; a long test makes all again."""
    some = [row for row in PROBLEMS if len(row["numbers"]) == count][::step]
    solved = solve_many(np.array([row["numbers"] for row in some]), np.array([row["target"] for row in some]))
    for i, row in enumerate(some):
        assert row["solutions"] == solved.solutions[i] > 0
        assert (row["first"], row["additive"], row["fraction"]) == (
            solved.form[i] + 1, solved.additive[i], solved.fraction[i],
        )  # fmt: skip


def test_every_problem_belongs_to_its_stratum():
    for row in PROBLEMS:
        name, count, largest = row["stratum"], len(row["numbers"]), max(row["numbers"])
        if name == "tiny":
            assert count == 3
            assert largest <= 25
        elif name == "fraction":
            assert row["fraction"]
        elif name == "television":
            assert count == 6
            assert row["target"] > 100
        elif "tries" in name:
            low, high = (int(each.replace(",", "")) for each in name.removesuffix(" tries").split(" to "))
            assert low <= EXPRESSIONS[count] / row["solutions"] < high
        else:
            assert name == f"{count} numbers, {'+ -' if row['additive'] else '* /'}"
            assert not row["fraction"]


@pytest.mark.long
def test_the_command_that_made_it_makes_it_again():
    arguments = [sys.executable, "benchmarks/test_set.py", "check"]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_file_that_was_changed_is_refused_by_both_readers(tmp_path):
    for name in ("v1.json", SUMS):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    assert read_problems(tmp_path) == list(bench.problems(tmp_path).values()) == PROBLEMS
    bench.problems.cache_clear()
    (tmp_path / "v1.json").write_text((FOLDER / "v1.json").read_text().replace('"target": 5,', '"target": 6,', 1))
    with pytest.raises(UserError, match=r"v1.json is not the file that SHA256SUMS beside it records"):
        read_problems(tmp_path)
    with pytest.raises(ValueError, match=r"v1.json is not the file that SHA256SUMS beside it records"):
        bench.problems(tmp_path)


# Never in training


@settings(max_examples=50)
@given(st.floats(1e-9, 0.99), st.integers(-(2**63), 2**64 - 1), st.integers(0, 99))
def test_by_numbers_trains_on_none_of_its_multisets_whatever_share_seed_and_order(share, seed, order):
    rng = random.Random(order)
    lists = [rng.sample(row["numbers"], len(row["numbers"])) for row in PROBLEMS]
    hashes = hash_numbers(*padded(lists))
    split = make_split({"split": {"name": "by_numbers"}, "held_out_share": share, "seed": seed}, len(lists))
    target = np.array([rng.randint(1, 10**6) for _ in lists])
    side, _ = assign(split, hashes, target, np.arange(len(lists)))
    assert not (side == TRAIN).any()


@pytest.fixture(scope="module")
def leaky(tmp_path_factory):
    """A source that holds every multiset of the test set, in another order and with other targets, and others."""
    rng = random.Random(0)
    lists = [rng.sample(row["numbers"], len(row["numbers"])) for row in PROBLEMS] + OTHERS
    rng.shuffle(lists)
    path = tmp_path_factory.mktemp("source") / "leaky.parquet"
    return write_source(path, lists, [rng.randint(1, 999) for _ in lists])


@pytest.mark.slow
@pytest.mark.parametrize("name", options("split"))
@pytest.mark.parametrize("seed", [0, 1])
def test_no_training_split_of_any_rule_and_share_holds_one_of_its_multisets(tmp_path, leaky, name, seed):
    sizes = ["test_size=null"] if name == "by_numbers" else ["split.train=1200", "split.test=200"]
    for share in ("0.01", "0.9") if name == "by_numbers" else ("0.15",):
        out = tmp_path / share
        source = ["source=local", f"source.paths={leaky}", f"held_out_share={share}", f"seed={seed}"]
        counts = prepare(out, *source, f"split={name}", *sizes, "annotate=false")["rows"]
        assert multisets(out / "train.parquet")
        assert multisets(out / "train.parquet").isdisjoint(RESERVED)
        assert multisets(out / "test.parquet") & RESERVED  # a test set may hold them
        assert counts.pop("in") == sum(counts.values())
        assert bool(counts["reserved for the bench"]) == (name != "by_numbers")
        if name != "by_numbers":
            assert counts["train"] + counts["reserved for the bench"] == 1200
            assert counts["test"] == 200


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.end_to_end if name == "tv" else ()) for name in options("preset")],
)
def test_no_problem_is_generated_for_training_from_its_multisets(name):
    """At the smallest share, where the hash alone would put them on the training side."""
    preset = OmegaConf.to_container(compose("prepare", f"preset={name}").preset)
    size = {"tv": 2}.get(name, 2000)  # six numbers take seconds
    numbers, count, _ = distinct(preset, size, 5, side=TRAIN, held_out_share=1e-9)
    made = {tuple(sorted(row[:n])) for row, n in zip(numbers.tolist(), count.tolist(), strict=True)}
    assert made.isdisjoint(RESERVED)


@pytest.mark.slow
def test_traces_of_a_folder_that_an_older_version_made_leave_them_out(tmp_path, monkeypatch):
    path = write_source(
        tmp_path / "s.parquet", [row["numbers"] for row in PROBLEMS[:64]] + OTHERS, [5] * 64 + [9] * len(OTHERS)
    )
    with monkeypatch.context() as older:
        older.setattr(splits, "reserved_hashes", lambda: np.zeros(0, np.uint64))
        prepare(tmp_path / "old", "source=local", f"source.paths={path}", "test_size=null", "held_out_share=0.01")
    old = tmp_path / "old"
    assert multisets(old / "train.parquet") & RESERVED
    tests = traces.hashes_of_tests(old)
    (batch,) = traces.batches(old / "train.parquet", ["reward_model", "extra_info"])
    usable = traces.usable(batch, tests) == traces.USABLE
    lists = [tuple(sorted(numbers)) for numbers in traces.truths(batch)[0]]
    assert not {numbers for numbers, good in zip(lists, usable, strict=True) if good} & RESERVED


def test_rows_that_a_model_trained_on_are_counted_if_they_are_known_and_of_this_task(tmp_path):
    truth = [PROBLEMS[0] | {"numbers": PROBLEMS[0]["numbers"][::-1]}, {"numbers": [1, 50, 60], "target": 7}]
    pq.write_table(pa.table({"reward_model": [{"ground_truth": each} for each in truth]}), tmp_path / "ours.parquet")
    pq.write_table(pa.table({"reward_model": [{"ground_truth": "42"}]}), tmp_path / "theirs.parquet")
    files = [str(tmp_path / name) for name in ("ours.parquet", "theirs.parquet", "gone.parquet")]
    assert command.reserved_rows(files[:2]) == 1
    assert command.reserved_rows(files) is None
    assert command.reserved_rows([]) is None


@pytest.mark.slow
def test_reserving_them_changed_no_row_of_the_shipped_presets(tmp_path, monkeypatch):
    """All its numbers are held out at the default share anyway, so the tiny base's results stay what they were."""
    share = compose("prepare").held_out_share
    hashes = hash_numbers(*padded([row["numbers"] for row in PROBLEMS]))
    assert is_below(hashes, share).all()
    assert is_reserved(hashes).all()
    made = []
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr(splits, "reserved_hashes", lambda: np.zeros(0, np.uint64))
        prepare(tmp_path / name, "annotate=false")
        made.append([truths(tmp_path / name / f"{side}.parquet") for side in ("train", "test")])
    assert made[0] == made[1]


@pytest.mark.slow
def test_the_manifest_names_the_test_set_so_that_an_older_folder_is_made_again(tmp_path, leaky):
    options = ["source=local", f"source.paths={leaky}", "test_size=null", "annotate=false"]
    prepare(tmp_path / "out", *options)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["bench"] == identity()
    assert prepare(tmp_path / "out", *options) is None
    (tmp_path / "out/manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "bench"}))
    assert prepare(tmp_path / "out", *options) is not None


# Figures


def answers(tmp_path, lines):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    arguments = [sys.executable, "-S", "-m", "reward_score", "--bench", str(path)]
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)


def solution(row):
    return f"so</think><answer>{solve(row['numbers'], row['target']).expression}</answer>"


def test_right_answers_are_counted_and_problems_without_one_are_wrong_and_said(tmp_path):
    tiny = [row for row in PROBLEMS if row["stratum"] == "tiny"]
    result = answers(tmp_path, [{"id": row["id"], "response": solution(row)} for row in tiny])
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "960 problems have no response and count as wrong" in lines
    assert [line.split()[2] for line in lines if line.startswith("all ")] == ["0.062"]
    assert [line.split()[2] for line in lines if line.startswith("tiny ")] == ["1.000"]
    assert [line.split()[-4] for line in lines if line.startswith("fraction ")] == ["0.000"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"id": "v2-0000", "response": ""}, "line 1: the test set v1 has no problem 'v2-0000'; its ids are v1-0000"),
        ({"id": ["x"], "response": ""}, "line 1: the test set v1 has no problem ['x']"),
        ({"id": "v1-0000"}, "line 1: a JSON object with `id` and `response` is expected"),
        (7, "line 1: a JSON object with"),
        ({"id": "v1-0000", "response": ["a", "b"]}, "several samples are several lines"),
    ],
)
def test_a_line_that_answers_nothing_is_refused_in_one_line(tmp_path, line, message):
    result = answers(tmp_path, [line])
    assert result.returncode != 0
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not result.stdout


def test_no_answer_at_all_is_refused(tmp_path):
    assert "there is no response to a problem of the test set v1" in answers(tmp_path, []).stderr


@settings(max_examples=20)
@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=5), min_size=1, max_size=30))
def test_the_figures_are_those_of_a_direct_count_and_the_intervals_those_of_the_evaluation(samples):
    verdicts = {
        row["id"]: ["right" if right else "syntax" for right in some]
        for row, some in zip(PROBLEMS, samples, strict=False)
    }
    result = bench.measure(verdicts)
    n = min(map(len, samples))
    rest = [0.0] * (1024 - len(samples))
    assert (result["n"], result["answered"]) == (n, len(samples))
    assert result["figures"][f"mean@{n}"] == pytest.approx(figure([fmean(some) for some in samples] + rest))
    for k in {1, 2, n}:
        drawn = [fmean(any(each) for each in combinations(some, k)) for some in samples]
        assert result["figures"][f"pass@{k}"] == pytest.approx(figure(drawn + rest))
    assert sum(result["reasons"].values()) == pytest.approx(1)


def test_students_quantile_is_scipys():
    for size in (2, 3, 4, 5, 10, 63, 64, 255, 1024, 20_001):
        assert t_quantile(size) == pytest.approx(stdtrit(size - 1, 0.975), rel=1e-9)


# The command


@pytest.mark.parametrize("name", options("prompt"))
def test_its_problems_are_put_under_any_prompt_in_the_order_of_their_ids(tmp_path, name):
    prompt = OmegaConf.to_container(compose("prepare", f"prompt={name}").prompt, resolve=True)
    write_bench(prompt, tmp_path / "data")
    made = rows(tmp_path / "data" / "test.parquet")
    for i, (row, problem) in enumerate(zip(made, PROBLEMS, strict=True)):
        assert row["prompt"] == messages_for(prompt, problem["numbers"], problem["target"])
        assert row["reward_model"]["ground_truth"] == {key: problem[key] for key in ("numbers", "target")}
        assert row["extra_info"]["index"] == i
    assert pq.read_table(tmp_path / "data" / "test.parquet")["data_source"].unique().to_pylist() == ["countdown/bench"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "tinyzero_base"),
        (["recipe=mini_r1"], "mini_r1"),
        (["recipe=mini_r1", "prompt=datawhale_r1"], "datawhale_r1"),
    ],
)
def test_the_prompt_is_that_of_the_recipe_or_the_one_that_is_named(overrides, name):
    cfg = OmegaConf.create({"model": str(ROOT / "assets" / "tiny_base"), "overrides": overrides})
    assert command.prompt_of(cfg)["name"] == name


def test_a_row_for_the_board_judges_every_response_by_its_problem(tmp_path):
    out = RunFolder(tmp_path / "bench")
    out.write_mark("evaluation", weights={"model.safetensors": "0"})
    samples = [
        {"extra_info": {"index": i, "set": "test", "sample": k}, "response": solution(PROBLEMS[i]) if k else "none"}
        for i in range(64)
        for k in (0, 1)
    ]
    write_whole(out.samples_of("validation", 0), as_lines(samples))
    keys = ("git_commit", "versions", "seed", "temperature", "cost")
    summary = dict.fromkeys(keys) | {"figures": {"response_tokens": [1, 1, 1], "truncated": [0, 0, 0]}}
    cfg = OmegaConf.create({"model": str(ROOT / "assets" / "tiny_base")})
    row = command.row_of(cfg, {"name": "tinyzero_base"}, out, summary)
    assert (row["n"], row["responses"], row["answered"]) == (2, 128, 64)
    assert row["strata"]["tiny"]["mean@2"][0] == 0.5
    assert row["strata"]["tiny"]["pass@2"][0] == 1.0
    assert row["training"] is None
    assert row["test_set"] == identity()


# The board


@pytest.mark.slow
@pytest.mark.parametrize("name", ["board.md.jinja", "board.zh.md.jinja"])
def test_the_board_is_what_its_files_say(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import board

    assert (ROOT / board.PAGES[name]).read_text(encoding="utf-8") == board.page(name)


def test_every_row_of_the_board_is_of_this_test_set_and_repeatable():
    files = sorted((ROOT / "benchmarks" / "results" / "board").glob("*.json"))
    assert {"tiny-base", "tiny-seed0"} <= {path.stem for path in files}
    for path in files:
        row = json.loads(path.read_text(encoding="utf-8"))
        assert row["test_set"] == identity()
        assert (row["answered"], row["problems"]) == (1024, 1024)
        assert row["figures"].keys() >= {f"mean@{row['n']}", f"pass@{row['n']}"}
        for value, low, high in row["figures"].values():
            assert 0 <= low <= value <= high <= 1
        assert row["strata"].keys() == {problem["stratum"] for problem in PROBLEMS}
        assert row["command"].startswith("python -m verl_recipes.bench ")
        assert not row["git_commit"].endswith("-dirty")
        if row["training"]:
            assert row["train_command"]
            assert row["training"]["reserved_rows"] == 0
            assert not (row["training"]["git_commit"] or "").endswith("-dirty")


@pytest.mark.slow
def test_the_datasheet_is_what_the_command_writes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import test_set

    written = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert test_set.datasheet(PROBLEMS, identity()["sha256"]) == written


def test_the_exhaustive_baseline_is_the_hypergeometric_chance(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import board

    for problem in PROBLEMS[:64]:
        total, solutions = expressions(problem["numbers"]), problem["solutions"]
        for tries in {min(each, total) for each in (1, 7, 60, 68)}:
            missed = hypergeom(total, solutions, tries).pmf(0)
            assert board.random_order(problem, tries) == pytest.approx(1 - missed)


def test_a_row_of_the_board_counts_the_test_sets_numbers_in_what_its_run_trained_on(tmp_path):
    run = make_run(tmp_path / "run", steps=2)
    for name, numbers in (("train", read_problems()[0]["numbers"]), ("val", [1, 50, 60])):
        truth = {"ground_truth": {"numbers": numbers, "target": 7}}
        pq.write_table(pa.table({"reward_model": [truth]}), tmp_path / f"{name}.parquet")
    files = {f"{name}_files": {f"{tmp_path}/{name}.parquet": "0"} for name in ("train", "val")}
    RunFolder(run).write_mark("run", **files)
    assert command.training_of(run)["reserved_rows"] == 1


def test_a_checkpoint_on_the_board_has_cost_the_steps_up_to_it(tmp_path):
    run = make_run(tmp_path / "run", steps=4)
    RunFolder(run).write_mark("run")
    half, whole = (command.training_of(run / "checkpoints" / f"global_step_{step}") for step in (2, 4))
    assert 0 < half["device_hours"] < whole["device_hours"]


def test_the_tiny_base_learns_from_numbers_of_the_training_side_alone():
    cfg = compose("tiny_base", "problems=2000")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets" / "tiny_base")
    texts = [
        tokenizer.decode(row["input_ids"]) for row in islice(tiny_base.rows(cfg, cfg.stages.search, tokenizer), 300)
    ]
    lists = [[*map(int, re.search(r"\[([\d, ]+)\]", text)[1].split(","))] for text in texts]
    assert not splits.is_held_out(hash_numbers(*padded(lists)), cfg.held_out_share).any()
