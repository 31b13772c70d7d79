"""The base model of the middle rung: its texts, its tokens, and that its configurations say what it is."""

import random
import re
from fractions import Fraction

import pytest
from commands import ROOT
from configurations import compose
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from data_prep.cli import CONFIGS
from verl_recipes import middle_base
from verl_recipes.bases.making import TAGS, make_tokenizer

TEXT = """I need 98 from 44, 19, 35. Try 44 + 35 = 79. Left: 79, 19. 79 + 19 = 98, which is the target.
Check: 44 + 35 = 79, 79 + 19 = 98.</think>
<answer> 44 + 35 + 19 </answer>"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """As a run loads it, beside a model's configuration."""
    folder = tmp_path_factory.mktemp("middle")
    made = make_tokenizer(middle_base.words([TEXT]), middle_base.LARGEST, "{{ messages[-1]['content'] }}")
    made.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


def test_a_number_a_tag_and_a_word_are_a_token_each_and_the_text_comes_back(tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    assert tokenizer.decode(ids) == TEXT
    tokens = [tokenizer.decode(each) for each in ids]
    assert [each for each in tokens if each.isdigit()] == re.findall(r"\d+", TEXT)
    assert {*TAGS} & {*re.findall(r"<.*?>", TEXT)} <= {*tokens}
    assert {" target", " from", "Check"} <= {*tokens}


@pytest.mark.parametrize("seed", range(20))
def test_every_equation_that_the_base_reads_is_true_and_its_result_alone_is_learned(tokenizer, seed):
    text = middle_base.equations(random.Random(seed))
    sides = [each.split(" = ") for each in text.rstrip(".").split(". ")]
    assert len(sides) == middle_base.EQUATIONS
    for left, result in sides:
        a, operator, b = left.split()
        values = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": Fraction(int(a), int(b))}
        assert values[operator] == int(result) <= middle_base.LARGEST
    row = middle_base.sums(tokenizer, random.Random(seed))
    assert tokenizer.decode(row["input_ids"]) == text
    learned = tokenizer.decode([each for each in row["labels"] if each != -100])
    assert learned.split() == [result for _, result in sides]


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
