"""What a run will need, by phase, before it starts: counted on the meta device, where nothing is computed.

Weights are summed; what a step keeps for its backward pass is what autograd saves when the real network is run on
tensors without content. Attention is counted as memory-efficient kernels store it. Not counted: what a kernel borrows
while it works, the fragments of the allocator, and the reward's own activations (a few images at a time).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..block_weights import blocks_of
from ..reward_models.protocol import Reward
from ..video_models.protocol import Carried, VideoModel
from .config import TrainConfig
from .memory import PLANS, MemoryPlan


@dataclass(frozen=True)
class Kept:
    """Bytes that one backward pass waits for.

    Attributes:
        whole: Without checkpoints.
        checkpointed: With every block checkpointed: all blocks' inputs, and all of the largest block.
        block: The largest block's frozen weights.
    """

    whole: int
    checkpointed: int
    block: int


@dataclass(frozen=True)
class Estimate:
    """Bytes of a run.

    Attributes:
        text, denoiser, blocks, vae, reward: Weights; ``blocks`` are those of ``denoiser`` that could be offloaded.
        replay: One guidance branch of one solver step.
        judge: One chunk of the VAE's decoder.
        carried: What the decoder carries between all chunks; waits in main memory when there is a GPU.
    """

    text: int
    denoiser: int
    blocks: int
    vae: int
    reward: int
    replay: Kept
    judge: Kept
    carried: int

    def phases(self, plan: MemoryPlan) -> dict[str, int]:
        """Bytes on the device in each phase under a plan."""
        replay = self.replay.checkpointed if plan.checkpoint_blocks else self.replay.whole
        judge = self.judge.checkpointed if plan.checkpoint_vae else self.judge.whole
        denoiser = self.denoiser - self.blocks + self.replay.block if plan.offload else self.denoiser
        judges = self.vae + self.reward
        both = 0 if plan.swap else 1
        return {
            "text": self.text,
            "replay": denoiser + replay + both * judges,
            "judge": judges + judge + both * denoiser,
        }

    def peak(self, plan: MemoryPlan) -> int:
        """The largest phase."""
        return max(self.phases(plan).values())

    def table(self, free: int) -> str:
        """Gigabytes by phase and plan, and the fastest plan that fits into ``free`` bytes, in words."""
        lines = [f"{'memory':10}" + "".join(f"{phase:>9}" for phase in (*self.phases(PLANS[0]), "peak")) + "  GB"]
        for plan in PLANS:
            sizes = (*self.phases(plan).values(), self.peak(plan))
            lines.append(f"{plan.name:10}" + "".join(f"{size / 1e9:9.2f}" for size in sizes))
        best = self.fitting(free)
        words = f"memory {best.name} fits" if best else "nothing fits: take fewer or smaller frames, or float8"
        carried = f"; {self.carried / 1e9:.2f} GB of the decoder's features wait in main memory" if self.carried else ""
        return "\n".join([*lines, f"{words} into the {free / 1e9:.1f} GB free{carried}"])

    def fitting(self, free: int) -> MemoryPlan | None:
        """The fastest plan that fits into so many bytes, or None."""
        return next((plan for plan in PLANS if self.peak(plan) <= free), None)


def estimate(model: VideoModel, reward: Reward | None, config: TrainConfig, text: Tensor) -> Estimate:
    """Count what training with these settings needs.

    Args:
        model: Loaded, wherever its weights lie; LoRAs to be trained need not be in it.
        reward: Its weights are counted if it keeps them in attributes.
        config: Settings with every default filled in.
        text: One embedding ``[L, D]``, as ``encode_text`` gives.
    """
    shape = model.spec.latent_shape(config.width, config.height, config.frames)
    latents = torch.zeros(config.batch_size, *shape, device="meta")
    sigma = model.sigmas(config.sampler_steps)[0]
    branch = model.conditioning([text] * config.batch_size, None, shape).positive
    branch = {name: value.to("meta") for name, value in branch.items()}
    network = model.denoisers[model.spec.expert_at(sigma)]
    replay = _kept(network, lambda: model.predict(latents.requires_grad_(), sigma, branch))
    part = latents[:, :, : config.judged_latents or None].detach()
    judge, carried = _of_decoder(model, part)
    blocks = sum(_bytes(block) for block in blocks_of(network))
    return Estimate(
        text=_bytes(getattr(model, "text_encoder", None)),
        denoiser=_bytes(network),
        blocks=blocks,
        vae=_bytes(model.vae),
        reward=sum(_bytes(value) for value in vars(reward).values() if isinstance(value, nn.Module)) if reward else 0,
        replay=replay,
        judge=judge,
        carried=carried,
    )


def _of_decoder(model: VideoModel, latents: Tensor) -> tuple[Kept, int]:
    """The chunk that keeps most, and what is carried over all boundaries."""
    parts = latents.split(list(model.chunks(latents.shape[2])), dim=2)
    kept, carried_bytes, carried = [], 0, ()
    for index, part in enumerate(parts[:3]):  # the first chunk is short; from the third on all are alike
        taken: list[Carried] = []

        def run(part: Tensor = part, carried: Carried = carried, taken: list = taken) -> Tensor:
            frames, after = model.decode_chunk(part.requires_grad_(), carried)
            taken.append(tuple(entry.detach() if isinstance(entry, Tensor) else entry for entry in after))
            return frames

        kept.append(_kept(model.vae, run))
        (carried,) = taken
        size = sum(entry.nbytes for entry in carried if isinstance(entry, Tensor))
        carried_bytes += size * (len(parts) - 3 if index == 2 else 1) if index < len(parts) - 1 else 0
    largest = max(kept, key=lambda found: found.whole)
    return largest, carried_bytes


def _kept(network: nn.Module, run: Callable[[], Tensor]) -> Kept:
    """What ``run``, which calls the network, keeps for its backward pass."""
    saved = _Saved()
    blocks = [block for module in network.modules() for block in blocks_of(module)]
    blocks = [block for block in blocks if not any(block is not other and _holds(other, block) for other in blocks)]
    inputs, inside = 0, [0]
    handles = []

    def before(_: nn.Module, args: tuple, kwargs: Mapping) -> None:
        nonlocal inputs
        inputs += max((v.nbytes for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), default=0)
        inside.append(-saved.total)

    def after(*_: object) -> None:
        inside[-1] += saved.total

    for block in blocks:
        handles += [
            block.register_forward_pre_hook(before, with_kwargs=True),
            block.register_forward_hook(after),
        ]
    hooks = torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor)
    try:
        with _on_meta(network), _EfficientAttention(), torch.enable_grad(), hooks:
            saved.leave_out(network.parameters())
            run()
    finally:
        for handle in handles:
            handle.remove()
    weights = max((sum(p.nbytes for p in block.parameters()) for block in blocks), default=0)
    return Kept(saved.total, saved.total - sum(inside) + inputs + max(inside), weights)


class _Saved:
    """Counts every storage that autograd saves, once; weights and views of them are left out."""

    def __init__(self) -> None:
        self.total = 0
        self._seen: list[Tensor] = []  # held, so that no address is used twice
        self._known: set[int] = set()

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self._seen.append(tensor)
            self._known.add(tensor.untyped_storage()._cdata)

    def __call__(self, tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in self._known:
            self.leave_out([tensor])
            self.total += tensor.untyped_storage().nbytes()
        return tensor


class _EfficientAttention(TorchFunctionMode):
    """Attention as memory-efficient kernels save it: never the matrix of weights, which only the plain one makes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            return _Attention.apply(given["query"], given["key"], given["value"])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        raise NotImplementedError("only counted, never run")


@contextmanager
def _on_meta(network: nn.Module) -> Iterator[None]:
    """The network with parameters and buffers that have no content; its own come back afterwards."""
    places = [
        (table, name, value)
        for module in network.modules()
        for table in (module._parameters, module._buffers)
        for name, value in table.items()
        if value is not None
    ]
    twins = {id(value): value.to("meta") for _, _, value in places}
    try:
        for table, name, value in places:
            twin = twins[id(value)]
            table[name] = nn.Parameter(twin, value.requires_grad) if isinstance(value, nn.Parameter) else twin
        yield
    finally:
        for table, name, value in places:
            table[name] = value


def _holds(outer: nn.Module, inner: nn.Module) -> bool:
    return any(module is inner for module in outer.modules())


def _bytes(module: object) -> int:
    if not isinstance(module, nn.Module):
        return 0
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
