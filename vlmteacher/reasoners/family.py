"""The declaration of a Reasoner family: one `Family` in the family's file, listed in `registry.FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmteacher.reasoners.base import Reasoner
from vlmteacher.reasoners.sampling import SamplerSettings

TABLE = "scale_shift_table"  # diffusers' name of a modulation, which is a parameter and no layer


@dataclass(frozen=True)
class LayerNames:
    """How the layers of a transformer are named outside diffusers: by the model's authors, or by another tool.

    Attributes:
        blocks: the name of the list of blocks.
        inner: diffusers' name within a block -> the other name, of linear layers.
        outer: the same for linear layers and convolutions outside the blocks.
        inner_others, outer_others: the same for norms and modulations, which only weight differences change.
        fused: layer in `inner` or `outer` -> the diffusers layers that it holds, in the order of their rows.
        shares: layer of `fused` -> its rows as a multiple of those of its fellows, where that is not 1.
    """

    blocks: str
    inner: Mapping[str, str]
    outer: Mapping[str, str] = field(default_factory=dict)
    inner_others: Mapping[str, str] = field(default_factory=dict)
    outer_others: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, Sequence[str]] = field(default_factory=dict)
    shares: Mapping[str, int] = field(default_factory=dict)

    @property
    def own_inner(self) -> set[str]:
        """diffusers' names within a block of the layers of `inner`."""
        return {own for name in self.inner for own in self.fused.get(name, (name,))}

    @property
    def all_inner(self) -> dict[str, str]:
        return {**self.inner, **self.inner_others}

    @property
    def all_outer(self) -> dict[str, str]:
        return {**self.outer, **self.outer_others}


@dataclass(frozen=True)
class DecoderFile:
    """What the weights of a published surrogate decoder do not show; it is known by the name of its file.

    Attributes:
        pattern: a regular expression that matches the start of the file's name.
        options: keywords of `SurrogateDecoder`.
        latents_scale: the decoder takes latents divided by this factor.
        denormalised: the decoder takes latents times the VAE's standard deviation, plus its mean.
        refusal: why the file is no decoder of this family although channels and strides agree.
    """

    pattern: str
    options: Mapping[str, Any] = field(default_factory=dict)
    latents_scale: float | None = None
    denormalised: bool = False
    refusal: str | None = None


def _fits(words: Sequence[str], index: Mapping[str, Any]) -> str | None:
    return None


def _agrees(name: str, config: Mapping[str, Any], pipeline: str, changed: bool) -> None:
    return None


@dataclass(frozen=True)
class Family:
    """All that the library has to know of a family of video models.

    Attributes:
        name: of the family, for messages.
        pipelines: diffusers' pipeline classes, as ``model_index.json`` names them.
        refused: pipeline classes of the same models that cannot be taught -> the reason, and what to do.
        transformer: diffusers' class of the network that is taught.
        blocks: the attribute of `transformer` that holds the list of its blocks, or several, in the order in which they
            run; blocks of all lists are called alike.
        load: (directory or hub id, ``model_index.json``, settings or None, dtype, local_files_only, **parts) ->
            Reasoner; parts: see `load_transformers`.
        build: (configs by part, settings, dtype) -> the same Reasoner without weights, on torch's default device.
        adopt: (loaded pipeline of diffusers, settings or None) -> a Reasoner of the pipeline's own parts.
        presets: sampler settings of published checkpoints, by the preset's name.
        hub_ids: hub id -> the name of the preset that is used without being asked for.
        lora_targets: `LoraConfig.target_modules` of PEFT, every linear layer of the blocks but their modulation: ends
            of names, or an expression for whole names where layers outside the blocks have the same ends.
        unread: a regular expression of the layers in the last block whose outputs nothing reads, so that their LoRA has
            no gradient.
        layers: how the authors name the layers, for each list of blocks where there are several (those outside the
            blocks stand with the first).
        comfyui: how ComfyUI names them, where that differs.
        musubi: the network module of musubi-tuner, where that trains the family.
        load_lora: the line of Python that loads a run's LoRA into diffusers' pipeline `pipe`, for model cards.
        decoders: (latent channels, frames per latent frame, pixels per latent cell) -> the surrogate decoder's file on
            the hub.
        decoder_files: published decoders whose weights do not show how they are to be used.
        preset_misfit: (words of a preset's name, ``model_index.json``) -> what the preset is for and the pipeline is
            not, or None.
        check_preset: (preset's name, transformer's config, pipeline, whether a few-step LoRA is merged); raises
            InputError for a preset that contradicts the config.
        check_guidance: (preset's name, pipeline, local_files_only); raises InputError for a preset that contradicts the
            guidance in the pipeline's configs.
        shares_tokens: several GPUs can share the tokens of a video (see `context_parallel.py`).
        fuse_blocks: run a transformer's blocks by our operators, in place; unfuse_blocks: the reverse.
    """

    name: str
    pipelines: tuple[str, ...]
    transformer: str
    blocks: str | tuple[str, ...]
    load: Callable[..., Reasoner]
    build: Callable[..., Reasoner]
    adopt: Callable[[Any, SamplerSettings | None], Reasoner]
    presets: Mapping[str, SamplerSettings]
    hub_ids: Mapping[str, str]
    lora_targets: list[str] | str
    layers: LayerNames | tuple[LayerNames, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    unread: str | None = None
    comfyui: LayerNames | tuple[LayerNames, ...] | None = None
    musubi: str | None = None
    load_lora: str = 'pipe.load_lora_weights(".", weight_name="lora.safetensors")'
    decoders: Mapping[tuple[int, int, int], str] = field(default_factory=dict)
    decoder_files: tuple[DecoderFile, ...] = ()
    preset_misfit: Callable[[Sequence[str], Mapping[str, Any]], str | None] = _fits
    check_preset: Callable[[str, Mapping[str, Any], str, bool], None] = _agrees
    check_guidance: Callable[[str, str, bool], None] | None = None
    shares_tokens: bool = False
    fuse_blocks: Callable[[Any], None] | None = None
    unfuse_blocks: Callable[[Any], None] | None = None

    @property
    def block_lists(self) -> tuple[str, ...]:
        """The attributes of `transformer` that hold its blocks."""
        return (self.blocks,) if isinstance(self.blocks, str) else self.blocks

    def names(self, comfyui: bool = False) -> dict[str, LayerNames]:
        """The authors' or ComfyUI's names of the layers, by the list of blocks; those outside are with the first."""
        names = (self.comfyui if comfyui else None) or self.layers
        return dict(zip(self.block_lists, (names,) if isinstance(names, LayerNames) else names, strict=True))

    @property
    def all_names(self) -> tuple[tuple[str, LayerNames], ...]:
        """`names` of the authors and of ComfyUI."""
        return *self.names().items(), *(self.names(comfyui=True).items() if self.comfyui else ())
