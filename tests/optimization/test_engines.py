from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.conftest import Run
from tests.tiny_pair import PROMPT, QUERIES
from vlmteacher.errors import InputError
from vlmteacher.lora.adapter import add_lora
from vlmteacher.optimization import engines
from vlmteacher.optimization.loop import Optimization
from vlmteacher.pipeline import TeacherPipeline
from vlmteacher.planning.costs import META
from vlmteacher.planning.models import build_decoder, build_reasoner, build_teacher
from vlmteacher.planning.reasoner import blank_instance
from vlmteacher.queries import QuerySet
from vlmteacher.ranks import Ranks
from vlmteacher.reasoners.checkpointing import Keep, block_lists, keep_activations, set_blocks
from vlmteacher.reasoners.condition import Condition, Noise
from vlmteacher.reasoners.wan.reasoner import WanReasoner
from vlmteacher.settings import Settings

# ---------------------------------------------------------------- what a CUDA graph may contain


class NoTransfers(TorchDispatchMode):
    """Raises when an operator mixes tensors of the CPU and the device, or an index is not on the device already.

    The device is "meta": a tensor without data cannot be read by the host anyway. A list as an index becomes a tensor
    on the device unseen, so every index must be a result of the step, or have been there in the step before.
    """

    def __init__(self, before: NoTransfers | None = None) -> None:
        super().__init__()
        self.before = before
        self.known: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.before and func._schema.name in ("aten::index", "aten::index_put", "aten::index_put_"):
            for index in args[1]:
                if index is not None and not (self._key(index) in self.known or self._key(index) in self.before.known):
                    raise AssertionError(f"{func} has an index from the host")
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        devices = {t.device.type for t in tensors if t.dim() or "copy" in func._schema.name}
        if self.before and len(devices) > 1:
            raise AssertionError(f"{func} goes between {devices}")
        self.known |= {self._key(t): t for t in tensors}  # holds them, because a freed storage's address is used again
        return out

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata


class NoNumbers(TorchFunctionMode):
    """Raises when numbers of the host become a tensor on the device, which no dispatch mode intercepts."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and out.device.type != "cpu":
            raise AssertionError(f"{func.__name__}({args[-1]}) copies to the device")
        return out


def loop_without_data(image: bool, **settings: Any) -> Optimization:
    """The packaged pair on the meta device."""
    reasoner, _ = build_reasoner("packaged", torch.float32)
    teacher, decoder = build_teacher("packaged", torch.float32), build_decoder("packaged", torch.float32)
    teacher.chunk_patches = 64  # stream the video
    add_lora(reasoner.transformer, blocks=settings.get("lora_blocks"))
    shape = (13, 64, 64)
    latents = reasoner.latent_shape(*shape)
    text = torch.empty(1, 24, reasoner.transformer.config.text_dim, device=META)
    first = torch.empty(*latents[:2], 1, *latents[3:], device=META) if image else None
    noise = Noise(torch.empty(latents, device=META), ())
    chosen = Settings(teacher_frames=6, **settings)
    queries = QuerySet.from_dict(QUERIES)
    return Optimization(reasoner, decoder, teacher, Condition(text, first, *shape), noise, queries, chosen)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("image", "level", "settings"),
    [
        (True, Keep.ALL, {}),
        (False, Keep.INPUT, {}),
        (True, Keep.ATTENTION, {}),
        (True, Keep.ALL, {"lora_blocks": "last:2"}),
    ],
)
def test_a_step_never_waits_for_the_host(image: bool, level: Keep, settings: dict[str, Any]) -> None:
    loop = loop_without_data(image, **settings)
    keep_activations(loop.reasoner.transformer, level)
    loop.teacher.activation_bytes = 0 if level else None
    with NoTransfers() as before:
        loop.objective.backward(*loop.objective.evaluate())  # fills the caches, as the warm-up does
    loop.optimizer.zero_grad(set_to_none=True)
    with NoNumbers(), NoTransfers(before):
        metrics = loop.objective.backward(*loop.objective.evaluate())
    assert metrics.shape == (10 + 3 + 1,)
    with pytest.raises(RuntimeError, match="meta"):
        metrics.tolist()


@pytest.mark.parametrize(
    "name", ["wan2.1-i2v-14b-480p", "ltx-0.9.8-2b-distilled", "hunyuan-video-1.5-480p-i2v", "hunyuan-video-i2v"]
)
def test_the_prediction_of_another_family_never_waits_for_the_host(name: str) -> None:
    reasoner: Any = build_reasoner(name)[0]
    network = reasoner.transformer
    set_blocks(network, {name: blocks[:2] for name, blocks in block_lists(network).items()})
    add_lora(network, 4)
    rows, columns = (4 * reasoner.spatial_stride * patch for patch in reasoner.patch)
    condition, noise = blank_instance(reasoner, (2 * reasoner.temporal_stride + 1, rows, columns))
    with NoTransfers() as before:
        reasoner.predict_clean(condition, noise).sum().backward()
    with NoNumbers(), NoTransfers(before):
        reasoner.predict_clean(condition, noise).sum().backward()


def test_the_modes_detect_what_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = loop_without_data(True)
    with NoTransfers() as before:
        loop.objective.evaluate()
    velocity = WanReasoner.velocity

    def old(reasoner: Any, condition: Any, latents: Any, sigma: Any, **more: Any) -> Tensor:
        return velocity(reasoner, condition, latents, torch.as_tensor(sigma, device=reasoner.device), **more)

    with monkeypatch.context() as patch:
        patch.setattr(WanReasoner, "velocity", old)
        with pytest.raises(AssertionError, match="as_tensor"), NoNumbers(), NoTransfers(before):
            loop.objective.evaluate()
    with pytest.raises(AssertionError, match="from the host"), NoTransfers(before):
        loop.noise.z1[:, [0, 2]]
    with pytest.raises(AssertionError, match="goes between"), NoTransfers(before):
        torch.ones(3).to(META)


# ---------------------------------------------------------------- engines


@pytest.fixture
def make(make_loop: Any) -> Any:
    return lambda **settings: make_loop(**{"max_steps": 3} | settings)


def test_one_read_of_the_device_per_step(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._schema.name in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero"):
                reads.append(func)
            return func(*args, **(kwargs or {}))

    tolist = Tensor.tolist

    def counted(tensor: Tensor) -> Any:
        reads.append("tolist")
        return tolist(tensor)

    loop = make()
    loop.step()
    monkeypatch.setattr(Tensor, "tolist", counted)
    with Reads():
        loop.objective.backward(*loop.objective.evaluate())
        assert not reads
        reads.clear()
        loop.engine.evaluate()
    assert set(reads) == {"tolist"}


def test_a_good_enough_step_saves_its_backward_where_steps_are_long(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, first = torch.device("cuda"), make().engine
    assert first.reads_first(gpu)
    first.seconds = engines.LONG / 2
    assert not first.reads_first(gpu) and first.reads_first(torch.device("cpu"))
    rows = []
    for reads in (True, False):
        monkeypatch.setattr(engines.Eager, "reads_first", lambda *_, reads=reads: reads)
        loop = make(threshold=100.0)
        made: list[int] = []
        backward = loop.objective.backward
        loop.objective.backward = lambda *a, made=made, backward=backward: (made.append(1), backward(*a))[1]
        rows.append([without_time(row) for row in loop])
        assert made == ([] if reads else [1])
    assert rows[0] == rows[1] and len(rows[0]) == 1


def test_compiled_blocks_take_the_same_steps(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_module(module, backend="aot_eager"))
    expected = [row["loss"] for row in make()]
    loop = make(engine="compile")
    blocks = loop.reasoner.transformer.blocks
    assert all(block._compiled_call_impl is not None for block in blocks)
    rows = list(loop)
    assert [row["loss"] for row in rows] == pytest.approx(expected, rel=1e-6)
    assert expected[2] < expected[0]
    loop.close()
    assert all(block._compiled_call_impl is None for block in blocks)


def test_compiled_blocks_keep_all_or_their_input(make: Any, pipe: TeacherPipeline) -> None:
    keep_activations(pipe.reasoner.transformer, Keep.LONG)
    try:
        with pytest.raises(InputError, match='cannot keep long: a compiled block keeps "all" or its "input"'):
            make(engine="compile")
    finally:
        keep_activations(pipe.reasoner.transformer, Keep.ALL)


def test_a_cuda_graph_needs_a_gpu(
    models: dict[str, str],
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queries = tmp_path / "queries.json"
    queries.write_text(json.dumps(QUERIES))
    given = [f"--{name}={value}" for name, value in models.items()]
    out = tmp_path / "run"
    given += [f"--prompt={PROMPT}", f"--queries={queries}", "--engine=cuda_graph", "--out", str(out)]
    status, _, err = run("solve", *given)
    assert status == 2 and err.count("\n") == 1 and not out.exists()
    assert 'engine "cuda_graph" needs Reasoner and Teacher on one NVIDIA GPU, they are on cpu: take "eager"' in err
    with pytest.raises(InputError, match="engine must be eager or compile or cuda_graph, not 'fast'"):
        Settings(engine="fast")  # type: ignore[arg-type]
    part = {"ranks": Ranks(), "transformer": torch.nn.Identity()}
    apart = [type("Part", (), part | {"device": torch.device("cuda", n)})() for n in (0, 1)]
    with pytest.raises(InputError, match="they are on cuda:0 and cuda:1"):
        engines.check_engine("cuda_graph", *apart)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    unnumbered = type("Part", (), {"device": torch.device("cuda"), "ranks": Ranks()})()
    engines.check_engine("cuda_graph", apart[1], unnumbered)
    with pytest.raises(InputError, match="they are on cuda:0 and cuda:1"):
        engines.check_engine("cuda_graph", apart[0], unnumbered)


# ---------------------------------------------------------------- recording and replay


class RecordedOnCPU(TorchDispatchMode):
    """A stand-in for a CUDA graph: replays the same calls of the CPU's operators on the same memory, without Python."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for kept, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(kept, Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


@pytest.fixture
def cuda_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the parts of torch.cuda that `CudaGraph` calls, so that it records on the CPU."""

    class Stream:
        def __init__(self, *_: Any) -> None: ...

        def wait_stream(self, _: Any) -> None: ...

    for name, value in {
        "CUDAGraph": RecordedOnCPU,
        "graph": lambda graph, **_: graph,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda _: nullcontext(),
        "device": lambda _: nullcontext(),
        "mem_get_info": lambda _: (2**40, 2**40),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.parametrize(
    ("level", "settings"), [(Keep.ALL, {}), (Keep.INPUT, {"lora_blocks": "last:1"}), (Keep.LONG, {"check_final": True})]
)
def test_a_replayed_step_equals_the_eager_step(
    make: Any, pipe: TeacherPipeline, level: Keep, settings: dict[str, Any], cuda_of_the_cpu: None
) -> None:
    """Every later step depends on the LoRA's weights alone. AdamW is not recorded here, because only GPUs have a
    capturable one."""
    keep_activations(pipe.reasoner.transformer, level)
    try:
        many = {"max_steps": 6, "threshold": 1e-6, **settings}
        expected = [without_time(row) for row in make(**many)]
        loop = make(**many)
        loop.engine = engine = engines.CudaGraph(loop.objective, loop.optimizer)
        evaluations = []
        evaluate, engine.update = loop.objective.evaluate, loop.optimizer.step
        loop.objective.evaluate = lambda *step: evaluations.append(1) or evaluate(*step)
        rows = [without_time(row) for row in loop]
        assert len(evaluations) == engines.WARM_UP_STEPS + 1  # the last one was recorded
        assert rows == expected and rows[5]["loss"] < rows[0]["loss"]

        loop.stopped = None
        loop.ladder.down()  # changes what is computed, which must be recorded again
        engine.reset()
        for _ in range(4):
            loop.step()
        assert len(evaluations) == 2 * (engines.WARM_UP_STEPS + 1)
        loop.close()
        assert all(parameter.grad is None for parameter in loop.parameters) and pipe.teacher.activation_bytes is None
    finally:
        keep_activations(pipe.reasoner.transformer, Keep.ALL)


def test_a_recorded_run_rolls_back_and_is_recorded_again(
    make: Any, pipe: TeacherPipeline, cuda_of_the_cpu: None
) -> None:
    """No earlier graph contains the new learning rate or the fresh optimiser's memory."""

    def steps(recorded: bool) -> list[dict[str, Any]]:
        loop = make(max_steps=9, threshold=1e-6)
        if recorded:
            loop.engine = engine = engines.CudaGraph(loop.objective, loop.optimizer)
            engine.update = loop.optimizer.step  # type: ignore[method-assign]
        rows = [loop.step() for _ in range(4)]
        with torch.no_grad():
            loop.parameters[-1].view(-1)[0] = torch.inf
        rows += [loop.step() for _ in range(5)]
        if recorded:
            assert engine.warm == engines.WARM_UP_STEPS and engine.step is not None
        loop.close()
        return [without_time(row) for row in rows]

    expected = steps(recorded=False)
    assert steps(recorded=True) == expected
    assert expected[4]["learning_rate"] == 0.005 and expected[8]["loss"] < expected[3]["loss"]


def without_time(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "seconds"}
