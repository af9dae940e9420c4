"""A run that begins where a LoRA stands instead of at the base model."""

from __future__ import annotations

import torch

from ..lora.adapter import Adapter
from ..lora.files import MatchedLora


def begin_from(adapter: Adapter, lora: MatchedLora) -> None:
    """Make a fresh adapter change its network exactly as a LoRA does at strength 1.

    The rank may be higher than the LoRA's: the rest of the matrices begins as that of a fresh adapter, whose product
    is zero. So do modules that the LoRA does not have.

    Args:
        adapter: From :func:`..lora.adapter.inject_new`.
        lora: Resolved against the same network.

    Raises:
        ValueError: The LoRA has a higher rank, changes modules that are not trained, or adds to parameters.
    """
    own, matrices = adapter.weights(), adapter.parameters()
    missing = sorted(lora.modules.keys() - own.keys())
    if missing:
        raise ValueError(
            f"{lora.source} changes {len(missing)} modules that this run would not train, such as {missing[0]}; "
            "set lora_targets to those it was trained with, or to all-linear"
        )
    if lora.offsets:
        raise ValueError(f"{lora.source} adds to parameters besides its matrices, which a run cannot go on with")
    for name, module in lora.modules.items():
        rank = own[name].rank
        if module.rank > rank:
            raise ValueError(
                f"{lora.source} has rank {module.rank} and this run {rank}; set rank to {module.rank} or more, "
                "or resize the LoRA first"
            )
        down, up = matrices[f"{name}.down"], matrices[f"{name}.up"]
        with torch.no_grad():
            down[: module.rank].copy_(module.down)
            up[:, : module.rank].copy_(module.up.float() * (module.scale / own[name].scale))
