"""Context parallelism: the tokens of a video shared by several GPUs, by diffusers' own plan for the model.

The blocks run on the rank's tokens; self-attention exchanges tokens for heads and back (Ulysses, arXiv 2309.14509), and
the output is put together on every rank. The LoRA's gradient on a rank is that of its tokens: the sum over the ranks is
the whole one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from vlmteacher.errors import InputError
from vlmteacher.ranks import Ranks
from vlmteacher.reasoners.registry import FAMILIES, family_of

if TYPE_CHECKING:
    from vlmteacher.reasoners.base import Reasoner


def check_ranks(reasoner: Reasoner, ranks: Ranks) -> None:
    """Raise InputError for a Reasoner whose tokens `ranks` cannot share."""
    if ranks.size == 1:
        return
    family = family_of(reasoner.transformer)
    if not family.shares_tokens:
        known = ", ".join(each.name for each in FAMILIES if each.shares_tokens)
        raise InputError(f"context parallelism does not work for {family.name}, only for {known}: leave it out")
    for name, network in _transformers(reasoner).items():
        heads = network.config.num_attention_heads
        if heads % ranks.size:
            counts = [n for n in range(2, heads + 1) if heads % n == 0]
            raise InputError(
                f"--context-parallel {ranks.size}: the {heads} heads of the {name} cannot be shared evenly: give"
                f" {', '.join(map(str, counts))}"
            )
        backends = {getattr(module, "_attention_backend", None) for module in network.attn_processors.values()}
        if other := backends - {None, "native"}:
            raise InputError(
                f"context parallelism takes the attention backend native only, the {name} has"
                f" {', '.join(str(getattr(each, 'value', each)) for each in other)}: leave set_attention_backend out"
            )


def check_tokens(reasoner: Reasoner, ranks: Ranks, size: Mapping[str, int]) -> None:
    """Raise InputError for a video whose tokens the ranks cannot share evenly."""
    if ranks.size == 1:
        return
    latents = reasoner.latent_shape(**size)[2:]
    tokens = math.prod(latents) // math.prod(reasoner.transformer.config.patch_size)
    if tokens % ranks.size:
        raise InputError(
            f"--context-parallel {ranks.size}: the {tokens} tokens of a video of {size['num_frames']} frames of"
            f" {size['width']}x{size['height']} cannot be shared evenly: give another number of ranks or another size"
        )


def _transformers(reasoner: Reasoner) -> dict[str, Any]:
    return {name: network for name, network in reasoner.networks.items() if name.startswith("transformer")}


@contextmanager
def shared_tokens(reasoner: Reasoner, ranks: Ranks) -> Iterator[None]:
    """Inside the block, the Reasoner's transformers share the tokens of their input among the ranks.

    Timesteps of single tokens must be those of the rank's own (see `own_tokens.py`): diffusers' plan would split those
    of a first frame and of the rest, two for all tokens, as if they were tokens. Its `enable_parallelism` takes the
    same steps, but cannot be undone and fails where there is no GPU.
    """
    if ranks.size == 1:
        yield
        return
    from diffusers import ContextParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel, remove_context_parallel
    from diffusers.models._modeling_parallel import ParallelConfig

    with ExitStack() as undo:
        for network in _transformers(reasoner).values():
            context = ContextParallelConfig(ulysses_degree=ranks.size, mesh=ranks.mesh)
            config = ParallelConfig(context_parallel_config=context)
            config.setup(ranks.rank, ranks.size, reasoner.device, mesh=ranks.mesh)
            plan = {name: split for name, split in network._cp_plan.items() if name}
            owners = [network, *(each for each in network.attn_processors.values())]
            for owner in owners:
                owner._parallel_config = config
                undo.callback(setattr, owner, "_parallel_config", None)
            apply_context_parallel(network, context, plan)
            undo.callback(_forget_hooks, [network.get_submodule(name) for name in plan])
            undo.callback(remove_context_parallel, network, plan)
        yield


def _forget_hooks(modules: Iterable[Any]) -> None:
    """Give modules without a hook of diffusers the forward of their class again, which may be another one now."""
    for module in modules:
        if not module._diffusers_hook.hooks:
            del module._diffusers_hook, module.forward
