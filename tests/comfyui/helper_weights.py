"""A node for the tests' ComfyUI: a digest of everything a video model consists of."""

import hashlib

import torch


class TestWeights:
    """SHA-256 over names and values of all tensors of all networks of a video model."""

    RETURN_TYPES = ()
    FUNCTION = "digest"
    OUTPUT_NODE = True
    CATEGORY = "_for_testing"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802 - ComfyUI's name
        return {"required": {"video_model": ("REWARD_LORA_VIDEO_MODEL",), "salt": ("INT", {"default": 0})}}

    def digest(self, video_model, salt):
        model = video_model.model
        parts = dict(model.denoisers) | {k: v for k, v in vars(model).items() if isinstance(v, torch.nn.Module)}
        digest, count = hashlib.sha256(), 0
        for part, network in sorted(parts.items()):
            for name, value in sorted(network.state_dict().items()):
                digest.update(f"{part} {name} {value.dtype}".encode())
                digest.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
                count += 1
        return {"ui": {"text": [f"{count} {digest.hexdigest()}"]}}


NODE_CLASS_MAPPINGS = {"TestWeights": TestWeights}
