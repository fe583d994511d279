"""Under certificates and predictions products are taken in the tensors' own precision."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import images, linear_model
from torch import nn

from holdfast import Threat, evaluate
from holdfast.arithmetic import PRECISIONS
from holdfast.bounds import bound_margins
from holdfast.certify import BoundCertifier, LipschitzCertifier, PlugInSmoothing, SmoothingCertifier
from holdfast.inference import (
    plain_arithmetic,
)


def flags() -> dict[str, object]:
    """What decides how torch computes a product; a word where torch refuses to say."""
    c = torch._C

    def old(read: Callable[[], object]) -> object:
        with contextlib.suppress(RuntimeError):
            return read()
        return "refused"

    return {
        **{"/".join(place): c._get_fp32_precision_getter(*place) for place in PRECISIONS},
        "matmul": old(torch.get_float32_matmul_precision),
        "cublas": old(c._get_cublas_allow_tf32),
        "cudnn": old(c._get_cudnn_allow_tf32),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warns": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fills": torch.utils.deterministic.fill_uninitialized_memory,
        "backends": (c._get_cudnn_enabled(), c._get_nnpack_enabled(), c._get_mkldnn_enabled()),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


PLAIN = {
    **{"/".join(place): "ieee" for place in PRECISIONS},
    **{"matmul": "highest", "cublas": False, "cudnn": False},
    **{"deterministic": True, "warns": True, "fills": False, "backends": (False, False, True), "autocast": False},
}


def _generic(precision: str) -> None:
    torch._C._set_fp32_precision_setter("generic", "all", precision)


MIXED: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "old": lambda: torch.set_float32_matmul_precision("medium"),
    "old, convolutions": lambda: torch._C._set_cudnn_allow_tf32(False),
    "new": lambda: _generic("bf16"),
    "new over old": lambda: (torch.set_float32_matmul_precision("high"), _generic("tf32")),
    "one of cudnn's": lambda: torch._C._set_fp32_precision_setter("cuda", "conv", "ieee"),
    "one of onednn's": lambda: torch._C._set_fp32_precision_setter("mkldnn", "matmul", "bf16"),
}


@pytest.fixture
def fast_arithmetic() -> Iterator[None]:
    """Whatever a test asks of torch's float32 products is gone afterwards."""
    with plain_arithmetic(torch.device("cpu")):
        torch.set_float32_matmul_precision("highest")
        torch._C._set_cudnn_allow_tf32(True)
        for place in PRECISIONS:
            if place[0] != "cuda" or place[1] in ("all", "matmul"):
                torch._C._set_fp32_precision_setter(*place, "none")
        torch._C._set_deterministic_algorithms(False)
        yield


@pytest.mark.usefixtures("fast_arithmetic")
@pytest.mark.parametrize("mix", MIXED)
def test_plain_arithmetic_inside_and_what_was_set_afterwards(mix: str) -> None:
    MIXED[mix]()
    cpu = torch.device("cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = flags()
        with plain_arithmetic(cpu):
            assert flags() == PLAIN
            with plain_arithmetic(cpu):
                assert flags() == PLAIN
            assert flags() == PLAIN
        assert flags() == before
        with pytest.raises(KeyError), plain_arithmetic(cpu):
            raise KeyError
        assert flags() == before


@pytest.mark.usefixtures("fast_arithmetic")
def test_a_setting_that_follows_another_still_does_afterwards() -> None:
    _generic("tf32")
    with plain_arithmetic(torch.device("cpu")):
        pass
    _generic("none")
    assert torch._C._get_fp32_precision_getter("cuda", "matmul") == "none"
    assert torch._C._get_fp32_precision_getter("mkldnn", "conv") == "none"


def test_a_caller_who_forbids_other_kernels_keeps_to_that() -> None:
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    try:
        with plain_arithmetic(torch.device("cpu")):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch._C._set_deterministic_algorithms(False)


def test_what_the_environment_asks_of_onednn_is_not_asked_in_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    with plain_arithmetic(torch.device("cpu")):
        assert not torch._C._get_mkldnn_enabled()
    assert torch._C._get_mkldnn_enabled()


class Recording(nn.Module):
    """A network that notes in what arithmetic its concrete forwards run."""

    def __init__(self) -> None:
        super().__init__()
        self.network = linear_model(4, (1, 8, 8))
        self.seen: list[dict[str, object]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is torch.Tensor:
            self.seen.append(flags())
        return self.network(x)


L2 = Threat("l2", 0.1)
DOORS: dict[str, Callable[[nn.Module, torch.Tensor, torch.Tensor], object]] = {
    "bound_margins": lambda model, x, y: bound_margins(model, x, y, L2),
    "bounds": lambda model, x, y: BoundCertifier(method="crown")(model, x, y, L2).radius,
    "lipschitz": lambda model, x, y: LipschitzCertifier()(model, x, y, L2).radius,
    "smoothing": lambda model, x, y: SmoothingCertifier(n=500)(model, x, y, L2).radius,
    "plug-in": lambda model, x, y: PlugInSmoothing(n=100)(model, x, y, L2).radius,
    "standard": lambda model, x, y: torch.tensor(evaluate(model, x, y, L2).table["prediction"].tolist()),
}


@pytest.mark.usefixtures("fast_arithmetic")
@pytest.mark.parametrize("door", DOORS)
def test_certificates_and_predictions_are_of_plain_arithmetic(door: str) -> None:
    (x, y), model, plain = images(6), Recording(), linear_model(4, (1, 8, 8))
    expected = DOORS[door](plain, x, y)
    torch.set_float32_matmul_precision("medium")
    before = flags()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(DOORS[door](plain, x, y), expected)
        DOORS[door](model, x, y)
    assert model.seen
    first = model.seen if door != "standard" else model.seen[:1]  # doubts about a network are asked as they come
    assert all(seen == PLAIN for seen in first)
    assert flags() == before


@pytest.mark.usefixtures("fast_arithmetic")
@pytest.mark.parametrize("door", [name for name in DOORS if name != "bound_margins"])
def test_half_precision_is_refused_by_name_under_a_certificate(door: str) -> None:
    x, y = images(5)
    model = linear_model(4, (1, 8, 8)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ValueError, match=r"weights are bfloat16, .* call model.float\(\)"):
            DOORS[door](model, x, y)
        with pytest.raises(ValueError, match=r"float32 or float64 inputs, given .* torch\.bfloat16"):
            DOORS[door](model, x.bfloat16(), y)
