"""What tests of documents share."""

import re
from itertools import zip_longest


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
