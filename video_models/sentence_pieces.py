"""T5's tokenizers straight from their SentencePiece models, answering as transformers' own.

transformers reads such a model through protobuf, which neither it nor ComfyUI brings along.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch


class SentencePiece:
    """A tokenizer whose texts end with the end mark, as T5's, mT5's and UMT5's do.

    Args:
        model: Content of a SentencePiece model file.

    Raises:
        RuntimeError: The content is none.
    """

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.pad_token_id = max(0, self._processor.pad_id())

    def __call__(
        self, text: str, *, max_length: int, truncation: bool = False, padding: str | bool = False,
        return_tensors: str = "",
    ) -> Any:  # fmt: skip
        """``input_ids`` of one text, as transformers' tokenizers give them.

        Args:
            text: What to tokenize.
            max_length: In tokens, the end mark among them.
            truncation: Whether to cut to that length.
            padding: ``max_length`` fills up to it.
            return_tensors: ``pt`` gives ``[1, L]`` instead of a list.
        """
        ids = self._processor.encode(text)
        ids = [*(ids[: max_length - 1] if truncation else ids), self._processor.eos_id()]
        if padding == "max_length":
            ids += [self.pad_token_id] * (max_length - len(ids))
        return SimpleNamespace(input_ids=torch.tensor([ids]) if return_tensors == "pt" else ids)
