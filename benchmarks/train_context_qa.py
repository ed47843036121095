"""Context QA (KorQuAD, IA3): tokens trained per second against PEFT with Trainer and TRL with packing.

Also what keeping an article's questions in one step does to quality, at equal numbers of examples.
"""

from __future__ import annotations

import time

from benchmarks.command import main
from benchmarks.compare_training import STEP, compare_training, make_accelerator
from benchmarks.measure import Findings, Table
from benchmarks.workload import Options, open_tokenizer, read_context_qa
from koat.adapters.attach import attach_adapter
from koat.adapters.methods import Ia3Settings
from koat.core.settings import ModelSettings, TrainingSettings
from koat.forest.verify import verify_layout
from koat.model import load_model, load_tokenizer
from koat.training.loop import measure_loss, train

NUM_EXAMPLES = 64
NUM_QUALITY_STEPS = 60
NUM_VALIDATION = 120
QUALITY_RATE = 2e-2
"""What did best for the shipped base with IA3 on all linear layers (docs/log.md)."""
LONGEST = 1024
"""Examples of more tokens are left out on every side: few, and one alone would set TRL's row length."""


def run(options: Options, rates: dict[str, float]) -> Findings:
    """Compare on every family and precision, then compare the samplers."""
    tokenizer = open_tokenizer(options)
    sequences = read_context_qa(options, tokenizer, "train", options.scale(NUM_EXAMPLES, STEP))
    sequences = [sequence for sequence in sequences if len(sequence) <= LONGEST]
    findings = Findings()
    for family in options.families:
        for precision in options.precisions:
            found = compare_training(
                "context QA",
                family,
                precision,
                Ia3Settings(),
                sequences,
                tokenizer,
                options,
                rates[precision],
            )
            for result in found.results:
                print(result.describe(), flush=True)
            findings.results += found.results
            findings.skipped += [reason for reason in found.skipped if reason not in findings.skipped]
    findings.tables.append(compare_samplers(options))
    return findings


def compare_samplers(options: Options) -> Table:
    """Train IA3 on the shipped base with grouped and with shuffled steps, equal in number and examples."""
    settings = ModelSettings(base=options.base, dtype="float32", device=str(options.device))
    tokenizer = load_tokenizer(settings)
    num_steps = 4 if options.quick else NUM_QUALITY_STEPS
    validation = read_context_qa(options, tokenizer, "validation", 8 if options.quick else NUM_VALIDATION)
    # One pass over whole paragraphs: both samplers see exactly the same examples.
    examples = read_context_qa(options, tokenizer, "train", num_steps * STEP)
    training = TrainingSettings(
        batch_size=STEP,
        max_steps=num_steps,
        learning_rate=QUALITY_RATE,
        seed=options.seed,
    )
    accelerator = make_accelerator(options)
    rows = []
    for sampler in ("grouped", "shuffled"):
        model = attach_adapter(load_model(settings), Ia3Settings(targets="all-linear"), seed=options.seed)
        layout, _ = verify_layout(model)
        before = measure_loss(model, validation, layout, training, accelerator)
        began = time.perf_counter()
        result = train(
            model, examples, layout, training.model_copy(update={"sampler": sampler}), accelerator=accelerator
        )
        seconds = time.perf_counter() - began
        model.eval()
        after = measure_loss(model, validation, layout, training, accelerator)
        shared = result.state.tokens / result.state.unique_tokens
        losses = (f"{before:.4f}", f"{after:.4f}")
        rows.append((sampler, f"{num_steps}", f"{len(examples)}", *losses, f"{shared:.2f}", f"{seconds:.1f}"))
    header = ("sampler", "steps", "examples", "validation loss before", "after", "sharing", "seconds")
    return Table("Quality at equal examples: IA3 on the shipped base, KorQuAD", header, rows)


if __name__ == "__main__":
    main(run, __doc__)
