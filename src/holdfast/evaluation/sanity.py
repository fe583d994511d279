"""Signs that an attacked accuracy says more about the attack than about the model."""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor, nn

from holdfast.attacks.losses import cross_entropy, until_wrong
from holdfast.evaluation.accuracy import names
from holdfast.inference import frozen_eval, predict
from holdfast.search import climb, gradient_of
from holdfast.threat import Threat

FEW = 64
"""Examples that are looked at."""
BLIND = ("square", "noise")
"""Attacks that look at answers only."""
THOROUGH = ("pgd", "apgd", "multi-targeted", "autoattack")
"""Attacks by gradient whose failure says something."""


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


def blind_successes(table: pd.DataFrame) -> list[str]:
    """Whether attacks that see answers only break what attacks by gradient leave standing."""
    by_gradient = pd.Series(False, index=table.index)
    by_answers = pd.Series(False, index=table.index)
    tried = False
    for name in names(table, "success"):
        blind = table[f"{name}.origin"].str.startswith(BLIND)
        tried |= name.startswith(THOROUGH)
        by_gradient |= table[f"{name}.success"] & ~blind
        by_answers |= table[f"{name}.success"] & blind
    only = int((by_answers & ~by_gradient & table["correct"]).sum())
    if not tried or only < max(3, len(table) / 100):
        return []
    return [
        f"{only} examples fall to an attack that sees answers only, and to none that follows gradients: those run "
        "are too weak, or the model hides its gradients. Run autoattack, and square with more queries and restarts"
    ]
