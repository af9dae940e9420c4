"""The word-level tokenizer of the tiny world: one token per word, then an end token."""

import json
from pathlib import Path

from . import world

PAD, END, UNKNOWN, START = "<pad>", "</s>", "<unk>", "<s>"
PAD_ID, END_ID, UNKNOWN_ID, START_ID = range(4)
VOCAB_SIZE = 32
CLASS = "PreTrainedTokenizerFast"


def vocabulary() -> dict[str, int]:
    """The ids of the special tokens and of the world's 18 words."""
    words = ("a", "moves", "on", "background", *world.SHAPES, *world.DIRECTIONS, *world.BACKGROUNDS)
    return {word: index for index, word in enumerate((PAD, END, UNKNOWN, START, *words))}


def create(max_length: int, *, clip: bool = False):
    """Create the tokenizer.

    Args:
        max_length: tokens, the model's text length.
        clip: also write a start token, as CLIP text models expect.

    Returns:
        A `PreTrainedTokenizerFast` that `AutoTokenizer` loads back from its folder.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(vocabulary(), unk_token=UNKNOWN))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}" if clip else f"$A {END}",
        special_tokens=[(START, START_ID), (END, END_ID)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=max_length,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        bos_token=START if clip else None,
    )


def save(words, folder: Path) -> None:
    """Write a tokenizer under the class name that transformers 4 and 5 both know."""
    words.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": CLASS}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
