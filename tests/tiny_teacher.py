"""A random tiny Qwen3-VL checkpoint, of the real classes, for tests."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from vlmteacher.microworld.facts import STYLE
from vlmteacher.microworld.tokenizer import build_tokenizer
from vlmteacher.queries import ANSWER_INSTRUCTION

CORPUS = (
    STYLE.query_instruction,
    ANSWER_INSTRUCTION,
    "<0.1 seconds> user assistant Yes No Is the red ball on the square?",
)
VIDEO_PROCESSOR = {
    "size": {"shortest_edge": 1024, "longest_edge": 25165824},
    "patch_size": 8,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


def tiny_qwen3_vl(path: str | os.PathLike[str], corpus: Iterable[str] = CORPUS, seed: int = 0) -> Path:
    """Write the checkpoint (config, weights, tokenizer with chat template, video processor) to `path`; returns it.

    A corpus without the word "Yes" gives a tokenizer that spells it in several tokens.
    """
    path = Path(path)
    tokenizer = build_tokenizer(list(corpus) * 2, vocab_size=420)
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 8,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
        # The stock initialisation (0.02) is all but constant at this size: losses and gradients would say nothing.
        for weight in model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "video_preprocessor_config.json").write_text(json.dumps(VIDEO_PROCESSOR))
    return path
