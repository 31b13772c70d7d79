"""Countdown problems as parquet in verl's format. Uses neither torch nor verl.

`SHIPPED` holds configs/, assets/ and requirements/: the checkout, or the folder of an installed package where
pyproject.toml puts them.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

if "-m" in getattr(sys, "orig_argv", []) and find_spec("omegaconf") is None:
    sys.exit("error: this Python has none of the packages: bash launch/setup.sh; source .venv/bin/activate")

_HERE = Path(__file__).resolve().parent
SHIPPED = _HERE / "shipped" if (_HERE / "shipped").is_dir() else _HERE.parent
