"""Makes the tables and figures of docs/results.md anew, by the commands that docs/results.yaml lists.

python docs/results.py [BEGINNING] [--list]     # make results ONLY=BEGINNING; --list shows the commands only

What is trained is not trained again: the names of runs are hashes of what decides them. A table or figure of which
a command failed, for want of its data, say, stays as it is, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from holdfast.component import nearest
from holdfast.experiments import resolve
from holdfast.experiments.analyses.neural_collapse import HEAD
from holdfast.experiments.records.comparison import mean_of
from holdfast.experiments.records.record import EVALUATIONS, Record, read_record
from holdfast.files import write_text
from holdfast.numbers import NONE

DOCS = Path(__file__).parent
HOLDFAST = Path(sys.executable).with_name("holdfast")
BRACES = re.compile(r"\{([^{}|]+)(?:\|([^{}]+))?\}")
Words = Mapping[str, Any]


def read_list() -> dict[str, dict[str, Any]]:
    """The tables and the figures, each by its name."""
    return dict(yaml.safe_load((DOCS / "results.yaml").read_text("utf-8")))


def begun(entries: Mapping[str, Any], beginning: str) -> dict[str, Any]:
    return {name: entry for name, entry in entries.items() if name.startswith(beginning)}


def rows_of(entry: Words) -> list[list[Words]]:
    """The words of each row of a table, once for each seed; of a figure its own."""
    rows = entry.get("rows", [{key: value for key, value in entry.items() if isinstance(value, str)}])
    return [[{**row, "seed": seed} for seed in entry.get("seeds", [0])] for row in rows]


def commands_of(entry: Words) -> list[str]:
    """Every command once, in order; {run} stays where a command is about the folder of an earlier one."""
    found = [fill(command, words) for row in rows_of(entry) for words in row for command in entry["commands"]]
    return list(dict.fromkeys(found))


def fill(command: str, words: Words) -> str:
    """A command with the words of a row; other braces are those of its settings."""
    return BRACES.sub(lambda match: str(words.get(match[1], match[0])), command)


def cell(text: str, words: Words, values: Words) -> str:
    """A cell of the table, of a row's words and the numbers that came out.

    Raises:
        ValueError: a name that is neither.
    """

    def shown(match: re.Match[str]) -> str:
        known = words if match[1] in words else values
        if match[1] not in known:
            raise ValueError(f"there is no {match[1]!r}; {nearest(match[1], values)}")
        return write(known[match[1]], match[2] or "")

    return BRACES.sub(shown, text)


def write(value: Any, form: str) -> str:
    """A number in a format of Python's; also ``.1p``: ``.1%`` without the sign, ``.1f %``: per cents, ``.1f°``:
    radians."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NONE
    if form.endswith("p"):
        return f"{100 * value:{form[:-1]}f}"
    if form.endswith(" %"):
        return f"{value:{form[:-2]}} %"
    if form.endswith("°"):
        return f"{math.degrees(value):{form[:-1]}}°"
    return f"{value:{form}}".replace("%", " %") if form else f"{value}"


@cache
def run(command: str) -> Path:
    """Carry out a command once, as a user would, its messages on standard error; the folder that it ends with.

    Raises:
        ValueError: it failed.
    """
    print(f"$ {command}", file=sys.stderr, flush=True)
    done = subprocess.run([HOLDFAST, *shlex.split(command)[1:]], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ValueError(f"exit code {done.returncode} of {command}")
    return Path(done.stdout.splitlines()[-1])


def carry_out(commands: Sequence[str], words: Words) -> tuple[str, Path]:
    """One command after another; the last one as it was carried out, and its folder."""
    known = dict(words)
    for number, text in enumerate(commands, start=1):
        command = fill(text, known)
        known["run"] = known[f"run{number}"] = folder = run(command)
    return command, folder


def lines_of(commands: Sequence[str], row: Sequence[Words]) -> list[dict[str, Any]]:
    """What came out for a row: one line, or after a study those of its table that the row chooses."""
    done = [carry_out(commands, words) for words in row]
    command, folder = done[0]
    kind = shlex.split(command)[1]
    if kind == "study":
        return chosen(pd.read_csv(folder / "table.csv", na_values=[NONE]), row[0]).to_dict("records")
    if kind == "analyze":
        return [measured(folder, row[0])]
    records = [evaluated(*one) if kind == "train" else read_record(one[1]) for one in done]
    numbers = [key for key, value in records[0].values.items() if type(value) in (int, float)]
    return [records[0].values | {key: mean_of(records, key).value for key in numbers}]


def evaluated(command: str, folder: Path) -> Record:
    """Of a training the evaluation that its command asked for, and how its classes had collapsed in the end."""
    recipe, *overrides = shlex.split(command)[2:]
    record = read_record(folder / EVALUATIONS / resolve(recipe, overrides).evaluation_identity(folder.name))
    path = folder / "neural-collapse.parquet"
    if not path.is_file():
        return record
    table = pd.read_parquet(path)
    last = table[(table["epoch"] == table["epoch"].max()) & (table["layer"] == HEAD) & table["class"].isna()]
    found = {f"{one.collection}.{one.metric}": float(one.value) for one in last.itertuples()}
    return replace(record, values=record.values | found)


def measured(folder: Path, row: Words) -> dict[str, Any]:
    """Sums, minima and means of an analysis' columns of numbers, over the lines that the row chooses."""
    found = {}
    for path in folder.glob("*.csv"):
        table = chosen(pd.read_csv(path), row)
        for column in table.select_dtypes(["number", "bool"]):
            found |= {f"{path.stem}.{column}.{how}": table[column].agg(how) for how in ("sum", "min", "mean")}
    return found


def chosen(table: pd.DataFrame, row: Words) -> pd.DataFrame:
    """The lines that have what ``where`` of the row says, in those of its columns that the table has."""
    for column, value in row.get("where", {}).items():
        if column in table:
            table = table[table[column].astype(str) == str(value)]
    return table


def make_table(entry: Words) -> list[str]:
    """The lines of a table.

    Raises:
        ValueError: a command failed, or gave no number of that name.
    """
    lines = [[*entry["columns"]], ["---"] * len(entry["columns"])]
    for row in rows_of(entry):
        found = lines_of(entry["commands"], row)
        lines += [[cell(text, row[0], values) for text in entry["columns"].values()] for values in found]
    return ["| " + " | ".join(line) + " |" for line in lines]


def put(page: str, name: str, lines: Sequence[str]) -> str:
    """The page with another table between the markers of this name."""
    start, end = f"<!-- table {name} -->\n", "<!-- end -->"
    before, _, after = page.partition(start)
    return before + start + "\n".join(lines) + "\n" + end + after.partition(end)[2]


def remake(listed: Mapping[str, Mapping[str, Any]], page: Path, figures: Path) -> list[str]:
    """Every table of the page and every figure of its folder; why some are left as they are."""
    left = []
    for name, entry in listed["tables"].items():
        try:
            lines = make_table(entry)
        except ValueError as fault:
            left.append(f"table {name} is left as it is: {fault}")
        else:
            write_text(page, put(page.read_text("utf-8"), name, lines))
    for name, entry in listed["figures"].items():
        try:
            _, folder = carry_out(entry["commands"], rows_of(entry)[0][0])
        except ValueError as fault:
            left.append(f"figure {name} is left as it is: {fault}")
        else:
            shutil.copyfile(folder / entry["file"], figures / f"{name}.png")
    return left


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("beginning", nargs="?", default="", help="of the names of tables and figures")
    parser.add_argument("--list", action="store_true", help="show the commands, and carry out none")
    asked = parser.parse_args(arguments)
    listed = {kind: begun(entries, asked.beginning) for kind, entries in read_list().items()}
    if not any(listed.values()):
        known = [name for entries in read_list().values() for name in entries]
        parser.error(f"nothing begins with {asked.beginning!r}; {nearest(asked.beginning, known)}")
    if asked.list:
        for entries in listed.values():
            for name, entry in entries.items():
                print(f"# {name}", *commands_of(entry), sep="\n")
        return 0
    left = remake(listed, DOCS / "results.md", DOCS / "figures")
    print(*left, sep="\n", file=sys.stderr)
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main())
