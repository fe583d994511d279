"""Component: frozen, validated settings and the one method that works; one registry per family.

A family is an abstract class declared with ``family="attacks"``; its members register with
``name="pgd"``. The same class is the Python API, the schema of the recipe and the text of the help:

    class GaussianNoise(Objective, name="gaussian-noise"):
        sigma: PositiveFloat = 0.25

A member from elsewhere is written as ``package.module:Class`` in the place of a name, or by the name under which an
installed package offers it (see ``foreign``); a recipe keeps what was written.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

from holdfast import foreign


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
    family_class: ClassVar[Any]
    """The family's abstract class."""
    name: ClassVar[str]
    """That under which it registers; the name of the class where it says none."""

    def __init_subclass__(cls, *, family: str | None = None, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if family is not None:
            cls.family, cls.registry, cls.family_class = family, {}, cls
        chosen = (own for base in cls.__mro__ if (own := vars(base).get("name", base.__name__)) != base.__name__)
        cls.name = name or next(chosen, cls.__name__)
        if name is not None:
            known = cls.registry.get(name, cls)
            if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):  # else defined anew
                raise ValueError(f"{name!r} is already one of the {cls.family}: {known.__qualname__}")
            cls.registry[name] = cls

    @classmethod
    def parse(cls, value: object) -> Self:
        """A member from a member, its name, or a mapping ``{name: ..., setting: ...}``.

        The name is one of the registry, ``package.module:Class``, or one that an installed package offers.

        Raises:
            ValueError: there is no such member, or its settings do not fit.
        """
        if isinstance(value, cls):
            return value
        settings = {"name": value} if isinstance(value, str) else value
        if not isinstance(settings, Mapping) or "name" not in settings:
            raise ValueError(
                f"expected the name of one of the {cls.family} or a mapping with a name, given {value!r}"
            )
        name, given = settings["name"], {k: v for k, v in settings.items() if k != "name"}
        if isinstance(name, str) and name in cls.registry:
            member: Self = cls.registry[name].model_validate(given)
            return member
        if isinstance(name, str) and foreign.only_looking():
            return cls._placeholder(name, given)
        return _make(cls.find(name), given, name)

    @classmethod
    def find(cls, name: object) -> type[Self]:
        """The member's class by its name, which is imported where it is from elsewhere.

        Raises:
            ValueError: there is no such member, it cannot be imported, or it is none of the family.
        """
        found: type[Self]
        if isinstance(name, str) and name in cls.registry:
            found = cls.registry[name]
            return found
        if isinstance(name, str) and foreign.is_path(name):
            return cls._checked(name, foreign.fetch(name))
        others = foreign.offered(cls.family)
        if not isinstance(name, str) or name not in others:
            options = {*cls.registry, *others}
            raise ValueError(f"{name!r} is not one of the {cls.family}; {nearest(name, options)}")
        return cls._checked(name, foreign.fetch(others[name].value, here=False))

    @classmethod
    def _checked(cls, name: str, found: Any) -> type[Self]:
        """The class, if it can be a member.

        Raises:
            ValueError: it is none of the family, or a method of it is missing or takes other arguments.
        """
        if not (isinstance(found, type) and issubclass(found, cls.family_class)):
            head = cls.family_class
            expected = (
                f"a class that derives from {head.__module__.rpartition('.')[0] or head.__module__}.{head.__name__}"
            )
            raise ValueError(f"{name!r} is not one of the {cls.family}: expected {expected}")
        if missing := sorted(getattr(found, "__abstractmethods__", ())):
            raise ValueError(f"{name!r} has no method {missing[0]!r}, which all of the {cls.family} have")
        for base in found.__mro__:
            for method in getattr(base, "__abstractmethods__", ()) if not _is_foreign(base, cls) else ():
                _check_arguments(name, method, getattr(found, method), getattr(base, method))
        return found

    @classmethod
    def _placeholder(cls, name: str, given: dict[str, Any]) -> Self:
        member = _placeholders(cls.family_class).model_construct(**given)
        member.__dict__ |= {"_written": name, "_given": given}  # no settings: outside what is compared
        kept: Self = member
        return kept

    @property
    def is_placeholder(self) -> bool:
        """Whether it stands for a member that was not imported, because somebody only looks."""
        return False

    @classmethod
    def is_foreign(cls) -> bool:
        """Whether somebody else wrote it."""
        return _is_foreign(cls, cls)

    @property
    def spelling(self) -> str:
        """What a recipe calls it: the name in the registry, or the path by which others can import it."""
        written: str = self.__dict__.get("_written", "")
        return written or _spelling(type(self))

    @property
    def short_name(self) -> str:
        """For tables, figures and files; of a path its last word, whether or not the member was imported."""
        return foreign.short_name(self.__dict__.get("_written", "")) or self.name

    @property
    def imported_paths(self) -> tuple[str, ...]:
        """What it takes from elsewhere, by ``package.module:Name``."""
        return (f"{type(self).__module__}:{type(self).__qualname__}",) if self.is_foreign() else ()

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
        return {"name": self.spelling, **handler(self)}

    def __repr_name__(self) -> str:
        own = type(self)
        return f"{own.__module__}:{own.__qualname__}" if self.is_foreign() else own.__name__

    @classmethod
    def summary(cls) -> str:
        """The first sentence of the docstring."""
        return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ").replace("``", "")

    @property
    def title(self) -> str:
        """What tables and figures call it."""
        return self.short_name


def _is_foreign(found: type, family: type[Component]) -> bool:
    """Whether a class is of another package than its family."""
    return found.__module__.partition(".")[0] != family.family_class.__module__.partition(".")[0]


def _spelling(member: type[Component]) -> str:
    """What a recipe calls a member of this class: where it is from elsewhere its path, if others can import it."""
    local = member.__module__ == "__main__" or "<" in member.__qualname__
    if _is_foreign(member, member) and not local:
        return f"{member.__module__}:{member.__qualname__}"
    return member.name


def _make(member: type[Any], given: dict[str, Any], name: object) -> Any:
    """A member from elsewhere with its settings, that remembers how it was named."""
    try:
        made = member.model_validate(given)
    except ValueError:
        raise
    except Exception as fault:  # a constructor of one's own
        text = " ".join(str(fault).split())
        raise ValueError(f"{name!r} cannot be made of the settings {given}: {text}") from fault
    if member.is_foreign():
        made.__dict__["_written"] = name
    return made


def _check_arguments(name: str, method: str, own: Any, expected: Any) -> None:
    """Refuse a method that cannot be called as those of its family are."""
    wanted = inspect.signature(expected).parameters.values()
    positional = [one.name for one in wanted if one.kind is one.POSITIONAL_OR_KEYWORD]
    by_name = {one.name: None for one in wanted if one.kind is one.KEYWORD_ONLY}
    try:
        inspect.signature(own).bind(*positional, **by_name)
    except TypeError:
        words = ", ".join(inspect.signature(expected).parameters)
        raise ValueError(
            f"{name!r}: {method} takes ({', '.join(inspect.signature(own).parameters)}), expected ({words})"
        ) from None


@functools.cache
def _placeholders(family: type[Component]) -> type[Any]:
    """A class of placeholders of a family: they keep any settings, and every method refuses to work."""

    def refuse(self: Component, *args: object, **kwargs: object) -> Any:
        raise ValueError(f"{self.spelling!r} of the {self.family} was not imported, as this only looks at a recipe")

    def serialise(self: Component, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"name": self.spelling, **self.__dict__["_given"]}

    bases = family.__mro__[: family.__mro__.index(Component)]
    taken = {name for base in Component.__mro__ for name in vars(base)}
    methods = {
        name: refuse
        for base in bases
        for name, value in vars(base).items()
        if inspect.isfunction(value) and name not in taken and (name[0] != "_" or name == "__call__")
    }
    namespace = {
        "__module__": family.__module__,
        "__qualname__": f"Placeholder[{family.__name__}]",
        "model_config": ConfigDict(extra="allow"),
        "is_placeholder": property(lambda self: True),
        "imported_paths": property(lambda self: (self.spelling,)),
        "_serialise": model_serializer(mode="wrap")(serialise),
        **methods,
    }
    metaclass: Any = type(family)
    return metaclass(f"Placeholder[{family.__name__}]", (family,), namespace)


def members(settings: object) -> Iterator[Component]:
    """Every component of a recipe, those inside others included."""
    if isinstance(settings, Component):
        yield settings
    if isinstance(settings, BaseModel):
        values: Iterable[object] = [getattr(settings, key) for key in type(settings).model_fields]
    elif isinstance(settings, Mapping):
        values = settings.values()
    else:
        values = settings if isinstance(settings, list | tuple) else ()
    for value in values:
        yield from members(value)


def foreign_modules(settings: object) -> dict[str, str]:
    """The modules from elsewhere that a recipe uses, imported where they are not yet, and the file of each.

    Raises:
        ValueError: one cannot be imported.
    """
    found = {}
    for path in dict.fromkeys(path for member in members(settings) for path in member.imported_paths):
        module = path.partition(":")[0]
        local = getattr(sys.modules.get(module), "__file__", None)  # a class of a script or a notebook
        found[module] = local or ("an interactive session" if module == "__main__" else foreign.origin(path))
    return found


def absent(settings: object) -> list[str]:
    """What a recipe names that was not imported, since somebody only looks: a sentence on each."""
    sentences = []
    for member in members(settings):
        for path in member.imported_paths:
            if member.is_placeholder or foreign.parts(path)[0] not in sys.modules:
                why = foreign.missing(path) if foreign.is_path(path) else _not_offered(member.family_class, path)
                what = f"{path} of the {member.family}"
                sentences.append(f"{what} cannot be imported: {why}" if why else f"{what} was not imported to look")
    return list(dict.fromkeys(sentences))


def _not_offered(family: type[Component], name: str) -> str:
    return "" if name in foreign.offered(family.family) else f"no installed package offers {name!r}"


def _in_words(value: object) -> str:
    """A setting; of a component its name and settings."""
    if not isinstance(value, Mapping):
        return str(value)
    return " ".join([str(value.get("name", "")), *(f"{k}={_in_words(v)}" for k, v in value.items() if k != "name")])


def distinct_labels(members: Sequence[Component]) -> list[str]:
    """One distinct label per member: its name, and the settings in which its namesakes differ."""
    result = []
    for member in members:
        namesakes = [other.model_dump() for other in members if other.short_name == member.short_name]
        own = member.model_dump()
        differing = [key for key in own if any(other.get(key) != own[key] for other in namesakes)]
        words = ",".join(f"{key}={_in_words(own[key])}" for key in differing)
        result.append(member.short_name + (f"({words})" if differing else ""))
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
