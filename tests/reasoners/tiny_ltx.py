"""Random-weight LTX-Video checkpoints in the hub's layout."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.tiny_models import PROMPT_WORDS

SIZE = (17, 64, 96)


def tiny_ltx_pipeline(path: Path, kind: str = "LTXConditionPipeline", timestep_conditioning: bool = True) -> Path:
    """Save a random LTX pipeline of class `kind`: 8 latent channels, strides of 8 in time and 32 in space.

    The VAE's posterior is all but certain, so that diffusers' draws from it are its mode.
    """
    import diffusers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = ["<pad>", "</s>", "<unk>", *PROMPT_WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text_encoder = T5EncoderModel(
            T5Config(vocab_size=len(words), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        )
        transformer = diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=32,
        )
        vae = diffusers.AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, True, False),
            decoder_spatio_temporal_scaling=(True, True, True, False),
            decoder_inject_noise=(timestep_conditioning, False, False, False, False),
            timestep_conditioning=timestep_conditioning,
            encoder_causal=True,
            decoder_causal=False,
        )
        vae.latents_mean.copy_(0.05 * torch.arange(8))
        vae.latents_std.copy_(1 + 0.1 * torch.arange(8))
        with torch.no_grad():
            vae.encoder.conv_out.conv.weight[-1] = 0
            vae.encoder.conv_out.conv.bias[-1] = -40
    getattr(diffusers, kind)(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=128
        ),
        text_encoder=text_encoder,
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(path)
    return Path(path)
