"""Real sizes on the meta device: every published Wan's tensors, in its publisher's names, are exactly what we load."""

from __future__ import annotations

import pytest
import torch
from reward_lora.tests.families import wan_shapes as shapes
from reward_lora.video_models import wan_encoder_keys, wan_keys, wan_vae_keys
from reward_lora.video_models.loading import build_clip_vision, build_t5, diffusers, fit_names
from reward_lora.video_models.wan_parts import build_transformer

COMMON = {"freq_dim": 256, "text_dim": 4096}
SMALL = COMMON | {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}
LARGE = COMMON | {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
MIDDLE = COMMON | {"dim": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30, "in_dim": 48, "out_dim": 48}
CLIP = {"in_dim": 36, "image_dim": 1280}
TRANSFORMERS = {
    "Wan2.1-T2V-1.3B": (SMALL, 1.42e9),
    "Wan2.1-T2V-14B": (LARGE, 14.29e9),
    "Wan2.1-I2V-14B": (LARGE | CLIP, 16.40e9),
    "Wan2.1-Fun-1.3B-InP": (SMALL | CLIP, 1.56e9),
    "Wan2.1-Fun-14B-InP": (LARGE | CLIP, 16.40e9),
    "Wan2.2-T2V-A14B, each": (LARGE, 14.29e9),
    "Wan2.2-I2V-A14B and Fun-A14B-InP, each": (LARGE | {"in_dim": 36}, 14.29e9),
    "Wan2.2-TI2V-5B": (MIDDLE, 5.00e9),
}
VAE = {"z_dim": 16, "dim_mult": (1, 2, 4, 4), "num_res_blocks": 2, "temporal": (False, True, True)}
VAES = {
    "Wan2.1": shapes.vae_shapes(dim=96, **VAE),
    "Wan2.2": shapes.vae_22_shapes(dim=160, decoder_dim=256, **VAE | {"z_dim": 48}),
    "shallow": shapes.vae_shapes(dim=4, z_dim=8, dim_mult=(1, 2, 2), num_res_blocks=1, temporal=(True, True)),
    "deep": shapes.vae_shapes(dim=4, z_dim=8, dim_mult=(1, 2, 4, 4), num_res_blocks=3, temporal=(False, True, True)),
    "one step": shapes.vae_shapes(dim=4, z_dim=8, dim_mult=(1, 2), num_res_blocks=2, temporal=(False,)),
}


def meta(named):
    return {name: torch.empty(shape, device="meta") for name, shape in named.items()}


def assert_fits(build, config, tensors):
    """Nothing missing, nothing left over, every shape right."""
    with torch.device("meta"):
        module = build(config)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in fit_names(tensors, module).items()} == expected
    return module


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer(name):
    sizes, parameters = TRANSFORMERS[name]
    tensors = meta(shapes.transformer_shapes(**sizes))
    config = wan_keys.transformer_config(tensors, {"num_heads": sizes["num_heads"]})
    module = assert_fits(build_transformer, config, wan_keys.convert_transformer(tensors))
    assert sum(p.numel() for p in module.parameters()) == pytest.approx(parameters, rel=5e-3)
    back = {wan_keys.original_module_name(key) for key in module.state_dict()}
    assert back == tensors.keys(), "a LoRA would be written under names that the publisher does not have"


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_vae(name, prefix):
    tensors = {prefix + key: tensor for key, tensor in meta(VAES[name]).items()}
    config = wan_vae_keys.vae_config(tensors)
    module = assert_fits(diffusers("AutoencoderKLWan"), config, wan_vae_keys.convert_vae(tensors))
    if name == "Wan2.1":  # diffusers' defaults
        with torch.device("meta"):
            published = dict(type(module)().config)
        published |= {"decoder_base_dim": 96}
        assert {key: value for key, value in module.config.items() if not key.startswith("_")} == {
            key: value for key, value in published.items() if not key.startswith("_")
        }


def test_text_encoder():
    tensors = meta(shapes.text_shapes(dim=4096, heads=64, ffn=10240, layers=24, vocabulary=256384))
    config = wan_encoder_keys.umt5_config(tensors)
    assert config["d_kv"] == 64
    assert_fits(build_t5, config, wan_encoder_keys.convert_umt5(tensors))


def test_image_encoder():
    tensors = meta(shapes.clip_shapes(dim=1280, layers=32, mlp=5120))
    config = wan_encoder_keys.clip_config(tensors)
    assert (config["num_attention_heads"], config["image_size"]) == (16, 224)
    assert_fits(build_clip_vision, config, wan_encoder_keys.convert_clip(tensors))
