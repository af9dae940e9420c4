"""Nodes for the tests' ComfyUI: texts without an encoder, core's own classes in tiny sizes, and what they hold."""

import hashlib

import torch


class TestConditioning:
    """Random text of a few tokens, padded with zeros as Wan's."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "_for_testing"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802 - ComfyUI's name
        return {"required": {"seed": ("INT", {"default": 0}), "width": ("INT", {"default": 4096})}}

    def make(self, seed, width):
        text = torch.zeros(1, 512, width)
        text[:, :5] = torch.randn(1, 5, width, generator=torch.Generator().manual_seed(seed))
        return ([[text, {}]],)


class TestTinyClipVision:
    """CLIP's image encoder in core's own class."""

    RETURN_TYPES = ("CLIP_VISION",)
    FUNCTION = "make"
    CATEGORY = "_for_testing"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"path": ("STRING", {}), "config": ("STRING", {})}}

    def make(self, path, config):
        import comfy.clip_vision
        import comfy.utils

        clip = comfy.clip_vision.ClipVisionModel(config)
        clip.load_sd(comfy.utils.load_torch_file(path))
        return (clip,)


class TestModelWeights:
    """A hash of a MODEL's own weights and of the names of what is patched."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "show"
    CATEGORY = "_for_testing"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"model": ("MODEL",)}, "optional": {"after": ("IMAGE",)}}

    @classmethod
    def IS_CHANGED(cls, **_inputs):  # noqa: N802
        return float("nan")

    def show(self, model, after=None):
        seen = hashlib.sha256(repr(sorted(model.patches)).encode())
        for name, tensor in sorted(model.model.state_dict().items()):
            seen.update(f"{name} {tensor.dtype}".encode())
            seen.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return {"ui": {"text": [seen.hexdigest()]}}


NODE_CLASS_MAPPINGS = {node.__name__: node for node in (TestConditioning, TestTinyClipVision, TestModelWeights)}
