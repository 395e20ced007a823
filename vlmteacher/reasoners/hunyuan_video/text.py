"""HunyuanVideo's prompts: templates for a Llama or a LLaVA, whose hidden states are the text, and a CLIP.

Texts are not padded: Llama is causal, so that its hidden states of the prompt are those that the pipeline gets with
padding. Control tokens that are spelled in a prompt are read as text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmteacher.prompts import check_cut, encode, quote, tokenize

SKIPPED = 2  # layers of the language model after the one whose hidden states are taken
CLIP_TOKENS = 77  # of the prompt that CLIP reads for one vector of the whole
IMAGE_TOKENS = 576  # of LLaVA: CLIP ViT-L/14 at 336 pixels
# "image_condition_type" of a transformer -> it is given every n-th image token
EVERY_NTH = {"latent_concat": 2, "token_replace": 4}
EVERY_NTH_NEGATIVE = 2  # as the pipeline gives those of the negative prompt's black image, for both
ASSISTANT = 4  # tokens of the turn's change to the assistant, which are cut out


@dataclass(frozen=True)
class Text:
    """An encoded prompt: embeds (1, L, D), pooled (1, P), and the tokens that were cut off, by name."""

    embeds: Tensor
    pooled: Tensor
    cut: dict[str, int]


@dataclass
class PromptEncoder:
    """The text encoders of a HunyuanVideo pipeline, as `HunyuanVideoPipeline` and its image-to-video variant call them.

    text_encoder is a `LlamaModel`, or for images a `LlavaForConditionalGeneration` with its image_processor.
    """

    text_encoder: Any
    tokenizer: Any
    text_encoder_2: Any
    tokenizer_2: Any
    image_processor: Any = None

    def of_prompt(self, prompt: str, limit: int, what: str) -> Text:
        """Encode a prompt, of which `limit` tokens are kept."""
        from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE as TEMPLATE

        start: int = TEMPLATE["crop_start"]  # tokens of the system turn
        ids, cut = self._ids(TEMPLATE["template"], prompt, start, limit, what)
        return self._text(self._hidden(ids)[:, start:], prompt, cut)

    def of_prompt_and_image(self, prompt: str, image: Any, every: int, limit: int, what: str) -> Text:
        """Encode a prompt and an image: every n-th image token, then the prompt, of which `limit` tokens are kept."""
        from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import (
            DEFAULT_PROMPT_TEMPLATE as TEMPLATE,
        )

        start, first, last = (TEMPLATE[name] for name in ("crop_start", "image_emb_start", "image_emb_end"))
        ids, cut = self._ids(TEMPLATE["template"], prompt, start, limit, what)
        header = self.tokenizer.convert_tokens_to_ids("<|end_header_id|>")
        ends = [place for place, token in enumerate(ids) if token == header]
        # The assistant's header is the third, unless the prompt was cut: then the pipeline takes the end for it.
        end = (ends[-1] if len(ends) > 2 else len(ids) - 1) + 1 + IMAGE_TOKENS - 1
        image_token = self.text_encoder.config.image_token_id
        pixels = self.image_processor(image, return_tensors="pt").pixel_values
        hidden = self._hidden([*ids[:first], *[image_token] * IMAGE_TOKENS, *ids[first + 1 :]], pixel_values=pixels)
        words = [hidden[:, start + IMAGE_TOKENS - 1 : end - ASSISTANT], hidden[:, end:]]
        return self._text(torch.cat([hidden[:, first:last:every], *words], 1), prompt, cut)

    def _ids(self, template: str, prompt: str, start: int, limit: int, what: str) -> tuple[list[int], dict[str, int]]:
        text = template.format(quote(self.tokenizer, prompt))
        ids = self.tokenizer("")["input_ids"] + encode(self.tokenizer, text)  # what begins every text, then ours
        cut = check_cut(self.tokenizer, ids[start:], limit, what)
        return ids[: start + limit], cut

    def _hidden(self, ids: list[int], **inputs: Tensor) -> Tensor:
        where = self.text_encoder  # which may be on the CPU: it runs once an instance
        inputs = {name: value.to(where.device, where.dtype) for name, value in inputs.items()}
        tokens = torch.tensor([ids], device=where.device)
        states: Tensor = where(input_ids=tokens, output_hidden_states=True, **inputs).hidden_states[-SKIPPED - 1]
        return states

    def _text(self, embeds: Tensor, prompt: str, cut: dict[str, int]) -> Text:
        tokens = tokenize(self.tokenizer_2, prompt, CLIP_TOKENS).input_ids
        return Text(embeds, self.text_encoder_2(tokens.to(self.text_encoder_2.device)).pooler_output, cut)
