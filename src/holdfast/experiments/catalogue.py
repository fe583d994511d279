"""What there is to choose from: every recipe and component, with the words of its docstring."""

from __future__ import annotations

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
    return entries


def components(name: str) -> list[type[Component]]:
    """The components of this name, of any family."""
    return [family.registry[name] for family in FAMILIES if name in family.registry]


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
