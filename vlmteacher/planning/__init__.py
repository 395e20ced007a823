"""FLOPs and peak memory of one optimisation step, at any size, without weights, GPU or network.

The models are built from their configs on the meta device, and the step is traced there, by the classes and functions
that run on real tensors. Counted are every product and attention, and every storage from its allocation to its release,
as by an allocator without losses. Equal layers are traced once or twice and added up (`per_layer`).
"""

from vlmteacher.planning.plan import GB, Step, make_plan
from vlmteacher.planning.table import format_plan

__all__ = ["GB", "Step", "format_plan", "make_plan"]
