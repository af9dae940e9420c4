"""EasyAnimate V5 and V5.1 against the publisher's numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..video_models.easyanimate import EasyAnimateModel, TextTower
from ..video_models.easyanimate_files import build_vae
from ..video_models.easyanimate_keys import convert_transformer, transformer_config
from ..video_models.easyanimate_text import encode_padded, pack
from ..video_models.loading import diffusers, materialise
from ..video_models.protocol import ModelSpec
from ..video_models.solvers import FlowMatch
from . import parity
from .report import Line

if TYPE_CHECKING:
    from .fixtures import Fixture


TINY_VAE = {"block_out_channels": (4,) * 4, "norm_num_groups": 2, "layers_per_block": 1, "latent_channels": 16}


def build(weights: Mapping[str, Tensor], config: Mapping, text_tokens: tuple[int, ...]) -> EasyAnimateModel:
    """A float32 model from the publisher's tensors, with a tiny VAE nobody asks.

    Args:
        weights: Of the transformer, in the publisher's names.
        config: The publisher's transformer configuration.
        text_tokens: Of each text encoder.
    """
    network = materialise(
        diffusers("EasyAnimateTransformer3DModel"),
        transformer_config(weights, config),
        convert_transformer(weights),
        Path("transformer.safetensors"),
        torch.float32,
        "cpu",
    )
    return _join(network, build_vae(TINY_VAE), text_tokens)


def _join(network: nn.Module, vae: nn.Module, text_tokens: tuple[int, ...]) -> EasyAnimateModel:
    channels, inp = network.config.out_channels, network.config.in_channels != network.config.out_channels
    spec = ModelSpec("easyanimate", "fixture", channels, 4, 8, 16, inp, ("all-linear",), 0, 0, 1, 1, 1.0, 8)
    return EasyAnimateModel(spec, network, vae, [TextTower(n, encode_padded) for n in text_tokens], FlowMatch())


def check_vae(fixture: Fixture) -> Iterator[Line]:
    """Decoding of all latents and of the first, its gradient, and encoding."""
    weights = fixture.tensors(fixture.meta.get("vae") or "vae.safetensors")
    vae = build_vae(fixture.meta["vae_config"])
    vae.load_state_dict(weights)
    nobody = diffusers("EasyAnimateTransformer3DModel")(
        {"num_attention_heads": 1, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "patch_size": 2}
        | {"num_layers": 0, "text_embed_dim": 4}
    )
    model, factor = _join(nobody, vae, (1,)), vae.config.scaling_factor
    yield from parity.check_vae(fixture, model.pixels, lambda video: model.encode(video) / factor)


def check_transformer(fixture: Fixture) -> Iterator[Line]:
    """The rotary tables, the bare model, with the LoRA at every strength, and bare again (bit for bit)."""
    io = fixture.tensors("io.safetensors")
    texts = [io[name] for name in ("encoder_hidden_states", "encoder_hidden_states_t5") if name in io]
    weights = fixture.tensors(fixture.meta.get("transformer") or "transformer.safetensors")
    model = build(weights, fixture.meta["transformer_config"], tuple(text.shape[1] for text in texts))
    x = io["hidden_states"]
    if "image_rotary_cos" in io:
        for name, table in zip(("cos", "sin"), model.transformer.rope_embedding(x), strict=True):
            yield Line(f"rotary {name}", "", parity.largest(table, io[f"image_rotary_{name}"]), 1e-5)

    def predict() -> Tensor:
        """Sample by sample, each at its own timestep."""
        outputs = []
        for i in range(len(x)):
            conditioning = model.conditioning([pack([text[i] for text in texts])], None, x.shape[1:])
            branch = dict(conditioning.positive)
            if "inpaint_latents" in io:
                branch["latents"] = io["inpaint_latents"][i : i + 1]
            outputs.append(model.predict(x[i : i + 1], io["timestep"][i].double() / 1000, branch))
        return torch.cat(outputs)

    yield from parity.check_network(fixture, model, io, predict)
