"""Random-weight HunyuanVideo checkpoints in the hub's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

SIZE = (5, 64, 64)
Condition = Literal["token_replace", "latent_concat"]
# how Llama 3 cuts a text into words, within which it merges bytes
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CONTROL = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<image>", "<pad>"]


def tiny_hunyuan_video_pipeline(path: Path, condition: Condition | None = None, guidance: bool | None = None) -> Path:
    """Save a random HunyuanVideo pipeline: 4 latent channels, strides of 4 and 8, two blocks in each list.

    condition: how an image comes in, of an image-to-video pipeline; None is text-to-video. guidance: whether the
    transformer takes a guidance scale, by default as published. The templates are as many tokens as in Llama 3's.
    """
    import diffusers
    import transformers

    tokenizer = llama_tokenizer()
    image = condition is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = diffusers.HunyuanVideoTransformer3DModel(
            in_channels=9 if condition == "latent_concat" else 4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            guidance_embeds=condition != "latent_concat" if guidance is None else guidance,
            text_embed_dim=32,
            pooled_projection_dim=16,
            rope_axes_dim=(4, 6, 6),
            image_condition_type=condition,
        )
        vae = diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        )
        text_encoder_2 = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=len(clip_tokenizer()),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        )
        image_parts: dict[str, Any] = {}
        if image:
            text_encoder: Any = transformers.LlavaForConditionalGeneration(llava_config(tokenizer))
            image_parts["image_processor"] = transformers.CLIPImageProcessor(
                size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}
            )
        else:
            text_encoder = transformers.LlamaModel(llama_config(tokenizer))
    getattr(diffusers, "HunyuanVideoImageToVideoPipeline" if image else "HunyuanVideoPipeline")(
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=text_encoder_2,
        tokenizer_2=clip_tokenizer(),
        **image_parts,
    ).save_pretrained(path)
    return Path(path)


def llama_config(tokenizer: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=tokenizer.pad_token_id,
    )


def llava_config(tokenizer: Any) -> Any:
    """Of a LLaVA with 576 image tokens: 24 x 24 patches."""
    from transformers import CLIPVisionConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=2
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=llama_config(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )


def llama_tokenizer() -> Any:
    """A byte-level tokenizer of Llama 3's form, to which every word of the templates is one token."""
    from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video, pipeline_hunyuan_video_image2video
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=CONTROL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    templates = (pipeline_hunyuan_video, pipeline_hunyuan_video_image2video)
    tokenizer.train_from_iterator([each.DEFAULT_PROMPT_TEMPLATE["template"] for each in templates] * 2, trainer)
    begin = [(CONTROL[0], 0)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{CONTROL[0]} $A", special_tokens=begin)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=CONTROL[0],
        eos_token=CONTROL[1],
        pad_token="<pad>",
        additional_special_tokens=CONTROL[2:5],
        padding_side="right",
    )


def clip_tokenizer() -> Any:
    """A CLIP tokenizer of bytes: its control tokens, and each byte inside and at the end of a word."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer(vocab={word: place for place, word in enumerate(words)}, merges=[], model_max_length=77)
