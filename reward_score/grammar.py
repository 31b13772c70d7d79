"""The grammar of a response: where the thought ends, which answer counts, what an expression is, and its exact value.

Most prompts end with "<think>", so a response begins inside the thought:

    11+18=29,29-25=4 no
    11*18=198,198-25=173 no</think>
    <answer> (18 - 11) * 25 </answer>

A response to another prompt may open its thought itself, which changes nothing.

1. A thought ends at `</think>`; a later `<think>` opens another.
2. A block is `<answer>`, text without one of the four tags, `</answer>`, all outside a thought. The last block counts.
3. It holds at most MAX_EXPRESSION characters and one expression, with white space around any sign or number:

    expression = term { ("+" | "-") term }
    term       = factor { ("*" | "/") factor }
    factor     = { "+" | "-" } ( number | "(" expression ")" )
    number     = "0" | ("1" | ... | "9") { "0" | ... | "9" }

   White space is ASCII's: space, tab, line feed, carriage return, vertical tab, form feed.
4. The expression uses each given number exactly once.
5. Its value, in rational arithmetic, is the target.

Tags are these very characters: lower case, no white space. A response that breaks a rule is refused under one reason,
that of the first rule it breaks: `no_answer` (1, 2), `too_long` and `syntax` (3), `wrong_numbers` (4),
`division_by_zero` and `wrong_value` (5).

Cost is linear in the length of the response. Nothing is evaluated as code, nothing recurses, and arithmetic begins only
after the literals were found to be the given numbers, so no value can grow large.

Five options widen these rules, all off by default. TinyZero's scorer has the first; none of the published ones has
another:

    answer_in_thought  (rule 2) a block counts inside a thought too, and so in a response without any `</think>`
    equals_target      (3) the expression may be followed by "=" and the target
    unicode_signs      (3) × ÷ − and the full-width ＋ － ＊ ／ （ ） ＝ stand for the ASCII signs
    latex_fractions    (3) \\frac{a}{b}, also \\dfrac and \\tfrac, stands for ((a) / (b))
    subset             (4) each given number is used at most once (the television game)
"""

import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

MAX_EXPRESSION = 1000
OPTIONS = ("answer_in_thought", "equals_target", "unicode_signs", "latex_fractions", "subset")
REASONS = ("no_answer", "too_long", "syntax", "wrong_numbers", "division_by_zero", "wrong_value")
NOT_AN_EXPRESSION = frozenset({"no_answer", "too_long", "syntax"})

WHITE_SPACE = " \t\n\r\v\f"
_TAG = re.compile(r"<(?:think|/think|answer|/answer)>")
SIGNS = str.maketrans("×÷−＋－＊／（）＝", "*/-+-*/()=")
_NUMBER_OR_SIGN = r"\s*(?:(0|[1-9][0-9]*)(?![0-9])|([-+*/()]"
_TOKEN = re.compile(_NUMBER_OR_SIGN + "))", re.ASCII)
_LATEX_TOKEN = re.compile(_NUMBER_OR_SIGN + r"|\\[dt]?frac\{|\}\{|\}))", re.ASCII)
_PRECEDENCE = {"(": 0, "\\frac{": 0, "}{": 0, "+": 1, "-": 1, "*": 2, "/": 2, "u+": 3, "u-": 3}
_OPENING = {")": "(", "}{": "\\frac{", "}": "}{"}


class ExpressionError(ValueError):
    """The text is no expression; `position` is the index of the character that shows it."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.position = position


class Verdict(NamedTuple):
    """What was found in a response.

    `reason` is "right" or one of REASONS; `thought_end` the index of the first `</think>`, None if there is none;
    `answer` the start and end of the text of the block that counts; `value` that of the expression, if it uses the
    right numbers and has one.
    """

    reason: str
    thought_end: int | None = None
    answer: tuple[int, int] | None = None
    value: int | Fraction | None = None


def find_answer(response: str, *, answer_in_thought: bool = False) -> tuple[int | None, tuple[int, int] | None]:
    """The index of the first `</think>`, and the start and end of the text in the block that counts (rules 1 and 2).

    >>> response = "3+4=7 no</think><answer>1+2</answer> or <answer>3+4</answer>"
    >>> thought_end, (start, end) = find_answer(response)
    >>> response[:thought_end], response[start:end]
    ('3+4=7 no', '3+4')
    >>> find_answer("<answer>1+2</answer> still thinking")
    (None, None)
    >>> find_answer("<answer>1+2</answer> still thinking", answer_in_thought=True)
    (None, (8, 11))
    """
    closed = response.find("</think>")
    thought_end = closed if closed >= 0 else None
    if thought_end is None and not answer_in_thought:
        return None, None
    in_thought, opened, answer = False, None, None
    for tag in _TAG.finditer(response, 0 if answer_in_thought else closed):
        name = tag[0]
        if name == "<answer>":
            opened = None if in_thought else tag.end()
        elif name == "</answer>":
            if opened is not None:
                answer = opened, tag.start()
            opened = None
        else:
            in_thought, opened = name == "<think>" and not answer_in_thought, None
    return thought_end, answer


def _no_token(text: str, position: int) -> ExpressionError:
    """The error of a text that has no token of an expression at a position."""
    position = len(text) - len(text[position:].lstrip(WHITE_SPACE))
    if text[position] == "0":
        return ExpressionError("a number begins with 0", position)
    return ExpressionError(f"{text[position]!r} has no place in an expression", position)


def parse(
    text: str, *, target: int = 0, equals_target: bool = False, unicode_signs: bool = False, latex: bool = False
) -> list[int | str]:
    """An expression (rule 3) in postfix order: integers, "+", "-", "*", "/", unary "u+" and "u-".

    Dijkstra's shunting yard: one pass, no recursion, no arithmetic.

    >>> parse("(1 + 2) / -3")
    [1, 2, '+', 3, 'u-', '/']

    Raises:
        ExpressionError: the text is something else.
    """
    text = text.translate(SIGNS) if unicode_signs else text
    if equals_target:
        head, _, tail = text.partition("=")
        if tail.strip(WHITE_SPACE) == str(target):
            text = head
    match_token = (_LATEX_TOKEN if latex else _TOKEN).match
    output: list[int | str] = []
    stack: list[str] = []
    text = text.rstrip(WHITE_SPACE)
    position, operand_next = 0, True
    while position < len(text):
        token = match_token(text, position)
        if token is None:
            raise _no_token(text, position)
        number, sign = token.groups()
        opens = number or sign == "(" or sign[0] == "\\"
        if operand_next != bool(opens) and not (operand_next and sign in ("+", "-")):
            expected, found = "a number or a parenthesis" if operand_next else "a sign", number or sign
            raise ExpressionError(f"{expected} was expected, not {found!r}", token.end() - len(found))
        position = token.end()
        if number:
            output.append(int(number))
            operand_next = False
        elif opens:
            stack.append("(" if sign == "(" else "\\frac{")
        elif sign in _OPENING:
            while stack and _PRECEDENCE[stack[-1]]:
                output.append(stack.pop())
            if not stack or stack.pop() != _OPENING[sign]:
                raise ExpressionError(f"{sign!r} closes nothing", position - len(sign))
            if sign == "}{":
                stack.append(sign)
                operand_next = True
            elif sign == "}":
                output.append("/")
        elif operand_next:
            stack.append("u" + sign)
        else:
            while stack and _PRECEDENCE[stack[-1]] >= _PRECEDENCE[sign]:
                output.append(stack.pop())
            stack.append(sign)
            operand_next = True
    if operand_next:
        raise ExpressionError("it ends where a number is expected", len(text))
    if any(not _PRECEDENCE[sign] for sign in stack):
        raise ExpressionError("a parenthesis is not closed", len(text))
    return output + stack[::-1]


def evaluate(postfix: Sequence[int | str]) -> int | Fraction | None:
    """The exact value of what `parse` returned, or None if it divides by zero.

    >>> evaluate(parse("8 / (3 - 8/3)"))
    Fraction(24, 1)
    """
    stack: list[int | Fraction] = []
    for item in postfix:
        if isinstance(item, int):
            stack.append(item)
        elif item == "u-":
            stack.append(-stack.pop())
        elif item != "u+":
            right, left = stack.pop(), stack.pop()
            if item == "/":
                if right == 0:
                    return None
                stack.append(Fraction(left) / right)
            else:
                stack.append(left + right if item == "+" else left - right if item == "-" else left * right)
    return stack.pop()


def judge(
    response: str,
    numbers: Sequence[int],
    target: int,
    *,
    answer_in_thought: bool = False,
    equals_target: bool = False,
    unicode_signs: bool = False,
    latex_fractions: bool = False,
    subset: bool = False,
) -> Verdict:
    """The verdict on a response; OPTIONS are explained above.

    Args:
        numbers: the given numbers, in any order.

    >>> judge("</think><answer>(18-11)*25</answer>", [11, 18, 25], 175)
    Verdict(reason='right', thought_end=0, answer=(16, 26), value=175)
    """
    thought_end, answer = find_answer(response, answer_in_thought=answer_in_thought)
    if answer is None:
        return Verdict("no_answer", thought_end)
    start, end = answer
    if end - start > MAX_EXPRESSION:
        return Verdict("too_long", thought_end, answer)
    try:
        postfix = parse(
            response[start:end],
            target=target,
            equals_target=equals_target,
            unicode_signs=unicode_signs,
            latex=latex_fractions,
        )
    except ExpressionError:
        return Verdict("syntax", thought_end, answer)
    used = sorted(item for item in postfix if isinstance(item, int))
    numbers = sorted(numbers)
    if used != numbers and not (subset and Counter(used) <= Counter(numbers)):
        return Verdict("wrong_numbers", thought_end, answer)
    value = evaluate(postfix)
    if value is None:
        return Verdict("division_by_zero", thought_end, answer)
    return Verdict("right" if value == target else "wrong_value", thought_end, answer, value)
