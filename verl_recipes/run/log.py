"""Why verl stopped, read from the log of a run."""

import re
from pathlib import Path

# What verl and Ray say because something else went wrong before.
CONSEQUENCES = (
    "ray.exceptions.",
    "no materializable trajectories",
    "Received an empty list as keys",
    "Engine core init",
)

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_WHO = re.compile(r"^(?:\([^)]*pid=[^)]*\)\s*)*(?:ERROR [-\d]+ [:\d]+ \[\S+\]\s*)?")  # Ray's and vLLM's prefixes
_EXCEPTION = re.compile(r"^(?:[A-Za-z_]\w*\.)*(?:[A-Z]\w*)?(?:Error|Exception|Interrupt)(?:\(\w+\))?: \S")


def reason(log: Path, offset: int = 0) -> str:
    """The last exception that a log tells of, from `offset` bytes on, as one line; the cause, where it tells of one."""
    with log.open(encoding="utf-8", errors="replace") as file:
        file.seek(offset)
        lines = [_WHO.sub("", _COLOUR.sub("", line)).strip() for line in file]
    exceptions = [line for line in lines if _EXCEPTION.match(line)]
    causes = [line for line in exceptions if not any(c in line for c in CONSEQUENCES)]
    return (causes or exceptions or ["it told of no error"])[-1]
