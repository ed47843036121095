"""The NSMC tables of docs/log.md: base, IA3 and LoRA on the small model that ships, real reviews.

    python scripts/nsmc_table.py tune --data ../shared/data/nsmc --out runs/nsmc    # validation.tsv only
    python scripts/nsmc_table.py test --data ../shared/data/nsmc --out runs/nsmc    # test.tsv, once, chosen settings

Each run is an ordinary run folder; what is there already is not computed again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import koat

TASKS = ("nsmc-prompt1", "nsmc-prompt2")
RATES = {
    ("ia3", "paper"): (2e-2, 3e-2, 4e-2, 6e-2, 8e-2, 1.2e-1),
    ("ia3", "peft"): (2e-2, 4e-2, 8e-2),
    ("ia3", "attention"): (1e-2, 2e-2, 4e-2, 6e-2),
    ("ia3", "all-linear"): (1e-2, 2e-2, 4e-2),
    ("lora", "all-linear"): (2e-3, 5e-3),
}
CANDIDATES: dict[str, dict[str, Any]] = {
    f"{method}-{targets}-{rate:g}": {"method": method, "targets": targets, "rate": rate}
    for (method, targets), rates in RATES.items()
    for rate in rates
}
CHOSEN = {"ia3": "ia3-all-linear-0.02", "lora": "lora-all-linear-0.002"}
"""The settings that did best on validation.tsv; see docs/log.md."""


def train(name: str, data: Path, out: Path, rows: int, seed: int) -> Path:
    """Train one candidate on `rows` training reviews, unless its run is there already."""
    candidate = CANDIDATES[name]
    folder = out / f"{name}-{rows}-seed{seed}"
    if (folder / "adapter").is_dir():
        return folder
    settings = {
        "model": {"base": "nano"},
        "data": {"train": [str(data / "train.tsv")], "limit": rows},
        "adapter": {"method": candidate["method"], "targets": candidate["targets"]},
        "training": {
            "learning_rate": candidate["rate"],
            "precision": "bfloat16",
            "seed": seed,
            "keep": "last",
            "save_every": 100_000,
        },
    }
    koat.finetune(settings, recipe="nsmc", out=folder, overwrite=folder.exists())
    return folder


def evaluate(target: Path | str, name: str, data: Path, part: str, out: Path, **options: Any) -> list[dict[str, Any]]:
    """Evaluate one model on both prompts, unless its scores are there already; return a row per prompt."""
    tag = "-".join(f"{key}{value}" for key, value in options.items())
    path = out / "scores" / f"{name}-{part}-{tag}.json"
    if not path.is_file():
        subject = koat.load(target, {"dtype": "bfloat16"})
        shots = data / "train.tsv" if options.get("num_shots") else None
        report = koat.evaluate(subject, tasks=TASKS, data=data / f"{part}.tsv", shots=shots, **options)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, ensure_ascii=False), encoding="utf-8")
    results: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["results"]
    return results


def describe(name: str, results: list[dict[str, Any]]) -> str:
    """Return a line with both prompts' likelihood and first-token accuracies."""
    cells = []
    for result in results:
        scores = result["scores"]
        likelihood = scores["likelihood"]
        cells.append(
            f"{result['task'][-7:]} {likelihood['value']:.3f} [{likelihood['low']:.3f}, {likelihood['high']:.3f}]"
            f" first-token {scores['first-token']['value']:.3f}"
        )
    return f"{name:28s} " + "  ".join(cells)


def tune(data: Path, out: Path, rows: int, limit: int, names: list[str]) -> None:
    """Compare candidates on validation reviews."""
    for name in names:
        folder = train(name, data, out, rows, seed=0)
        print(
            describe(name, evaluate(folder, folder.name, data, "validation", out, num_shots=0, limit=limit)), flush=True
        )


def test(data: Path, out: Path, rows: int, num_seeds: int, shots: list[int], items: int | str) -> None:
    """Evaluate base and chosen settings on the whole test file, several seeds."""
    for num_shots in shots:
        for seed in range(num_seeds if num_shots else 1):
            options = {"num_shots": num_shots, "limit": items, "seed": 1234 + seed}
            print(
                describe(f"base {num_shots} shots seed {seed}", evaluate("nano", "base", data, "test", out, **options))
            )
        for label, name in CHOSEN.items():
            values = []
            for seed in range(num_seeds):
                folder = train(name, data, out, rows, seed)
                options = {"num_shots": num_shots, "limit": items, "seed": 1234 + seed}
                results = evaluate(folder, folder.name, data, "test", out, **options)
                values.append([result["scores"]["likelihood"]["value"] for result in results])
                print(describe(f"{label} {num_shots} shots seed {seed}", results), flush=True)
            means = [statistics.mean(column) for column in zip(*values, strict=True)]
            print(f"{label} {num_shots} shots, mean over {num_seeds} seeds: " + "  ".join(f"{m:.3f}" for m in means))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("tune", "test"))
    parser.add_argument("--data", type=Path, required=True, help="folder with train.tsv, validation.tsv, test.tsv")
    parser.add_argument("--out", type=Path, default=Path("runs/nsmc"))
    parser.add_argument("--rows", type=int, default=8000, help="training reviews")
    parser.add_argument("--limit", type=int, default=2000, help="validation reviews while tuning")
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES), choices=CANDIDATES, metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--items", default="all", help="test reviews, or all")
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 10])
    arguments = parser.parse_args()
    items = arguments.items if arguments.items == "all" else int(arguments.items)
    if arguments.stage == "tune":
        tune(arguments.data, arguments.out, arguments.rows, arguments.limit, arguments.candidates)
    else:
        test(arguments.data, arguments.out, arguments.rows, arguments.seeds, arguments.shots, items)


if __name__ == "__main__":
    main()
