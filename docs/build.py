"""Writes the pages that follow from the code: docs/studies/*.md from the studies, docs/api.md from the docstrings.

python docs/build.py            # a test fails where a page is not what this writes
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from functools import partial
from pathlib import Path
from textwrap import fill as wrap
from typing import Any

from pydantic import BaseModel

from holdfast.experiments.studies.study import Study, plan_study, read_study, study_names

DOCS = Path(__file__).parent
fill = partial(wrap, width=116, break_long_words=False, break_on_hyphens=False)
ROOMS = (
    ("holdfast", "The front door"),
    ("holdfast.attacks", "Attacks: what fooled a model"),
    ("holdfast.certify", "Certificates: what cannot be fooled"),
    ("holdfast.bounds", "Bounds of any traceable module"),
    ("holdfast.objectives", "Training losses"),
    ("holdfast.training", "The loop"),
    ("holdfast.evaluation", "The sandwich"),
    ("holdfast.layers", "Layers"),
    ("holdfast.models", "Architectures"),
    ("holdfast.data", "Image sets"),
    ("holdfast.analysis", "What explains robustness"),
    ("holdfast.experiments", "Recipes, runs and their folders"),
)
SLURM = "--on slurm --workers 16 --resource timeout_min=2880 --resource gpus_per_node=1"
RAY = "--on ray --address auto --resource num_gpus=0.25"


def study_page(name: str, study: Study) -> str:
    """What a study shows, how long it takes, how to run it, and the published numbers."""
    runs, _ = plan_study(study)
    lines = [f"# {study.title}", "", fill(study.shows), "", fill(f"Source: {study.source}."), ""]
    lines += [fill(f"On one GPU: {study.hours}."), ""]
    lines += [fill(f"What is different: {study.note}"), ""] if study.note else []
    commands = [f"holdfast study {name}"]
    if runs:
        commands = [f"holdfast study {name} --dry-run", *commands]
    commands.append(f"holdfast study {name} --data digits --scale 0.1")
    if runs:
        commands.insert(2, f"holdfast study {name} --scale 0.01 --workers 2")
        commands += [f"holdfast study {name} {SLURM}", f"holdfast study {name} {RAY}"]
    lines += [*(f"    {command}" for command in commands), ""]
    words = "The first line shows the plan and its cost, the last ones run it on Slurm and on Ray. " if runs else ""
    words += (
        "`--scale` shrinks what is trained on and evaluated, and says how. Table (CSV, LaTeX) and figures go to "
    )
    words += f"`runs/studies/{name}`; runs that are finished are not repeated."
    lines += [fill(words), ""]
    lines += ["## Claims, which the runs answer", ""] if study.claims else []
    for claim in study.claims:
        condition = f"{claim.condition}{' (one value answers)' if claim.exact else ''}"
        lines += [fill(f"- {claim.says}", subsequent_indent="  "), "", f"      {condition}", ""]
    for one in study.published:
        kind = "Published" if one.verified else "Published, but unverified"
        lines += [f"## {kind}: {one.source}", ""]
        count = len(one.rows[0]) - len(one.columns)
        lines += ["| " + " | ".join([*[""] * count, *one.columns]) + " |", "|" + " --- |" * len(one.rows[0])]
        lines += ["| " + " | ".join("–" if cell is None else f"{cell}" for cell in row) + " |" for row in one.rows]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def api_page() -> str:
    """Every public name, its signature or settings, and its docstring."""
    lines = ["# API", "", "Every public name, once, by the room it lives in; written from the docstrings.", ""]
    seen: list[Any] = []
    for module_name, title in ROOMS:
        module = importlib.import_module(module_name)
        lines += [f"## {title}: `{module_name}`", ""]
        for name in sorted(module.__all__, key=str.lower):
            value = getattr(module, name)
            if not any(value is other for other in seen):
                seen.append(value)
                lines += entry(name, value)
    return "\n".join(lines).rstrip() + "\n"


def entry(name: str, value: Any) -> list[str]:
    """One name."""
    if inspect.isclass(value) and issubclass(value, BaseModel):
        lines = [f"### `{name}`", "", own_doc(value), ""]
        rows = [
            (
                key,
                "required" if field.is_required() else repr(field.get_default()),
                " ".join((field.description or "").split()),
            )
            for key, field in value.model_fields.items()
        ]
        if rows:
            lines += ["| setting | default | meaning |", "| --- | --- | --- |"]
            lines += [f"| `{key}` | `{default}` | {meaning} |".replace("|ᵀ", "ᵀ") for key, default, meaning in rows]
            lines.append("")
        return lines
    if callable(value):
        try:
            text = re.sub(r": '([^']*)'|-> '([^']*)'", _plain, str(inspect.signature(value)))
        except (TypeError, ValueError):
            text = ""
        return [f"### `{name}`", "", f"    {name}{text}", "", own_doc(value), ""]
    return [f"### `{name}`", "", f"`{value!r}`", ""]


def _plain(match: re.Match[str]) -> str:
    """An annotation without its quotes."""
    return f": {match[1]}" if match[1] else f"-> {match[2]}"


def own_doc(value: Any) -> str:
    """The docstring, its sections as they stand."""
    doc = inspect.getdoc(value) or ""
    text, *sections = doc.split("\n\n")
    blocks = [text]
    for section in sections:
        known = section.startswith(("Args:", "Raises:", ">>>", "    "))
        blocks.append("\n".join(f"    {line}" for line in section.splitlines()) if known else section)
    return "\n\n".join(blocks)


def pages() -> dict[Path, str]:
    """Every page by its path."""
    found = {DOCS / "studies" / f"{name}.md": study_page(name, read_study(name)) for name in study_names()}
    index = ["# Studies", "", "Published experiments, each by one command: `holdfast study NAME`.", ""]
    index += [f"- [{name}]({name}.md): {read_study(name).title}" for name in study_names()]
    found[DOCS / "studies" / "README.md"] = "\n".join(index) + "\n"
    found[DOCS / "api.md"] = api_page()
    return found


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path, file=sys.stderr)
