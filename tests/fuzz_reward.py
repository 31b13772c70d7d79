"""python tests/fuzz_reward.py [libFuzzer's options] CORPUS: search for a response that the reward cannot stand.

Atheris (https://github.com/google/atheris) follows which branches an input takes and mutates those that took new ones.
An exception, a verdict that the oracle contradicts, or a second of thought is a finding; libFuzzer then writes the
input to a file crash-* or timeout-*. The seeds lie in tests/fuzz_corpus.
"""

import sys
from pathlib import Path

import atheris

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))
with atheris.instrument_imports(include=["reward_score"]):
    from reward_oracle import check


def one_input(data: bytes) -> None:
    check(data.decode("utf-8", "surrogateescape"))


if __name__ == "__main__":
    options = ["-timeout=1", "-max_len=4096", f"-dict={TESTS / 'fuzz_reward.dict'}"]
    atheris.Setup([sys.argv[0], *options, *sys.argv[1:]], one_input)
    atheris.Fuzz()
