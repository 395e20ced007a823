"""The LoRA linear on a GPU: every backend against float64, then against PEFT's layers, the frozen ones and each other.

    python -m benchmarks.gpu.lora_linear [--json] [--dtype float16] [--pairs 30]

`fastest` of each case is what the policy in vlmteacher/ops/backends.py should say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import backends, forced, gate, parsed_on_gpu, share
from benchmarks.lora_linear import Augmented, layers
from benchmarks.timing import argument_parser, compare
from vlmteacher.ops import lora_linear as operator

# (case, tokens, K, N of each layer that shares x, rank); the last is there for its odd sizes
SHAPES = [
    ("Wan 5B q, k, v, 20240 tokens", 20240, 3072, (3072,) * 3, 16),
    ("Wan 5B ffn up", 20240, 3072, (14336,), 16),
    ("Wan 5B ffn down", 20240, 14336, (3072,), 16),
    ("Wan 5B q, k, v, 5060 tokens", 5060, 3072, (3072,) * 3, 16),
    ("Wan 1.3B q, k, v", 8190, 1536, (1536,) * 3, 16),
    ("rank 128", 20240, 3072, (3072,), 128),
    ("odd sizes", 4093, 1001, (1003,), 5),
]


def results(
    run: Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]],
    dtype: torch.dtype, tensors: Sequence[Any], grads: Sequence[Tensor],
) -> list[Tensor]:  # fmt: skip
    """Outputs and gradients in float64, of `run` in `dtype`."""
    x, weights, biases, a, b = tensors
    x = x.to(dtype).requires_grad_()
    weights, biases, a, b = ([t.to(dtype) for t in group] for group in (weights, biases, a, b))
    trained = [t.requires_grad_() for t in (*a, *b)]
    ys = run(x, weights, biases, a, b)
    gradients = torch.autograd.grad(ys, [x, *trained], [g.to(dtype) for g in grads])
    return [t.detach().double() for t in (*ys, *gradients)]


def ours(x: Tensor, w: Sequence[Tensor], c: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    return operator.lora_linear_group(x, w, c, a, b, [0.7] * len(w))


def plain(
    x: Tensor, w: Sequence[Tensor], c: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor]
) -> list[Tensor]:
    return [operator.lora_linear_reference(x, *layer, 0.7) for layer in zip(w, c, a, b, strict=True)]


def check(namespace: Any, dtype: torch.dtype, tensors: Sequence[Any], grads: Sequence[Tensor]) -> float:
    """A backend's largest error as a share of the allowed one (see `share`)."""
    narrow = [[t.to(dtype) for t in each] if isinstance(each, list) else each.to(dtype) for each in tensors]
    with forced(operator, namespace):
        computed = results(ours, dtype, narrow, grads)
    return share(computed, lambda *args: results(plain, dtype, *args), narrow, list(grads))


def main() -> None:
    settings = parsed_on_gpu(argument_parser(__doc__ or "", "bfloat16"), "lora_linear")
    dtype, rows, device = getattr(torch, settings.dtype), [], "cuda"
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    for case, m, k, sizes, rank in SHAPES:
        stock = layers(k, sizes, dtype, device, rank)
        x = torch.randn(m, k, dtype=dtype, device=device, requires_grad=True)
        grads = [torch.randn(m, n, dtype=dtype, device=device) for n in sizes]
        weights, biases = ([getattr(layer.base_layer, name) for layer in stock] for name in ("weight", "bias"))
        a, b = ([getattr(layer, name)["default"].weight for layer in stock] for name in ("lora_A", "lora_B"))
        tensors = (x.detach(), weights, biases, [t.detach() for t in a], [t.detach() for t in b])
        some = ([x.detach()[:2048], *tensors[1:]], [g[:2048] for g in grads])  # float64 is slow on most GPUs
        row: dict[str, Any] = {"case": case, "backends": {}}
        for name, namespace in ({"torch": None} | backends("lora_linear")).items():
            error = check(namespace, dtype, *some)
            gate(case, name, error)
            if settings.check:
                continue

            def step(
                w: Any = weights, c: Any = biases, a: Any = a, b: Any = b, x: Tensor = x, g: Any = grads
            ) -> object:
                return torch.autograd.grad(ours(x, w, c, a, b), [x, *a, *b], g)

            def peft(layers: Any = stock, a: Any = a, b: Any = b, x: Tensor = x, g: Any = grads) -> object:
                return torch.autograd.grad([layer(x) for layer in layers], [x, *a, *b], g)

            def frozen(layers: Any = stock, x: Tensor = x, g: Any = grads) -> object:
                return torch.autograd.grad([layer.base_layer(x) for layer in layers], [x], g)

            with forced(operator, namespace):
                facts = compare(case, step, peft, settings.pairs, device) | {"error": error}
                facts["vs_frozen_linear"] = 1 / compare(case, step, frozen, settings.pairs, device)["speedup"]
                if len(sizes) == 1:
                    rival = Augmented(x, weights[0], biases[0], a[0], b[0], grads[0])
                    facts["vs_augmented"] = 1 / compare(case, step, rival, settings.pairs, device)["speedup"]
            row["backends"][name] = facts
            print(
                f"{case:<32} {name:<7} {facts['ours_ms']:8.3f} ms  x{facts['speedup']:.2f} of PEFT's speed  "
                f"{facts['vs_frozen_linear']:.2f} of the frozen layers' time"
                + (f"  {facts['vs_augmented']:.2f} of K-augmentation's" if "vs_augmented" in facts else "")
            )
        if settings.check:
            continue
        row["fastest"] = min(row["backends"], key=lambda name: row["backends"][name]["ours_ms"])
        rows.append(row | row["backends"][row["fastest"]])
    if settings.json and rows:
        speedups = torch.tensor([row["speedup"] for row in rows]).log().mean().exp()
        facts = {"benchmark": "gpu.lora_linear", "device": torch.cuda.get_device_name(), "dtype": settings.dtype}
        print(json.dumps(facts | {"rows": rows, "summary": {"speedup": float(speedups)}}))


if __name__ == "__main__":
    main()
