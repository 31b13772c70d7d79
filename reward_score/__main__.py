"""python -m reward_score: why is the reward what it is?

One response:

    python -m reward_score --numbers 11 18 25 --target 175 "18-11=7</think><answer>(18-11)*25</answer>"

A file of JSON lines with `response` and `ground_truth`, such as a run writes to samples/: a line for each, and the
shares of all reasons at the end:

    python -m reward_score runs/tiny-seed0/samples/validation/30.jsonl

Responses to the frozen test set (docs/bench.md), whatever made them, as JSON lines with `id` and `response`, one or
more for each problem: the figures with intervals, all and by stratum:

    python -m reward_score --bench answers.jsonl
"""

import argparse
import gzip
import json
import signal
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from reward_score import bench
from reward_score.countdown import check_options, compute_score, read_ground_truth
from reward_score.grammar import MAX_EXPRESSION, OPTIONS, REASONS, ExpressionError, judge, parse
from reward_score.profiles import PROFILES

SHOWN = 80  # characters of an answer


def quote(text: str) -> str:
    """The text as Python would write it, on one line, its middle left out if it is long."""
    return repr(text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}")


def why_no_answer(response: str, thought_end: int | None, answer_in_thought: bool) -> str:
    """The likeliest reason that no block counts."""
    blocks = response.count("<answer>")
    if answer_in_thought:
        return "no <answer> is closed by </answer> before the next tag" if blocks else "there is no <answer>"
    if thought_end is None:
        return "the thought never ends, as there is no </think>" + (
            f"; an <answer> inside a thought does not count ({blocks} there)" if blocks else ""
        )
    if "<answer>" not in response[thought_end:]:
        return "no <answer> follows the thought" + (f"; the {blocks} inside it do not count" if blocks else "")
    return "no <answer> after the thought is closed by </answer> before the next tag, outside a later <think>"


def explain(response: str, ground_truth: Mapping[str, Any], **options: bool) -> str:
    """One sentence on what was found and why it is right or refused.

    Args:
        options: of reward_score/grammar.py.

    >>> explain("no</think><answer>18*11</answer>", {"numbers": [11, 18, 25], "target": 175})
    "'18*11' (characters 18 to 22): it uses 11, 18, and 11, 18, 25 are given, each to be used once"
    """
    numbers, target = read_ground_truth(ground_truth, "", None)
    verdict = judge(response, numbers, target, **options)
    if verdict.answer is None:
        return why_no_answer(response, verdict.thought_end, options.get("answer_in_thought", False))
    start, end = verdict.answer
    found = f"{quote(response[start:end])} (characters {start} to {end - 1})"
    if verdict.reason == "too_long":
        return f"{found}: it has {end - start} characters, and {MAX_EXPRESSION} are the most"
    signs = {name: options.get(name, False) for name in ("equals_target", "unicode_signs")}
    try:
        postfix = parse(response[start:end], target=target, latex=options.get("latex_fractions", False), **signs)
    except ExpressionError as error:
        return f"{found}: no expression, {error} (character {start + error.position})"
    if verdict.reason == "wrong_numbers":
        used = sorted(item for item in postfix if isinstance(item, int))
        times = "at most once" if options.get("subset") else "once"
        return f"{found}: it uses {listed(used)}, and {listed(numbers)} are given, each to be used {times}"
    if verdict.reason == "division_by_zero":
        return f"{found}: it divides by zero"
    return f"{found}: its value is {verdict.value}, " + ("the target" if verdict.value == target else f"not {target}")


def listed(numbers: list[int]) -> str:
    """Numbers with commas, the middle left out if they are many."""
    return quote(", ".join(map(str, numbers)))[1:-1]


def read(path: Path, *fields: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and content of each line in a file, compressed if its name says so. All `fields` are there."""
    packed = path.with_name(f"{path.name}.gz")
    if packed.exists() and not path.exists():
        raise ValueError(f"{path} does not exist, but {packed} does: name that file")
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                if not isinstance(row["response"], str):  # a list of samples would be one text, and null "None"
                    raise TypeError("response is no text; several samples are several lines")
                yield number, row | {name: row[name] for name in fields}
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                expected = " and ".join(f"`{name}`" for name in fields)
                fault = f"{type(error).__name__}: {error}"
                raise ValueError(
                    f"{path}, line {number}: a JSON object with {expected} is expected ({fault})"
                ) from None


def score_bench(path: Path, options: Mapping[str, bool]) -> None:
    """The table of responses to the frozen test set."""
    answers: dict[str, list[str]] = {}
    for number, row in read(path, "id", "response"):
        if not isinstance(name := row["id"], str) or name not in bench.problems():
            raise ValueError(f"{path}, line {number}: {bench.unknown(name)}")
        answers.setdefault(name, []).append(row["response"])
    print(*bench.table(bench.measure(bench.judge_all(answers, **options))), sep="\n")
    if widened := [name for name, value in options.items() if value]:
        print(f"the grammar was widened by {', '.join(widened)}: no row for the board")


def score_file(path: Path, profile: str, options: Mapping[str, bool]) -> None:
    """A line for each response of a file, and the shares of all reasons."""
    reasons, total, others = Counter[str](), 0.0, 0
    for line, row in read(path, "response", "ground_truth"):
        response, row_truth = row["response"], row["ground_truth"]
        score = compute_score(str(path), response, row_truth, {"index": line}, profile=profile, **options)
        reasons[score["reason"]] += 1
        total += score["score"]
        others += (
            row.get("reason", score["reason"]) != score["reason"]
            or row.get("reward_score", score["score"]) != score["score"]
        )
        print(f"{line}: {score['score']:g} {score['reason']}: {explain(response, row_truth, **options)}")
    count = reasons.total()
    if not count:
        raise ValueError(f"{path} holds no response: one JSON object a line is expected")
    print(f"{count} responses, mean score {total / count:.3f}")
    if others:
        print(f"{others} of them were recorded with another reward: name the run's --profile and options")
    for reason in ("right", *REASONS):
        print(f"  {reason:17}{reasons[reason]:7} {reasons[reason] / count:7.1%}")


def show(response: str, ground_truth: Mapping[str, Any], profile: str, options: dict[str, Any]) -> None:
    """A verdict at length."""
    score = compute_score("the command line", response, ground_truth, profile=profile, **options)
    parts = [f"{weight:g} x {name} {score[name]:g}" for name, weight in PROFILES[profile].weights.items()]
    thought, closed, _ = response.partition("</think>")
    print(f"score    {score['score']:g} = {' + '.join(parts)}")
    print(f"thought  {len(thought)} characters, " + ("closed by </think>" if closed else "never closed"))
    print(f"reason   {score['reason']}: {explain(response, ground_truth, **options)}")


def own_version() -> str:
    """The version of the installed package; this folder may have been copied without it."""
    try:
        return version("countdown-zero")
    except PackageNotFoundError:
        return "unknown: countdown-zero is not installed here"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m reward_score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=own_version())
    parser.add_argument("source", help="a response, with --numbers and --target; without them a file of JSON lines")
    parser.add_argument("--numbers", type=int, nargs="+", metavar="N")
    parser.add_argument("--target", type=int)
    parser.add_argument("--bench", action="store_true", help="the file answers the frozen test set")
    parser.add_argument("--profile", default="countdown", choices=PROFILES)
    for option in OPTIONS:
        parser.add_argument(
            f"--{option.replace('_', '-')}", action=argparse.BooleanOptionalAction, help="as the profile sets it"
        )
    arguments = parser.parse_args()
    if (arguments.numbers is None) != (arguments.target is None):
        parser.error("--numbers and --target belong together")
    if min(arguments.numbers or [0]) < 0:
        parser.error("--numbers are integers from 0 up")
    if arguments.bench and (arguments.numbers is not None or arguments.profile != "countdown"):
        parser.error("--bench has problems and a rule of its own: it goes with neither --numbers nor --profile")
    given = {option: getattr(arguments, option) for option in OPTIONS if getattr(arguments, option) is not None}
    options: dict[str, Any] = check_options(profile=arguments.profile, **given).grammar
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        if arguments.numbers is not None:
            truth = {"numbers": arguments.numbers, "target": arguments.target}
            show(arguments.source, truth, arguments.profile, options)
            return
        if arguments.bench:
            score_bench(Path(arguments.source), options)
        else:
            score_file(Path(arguments.source), arguments.profile, options)
    except FileNotFoundError as error:
        sys.exit(f"error: {error.filename}: {error.strerror}; a response needs --numbers and --target")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        sys.exit(f"error: {arguments.source} is damaged: {error}")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
