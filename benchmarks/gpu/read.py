"""What a GPU gave, as rows of Markdown with its name.

python benchmarks/gpu/read.py OUT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def rows(out: Path) -> Iterator[str]:
    """A heading and the lines of each part, failures last."""
    for file in sorted(out.glob("*.json")):
        found = json.loads(file.read_text())
        trial = ", a trial whose numbers mean nothing" if found["tiny"] else ""
        yield f"\n### {found['part']} ({found['device']}, torch {found['torch']}{trial})\n"
        yield from table(found["result"])
    for file in sorted(out.glob("*.failed")):
        found = json.loads(file.read_text())
        yield f"\n### {found['part']} failed\n\n```\n{found['error'].strip()}\n```"


def table(result: dict[str, Any]) -> Iterator[str]:
    """One line for each entry; entries that are no tables themselves have one value."""
    each = {name: value if isinstance(value, dict) else {"value": value} for name, value in result.items()}
    columns = list(dict.fromkeys(column for value in each.values() for column in value))
    yield f"| | {' | '.join(columns)} |"
    yield "| --- " * (1 + len(columns)) + "|"
    for name, value in each.items():
        yield f"| {name} | {' | '.join(cell(value.get(column)) for column in columns)} |"


def cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    print("\n".join(rows(Path(sys.argv[1]))))
