"""EasyAnimate's text encoders: Bert and T5 (V5), or Qwen2-VL (V5.1), encoding as ``pipeline_easyanimate_inpaint.py``.

The transformer looks at padding as at any token, so every prompt has the same number of tokens, and what the
encoders make of padding matters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_TOKENS = 256
"""Of any tokenizer; less if its own ``model_max_length`` is less (Bert: 77)."""


def encode_padded(encoder: nn.Module, tokenizer: Any, prompt: str, tokens: int) -> Tensor:
    """``[tokens, D]`` of Bert or T5, which see the padding too: the publisher gives V5's encoders no mask."""
    ids = tokenizer(prompt, padding="max_length", max_length=tokens, truncation=True, return_tensors="pt").input_ids
    return encoder(ids.to(next(encoder.parameters()).device))[0][0]


def encode_chat(encoder: nn.Module, tokenizer: Any, prompt: str, tokens: int) -> Tensor:
    """``[tokens, D]`` of Qwen2-VL's last layer but one, for the prompt as a chat's first message."""
    message = {"role": "user", "content": [{"type": "text", "text": prompt}]}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(
        text, padding="max_length", max_length=tokens, truncation=True, padding_side="right", return_tensors="pt"
    ).to(next(encoder.parameters()).device)
    mask = inputs.attention_mask
    # transformers 4.46, with which V5.1 was trained, puts all padding at position 1; newer releases go on counting.
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    output = encoder(
        input_ids=inputs.input_ids,
        attention_mask=mask,
        position_ids=positions.expand(3, -1, -1),
        use_cache=False,
        output_hidden_states=True,
    )
    return output.hidden_states[-2][0]


def pack(parts: Sequence[Tensor]) -> Tensor:
    """Several encoders' ``[L_i, D_i]`` as one ``[sum L, max D]``, the narrower ones zero-padded."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, width - part.shape[1])) for part in parts])


def unpack(packed: Tensor, tokens: Sequence[int], widths: Sequence[int]) -> list[Tensor]:
    """What :func:`pack` joined, from ``[..., sum L, max D]``.

    Raises:
        ValueError: The tensor has another number of tokens or channels.
    """
    if packed.shape[-2:] != (sum(tokens), max(widths)):
        raise ValueError(f"a text embedding must be {sum(tokens)}x{max(widths)}, got {list(packed.shape[-2:])}")
    return [part[..., :width] for part, width in zip(packed.split(list(tokens), -2), widths, strict=True)]


def build_bert(config: Mapping[str, Any]) -> nn.Module:
    """transformers' ``BertModel`` without the pooler, which nobody asks."""
    from transformers import BertConfig, BertModel

    module = BertModel(BertConfig.from_dict(dict(config)), add_pooling_layer=False)
    module._keys_to_ignore_on_load_unexpected = [r"^pooler\."]
    length = module.config.max_position_embeddings
    with torch.device("cpu"):  # numbers that no file holds
        module.embeddings.position_ids = torch.arange(length)[None]
        module.embeddings.token_type_ids = torch.zeros(1, length, dtype=torch.long)
    return module


def build_qwen(config: Mapping[str, Any]) -> nn.Module:
    """The language half of transformers' Qwen2-VL; its eyes and its mouth are not needed."""
    import transformers

    # Before it had a name of its own (transformers 4.52), the text model was what is now the whole.
    kind = getattr(transformers, "Qwen2VLTextModel", transformers.Qwen2VLModel)
    whole = transformers.Qwen2VLConfig.from_dict(dict(config))
    module = kind(getattr(whole, "text_config", whole))
    with torch.device("cpu"):  # before transformers 5 the layers have tables too
        for owner in [part for part in module.modules() if hasattr(part, "rotary_emb")]:
            owner.rotary_emb = type(owner.rotary_emb)(config=module.config)
    return module


def convert_qwen(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The language half's tensors; in newer files it is called ``model.language_model``."""
    language = "model.language_model."
    prefix = language if any(name.startswith(language) for name in tensors) else "model."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
