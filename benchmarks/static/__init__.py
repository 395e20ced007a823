"""Registers, spills, shared memory and theoretical occupancy of every GPU kernel, by the compilers and without a GPU.

    python -m benchmarks.static [--only triton|cuda] [--operator NAME] [--write]

For every operator of vlmteacher/ops/manifest.py nvcc compiles csrc/NAME/instances.cu, and Triton compiles the launches
of `examples()` in kernels/NAME.py for their types and tiles. `--write` saves the table as benchmarks/static/table.md.
"""
