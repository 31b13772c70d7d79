"""The order of problems by difficulty (verl_recipes/in_verl/curriculum.py), and its way through verl's data loader."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
import pytest
from configurations import compose
from hypothesis import given
from hypothesis import strategies as st

from data_prep.cli import UserError, as_list
from verl_recipes.in_verl.curriculum import CLASSES, Curriculum
from verl_recipes.run.preflight import check_curriculum

ORDERS = ("easy_to_hard", "balanced", "adaptive")
DIFFICULTY = st.lists(st.sampled_from([0.0, 0.5, 1.1, 1.8325, 2.7, 3.3, 4.4]), min_size=1, max_size=60)


def answer(curriculum, difficulty, drawn, success):
    """Let each drawn problem be answered twice; `success` of a problem's number is how many of them are right."""
    curriculum.learn((difficulty[i], float(k < success(i))) for i in drawn for k in range(2))


def draw(curriculum, difficulty, steps, batch=4, success=lambda i: i % 3):
    order = []
    for _ in range(steps):
        drawn = [curriculum.next() for _ in range(batch)]
        answer(curriculum, difficulty, drawn, success)
        order += drawn
    return order


@given(DIFFICULTY, st.sampled_from(ORDERS), st.integers(0, 99), st.integers(1, 12), st.integers(0, 12))
def test_a_run_that_goes_on_draws_what_an_undisturbed_one_does(difficulty, order, seed, steps, stopped_at):
    whole = draw(Curriculum(difficulty, order, seed, 4 * steps), difficulty, steps + stopped_at)
    first = Curriculum(difficulty, order, seed, 4 * steps)
    begun = draw(first, difficulty, stopped_at)
    second = Curriculum(difficulty, order, seed, 4 * steps)
    second.restore(first.state())
    assert begun + draw(second, difficulty, steps) == whole


@pytest.mark.slow
@given(DIFFICULTY, st.sampled_from(ORDERS), st.integers(0, 99))
def test_within_a_class_every_problem_comes_once_before_any_comes_again(difficulty, order, seed):
    curriculum = Curriculum(difficulty, order, seed, 100)
    assert sorted(np.concatenate(curriculum.members)) == list(range(len(difficulty)))
    assert all(len(members) for members in curriculum.members)
    counts = Counter(draw(curriculum, difficulty, 30))
    for members in curriculum.members:
        drawn = [counts[i] for i in members]
        assert max(drawn) - min(drawn) <= 1


@given(DIFFICULTY)
def test_classes_are_in_the_order_of_difficulty_and_equal_difficulty_is_one_class(difficulty):
    classes = [{difficulty[i] for i in members} for members in Curriculum(difficulty, "balanced", 0, 1).members]
    assert len(classes) < 2 * CLASSES
    assert all(max(easier) < min(harder) for easier, harder in pairwise(classes))


def test_a_difficulty_that_most_problems_share_does_not_swallow_the_easier_ones():
    """As in the tiny task: 164 of 4,096 problems are easy, 288 harder, and the rest share the greatest difficulty."""
    difficulty = [1.05] * 164 + [1.53] * 288 + [1.83] * 3644
    assert [len(members) for members in Curriculum(difficulty, "balanced", 0, 1).members] == [452, 3644]
    assert len(Curriculum([1.05] + [1.83] * 99, "balanced", 0, 1).members) == 1  # one problem is no class


def test_balanced_takes_the_classes_in_turn():
    curriculum = Curriculum(list(range(50)), "balanced", 0, 100)
    assert [curriculum.next() // 10 for _ in range(10)] == [0, 1, 2, 3, 4] * 2


def test_easy_to_hard_begins_with_the_easiest_class_and_ends_with_the_hardest():
    difficulty = [i / 100 for i in range(500)]
    order = draw(Curriculum(difficulty, "easy_to_hard", 0, 1000), difficulty, 250)
    means = [np.mean([difficulty[i] for i in part]) for part in np.array_split(order, 5)]
    assert means == sorted(means)
    assert np.mean([i < 100 for i in order[:100]]) > 0.6
    assert np.mean([i >= 400 for i in order[-100:]]) > 0.6


def test_adaptive_goes_where_half_of_the_answers_are_right_and_tries_every_class_again():
    difficulty = [i / 100 for i in range(500)]
    success = [2, 2, 1, 0, 0]  # of two answers to each problem of a class
    curriculum = Curriculum(difficulty, "adaptive", 0, 1000)
    assert curriculum.weights() == pytest.approx([0.2] * 5)
    order = draw(curriculum, difficulty, 100, batch=20, success=lambda i: success[i // 100])
    share = np.bincount(np.array(order[1000:]) // 100) / 1000
    assert share.argmax() == 2
    assert share[2] > 0.4
    assert share.min() > 0.02


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_is_an_option_and_composes(order):
    cfg = compose("train", f"curriculum={order}")
    assert (cfg.data.curriculum.order, cfg.data.curriculum.steps) == (order, cfg.trainer.total_training_steps)


@pytest.mark.slow
def test_data_without_difficulties_that_differ_is_refused(small_data, tmp_path):
    cfg = compose("train", "curriculum=adaptive", *small_data)
    check_curriculum(cfg)
    with pytest.raises(UserError, match=r"dynamic sampling \(algorithm.filter_groups.enable\) drops some"):
        check_curriculum(compose("train", "curriculum=adaptive", "recipe=dapo", *small_data))
    table = pq.read_table(as_list(cfg.data.train_files)[0])
    cfg.data.train_files = str(tmp_path / "other.parquet")
    place = table.schema.get_field_index("extra_info")
    for info, why in (({}, r"512 of 512 problems .* no difficulty"), ({"difficulty": 2.0}, r"512 .* equally hard")):
        other = table.set_column(place, "extra_info", [[{"split": "train", "index": 0} | info] * len(table)])
        pq.write_table(other, tmp_path / "other.parquet")
        with pytest.raises(UserError, match=f"curriculum=adaptive: .*{why}"):
            check_curriculum(cfg)


@pytest.mark.slow
def test_verls_data_loader_saves_and_restores_the_order(small_data):
    from torchdata.stateful_dataloader import StatefulDataLoader
    from transformers import AutoTokenizer
    from verl.trainer.ppo.utils import create_rl_dataset, create_rl_sampler
    from verl.utils.dataset.rl_dataset import collate_fn

    cfg = compose("train", "curriculum=adaptive", *small_data)
    tokenizer = AutoTokenizer.from_pretrained(cfg.actor_rollout_ref.model.path)

    def loader(files):
        dataset = create_rl_dataset(files, cfg.data, tokenizer, None)
        sampler = create_rl_sampler(cfg.data, dataset)
        return StatefulDataLoader(dataset, 32, num_workers=0, drop_last=True, collate_fn=collate_fn, sampler=sampler)

    def steps(data, count):
        drawn = []
        for _, batch in zip(range(count), iter(data), strict=False):
            drawn.append([info["index"] for info in batch["extra_info"]])
            # What the replay buffer hands over: four samples a problem, the easier ones right.
            data.dataset.learn(
                [{"extra_info": info, "acc": float(info["difficulty"] < 1.5)} for info in batch["extra_info"]] * 4
            )
        return drawn

    whole = steps(loader(cfg.data.train_files), 6)
    first = loader(cfg.data.train_files)
    begun = steps(first, 3)
    second = loader(cfg.data.train_files)
    second.load_state_dict(first.state_dict())
    assert begun + steps(second, 3) == whole
    test = loader(cfg.data.val_files).dataset
    assert [test[i]["extra_info"]["index"] for i in range(len(test))] == list(range(16))
