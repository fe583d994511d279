"""Threat: text, geometry, random points."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast import Threat
from holdfast.draws import Draws

NORMS = ("linf", "l2", "l1")
INF = math.inf


def test_parses_fractions_and_decimals() -> None:
    assert Threat.parse("linf:8/255") == Threat("linf", 8 / 255)
    assert Threat.parse("l2:36/255").eps == 36 / 255
    assert Threat.parse({"norm": "l1", "eps": "1/2", "low": -1, "high": INF}) == Threat("l1", 0.5, -1.0, INF)
    assert Threat("linf", "8/255") == Threat("linf", 8 / 255)


@given(st.sampled_from(NORMS), st.one_of(st.integers(0, 255).map(lambda k: k / 255), st.floats(0, 1e6)))
def test_text_reads_back_exactly(norm: str, eps: float) -> None:
    threat = Threat(norm, eps)
    assert Threat.parse(str(threat)) == threat
    assert Threat.parse(threat.serialise()) == threat


@pytest.mark.parametrize("box", [(-INF, INF), (0.0, INF), (-1.0, 1.0)])
def test_any_box_survives_json(box: tuple[float, float]) -> None:
    threat = Threat("l2", 8 / 255, *box)
    assert Threat.parse(json.loads(json.dumps(threat.serialise(), allow_nan=False))) == threat


def test_text_is_what_one_would_write() -> None:
    assert str(Threat("linf", 8 / 255)) == "linf:8/255"
    assert str(Threat("l2", 0.2)) == "l2:0.2"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("linf", "norm:eps"),
        ("linff:0.1", "did you mean 'linf'"),
        ("linf:-0.1", "≥ 0"),
        ("linf:abc", "fraction"),
        ("linf:1/0", "fraction"),
        ("linf:nan", "fraction"),
        ("linf:inf", "fraction"),
        ({"norm": "linf"}, "needs eps"),
        ({"norm": "linf", "eps": 1, "hihg": 2}, "did you mean 'high'"),
        ({"norm": "linf", "eps": 1, "low": 1, "high": 0}, "empty"),
        ({"norm": "linf", "eps": True}, "number"),
        ({"norm": ["linf"], "eps": 1}, "not a norm"),
        ({"norm": "linf", "eps": 1, "low": None}, "number"),
        (3, "norm:eps"),
    ],
)
def test_bad_input_is_named(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Threat.parse(value)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("box", [(0.0, 1.0), (-INF, INF), (-INF, 1.0)])
def test_projection_is_feasible_and_leaves_feasible_points_alone(norm: str, box: tuple[float, float]) -> None:
    threat = Threat(norm, 0.7, *box)
    x = torch.rand(50, 3, 4, dtype=torch.float64)
    far = x + 3 * torch.randn_like(x)
    projected = threat.project(x, far)
    assert (threat.distance(x, projected) <= threat.eps + 1e-12).all()
    assert (projected >= threat.low).all()
    assert (projected <= threat.high).all()
    assert torch.allclose(threat.project(x, projected), projected, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_projection_without_box_is_the_nearest_point(norm: str) -> None:
    # The variational inequality ⟨z − p, q − p⟩ ≤ 0 for every q of the ball characterises the projection p of z.
    threat = Threat(norm, 0.5, -INF, INF)
    x, z = torch.zeros(1, 5, dtype=torch.float64), torch.randn(1, 5, dtype=torch.float64)
    p = threat.project(x, z)
    corners = threat.random_point(x.expand(2000, 5), Draws.of(0, range(2000)))
    assert threat.distance(x, p).item() == pytest.approx(0.5)
    if norm != "linf":
        assert (((z - p) * (corners - p)).sum(1) <= 1e-9).all()
    else:
        assert torch.equal(p, z.clamp(-0.5, 0.5))


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2), ("l1", INF)])
def test_steepest_direction_attains_the_dual_norm(norm: str, dual: float) -> None:
    threat = Threat(norm, 1.0, -INF, INF)
    gradient = torch.randn(20, 2, 3, dtype=torch.float64)
    direction = threat.steepest(gradient, torch.zeros_like(gradient))
    assert torch.allclose((gradient * direction).flatten(1).sum(1), gradient.flatten(1).norm(dual, dim=1))
    assert torch.allclose(threat.distance(torch.zeros_like(gradient), direction), torch.ones(20).double())


@pytest.mark.parametrize("norm", NORMS)
def test_steepest_direction_of_nothing_is_nothing_and_tiny_gradients_count(norm: str) -> None:
    threat = Threat(norm, 1.0)
    x = torch.full((1, 4), 0.5)
    assert threat.steepest(torch.zeros(1, 4), x).abs().sum() == 0
    tiny = threat.steepest(torch.tensor([[1e-30, 0, 0, 0]]), x)
    assert tiny.tolist() == [[1, 0, 0, 0]]


def test_steepest_l1_direction_avoids_coordinates_at_the_box() -> None:
    x_adv = torch.tensor([[1.0, 0.5, 0.5]])
    assert Threat("l1", 1.0).steepest(torch.tensor([[9.0, -2.0, 1.0]]), x_adv).tolist() == [[0, -1, 0]]


@pytest.mark.parametrize(("norm", "mean"), [("linf", 5 / 6), ("l2", 5 / 6), ("l1", 5 / 6)])
def test_random_points_are_uniform_in_the_ball(norm: str, mean: float) -> None:
    # In d dimensions the distance of a uniform point of any norm's ball has mean d / (d + 1).
    threat = Threat(norm, 2.0, -INF, INF)
    x = torch.zeros(4000, 5)
    distance = threat.distance(x, threat.random_point(x, Draws.of(1, range(4000))))
    assert distance.max() <= 2.0 + 1e-6
    assert distance.mean().item() / 2 == pytest.approx(mean, abs=0.01)


@pytest.mark.parametrize("norm", NORMS)
def test_random_points_of_generators_depend_on_their_own_only(norm: str) -> None:
    threat, x = Threat(norm, 0.3), torch.rand(6, 2, 3)

    def generators(numbers: list[int]) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(number) for number in numbers]

    shared = generators([0, 1, 2, 3, 4, 5])
    first, second = threat.random_point(x, shared), threat.random_point(x, shared)
    assert torch.equal(first[[4, 1]], threat.random_point(x[[4, 1]], generators([4, 1])))
    assert ((first - second).flatten(1).abs().amax(1) > 1e-3).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["random_point", "largest_noise"])
def test_random_points_do_not_hang_on_their_neighbours(norm: str, kind: str) -> None:
    threat = Threat(norm, 0.3, -INF, INF)
    x = torch.rand(37, 3, 5, 7)
    together = getattr(threat, kind)(x, Draws.of(7, range(37)))
    alone = torch.cat([getattr(threat, kind)(x[[i]], Draws.of(7, [i])) for i in reversed(range(37))])
    assert torch.equal(together, alone.flip(0))
    length = threat.distance(x, together) / 0.3
    assert torch.allclose(length, torch.ones(37)) if kind == "largest_noise" else (length <= 1 + 1e-5).all()


@pytest.mark.parametrize("norm", NORMS)
def test_as_many_examples_draw_as_there_are(norm: str) -> None:
    threat = Threat(norm, 0.3)
    x = torch.rand(6, 2, 3)
    together = threat.random_point(x, Draws.of(7, range(6)))
    alone = torch.cat([threat.random_point(x[[i]], Draws.of(7, [i])) for i in reversed(range(6))])
    assert torch.equal(together, alone.flip(0))
    assert (together >= 0).all()
    assert (together <= 1).all()
    with pytest.raises(ValueError, match="6 examples need as many generators"):
        threat.random_point(x, Draws.of(7, range(5)))


@settings(max_examples=30)
@given(st.sampled_from(NORMS), st.floats(0, 2), st.integers(0, 2**31))
def test_interval_holds_every_feasible_point(norm: str, eps: float, seed: int) -> None:
    threat = Threat(norm, eps)
    x = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed))
    lower, upper = threat.interval(x)
    point = threat.random_point(x, Draws.of(seed, range(3)))
    assert (lower - 1e-6 <= point).all()
    assert (point <= upper + 1e-6).all()


@pytest.mark.parametrize("norm", NORMS)
def test_covering_radius_is_the_distance_between_opposite_corners(norm: str) -> None:
    threat = Threat(norm, 0.1, 0.0, 2.0)
    corners = torch.zeros(1, 6), torch.full((1, 6), 2.0)
    assert threat.covering_eps(6) == pytest.approx(threat.distance(*corners).item())
    assert Threat(norm, 0.1, 0.0, INF).covering_eps(6) == INF


def test_l1_projection_is_the_nearest_point_of_ball_and_box() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(40, 12, dtype=torch.float64, generator=generator)
    points = x + torch.randn(40, 12, dtype=torch.float64, generator=generator)
    threat = Threat("l1", 1.5)
    nearest = threat.project(x, points)
    assert (threat.distance(x, nearest) <= 1.5 + 1e-9).all()
    # The condition of optimality: no feasible point lies at an acute angle.
    for _ in range(300):
        other = threat.project(x, x + 3 * torch.randn(40, 12, dtype=torch.float64, generator=generator))
        angle = ((points - nearest) * (other - nearest)).sum(1)
        assert (angle <= 1e-9).all()
    assert torch.allclose(threat.project(x, nearest), nearest, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("box", [(0.0, 1.0), (-INF, INF)])
def test_the_shortest_step_reaches_the_hyperplane_and_none_is_shorter(norm: str, box: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(50, 9, dtype=torch.float64, generator=generator)
    gradient = torch.randn(50, 9, dtype=torch.float64, generator=generator)
    gradient[:, 3] = 0
    gain = torch.randn(50, dtype=torch.float64, generator=generator)
    threat = Threat(norm, 1.0, *box)
    step = threat.shortest_step(x, gradient, gain)
    assert ((x + step >= box[0] - 1e-12) & (x + step <= box[1] + 1e-12)).all()
    room = torch.where(gradient * gain[:, None] > 0, box[1] - x, x - box[0])
    most = (gradient.abs() * room.nan_to_num(posinf=1e9)).sum(1)
    reached = gain.sign() * torch.minimum(gain.abs(), most)
    assert torch.allclose((gradient * step).sum(1), reached, rtol=1e-5, atol=1e-9)
    assert (step[:, 3] == 0).all()
    length = threat.distance(torch.zeros_like(step), step)
    if box[1] == INF:
        assert torch.allclose(length, gain.abs() / threat.dual_length(gradient), rtol=1e-5)
    inside = gain.abs() < most
    assert inside.sum() > 30
    for _ in range(300):  # no other way there is shorter
        noise = torch.randn(50, 9, dtype=torch.float64, generator=generator) * 0.3
        other = (x + step + noise).clamp(*box) - x
        short = (gradient * other).sum(1) * gain.sign() >= gain.abs()
        assert (threat.distance(torch.zeros_like(other), other) >= length * (1 - 1e-5))[short & inside].all()


def test_l0_counts_entries() -> None:
    threat, x = Threat("l0", 2), torch.full((1, 4), 0.5)
    points = torch.tensor([[0.9, 0.4, 0.5, 0.2]])
    assert threat.distance(x, points).tolist() == [3]
    assert torch.allclose(threat.project(x, points), torch.tensor([[0.9, 0.5, 0.5, 0.2]]))
    lower, upper = threat.interval(x)
    assert lower.tolist() == [[0, 0, 0, 0]]
    assert upper.tolist() == [[1, 1, 1, 1]]
    assert torch.equal(Threat("l0", 0.5).interval(x)[0], x)
    with pytest.raises(ValueError, match="no steepest direction"):
        threat.steepest(x, x)


def test_an_l0_ball_covers_the_box_when_it_may_change_every_entry() -> None:
    assert Threat("l0", 4, 0.0, 0.5).covering_eps(8) == 8
    assert Threat("l1", 4, 0.0, 0.5).covering_eps(8) == pytest.approx(4)
    assert Threat("l2", 4, 0.0, 0.5).covering_eps(16) == pytest.approx(2)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
@pytest.mark.parametrize("scale", [1e-24, 1.0, 1e18])
def test_support_is_what_the_best_point_gains(norm: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    eps = {"linf": 0.2, "l2": 0.6, "l1": 1.5, "l0": 3}[norm]
    threat, x = Threat(norm, eps), torch.rand(30, 10, generator=generator)
    direction = torch.randn(30, 10, generator=generator)
    found = threat.support(x, scale * direction) / scale
    best = torch.full((30,), -torch.inf)
    if norm == "l0":
        room = torch.where(direction > 0, 1 - x, x) * direction.abs()
        best = room.topk(3, dim=1).values.sum(1)
    else:
        point = x.clone()
        for _ in range(300):
            point = threat.project(x, point + 0.05 * eps * threat.steepest(direction, point))
            best = torch.maximum(best, (direction * (point - x)).sum(1))
    assert (found >= best - 1e-5).all()
    assert (found <= best * 1.02 + 1e-5).all()
    assert threat.with_eps(0.0).support(x, direction).abs().max() < 1e-6
