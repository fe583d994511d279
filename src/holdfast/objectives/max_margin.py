"""Max-margin adversarial training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from holdfast.attacks.losses import gap
from holdfast.fold import frozen_copy
from holdfast.objectives.objective import Loss, Progress, Searching, labels_only
from holdfast.search import per_example
from holdfast.threat import Threat


class MMA(Searching, name="mma"):
    """Cross-entropy where the shortest perturbation found crosses the decision boundary, up to a largest margin
    (Ding et al., 2020).

    c · CE(x) + (1 − c) · CE(x') with x' = x for what is wrong as it is, x' on the boundary for what is right, and
    without the second term where no crossing lies within d_max. The crossing is sought by PGD on the soft margin
    log Σ_{j ≠ y} exp z_j − z_y in the ball of radius d_max, and by bisection of the way there (the paper's AN-PGD).
    """

    hinge: PositiveFloat = 1.5
    """d_max, the largest margin that is asked for, in units of eps; the paper trains up to half as far again as it
    evaluates."""
    clean: float = Field(default=1 / 3, ge=0, le=1)
    """c, the share of the clean cross-entropy in the loss."""
    bisections: PositiveInt = 10
    """Halvings of the way to what PGD found."""

    def perturbed(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, progress: Progress
    ) -> tuple[Tensor, Tensor]:
        """The points x', (N, ...), and whether they have a part in the loss, (N,) bool."""
        labels = labels_only(y)
        reach = threat.with_eps(self.hinge * threat.eps)
        with frozen_copy(model, x, self.steps) as copy:

            def soft_margin(points: Tensor, rows: Tensor) -> tuple[Tensor, None]:
                logits = copy(points)
                own = labels[rows, None]
                rivals = logits.scatter(1, own, -torch.inf).logsumexp(1)
                return rivals - logits.gather(1, own).squeeze(1), None

            far = self.climbed(soft_margin, x, reach, progress.random_points(x, reach))
            with torch.no_grad():
                wrong, crosses = (gap(copy(points), y) >= 0 for points in (x, far))
                inside, outside = x.new_zeros(len(x)), x.new_ones(len(x))
                for _ in range(self.bisections):
                    middle = (inside + outside) / 2
                    beyond = gap(copy(x + per_example(middle, x) * (far - x)), y) >= 0
                    inside, outside = torch.where(beyond, inside, middle), torch.where(beyond, middle, outside)
        x_adv = x + per_example(outside.masked_fill(wrong | ~crosses, 0), x) * (far - x)
        return x_adv, wrong | crosses

    def loss_at(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        x_adv: tuple[Tensor, Tensor],
        threat: Threat,
        progress: Progress,
    ) -> Loss:
        points, counts = x_adv
        clean, perturbed = F.cross_entropy(model(torch.cat([x, points])), y.repeat(2), reduction="none").chunk(2)
        natural, robust = clean.mean(), (counts * perturbed).mean()
        lengths = threat.distance(x, points)
        parts = {
            "cross_entropy": natural.detach(),
            "boundary_cross_entropy": robust.detach(),
            "margin": torch.where(counts, lengths, self.hinge * threat.eps).mean(),
        }
        return Loss(self.clean * natural + (1 - self.clean) * robust, parts, points)
