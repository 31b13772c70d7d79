"""The reward of Countdown as verl calls it: is the response's equation well formed, and is it right?

For the numbers [11, 18, 25], the target 175 and a response as in reward_score/grammar.py:

    {"score": 1.0, "acc": 1.0, "format": 1.0, "reason": "right", "reason/no_answer": 0.0, "reason/too_long": 0.0, ...}

Every number becomes a metric of verl's, so the mean of `reason/syntax` is the share of responses refused for it.
"""

import math
from collections.abc import Callable, Mapping
from operator import index
from typing import Any, NamedTuple

from reward_score import components
from reward_score.grammar import NOT_AN_EXPRESSION, OPTIONS, REASONS, Verdict, judge
from reward_score.profiles import PROFILES

VERLS_OWN = {"reward_router_address", "reward_model_tokenizer"}  # verl may pass these, and they are ignored
LANGUAGES = ("en", "zh")


class Options(NamedTuple):
    """What a reward pays for, as `check_options` returns it."""

    weights: dict[str, float]
    grammar: dict[str, bool]
    language: str
    max_characters: int
    overlong_buffer: int


class Case(NamedTuple):
    """All that a component may look at."""

    response: str
    verdict: Verdict
    target: int
    options: Options


COMPONENTS: dict[str, Callable[[Case], float]] = {
    "format": lambda case: float(case.verdict.reason not in NOT_AN_EXPRESSION),
    "acc": lambda case: float(case.verdict.reason == "right"),
    "answered": lambda case: float(case.verdict.reason != "no_answer"),  # TinyZero's format term: any answer block
    "layout": lambda case: components.layout(case.response),
    "thought_length": lambda case: components.thought_length(
        None if case.verdict.thought_end is None else case.response[: case.verdict.thought_end]
    ),
    "language": lambda case: components.language(case.response[: case.verdict.thought_end], case.options.language),
    "overlong": lambda case: components.overlong(
        len(case.response), case.options.max_characters, case.options.overlong_buffer
    ),
    "repetition": lambda case: components.repetition(case.response),
    "distance": lambda case: components.distance(case.verdict.value, case.target),
    "closeness": lambda case: components.closeness(case.verdict.value, case.target),
}
_REASON_KEYS = {
    reason: {"reason": reason} | {f"reason/{other}": float(other == reason) for other in REASONS}
    for reason in ("right", *REASONS)
}


def read_ground_truth(
    ground_truth: Mapping[str, Any], data_source: str, extra_info: Mapping[str, Any] | None
) -> tuple[list[int], int]:
    """The numbers in ascending order, and the target; a ValueError names the row if they are something else."""
    try:
        numbers, target = sorted(map(index, ground_truth["numbers"])), index(ground_truth["target"])
        if numbers and numbers[0] >= 0:
            return numbers, target
        problem = "they are none, or negative"
    except (KeyError, TypeError, IndexError) as error:
        problem = f"{type(error).__name__}: {error}"
    row = {key: (extra_info or {}).get(key) for key in ("split", "index")}
    raise ValueError(
        f"the ground truth of row {row['index']} in split {row['split']} of {data_source!r} must hold `numbers` "
        f"(integers from 0 up) and `target` (an integer), got {ground_truth!r} ({problem})"
    )


def check_options(
    *,
    profile: str = "countdown",
    weights: Mapping[str, float] | None = None,
    language: str = "en",
    max_characters: int = 4096,
    overlong_buffer: int = 1024,
    **others: Any,
) -> Options:
    """The keywords of `compute_score`, checked: before a run starts, and again with each response.

    Args:
        profile: a name of reward_score/profiles.py.
        weights: of components, on top of the profile's; 0 only measures.
        language: "en" or "zh", of the component `language`.
        max_characters, overlong_buffer: of the component `overlong`.
        others: the options of reward_score/grammar.py, true or false; those not given are as the profile sets them.

    Raises:
        ValueError: a keyword or a name is unknown, or a value makes no sense.

    >>> check_options(profile="tinyzero").grammar["answer_in_thought"]
    True
    """
    chosen = PROFILES.get(profile) if isinstance(profile, str) else None
    if chosen is None:
        raise ValueError(f"there is no reward profile {profile!r}, only {', '.join(PROFILES)}")
    if weights is not None and not isinstance(weights, Mapping):
        raise ValueError(f"weights is a number for each component's name, not {weights!r}")
    paid = chosen.weights | dict(weights or {})
    if unknown := paid.keys() - COMPONENTS.keys():
        raise ValueError(f"the reward has no component {', '.join(sorted(unknown))}; it has {', '.join(COMPONENTS)}")
    if unknown := others.keys() - VERLS_OWN - set(OPTIONS):
        known = "profile, weights, language, max_characters, overlong_buffer"
        raise ValueError(f"the reward has no option {', '.join(sorted(unknown))}; it has {known}, {', '.join(OPTIONS)}")
    for name, weight in paid.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"the weight of {name} is a number, not {weight!r}")
    grammar = {name: others.get(name, name in chosen.options) for name in OPTIONS}
    for name, value in grammar.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} is true or false, not {value!r}")
    if language not in LANGUAGES:
        raise ValueError(f"language is {' or '.join(LANGUAGES)}, not {language!r}")
    for name, characters in (("max_characters", max_characters), ("overlong_buffer", overlong_buffer)):
        if isinstance(characters, bool) or not isinstance(characters, int) or characters < 1:
            raise ValueError(f"{name} is a number of characters from 1 up, not {characters!r}")
    return Options(paid, grammar, language, max_characters, overlong_buffer)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Mapping[str, Any],
    extra_info: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The verdict on one response, as verl 0.9.1 calls it (`reward.custom_reward_function`, with its `reward_kwargs`).

    Args:
        data_source, extra_info: name the row if its ground truth is malformed.
        solution_str: the response alone, decoded without special tokens.
        ground_truth: `numbers` (list, tuple or array of integers from 0 up) and `target` (integer).
        options: those of `check_options`.

    Returns:
        The same keys for every response: `score`; `acc` and `format` (0.0 or 1.0); each component of the profile and of
        `weights`; `reason`, which is "right" or one of REASONS; and `reason/<each of REASONS>` (0.0 or 1.0).

    Raises:
        ValueError: the ground truth is malformed, or an option is unknown or wrong. No response raises anything.
    """
    numbers, target = read_ground_truth(ground_truth, data_source, extra_info)
    checked = check_options(**options)
    verdict = judge(solution_str, numbers, target, **checked.grammar)
    case = Case(solution_str, verdict, target, checked)
    parts = {name: COMPONENTS[name](case) for name in {"acc": 0, "format": 0} | checked.weights}
    score = sum(weight * parts[name] for name, weight in checked.weights.items())
    return {"score": score, **parts, **_REASON_KEYS[verdict.reason]}
