"""What an evaluation shows beside its answers, a curve and adversarial images: at once or asked for afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from holdfast.certify import SoundnessError
from holdfast.component import distinct_labels
from holdfast.data import Images, drawn
from holdfast.evaluation import Evaluation, sandwich_curve
from holdfast.evaluation.subject import common_subject, subject_of
from holdfast.experiments.recipes.experiment import EvaluationSettings, Experiment
from holdfast.experiments.runs.folder import Run
from holdfast.files import claimed, whole_file
from holdfast.inference import device_of, frozen_eval, predict
from holdfast.listeners import Reporter
from holdfast.plots import contact_sheet, sandwich_figure, save_figure
from holdfast.threat import Threat


def missing(run: Run, asked: EvaluationSettings) -> dict[str, int]:
    """What is asked for by name of a finished evaluation's report and is not there.

    What is left at its default asks for nothing, and so does less than what is there: no curve, fewer images kept.
    """
    there, images = run.experiment.evaluation, run.result["examples"]
    named = {name: getattr(asked, name) for name in asked.model_fields_set}
    kept, found = named.get("keep_adversarial", 0), {}
    if min(kept, images) > there.keep_adversarial:
        found["keep_adversarial"] = kept
    points = named.get("curve_points") or there.curve_points
    count = named.get("curve_examples", there.curve_examples)
    drawn_by = there.curve_points, min(there.curve_examples, images)
    if points and run.experiment.test_threat.eps > 0 and (points, min(count, images)) != drawn_by:
        found |= {"curve_points": points, "curve_examples": count}
    return found


def finished_as_asked(run: Run, experiment: Experiment) -> bool:
    """Whether an evaluation is finished, and all there that is asked for of its report."""
    return run.finished and run.complete and not missing(run, experiment.evaluation)


def already(run: Run, asked: EvaluationSettings) -> str:
    """In words that an evaluation is finished, and what it has more of than is asked for by name."""
    there = run.experiment.evaluation
    names = [name for name in ("keep_adversarial", "curve_points") if name in asked.model_fields_set]
    less = [
        f"evaluation.{name}={getattr(asked, name)}" for name in names if getattr(asked, name) < getattr(there, name)
    ]
    more = f", with more than {' and '.join(less)} ask for; what is there stays" if less else ""
    return f"{run.path} is finished already{more}"


def report_further(run: Run, experiment: Experiment, model: nn.Module, test: Images, reporter: Reporter) -> None:
    """Make what is ``missing`` of a finished evaluation's report. Its answers stay and are not made again.

    Raises:
        ValueError: the images are others by now, or an attack does not find again what it found; nothing was
            written.
        SoundnessError: an attack broke a certified example.
    """
    with claimed(run.path), alarm_kept(run, "test"):
        found = missing(run, experiment.evaluation)
        new = ", ".join(f"evaluation.{name}={value}" for name, value in found.items())
        reporter.stage(f"{run.path} is finished already; new are {new}")
        settings = run.experiment.evaluation.model_copy(update=found)
        here = settings.model_copy(update={"batch_size": experiment.evaluation.batch_size})
        asked = experiment.model_copy(update={"evaluation": here})
        images, labels, evaluation = read_evaluation(run, asked, model, test)
        if "keep_adversarial" in found:
            evaluation.adversarial.update(_found_again(run, asked, evaluation, images, labels))
        curve = make_curve(asked, evaluation, images, labels) if "curve_points" in found else None
        reporter.begin(run.path)
        if "keep_adversarial" in found:
            keep_adversarial(run, asked, evaluation, images)
        if curve is not None:
            draw_curve(run, asked, evaluation, curve, reporter)
        # Last: until then the same command does it all again.
        run.describe(experiment.model_copy(update={"evaluation": settings}))


def read_evaluation(
    run: Run, experiment: Experiment, model: nn.Module, test: Images
) -> tuple[Tensor, Tensor, Evaluation]:
    """Images, labels and what was found of them, but for the adversarial images.

    Raises:
        ValueError: the images are others by now.
    """
    settings, table = experiment.evaluation, run.examples
    chosen = drawn(test.labels, settings.examples, settings.draw)
    images, labels = test.batch(chosen)
    if not (np.array_equal(table["index"], chosen) and np.array_equal(table["label"], labels)):
        raise ValueError(f"{run.path} is about other images than the data have now: evaluate them with --again")
    certifiers = dict(zip(distinct_labels(settings.certifiers), settings.certifiers, strict=True))
    subject = common_subject(model, settings.certifiers).classifier
    return images, labels, Evaluation(table, run.result, subject, pd.DataFrame(), certifiers=certifiers)


def _found_again(
    run: Run, experiment: Experiment, evaluation: Evaluation, images: Tensor, labels: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each attack its first adversarial images, as in ``Evaluation.adversarial``: those that were kept, and the
    others by the seeds that found them.

    Raises:
        ValueError: an attack finds others than it found.
    """
    settings, threat, subject = experiment.evaluation, experiment.test_threat, subject_of(evaluation.subject)
    table, device, found = evaluation.table, device_of(evaluation.subject), {}
    for name, attack in zip(distinct_labels(settings.attacks), settings.attacks, strict=True):
        hits = table[f"{name}.attacked"] & np.isfinite(table[f"{name}.distance"])
        rows = torch.from_numpy(np.flatnonzero(hits)[: settings.keep_adversarial])
        x_adv = run.read_adversarial(name)
        if len(new := rows[len(x_adv) :]):
            x, y = images[new].to(device), labels[new].to(device)
            how: dict[str, Any] = {"seed": experiment.seed, "batch_size": settings.batch_size}
            result = subject.confirmed(attack(evaluation.subject, x, y, threat, indices=new, **how), x, y, threat)
            known = table[f"{name}.distance"].to_numpy()[new.numpy()]
            if not np.allclose(result.adversarial_distance.cpu(), known, rtol=1e-5, atol=1e-6):
                raise ValueError(
                    f"{run.path} kept {len(x_adv)} adversarial images of {name}, which does not find the others "
                    f"again as they were: evaluation.keep_adversarial={settings.keep_adversarial} needs --again"
                )
            x_adv = torch.cat([x_adv, result.x_adv.cpu()])
        found[name] = rows, x_adv
    return found


@contextlib.contextmanager
def alarm_kept(run: Run, part: str) -> Iterator[None]:
    """Keeps the example that rings the soundness alarm, as ``alarm.npz``."""
    try:
        yield
    except SoundnessError as alarm:
        with whole_file(run.path / "alarm.npz") as temporary:
            np.savez(temporary, part=part, example=alarm.example, x=alarm.x.numpy(), x_adv=alarm.x_adv.numpy())
        message = f"in the {part} images, {alarm} (kept in {run.path / 'alarm.npz'})"
        raise SoundnessError(message, alarm.example, alarm.x, alarm.x_adv) from alarm


def make_curve(experiment: Experiment, evaluation: Evaluation, images: Tensor, labels: Tensor) -> pd.DataFrame:
    """The sandwich curve at the radii and on the images that the settings name."""
    settings, threat = experiment.evaluation, experiment.test_threat
    radii = sorted({*np.linspace(0, 2 * threat.eps, settings.curve_points + 1).tolist(), threat.eps})
    first = slice(settings.curve_examples)
    how = {"seed": experiment.seed, "batch_size": settings.batch_size}
    subject = evaluation.subject
    return sandwich_curve(subject, images[first], labels[first], threat, evaluation, settings.attacks, radii, **how)


def draw_curve(
    run: Run, experiment: Experiment, evaluation: Evaluation, curve: pd.DataFrame, reporter: Reporter
) -> None:
    """``figures/sandwich``."""
    count = min(experiment.evaluation.curve_examples, len(evaluation.table))
    guarantee = evaluation.summary["bracket_guarantee"]
    figure = sandwich_figure(curve, experiment.test_threat, examples=count, guarantee=guarantee)
    save_figure(figure, run.path / "figures" / "sandwich", curve)
    reporter.stage(f"figure {run.path / 'figures' / 'sandwich.png'}")


def keep_adversarial(run: Run, experiment: Experiment, evaluation: Evaluation, images: Tensor) -> None:
    """The first so many adversarial images of each attack, with the probabilities before and after."""
    most = experiment.evaluation.keep_adversarial
    for name, (rows, x_adv) in evaluation.adversarial.items():
        rows, x_adv = rows[:most], x_adv[:most]
        both = [_probabilities(evaluation.subject, x) for x in (images[rows], x_adv)]
        run.write_adversarial(name, evaluation.table.iloc[rows.numpy()], x_adv, *both)


def _probabilities(classifier: nn.Module, x: Tensor) -> Tensor:
    """Of every class, (N, K): those of a network, or the shares of a vote."""
    if not len(x):
        return torch.zeros(0, 0)
    with frozen_eval(classifier):
        return predict(classifier, x.to(device_of(classifier))).float().softmax(1).cpu()


def draw_adversarial(run: Run, images: Tensor, evaluation: Evaluation, threat: Threat) -> None:
    """A contact sheet for each attack that found something."""
    table = evaluation.table
    for name, (rows, x_adv) in evaluation.adversarial.items():
        if images.dim() == 4 and images.shape[1] in (1, 3) and len(rows):
            first = rows[:8]
            figure = contact_sheet(images[first], x_adv[:8], table["label"].to_numpy()[first.numpy()], name, threat)
            frame = table.iloc[first.numpy()][["index", "label", f"{name}.distance", f"{name}.origin"]]
            save_figure(figure, run.path / "figures" / f"adversarial-{name}", frame)
