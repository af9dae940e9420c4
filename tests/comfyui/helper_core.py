"""In the tests' ComfyUI core's own loaders take tiny files: sizes that core knows by heart are read off the file."""

from contextlib import ExitStack
from functools import partial, wraps
from unittest.mock import patch

import comfy.ldm.wan.vae
import comfy.ldm.wan.vae2_2
import comfy.sd
import comfy.text_encoders.sd3_clip

NODE_CLASS_MAPPINGS = {}
load_text, load_vae = comfy.sd.load_text_encoder_state_dicts, comfy.sd.VAE.__init__


@wraps(load_text)
def text_of_any_size(state_dicts, *given, **named):
    """UMT5, which core knows by its 24 layers."""
    (tensors, *others), block = state_dicts, "encoder.block.0.layer.{}.weight"
    if others or "spiece_model" not in tensors:
        return load_text(state_dicts, *given, **named)
    heads = tensors[block.format("0.SelfAttention.relative_attention_bias")].shape[1]
    inner, width = tensors[block.format("0.SelfAttention.q")].shape
    sizes = {"vocab_size": tensors["shared.weight"].shape[0], "d_model": width, "d_kv": inner // heads}
    sizes |= {"num_heads": heads, "d_ff": tensors[block.format("1.DenseReluDense.wi_0")].shape[0]}
    sizes["num_layers"] = sum(name.endswith(".SelfAttention.q.weight") for name in tensors)
    named["model_options"] = {**named.get("model_options", {}), "umt5xxl_model_config": sizes}
    number_type = comfy.text_encoders.sd3_clip.t5_xxl_detect(tensors)
    with (
        patch.object(comfy.sd, "detect_te_model", lambda _: comfy.sd.TEModel.T5_XXL),
        patch.object(comfy.sd, "t5xxl_detect", lambda _: number_type),
    ):
        return load_text(state_dicts, *given, **named)


@wraps(load_vae)
def vae_of_any_size(self, sd=None, *given, **named):
    """Wan's two, of any width; newer versions of core read that of the first off the file themselves."""

    def sized(real, sizes, **config):
        return real(**{**config, **sizes})

    with ExitStack() as stack:
        if sd is not None and "decoder.middle.0.residual.0.gamma" in sd:
            first, last = sd["encoder.conv1.weight"].shape[0], sd["decoder.head.0.gamma"].shape[0]
            for module, sizes in ((comfy.ldm.wan.vae, {"dim": first}),
                                  (comfy.ldm.wan.vae2_2, {"dim": first, "dec_dim": last})):  # fmt: skip
                stack.enter_context(patch.object(module, "WanVAE", partial(sized, module.WanVAE, sizes)))
        load_vae(self, sd, *given, **named)


comfy.sd.load_text_encoder_state_dicts, comfy.sd.VAE.__init__ = text_of_any_size, vae_of_any_size
