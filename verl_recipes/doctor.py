"""python -m verl_recipes.doctor [overrides of a run]: whether this machine can do the run, and how to fix it if not.

It prints a line for each check: ok, warning or wrong. A line below says how to fix it. The exit status is 1 if anything
is wrong. It needs Python alone, because the packages may be missing or broken. The overrides are those of `python -m
verl_recipes.train`, whose --help lists them.

    python -m verl_recipes.doctor                                                       for the tiny run, on this CPU
    python -m verl_recipes.doctor recipe=mini_r1 model=qwen2.5_3b hardware=h100 gpus=4  for this run
"""

from __future__ import annotations

import sys
from itertools import chain
from typing import Any

from verl_recipes.run.machine import SETUP, Line, findings, show


def configuration(arguments: list[str], gpu: bool) -> tuple[Any, Line | None]:
    """The composed configuration of the run, or None and the reason."""
    try:
        import verl_recipes.settings.configuration  # noqa: F401  registers its resolvers
        from data_prep.cli import compose, overrides_of
        from verl_recipes.settings.schema import TrainKeys

        return compose("train", overrides_of(arguments), TrainKeys), None
    except ImportError as error:
        return None, Line("wrong", f"configuration: {error}", SETUP[gpu])
    except SystemExit as error:
        text = str(error).replace("error: ", "", 1)
        return None, Line(
            "wrong", f"configuration: {text}", "correct the overrides; python -m verl_recipes.train --help lists them"
        )


def main(arguments: list[str]) -> int:
    """Print every finding; returns the exit status."""
    gpu = any(each.startswith("hardware=") and each != "hardware=cpu" for each in arguments)
    cfg, refused = configuration(arguments, gpu)
    if cfg:
        from data_prep.cli import show as show_configuration
        from data_prep.cli import split_options

        if split_options(arguments)[2]:
            show_configuration(cfg)
            return 0
    states = []
    for line in chain([refused] if refused else [], findings(cfg.trainer.device != "cpu" if cfg else gpu, cfg)):
        show(line)
        states.append(line.state)
    wrong, warnings = states.count("wrong"), states.count("warning")
    also = f"; warnings, which stop no run: {warnings}" if warnings else ""
    print(f"doctor: {wrong or 'nothing is'} wrong{also}")
    return 1 if wrong else 0


if __name__ == "__main__":
    if {"--help", "-h"} & set(sys.argv[1:]):
        print((__doc__ or "").strip())
    elif "--version" in sys.argv[1:]:
        from data_prep.cli import print_version

        print_version()
    else:
        sys.exit(main(sys.argv[1:]))
