"""Tiny CogVideoX checkpoints: the publisher's 2B and 5B-I2V, and VideoX-Fun's InP models of both.

All come as diffusers' folders. The names are written down here from diffusers' conversion script of the publisher's
weights (``scripts/convert_cogvideox_to_diffusers.py``) and its classes of release 0.30, and T5's from transformers;
the real models' key lists come from the same functions.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from . import WORDS, write_json, write_shards
from .wan_shapes import Shapes, _conv, _with_bias, fill

LAYOUTS = ("diffusers 2b", "diffusers 5b i2v, sharded", "fun 2b inp", "fun 5b inp, sharded")
SIZE = (32, 48, 9)
"""Not the tiny models' training size, as with the real ones."""

TINY = {"heads": 2, "head": 16, "layers": 2, "time": 24, "text": 20}
TINY_VAE = {"widths": (8, 8, 16, 16), "layers": 1}
TINY_TEXT = {"dim": 20, "inner": 16, "ffn": 32, "layers": 2, "heads": 2, "vocabulary": 40}
POSITIONS = {"sample_width": 12, "sample_height": 8, "sample_frames": 17, "max_text_seq_length": 12}


def transformer_shapes(
    *, heads: int, head: int, layers: int, time: int, text: int, channels: int = 16, learned: int = 0
) -> Shapes:
    """``CogVideoXTransformer3DModel``'s tensors; ``learned`` counts the positions of a table that was learned."""
    inner = heads * head
    sizes: Shapes = {"patch_embed.proj": (inner, channels, 2, 2), "patch_embed.text_proj": (inner, text)}
    sizes |= {"time_embedding.linear_1": (time, inner), "time_embedding.linear_2": (time, time)}
    sizes |= {"norm_final": (inner,), "norm_out.norm": (inner,), "norm_out.linear": (2 * inner, time)}
    sizes["proj_out"] = (64, inner)
    for i in range(layers):
        block: Shapes = {"ff.net.0.proj": (4 * inner, inner), "ff.net.2": (inner, 4 * inner)}
        for norm in ("norm1", "norm2"):
            block |= {f"{norm}.linear": (6 * inner, time), f"{norm}.norm": (inner,)}
        block |= {f"attn1.to_{part}": (inner, inner) for part in ("q", "k", "v", "out.0")}
        block |= {f"attn1.norm_{part}": (head,) for part in "qk"}
        sizes |= {f"transformer_blocks.{i}.{name}": size for name, size in block.items()}
    table: Shapes = {"patch_embed.pos_embedding": (1, learned, inner)} if learned else {}
    return _with_bias(sizes) | table


def vae_shapes(*, widths: tuple[int, ...], layers: int, latents: int = 16) -> Shapes:
    """``AutoencoderKLCogVideoX``'s tensors: causal convolutions, and norms told by the latents in the decoder."""
    top, low = widths[-1], widths[0]
    shapes = _conv("encoder.conv_in.conv", low, 3, 3) | _conv("encoder.conv_out.conv", 2 * latents, top, 3)
    shapes |= _conv("decoder.conv_in.conv", top, latents, 3) | _conv("decoder.conv_out.conv", 3, low, 3)
    shapes |= _with_bias({"encoder.norm_out": (top,)}) | _told_norm("decoder.norm_out", low, latents)
    for half, way, order, count in (
        ("encoder", "down", widths, layers),
        ("decoder", "up", widths[::-1], layers + 1),
    ):
        told = latents if half == "decoder" else 0
        for place in range(2):
            shapes |= _residual(f"{half}.mid_block.resnets.{place}", top, top, told)
        width = order[0]
        for level, out in enumerate(order):
            block = f"{half}.{way}_blocks.{level}"
            for place in range(count):
                shapes |= _residual(f"{block}.resnets.{place}", width, out, told)
                width = out
            if level < len(order) - 1:
                shapes |= _with_bias({f"{block}.{way}samplers.0.conv": (out, out, 3, 3)})
    return shapes


def _told_norm(name: str, width: int, latents: int) -> Shapes:
    shapes = _with_bias({f"{name}.norm_layer": (width,)})
    return shapes | _conv(f"{name}.conv_y.conv", width, latents, 1) | _conv(f"{name}.conv_b.conv", width, latents, 1)


def _residual(name: str, into: int, out: int, told: int) -> Shapes:
    shapes = _conv(f"{name}.conv1.conv", out, into, 3) | _conv(f"{name}.conv2.conv", out, out, 3)
    for norm, width in (("norm1", into), ("norm2", out)):
        shapes |= _told_norm(f"{name}.{norm}", width, told) if told else _with_bias({f"{name}.{norm}": (width,)})
    return shapes if into == out else shapes | _conv(f"{name}.conv_shortcut", out, into, 1)


def text_shapes(*, dim: int, inner: int, ffn: int, layers: int, heads: int, vocabulary: int) -> Shapes:
    """The tensors of T5's encoder."""
    shapes: Shapes = {"shared.weight": (vocabulary, dim), "encoder.final_layer_norm.weight": (dim,)}
    attention = "SelfAttention"
    shapes[f"encoder.block.0.layer.0.{attention}.relative_attention_bias.weight"] = (32, heads)
    for i in range(layers):
        block: Shapes = {f"layer.0.{attention}.{part}": (inner, dim) for part in "qkv"}
        block |= {f"layer.0.{attention}.o": (dim, inner), "layer.0.layer_norm": (dim,), "layer.1.layer_norm": (dim,)}
        block |= {f"layer.1.DenseReluDense.{part}": (ffn, dim) for part in ("wi_0", "wi_1")}
        block["layer.1.DenseReluDense.wo"] = (dim, ffn)
        shapes |= {f"encoder.block.{i}.{name}.weight": size for name, size in block.items()}
    return shapes


def transformer_config(sizes: dict[str, int], channels: int, *, rotary: bool, **more: Any) -> dict[str, Any]:
    """``transformer/config.json`` as published."""
    config = {"_class_name": "CogVideoXTransformer3DModel", "_diffusers_version": "0.30.0.dev0", "dropout": 0.0}
    config |= {"num_attention_heads": sizes["heads"], "attention_head_dim": sizes["head"], "attention_bias": True}
    config |= {"num_layers": sizes["layers"], "time_embed_dim": sizes["time"], "text_embed_dim": sizes["text"]}
    config |= {"in_channels": channels, "out_channels": 16, "patch_size": 2, "temporal_compression_ratio": 4}
    config |= {"activation_fn": "gelu-approximate", "timestep_activation_fn": "silu", "flip_sin_to_cos": True}
    config |= {"freq_shift": 0, "norm_elementwise_affine": True, "norm_eps": 1e-5}
    config |= {"spatial_interpolation_scale": 1.875, "temporal_interpolation_scale": 1.0}
    return config | {"use_rotary_positional_embeddings": rotary} | more


def write(folder: Path, layout: str) -> None:
    """Fill a folder; see ``LAYOUTS``."""
    image, inp, rotary, sharded = (word in layout for word in ("i2v", "inp", "5b", "sharded"))
    channels = 33 if inp else 32 if image else 16
    more: dict[str, Any] = dict(POSITIONS)
    if inp:
        more["add_noise_in_inpaint_model"] = True
    if image:
        more["use_learned_positional_embeddings"] = True
    tokens = POSITIONS["max_text_seq_length"] + 5 * (POSITIONS["sample_height"] // 2) * (POSITIONS["sample_width"] // 2)
    shapes = transformer_shapes(**TINY, channels=channels, learned=tokens if image else 0)
    write_json(folder / "transformer" / "config.json", transformer_config(TINY, channels, rotary=rotary, **more))
    stem = "diffusion_pytorch_model"
    if sharded:
        write_shards(folder / "transformer", stem, fill(shapes, 1))
    else:
        save_file(fill(shapes, 1), folder / "transformer" / f"{stem}.safetensors")
    _write_vae(folder / "vae", stem)
    _write_text(folder, sharded=sharded)
    pipeline = "CogVideoXImageToVideoPipeline" if image else "CogVideoXPipeline"
    if not inp:  # VideoX-Fun opens part by part
        parts = {"scheduler": "CogVideoXDDIMScheduler", "transformer": "CogVideoXTransformer3DModel"}
        parts["vae"] = "AutoencoderKLCogVideoX"
        index = {name: ["diffusers", kind] for name, kind in parts.items()}
        index |= {"text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "T5Tokenizer"]}
        write_json(folder / "model_index.json", {"_class_name": pipeline, **index})
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(1.0 if rotary else 3.0))


def scheduler_config(snr_shift_scale: float) -> dict[str, Any]:
    """``scheduler/scheduler_config.json`` as published; the 2B is shifted, the 5B is not."""
    config = {"_class_name": "CogVideoXDDIMScheduler", "_diffusers_version": "0.30.0.dev0", "beta_start": 0.00085}
    config |= {"beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "trained_betas": None}
    config |= {"clip_sample": False, "clip_sample_range": 1.0, "sample_max_value": 1.0, "set_alpha_to_one": True}
    config |= {"steps_offset": 0, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    return config | {"snr_shift_scale": snr_shift_scale, "timestep_spacing": "linspace"}


def vae_config(widths: tuple[int, ...], layers: int, groups: int) -> dict[str, Any]:
    """``vae/config.json`` as published."""
    config = {"_class_name": "AutoencoderKLCogVideoX", "block_out_channels": list(widths), "layers_per_block": layers}
    config |= {f"{way}_block_types": [f"CogVideoX{way.title()}Block3D"] * len(widths) for way in ("down", "up")}
    config |= {"norm_num_groups": groups, "latent_channels": 16, "in_channels": 3, "out_channels": 3, "act_fn": "silu"}
    config |= {"norm_eps": 1e-6, "temporal_compression_ratio": 4, "sample_height": 480, "sample_width": 720}
    return config | {"scaling_factor": 1.15258426, "use_quant_conv": False, "use_post_quant_conv": False}


def _write_vae(folder: Path, stem: str) -> None:
    write_json(folder / "config.json", vae_config(TINY_VAE["widths"], TINY_VAE["layers"], 4))
    save_file(fill(vae_shapes(**TINY_VAE), 2, 0.1), folder / f"{stem}.safetensors")


def _write_text(folder: Path, *, sharded: bool) -> None:
    """T5, and its tokenizer as published: a sentencepiece model."""
    import sentencepiece

    sizes, encoder = TINY_TEXT, folder / "text_encoder"
    config = {"model_type": "t5", "architectures": ["T5EncoderModel"], "feed_forward_proj": "gated-gelu"}
    config |= {"d_model": sizes["dim"], "d_kv": sizes["inner"] // sizes["heads"], "num_heads": sizes["heads"]}
    config |= {"d_ff": sizes["ffn"], "num_layers": sizes["layers"], "vocab_size": sizes["vocabulary"]}
    write_json(encoder / "config.json", config | {"is_gated_act": True, "dense_act_fn": "gelu_new"})
    tensors = fill(text_shapes(**sizes), 3)
    if sharded:
        write_shards(encoder, "model", tensors)
    else:
        save_file(tensors, encoder / "model.safetensors")
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS)] * 20), model_writer=pieces, vocab_size=sizes["vocabulary"],
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(
        folder / "tokenizer" / "tokenizer_config.json",
        {"tokenizer_class": "T5Tokenizer", "model_max_length": 226, "extra_ids": 0, **names},
    )
    write_json(folder / "tokenizer" / "special_tokens_map.json", names)
    (folder / "tokenizer" / "spiece.model").write_bytes(pieces.getvalue())
