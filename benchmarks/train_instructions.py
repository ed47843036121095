"""Instructions (KoBEST mixed with small talk, LoRA and IA3): tokens trained per second against both peers."""

from __future__ import annotations

from benchmarks.command import main
from benchmarks.compare_training import STEP, compare_training
from benchmarks.measure import Findings
from benchmarks.workload import Options, open_tokenizer, read_instructions
from koat.adapters.methods import Ia3Settings, LoraSettings

NUM_EXAMPLES = 160


def run(options: Options, rates: dict[str, float]) -> Findings:
    """Compare both methods on every family and precision."""
    tokenizer = open_tokenizer(options)
    sequences = read_instructions(options, tokenizer, options.scale(NUM_EXAMPLES, 2 * STEP))
    findings = Findings()
    for family in options.families:
        for precision in options.precisions:
            for adapter in (LoraSettings(), Ia3Settings()):
                found = compare_training(
                    "instructions",
                    family,
                    precision,
                    adapter,
                    sequences,
                    tokenizer,
                    options,
                    rates[precision],
                )
                for result in found.results:
                    print(result.describe(), flush=True)
                findings.results += found.results
                findings.skipped += [reason for reason in found.skipped if reason not in findings.skipped]
    return findings


if __name__ == "__main__":
    main(run, __doc__)
