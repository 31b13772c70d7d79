"""Our profiles beside the scorers whose rewards they repeat, on ten thousand responses.

The published rules are written again here as plainly as they are there: Jiayi-Pan/TinyZero at commit b19c457,
verl/utils/reward_score/countdown.py; philschmid/deep-learning-pytorch-huggingface at 59b3797,
training/scripts/run_r1_grpo.py (mini-r1); datawhalechina/unlock-deepseek at 83de91b,
Datawhale-R1/train_Datawhale-R1.py, as published with the article, and at 9ece4b3, as corrected. They use `eval`, so no
response here holds two powers.
"""

import random
import re
from collections import Counter

import pytest

from data_prep.cli import CONFIGS
from reward_score.countdown import compute_score
from reward_score.grammar import MAX_EXPRESSION, find_answer
from reward_score.profiles import PROFILES

# --- the published rules; each finds the start and end of its answer's text -----------------------------------------


def tinyzero_answer(response):
    start_of_line = response.rfind("\n") + 1
    matches = list(re.finditer(r"<answer>(.*?)</answer>", response[start_of_line:]))
    return tuple(start_of_line + place for place in matches[-1].span(1)) if matches else None


def first_answer(response):
    match = re.search(r"<answer>(.*?)<\/answer>", response)
    return match.span(1) if match else None


def published_value(text, numbers):
    """What their eval makes of an answer, None where they refuse it."""
    text = text.strip()
    if sorted(int(n) for n in re.findall(r"\d+", text)) != sorted(numbers):
        return None
    if not re.match(r"^[\d+\-*/().\s]+$", text):
        return None
    try:
        return float(eval(text, {"__builtins__": None}, {}))
    except Exception:
        return None


def published_equation(response, answer, numbers, target):
    value = None if answer is None else published_value(response[slice(*answer)], numbers)
    return value is not None and abs(value - target) < 1e-5


def tinyzero(response, numbers, target):
    answer = tinyzero_answer(response)
    return 0.0 if answer is None else 1.0 if published_equation(response, answer, numbers, target) else 0.1


LAYOUT = r"^<think>([^<]*(?:<(?!/?think>)[^<]*)*)<\/think>\n<answer>([\s\S]*?)<\/answer>$"


def published_layout(response):
    return float(re.search(LAYOUT, "<think>" + response, re.DOTALL) is not None)


def published_length(response):
    match = re.search(r"<think>(.*?)</think>", "<think>" + response)
    return float(match is not None and len(match.group(1).strip()) > 1000)


def mini_r1(response, numbers, target):
    return published_layout(response) + published_equation(response, first_answer(response), numbers, target)


def datawhale_r1_article(response, numbers, target):
    return mini_r1(response, numbers, target) + published_length(response)


PUBLISHED = {
    "tinyzero": (tinyzero, tinyzero_answer),
    "mini_r1": (mini_r1, first_answer),
    "datawhale_r1": (mini_r1, first_answer),
    "datawhale_r1_article": (datawhale_r1_article, first_answer),
}

# --- every case in which ours differs, with an example: numbers 2, 3, 6 unless said ---------------------------------

END = "</think>\n"
DIFFERENCES = {  # name in docs/reward.md: (profile, response, target, theirs, ours)
    "a thought that never ends": ("mini_r1", "so <answer>2+3+6</answer>", 11, 1.0, 0.0),
    "a block inside the thought": ("mini_r1", f"<answer>2+3+6</answer>{END}<answer>2*3+6</answer>", 11, 2.0, 1.0),
    "several blocks after the thought": ("mini_r1", f"{END}<answer>2+3+6</answer><answer>2*3+6</answer>", 12, 1.0, 2.0),
    "a line break after the block": ("tinyzero", f"{END}<answer>2+3+6</answer>\n", 11, 0.0, 1.0),
    "a line break inside the block": ("mini_r1", f"{END}<answer>\n2+3+6\n</answer>", 11, 1.0, 2.0),
    "a tag inside the block": ("tinyzero", f"{END}<answer>so <answer>2+3+6</answer>", 11, 0.1, 1.0),
    "** or //": ("tinyzero", f"{END}<answer>2**3-6</answer>", 2, 1.0, 0.1),
    "a decimal point": ("tinyzero", f"{END}<answer>1.5*2</answer>", 3, 1.0, 0.1),
    "white space beyond ASCII's": ("mini_r1", f"{END}<answer>\u30002+3+6</answer>", 11, 2.0, 1.0),
    "a vertical tab or a carriage return between signs": ("mini_r1", f"{END}<answer>2\v+3+6</answer>", 11, 1.0, 2.0),
    "more than 200 open parentheses": ("mini_r1", f"{END}<answer>{'(' * 201}2{')' * 201}+3+6</answer>", 11, 1.0, 2.0),
    "more than 1000 characters": ("mini_r1", f"{END}<answer>2+3+{' ' * 1000}6</answer>", 11, 2.0, 1.0),
    "a value within 0.00001 of the target": ("tinyzero", f"{END}<answer>1-1/999/998</answer>", 1, 1.0, 0.1),
    "a later thought in one line": (
        "datawhale_r1_article",
        f"\n{END}<think>{'so ' * 400}</think><answer>2+3+6</answer>",
        11,
        2.0,
        1.0,
    ),
}


NUMBERS = {"a decimal point": [1, 2, 5], "a value within 0.00001 of the target": [1, 1, 998, 999]}


def in_thought(response, place):
    tags = [tag[0] for tag in re.finditer(r"</?think>", response[:place])]
    return not tags or tags[-1] == "<think>"


def names_of(profile, response, numbers):
    """The differences that apply to a response, by properties of it alone."""
    anywhere = "answer_in_thought" in PROFILES[profile].options
    theirs, (_, ours) = PUBLISHED[profile][1](response), find_answer(response, answer_in_thought=anywhere)
    length = response.partition("</think>")
    if profile == "datawhale_r1_article" and "\n" in length[0] and "<think>" in length[2]:
        yield "a later thought in one line"
    if theirs is not None and not anywhere and in_thought(response, theirs[0]):
        yield "a block inside the thought" if "</think>" in response else "a thought that never ends"
    elif theirs is None and ours is not None:
        inside = "\n" in response[slice(*ours)]
        yield "a line break inside the block" if inside else "a line break after the block"
    elif theirs is not None and ours is not None and theirs != ours:
        inner = re.search("</?think>|<answer>", response[slice(*theirs)])
        yield "a tag inside the block" if inner else "several blocks after the thought"
    elif theirs is not None and ours is None:
        yield "a tag inside the block"
    else:
        text = response[slice(*theirs)] if theirs else ""
        for name, applies in {
            "** or //": re.search(r"\*\s*\*|/\s*/", text),
            "a decimal point": "." in text,
            "white space beyond ASCII's": text.strip() != text.strip(" \t\n\r\v\f"),
            "a vertical tab or a carriage return between signs": re.search("[\v\r]", text.strip()),
            "more than 200 open parentheses": text.count("(") > 200,
            "more than 1000 characters": len(text) > MAX_EXPRESSION,
        }.items():
            if applies:
                yield name


# --- the responses ---------------------------------------------------------------------------------------------------


def tree(rng, terms):
    """An expression of the terms in this order."""
    if len(terms) == 1:
        return rng.choice(["{}", "{}", "{}", "-{}", "({})"]).format(terms[0])
    cut, space = rng.randrange(1, len(terms)), rng.choice(["", " "])
    sides = tree(rng, terms[:cut]), tree(rng, terms[cut:])
    return rng.choice(["({})", "{}"]).format(f"{space}{rng.choice('+-*/')}{space}".join(sides))


def answer_text(rng, numbers):
    terms = rng.sample(numbers, len(numbers))
    text = tree(rng, terms)
    tricks = {
        "power": lambda: (
            re.sub(r"[-+*/]", rng.choice(["**", "//"]), tree(rng, terms[:2]), count=1).replace("-", "+")
            + "".join(f"+{n}" for n in terms[2:])
        ),
        "decimal": lambda: f"{terms[0]}.{'*'.join(map(str, terms[1:]))}",
        "missing": lambda: tree(rng, terms[1:]),
        "twice": lambda: tree(rng, [*terms, terms[0]]),
        "zero": lambda: f"0{text}",
        "equals": lambda: f"{text} = 11",
        "call": lambda: "".join(f"({n})" for n in terms),
        "open": lambda: f"({text}",
        "words": lambda: f"{text} or so",
        "empty": lambda: "",
        "digits": lambda: text.translate(str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩")),
        "wide": lambda: f"\u3000{text}",
        "tab": lambda: "\v+".join(map(str, terms)),
        "return": lambda: "\r+".join(map(str, terms)),
        "deep": lambda: "(" * 201 + text + ")" * 201,
        "long": lambda: text + " " * 1000 + f"+{terms[0]}",
        "nested": lambda: f"so <answer>{text}",
        "thinking": lambda: f"{text}</think>{text}",
        "lines": lambda: f"\n{text}\n",
    }
    return rng.choice(list(tricks.values()))() if rng.random() < 0.4 else text


def response_of(rng, numbers):
    block = f"<answer>{rng.choice(['', ' '])}{answer_text(rng, numbers)}</answer>"
    other = f"<answer>{answer_text(rng, numbers)}</answer>"
    thought = rng.choice(
        ["", "3+4=7 no ", "3+4=7 no\n3*4=12\n", "so " * 400, "let < me > see </answer>", "so <think> so "]
    )
    usual = f"{thought}</think>\n{block}"
    others = [
        f"{thought}</think> {block}",
        f"{thought}</think>\n{block}\n",
        f"{thought}</think>\n{block} I am sure.",
        f"{thought}</think>\n{block}\nI am sure.",
        f"{thought}{other}</think>\n{block}",
        f"{thought}{other}\n</think>\n{block}",
        f"{thought}{block}",
        f"{thought}{block}</think>",
        f"{thought}</think>\n{other}{block}",
        f"{thought}</think>\n{other}\n{block}",
        f"{thought}</think><think>{thought}</think>\n{block}",
        f"{thought}</think>\n<think>{block}",
        f"{thought}</think>\n{block.removesuffix('</answer>')}",
        f"{thought}</think>\n{block}</answer>",
        f"{thought}</think>\n",
        thought,
    ]
    return usual if rng.random() < 0.5 else rng.choice(others)


def cases(count=10_000):
    rng = random.Random(0)
    for _ in range(count):
        numbers = [rng.randint(1, 25) for _ in range(rng.choice([3, 4]))]
        response = response_of(rng, numbers)
        target = rng.randint(1, 100)
        answers = [response[slice(*place)] for place in (first_answer(response), find_answer(response)[1]) if place]
        texts = [
            text.replace("\v", "").replace("\n", " ").replace("(" * 201, "").replace(")" * 201, "") for text in answers
        ]
        values = [published_value(text, numbers) for text in texts]
        whole = [int(value) for value in values if value is not None and value == int(value)]
        yield response, numbers, rng.choice(whole) if whole and rng.random() < 0.8 else target


@pytest.mark.slow
@pytest.mark.parametrize("profile", PUBLISHED)
def test_ten_thousand_responses_differ_only_where_it_is_intended(profile):
    published, _ = PUBLISHED[profile]
    seen, verdicts = Counter(), Counter()
    for response, numbers, target in cases():
        theirs = published(response, numbers, target)
        ours = compute_score("", response, {"numbers": numbers, "target": target}, profile=profile)["score"]
        verdicts[theirs] += 1
        if theirs != pytest.approx(ours):
            names = list(names_of(profile, response, numbers))
            assert names, (response, numbers, target, theirs, ours)
            seen.update(names)
    assert seen.keys() <= DIFFERENCES.keys()
    assert len(seen) >= 8, seen  # the responses try them
    assert min(verdicts.values()) >= 100, verdicts


@pytest.mark.parametrize(
    ("response", "paid"),
    [
        ("so <answer>2+3+6</answer>", 1.0),
        ("so\nI try <answer> 2*3+6 </answer>", 0.1),
        ("<answer>2+3</answer>", 0.1),
        ("<answer>I do not know</answer>", 0.1),
        ("so <answer>2*3+6</answer> no, <answer>2+3+6</answer>", 1.0),
        ("so <answer>2+3+6</answer></think>", 1.0),
        ("so <answer>2+3+6</answer></think><answer>2*3+6</answer>", 0.1),
        ("so </think><think><answer>2+3+6</answer>", 1.0),
        ("so <answer>2+3+6", 0.0),
        ("2+3+6", 0.0),
    ],
)
def test_a_thought_that_never_ends_is_paid_as_tinyzeros_scorer_pays_it(response, paid):
    truth = {"numbers": [2, 3, 6], "target": 11}
    assert tinyzero(response, **truth) == paid
    assert compute_score("", response, truth, profile="tinyzero")["score"] == paid


def test_the_grammar_asks_for_a_closed_thought_unless_the_option_is_set():
    truth, response = {"numbers": [2, 3, 6], "target": 11}, "so <answer>2+3+6</answer>"
    assert compute_score("", response, truth)["reason"] == "no_answer"
    assert compute_score("", response, truth, answer_in_thought=True)["reason"] == "right"
    assert compute_score("", response, truth, profile="tinyzero", answer_in_thought=False)["reason"] == "no_answer"


@pytest.mark.slow
def test_the_layout_and_the_thought_length_are_theirs_to_the_letter():
    for response, numbers, target in cases():
        ours = compute_score("", response, {"numbers": numbers, "target": target}, profile="datawhale_r1_article")
        assert ours["layout"] == published_layout(response), response
        if "<think>" not in response:
            assert ours["thought_length"] == published_length(response), response


@pytest.mark.parametrize("name", DIFFERENCES)
def test_each_intended_difference_is_one(name):
    profile, response, target, theirs, ours = DIFFERENCES[name]
    truth = {"numbers": NUMBERS.get(name, [2, 3, 6]), "target": target}
    assert PUBLISHED[profile][0](response, **truth) == theirs
    assert compute_score("", response, truth, profile=profile)["score"] == ours


@pytest.mark.parametrize("document", ["docs/reward.md", "docs/zh/reward.md"])
def test_the_documents_list_every_intended_difference(document):
    rows = [
        line for line in (CONFIGS.parent / document).read_text(encoding="utf-8").splitlines() if line.startswith("| ")
    ]
    listed = [tuple(cell.strip(" `") for cell in row.split("|")[-4:-1]) for row in rows]
    differences = [(profile, f"{theirs:g}", f"{ours:g}") for profile, _, _, theirs, ours in DIFFERENCES.values()]
    assert [row for row in listed if row[0] in PUBLISHED] == differences
    if document == "docs/reward.md":
        assert [row.split("|")[1].strip() for row in rows if row.split("|")[1].strip() in DIFFERENCES] == [*DIFFERENCES]
