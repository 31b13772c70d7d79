"""Countdown problems as parquet in verl's format. Uses neither torch nor verl.

`SHIPPED` holds configs/, assets/ and requirements/: the checkout, or the folder of an installed package where
pyproject.toml puts them.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

# What was typed, since Python 3.10. The two commands run without packages and say more of what is missing.
_TYPED = {*getattr(sys, "orig_argv", [])}
if (
    "-m" in _TYPED
    and not {"verl_recipes.doctor", "verl_recipes.run.machine"} & _TYPED
    and find_spec("omegaconf") is None
):
    sys.exit("error: this Python has none of the packages: bash launch/setup.sh; source .venv/bin/activate")

_HERE = Path(__file__).resolve().parent
SHIPPED = _HERE / "shipped" if (_HERE / "shipped").is_dir() else _HERE.parent
