"""From a recipe's name and overrides ``key=value`` to a validated Experiment."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from holdfast.component import explain, nearest
from holdfast.experiments.recipes.experiment import Experiment
from holdfast.threat import Threat


def recipe_names() -> list[str]:
    """The recipes that come with holdfast."""
    return sorted(p.name.removesuffix(".yaml") for p in _folder().iterdir() if p.name.endswith(".yaml"))


def resolve(recipe: str | Path, overrides: Iterable[str] = ()) -> Experiment:
    """The experiment of a recipe (its name or the path of a YAML file) with overrides ``key=value``.

    Raises:
        ValueError: unknown recipe, key or component, or a value that does not fit; one line per fault.
        FileNotFoundError: the recipe is a path to a file that is not there.
    """
    return apply_all(read_recipe(recipe), overrides)


def apply_all(settings: dict[str, Any], overrides: Iterable[str]) -> Experiment:
    """The experiment of a plain mapping with overrides; raises as ``resolve`` does."""
    for override in overrides:
        apply(settings, override)
    try:
        return Experiment.model_validate(settings)
    except ValidationError as error:
        raise ValueError(explain(error)) from error


def read_recipe(recipe: str | Path) -> dict[str, Any]:
    """The recipe as a plain mapping."""
    if str(recipe) in recipe_names():
        return _parse((_folder() / f"{recipe}.yaml").read_text(encoding="utf-8"), str(recipe))
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml") or path.parent != Path("."):
        if not path.is_file():
            raise FileNotFoundError(f"there is no recipe file {path}")
        return _parse(path.read_text(encoding="utf-8"), str(path))
    raise ValueError(f"{str(recipe)!r} is not a recipe; {nearest(recipe, recipe_names())}")


def apply(settings: dict[str, Any], override: str) -> None:
    """Put one ``key=value`` into a recipe; the value is a YAML scalar or list, the key is dotted.

    A bare name swaps a whole component: ``objective=llr``; a dotted key changes one of its settings.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"expected key=value, given {override!r}")
    put(settings, key, parse_yaml(key, text))


def parse_yaml(key: str, text: str) -> Any:
    """A value as it is written behind ``key=``."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{key}: {text!r} is not a YAML value ({str(error).splitlines()[0]})") from error


def put(settings: dict[str, Any], key: str, value: Any) -> None:
    """Put a value into a recipe, at a dotted key."""
    *parents, last = key.split(".")
    place: Any = settings
    for part in parents:
        place[_index(place, part, key)] = place = _open(part, _get(place, part, key))
    place[_index(place, last, key)] = value


def _open(part: str, value: Any) -> Any:
    """A value whose inside is to be changed: a bare component name or threat becomes a mapping."""
    if isinstance(value, str):
        return dataclasses.asdict(Threat.parse(value)) if part == "threat" else {"name": value}
    return {} if value is None else value


def _get(place: Any, part: str, key: str) -> Any:
    index = _index(place, part, key)
    return place.get(index) if isinstance(place, dict) else place[index]


def _index(place: Any, part: str, key: str) -> str | int:
    if isinstance(place, dict):
        return part
    if not isinstance(place, list):
        raise ValueError(f"{key}: there is nothing inside {place!r}")
    if not part.isdigit() or int(part) >= len(place):
        raise ValueError(f"{key}: {part!r} is not one of the positions 0 to {len(place) - 1}")
    return int(part)


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{source} is not a recipe: expected a mapping, found {type(settings).__name__}")
    return settings


def _folder() -> Any:
    return resources.files("holdfast.experiments") / "recipes"


def recipe_note(name: str) -> str:
    """The first line of a recipe's comment."""
    return (_folder() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
