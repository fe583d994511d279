"""What others wrote: imported by ``package.module:Name``, or offered by an installed package under a name.

The current folder is searched last, and only while such a name is imported, so that no file that happens to lie
there stands in for a package. What the imported module imports at its top is found there, too, and so are the
submodules of a package at any time; a module beside it that it imports later, within a function, is not.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from importlib import metadata
from types import ModuleType
from typing import Any

_looking: ContextVar[bool] = ContextVar("looking", default=False)


@contextlib.contextmanager
def no_imports() -> Iterator[None]:
    """Inside, reading a recipe imports nothing that it names: who looks at a folder runs no code from it.

    A member of a family from elsewhere is then a placeholder, which keeps the name and the settings and refuses
    to work.
    """
    token = _looking.set(True)
    try:
        yield
    finally:
        _looking.reset(token)


def only_looking() -> bool:
    """Whether this is inside ``no_imports``."""
    return _looking.get()


def is_path(name: str) -> bool:
    """Whether it is written as ``package.module:Name``, rather than a name in a registry."""
    return ":" in name


def short_name(name: str) -> str:
    """What tables and figures call a member: ``Warm`` for ``package.losses:Warm``."""
    return name.rpartition(":")[2].rpartition(".")[2] if is_path(name) else name


def parts(path: str) -> tuple[str, str]:
    """Module and name of ``package.module:Name``.

    Raises:
        ValueError: it is none.
    """
    module, _, name = path.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), *name.split(".")]):
        raise ValueError(f"expected package.module:Name, given {path!r}")
    return module, name


def fetch(path: str, *, here: bool = True) -> Any:
    """What ``package.module:Name`` names; ``Outer.Inner`` is found inside.

    Args:
        here: search the current folder, too, after everything else.

    Raises:
        ValueError: the module is not there, or raises when it is imported, or has no such name; one sentence.
    """
    module_name, name = parts(path)
    module = _module(path, module_name, here)
    value: Any = module
    for part in name.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            close = difflib.get_close_matches(part, getattr(value, "__dict__", ()), n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            where = f"{module_name} ({_file(module)}) has no {name!r}"
            raise ValueError(f"{path!r} cannot be imported: {where}{hint}") from None
    return value


def _module(path: str, name: str, here: bool) -> ModuleType:
    try:
        with current_folder_last() if here else contextlib.nullcontext():
            if name not in sys.modules:
                importlib.invalidate_caches()  # the file may be a moment old
            return importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as fault:  # a module may raise anything, SystemExit too
        raise ValueError(f"{path!r} cannot be imported: {_in_a_sentence(fault, name)}") from fault


def _in_a_sentence(fault: BaseException, module: str) -> str:
    text = " ".join(str(fault).split())
    if isinstance(fault, ModuleNotFoundError):
        own = fault.name is not None and (module == fault.name or module.startswith(f"{fault.name}."))
        return f"{text}, neither installed nor in {os.getcwd()}" if own else f"{text}, which it imports"
    if isinstance(fault, SyntaxError):
        return f"{text} is no Python"
    lines, step = "", fault.__traceback__
    while step is not None:
        file = step.tb_frame.f_code.co_filename
        if not file.startswith("<") and "importlib" not in file and file != __file__:
            lines = f" ({os.path.basename(file)}, line {step.tb_lineno})"
        step = step.tb_next
    return f"it raises {type(fault).__name__}{f': {text}' if text else ''}{lines}"


@contextlib.contextmanager
def current_folder_last() -> Iterator[None]:
    """The current folder at the end of the search path, unless it is on it already."""
    folder = os.getcwd()
    if any(os.path.abspath(entry or folder) == folder for entry in sys.path if isinstance(entry, str)):
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        for place in reversed(range(len(sys.path))):  # the module may have changed the path, too
            if sys.path[place] == folder:
                del sys.path[place]
                break


def _file(module: ModuleType) -> str:
    found = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), None)
    return str(found) if found else "built in"


def origin(path: str) -> str:
    """The file of the module of ``package.module:Name``, which is imported for it if it is not yet.

    Raises:
        ValueError: it cannot be imported.
    """
    name, _ = parts(path)
    return _file(_module(path, name, here=True))


def missing(path: str) -> str:
    """Why ``package.module:Name`` will hardly be imported, found out without running any of it; empty where nothing
    is known against it."""
    try:
        top = parts(path)[0].partition(".")[0]
    except ValueError as fault:
        return str(fault)
    if top in sys.modules or top in sys.builtin_module_names:
        return ""
    with current_folder_last():
        found = importlib.util.find_spec(top)
    return "" if found else f"there is no module {top!r}, neither installed nor in {os.getcwd()}"


def offered(family: str) -> dict[str, metadata.EntryPoint]:
    """What installed packages offer under the entry-point group ``holdfast.FAMILY``, from their metadata alone."""
    found: dict[str, metadata.EntryPoint] = {}
    for entry in metadata.entry_points(group=f"holdfast.{family}"):
        found.setdefault(entry.name, entry)  # of several the first on the path
    return dict(sorted(found.items()))


def package_of(entry: metadata.EntryPoint) -> str:
    """The package that offers it."""
    return entry.dist.name if entry.dist is not None else entry.module.partition(".")[0]
