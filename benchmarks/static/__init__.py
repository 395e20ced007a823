"""What the compilers make of the GPU kernels, without a GPU: registers, spills, shared memory, occupancy on paper.

    python -m benchmarks.static [--only triton|cuda] [--operator NAME] [--write]

Every csrc/*/instances.cu is compiled by nvcc; every Triton kernel that an operator of `triton_examples.py` launches is
compiled by Triton for that launch's types and tiles. `--write` keeps the table in benchmarks/static/table.md.
"""
