"""Frozen linear layers with a LoRA, forward and backward, against PEFT's layers and against the frozen layers alone.

python -m benchmarks.lora_linear [--json] [--dtype float32] [--only microworld] [--augmented]

`ceiling` is PEFT's time over the frozen layers': the speed-up of an operator whose low-rank part costs nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.memory import saved_bytes
from benchmarks.timing import argument_parser, compare, parsed, publish
from vlmteacher.ops.lora_linear import lora_linear_group

RANK = 16
# (case, tokens, K, N of each layer that shares x): the packaged Reasoner, one in between, Wan 5B with fewer tokens.
SHAPES = [
    ("microworld q, k, v", 256, 256, (256, 256, 256)),
    ("microworld ffn up", 256, 256, (768,)),
    ("microworld ffn down", 256, 768, (256,)),
    ("mid q, k, v", 1024, 1024, (1024, 1024, 1024)),
    ("mid ffn up", 1024, 1024, (4096,)),
    ("mid ffn down", 1024, 4096, (1024,)),
    ("Wan 5B q, k, v", 512, 3072, (3072, 3072, 3072)),
    ("Wan 5B ffn up", 512, 3072, (14336,)),
    ("Wan 5B ffn down", 512, 14336, (3072,)),
]


def layers(k: int, sizes: Sequence[int], dtype: torch.dtype, device: str, rank: int = RANK) -> list[nn.Module]:
    """PEFT's layers, as the optimisation makes them: the base frozen in `dtype`, the adapter in float32."""
    from peft import LoraConfig, inject_adapter_in_model

    base = nn.ModuleList(nn.Linear(k, n, dtype=dtype, device=device) for n in sizes).requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[str(i) for i in range(len(sizes))])
    model = inject_adapter_in_model(config, base)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=torch.float32) / k**0.5
    return list(model)


SIDES = ("ours", "peft", "frozen")


def suite_case(shape: tuple[str, int, int, tuple[int, ...]], dtype: torch.dtype, side: str) -> Callable[[], object]:
    """Forward + backward of one group of layers, by ours, PEFT's or the frozen layers alone."""
    _, tokens, k, sizes = shape
    stock = layers(k, sizes, dtype, "cpu")
    x = torch.randn(tokens, k, dtype=dtype, requires_grad=True)
    grads = [torch.randn(tokens, n, dtype=dtype) for n in sizes]
    weights, biases = ([getattr(layer.base_layer, name) for layer in stock] for name in ("weight", "bias"))
    a, b = ([getattr(layer, name)["default"].weight for layer in stock] for name in ("lora_A", "lora_B"))
    forward = {
        "ours": lambda: lora_linear_group(x, weights, biases, a, b, [1.0] * len(stock)),
        "peft": lambda: [layer(x) for layer in stock],
        "frozen": lambda: [layer.base_layer(x) for layer in stock],
    }[side]
    wanted = [x] if side == "frozen" else [x, *a, *b]
    return lambda: torch.autograd.grad(forward(), wanted, grads)


SUITE = {
    f"{shape[0]}, {name}": functools.partial(suite_case, shape, getattr(torch, name))
    for shape in SHAPES[:6]
    for name in ("bfloat16", "float32")
}


class Augmented:
    """The alternative, K-augmentation: S beside x and dS beside dy, so that y and dx are one vendor product each,
    y = [x | S] [W | B]^T and dx = [dy | dS] [W ; A]. The best case is measured: x and dy are already in such buffers,
    and the weight in one with room for the factors; only the factors are copied, at every step."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, grad: Tensor) -> None:
        (m, k), (n, r) = x.shape, b.shape
        self.k, self.n, self.bias, self.a, self.b = k, n, bias, a, b
        self.x, self.grad, self.weight = x.new_empty(m, k + r), x.new_empty(m, n + r), x.new_empty(n + r, k + r)
        self.x[:, :k], self.grad[:, :n], self.weight[:n, :k] = x.detach(), grad, weight

    def __call__(self) -> object:
        a, b = self.a.detach().to(self.x.dtype), self.b.detach().to(self.x.dtype)
        self.weight[: self.n, self.k :], self.weight[self.n :, : self.k] = b, a
        s, ds = self.x[:, self.k :], self.grad[:, self.n :]
        torch.mm(self.x[:, : self.k], a.T, out=s)
        y = torch.addmm(self.bias, self.x, self.weight[: self.n].T)
        torch.mm(self.grad[:, : self.n], b, out=ds)
        dx = self.grad @ self.weight[:, : self.k]
        return y, dx, (ds.T @ self.x[:, : self.k]).float(), (self.grad[:, : self.n].T @ s).float()


def main() -> None:
    parser = argument_parser(__doc__ or "", "bfloat16")
    parser.add_argument(
        "--augmented", action="store_true", help="time the K-augmentation route too, single layers only"
    )
    parser.add_argument("--only", default="", help="the shapes whose name begins so: microworld, mid or Wan 5B")
    settings = parsed(parser)
    dtype = getattr(torch, settings.dtype)
    rows = []
    for case, m, k, sizes in SHAPES:
        if not case.startswith(settings.only):
            continue
        stock = layers(k, sizes, dtype, settings.device)
        x = torch.randn(m, k, dtype=dtype, device=settings.device, requires_grad=True)
        grads = [torch.randn(m, n, dtype=dtype, device=settings.device) for n in sizes]
        weights = [layer.base_layer.weight for layer in stock]
        biases = [layer.base_layer.bias for layer in stock]
        a = [layer.lora_A["default"].weight for layer in stock]
        b = [layer.lora_B["default"].weight for layer in stock]

        def ours(
            x: Tensor = x, w: list[Tensor] = weights, c: list[Tensor] = biases, a: list[Tensor] = a, b: list[Tensor] = b
        ) -> list[Tensor]:
            return lora_linear_group(x, w, c, a, b, [1.0] * len(w))

        def theirs(x: Tensor = x, stock: list[nn.Module] = stock) -> list[Tensor]:
            return [layer(x) for layer in stock]

        def frozen(x: Tensor = x, stock: list[nn.Module] = stock) -> list[Tensor]:
            return [layer.base_layer(x) for layer in stock]

        def both(
            forward: Callable[[], list[Tensor]], wanted: list[Tensor], grads: list[Tensor] = grads
        ) -> Callable[[], object]:
            return lambda: torch.autograd.grad(forward(), wanted, grads)

        trained = [x, *a, *b]
        row = compare(case, both(ours, trained), both(theirs, trained), settings.pairs, settings.device)
        alone = compare(case, both(ours, trained), both(frozen, [x]), settings.pairs, settings.device)
        row["vs_frozen_linear"] = 1 / alone["speedup"]
        row["ceiling"] = row["stock_ms"] / alone["stock_ms"]
        if settings.augmented and len(sizes) == 1:
            rival = Augmented(x, weights[0], biases[0], a[0], b[0], grads[0])
            row["vs_augmented"] = (
                1 / compare(case, both(ours, trained), rival, settings.pairs, settings.device)["speedup"]
            )
        parameters = [*weights, *biases, *a, *b]
        row["memory_ratio"] = saved_bytes(ours, parameters)[0] / saved_bytes(theirs, parameters)[0]
        rows.append(row)
        print(
            f"  {case:<24} {row['vs_frozen_linear']:.2f} of the frozen layers' time (PEFT: {row['ceiling']:.2f}),"
            f" saves {row['memory_ratio']:.2f} of PEFT's bytes"
            + (f", {row['vs_augmented']:.2f} of K-augmentation's time" if "vs_augmented" in row else "")
        )
    publish("lora_linear", settings, rows)


if __name__ == "__main__":
    main()
