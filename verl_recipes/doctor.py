"""python -m verl_recipes.doctor [overrides of a run]: is this machine fit for the run, and how is it fixed.

It prints a line for each check: ok, warning or wrong. Below the latter two stands what fixes it. The exit status is 1
if anything is wrong. It needs nothing but a Python: all else may be missing or broken, which is when it is asked. The
overrides are those of `python -m verl_recipes.train`, whose --help lists them.
"""

from __future__ import annotations

import sys
from typing import Any

from verl_recipes.run.machine import SETUP, Line, findings, show


def configuration(overrides: list[str], gpu: bool) -> tuple[Any, Line | None]:
    """The composed configuration of the run, or None; and a line that says why there is none."""
    try:
        import verl_recipes.settings.configuration  # noqa: F401  registers its resolvers
        from data_prep.cli import compose
        from verl_recipes.settings.schema import TrainKeys

        return compose("train", overrides, TrainKeys), None
    except ImportError as error:
        return None, Line("wrong", f"configuration: {error}", SETUP[gpu])
    except SystemExit as error:
        text = str(error).replace("error: ", "", 1)
        return None, Line("wrong", f"configuration: {text}", "correct the overrides; train --help lists them")


def main(overrides: list[str]) -> int:
    """Print every line; the exit status."""
    gpu = any(each.startswith("hardware=") and each != "hardware=cpu" for each in overrides)
    cfg, refused = configuration(overrides, gpu)
    wrong = 0
    for line in ([refused] if refused else []) + list(findings(cfg.trainer.device != "cpu" if cfg else gpu, cfg)):
        wrong += show(line)
    print(f"doctor: {wrong} wrong" if wrong else "doctor: nothing is wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    if {"--help", "-h"} & set(sys.argv[1:]):
        print((__doc__ or "").strip())
    else:
        sys.exit(main(sys.argv[1:]))
