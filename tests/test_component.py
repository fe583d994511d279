"""Component: registries, nested settings, and errors that teach."""

from __future__ import annotations

import importlib
import sys
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import NonNegativeFloat, PositiveInt, ValidationError

from holdfast import foreign
from holdfast.component import (
    Component,
    Settings,
    absent,
    distinct_labels,
    explain,
    foreign_modules,
    parse_number,
)
from holdfast.foreign import no_imports


class Shape(Component, family="shapes"):
    """A family of the tests."""


class Square(Shape, name="square"):
    """Four equal sides.

    More words.
    """

    side: NonNegativeFloat = 1.0
    """Length of a side."""


class Star(Shape, name="star"):
    """Pointed."""

    points: PositiveInt
    """How many."""


class Drawing(Settings):
    shapes: list[Shape]
    frame: Shape = Square()


def test_members_come_from_themselves_names_and_mappings() -> None:
    assert Shape.parse("square") == Square() == Shape.parse(Square())
    assert Shape.parse({"name": "square", "side": 0.25}) == Square(side=0.25)
    drawing = Drawing.model_validate({"shapes": ["square", {"name": "star", "points": 5}]})
    assert drawing.shapes == [Square(), Star(points=5)]
    assert Drawing.model_validate(drawing.model_dump()) == drawing


def test_members_are_frozen_and_know_themselves() -> None:
    with pytest.raises(ValidationError):
        Square().side = 2.0
    assert Square.summary() == "Four equal sides."
    assert Square.model_fields["side"].description == "Length of a side."
    assert Square().model_dump() == {"name": "square", "side": 1.0}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("sqare", "'sqare' is not one of the shapes; did you mean 'square'"),
        ("zzz", "valid: square, star"),
        ({"side": 1}, "expected the name of one of the shapes"),
        (7, "expected the name of one of the shapes"),
        ({"name": "square", "sid": 1}, "unknown key 'sid'; did you mean 'side'"),
        ({"name": "square", "side": -1}, "greater than or equal to 0"),
        ({"name": ["square"]}, "is not one of the shapes"),
    ],
)
def test_what_does_not_fit_is_named_with_the_nearest(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shape.parse(value)


def test_a_fault_inside_a_recipe_is_located() -> None:
    with pytest.raises(ValidationError) as caught:
        Drawing.model_validate({"shapes": ["square", {"name": "star", "points": 0}], "fram": "star"})
    assert "unknown key 'fram'; did you mean 'frame'?" in explain(caught.value)
    with pytest.raises(ValidationError) as caught:
        Drawing.model_validate({"shapes": ["square", {"name": "star", "points": 0}]})
    assert explain(caught.value) == "shapes.1.points: Input should be greater than 0, given 0"


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="already one of the shapes"):

        class Another(Shape, name="square"):
            pass


def test_labels_tell_namesakes_apart() -> None:
    assert distinct_labels([Square(), Star(points=3)]) == ["square", "star"]
    assert distinct_labels([Star(points=3), Star(points=4)]) == ["star(points=3)", "star(points=4)"]
    with pytest.raises(ValueError, match="listed twice"):
        distinct_labels([Square(), Square()])


def test_numbers() -> None:
    assert parse_number("8/255") == 8 / 255
    assert parse_number("1e-3") == 0.001
    for wrong in ("x", None, True, float("nan"), float("inf"), [1]):
        with pytest.raises(ValueError, match="number"):
            parse_number(wrong)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with modules in it."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


class Figure(Component, family="figures"):
    """A family whose members come from elsewhere."""

    colour: str = "red"

    @abstractmethod
    def area(self, scale: float, *, unit: str = "") -> float:
        """How large it is."""


def write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"from {__name__} import Figure\n{text}")


OVAL = """
class Oval(Figure):
    '''Round.'''
    wide: float = 1.0
    def area(self, scale, *, unit=""):
        return self.wide * scale

class Outer:
    class Inner(Oval):
        pass
"""


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch) -> type[Figure]:
    """The family as the modules of the current folder import it."""
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or sys.modules[Figure.__module__])
    return Figure


def test_a_member_comes_by_its_path_and_the_recipe_keeps_it(folder: Path, figure: type[Figure]) -> None:
    write(folder / "ownoval.py", OVAL)
    before = list(sys.path)
    oval = figure.parse({"name": "ownoval:Oval", "wide": 2})
    assert sys.path == before
    assert oval.area(3) == 6
    assert oval.model_dump() == {"name": "ownoval:Oval", "colour": "red", "wide": 2.0}
    assert figure.parse(oval.model_dump()) == oval == type(oval)(wide=2)
    assert type(oval)().model_dump()["name"] == "ownoval:Oval"
    assert oval.short_name == oval.title == "Oval"
    assert oval.model_copy(update={"wide": 1.0}).spelling == "ownoval:Oval"
    inner = figure.parse("ownoval:Outer.Inner")
    assert inner.spelling == "ownoval:Outer.Inner"
    assert distinct_labels([oval, inner]) == ["Oval", "Inner"]
    assert foreign_modules([oval]) == {"ownoval": str(folder / "ownoval.py")}


def test_a_file_beside_you_stands_in_for_no_package(folder: Path, figure: type[Figure]) -> None:
    write(folder / "ownlast.py", "import wave, ownhelper\n" + OVAL)
    (folder / "wave.py").write_text("raise SystemExit('a stranger')")
    (folder / "ownhelper.py").write_text("")
    sys.modules.pop("wave", None)
    assert figure.parse("ownlast:Oval").area(1) == 1
    with pytest.raises(ImportError):
        importlib.import_module("ownlast2")


def test_submodules_of_a_package_are_found_later(folder: Path, figure: type[Figure]) -> None:
    write(folder / "ownpack" / "__init__.py", "")
    late = OVAL.replace("return self.wide", "from ownpack.late import two; return two * self.wide")
    write(folder / "ownpack" / "ovals.py", late)
    (folder / "ownpack" / "late.py").write_text("two = 2")
    assert figure.parse("ownpack.ovals:Oval").area(1) == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ownnone:Oval", None, "No module named 'ownnone', neither installed nor in"),
        ("ownbad:Oval", "import ownabsent", "No module named 'ownabsent', which it imports"),
        ("ownbad:Oval", "1 / 0", r"it raises ZeroDivisionError: division by zero \(ownbad.py, line 2\)"),
        ("ownbad:Oval", "raise SystemExit", "it raises SystemExit"),
        ("ownbad:Oval", "class", r"invalid syntax \(ownbad.py, line 2\)"),
        ("ownbad:Ovel", OVAL, "has no 'Ovel'; did you mean 'Oval'"),
        ("ownbad:Outer", OVAL, "'ownbad:Outer' is not one of the figures: expected a class that derives from"),
        ("ownbad:Oval", "class Oval(Figure): pass", "'ownbad:Oval' has no method 'area'"),
        (
            "ownbad:Oval",
            "class Oval(Figure):\n def area(self): ...",
            r"area takes \(self\), expected \(self, scale",
        ),
        ("ownbad:Oval", OVAL.replace("float = 1.0", "int"), "wide"),
        ("ownbad:Oval", "class Oval(Figure):\n def __init__(self, n): 1\n def area(self, scale, unit): ...", "'n'"),
        ("ownbad:", "", "expected package.module:Name"),
        ("own bad:Oval", "", "expected package.module:Name"),
    ],
)
def test_what_cannot_be_a_member_is_told_in_a_sentence(
    folder: Path, figure: type[Figure], name: str, text: str | None, message: str
) -> None:
    if text is not None:
        write(folder / "ownbad.py", text)
    with pytest.raises(ValueError, match=message) as caught:
        figure.parse(name)
    assert isinstance(caught.value, ValidationError) or "\n" not in str(caught.value)


def test_who_looks_imports_nothing(folder: Path, figure: type[Figure]) -> None:
    write(folder / "ownlook.py", "raise SystemExit('code was run')")
    with no_imports():
        oval = figure.parse({"name": "ownlook:Oval", "wide": 2, "area": 3})
        gone = figure.parse("owngone:Oval")
        unknown = figure.parse("oval")
    assert oval.is_placeholder
    assert oval.model_dump() == {"name": "ownlook:Oval", "wide": 2, "area": 3}
    assert oval.title == oval.short_name == "Oval"
    with pytest.raises(ValueError, match="'ownlook:Oval' of the figures was not imported"):
        oval.area(1)
    sentences = absent([oval, gone, unknown])
    assert sentences[0] == "ownlook:Oval of the figures was not imported to look"
    assert sentences[1].startswith("owngone:Oval of the figures cannot be imported: there is no module 'owngone'")
    assert sentences[2] == "oval of the figures cannot be imported: no installed package offers 'oval'"
    assert "ownlook" not in sys.modules


def test_an_installed_package_offers_names(
    folder: Path, figure: type[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    site = folder / "site"
    write(site / "ownoffer.py", OVAL)
    (site / "ownoffer-1.0.dist-info").mkdir()
    (site / "ownoffer-1.0.dist-info" / "METADATA").write_text("Name: ownoffer\nVersion: 1.0\n")
    (site / "ownoffer-1.0.dist-info" / "entry_points.txt").write_text("[holdfast.figures]\nround = ownoffer:Oval\n")
    monkeypatch.syspath_prepend(str(site))
    assert foreign.package_of(foreign.offered("figures")["round"]) == "ownoffer"
    assert "ownoffer" not in sys.modules
    assert figure.parse({"name": "round", "wide": 3}).model_dump()["name"] == "round"
    with pytest.raises(ValueError, match="'rond' is not one of the figures; did you mean 'round'"):
        figure.parse("rond")


def test_a_class_that_is_defined_anew_takes_its_own_place() -> None:
    for _ in range(2):

        class Line(Figure, name="line"):
            def area(self, scale: float, *, unit: str = "") -> float:
                return 0

    assert Figure.registry.pop("line") is Line
    assert Line().model_dump() == {"name": "line", "colour": "red"}  # nobody else could import it
