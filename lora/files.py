"""LoRA files as the rest of the pack uses them: read, resolved against a model, written."""

from .match import match
from .read import read_lora
from .weights import LoraFile, LoraModule, MatchedLora, Offset
from .write import write_lora

__all__ = ["LoraFile", "LoraModule", "MatchedLora", "Offset", "match", "read_lora", "write_lora"]
