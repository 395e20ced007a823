"""Checks of the LoRA's names in a real ComfyUI, whose folder is the first argument; run by test_comfyui.py.

Every family's LoRA goes from a diffusers transformer through the nodes' functions onto ComfyUI's own model of the same
sizes: all keys are known there, and the weights change by B A. For Wan both models compute the same video.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2])]
sys.path.insert(1, sys.argv[1])

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing(False)
from comfy.cli_args import args  # noqa: E402

args.cpu = True
import comfy.lora  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.supported_models  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from diffusers import HunyuanVideo15Transformer3DModel, LTXVideoTransformer3DModel, WanTransformer3DModel  # noqa: E402

from integrations.comfyui.nodes import OptimizeWithTeacher, TeacherExtension, check_model  # noqa: E402
from integrations.comfyui.teaching import lora_layers  # noqa: E402
from tests.reasoners.tiny_hunyuan import tiny_hunyuan_pipeline  # noqa: E402
from tests.reasoners.tiny_ltx import tiny_ltx_pipeline  # noqa: E402
from vlmteacher import InputError  # noqa: E402
from vlmteacher.lora.adapter import add_lora, export_lora, lora_parameters, remove_lora  # noqa: E402
from vlmteacher.lora.formats import read_lora  # noqa: E402
from vlmteacher.lora.formats.names import theirs  # noqa: E402
from vlmteacher.pipeline import PACKAGED_PAIR  # noqa: E402
from vlmteacher.reasoners.registry import family_of  # noqa: E402


def model(kind: str, **config: Any) -> Any:
    """ComfyUI's MODEL of a class of `supported_models`, with random weights."""
    declared = getattr(comfy.supported_models, kind)
    made = declared({**declared.unet_config, **config})
    made.set_inference_dtype(torch.float32, None)
    torch.manual_seed(1)
    inner = made.get_model({}, "")
    with torch.no_grad():
        for weight in inner.parameters():
            weight.normal_(std=0.05)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(inner, cpu, cpu)


def trained(base: Any, transformer: Any) -> bytes:
    """The file of a LoRA whose factors are both random, which stays on the transformer. base: its MODEL in ComfyUI."""
    check_model(base, lora_layers(transformer))
    add_lora(transformer, 4, alpha=8, seed=0, fused=False)
    torch.manual_seed(2)
    with torch.no_grad():
        for factor in lora_parameters(transformer):
            factor.normal_(std=0.05)
    return export_lora(transformer)


def patched(base: Any, lora: bytes) -> tuple[Any, dict[str, torch.Tensor]]:
    """MODEL with the LoRA, as the node puts it on, and the change of every weight by ComfyUI's name."""
    tensors = safetensors.torch.load(read_lora(lora, "the LoRA").to_bytes("comfyui"))
    key_map = comfy.lora.model_lora_keys_unet(base.model, {})
    unknown = [key for key in tensors if key.rpartition(".lora_")[0] not in key_map]
    assert not unknown, unknown
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    result, _ = comfy.sd.load_lora_for_models(base, None, tensors, 1.0, 0)
    result.patch_model()
    changes = {name: value - before[name] for name, value in result.model.state_dict().items()}
    return result, {name: change for name, change in changes.items() if change.any()}


def check_changes(changes: dict[str, torch.Tensor], lora: bytes) -> None:
    """Every layer changes by B A, and nothing else does."""
    read = read_lora(lora, "the LoRA")
    updates = {name: factors.update() for name, factors in read.layers.items()}
    names = read.family.comfyui or read.family.layers
    for layer, parts in names.fused.items():  # query, key and value are one layer in ComfyUI
        for name in [name for name in updates if name.endswith(f".{parts[0]}")]:
            block = name.removesuffix(parts[0])
            updates[block + layer] = torch.cat([updates.pop(block + part) for part in parts])
    wanted = {f"diffusion_model.{theirs(name, names, 'it')}.weight": update for name, update in updates.items()}
    assert changes.keys() == wanted.keys(), sorted(changes.keys() ^ wanted.keys())[:4]
    for name, update in wanted.items():
        torch.testing.assert_close(changes[name], update, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def wan() -> None:
    transformer = WanTransformer3DModel.from_pretrained(PACKAGED_PAIR / "reasoner" / "transformer")
    c = transformer.config
    base = model(
        "WAN21_T2V",
        **{"dim": c.num_attention_heads * c.attention_head_dim, "num_heads": c.num_attention_heads},
        **{"in_dim": c.in_channels, "out_dim": c.out_channels, "ffn_dim": c.ffn_dim, "freq_dim": c.freq_dim},
        **{"text_dim": c.text_dim, "num_layers": c.num_layers},
    )
    names, own = family_of(transformer).layers, transformer.state_dict()
    weights = {}
    for name, value in own.items():
        layer, _, kind = name.rpartition(".")
        weights[
            theirs(name, names, "it") if kind == "scale_shift_table" else f"{theirs(layer, names, 'it')}.{kind}"
        ] = value
    base.model.diffusion_model.load_state_dict(weights)
    x, text = torch.randn(1, c.in_channels, 2, 8, 8), torch.randn(1, 12, c.text_dim)

    def both(comfyui: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ours = transformer(x, torch.tensor([700.0]), text, return_dict=False)[0]
        return ours, comfyui.model.diffusion_model(x, torch.tensor([700.0]), context=text)

    first, other = both(base)
    torch.testing.assert_close(first, other, rtol=1e-3, atol=1e-3)
    lora = trained(base, transformer)
    result, changes = patched(base, lora)
    check_changes(changes, lora)
    ours, theirs_ = both(result)
    moved = (ours - first).abs().mean()
    assert moved > 20 * (ours - theirs_).abs().mean(), "the LoRA does another thing in ComfyUI"
    torch.testing.assert_close(ours, theirs_, rtol=1e-3, atol=1e-3)
    print(f"wan: {len(changes)} layers; the LoRA moves the output by {moved:.3g}, the two differ by "
          f"{(ours - theirs_).abs().max():.2g}")  # fmt: skip
    remove_lora(transformer)
    small = model("WAN21_T2V", dim=128, num_heads=2, ffn_dim=64, num_layers=1, text_dim=32, freq_dim=32)
    refused(small, transformer, "diffusion_model.blocks.0")


def ltx(folder: Path) -> None:
    transformer = LTXVideoTransformer3DModel.from_pretrained(tiny_ltx_pipeline(folder) / "transformer")
    c = transformer.config
    base = model(
        "LTXV",
        **{name: c[name] for name in ("in_channels", "cross_attention_dim", "attention_head_dim", "num_layers")},
        **{"num_attention_heads": c.num_attention_heads, "caption_channels": c.caption_channels},
    )
    lora = trained(base, transformer)
    _, changes = patched(base, lora)
    check_changes(changes, lora)
    print(f"ltx: {len(changes)} layers")
    remove_lora(transformer)
    refused(model("WAN21_T2V", dim=128, num_heads=2, ffn_dim=64, num_layers=1), transformer, "nothing at")


def hunyuan(folder: Path) -> None:
    transformer = HunyuanVideo15Transformer3DModel.from_pretrained(tiny_hunyuan_pipeline(folder) / "transformer")
    c = transformer.config
    base = model(
        "HunyuanVideo15",
        **{"in_channels": c.in_channels, "out_channels": c.out_channels, "depth": c.num_layers, "num_heads": 2},
        **{"hidden_size": 32, "mlp_ratio": 4.0, "context_in_dim": 32, "vec_in_dim": None, "depth_single_blocks": 0},
        **{"axes_dim": [4, 6, 6], "theta": 256, "patch_size": [1, 1, 1], "qkv_bias": True, "guidance_embed": False},
        **{"byt5": True, "meanflow": True, "use_cond_type_embedding": True, "vision_in_dim": 16, "meanflow_sum": False},
    )
    lora = trained(base, transformer)
    _, changes = patched(base, lora)
    check_changes(changes, lora)
    print(f"hunyuan: {len(changes)} layers")


def refused(base: Any, transformer: Any, words: str) -> None:
    try:
        check_model(base, lora_layers(transformer))
    except InputError as error:
        assert words in str(error) and "\n" not in str(error), error
    else:
        raise AssertionError("a model of other layers was taken")


def schemas() -> None:
    import asyncio

    for node in asyncio.run(TeacherExtension().get_node_list()):
        schema = node.GET_SCHEMA()  # validates it
        assert schema.node_id.startswith("VLMTeacher") and schema.category == "vlmteacher"
        print(f"{schema.node_id}: {len(schema.inputs)} inputs, {len(schema.outputs)} outputs")
    assert OptimizeWithTeacher.validate_inputs(prompt=None, queries=None) is True
    assert "--max-steps" in str(OptimizeWithTeacher.validate_inputs(prompt="a", settings="--max-step 3"))
    assert "empty" in str(OptimizeWithTeacher.validate_inputs(prompt=" "))
    assert "not inside" in str(OptimizeWithTeacher.validate_inputs(prompt="a", run_folder="../.."))


if __name__ == "__main__":
    schemas()
    wan()
    with tempfile.TemporaryDirectory() as path:
        ltx(Path(path, "ltx"))
        hunyuan(Path(path, "hunyuan"))
