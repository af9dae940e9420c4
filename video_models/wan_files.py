"""Loading Wan2.1 from a diffusers folder, or from the folder its publisher (or VideoX-Fun's) ships."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import wan_encoder_keys, wan_keys
from .files import WeightFileError, find_weights, fingerprint, load_weights, parameter_count, read_json, read_weights
from .protocol import ModelSpec
from .wan import TEXT_TOKENS, WanModel

LAYOUTS = (
    "model_index.json of a diffusers WanPipeline or WanImageToVideoPipeline",
    "Wan's own config.json, diffusion_pytorch_model.safetensors and Wan2.1_VAE.pth",
)
"""What :func:`detect` looks for, for messages."""

PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
VAE_FILE = "Wan2.1_VAE"
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16"
IMAGE_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14"
TOKENIZERS = ("google/umt5-xxl", "umt5-xxl", "tokenizer")
OPTIONS_FILE = "reward_lora.json"

FLOAT32_BELOW = 200_000_000
"""``auto`` gives a network with fewer parameters float32, a larger one bfloat16 as the publisher runs it."""

# What diffusers keeps in float32 too: WanTransformer3DModel._keep_in_fp32_modules.
FLOAT32_PARTS = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
SKIPPED = (r"\.position_ids$", r"^visual_projection\.")
DEFAULT_SHIFT = 5.0


def detect(folder: Path) -> bool:
    """Whether a folder holds a Wan model in one of the two layouts."""
    if (folder / "model_index.json").is_file():
        return read_json(folder / "model_index.json").get("_class_name") in PIPELINES
    return (folder / "config.json").is_file() and find_weights(folder, VAE_FILE) is not None


def load(
    folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", text: bool = True
) -> WanModel:
    """Load what :func:`detect` recognised.

    A file ``reward_lora.json`` in the folder may override the model's defaults: ``name``, ``width``,
    ``height``, ``frames``, ``steps``, ``guidance_scale``, ``fps``, ``lora_targets``, ``shift`` and ``text_tokens``.

    Args:
        folder: The model's folder.
        dtype: Of every network. None chooses float32 for small networks and the VAE, else bfloat16.
        device: Where the networks go; the CLIP image encoder is loaded to the CPU at the first image.
        text: Whether to load the text encoder and its tokenizer.

    Raises:
        WeightFileError: A file is missing, damaged, or of another model.
    """
    parts = _diffusers_parts(folder) if (folder / "model_index.json").is_file() else _original_parts(folder)
    options = _read_options(folder)
    transformer = parts.transformer(dtype, device)
    vae = parts.vae(dtype or torch.float32, device)
    text_encoder = tokenizer = None
    text_fingerprint = ""
    if text:
        text_encoder = parts.text_encoder(dtype, device)
        tokenizer = _load_tokenizer(parts.tokenizer)
    if parts.text_files:
        text_fingerprint = f"{fingerprint(parts.text_files)}:{dtype or 'auto'}"
    shift, text_tokens = options.pop("shift", parts.shift), options.pop("text_tokens", TEXT_TOKENS)
    spec = dataclasses.replace(_spec(folder.resolve().name, transformer, vae), **options)
    image_encoder = None if parts.image_encoder is None else lambda: parts.image_encoder(dtype, "cpu")
    return WanModel(
        spec, transformer, vae, text_encoder, tokenizer, image_encoder, shift, text_tokens, text_fingerprint
    )


Loader = Callable[[torch.dtype | None, torch.device | str], nn.Module]


@dataclasses.dataclass(frozen=True)
class _Parts:
    """How to load each part of a model; the same for both layouts."""

    transformer: Loader
    vae: Loader
    text_encoder: Loader
    image_encoder: Loader | None
    tokenizer: Path
    text_files: tuple[Path, ...]
    shift: float


def _diffusers_parts(folder: Path) -> _Parts:
    index = read_json(folder / "model_index.json")
    if (index.get("transformer_2") or [None])[0] is not None or index.get("boundary_ratio") is not None:
        raise WeightFileError(f"{folder} is a Wan2.2 model with two experts; supported are models with one transformer")
    if index.get("expand_timesteps"):
        raise WeightFileError(f"{folder} is a Wan2.2 TI2V model; supported are Wan2.1 models")

    def component(name: str, stem: str, build: Callable, **options: Any) -> Loader:
        def loader(dtype: torch.dtype | None, device: torch.device | str) -> nn.Module:
            path = find_weights(folder / name, stem)
            if path is None:
                raise WeightFileError(f"{folder / name} has no {stem}.safetensors; download the model again")
            config = read_json(folder / name / "config.json")
            return _build(build, config, read_weights(path), path, dtype, device, **options)

        return loader

    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    shift = scheduler.get("flow_shift", scheduler.get("shift", DEFAULT_SHIFT))
    image = (folder / "image_encoder").is_dir()
    text = find_weights(folder / "text_encoder", "model")
    return _Parts(
        transformer=component("transformer", "diffusion_pytorch_model", _build_transformer, keep=FLOAT32_PARTS),
        vae=component("vae", "diffusion_pytorch_model", _build_vae),
        text_encoder=component("text_encoder", "model", _build_umt5),
        image_encoder=component("image_encoder", "model", _build_clip) if image else None,
        tokenizer=folder / "tokenizer",
        text_files=() if text is None else _text_files(text, folder / "tokenizer"),
        shift=float(shift),
    )


def _original_parts(folder: Path) -> _Parts:
    config = read_json(folder / "config.json")

    def component(stem: str, build: Callable, read_config: Callable, convert: Callable, **options: Any) -> Loader:
        def loader(dtype: torch.dtype | None, device: torch.device | str) -> nn.Module:
            path = find_weights(folder, stem)
            if path is None:
                raise WeightFileError(f"{folder} has no {stem}.pth or .safetensors; download the model again")
            tensors = read_weights(path)
            try:
                arguments = read_config(tensors)
            except ValueError as error:
                raise WeightFileError(f"{path} cannot be used: {error}") from None
            return _build(build, arguments, convert(tensors), path, dtype, device, **options)

        return loader

    tokenizer = next((folder / name for name in TOKENIZERS if (folder / name).is_dir()), folder / TOKENIZERS[0])
    text = find_weights(folder, TEXT_FILE)
    image = find_weights(folder, IMAGE_FILE)
    return _Parts(
        transformer=component(
            "diffusion_pytorch_model",
            _build_transformer,
            lambda tensors: wan_keys.transformer_config(tensors, config),
            wan_keys.convert_transformer,
            keep=FLOAT32_PARTS,
        ),
        vae=component(VAE_FILE, _build_vae, wan_keys.vae_config, wan_keys.convert_vae),
        text_encoder=component(TEXT_FILE, _build_umt5, wan_encoder_keys.umt5_config, wan_encoder_keys.convert_umt5),
        image_encoder=None
        if image is None
        else component(IMAGE_FILE, _build_clip, wan_encoder_keys.clip_config, wan_encoder_keys.convert_clip),
        tokenizer=tokenizer,
        text_files=() if text is None else _text_files(text, tokenizer),
        shift=DEFAULT_SHIFT,
    )


def _build(
    build: Callable[[Mapping[str, Any]], nn.Module],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    path: Path,
    dtype: torch.dtype | None,
    device: torch.device | str,
    keep: tuple[str, ...] = (),
) -> nn.Module:
    if dtype is None:
        dtype = torch.float32 if parameter_count(tensors) < FLOAT32_BELOW else torch.bfloat16
    try:
        with torch.device("meta"):
            module = build(config)
    except (TypeError, ValueError, KeyError, RuntimeError, ZeroDivisionError) as error:
        raise WeightFileError(f"the config for {path} cannot be used ({error}); download it again") from None
    if dtype == torch.float16 and build is _build_umt5:
        keep = ("wo",)  # its values overflow float16, as transformers notes
    load_weights(module, _fit_names(tensors, module), path, dtype=dtype, device=device, keep_float32=keep)
    if build is _build_umt5:
        module.encoder.embed_tokens.weight = module.shared.weight  # one tensor, or moving would double it
    return module.eval().requires_grad_(False)


def _fit_names(tensors: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Follow transformers' releases: with or without ``vision_model.``, tied weights once or twice."""
    expected = module.state_dict().keys()
    fitted = dict(tensors)
    prefix = "vision_model."
    wanted = any(name.startswith(prefix) for name in expected)
    if any(name.startswith(prefix) for name in fitted) and not wanted:
        fitted = {name.removeprefix(prefix): tensor for name, tensor in fitted.items()}
    elif wanted and not any(name.startswith(prefix) for name in fitted):
        fitted = {prefix + name: tensor for name, tensor in fitted.items()}
    tied, source = "encoder.embed_tokens.weight", "shared.weight"
    if tied in expected and source in expected:
        one = fitted.get(source, fitted.get(tied))
        if one is not None:
            fitted[tied] = fitted[source] = one
    # What the library itself skips, position numbers (computed by every release), and CLIP's projection.
    skipped = (*(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()), *SKIPPED)
    return {
        name: tensor
        for name, tensor in fitted.items()
        if name in expected or not any(re.search(pattern, name) for pattern in skipped)
    }


def _build_transformer(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import WanTransformer3DModel

    module = WanTransformer3DModel.from_config(dict(config))
    used = module.config
    with torch.device("cpu"):  # its tables are computed, not loaded
        module.rope = type(module.rope)(used.attention_head_dim, used.patch_size, used.rope_max_seq_len)
    return module


def _build_vae(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_config(dict(config))


def _build_umt5(config: Mapping[str, Any]) -> nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config.from_dict(dict(config)))


def _build_clip(config: Mapping[str, Any]) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    module = CLIPVisionModel(CLIPVisionConfig.from_dict(dict(config)))
    embeddings = getattr(module, "vision_model", module).embeddings
    with torch.device("cpu"):
        embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings)[None]
    return module


def _text_files(weights: Path, tokenizer: Path) -> tuple[Path, ...]:
    shards = sorted(weights.parent.glob("*.safetensors")) if weights.name.endswith(".index.json") else []
    vocabulary = [path for path in sorted(tokenizer.glob("*")) if path.suffix in (".json", ".model", ".txt")]
    return (weights, *shards, *vocabulary)


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise WeightFileError(f"the tokenizer's folder {folder} is missing; download it with the model")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever its many parsers raise
        raise WeightFileError(f"the tokenizer in {folder} cannot be read ({error}); download it again") from None


def _read_options(folder: Path) -> dict[str, Any]:
    path = folder / OPTIONS_FILE
    if not path.is_file():
        return {}
    options = read_json(path)
    kinds = {
        "name": str,
        "lora_targets": list,
        "guidance_scale": (int, float),
        "shift": (int, float),
        **dict.fromkeys(("width", "height", "frames", "steps", "fps", "text_tokens"), int),
    }
    for key, value in options.items():
        if key not in kinds:
            raise WeightFileError(f"{path}: unknown option {key}; allowed are {', '.join(sorted(kinds))}")
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise WeightFileError(f"{path}: {key} has the wrong type, got {value!r}")
    if "lora_targets" in options:
        options["lora_targets"] = tuple(options["lora_targets"])
    return options


def _spec(name: str, transformer: nn.Module, vae: nn.Module) -> ModelSpec:
    spatial = 2 ** (len(vae.config.dim_mult) - 1) * (vae.config.patch_size or 1)
    return ModelSpec(
        family="wan",
        name=name,
        latent_channels=vae.config.z_dim,
        temporal_stride=2 ** sum(vae.config.temperal_downsample),
        spatial_stride=spatial,
        size_multiple=spatial * transformer.config.patch_size[1],
        image_to_video=transformer.config.in_channels != transformer.config.out_channels,
        lora_targets=("all-linear",),  # as VideoX-Fun trains its reward LoRAs
        width=832,
        height=480,
        frames=81,
        steps=50,
        guidance_scale=6.0,
        fps=16,
    )
