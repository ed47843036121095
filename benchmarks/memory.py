"""What `koat plan` says of memory, beside what a training step takes: methods, families, lengths, checkpointing.

Planned from the configuration alone, on shapes. Measured on the model itself: the bytes that autograd keeps
(saved-tensor hooks), and the most bytes alive during a step, with weights, adapter, gradients and optimizer as they
lie in memory. On a GPU: larger models, and what PyTorch's allocator gave out (`max_memory_allocated`). Long contexts
add the growth of a process (`benchmarks.long_contexts`).
"""

from __future__ import annotations

import copy
import gc
import tempfile
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.command import main
from benchmarks.kept import count_kept_bytes
from benchmarks.long_contexts import train_alone
from benchmarks.measure import Findings, Result, Table
from benchmarks.workload import SIZES, Absent, Options, build_base
from koat.adapters.attach import attach_adapter
from koat.adapters.methods import METHODS
from koat.core.sequence import Sequence
from koat.core.settings import ModelSettings, TrainingSettings
from koat.forest.pack import MicroBatch, collate_rows
from koat.forest.score import Layout, run_rows, token_logprobs
from koat.forest.verify import verify_layout
from koat.model import load_model
from koat.training.optimizer import build_optimizer
from koat.workflows.planning.memory import Footprint, measure_base, measure_footprint
from koat.workflows.planning.simulate import LiveBytes, set_checkpointing

MARK = 0.10
"""How far a plan may be from what is measured."""
QUICK = {"vocab_size": 512, "num_hidden_layers": 4}
"""Quick models get a small head: it would be all there is."""
GROUPED = ("mixtral", "qwen3")
"""Families whose own defaults name key-value heads for another size."""


@dataclass(frozen=True)
class Case:
    """One step: a method on a family, rows of some tokens, with or without checkpointing."""

    method: str
    family: str
    num_rows: int
    length: int
    checkpointing: bool = False
    precision: str = "float32"
    optimizer: str = "adamw"

    def __str__(self) -> str:
        more = ", checkpointing" if self.checkpointing else ""
        return f"{self.method} {self.family} {self.precision} {self.num_rows} x {self.length}{more}"


CASES = (
    Case("ia3", "llama", 1, 512),
    Case("ia3", "llama", 4, 256, checkpointing=True),
    Case("ia3", "gpt_neox", 2, 384),
    Case("ia3", "gpt_neox", 2, 384, precision="bfloat16"),
    Case("ia3", "qwen3", 1, 768, precision="bfloat16"),
    Case("lora", "llama", 2, 384),
    Case("lora", "llama", 1, 1024, checkpointing=True),
    Case("lora", "llama", 2, 384, precision="bfloat16"),
    Case("lora", "gpt_neox", 1, 1024),
    Case("lora", "gpt_neox", 2, 512, checkpointing=True, precision="bfloat16"),
    Case("lora", "bloom", 2, 256),
    Case("lora", "mixtral", 2, 256),
    Case("prompt", "llama", 2, 384),
    Case("prompt", "gpt_neox", 1, 512, checkpointing=True),
    Case("p_tuning", "qwen3", 2, 256),
    Case("prefix", "llama", 2, 256),
    Case("prefix", "gpt_neox", 1, 512),
    Case("full", "llama", 2, 384),
    Case("full", "gpt_neox", 1, 1024, checkpointing=True),
)

GPU_CASES = (
    Case("ia3", "gpt_neox", 2, 1024, precision="bfloat16"),
    Case("ia3", "gpt_neox", 8, 1024, checkpointing=True, precision="bfloat16"),
    Case("ia3", "llama", 2, 1024, precision="bfloat16"),
    Case("ia3", "qwen3", 2, 1024, precision="bfloat16"),
    Case("lora", "gpt_neox", 2, 1024, precision="bfloat16"),
    Case("lora", "llama", 2, 1024, precision="bfloat16"),
    Case("lora", "llama", 1, 1024),
    Case("lora", "llama", 4, 2048, checkpointing=True, precision="bfloat16"),
    Case("lora", "olmo2", 2, 1024, precision="bfloat16"),
    Case("lora", "bloom", 2, 512, precision="bfloat16"),
    Case("prompt", "llama", 2, 1024, precision="bfloat16"),
    Case("prompt", "gpt_neox", 4, 1024, checkpointing=True, precision="bfloat16"),
    Case("p_tuning", "llama", 2, 1024, precision="bfloat16"),
    Case("prefix", "llama", 2, 1024, precision="bfloat16"),
    Case("full", "gpt_neox", 1, 1024, precision="bfloat16"),
    Case("full", "llama", 2, 2048, checkpointing=True, precision="bfloat16"),
    Case("lora", "llama", 2, 1024, precision="nf4"),
    Case("lora", "llama", 4, 2048, checkpointing=True, precision="nf4"),
    Case("ia3", "gpt_neox", 2, 1024, precision="nf4"),
)
"""On a GPU, at 1.3 billion parameters: what is smaller than these drowns in the workspace of its libraries."""
GPU_SIZE = "1.3b"


@dataclass(frozen=True)
class Measured:
    """Bytes that one step took."""

    kept: int
    peak: int
    kernel: str


def build(case: Case, options: Options) -> Any:
    """Build a case's frozen base with random weights."""
    if case.precision == "nf4":
        return build_quantised(case.family, options)
    width, _, heads = SIZES[options.size]
    shape: dict[str, Any] = {**QUICK} if options.quick else {}
    if case.family in GROUPED:
        shape |= {"num_key_value_heads": heads // 2, "head_dim": width // heads}
    return build_base(case.family, options, case.precision, **shape)


def build_quantised(family: str, options: Options) -> Any:
    """Build a frozen base with random weights in 4 bit: as koat loads one from a folder."""
    with tempfile.TemporaryDirectory() as folder:
        build_base(family, options, "bfloat16").save_pretrained(folder)
        settings = ModelSettings(base=folder, quantisation="nf4", dtype="bfloat16", device=str(options.device))
        return load_model(settings)


def settle(case: Case) -> TrainingSettings:
    """Return a case's training settings."""
    return TrainingSettings(activation_checkpointing=case.checkpointing, optimizer=case.optimizer)  # type: ignore[arg-type]


def plan_case(case: Case, config: Any, options: Options) -> Footprint:
    """Plan a case as `koat plan` does, from the configuration of its base."""
    quantised = {"quantisation": "nf4", "dtype": "bfloat16"} if case.precision == "nf4" else {"dtype": case.precision}
    settings = ModelSettings(base="random", device=str(options.device), **quantised)  # type: ignore[arg-type]
    training = settle(case)
    return measure_footprint(measure_base(settings, training, config), METHODS[case.method].settings(), training)


def draw_rows(num_rows: int, length: int, vocabulary: int, seed: int) -> list[Sequence]:
    """Return sequences of one token more than `length`: the last one predicts nothing and is left out of a row."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(2, vocabulary, (num_rows, length + 1), generator=generator)
    return [Sequence(tuple(row), (False,) + (True,) * length) for row in drawn.tolist()]


def count_bytes(tensors: ListLike[Tensor]) -> int:
    """Return the bytes of the distinct storages of some tensors."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def list_moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the tensors in an optimizer's state."""
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def measure_case(case: Case, options: Options) -> tuple[Measured, Any]:
    """Run a case's step, twice, the second time with gradients and moments in place, and count its bytes."""
    gc.collect()
    before = torch.cuda.memory_allocated() if options.device.type == "cuda" else 0
    base = build(case, options)
    config = copy.deepcopy(base.config)
    model = attach_adapter(base, METHODS[case.method].settings())
    layout, verification = verify_layout(model)
    set_checkpointing(model, case.checkpointing)
    model.train()
    rows = draw_rows(case.num_rows, case.length, config.vocab_size, options.seed)
    batch = collate_rows(rows, [[number] for number in range(len(rows))]).to(options.device)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = build_optimizer(trained, settle(case))
    (-token_logprobs(model, batch, layout).sum()).backward()
    optimizer.step()
    if options.device.type == "cuda":
        return Measured(*watch_gpu(model, batch, layout, before), verification.kernel), config
    fixed = [*model.parameters(), *(weight.grad for weight in trained), *list_moments(optimizer)]
    own = [*fixed, *model.buffers()]
    with LiveBytes(own) as live:
        loss = -token_logprobs(model, batch, layout).sum()
        loss.backward()
    del loss
    if case.checkpointing:
        with LiveBytes(own) as alive:
            hidden = run_rows(model, batch, layout)
            kept = alive.live
        del hidden
    else:
        kept = count_kept_bytes(model, lambda: run_rows(model, batch, layout))
    return Measured(kept, count_bytes(fixed) + live.peak, verification.kernel), config


def watch_gpu(model: Any, batch: MicroBatch, layout: Layout, before: int) -> tuple[int, int]:
    """Return what the GPU holds after the layers' forward pass beside what it held, and its peak over `before`."""
    torch.cuda.reset_peak_memory_stats()
    (-token_logprobs(model, batch, layout).sum()).backward()
    peak = torch.cuda.max_memory_allocated() - before
    held = torch.cuda.memory_allocated()
    hidden = run_rows(model, batch, layout)
    kept = torch.cuda.memory_allocated() - held
    del hidden
    return kept, peak


def judge(planned: float, measured: float) -> str:
    """Return whether a plan is near enough."""
    return "held" if abs(planned - measured) <= MARK * measured else "MISSED"


def compare_cases(cases: ListLike[Case], options: Options) -> tuple[Table, bool]:
    """Plan and measure each case; return the table and whether all are near enough."""
    table = Table(
        f"Planned and measured memory of a step, {options.size} models, MB",
        ("case", "kernel", "kept, planned", "measured", "ratio", "peak, planned", "measured", "ratio", "mark"),
        [],
    )
    for case in cases:
        measured, config = measure_case(case, options)
        footprint = plan_case(case, config, options)
        kept = footprint.count_activations(case.num_rows, case.length)
        peak = footprint.train_peak(case.num_rows, case.length)
        verdicts = {judge(kept, measured.kept), judge(peak, measured.peak)}
        row = (
            str(case), measured.kernel,
            f"{kept / 1e6:.2f}", f"{measured.kept / 1e6:.2f}", f"{kept / measured.kept:.3f}",
            f"{peak / 1e6:.2f}", f"{measured.peak / 1e6:.2f}", f"{peak / measured.peak:.3f}",
            "held" if verdicts == {"held"} else "MISSED",
        )  # fmt: skip
        table.rows.append(row)
        print(" | ".join(row), flush=True)
    return table, all(row[-1] == "held" for row in table.rows)


def tabulate_contexts(options: Options) -> Table:
    """Train on the longest contexts, each time in a process of its own. Raises Absent without the data."""
    header = ("method", "checkpointing", "longest, tokens", "steps", "loss", "planned, MB", "growth, MB", "of plan")
    table = Table("Training the shipped model on the longest KorQuAD contexts", header, [])
    for method in ("ia3", "lora"):
        for checkpointing in (False, True):
            growth = train_alone(options, method, checkpointing)
            row = (
                method, "yes" if checkpointing else "no", f"{growth.longest:,}", f"{growth.num_steps}",
                f"{growth.loss:.3f}", f"{growth.planned / 1e6:.0f}", f"{growth.grown / 1e6:.0f}",
                f"{growth.grown / growth.planned:.2f}",
            )  # fmt: skip
            table.rows.append(row)
            print(" | ".join(row), flush=True)
    return table


def run(options: Options, rates: dict[str, float]) -> Findings:
    """Compare all cases, then train on the longest contexts."""
    on_gpu = options.device.type == "cuda"
    sized = options if options.quick else replace(options, size=GPU_SIZE if on_gpu else "small")
    cases = [case for case in (GPU_CASES if on_gpu else CASES) if case.precision in (*options.precisions, "nf4")]
    table, held = compare_cases(cases, sized)
    findings = Findings(tables=[table])
    verdict = f"{len(table.rows)} steps within {MARK:.0%} of the plan" if held else "NOT EQUAL: a plan is too far off"
    findings.results.append(
        Result("memory", f"{sized.size} models", "both", "all", "measured", verdict, held, "one step each, see below")
    )
    try:
        findings.tables.append(tabulate_contexts(options))
    except Absent as reason:
        findings.skipped.append(f"long contexts: {reason}")
    return findings


if __name__ == "__main__":
    main(run, __doc__)
