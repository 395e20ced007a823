"""A small tokenizer with Qwen3-VL's special tokens and chat template, for the packaged Teacher and for tests."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vlmteacher.errors import InputError
from vlmteacher.microworld import world
from vlmteacher.microworld.questions import texts

# The pad token comes first: its id is 0.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# Qwen's own split: words with their leading space, single digits, runs of punctuation.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.content is string -%}"
    "{{- message.content -}}"
    "{%- else -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part.type == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
    "{%- else -%}{{- part.text -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def kept_tokenizer(folder: Path, corpus: Callable[[], Iterable[str]], vocab_size: int) -> PreTrainedTokenizerFast:
    """Load the tokenizer in `folder`; build it from the corpus first where there is none, for resumed training."""
    if not folder.exists():
        build_tokenizer(corpus(), vocab_size).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def check_words(tokenizer: PreTrainedTokenizerFast, families: Sequence[str]) -> None:
    """Raise InputError unless every word of the families' prompts and questions is one token.

    The packaged Teacher knows no other words, and training finds a thing's name by its token.
    """
    vocabulary, rng = tokenizer.get_vocab(), np.random.default_rng(0)
    for family in families:
        scenes = [world.sample_scene(rng, family, split) for split in ("train", "ood")]
        words = {word for scene in scenes for text in texts(scene) for word in re.findall(r"\w+", text)}
        if unknown := sorted(word for word in words if not {word, f"Ġ{word}"} & vocabulary.keys()):
            raise InputError(
                f"family {family}: the Teacher does not know the words {', '.join(unknown)}: train the pair again with"
                " this family (python -m recipes.microworld)"
            )


def build_tokenizer(corpus: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on `corpus`; pad is `<|endoftext|>` (id 0), end of answer is `<|im_end|>`.

    vocab_size: the most entries, special tokens and the 256 bytes included (so at least 263; fewer merges in the corpus
    give fewer). `save_pretrained(directory)` writes what `AutoTokenizer.from_pretrained` reads back unchanged.
    """
    smallest = len(SPECIAL_TOKENS) + len(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < smallest:
        raise ValueError(f"vocab_size {vocab_size} is too small: the bytes and special tokens alone are {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|endoftext|>", "<|im_end|>")],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
