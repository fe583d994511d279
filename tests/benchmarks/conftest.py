"""The scripts of benchmarks/ as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # by this name the scripts import each other
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("exact", monkeypatch)


@pytest.fixture
def exact_region(exact: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("exact_region", monkeypatch)


@pytest.fixture
def exact_smooth(exact: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("exact_smooth", monkeypatch)


@pytest.fixture
def soundness(exact_region: ModuleType, exact_smooth: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    script("random_networks", monkeypatch)
    return script("soundness", monkeypatch)


@pytest.fixture
def verification(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("verification", monkeypatch)
