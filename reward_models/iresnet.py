"""Face recognition networks read from their ONNX file into differentiable torch.

The recognisers of insightface (``glintr100.onnx``, ``w600k_r50.onnx``) are IResNets (arXiv 2004.04989) whose
convolutions were fused with the batch norm behind them when they were exported. Their graphs use a dozen plain
operators, so the graph itself is executed, node by node along its edges: nothing has to be guessed about depth or
width, and an operator or attribute that is not known is an error and never ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..files import WeightFileError, existing, unreadable

FACE_SIZE = 112


@dataclass(frozen=True)
class _Step:
    """One node: ``function`` of the values called ``inputs``; ``finished`` are not needed after it."""

    function: Callable[..., Tensor]
    inputs: tuple[str, ...]
    output: str
    finished: tuple[str, ...]


class FaceNetwork(nn.Module):
    """``[N, 3, 112, 112]`` RGB in 0..1 to ``[N, D]`` embeddings, not normalised; see :meth:`load`."""

    def __init__(
        self, steps: list[_Step], weights: dict[str, Tensor], source: str, result: str, *, normalizes: bool
    ) -> None:
        super().__init__()
        self._steps, self._source, self._result, self._normalizes = steps, source, result, normalizes
        self._names = {name: f"weight_{index}" for index, name in enumerate(weights)}
        for name, weight in weights.items():
            self.register_buffer(self._names[name], weight)

    @classmethod
    def load(cls, path: Path | str) -> FaceNetwork:
        """Read an ONNX file and compare the result with onnxruntime on a random picture.

        Raises:
            WeightFileError: The file is missing, damaged, holds another kind of network, or differs from onnxruntime.
        """
        path = Path(path)
        graph = _read(path).graph
        weights, steps = _weights(graph, path), []
        inputs = [value for value in graph.input if value.name not in weights]
        if len(inputs) != 1 or len(graph.output) != 1 or _shape(inputs[0])[1:] != [3, FACE_SIZE, FACE_SIZE]:
            raise WeightFileError(
                f"{path} is no face recognition network: it takes {[_shape(value) for value in inputs]} and gives "
                f"{len(graph.output)} outputs, where one picture [N, 3, {FACE_SIZE}, {FACE_SIZE}] and one are needed"
            )
        nodes = [node for node in graph.node if node.op_type != "Constant"]
        last_use = {name: index for index, node in enumerate(nodes) for name in node.input}
        for index, node in enumerate(nodes):
            finished = {name for name in node.input if last_use[name] == index} - weights.keys()
            steps.append(_Step(_function(node, path), tuple(node.input), node.output[0], tuple(finished)))
        # insightface's own rule: a network that begins by scaling its input takes 0..255
        starts = {node.op_type for node in graph.node[:8]}
        network = cls(steps, weights, inputs[0].name, graph.output[0].name, normalizes={"Sub", "Mul"} <= starts)
        network.eval()._compare_with_onnxruntime(path)
        return network

    def forward(self, faces: Tensor) -> Tensor:
        pixels = faces * 255
        values = {self._source: pixels if self._normalizes else (pixels - 127.5) / 127.5}
        for step in self._steps:
            arguments = [values[name] if name in values else getattr(self, self._names[name]) for name in step.inputs]
            values[step.output] = step.function(*arguments)
            for name in step.finished:
                del values[name]
        return values[self._result]

    @torch.no_grad()
    def _compare_with_onnxruntime(self, path: Path) -> None:
        """Published networks are many and this reader is small, so each is proven at every load."""
        face = torch.rand(1, 3, FACE_SIZE, FACE_SIZE, generator=torch.Generator().manual_seed(0))
        try:
            ours = self(face)
        except (RuntimeError, KeyError, TypeError) as error:
            raise WeightFileError(f"{path} is damaged or no face recognition network ({error})") from None
        session = open_session(path, "cpu")
        pixels = face * 255 if self._normalizes else (face * 255 - 127.5) / 127.5
        theirs = torch.from_numpy(session.run(None, {self._source: pixels.numpy()})[0])
        if ours.shape != theirs.shape or ours.dim() != 2 or not float((ours - theirs).norm() / theirs.norm()) < 1e-3:
            raise WeightFileError(f"{path} gives other numbers here than in onnxruntime; please report this file")


def open_session(path: Path, device: str) -> Any:
    """An onnxruntime session, on the GPU where ``device`` and the installed onnxruntime allow it.

    Raises:
        WeightFileError: The file is missing or damaged.
    """
    import onnxruntime as runtime

    known = runtime.get_available_providers()
    wanted = (["CUDAExecutionProvider"] if device.startswith("cuda") else []) + ["CPUExecutionProvider"]
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # warnings about unused initialisers are of no use to anyone
    try:
        return runtime.InferenceSession(str(existing(path)), options, [name for name in wanted if name in known])
    except WeightFileError:
        raise
    except Exception as error:  # its exceptions share no public base class
        reason = str(error).splitlines()[0]
        raise WeightFileError(f"{path} cannot be opened by onnxruntime ({reason}); download it again") from None


def _read(path: Path) -> Any:
    import onnx

    try:
        return onnx.load(str(existing(path)), load_external_data=False)
    except OSError as error:
        raise unreadable(path, error) from None
    except WeightFileError:
        raise
    except Exception:  # protobuf's decoding errors differ between its versions
        raise WeightFileError(f"{path} is damaged or not an ONNX file; download it again") from None


def _weights(graph: Any, path: Path) -> dict[str, Tensor]:
    """Initialisers and constants by name; copies, so that nothing keeps the protobuf alive."""
    import onnx

    tensors = {tensor.name: tensor for tensor in graph.initializer}
    tensors |= {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    try:
        return {name: torch.tensor(onnx.numpy_helper.to_array(tensor)) for name, tensor in tensors.items()}
    except Exception:  # external or cut off data: the kind of error depends on onnx' version
        raise WeightFileError(f"{path} lacks the data of its weights; download it again") from None


def _shape(value: Any) -> list[int | str]:
    return [size.dim_value or size.dim_param or "?" for size in value.type.tensor_type.shape.dim]


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pads: Sequence[int] = (0, 0, 0, 0),
    strides: Sequence[int] = (1, 1),
    dilations: Sequence[int] = (1, 1),
    group: int = 1,
) -> Tensor:
    top, left, bottom, right = pads
    if (top, left) != (bottom, right):
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    return F.conv2d(x, weight, bias, tuple(strides), (top, left), tuple(dilations), group)


def _batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, *, epsilon: float = 1e-5
) -> Tensor:
    return F.batch_norm(x, mean, variance, weight, bias, eps=epsilon)


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    return F.prelu(x, slope.flatten())


def _identity(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class _Operator:
    """What computes an operator, which attributes it takes or may pass over, and which must have one value."""

    function: Callable[..., Tensor]
    takes: frozenset[str] = frozenset()
    ignores: frozenset[str] = frozenset()
    fixed: Mapping[str, object] = field(default_factory=dict)


OPERATORS = {
    "Add": _Operator(torch.add),
    "BatchNormalization": _Operator(
        _batch_norm, frozenset({"epsilon"}), frozenset({"momentum"}), {"training_mode": 0, "spatial": 1}
    ),
    "Conv": _Operator(
        _convolution,
        frozenset({"pads", "strides", "dilations", "group"}),
        frozenset({"kernel_shape"}),  # the weight says it
        {"auto_pad": b"NOTSET"},
    ),
    "Flatten": _Operator(partial(torch.flatten, start_dim=1), fixed={"axis": 1}),
    "Gemm": _Operator(F.linear, fixed={"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}),
    "Identity": _Operator(_identity),
    "Mul": _Operator(torch.mul),
    "PRelu": _Operator(_prelu),
    "Sub": _Operator(torch.sub),
}


def _function(node: Any, path: Path) -> Callable[..., Tensor]:
    """What a node computes.

    Raises:
        WeightFileError: An operator or attribute that face networks do not use.
    """
    from onnx.helper import get_attribute_value

    if node.op_type not in OPERATORS:
        raise WeightFileError(
            f"{path} holds the operator {node.op_type}, which no IResNet uses; "
            "choose glintr100.onnx (antelopev2) or w600k_r50.onnx (buffalo_l)"
        )
    operator = OPERATORS[node.op_type]
    given = {attribute.name: get_attribute_value(attribute) for attribute in node.attribute}
    for name, value in given.items():
        passed = name in operator.takes | operator.ignores
        if not passed and (name not in operator.fixed or operator.fixed[name] != value):
            raise WeightFileError(f"{path}: {node.op_type} with {name} = {value} is not supported")
    return partial(operator.function, **{name: given[name] for name in operator.takes & given.keys()})
