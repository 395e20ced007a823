"""FLOPs and peak memory of one optimisation step, at any size, without weights, GPU or network.

The models are built from their configs on the meta device and the step itself, the same classes and functions that run
on real tensors, is traced there: every product and attention is counted, and every storage from its birth to its death,
as an allocator without losses would see it. Layers that are alike are traced once or twice and added up (`per_layer`).
"""

from vlmteacher.planning.plan import GB, Step, make_plan
from vlmteacher.planning.table import format_plan

__all__ = ["GB", "Step", "format_plan", "make_plan"]
