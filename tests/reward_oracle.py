"""Another way to the same verdict, for tests: slow, by regular expressions and Python's own parser."""

import ast
import math
import re
from fractions import Fraction

from reward_score.countdown import COMPONENTS, compute_score
from reward_score.grammar import MAX_EXPRESSION, REASONS

TRUTHS = [{"numbers": [11, 18, 25], "target": 175}, {"numbers": [2, 3], "target": 6}]
ALL = dict.fromkeys(COMPONENTS, 0.0)
KEYS = {"score", "reason", *COMPONENTS, *(f"reason/{name}" for name in REASONS)}
WIDER = ("equals_target", "unicode_signs", "latex_fractions", "subset")  # whatever is right without them stays right
SIGNS = {ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b}


def answer_of(response, answer_in_thought):
    """The text of the block that counts: the last one, in what lies outside the thoughts unless the option is on."""
    if answer_in_thought:
        found = re.findall(r"<answer>((?:(?!</?(?:answer|think)>).)*)</answer>", response, re.DOTALL)
        return found[-1] if found else None
    pieces = re.split("(</?think>)", response)
    outside = [text for tag, text in zip(pieces[1::2], pieces[2::2], strict=True) if tag == "</think>"]
    blocks = [re.findall(r"<answer>((?:(?!</?answer>).)*)</answer>", text, re.DOTALL) for text in outside]
    return next((found[-1] for found in reversed(blocks) if found), None)


def value_of(node, numbers):
    """The exact value of a node of Python's, its literals added to `numbers`; ValueError where it has no place here."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        numbers.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = value_of(node.operand, numbers)
        return value if value is None or isinstance(node.op, ast.UAdd) else -value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div):
        left, right = value_of(node.left, numbers), value_of(node.right, numbers)
        if left is None or right is None:
            return None
        if isinstance(node.op, ast.Div):
            return left / right if right else None
        return SIGNS[type(node.op)](left, right)
    raise ValueError("not of this grammar")


def reason_of(response, truth, answer_in_thought=False):
    """The reason as Python's parser sees it; None where it cannot tell (it gives up on deep nesting)."""
    answer = answer_of(response, answer_in_thought)
    if answer is None:
        return "no_answer"
    if len(answer) > MAX_EXPRESSION:
        return "too_long"
    if re.search(r"[^-+*/()0-9 \t\n\r\v\f]|(?<![0-9])0[0-9]", answer):
        return "syntax"
    numbers = []
    try:
        value = value_of(ast.parse(re.sub(r"\s", " ", answer).strip(), mode="eval").body, numbers)
    except (RecursionError, MemoryError):
        return None
    except SyntaxError as error:
        return None if "nested" in str(error) else "syntax"
    except ValueError as error:
        return None if "digits" in str(error) else "syntax"
    if sorted(numbers) != truth["numbers"]:
        return "wrong_numbers"
    return "division_by_zero" if value is None else "right" if value == truth["target"] else "wrong_value"


def check(response):
    """All that must hold of the verdict on any response."""
    for truth in TRUTHS:
        scored = compute_score("countdown", response, truth, weights=ALL)
        assert scored.keys() == KEYS
        assert all(math.isfinite(value) for name, value in scored.items() if name != "reason")
        assert reason_of(response, truth) in (None, scored["reason"]), (response, scored)
        anywhere = compute_score("countdown", response, truth, answer_in_thought=True)
        assert reason_of(response, truth, answer_in_thought=True) in (None, anywhere["reason"]), (response, anywhere)
        for option in WIDER:
            wider = compute_score("countdown", response, truth, **{option: True})
            assert wider["acc"] >= scored["acc"], (response, option)
            assert wider["format"] >= scored["format"], (response, option)
