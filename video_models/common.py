"""What the families do alike."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..block_weights import bring
from .protocol import ModelSpec


def freeze(*modules: nn.Module | None) -> None:
    """No dropout, no gradient of their own."""
    for module in modules:
        if module is not None:
            module.eval().requires_grad_(False)


def move(
    modules: Mapping[str, nn.Module | Sequence[nn.Module] | None], device: torch.device | str, parts: Iterable[str]
) -> None:
    """Move the named parts, or all, to a device.

    Raises:
        ValueError: A name that is not among ``modules``.
    """
    parts = tuple(parts) or tuple(modules)
    unknown = sorted(set(parts) - set(modules))
    if unknown:
        raise ValueError(f"unknown parts {unknown}; allowed are {sorted(modules)}")
    for part in parts:
        found = modules[part]
        for module in [found] if isinstance(found, nn.Module) else found or ():
            bring(module, device)


def linear_names(network: nn.Module, published: Callable[[str], str] = str) -> dict[str, str]:
    """The publisher's name of every linear layer, by its name in our classes.

    Args:
        network: With or without adapters in it.
        published: From our name to the publisher's; the same if not given.
    """
    linear = (name for name, module in network.named_modules() if isinstance(module, nn.Linear))
    # In an injected adapter the layer itself is called base_layer, and the adapter's own matrices lora_A, lora_B.
    names = (name.removesuffix(".base_layer") for name in linear if ".lora_" not in name)
    return {name: published(name) for name in names}


def draw_noise(latent_shape: Sequence[int], seeds: Sequence[int], device: torch.device) -> Tensor:
    """Standard normal ``[B, *latent_shape]``, one seed a sample, drawn on the CPU so that every device agrees."""
    drawn = [torch.randn(tuple(latent_shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn).to(device)


def short_hash(*what: object) -> str:
    """Sixteen hexadecimal digits over the arguments."""
    return hashlib.sha256(":".join(map(str, what)).encode()).hexdigest()[:16]


def no_text_encoder(spec: ModelSpec) -> RuntimeError:
    """The error of a model that is asked to encode text and was loaded without its encoder."""
    return RuntimeError(f"{spec.name} was loaded without its text encoder; load it with text=True")


def refuse_images(spec: ModelSpec, start: Tensor | None, end: Tensor | None) -> None:
    """Raise ``ValueError`` if a text-to-video model is given an image."""
    if start is not None or end is not None:
        raise ValueError(f"{spec.name} is a text-to-video model and takes no start or end image")


def check_pairs(positive: Sequence[Tensor], negative: Sequence[Tensor] | None) -> None:
    """Raise ``ValueError`` unless there is a negative text for every positive one, or none at all."""
    if negative is not None and len(negative) != len(positive):
        raise ValueError(f"{len(positive)} positive prompts need as many negative ones, got {len(negative)}")
