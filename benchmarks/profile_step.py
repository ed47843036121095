"""Where koat's own step time goes: operators by kind, and what single choices cost. Compares with no peer."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.command import keep_quiet, parse_options
from benchmarks.compare_training import STEP, Ours, build_ours
from benchmarks.machine import measure_matrix_rate
from benchmarks.measure import interleave
from benchmarks.workload import Options, open_tokenizer, read_context_qa, read_instructions
from koat.adapters.methods import Ia3Settings
from koat.core.sequence import Sequence
from koat.forest.attend import render_mask
from koat.forest.pack import MicroBatch
from koat.forest.score import cut_sequences, token_logprobs, unwrap
from koat.training.sampler import plan_steps

KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "linear", "matmul"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "norms": ("norm", "rsqrt"),
    "head's softmax": ("logsumexp", "index_select", "index_add", "exp", "amax", "log_softmax"),
    "copies and casts": ("copy_", "_to_copy", "contiguous", "clone", "cat", "to"),
}
"""Kinds of operators by parts of their names; what fits nothing is elementwise."""


def read_steps(options: Options, kind: str) -> list[list[Sequence]]:
    """Return two steps of examples of a benchmark, as the grouped sampler makes them."""
    tokenizer = open_tokenizer(options)
    if kind == "context QA":
        sequences = read_context_qa(options, tokenizer, "train", 2 * STEP)
    else:
        sequences = read_instructions(options, tokenizer, 2 * STEP)
    plan = plan_steps(sequences, "grouped", STEP, 1, None, options.seed)
    return [[sequences[index] for index in step] for step in plan.order_epoch(0)]


def run_parts(ours: Ours, step: list[Sequence]) -> dict[str, float]:
    """Run one step taken apart and return the seconds of each part."""
    seconds: dict[str, float] = defaultdict(float)

    def clock(name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        with record_function(name):
            made = work()
        seconds[name] += time.perf_counter() - began
        return made

    settings, layout = ours.settings, ours.layout
    batches = clock("packing in Python", lambda: list(cut_sequences(step, layout, settings.tokens_per_microbatch)))
    for batch in batches:
        assert layout.plan is not None
        plan, dtype = layout.plan, unwrap(ours.model).dtype
        clock("mask", lambda: render_mask(plan, batch.position, batch.subtree_end, dtype))  # noqa: B023
        loss = clock("forward (with mask)", lambda: -token_logprobs(ours.model, batch, layout).sum())  # noqa: B023
        clock("backward", loss.backward)
    return seconds


def sort_operators(ours: Ours, step: list[Sequence]) -> dict[str, float]:
    """Profile one step and return milliseconds of own time by kind of operator."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run_parts(ours, step)
    found: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if not event.key.startswith("aten::"):
            continue
        name = event.key.removeprefix("aten::")
        kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "elementwise")
        found[kind] += event.self_cpu_time_total / 1000
    return dict(found)


def time_kernels(batch: MicroBatch, model: Any, rounds: int) -> dict[str, float]:
    """Time one layer's attention, forward and backward, under each way of giving the mask."""
    from koat.forest.attend import make_visible

    config = unwrap(model).config
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    shape = (*batch.token_ids.shape, heads, width)
    dtype = unwrap(model).dtype
    inputs = [torch.randn(shape).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3)]
    visible = make_visible(batch.position, batch.subtree_end)
    additive = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))

    def attend(**keywords: Any) -> Callable[[], None]:
        def work() -> None:
            torch.nn.functional.scaled_dot_product_attention(*inputs, **keywords).sum().backward()

        return work

    sides = {
        "boolean mask": attend(attn_mask=visible),
        "additive mask": attend(attn_mask=additive),
        "causal, no mask (not exact)": attend(is_causal=True),
    }
    interleave(sides, 1, torch.device("cpu"))
    return interleave(sides, rounds, torch.device("cpu"))


def time_rows(ours: Ours, total: int, lengths: tuple[int, ...]) -> dict[int, float]:
    """Return seconds per token of forward and backward when `total` tokens travel in rows of each length."""
    generator = torch.Generator().manual_seed(0)

    def make(length: int) -> Callable[[], None]:
        count = max(1, total // length)
        ids = torch.randint(2, 8000, (count, length), generator=generator)
        rows = [Sequence(tuple(row), (False,) * (length - 8) + (True,) * 8) for row in ids.tolist()]
        layout = replace(ours.layout, max_row_length=length)

        def work() -> None:
            for batch in cut_sequences(rows, layout, count * length):
                (-token_logprobs(ours.model, batch, layout).sum()).backward()

        return work

    sides = {str(length): make(length) for length in lengths}
    seconds = interleave(sides, 3, torch.device("cpu"))
    return {length: seconds[str(length)] / (max(1, total // length) * length) for length in lengths}


def fit_quadratic(per_token: Mapping[int, float]) -> tuple[float, float]:
    """Fit `seconds per token = a (1 + q * length)`; return (a, q), q being what `RowCost.quadratic` means."""
    lengths = torch.tensor([float(length) for length in per_token])
    values = torch.tensor(list(per_token.values()))
    design = torch.stack([torch.ones_like(lengths), lengths], 1)
    offset, slope = torch.linalg.lstsq(design, values[:, None]).solution.flatten().tolist()
    return offset, slope / offset


def show(title: str, values: Mapping[Any, float], unit: str = "ms", factor: float = 1e3) -> None:
    """Print named numbers under a title."""
    print(f"\n{title}")
    for name, value in values.items():
        print(f"  {name!s:32s} {value * factor:10.2f} {unit}")


def main() -> None:
    """Profile every family and precision on both kinds of data."""
    options = parse_options(description=__doc__)
    keep_quiet()
    for family in options.families:
        for precision in options.precisions:
            ours = build_ours(family, precision, Ia3Settings(), options)
            ours.model.train()
            rate = measure_matrix_rate(getattr(torch, precision), options.device, seconds=0.1)
            print(f"\n=== {family} {precision}; matrix rate {rate / 1e9:.0f} GFLOP/s")
            print(f"RowCost.quadratic in use: 1/{1 / ours.layout.cost.quadratic:.0f}")
            for kind in ("context QA", "instructions"):
                step = read_steps(options, kind)[0]
                run_parts(ours, step)
                show(f"{kind}: one step taken apart", run_parts(ours, step))
                show(f"{kind}: operators by kind", sort_operators(ours, step), factor=1)
                batches = list(cut_sequences(step, ours.layout, ours.settings.tokens_per_microbatch))
                tokens = sum(batch.num_tokens for batch in batches)
                padded = sum(batch.token_ids.numel() for batch in batches)
                shapes = ", ".join(f"{batch.token_ids.shape[0]}x{batch.token_ids.shape[1]}" for batch in batches)
                print(f"  {kind}: {sum(map(len, step))} original, {tokens} unique, {padded} with padding: {shapes}")
                show(
                    f"{kind}: attention of one layer",
                    time_kernels(batches[0], ours.model, 3 if options.quick else 9),
                )
            lengths = (128, 512, 1024) if options.quick else (64, 128, 256, 512, 1024, 2048)
            per_token = time_rows(ours, lengths[-1], lengths)
            show("rows: time per token by row length", per_token, "us", 1e6)
            print(f"  fitted RowCost.quadratic: 1/{1 / fit_quadratic(per_token)[1]:.0f}")
    sys.exit(0)


if __name__ == "__main__":
    main()
