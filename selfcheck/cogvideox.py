"""CogVideoX-Fun against VideoX-Fun's numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..training.gradient import Walk
from ..video_models.cogvideox import CogVideoXModel, position_table, resize_positions, rotary_of
from ..video_models.cogvideox_files import build_transformer, describe
from ..video_models.solvers import Ddim
from . import parity
from .report import Line

if TYPE_CHECKING:
    from .fixtures import Fixture

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SCHEDULE |= {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
"""Where a fixture speaks of timesteps alone."""


def build(
    config: Mapping | None, transformer: Mapping[str, Tensor], vae_config: Mapping | None, vae: Mapping[str, Tensor],
    scheduler: Mapping,
) -> CogVideoXModel:  # fmt: skip
    """A float32 model; a part without a configuration is replaced by a tiny one nobody asks."""
    from diffusers import AutoencoderKLCogVideoX

    if config is None:
        config = {"num_attention_heads": 1, "attention_head_dim": 16, "num_layers": 0, "time_embed_dim": 4}
        config |= {"text_embed_dim": 4, "use_rotary_positional_embeddings": True}
    if vae_config is None:
        vae_config = {"block_out_channels": [4, 4, 4, 4], "layers_per_block": 1, "norm_num_groups": 2}
    network, decoder = build_transformer(config), AutoencoderKLCogVideoX(**vae_config)
    for module, tensors in ((network, transformer), (decoder, vae)):
        if tensors:
            module.load_state_dict(tensors)
    resize_positions(network)
    # Only the classes named after CogVideoX know the shift.
    shift = scheduler.get("snr_shift_scale", 3.0) if "CogVideoX" in scheduler.get("cls", "") else 1.0
    solver = Ddim.from_config({**scheduler, "snr_shift_scale": shift})
    return CogVideoXModel(describe("fixture", network, decoder), network, decoder, solver)


def check_positions(fixture: Fixture, model: CogVideoXModel, io: Mapping[str, Tensor], shape) -> Iterator[Line]:
    """Our position tables for latents ``(C, t, h, w)`` against those that were used."""
    allowed = parity.tolerance(fixture, "out", 1e-4)
    network = model.transformer
    patch = network.config.patch_size
    size = (shape[1], shape[2] // patch, shape[3] // patch)
    if "pos_embedding" in io:
        yield Line("positions", "", parity.largest(network.patch_embed.pos_embedding, io["pos_embedding"]), allowed)
    if "pos_embedding_used" in io:
        table = position_table(network.patch_embed, model.text_tokens, size)
        yield Line("positions resized", "", parity.largest(table, io["pos_embedding_used"]), allowed)
    if "image_rotary_cos" in io:
        for name, ours in zip(("cos", "sin"), rotary_of(network.config, size), strict=True):
            yield Line(f"rotary {name}", "", parity.largest(ours, io[f"image_rotary_{name}"]), allowed)


def check_transformer(fixture: Fixture) -> Iterator[Line]:
    """Position tables; the bare model, with the LoRA at every strength, the LoRA's gradients, and bare again."""
    meta, io = fixture.meta, fixture.tensors("io.safetensors")
    weights = fixture.tensors(meta.get("transformer") or "transformer.safetensors")
    model = build(meta["transformer_config"], weights, None, {}, meta.get("scheduler") or SCHEDULE)
    latents, sigmas = io["hidden_states"].transpose(1, 2), (1 - model.solver.alphas).sqrt()

    def predict() -> Tensor:
        """Sample by sample, each at its own timestep."""
        outputs = []
        for i, t in enumerate(io["timestep"].long()):
            branch = {"text": io["encoder_hidden_states"][i : i + 1]}
            if "inpaint_latents" in io:
                branch["latents"] = io["inpaint_latents"][i : i + 1].transpose(1, 2)
            outputs.append(model.predict(latents[i : i + 1], sigmas[t], branch))
        return torch.cat(outputs).transpose(1, 2)

    yield from check_positions(fixture, model, io, latents.shape[1:])
    yield from parity.check_network(fixture, model, io, predict)


def check_vae(fixture: Fixture) -> Iterator[Line]:
    """Decoding of all latents and of the first, its gradient, and encoding."""
    meta = fixture.meta
    model = build(None, {}, meta["vae_config"], fixture.tensors(meta.get("vae") or "vae.safetensors"), SCHEDULE)
    factor = model.vae.config.scaling_factor
    yield from parity.check_vae(fixture, model.pixels, lambda video: model.encode(video) / factor)


def check_train_step(fixture: Fixture) -> Iterator[Line]:
    """A whole reward step: schedule, positions, latents, frames, reward, and the LoRA's gradients of every strategy."""
    meta, io = fixture.meta, fixture.tensors("io.safetensors")
    weights = [fixture.tensors(f"{part}.safetensors") for part in ("transformer", "vae")]
    model = build(meta["transformer_config"], weights[0], meta["vae_config"], weights[1], meta["scheduler"])
    noise = io["init_noise"].transpose(1, 2)
    sigmas = model.sigmas(int(meta["num_inference_steps"]))
    if "alphas_cumprod" in io:
        error = parity.largest(model.solver.alphas.float(), io["alphas_cumprod"])
        yield Line("schedule", "", error, parity.tolerance(fixture, "latents", 1e-4))
    asked = torch.stack([model.solver.timestep(sigma) for sigma in sigmas[:-1]])
    yield Line("timesteps", "", float((asked - io["timesteps"]).abs().max()), 0.0)
    yield from check_positions(fixture, model, io, noise.shape[1:])
    texts = [list(io[f"prompt_embeds_{side}"].expand(len(noise), -1, -1)) for side in ("cond", "uncond")]
    walk = Walk(model, model.conditioning(*texts, noise.shape[1:]), float(meta["guidance_scale"]))
    yield from parity.check_train_step(fixture, walk, io, noise, sigmas, io["final_latents"].transpose(1, 2))
