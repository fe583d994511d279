"""Calls that add, scale, multiply by constants or take the larger of two: bounds hold, the rest is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from called import Called, holds, inputs, same_when_exported
from torch import Tensor

from holdfast import Threat
from holdfast.bounds import UnsupportedOperator, bound_margins, bound_outputs, trace

GENERATOR = torch.Generator().manual_seed(3)
MATRIX = torch.randn(6, 5, generator=GENERATOR, dtype=torch.float64)
MAP = torch.randn(1, 4, 6, 6, generator=GENERATOR, dtype=torch.float64)
CHANNELS = MAP[:, :, :1, :1]

ARITHMETIC: dict[str, Callable[[Tensor], Tensor]] = {
    "add, alpha": lambda z: torch.add(z, z.flip(3), alpha=-0.5),
    "add, alpha of a constant": lambda z: torch.add(z, MAP, alpha=3),
    "sub, alpha": lambda z: z.sub(z.flip(2), alpha=2),
    "sub by keyword": lambda z: torch.sub(other=z.flip(1), input=2 * z),
    "a constant less z": lambda z: 1 - z,
    "rsub": lambda z: torch.rsub(z, 2.0),
    "sum that broadcasts": lambda z: z + z.mean((2, 3), keepdim=True),
    "difference that broadcasts": lambda z: z.sum(1, keepdim=True) - z,
    "sum that broadcasts both": lambda z: z[:, :, :1] + z[:, :1],
    "constant that broadcasts": lambda z: z.mean((2, 3), keepdim=True) + MAP,
    "mul by keyword": lambda z: torch.mul(z, other=-2.0),
    "multiply by a map": lambda z: torch.multiply(MAP, z),
    "divide": lambda z: torch.divide(z, CHANNELS),
    "true_divide in place": lambda z: z.add(1.0).div_(-4.0),
    "neg": lambda z: z.neg() + torch.negative(2 * z) - (-z),
    "matrix from the right": lambda z: z @ MATRIX,
    "matrix from the left": lambda z: MATRIX.T @ z,
    "vector from the right": lambda z: torch.matmul(z, MATRIX[:, 0]),
    "matrices of a map": lambda z: z @ MAP,
    "mm": lambda z: z.flatten(2)[:, 0, :6].mm(MATRIX),
    "addmm": lambda z: torch.addmm(MATRIX[0], z[:, 0, 0], MATRIX, beta=2, alpha=-1),
    "linear without a bias": lambda z: torch.nn.functional.linear(z, MATRIX.T),
    "einsum": lambda z: torch.einsum("nchw,wk->nkc", z, MATRIX),
    "einsum of one": lambda z: torch.einsum("nchw->nwc", z),
    "maximum": lambda z: torch.maximum(z, z.flip(1)),
    "minimum that broadcasts": lambda z: z.minimum(z.mean(1, keepdim=True)),
    "max of two": lambda z: torch.max(z, 0.3 - z),
    "maximum with a map": lambda z: torch.maximum(z, MAP),
    "minimum with a number": lambda z: torch.minimum(torch.tensor(0.2, dtype=torch.float64), z),
    "maximum that spreads": lambda z: z.mean((2, 3), keepdim=True).maximum(MAP),
}


@pytest.mark.parametrize("function", ARITHMETIC.values(), ids=ARITHMETIC.keys())
def test_bounds_hold_and_are_exact_at_a_point(function: Callable[[Tensor], Tensor]) -> None:
    holds(function)


@pytest.mark.parametrize("function", ARITHMETIC.values(), ids=ARITHMETIC.keys())
def test_in_graphs_of_torch_export_they_are_the_same(function: Callable[[Tensor], Tensor]) -> None:
    same_when_exported(function)


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize(
    "name", ["sum that broadcasts", "matrix from the left", "einsum", "maximum", "mul by keyword"]
)
def test_in_other_norms(name: str, norm: str) -> None:
    holds(ARITHMETIC[name], Threat(norm, 0.3))


def test_the_larger_of_two_has_the_interval_of_its_ends() -> None:
    x, threat = inputs(), Threat("linf", 0.1)
    one = bound_outputs(Called(lambda z: torch.relu(z[:, 2:])).eval(), x, threat, arithmetic=None)
    two = bound_outputs(Called(lambda z: torch.maximum(z[:, 2:], z[:, 2:])).eval(), x, threat, arithmetic=None)
    assert torch.allclose(one[0], two[0])


def test_a_temperature_and_what_does_nothing_behind_the_last_layer_lose_nothing() -> None:
    class Behind(Called):
        def __init__(self, last: Callable[[Tensor], Tensor]) -> None:
            super().__init__(torch.relu)
            self.last = last

        def forward(self, x: Tensor) -> Tensor:
            return self.last(super().forward(x))

    x, y, threat = inputs(), torch.tensor([0, 1, 2]), Threat("l2", 0.2)
    ends: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
        "temperature": (lambda z: z / 4.0, 0.25),
        "shift": (lambda z: z - 3.0, 1.0),
        "view": (lambda z: z.view(-1, 1, 3).flatten(1), 1.0),
        "dropout": (lambda z: torch.dropout(z, 0.5, False).contiguous().double(), 1.0),
        "log-softmax and what does nothing": (lambda z: z.log_softmax(-1).clone(), 1.0),
    }
    for method in ("ibp", "crown-ibp", "crown", "bcp", "lmt"):
        plain = bound_margins(Called(torch.relu).eval(), x, y, threat, method, arithmetic=None)
        for name, (last, factor) in ends.items():
            found = bound_margins(Behind(last).eval(), x, y, threat, method, arithmetic=None)
            assert torch.allclose(found, factor * plain, atol=1e-9), (method, name)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda z: z.flatten(1)[:, 0] + z[:, 0, 0, 0].unsqueeze(1), "broadcast along the batch"),
        (lambda z: torch.div(z, 2.0, rounding_mode="floor"), "rounds"),
        (lambda z: MATRIX.new_ones(2, 2) @ z[:, 0, 0], "mixes the examples"),
        (lambda z: torch.einsum("nchw,nk->nk", z, torch.ones(2, 3).double()), "mixes or moves"),
        (lambda z: torch.einsum("nchw->cn", z).T, "mixes or moves"),
        (lambda z: torch.addmm(z[:, 0, 0, :5], z[:, 0, 0], MATRIX), "only a constant plus"),
        (lambda z: z.max() + z, "of the whole batch"),
    ],
)
def test_what_mixes_the_batch_or_has_no_rule_is_refused(function: Callable[[Tensor], Tensor], message: str) -> None:
    model = Called(lambda z: z)
    model.function = function
    with pytest.raises(UnsupportedOperator, match=message):
        trace(model.eval(), inputs())
