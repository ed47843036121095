"""Find out whether prompts that grow as a forest write what each would be continued with by itself."""

from __future__ import annotations

import logging
from weakref import WeakKeyDictionary

import torch
from torch import nn

from koat.core.differences import find_largest
from koat.core.out_of_memory import is_out_of_memory
from koat.core.precision import exact_products
from koat.core.sequence import supervise_from
from koat.core.soft_prompt import has_soft_prompt
from koat.forest.grow import grow_forest
from koat.forest.kernels import find_kernel, pick_cached
from koat.forest.probe import make_probe, single_logprobs
from koat.forest.score import Layout, set_kernel, unwrap
from koat.forest.twin import make_twin, shrink_windows
from koat.forest.verify import TWIN_TOLERANCE, describe_error

NUM_NEW = 12
"""Tokens that prompts are let to write on the twin."""
log = logging.getLogger(__name__)
_VERDICTS: WeakKeyDictionary[nn.Module, dict[Layout, bool]] = WeakKeyDictionary()


@torch.no_grad()
def verify_growth(model: nn.Module, layout: Layout) -> bool:
    """Whether prompts that grow as a forest write, on a float32 twin, what plain passes find likeliest.

    It is found out once for a model and layout: a twin of a wide model takes a while to make.
    """
    if not layout.shares or has_soft_prompt(model):
        return False
    verdicts = _VERDICTS.setdefault(unwrap(model), {})
    if layout not in verdicts:
        verdicts[layout] = _try_growth(model, layout)
    return verdicts[layout]


def _try_growth(model: nn.Module, layout: Layout) -> bool:
    """Measure how exact growth is, and say what is done instead where it is not."""
    try:
        worst = measure_growth(model, layout)
    except Exception as error:  # the model's own code may fail in any way on inputs it does not know
        if is_out_of_memory(error):
            raise
        reason = describe_error(error)
    else:
        if worst <= TWIN_TOLERANCE:
            return True
        reason = f"log-probabilities differ by {worst:.2g} on a float32 twin"
    log.warning("Prompts are continued in left-padded batches, which share nothing: growing as a forest, %s.", reason)
    return False


@exact_products()
def measure_growth(model: nn.Module, layout: Layout) -> float:
    """Return the largest difference of what a twin's prompts write from plain passes over prompt and text."""
    twin = make_twin(model)
    prompts = [sequence.token_ids for sequence in make_probe(twin.config.vocab_size)]
    grown, _ = grow_forest(
        twin, shrink_windows(layout), prompts, NUM_NEW, lambda places, ids: torch.zeros(len(places)) > 0
    )
    wholes = [supervise_from(p + tuple(g.token_ids), len(p)) for p, g in zip(prompts, grown, strict=True)]
    set_kernel(twin, pick_cached(twin, find_kernel(twin.config)))
    return find_largest(
        float((torch.tensor(each.logprobs) - expected.cpu()).abs().max())
        for each, expected in zip(grown, single_logprobs(twin, wholes), strict=True)
    )
