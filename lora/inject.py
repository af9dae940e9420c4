"""Runtime adapters on a real model: injected by peft, changed in strength, removed bit for bit.

Nothing is ever merged into the base weights, so low-precision and quantised bases stay as they are.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .network import base_layers, select_modules
from .offset import OffsetHook
from .weights import LoraModule, MatchedLora

STRENGTH_RANGE = (-2.0, 2.0)


def check_strength(strength: float) -> float:
    """Return the strength, or raise ``ValueError`` outside -2..2."""
    low, high = STRENGTH_RANGE
    if not low <= strength <= high:
        raise ValueError(f"strength must lie in {low:g}..{high:g}, got {strength}")
    return float(strength)


class Adapter:
    """One LoRA inside one network.

    Made by :func:`inject_new` for training or :func:`inject_weights` for use; several may live in one
    network at once. Frozen unless :meth:`train` was called.

    Args:
        model: The network it was injected into.
        name: Its name in peft.
        ranks, alphas: Of every adapted module, by module name.
        offsets: Plain additions to layers, which come along.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        ranks: Mapping[str, int],
        alphas: Mapping[str, float],
        offsets: Sequence[OffsetHook] = (),
    ) -> None:
        self.model, self.name = model, name
        self._ranks, self._alphas, self._offsets = dict(ranks), dict(alphas), list(offsets)
        self._strength, self._paused = 1.0, False

    @property
    def modules(self) -> list[str]:
        """Names of the layers it adapts."""
        return list(self._ranks)

    def _layer(self, module: str) -> nn.Module:
        return self.model.get_submodule(module)

    def parameters(self) -> dict[str, nn.Parameter]:
        """``<module>.down`` ``[rank, in]`` and ``<module>.up`` ``[out, rank]``, in a fixed order."""
        found = {}
        for module in self._ranks:
            layer = self._layer(module)
            found[f"{module}.down"] = layer.lora_A[self.name].weight
            found[f"{module}.up"] = layer.lora_B[self.name].weight
        return found

    def weights(self) -> dict[str, LoraModule]:
        """The matrices and alphas by module, ready for :func:`.files.write_lora`."""
        p = self.parameters()
        return {m: LoraModule(p[f"{m}.down"].detach(), p[f"{m}.up"].detach(), self._alphas[m]) for m in self._ranks}

    def train(self) -> None:
        """Make this adapter's matrices require gradient."""
        for parameter in self.parameters().values():
            parameter.requires_grad_(True)

    @property
    def strength(self) -> float:
        """-2..2; 0 takes the adapter out of the computation, so the outputs are the base model's to the bit."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = check_strength(value)
        self._put(0.0 if self._paused else self._strength)

    @property
    def paused(self) -> bool:
        """Out of the computation for now, whatever its strength."""
        return self._paused

    @paused.setter
    def paused(self, value: bool) -> None:
        if value != self._paused:
            self._paused = value
            self._put(0.0 if value else self._strength)

    def _put(self, value: float) -> None:
        for offset in self._offsets:
            offset.strength = value
        for module, rank in self._ranks.items():
            layer = self._layer(module)
            layer.scaling[self.name] = value * self._alphas[module] / rank
            others = [name for name in layer.active_adapters if name != self.name]
            # peft's set_adapter would also switch requires_grad of every adapter; only the list is wanted here.
            layer._active_adapter = others if value == 0 else [*others, self.name]

    @contextmanager
    def at_strength(self, value: float) -> Iterator[None]:
        """Temporarily another strength; 0 gives the base model."""
        before = self._strength
        self.strength = value
        try:
            yield
        finally:
            self.strength = before

    def remove(self) -> None:
        """Take the adapter out. When it was the last one, the network's own layers are back in place."""
        for offset in self._offsets:
            offset.remove()
        for module in self._ranks:
            layer = self._layer(module)
            for part in (layer.lora_A, layer.lora_B, layer.lora_dropout):
                del part[self.name]
            layer._active_adapter = [name for name in layer.active_adapters if name != self.name]
            if not layer.lora_A:
                parent, _, child = module.rpartition(".")
                setattr(self.model.get_submodule(parent), child, layer.get_base_layer())
        configs = getattr(self.model, "peft_config", None)
        if configs is not None:
            configs.pop(self.name, None)
            if not configs:
                del self.model.peft_config


def _inject(
    model: nn.Module,
    name: str,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    offsets: Sequence[OffsetHook] = (),
) -> Adapter:
    from peft import LoraConfig, inject_adapter_in_model

    adapter = Adapter(model, name, ranks, alphas, offsets)
    if not ranks:
        return adapter
    if name in getattr(model, "peft_config", {}):
        raise ValueError(f"an adapter called {name!r} is in this model already")
    trainable = [p for p in model.parameters() if p.requires_grad]  # peft freezes what it did not make
    common = Counter(ranks.values()).most_common(1)[0][0]
    config = LoraConfig(
        r=common,
        lora_alpha=common,
        target_modules="|".join(re.escape(module) for module in ranks),  # a string is matched as a whole
        rank_pattern={f"^{re.escape(module)}$": rank for module, rank in ranks.items() if rank != common},
    )
    active = {m: layer.active_adapters for m, layer in model.named_modules() if hasattr(layer, "_active_adapter")}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several LoRAs are our intention
        inject_adapter_in_model(config, model, name)
    for module, layer in model.named_modules():
        if hasattr(layer, "_active_adapter"):
            layer._active_adapter = list(active.get(module, []))
    for parameter in trainable:
        parameter.requires_grad_(True)
    for module in ranks:
        layer = model.get_submodule(module)
        base = layer.get_base_layer().weight
        dtype = base.dtype if base.dtype in (torch.float32, torch.float64) else torch.float32
        for part in (layer.lora_A, layer.lora_B):
            part[name].to(dtype=dtype).requires_grad_(False)
    adapter.strength = 1.0
    return adapter


def inject_new(
    model: nn.Module, targets: Sequence[str], rank: int, alpha: float, seed: int, name: str = "trained"
) -> Adapter:
    """Put a fresh trainable LoRA into a network: ``down`` Kaiming-uniform with ``a = sqrt(5)``, ``up`` zero.

    Args:
        model: Any network with linear layers.
        targets: See :func:`select_modules`.
        rank: Rank of every pair of matrices.
        alpha: Network alpha; the adapter is scaled by ``alpha / rank``.
        seed: Makes the initialisation; the same on every device and rank.
        name: The adapter's name in peft.
    """
    modules = select_modules(model, targets)
    adapter = _inject(model, name, dict.fromkeys(modules, rank), dict.fromkeys(modules, float(alpha)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in adapter.parameters().items():
            if key.endswith(".up"):
                parameter.zero_()
            else:  # Kaiming-uniform with a = sqrt(5): bound = 1 / sqrt(fan_in)
                noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.copy_((2 * noise - 1) / math.sqrt(parameter.shape[1]))
    adapter.train()
    return adapter


def inject_weights(model: nn.Module, lora: MatchedLora, strength: float = 1.0, name: str = "lora") -> Adapter:
    """Put given matrices into a network, frozen, at a strength. Raises ``ValueError`` outside -2..2."""
    check_strength(strength)
    ranks = {module: m.rank for module, m in lora.modules.items()}
    layers = base_layers(model)
    offsets = [OffsetHook(layers[module], offset) for module, offset in lora.offsets.items()]
    alphas = {module: m.alpha for module, m in lora.modules.items()}
    adapter = _inject(model, name, ranks, alphas, offsets)
    with torch.no_grad():
        for module, weights in lora.modules.items():
            layer = model.get_submodule(module)
            layer.lora_A[name].weight.copy_(weights.down)
            layer.lora_B[name].weight.copy_(weights.up)
    adapter.strength = strength
    return adapter


def total_norm(tensors: Sequence[Tensor]) -> float:
    """Euclidean norm over all entries of several tensors."""
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t.double()) for t in tensors])))
