"""What the 1-Lipschitz layers share: free parameters, effective weights that are never stale, a verified bound."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Hashable, Iterator
from copy import deepcopy
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree

Kept = dict[Hashable, tuple[list[Tensor], Any]]
"""By the size of the input: copies of the parameters, and what was derived from them."""
_step: dict[int, Kept] | None = None
"""What the layers share within a training step, by their identity."""


@contextlib.contextmanager
def shared_weights() -> Iterator[None]:
    """Inside, the training forwards of a layer share one effective weight, and its graph: for one training step."""
    global _step
    before, _step = _step, {}
    try:
        yield
    finally:
        _step = before


class LipschitzLayer(nn.Module):
    """A layer whose l_2 Lipschitz constant is bounded by how it is built from its free parameters.

    What follows from the parameters is computed at every forward while gradients flow to them (once per training
    step inside ``shared_weights``), and otherwise kept with a copy of the parameters it came from: whatever changes
    these, the next forward sees it.
    """

    weight: nn.Parameter
    """Free, of any size."""
    bias: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self._kept: Kept = {}

    @abstractmethod
    def derive(self, size: Hashable = None) -> Any:
        """What the forward needs of the parameters, differentiable in them; of the bias nothing.

        Args:
            size: of the input, where it matters.
        """

    @abstractmethod
    def lipschitz_bound(self) -> float:
        """At least the layer's Lipschitz constant in eval mode, from l_2 to l_2, computed in float64."""

    def derived(self, size: Hashable = None) -> Any:
        """``derive``, or what is kept of it."""
        sources: list[Tensor] = [value for name, value in self.named_parameters() if name != "bias"]
        sources += [value for name, value in self.named_buffers() if "." in name]  # a parametrisation's
        trains = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
        transformed = any(map(torch._C._functorch.is_functorch_wrapped_tensor, sources))  # parameters of torch.func
        if trains != self.training or (trains and _step is None) or transformed:
            return self.derive(size)
        kept = _step.setdefault(id(self), {}) if trains and _step is not None else self._kept
        if any(not all(map(_same, copies, sources)) for copies, _ in list(kept.values())[:1]):
            kept.clear()
        if size not in kept:
            copies = [source.detach().clone() for source in sources]
            if trains:
                kept[size] = copies, self.derive(size)
            else:  # what is kept serves whatever comes: a later gradient, another precision
                plain = torch.autocast(self.weight.device.type, enabled=False)
                with torch.inference_mode(False), torch.no_grad(), plain:
                    kept[size] = copies, self.derive(size)
        return kept[size][1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}


def _same(copy: Tensor, source: Tensor) -> bool:
    if copy.dtype != source.dtype or copy.device != source.device or copy.shape != source.shape:
        return False
    plain = copy.device.type == "cpu" and copy.is_contiguous() and source.is_contiguous()
    if plain and copy.nbytes % 8 == 0:
        with contextlib.suppress(RuntimeError):  # within a transform of torch.func
            first, second = (value.detach().view(-1).view(torch.int64).numpy() for value in (copy, source))
            return np.array_equal(first, second)  # bit for bit, and five times as fast
    return torch.equal(copy, source)


class LipschitzConv2d(LipschitzLayer):
    """A convolution with "same" padding between any numbers of channels."""

    padding_modes: ClassVar[tuple[str, ...]] = ("zeros", "circular")
    """Those it is defined for, the usual one first."""
    strides: ClassVar[bool] = True
    """Whether it is defined for a stride."""
    unshuffles: ClassVar[bool] = True
    """Whether a stride s first turns s × s pixels into channels, which keeps lengths; otherwise positions are left
    out."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        *,
        bias: bool = True,
        padding_mode: str | None = None,
        stride: int = 1,
    ) -> None:
        super().__init__()
        kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        name = type(self).__name__
        if len(kernel) != 2 or any(side % 2 == 0 or side < 1 for side in kernel):
            raise ValueError(f"{name} needs a kernel of odd sides, given {kernel_size}")
        if min(in_channels, out_channels, stride) < 1:
            raise ValueError(f"{name} needs positive numbers, given {in_channels}, {out_channels}, stride {stride}")
        self.padding_mode = padding_mode or self.padding_modes[0]
        if self.padding_mode not in self.padding_modes:
            allowed = " or ".join(self.padding_modes)
            raise ValueError(f"{name} is defined for padding_mode {allowed}, given {padding_mode!r}")
        if stride > 1 and not self.strides:
            raise ValueError(f"{name} has no stride; put a PixelUnshuffle before it")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = kernel, stride
        self.weight = nn.Parameter(self.initial_weight())
        self.bias = nn.Parameter(torch.zeros(self.bias_size)) if bias else None

    @property
    def read_channels(self) -> int:
        """Channels that the kernel reads."""
        return self.in_channels * self.stride**2 if self.unshuffles else self.in_channels

    @property
    def width(self) -> int:
        """Channels of the square layer that it is cut out of, where the method needs one."""
        return max(self.read_channels, self.out_channels)

    @property
    def bias_size(self) -> int:
        return self.out_channels

    def unshuffled(self, x: Tensor) -> Tensor:
        """The input as the kernel reads it."""
        return F.pixel_unshuffle(x, self.stride) if self.unshuffles and self.stride > 1 else x

    @abstractmethod
    def initial_weight(self) -> Tensor:
        """The free parameter of a new layer."""

    def extra_repr(self) -> str:
        stride = f", stride={self.stride}" if self.stride > 1 else ""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"bias={self.bias is not None}, padding_mode={self.padding_mode}{stride}"
        )


class LipschitzLinear(LipschitzLayer):
    """A dense layer between any numbers of features."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__()
        if min(in_features, out_features) < 1:
            raise ValueError(f"{type(self).__name__} needs features, given {in_features} and {out_features}")
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(self.initial_weight())
        self.bias = nn.Parameter(torch.zeros(self.bias_size)) if bias else None

    @property
    def width(self) -> int:
        """Features of the square layer that it is cut out of, where the method needs one."""
        return max(self.in_features, self.out_features)

    @property
    def bias_size(self) -> int:
        return self.out_features

    @abstractmethod
    def initial_weight(self) -> Tensor:
        """The free parameter of a new layer."""

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class AffineConv2d(LipschitzConv2d):
    """A convolution with an effective kernel."""

    def effective_weight(self) -> Tensor:
        """The kernel that is applied, (out, in, k_1, k_2)."""
        kernel: Tensor = self.derived()
        return kernel

    def forward(self, x: Tensor) -> Tensor:
        stride = 1 if self.unshuffles else self.stride
        return convolve(self.unshuffled(x), self.effective_weight(), self.bias, self.padding_mode, stride)

    def freeze(self) -> nn.Module:
        """The plain convolution that it is now, behind a PixelUnshuffle where its stride needs one."""
        plain = nn.utils.skip_init(
            nn.Conv2d,
            self.read_channels,
            self.out_channels,
            self.kernel_size,
            stride=1 if self.unshuffles else self.stride,
            padding=(self.kernel_size[0] // 2, self.kernel_size[1] // 2),
            bias=self.bias is not None,
            padding_mode=self.padding_mode,
        )
        plain = _filled(plain, self.effective_weight(), self.bias)
        unshuffles = self.unshuffles and self.stride > 1
        return nn.Sequential(nn.PixelUnshuffle(self.stride), plain) if unshuffles else plain


class AffineLinear(LipschitzLinear):
    """A dense layer with an effective weight."""

    def effective_weight(self) -> Tensor:
        """The matrix that is applied, (out, in)."""
        matrix: Tensor = self.derived()
        return matrix

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective_weight(), self.bias)

    def freeze(self) -> nn.Linear:
        """The plain dense layer that it is now."""
        plain = nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, bias=self.bias is not None)
        return _filled(plain, self.effective_weight(), self.bias)


def _filled(plain: Any, weight: Tensor, bias: Tensor | None) -> Any:
    plain = plain.to(weight)
    with torch.no_grad():
        plain.weight.copy_(weight)
        if bias is not None:
            plain.bias.copy_(bias)
    return plain


def freeze(model: nn.Module) -> nn.Module:
    """A copy of a model in eval mode whose affine Lipschitz layers are plain convolutions and dense layers."""
    model = deepcopy(model).eval()
    if isinstance(model, AffineConv2d | AffineLinear):
        return model.freeze()
    for module in list(model.modules()):
        for name, child in module._modules.items():  # named_children leaves out what is there twice
            if isinstance(child, AffineConv2d | AffineLinear):
                setattr(module, name, child.freeze())
    return model


def in_double(model: nn.Module) -> nn.Module:
    """A copy of a model in eval mode in float64, with the weights that it applies now: what layers and
    parametrisations make of their parameters is as they made it in the model's own precision."""
    double = deepcopy(model).eval()
    for module in double.modules():
        if parametrize.is_parametrized(module) and not isinstance(module, LipschitzLayer):
            kind = type(module)  # the original's too, from which a removal would take the weight away
            module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
            for name in [name for name, _ in cast(nn.ModuleDict, module.parametrizations).items()]:
                parametrize.remove_parametrizations(module, name)
    double = double.double()
    for name, theirs in double.named_modules():  # fewer than the model's, without the parametrisations
        if isinstance(theirs, LipschitzLayer):
            ours = cast(LipschitzLayer, model.get_submodule(name))
            theirs._kept = _pytree.tree_map_only(Tensor, _doubled, ours._kept)
    return double


def _doubled(value: Tensor) -> Tensor:
    kinds = {torch.float32: torch.float64, torch.complex64: torch.complex128}
    return value.to(kinds.get(value.dtype, value.dtype))


def convolve(x: Tensor, kernel: Tensor, bias: Tensor | None, padding_mode: str, stride: int = 1) -> Tensor:
    """A convolution with "same" padding of a kernel of odd sides."""
    high, wide = kernel.shape[2] // 2, kernel.shape[3] // 2
    if padding_mode == "circular":
        return F.conv2d(F.pad(x, (wide, wide, high, high), mode="circular"), kernel, bias, stride)
    return F.conv2d(x, kernel, bias, stride, (high, wide))


def adjoint_kernel(kernel: Tensor) -> Tensor:
    """The kernel whose "same" convolution is the adjoint of this one's, for either padding."""
    return kernel.transpose(0, 1).flip(2, 3)


def widen(x: Tensor, channels: int) -> Tensor:
    """Zeros appended along dimension 1 up to so many channels; (N, C, ...)."""
    missing = channels - x.shape[1]
    return F.pad(x, [0, 0] * (x.dim() - 2) + [0, missing]) if missing > 0 else x
