"""Load Video Model."""

from __future__ import annotations

import comfy.model_management
from comfy_api.latest import io

from ..video_models import BUILTIN, load_video_model
from . import folders
from .bridge import engine, patience, say
from .types import LoadedModel, VideoModelType

DTYPES = ["auto", "bfloat16", "float16", "float32"]


class LoadVideoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardLoraLoadVideoModel",
            display_name="Load Video Model",
            category="Reward LoRA/model",
            description="Loads a whole video diffusion model: text encoder, denoiser and VAE. 'builtin' is a tiny "
            "model of moving coloured shapes that comes with the pack and runs on any computer.",
            inputs=[
                io.Combo.Input(
                    "name",
                    options=folders.list_video_models(),
                    default=BUILTIN,
                    tooltip="'builtin', or a model's folder below models/video_models or models/diffusion_models "
                    "(the diffusers layout, or the one its publisher ships).",
                ),
                io.Combo.Input(
                    "dtype",
                    options=DTYPES,
                    default="auto",
                    tooltip="Number type of the weights. 'auto' takes what the publisher runs.",
                ),
                io.String.Input(
                    "path",
                    default="",
                    optional=True,
                    tooltip="A model's folder anywhere on this computer. If given, it counts instead of the name.",
                ),
            ],
            outputs=[
                VideoModelType.Output(
                    "video_model", display_name="video_model", tooltip="For every other node of this pack."
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, dtype: str | None = None) -> bool | str:
        if dtype is not None and dtype not in DTYPES:
            return f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}"
        return True

    @classmethod
    def execute(cls, name: str, dtype: str, path: str = "") -> io.NodeOutput:
        chosen = path.strip().strip('"') or name
        with engine(), patience(f"loading {chosen}", cls.hidden.unique_id):
            rest = comfy.model_management.unet_offload_device()
            model = load_video_model(chosen, dtype=dtype, device=rest, search=folders.video_model_roots())
        spec = model.spec
        facts = f"{spec.name}: {spec.width}x{spec.height}, {spec.frames} frames, {spec.steps} steps, "
        facts += f"guidance {spec.guidance_scale:g}"
        say(facts, cls.hidden.unique_id)
        return io.NodeOutput(LoadedModel(model, f"{chosen} {dtype}"), ui={"text": [facts]})
