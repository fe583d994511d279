"""Which calls a foreign forward makes: branches on shapes, compiled and exported parts, layers kept whole."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import images
from torch import Tensor, nn

from holdfast import Threat
from holdfast.bounds import UnsupportedOperator, bound_margins, trace
from holdfast.certify import BoundCertifier
from holdfast.layers import CPLConv2d, MaxMin, Normalize


class Own(nn.Module):
    """Layers of ours, whose insides nobody is to look at."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv, self.sort, self.head = CPLConv2d(1, 1), MaxMin(), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.sort(self.conv(x).flatten(1)))


class BranchingOnTheShape(Own):
    def forward(self, x: Tensor) -> Tensor:
        n, channels, *sides = x.shape
        assert channels == 1
        assert x.dim() == 4
        if x.size(2) > 100 or len(x) == 0 or not x.is_floating_point():
            x = x[:, :, :100]
        for scale, part in zip(range(1, sides[0] + 1), x.unbind(-1), strict=True):
            if scale == 1:
                first = part
        z = self.conv(x)
        parts = [part * 1.0 for part in z.split(sides[0] // 2, 2)]
        return self.head(self.sort(torch.cat(parts, 2).reshape(n, -1))) + 0 * first[:, :1, :4].sum(1)


def kinds(model: nn.Module) -> list[str]:
    return [type(node.operator).__name__ for node in trace(model.eval(), images(4)[0]).nodes]


def test_a_forward_that_branches_on_shapes_keeps_our_own_layers_whole() -> None:
    found = kinds(BranchingOnTheShape())
    assert found.count("LipschitzMap") == 1
    assert found.count("PairwiseMax") == 1
    (x, y), threat = images(4), Threat("l2", 0.2)
    margins = [bound_margins(kind().eval(), x, y, threat) for kind in (Own, BranchingOnTheShape)]
    assert torch.allclose(*margins, atol=1e-4)


def compiled_by_itself() -> nn.Module:
    return torch.compile(Own(), backend="eager")


def compiled_behind_another() -> nn.Module:
    return nn.Sequential(nn.Identity(), torch.compile(Own(), backend="eager"))


def compiled_leaves() -> nn.Module:
    model = Own()
    model.sort, model.head = (torch.compile(part, backend="eager") for part in (model.sort, model.head))
    return model


def compiled_in_place() -> nn.Module:
    model = nn.Sequential(nn.Identity(), Own())
    model[1].compile(backend="eager")
    model[1].sort.compile(backend="eager")
    return model


def compiled_forward() -> nn.Module:
    model = nn.Sequential(nn.Identity(), Own())
    model[1].forward = torch.compile(model[1].forward, backend="eager")
    return model


class CompiledClass(Own):
    @torch.compile(backend="eager")
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize(
    "make",
    [
        *[compiled_by_itself, compiled_behind_another, compiled_leaves, compiled_in_place, compiled_forward],
        CompiledClass,
    ],
    ids=lambda make: make.__name__,
)
def test_what_the_caller_compiled_is_bounded_as_what_it_compiles(make: Callable[[], nn.Module]) -> None:
    (x, y), threat = images(4), Threat("linf", 0.02)
    plain, model = Own().eval(), make().eval()
    before = {name: copy.copy(vars(module)) for name, module in model.named_modules()}
    assert torch.equal(bound_margins(model, x, y, threat), bound_margins(plain, x, y, threat))
    assert {name: vars(module) for name, module in model.named_modules()} == before
    assert BoundCertifier()(model, x, y, threat).status == BoundCertifier()(plain, x, y, threat).status


def test_an_exported_part_is_seen_through() -> None:
    (x, y), threat = images(4), Threat("linf", 0.02)
    inner = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)).eval()
    program = torch.export.export(inner, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    plain, model = (nn.Sequential(Normalize([0.4], [0.3]), part) for part in (inner, program.module()))
    found, wanted = (bound_margins(each, x, y, threat, "crown") for each in (model, plain))
    assert torch.allclose(found, wanted, atol=1e-5)


def test_what_the_output_does_not_follow_from_needs_no_rule() -> None:
    class Beside(Own):
        def forward(self, x: Tensor) -> Tensor:
            torch.sin(x)
            norms = torch.fft.fft(x.flatten(1))
            del norms
            return super().forward(x)

    assert kinds(Beside()) == kinds(Own())


def test_a_branch_on_values_is_refused_by_its_place_and_with_a_remedy() -> None:
    class Choosing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.mean() > 0.5 else -x

    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(64, 4), Choosing()))
    with pytest.raises(UnsupportedOperator, match=r"(?s)cannot be traced: .* in '1\.1' \(Choosing\).*torch\.where"):
        trace(model, images(4)[0])


def test_torchscript_is_refused_with_the_files_that_can_be_read() -> None:
    model = torch.jit.trace(Own().eval(), images(2)[0], check_trace=False)
    with pytest.raises(UnsupportedOperator, match=r"TorchScript hides .* ONNX or torch\.export"):
        trace(nn.Sequential(model), images(4)[0])
