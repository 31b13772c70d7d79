"""What a response does, read from its arithmetic: the four behaviours of arXiv 2503.01307, and plain counts.

The paper (Gandhi et al., "Cognitive Behaviors that Enable Self-Improving Reasoners") has a language model count them on
Countdown. Here rules count them, so that a count can be repeated. Each rule needs a computed number beside its words:

    verification       a computed value is judged against the target ("29 no", "≠ 98", "太大"), or is computed again
    backtracking       a candidate that was refused, or missed with all numbers used, is followed by another one
    subgoal_setting    a number other than the target is asked for before it is made ("I need 54", "先凑出54")
    backward_chaining  the arithmetic starts at the target ("98 - 44 = 54", "98 = 44 + 54")

A statement is `expression = value`. A candidate is a chain of statements that uses each given number at most once; a
later statement of the chain may use the value of an earlier one. An announced check does not count, nor does a doubt
without arithmetic. docs/behaviours.md says how often the rules are right. The cost is linear in the response's length.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from reward_score.components import language, repetition
from reward_score.grammar import SIGNS, ExpressionError, evaluate, parse

Number = int | Fraction
BEHAVIOURS = ("verification", "backtracking", "subgoal_setting", "backward_chaining")
LONGEST = 200  # characters of one side of a statement; a longer one is not read, which bounds the cost
GAP = 90  # characters read after a statement, which may judge it, and before one, which may announce it

_WORDY_SIGN = re.compile(r"\\times|\\cdot|\\div|(?<=[0-9)]) ?[x·] ?(?=[0-9(])")
_RUN = re.compile(r"(?:[0-9]+(?:\.[0-9]+)?|[-+*/()= \t])+")
_BOUNDARY = re.compile(r"(?<=[0-9)])[ \t]+(?=[0-9(])")  # between two expressions side by side
_BULLET = re.compile(r"^[ \t]*[-+*][ \t]+(?=[0-9(])")
_NUMBER = re.compile(r"[ \t]*(-?[0-9]+(?:\.[0-9]+)?)")
_CLAUSE = re.compile(r"[.,;:!?\n，。；：！？、]|\b(?:so|then|thus|and)\b")

_REFUSED = (
    r"\b(?:no|nope|not|wrong|incorrect\w*|fail\w*|false|too|unused|rejected|overshoots?|miss\w*|extra|off by|short"
    r"|should be|(?:way|far) (?:above|below|over)|(?:more|less|larger|smaller|higher|lower) than|smaller|larger"
    r"|(?:below|above|away)|but the target|leaving out)\b|n't\b|≠|!=|[❌✗✘]|[×x](?! ?[0-9])|\(x\)"
    r"|不(?!用|是给)|没用|太[大小多少高低]|[大小]于|偏[大小]|超|失败|差|放弃|多了|少了|可是"
)
_ACCEPTED = (
    r"\b(?:yes|yep|ok|correct|right|match\w*|hits|exact(?:ly)?|perfect|bingo|pass|true|good|equals|the target"
    r"|target reached|the number we)\b|[✓✔✅√]|正好|正确|成功|符合|相符|没问题|可以|等于|就是|对了"
)
_VERDICT = re.compile(f"{_REFUSED}|{_ACCEPTED}", re.IGNORECASE)
_REFUSAL = re.compile(_REFUSED, re.IGNORECASE)
_NO_VERDICT = re.compile(  # the same words about something else
    r"\bno (?:\w+ )?(?:parenthes|other|more|need|trick|remain)\w*|\bnot (?:yet|only)|\bnew (?:goal|target)|目标[是变]",
    re.IGNORECASE,
)
_CHECK = re.compile(r"\b(?:check|verif|recomput|confirm|wait|really)|验|检查|核对|算错|不，", re.IGNORECASE)
_WANTED = re.compile(
    r"(?:\b(?:need|want|require|get|make|making|made|reach|aim|build|creat|obtain|find|goal|target|look|shoot|like"
    r"|has to|product)|需要|凑|得到|拼|组成|目标|想|要|有)[^0-9.;\n。；]{0,40}?([0-9]{1,9})(?![0-9])"
    r"|(?<![0-9])([0-9]{1,9})[^0-9.;,\n。；，]{0,12}"
    r"(?:must come|is (?:still )?(?:required|needed)|is the new goal|就好)",
    re.IGNORECASE,
)
_MADE = re.compile("get|make|making|made|find|obtain|得到|有")
_OPERATOR = re.compile(" ?[-+*/×÷−＋－＊／]")
_COUNT = re.compile(r" ?(?:numbers|of them|integers|个|次)")


class Statement(NamedTuple):
    """`expression = value` in a text, or value = expression (`flipped`)."""

    start: int
    end: int
    expression: str
    literals: tuple[int, ...]
    value: Number
    true: bool
    flipped: bool


class Side(NamedTuple):
    """What stands at one side of an equals sign: an expression in postfix form, or None, and the leading number."""

    text: str
    postfix: list[int | str] | None
    number: Number | None
    decimals: int


def plain_signs(text: str) -> str:
    """The text with ASCII's signs of arithmetic, every character still in its place."""
    return _WORDY_SIGN.sub(lambda sign: ("/" if "div" in sign[0] else "*").center(len(sign[0])), text.translate(SIGNS))


def read_side(text: str, left: bool) -> Side:
    """Of a text without equals signs, the expression that ends it (`left` of one) or begins it (right of one)."""
    if len(text) > LONGEST:
        return Side("", None, None, 0)
    pieces = _BOUNDARY.split(text)
    if left:
        piece, number, decimals = _BULLET.sub("", pieces[-1]), None, 0
        tries = (piece, piece.lstrip("-+*/) \t"), piece.lstrip("-+*/() \t"))
    else:
        found = _NUMBER.match(pieces[0])
        digits = found[1] if found else ""
        decimals = len(digits.partition(".")[2])
        number = None if not digits else Fraction(digits) if decimals else int(digits)
        tries = (pieces[0], pieces[0].rstrip("-+*/() \t"), digits)
    for each in tries:
        try:
            return Side("".join(each.split()), parse(each), number, decimals)
        except ExpressionError:
            continue
    return Side("", None, number, decimals)


def statements(text: str) -> Iterator[Statement]:
    """All statements of a text in their order; `a = b = c` holds two, and `3 + 4 = 7 * 2 = 14` goes on from 7.

    >>> [(each.expression, int(each.value), each.true) for each in statements("11+18=29, so 29 x 2 = 60")]
    [('11+18', 29, True), ('29*2', 60, False)]
    """
    for run in _RUN.finditer(plain_signs(text)):
        sides = list(re.finditer("[^=]+", run[0])) if "=" in run[0] else []
        for one, other in pairwise(sides):
            left, right = read_side(one[0], left=True), read_side(other[0], left=False)
            flipped = left.postfix is not None and len(left.postfix) == 1
            expression, stated = (right, left) if flipped else (left, right)
            if expression.postfix is None or len(expression.postfix) < 3:
                continue
            actual = evaluate(expression.postfix)
            value = stated.number
            if stated.postfix and not stated.decimals and (value is None or value != actual):
                value = evaluate(stated.postfix)
            if value is None:
                continue
            tolerance: Number = Fraction(1, 2 * 10**stated.decimals) if stated.decimals else 0  # 35/19 = 1.84
            yield Statement(
                run.start() + one.end() - len(one[0].lstrip()),
                run.start() + other.start() + len(other[0].rstrip("-+*/( \t")),
                expression.text,
                tuple(item for item in expression.postfix if isinstance(item, int)),
                value,
                actual is not None and abs(Fraction(actual) - value) <= tolerance,
                flipped,
            )


def wanted(text: str, numbers: Sequence[int], target: int, found: Sequence[Statement]) -> int:
    """How many numbers are asked for before they are made, and lead to the target or are made later."""
    known: set[Number] = {*numbers, *(each.value for each in found)}
    starts = {each.start: each for each in found}
    made_last = {each.value: each.start for each in found if not each.flipped}
    made_first = {each.value: each.start for each in reversed(found) if target not in each.literals}
    count = 0
    for match in _WANTED.finditer(text):
        which = 1 if match[1] else 2
        start, end = match.span(which)
        if _COUNT.match(text, end):
            continue
        goal: Number = int(match[which])
        if _OPERATOR.match(text, end):  # it begins an expression: "what is left to make is 98 - 44 = 54"
            if start not in starts or goal != target:
                continue
            goal = starts[start].value
        if goal in (0, target) or made_first.get(goal, start) < start:
            continue
        clause = _CLAUSE.split(text[max(0, match.start() - 30) : match.start()])[-1]
        if _MADE.match(match[0]) and re.search("[0-9]", clause):
            continue  # "multiply 3 and 5 to get 15"
        leads = {target - goal, target + goal, goal - target, Fraction(target) / goal, Fraction(goal) / (target or 1)}
        count += bool(leads & known) or made_last.get(goal, -1) > start
    return count


class Trace:
    """The candidates of a response, read statement by statement, and the checks on the way.

    A candidate goes on as long as a statement needs given numbers that are still unused, or a value that the candidate
    has made. `used` counts the given numbers in it, `made` its values that no later statement has used.
    """

    def __init__(self, numbers: Sequence[int], target: int) -> None:
        self.given: Counter[Number] = Counter(numbers)
        self.target = target
        self.used: Counter[Number] = Counter()
        self.made: Counter[Number] = Counter()
        self.made_of: dict[Number, Counter[Number]] = {}  # each value ever made: the given numbers in it
        self.goals: set[Number] = {target}  # what is to be made, seen from the target
        self.candidates: list[list[str]] = []
        self.dropped: list[bool] = []  # for each candidate, whether it was refused, or missed with all numbers used
        self.verification = self.backward = 0

    def starts_at_target(self, each: Statement, needed: Counter[Number]) -> bool:
        """Whether the statement reckons back from the target, or from a goal that was found that way."""
        foreign = [value for value in needed if value not in self.given and value not in self.made]
        if each.flipped and each.value == self.target:
            found = bool(foreign) or needed < self.given
        else:  # the difference between a finished candidate and the target is no start at the target
            finished = self.used == self.given and any(map(self.made.get, needed))
            found = any(map(self.goals.__contains__, foreign)) and not finished
        if found:
            self.goals.update(foreign, [each.value])
        return found

    def read(self, each: Statement, before: str, after: str) -> None:
        """One more statement, with the text that leads to it and the text that judges it."""
        needed: Counter[Number] = Counter(each.literals)
        if self.starts_at_target(each, needed):
            self.backward += 1
            return
        after = _NO_VERDICT.sub("", after)
        refused = bool(_REFUSAL.search(after))
        self.verification += bool(refused or _VERDICT.search(after))
        direct = needed & (self.given - self.used)
        rest = needed - direct
        if not self.candidates or not (rest <= self.made or any(map(self.made.get, rest))):  # nothing to go on from
            checking = bool(self.candidates) and bool(_CHECK.search(before))
            self.verification += checking
            if not checking:
                self.candidates.append([])
                self.dropped.append(False)
            direct = needed & self.given
            rest = needed - direct
            self.used, self.made = sum((self.made_of.get(value, Counter()) for value in rest), Counter()), Counter()
        self.made_of[each.value] = sum((self.made_of.get(value, Counter()) for value in rest), direct) & self.given
        self.used = (self.used + direct) & self.given
        self.made -= rest
        self.made[each.value] += 1
        self.candidates[-1].append(each.expression)
        self.dropped[-1] = refused or (self.used == self.given and each.value != self.target)


def behaviours(response: str, numbers: Sequence[int], target: int) -> dict[str, float]:
    """What a response to a Countdown problem does, up to the end of its thought.

    Returns:
        How often each of BEHAVIOURS occurs; `candidates`, and how many of them repeat an earlier one (`repeats`);
        `statements`, and how many of them are true (`true_statements`); `language_mixing`, the share of words that are
        not in the language of most; `repetition`, 1 if the end of the response is degenerate.

    >>> found = behaviours("11+18=29,29-25=4 no\\n18-11=7,7*25=175 yes</think>", [11, 18, 25], 175)
    >>> found["candidates"], found["verification"], found["backtracking"], found["true_statements"]
    (2, 2, 1, 4)
    """
    thought = response.partition("</think>")[0]
    found = list(statements(thought))
    trace = Trace(numbers, target)
    ends = [0, *(each.end for each in found)]
    starts = [*(each.start for each in found), len(thought)]
    for i, each in enumerate(found):
        before = thought[max(ends[i], each.start - GAP) : each.start] if i else ""
        trace.read(each, before, thought[each.end : min(starts[i + 1], each.end + GAP)])
    tried = [tuple(candidate) for candidate in trace.candidates]
    return {
        "verification": trace.verification,
        "backtracking": sum(
            drop and one != other for drop, (one, other) in zip(trace.dropped, pairwise(tried), strict=False)
        ),
        "subgoal_setting": wanted(thought, numbers, target, found),
        "backward_chaining": trace.backward,
        "candidates": len(tried),
        "repeats": len(tried) - len(set(tried)),
        "statements": len(found),
        "true_statements": sum(each.true for each in found),
        "language_mixing": 1 - max(language(thought, "en"), language(thought, "zh")),
        "repetition": repetition(response),
    }
