"""countdown-zero COMMAND [overrides]: every command by one name; the same as python -m verl_recipes.COMMAND.

`countdown-zero` alone lists the commands, and `countdown-zero COMMAND --help` explains one.
"""

import ast
import runpy
import sys
from importlib.metadata import version
from pathlib import Path

from data_prep.cli import UserError

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
        lines.append(f"  {name:<10} {sentence}")
    return "\n".join(lines)


def main() -> None:
    """Run the command that the first argument names, as `python -m` would."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h"):
        print(listing())
    elif name == "--version":
        print(version("countdown-zero"))
    elif name not in COMMANDS:
        raise UserError(f"{name!r} is not a command; the commands are: {', '.join(sorted(COMMANDS))}")
    else:
        path = COMMANDS[name]
        module = path.parent.name if path.stem == "__main__" else f"{path.parent.name}.{path.stem}"
        sys.argv = [str(path), *sys.argv[2:]]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
