"""What a run will need, by phase, before it starts: counted on tensors without content, where nothing is computed.

Each phase is run as training runs it, backward pass and checkpoints included, on tensors without content, and every
storage is counted from where it is made to where it is freed (:mod:`.live`). Weights are summed. Attention is counted
as memory-efficient kernels store it. The fragments of the allocator are not counted.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F

from ..block_weights import FLOAT8, blocks_of
from ..lora.adapter import at_input_precision, inject_new
from ..reward_models.protocol import Reward
from ..video_models.protocol import VideoModel
from .config import TrainConfig
from .decoding import Decoder, own, sparse
from .gradient import silent
from .live import LiveBytes
from .memory import PLANS, MemoryPlan, checkpointed_blocks

log = logging.getLogger(__name__)

OPTIMIZER = 4
"""Tensors of a LoRA parameter's size: itself, its gradient, and two moments of AdamW."""


@dataclass(frozen=True)
class Borrowed:
    """Peak bytes of a piece of work beside the weights.

    Attributes:
        whole: Without checkpoints.
        checkpointed: With every block checkpointed.
    """

    whole: int
    checkpointed: int


@dataclass(frozen=True)
class Estimate:
    """Bytes of a run.

    Attributes:
        text, denoiser, vae, reward: Weights; of a denoiser with several experts, the one at work.
        blocks: Those of ``denoiser`` that could be offloaded.
        block: Those of its largest block.
        lora: All LoRAs, their gradients and their optimizer.
        rollout: One guidance branch of one solver step, without gradient.
        replay: One guidance branch of one solver step, there and back.
        judge: The larger of one chunk of the VAE's decoder, there and back, with all frames, and the reward's work.
        boundary: What the decoder carries from one chunk to the next.
        boundaries: How many of these there are.
        resting: Weights that only ever rest, such as a second expert's.
        main_memory: Whether all of it is computed in main memory, where every weight is all the time, and what the
            decoder carries too, which else waits there for a GPU.
        scoring_counted: Whether the reward's work is: one that looks at what its tensors hold cannot be tried without.
    """

    text: int
    denoiser: int
    blocks: int
    block: int
    lora: int
    vae: int
    reward: int
    rollout: int
    replay: Borrowed
    judge: Borrowed
    boundary: int
    boundaries: int
    resting: int = 0
    main_memory: bool = False
    scoring_counted: bool = True

    @property
    def weights(self) -> int:
        return self.text + self.denoiser + self.vae + self.reward + self.resting

    def carried(self, plan: MemoryPlan) -> int:
        """What the decoder carries between its chunks, as far as it waits for the way back."""
        if not plan.checkpoint_vae or not self.boundaries:
            return self.boundaries * self.boundary
        every = sparse(self.boundaries + 1)
        return (self.boundaries // every + every - 1) * self.boundary

    def phases(self, plan: MemoryPlan) -> dict[str, int]:
        """Bytes on the device in each phase under a plan."""
        rollout = self.rollout * (2 if plan.batched_guidance else 1)
        replay = self.replay.checkpointed if plan.checkpoint_blocks else self.replay.whole
        judge = self.judge.checkpointed if plan.checkpoint_vae else self.judge.whole
        if self.main_memory:
            there = self.weights + self.lora
            judge += self.carried(plan)
            return {"text": there, "rollout": there + rollout, "judge": there + judge, "replay": there + replay}
        denoiser = self.denoiser - self.blocks + 2 * self.block if plan.offload else self.denoiser
        judges = self.vae + self.reward
        walking = denoiser + self.lora + (0 if plan.swap else judges)
        judging = judges + self.lora + (0 if plan.swap else denoiser)
        return {"text": self.text, "rollout": walking + rollout, "judge": judging + judge, "replay": walking + replay}

    def peak(self, plan: MemoryPlan) -> int:
        """The largest phase."""
        return max(self.phases(plan).values())

    def fitting(self, free: int) -> MemoryPlan | None:
        """The fastest plan that fits into so many bytes, or None. In main memory the weights are there already."""
        free += self.weights if self.main_memory else 0
        return next((plan for plan in PLANS if self.peak(plan) <= free), None)

    def table(self, free: int) -> str:
        """Gigabytes by phase and plan, and the fastest plan that fits into ``free`` bytes, in words."""
        lines = [f"{'memory':10}" + "".join(f"{phase:>9}" for phase in (*self.phases(PLANS[0]), "peak")) + "  GB"]
        for plan in PLANS:
            sizes = (*self.phases(plan).values(), self.peak(plan))
            lines.append(f"{plan.name:10}" + "".join(f"{size / 1e9:9.2f}" for size in sizes))
        best = self.fitting(free)
        words = f"memory {best.name} fits" if best else f"nothing fits: {LESS}"
        carried = f"; {_gb(self.carried(best or PLANS[-1]))} of the decoder's features wait in main memory"
        said = f"{words} into {self._room(free)}{'' if self.main_memory else carried}{self._uncounted}"
        return "\n".join([*lines, said])

    def line(self, plan: MemoryPlan, free: int) -> str:
        """What a run under a plan needs, where most, what is free, and what to change if that is too little."""
        phases = self.phases(plan)
        largest = max(phases, key=phases.__getitem__)
        words = f"memory: {plan.name} needs about {_gb(phases[largest])}, most to {VERBS[largest]}{self._uncounted}"
        words += f"; {self._room(free)}"
        if phases[largest] <= free + (self.weights if self.main_memory else 0):
            return words
        best = self.fitting(free)
        return f"{words}; that is too little: " + (f"set memory to {best.name}" if best else LESS)

    @property
    def _uncounted(self) -> str:
        return "" if self.scoring_counted else "; what the reward needs beside its weights is not counted"

    def _room(self, free: int) -> str:
        there = f" and {_gb(self.weights)} of weights that are there" if self.main_memory else ""
        return f"{_gb(free)} free{there}"


VERBS = {"text": "encode the text", "rollout": "sample", "judge": "judge the frames", "replay": "replay a solver step"}
LESS = "take fewer or smaller frames, a smaller batch_size, fewer judged_latents, or float8"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size < 1e10 else f"{size / 1e9:.1f} GB"


def estimate(
    model: VideoModel, reward: Reward | None, config: TrainConfig, text: Tensor, device: torch.device | str = "cpu"
) -> Estimate:
    """Count what training with these settings needs.

    Args:
        model: Loaded, wherever its weights lie; with the LoRAs to be trained, or without any.
        reward: Its networks are found in its attributes; None counts none.
        config: Settings with every default filled in.
        text: One embedding ``[L, D]``, as ``encode_text`` gives.
        device: Where it will be computed.
    """
    device = torch.device(device)
    shape = model.spec.latent_shape(config.width, config.height, config.frames)
    latents = torch.zeros(config.batch_size, *shape, device="meta")
    sigma = model.sigmas(config.sampler_steps)[0]
    network = model.denoisers[model.spec.expert_at(sigma)]
    with ExitStack() as undo:
        if not any(parameter.requires_grad for parameter in network.parameters()):
            undo.callback(inject_new(network, config.lora_targets, config.rank, config.network_alpha, 0).remove)
        branch = model.conditioning([text] * config.batch_size, None, shape).positive
        branch = {name: value.to("meta") for name, value in branch.items()}
        lora = sum(p.nbytes for p in network.parameters() if p.requires_grad)
        blocks = [_bytes(block, frozen=True) for block in blocks_of(network)]
        rollout, replay = _walk(model, network, latents, sigma, branch, device)
        denoiser = _bytes(network, frozen=True)
        if config.float8 and not any(p.dtype == FLOAT8 for p in network.parameters()):
            # Not stored so yet: half or a quarter of the bytes, and while it works, a block as it was; autograd keeps
            # every block's unless they are checkpointed.
            replay = Borrowed(replay.whole + sum(blocks), replay.checkpointed + max(blocks, default=0))
            saved = sum(_saved_by_float8(block) for block in blocks_of(network))
            denoiser -= saved
            blocks = [size * (1 - saved / max(1, sum(blocks))) for size in blocks]
    view = config.view_at(0, False)
    part = latents[:, :, : config.judged_latents or None] if view.latent_choice == "first" else latents
    judge, graph, boundary = _judge(model, part, device)
    frames, _ = view.shown(model, shape[1], model.spec.frames_of(part.shape[2]))
    scoring = _scoring(reward, (config.batch_size, 3, len(frames), config.height, config.width), view.augment, device)
    judge = Borrowed(*(max(a, b + (scoring or 0)) for a, b in zip(*map(astuple, (judge, graph)), strict=True)))
    experts = len(config.experts)
    return Estimate(
        text=_bytes(getattr(model, "text_encoder", None)),
        denoiser=denoiser,
        blocks=int(sum(blocks)),
        block=int(max(blocks, default=0)),
        lora=OPTIMIZER * lora * experts,
        vae=_bytes(model.vae),
        reward=sum(map(_bytes, _parts(reward))),
        rollout=rollout,
        replay=replay,
        judge=judge,
        boundary=boundary,
        boundaries=len(model.chunks(part.shape[2])) - 1 if boundary else 0,
        resting=sum(_bytes(other, frozen=True) for other in model.denoisers.values() if other is not network),
        main_memory=device.type == "cpu",
        scoring_counted=scoring is not None,
    )


def _walk(
    model: VideoModel, network: nn.Module, x: Tensor, sigma: Tensor, branch: Mapping[str, Tensor], device: torch.device
) -> tuple[int, Borrowed]:
    """Peak of one guidance branch without gradient, and of one there and back."""
    with _counted(network, device) as live, torch.no_grad(), at_input_precision(model):
        model.predict(x, sigma, branch)
    peaks = []
    for checkpointed in (False, True):
        leaf = x.detach().requires_grad_()
        with _counted(network, device) as there_and_back, checkpointed_blocks(model, checkpointed), torch.enable_grad():
            for parameter in network.parameters():  # a LoRA's gradients are counted with it
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
                there_and_back.leave_out([parameter.grad] if parameter.requires_grad else [])
            prediction = model.predict(leaf, sigma, branch)
            prediction.backward(torch.empty_like(prediction))
        peaks.append(there_and_back.most)
    return live.most, Borrowed(*peaks)


def _judge(model: VideoModel, latents: Tensor, device: torch.device) -> tuple[Borrowed, Borrowed, int]:
    """Of the decoder, three sizes.

    Returns:
        Peak of a chunk's decoding and of the way back through it, with all frames and their gradients; its graph, where
        it is there while the reward works: for a single chunk; and one boundary.
    """
    lengths = list(model.chunks(latents.shape[2]))
    parts, given, carried, frames, peaks, graphs = latents.split(lengths, dim=2), (), (), 0, [], []
    with _counted(model.vae, device) as live:
        for part in parts[:3]:  # the first chunk is short; from the third on all are alike
            given = tuple(own(entry) for entry in carried)
            with torch.no_grad():
                clip, carried = model.decode_chunk(part, given)
            frames += clip.nbytes
        upstream = [torch.empty_like(e) if isinstance(e, Tensor) else None for e in carried] if len(parts) > 2 else ()
        at_frames = torch.empty_like(clip)
        del clip, carried
        before = sum(entry.nbytes for entry in given if isinstance(entry, Tensor))
        for save_memory in (False, True):
            live.most = live.now
            Decoder(model, silent, save_memory)._chunk_gradient(part, given, at_frames, upstream)
            # On a GPU what was carried waits elsewhere, and what is at work is a copy of it.
            peaks.append(live.most - (before if device.type == "cpu" else 0))
            graphs.append(_graph(model, part, save_memory, live) if len(parts) == 1 else 0)
    frames = frames * latents.shape[2] // sum(lengths[:3])
    return Borrowed(*(peak + 2 * frames for peak in peaks)), Borrowed(*graphs), before


def _graph(model: VideoModel, latents: Tensor, save_memory: bool, live: LiveBytes) -> int:
    """Bytes of a clip's frames and of the autograd graph that made them."""
    before, decoder, kept = live.now, Decoder(model, silent, save_memory), []
    with torch.enable_grad():
        kept.append(decoder.with_graph(latents.detach().requires_grad_()))
    return live.now - before


def _scoring(reward: Reward | None, size: tuple[int, ...], views: int, device: torch.device) -> int | None:
    """Peak of judging frames of a size ``[B, 3, T, H, W]`` there and back, in some views; None if it cannot be tried.

    The reward's twin has what it has, but for weights without content where it will compute.
    """
    if reward is None:
        return 0
    parts = [[p] if isinstance(p, Tensor) else [*p.parameters(), *p.buffers()] for p in _parts(reward)]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as contentless:
            twins = {id(tensor): _twin(tensor, device) for part in parts for tensor in part}
        twin = copy.deepcopy(reward, dict(twins))
        with contentless, _efficient_attention(), LiveBytes(device.type) as live, torch.enable_grad():
            live.leave_out(twins.values())
            frames = torch.empty(size, device=device, requires_grad=True)
            reference = torch.empty_like(frames) if "reference" in reward.needs else None
            shown = [frames.clone() for _ in range(views)] or [frames]
            scores = [twin.score(view, ["a video"] * size[0], reference=reference).sum() for view in shown]
            torch.autograd.grad(sum(scores), frames)
        return live.most
    except Exception as error:  # of anybody's reward: it asks for contents, or has weights where nobody finds them
        log.debug("the reward %s cannot be tried without content: %s", reward.name, error)
        return None


def _twin(tensor: Tensor, device: torch.device) -> Tensor:
    twin = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin


def _parts(thing: object) -> Iterator[nn.Module | Tensor]:
    """Networks and tensors among a reward's attributes, and among those of the rewards it is made of."""
    if isinstance(thing, (nn.Module, Tensor)):
        yield thing
    elif isinstance(thing, (list, tuple, Mapping)):
        for value in thing.values() if isinstance(thing, Mapping) else thing:
            yield from _parts(value)
    elif isinstance(thing, Reward):
        yield from _parts(vars(thing))


@contextmanager
def _counted(network: nn.Module, device: torch.device) -> Iterator[LiveBytes]:
    """A block in which the network's work is counted and nothing is computed."""
    with _on_meta(network), _efficient_attention(), LiveBytes(device.type) as live:
        live.leave_out([*network.parameters(), *network.buffers()])
        yield live


@contextmanager
def _efficient_attention() -> Iterator[None]:
    """Attention as memory-efficient kernels save it: never the matrix of weights, which only the plain one makes.

    A mode would not reach what is computed again on the way back.
    """
    real = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.device.type != "meta" and not isinstance(query, FakeTensor):
            return real(query, key, value, *args, **kwargs)
        return _Attention.apply(query, key, value)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


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


def _bytes(module: object, frozen: bool = False) -> int:
    """Of a module's parameters and buffers; of the frozen ones alone on request. 0 of anything else."""
    if not isinstance(module, nn.Module):
        return 0
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()) if not (frozen and t.requires_grad))


def _saved_by_float8(block: nn.Module) -> int:
    """Bytes that storing a block in float8 saves (:func:`..block_weights.in_float8`)."""
    matrices = (m.weight for name, m in block.named_modules() if isinstance(m, nn.Linear) and ".lora_" not in name)
    return sum(w.nbytes - w.numel() - 4 * len(w) for w in matrices if not w.requires_grad)
