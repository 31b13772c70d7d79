"""The rule-based reward of Countdown: is the response's equation well formed, and is it right?

One example, as the tiny model writes it (the prompt ends with "<think>", so a response begins inside the thought):

    11+18=29,29-25=4 no
    11*18=198,198-25=173 no</think>
    <answer> (18 - 11) * 25 </answer>

For the numbers [11, 18, 25] and the target 175 this scores 1.0; for another target 0.1, as it is well formed and
wrong; without the answer block, or with `2**3` in it, 0.0.

Grammar. A response begins inside the thought, which ends at `</think>`; a later `<think>` opens it again. The answer
is the last `<answer>...</answer>` that lies outside the thought. It holds one expression and nothing else: decimal
integers without leading zeros, + - * /, unary + and -, parentheses, ASCII white space and line breaks; at most
MAX_EXPRESSION characters. A right expression uses each given number exactly once and has exactly the target's value,
in rational arithmetic.

Cost is linear in the length of the response, and nothing in it is evaluated as code. Arithmetic happens only after
the literals were found to be the given numbers, so no value can grow large.
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

MAX_EXPRESSION = 1000
WRONG_SCORE = 0.1  # well formed but wrong, as in TinyZero (Jiayi-Pan/TinyZero, verl/utils/reward_score/countdown.py)

_TAG = re.compile(r"<(/?)(think|answer)>")
_TOKEN = re.compile(r"[ \t\r\n]*(?:(0|[1-9][0-9]*)(?![0-9])|([-+*/()]))")
_PRECEDENCE = {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2, "u+": 3, "u-": 3}


def extract_answer(response: str) -> str | None:
    """The text of the answer block that counts (see the grammar above), or None where there is none.

    >>> extract_answer("3+4=7 no</think><answer>1+2</answer> or <answer>3+4</answer>")
    '3+4'
    >>> extract_answer("<answer>1+2</answer> still thinking") is None
    True
    """
    in_thought, opened, answer = True, None, None
    for tag in _TAG.finditer(response):
        closing, name = tag.groups()
        if name == "think":
            in_thought, opened = not closing, None
        elif not in_thought:
            if closing and opened is not None:
                answer = response[opened : tag.start()]
            opened = None if closing else tag.end()
    return answer


def parse(expression: str) -> list[int | str] | None:
    """The expression in postfix order (integers, "+", "-", "*", "/", unary "u+" and "u-"), or None if it is not one.

    Dijkstra's shunting yard: one pass, no recursion, no arithmetic.

    >>> parse("(1 + 2) / -3")
    [1, 2, '+', 3, 'u-', '/']
    >>> parse("2 ** 3") is None
    True
    """
    if len(expression) > MAX_EXPRESSION:
        return None
    output: list[int | str] = []
    stack: list[str] = []
    text = expression.rstrip(" \t\r\n")
    position, operand_next = 0, True
    while position < len(text):
        token = _TOKEN.match(text, position)
        if token is None:
            return None
        position = token.end()
        number, operator = token.groups()
        if number:
            if not operand_next:
                return None
            output.append(int(number))
            operand_next = False
        elif operator == "(":
            if not operand_next:
                return None
            stack.append("(")
        elif operator == ")":
            if operand_next:
                return None
            while stack and stack[-1] != "(":
                output.append(stack.pop())
            if not stack:
                return None
            stack.pop()
        elif operand_next:
            if operator in "*/":
                return None
            stack.append("u" + operator)
        else:
            while stack and _PRECEDENCE[stack[-1]] >= _PRECEDENCE[operator]:
                output.append(stack.pop())
            stack.append(operator)
            operand_next = True
    if operand_next or "(" in stack:
        return None
    return output + stack[::-1]


def evaluate(postfix: list[int | str]) -> Fraction | None:
    """The exact value of what `parse` returned, or None where it divides by zero."""
    stack: list[Fraction] = []
    for item in postfix:
        if isinstance(item, int):
            stack.append(Fraction(item))
        elif item == "u-":
            stack.append(-stack.pop())
        elif item != "u+":
            right, left = stack.pop(), stack.pop()
            if item == "/":
                if right == 0:
                    return None
                stack.append(left / right)
            else:
                stack.append(left + right if item == "+" else left - right if item == "-" else left * right)
    return stack.pop()


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Mapping[str, Any],
    extra_info: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, float]:
    """The verdict on one response, as verl 0.9.1 calls it (`reward.custom_reward_function`).

    Args:
        data_source: name of the data set; not used.
        solution_str: the response alone, decoded without special tokens.
        ground_truth: `numbers` (list, tuple or array of positive integers) and `target` (integer).
        extra_info, kwargs: not used; verl passes them.

    Returns:
        Always the same keys: `score` (1.0 right, 0.1 well formed and wrong, 0.0 otherwise), `acc` and `format`
        (0.0 or 1.0).

    Raises:
        ValueError: the ground truth is malformed. No response raises anything.
    """
    try:
        numbers = sorted(int(number) for number in ground_truth["numbers"])
        target = int(ground_truth["target"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"ground truth must hold `numbers` and `target`, got {ground_truth!r} for {data_source!r}"
        ) from error
    answer = extract_answer(solution_str)
    postfix = None if answer is None else parse(answer)
    if postfix is None:
        return {"score": 0.0, "acc": 0.0, "format": 0.0}
    uses_the_numbers = sorted(item for item in postfix if isinstance(item, int)) == numbers
    right = uses_the_numbers and evaluate(postfix) == target
    return {"score": 1.0 if right else WRONG_SCORE, "acc": float(right), "format": 1.0}
