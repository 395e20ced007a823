"""The Triton kernels of rms_norm against the definition in float64, in Triton's interpreter."""

from __future__ import annotations

from tests.kernels.interpreter import interpreted, with_triton


@with_triton
def test_triton_in_its_interpreter(tmp_path):
    rows = interpreted("rms_norm_process", tmp_path)
    assert len(rows) >= 8
    assert not [row for row in rows if not row["part"] <= 1]  # a NaN fails too
