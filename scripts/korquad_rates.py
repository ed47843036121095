"""IA3's learning rates by preset on KorQuAD: loss on questions about articles that were not trained on.

    python scripts/korquad_rates.py --data ../shared/data/qa --out runs/korquad-rates

Each run is an ordinary run folder; what is there already is not computed again. The table is in docs/log.md, beside
that of NSMC, whose rates `scripts/nsmc_table.py tune` compares.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import koat

PRESETS = ("paper", "peft", "attention", "all-linear")
RATES = (1e-2, 2e-2, 4e-2, 8e-2)
NUM_STEPS = 60


def train(preset: str, rate: float, data: Path, folder: Path) -> None:
    """Train on questions of some articles, unless the run is there already."""
    if (folder / "adapter").is_dir():
        return
    settings: dict[str, Any] = {
        "model": {"base": "nano"},
        "data": {
            "train": [str(data / "KorQuAD_v1.0_dev.json")],
            "splits": str(data / "korquad_article_split.tsv"),
            "limit": NUM_STEPS * 24,
            "validation_limit": 120,
        },
        "adapter": {"targets": preset},
        "training": {"learning_rate": rate, "precision": "bfloat16", "validate_every": NUM_STEPS, "keep": "last"},
    }
    koat.finetune(settings, recipe="context-qa", out=folder, overwrite=folder.exists())


def read_loss(folder: Path) -> float:
    """Return a run's last validation loss."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses: list[float] = [record["validation_loss"] for record in records if "validation_loss" in record]
    return losses[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with KorQuAD_v1.0_dev.json and its split")
    parser.add_argument("--out", type=Path, default=Path("runs/korquad-rates"))
    parser.add_argument("--presets", nargs="+", default=PRESETS, choices=PRESETS)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    arguments = parser.parse_args()
    for preset in arguments.presets:
        for rate in arguments.rates:
            folder = arguments.out / f"{preset}-{rate:g}"
            train(preset, rate, arguments.data, folder)
            print(f"{preset:12s} {rate:g}  {read_loss(folder):.3f}", flush=True)


if __name__ == "__main__":
    main()
