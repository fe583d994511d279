"""Modes, gradients, seeds and the checks at the door."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from helpers import Trace, images, linear_model, small_cnn
from torch import nn

from holdfast import Threat, evaluate
from holdfast.analysis import local_lipschitz
from holdfast.attacks import PGD
from holdfast.bounds import bound_margins
from holdfast.certify import BoundCertifier, LipschitzCertifier, SmoothingCertifier
from holdfast.inference import (
    check_inputs,
    check_logits,
    device_of,
    frozen_eval,
    mix_seed,
    own_inputs,
    predict,
    rehearse,
)


def test_frozen_eval_restores_every_submodule_and_parameter() -> None:
    model = small_cnn()
    model.train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    trace = Trace(model)
    with frozen_eval(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
    trace.check()


def test_frozen_eval_restores_after_an_exception() -> None:
    model = small_cnn().train()
    trace = Trace(model)
    with pytest.raises(KeyError), frozen_eval(model):
        raise KeyError
    trace.check()


def test_labels_of_any_integer_kind_become_int64() -> None:
    assert (
        check_inputs(torch.rand(2, 3), torch.tensor([1, 2], dtype=torch.uint8), Threat("linf", 0)).dtype
        == torch.int64
    )


def test_a_model_that_changes_its_input_changes_nobodys_images() -> None:
    class Halving(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x *= 0.5
            return x.flatten(1)[:, :4]

    x, _ = images(5)
    before = x.clone()
    assert torch.equal(predict(Halving(), x), 0.5 * before.flatten(1)[:, :4])
    assert torch.equal(x, before)


@dataclass
class Output:
    """As some libraries wrap their answers."""

    logits: torch.Tensor


class Answering(nn.Module):
    """Answers with whatever is made of its logits."""

    def __init__(self, answer: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.network, self.answer = linear_model(4, (1, 8, 8)), answer

    def forward(self, x: torch.Tensor) -> object:
        return self.answer(self.network(x))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda z: (z, z), "gave tuple of 2; return the logits alone"),
        (lambda z: {"logits": z}, "gave dict of logits; return the logits alone"),
        (Output, r"gave Output; return the logits alone, its \.logits"),
        (lambda z: None, "gave None"),
        (lambda z: z.numpy(), "gave ndarray"),
        (lambda z: z.argmax(1), "in floating point, the model gave torch.int64"),
        (lambda z: torch.complex(z, z), "the model gave torch.complex64"),
    ],
)
def test_whatever_is_no_tensor_of_logits_is_refused_in_one_sentence(
    answer: Callable[[torch.Tensor], object], message: str
) -> None:
    x, y = images(5)
    with pytest.raises(ValueError, match=message):
        predict(Answering(answer), x)
    with pytest.raises(ValueError, match=message):
        evaluate(Answering(answer), x, y, Threat("linf", 0.1), attacks=["fgsm"])


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.float64, r"weights are float64, its inputs float32: .* call model.float\(\)"),
        (torch.float16, r"weights are float16, .* call model.float\(\)"),
        (torch.bfloat16, r"weights are bfloat16, .* call model.float\(\)"),
        (torch.complex64, "weights are complex64, expected real ones"),
    ],
)
def test_weights_that_cannot_meet_the_images_are_named(dtype: torch.dtype, message: str) -> None:
    x, y = images(5)
    with warnings.catch_warnings(action="ignore"):  # torch says that complex modules are new
        model = linear_model(4, (1, 8, 8)).to(dtype)
    threat = Threat("linf", 0.1)
    doors: list[Callable[[], object]] = [
        lambda: predict(model, x),
        lambda: evaluate(model, x, y, threat, attacks=["fgsm"]),
        lambda: PGD()(model, x, y, threat),
        lambda: bound_margins(model, x, y, threat),
        lambda: BoundCertifier(method="crown")(model, x, y, threat),
        lambda: LipschitzCertifier()(model, x, y, Threat("l2", 0.1)),
        lambda: SmoothingCertifier(sigma=0.25)(model, x, y, Threat("l2", 0.1)),
        lambda: local_lipschitz(model, x, threat),
    ]
    for door in doors:
        with pytest.raises(ValueError, match=message):
            door()


def test_weights_without_values_and_float64_images_are_named() -> None:
    x, _ = images(2)
    with pytest.raises(ValueError, match="device meta"):
        predict(linear_model(4, (1, 8, 8)).to("meta"), x)
    with pytest.raises(ValueError, match="or give float32 inputs"):
        predict(linear_model(4, (1, 8, 8)), x.double())
    assert predict(linear_model(4, (1, 8, 8)).double(), x.double()).dtype == torch.float64


def test_a_fault_in_a_foreign_forward_is_told_with_its_place() -> None:
    x, _ = images(2)
    with pytest.raises(
        ValueError, match=r"images of \(1, 8, 8\): AttributeError: .*'nothing'.*test_inference.py, line"
    ):
        rehearse(Answering(lambda z: z.nothing), x, 4)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="label 4 does not fit a model of 4 classes"):
        rehearse(Answering(lambda z: z), x, 5)


def test_predict_is_the_model_whatever_the_batch_size() -> None:
    model = small_cnn().eval()
    x, _ = images(7)
    assert torch.allclose(predict(model, x, 3), model(x), atol=1e-6)


def test_seeds_are_mixed_in_order() -> None:
    assert mix_seed(1, 2) != mix_seed(2, 1)
    assert 0 <= mix_seed(0) < 2**63


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.rand(8), torch.zeros(8).long(), "batch"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2).long(), "divide uint8 images by 255"),
        (torch.rand(2, 3).half(), torch.zeros(2).long(), "float32 or float64"),
        (torch.rand(2, 3).bfloat16(), torch.zeros(2).long(), "float32 or float64"),
        (torch.rand(2, 3), torch.zeros(3).long(), "2 integer labels"),
        (torch.rand(2, 3), torch.zeros(2), "integer labels"),
        (torch.rand(2, 3), torch.zeros(2).bool(), "integer labels"),
        (torch.rand(2, 3) + 1, torch.zeros(2).long(), "box is"),
        (torch.rand(2, 3) - 1, torch.zeros(2).long(), "box is"),
        (torch.tensor([[torch.nan, 0.0]]), torch.zeros(1).long(), "NaN or inf"),
        (torch.rand(2, 3), torch.tensor([0, -1]), "≥ 0, given -1"),
    ],
)
def test_inputs_that_make_no_sense_are_refused(x: torch.Tensor, y: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_inputs(x, y, Threat("linf", 0.1))


def test_answers_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="label 3 does not fit a model of 3 classes"):
        check_logits(torch.zeros(1, 3), torch.tensor([3]))
    with pytest.raises(ValueError, match="expected logits"):
        check_logits(torch.zeros(2, 3, 1), torch.tensor([0, 1]))
    with pytest.raises(FloatingPointError, match="not finite for example 1 of 2"):
        check_logits(torch.tensor([[0.0, 1.0], [torch.nan, 0.0]]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="K ≥ 2 classes"):
        check_logits(torch.zeros(2, 1), torch.tensor([0, 0]))


def test_device_of_a_module_without_parameters_is_the_cpu() -> None:
    assert device_of(nn.ReLU()).type == "cpu"


def test_a_leaf_that_needs_a_gradient_and_every_kind_of_module_take_copies() -> None:
    points = torch.full((2, 3), -0.5, requires_grad=True)
    plain = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)).eval()
    modules = [plain, torch.jit.script(plain), torch.compile(plain, backend="eager")]
    for model in modules:
        with own_inputs(model), own_inputs(model):
            model(points).sum().backward()
        assert (points == -0.5).all()
        assert not model._forward_pre_hooks
    with own_inputs(plain):
        model = copy.deepcopy(plain)
    model(points)
    assert (points == -0.5).all()


def test_a_graph_for_export_is_the_models_own() -> None:
    model = small_cnn().eval()
    with frozen_eval(model):
        program = torch.export.export(model, (torch.rand(1, 1, 8, 8),))
    assert "clone" not in program.graph_module.code
