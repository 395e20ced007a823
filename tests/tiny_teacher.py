"""Random tiny checkpoints of the Teachers' families, of the real classes, for tests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerFast

from vlmteacher.microworld.questions import STYLE
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


def _write(path: Path, config: Any, tokenizer: PreTrainedTokenizerFast, processor: dict[str, Any], seed: int) -> Path:
    """Random weights of `config`'s class, the tokenizer, the video processor's file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, config.architectures[0])(config)
        # The stock initialisation (0.02) is all but constant at this size: losses and gradients would say nothing.
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                fan_in = weight.shape[-1] if ".experts." in name else weight[0].numel()
                torch.nn.init.normal_(weight, std=fan_in**-0.5)
            else:
                weight.data.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "video_preprocessor_config.json").write_text(json.dumps(processor))
    return path


def _qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = ("image_token", "video_token", "vision_start_token", "vision_end_token")
    tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    return {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in zip(names, tokens, strict=True)}


def _tiny_qwen3(
    path: str | os.PathLike[str],
    kind: str,
    corpus: Iterable[str],
    seed: int,
    text: dict[str, Any],
    vision: dict[str, Any],
    template: Callable[[str], str] = str,
) -> Path:
    """A checkpoint of the class `kind`, whose config is of a Qwen3-VL but for the entries `text` and `vision`.

    template: changes the chat template.
    """
    tokenizer = build_tokenizer(list(corpus) * 2, vocab_size=420)
    tokenizer.chat_template = template(str(tokenizer.chat_template))
    config = getattr(transformers, f"{kind}Config")(
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
        }
        | text,
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
        }
        | vision,
        tie_word_embeddings=True,
        architectures=[f"{kind}ForConditionalGeneration"],
        **_qwen_ids(tokenizer),
    )
    return _write(Path(path), config, tokenizer, VIDEO_PROCESSOR, seed)


def tiny_qwen3_vl(
    path: str | os.PathLike[str],
    corpus: Iterable[str] = CORPUS,
    seed: int = 0,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
) -> Path:
    """Write the checkpoint (config, weights, tokenizer with chat template, video processor) to `path`; returns it.

    A corpus without the word "Yes" gives a tokenizer that spells it in several tokens. text, vision: entries of the
    config to be changed.
    """
    return _tiny_qwen3(path, "Qwen3VL", corpus, seed, text or {}, {"deepstack_visual_indexes": [0, 1]} | (vision or {}))


EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}


def tiny_qwen3_vl_moe(
    path: str | os.PathLike[str],
    corpus: Iterable[str] = CORPUS,
    seed: int = 0,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
) -> Path:
    """The same for Qwen3-VL with experts: two of four for every token."""
    deep = {"deepstack_visual_indexes": [0, 1]}
    return _tiny_qwen3(path, "Qwen3VLMoe", corpus, seed, EXPERTS | (text or {}), deep | (vision or {}))


# The norms of so few channels would amplify roundings with the published epsilon of 1e-6.
HYBRID = {
    "rms_norm_eps": 0.1,
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


def _thinking(template: str) -> str:
    """A template that opens a thought unless `enable_thinking` is false, as that of Qwen3.5."""
    begin = "'<|im_start|>assistant\\n'"
    assert begin in template
    closed = "(enable_thinking is defined and enable_thinking is false)"
    return template.replace(begin, f"{begin} + ('<think>\\n\\n</think>\\n\\n' if {closed} else '<think>\\n')")


def tiny_qwen3_5(
    path: str | os.PathLike[str],
    corpus: Iterable[str] = CORPUS,
    seed: int = 0,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
) -> Path:
    """The same for Qwen3.5: layers with the gated delta rule and with attention take turns; its template thinks."""
    return _tiny_qwen3(path, "Qwen3_5", corpus, seed, HYBRID | (text or {}), vision or {}, _thinking)


def tiny_qwen3_5_moe(
    path: str | os.PathLike[str],
    corpus: Iterable[str] = CORPUS,
    seed: int = 0,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
) -> Path:
    """The same for Qwen3.5 with experts, one of which every token passes."""
    experts = HYBRID | EXPERTS | {"shared_expert_intermediate_size": 20}
    return _tiny_qwen3(path, "Qwen3_5Moe", corpus, seed, experts | (text or {}), vision or {}, _thinking)


def tiny_qwen25_vl(
    path: str | os.PathLike[str],
    corpus: Iterable[str] = CORPUS,
    seed: int = 0,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
) -> Path:
    """The same for Qwen2.5-VL: the first of its two visual blocks attends in windows of 4x4 patches."""
    tokenizer = build_tokenizer(list(corpus) * 2, vocab_size=420)
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
        }
        | (text or {}),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 8,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": 32,
            "window_size": 32,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 4,
        }
        | (vision or {}),
        tie_word_embeddings=True,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        **_qwen_ids(tokenizer),
    )
    processor = VIDEO_PROCESSOR | {"size": {"shortest_edge": 512, "longest_edge": 4096}, "image_mean": [0.4, 0.5, 0.6]}
    return _write(Path(path), config, tokenizer, processor, seed)


INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def tiny_internvl(
    path: str | os.PathLike[str],
    corpus: Iterable[str] = CORPUS,
    seed: int = 0,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
) -> Path:
    """The same for InternVL, on a Qwen2 language model: frames of 32x32 pixels, 16 patches, 4 visual tokens each."""
    base = build_tokenizer(list(corpus) * 2, vocab_size=420)
    base.add_special_tokens({"additional_special_tokens": list(INTERNVL_TOKENS.values())})
    template = str(base.chat_template).replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\\n")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base.backend_tokenizer,
        pad_token=base.pad_token,
        eos_token=base.eos_token,
        chat_template=template.replace("<|vision_start|><|video_pad|><|vision_end|>", "<video>\\n"),
        extra_special_tokens=INTERNVL_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    config = transformers.InternVLConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 2048,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
        }
        | (text or {}),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": (32, 32),
            "patch_size": (8, 8),
        }
        | (vision or {}),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=True,
        architectures=["InternVLForConditionalGeneration"],
    )
    processor = {"size": {"height": 32, "width": 32}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}
    return _write(Path(path), config, tokenizer, processor, seed)


SMOLVLM_TEMPLATE = (  # writes what transformers' own template for videos does
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}:"
    "{% if message.content[0].type != 'image' %}{{ ' ' }}{% endif %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% elif part.type == 'image' %}<image>{% elif part.type == 'video' %}<video>{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def with_tokens(corpus: Iterable[str], tokens: Iterable[str], eos: str, template: str) -> PreTrainedTokenizerFast:
    """A tokenizer with further control tokens and a template of its own."""
    base = build_tokenizer(list(corpus) * 2, vocab_size=420)
    base.add_special_tokens({"additional_special_tokens": list(tokens)})
    return PreTrainedTokenizerFast(
        tokenizer_object=base.backend_tokenizer,
        pad_token=base.pad_token,
        eos_token=eos,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def tiny_smolvlm(
    path: str | os.PathLike[str],
    corpus: Iterable[str] = CORPUS,
    seed: int = 0,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
) -> Path:
    """The same for SmolVLM2, on a Llama: frames of 32x32 pixels, 16 patches, 4 visual tokens each."""
    tokens = ("<fake_token_around_image>", "<global-img>", "<image>", "<end_of_utterance>")
    tokenizer = with_tokens(corpus, tokens, "<end_of_utterance>", SMOLVLM_TEMPLATE)
    config = transformers.SmolVLMConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 2048,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
        }
        | (text or {}),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        }
        | (vision or {}),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=True,
        architectures=["SmolVLMForConditionalGeneration"],
    )
    edges = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32}}
    processor = edges | {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]}
    return _write(Path(path), config, tokenizer, processor, seed)


GLM_TOKENS = (
    *("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>", "<|video|>"),
    *("<think>", "</think>", "<answer>", "</answer>", "<|begin_of_box|>", "<|end_of_box|>"),
)
GLM_TEMPLATE = (  # writes what that of GLM-4.1V does: no word of thoughts
    "[gMASK]<sop>{% for message in messages %}<|{{ message.role }}|>\n{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}"
    "{% elif part.type == 'image' %}<|begin_of_image|><|image|><|end_of_image|>"
    "{% elif part.type == 'video' %}<|begin_of_video|><|video|><|end_of_video|>{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GLM_SWITCH = (  # what that of GLM-4.5V has in the place of the last line
    "{% if add_generation_prompt %}<|assistant|>\n"
    "{{ '<think></think>\\n' if enable_thinking is defined and not enable_thinking else '' }}{% endif %}"
)


def tiny_glm4v(
    path: str | os.PathLike[str],
    corpus: Iterable[str] = CORPUS,
    seed: int = 0,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    moe: bool = False,
) -> Path:
    """The same for GLM-4.1V, whose heads of 16 channels are rotated by half; moe: for GLM-4.5V."""
    tokenizer = with_tokens(corpus, GLM_TOKENS, "<|endoftext|>", GLM_TEMPLATE)
    if moe:
        tokenizer.chat_template = GLM_TEMPLATE.rpartition("{% if add")[0] + GLM_SWITCH
    names = [
        f"{kind}_{token}" for kind in ("image", "video") for token in ("token_id", "start_token_id", "end_token_id")
    ]
    tokens = ("image", "begin_of_image", "end_of_image", "video", "begin_of_video", "end_of_video")
    kind = transformers.Glm4vMoeConfig if moe else transformers.Glm4vConfig
    experts = {"moe_intermediate_size": 24, "n_routed_experts": EXPERTS["num_experts"], "num_experts_per_tok": 2}
    experts["head_dim"] = 16
    config = kind(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
                "partial_rotary_factor": 0.5,
            },
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>"]),
        }
        | (experts if moe else {})
        | (text or {}),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 8,
            "image_size": 64,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": 32,
        }
        | (vision or {}),
        tie_word_embeddings=False,
        architectures=["Glm4vMoeForConditionalGeneration" if moe else "Glm4vForConditionalGeneration"],
        **dict(zip(names, (tokenizer.convert_tokens_to_ids(f"<|{token}|>") for token in tokens), strict=True)),
    )
    processor = VIDEO_PROCESSOR | {"image_mean": [0.4, 0.5, 0.6]}
    return _write(Path(path), config, tokenizer, processor, seed)


def tiny_glm4v_moe(
    path: str | os.PathLike[str],
    corpus: Iterable[str] = CORPUS,
    seed: int = 0,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
) -> Path:
    """The same for GLM-4.5V: one dense layer, then layers with experts; its template closes the thought."""
    return tiny_glm4v(path, corpus, seed, text, vision, moe=True)
