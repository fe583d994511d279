"""The axes of a sweep: what each way of writing values means, and what means nothing."""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.experiments.sweeps.axes import Derived, Drawn, Listed, parse_axis


def values(text: str) -> list[Any]:
    axis = parse_axis(text)
    assert isinstance(axis, Listed)
    return [tuple(choice.values()) if len(choice) > 1 else next(iter(choice.values())) for choice in axis.choices]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=1,b,2.5,null", [1, "b", 2.5, None]),
        ("a=range(16,1024,*2)", [16, 32, 64, 128, 256, 512, 1024]),
        ("a=range(1,10,4)", [1, 5, 9]),
        ("a=range(0,1,0.25)", [0, 0.25, 0.5, 0.75, 1]),
        ("a= range(3,5)", [3, 4, 5]),
        ("a=range(1/255,4/255,*2)", [pytest.approx(1 / 255), pytest.approx(2 / 255), pytest.approx(4 / 255)]),
        ("a=linf:0.1,l2:8/255", ["linf:0.1", "l2:8/255"]),
        ("a={name: trades, beta: 6},llr", [{"name": "trades", "beta": 6}, "llr"]),
        ("a=[1,2]", [[1, 2]]),
        ("a=[]", [[]]),
        ("a+b=[1,2],[3,x]", [(1, 2), (3, "x")]),
    ],
)
def test_values_of_an_axis(text: str, expected: list[Any]) -> None:
    assert values(text) == expected


def test_random_and_derived_axes() -> None:
    axis = parse_axis("optimizer.lr=loguniform(1e-3, 10)")
    assert isinstance(axis, Drawn)
    draws = [axis.draw(trial) for trial in range(1000)]
    assert all(1e-3 <= draw <= 10 for draw in draws)
    assert 0.45 < sum(draw < 0.1 for draw in draws) / 1000 < 0.55  # uniform in the logarithm
    assert Drawn("optimizer.lr", 0, 1, False).draw(5) == Drawn("optimizer.lr", 0, 1, False).draw(5)
    derived = parse_axis("training.epochs=of(max(1, round(6000 / data.train_size)))")
    assert isinstance(derived, Derived)
    assert derived.value({"data": {"train_size": 70}}) == 86
    assert Derived("a", "-(2 ** 3 - 10) // 2").value({}) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "expected KEY=VALUE"),
        ("a=", "has no values"),
        ("a=range(10,1)", "never gets from 10 to 1"),
        ("a=range(1,10,*1)", "never gets"),
        ("a=range(0,1,1e-9)", "more than 10000 values"),
        ("a=range(1)", r"expected range\(FIRST, LAST\)"),
        ("a=uniform(1,0)", r"expected uniform\(LOW, HIGH\)"),
        ("a=loguniform(0,1)", "above 0"),
        ("a+b=[1,2],[3]", "expected lists of 2 values"),
        ("a+b=range(1,2)", "lists of values, one for each key"),
        ("a=of(1 +)", "is no formula"),
        ("a+=[1,2]", "expected different keys"),
        ("a+a=[1,2]", "expected different keys"),
        ("a=[1", "is not a YAML value"),
    ],
)
def test_axes_that_make_no_sense(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_axis(text)


@pytest.mark.parametrize(
    "formula",
    [
        "__import__('os').system('x')",
        "open",
        "data.name",
        "1 / 0",
        "data['x']",
        "True",
        "9 ** 9 ** 9",
        "(-1) ** 0.5",
        "min()",
        "1e308 * 10",
        "round(1.26, ndigits=1)",
    ],
)
def test_a_formula_computes_numbers_and_nothing_else(formula: str) -> None:
    with pytest.raises(ValueError, match=r"seed=of\("):
        Derived("seed", formula).value({"data": {"name": "digits"}})
