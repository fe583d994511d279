"""Settings as they are stored and compared: those that are not the defaults."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from holdfast.component import Component
from holdfast.threat import Threat


def sparse(settings: BaseModel, *, without: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The settings that differ from their defaults as a plain mapping, which validates to the same settings; of a
    component also its name."""
    found: dict[str, Any] = {}
    if isinstance(settings, Component):
        if settings.is_foreign() or settings.is_placeholder:  # whoever only looks does not know its defaults
            whole: dict[str, Any] = settings.model_dump(mode="json")
            return whole
        found["name"] = settings.spelling
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if name in without or (not field.is_required() and value == field.get_default(call_default_factory=True)):
            continue
        found[name] = plain(value)
    return found


def plain(value: Any) -> Any:
    """A setting's value in the types that YAML and JSON have."""
    if isinstance(value, BaseModel):
        return sparse(value)
    if isinstance(value, Threat):
        return value.serialise()
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def digest(part: Mapping[str, Any]) -> str:
    """The name that follows from settings: twelve hexadecimal digits."""
    return hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:12]
