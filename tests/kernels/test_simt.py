"""The executor of CUDA sources on the CPU computes correctly, and reports what a GPU leaves undefined as a Fault."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import simt

SEEDS = range(4)
MISTAKES = {  # in the order of the enum in examples.cpp
    "two barriers": r"barrier divergence: thread 0 waits at the barrier of examples.cpp:\d+, thread 32 waits",
    "exit before a barrier": r"barrier divergence: thread 0 waits .*, thread 3 has exited",
    "beyond the end of shared memory": r"an access \d+ bytes from the start of shared memory of 1024 bytes",
    "before the start of shared memory": r"written just outside of shared memory",
    "ldmatrix from beyond": r"ldmatrix at examples.cpp:\d+: 16 bytes at \d+ are outside of shared memory",
    "ldmatrix from an unaligned row": r"ldmatrix at examples.cpp:\d+: an address that is not aligned",
    "cp.async to beyond": r"cp.async at examples.cpp:\d+: 16 bytes at 1024 are outside",
    "beyond a static array": r"an index outside of an array",
    "a lane that is not in its mask": r"collective: __shfl_sync at .* by lane \d+, which is not in mask 000000ff",
    "masks that differ": r"collective: .*(which is not in mask|with mask ffffffff, .* with mask fffffffe)",
    "exit before a collective": r"collective: thread 0 waits in __syncwarp .*, thread 3 has exited",
    "a barrier instead of a collective": r"collective: thread 0 waits in __syncwarp .*, thread 3 waits at the barrier",
    "a shuffle from outside of the mask": r"reads from lane 20, which is not in mask 0000ffff",
    "a read beyond a buffer": r"an access 64 bytes from the start of a buffer of 64 bytes",
    "a write before a buffer": r"written just outside of a buffer",
    "an unaligned write": r"an address that is not aligned",
    "a null pointer": r"no memory of this program",
}


@pytest.fixture(scope="module")
def library():
    return simt.build("examples.cpp")


@pytest.fixture
def memory(library):
    with simt.Memory(library) as memory:
        yield memory


@pytest.mark.parametrize("seed", SEEDS)
def test_shuffles_barriers_and_static_shared_memory(library, memory, seed):
    library.simt_seed(seed)
    values = memory.put(torch.arange(3 * 96.0))
    out = memory.empty(3, 96, dtype=torch.float32)
    simt.call(library.run_block_sum, values, out, 3, 96)
    assert torch.equal(out, values.view(3, 96).sum(1, keepdim=True).expand(3, 96))


@pytest.mark.parametrize("seed", SEEDS)
def test_halves_of_a_warp_meet_by_themselves(library, memory, seed):
    library.simt_seed(seed)
    values = memory.put(torch.tensor([i % 4 - 1 for i in range(32)], dtype=torch.int32))
    out = memory.empty(2, 32, dtype=torch.int32)
    simt.call(library.run_halves, values, out)
    lanes = torch.arange(32)
    from_lane = torch.where(lanes % 2 == 1, 1, torch.where(lanes >= 2, lanes - 2, lanes))
    assert torch.equal(out[0], values[from_lane])
    votes = sum(1 << i for i in range(1, 32, 2) if values[i] > 0)
    assert all(int(out[1, i]) & 0xFFFFFFFF == (votes if i % 2 else int(values[0::2].max() > 0)) for i in range(32))


def test_atomics_over_blocks(library, memory):
    values = memory.put(torch.randint(0, 8, (4 * 64,), generator=torch.Generator().manual_seed(0)).to(torch.int32))
    out, most = memory.put(torch.zeros(8, dtype=torch.int32)), memory.put(torch.zeros(1, dtype=torch.int32))
    simt.call(library.run_histogram, values, out, most, 4, 64)
    assert torch.equal(out.long(), torch.bincount(values, minlength=8)) and most == values.max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_asynchronous_copy_matrix_load_and_product(library, memory, dtype):
    generator = torch.Generator().manual_seed(0)
    left = memory.put(torch.randn(16, 16, generator=generator).to(dtype))
    right = memory.put(torch.randn(16, 8, generator=generator).to(dtype))
    out = memory.empty(16, 8, dtype=torch.float32)
    simt.call(library.run_product, left, right, out, dtype == torch.float16, True)
    torch.testing.assert_close(out, left.float() @ right.float())
    simt.call(library.run_product, left, right, out, dtype == torch.float16, False)
    assert out.isnan().any()  # the kernel did not wait for the copies


def test_a_missing_barrier_shows(library, memory):
    values, out = memory.put(torch.arange(128.0)), memory.empty(128, dtype=torch.float32)
    for seed in SEEDS:
        library.simt_seed(seed)
        simt.call(library.run_neighbour, values, out, 128, True)
        assert torch.equal(out, values.roll(-33))
        simt.call(library.run_neighbour, values, out, 128, False)
        assert out.isnan().any()


def test_static_shared_memory_starts_undefined(library, memory):
    out = memory.put(torch.zeros(64))
    simt.call(library.run_static_poison, out)
    assert (out[:8] == 1).all() and out[8:].isnan().all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found_and_named_and_the_next_kernel_runs(library, mistake, seed):
    library.simt_seed(seed)
    with simt.Memory(library) as memory:
        buffer = memory.put(torch.zeros(16))
        with pytest.raises(simt.Fault, match=MISTAKES[mistake]):
            simt.call(library.run_mistaken, list(MISTAKES).index(mistake), buffer, 16)
    with simt.Memory(library) as memory:
        simt.call(library.run_mistaken, len(MISTAKES), memory.put(torch.zeros(16)), 16)
