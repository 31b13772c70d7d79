"""What every command of this project does alike: Hydra composes, and a user's mistake is one line and a failed exit."""

import errno
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


class UserError(SystemExit):
    """A mistake of the user's: the message says what is wrong, where, and what to do. Uncaught, it ends the program."""

    def __init__(self, message: str) -> None:
        super().__init__(f"error: {message}")

    def __reduce__(self) -> tuple[type, tuple[str]]:  # from a worker process it comes as it was raised
        return type(self), (str(self).removeprefix("error: "),)


def command(config: str, folder: Path = CONFIGS) -> Callable[[Callable[[Any], object]], Callable[[], object]]:
    """`hydra.main` with a configuration of this project. A full disk is one line: Hydra would print the overrides."""
    import hydra

    def decorate(main: Callable[[Any], object]) -> Callable[[], object]:
        @wraps(main)
        def told(cfg: Any) -> object:
            try:
                return main(cfg)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                where = f" at {error.filename}" if error.filename else ""
                raise UserError(f"the disk is full{where}; free some of it, and the same command goes on") from None

        return hydra.main(config_path=str(folder), config_name=config, version_base="1.3")(told)

    return decorate


def run(main: Callable[[], object]) -> None:
    """Call a `command`; an override that Hydra refuses, or Ctrl-C, becomes one line on stderr."""
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises to us, instead of printing several lines
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        first_lines = [
            str(each).strip().splitlines()[0] for each in (error, error.__cause__) if str(each or "").strip()
        ]
        if isinstance(error, MissingConfigException) and error.options:
            first_lines.append(f"(known: {', '.join(error.options)})")
        raise UserError(" ".join(dict.fromkeys(first_lines))) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
