"""Countdown problems as parquet in verl's format. Uses neither torch nor verl.

`SHIPPED` holds configs/, assets/ and requirements/: the checkout, or the folder of an installed package where
pyproject.toml puts them.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
SHIPPED = _HERE / "shipped" if (_HERE / "shipped").is_dir() else _HERE.parent
