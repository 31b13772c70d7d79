"""The option names of `vllm serve` in the vLLM of requirements/gpu.txt, which no CPU can install beside its own.

    pip download --no-deps vllm==VERSION && unzip vllm-*.whl -d FOLDER && python tests/vllm_arguments.py FOLDER

writes tests/vllm_arguments.txt from the source text: every literal `--name` that vllm/engine/arg_utils.py and
vllm/entrypoints/openai/cli_args.py add to the parser, and the fields of the classes that the latter turns into options.
"""

import ast
import re
import sys
from pathlib import Path

LIST = Path(__file__).with_suffix(".txt")
SOURCES = ("vllm/engine/arg_utils.py", "vllm/entrypoints/openai/cli_args.py")


def options(text: str) -> set[str]:
    """The options that a module's source adds to a parser, without their dashes."""
    tree, found = ast.parse(text), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            names = [each.value for each in node.args if isinstance(each, ast.Constant)]
            found |= {name[2:] for name in names if name.startswith("--")}
        if isinstance(node, ast.ClassDef) and node.name.endswith("FrontendArgs"):
            fields = (each.target for each in node.body if isinstance(each, ast.AnnAssign))
            found |= {each.id.replace("_", "-") for each in fields if isinstance(each, ast.Name)}
    return found


def known() -> tuple[str, set[str]]:
    """The version that the list is of, and its names."""
    head, *names = LIST.read_text(encoding="utf-8").splitlines()
    return re.search(r"vllm (\S+),", head)[1], set(names)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (version,) = (path.name.split("-")[1].removesuffix(".dist") for path in folder.glob("vllm-*.dist-info"))
    found = set().union(*(options((folder / source).read_text(encoding="utf-8")) for source in SOURCES))
    sources = ", ".join(SOURCES)
    head = f"# Options of `vllm serve` in vllm {version}, by tests/vllm_arguments.py from its wheel: {sources}"
    LIST.write_text("\n".join([head, *sorted(found)]) + "\n", encoding="utf-8")
