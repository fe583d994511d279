"""Attack: what every attack takes and returns."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.component import Component
from holdfast.inference import check_inputs, check_logits, frozen_eval, predict
from holdfast.search import Ascent, Function
from holdfast.threat import Threat


@dataclass(frozen=True)
class AttackResult:
    """What an attack did to each of N examples."""

    x_adv: Tensor
    """The adversarial example, or the strongest point where none was found; the input itself where the
    model was wrong already. (N, ...), inside the threat set."""
    success: Tensor
    """Whether the model is wrong at x_adv, (N,) bool; an already wrong example counts."""
    distance: Tensor
    """‖x_adv − x‖ in the threat's norm, (N,); 0 for an already wrong example. A minimum-norm attack that
    finds nothing reports inf."""
    forwards: Tensor
    """Forward passes spent on the example, (N,) int64, the clean one among them."""
    backwards: Tensor
    """Backward passes spent on the example, (N,) int64."""


class Attack(Component, family="attacks"):
    """Searches the threat set around each input for one that the model gets wrong."""

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        *,
        seed: int = 0,
        indices: Sequence[int] | Tensor | None = None,
        batch_size: int = 256,
    ) -> AttackResult:
        """Attack every example; the model is left exactly as it was.

        Args:
            model: any module from (N, ...) inputs to (N, K) logits; attacked in eval mode.
            x: inputs in the threat's box, (N, ...), floating.
            y: labels, (N,) integers in 0..K−1.
            seed: what example i draws depends on (seed, indices[i]) only.
            indices: the examples' numbers in their data set; 0..N−1 by default.
            batch_size: at most so many examples in a forward pass.

        Raises:
            ValueError: inputs or labels that make no sense (see ``check_inputs``).
            FloatingPointError: the model answers with NaN or inf.
        """
        y = check_inputs(x, y, threat)
        numbers = torch.arange(len(x)) if indices is None else torch.as_tensor(indices)
        with frozen_eval(model):
            x = x.detach()
            right = torch.zeros_like(y, dtype=torch.bool)
            if len(x):
                logits = predict(model, x, batch_size)
                check_logits(logits, y)
                right = logits.argmax(1) == y
            standing = right.nonzero().squeeze(1)
            ascent = self.perturb(
                model, x[standing], y[standing], threat, seed, numbers[standing.cpu()], batch_size
            )
        x_adv, success = x.clone(), torch.ones_like(y, dtype=torch.bool)
        forwards = torch.ones_like(y, dtype=torch.int64)
        backwards = torch.zeros_like(forwards)
        x_adv[standing], success[standing] = ascent.x, ascent.finished
        forwards[standing] += ascent.forwards
        backwards[standing] += ascent.backwards
        return AttackResult(x_adv, success, threat.distance(x, x_adv), forwards, backwards)

    @abstractmethod
    def perturb(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        seed: int,
        indices: Tensor,
        batch_size: int,
    ) -> Ascent:
        """Attack examples that a frozen model in eval mode gets right; finished means wrong."""


def cross_entropy_until_wrong(model: nn.Module, y: Tensor) -> Function:
    """−log softmax(model(x'))_y of each example, finished where the model is wrong."""

    def function(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        logits, labels = model(points), y[rows]
        return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(1) != labels

    return function
