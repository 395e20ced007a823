"""Workflows through the HTTP API of a real ComfyUI, whose folder is the first argument; run by test_comfyui.py.

The second argument is an empty folder. The server runs on the CPU, with the packaged pair and with a random Wan that
ComfyUI's own loader takes.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import aiohttp  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402

from tests.reasoners import tiny_checkpoints  # noqa: E402
from tests.tiny_pair import tiny_decoder  # noqa: E402
from tests.tiny_teacher import tiny_qwen3_vl  # noqa: E402
from vlmteacher.lora.formats.names import theirs  # noqa: E402
from vlmteacher.reasoners.wan.family import WAN  # noqa: E402

NODES = ROOT / "integrations/comfyui"
PREVIEW = 4  # the kind of a binary message: a picture with its node


def tiny_wan(base: Path) -> None:
    """A random Wan of the sizes that ComfyUI assumes, as a pipeline, and another transformer under Wan's own names."""
    from diffusers import WanTransformer3DModel

    tiny_checkpoints.TEXT_DIM, tiny_checkpoints.LATENTS = 4096, 16

    def transformer(seed: int) -> Any:
        torch.manual_seed(seed)
        return WanTransformer3DModel(
            **{"num_attention_heads": 2, "attention_head_dim": 128, "in_channels": 16, "out_channels": 16},
            **{"text_dim": 4096, "freq_dim": 256, "ffn_dim": 64, "num_layers": 2},
        )

    tiny_checkpoints._wan(base / "wan", "WanPipeline", transformer(1))
    weights = {}
    for name, value in transformer(2).state_dict().items():
        layer, _, kind = name.rpartition(".")
        table = kind == "scale_shift_table"
        weights[theirs(name if table else layer, WAN.layers, "it") + ("" if table else f".{kind}")] = value.contiguous()
    for folder in ("diffusion_models", "vae_approx"):
        (base / "models" / folder).mkdir(parents=True)
    safetensors.torch.save_file(weights, base / "models/diffusion_models/tiny_wan.safetensors")
    tiny_decoder(base / "models/vae_approx/tiny.safetensors", latent_channels=16)
    tiny_qwen3_vl(base / "teacher")


class Client:
    """A client of the server that keeps what the last workflow reported."""

    def __init__(self, session: aiohttp.ClientSession, address: str, page: aiohttp.ClientWebSocketResponse) -> None:
        self.session, self.address, self.page = session, address, page

    async def post(self, path: str, **content: Any) -> Any:
        async with self.session.post(self.address + path, json=content) as response:
            return json.loads(await response.text() or "null")

    async def run(self, workflow: dict[str, Any], stop_at: int | None = None) -> dict[str, Any]:
        """Run a workflow to its end; returns the last message. stop_at: steps of an optimisation to interrupt it at."""
        answer = await self.post("/prompt", prompt=workflow, client_id="test")
        if "error" in answer:
            return {"type": "refused", **answer}
        self.previews, self.progress, self.cached = 0, 0, []
        async for message in self.page:
            if message.type == aiohttp.WSMsgType.BINARY:
                self.previews += int.from_bytes(message.data[:4], "big") == PREVIEW
                continue
            event = json.loads(message.data)
            for node in event["data"].get("nodes", {}).values() if event["type"] == "progress_state" else ():
                if node["max"] > 1:
                    self.progress = max(self.progress, node["value"])
                    if node["value"] == stop_at:
                        await self.post("/interrupt")
                        stop_at = None
            if event["type"] == "execution_cached":
                self.cached = event["data"]["nodes"]
            if event["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                return {"type": event["type"], **event["data"]}
        raise AssertionError("the server closed the connection")


@asynccontextmanager
async def server(comfyui: Path, base: Path) -> Any:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VLMTEACHER_CHECK_DECODER": "0"}
    flags = ["--cpu", "--port", str(port), "--base-directory", str(base), "--preview-method", "auto"]
    with (base / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "main.py", *flags], cwd=comfyui, env=environment, stdout=log, stderr=log
        )
        address = f"http://127.0.0.1:{port}"
        try:
            async with aiohttp.ClientSession() as session:
                for _ in range(600):
                    assert process.poll() is None, (base / "log.txt").read_text()[-2000:]
                    try:
                        page = await session.ws_connect(f"{address}/ws?clientId=test")
                        break
                    except aiohttp.ClientError:
                        await asyncio.sleep(0.5)
                await page.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
                yield Client(session, address, page)
        finally:
            process.terminate()
            process.wait()


async def packaged_pair(client: Client, base: Path) -> None:
    workflow = json.loads((NODES / "workflow_api.json").read_text())
    workflow["4"]["inputs"]["settings"] = "--max-steps 2 --final-samples 1"
    result = await client.run(workflow)
    assert result["type"] == "execution_success", result
    assert client.previews >= 2 and client.progress == 2, (client.previews, client.progress)
    print(f"packaged pair: {client.previews} previews")
    assert list((base / "output/loras").glob("*.safetensors")) and list((base / "output/vlmteacher").glob("*.mp4"))
    await client.run(workflow)
    assert {"1", "3", "4"} <= set(client.cached), client.cached
    for name, value, words in (
        ("prompt", "  ", "prompt is empty"),
        ("settings", "--max-step 2", "did you mean --max-steps"),
        ("run_folder", "../elsewhere", "is not inside"),
    ):
        changed = json.loads(json.dumps(workflow))
        changed["4"]["inputs"][name] = value
        refusal = await client.run(changed)
        assert refusal["type"] == "refused" and words in json.dumps(refusal["node_errors"]), refusal


async def on_a_model(client: Client, base: Path) -> None:
    """The LoRA is trained on the file that MODEL is loaded from; the saved MODEL is this file plus B A."""
    load = {
        **{"reasoner": str(base / "wan"), "teacher": str(base / "teacher"), "transformer": "tiny_wan.safetensors"},
        **{"decoder": "tiny.safetensors", "preset": "default", "few_step_lora": "none", "dtype": "float32"},
        **{"quantize": "none", "offload": False},
    }
    optimise = {
        **{"pipeline": ["1", 0], "model": ["2", 0], "prompt": "move the red ball", "queries": "Is it red?", "seed": 1},
        **{"num_frames": 5, "height": 32, "width": 48, "run_folder": "tiny", "strength": 0.5},
        "settings": "--max-steps 3 --rank 2 --lr 0.03 --teacher-frames 4",
    }
    workflow: dict[str, Any] = {
        "1": {"class_type": "VLMTeacherLoadPipeline", "inputs": load},
        "2": {"class_type": "UNETLoader", "inputs": {"unet_name": "tiny_wan.safetensors", "weight_dtype": "default"}},
        "3": {"class_type": "VLMTeacherOptimize", "inputs": optimise},
        "4": {"class_type": "ModelSave", "inputs": {"model": ["3", 0], "filename_prefix": "patched"}},
        "5": {"class_type": "SaveLoRA", "inputs": {"lora": ["3", 1], "prefix": "tiny_lora"}},
    }
    result = await client.run(workflow, stop_at=1)
    assert result["type"] == "execution_interrupted", result
    run = base / "output/vlmteacher/tiny/run.json"
    assert json.loads(run.read_text())["stopped"] == "interrupted"
    result = await client.run(workflow)
    assert result["type"] == "execution_success", result
    assert "1" in client.cached, "the pipeline was loaded again"
    assert json.loads(run.read_text())["stopped"] == "max_steps"
    (patched,), (lora,) = ((base / "output").glob(f"{name}*.safetensors") for name in ("patched", "tiny_lora"))
    base_weights = safetensors.torch.load_file(base / "models/diffusion_models/tiny_wan.safetensors")
    weights, factors = safetensors.torch.load_file(patched), safetensors.torch.load_file(lora)
    changed = 0
    for name, weight in base_weights.items():
        key = f"diffusion_model.{name.removesuffix('.weight')}"
        new = next(value.float() for own, value in weights.items() if own.endswith(f"diffusion_model.{name}"))
        update = torch.zeros_like(weight)
        if f"{key}.lora_A.weight" in factors:
            update = 0.5 * factors[f"{key}.lora_B.weight"] @ factors[f"{key}.lora_A.weight"]
            changed += 1
        torch.testing.assert_close(new, weight + update, rtol=1e-3, atol=1e-5)
    assert changed == 2 * 10 == len(factors) // 2
    print(f"model: {changed} patched layers are the file plus B A; the interrupted run went on")

    workflow["1"]["inputs"] = {**load, "reasoner": "", "teacher": "", "transformer": "the reasoner's own"}
    workflow["1"]["inputs"]["decoder"] = "default"
    result = await client.run(workflow)
    assert result["type"] == "execution_error" and "load the same file in both" in result["exception_message"], result


async def main(comfyui: Path, base: Path) -> None:
    for folder in ("custom_nodes", "input"):
        (base / folder).mkdir()
    (base / "custom_nodes/vlmteacher").symlink_to(NODES)
    (base / "input/vlmteacher_example.png").write_bytes((NODES / "vlmteacher_example.png").read_bytes())
    tiny_wan(base)
    async with server(comfyui, base) as client:
        await packaged_pair(client, base)
        await on_a_model(client, base)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()))
