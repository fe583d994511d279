"""ONNX networks: each operator as onnx's own evaluator computes it, in any batch, and bounded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from holdfast import Threat
from holdfast.bounds import bound_outputs
from holdfast.formats import Onnx, read_onnx
from holdfast.models import Model

IMAGE = (3, 7, 6)
Made = tuple[list[Any], dict[str, np.ndarray[Any, Any]]]


def draw(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def saved(
    folder: Path,
    nodes: list[Any],
    constants: dict[str, Any] | None = None,
    shape: tuple[Any, ...] = (1, *IMAGE),
    version: int = 13,
) -> Path:
    """A file whose last node's first output is the network's."""
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    path = folder / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=8), path)
    return path


def check(path: Path, shape: tuple[int, ...], bounded: bool = True) -> nn.Module:
    """The module answers a batch as the reference answers its inputs one by one, and is bounded."""
    reference, module = ReferenceEvaluator(str(path)), read_onnx(path).module
    x = torch.from_numpy(draw(4, *shape[1:] if shape[0] == 1 else shape))
    wanted = [np.ravel(reference.run(None, {"x": one.numpy().reshape(shape)})[0]) for one in x]
    assert np.allclose(module(x).detach().numpy(), np.stack(wanted), atol=1e-5)
    if bounded:
        lower, upper = bound_outputs(module, x, Threat("linf", 0.01, low=-9, high=9), method="ibp")
        found = module(x)
        assert ((lower <= found + 1e-5) & (found <= upper + 1e-5)).all()
    return module


def node(kind: str, inputs: str = "x", output: str = "y", **attributes: Any) -> Any:
    return helper.make_node(kind, inputs.split(), output.split(), name=f"the_{kind}", **attributes)


CONVOLUTIONS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "plain": ((4, 3, 3, 3), {}),
    "strides": ((4, 3, 3, 2), {"strides": [2, 1], "pads": [1, 0, 1, 0]}),
    "one-sided": ((4, 3, 3, 3), {"pads": [1, 0, 2, 3]}),
    "dilations": ((4, 3, 2, 2), {"dilations": [2, 3], "pads": [1, 1, 1, 1]}),
    "groups": ((6, 1, 3, 3), {"group": 3}),
    "same-upper": ((4, 3, 4, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "same-lower": ((4, 3, 4, 3), {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    "valid": ((4, 3, 3, 3), {"auto_pad": "VALID"}),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(tmp_path: Path, case: str) -> None:
    weight, attributes = CONVOLUTIONS[case]
    constants = {"w": draw(*weight), "b": draw(weight[0])}
    check(saved(tmp_path, [node("Conv", "x w b", **attributes)], constants), (1, *IMAGE))


def test_transposed_convolution(tmp_path: Path) -> None:
    layer = node("ConvTranspose", "x w", strides=[2, 2], pads=[1, 0, 1, 0], output_padding=[1, 0])
    check(saved(tmp_path, [layer], {"w": draw(3, 4, 3, 3)}), (1, *IMAGE))


POOLS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_shape": [2, 2]},
    "strides": {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    "ceil": {"kernel_shape": [2, 3], "strides": [2, 2], "ceil_mode": 1},
    "more-after": {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]},
    "more-before": {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 0, 0]},
    "same-upper": {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
}


@pytest.mark.parametrize("case", POOLS)
@pytest.mark.parametrize("kind", ["MaxPool", "AveragePool", "counted"])
def test_pooling(tmp_path: Path, kind: str, case: str) -> None:
    counted = {"count_include_pad": 1} if kind == "counted" else {}
    name = "AveragePool" if kind == "counted" else kind
    check(saved(tmp_path, [node(name, **POOLS[case], **counted)], version=21), (1, *IMAGE))


def test_max_pooling_of_every_other_entry(tmp_path: Path) -> None:
    check(saved(tmp_path, [node("MaxPool", kernel_shape=[2, 2], dilations=[2, 2])]), (1, *IMAGE))


@pytest.mark.parametrize("kind", ["GlobalAveragePool", "GlobalMaxPool"])
def test_pooling_of_all(tmp_path: Path, kind: str) -> None:
    check(saved(tmp_path, [node(kind), node("Flatten", "y", "z")]), (1, *IMAGE))


@pytest.mark.parametrize(
    "settings", [{}, {"transB": 1}, {"alpha": 0.5, "beta": 2.0}, {"transB": 1, "alpha": -1.5, "beta": 0.0}]
)
@pytest.mark.parametrize("bias", [(5,), (1, 5), (1,), None])
def test_gemm(tmp_path: Path, settings: dict[str, Any], bias: tuple[int, ...] | None) -> None:
    constants = {"w": draw(5, 4) if settings.get("transB") else draw(4, 5)}
    constants |= {"b": draw(*bias)} if bias else {}
    layer = node("Gemm", "x w b" if bias else "x w", **settings)
    assert isinstance(check(saved(tmp_path, [layer], constants, (1, 4)), (1, 4)), nn.Sequential)


UNARY: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in ("Relu", "Sigmoid", "Tanh", "Abs", "Neg", "Identity", "Elu", "LogSoftmax")},
    "LeakyRelu": ("LeakyRelu", {"alpha": 0.2}),
    "Softmax": ("Softmax", {"axis": -1}),
    "Dropout": ("Dropout", {}),
    "Cast": ("Cast", {"to": TensorProto.FLOAT}),
}


@pytest.mark.parametrize("case", UNARY)
def test_functions_of_an_entry(tmp_path: Path, case: str) -> None:
    kind, attributes = UNARY[case]
    nodes = [node("Gemm", "x w", "h"), node(kind, "h", **attributes)]
    check(saved(tmp_path, nodes, {"w": draw(4, 5)}, (1, 4)), (1, 4))


BINARY = {
    "channels": (3, 1, 1),
    "batch": (1, 3, 1, 1),
    "scalar": (),
    "one": (1,),
    "image": IMAGE,
    "row": (6,),
    "deeper": (1, 1, 3, 1, 1),
}


@pytest.mark.parametrize("shape", BINARY)
@pytest.mark.parametrize("kind", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("order", ["x c", "c x"])
def test_arithmetic_with_constants(tmp_path: Path, kind: str, shape: str, order: str) -> None:
    bounded = (kind, order) != ("Div", "c x")  # that is 1 / x, which may have a pole
    constant = np.asarray(1.5 + np.abs(draw(*BINARY[shape])), np.float32)
    check(saved(tmp_path, [node(kind, order)], {"c": constant}), (1, *IMAGE), bounded)


def test_sums_of_two_ways(tmp_path: Path) -> None:
    nodes = [node("Conv", "x w", "a", pads=[1, 1, 1, 1]), node("Relu", "a", "b"), node("Add", "b x", "c")]
    nodes += [node("Sub", "c b", "d"), node("Concat", "d x", "e", axis=1), node("Flatten", "e")]
    check(saved(tmp_path, nodes, {"w": draw(3, 3, 3, 3)}), (1, *IMAGE))


def test_batch_normalisation(tmp_path: Path) -> None:
    constants = {"s": draw(3), "b": draw(3) + 1, "m": draw(3) - 1, "v": np.abs(draw(3)) + 1}
    check(
        saved(tmp_path, [node("BatchNormalization", "x s b m v", epsilon=0.1)], constants, version=15), (1, *IMAGE)
    )


def integers(*numbers: int) -> np.ndarray[Any, Any]:
    return np.array(numbers, np.int64)


SHAPES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "flatten": ([node("Flatten")], {}),
    "flatten-all": ([node("Flatten", axis=0)], {}),
    "reshape": ([node("Reshape", "x s")], {"s": integers(1, -1)}),
    "reshape-kept": ([node("Reshape", "x s")], {"s": integers(0, 0, -1)}),
    "no-batch": ([node("Reshape", "x s", "h"), node("MatMul", "h w")], {"s": integers(-1), "w": draw(126, 4)}),
    "and-back": (
        [node("Reshape", "x s", "h"), node("Reshape", "h t")],
        {"s": integers(126), "t": integers(1, 6, 21)},
    ),
    "transposed": ([node("Transpose", perm=[0, 2, 3, 1])], {}),
    "reversed": ([node("Transpose", "x", "h"), node("Flatten", "h", axis=0)], {}),
    "pooled": ([node("GlobalAveragePool", "x", "h"), node("Squeeze", "h s")], {"s": integers(2, 3)}),
    "squeezed": ([node("GlobalAveragePool", "x", "h"), node("Squeeze", "h")], {}),
    "unsqueezed": ([node("Unsqueeze", "x s", "h"), node("Relu", "h")], {"s": integers(1, -1)}),
    "column": (
        [node("Flatten", "x", "h"), node("Transpose", "h", "t"), node("MatMul", "w t", "u"), node("Add", "u b")],
        {"w": draw(4, 126), "b": draw(4, 1)},
    ),
    "slice": ([node("Slice", "x a b c d")], dict(zip("abcd", map(integers, (1, 9, 2, 2)), strict=True))),
    "gather": ([node("Gather", "x i", axis=1)], {"i": integers(2, 0)}),
    "gather-one": ([node("Gather", "x i", axis=-1)], {"i": np.int64(-1)}),
    "padded": ([node("Pad", "x p")], {"p": integers(0, 0, 1, 2, 0, 0, 0, 1)}),
    "mean": ([node("ReduceMean", axes=[2, 3], keepdims=0)], {}),
    "shape": (
        [
            node("Shape", "x", "s"),
            node("Gather", "s i", "n"),
            node("Concat", "n m", "t", axis=0),
            node("Reshape", "x t"),
        ],
        {"i": integers(0), "m": integers(-1)},
    ),
}


@pytest.mark.parametrize("batch", [1, "N"])
@pytest.mark.parametrize("case", SHAPES)
def test_shapes(tmp_path: Path, case: str, batch: Any) -> None:
    nodes, constants = SHAPES[case]
    check(saved(tmp_path, nodes, constants, (batch, *IMAGE)), (1, *IMAGE))


def test_parts_that_are_split(tmp_path: Path) -> None:
    nodes = [node("Split", "x s", "a b", axis=1), node("Concat", "b a", axis=1)]
    check(saved(tmp_path, nodes, {"s": integers(1, 2)}), (1, *IMAGE))


def test_a_network_without_a_batch(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x w", "h"), node("Add", "h b", "r"), node("Relu", "r")]
    module = check(saved(tmp_path, nodes, {"w": draw(5, 4), "b": draw(4)}, (5,)), (5,))
    assert [type(layer) for layer in module.children()] == [nn.Linear, nn.ReLU]
    assert module[0].bias is not None  # type: ignore[index]


@pytest.mark.parametrize("low", [None, 0.0, -0.5])
@pytest.mark.parametrize("high", [None, 0.7])
def test_clipping(tmp_path: Path, low: float | None, high: float | None) -> None:
    ends = {name: np.float32(end) for name, end in (("l", low), ("h", high)) if end is not None}
    names = ["x", "l" if low is not None else "", *(["h"] if high is not None else [])]
    clip = helper.make_node("Clip", names, ["y"], name="clip")
    check(saved(tmp_path, [clip], ends), (1, *IMAGE))


def test_older_operator_sets(tmp_path: Path) -> None:
    nodes = [
        node("Conv", "x w", "a"),
        node("Clip", "a", "b", min=0.0, max=1.0),
        node("Pad", "b", "c", pads=[0] * 8),
    ]
    nodes += [node("GlobalAveragePool", "c", "d"), node("Squeeze", "d", "e", axes=[2, 3]), node("Softmax", "e")]
    check(saved(tmp_path, nodes, {"w": draw(4, 3, 3, 3)}, version=9), (1, *IMAGE))


def test_images_fit_flat_inputs_and_channels_last(tmp_path: Path) -> None:
    x = torch.rand(2, *IMAGE)
    flat = read_onnx(saved(tmp_path, [node("Relu")], shape=(1, 126)), IMAGE)
    assert flat.input_shape == IMAGE
    assert torch.equal(flat.module(x), x.flatten(1))
    last = read_onnx(saved(tmp_path, [node("Relu")], shape=("N", 7, 6, 3)), IMAGE)
    assert torch.equal(last.module(x), x.permute(0, 2, 3, 1).flatten(1))
    with pytest.raises(ValueError, match=r"takes inputs of shape \(1, 126\), the images have \(1, 28, 28\)"):
        read_onnx(saved(tmp_path, [node("Relu")], shape=(1, 126)), (1, 28, 28))


def test_it_is_differentiable_and_leaves_the_random_numbers(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    module = read_onnx(saved(tmp_path, [node("Gemm", "x w")], {"w": draw(4, 5)}, (1, 4))).module
    assert torch.equal(state, torch.get_rng_state())
    x = torch.rand(2, 4, requires_grad=True)
    module(x)[:, 0].sum().backward()
    assert torch.allclose(x.grad, torch.from_numpy(draw(4, 5))[:, 0].expand(2, 4))  # type: ignore[arg-type]


def refused(path: Path, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read_onnx(path)
    assert str(path) in str(caught.value)


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    refused(saved(tmp_path, [node("Relux")]), r"'the_Relux' \(Relux\).*did you mean 'Relu'.*package.module:factory")
    lines = [node("Relu", "x", "a"), node("Concat", "a x", axis=0)]
    refused(saved(tmp_path, lines), r"'the_Concat' \(Concat\) is not read: it works along the batch")
    refused(saved(tmp_path, [node("Conv", "x w")], {"w": draw(4, 3, 3, 3)}, (8, *IMAGE)), "fixed batch of 8")
    refused(saved(tmp_path, [node("Relu")], shape=(1, "C")), "has no fixed shape")
    refused(saved(tmp_path, [node("Relu")], version=6), "operator set 6, read are 7 to")
    refused(saved(tmp_path, [node("Relu", "z")]), r"reads 'z', which nothing before it computes")
    refused(saved(tmp_path, [node("Relu", "c")], {"c": draw(2)}), "does not depend on its input")


def test_a_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"hello, world")
    refused(path, "cannot be read as ONNX")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_onnx(tmp_path / "other.onnx")


def test_the_model_of_a_recipe(tmp_path: Path) -> None:
    nodes = [node("Flatten", "x", "h"), node("Gemm", "h w")]
    path = saved(tmp_path, nodes, {"w": draw(126, 4)})
    model = Model.parse({"name": "onnx", "path": str(path)})
    assert isinstance(model, Onnx)
    assert model.build(IMAGE, 4)(torch.rand(2, *IMAGE)).shape == (2, 4)
    with pytest.raises(ValueError, match="has 4 outputs, the data 10 classes"):
        model.build(IMAGE, 10)


EXPORTED: dict[str, Callable[[], nn.Module]] = {
    "chain": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.ReLU(), nn.Flatten(), nn.Linear(168, 4)),
    "normed": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    ),
}


@pytest.mark.parametrize("case", EXPORTED)
def test_what_torch_exports_comes_back(tmp_path: Path, case: str) -> None:
    torch.manual_seed(0)
    model, x = EXPORTED[case]().eval(), torch.rand(3, *IMAGE)
    torch.onnx.export(model, (x[:1],), tmp_path / "net.onnx", dynamo=True, verbose=False)
    assert torch.allclose(read_onnx(tmp_path / "net.onnx").module(x), model(x), atol=1e-5)
