"""Signs that an accuracy says more about the attack, the labels or the batch than about the model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import binom
from torch import Tensor, nn

from holdfast.attacks import Attack
from holdfast.attacks.losses import cross_entropy, until_wrong
from holdfast.evaluation.accuracy import names
from holdfast.inference import frozen_eval, predict
from holdfast.search import climb, gradient_of
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
    """Classes with ``ENOUGH`` images that the model never answers with."""
    images = table["label"].value_counts().sort_index()
    missing = [int(c) for c in images.index[images >= ENOUGH] if c not in set(table["prediction"])]
    if not missing:
        return []
    if table["prediction"].nunique() == 1:
        return [
            f"the model answers with class {table['prediction'].iloc[0]} to every one of {len(table)} images of "
            f"{len(images)} classes"
        ]
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

    Answers that change from call to call; probabilities in the place of logits; gradients that are exactly
    zero; a cross-entropy that more steps of PGD do not raise (Carlini et al., 2019; Croce & Hein, 2020).
    """
    x, y = x[:FEW], y[:FEW]
    found = []
    with frozen_eval(model):
        logits = predict(model, x)
        again = predict(model, x)
        if not torch.allclose(logits, again, rtol=1e-4, atol=1e-5):
            found.append(
                "the model answers at random: the same inputs gave other logits twice. Accuracies are draws, and "
                "attacks need averaged gradients: run autoattack with version=rand, or apgd with samples=20"
            )
        sums = logits.sum(1)
        if (logits >= 0).all() and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
            found.append(
                "the outputs are probabilities, not logits: the gradient of their cross-entropy fades where the "
                "model is sure. Leave out the softmax, or run pgd with loss=margin"
            )
        points = x.clone().requires_grad_(True)
        with torch.enable_grad():
            gradient = gradient_of(cross_entropy(model(points), y), points)
        zero = int((gradient.flatten(1) == 0).all(1).sum())
        if zero > len(x) / 10:
            found.append(
                f"the gradient of the cross-entropy is exactly zero for {zero} of {len(x)} examples: attacks by "
                "gradient see nothing there. Run square, and pgd with loss=margin or loss=dlr"
            )
        standing = (logits.argmax(1) == y).nonzero().squeeze(1)
        if threat.eps > 0 and threat.norm != "l0" and len(standing):
            none, few, many = (_loss_after(model, x[standing], y[standing], threat, steps) for steps in (0, 3, 20))
            if many < max(none, few) * (1 - 1e-3) - 1e-6:
                found.append(
                    f"more steps do not raise the loss: {none:.4g} before PGD, {few:.4g} after 3 steps of it, "
                    f"{many:.4g} after 20. The "
                    "gradients lead astray: run autoattack, and pgd with more restarts"
                )
    return found


def _loss_after(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, steps: int) -> float:
    step_size = min(1.0, 2.5 / max(steps, 1)) * threat.eps
    x_adv = climb(until_wrong(model, y), x, threat, steps=steps, step_size=step_size, start=x)
    return cross_entropy(predict(model, x_adv), y).mean().item()


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
