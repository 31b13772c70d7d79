"""Why verl stopped, read from the log of a run."""

import re
from pathlib import Path

# Parts of errors that only follow from an earlier error.
CONSEQUENCES = (
    "ray.exceptions.",
    "no materializable trajectories",
    "Received an empty list as keys",
    "Engine core init",
    "EngineCore encountered",
)

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_WHO = re.compile(r"^(?:\([^)]*pid=[^)]*\)\s*)*(?:ERROR [-\d]+ [:\d]+ \[\S+\]\s*)?")  # Ray's and vLLM's prefixes
_EXCEPTION = re.compile(r"^(?:[A-Za-z_]\w*\.)*(?:[A-Z]\w*)?(?:Error|Exception|Interrupt)(?:\(\w+\))?: \S")


def last_error(log: Path, offset: int = 0) -> str:
    """The last exception in a log from byte `offset` on, as one line, but none that only follows from another."""
    with log.open(encoding="utf-8", errors="replace") as file:
        file.seek(offset)
        lines = [_WHO.sub("", _COLOUR.sub("", line)).strip() for line in file]
    exceptions = [line for line in lines if _EXCEPTION.match(line)]
    causes = [line for line in exceptions if not any(c in line for c in CONSEQUENCES)]
    return (causes or exceptions or ["the log contains no error message"])[-1]
