"""How steep a network is around an input: the largest quotient that ascent finds, and figures from above."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from holdfast.bounds.ball import lipschitz_constant
from holdfast.bounds.gains import certified_gains
from holdfast.bounds.graph import trace
from holdfast.bounds.operators import UnsupportedOperator
from holdfast.draws import Draws
from holdfast.fold import folded
from holdfast.inference import check_inputs, check_logits, door, frozen_eval, predict
from holdfast.search import Ascent, State, ascend
from holdfast.threat import Threat

On = Literal["logits", "probabilities", "margins"]
NEAREST = 1e-3
"""Share of eps below which a distance counts as so much: rounding would make up the quotient otherwise."""


@dataclass(frozen=True)
class LocalLipschitz:
    """Per example, N of them."""

    value: Tensor
    """The largest ‖g(x') − g(x)‖ / ‖x' − x‖ found, (N,): a lower bound of the local constant."""
    x: Tensor
    """Where it was found, (N, ...)."""
    upper: Tensor | None
    """A certified upper bound, (N,), from the network's verified constant; None where an operator has none."""
    first_order: Tensor | None
    """The dual norm of the Jacobian at x, summed over the outputs, (N,): the constant of the linearised network
    where one output counts, at least that constant where several do; no bound of the local one. None where neither
    was asked for."""


@dataclass(frozen=True)
class _Shrinking:
    """Steepest steps that shrink along a cosine from a quarter of eps to nothing."""

    threat: Threat
    steps: int

    def begin(self, x: Tensor, points: Tensor) -> State:
        return {}

    def move(self, state: State, x: Tensor, points: Tensor, value: Tensor, gradient: Tensor, age: Tensor) -> Tensor:
        length = self.threat.eps / 8 * (1 + torch.cos(math.pi * age.to(points) / self.steps))
        direction = self.threat.steepest(gradient, points)
        return self.threat.project(x, points + length.view(-1, *[1] * (x.dim() - 1)) * direction)


@door
def local_lipschitz(
    model: nn.Module,
    x: Tensor,
    threat: Threat,
    *,
    output_norm: Literal[1, 2] = 1,
    on: On = "logits",
    steps: int = 50,
    restarts: int = 5,
    seed: int = 0,
    upper: bool = True,
    batch_size: int = 256,
) -> LocalLipschitz:
    """max over x' of the threat set of ‖g(x') − g(x)‖_q / ‖x' − x‖, in the threat's norm below (Yang et al., 2020).

    The published estimator descends, in steps that do not depend on eps; this one ascends from points near x (the
    first restart) and from anywhere in the ball, in shrinking steps, and keeps the best. g(x) is computed once.

    Args:
        model: any module from inputs to logits; measured in eval mode and left as it was.
        x: inputs in the threat's box, (N, ...).
        output_norm: q, 1 or 2.
        on: g: ``logits``, ``probabilities``, or ``margins``, z_c − z_j of the class c that the model gives x.
        steps: gradient steps of a restart.
        restarts: starts for each example. One alone can end far below the largest quotient, already on a linear
            network, where every corner of the box is a hill of its own; five come within a few per cent there.
            Each costs steps + 1 forward and steps backward passes per example, so the time grows in proportion.
        seed: what example i draws depends on it and on i only.
        upper: give the figures from above as well; they take a backward pass for every output.

    Raises:
        ValueError: inputs that make no sense, eps = 0, unknown options, or logits in half precision.
    """
    check_inputs(x, torch.zeros(len(x), dtype=torch.int64, device=x.device), threat)
    if threat.eps <= 0 or output_norm not in (1, 2) or on not in ("logits", "probabilities", "margins"):
        raise ValueError(
            f"expected eps > 0, output_norm 1 or 2 and on logits, probabilities or margins, given {threat}, "
            f"{output_norm} and {on!r}"
        )
    if not len(x):
        raise ValueError("there are no examples")
    if steps < 1 or restarts < 1:
        raise ValueError(f"expected at least one step and one restart, given {steps} and {restarts}")
    parts = []
    with frozen_eval(model):
        copy = folded(model, x[:2])
        for number, batch in enumerate(x.split(batch_size)):
            indices = range(number * batch_size, number * batch_size + len(batch))
            logits = predict(copy, batch, batch_size)
            check_logits(logits, torch.zeros(len(batch), dtype=torch.int64, device=x.device))
            if torch.finfo(logits.dtype).bits < 32:
                raise ValueError(f"the model answers in {logits.dtype}, whose rounding hides how steep it is")
            measured = _measure(on, logits.argmax(1))
            found = _ascent(copy, batch, measured, logits, threat, output_norm, steps, restarts, seed, indices)
            value = _without_rounding(model, batch, found, measured, logits, threat, output_norm)
            slopes = _first_order(model, batch, measured, threat, output_norm) if upper else found.value[:0]
            parts.append((value, found.x, slopes))
        certified = _certified(model, x, threat, output_norm, on) if upper else None
    value, points, slopes = (torch.cat(column) for column in zip(*parts, strict=True))
    return LocalLipschitz(value, points, certified, slopes if upper else None)


def _measure(on: On, classes: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """(logits (n, K), rows (n,)) → what is measured of them, (n, ...)."""
    if on == "logits":
        return lambda logits, rows: logits
    if on == "probabilities":
        return lambda logits, rows: logits.softmax(1)

    def margins(logits: Tensor, rows: Tensor) -> Tensor:
        return logits.gather(1, classes[rows, None]) - logits  # the own class contributes 0

    return margins


def _ascent(
    model: nn.Module,
    x: Tensor,
    measured: Callable[[Tensor, Tensor], Tensor],
    logits: Tensor,
    threat: Threat,
    output_norm: int,
    steps: int,
    restarts: int,
    seed: int,
    indices: range,
) -> Ascent:
    every = torch.arange(len(x), device=x.device)
    centre = measured(logits, every)
    rounding = _rounding(centre, output_norm)

    numbers = torch.tensor(indices, device=x.device)

    def quotient(points: Tensor, rows: Tensor) -> tuple[Tensor, None]:
        moved = torch.linalg.vector_norm(measured(model(points), rows) - centre[rows], output_norm, dim=1)
        moved = moved - rounding[rows]
        distance = threat.distance(x[rows], points).clamp(min=NEAREST * threat.eps)
        # The slope of a largest entry is that entry's alone; a sign step would turn it round at every step.
        return moved / (distance.detach() if threat.is_box else distance), None

    def start(rows: Tensor, restart: int) -> Tensor:
        point = threat.random_point(x[rows], Draws.of(seed, numbers[rows], 51, restart))
        return point if restart else threat.project(x[rows], x[rows] + 0.01 * (point - x[rows]))

    return ascend(quotient, x, _Shrinking(threat, steps), steps=steps, start=start, restarts=restarts)


def _rounding(centre: Tensor, output_norm: int) -> Tensor:
    """What two evaluations of the same outputs may differ by, (n,): no slope."""
    return 32 * torch.finfo(centre.dtype).eps * torch.linalg.vector_norm(centre, output_norm, dim=1)


@torch.no_grad()
def _without_rounding(
    model: nn.Module,
    x: Tensor,
    found: Ascent,
    measured: Callable[[Tensor, Tensor], Tensor],
    logits: Tensor,
    threat: Threat,
    output_norm: int,
) -> Tensor:
    """The values found, in float64 where rounding is more than a thousandth of them, (n,)."""
    value = found.value.clamp(min=0)
    every = torch.arange(len(x), device=x.device)
    moved = value * threat.distance(x, found.x).clamp(min=NEAREST * threat.eps)
    doubtful = (_rounding(measured(logits, every), output_norm) > 1e-3 * moved).nonzero().squeeze(1)
    if len(doubtful):
        exact = _in_float64(model, x, found.x, doubtful, measured, threat, output_norm)
        value[doubtful] = value[doubtful] if exact is None else exact
    return value


def _in_float64(
    model: nn.Module,
    x: Tensor,
    points: Tensor,
    rows: Tensor,
    measured: Callable[[Tensor, Tensor], Tensor],
    threat: Threat,
    output_norm: int,
) -> Tensor | None:
    """The quotients of some rows without rounding; None where the module cannot be asked in float64."""
    x, points = x[rows], points[rows]
    try:
        exact = deepcopy(model).double()
        here, there = exact(x.double()), exact(points.double())
    except Exception:  # whatever a foreign module raises
        return None
    if here.dtype != torch.float64:
        return None
    moved = torch.linalg.vector_norm(measured(there, rows) - measured(here, rows), output_norm, dim=1)
    distance = threat.distance(x.double(), points.double())
    return (moved / distance.clamp(min=NEAREST * threat.eps)).to(x.dtype)


def _first_order(
    model: nn.Module,
    x: Tensor,
    measured: Callable[[Tensor, Tensor], Tensor],
    threat: Threat,
    output_norm: int,
) -> Tensor:
    """The q-norm over the outputs of the dual norms of their gradients."""
    points = x.clone().requires_grad_(True)
    with torch.enable_grad():
        outputs = measured(model(points), torch.arange(len(x), device=x.device))
        lengths = [
            threat.dual_length(torch.autograd.grad(outputs[:, k].sum(), points, retain_graph=True)[0])
            for k in range(outputs.shape[1])
        ]
    return torch.linalg.vector_norm(torch.stack(lengths), output_norm, dim=0)


def _certified(model: nn.Module, x: Tensor, threat: Threat, output_norm: int, on: On) -> Tensor | None:
    """The verified constant in l_2, as far as norms allow: ‖v‖_1 ≤ √K ‖v‖_2, and the l_2 length of the ball."""
    try:
        graph = trace(model, x[:64])
        constant = float(lipschitz_constant(graph, certified_gains(graph, x[:1]), x[:1]))
        constant *= threat.euclidean_eps(x[0].numel())
    except (UnsupportedOperator, ValueError):
        return None
    classes = graph.shape(len(graph.nodes))[0]
    if on == "margins":  # z ↦ z_c − z_j: its matrix 1 e_cᵀ − I has norm at most 1 + √K
        constant *= 1 + math.sqrt(classes)
    elif on == "probabilities":  # the Jacobian diag(p) − p pᵀ of the softmax has norm at most ½
        constant *= 0.5
    return x.new_full((len(x),), constant * (math.sqrt(classes) if output_norm == 1 else 1.0))
