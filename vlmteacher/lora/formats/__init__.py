"""LoRA files: read from many tools, written in three key styles.

The files that `read_lora` reads, by their keys:

| tool | keys | source of alpha |
|---|---|---|
| diffusers | ``transformer.blocks.0.attn1.to_q.lora_A.weight`` | metadata ``lora_adapter_metadata`` |
| diffusers, ``save_lora_adapter`` | ``blocks.0.attn1.to_q.lora_A.weight`` | the same |
| finetrainers | as diffusers | metadata ``lora_config`` (its own writer), or nowhere |
| PEFT | ``base_model.model.blocks.0.attn1.to_q.lora_A.weight`` | ``adapter_config.json`` beside the file |
| ComfyUI, diffusion-pipe | ``diffusion_model.blocks.0.self_attn.q.lora_A.weight`` | ``.alpha``, or multiplied into B |
| LightX2V | the same with ``lora_down``; ``.diff``, ``.diff_b``, ``.diff_m`` | ``.alpha`` |
| DiffSynth | ``blocks.0.self_attn.q.lora_A.default.weight``, ``pipe.dit.`` before it | alpha is the rank |
| musubi-tuner, kohya | ``lora_unet_blocks_0_self_attn_q.lora_down.weight`` | ``.alpha``, ``ss_network_alpha`` |
| VideoX-Fun | ``lora_unet__blocks_0_self_attn_q.lora_down.weight`` | ``.alpha`` |

The keys may have diffusers' names of the layers or the authors' (`names`), with any of the prefixes (`keys`).
Sources: diffusers' ``loaders/lora_conversion_utils.py`` and its ``convert_*_to_diffusers.py``, ComfyUI's
``comfy/lora.py``, musubi-tuner's ``convert_lora.py``, DiffSynth-Studio's ``utils/lora/general.py``, VideoX-Fun's
``utils/lora_utils.py``, LightX2V's ``utils/lora_loader.py``, finetrainers' ``sft_trainer/trainer.py``, PEFT's
``utils/other.py`` (`get_pattern_key`).

The styles that `LoRA.to_bytes` writes: diffusers (alpha in the metadata), comfyui (B times alpha / rank), musubi
(``.alpha``).
"""

from vlmteacher.lora.formats.lora import STYLES, Factors, LoRA, Style
from vlmteacher.lora.formats.merging import merge_lora
from vlmteacher.lora.formats.reading import read_experts, read_lora
from vlmteacher.lora.formats.writing import diffusers_bytes, safetensors_bytes

__all__ = [
    "STYLES",
    "Factors",
    "LoRA",
    "Style",
    "diffusers_bytes",
    "merge_lora",
    "read_experts",
    "read_lora",
    "safetensors_bytes",
]
