"""Compiled blocks: the repeated parts of a network through ``torch.compile``, each kind of them compiled once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..block_weights import blocks_of


@contextmanager
def compiled(network: nn.Module) -> Iterator[None]:
    """Compile the blocks of a network, on their next call, for the length of a ``with`` statement.

    Equal blocks share one compilation for every shape of input, with and without gradient; LoRAs in them and
    checkpointing around them are taken along. Results differ from those without by rounding.
    """
    blocks = blocks_of(network)
    try:
        for block in blocks:
            block.compile(dynamic=False)
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None  # as a module that was never compiled


def check_compiler(device: torch.device) -> None:
    """Raise ``ValueError`` unless ``torch.compile`` works on a device."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # of a compiler, a driver or a missing package, each with a type of its own
        raise ValueError(
            f"compile does not work here ({str(error).strip().splitlines()[0]}): it takes Triton on a GPU and a C++ "
            "compiler on a CPU; install that, or leave compile out"
        ) from None
