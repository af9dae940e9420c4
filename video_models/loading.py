"""What the families' loaders share: parts of a model from disk to a module, on any layout.

A part is a :data:`Loader`, made by :func:`component` from a folder, a file's stem, and a function that builds the
network from its configuration. The publisher's own files need two functions more: the configuration read off the
tensors' shapes, and the names in our classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import WeightFileError, find_weights, load_weights, parameter_count, read_json, read_weights
from .sentence_pieces import SentencePiece

Build = Callable[[Mapping[str, Any]], nn.Module]
"""From a configuration to a network, called under ``torch.device("meta")``."""

Loader = Callable[["torch.dtype | None", "torch.device | str"], nn.Module]
"""Loads one part of a model, frozen and in eval mode; dtype None chooses by size."""


@dataclass(frozen=True)
class ModelFiles:
    """A Wan model as single files, as ComfyUI keeps them.

    Attributes:
        diffusion: Of ``models/diffusion_models``: the network, or with two experts the one for high noise.
        text: Of ``models/text_encoders``: UMT5 with its tokenizer inside (``spiece_model``).
        vae: Of ``models/vae``.
        diffusion_low: The expert for low noise, of a model with two.
        clip_vision: Of ``models/clip_vision``, for Wan2.1 image-to-video.
    """

    diffusion: Path
    text: Path
    vae: Path
    diffusion_low: Path | None = None
    clip_vision: Path | None = None


OPTIONS_FILE = "reward_lora.json"

FLOAT32_BELOW = 200_000_000
"""``auto`` gives a network with fewer parameters float32, a larger one bfloat16 as the publishers run theirs."""

SKIPPED = (r"\.position_ids$", r"^visual_projection\.")
"""Names in published files that no class needs: position numbers, and CLIP's projection."""


def component(
    folder: Path,
    stem: str,
    build: Build,
    *,
    read_config: Callable[[Mapping[str, Tensor]], Mapping[str, Any]] | None = None,
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    keep_float32: tuple[str, ...] = (),
) -> Loader:
    """How to load one part.

    Args:
        folder: Where its weights lie.
        stem: Name of the weights without ending: sharded or single safetensors, or ``.pth``.
        build: Makes the network.
        read_config: The configuration by the tensors; None reads ``config.json`` of the folder.
        convert: From the file's names (and shapes) to our class's; None if they are the same.
        keep_float32: Parts of names that stay float32 when the network has 16 bits.
    """

    def load(dtype: torch.dtype | None, device: torch.device | str) -> nn.Module:
        path = find_weights(folder, stem)
        if path is None:
            raise WeightFileError(f"{folder} has no {stem}.pth or .safetensors; download the model again")
        tensors = read_weights(path)
        try:
            config = read_json(folder / "config.json") if read_config is None else read_config(tensors)
        except WeightFileError:
            raise
        except ValueError as error:
            raise WeightFileError(f"{path} cannot be used: {error}") from None
        return materialise(build, config, convert(tensors) if convert else tensors, path, dtype, device, keep_float32)

    return load


def materialise(
    build: Build,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    source: Path,
    dtype: torch.dtype | None,
    device: torch.device | str,
    keep_float32: tuple[str, ...] = (),
) -> nn.Module:
    """A frozen network from its configuration and tensors, each tensor converted once and never copied twice.

    Raises:
        WeightFileError: The configuration cannot be built, or the tensors are not this network's.
    """
    if dtype is None:
        dtype = torch.float32 if parameter_count(tensors) < FLOAT32_BELOW else torch.bfloat16
    try:
        with torch.device("meta"):
            module = build(config)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # the libraries check configurations with errors of many kinds
        reason = " ".join(str(error).split())
        raise WeightFileError(f"the config for {source} cannot be used ({reason}); download it again") from None
    if dtype == torch.float16 and hasattr(module, "shared"):
        keep_float32 = (*keep_float32, "wo")  # T5's values overflow float16, as transformers notes
    load_weights(module, fit_names(tensors, module), source, dtype=dtype, device=device, keep_float32=keep_float32)
    if hasattr(module, "shared"):
        module.encoder.embed_tokens.weight = module.shared.weight  # one tensor, or moving would double it
    return module.eval().requires_grad_(False)


def fit_names(tensors: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Follow transformers' releases: with or without ``vision_model.``, ``text_model.``; tied weights once or twice."""
    expected = module.state_dict().keys()
    fitted = dict(tensors)
    for prefix in ("vision_model.", "text_model."):
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
    skipped = (*(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()), *SKIPPED)
    return {
        name: tensor
        for name, tensor in fitted.items()
        if name in expected or not any(re.search(pattern, name) for pattern in skipped)
    }


def diffusers(class_name: str) -> Build:
    """A builder for one of diffusers' classes."""

    def build(config: Mapping[str, Any]) -> nn.Module:
        import diffusers

        return getattr(diffusers, class_name).from_config(dict(config))

    return build


def build_t5(config: Mapping[str, Any]) -> nn.Module:
    """The encoder of T5, mT5 or UMT5, by ``model_type``."""
    import transformers

    kinds = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}
    kind = kinds.get(config.get("model_type", "umt5"))
    if kind is None:
        raise ValueError(f"model_type must be one of {', '.join(kinds)}, got {config['model_type']!r}")
    return getattr(transformers, f"{kind}EncoderModel")(getattr(transformers, f"{kind}Config").from_dict(dict(config)))


def build_clip_vision(config: Mapping[str, Any]) -> nn.Module:
    """transformers' ``CLIPVisionModel``."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    module = CLIPVisionModel(CLIPVisionConfig.from_dict(dict(config)))
    embeddings = getattr(module, "vision_model", module).embeddings
    with torch.device("cpu"):
        embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings)[None]
    return module


def build_clip_text(config: Mapping[str, Any]) -> nn.Module:
    """transformers' ``CLIPTextModel``."""
    from transformers import CLIPTextConfig, CLIPTextModel

    module = CLIPTextModel(CLIPTextConfig.from_dict(dict(config)))
    embeddings = getattr(module, "text_model", module).embeddings
    with torch.device("cpu"):  # numbers that no file holds
        embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings)[None]
    return module


def text_files(weights: Path | None, tokenizer: Path) -> tuple[Path, ...]:
    """Every file that decides what a text encoder answers: its weights, their shards, and the vocabulary."""
    if weights is None:
        return ()
    kind = weights.name.removesuffix(".index.json").rpartition(".")[2]
    shards = sorted(weights.parent.glob(f"*.{kind}")) if weights.name.endswith(".index.json") else []
    vocabulary = [path for path in sorted(tokenizer.glob("*")) if path.suffix in (".json", ".model", ".txt")]
    return (weights, *shards, *vocabulary)


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer in a folder, or one like it; never asks the hub."""
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise WeightFileError(f"the tokenizer's folder {folder} is missing; download it with the model")
    pieces = folder / "spiece.model"
    try:
        if pieces.is_file() and not (folder / "tokenizer.json").is_file():
            return SentencePiece(pieces.read_bytes())
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever its many parsers raise
        raise WeightFileError(f"the tokenizer in {folder} cannot be read ({error}); download it again") from None


def open_clip_tokenizer(tokens: int) -> Callable[[list[str]], Tensor]:
    """OpenCLIP's tokenizer, which comes with its package: from prompts to ``[N, tokens]``, zero-padded."""
    try:
        import open_clip
    except ImportError:
        raise WeightFileError(
            "the tokenizer of OpenCLIP's text encoder comes with the package open_clip_torch; "
            "pip install open_clip_torch"
        ) from None
    return open_clip.SimpleTokenizer(context_length=tokens)


def read_options(folder: Path, **more: Any) -> dict[str, Any]:
    """What ``reward_lora.json`` of a model's folder overrides: defaults of its ``ModelSpec``.

    Args:
        folder: The model's folder.
        more: Further options of the family, with their types.
    """
    path = folder / OPTIONS_FILE
    if not path.is_file():
        return {}
    options = read_json(path)
    kinds = {
        "name": str,
        "recipe": str,
        "lora_targets": list,
        "guidance_scale": (int, float),
        **dict.fromkeys(("width", "height", "frames", "steps", "fps"), int),
        **more,
    }
    for key, value in options.items():
        if key not in kinds:
            raise WeightFileError(f"{path}: unknown option {key}; allowed are {', '.join(sorted(kinds))}")
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise WeightFileError(f"{path}: {key} has the wrong type, got {value!r}")
    if "lora_targets" in options:
        options["lora_targets"] = tuple(options["lora_targets"])
    return options
