"""Load Video Model, Load Video Model (files)."""

from __future__ import annotations

import comfy.model_management
import folder_paths
from comfy_api.latest import io

from ..training.job import ModelSource
from ..video_models import BUILTIN, ModelFiles, load_video_model
from ..video_models.protocol import ModelSpec
from . import folders
from .bridge import downloading, engine, patience, say
from .types import LoadedModel, VideoModelType

DTYPES = ["auto", "bfloat16", "float16", "float32"]
NONE = "none"


def dtype_input(about: str = "Number type of the weights. 'auto' takes what the publisher runs.") -> io.Input:
    return io.Combo.Input("dtype", options=DTYPES, default="auto", tooltip=about)


def model_output() -> io.Output:
    return VideoModelType.Output(
        "video_model", display_name="video_model", tooltip="For every other node of this pack."
    )


def facts(spec: ModelSpec, shift: str = "") -> str:
    """What a model paints without further settings, in a line."""
    parts = [f"{spec.width}x{spec.height}", f"{spec.frames} frames", f"{spec.steps} steps", spec.solver, shift]
    parts += [f"guidance {spec.guidance_scale:g}", f"experts {', '.join(spec.experts)}" if spec.boundary else ""]
    return f"{spec.name}: {', '.join(filter(None, parts))}" + (f"; recipe {spec.recipe}" if spec.recipe else "")


def _check_dtype(dtype: str | None) -> bool | str:
    if dtype is not None and dtype not in DTYPES:
        return f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}"
    return True


def _load(source: str | ModelFiles, title: str, dtype: str, download: bool, node: str | None) -> io.NodeOutput:
    with engine(), patience(f"loading {title}", node):
        rest = comfy.model_management.unet_offload_device()
        model = load_video_model(
            source,
            dtype=dtype,
            device=rest,
            search=folders.video_model_roots(),
            download=download,
            progress=downloading(node),
        )
    told = facts(model.spec)
    say(told, node)
    again = source
    if isinstance(source, ModelFiles):
        again = {role: str(path) for role, path in vars(source).items() if path is not None}
    where = ModelSource(again, dtype, tuple(map(str, folders.video_model_roots())))
    return io.NodeOutput(LoadedModel(model, f"{title} {dtype}", source=where), ui={"text": [told]})


class LoadVideoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        models = folders.list_video_models()
        return io.Schema(
            node_id="RewardLoraLoadVideoModel",
            display_name="Load Video Model",
            category="Reward LoRA/model",
            description="Loads a whole video diffusion model: text encoder, denoiser and VAE. 'builtin' is a tiny "
            "model of moving coloured shapes that comes with the pack and runs on any computer.",
            inputs=[
                io.Combo.Input(
                    "name",
                    options=list(models),
                    default=BUILTIN,
                    tooltip="A model's folder below models/video_models or models/diffusion_models, in the diffusers "
                    "layout or its publisher's; or the name of a published model, to be downloaded. "
                    + "; ".join(f"{name} ({about})" for name, about in models.items()),
                ),
                dtype_input(),
                io.String.Input(
                    "path",
                    default="",
                    optional=True,
                    tooltip="A model's folder anywhere on this computer. If given, it counts instead of the name.",
                ),
                io.Boolean.Input(
                    "download",
                    default=False,
                    optional=True,
                    tooltip="Fetch a published model that is not here into models/video_models: tens of gigabytes, "
                    "once, and it goes on where it was cut off. HF_ENDPOINT and HF_HUB_OFFLINE are honoured.",
                ),
            ],
            outputs=[model_output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, dtype: str | None = None) -> bool | str:
        return _check_dtype(dtype)

    @classmethod
    def execute(cls, name: str, dtype: str, path: str = "", download: bool = False) -> io.NodeOutput:
        chosen = path.strip().strip('"') or name
        return _load(chosen, chosen, dtype, download, cls.hidden.unique_id)


class LoadVideoModelFiles(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def files(name: str, folder: str, about: str, *, needed: bool = True) -> io.Input:
            options = folder_paths.get_filename_list(folder)
            about = f"Of models/{folder}: {about}"
            if needed:
                return io.Combo.Input(name, options=options, tooltip=about)
            return io.Combo.Input(name, options=[NONE, *options], default=NONE, optional=True, tooltip=about)

        return io.Schema(
            node_id="RewardLoraLoadVideoModelFiles",
            display_name="Load Video Model (files)",
            category="Reward LoRA/model",
            description="Loads a Wan model from the single files that ComfyUI's own workflows use. Float8 files are "
            "unpacked to 16 bits, so they take twice their size in memory.",
            inputs=[
                files("diffusion", "diffusion_models", "a Wan model, or the high-noise expert of Wan2.2."),
                files("text_encoder", "text_encoders", "umt5_xxl_fp16 or umt5_xxl_fp8_e4m3fn_scaled."),
                files("vae", "vae", "wan_2.1_vae, or wan2.2_vae for the 5B model."),
                dtype_input(),
                files("diffusion_low", "diffusion_models", "the low-noise expert of Wan2.2.", needed=False),
                files("clip_vision", "clip_vision", "clip_vision_h, for Wan2.1 with a start image.", needed=False),
            ],
            outputs=[model_output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, dtype: str | None = None) -> bool | str:
        return _check_dtype(dtype)

    @classmethod
    def execute(
        cls,
        diffusion: str,
        text_encoder: str,
        vae: str,
        dtype: str,
        diffusion_low: str = NONE,
        clip_vision: str = NONE,
    ) -> io.NodeOutput:
        with engine():
            files = ModelFiles(
                folders.model_file("diffusion_models", diffusion),
                folders.model_file("text_encoders", text_encoder),
                folders.model_file("vae", vae),
                None if diffusion_low == NONE else folders.model_file("diffusion_models", diffusion_low),
                None if clip_vision == NONE else folders.model_file("clip_vision", clip_vision),
            )
        title = " ".join(name for name in (diffusion, diffusion_low, text_encoder, vae, clip_vision) if name != NONE)
        return _load(files, title, dtype, False, cls.hidden.unique_id)
