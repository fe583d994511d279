"""What all commands share: the progress on standard error, the table on standard output, the exit codes."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from holdfast.listeners import Reporter

if TYPE_CHECKING:
    from holdfast.experiments import Run
    from holdfast.experiments.recipes.experiment import EvaluationSettings

RUNS = Path("runs")
DONE, FAILED, BAD_INPUT, ALARM = 0, 1, 2, 3


class ProgressLine(Reporter):
    """Shows loss, validation accuracies and time left on standard error."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.folder: Path | None = None
        self._bar: Progress | None = None
        self._done = 0

    def begin(self, folder: Path) -> None:
        self.folder = folder
        self.stage(f"run folder {folder}")

    def begin_many(self, folder: Path) -> None:
        """Work begins in several folders below this one."""
        self.folder = folder

    def train(self, steps: int, per_epoch: int, finished: int) -> None:
        self._steps, self._per_epoch, self._count, self._accuracies = steps, per_epoch, finished, ""
        self._epochs = -(-steps // per_epoch)
        if finished:
            epoch, step = divmod(finished, per_epoch)
            self.stage(f"goes on after epoch {epoch}{f' and {step} steps' if step else ''} of {self._epochs}")
        columns = ("epoch {task.fields[epoch]}", BarColumn(12), TimeRemainingColumn(), "{task.fields[text]}")
        if self.console.is_terminal:
            self._bar = Progress(
                *[TextColumn(c) if isinstance(c, str) else c for c in columns],
                console=self.console,
                transient=True,
                redirect_stdout=False,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=steps, completed=finished, epoch="", text="")

    def step(self, loss: Any) -> None:
        self._count += 1
        if self._bar and (self._count % 10 == 0 or self._count == self._steps):
            epoch = f"{min(self._count // self._per_epoch + 1, self._epochs)}/{self._epochs}"
            text = f"loss {loss.item():.3f}  {self._accuracies}"
            self._bar.update(self._task, completed=self._count, epoch=epoch, text=text)

    def epoch(self, record: dict[str, Any]) -> None:
        found = {k.removeprefix("validation_"): v for k, v in record.items() if k.startswith("validation_")}
        if found:
            order = [name for name in ("standard", "attacked", "certified") if name in found]
            self._accuracies = "  ".join(f"{name} {percent(found[name])}" for name in order)
            self.stage(f"epoch {record['epoch']}/{self._epochs}  loss {record['loss']:.3f}  {self._accuracies}")

    def work(self, text: str, done: int, total: int) -> None:
        if not self.console.is_terminal and 10 * done // total > 10 * self._done // total:
            self.stage(f"{text}: {done} of {total}")
        self._done = done % total
        if self.console.is_terminal and self._bar is None:
            self._bar = Progress(TextColumn(text), BarColumn(24), TimeRemainingColumn(), console=self.console)
            self._bar.start()
            self._task = self._bar.add_task("", total=total)
        if self._bar:
            self._bar.update(self._task, completed=done)
        if done == total:
            self.close()

    def stage(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


@contextlib.contextmanager
def answer_for() -> Iterator[Any]:
    """Runs a command's work and turns whatever stops it into a message and an exit code.

    Bad input is what fails before anything is written (2); what fails later keeps its state in the run
    folder and says so (1); an attack that breaks a certified example rings the alarm (3).
    """
    progress = ProgressLine()
    try:
        yield progress
    except KeyboardInterrupt:
        _leave(progress, "interrupted", FAILED)
    except Exception as fault:
        from holdfast.certify import SoundnessError

        if isinstance(fault, SoundnessError):
            _leave(progress, f"SOUNDNESS ALARM: {fault}", ALARM)
        if progress.folder is not None:
            known = isinstance(fault, OSError | ArithmeticError)
            _leave(progress, _text(fault) if known else traceback.format_exc(), FAILED)
        if not isinstance(fault, ValueError | OSError | ArithmeticError):
            raise
        _leave(progress, _text(fault), BAD_INPUT)
    finally:
        progress.close()


def _text(fault: Exception) -> str:
    if isinstance(fault, OSError) and fault.strerror:
        return f"{fault.strerror}: {fault.filename}" if fault.filename else fault.strerror
    return str(fault)


def _leave(progress: ProgressLine, message: str, code: int) -> None:
    progress.close()
    progress.stage(f"holdfast: {message}")
    if code == FAILED and progress.folder is not None:
        progress.stage(f"the state is kept in {progress.folder}; the same command goes on from there")
    sys.exit(code)


def _radius(mean: float | None) -> str:
    return "–" if mean is None else f"{mean:.3g}"


def percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.1f} %"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:  # a file or a pipe folds no lines
        console.width = max(console.width, 160)
    console.print(table)


def print_run(run: Run) -> None:
    """The table of a run's result, and on the last line the path of its folder.

    Of a training with several evaluations it is the latest one's, unless another was asked for.
    """
    result, settings = run.result, run.experiment.evaluation
    rows = [_row("Standard", result, "standard")]
    for label, title in _attackers(result, settings).items():
        rows.append(_row(title, result, "attacked", label))
    for label, certifier in zip(result["certified"], settings.certifiers, strict=True):
        words = [certifier.title, result["guarantees"][label], result.get("arithmetic", {}).get(label)]
        title = f"Certified ({', '.join(word for word in words if word)})"
        rows.append(_row(title, result, "certified", label))
    objective = run.experiment.objective
    how = (objective or run.experiment.model).short_name
    title = f"{how} on {run.experiment.test_data.short_name}, {result['threat']}"
    print_table(title, ["", "accuracy", "95 % interval", "count"], rows)
    for name, spent in result.get("sampling", {}).items():
        text = f"{name}: {spent['samples']:.0f} samples per image, at most {spent['n0'] + spent['n']}"
        text += f", α {spent['alpha']:g}, abstained {percent(spent['abstained'])}"
        bits = spent.get("grid_bits")
        text += f", noise on a grid of 2^-{bits}" if bits else ", rounded noise taken for real"
        Console(highlight=False, markup=False).print(text)
    if radii := result.get("certified_at"):
        columns = list(next(iter(radii.values())))
        lines = [
            [name, *(percent(found[column]) for column in columns[:-1]), _radius(found[columns[-1]])]
            for name, found in radii.items()
        ]
        print_table("certified at", ["", *columns], lines)
    for line in (*_beside(result), *([run.note] if run.note else [])):
        Console(highlight=False, markup=False).print(line, soft_wrap=True)
    for warning in result.get("warnings", []):
        Console(stderr=True).print(f"warning: {warning}", highlight=False, soft_wrap=True, markup=False)
    print(run.path)


def _beside(result: dict[str, Any]) -> Iterator[str]:
    """What else an evaluation knows: training images, local Lipschitz constants."""
    both = result["bracket"]
    if left := result.get("not_reached"):
        undecided = (result["standard"] if both["attacked"] is None else both["attacked"]) - (
            both["certified"] or 0
        )
        names = ", ".join(f"{count} of {result['examples']} by {name}" for name, count in left.items())
        yield f"the time was up: {percent(undecided)} undecided, not reached {names}; the same command goes on"
    if max(len(result["attacked"]), len(result["certified"])) > 1:
        said = [f"under all attacks {percent(both['attacked'])}"] if both["attacked"] is not None else []
        if both["certified"] is not None:
            how = result.get("bracket_guarantee", "by any certificate")
            said.append(f"under any certificate {percent(both['certified'])} ({how})")
        yield ", ".join(said)
    if "not_surely_wrong" in result:
        yield f"not surely wrong after 1,000 votes, abstentions among them: {percent(result['not_surely_wrong'])}"
    train = result.get("train", {})
    if train:
        attacked = "".join(f", {name} {percent(value)}" for name, value in train["attacked"].items())
        yield f"training images ({train['examples']}): standard {percent(train['standard'])}{attacked}"
    parts = [("test", result), ("training", train)]
    found = [
        f"{one['local_lipschitz']['mean']:.4g} on {one['local_lipschitz']['examples']} {part} images"
        for part, one in parts
        if "local_lipschitz" in one
    ]
    if found:
        yield f"local Lipschitz constant of the logits found, mean: {', '.join(found)}"


def print_runs(runs: Sequence[Run]) -> None:
    """One column for each threat; on the last line the folder of the last evaluation."""
    settings = runs[0].experiment.evaluation
    rows = [["Standard", *(percent(run.result["standard"]) for run in runs)]]
    certifiers = zip(runs[0].result["certified"], settings.certifiers, strict=True)
    titles = {
        "attacked": _attackers(runs[0].result, settings),
        "certified": {label: f"Certified ({part.title})" for label, part in certifiers},
    }
    for kind, parts in titles.items():
        for label, title in parts.items():
            rows.append([title, *(percent(run.result[kind][label]) for run in runs)])
    title = f"accuracy on {runs[0].result['examples']} examples"
    print_table(title, ["", *(run.result["threat"] for run in runs)], rows)
    for run in runs:
        for warning in run.result.get("warnings", []):
            text = f"warning: {run.result['threat']}: {warning}"
            Console(stderr=True).print(text, highlight=False, soft_wrap=True, markup=False)
    print(runs[-1].path)


def _attackers(result: dict[str, Any], settings: EvaluationSettings) -> dict[str, str]:
    """Titles of the attacks of a result, and of the certifiers that found counterexamples, by their labels."""
    from holdfast.component import distinct_labels

    attacks, certifiers = settings.attacks, settings.certifiers
    titles = {label: one.title for label, one in zip(distinct_labels(attacks), attacks, strict=True)}
    refuting = zip(distinct_labels(certifiers), certifiers, strict=True)
    titles |= {label: f"Counterexamples of {one.title}" for label, one in refuting if label not in titles}
    return {label: titles[label] for label in result["attacked"]}


def _row(title: str, result: dict[str, Any], kind: str, label: str | None = None) -> tuple[str, ...]:
    accuracy, interval, count = (part[kind] for part in (result, result["intervals"], result["counts"]))
    if label:
        accuracy, interval, count = accuracy[label], interval[label], count[label]
    low, high = (f"{100 * end:.1f}" for end in interval)
    return title, percent(accuracy), f"{low} – {high} %", f"{count} / {result['examples']}"
