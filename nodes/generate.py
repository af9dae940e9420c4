"""Generate Video."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..lora.adapter import applied
from ..training.sample import sample_prompt
from . import train_widgets
from .bridge import Progress, engine, placed, to_images, to_still
from .types import LoadedModel, VideoModelType

INTERVAL = {"guidance_interval": train_widgets.SAMPLING["guidance_interval"]}


class GenerateVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = "0 takes the model's default."
        return io.Schema(
            node_id="RewardLoraGenerateVideo",
            display_name="Generate Video",
            category="Reward LoRA/model",
            description="Paints a video from a prompt, with the LoRAs that were applied to the model. The same seed "
            "and prompt give the same noise at every LoRA strength, so clips can be compared.",
            inputs=[
                VideoModelType.Input("video_model", tooltip="From Load Video Model or Apply Reward LoRA."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="a red circle moves right on a blue background",
                    tooltip="What the video shall show; 'each' of Prompts paints one video a prompt.",
                ),
                io.String.Input("negative", multiline=True, default="", tooltip="What guidance leads away from."),
                io.Int.Input(
                    "seed",
                    default=42,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="Source of the noise, 0 to 2^64 - 1.",
                ),
                io.Int.Input("width", default=0, min=0, max=4096, step=8, tooltip=f"Pixels, up to 4096. {default}"),
                io.Int.Input("height", default=0, min=0, max=4096, step=8, tooltip=f"Pixels, up to 4096. {default}"),
                io.Int.Input(
                    "frames",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip=f"How many, up to 1024; most models want 4n+1. {default}",
                ),
                io.Int.Input("steps", default=0, min=0, max=1000, tooltip=f"Solver steps, up to 1000. {default}"),
                io.Float.Input(
                    "guidance_scale",
                    default=0.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    display_mode=io.NumberDisplay.slider,
                    tooltip=f"Classifier-free guidance, 1 to 30; 1 turns it off. {default}",
                ),
                io.Image.Input(
                    "start_image", optional=True, tooltip="First frame, for models that begin with an image."
                ),
                io.Image.Input(
                    "end_image", optional=True, tooltip="Last frame, for models that can end with an image."
                ),
                *train_widgets.inputs(INTERVAL, optional=True),
            ],
            outputs=[
                io.Image.Output("images", display_name="images", tooltip="The frames."),
                io.Float.Output("fps", display_name="fps", tooltip="Frames a second the model was made for."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        video_model: LoadedModel,
        prompt: str,
        negative: str,
        seed: int,
        width: int,
        height: int,
        frames: int,
        steps: int,
        guidance_scale: float,
        start_image: Tensor | None = None,
        end_image: Tensor | None = None,
        guidance_interval: str = "",
    ) -> io.NodeOutput:
        model = video_model.model
        steps = steps or model.spec.steps
        progress, calls = Progress(steps + 3, cls.hidden.unique_id), []  # text, the denoiser's arrival, steps, decode

        def tick(phase: str) -> None:
            step = calls.count("rollout")
            progress.show(len(calls), text=f"solver step {step} of {steps}" if phase == "rollout" and step else phase)
            calls.append(phase)

        with engine(), progress, placed(model, tick) as placing, applied(model, video_model.uses):
            clip = sample_prompt(
                model,
                prompt,
                seed,
                negative_prompt=negative,
                width=width,
                height=height,
                frames=frames,
                steps=steps,
                guidance_scale=guidance_scale,
                **train_widgets.given(INTERVAL, {"guidance_interval": guidance_interval}),
                start_image=to_still(start_image),
                end_image=to_still(end_image),
                tick=placing,
            )
        frames, height, width = clip.shape[2:]
        progress.show(steps + 3, text=f"{width}x{height}, {frames} frames")
        return io.NodeOutput(to_images(clip), float(model.spec.fps))
