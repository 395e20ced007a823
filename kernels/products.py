"""What the Triton kernels that multiply matrices share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_product(total, left, right):
    """total + left . right.

    float32 is not rounded to TF32, and a step's sum is its own: sums of few, then a sum of few sums, round less than
    one long sum. The compiler would make one of them, were it not told how many may be added up at a time.
    """
    if left.dtype == tl.float32:
        return total + tl.dot(left, right, input_precision="ieee", max_num_imprecise_acc=left.shape[1])
    return tl.dot(left, right, total)
