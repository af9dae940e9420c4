"""Wan against VideoX-Fun's numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..training.gradient import Walk
from ..video_models import wan_keys, wan_vae_keys
from ..video_models.wan import WanModel
from ..video_models.wan_parts import make_spec
from . import parity
from .report import Line

if TYPE_CHECKING:
    from .fixtures import Fixture


def build(transformer: Mapping[str, Tensor], config: Mapping, vae: Mapping[str, Tensor], vae_meta: Mapping) -> WanModel:
    """A float32 model from the publisher's tensors. A missing VAE is replaced by a tiny one nobody asks.

    Args:
        transformer: In the publisher's names.
        config: The publisher's transformer configuration.
        vae: In the publisher's names, or empty.
        vae_meta: May hold ``latents_mean`` and ``latents_std``.
    """
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    network = WanTransformer3DModel(**wan_keys.transformer_config(transformer, config))
    network.load_state_dict(wan_keys.convert_transformer(transformer))
    statistics = {key: vae_meta[key] for key in ("latents_mean", "latents_std") if vae_meta.get(key)}
    if vae:
        decoder = AutoencoderKLWan(**wan_vae_keys.vae_config(vae) | statistics)
        decoder.load_state_dict(wan_vae_keys.convert_vae(vae))
    else:
        decoder = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False])
    return WanModel(make_spec("fixture", network, decoder), network, decoder)


def _predict(model: WanModel, io: Mapping[str, Tensor]) -> Tensor:
    """The transformer's output sample by sample, each at its own timestep."""
    outputs = []
    for i in range(io["x"].shape[0]):
        conditioning = model.conditioning([io["context"][i]], None, io["x"].shape[1:])
        branch = dict(conditioning.positive)
        if "y" in io:
            branch["latents"] = io["y"][i : i + 1]
        if "clip" in io:
            branch["image"] = io["clip"][i : i + 1]
        outputs.append(model.predict(io["x"][i : i + 1], io["t"][i].double() / 1000, branch))
    return torch.cat(outputs)


def check_transformer(fixture: Fixture) -> Iterator[Line]:
    """The bare model, with the LoRA at every strength, the LoRA's gradients, and bare again (bit for bit)."""
    weights = fixture.tensors(fixture.meta.get("transformer") or "transformer.safetensors")
    model = build(weights, fixture.meta["transformer_config"], {}, {})
    io = fixture.tensors("io.safetensors")
    yield from parity.check_network(fixture, model, io, lambda: _predict(model, io))


def check_vae(fixture: Fixture) -> Iterator[Line]:
    """Decoding of all latents and of the first, its gradient, and encoding."""
    from diffusers import AutoencoderKLWan

    weights = fixture.tensors("vae.safetensors")
    statistics = {key: fixture.meta[key] for key in ("latents_mean", "latents_std") if fixture.meta.get(key)}
    vae = AutoencoderKLWan(**wan_vae_keys.vae_config(weights) | statistics)
    vae.load_state_dict(wan_vae_keys.convert_vae(weights))
    model = _vae_only(vae)
    yield from parity.check_vae(fixture, lambda latents: model.decode(latents) * 2 - 1, model.encode)


def _vae_only(vae) -> WanModel:
    from diffusers import WanTransformer3DModel

    network = WanTransformer3DModel(num_attention_heads=1, attention_head_dim=12, text_dim=4, freq_dim=8, num_layers=0)
    return WanModel(make_spec("fixture", network, vae), network, vae)


def check_train_step(fixture: Fixture) -> Iterator[Line]:
    """A whole reward step: latents, frames, reward, and the LoRA's gradients of every strategy."""
    meta, io = fixture.meta, fixture.tensors("io.safetensors")
    model = build(
        fixture.tensors("transformer.safetensors"), meta["transformer_config"], fixture.tensors("vae.safetensors"), meta
    )
    noise = io["init_noise"]
    texts = [[io[f"context_{side}"]] * noise.shape[0] for side in ("cond", "uncond")]
    walk = Walk(model, model.conditioning(*texts, noise.shape[1:]), float(meta["guidance_scale"]))
    yield from parity.check_train_step(fixture, walk, io, noise, io["sigmas"].double(), io["final_latents"])
