"""What tests of documents share."""

import os
import re
import shlex
import subprocess
from itertools import zip_longest

from data_prep.cli import CONFIGS

ROOT = CONFIGS.parent


def printed(result):
    """The commands that a dry run printed."""
    assert result.returncode == 0, result.stderr
    lines = [line.removeprefix("+ ") for line in result.stdout.splitlines() if line.startswith("+ ")]
    return [shlex.split(line.removeprefix("exec ")) for line in lines]


def commands(name):
    """Every command of a page's blocks, of a launch script those that it starts: the module, and its overrides."""
    blocks = re.findall(r"```bash\n(.+?)```", (ROOT / name).read_text(encoding="utf-8"), re.S)
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        if "launch/" in line:
            dry = {"cwd": ROOT, "env": os.environ | {"DRY_RUN": "1"}, "capture_output": True, "text": True}
            found = printed(subprocess.run(["bash", "-c", line], **dry))
        else:
            found = [shlex.split(line, comments=True)]
        yield from ((command[2], command[3:]) for command in found)


def repeats(name, page, measured):
    """Whether a page has a measured text. A Chinese page translates the heads of the tables, and nothing else."""
    if "zh" not in name:
        return measured in page
    lines = measured.rstrip("\n").split("\n")
    heads = [
        str(after).startswith(("| --- |", "|---")) and re.search("[a-z]", line)
        for line, after in zip_longest(lines, lines[1:])
    ]
    return bool(
        re.search(
            "\n".join(
                r"\|.*[\u4e00-\u9fff].*\|" if head else re.escape(line) for line, head in zip(lines, heads, strict=True)
            ),
            page,
        )
    )
