"""What there is to choose from: every recipe and component, with the words of its docstring."""

from __future__ import annotations

from typing import Any

from holdfast import foreign
from holdfast.attacks import Attack
from holdfast.certify import Certifier
from holdfast.component import Component
from holdfast.data import Augmentation, Data
from holdfast.experiments.analyses import Analysis
from holdfast.experiments.recipes.overrides import recipe_names, recipe_note
from holdfast.experiments.studies.study import read_study, study_names
from holdfast.models import Model
from holdfast.objectives import Objective
from holdfast.training import Optimizer, Schedule

FAMILIES: tuple[type[Component], ...] = (
    *(Data, Augmentation, Model, Objective, Attack, Certifier, Optimizer, Schedule, Analysis),
)


def catalogue() -> dict[str, dict[str, str]]:
    """For each family its members' names, and a sentence on each."""
    entries = {"recipes": {name: recipe_note(name) for name in recipe_names()}}
    entries["studies"] = {name: read_study(name).title for name in study_names()}
    for family in FAMILIES:
        entries[family.family] = {name: member.summary() for name, member in sorted(family.registry.items())}
        for name, entry in foreign.offered(family.family).items():
            entries[family.family].setdefault(name, f"{entry.value} of the package {foreign.package_of(entry)}")
    return entries


def components(name: str) -> list[type[Component]]:
    """The components of this name, of any family; one from elsewhere is imported.

    Raises:
        ValueError: it cannot be imported, or is a member of no family.
    """
    if foreign.is_path(name):
        found = foreign.fetch(name)
        families = [one for one in FAMILIES if isinstance(found, type) and issubclass(found, one)]
        if not families:
            raise ValueError(f"{name!r} is a member of no family, but {_in_words(found)}")
        return [families[0].find(name)]
    known = [family for family in FAMILIES if name in family.registry or name in foreign.offered(family.family)]
    return [family.find(name) for family in known]


def _in_words(found: Any) -> str:
    """What may make a model: a function or a class of modules; or what it is."""
    if not callable(found):
        return f"{type(found).__name__}, which makes no model either"
    kind = "class" if isinstance(found, type) else "function"
    doc = (found.__doc__ or "").strip().partition("\n")[0]
    return f"a {kind} that may make a model{f': {doc}' if doc else ''}"


def settings_of(component: type[Component]) -> list[tuple[str, str, str]]:
    """Name, default and meaning of each setting."""
    return [
        (
            name,
            "required" if field.is_required() else str(field.get_default()),
            " ".join((field.description or "").split()),
        )
        for name, field in component.model_fields.items()
    ]
