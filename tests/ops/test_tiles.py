"""The kernels for AMX, their tile instructions emulated (tiles.h): as operators, against the definitions in float64.

For machines without a matrix unit; on one with AMX the operators' own tests run them on it. The emulation has its
shapes, layouts and roundings, not its faults of access.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.ops import test_attention, test_surrogate_decoder
from tests.processors import reachable
from tests.rounding import check, expected
from vlmteacher.ops import attention, decoder_cpu, processors
from vlmteacher.ops.lora_linear import lora_linear_group_backward_reference, lora_linear_group_reference

pytestmark = pytest.mark.slow  # half a minute of compiling and emulating
ROOT = Path(__file__).parents[2]
VECTORS = ["-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16"]
SOURCES = ["processor.cpp", "scratch.cpp"] + [
    f"{operator}/{file}"
    for operator, files in {
        "surrogate_decoder": ("cpu.cpp", "conv_amx.cpp"),
        "lora_linear": ("cpu.cpp", "wide_amx.cpp", "skinny_avx512bf16.cpp"),
        "attention": ("cpu.cpp", "attention_amx.cpp"),
    }.items()
    for file in files
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The operators with these kernels alone, as torch.ops.vlmteacher_tiles."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None or "avx512_bf16" not in reachable():
        pytest.skip("no g++, or a processor without AVX-512 BF16, which the kernels need beside the tiles")
    folder, torch_folder = tmp_path_factory.mktemp("tiles"), Path(torch.__file__).parent
    flags = [
        "-std=c++20", "-O1", "-fPIC", "-c", "-DEMULATED_TILES", "-DBUILT_AVX2", "-DBUILT_AVX512BF16",
        "-Dvlmteacher_cpp=vlmteacher_tiles", "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-isystem", str(torch_folder / "include"),
    ]  # fmt: skip
    running, objects = [], []
    for source in SOURCES:
        objects.append(str(folder / f"{source.replace('/', '_')}.o"))
        wide = []
        if source.endswith("_amx.cpp"):
            wide = [*VECTORS, "-mamx-tile", "-mamx-bf16", "-include", str(Path(__file__).with_name("tiles.h"))]
        elif source.endswith("_avx512bf16.cpp"):
            wide = VECTORS
        command = [compiler, *flags, *wide, str(ROOT / "csrc" / source), "-o", objects[-1]]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for process in running:
        assert process.wait() == 0, process.stderr and process.stderr.read()
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run([compiler, "-shared", *objects, *libraries, "-o", str(folder / "tiles.so")], check=True)
    torch.ops.load_library(folder / "tiles.so")


@pytest.fixture
def tiles(library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the operators call and how they pack, on a processor whose class is amx_tiles."""
    monkeypatch.setattr(torch.ops, "vlmteacher_cpp", torch.ops.vlmteacher_tiles)
    monkeypatch.setattr(decoder_cpu, "in_use", lambda: "amx_tiles")
    monkeypatch.setattr(processors, "_served", {})
    processors._serve("amx_tiles")


@pytest.mark.parametrize("case", test_surrogate_decoder.CASES)
def test_convolutions(tiles: None, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_surrogate_decoder, "reachable", lambda: ["amx_tiles"])
    monkeypatch.setattr(test_surrogate_decoder, "used_as", lambda _: torch.no_grad())
    test_surrogate_decoder.test_forward(case, torch.bfloat16)
    test_surrogate_decoder.test_backward(case, False, torch.bfloat16)
    if test_surrogate_decoder.CASES[case][6] == 1:
        test_surrogate_decoder.test_backward(case, True, torch.bfloat16)


@pytest.mark.parametrize("mask", test_attention.MASKS)
@pytest.mark.parametrize("case", test_attention.CASES)
def test_attention_of_every_mask(tiles: None, case: str, mask: str) -> None:
    given = test_attention.draw(case, torch.bfloat16)
    spans = test_attention.spans_of(mask, *test_attention.CASES[case][1:3])
    torch.full((2, *given[0].shape), torch.nan, dtype=torch.bfloat16)
    ours = test_attention.run(attention.attention, given, spans, torch.bfloat16, "native")
    check(ours, expected(test_attention.run, attention.attention_reference, given, spans, torch.bfloat16))


@pytest.mark.parametrize("rows", [5, 32, 33, 131])
@pytest.mark.parametrize("width, sizes, rank", [(64, (32,), 2), (130, (34, 70, 34), 16), (38, (98, 2), 6)])
def test_wide_products(tiles: None, rows: int, width: int, sizes: tuple[int, ...], rank: int) -> None:
    g = torch.Generator().manual_seed(rows * width)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).bfloat16().double()

    given = {
        "x": [draw(rows, width)],
        "weights": [draw(n, width) for n in sizes],
        "biases": [draw(n) for n in sizes],
        "a": [draw(rank, width) for _ in sizes],
        "b": [draw(n, rank) for n in sizes],
        "grads": [draw(rows, n) for n in sizes],
    }
    scaling = [0.5 * (i + 1) for i in range(len(sizes))]

    def run(functions, given, dtype):
        x, weights, biases, a, b, grads = ([t.to(dtype) for t in tensors] for tensors in given.values())
        torch.full((rows, max(sizes)), torch.nan, dtype=dtype)  # where the next allocations of this size will be
        forward, backward = functions
        *ys, s = forward(x[0], weights, biases, a, b, scaling)
        return [*ys, *backward(grads, x[0], s, weights, a, b, scaling, True, True, True)]

    own = torch.ops.vlmteacher_tiles
    ours = run((own.lora_linear, own.lora_linear_backward), given, torch.bfloat16)
    definition = lora_linear_group_reference, lora_linear_group_backward_reference
    check(ours, expected(run, definition, given, torch.bfloat16))
