"""Signs that an accuracy says more about the attack, the labels or the batch than about the model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import binom
from torch import Tensor, nn

from holdfast.analysis.attack_check import Problems
from holdfast.attacks import PGD, Attack
from holdfast.attacks.losses import cross_entropy, until_wrong
from holdfast.evaluation.accuracy import names
from holdfast.inference import frozen_eval, predict
from holdfast.search import climb, gradient_of, slopes_of
from holdfast.threat import Threat

FEW = 64
"""Examples that are looked at."""
SIGNIFICANCE = 1e-6
"""Probability below which a count is no accident: thousands of evaluations raise no false alarm."""
ENOUGH = 10
"""Images of a class that make it odd that no answer names it: with answers as frequent as labels, e⁻¹⁰."""
MOST_CLASSES = 2000
"""Beyond so many the search for their best order takes too long."""
LISTED = 10
"""Classes that are named in one warning."""
FLAT = 0.02
"""Of the slope between images, that at an image which counts as none: trained and untrained networks have more than
the whole of it."""
CHECKED = 16
"""Images around which an adversarial example is put, at most, and half as many at least."""
CHECK_PASSES = 80
"""Of the check for each of them, where gradients lead to it."""
SHARE = 0.05
"""Of the attacks' passes, what the check may take."""
CHECKS = (PGD(steps=20, loss="margin"), PGD(steps=20, loss="margin", random_start=False))
"""What looks for it."""


def covers_box(threat: Threat, x: Tensor) -> bool:
    """Whether the ball around every image holds the whole box, up to rounding; of l0 that is no ball too large."""
    return not threat.discrete and bool(threat.eps >= (1 - 1e-9) * threat.covering_eps(x[0].numel()))


def excessive_radius(threat: Threat, x: Tensor) -> list[str]:
    """Whether the balls are so large that no classifier is robust in them, as where eps is meant in pixels.

    A ball of half the radius that covers the box holds the middle of it, the grey image, whatever its centre.

    Args:
        x: images of the right shape, (N, ...), at least one.
    """
    covering = threat.covering_eps(x[0].numel())
    if threat.discrete or not threat.eps >= (1 - 1e-9) * covering / 2:
        return []
    if covers_box(threat, x):
        what = f"the ball of radius {threat.eps:g} around any image is the whole box"
    else:
        what = f"the balls of radius {threat.eps:g} around any two images meet in the middle of the box"
    advice = (
        f"; eps is in units of the inputs: write {threat.norm}:{threat.eps:g}/255 if pixels of 0 to 255 are meant"
    )
    pixels = (threat.low, threat.high) == (0, 1) and threat.norm in ("linf", "l2") and threat.eps >= 1
    return [
        f"eps is too large for {threat}: {what} [{threat.low:g}, {threat.high:g}], and no classifier is robust for "
        "images of two classes" + (advice if pixels else "")
    ]


def randomness(model: nn.Module, x: Tensor) -> list[str]:
    """Whether the same inputs get other logits when they are asked again."""
    x = x[:FEW]
    with frozen_eval(model):
        if not len(x) or torch.allclose(predict(model, x), predict(model, x), rtol=1e-4, atol=1e-5, equal_nan=True):
            return []
    return [
        "the model answers at random: the same inputs gave other logits twice. Accuracies are draws, and "
        "attacks need averaged gradients: run ladder or apgd with samples=20, or autoattack with version=rand"
    ]


def batch_dependence(model: nn.Module, x: Tensor) -> list[str]:
    """Whether the answer about an example depends on the others in its batch: a few are asked again, in pairs.

    Logits count as others where they differ by more than a hundredth of their spread, which rounding does not, and
    where the same batch gives the same logits twice: a model that answers at random is another matter.
    """
    x = x[:FEW]
    if len(x) < 2:
        return []
    few, size = x[: min(8, len(x) // 2 * 2)], 2 if len(x) > 2 else 1
    with frozen_eval(model):
        together = predict(model, x)
        try:
            apart = predict(model, few, size)
        except Exception as fault:  # whatever a foreign forward raises; it has just answered a larger batch
            return [f"the model does not take a batch of {size}, though it takes one of {len(x)}: {fault}"]
        logits = together[: len(few)]
        other = _differ(logits, apart)
        if not other.any() or _differ(together, predict(model, x)).any():
            return []
    changed = int((logits.argmax(1) != apart.argmax(1)).sum())
    norms = [
        f"{name or 'the model itself'!r}"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None
    ]
    return [
        f"the answer about an example depends on its batch: {int(other.sum())} of {len(few)} examples get other "
        f"logits in a batch of {size} than in one of {len(x)}, and {changed} another class. Accuracies change with "
        "the batch size, and attacks and certificates speak of other classifiers"
        + (f"; BatchNorm without running statistics: {_listed(norms)}" if norms else "")
    ]


def _differ(logits: Tensor, others: Tensor) -> Tensor:
    """Of which examples the logits (n, K) differ by more than rounding, (n,) bool."""
    logits, others = (part.double().nan_to_num(neginf=0.0) for part in (logits, others))  # masks are masks
    spread = (logits - logits.mean()).abs().max()
    return (logits - others).abs().amax(1) > 1e-2 * spread + 1e-5 * logits.abs().max()


def misplaced_labels(table: pd.DataFrame) -> list[str]:
    """Whether the labels are in another order than the classes of the model, or hardly an answer is right.

    An order of the classes is sought on one half of the examples and judged on the other: of the classes that it
    moves it must make significantly more right than wrong, three times as many right as there were, and at least a
    half (a fifth of many classes). Of all answers it must explain four fifths of that beyond chance (Cohen's
    kappa): an untrained network on ten digits comes to 0.3, one that always gives the same answer to 0. Of two
    classes an untrained network can be as wrong as if they were swapped.
    """
    label, prediction = table["label"].to_numpy(), table["prediction"].to_numpy()
    seen = np.union1d(label, prediction)
    if len(seen) > MOST_CLASSES:
        return []
    rows, columns = np.searchsorted(seen, label), np.searchsorted(seen, prediction)
    confusion = _confusion(rows, columns, len(seen))
    count, right = len(table), int(np.trace(confusion))
    if (confusion.max(1) == np.diagonal(confusion)).all():  # no order is better
        return []
    moved, before, after = _judged_by_halves(rows, columns, len(seen))
    needed = max(0.2, min(0.5, 10 / len(seen)))
    evident = binom.sf(after - 1, before + after, 0.5) < SIGNIFICANCE
    order = _best_order(confusion)
    best = int((columns == order[rows]).sum())
    chance = float(confusion.sum(1) @ confusion.sum(0)[order]) / count**2
    explains = best / count - chance >= 0.8 * needed * (1 - chance)
    if evident and explains and after >= needed * moved and after >= 3 * before:
        names = {int(seen[c]): int(seen[order[c]]) for c in np.unique(rows) if order[c] != c}
        return [
            "the labels seem to be in another order than the model's classes: "
            f"{100 * right / count:.1f} % of the answers are right as they are, and {100 * best / count:.1f} % "
            f"would be {_in_words(names)}"
        ]
    chance = float(confusion.sum(1) @ confusion.sum(0)) / count**2
    if right < chance * count / 10 and binom.cdf(right, count, chance) < SIGNIFICANCE:
        return [
            f"{100 * right / count:.1f} % of the answers are right, far fewer than the {100 * chance:.1f} % of "
            "the same answers in random order: are the labels those of these images, in the order of its classes?"
        ]
    return []


def _confusion(label: np.ndarray, prediction: np.ndarray, classes: int) -> np.ndarray:
    """How many examples of a label (row) get an answer (column), (K, K)."""
    return np.bincount(label * classes + prediction, minlength=classes**2).reshape(classes, classes)


def _best_order(confusion: np.ndarray) -> np.ndarray:
    """The class of the model for each label that makes most answers right, (K,); as it is where that is as good."""
    gain = confusion + np.eye(len(confusion)) / (2 * len(confusion))
    return np.asarray(linear_sum_assignment(gain, maximize=True)[1])


def _judged_by_halves(label: np.ndarray, prediction: np.ndarray, classes: int) -> tuple[int, int, int]:
    """How many examples the best order of the other half moves, and how many of them are right before and after."""
    half = np.empty(len(label), dtype=int)
    half[np.argsort(label, kind="stable")] = np.arange(len(label)) % 2  # every class in both
    moved = before = after = 0
    for one in (half == 0, half == 1):
        order = _best_order(_confusion(label[one], prediction[one], classes))
        there = ~one & (order[label] != label)
        moved += int(there.sum())
        before += int((prediction == label)[there].sum())
        after += int((prediction == order[label])[there].sum())
    return moved, before, after


def _in_words(order: dict[int, int]) -> str:
    """What to do to the labels that an order moves."""
    shifts = {new - old for old, new in order.items()}
    if len(order) == 2 and set(order) == set(order.values()):
        return f"with {' and '.join(map(str, order))} swapped"
    if shifts in ({1}, {-1}):
        return f"with labels {min(order)} to {max(order)} one {'higher' if shifts == {1} else 'lower'}"
    if len(order) > LISTED:
        return f"in an order that moves {len(order)} classes"
    return "with labels read as " + ", ".join(f"{old} → {new}" for old, new in order.items())


def unpredicted_classes(table: pd.DataFrame) -> list[str]:
    """Classes with ``ENOUGH`` images that the model never answers with, or one answer to all of several classes."""
    images = table["label"].value_counts().sort_index()
    missing = [int(c) for c in images.index[images >= ENOUGH] if c not in set(table["prediction"])]
    if table["prediction"].nunique() == 1 and (table["label"] != table["prediction"]).sum() >= ENOUGH:
        return [
            f"the model answers with class {table['prediction'].iloc[0]} to every one of {len(table)} images of "
            f"{len(images)} classes"
        ]
    if not missing:
        return []
    many, count = len(missing) > 1, int(images[missing].sum())
    return [
        f"{'classes' if many else 'class'} {_listed([str(c) for c in missing])} {'are' if many else 'is'} never "
        f"predicted, though {count} of {len(table)} images are of {'them' if many else 'it'}"
    ]


def _listed(names: list[str]) -> str:
    """The first of them."""
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")


def suspicions(model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> list[str]:
    """What the model's own answers and gradients give away, on the first few examples.

    Probabilities in the place of logits, saturated outputs, gradients that are zero or fade at the images; a
    cross-entropy that more steps of PGD do not raise (Carlini et al., 2019; Croce & Hein, 2020).
    """
    x, y = x[:FEW], y[:FEW]
    if not len(x):
        return []
    with frozen_eval(model):
        points = x.clone().requires_grad_(True)
        with torch.enable_grad():
            logits = model(points)
            gradient, not_finite = slopes_of(cross_entropy(logits, y), points, keep=True)
            own = logits.detach().argmax(1)
            centred = logits - logits.mean(1, keepdim=True)
            slope = gradient_of(centred.gather(1, own[:, None]), points)
        found = _flat_answers(x, logits.detach(), own, gradient, slope)
        standing = (own == y).nonzero().squeeze(1)
        sensible = threat.eps > 0 and threat.norm != "l0" and not covers_box(threat, x)
        if sensible and not not_finite.any() and len(standing):
            clean = logits.detach()[standing], y[standing]
            none = cross_entropy(*clean).mean().item()
            (few, _), (many, all_fall) = (_after(model, x[standing], y[standing], threat, n) for n in (3, 20))
            # On the far side of the boundary, where nothing stands, the loss may go up and down.
            if many < none * (1 - 1e-3) - 1e-6 or (many < 0.9 * few and not all_fall):
                found.append(
                    f"more steps do not raise the loss: {none:.4g} before PGD, {few:.4g} after 3 steps of it, "
                    f"{many:.4g} after 20. The "
                    "gradients lead astray: run autoattack, and pgd with more restarts"
                )
    return found


def _flat_answers(x: Tensor, logits: Tensor, own: Tensor, gradient: Tensor, slope: Tensor) -> list[str]:
    """Whether the answers say too little of where they change.

    Args:
        own: the classes of the largest logits, (n,).
        gradient: of the cross-entropy, (n, ...).
        slope: of the largest logit, less the mean of all, (n, ...).
    """
    found, sums = [], logits.sum(1)
    if (logits >= 0).all() and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        found.append(
            "the outputs are probabilities, not logits: the gradient of their cross-entropy fades where the "
            "model is sure. Leave out the softmax, or run pgd with loss=margin"
        )
    flat = _flatness(x, logits, own, slope) < FLAT
    if not found and (ends := _piled_up(logits, flat)):
        return [
            f"the outputs are saturated: {ends}, and the gradients fade there, as behind a sigmoid. Attack the "
            "logits before it"
        ]
    zero = int((gradient.flatten(1) == 0).all(1).sum())
    if zero > len(x) / 10:
        found.append(
            f"the gradient of the cross-entropy is exactly zero for {zero} of {len(x)} examples: attacks by "
            "gradient see nothing there. Run square, and pgd with loss=margin or loss=dlr"
        )
    elif flat and not found:
        found.append(
            "the gradients fade: at the images the largest logit is flatter by far than from one image to another, "
            "as behind a saturated function. Run square, and apgd with loss=dlr"
        )
    return found


def _piled_up(logits: Tensor, flat: bool) -> str:
    """In words, that half of the outputs or more are at the ends of their range; empty where they are not, or where
    that says nothing: what is bounded by no function comes to 1 from either side, unless its gradients are flat."""
    low, high = logits.min().item(), logits.max().item()
    at_low, at_high = (int(((logits - end).abs() <= 0.01 * (high - low)).sum()) for end in (low, high))
    bounded = high <= 1 and high > 0.99 and (0 <= low < 0.01 or -1 <= low < -0.99)
    if at_low + at_high < logits.numel() / 2 or not (flat or (bounded and min(at_low, at_high) >= ENOUGH)):
        return ""
    share = 100 * (at_low + at_high) / logits.numel()
    return f"{share:.0f} % of them are at the ends of their range, {low:.3g} and {high:.3g}"


def _flatness(x: Tensor, logits: Tensor, own: Tensor, slope: Tensor) -> float:
    """The slope of the largest logit, less the mean of all, at an image over that from there to an image of another
    class, in l_2: medians; inf where nothing else is answered."""
    other = own[:, None] != own
    centred = (logits - logits.mean(1, keepdim=True)).double()
    fall = (centred.gather(1, own[:, None]) - centred.T[own]).abs()
    away = torch.cdist(x.flatten(1).double(), x.flatten(1).double())
    between = (fall / away)[other].median() if other.any() else centred.new_zeros(())
    if not between > 0:
        return float("inf")
    return (slope.flatten(1).double().norm(dim=1).median() / between).item()


def _after(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, steps: int) -> tuple[float, bool]:
    """The mean loss after so many steps of PGD, and whether the model is wrong at every point."""
    step_size = min(1.0, 2.5 / steps) * threat.eps
    logits = predict(model, climb(until_wrong(model, y), x, threat, steps=steps, step_size=step_size, start=x))
    return cross_entropy(logits, y).mean().item(), not bool((logits.argmax(1) == y).any())


def hidden_gradients(
    model: nn.Module, x: Tensor, threat: Threat, spent: int, *, seed: int, batch_size: int
) -> list[str]:
    """Whether gradients lead to adversarial examples that are there by construction (``analysis.attack_check``).

    Args:
        spent: passes of the attacks, of which a twentieth may be spent on this; too few of them pay for no check.
    """
    count = min(CHECKED, len(x), int(SHARE * spent / CHECK_PASSES))
    if count < CHECKED // 2 or threat.eps <= 0 or threat.discrete or covers_box(threat, x):
        return []
    try:
        problems = Problems(model, x[:count], threat, inner=32, seed=seed, batch_size=batch_size)
    except ValueError:  # it answers at random, which is told elsewhere
        return []
    at_random = problems.at_random(32)
    found = torch.stack([problems.check(attack, at_random).found for attack in CHECKS]).any(0)
    made, hits, luck = int(problems.made.sum()), int(found.sum()), int(at_random.sum())
    if made < CHECKED // 2 or hits >= made / 8:
        return []
    return [
        f"the gradients are hidden: of {made} adversarial examples that are there by construction PGD finds {hits} "
        f"and random search {luck}. What attacks by gradient leave standing here says little of the model. Run "
        "square, and holdfast analyze RUN attack-check for each attack"
    ]


def odd_gradients(table: pd.DataFrame) -> list[str]:
    """Of how many examples some attack met a gradient that is NaN or inf, and how many of them stand for all."""
    met = [name.removesuffix(".odd") for name in table.columns if name.endswith(".odd")]
    if not met:
        return []
    odd = pd.concat([table[f"{name}.odd"] for name in met], axis=1).any(axis=1)
    broken = pd.concat([table[f"{name}.success"] for name in names(table, "success")], axis=1).any(axis=1)
    return [
        f"the gradients of {int(odd.sum())} of {len(table)} examples were NaN or inf on the way of {_listed(met)}, "
        f"which went on with what was left of them and by answers alone; {int((odd & ~broken).sum())} of these "
        "stand. Run square on them, or give the model's roots and divisions a small constant"
    ]


def blind_successes(table: pd.DataFrame, attacks: Mapping[str, Attack]) -> list[str]:
    """Whether attacks that see answers only break what attacks by gradient leave standing.

    Args:
        attacks: by the names that they have in the table.
    """
    by_gradient = pd.Series(False, index=table.index)
    by_answers = pd.Series(False, index=table.index)
    for name, attack in attacks.items():
        blind = table[f"{name}.origin"].map(attack.found_blindly).astype(bool)
        by_gradient |= table[f"{name}.success"] & ~blind
        by_answers |= table[f"{name}.success"] & blind
    only = int((by_answers & ~by_gradient & table["correct"]).sum())
    if not any(attack.thorough for attack in attacks.values()) or only < max(3, len(table) / 100):
        return []
    return [
        f"{only} examples fall to an attack that sees answers only, and to none that follows gradients: those run "
        "are too weak, or the model hides its gradients. Run autoattack, and square with more queries and restarts"
    ]
