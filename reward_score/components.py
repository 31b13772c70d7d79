"""What a response may be paid for, or made to pay for: small pure functions of plain values.

`format` and `acc` are in every verdict; the others are computed if a profile or the keyword `weights` names them
(reward_score/profiles.py).
"""

import re
import zlib
from fractions import Fraction

LOOP_RATIO = 0.1  # of compressed to plain size; prose compresses to 0.4, the tiny model's search to 0.39 or more
LOOP_WINDOW = 4096  # characters at the end, so that the cost is bounded: output that has degenerated does not recover

CLOSENESS_HALF = 10  # off the target, `closeness` is one half

LANGUAGE_WINDOW = 32_768  # characters at the beginning, to bound the cost as well

_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]+")
_LATIN = re.compile("[A-Za-z]+")
_OTHER = re.compile(r"[^\W\d_A-Za-z\u3400-\u4dbf\u4e00-\u9fff]+")


def layout(response: str) -> float:
    """The format term of mini-r1 and Datawhale-R1: a thought, a line break, a block, and nothing more.

    Says what their regular expression says (philschmid/deep-learning-pytorch-huggingface,
    training/scripts/run_r1_grpo.py), which never looks into the block, and lets a line break follow it.

    >>> layout("3+4=7</think>\\n<answer>3+4</answer>"), layout("3+4=7</think> <answer>3+4</answer>")
    (1.0, 0.0)
    """
    thought, _, rest = response.partition("</think>")
    block = rest.removesuffix("\n")
    ends = block.startswith("\n<answer>") and block[len("\n<answer>") :].endswith("</answer>")
    return float("<think>" not in thought and ends)


def thought_length(thought: str | None) -> float:
    """The reward for length of the Datawhale-R1 article: 1 for a thought of more than 1000 characters in one line.

    One line, because the script's `.` matches no line break (datawhalechina/unlock-deepseek,
    Datawhale-R1/train_Datawhale-R1.py). Its authors withdrew it: it came from a misreading of how R1-Zero was trained,
    makes the model chase length and repeat tokens, and must be deleted; a longer thought is not a deeper one, and
    others saw length grow with difficulty by itself, or dip and then grow. It is here so that the article's run can be
    repeated and its effect shown.

    >>> thought_length("so " * 400), thought_length("so "), thought_length(None)
    (1.0, 0.0, 0.0)
    """
    return float(thought is not None and "\n" not in thought and len(thought.strip()) > 1000)


def language(thought: str, asked: str = "en") -> float:
    """R1's reward for consistency (arXiv 2501.12948, 2.3.2): the share of a thought's words in the asked language.

    A word is a run of Latin letters ("en"), one Chinese character ("zh"), or a run of other letters. A thought without
    words, of digits and signs alone, is in every language.

    >>> language("so 3 + 4 不 对", "en"), language("so 3 + 4 不 对", "zh"), language("3+4=7")
    (0.3333333333333333, 0.6666666666666666, 1.0)
    """
    thought = thought[:LANGUAGE_WINDOW]
    words = {"zh": sum(map(len, _CHINESE.findall(thought))), "en": len(_LATIN.findall(thought))}
    total = sum(words.values()) + len(_OTHER.findall(thought))
    return words[asked] / total if total else 1.0


def overlong(length: int, maximum: int = 4096, buffer: int = 1024) -> float:
    """DAPO's soft length penalty (arXiv 2503.14476, equation 13): 0 up to maximum - buffer, -1 from maximum on.

    In characters, as verl does not give a reward function the tokens; verl counts tokens itself with
    `reward.reward_manager.name=dapo`.

    >>> overlong(3000), overlong(3584), overlong(9999)
    (0.0, -0.5, -1.0)
    """
    return min(max((maximum - buffer - length) / buffer, -1.0), 0.0)


def repetition(response: str) -> float:
    """1 if the end of a response is degenerate: it repeats itself so much that it compresses to under a tenth.

    >>> repetition("!" * 200), repetition("so 3 + 4 = 7 no. " * 30), repetition("3+4=7 no, but 3*4=12, 12-4=8 yes")
    (1.0, 1.0, 0.0)
    """
    end = response[-LOOP_WINDOW:].encode("utf-8", "surrogatepass")
    return float(len(zlib.compress(end, 1)) < LOOP_RATIO * len(end))


def distance(value: int | Fraction | None, target: int) -> float:
    """The television game's partial credit: 10, 7 or 5 of 10 points for the target, within 5 of it, within 10.

    >>> [distance(value, 98) for value in (98, Fraction(187, 2), 103, 88, 87, None)]
    [1.0, 0.7, 0.7, 0.5, 0.0, 0.0]
    """
    if value is None:
        return 0.0
    off = abs(Fraction(value) - target)
    return 1.0 if off == 0 else 0.7 if off <= 5 else 0.5 if off <= 10 else 0.0


def closeness(value: int | Fraction | None, target: int) -> float:
    """How near an expression's value comes to the target: 1 for the target, 1/2 if it is 10 off, 1/3 if 20.

    Falls with every step away and never reaches 0, so that wrong values at different distances differ. The distance is
    exact, and an expression that breaks a rule has no value.

    >>> [closeness(value, 98) for value in (98, 88, Fraction(197, 2), 1098, None)]
    [1.0, 0.5, 0.9523809523809523, 0.009900990099009901, 0.0]
    """
    return 0.0 if value is None else float(CLOSENESS_HALF / (CLOSENESS_HALF + abs(Fraction(value) - target)))
