"""IA3's price: bytes kept for backward and the time of a step, beside the frozen base, PEFT's IA3 and LoRA r=8.

The frozen base as transformers has it, with activation gradients only, is the floor. Beside it stands the same base
with the norms, projections and rotary positions that koat gives every frozen model, so that what they save is not
taken for IA3's. IA3 has the paper's targets on both sides, LoRA PEFT's own targets and, as a further column, all linear
layers. Bytes are counted per token and layer, so no layer outside the repeated ones, no head and no embedding has a
part in them.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training, set_peft_model_state_dict
from torch import Tensor

from benchmarks.command import main
from benchmarks.kept import draw_inputs, measure_layer, run_layers
from benchmarks.measure import Check, Findings, Result, Table, check_equal, compare_rounds, take_turns
from benchmarks.workload import SIZES, Absent, Options, build_base
from koat.adapters.architectures import find_architecture
from koat.adapters.attach import attach_adapter, read_adapter_state
from koat.adapters.frozen import refine_frozen
from koat.adapters.ia3 import Ia3Linear, make_ia3_config
from koat.adapters.methods import Ia3Settings
from koat.core.settings import ModelSettings
from koat.model import load_model

SHAPES = {
    "llama": ("llama", 1, 1.05),
    "llama, 1 key-value head of 4": ("llama", 4, 1.05),
    "gpt_neox": ("gpt_neox", 1, 1.10),
}
"""Family, query heads to a key-value head, and what koat's IA3 may keep in bfloat16, over the floor."""
STEP_MARK = 1.05
"""What koat's step may take, over the floor's."""
PEER = "PEFT IA3"
NUM_LAYERS = 2
"""What is compared and timed: layers are alike, two of them tell."""
NUM_STEPS = 3
"""A side's steps in a row."""


@dataclass(frozen=True)
class Work:
    """What a step computes: a size of `SIZES`, rows and their length in tokens, and how often it is timed."""

    size: str
    rows: int
    length: int
    num_rounds: int

    @property
    def num_tokens(self) -> int:
        """Tokens of a step."""
        return self.rows * self.length


SHORT = Work("small", 2, 256, 51)
"""Also what is compared: a call costs as much as its arithmetic here."""
USUAL = Work("small", 8, 512, 9)
"""The tokens of koat's own micro-batches, `training.tokens_per_microbatch`."""
WIDE = Work("1.3b", 2, 256, 7)
"""Multiplying by a vector costs the less, the wider the layers."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3, "nf4": 0.3}
"""Largest difference allowed between two numbers, over their standard deviation."""

Wrap = Callable[[Any], Any]


def make_sides() -> dict[str, Wrap]:
    """Return how each side puts its adapter on a base model."""
    return {
        "floor": lambda base: base,
        "lean base": make_lean,
        "koat IA3": lambda base: attach_adapter(base, Ia3Settings()),
        PEER: lambda base: wrap_with_peft(settle_for_peft(base), make_ia3_config(Ia3Settings(), base.config)),
        "LoRA r=8": lambda base: wrap_with_peft(base, LoraConfig(task_type="CAUSAL_LM", r=8)),
        "LoRA r=8 all-linear": lambda base: wrap_with_peft(
            base,
            LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=list(find_architecture(base.config).linears)),
        ),
    }


def make_lean(base: Any) -> Any:
    """Return a frozen base with koat's norms, projections and rotary positions and no adapter."""
    refine_frozen(base)
    return base


def wrap_with_peft(base: Any, config: Any) -> Any:
    """Return plain PEFT's model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(base, config)


def build(name: str, base: str, options: Options, depth: int) -> Any:
    """Build a random frozen base of a shape and depth. Raises Absent for NF4 without bitsandbytes."""
    family, group, _ = SHAPES[name]
    shape = {"num_hidden_layers": depth, "vocab_size": 64}
    if group > 1:
        shape["num_key_value_heads"] = SIZES[options.size][2] // group
    if base != "nf4":
        return build_base(family, options, base, **shape)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise Absent(f"bitsandbytes is not installed ({error}); it comes with the extra `quant`") from error
    with tempfile.TemporaryDirectory() as folder:
        build_base(family, options, "bfloat16", **shape).save_pretrained(folder)
        settings = ModelSettings(base=folder, quantisation="nf4", dtype="bfloat16", device=str(options.device))
        return load_model(settings).requires_grad_(False).eval()


def randomise(model: Any, seed: int) -> None:
    """Move an adapter away from the identity: there, a wrong gradient may hide."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            noise = 0.1 * torch.randn(weight.shape, generator=generator)
            weight.data += noise.to(weight.device, weight.dtype)


def settle_for_peft(base: Any) -> Any:
    """Prepare a 4-bit base as PEFT's manual says: its IA3 makes 4-bit layers' outputs float32, so the rest must be."""
    if getattr(base, "is_loaded_in_4bit", False):
        return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    return base


def wants_autocast(side: str, base: str) -> bool:
    """Whether a side runs under autocast only: PEFT's IA3 on a 4-bit base, where keys are float32, queries not."""
    return side == PEER and base == "nf4"


def compute(model: Any, autocast: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a loss for each token and the adapter's gradients, after one pass over random numbers."""
    hidden = run_layers(model, draw_inputs(model, SHORT.length, SHORT.rows), autocast=autocast)
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(hidden.device)
    losses = (hidden.float() * direction).sum(-1)
    losses.sum().backward()
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    return losses.detach().flatten(), {name: weight.grad.flatten() for name, weight in named}


def find_held(model: Any) -> dict[str, Tensor]:
    """Return the marks `[d]` of entries that koat holds at one, by the names of their vectors."""
    return {
        f"{path}.ia3_l.default": module.held
        for path, module in model.named_modules()
        if isinstance(module, Ia3Linear) and module.held is not None
    }


def compare_with_peft(name: str, base: str, options: Options) -> list[Check]:
    """Check that koat's and PEFT's IA3 compute the same losses and gradients at the same vectors.

    Entries that koat holds at one are left out: PEFT has no such thing and trains them.
    """
    sides = make_sides()
    ours, theirs = (sides[side](build(name, base, options, NUM_LAYERS)) for side in ("koat IA3", PEER))
    randomise(ours, options.seed)
    set_peft_model_state_dict(theirs, read_adapter_state(ours))
    (losses, gradients), (expected, exact) = compute(ours, False), compute(theirs, wants_autocast(PEER, base))
    held = find_held(ours)
    free = {key: ~held[key] if key in held else torch.ones_like(exact[key], dtype=torch.bool) for key in exact}

    def compare(what: str, found: Tensor, wanted: Tensor) -> Check:
        return check_equal(what, found / wanted.std(), wanted / wanted.std(), TOLERANCE[base])

    checks = [compare("losses", losses, expected)]
    # Keys', values' and inner vectors' gradients differ in size: each vector is held against its own.
    worst = [compare("gradients", gradients[key][mark], exact[key][mark]) for key, mark in free.items()]
    return [*checks, max(worst, key=lambda check: check.difference)]


def count_kept(name: str, base: str, checkpointing: bool, options: Options) -> dict[str, float]:
    """Return each side's kept bytes per token of one more layer."""

    def make(wrap: Wrap, depth: int) -> Any:
        model = wrap(build(name, base, options, depth))
        if checkpointing:
            causal = model.get_base_model() if hasattr(model, "get_base_model") else model
            causal.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        return model

    return {
        side: measure_layer(functools.partial(make, wrap), autocast=wants_autocast(side, base))
        for side, wrap in make_sides().items()
    }


def time_steps(name: str, base: str, work: Work, options: Options) -> tuple[dict[str, float], dict[str, float]]:
    """Return each side's median seconds of a step, and its median ratio to the floor's steps of the same round."""
    models = {side: wrap(build(name, base, options, NUM_LAYERS)) for side, wrap in make_sides().items()}
    for model in models.values():
        randomise(model, options.seed)
    drawn = torch.randn(work.rows, work.length, SIZES[options.size][0]).to(options.device)
    direction = functools.cache(drawn.to)
    inputs = {side: draw_inputs(model, work.length, work.rows) for side, model in models.items()}

    def step(side: str) -> None:
        hidden = run_layers(models[side], inputs[side], autocast=wants_autocast(side, base))
        hidden.backward(direction(hidden.dtype))

    steps = {side: functools.partial(step, side) for side in models}
    seconds = take_turns(steps, options.scale(work.num_rounds, 2), NUM_STEPS, options.device, options.seed)
    return {side: median(each) for side, each in seconds.items()}, compare_rounds(seconds, "floor")


def list_works(options: Options) -> list[Work]:
    """Return what is timed: two amounts of tokens and a wider model beside the small one, else the size asked for."""
    return [SHORT, USUAL, WIDE] if options.size == "small" else [replace(WIDE, size=options.size)]


def judge_kept(name: str, kept: dict[str, float]) -> str:
    """Return whether the marks for bfloat16 are held."""
    floor, ours = kept["floor"], kept["koat IA3"]
    held = ours <= SHAPES[name][2] * floor and ours - floor <= (kept[PEER] - floor) / 3
    return "held" if held else "MISSED"


def judge_time(ratios: dict[str, float]) -> str:
    """Return whether koat's step is near the floor's and shorter than LoRA's."""
    return "held" if ratios["koat IA3"] <= min(STEP_MARK, ratios["LoRA r=8"]) else "MISSED"


def run(options: Options, rates: dict[str, float]) -> Findings:
    """Check, count and time every shape and base."""
    sides = tuple(make_sides())
    kept_table = Table(
        "Bytes kept for backward, per token and layer",
        ("shape", "base", "checkpointing", "floor, bytes", *(f"{side}, of floor" for side in sides[1:]), "marks"),
        [],
    )
    time_table = Table(
        f"A step of {NUM_LAYERS} layers",
        ("shape", "size", "tokens", "base", "floor, ms", *(f"{side}, of floor" for side in sides[1:]), "marks"),
        [],
    )
    findings = Findings(tables=[kept_table, time_table])
    for name in (name for name in SHAPES if SHAPES[name][0] in options.families):
        for base in (*options.precisions, "nf4"):
            try:
                measure(name, base, options, findings)
            except Absent as reason:
                findings.skipped.append(f"{name}, {base}: {reason}")
    return findings


def measure(name: str, base: str, options: Options, findings: Findings) -> None:
    """Add one shape on one base to the findings."""
    kept_table, time_table = findings.tables
    checks = compare_with_peft(name, base, options)
    passed = all(check.passed for check in checks)
    for work in list_works(options):
        sized = replace(options, size=work.size)
        what = f"{name} {work.size}, {work.num_tokens:,} tokens"
        result = Result(
            "IA3 step", what, base, "ia3", PEER, "; ".join(map(str, checks)), passed,
            f"{PEER}: koat's configuration, plain PEFT layers; {NUM_LAYERS} layers, {work.rows} x {work.length} tokens",
        )  # fmt: skip
        findings.results.append(result)
        if passed:
            seconds, ratios = time_steps(name, base, work, sized)
            result.rate, result.peer_rate = (work.num_tokens / seconds[side] for side in ("koat IA3", PEER))
            result.factors = {"kernel": seconds[PEER] / seconds["koat IA3"]}
            result.notes = f"koat's step is {ratios['koat IA3']:.3f} of the frozen base's"
            shown = (f"{ratio:.3f}" for side, ratio in ratios.items() if side != "floor")
            marked = judge_time(ratios) if base == "bfloat16" and not options.quick else "-"
            size = (work.size, f"{work.rows} x {work.length}")
            time_table.rows.append((name, *size, base, f"{1e3 * seconds['floor']:.1f}", *shown, marked))
        print(result.describe(), flush=True)
    for checkpointing in (False, True):
        kept = count_kept(name, base, checkpointing, options)
        shown = (f"{value / kept['floor']:.3f}" for side, value in kept.items() if side != "floor")
        marked = judge_kept(name, kept) if base == "bfloat16" and not checkpointing else "-"
        row = (name, base, "yes" if checkpointing else "no", f"{kept['floor']:,.0f}", *shown, marked)
        kept_table.rows.append(row)


if __name__ == "__main__":
    main(run, __doc__)
