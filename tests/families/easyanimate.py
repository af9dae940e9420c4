"""Tiny EasyAnimate checkpoints: V5 and V5.1 as the publisher lays them out, and V5.1 as diffusers does.

The names are written down here from ``easyanimate/models/transformer3d.py`` and ``easyanimate/vae`` of
aigc-apps/EasyAnimate, and from the published ``model.safetensors.index.json`` of Qwen2-VL, independently of the
package's tables; the real models' key lists come from the same functions.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from . import WORDS, write_json, write_shards
from .wan_shapes import Shapes, _conv, _with_bias, fill

LAYOUTS = ("original v5 inp, sharded", "original v5.1 inp", "diffusers v5.1 t2v")

TINY = {"inner": 32, "head": 16, "layers": 3, "mmdit": 1, "time": 24}
V5 = {"text": 12, "text_t5": 20}
V51 = {"text": 16, "normed": True}
WIDTHS = (8, 8, 16, 16)
"""Channels of the tiny VAE's levels; the real one has 128, 256, 512, 512 and two blocks a level."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou help."
    "<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}{% if 'text' in content %}"
    "{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def transformer_shapes(
    *, inner: int, head: int, layers: int, mmdit: int, time: int, text: int, text_t5: int = 0, normed: bool = False,
    channels: int = 33, out: int = 16, patch: int = 2,
) -> Shapes:  # fmt: skip
    """``EasyAnimateTransformer3DModel``'s tensors; blocks from ``mmdit`` on have no weights of their own for text."""
    shapes: Shapes = {"text_proj.0.weight": (text,)} if normed else {}
    sizes: Shapes = {"proj": (inner, channels, patch, patch), "proj_out": (patch**2 * out, inner)}
    sizes |= {"text_proj.1" if normed else "text_proj": (inner, text), "norm_final": (inner,)}
    if text_t5:
        sizes["text_proj_t5"] = (inner, text_t5)
    sizes |= {"time_embedding.linear_1": (time, inner), "time_embedding.linear_2": (time, time)}
    sizes |= {"norm_out.linear": (2 * inner, time), "norm_out.norm": (inner,)}
    for i in range(layers):
        block = {}
        for norm in ("norm1", "norm2"):
            block |= {f"{norm}.linear": (6 * inner, time), f"{norm}.norm": (inner,)}
        for attention, forward in (("attn1", "ff"), ("attn2", "txt_ff"))[: 2 if i < mmdit else 1]:
            block |= {f"{attention}.to_{part}": (inner, inner) for part in ("q", "k", "v", "out.0")}
            block |= {f"{attention}.norm_{part}": (head,) for part in "qk"}
            block |= {f"{forward}.net.0.proj": (4 * inner, inner), f"{forward}.net.2": (inner, 4 * inner)}
        sizes |= {f"transformer_blocks.{i}.{name}": size for name, size in block.items()}
    return shapes | _with_bias(sizes)


def vae_shapes(*, widths: tuple[int, ...], latents: int = 16, blocks: int = 1) -> Shapes:
    """``AutoencoderKLMagvit``'s tensors, without attention in the middle."""
    top = widths[-1]
    shapes = _conv("encoder.conv_in", widths[0], 3, 3) | _conv("encoder.conv_out", 2 * latents, top, 3)
    shapes |= _conv("decoder.conv_in", top, latents, 3) | _conv("decoder.conv_out", 3, widths[0], 3)
    shapes |= _conv("quant_conv", 2 * latents, 2 * latents, 1) | _conv("post_quant_conv", latents, latents, 1)
    shapes |= _with_bias({"encoder.conv_norm_out": (top,), "decoder.conv_norm_out": (widths[0],)})
    for half, order, count, resampler in (
        ("encoder.down_blocks", widths, blocks, "downsampler"),
        ("decoder.up_blocks", widths[::-1], blocks + 1, "upsampler"),
    ):
        width = order[0]
        for level, out in enumerate(order):
            for place in range(count):
                shapes |= _residual(f"{half}.{level}.convs.{place}", width, out)
                width = out
            if level < len(order) - 1:
                shapes |= _conv(f"{half}.{level}.{resampler}.conv", out, out, 3)
    for half in ("encoder", "decoder"):
        for place in range(blocks):
            shapes |= _residual(f"{half}.mid_block.convs.{place}", top, top)
    return shapes


def _residual(name: str, into: int, out: int) -> Shapes:
    shapes = _with_bias({f"{name}.norm1": (into,), f"{name}.norm2": (out,)})
    shapes |= _conv(f"{name}.conv1", out, into, 3) | _conv(f"{name}.conv2", out, out, 3)
    return shapes if into == out else shapes | _conv(f"{name}.shortcut", out, into, 1)


def qwen_shapes(*, dim: int, key_value: int, mlp: int, layers: int, vocabulary: int) -> Shapes:
    """Qwen2-VL's tensors as published: the language half, its head, and a scrap of its eyes."""
    shapes: Shapes = {"lm_head.weight": (vocabulary, dim), "visual.merger.ln_q.bias": (8,)}
    shapes |= {"model.embed_tokens.weight": (vocabulary, dim), "model.norm.weight": (dim,)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        shapes |= _with_bias({f"{layer}self_attn.q_proj": (dim, dim)})
        shapes |= _with_bias({f"{layer}self_attn.{part}_proj": (key_value, dim) for part in "kv"})
        shapes |= {f"{layer}self_attn.o_proj.weight": (dim, dim), f"{layer}mlp.down_proj.weight": (dim, mlp)}
        shapes |= {f"{layer}mlp.{part}_proj.weight": (mlp, dim) for part in ("gate", "up")}
        shapes |= {f"{layer}{norm}_layernorm.weight": (dim,) for norm in ("input", "post_attention")}
    return shapes


def write(folder: Path, layout: str) -> None:
    """Fill a folder; see ``LAYOUTS``."""
    kind, version, variant = layout.removesuffix(", sharded").split()
    if kind == "diffusers":
        _write_diffusers(folder)
    else:
        sizes = TINY | (V5 if version == "v5" else V51)
        _write_transformer(folder / "transformer", sizes, sharded=layout.endswith("sharded"))
        _write_vae(folder / "vae")
        pipeline = "EasyAnimatePipeline_Multi_Text_Encoder_Inpaint" if version == "v5" else "EasyAnimateInpaintPipeline"
        write_json(folder / "model_index.json", {"_class_name": pipeline})
    if version == "v5":
        _write_v5_text(folder)
        _write_v5_scheduler(folder / "scheduler")
    else:
        _write_qwen(folder)
        write_json(
            folder / "scheduler" / "scheduler_config.json",
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
            | {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15},
        )


def _write_transformer(folder: Path, sizes: dict[str, Any], *, sharded: bool) -> None:
    config = {"_class_name": "EasyAnimateTransformer3DModel", "num_attention_heads": sizes["inner"] // sizes["head"]}
    config |= {"attention_head_dim": sizes["head"], "in_channels": 33, "out_channels": 16, "patch_size": 2}
    config |= {"num_layers": sizes["layers"], "mmdit_layers": sizes["mmdit"], "time_embed_dim": sizes["time"]}
    config |= {"text_embed_dim": sizes["text"], "text_embed_dim_t5": sizes.get("text_t5"), "swa_layers": None}
    config |= {"add_norm_text_encoder": sizes.get("normed", False), "clip_channels": None, "ref_channels": None}
    config |= {"add_noise_in_inpaint_model": True, "sample_width": 90, "sample_height": 60, "norm_eps": 1e-5}
    write_json(folder / "config.json", config)
    tensors = fill(transformer_shapes(**sizes), 1)
    if sharded:
        write_shards(folder, "diffusion_pytorch_model", tensors)
    else:
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors")


def _write_vae(folder: Path) -> None:
    config = {"_class_name": "AutoencoderKLMagvit", "block_out_channels": list(WIDTHS), "latent_channels": 16}
    config |= {"layers_per_block": 1, "norm_num_groups": 4, "scaling_factor": 0.7125, "spatial_group_norm": True}
    config |= {f"{way}_block_types": [f"Spatial{way.title()}Block3D"] for way in ("down", "up")}
    for way in ("down", "up"):
        config[f"{way}_block_types"] += [f"SpatialTemporal{way.title()}Block3D"] * 3
    config |= {"mid_block_use_attention": False, "mid_block_attention_type": "spatial", "cache_mag_vae": True}
    write_json(folder / "config.json", config | {"mini_batch_encoder": 4, "mini_batch_decoder": 1})
    save_file(fill(vae_shapes(widths=WIDTHS), 2, 0.1), folder / "diffusion_pytorch_model.safetensors")


def _write_v5_scheduler(folder: Path) -> None:
    config = {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    config |= {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "num_train_timesteps": 1000}
    write_json(folder / "scheduler_config.json", config | {"rescale_betas_zero_snr": True, "steps_offset": 1})


def _write_v5_text(folder: Path) -> None:
    """Bert with a vocabulary of whole words, and T5 with a sentencepiece model."""
    import sentencepiece
    from transformers import BertConfig, BertModel, MT5Config, MT5EncoderModel

    torch.manual_seed(3)
    bert = BertConfig(
        vocab_size=15, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16,
    )  # fmt: skip
    BertModel(bert, add_pooling_layer=False).save_pretrained(folder / "text_encoder")
    t5 = MT5Config(
        vocab_size=40, d_model=20, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    MT5EncoderModel(t5).save_pretrained(folder / "text_encoder_2")
    names = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    tokenizer = folder / "tokenizer"
    write_json(tokenizer / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "model_max_length": 9})
    (tokenizer / "vocab.txt").write_text("\n".join((*names, *WORDS)) + "\n", encoding="utf-8")
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS)] * 20), model_writer=pieces, vocab_size=40, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    write_json(
        folder / "tokenizer_2" / "tokenizer_config.json",
        {"tokenizer_class": "T5Tokenizer", "model_max_length": 12, "extra_ids": 0, "additional_special_tokens": []}
        | {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
    )
    (folder / "tokenizer_2" / "spiece.model").write_bytes(pieces.getvalue())


def _write_qwen(folder: Path) -> None:
    """A text encoder in the published spelling and shards, and a tokenizer of bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    config = {"model_type": "qwen2_vl", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": len(alphabet) + len(special)}
    config |= {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    config |= {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 512}
    config |= {"vision_config": {"depth": 1, "embed_dim": 8, "num_heads": 1, "hidden_size": 16}}
    config |= {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652}
    write_json(folder / "text_encoder" / "config.json", config | {"bos_token_id": 256, "eos_token_id": 258})
    shapes = qwen_shapes(dim=16, key_value=8, mlp=24, layers=3, vocabulary=config["vocab_size"])
    write_shards(folder / "text_encoder", "model", fill(shapes, 4))
    tokenizer = folder / "tokenizer"
    write_json(tokenizer / "vocab.json", {character: i for i, character in enumerate(alphabet)})
    (tokenizer / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    added = {
        str(len(alphabet) + i): {"content": name, "special": True, "normalized": False, "lstrip": False}
        | {"rstrip": False, "single_word": False}
        for i, name in enumerate(special)
    }
    settings = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 128, "padding_side": "left"}
    settings |= {"added_tokens_decoder": added, "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    write_json(tokenizer / "tokenizer_config.json", settings | {"chat_template": CHAT_TEMPLATE})


def _write_diffusers(folder: Path) -> None:
    """As ``save_pretrained`` of diffusers' ``EasyAnimatePipeline`` writes it, by diffusers' own classes."""
    from diffusers import AutoencoderKLMagvit, EasyAnimateTransformer3DModel

    torch.manual_seed(5)
    transformer = EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=16, out_channels=16, patch_size=2, num_layers=3,
        mmdit_layers=2, time_embed_dim=24, text_embed_dim=16, add_norm_text_encoder=True,
    )  # fmt: skip
    vae = AutoencoderKLMagvit(block_out_channels=WIDTHS, layers_per_block=1, norm_num_groups=4)
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    write_json(folder / "model_index.json", {"_class_name": "EasyAnimatePipeline"})
