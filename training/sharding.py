"""A frozen base model divided among the processes of a run (FSDP2), for one that does not fit on a single GPU.

Every process keeps its part of the weights of each block. While a block works, it has all of them, gathered from the
others as the one before works. Embeddings and output layers stay whole, and so do LoRAs, which come into the network
afterwards: their gradients are averaged as without sharding.

A shard belongs to its process: all must call the networks equally often, and the model is of no use after the run. That
is why only processes of their own, which end with the run, shard theirs.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..block_weights import MARK, blocks_of
from ..video_models.protocol import VideoModel
from .distributed import Group

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

ALONE = "shard divides the base model among several processes, and this is one alone; set devices to 2 or more"


def mesh_of(group: Group, device: str) -> DeviceMesh:
    """All processes of a group, as :func:`shard` takes them. They must make it together.

    Raises:
        ValueError: There is one process alone, or this PyTorch cannot do it.
    """
    if group.size == 1:
        raise ValueError(ALONE)
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 7):
        raise ValueError(f"shard needs PyTorch 2.7 or newer, this is {torch.__version__}")
    if device.startswith("cuda") and not torch.distributed.is_nccl_available():
        raise ValueError(
            "shard needs NCCL on GPUs, which this PyTorch lacks (on Windows there is none); leave shard out"
        )
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(torch.device(device).type, (group.size,))


def shard(model: VideoModel, mesh: DeviceMesh) -> None:
    """Divide the frozen weights of the blocks of every denoiser among all processes, for good.

    Args:
        model: Loaded alike in every process, and without LoRAs.
        mesh: The processes and where they compute; this one's shard stays there.
    """
    from torch.distributed.fsdp import fully_shard

    # True, and harmless: nothing is added to it in place, and the outermost network has no weights to gather.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for network in model.denoisers.values():
        blocks = blocks_of(network)
        whole = set(network.parameters()) - {parameter for block in blocks for parameter in block.parameters()}
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
            for parameter in block.parameters():
                setattr(parameter, MARK, True)
        # Around them all, so that one block's weights may arrive while another works.
        fully_shard(network, mesh=mesh, ignored_params=whole)


def shards(network: nn.Module) -> set[nn.Parameter]:
    """The parameters of a network of which this process has only a part."""
    return {parameter for parameter in network.parameters() if hasattr(parameter, "to_local")}


def is_sharded(model: VideoModel) -> bool:
    return all(shards(network) for network in model.denoisers.values())
