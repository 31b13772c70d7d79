"""countdown-zero COMMAND [overrides]: every command by one name; the same as python -m verl_recipes.COMMAND.

`countdown-zero` alone lists the commands, and `countdown-zero COMMAND --help` explains one.
`eval "$(countdown-zero -sc install=bash)"` lets the Tab key complete commands, groups, keys and values (Hydra's own
completion: also zsh and fish).
"""

import ast
import os
import runpy
import sys
from pathlib import Path

from data_prep.cli import HELP, UserError, print_version
from data_prep.help import CONFIGS, complete, did_you_mean

HERE = Path(__file__).resolve().parent
COMMANDS = {path.stem: path for path in sorted(HERE.glob("[!_]*.py"))} | {
    "data": HERE.parent / "data_prep" / "__main__.py",
    "render": HERE.parent / "data_prep" / "render.py",
    "traces": HERE.parent / "data_prep" / "traces.py",
    "score": HERE.parent / "reward_score" / "__main__.py",
}


def listing() -> str:
    """A line for each command: its name, and the first sentence of its docstring without the usage before it."""
    lines = ["countdown-zero COMMAND [KEY=VALUE ...], where COMMAND is one of"]
    for name, path in sorted(COMMANDS.items()):
        document = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        sentence = document.partition("\n\n")[0].replace("\n", " ").partition(": ")[2]
        lines.append(f"  {name:<{max(map(len, COMMANDS))}} {sentence}")
    lines += ["", '`COMMAND --help` explains one. Completion by the Tab key: eval "$(countdown-zero -sc install=bash)"']
    return "\n".join(lines)


def run(name: str, arguments: list[str]) -> None:
    """Run a command as `python -m` would."""
    path = COMMANDS[name]
    module = path.parent.name if path.stem == "__main__" else f"{path.parent.name}.{path.stem}"
    sys.argv = [str(path), *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def completion(request: str) -> None:
    """Answer Hydra's shell function, which gives the line in COMP_LINE: with commands, or with what one completes."""
    if not request.startswith("query="):
        sys.argv[0] = "countdown-zero"  # the name that the shell function serves
        complete(request, {"train": CONFIGS})  # any: only the shell function is wanted
        return
    _, *words = os.environ["COMP_LINE"].split(" ")
    if len(words) < 2:
        print(*(name for name in sorted(COMMANDS) if name.startswith("".join(words))))
    elif words[0] in COMMANDS and words[0] not in ("score", "report"):  # these take files, which the shell completes
        os.environ["COMP_LINE"] = " ".join(words)
        run("train" if words[0] in ("doctor", "submit") else words[0], ["-sc", request])


def main() -> None:
    name, *arguments = sys.argv[1:] or HELP
    if name in HELP:
        print(listing())
    elif name == "--version":
        print_version()
    elif name == "-sc" and arguments:
        completion(arguments[0])
    elif name not in COMMANDS:
        known = did_you_mean(name, COMMANDS) or f"; the commands are: {', '.join(sorted(COMMANDS))}"
        raise UserError(f"{name!r} is not a command{known}")
    else:
        run(name, arguments)


if __name__ == "__main__":
    main()
