"""Traces for a warm start: what they say is true, whatever the problem, and the folder is what it says it is."""

import json
import random
import re
import subprocess
import sys
from fractions import Fraction

import chatml
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from configurations import options
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from test_data import VALUES, hashes, multisets, prepare, rows, write_source
from transformers import AutoTokenizer

from data_prep import cli, traces
from data_prep.cli import CONFIGS, UserError, quoted
from data_prep.schema import TracesKeys
from data_prep.search import after, expression, random_step, solution_steps
from data_prep.solver import flat
from data_prep.split import hash_numbers, padded
from data_prep.traces import functions_of
from data_prep.wording import PHRASES, STYLES, write_trace
from reward_score.countdown import compute_score
from reward_score.profiles import PROFILES
from verl_recipes.measure.behaviours import behaviours

TINY = CONFIGS.parent / "assets" / "tiny_base"
LANGUAGES = sorted(PHRASES)
NUMBER = r"\d+(?:/\d+)?|\(\d+/\d+\)"
STEP = re.compile(rf"({NUMBER}) ([-+*/]) ({NUMBER}) = (\d+(?:/\d+)?)")
LEFT = r"(?:Left: |leaves |剩下 |还剩 )"
BACK = r"(?:[Bb]ack to |回到 |退回 )"
BROKEN = r"(\d+) / (\d+) (?:is not|不是整数|除不尽)"
MOVE = re.compile(rf"{STEP.pattern}|{LEFT}(?P<left>[\d/、, ]+)|{BACK}(?P<back>[\d/、, ]+)|{BROKEN}")
SMALL, LARGE = r"= (\d+)(?:, too small|, not enough|，太小|，偏小)", r"= (\d+)(?:, too (?:large|big)|，太大|，偏大)"
FRACTIONS = [([3, 3, 8, 8], 24), ([1, 5, 5, 5], 24), ([1, 3, 4, 6], 24), ([4, 6], 1)]


def run(monkeypatch, data, out, *overrides):
    """The command, in this process; its manifest."""
    arguments = [f"data={quoted(data)}", f"out={quoted(out)}", "workers=1", *overrides]
    monkeypatch.setattr(sys, "argv", ["traces", *arguments])
    traces.main()
    return json.loads((out / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "small"
    prepare(out, "preset=3to4", "preset.rows=400", "train_size=200", "test_size=40")
    return out


def responses(path):
    return [row["messages"][-1]["content"] for row in rows(path)]


# What a trace says


@st.composite
def problems(draw, counts=(2, 3, 4, 5)):
    """Numbers, and a target that steps on them reach; or one of the problems that need a fraction."""
    if 4 in counts and draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from(FRACTIONS[:3]))
    numbers = draw(st.lists(st.integers(1, 99), min_size=(n := draw(st.sampled_from(counts))), max_size=n))
    pool = list(numbers)
    while len(pool) > 1:
        step = random_step(pool, 10_000, set(), random.Random(draw(st.integers(0, 99))))
        if step is None:
            return [44, 19, 35], 98
        pool = after(pool, step)
    return numbers, pool[0]


def told(numbers, target, style, language, tries, seed):
    """The steps of a solution, its trace, and how many wrong tries it is said to hold."""
    rng = random.Random(seed)
    (functions,) = functions_of([numbers], np.array([target]))
    tree = flat(len(numbers), rng.choice(functions), range(len(numbers)))
    steps = solution_steps(tree, sorted(numbers), rng)
    return steps, *write_trace(numbers, target, steps, style=style, tries=tries, language=language, rng=rng)


def value(text):
    return Fraction(text.strip("()"))


def check_equations(text, fractions):
    """Every equation is one true step on two numbers; without need for a fraction all are integers >= 0."""
    found = list(STEP.finditer(text))
    assert len(found) == text.count("=")
    for a, operator, b, result in (match.groups() for match in found):
        actual = {"+": Fraction.__add__, "-": Fraction.__sub__, "*": Fraction.__mul__, "/": Fraction.__truediv__}
        assert actual[operator](value(a), value(b)) == value(result), text
        assert fractions or not re.search(r"\d/\d", f"{a} {b} {result}"), text


def check_wrong_tries(text, target, tries):
    small, large = ([int(each) for each in re.findall(pattern, text)] for pattern in (SMALL, LARGE))
    broken = [(int(a), int(b)) for a, b in re.findall(BROKEN, text)]
    assert all(each < target for each in small)
    assert all(each > target for each in large)
    assert all(a % b for a, b in broken)
    assert len(small) + len(large) + len(broken) == tries


def listed(text):
    return sorted(value(each) for each in re.split("[,、]", text.rstrip(", 、")))


def check_search(text, numbers):
    """Play it: every step takes numbers that are there, what is left is left, and going back is to where it was.

    Returns how often no number but the result is left.
    """
    stack, ends = [sorted(map(Fraction, numbers))], 0
    for move in MOVE.finditer(text):
        if move["left"]:
            assert listed(move["left"]) == stack[-1], text
        elif move["back"]:
            while stack[-1] != listed(move["back"]):
                stack.pop()
                assert stack, text
        else:
            a, b = (value(each) for each in ((move[1], move[3]) if move[1] else move.groups()[-2:]))
            rest = list(stack[-1])
            rest.remove(a)
            rest.remove(b)
            ends += not rest
            if rest:
                stack.append(sorted([*rest, value(move[4])]))
    return ends


def check(numbers, target, style, language, tries, seed):
    steps, text, used = told(numbers, target, style, language, tries, seed)
    thought, _, answer = text.partition("</think>")
    lines = thought.split("\n")
    fractions = any(isinstance(each, Fraction) for step in steps for each in step)
    assert not fractions or (numbers, target) in FRACTIONS
    check_equations(thought, fractions)
    check_wrong_tries(thought, target, used)
    assert used <= (tries if style != "first_try" else 0)
    said = re.findall(r"\d+", lines[0] if style != "first_try" else re.split(r"[.。] ?", lines[0], maxsplit=1)[0])
    assert sorted(map(int, said)) == sorted([*numbers, target])
    if style == "search":  # each line is a candidate from the first step to the last
        assert [check_search(line, numbers) for line in lines[1:-1]] == [1] * (used + 1)
    else:
        assert check_search("\n".join(lines[:-1]), numbers) == used + 1
    assert answer == f"\n<answer> {expression(steps)} </answer>"
    truth = {"numbers": numbers, "target": target}
    assert compute_score("countdown", text, truth)["score"] == 1
    counted = behaviours(text, numbers, target)
    assert counted["true_statements"] == counted["statements"] or fractions  # which it reads up to the "/"
    assert compute_score("countdown", text, truth, weights={"language": 0}, language=language)["language"] == 1


PLACES = st.sampled_from(STYLES), st.sampled_from(LANGUAGES), st.integers(0, 12), st.integers(0, 2**40)


@given(problems(), *PLACES)
def test_whatever_a_trace_says_is_true(problem, style, language, tries, seed):
    check(*problem, style, language, tries, seed)


@pytest.mark.slow
@settings(max_examples=20)
@given(problems(counts=(6,)), *PLACES)
def test_whatever_a_trace_of_six_numbers_says_is_true(problem, style, language, tries, seed):
    check(*problem, style, language, tries, seed)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("style", STYLES)
def test_a_fraction_is_written_only_where_the_problem_needs_one(style, language):
    for problem in FRACTIONS[:3]:
        _, text, _ = told(*problem, style, language, 4, 0)
        assert re.search(r" \(?\d+/\d+\)?", text)
        check(*problem, style, language, 4, 0)


def test_the_expression_of_steps_is_what_the_steps_make():
    steps = [(9, "-", 4, 5), (7, "-", 5, 2), (6, "/", 2, 3), (3, "*", 5, 15)]
    assert expression(steps) == "6 / (7 - (9 - 4)) * 5"
    assert expression(steps, blank="", sparing=False) == "(6/(7-(9-4)))*5"
    assert expression([(5, "+", 3, 8), (8, "+", 8, 16)]) == "5 + 3 + 8"  # the second 8 is a given number


def test_languages_have_the_same_phrases():
    assert PHRASES["en"].keys() == PHRASES["zh"].keys()


# The folder


def test_rows_continue_the_prompt_and_name_their_problem(monkeypatch, tmp_path, data):
    manifest = run(monkeypatch, data, tmp_path / "out")
    problems = {row["extra_info"]["index"]: row for row in rows(data / "train.parquet")}
    made = [*rows(tmp_path / "out/train.parquet"), *rows(tmp_path / "out/held_out.parquet")]
    assert sorted(row["extra_info"]["index"] for row in made) == sorted(problems)
    for row in made:
        problem = problems[row["extra_info"]["index"]]
        *prompt, response = row["messages"]
        assert prompt == problem["prompt"]
        assert response["role"] == "assistant"
        assert not response["content"].startswith("<think>")  # the prompt ends with it
        assert {key: row[key] for key in ("data_source", "reward_model")} == {
            key: problem[key] for key in ("data_source", "reward_model")
        }
        truth = row["reward_model"]["ground_truth"]
        assert compute_score(row["data_source"], response["content"], truth)["score"] == 1
        assert (row["extra_info"]["style"] == "first_try") <= (row["extra_info"]["tries"] == 0)
    assert set(manifest["files"]) == {"train.parquet", "held_out.parquet"}
    assert sum(manifest["traces"]["styles"].values()) == pytest.approx(1, abs=1e-3)


def profile_of(recipe):
    """The prompt and the reward's profile of a recipe, from its file alone."""
    node = OmegaConf.load(CONFIGS / "recipe" / f"{recipe}.yaml")
    chosen = {key: name for each in node.defaults if OmegaConf.is_dict(each) for key, name in each.items()}
    reward = OmegaConf.load(CONFIGS / "reward" / f"{chosen['override /reward']}.yaml")
    return chosen["override /prompt"], reward.custom_reward_function.reward_kwargs.profile


RECIPES = ["tinyzero_ppo", "mini_r1", "datawhale_r1"]  # the others take one of these, or the tiny set's
OTHERS = ("tinyzero_instruct", "tinyzero_base_bos", "chat", "chat_thinking")
PROFILE = dict.fromkeys(OTHERS, "tinyzero") | dict(map(profile_of, RECIPES))


@pytest.mark.parametrize(
    "prompt",
    [
        each if each in ("tinyzero_base", "datawhale_r1") else pytest.param(each, marks=pytest.mark.slow)
        for each in options("prompt")
    ],
)
def test_each_prompts_responses_are_paid_in_full_by_its_recipe(monkeypatch, tmp_path, prompt):
    prepare(tmp_path / "data", f"prompt={prompt}", "train_size=30", "test_size=4", "annotate=no")
    language = "language=zh" if prompt == "datawhale_r1" else "language=en"
    tokenizer = f"tokenizer={quoted(TINY)}"
    run(monkeypatch, tmp_path / "data", tmp_path / "out", language, "held_out_share=0", tokenizer)
    profile = PROFILE[prompt]
    for row in rows(tmp_path / "out/train.parquet"):
        truth, response = row["reward_model"]["ground_truth"], row["messages"][-1]["content"]
        verdict = compute_score(row["data_source"], response, truth, profile=profile)
        assert verdict["score"] == sum(PROFILES[profile].weights.values())


@pytest.mark.slow
def test_a_prompt_that_does_not_open_the_thought_gets_a_response_that_does(monkeypatch, tmp_path):
    one_message = 'prompt.messages=[{role: user, content: "{numbers} to {target}"}]'
    prepare(tmp_path / "data", one_message, "train_size=20", "test_size=4")
    run(monkeypatch, tmp_path / "data", tmp_path / "out", "held_out_share=0")
    for row in rows(tmp_path / "out/train.parquet"):
        response = row["messages"][-1]["content"]
        assert response.startswith("<think>")
        assert compute_score("x", response, row["reward_model"]["ground_truth"])["score"] == 1


def test_a_tokenizers_own_template_is_asked_whether_it_opens_the_thought(tmp_path):
    prompt = OmegaConf.to_container(cli.compose("render", ["prompt=chat_thinking", "tokenizer=x"]).prompt)
    with pytest.raises(UserError, match="name a tokenizer with tokenizer=PATH"):
        traces.opening(prompt, None)
    tokenizer = chatml.save(tmp_path)
    assert traces.opening(prompt, str(tmp_path)) == "<think>"
    tokenizer.chat_template += "{% if enable_thinking %}<think>\n{% endif %}"
    tokenizer.save_pretrained(tmp_path)
    assert traces.opening(prompt, str(tmp_path)) == ""
    assert traces.opening(prompt | {"template_options": {}}, str(tmp_path)) == "<think>"


@pytest.mark.slow
def test_workers_do_not_change_a_byte_and_another_seed_does(monkeypatch, tmp_path, data):
    monkeypatch.setattr(traces, "CHUNK", 30)
    made = [
        run(monkeypatch, data, tmp_path / f"{i}", "count=300", f"seed={seed}", f"workers={workers}")
        for i, (workers, seed) in enumerate([(1, 0), (2, 0), (1, 1)])
    ]
    one, two, other = (each["files"] for each in made)
    assert one == two
    assert other["train.parquet"] != one["train.parquet"]


def test_no_numbers_of_a_test_set_or_of_the_held_out_file_are_in_the_training_file(monkeypatch, tmp_path, data):
    run(monkeypatch, data, tmp_path / "out", "held_out_share=0.3")
    train, held_out = (multisets(tmp_path / "out" / f"{name}.parquet") for name in ("train", "held_out"))
    assert train
    assert held_out
    assert not train & held_out
    assert not (train | held_out) & multisets(data / "test.parquet")


@pytest.mark.slow
def test_problems_that_a_recipes_split_shares_with_its_test_set_are_left_out(monkeypatch, tmp_path):
    numbers = [[i % 20 + 1, 2, 3] for i in range(30)]
    source = write_source(tmp_path / "s.parquet", numbers, [a + 5 for a, _, _ in numbers])
    split = ("split=tinyzero", "split.train=20", "split.test=5")
    prepare(tmp_path / "data", "source=local", f"source.paths={source}", *split)
    manifest = run(monkeypatch, tmp_path / "data", tmp_path / "out")
    shared = multisets(tmp_path / "data/test.parquet")
    assert manifest["traces"]["skipped"]["in_a_test_set"] == 5
    assert not multisets(tmp_path / "out/train.parquet") & shared


@pytest.mark.parametrize("annotate", [pytest.param(True, marks=pytest.mark.slow), False])
def test_unsolvable_problems_are_left_out_and_counted(monkeypatch, tmp_path, annotate):
    numbers = [[a, a + 1] for a in range(1, 41)]
    source = write_source(tmp_path / "s.parquet", numbers, [a + b if a % 2 else 999 for a, b in numbers])
    options = ("source=local", f"source.paths={source}", "test_size=1", f"annotate={annotate}")
    prepare(tmp_path / "data", *options)
    made = run(monkeypatch, tmp_path / "data", tmp_path / "out", "held_out_share=0")
    solvable = sum(sum(truth["numbers"]) == truth["target"] for truth in truths_of(tmp_path / "data/train.parquet"))
    assert made["files"]["train.parquet"]["rows"] == solvable
    total = len(rows(tmp_path / "data/train.parquet"))
    assert made["traces"]["skipped"] == {"unsolvable": total - solvable}


def test_traces_of_data_that_is_made_anew_meanwhile_are_not_written(monkeypatch, tmp_path, data):
    opened, times = traces.opened, iter(range(9))
    monkeypatch.setattr(traces, "opened", lambda folder: opened(folder) | ({"files": {}} if next(times) else {}))
    with pytest.raises(UserError, match=f"data={data} was made anew meanwhile"):
        run(monkeypatch, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def truths_of(path):
    return [row["reward_model"]["ground_truth"] for row in rows(path)]


def test_more_traces_than_problems_are_several_different_ones_a_problem(monkeypatch, tmp_path, data):
    run(monkeypatch, data, tmp_path / "out", "count=700", "held_out_share=0")
    made = [
        (row["extra_info"]["index"], row["messages"][-1]["content"]) for row in rows(tmp_path / "out/train.parquet")
    ]
    assert len(set(made)) == len(made) == 700
    times = [sum(index == each for index, _ in made) for each in range(200)]
    assert set(times) == {3, 4}


@pytest.mark.slow
def test_shares_of_styles_are_relative_and_the_tries_are_bounded(monkeypatch, tmp_path, data):
    styles = "styles={first_try: 0, search: 0.5, search_with_backtracking: 0}"
    manifest = run(monkeypatch, data, tmp_path / "out", styles, "most=3", "held_out_share=0")
    assert manifest["traces"]["styles"] == {"first_try": 0, "search": 1, "search_with_backtracking": 0}
    assert {row["extra_info"]["tries"] for row in rows(tmp_path / "out/train.parquet")} == {1, 2, 3}


@pytest.mark.slow
def test_no_response_has_more_tokens_than_allowed(monkeypatch, tmp_path, data):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    options = (f"tokenizer={TINY}", "held_out_share=0", "count=150")
    free, bounded, tight = (
        run(monkeypatch, data, tmp_path / name, *options, f"max_tokens={most}")["traces"]
        for name, most in (("free", "null"), ("bounded", 220), ("tight", 150))
    )
    for name, most in (("bounded", 220), ("tight", 150)):
        lengths = [
            len(tokenizer(each + tokenizer.eos_token)["input_ids"])
            for each in responses(tmp_path / name / "train.parquet")
        ]
        assert max(lengths) <= most
    assert free["tokens"]["most"] > 220 >= bounded["tokens"]["most"]
    assert bounded["wrong_tries"] < free["wrong_tries"]
    assert tight["skipped"]["too_long"] > 0  # even without a wrong try
    assert len(responses(tmp_path / "tight" / "train.parquet")) + tight["skipped"]["too_long"] == 150


def test_the_same_command_again_does_nothing_and_another_replaces_the_folder(monkeypatch, tmp_path, data, capsys):
    first = run(monkeypatch, data, tmp_path / "out")
    assert "\n\nsearch_with_backtracking, " in capsys.readouterr().out
    again = run(monkeypatch, data, tmp_path / "out")
    assert "already there" in capsys.readouterr().out
    assert first == again
    assert run(monkeypatch, data, tmp_path / "out", "seed=1")["files"] != first["files"]
    assert hashes(tmp_path / "out").keys() == {"train.parquet", "held_out.parquet"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=nowhere"], "data=nowhere: there is no such folder; python -m data_prep out=nowhere makes one"),
        (["data=configs"], "data=configs holds no problems of data_prep"),
        (["out=configs"], "configs exists and was not written by data_prep"),
        (["max_tokens=100"], "max_tokens=100 needs tokenizer=PATH"),
        (["tokenizer=configs"], "the tokenizer of configs cannot be loaded"),
        (["max_tokens=20", f"tokenizer={TINY}"], "no trace fits: all 200 are longer; raise max_tokens"),
        (["styles={first_try: 0, search: 0, search_with_backtracking: 0}"], "one of the shares should be greater"),
        (["+styles.guess=1"], "styles.guess=1: there is no such key"),
        (["styles.search=-1"], "styles.search=-1: should be greater than or equal to 0"),
        (["language=fr"], "language=fr: should be 'en' or 'zh'"),
        (["count=0"], "count=0: should be greater than or equal to 1"),
        (["held_out_share=1"], "held_out_share=1: should be less than 1"),
        (["held_out_share=0.9999"], "all traces are held out; lower held_out_share"),
        (["stop=0"], "stop=0: should be greater than 0"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_line(monkeypatch, tmp_path, data, overrides, message):
    monkeypatch.chdir(CONFIGS.parent)
    monkeypatch.setattr(sys, "argv", ["traces", f"data={quoted(data)}", f"out={quoted(tmp_path / 'out')}", *overrides])
    with pytest.raises(UserError) as error:
        traces.main()
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_folders_of_something_else_are_neither_read_nor_replaced(monkeypatch, tmp_path, data):
    with pytest.raises(UserError, match="is the folder of the problems"):
        run(monkeypatch, data, data)
    prepare(tmp_path / "other", "train_size=20", "test_size=4", "annotate=no")
    with pytest.raises(UserError, match="holds problems and no traces"):
        run(monkeypatch, data, tmp_path / "other")
    run(monkeypatch, data, tmp_path / "out")
    with pytest.raises(UserError, match="holds no problems of data_prep"):
        run(monkeypatch, tmp_path / "out", tmp_path / "again")
    (tmp_path / "out/notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match=r"notes\.txt in it was not written by data_prep"):
        run(monkeypatch, data, tmp_path / "out", "seed=1")
    (tmp_path / "other/train.parquet").write_bytes((data / "train.parquet").read_bytes())
    with pytest.raises(UserError, match=r"train\.parquet is not the file that manifest\.json records"):
        run(monkeypatch, tmp_path / "other", tmp_path / "again")


def compose():
    return cli.compose("traces", [], folder=CONFIGS / "commands")


@pytest.mark.slow
@settings(max_examples=60)
@given(st.sampled_from([*TracesKeys.model_fields, *(f"styles.{style}" for style in STYLES)]), VALUES)
def test_any_value_of_any_key_is_valid_or_refused_in_one_line_that_names_it(key, value):
    cfg, said = compose(), ""
    OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    try:
        with cli.in_one_line():
            cli.check(cfg, TracesKeys)
    except UserError as error:
        said = str(error).removeprefix("error: ")
    assert "\n" not in said
    assert not said or re.search(rf"(^|; ){re.escape(key)}[=:.]", said)


@pytest.mark.slow
def test_help_shows_the_keys_and_a_refusal_is_one_line_on_the_screen(tmp_path):
    command = [sys.executable, "-m", "data_prep.traces"]
    shown = subprocess.run([*command, "--help"], cwd=CONFIGS.parent, capture_output=True, text=True, check=True).stdout
    assert "styles.search_with_backtracking" in shown
    refused = subprocess.run([*command, f"data={tmp_path}/x"], cwd=CONFIGS.parent, capture_output=True, text=True)
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1


def test_traces_leave_out_the_numbers_of_sets_out_of_distribution_too(tmp_path):
    truth = {"ground_truth": {"numbers": [1, 50, 60], "target": 7}}
    pq.write_table(pa.table({"reward_model": [truth]}), tmp_path / "ood_far.parquet")
    assert hash_numbers(*padded([[1, 50, 60]]))[0] in traces.hashes_of_tests(tmp_path)
