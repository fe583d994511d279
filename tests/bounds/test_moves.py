"""Calls that move, copy, choose or sum up entries: bounds hold, and what touches the batch is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from called import Called, holds, inputs, operators, same_when_exported
from torch import Tensor, nn

from holdfast import Threat
from holdfast.bounds import UnsupportedOperator, bound_margins, trace
from holdfast.bounds.operators import Affine

TOKEN = torch.linspace(-1, 1, 36, dtype=torch.float64).view(1, 1, 6, 6)


def second_of_split(z: Tensor) -> Tensor:
    first, second = z.split([1, 3], 1)
    return second - 2 * first


def swapped(z: Tensor) -> Tensor:
    return torch.cat(z.chunk(2, 1)[::-1], 1)


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "pad, zeros": lambda z: F.pad(z, (1, 2, 0, 1)),
    "pad, cutting": lambda z: F.pad(z, (-1, 1)),
    "pad, a constant": lambda z: F.pad(z, (1, 1), value=0.7),
    "pad, reflect": lambda z: F.pad(z, (2, 1, 1, 2), mode="reflect"),
    "pad, replicate": lambda z: F.pad(z, (3, 0, 0, 2), "replicate"),
    "pad, circular": lambda z: F.pad(z, (1, 2, 2, 1), mode="circular"),
    "sum over two": lambda z: z.sum((2, 3)),
    "sum, negative": lambda z: torch.sum(z, dim=-1, keepdim=True),
    "mean over one": lambda z: z.mean(-2),
    "mean, kept": lambda z: torch.mean(z, (1, 3), keepdim=True),
    "mean, by axis": lambda z: z.mean(axis=1),
    "chunk": lambda z: z.chunk(2, 1)[0] + z.chunk(2, 1)[1],
    "chunks swapped": swapped,
    "split": second_of_split,
    "tensor_split": lambda z: z.tensor_split(3, dim=2)[1],
    "unbind": lambda z: z.unbind(1)[2] - z.unbind(dim=-1)[0].mean((1, 2), keepdim=True)[:, :1],
    "stack": lambda z: torch.stack([z, 2 * z, z.flip(3)], 2),
    "stack, last": lambda z: torch.stack((z, -z), dim=-1),
    "cat with a constant": lambda z: torch.cat([TOKEN.expand(z.shape[0], -1, -1, -1), z], 1),
    "repeat": lambda z: z.repeat(1, 2, 1, 1)[:, 1:5] - z,
    "tile": lambda z: torch.tile(z, (1, 1, 2, 1)),
    "repeat_interleave": lambda z: z.repeat_interleave(2, dim=1),
    "expand": lambda z: z[:, :1].expand(-1, 4, -1, -1) + z,
    "expand to the batch": lambda z: z.mean(1, keepdim=True).expand(z.shape[0], 2, 6, 6),
    "roll": lambda z: z.roll((1, -2), (2, 3)),
    "flip": lambda z: torch.flip(z, [1, 3]),
    "narrow": lambda z: z.narrow(2, 1, 3),
    "select": lambda z: z.select(1, 2) - z[:, 1],
    "index by a list": lambda z: z[:, [2, 0, 0]],
    "movedim": lambda z: z.movedim(1, -1),
    "swapaxes": lambda z: torch.swapaxes(z, 1, 3),
    "mT": lambda z: z.mT,
    "unfold": lambda z: z.unfold(2, 3, 2),
    "im2col": lambda z: F.unfold(z, 3, padding=1, stride=2),
    "clone, contiguous, to": lambda z: z.clone().contiguous().double().to(torch.float64).type(torch.float64),
    "unflatten": lambda z: z.unflatten(1, (2, 2)).sum(1),
    "flatten some": lambda z: torch.flatten(z, 1, 2).squeeze().unsqueeze(-1),
    "view and reshape": lambda z: z.reshape(z.size(0), -1).view(-1, 12, 12),
    "pixel_shuffle": lambda z: F.pixel_unshuffle(F.pixel_shuffle(z, 2), 3),
    "channel_shuffle": lambda z: F.channel_shuffle(z, 2),
    "tril": torch.tril,
}


@pytest.mark.parametrize("function", MOVES.values(), ids=MOVES.keys())
def test_bounds_hold_and_are_exact_at_a_point(function: Callable[[Tensor], Tensor]) -> None:
    holds(function)


@pytest.mark.parametrize("function", MOVES.values(), ids=MOVES.keys())
def test_in_graphs_of_torch_export_they_are_the_same(function: Callable[[Tensor], Tensor]) -> None:
    same_when_exported(function)


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("name", ["pad, reflect", "sum over two", "stack", "cat with a constant", "im2col"])
def test_in_other_norms(name: str, norm: str) -> None:
    holds(MOVES[name], Threat(norm, 0.3))


class Padded(nn.Module):
    def __init__(self, pad: nn.Module) -> None:
        super().__init__()
        self.pad = pad

    def forward(self, z: Tensor) -> Tensor:
        return self.pad(z)


PADS: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
    "zeros": (nn.ZeroPad2d((1, 2, 0, 1)), lambda z: F.pad(z, (1, 2, 0, 1))),
    "constant": (nn.ConstantPad2d(1, 0.3), lambda z: F.pad(z, (1, 1, 1, 1), value=0.3)),
    "reflect": (nn.ReflectionPad2d((2, 1, 1, 2)), lambda z: F.pad(z, (2, 1, 1, 2), "reflect")),
    "replicate": (nn.ReplicationPad2d(2), lambda z: F.pad(z, (2, 2, 2, 2), "replicate")),
    "circular": (nn.CircularPad2d((1, 0, 2, 1)), lambda z: F.pad(z, (1, 0, 2, 1), "circular")),
}


@pytest.mark.parametrize(("module", "function"), PADS.values(), ids=PADS.keys())
def test_a_pad_module_is_its_function(module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    x, y, threat = inputs(), torch.tensor([0, 1, 2]), Threat("linf", 0.1)
    one, other = (bound_margins(Called(f).eval(), x, y, threat, "crown") for f in (Padded(module), function))
    assert torch.equal(one, other)


def test_what_does_nothing_is_left_out_of_the_graph() -> None:
    plain = operators(lambda z: z)
    assert operators(lambda z: F.dropout(z.contiguous().view(z.shape).expand_as(z), training=False)) == plain
    assert operators(lambda z: nn.Identity()(nn.Dropout2d().eval()(z)).double()) == plain


def test_what_only_moves_entries_says_so_and_copies_do_not() -> None:
    def last(function: Callable[[Tensor], Tensor]) -> tuple[bool, int]:
        node = trace(Called(function).eval(), inputs()).nodes[-3]
        assert isinstance(node.operator, Affine)
        return node.operator.entrywise, node.operator.fan_out(node.shape)

    assert last(lambda z: z.flip(2)) == (True, 1)
    assert last(lambda z: F.pad(z, (1, 1))) == (True, 1)
    assert last(lambda z: z.repeat(1, 3, 1, 1)) == (False, 3)
    assert last(lambda z: F.pad(z, (1, 1, 1, 1), "reflect")) == (False, 9)
    assert last(lambda z: z.sum((2, 3), True)) == (False, 36)


class AcrossTheBatch(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.head = function, nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(x).flatten(1))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda z: z.flip(0), "mixes or moves the examples"),
        (lambda z: z.roll(1, 0), "mixes or moves the examples"),
        (lambda z: z.roll(1), "mixes or moves the examples"),
        (lambda z: z.transpose(0, 1).transpose(0, 1), "batch dimension first"),
        (lambda z: z - z.mean(0, keepdim=True), r"averages over the examples of the batch"),
        (lambda z: z - z.sum(), r"sums over the examples of the batch"),
        (lambda z: torch.cat([z, z])[: len(z)], "beside each other"),
        (lambda z: torch.stack([z, z])[0], "beside each other"),
        (lambda z: z[:1].expand(len(z), -1, -1, -1), "selects among the examples"),
        (lambda z: F.pad(z, (0, 0, 0, 0, 0, 0, 1, 0))[1:], "pads the batch"),
        (lambda z: z.half().float(), "changes the precision, torch.float32 to torch.float16"),
        (lambda z: torch.cat([torch.randn(len(z), 1, 6, 6), z], 1)[:, 1:], "differs from example to example"),
    ],
)
def test_what_touches_the_batch_or_the_precision_is_refused(
    function: Callable[[Tensor], Tensor], message: str
) -> None:
    with pytest.raises(UnsupportedOperator, match=message):
        trace(AcrossTheBatch(function).eval(), inputs().float())
