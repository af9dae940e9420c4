"""A node for the tests' ComfyUI: a text conditioning without a text encoder."""

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


NODE_CLASS_MAPPINGS = {"TestConditioning": TestConditioning}
