"""The base model of the middle rung: its texts, its tokens, and that its configurations say what it is."""

import random
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import ROOT
from configurations import compose
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from data_prep.cli import CONFIGS
from data_prep.wording import PHRASES
from reward_score.countdown import compute_score
from verl_recipes import middle_base
from verl_recipes.bases.making import TAGS, make_tokenizer
from verl_recipes.middle_base import FREE, KNOWN, NOT

PROMPT = "User: Using the numbers [44, 19, 35], create an equation that equals 98.\nAssistant: Let me see.\n<think>\n"
RESPONSE = """ I need 98 from 44, 19, 35. First 44 + 35 = 79. 79 + 19 = 98, which is the target.
Check: 44 + 35 = 79, 79 + 19 = 98. Each number is used once.</think>
<answer> 44 + 35 + 19 </answer>"""
PROBLEM = middle_base.Problem(PROMPT, RESPONSE, [44, 19, 35], 98, [(44, "+", 35, 79), (79, "+", 19, 98)])


def whole(text):
    return "".join(part for part, _ in text)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """As a run loads it, beside a model's configuration."""
    folder = tmp_path_factory.mktemp("middle")
    words = middle_base.words([PROMPT, RESPONSE, *(each for some in PHRASES["en"].values() for each in some)])
    made = make_tokenizer(words, middle_base.LARGEST, "{{ messages[-1]['content'] }}")
    made.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


def test_a_number_a_tag_and_a_word_are_a_token_each_and_the_text_comes_back(tokenizer):
    text = PROMPT + RESPONSE
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    tokens = [tokenizer.decode(each) for each in ids]
    assert [each for each in tokens if each.isdigit()] == re.findall(r"\d+", text)
    assert {*TAGS} & {*re.findall(r"<.*?>", text)} <= {*tokens}
    assert {" target", " from", "Check"} <= {*tokens}


@pytest.mark.parametrize("seed", range(20))
def test_what_the_base_reads_is_true_and_only_what_follows_from_before_weighs_more(tokenizer, seed):
    rng = random.Random(seed)
    search = middle_base.searched([PROBLEM], rng)
    response = whole(part for part in search if part[1] != NOT)
    assert compute_score("countdown", response, {"numbers": PROBLEM.numbers, "target": PROBLEM.target})["acc"] == 1
    for text in (search, middle_base.equations(rng), middle_base.solved([PROBLEM], rng)):
        for a, operator, b, value in re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", whole(text)):
            right = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(value) * int(b)}
            assert right[operator] == int(a if operator == "/" else value)
        for part, kind in text:
            if kind == FREE:
                assert not re.search(r"= \d|(Left|leaves|ack to):? \d|, (too|not|which|that|right)", part)


def test_the_base_searches_after_a_question_or_alone_but_not_after_the_prompt():
    rng = random.Random(0)
    before = {"".join(part for part, kind in middle_base.searched([PROBLEM], rng) if kind == NOT) for _ in range(20)}
    assert before == {"", PROMPT.partition(" Let me")[0]}


def test_the_problems_are_those_whose_traces_hold_all_steps(tmp_path):
    rows = [
        {
            "messages": [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": response}],
            "reward_model": {"style": "rule", "ground_truth": {"numbers": PROBLEM.numbers, "target": PROBLEM.target}},
        }
        for response in (RESPONSE, RESPONSE.replace("44 + 35 = 79", "44 + (1/3) = 133/3", 1))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    assert middle_base.read(str(tmp_path / "train.parquet")) == [PROBLEM]


def test_a_value_is_compared_with_its_target():
    found = re.findall(r"The target is (\d+)\. (\d+) is (.*?)\.", whole(middle_base.comparisons(random.Random(0))))
    assert len(found) == 6
    for target, value, said in found:
        assert said == ("right", "too large", "too small")[(int(value) > int(target)) - (int(value) < int(target))]


def test_a_list_is_said_again_and_then_in_some_order():
    first, again, other, *_ = [re.findall(r"\d+", part) for part, _ in middle_base.lists(random.Random(0))]
    assert first == again
    assert sorted(first) == sorted(other)


def test_a_solution_is_cut_where_its_numbers_are_free_and_nothing_is_lost():
    text = middle_base.solved([PROBLEM], random.Random(0))
    assert whole(text) == PROMPT + RESPONSE
    assert [part for part, kind in text if kind == FREE] == [
        " First 44 + 35 =",
        ". 79 + 19 =",
        ",",
        ".",
    ]


def test_a_text_in_parts_has_the_tokens_of_the_whole(tokenizer):
    ids = set(tokenizer.convert_tokens_to_ids([str(each) for each in range(middle_base.LARGEST + 1)]))
    rng = random.Random(0)
    for text in (middle_base.searched([PROBLEM], rng), middle_base.lists(rng), middle_base.solved([PROBLEM], rng)):
        some, weights = middle_base.encoded(text, tokenizer, ids)
        assert some == [*tokenizer(whole(text))["input_ids"], tokenizer.eos_token_id]
        assert {*weights} <= {0.0, 1.0, float(KNOWN)}
        assert all(token in ids for token, weight in zip(some, weights, strict=True) if weight == KNOWN)


def test_a_batch_holds_whole_texts_of_similar_length_within_its_tokens(tokenizer):
    rng = random.Random(0)
    kinds = [lambda: middle_base.equations(rng), lambda: middle_base.searched([PROBLEM], rng)]
    made = middle_base.batches(kinds, [0.5, 0.5], 2048, tokenizer, set(), rng)
    seen = torch.zeros(2)
    for _ in range(20):
        ids, weights = next(made)
        assert ids.shape == weights.shape
        assert ids.numel() <= 2048
        padding = (ids == tokenizer.pad_token_id).float().mean()
        assert (weights[ids == tokenizer.pad_token_id] == 0).all()
        assert padding < 0.2
        is_search = torch.tensor(["<answer>" in tokenizer.decode(row) for row in ids])
        seen += torch.tensor(
            [(ids[~is_search] != tokenizer.pad_token_id).sum(), (ids[is_search] != tokenizer.pad_token_id).sum()]
        )
    assert 0.3 < seen[0] / seen.sum() < 0.7  # the shares are of tokens


def test_the_models_configuration_is_that_of_the_base_which_is_made():
    model, made = OmegaConf.load(CONFIGS / "model" / "middle.yaml"), compose("middle_base")
    assert model.actor_rollout_ref.model.path == made.out
    assert model.data.max_response_length == middle_base.RESPONSE
    shape = {key: model.architecture[key] for key in middle_base.SHAPE if key in model.architecture}
    assert shape.items() <= middle_base.SHAPE.items()
    assert len(shape) == 5


def test_the_commands_and_the_run_name_the_same_problems():
    script = (ROOT / "launch" / "middle.sh").read_text(encoding="utf-8")
    made_by = compose("train", "recipe=middle", "model=middle").data.made_by
    assert f'"{made_by.removeprefix("python -m data_prep ").removesuffix(" out=data/middle")}"' in script
    assert compose("middle_base").traces in script
