"""Weights of a network's blocks that stay in main memory, or in float8, and visit the device one block at a time.

While a block runs, its frozen parameters are replaced by copies where its input is, in the type they came in; after
it they are the stored ones again. Autograd keeps the copies of a block alone, and only until its backward pass is
done: with checkpointed blocks the device never holds more than one block's weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

FLOAT8 = torch.float8_e4m3fn
MARK = "_reward_lora_elsewhere"


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The repeated parts of a network: the entries of its lists of modules."""
    return [block for child in network.children() if isinstance(child, nn.ModuleList) for block in child]


@contextmanager
def offloaded(network: nn.Module) -> Iterator[None]:
    """Keep the frozen weights of the blocks where they are while the rest of the network moves: see :func:`bring`.

    LoRAs must be in the network before, and may leave it only after.
    """
    with ExitStack() as undo:
        for block in blocks_of(network):
            for parameter in block.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to("cpu")
                    setattr(parameter, MARK, True)
                    undo.callback(delattr, parameter, MARK)
            _visit(block, {}, undo)
        yield


@contextmanager
def in_float8(network: nn.Module) -> Iterator[None]:
    """Store the frozen matrices of the blocks in float8 with one scale a row; the originals wait in main memory.

    Half the memory of 16 bits, and other weights: each is off by up to 6 %. At the end the originals are back, on the
    CPU.
    """
    with ExitStack() as undo:
        for block in blocks_of(network):
            scales: dict[Tensor, tuple[Tensor, torch.dtype]] = {}
            linears = (m for name, m in block.named_modules() if isinstance(m, nn.Linear) and ".lora_" not in name)
            for module in linears:  # LoRAs are small, and their rounding would be seen
                for parameter in module.parameters(recurse=False):
                    if not parameter.requires_grad and parameter.ndim == 2:
                        undo.callback(_restore, parameter, parameter.data.to("cpu"))
                        stored, scale = quantise(parameter.data)
                        scales[parameter] = (scale, parameter.dtype)
                        parameter.data = stored
            _visit(block, scales, undo)
        yield


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``[out, in]`` to float8 and a float32 scale ``[out, 1]``: the product of both is the weight that is used."""
    values = weight.detach().float()
    scale = values.abs().amax(1, keepdim=True).clamp_min(1e-12) / torch.finfo(FLOAT8).max
    return (values / scale).to(FLOAT8), scale


def residents(network: nn.Module) -> list[Tensor]:
    """Parameters and buffers that live where the network lives: all but weights that visit block by block."""
    return [t for t in (*network.parameters(), *network.buffers()) if not getattr(t, MARK, False)]


def bring(network: nn.Module, device: torch.device | str) -> None:
    """Move a network's residents, and their gradients, to a device."""
    if not any(hasattr(parameter, MARK) for parameter in network.parameters()):
        network.to(device)
        return
    for tensor in residents(network):
        tensor.data = tensor.data.to(device)
        if tensor.grad is not None:
            tensor.grad.data = tensor.grad.data.to(device)


def _restore(parameter: nn.Parameter, original: Tensor) -> None:
    parameter.data = original


def _visit(block: nn.Module, scales: Mapping[Tensor, tuple[Tensor, torch.dtype]], undo: ExitStack) -> None:
    """Let a block run on visiting copies until ``undo`` is closed."""
    original, own = block.forward, "forward" in vars(block)
    places = [
        (module, name, parameter)
        for module in block.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and (parameter in scales or getattr(parameter, MARK, False))
    ]

    def forward(*args: Any, **kwargs: Any) -> Any:
        device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        try:
            for module, name, parameter in places:
                # What stands there may be a copy already: float8 weights that are offloaded too.
                module._parameters[name] = _copy(module._parameters[name], scales.get(parameter), device)
            return original(*args, **kwargs)
        finally:
            for module, name, parameter in places:
                module._parameters[name] = parameter

    block.forward = forward

    def restore() -> None:
        if own:
            block.forward = original
        else:
            del block.forward

    undo.callback(restore)


def _copy(weight: Tensor, scale: tuple[Tensor, torch.dtype] | None, device: torch.device) -> Tensor:
    visiting = weight.detach().to(device, non_blocking=True)
    if scale is None:
        return visiting
    factor, dtype = scale
    return (visiting.float() * factor.to(device)).to(dtype)
