"""The published base models: where they lie on the Hugging Face Hub, what of them is read, and what they need."""

from __future__ import annotations

from dataclasses import dataclass

DIFFUSERS_FILES = (
    "model_index.json",
    "scheduler/*.json",
    "tokenizer*/*",
    *(f"{part}/*.json" for part in ("transformer*", "text_encoder*", "vae", "image_encoder")),
    *(f"{part}/*.safetensors*" for part in ("transformer*", "text_encoder*", "vae", "image_encoder")),
)
"""Patterns of the files a diffusers folder is loaded from."""

WAN_FILES = (
    "config.json",
    "diffusion_pytorch_model*",
    *(f"{expert}_noise_model/*" for expert in ("high", "low")),
    "models_t5_umt5-xxl-enc-bf16.*",
    "models_clip_*",
    "Wan2.*_VAE.*",
    "google/umt5-xxl/*",
)
"""Patterns of the files Wan's own folder is loaded from."""

MODELSCOPE_FILES = (
    "model_index.json",
    "scheduler/*.json",
    "tokenizer/*",
    "*/config.json",
    *(f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")),
    "text_encoder/model.safetensors",
    "text2video_pytorch_model.pth",
    "VQGAN_autoencoder.pth",
    "open_clip_pytorch_model.bin",
)
"""Patterns of the files ModelScope's two folders are loaded from; the same weights lie there in other formats too."""

OPENSORA_FILES = ("*.json", "*.safetensors", "*.bin", "spiece.model")
"""Patterns of the files that Open-Sora's denoiser, its VAE and T5 are loaded from."""


@dataclass(frozen=True)
class BaseModel:
    """One published model.

    Attributes:
        repository: On the Hugging Face Hub.
        family: Under what it is listed.
        disk: Gigabytes of its files, about.
        memory: Gigabytes of its largest network in 16 bits: what the GPU must hold at least while it works.
        files: Patterns of the files that are read, and so downloaded.
        licence: Of the weights.
        parts: Further repositories it needs, each in a folder of its own name within the model's; of them the files
            of the same patterns are read.
    """

    repository: str
    family: str
    disk: int
    memory: int
    files: tuple[str, ...] = DIFFUSERS_FILES
    licence: str = "Apache-2.0"
    parts: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        return f"https://huggingface.co/{self.repository}"


def _wan(owner: str, name: str, disk: int, memory: int) -> tuple[str, BaseModel]:
    files = DIFFUSERS_FILES if name.endswith("-Diffusers") else WAN_FILES
    return name, BaseModel(f"{owner}/{name}", name[:6], disk, memory, files)


def _cog(owner: str, name: str, disk: int) -> tuple[str, BaseModel]:
    small = "2b" in name
    licence = "Apache-2.0" if small else "CogVideoX LICENSE (free for research; register for commercial use)"
    return name, BaseModel(f"{owner}/{name}", "CogVideoX", disk, 10 if small else 12, licence=licence)


def _easy(name: str, disk: int) -> tuple[str, BaseModel]:
    return name, BaseModel(f"alibaba-pai/{name}", "EasyAnimate", disk, 24 if "12b" in name else 15)


def _modelscope(name: str, disk: int) -> tuple[str, BaseModel]:
    return name, BaseModel(f"ali-vilab/{name}", "ModelScope", disk, 3, MODELSCOPE_FILES, "CC-BY-NC-4.0")


BASE_MODELS: dict[str, BaseModel] = dict(
    [
        _wan("alibaba-pai", "Wan2.1-Fun-1.3B-InP", 19, 12),
        _wan("alibaba-pai", "Wan2.1-Fun-14B-InP", 47, 33),
        _wan("alibaba-pai", "Wan2.1-Fun-V1.1-1.3B-InP", 19, 12),
        _wan("alibaba-pai", "Wan2.1-Fun-V1.1-14B-InP", 47, 33),
        _wan("Wan-AI", "Wan2.1-T2V-1.3B", 18, 12),
        _wan("Wan-AI", "Wan2.1-T2V-14B", 69, 29),
        _wan("Wan-AI", "Wan2.1-I2V-14B-480P", 82, 33),
        _wan("Wan-AI", "Wan2.1-I2V-14B-720P", 82, 33),
        _wan("Wan-AI", "Wan2.1-T2V-1.3B-Diffusers", 29, 12),
        _wan("Wan-AI", "Wan2.1-T2V-14B-Diffusers", 80, 29),
        _wan("Wan-AI", "Wan2.1-I2V-14B-480P-Diffusers", 91, 33),
        _wan("Wan-AI", "Wan2.1-I2V-14B-720P-Diffusers", 91, 33),
        _wan("alibaba-pai", "Wan2.2-Fun-A14B-InP", 64, 29),
        _wan("Wan-AI", "Wan2.2-T2V-A14B", 126, 29),
        _wan("Wan-AI", "Wan2.2-I2V-A14B", 126, 29),
        _wan("Wan-AI", "Wan2.2-TI2V-5B", 34, 12),
        _wan("Wan-AI", "Wan2.2-T2V-A14B-Diffusers", 126, 29),
        _wan("Wan-AI", "Wan2.2-I2V-A14B-Diffusers", 126, 29),
        _wan("Wan-AI", "Wan2.2-TI2V-5B-Diffusers", 34, 12),
        _cog("alibaba-pai", "CogVideoX-Fun-V1.1-2b-InP", 14),
        _cog("alibaba-pai", "CogVideoX-Fun-V1.1-5b-InP", 22),
        _cog("zai-org", "CogVideoX-2b", 14),
        _cog("zai-org", "CogVideoX-5b", 22),
        _cog("zai-org", "CogVideoX-5b-I2V", 22),
        _easy("EasyAnimateV5-7b-zh-InP", 22),
        _easy("EasyAnimateV5-12b-zh-InP", 34),
        _easy("EasyAnimateV5.1-7b-zh-InP", 30),
        _easy("EasyAnimateV5.1-12b-zh-InP", 39),
        _easy("EasyAnimateV5.1-7b-zh", 30),
        _easy("EasyAnimateV5.1-12b-zh", 39),
        _easy("EasyAnimateV5.1-7b-zh-diffusers", 30),
        _easy("EasyAnimateV5.1-12b-zh-diffusers", 39),
        _easy("EasyAnimateV5.1-12b-zh-InP-diffusers", 39),
        _modelscope("text-to-video-ms-1.7b", 8),
        _modelscope("modelscope-damo-text-to-video-synthesis", 15),
        (
            "VideoCrafter2",
            BaseModel(
                "VideoCrafter/VideoCrafter2", "VideoCrafter", 7, 3, ("model.ckpt",), "research only, by its README"
            ),
        ),
        (
            "OpenSora-STDiT-v3",
            BaseModel(
                "hpcai-tech/OpenSora-STDiT-v3",
                "Open-Sora",
                26,
                10,
                OPENSORA_FILES,
                parts=("hpcai-tech/OpenSora-VAE-v1.2", "DeepFloyd/t5-v1_1-xxl"),
            ),
        ),
    ]
)
"""By the name of their folder."""
