"""Component: registries, nested settings, and errors that teach."""

from __future__ import annotations

import pytest
from pydantic import NonNegativeFloat, PositiveInt, ValidationError

from holdfast.component import Component, Settings, distinct_labels, explain, parse_number


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
