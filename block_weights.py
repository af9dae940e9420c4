"""Weights of a network's blocks that stay in main memory, or in float8, and visit the device one block at a time.

While a block runs, its frozen parameters are replaced by copies where its input is, in the type they came in; after
it they are the stored ones again. Autograd keeps the copies of a block alone, and only until its backward pass is
done: with checkpointed blocks the device never holds more than one block's weights, or on a GPU two, for there the
next one's are copied while one works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

FLOAT8 = torch.float8_e4m3fn
MARK = "_reward_lora_elsewhere"
ARENA = 1 << 30
"""Page-locked memory is taken in pieces of this size, a power of two, to which the allocator rounds each of them up."""
PINNED = 0.7
"""Part of the main memory available that may be locked: it can not be swapped out."""


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The repeated parts of a network: the entries of its lists of modules."""
    return [block for child in network.children() if isinstance(child, nn.ModuleList) for block in child]


@contextmanager
def offloaded(network: nn.Module) -> Iterator[None]:
    """Keep the frozen weights of the blocks where they are while the rest of the network moves: see :func:`bring`.

    LoRAs must be in the network before, and may leave it only after.
    """
    with ExitStack() as undo:
        blocks = blocks_of(network)
        staying = [[p for p in block.parameters() if not p.requires_grad] for block in blocks]
        for parameter in (p for block in staying for p in block):
            parameter.data = parameter.data.to("cpu")
            setattr(parameter, MARK, True)
            undo.callback(delattr, parameter, MARK)
        ahead = Ahead(staying) if torch.cuda.is_available() and _pin(staying, undo) else None
        if ahead:
            undo.callback(ahead.drop)
        for index, block in enumerate(blocks):
            _visit(block, {}, undo, ahead and (lambda device, index=index: ahead.take(index, device)))
        yield


class Ahead:
    """Copies to a GPU the weights of the block that will come next, while one works.

    They are allocated on the stream that computes, so that in its order their memory is free, and again free after
    them. The copying stream waits for it before it writes; it waits for the copies before it reads, or drops them.
    At most one block's are on their way. Which is next is a guess from the last two, forwards in a prediction and
    backwards where blocks are computed again; a wrong guess costs a copy.

    Args:
        blocks: Parameters of every block in order, in page-locked memory.
    """

    def __init__(self, blocks: Sequence[Sequence[nn.Parameter]]) -> None:
        self._blocks, self._last = blocks, -1
        self._coming: tuple[int, dict[Tensor, Tensor], Any] | None = None
        self._streams: dict[torch.device, Any] = {}

    def take(self, index: int, device: torch.device) -> dict[Tensor, Tensor]:
        """Copies of a block's parameters on the device, by parameter, if they were sent for; and send for the next."""
        found = self.drop(but=index)
        following = index - 1 if self._last in (index, index + 1) and index else index + 1
        self._last = index
        if following < len(self._blocks):
            self._send(following, device)
        return found

    def drop(self, but: int = -1) -> dict[Tensor, Tensor]:
        """Nothing is on its way any more; gives the copies if they are that block's."""
        if self._coming is None:
            return {}
        (index, copies, arrived), self._coming = self._coming, None
        torch.cuda.current_stream(next(iter(copies.values())).device).wait_event(arrived)
        return copies if index == but else {}

    def _send(self, index: int, device: torch.device) -> None:
        try:
            copies = {p: torch.empty_like(p, device=device, requires_grad=False) for p in self._blocks[index]}
        except torch.OutOfMemoryError:
            return  # then it comes when it is needed, and the one before has gone
        if not copies:
            return
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), torch.no_grad():
            for parameter, copy in copies.items():
                copy.copy_(parameter, non_blocking=True)
        self._coming = (index, copies, stream.record_event())


def _pin(blocks: Sequence[Sequence[nn.Parameter]], undo: ExitStack) -> bool:
    """Move parameters into page-locked memory, from which a GPU fetches them by itself, until ``undo`` is closed.

    Returns:
        Whether all are there; if there is no room for that, they stay where they are.
    """
    import psutil

    parameters = [parameter for block in blocks for parameter in block]
    left = sum(-(-parameter.nbytes // 512) * 512 for parameter in parameters)
    if left > PINNED * psutil.virtual_memory().available:
        return False
    arena, used = torch.empty(0, dtype=torch.uint8), 0
    for parameter in parameters:
        size = -(-parameter.nbytes // 512) * 512
        if used + size > arena.numel():
            try:
                arena, used = torch.empty(max(size, min(ARENA, left)), dtype=torch.uint8, pin_memory=True), 0
            except RuntimeError:  # the system locks no more
                return False
        view = arena[used : used + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        parameter.data = view.copy_(parameter.data)
        undo.callback(_unpin, parameter)
        used, left = used + size, left - size
    return True


def _unpin(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data.clone()


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


def _visit(
    block: nn.Module,
    scales: Mapping[Tensor, tuple[Tensor, torch.dtype]],
    undo: ExitStack,
    fetch: Callable[[torch.device], Mapping[Tensor, Tensor]] | None = None,
) -> None:
    """Let a block run on visiting copies until ``undo`` is closed; ``fetch`` gives those that are on the device."""
    original, own = block.forward, "forward" in vars(block)
    places = [
        (module, name, parameter)
        for module in block.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and (parameter in scales or getattr(parameter, MARK, False))
    ]

    def forward(*args: Any, **kwargs: Any) -> Any:
        device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        there = fetch(device) if fetch and device.type == "cuda" else {}
        try:
            for module, name, parameter in places:
                if parameter in there:
                    module._parameters[name] = there[parameter]
                    continue
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
