"""Certified training losses beyond IBP: reference arrays, closed forms, bounds that are bounds."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import images, small_cnn
from torch import Tensor, nn

from holdfast import Threat
from holdfast.bounds import Interval, UnsupportedOperator, bound_margins, region_of, robust_cross_entropy, trace
from holdfast.bounds.linear import intervals, sweep
from holdfast.bounds.optimised import one_step_slopes
from holdfast.bounds.relaxation import slopes_by
from holdfast.bounds.specification import fused_robust_sum, linear_margins
from holdfast.inference import mix_seed
from holdfast.layers import operator_norm
from holdfast.objectives import (
    BCP,
    CAP,
    CCIBP,
    CROWNIBP,
    EMMA,
    IBP,
    LMT,
    MTLIBP,
    SABR,
    STAPS,
    TAPS,
    ExpIBP,
    GloRo,
    OneStepRelaxation,
    Progress,
)
from holdfast.objectives.certified import CertifiedTraining, interval_regulariser, smoothed, wide_initialisation
from holdfast.objectives.expressive import connected, cut_before

INF = math.inf
Nets = dict[str, tuple[nn.Module, dict[str, Tensor]]]
Read = Callable[[str], dict[str, Tensor]]


def published(arrays: dict[str, Tensor], k: int, norm: str = "linf") -> Threat:
    return Threat(norm, arrays[f"eps_{norm}"][k].item(), -INF, INF)


@pytest.mark.parametrize("k", [0, 1])
def test_crown_ibp_and_its_gradients_equal_the_original(certified_nets: Nets, k: int) -> None:
    model, arrays = certified_nets["cnn2_tiny"]
    x, y, threat = arrays["x"].double(), arrays["y"], published(arrays, k)
    loss = CROWNIBP(beta=1.0).loss(model, x, y, threat, Progress.end())
    assert loss.total.item() == pytest.approx(arrays[f"linf{k}__crownibp_adaptive_rce"].item(), abs=1e-9)
    loss.total.backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, arrays[f"linf{k}__crownibp_adaptive_rce_grad__{name}"], atol=1e-9)
    mixed = CROWNIBP(beta=0.3, kappa=0.25).loss(model, x, y, threat, Progress.end())
    assert mixed.total.item() == pytest.approx(arrays[f"linf{k}__mix_beta0.3_kappa0.25_loss"].item(), abs=1e-9)
    robust = mixed.parts["robust_cross_entropy"].item()
    assert robust == pytest.approx(arrays[f"linf{k}__mix_beta0.3_kappa0.25_rce"].item(), abs=1e-9)


@pytest.mark.parametrize("k", [0, 1])
def test_the_one_step_slopes_equal_the_original(certified_nets: Nets, k: int) -> None:
    model, arrays = certified_nets["cnn2_tiny"]
    x, y, region = arrays["x"].double(), arrays["y"], region_of(arrays["x"].double(), published(arrays, k))
    graph = trace(model, x)
    relus = [n for n, node in enumerate(graph.nodes) if node.path.strip("'") in ("1", "3", "6")]
    order = {node: len(relus) - 1 - place for place, node in enumerate(relus)}  # theirs count from the output

    def start(node: int, shape: tuple[int, ...]) -> Tensor:
        return arrays[f"linf{k}__ours_slope_init{order[node]}"].view(8, *shape)

    first = sweep(graph, region, lambda node: lambda value: start(node, tuple(value.centre.shape[1:])).double())
    before = robust_cross_entropy(linear_margins(graph, region, first, y).lower).mean()
    assert before.item() == pytest.approx(arrays[f"linf{k}__ours_rce_init"].item(), abs=1e-7)
    slopes = one_step_slopes(graph, region, y, start=start)
    margins = linear_margins(graph, region, sweep(graph, region, slopes), y).lower
    assert torch.allclose(margins, arrays[f"linf{k}__ours_margin"], atol=1e-6)  # theirs pass through float32
    assert robust_cross_entropy(margins).mean() < before


@pytest.mark.parametrize("kind", ["linear", "smoothed"])
@pytest.mark.parametrize("data", ["mnist", "cifar"])
def test_the_ramp_is_the_published_schedule(reference: Read, data: str, kind: str) -> None:
    arrays = reference("certified_misc")
    start, length, eps, per_epoch, epochs = arrays[f"sched_{data}_{kind}_args"].tolist()
    objective = IBP(warmup=start / epochs, ramp_end=(start + length - 1) / epochs, ramp_shape=kind)
    steps = (arrays[f"sched_{data}_{kind}_epoch"] * per_epoch).ceil().long().tolist()
    ramps = [eps * objective.ramp(Progress(step, int(epochs * per_epoch))) for step in steps]
    # Their smoothed ramp bends at a whole step.
    tolerance = 1e-9 if kind == "linear" else 1e-5 * eps / 0.4
    assert np.allclose(ramps, arrays[f"sched_{data}_{kind}_eps"].numpy(), rtol=0, atol=tolerance)


def test_the_smoothed_ramp_has_no_jump() -> None:
    shares = torch.linspace(0, 1, 2001).tolist()
    values = torch.tensor([smoothed(share) for share in shares])
    assert values[0] == 0
    assert values[-1] == pytest.approx(1)
    assert 0 <= values.diff().min() <= values.diff().max() < 0.001
    assert values.diff().diff().abs().max() < 1e-5


def small_problem(eps: float = 0.03) -> tuple[nn.Module, Tensor, Tensor, Threat]:
    torch.manual_seed(0)
    x, y = images(12)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4)
    )
    return model.double(), x.double(), y, Threat("linf", eps)


def robust_losses(eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Robust cross-entropy, (12,) each: fused, margin by margin, by intervals, and the worst at random points."""
    model, x, y, threat = small_problem(eps)
    graph, region = trace(model, x), region_of(x, threat)
    done = sweep(graph, region, slopes_by("adaptive"))
    total, shift = fused_robust_sum(graph, region, done, y)
    fused = F.softplus(total.log() + shift)
    single = robust_cross_entropy(linear_margins(graph, region, done, y).lower)
    interval = robust_cross_entropy(bound_margins(model, x, y, threat, "ibp"))
    worst = torch.full_like(fused, -INF)
    for seed in range(200):
        point = threat.random_point(x, [torch.Generator().manual_seed(97 * seed + i) for i in range(12)])
        worst = torch.maximum(worst, F.cross_entropy(model(point), y, reduction="none"))
    return tuple(loss.detach() for loss in (fused, single, interval, worst))  # type: ignore[return-value]


def test_the_fused_loss_bounds_the_sum_of_exponentials() -> None:
    for eps in (0.0, 0.01, 0.1, 0.5):
        fused, single, _, worst = robust_losses(eps)
        assert (fused >= worst - 1e-9).all()
        if eps == 0:
            assert torch.allclose(fused, single, atol=1e-5)


def test_fusion_is_tighter_than_single_margins_where_these_are_narrow() -> None:
    fused, single, interval, _ = robust_losses(0.02)
    assert (fused <= single).all()
    assert (fused < interval).all()


def test_fusion_is_little_better_than_intervals_where_margins_are_wide() -> None:
    """s (h₁ − h₂) + 1 and 0 with h₁ = h₂: intervals cannot cancel, and a backward pass sees that nothing moves."""
    hidden, last = nn.Linear(1, 2), nn.Linear(2, 2)
    x, y = torch.full((1, 1), 0.5, dtype=torch.float64), torch.tensor([0])
    losses = []
    for scale in (1.0, 10.0, 100.0):
        model = nn.Sequential(hidden, nn.ReLU(), last).double()
        with torch.no_grad():
            hidden.weight.copy_(torch.ones(2, 1))
            hidden.bias.fill_(1.0)
            last.weight.copy_(scale * torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
            last.bias.copy_(torch.tensor([1.0, 0.0]))
        threat = Threat("linf", 0.5)
        graph, region = trace(model, x), region_of(x, threat)
        done = sweep(graph, region, slopes_by("adaptive"))
        assert linear_margins(graph, region, done, y).lower.item() == pytest.approx(
            1.0
        )  # the true margin everywhere
        total, shift = fused_robust_sum(graph, region, done, y)
        # −m lies in −1 ± scale by intervals, and is −1: the chord's middle.
        middle = math.log((math.exp(-1 + scale) + math.exp(-1 - scale)) / 2)
        assert (total.log() + shift).item() == pytest.approx(middle, abs=1e-9)
        losses.append(F.softplus(total.log() + shift).item())
        interval = robust_cross_entropy(bound_margins(model, x, y, threat, "ibp")).item()
        assert interval - losses[-1] < math.log(2) + 1e-9
    assert losses[0] < 1
    assert losses[2] > 98


def test_the_published_methods_bound_every_margin_by_itself_unless_fusion_is_asked_for() -> None:
    model, x, y, threat = small_problem(0.1)
    graph, region = trace(model, x), region_of(x, threat)
    single = robust_cross_entropy(
        linear_margins(graph, region, sweep(graph, region, slopes_by("adaptive")), y).lower
    )
    plain, fused = (
        objective.loss(model, x, y, threat, Progress.end()).total.item()
        for objective in (CROWNIBP(beta=1.0), CROWNIBP(beta=1.0, fused=True))
    )
    assert plain == pytest.approx(single.mean().item(), abs=1e-12)
    assert fused != pytest.approx(plain, rel=1e-3)
    slopes = one_step_slopes(graph, region, y, mix_seed(0, Progress.end().step))
    single = robust_cross_entropy(linear_margins(graph, region, sweep(graph, region, slopes), y).lower)
    loss = OneStepRelaxation().loss(model, x, y, threat, Progress.end()).total.item()
    assert loss == pytest.approx(single.mean().item(), abs=1e-12)


def test_beta_goes_from_the_linear_to_the_interval_bound() -> None:
    model, x, y, threat = small_problem()
    objective = CROWNIBP(ramp_end=1.0)
    end = objective.loss(model, x, y, threat, Progress.end()).parts["robust_cross_entropy"]
    interval = IBP(kappa=0.0).loss(model, x, y, threat, Progress.end()).parts["robust_cross_entropy"]
    assert end == pytest.approx(interval.item(), abs=1e-12)
    early = objective.loss(model, x, y, threat, Progress(1, 1000))
    assert early.total.item() == pytest.approx(early.parts["cross_entropy"].item(), rel=0.01)


def test_every_loss_is_what_its_formula_says() -> None:
    model, x, y, threat = small_problem()
    end = Progress.end()

    def robust(objective: object) -> float:
        return objective.loss(model, x, y, threat, end).parts["robust_cross_entropy"].item()  # type: ignore[attr-defined]

    ibp = robust_cross_entropy(bound_margins(model, x, y, threat, "ibp"))
    assert robust(SABR(share=1.0)) == pytest.approx(ibp.mean().item(), abs=1e-9)
    x_adv = MTLIBP().loss(model, x, y, threat, end).x_adv
    adversarial = F.cross_entropy(model(x_adv), y, reduction="none")
    assert (adversarial <= ibp).all()
    expected = (0.9 * adversarial + 0.1 * ibp).mean().item()
    assert robust(MTLIBP(alpha=0.1)) == pytest.approx(expected, abs=1e-9)
    assert robust(ExpIBP(alpha=0.3)) == pytest.approx((adversarial**0.7 * ibp**0.3).mean().item(), abs=1e-9)
    assert robust(CCIBP(alpha=0.0)) == pytest.approx(adversarial.mean().item(), abs=1e-9)
    assert robust(CCIBP(alpha=1.0)) == pytest.approx(ibp.mean().item(), abs=1e-9)
    assert adversarial.mean() < robust(CCIBP(alpha=0.5)) < ibp.mean()
    assert robust(SABR(share=0.3)) < ibp.mean()
    cap = bound_margins(model, x, y, threat, "cap", intersect=True)
    assert robust(CAP()) >= robust_cross_entropy(cap).mean().item() - 1e-9
    assert robust(OneStepRelaxation()) <= robust(CROWNIBP(beta=1.0, relaxation="one"))


CERTIFIED = [IBP(), CROWNIBP(), CAP(), MTLIBP(steps=2), CCIBP(steps=2), SABR(steps=2), TAPS(steps=2)]


@pytest.mark.parametrize("objective", CERTIFIED, ids=lambda o: o.name)
def test_the_radius_that_is_trained_may_be_another(objective: CertifiedTraining) -> None:
    model, x, y, threat = small_problem()
    wider = objective.model_copy(update={"radius": 1.5})
    for progress in (Progress(20, 100), Progress.end()):
        first, second = (
            one.loss(model, x, y, Threat("linf", eps), progress).total.item()
            for one, eps in ((wider, threat.eps), (objective, 1.5 * threat.eps))
        )
        assert first == pytest.approx(second, rel=1e-9)
    assert CROWNIBP.model_validate({"radius": "126/100"}).radius == 1.26


@pytest.mark.parametrize("objective", CERTIFIED, ids=lambda o: o.name)
def test_the_weight_of_the_clean_loss_may_be_constant(objective: CertifiedTraining) -> None:
    model, x, y, threat = small_problem()
    constant = objective.model_copy(update={"kappa": 0.3, "start_kappa": 0.3, "warmup": 0.1})
    for step in (0, 30, 100):
        loss = constant.loss(model, x, y, threat, Progress(step, 100))
        parts = {name: value.item() for name, value in loss.parts.items()}
        mixed = 0.3 * parts["cross_entropy"] + 0.7 * parts["robust_cross_entropy"]
        assert loss.total.item() == pytest.approx(mixed, rel=1e-9)
        if step == 0 and not isinstance(objective, TAPS):  # at radius 0 the bounds are the network's own answers
            assert parts["robust_cross_entropy"] == pytest.approx(parts["cross_entropy"], rel=1e-6)


def test_the_attack_may_reach_farther_than_the_bounds() -> None:
    model, x, y, threat = small_problem()
    for objective, factor in (
        (MTLIBP(), 1.0),
        (MTLIBP(radius=1.26), 1.26),
        (MTLIBP(attack_radius=2.0), 2.0),
        (CCIBP(radius=1.26, attack_radius=2.24), 2.24),
        (SABR(share=0.3), 0.7),
        (SABR(share=0.3, attack_radius=1.0), 1.0),
    ):
        for ramp, progress in ((0.5, Progress(1, 4)), (1.0, Progress.end())):
            loss = objective.loss(model, x, y, threat, progress)
            reached = (loss.x_adv - x).abs().amax().item()
            assert reached == pytest.approx(ramp * factor * threat.eps, rel=1e-5)
    wide = MTLIBP(attack_radius=2.0, alpha=0.0).loss(model, x, y, threat, Progress.end())
    expected = F.cross_entropy(model(wide.x_adv), y).item()
    assert wide.total.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("objective", [*CERTIFIED, BCP()], ids=lambda o: o.name)
def test_every_certified_loss_takes_shi_s_regulariser(objective: CertifiedTraining) -> None:
    model, x, y, threat = small_problem(0.3)
    threat = Threat("l2", 0.3) if isinstance(objective, BCP) else threat
    regular = objective.model_copy(update={"regularisation": 0.8, "tolerance": 1.0, "ramp_end": 1.0})
    plain = objective.model_copy(update={"ramp_end": 1.0})
    middle = Progress(1, 4)
    with_it, without = (one.loss(model, x, y, threat, middle) for one in (regular, plain))
    added = with_it.total.item() - without.total.item()
    assert added == pytest.approx(with_it.parts["regulariser"].item(), abs=1e-9)
    if isinstance(objective, IBP | MTLIBP | BCP):  # the whole box by intervals
        graph = trace(model, x)
        values = intervals(graph, region_of(x, threat.with_eps(0.25 * threat.eps)))
        assert added == pytest.approx(0.75 * 0.8 * interval_regulariser(graph, values, 1.0).item(), abs=1e-9)
    assert added > 0
    assert "regulariser" not in regular.loss(model, x, y, threat, Progress.end()).parts


def test_sabr_s_box_shrinks_behind_every_relu() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        model[0].bias.copy_(torch.tensor([1.0, 0.0]))
        model[2].weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
        model[2].bias.zero_()
    x, y, threat = torch.tensor([[0.5, 0.5]]), torch.tensor([0]), Threat("linf", 0.1, -INF, INF)
    # Hidden: (1.5 ± 0.1, 1 ± 0.2), so that the margin is 2.5 − c (0.1 + 0.2) where the whole box is taken.
    for share in (1.0, 0.8):
        loss = SABR(share=1.0, shrinkage=share).loss(model, x, y, threat, Progress.end()).total.item()
        assert loss == pytest.approx(math.log1p(math.exp(-(2.5 - share * 0.3))), rel=1e-5)


def test_taps_is_staps_of_the_whole_box() -> None:
    model, x, y, threat = small_problem()
    taps, staps, small = (
        one.loss(model, x, y, threat, Progress.end()).total.item() for one in (TAPS(), STAPS(share=1.0), STAPS())
    )
    assert taps == staps
    assert small < taps


def test_gloro_is_about_the_centre_of_a_clipped_box() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([torch.zeros(36), torch.ones(36)]))
        model[1].bias.copy_(torch.tensor([5.0, 0.0]))
    x, y = torch.zeros(1, 1, 6, 6), torch.tensor([0])
    loss = GloRo().loss(model, x, y, Threat("linf", 0.2), Progress.end()).total
    worst = model(x + 0.2)
    assert loss >= torch.log1p((worst[0, 1] - worst[0, 0]).exp()) - 1e-4


def test_lipschitz_losses_take_the_margins_less_the_norms() -> None:
    model, x, y, _ = small_problem()
    threat = Threat("l2", 0.2)
    end = Progress.end()
    first = operator_norm(model[0], (1, 8, 8)) * operator_norm(model[3])
    logits, weight = model(x), model[-1].weight
    radius = 0.2 * first
    reach = radius * (weight[:, None] - weight).norm(dim=2)
    worst = logits + reach[y]
    expected = F.cross_entropy(worst, y).item()
    lmt = LMT(power_iterations=300).loss(model, x, y, threat, end).total.item()
    assert lmt == pytest.approx(expected, rel=1e-4)
    lead = logits.gather(1, y[:, None]) - logits  # what is certified is raised to level and no more
    level = F.cross_entropy(logits + torch.minimum(lead.clamp(min=0), reach[y]), y).item()
    emma = EMMA(power_iterations=300).loss(model, x, y, threat, end).total.item()
    assert emma == pytest.approx(level, rel=1e-4)
    bcp = BCP(power_iterations=300).loss(model, x, y, threat, end).total.item()
    assert F.cross_entropy(logits, y).item() < bcp < lmt
    best = logits.argmax(1)
    rivals = (logits + reach[best]).scatter(1, best[:, None], -INF).amax(1, keepdim=True)
    extended = F.cross_entropy(torch.cat([logits, rivals], 1), y).item()
    gloro = GloRo(power_iterations=300).loss(model, x, y, threat, end).total.item()
    assert gloro == pytest.approx(extended, rel=1e-4)


def test_the_gradient_of_bcp_is_that_of_finite_differences() -> None:
    model, x, y, _ = small_problem()
    threat, objective = Threat("l2", 0.2), BCP(power_iterations=400)
    loss = objective.loss(model, x, y, threat, Progress.end()).total
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    direction = [torch.randn_like(parameter) for parameter in model.parameters()]
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True)).item()
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, d in zip(model.parameters(), direction, strict=True):
                parameter += sign * 1e-6 * d
            values.append(objective.loss(model, x, y, threat, Progress.end()).total.item())
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-3)


def test_shi_initialisation_keeps_the_width_of_intervals() -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(5) for layer in (nn.Linear(400, 400), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(400, 4))
    wide_initialisation(model, seed=1)
    x = torch.rand(3, 400)
    graph = trace(model, x)
    values = intervals(graph, region_of(x, Threat("linf", 0.01, -INF, INF)))
    widths = [values[node.inputs[0]].radius.mean().item() for node in graph.nodes[1::2]]
    assert widths[-1] / widths[0] == pytest.approx(1, abs=0.5)
    assert widths[0] == pytest.approx(0.01 * 400 * math.sqrt(2 / math.pi) * math.sqrt(2 * math.pi) / 400, rel=0.05)
    plain = nn.Sequential(
        *[type(m)(400, 400) if isinstance(m, nn.Linear) else m for m in layers], nn.Linear(400, 4)
    )
    wide = intervals(trace(plain, x), region_of(x, Threat("linf", 0.01, -INF, INF)))
    tight = interval_regulariser(graph, values, 0.5)
    assert interval_regulariser(trace(plain, x), wide, 0.5) > tight
    regular = IBP(kappa=0.0, regularisation=0.5, ramp_end=1.0)
    early = regular.loss(model, x, torch.tensor([0, 1, 2]), Threat("linf", 0.01), Progress(1, 100))
    assert early.parts["regulariser"] > 0
    assert (
        "regulariser"
        not in regular.loss(model, x, torch.tensor([0, 1, 2]), Threat("linf", 0.01), Progress.end()).parts
    )


def test_the_gradient_enters_a_latent_box_where_the_attack_reached_its_ends() -> None:
    lower = torch.zeros(1, 3, requires_grad=True)
    upper = torch.ones(1, 3, requires_grad=True)
    points = connected(torch.tensor([[[0.0, 0.5, 0.9]]]), Interval.between(lower, upper))
    assert torch.allclose(points, torch.tensor([[[0.0, 0.5, 0.9]]]))
    points.sum().backward()
    assert torch.allclose(lower.grad, torch.tensor([[1.0, 0.0, 0.0]]))
    assert torch.allclose(upper.grad, torch.tensor([[0.0, 0.0, 0.8]]))


def test_staps_weighs_the_gradients_of_its_two_factors() -> None:
    model, x, y, threat = small_problem()
    gradients = {}
    for emphasis in (1.0, 5.0, 1e9):
        loss = STAPS(emphasis=emphasis).loss(model, x, y, threat, Progress.end())
        gradients[emphasis] = torch.autograd.grad(loss.total, model[-1].weight)[0]
    # α weighs the attacked factor 2 α / (1 + α) and the bound 2 / (1 + α): from 1 each to 2 and 0.
    attacked = gradients[1e9] / 2
    bounded = gradients[1.0] - attacked
    assert torch.allclose(gradients[5.0], 10 / 6 * attacked + 2 / 6 * bounded, atol=1e-7)
    # With equal weights it is the gradient of the product.
    product = STAPS(emphasis=1.0)
    direction, values = torch.randn_like(model[-1].weight), []
    for sign in (1, -2):
        with torch.no_grad():
            model[-1].weight += sign * 1e-6 * direction
        values.append(product.loss(model, x, y, threat, Progress.end()).total.item())
    assert (values[0] - values[1]) / 2e-6 == pytest.approx((gradients[1.0] * direction).sum().item(), rel=0.01)


def test_staps_attacks_what_follows_the_last_relu_but_so_many() -> None:
    model, x, y, threat = small_problem()
    graph = trace(model, x)
    assert [cut_before(graph, count) for count in (1, 2, 9)] == [4, 1, 1]
    loss = STAPS(share=1.0).loss(model, x, y, threat, Progress.end())
    ibp = robust_cross_entropy(bound_margins(model, x, y, threat, "ibp"))
    found = loss.total.item()
    adversarial = F.cross_entropy(model(x), y, reduction="none")  # nothing is attacked at the input
    assert loss.x_adv is None
    assert (adversarial * ibp).mean().item() - 1e-6 <= found <= ibp.square().mean().item() + 1e-6


def test_what_is_trained_with_batch_norm_is_bounded_with_the_statistics_of_the_clean_batch() -> None:
    x, y = images(16)
    for objective in (CROWNIBP(beta=1.0), CCIBP(alpha=0.5), BCP()):
        model = small_cnn().train()
        clean = F.cross_entropy(small_cnn().train().requires_grad_(False)(x), y)
        loss = objective.loss(model, x, y, Threat("l2", 0.0), Progress.end())
        # Dropout perturbs the clean pass only.
        assert abs(loss.total.item() - clean.item()) < 0.7
        loss.total.backward()
        assert model[1].weight.grad.abs().max() > 0


class Masked(nn.Module):
    """A network that says −inf of its last class, by a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))
        self.register_buffer("mask", torch.tensor([0.0, 0.0, 0.0, -math.inf]))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x) + self.mask
        return logits


def test_masks_of_classes_are_refused_where_the_loss_is_on_bounds() -> None:
    x, y = images(4)
    for objective in (IBP(), CROWNIBP(), CAP()):
        with pytest.raises(UnsupportedOperator, match="class 3 are -inf for every example; leave masked classes"):
            objective.loss(Masked(), x, y.clamp(max=2), Threat("linf", 0.05), Progress.end())
