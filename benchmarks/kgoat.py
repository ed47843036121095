"""K(G)OAT's table on whole models: IA3 and LoRA at 1.3 and 5.8 billion parameters, time and memory of a step.

K(G)OAT trained 802,816 numbers by IA3 where LoRA trains 3,670,016, and took longer (226 against 203 minutes). Here the
same shapes with random weights, GPT-NeoX as polyglot-ko and Llama beside it, in bfloat16: the frozen base with
activation gradients only (the floor), IA3 and LoRA by koat and by PEFT, with one base between them. That koat's IA3
and PEFT's compute the same is checked on two of the layers: through tens of random ones rounding grows to anything. A
step is the layers' forward and backward pass; the head is the same on every side and left out. A GPU's memory is
needed: without one, `--quick` shows that it runs.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.command import main
from benchmarks.ia3 import PEER, STEP_MARK, compare_with_peft, make_sides, randomise
from benchmarks.kept import draw_inputs, run_layers
from benchmarks.measure import Findings, Result, Table, compare_rounds, take_turns
from benchmarks.workload import Absent, Options, build_base
from koat.adapters.attach import attach_adapter, count_trainable
from koat.adapters.methods import LoraSettings

SIZES = {"gpt_neox": ("1.3b", "5.8b"), "llama": ("1.3b",)}
ROWS, LENGTH, NUM_ROUNDS, NUM_STEPS = {"1.3b": 16, "5.8b": 8}, 1024, 9, 3
"""Rows of a step, so many that a GPU does not wait for the processor, and their tokens; rounds that are timed; a side's
steps in a row, the first not counted."""
LORA = "LoRA r=8"
OURS, OUR_LORA = "koat IA3", "koat LoRA r=8"


def share_weights(base: Any) -> Any:
    """Return a copy of a model's modules that hold the very same weights."""
    held = [*base.parameters(), *base.buffers()]
    return copy.deepcopy(base, {id(tensor): tensor for tensor in held})


def list_sides() -> dict[str, Callable[[Any], Any]]:
    """Return how each side puts its adapter on a base model: those of `benchmarks.ia3`, and koat's LoRA."""
    sides = make_sides()
    return {name: sides[name] for name in ("floor", "lean base", OURS, PEER, LORA)} | {OUR_LORA: attach_lora}


def attach_lora(base: Any) -> Any:
    """Return a base with koat's LoRA on the layers that PEFT's own defaults name."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    return attach_adapter(base, LoraSettings(r=8, alpha=8, targets=list(DEFAULTS[base.config.model_type])))


def run_step(model: Any, inputs: Tensor, direction: Tensor) -> None:
    """Run a model's layers forward and backward."""
    model.zero_grad(set_to_none=True)
    run_layers(model, inputs).backward(direction)


def measure_peak(work: Callable[[], None], device: torch.device) -> int:
    """Return the bytes that a piece of work takes at most beside what is there; 0 where there is no GPU."""
    if device.type != "cuda":
        return 0
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def judge(ratios: dict[str, float]) -> str:
    """Return whether koat's IA3 is near the floor and faster than LoRA, koat's own as well."""
    return "held" if ratios[OURS] <= min(STEP_MARK, ratios[LORA], ratios[OUR_LORA]) else "MISSED"


def measure_model(family: str, options: Options, findings: Findings) -> None:
    """Add one family and size to the findings."""
    rows, length = (2, 64) if options.quick else (ROWS[options.size], LENGTH)
    checks = compare_with_peft(family, "bfloat16", options)
    passed = all(check.passed for check in checks)
    base = build_base(family, options, "bfloat16", vocab_size=64)
    base.set_attn_implementation("sdpa")
    models = {name: wrap(share_weights(base)) for name, wrap in list_sides().items()}
    for model in models.values():
        randomise(model, options.seed)
    result = Result(
        "K(G)OAT's table", f"{family} {options.size}", "bfloat16", "ia3", LORA, "; ".join(map(str, checks)), passed,
        f"{rows} x {length} tokens, layers forward and backward; {LORA}: plain PEFT on its own targets",
    )  # fmt: skip
    findings.results.append(result)
    if passed:
        inputs = draw_inputs(base, length, rows)
        direction = torch.randn(inputs.shape).to(inputs)
        steps = {name: functools.partial(run_step, model, inputs, direction) for name, model in models.items()}
        rounds = options.asked_rounds or NUM_ROUNDS
        seconds = take_turns(steps, rounds, NUM_STEPS, options.device, options.seed)
        ratios = compare_rounds(seconds, "floor")
        result.rate, result.peer_rate = (rows * length / median(seconds[name]) for name in (OURS, LORA))
        result.notes = f"koat's step is {ratios[OURS]:.3f} of the frozen base's"
        for name, model in models.items():
            row = (
                f"{family} {options.size}", name, f"{count_trainable(model):,}", f"{1e3 * median(seconds[name]):.1f}",
                f"{ratios[name]:.3f}", f"{measure_peak(steps[name], options.device) / 1e9:.2f}",
                judge(ratios) if name == OURS else "",
            )  # fmt: skip
            findings.tables[0].rows.append(row)
            print(" | ".join(row), flush=True)
    print(result.describe(), flush=True)


def run(options: Options, rates: dict[str, float]) -> Findings:
    """Measure every family and size. Raises Absent without a GPU."""
    if options.device.type != "cuda" and not options.quick:
        raise Absent("models of billions of parameters want a GPU; --quick shows that it runs")
    header = ("model", "side", "trained", "step, ms", "of floor", "peak beside weights, GB", "marks")
    findings = Findings(tables=[Table("K(G)OAT's table: a step of all layers", header, [])])
    for family in options.families:
        for size in (options.size,) if options.quick else SIZES[family]:
            measure_model(family, replace(options, size=size), findings)
    return findings


if __name__ == "__main__":
    main(run, __doc__)
