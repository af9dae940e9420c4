"""Video Model from MODEL, CLIP, VAE."""

from __future__ import annotations

from collections.abc import Iterable

import comfy.lora
import comfy.model_management
import torch
from comfy.ldm.wan.model import WanModel
from comfy.model_patcher import ModelPatcher, get_key_weight
from comfy.model_sampling import CONST, ModelSamplingDiscreteFlow
from comfy_api.latest import io
from torch import Tensor

from ..video_models.files import parse_dtype
from ..video_models.wan_native import NativeText, NativeTransformer, Weights, digest, load_native, network_dtype
from .bridge import engine, make_room, patience, say
from .types import LoadedModel
from .video_model import dtype_input, facts, model_output

SUPPORTED = (
    "supported are Wan2.1 and Wan2.2: text-to-video, image-to-video, first and last frame, Fun-InP, the two experts "
    "and TI2V-5B"
)
SCALES = ("scale_weight", "scale_input", "weight_scale", "weight_scale_2", "input_scale", "scaled_fp8")
"""What quantised layers keep beside their weights; ComfyUI's own unpacking uses it."""


class VideoModelFromParts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardLoraVideoModelFromParts",
            display_name="Video Model from MODEL, CLIP, VAE",
            category="Reward LoRA/model",
            description="Makes a Wan that ComfyUI's own loaders have loaded trainable: LoRAs on the MODEL and its "
            "shift are taken over, quantised weights are unpacked. The weights are copied and the MODEL itself stays "
            "as it is.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A Wan from Load Diffusion Model or Load Checkpoint, with or without LoRAs and "
                    "ModelSamplingSD3; of Wan2.2's two, the one for high noise.",
                ),
                io.Clip.Input("clip", tooltip="From Load CLIP with umt5_xxl and the type wan."),
                io.Vae.Input("vae", tooltip="From Load VAE: wan_2.1_vae, or wan2.2_vae for the 5B model."),
                dtype_input(
                    "Number type of our copy. 'auto' is bfloat16 for a large network, float32 for a small one and the "
                    "VAE."
                ),
                io.Model.Input("model_low", optional=True, tooltip="The MODEL for low noise, of Wan2.2's two."),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="From Load CLIP Vision with clip_vision_h, for Wan2.1 with a start image.",
                ),
            ],
            outputs=[
                model_output(),
                io.String.Output("report", display_name="report", tooltip="What was taken over and what was not."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, clip, vae, dtype: str, model_low=None, clip_vision=None) -> io.NodeOutput:
        node = cls.hidden.unique_id
        patchers = {"model": model} | ({} if model_low is None else {"model_low": model_low})
        with engine(), patience("copying the MODEL", node):
            chosen, shift = parse_dtype(dtype), shift_of(patchers.values())
            make_room()
            loaded, seen = load_native(
                [transformer_of(name, patcher, chosen) for name, patcher in patchers.items()],
                lambda: weights(vae.patcher, "", chosen),
                text_of(clip, chosen),
                None if clip_vision is None else lambda: weights(clip_vision.patcher, "", chosen),
                shift=shift,
                dtype=chosen,
                device=comfy.model_management.unet_offload_device(),
            )
            sees = "" if clip_vision is None else digest(stored(clip_vision.patcher))
        told = facts(loaded.spec, "the published shift" if shift is None else f"shift {shift:g}")
        report = "\n".join([told, *(line for item in patchers.items() for line in taken(*item))])
        say(report, node)
        return io.NodeOutput(LoadedModel(loaded, f"native {seen} {sees} {dtype}"), report, ui={"text": [report]})


def transformer_of(name: str, patcher: ModelPatcher, dtype: torch.dtype | None) -> NativeTransformer:
    """The transformer of a MODEL. Raises ``ValueError`` if it is no Wan that we know."""
    network = patcher.model.diffusion_model
    if type(network) is not WanModel:
        kind = type(patcher.model).__name__
        raise ValueError(f"{name} is a {kind} with a {type(network).__name__}; {SUPPORTED}")
    return NativeTransformer(lambda: weights(patcher, "diffusion_model.", dtype), network.num_heads, network.eps)


@torch.no_grad()
def weights(patcher: ModelPatcher, prefix: str, dtype: torch.dtype | None) -> Weights:
    """What core computes with: see :func:`computed`.

    Args:
        patcher: Of a MODEL, a CLIP or a VAE.
        prefix: Of the network inside the patcher's model.
        dtype: Of large matrices that had to be computed; None chooses by size.
    """
    network = patcher.model.get_submodule(prefix.rstrip("."))
    named = {name: value for name, value in network.named_parameters() if name.rpartition(".")[2] not in SCALES}
    integers = [name for name, value in named.items() if not value.is_floating_point()]
    if integers:
        kind = str(named[integers[0]].dtype).removeprefix("torch.")
        raise ValueError(
            f"the {type(patcher.model).__name__} is quantised to integers ({integers[0]} is {kind}); load a file of 16 "
            "or 32 bits, or of float8"
        )
    large = network_dtype(named, dtype)
    rest = comfy.model_management.unet_offload_device()
    borrowed, made = {}, {}
    for name in named:
        comfy.model_management.throw_exception_if_processing_interrupted()
        value = computed(patcher, prefix + name)
        if value is None:
            borrowed[name] = plain(original(patcher, prefix + name, named[name]))
        else:
            precise = value.ndim < 2 or name.startswith("time_embedding.")  # these stay float32 in the copy
            made[name] = value.to(rest, torch.float32 if precise else large)
    return Weights(borrowed, made)


def computed(patcher: ModelPatcher, key: str) -> Tensor | None:
    """A weight unpacked and with its LoRAs, in float32 on ComfyUI's device; None if it needs neither.

    As ``ModelPatcher.patch_weight_to_device``, but for rounding the result to the type it came in.
    """
    weight, _, unpack = get_key_weight(patcher.model, key)
    weight = original(patcher, key, weight)
    patches, wrappers = patcher.patches.get(key, ()), patcher.weight_wrapper_patches.get(key, ())
    if unpack is None and not patches and not wrappers:
        return None
    device = comfy.model_management.get_torch_device()
    value = comfy.model_management.cast_to_device(weight, device, torch.float32, copy=True)
    value = value if unpack is None else unpack(value, inplace=True)
    value = comfy.lora.calculate_weight(patches, value, key)
    for wrap in wrappers:
        value = wrap(value)
    return value


def original(patcher: ModelPatcher, key: str, weight: Tensor) -> Tensor:
    """What lies aside while the model is loaded with LoRAs in its weights; else the weight itself."""
    if key in patcher.hook_backup:
        return patcher.hook_backup[key][0]
    return patcher.backup[key].weight if key in patcher.backup else weight


def plain(tensor: Tensor) -> Tensor:
    """The same numbers in the same place as a tensor that gradients may meet: ComfyUI's are made in inference mode."""
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def shift_of(patchers: Iterable[ModelPatcher]) -> float | None:
    """What ModelSamplingSD3 set; None if nothing did.

    Raises:
        ValueError: The sampling is another, or the two experts' differ.
    """
    shifts = set()
    for patcher in patchers:
        sampling = patcher.object_patches.get("model_sampling")
        if sampling is not None:
            flow = isinstance(sampling, ModelSamplingDiscreteFlow) and isinstance(sampling, CONST)
            if not flow or not sampling.shift > 0:
                raise ValueError("the MODEL's sampling was changed; of the nodes that do so only ModelSamplingSD3 is "
                                 "supported, with a shift above 0")  # fmt: skip
            shifts.add(float(sampling.shift))
    if len(shifts) > 1:
        raise ValueError(f"the two MODELs have the shifts {' and '.join(map(str, sorted(shifts)))}; give both the same")
    return shifts.pop() if shifts else None


def text_of(clip, dtype: torch.dtype | None) -> NativeText:
    """UMT5 where ComfyUI keeps it. Raises ``ValueError`` for another text encoder."""
    if not hasattr(clip.cond_stage_model, "umt5xxl"):
        kind = type(clip.cond_stage_model).__name__
        raise ValueError(f"the CLIP must be UMT5, from Load CLIP with umt5_xxl and the type wan, got {kind}")
    values = stored(clip.patcher)
    with torch.no_grad():
        values |= {key: computed(clip.patcher, key) for key in clip.patcher.patches}
    return NativeText(
        lambda: weights(clip.patcher, "umt5xxl.transformer.", dtype),
        clip.tokenizer.state_dict()["spiece_model"].numpy().tobytes(),
        digest(values),
    )


def stored(patcher: ModelPatcher) -> dict[str, Tensor]:
    """The numbers in memory, still packed where they are quantised: to know them again."""
    named = {name: original(patcher, name, value) for name, value in patcher.model.named_parameters()}
    return {name: getattr(value, "_qdata", value) for name, value in named.items()}


def taken(name: str, patcher: ModelPatcher) -> list[str]:
    """What is set on a MODEL: taken over, or acting in ComfyUI's own sampler alone."""
    lines = []
    if patcher.patches:
        lines.append(f"{name}: {len(patcher.patches)} weights with LoRAs or other patches taken over")
    options = {**patcher.model_options, **patcher.model_options.get("transformer_options", {})}
    groups = (options, patcher.object_patches, patcher.injections)
    others = {name for group in groups for name in group} - {"transformer_options", "model_sampling"}
    others |= {kind for kind, found in patcher.wrappers.items() if any(found.values())}
    if others:
        lines.append(f"{name}: not taken over, for it acts in ComfyUI's sampler alone: {', '.join(sorted(others))}")
    return lines
