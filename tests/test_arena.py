"""The arena: its page is made from the committed files, and all algorithms have one budget (benchmarks/arena.py)."""

import re
import sys
from pathlib import Path

import pytest
from configurations import compose
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))  # where it finds its neighbour, results.py
from benchmarks.arena import (
    ALGORITHMS,
    CONTROL,
    NAMES,
    RATES,
    REFERENCE,
    ROOT,
    STEPS,
    TEMPLATES,
    by_algorithm,
    holm,
    load,
    overrides,
    page,
)


@pytest.mark.slow
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_page_is_made_from_the_committed_runs(template):
    assert (ROOT / TEMPLATES[template]).read_text(encoding="utf-8") == page(template, load())


def test_every_committed_run_is_one_that_the_arena_makes():
    for result in load():
        assert result["algorithm"] in NAMES
        assert result["learning rate"] in RATES
        if "collapsed" not in result:
            assert len(result["training accuracy"]) == STEPS
            made = overrides(result["algorithm"], result["learning rate"], result["seed"])
            assert result["command"] == " ".join(["python -m verl_recipes.train", *made])
            assert {len(counts) for counts in result["right of 8"].values()} == {256}


def test_all_begin_at_the_same_answers_of_the_base():
    """The base is measured before each run, with the run's seed: equal seeds give equal answers."""
    before = {}
    for result in load():
        if "right of 8" in result:
            assert before.setdefault(result["seed"], result["right of 8"]["before"]) == result["right of 8"]["before"]


@pytest.mark.slow
@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), min_size=1, max_size=9))
def test_holms_correction_keeps_the_order_and_lies_between_p_and_bonferronis(ps):
    corrected = holm(ps)
    for name, p in ps.items():
        assert p <= corrected[name] <= min(1.0, p * len(ps))
        assert all(corrected[name] <= corrected[other] for other in ps if ps[other] > p)


def test_a_rate_is_compared_over_the_seeds_that_have_it():
    runs = [
        {"algorithm": REFERENCE, "learning rate": rate, "seed": seed, "training accuracy": [0.1]}
        for rate, seed in ((1e-4, 0), (3e-4, 0), (3e-4, 1))
    ]
    assert by_algorithm(runs) == {}  # a rate is missing
    runs.append(runs[0] | {"learning rate": 1e-3})
    assert [run["learning rate"] for run in by_algorithm(runs)[REFERENCE]] == [3e-4, 3e-4]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", NAMES)
def test_every_algorithm_has_the_same_budget_and_data(algorithm):
    cfg = compose("train", *overrides(algorithm, 3e-4, 1))
    rollout, actor = cfg.actor_rollout_ref.rollout, cfg.actor_rollout_ref.actor
    assert (cfg.data.train_batch_size, rollout.n, cfg.trainer.total_training_steps) == (32, 8, STEPS)
    assert (cfg.data.train_files, cfg.data.max_response_length) == ("data/tiny/train.parquet", 256)
    assert (actor.optim.lr, actor.optim.optimizer, cfg.seed) == (3e-4, "AdamW", 1)
    assert cfg.reward.custom_reward_function.path.endswith("random_control" if algorithm == CONTROL else "countdown")
    if algorithm in (set(ALGORITHMS) - {CONTROL}) & by_algorithm(load()).keys():  # what the page says
        clauses = re.findall(r"(\d) in ([a-z_, ]+)[,.]", page("arena.md.jinja", load()))
        updates = {name: number for number, names in clauses for name in re.split(", | and ", names)}
        assert updates.get(algorithm, updates["the others"]) == str(32 // actor.ppo_mini_batch_size)
