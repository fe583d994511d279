"""Component: frozen, validated settings and the one method that works; one registry per family.

A family is an abstract class declared with ``family="attacks"``; its members register with
``name="pgd"``. The same class is the Python API, the schema of the recipe and the text of the help:

    class GaussianNoise(Objective, name="gaussian-noise"):
        sigma: PositiveFloat = 0.25
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Self

from annotated_types import Gt
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema


def nearest(given: object, options: Iterable[str]) -> str:
    """The tail of an error message: the valid names nearest to the one given, or all of them."""
    options = sorted(options)
    close = difflib.get_close_matches(str(given), options, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"valid: {', '.join(options)}"


def parse_number(value: object) -> float:
    """A number, or a string such as ``"0.1"``, ``"8/255"`` or ``"1e-3"``, as a float."""
    if isinstance(value, str):
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError, OverflowError):
            raise ValueError(f"expected a number or a fraction such as 8/255, given {value!r}") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected a number or a fraction such as 8/255, given {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, given {value!r}")
    return float(value)


Number = Annotated[float, BeforeValidator(parse_number)]
"""A setting that may be written as a fraction: ``36/255``."""
PositiveNumber = Annotated[Number, Gt(0)]


class Settings(BaseModel):
    """Frozen settings; an unknown key is an error that names the nearest valid ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, value: object) -> object:
        if isinstance(value, Mapping):
            for key in value:
                if key not in cls.model_fields:
                    raise ValueError(f"unknown key {key!r}; {nearest(key, cls.model_fields)}")
        return value


class Component(Settings):
    """A member of a family: a value that does one thing, chosen by name in a recipe."""

    family: ClassVar[str]
    registry: ClassVar[dict[str, Any]]
    """The family's members by name."""
    name: ClassVar[str]

    def __init_subclass__(cls, *, family: str | None = None, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if family is not None:
            cls.family, cls.registry = family, {}
        if name is not None:
            if name in cls.registry:
                raise ValueError(f"{name!r} is already one of the {cls.family}: {cls.registry[name].__qualname__}")
            cls.name = name
            cls.registry[name] = cls

    @classmethod
    def parse(cls, value: object) -> Self:
        """A member from a member, its name, or a mapping ``{name: ..., setting: ...}``."""
        if isinstance(value, cls):
            return value
        settings = {"name": value} if isinstance(value, str) else value
        if not isinstance(settings, Mapping) or "name" not in settings:
            raise ValueError(
                f"expected the name of one of the {cls.family} or a mapping with a name, given {value!r}"
            )
        name = settings["name"]
        if not isinstance(name, str) or name not in cls.registry:
            raise ValueError(f"{name!r} is not one of the {cls.family}; {nearest(name, cls.registry)}")
        member: Self = cls.registry[name].model_validate({k: v for k, v in settings.items() if k != "name"})
        return member

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if "registry" not in cls.__dict__:  # a member: the ordinary schema of its fields
            return handler(source)
        return core_schema.no_info_plain_validator_function(
            cls.parse,
            serialization=core_schema.plain_serializer_function_ser_schema(lambda member: member.model_dump()),
        )

    @model_serializer(mode="wrap")
    def _serialise(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"name": self.name, **handler(self)}

    @classmethod
    def summary(cls) -> str:
        """The first sentence of the docstring."""
        return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ").replace("``", "")

    @property
    def title(self) -> str:
        """What tables and figures call it."""
        return self.name


def _in_words(value: object) -> str:
    """A setting; of a component its name and settings."""
    if not isinstance(value, Mapping):
        return str(value)
    return " ".join([str(value.get("name", "")), *(f"{k}={_in_words(v)}" for k, v in value.items() if k != "name")])


def distinct_labels(members: Sequence[Component]) -> list[str]:
    """One distinct label per member: its name, and the settings in which its namesakes differ."""
    result = []
    for member in members:
        namesakes = [other.model_dump() for other in members if other.name == member.name]
        own = member.model_dump()
        differing = [key for key in own if any(other[key] != own[key] for other in namesakes)]
        words = ",".join(f"{key}={_in_words(own[key])}" for key in differing)
        result.append(member.name + (f"({words})" if differing else ""))
    for label in result:
        if result.count(label) > 1:
            raise ValueError(f"{label!r} is listed twice with the same settings")
    return result


def explain(error: ValidationError) -> str:
    """A validation error in one line per fault: where, what is wrong, and the value given."""

    def line(fault: Any) -> str:
        where = ".".join(str(part) for part in fault["loc"])
        what = fault["msg"].removeprefix("Value error, ")
        given = "" if fault["type"] in ("value_error", "missing") else f", given {fault['input']!r}"
        return f"{where}: {what}{given}" if where else f"{what}{given}"

    return "\n".join(line(fault) for fault in error.errors(include_url=False))
