"""The run folder: everything a run leaves behind, each file written whole."""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from holdfast.component import explain
from holdfast.experiments.recipes.experiment import Experiment
from holdfast.experiments.records.find import evaluations, find_folder, trainings
from holdfast.experiments.records.record import (
    EVALUATIONS,
    FAILED,
    HISTORY,
    OLD_RECIPE,
    RECIPE,
    history_lines,
    history_values,
)
from holdfast.experiments.runs import untrained
from holdfast.experiments.runs.environment import environment
from holdfast.experiments.runs.pieces import Pieces
from holdfast.experiments.schema import SCHEMA, schema_of, upgrade
from holdfast.files import claimed, empty, remove_leftovers, whole_file, write_bytes, write_json, write_text
from holdfast.models.model import Shape
from holdfast.models.weights import refuse_misfits
from holdfast.training.checkpoint import Checkpoint


@dataclass(frozen=True)
class Run:
    """A training, or an evaluation of one, by the path of its folder.

    What is asked of a training's result is answered by its latest evaluation; what is asked of an evaluation's
    model by the training above it. Where nobody trained the model here, ``model.json`` stands in the place of
    weights.
    """

    path: Path
    asked: str = field(default="", compare=False)
    """The name of the evaluation that answers for a training, where it is not the latest."""

    @property
    def is_evaluation(self) -> bool:
        return self.path.parent.name == EVALUATIONS

    @property
    def training(self) -> Run:
        """The training, or whatever the evaluation is below."""
        return Run(self.path.parent.parent) if self.is_evaluation else self

    @property
    def evaluations(self) -> list[Run]:
        """Those that are finished, oldest first."""
        results = [self.path / "result.json"] if (self.path / "result.json").is_file() else []
        results += () if self.is_evaluation else (self.path / EVALUATIONS).glob("*/result.json")
        return [Run(path.parent) for path in sorted(results, key=lambda path: path.stat().st_mtime)]

    @property
    def evaluated(self) -> Run:
        """The evaluation that answers: itself, or the latest.

        Raises:
            FileNotFoundError: there is none.
        """
        if self.asked:
            return Run(self.path / EVALUATIONS / self.asked)
        if not self.evaluations:
            raise FileNotFoundError(f"{self.path} is not finished: it holds no evaluation yet")
        return self.evaluations[-1]

    @property
    def finished(self) -> bool:
        """Whether there is an evaluation; ``result.json`` is written last."""
        return bool(self.evaluations)

    @property
    def complete(self) -> bool:
        """Whether a finished evaluation left nothing for want of time."""
        return "not_reached" not in self.result

    @property
    def trained(self) -> bool:
        """Whether the training is at its end."""
        return (self.training.path / "model.safetensors").is_file()

    @property
    def trained_as(self) -> str:
        """The name that follows from the training's recipe.

        Raises:
            ValueError: it is damaged.
        """
        try:
            return Experiment.model_validate(upgrade(self.training.recipe)).identity
        except ValidationError as error:
            raise ValueError(f"{self.training.path} cannot be read: {explain(error)}") from error

    @property
    def recipe(self) -> dict[str, Any]:
        """What is stored of the recipe, in the form of its time."""
        return _read_recipe(self.path)

    @property
    def schema(self) -> int:
        """The number of the form in which the recipe is stored."""
        return schema_of(self.recipe)

    @cached_property
    def experiment(self) -> Experiment:
        """The resolved recipe: of the training, and of this or its latest evaluation.

        Raises:
            ValueError: a recipe is damaged or of a later version.
        """
        path = self.training.path
        try:
            settings = upgrade(self.training.recipe)
            below = self if self.is_evaluation or not self.finished else self.evaluated
            if below.path != path:
                path = below.path
                own = upgrade(below.recipe)
                # An evaluation of 0.1 repeats the whole recipe; its threat is its own.
                if own["threat"] != settings["threat"]:
                    own["evaluation"] = {**own["evaluation"], "threat": own["threat"]}
                if own["data"] != settings["data"]:
                    own["evaluation"]["data"] = own["data"]
                settings |= {key: own[key] for key in ("evaluation", "seed")}
            return Experiment.model_validate(settings)
        except (ValidationError, KeyError, TypeError) as error:
            text = explain(error) if isinstance(error, ValidationError) else f"it holds no recipe ({error!r})"
            raise ValueError(f"{path} cannot be read: {text}") from error
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error

    @property
    def result(self) -> dict[str, Any]:
        """Accuracies, counts, intervals, passes and seconds of the last line.

        Raises:
            FileNotFoundError: there is no evaluation.
            ValueError: ``result.json`` is damaged.
        """
        path = self.evaluated.path / "result.json"
        try:
            result = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        known = isinstance(result, dict) and {"standard", "bracket", "counts"} <= set(result)
        if not known or not {"attacked", "certified"} <= set(result["bracket"]):
            raise ValueError(f"{path} cannot be read: it is not a result")
        return result

    @property
    def examples(self) -> pd.DataFrame:
        """The per-example table."""
        return pd.read_parquet(self.evaluated.path / "examples.parquet")

    @property
    def history(self) -> pd.DataFrame:
        """One row per epoch."""
        epochs, _ = history_lines(self.training.path)
        return pd.read_json(StringIO("\n".join(epochs)), lines=True)

    @property
    def stretches(self) -> list[dict[str, Any]]:
        """One record for each start and resumption of the training: ``step``, batches before it, ``processes``,
        ``accelerator``, ``device``, ``by_process``."""
        return [json.loads(line) for line in history_lines(self.training.path)[1]]

    @property
    def note(self) -> str:
        """In words what the number of processes changed; empty where it changed nothing, or nobody trained here."""
        return str(history_values(self.training.path).get("note", ""))

    @property
    def _checkpoint(self) -> Path:
        return self.training.path / "checkpoint" / "last.pt"

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Held while somebody works in the folder (see ``files.claimed``); what fails leaves word there.

        Raises:
            BlockingIOError: another process works in it.
        """
        with claimed(self.path):
            (self.path / FAILED).unlink(missing_ok=True)
            try:
                yield
            except Exception as fault:
                write_text(self.path / FAILED, f"{type(fault).__name__}: {fault}\n")
                raise

    def clear(self) -> None:
        """Throw away what is there."""
        empty(self.path)

    def begin(self, recipe: dict[str, Any], settings: dict[str, Any], device: torch.device) -> None:
        """Write what is known before the work, and clear what a killed run left.

        Args:
            recipe: what is stored of the recipe.
            settings: all of it, with what is the default today, for whoever lists runs.
        """
        remove_leftovers(self.path)
        self._write_recipe(recipe)
        write_json(self.path / "environment.json", {**environment(device), "settings": settings})

    def describe(self, experiment: Experiment) -> None:
        """Write what a finished evaluation was asked by now; what it was made with stays."""
        path = self.path / "environment.json"
        known = json.loads(path.read_text("utf-8"))
        write_json(path, {**known, "settings": experiment.model_dump(mode="json")})
        self._write_recipe(experiment.evaluation_recipe())

    def _write_recipe(self, recipe: dict[str, Any]) -> None:
        text = yaml.safe_dump({"schema": SCHEMA, **recipe}, sort_keys=False, allow_unicode=True)
        write_text(self.path / RECIPE, text)

    def end_training(self) -> None:
        """Write where each stretch of the training ran beside the environment of the last."""
        path = self.path / "environment.json"
        write_json(path, {**json.loads(path.read_text("utf-8")), "stretches": self.stretches})

    def evaluation(self, experiment: Experiment) -> Run:
        """The evaluation of this training that the recipe asks for, whether it is there or not."""
        return Run(self.path / EVALUATIONS / experiment.evaluation_identity(self.path.name))

    def read_checkpoint(self, model: nn.Module, device: torch.device) -> Checkpoint | None:
        """The state to go on from, where there is one that fits the model.

        Raises:
            ValueError: the file is damaged, or of another model.
        """
        if not self._checkpoint.exists():
            return None
        checkpoint = Checkpoint.load(self._checkpoint, device)
        try:
            refuse_misfits(checkpoint.model, model.state_dict(), self._checkpoint)
        except ValueError as fault:
            raise ValueError(f"{fault}; delete it to start anew") from fault
        return checkpoint

    @property
    def kept(self) -> dict[int, dict[str, Tensor]]:
        """Weights of the epochs that ``training.keep_every`` names.

        Raises:
            FileNotFoundError: none were kept.
        """
        files = sorted((self.training.path / "checkpoint").glob("epoch-*.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"{self.path} keeps no weights of earlier epochs; train with training.keep_every=1"
            )
        return {int(path.stem.removeprefix("epoch-")): load_file(path) for path in files}

    def write_checkpoint(self, checkpoint: Checkpoint, keep_every: int | None = None) -> None:
        """The state to go on from, and the history so far; of every so many epochs also the weights, to stay."""
        checkpoint.save(self._checkpoint)
        epoch = checkpoint.history[-1]["epoch"] if checkpoint.history else 0
        if keep_every and not checkpoint.partial and epoch % keep_every == 0:
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.model.items()}
            write_bytes(self.path / "checkpoint" / f"epoch-{epoch:04}.safetensors", save(state))
        records = [*checkpoint.history, *checkpoint.stretches]
        records.sort(key=lambda record: (record["step"], "stretch" in record))  # a stretch before its first epoch
        write_text(self.path / HISTORY, "".join(json.dumps(record) + "\n" for record in records))

    def write_examples(self, table: pd.DataFrame, seconds: pd.DataFrame) -> None:
        """The table of the evaluation, and beside it what each example cost the certifiers."""
        for name, part in (("examples", table), ("seconds", seconds)):
            with whole_file(self.path / f"{name}.parquet") as temporary:
                part.to_parquet(temporary)

    def write_table(self, name: str, table: pd.DataFrame) -> None:
        """What an analysis saw of the training."""
        with whole_file(self.path / f"{name}.parquet") as temporary:
            table.to_parquet(temporary)

    def write_adversarial(
        self, name: str, known: pd.DataFrame, x_adv: Tensor, before: Tensor, after: Tensor
    ) -> None:
        """``adversarial/NAME.npz``: examples, labels, distances, what found them, the probabilities of all classes
        before and after, and the images themselves.

        Args:
            known: the rows of the per-example table that they are of.
            before, after: (n, K).
        """
        with whole_file(self.path / "adversarial" / f"{name}.npz") as temporary, temporary.open("wb") as file:
            np.savez_compressed(
                file,
                index=known["index"].to_numpy(),
                label=known["label"].to_numpy(),
                distance=known[f"{name}.distance"].to_numpy(),
                origin=known[f"{name}.origin"].to_numpy().astype(str),
                x_adv=x_adv.numpy(),
                probabilities=before.numpy(),
                probabilities_adv=after.numpy(),
            )

    def read_adversarial(self, name: str) -> Tensor:
        """The images that ``write_adversarial`` wrote.

        Raises:
            FileNotFoundError, ValueError: they are not there, or damaged.
        """
        path = self.path / "adversarial" / f"{name}.npz"
        try:
            with np.load(path, allow_pickle=False) as file:
                return torch.from_numpy(file["x_adv"])
        except (EOFError, KeyError, zipfile.BadZipFile) as fault:
            raise ValueError(f"{path} cannot be read: {fault}") from fault

    @property
    def pieces(self) -> Pieces:
        """What is finished of an evaluation."""
        return Pieces(self.path / "pieces")

    def write_model(self, model: nn.Module, input_shape: Shape, num_classes: int) -> None:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        # One key, as safetensors writes several in an order that changes from time to time.
        shape = json.dumps({"input_shape": input_shape, "num_classes": num_classes})
        write_bytes(self.path / "model.safetensors", save(state, metadata={"shape": shape}))

    def model(self) -> nn.Module:
        """The model in eval mode, on the CPU.

        Raises:
            FileNotFoundError: there is no trained model yet.
            ValueError: the file is damaged or does not fit the recipe.
        """
        if self.is_evaluation:
            return self.training.model()
        if (self.path / "model.json").is_file():
            return untrained.rebuild(self.path, self.experiment.model)
        path = self.path / "model.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"{self.path} holds no trained model yet; run its training to the end")
        try:
            with safe_open(path, "pt") as file:
                shape = {key: json.loads(value) for key, value in file.metadata().items()}
            shape = shape.get("shape", shape)  # older files have a key for each
            with torch.random.fork_rng():
                bare = self.experiment.model.model_copy(update={"weights": None})
                model = bare.build(tuple(shape["input_shape"]), shape["num_classes"])
            model.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        return model.eval()


def find_run(name: str | Path, runs: Path) -> Run:
    """The training or evaluation of this path, or of this name (or the beginning of one) in the folder of runs.

    Raises:
        FileNotFoundError: there is none, or several begin so.
    """
    return Run(find_folder(name, runs))


def all_runs(runs: Path) -> list[Run]:
    """Every training in a folder of runs, and every model that was evaluated without one, oldest first."""
    return [Run(path) for path in trainings(runs)]


def all_evaluations(runs: Path) -> list[Run]:
    """Every evaluation below them that has a folder of its own, oldest first."""
    return [Run(path) for path in evaluations(runs)]


def _read_recipe(folder: Path) -> dict[str, Any]:
    """What a folder keeps of a recipe.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / RECIPE if (folder / RECIPE).is_file() else folder / OLD_RECIPE
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is not YAML: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds no recipe")
    return found
