"""Traces in words: how a model that searches would write the way to a solution.

    I need 98 from 44, 19, 35.
    Start with 44 - 19 = 25. Left: 25, 35. 25 + 35 = 60, too small. 25 * 35 = 875, too large. Go back to 44, 19, 35.
    Try 44 + 35 = 79. Left: 79, 19. 79 + 19 = 98, which is the target.
    Check: 44 + 35 = 79, 79 + 19 = 98. Each number is used once.

Every equation is one step on two numbers, and true. A wrong candidate uses all numbers, or ends before a quotient that
is not whole; it misses the target. A fraction is written without blanks, 8/3, and occurs only in a solution that needs
one.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence

from data_prep.search import DRAWS, Key, Number, Step, after, expression, key_of, last_step, random_step

PHRASES: dict[str, dict[str, list[str]]] = {
    "en": {
        "need": ["I need {target} from {numbers}.", "The target is {target}, the numbers are {numbers}."],
        "start": ["Start with {}.", "First {}.", "Begin with {}."],
        "try": ["Try {}.", "Now {}.", "Next {}."],
        "then": ["Then {}.", "Then {}.", "And {}."],
        "left": ["Left: {}.", "Left: {}.", "That leaves {}."],
        "candidate": ["Try {}", "{}"],
        "another": ["Try {}", "{}", "Or {}"],
        "small": ["{}, too small.", "{}, too small.", "{}, not enough."],
        "large": ["{}, too large.", "{}, too large.", "{}, too big."],
        "broken": ["{} is not whole.", "{} is not an integer."],
        "back": ["Go back to {}.", "Go back to {}.", "Back to {}."],
        "hit": ["{}, which is the target.", "{}, that is the target.", "{}, right."],
        "check": ["Check: {steps}. Each number is used once.", "Check {expression}: {steps}. Correct."],
    },
    "zh": {
        "need": ["要用 {numbers} 得到 {target}。", "目标是 {target}，数字是 {numbers}。"],
        "start": ["先算 {}。", "先试 {}。", "从 {} 开始。"],
        "try": ["再试 {}。", "试试 {}。", "换成 {}。"],
        "then": ["再算 {}。", "然后 {}。"],
        "left": ["剩下 {}。", "剩下 {}。", "还剩 {}。"],
        "candidate": ["试 {}", "{}"],
        "another": ["试 {}", "{}", "再试 {}"],
        "small": ["{}，太小。", "{}，太小了。", "{}，偏小。"],
        "large": ["{}，太大。", "{}，太大了。", "{}，偏大。"],
        "broken": ["{} 不是整数。", "{} 除不尽。"],
        "back": ["回到 {}。", "回到 {}。", "退回 {}。"],
        "hit": ["{}，就是目标。", "{}，正好。"],
        "check": ["检验：{steps}，每个数都用了一次。", "检查 {expression}：{steps}，正确。"],
    },
}
# Between steps, between numbers, between sentences. The last also follows "<think>", so that ">" is a token's end.
JOINTS = {"en": (", ", ", ", " "), "zh": ("，", "、", "")}
STYLES = ("first_try", "search", "search_with_backtracking")

BROKEN = 0.1  # probability of a quotient that is not whole, where there is one
FIRST = 0.6  # probability that a wrong try begins with the given numbers, and not after a step of the solution
BRANCH = 3  # the most wrong tries that share a first step
SCALE = 10  # steps of wrong tries stay within this many times the target or the largest number

Say = Callable[..., str]


def phrases(language: str, rng: random.Random) -> Say:
    """A function that says something, in words drawn at random: say("left", "25, 35")."""
    return lambda key, *values, **named: rng.choice(PHRASES[language][key]).format(*values, **named)


def written(step: Step) -> str:
    """A step as an equation.

    >>> from fractions import Fraction
    >>> written((8, "/", Fraction(1, 3), 24))
    '8 / (1/3) = 24'
    """
    a, operator, b, value = step
    left, right = (f"({each})" if operator in "*/" and not isinstance(each, int) else str(each) for each in (a, b))
    return f"{left} {operator} {right} = {value}"


def miss(pool: Sequence[int], target: int, avoid: set[Key], rng: random.Random) -> tuple[str, str] | None:
    """The end of a wrong try on the last two numbers, and the phrase that refuses it; None if there is no other."""
    low, high = sorted(pool)
    if low > 1 and high % low and (high, "/", low) not in avoid and rng.random() < BROKEN:
        avoid.add((high, "/", low))
        return f"{high} / {low}", "broken"
    step = last_step(rng.sample(pool, 2), target, avoid, rng)
    if step is None:
        return None
    avoid.add(key_of(step))
    return written(step), "small" if step[3] < target else "large"


def wrong_candidate(
    numbers: Sequence[int], target: int, largest: int, avoid: set[Key], joint: str, rng: random.Random
) -> tuple[str, str] | None:
    """A wrong candidate from its first step to its last, and the phrase that refuses it."""
    for _ in range(DRAWS):
        pool, chain = list(numbers), []
        while len(pool) > 2 and (step := random_step(pool, largest, set(), rng)):
            chain.append(written(step))
            pool = after(pool, step)
        if len(pool) == 2 and (end := miss(pool, target, avoid, rng)):
            return joint.join([*chain, end[0]]), end[1]
    return None


def dead_end(
    pool: list[int], target: int, most: int, avoid: set[Key], opening: str, language: str, rng: random.Random
) -> tuple[list[str], int]:
    """A first step with a few wrong continuations.

    Args:
        pool: the numbers, two or more.
        target: what each continuation misses.
        most: the most continuations, at least 1.
        avoid: steps that were taken before; these are added.
        opening: the phrase of the first step.

    Returns:
        The sentences, the last of which goes back to the pool; how many continuations they hold, 0 if there is none.
    """
    say, joints = phrases(language, rng), JOINTS[language]
    if len(pool) == 2:
        end = miss(pool, target, avoid, rng)
        return ([say(end[1], end[0])], 1) if end else ([], 0)
    step = random_step(pool, SCALE * max(target, *pool), avoid, rng)
    if step is None:
        return [], 0
    avoid.add(key_of(step))
    rest, tried, used = after(pool, step), set[Key](), 0
    said = [say(opening, written(step)), say("left", joints[1].join(map(str, rest)))]
    most = rng.randint(1, min(BRANCH, most))
    while used < most:
        more, count = dead_end(rest, target, most - used, tried, "try", language, rng)
        if not count:
            break
        said, used = said + more, used + count
    if len(rest) > 2 and used:
        said.pop()  # it goes back to the rest, only to go back further
    return ([*said, say("back", joints[1].join(map(str, pool)))], used) if used else ([], 0)


def with_backtracking(
    numbers: list[int], target: int, steps: Sequence[Step], tries: int, language: str, rng: random.Random
) -> tuple[list[str], int]:
    """The lines of a search that goes back, as in `write_trace`."""
    say, (_, comma, blank) = phrases(language, rng), JOINTS[language]
    pools: list[list[Number]] = [[*numbers]]
    for step in steps[:-1]:
        pools.append(after(pools[-1], step))
    whole = [i for i, pool in enumerate(pools) if all(isinstance(each, int) for each in pool)]
    wanted = Counter(0 if rng.random() < FIRST else rng.choice(whole) for _ in range(tries))
    lines: list[list[str]] = [[]]
    used, opening = 0, "start"
    for i, (pool, step) in enumerate(zip(pools, steps, strict=True)):
        avoid, end = {key_of(step)}, used + wanted[i]
        integers = [each for each in pool if isinstance(each, int)]  # all of them, wherever a wrong try is wanted
        while used < end:
            more, count = dead_end(integers, target, end - used, avoid, opening, language, rng)
            if not count:
                break
            lines[-1] += more
            used, opening = used + count, "try"
            if i == 0:
                lines.append([])
        if i == len(steps) - 1:
            lines[-1].append(say("hit", written(step)))
        else:
            left = comma.join(map(str, after(pool, step)))
            lines[-1] += [say(opening if i == 0 else "then", written(step)), say("left", left)]
            opening = "try"
    return [blank.join(line) for line in lines], used


def write_trace(
    numbers: list[int], target: int, steps: Sequence[Step], *, style: str, tries: int, language: str, rng: random.Random
) -> tuple[str, int]:
    """A trace, from the text after "<think>" to "</answer>".

    Args:
        numbers, target: the problem.
        steps: of a solution (data_prep/search.py).
        style: one of STYLES.
        tries: how many wrong tries to write before the solution; fewer, if the numbers allow no more.
        language: "en" or "zh".

    Returns:
        The text; how many wrong tries it holds.
    """
    say, (joint, comma, blank) = phrases(language, rng), JOINTS[language]
    equations, used = [written(step) for step in steps], 0
    lines = [say("need", numbers=comma.join(map(str, numbers)), target=target)]
    if style == "first_try":
        said = [say("then" if i else "start", each) for i, each in enumerate(equations[:-1])]
        lines = [blank.join([*lines, *said, say("hit", equations[-1])])]
    elif style == "search":
        avoid, largest = set[Key](), SCALE * max(target, *numbers)
        while used < tries and (found := wrong_candidate(numbers, target, largest, avoid, joint, rng)):
            lines.append(say("another" if used else "candidate", say(found[1], found[0])))
            used += 1
        lines.append(say("another" if used else "candidate", say("hit", joint.join(equations))))
    else:
        searched, used = with_backtracking(numbers, target, steps, tries, language, rng)
        lines += searched
    answer = expression(steps)
    lines.append(say("check", steps=joint.join(equations), expression=answer))
    return f"{blank}{chr(10).join(lines)}</think>\n<answer> {answer} </answer>", used
