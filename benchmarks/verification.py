"""Branch and bound on a folder of VNN-COMP: verdicts beside the published ones, and the seconds of each.

    python benchmarks/verification.py FOLDER --seconds 120 --out verification.jsonl

FOLDER holds an ``instances.csv`` of network, property, limit_s, verdict and solved_by_seconds, and the files that
it names. Each instance has one line in the output, written as soon as it is decided; asked again, the script goes
on with those that have none at this limit. The last thing printed is a table in Markdown. Exit code 1 if a verdict
contradicts a published one.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from holdfast.certify import verify
from holdfast.formats import OnnxNetwork, Property, read_onnx, read_vnnlib

WORDS = {"proved": "unsat", "refuted": "sat", "undecided": "unknown"}


def decide(network: OnnxNetwork, asked: Property, seconds: float) -> dict[str, Any]:
    """Verdict of all boxes of a property together, within so many seconds, and what it took."""
    started, cpu = time.perf_counter(), time.process_time()
    word, domains, root, bound = "unsat", 0, 0.0, math.inf
    for query in asked.queries:
        found = verify(
            network.module,
            query.lower.view(1, *network.input_shape),
            query.upper.view(1, *network.input_shape),
            [rows for rows, _ in query.unsafe],
            [offsets for _, offsets in query.unsafe],
            seconds=max(0.0, seconds - (time.perf_counter() - started)),
        )
        domains, root, bound = domains + found.domains, root + found.root_seconds, min(bound, found.bound)
        if found.verdict != "proved":
            word = WORDS[found.verdict]
        if word == "sat":
            break
    return {
        "verdict": word,
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "root_seconds": round(root, 2),
        "domains": domains,
        "bound": bound if math.isfinite(bound) else None,
    }


def instances(folder: Path) -> list[dict[str, str]]:
    """The rows of ``instances.csv``."""
    with (folder / "instances.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def contradicts(verdict: str, published: str) -> bool:
    """Whether one says that there is a counterexample and the other that there is none."""
    return {verdict, published} == {"sat", "unsat"}


def kept(path: Path) -> list[dict[str, Any]]:
    """The lines of an output file; one that was cut off in the middle does not count."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def run(folder: Path, chosen: Sequence[dict[str, str]], seconds: float, out: Path) -> Iterator[dict[str, Any]]:
    """Each instance with what became of it, from the file where it is there."""
    known = {(one["network"], one["property"]): one for one in kept(out) if one["limit"] == seconds}
    for row in chosen:
        key = row["network"], row["property"]
        if key not in known:
            network = read_onnx(folder / row["network"])
            found = decide(network, read_vnnlib(folder / row["property"]), seconds)
            known[key] = {"network": key[0], "property": key[1], "limit": seconds, "published": row["verdict"]}
            known[key] |= found
            with out.open("a") as file:
                file.write(("" if _whole(out) else "\n") + json.dumps(known[key]) + "\n")
        yield known[key] | {"others": row["solved_by_seconds"]}


def _whole(path: Path) -> bool:
    """Whether a file ends with a line's end."""
    text = path.read_bytes()
    return not text or text.endswith(b"\n")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown, with a line of counts for each network."""
    lines = ["| network | property | published | ours | seconds | CPU | root | parts | others' seconds |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        ours = f"**{row['verdict']}**" if contradicts(row["verdict"], row["published"]) else row["verdict"]
        share = f"{100 * row['root_seconds'] / row['limit']:.0f} %"
        names = f"{Path(row['network']).stem} | {row['property'].removesuffix('.gz').removesuffix('.vnnlib')}"
        numbers = f"{row['seconds']:.1f} | {row['cpu_seconds']:.1f} | {share} | {row['domains']}"
        lines.append(f"| {names} | {row['published']} | {ours} | {numbers} | {row['others'] or '–'} |")
    lines += ["", "| network | decided of those with a published verdict | beyond them | wrong |"]
    lines += ["| --- | --- | --- | --- |"]
    for network in dict.fromkeys(row["network"] for row in rows):
        mine = [row for row in rows if row["network"] == network]
        told = [row for row in mine if row["published"] != "unknown"]
        equal = sum(row["verdict"] == row["published"] for row in told)
        beyond = sum(row["verdict"] != "unknown" for row in mine if row["published"] == "unknown")
        wrong = sum(contradicts(row["verdict"], row["published"]) for row in mine)
        lines.append(f"| {Path(network).stem} | {equal} of {len(told)} | {beyond} | {wrong} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=120.0, help="for each instance")
    parser.add_argument("--out", type=Path, default=Path("verification.jsonl"))
    parser.add_argument("--only", default="", help="those whose network or property has this in its name")
    parser.add_argument("--limit", type=int, help="so many instances at most")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    chosen = [row for row in instances(options.folder) if options.only in f"{row['network']} {row['property']}"]
    rows = []
    for row in run(options.folder, chosen[: options.limit], options.seconds, options.out):
        rows.append(row)
        told = f"{row['network']} {row['property']}: {row['verdict']} ({row['published']} published), "
        print(f"{told}{row['seconds']:.1f} s, root {row['root_seconds']:.1f} s, {row['domains']} parts, ", end="")
        print(f"bound {row['bound']}", flush=True, file=sys.stdout)
    print("\n" + table(rows))
    return int(any(contradicts(row["verdict"], row["published"]) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
