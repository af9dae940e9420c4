"""Proofs in float64 through networks that cast to float32 inside."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _KeepFloat64(TorchFunctionMode):
    """``tensor.float()`` leaves float64 as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def float64_throughout(dtype: torch.dtype) -> AbstractContextManager:
    """A context for running a network: in float64, it keeps diffusers' networks from casting to float32 inside.

    The casts around its norms and upsampling are meant for 16 bits; proofs need float64 throughout. Blocks
    must not be checkpointed then, for they are recomputed outside of this context.
    """
    return _KeepFloat64() if dtype == torch.float64 else nullcontext()
