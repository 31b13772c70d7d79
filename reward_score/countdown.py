"""The reward of Countdown as verl calls it: is the response's equation well formed, and is it right?

For the numbers [11, 18, 25], the target 175 and a response as in reward_score/grammar.py:

    {"score": 1.0, "acc": 1.0, "format": 1.0, "reason": "right", "reason/no_answer": 0.0, "reason/too_long": 0.0, ...}

Every number becomes a metric of verl's, so the mean of `reason/syntax` is the share of responses refused for it.
"""

from collections.abc import Callable, Mapping
from operator import index
from typing import Any, NamedTuple

from reward_score import components
from reward_score.grammar import REASONS, Verdict, judge
from reward_score.profiles import PROFILES

VERLS_OWN = {"reward_router_address", "reward_model_tokenizer"}  # verl may pass these; no use is made of them


class Case(NamedTuple):
    """All that a component may look at."""

    response: str
    verdict: Verdict
    target: int
    language: str
    max_characters: int
    overlong_buffer: int


COMPONENTS: dict[str, Callable[[Case], float]] = {
    "format": lambda case: components.well_formed(case.verdict.reason),
    "acc": lambda case: components.equation(case.verdict.reason),
    "answered": lambda case: components.answered(case.verdict.reason),
    "layout": lambda case: components.layout(case.response),
    "thought_length": lambda case: components.thought_length(
        None if case.verdict.thought_end is None else case.response[: case.verdict.thought_end]
    ),
    "language": lambda case: components.language(case.response[: case.verdict.thought_end], case.language),
    "overlong": lambda case: components.overlong(len(case.response), case.max_characters, case.overlong_buffer),
    "repetition": lambda case: components.repetition(case.response),
    "distance": lambda case: components.distance(case.verdict.value, case.target),
}
_REASON_KEYS = {
    reason: {"reason": reason} | {f"reason/{other}": float(other == reason) for other in REASONS}
    for reason in ("right", *REASONS)
}


def read_ground_truth(
    ground_truth: Mapping[str, Any], data_source: str, extra_info: Mapping[str, Any] | None
) -> tuple[list[int], int]:
    """The numbers in ascending order, and the target; a ValueError that names the row where they are no such thing."""
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


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Mapping[str, Any],
    extra_info: Mapping[str, Any] | None = None,
    *,
    profile: str = "countdown",
    weights: Mapping[str, float] | None = None,
    equals_target: bool = False,
    unicode_signs: bool = False,
    latex_fractions: bool = False,
    subset: bool = False,
    language: str = "en",
    max_characters: int = 4096,
    overlong_buffer: int = 1024,
    **others: Any,
) -> dict[str, Any]:
    """The verdict on one response, as verl 0.9.1 calls it (`reward.custom_reward_function`, with its `reward_kwargs`).

    Args:
        data_source, extra_info: name the row where its ground truth is malformed.
        solution_str: the response alone, decoded without special tokens.
        ground_truth: `numbers` (list, tuple or array of integers from 0 up) and `target` (integer).
        profile: a name of reward_score/profiles.py.
        weights: of components, on top of the profile's; 0 only measures.
        equals_target, unicode_signs, latex_fractions, subset: options of reward_score/grammar.py.
        language: "en" or "zh", of the component `language`.
        max_characters, overlong_buffer: of the component `overlong`.

    Returns:
        The same keys for every response: `score`; `acc` and `format` (0.0 or 1.0); each component of the profile and of
        `weights`; `reason`, which is "right" or one of REASONS; and `reason/<each of REASONS>` (0.0 or 1.0).

    Raises:
        ValueError: the ground truth is malformed, or a keyword or name is unknown. No response raises anything.
    """
    numbers, target = read_ground_truth(ground_truth, data_source, extra_info)
    paid = PROFILES.get(profile)
    if paid is None:
        raise ValueError(f"there is no reward profile {profile!r}, only {', '.join(PROFILES)}")
    if weights:
        paid = paid | dict(weights)
    if unknown := (others.keys() - VERLS_OWN) | (paid.keys() - COMPONENTS.keys()):
        raise ValueError(f"the reward knows no {', '.join(sorted(unknown))}; components are {', '.join(COMPONENTS)}")
    if language not in ("en", "zh"):
        raise ValueError(f"language is en or zh, not {language!r}")
    if overlong_buffer < 1:
        raise ValueError(f"overlong_buffer is a number of characters from 1 up, not {overlong_buffer}")
    verdict = judge(
        solution_str,
        numbers,
        target,
        equals_target=equals_target,
        unicode_signs=unicode_signs,
        latex_fractions=latex_fractions,
        subset=subset,
    )
    case = Case(solution_str, verdict, target, language, max_characters, overlong_buffer)
    parts = {name: COMPONENTS[name](case) for name in {"acc": 0, "format": 0} | paid}
    score = sum(weight * parts[name] for name, weight in paid.items())
    return {"score": score, **parts, **_REASON_KEYS[verdict.reason]}
