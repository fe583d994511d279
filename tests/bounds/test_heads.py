"""Softmax heads: closed forms, sampling, and certificates that do not notice them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import images, small_cnn
from torch import Tensor, nn

from holdfast import Threat
from holdfast.analysis import network_constant
from holdfast.attacks import PGD
from holdfast.bounds import METHODS, Interval, UnsupportedOperator, bound_margins, bound_outputs, trace
from holdfast.bounds.heads import margins_after, outputs_after
from holdfast.bounds.operators import Softmax
from holdfast.certify import BoundCertifier, Certificate, LipschitzCertifier
from holdfast.objectives import IBP, Progress

SOFTMAX, LOG_SOFTMAX = (Softmax(log=False),), (Softmax(log=True),)


def network(*head: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4), *head).eval()


class Functional(nn.Module):
    """A head that is called as a function, where symbolic tracing follows or where only export can."""

    def __init__(self, name: str, *, exported: bool) -> None:
        super().__init__()
        self.name, self.exported = name, exported

    def forward(self, z: Tensor) -> Tensor:
        if self.exported:
            assert z.shape[1] == 4
        functions = {
            "F.softmax": lambda: F.softmax(z, dim=1),
            "torch.softmax": lambda: torch.softmax(z, -1),
            "Tensor.softmax": lambda: z.softmax(dim=1),
            "F.log_softmax": lambda: F.log_softmax(z, 1),
            "torch.log_softmax": lambda: torch.log_softmax(z, dim=-1),
            "Tensor.log_softmax": lambda: z.log_softmax(1),
        }
        return functions[self.name]()


NAMES = [f"{owner}.{name}" for name in ("softmax", "log_softmax") for owner in ("F", "torch", "Tensor")]
HEADS: dict[str, nn.Module] = {
    "Softmax": nn.Softmax(1),
    "LogSoftmax": nn.LogSoftmax(-1),
    **{f"{name} {how}": Functional(name, exported=bool(how)) for name in NAMES for how in ("", "exported")},
}


def same_but_for_margins(one: Certificate, other: Certificate) -> None:
    assert torch.equal(one.prediction, other.prediction)
    assert torch.equal(one.radius, other.radius)
    assert torch.equal(one.verified, other.verified)
    assert one.status == other.status


@pytest.mark.parametrize("method", [*METHODS, "cascade"])
def test_certificates_are_those_of_the_network_without_the_head(method: str) -> None:
    (x, _), threat = images(10), Threat("l2", 0.15)
    y = network()(x).argmax(1)
    y[0] = (y[0] + 1) % 4
    certifier = BoundCertifier(method=method, iterations=3)
    plain = certifier(network(), x, y, threat)
    assert plain.verified.any()
    assert not plain.verified.all()
    for head in (nn.LogSoftmax(1), nn.Softmax(1)):
        same_but_for_margins(certifier(network(head), x, y, threat), plain)
    logged = certifier(network(nn.LogSoftmax(1)), x, y, threat)
    assert plain.margin is not None
    assert logged.margin is not None
    assert torch.equal(logged.margin, plain.margin)


def test_lipschitz_certificates_are_those_of_the_network_without_the_head() -> None:
    (x, _), threat = images(10), Threat("l2", 0.1)
    y = network()(x).argmax(1)
    plain = LipschitzCertifier()(network(), x, y, threat)
    assert (plain.radius > 0).all()
    for head in (nn.LogSoftmax(1), nn.Softmax(1)):
        same_but_for_margins(LipschitzCertifier()(network(head), x, y, threat), plain)


@pytest.mark.parametrize("name", HEADS)
def test_every_form_of_a_head_is_known_and_taken_off(name: str) -> None:
    model, (x, y), threat = network(HEADS[name]), images(8), Threat("linf", 0.05)
    graph = trace(model, x)
    assert graph.heads == (LOG_SOFTMAX if "log" in name.lower() else SOFTMAX) or graph.heads[0].dim == -1
    assert not any(isinstance(node.operator, Softmax) for node in graph.nodes)
    margins = bound_margins(model, x, y, threat, "crown")
    assert torch.equal(margins, margins_after(graph.heads, bound_margins(network(), x, y, threat, "crown")))
    lower, upper = bound_outputs(model, x, threat, "crown")
    points = [threat.project(x, x + threat.eps * torch.randn_like(x).sign()) for _ in range(5)]
    for point in (*points, PGD(steps=10)(model, x, y, threat).x_adv):
        answers = model(point)
        assert (lower <= answers).all()
        assert (answers <= upper).all()
        others = torch.tensor([[j for j in range(4) if j != label] for label in y.tolist()])
        assert (margins <= answers.gather(1, y[:, None]) - answers.gather(1, others) + 1e-6).all()


def test_margins_of_two_classes_are_exact() -> None:
    margins = torch.tensor([[-30.0], [-2.0], [-0.1], [0.0], [0.1], [2.0], [30.0]], dtype=torch.float64)
    assert torch.allclose(margins_after(SOFTMAX, margins), torch.tanh(margins / 2), rtol=1e-13, atol=0)


def test_margins_behind_a_softmax_are_lower_bounds_of_the_same_sign() -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-3, 0.1, 1.0, 10.0, 100.0):
        margins = scale * torch.randn(2000, 4, generator=generator)
        margins[::2].abs_()
        bounds = margins_after(SOFTMAX, margins).double()
        assert torch.equal(bounds.amin(1) > 0, margins.amin(1) > 0)
        for reach in (0.0, 0.1, 1.0, 10.0):
            above = reach * scale * torch.rand(margins.shape, generator=generator, dtype=torch.float64)
            above *= torch.rand(margins.shape, generator=generator) < 0.5
            gaps = F.pad(margins.double() + above, (1, 0))  # z_y − z_k of every class, y first
            p = (-gaps).softmax(1)
            assert (bounds <= p[:, :1] - p[:, 1:] + 1e-15).all()
        tight = margins.amin(1) > 0
        p = (-F.pad(margins.double(), (1, 0))).softmax(1)
        assert torch.allclose(bounds[tight], (p[:, :1] - p[:, 1:])[tight], rtol=2e-4, atol=0)


def test_what_is_not_a_number_stays_so_and_the_infinite_has_a_sign() -> None:
    infinite = torch.tensor([[math.nan, 1.0], [math.inf, math.inf], [-math.inf, 2.0]])
    first, second, third = margins_after(SOFTMAX, infinite)
    assert first.isnan().any()
    assert (second > 0.99).all()
    assert third[0] == pytest.approx(-1)
    assert third[1] <= 0


@pytest.mark.parametrize("heads", [SOFTMAX, LOG_SOFTMAX, LOG_SOFTMAX * 2, SOFTMAX * 2], ids=str)
def test_intervals_behind_a_head_hold_and_are_tight(heads: tuple[Softmax, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-3, 1.0, 30.0):
        centre, radius = (scale * torch.randn(500, 5, generator=generator, dtype=torch.float64) for _ in range(2))
        box = Interval(centre, radius.abs())
        known = outputs_after(heads, box)
        corners = []
        for own in range(5):  # one logit up and the others down, and the other way round
            for sign in (1, -1):
                toward = torch.full((5,), -sign)
                toward[own] = sign
                corners.append(box.centre + toward * box.radius)
        answers = torch.stack(corners)
        for head in heads:
            answers = answers.log_softmax(2) if head.log else answers.softmax(2)
        assert (known.lower - 1e-15 <= answers).all()
        assert (answers <= known.upper + 1e-15).all()
        if len(heads) == 1:
            assert torch.allclose(answers.amin(0), known.lower, atol=1e-11)
            assert torch.allclose(answers.amax(0), known.upper, atol=1e-11)


def test_in_the_middle_bounds_hold_and_methods_by_balls_refuse_by_name() -> None:
    model, (x, y), threat = network(nn.Softmax(1), nn.Linear(4, 3)), images(6), Threat("linf", 0.1)
    assert trace(model, x).heads == ()
    margins = [bound_margins(model, x, y % 3, threat, method) for method in ("ibp", "crown-ibp", "crown")]
    answers = model(PGD(steps=10)(model, x, y % 3, threat).x_adv)
    others = torch.tensor([[j for j in range(3) if j != label] for label in (y % 3).tolist()])
    for each in margins:
        assert (each <= answers.gather(1, y[:, None] % 3) - answers.gather(1, others)).all()
    for method in ("bcp", "lmt"):
        with pytest.raises(UnsupportedOperator, match="Softmax has no"):
            bound_margins(model, x, y % 3, threat, method)


def test_over_the_channels_of_a_map_intervals_hold() -> None:
    torch.manual_seed(0)
    model, (x, _) = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Softmax(1), nn.Flatten(), nn.Linear(108, 4)), images(4)
    lower, upper = bound_outputs(model, x, Threat("linf", 0.1))
    for _ in range(10):
        answers = model((x + 0.1 * torch.randn_like(x).sign()).clamp(0, 1))
        assert (lower <= answers).all()
        assert (answers <= upper).all()


@pytest.mark.parametrize("dim", [0, -4])
def test_a_softmax_over_the_batch_is_refused(dim: int) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Softmax(dim), nn.Flatten(), nn.Linear(108, 4))
    with pytest.raises(UnsupportedOperator, match=r"'1': .*examples of the batch"):
        trace(model, images(4)[0])


def test_another_dtype_is_refused() -> None:
    class Wide(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return F.softmax(z, 1, dtype=torch.float64)

    with pytest.raises(UnsupportedOperator, match="dtype"):
        trace(network(Wide()), images(4)[0])


@pytest.mark.parametrize("head", [nn.Softmax(1), nn.LogSoftmax(1)], ids=lambda head: type(head).__name__)
def test_the_constant_of_the_network_holds_behind_a_head(head: nn.Module) -> None:
    x, _ = images(8)
    constant, plain = (network_constant(network(*tail), x, Threat("l2", 0.5)) for tail in ((head,), ()))
    assert 0 < constant.found <= constant.verified
    assert constant.verified == pytest.approx(plain.verified * (2.0 if isinstance(head, nn.LogSoftmax) else 0.5))


def test_certified_training_takes_log_softmax_for_its_logits_and_refuses_softmax() -> None:
    (x, y), threat = images(6), Threat("linf", 0.05)
    plain, logged = (small_cnn(batch_norm=False), nn.Sequential(small_cnn(batch_norm=False), nn.LogSoftmax(1)))
    losses = [IBP().loss(model, x, y, threat, Progress.end()).total for model in (plain.eval(), logged.eval())]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    with pytest.raises(UnsupportedOperator, match="softmax"):
        IBP().loss(nn.Sequential(plain, nn.Softmax(1)), x, y, threat, Progress.end())
