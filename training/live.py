"""Bytes of tensors as they come and go, on any device, the one without content included."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SMALL = 20480
"""Up to this size PyTorch's own convolution is chosen before oneDNN's (``use_mkldnn`` in ``Convolution.cpp``)."""


class LiveBytes(TorchDispatchMode):
    """Counts every storage from where an operator makes it to where it is freed, once whatever its views.

    Convolutions borrow more while they work, and so much is added (:func:`borrowed`).

    Args:
        device: ``cpu``, or the kind of accelerator, whose kernels would do the work.

    Attributes:
        now: Bytes alive.
        most: The most there were.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.now = self.most = 0
        self._device = device
        self._alive: dict[int, weakref.ref] = {}

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Tensors, such as weights, that are counted elsewhere."""
        for tensor in tensors:
            self._add(tensor, 0)

    def _add(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return

        def gone(_: Any) -> None:
            self.now -= size
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self._add(tensor, tensor.untyped_storage().nbytes())
        if func is torch.ops.aten.convolution.default:
            self.most = max(self.most, self.now + borrowed(args[0], args[1], result, self._device))
        elif func is torch.ops.aten.convolution_backward.default:
            self.most = max(self.most, self.now + borrowed(args[1], args[2], args[0], self._device))
        return result


def borrowed(inputs: Tensor, weight: Tensor, outputs: Tensor, device: str) -> int:
    """What a convolution's kernel borrows, there or back.

    On a CPU PyTorch's own kernel unfolds its input into columns, one entry for every weight and place; oneDNN, which
    serves larger float32 inputs and all 16-bit ones, borrows nothing from PyTorch. On a GPU tensor-core kernels want
    the channels last: a copy of input and output.

    Args:
        inputs: ``[N, C, ...]``.
        weight: ``[out, C / groups, ...]``.
        outputs: ``[N, out, ...]``.
        device: Kind of device.
    """
    if device != "cpu":
        return inputs.nbytes + outputs.nbytes
    batch, *_ = inputs.shape
    one_dnn = inputs.dtype in (torch.bfloat16, torch.float16) or (
        inputs.dtype == torch.float32
        and (batch > 1 or weight.shape[1] != inputs.shape[1] or math.prod(inputs.shape[:4]) > SMALL)
    )
    return 0 if one_dnn else batch * weight[0].numel() * outputs[0, 0].numel() * inputs.itemsize
