"""Load the Reasoner of a Wan pipeline of diffusers: from files, from the loaded pipeline, or from configs alone.

`kind` is the class of the Reasoner. All have the same parts, and transformers of different classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from vlmteacher.checkpoints.pretrained import cast, load_network, load_processor, load_tokenizer
from vlmteacher.errors import InputError
from vlmteacher.reasoners.parts import load_transformers
from vlmteacher.reasoners.sampling import SamplerSettings
from vlmteacher.reasoners.wan.reasoner import WanReasoner

# Encoders that a pipeline's index may name; the first is taken for any other name.
TEXT_ENCODERS = ("UMT5EncoderModel", "T5EncoderModel")
IMAGE_ENCODERS = ("CLIPVisionModel", "CLIPVisionModelWithProjection")


def load_wan(
    kind: type[WanReasoner],
    path_or_id: str,
    index: dict[str, Any],
    settings: SamplerSettings | None,
    dtype: torch.dtype,
    local_files_only: bool,
    **parts: Sequence[str],
) -> WanReasoner:
    """Load the Reasoner of a diffusers pipeline, local or on the hub, whose ``model_index.json`` is `index`.

    parts: see `load_transformers`; the high-noise expert comes first. Raises InputError.
    """
    import diffusers
    import transformers

    load = partial(load_network, name=path_or_id, local_files_only=local_files_only)

    def named(part: str) -> str:
        return (index.get(part) or [None, None])[1] or ""

    def encoder(part: str, known: Sequence[str]) -> Any:
        kind = named(part) if named(part) in known else known[0]
        return load(getattr(transformers, kind), subfolder=part, dtype=dtype)

    if not named("transformer"):
        raise InputError(f"{path_or_id} has no transformer for the high noise levels, the one that gets the LoRA")
    networks = load_transformers(
        getattr(diffusers, kind.architecture),
        path_or_id,
        ["transformer", *(["transformer_2"] if named("transformer_2") else [])],
        dtype,
        local_files_only,
        **parts,
    )
    # diffusers' Wan examples keep the VAE in float32; it runs once or twice an instance.
    vae = load(diffusers.AutoencoderKLWan, subfolder="vae", dtype=torch.float32)
    text_encoder = encoder("text_encoder", TEXT_ENCODERS)
    for name, network in networks.items():
        if network.config.text_dim != text_encoder.config.d_model:
            raise InputError(
                f"the {name} takes text of width {network.config.text_dim} and the text encoder gives"
                f" {text_encoder.config.d_model}: they belong to different models"
            )
    image_encoder = image_processor = None
    if named("image_encoder") and networks["transformer"].config.image_dim is not None:
        image_encoder = encoder("image_encoder", IMAGE_ENCODERS)
        image_processor = load_processor(
            transformers.CLIPImageProcessor, path_or_id, "image_processor", local_files_only
        )
    return kind(
        networks["transformer"],
        vae,
        text_encoder,
        load_tokenizer(path_or_id, "tokenizer", local_files_only),
        kind.keeps_first_frame(index["_class_name"], index),
        settings,
        transformer_2=networks.get("transformer_2"),
        boundary_ratio=index.get("boundary_ratio"),
        image_encoder=image_encoder,
        image_processor=image_processor,
    )


def adopt_wan(kind: type[WanReasoner], pipeline: Any, settings: SamplerSettings | None) -> WanReasoner:
    """The Reasoner of a loaded pipeline's own parts. Raises InputError where they do not fit together."""
    takes_image = pipeline.transformer.config.image_dim is not None
    return kind(
        pipeline.transformer,
        pipeline.vae,
        pipeline.text_encoder,
        pipeline.tokenizer,
        kind.keeps_first_frame(type(pipeline).__name__, pipeline.config),
        settings,
        transformer_2=getattr(pipeline, "transformer_2", None),
        boundary_ratio=pipeline.config.get("boundary_ratio"),
        image_encoder=pipeline.image_encoder if takes_image else None,
        image_processor=pipeline.image_processor if takes_image else None,
    )


def build_wan(
    kind: type[WanReasoner], configs: Mapping[str, Any], settings: SamplerSettings, dtype: torch.dtype
) -> WanReasoner:
    """Build the Reasoner without weights from the configs of its parts and the entries of its ``model_index.json``."""
    import diffusers
    from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    def transformer() -> Any:
        return cast(getattr(diffusers, kind.architecture).from_config(configs["transformer"]), dtype)

    boundary = configs.get("boundary_ratio")
    clip = configs.get("image_encoder")
    return kind(
        transformer(),
        diffusers.AutoencoderKLWan.from_config(configs["vae"]),
        UMT5EncoderModel(UMT5Config(**configs["text_encoder"])).to(dtype),
        None,
        kind.keeps_first_frame(configs["pipeline"], configs),
        settings,
        transformer_2=None if boundary is None else transformer(),
        boundary_ratio=boundary,
        image_encoder=None if clip is None else CLIPVisionModel(CLIPVisionConfig(**clip)).to(dtype),
    )
