"""The base model of the middle rung: its texts, its tokens, and that its configurations say what it is."""

import random
import re
import sys
from fractions import Fraction
from itertools import chain

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import ROOT
from configurations import compose
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep import cli
from data_prep.cli import CONFIGS, UserError
from data_prep.prompts import fill
from data_prep.search import after, random_step
from data_prep.wording import PHRASES, write_trace
from reward_score.countdown import compute_score
from verl_recipes import middle_base
from verl_recipes.bases.making import TAGS, make_tokenizer
from verl_recipes.middle_base import FREE, KNOWN, NOT, SURE

OWN = cli.compose("middle_base", [], folder=CONFIGS / "commands")
PROMPT = fill(compose("train", "recipe=middle", "model=middle").prompt.messages[0].content, [44, 19, 35], 98)
RESPONSE = """ I need 98 from 44, 19, 35. First 44 + 35 = 79. 79 + 19 = 98, which is the target.
Check: 44 + 35 = 79, 79 + 19 = 98. Each number is used once.</think>
<answer> 44 + 35 + 19 </answer>"""
PROBLEM = middle_base.Problem(PROMPT, RESPONSE, [44, 19, 35], 98, [(44, "+", 35, 79), (79, "+", 19, 98)])


def whole(text):
    return "".join(part for part, _ in text)


def solution(numbers, steps, rng):
    return write_trace(numbers, steps[-1][3], steps, style="first_try", tries=0, language="en", rng=rng)[0]


def row(numbers, steps, response):
    target = int(steps[-1][3])
    prompt = PROMPT.replace("[44, 19, 35]", str(numbers)).replace("98", str(target))
    return {
        "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}],
        "reward_model": {"style": "rule", "ground_truth": {"numbers": numbers, "target": target}},
    }


def rows(count):
    """Problems of four numbers with their solutions."""
    rng, made = random.Random(0), []
    while len(made) < count:
        numbers = pool = rng.sample(range(1, 100), 4)
        steps = []
        while len(pool) > 1 and (step := random_step(pool, 900, set(), rng)):
            steps.append(step)
            pool = after(pool, step)
        if len(pool) == 1:
            made.append(row(numbers, steps, solution(numbers, steps, rng)))
    return made


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """As a run loads it, beside a model's configuration."""
    folder = tmp_path_factory.mktemp("middle")
    responses = [each["messages"][-1]["content"] for each in rows(300)]
    words = middle_base.words([PROMPT, *responses, *chain(*PHRASES["en"].values())])
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
def test_what_the_base_reads_is_true_and_only_what_follows_from_before_weighs_more(seed):
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
                assert not re.search(r"(=|need|is|from|are|Left:|leaves|ack to) \d|, (too|not|which|that|right)", part)
            if kind == SURE:
                numbers, verdict = r" \d+(, \d+)*\.?", r" (too \w+|not enough|\w+ is the target|right)"
                assert re.fullmatch(rf"{numbers}|{verdict}| (I need|The target is) \d.*\.|\nCheck[\s\S]+", part)


def test_the_base_searches_after_a_question_or_alone_but_not_after_the_prompt():
    rng = random.Random(0)
    before = {"".join(part for part, kind in middle_base.searched([PROBLEM], rng) if kind == NOT) for _ in range(20)}
    assert before == {"", PROMPT.partition(" Let me")[0]}


def test_the_problems_are_those_whose_traces_hold_all_steps(tmp_path):
    fractions = [(8, "/", 3, Fraction(8, 3)), (3, "-", Fraction(8, 3), Fraction(1, 3)), (8, "/", Fraction(1, 3), 24)]
    numbers = [8, 3, 8, 3]
    some = [row(numbers, fractions, solution(numbers, fractions, random.Random(0)))]
    some.append(row(PROBLEM.numbers, PROBLEM.steps, RESPONSE))
    pq.write_table(pa.Table.from_pylist(some), tmp_path / "train.parquet")
    assert middle_base.read(str(tmp_path / "train.parquet")) == [PROBLEM]


@pytest.mark.parametrize("seed", range(5))
def test_eight_results_are_compared_with_one_target(seed):
    text = middle_base.comparisons(random.Random(seed))
    target = int(re.search(r"I need (\d+)|target is (\d+)", whole(text))[0].split()[-1])
    found = re.findall(r"= (\d+), ([a-z ]+)\.", whole(text))
    assert len(found) == 8
    for value, said in found:
        verdict = ("hit", "large", "small")[(int(value) > target) - (int(value) < target)]
        assert f"{{}}, {said}." in PHRASES["en"][verdict]
    assert sum(int(value) == target for value, _ in found) >= 1


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


@pytest.mark.slow
def test_a_batch_holds_whole_texts_of_similar_length_within_its_tokens(tokenizer):
    rng = random.Random(0)
    kinds = [lambda: middle_base.equations(rng), lambda: middle_base.searched([PROBLEM], rng)]
    made = middle_base.batches(kinds, [0.5, 0.5], 4096, tokenizer, set(), rng)
    answer = tokenizer.convert_tokens_to_ids("<answer>")
    seen, padding = torch.zeros(2), torch.zeros(2)
    for _ in range(100):
        ids, weights = next(made)
        assert ids.shape == weights.shape
        assert ids.numel() <= 4096
        padded = ids == tokenizer.pad_token_id
        assert (weights[padded] == 0).all()
        is_search = (ids == answer).any(dim=1)
        seen += torch.tensor([(~padded)[~is_search].sum(), (~padded)[is_search].sum()])
        padding += torch.tensor([padded.sum(), ids.numel()])
    assert padding[0] / padding[1] < 0.1
    assert 0.45 < seen[0] / seen.sum() < 0.55  # the shares are of tokens


def test_the_models_configuration_is_that_of_the_base_which_is_made(tokenizer):
    cfg = compose("train", "recipe=middle", "model=middle")
    assert cfg.actor_rollout_ref.model.path == OWN.out
    assert compose("train", "recipe=middle", "model=local").data.max_response_length == middle_base.RESPONSE
    shape = {key: cfg.architecture[key] for key in middle_base.SHAPE if key in cfg.architecture}
    assert shape.items() <= middle_base.SHAPE.items()
    assert len(shape) == 5
    assert cfg.architecture.vocab_size == len(tokenizer)


def test_the_commands_and_the_run_name_the_same_problems():
    script = (ROOT / "launch" / "middle.sh").read_text(encoding="utf-8")
    made_by = compose("train", "recipe=middle", "model=middle").data.made_by
    assert f'"{made_by.removeprefix("python -m data_prep ").removesuffix(" out=data/middle")}"' in script
    assert f"out={OWN.traces}" in middle_base.MAKES.split()


def run(monkeypatch, *overrides):
    monkeypatch.setattr(sys, "argv", ["middle_base", *overrides])
    middle_base.main()


@pytest.mark.slow
def test_a_base_is_made_and_saved_with_its_weights_and_its_tokens(monkeypatch, tmp_path):
    pq.write_table(pa.Table.from_pylist(rows(300)), tmp_path / "train.parquet")
    run(monkeypatch, f"traces={tmp_path}", f"out={tmp_path}/base", "steps=2", "sums_first=1", "tokens=1024")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    made = AutoTokenizer.from_pretrained(tmp_path / "base")
    architecture = compose("train", "recipe=middle", "model=middle").architecture
    assert (model.num_parameters(), len(made)) == (architecture.parameters, architecture.vocab_size)
    assert all(torch.isfinite(each).all() for each in model.parameters())
    assert model.generation_config.max_new_tokens == middle_base.RESPONSE


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["traces=no/such"],
            "traces=no/such: there is no such folder; `bash launch/middle.sh` makes data/middle-direct",
        ),
        (["traces=/"], "traces: //train.parquet does not exist, and `python -m data_prep.traces data="),
        (["steps=200"], "sums_first=250 leaves none of steps=200"),
        (["+texts.walks=0.1"], "texts.walks=0.1: there is no such key"),
        (["texts={equations: 0, lists: 0, comparisons: 0, searched: 0, solved: 0}"], "should be greater than 0"),
        (["tokens=100"], "tokens=100: should be greater than or equal to 1024"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, tmp_path, overrides, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(said)):
        run(monkeypatch, *overrides)


def test_traces_without_a_solution_are_refused(monkeypatch, tmp_path):
    chinese = row(PROBLEM.numbers, PROBLEM.steps, "要用 44、19、35 得到 98。")
    pq.write_table(pa.Table.from_pylist([chinese]), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=f"out={tmp_path} exists"):
        run(monkeypatch, f"traces={tmp_path}", f"out={tmp_path}")
    with pytest.raises(UserError, match="no English solutions"):
        run(monkeypatch, f"traces={tmp_path}", f"out={tmp_path}/base")
    assert not (tmp_path / "base").exists()
