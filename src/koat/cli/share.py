"""Commands for what training left: merge it, look at it, average it, hand it on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from koat.cli.front import koat

if TYPE_CHECKING:
    from koat.core.settings import ModelSettings

OUT = click.Path(path_type=Path)


def read_loading(base: str | None) -> ModelSettings | None:
    """Return how the base is loaded, None when nothing was said about it."""
    from koat.core.settings import ModelSettings
    from koat.workflows.shell import quiet_libraries

    quiet_libraries()
    return ModelSettings(base=base) if base else None


def print_json(value: Any) -> None:
    """Print one JSON value."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


@koat.command()
@click.argument("run")
@click.option("--out", type=OUT, required=True, help="Folder for the merged model.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Type of the written weights; auto: as the base is stored.",
)
@click.option("--base", help="Base model of the adapter, when it is not where it was.")
@click.option("--device", default="cpu", show_default=True, help="Where float32 weights fit: cpu, cuda or cuda:N.")
@click.option("--tolerance", type=float, default=1e-4, show_default=True, help="Logit difference allowed in float32.")
@click.option("--requantise", is_flag=True, help="Also measure what quantising the merged weights again costs.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier merge in --out.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def merge(
    run: str,
    out: Path,
    dtype: str,
    base: str | None,
    device: str,
    tolerance: float,
    requantise: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Merge the adapter of RUN (a run or a PEFT adapter folder) into its base model.

    \b
    koat merge runs/ia3 --out merged/ia3
    koat merge runs/lora --out merged/lora --dtype bfloat16 --json

    Leaves a plain Hugging Face folder with tokenizer and prompt template. Its logits are compared with the
    adapter's on real prompts; a folder that differs by more than rounding explains is not left.
    """
    loading = read_loading(base)
    from koat.report.sharing import print_merge
    from koat.workflows.sharing.merge import merge_run

    done = merge_run(
        run, out, dtype=dtype, settings=loading, device=device, tolerance=tolerance,
        measure_requantising=requantise, overwrite=overwrite,
    )  # fmt: skip
    if as_json:
        print_json({"folder": str(done.folder), **done.record})
        return
    print_merge(str(done.folder), done.record)


@koat.command()
@click.argument("source", type=OUT)
@click.option("--for", "program", type=click.Choice(["vllm", "llama.cpp"]), required=True, help="What will serve it.")
@click.option("--out", type=OUT, required=True, help="Folder to write.")
@click.option("--adapter", "as_adapter", is_flag=True, help="For vllm: a LoRA adapter as it is, not merged.")
@click.option("--base", help="Base model of the adapter, when it is not where it was.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier export in --out.")
def export(source: Path, program: str, out: Path, as_adapter: bool, base: str | None, overwrite: bool) -> None:
    """Write what vLLM or llama.cpp needs to serve SOURCE (a run, or a folder that `koat merge` wrote).

    \b
    koat export runs/ia3 --for vllm --out served/ia3
    koat export merged/lora --for llama.cpp --out served/lora

    The folder holds the merged model and a README.txt with the commands. koat does not run those programs.
    """
    loading = read_loading(base)
    from koat.workflows.sharing.export import README, export_model

    folder = export_model(source, program, out, as_adapter=as_adapter, settings=loading, overwrite=overwrite)
    click.echo((folder / README).read_text(encoding="utf-8"))
    click.echo(f"written: {folder}")


@koat.group()
def adapters() -> None:
    """Look at adapters on disk, and average them."""


@adapters.command("list")
@click.argument("folder", type=OUT)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_below(folder: Path, as_json: bool) -> None:
    """List the adapters beneath FOLDER with method, base, parameters and scores.

    \b
    koat adapters list runs
    """
    from koat.report.sharing import print_adapters
    from koat.workflows.sharing.shelf import list_adapters

    entries, problems = list_adapters(folder)
    found = [entry.to_mapping() for entry in entries]
    if as_json:
        print_json({"adapters": found, "problems": problems})
        return
    print_adapters(found, problems)


@adapters.command("show")
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(run: str, as_json: bool) -> None:
    """Show what is known of the adapter of RUN (a run or a PEFT adapter folder).

    \b
    koat adapters show runs/ia3
    """
    from koat.report.sharing import print_adapter
    from koat.workflows.sharing.shelf import show_adapter

    found = show_adapter(run).to_mapping()
    if as_json:
        print_json(found)
        return
    print_adapter(found)


@adapters.command("average")
@click.argument("runs", nargs=-1, required=True)
@click.option("--out", type=OUT, required=True, help="Folder for the new adapter.")
@click.option("--base", help="Base model of the adapters, when it is not where it was.")
def average(runs: tuple[str, ...], out: Path, base: str | None) -> None:
    """Average the adapters of RUNS, which must share base, method and targets.

    \b
    koat adapters average runs/seed0 runs/seed1 runs/seed2 --out averaged/ia3

    IA3: the mean of the vectors, which is one plus the mean deviation from one. LoRA: exactly the mean of the
    updates, by joining the factors; the ranks add up.
    """
    loading = read_loading(base)
    from koat.report.sharing import print_adapter
    from koat.workflows.sharing.shelf import average_runs

    print_adapter(average_runs(runs, out, loading).to_mapping())


@koat.command()
@click.argument("run")
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--merged", type=OUT, help="Send this merged model of the run instead of its adapter.")
@click.option("--private", is_flag=True, help="Make the repository a private one.")
@click.option("--licence", default="other", show_default=True, help="Licence as the Hub names it, e.g. apache-2.0.")
@click.option("--base", help="Hub id of the base model, when training took it from a folder.")
@click.option("--dry-run", is_flag=True, help="Show what would be sent, and stop.")
def push(
    run: str, repo: str, merged: Path | None, private: bool, licence: str, base: str | None, dry_run: bool
) -> None:
    """Upload the adapter of RUN, or its merged model, with a model card, to the Hugging Face Hub.

    \b
    koat push runs/ia3 me/reviews-ia3 --base EleutherAI/polyglot-ko-1.3b --dry-run
    koat push runs/ia3 me/reviews --merged merged/ia3 --private --licence apache-2.0

    Shows all that it sends first. HF_ENDPOINT and HF_TOKEN are read from the environment.
    """
    from koat.report.sharing import print_upload
    from koat.workflows.sharing.push import prepare_upload, send_upload
    from koat.workflows.shell import quiet_libraries

    quiet_libraries()
    upload = prepare_upload(run, repo, merged=merged, private=private, licence=licence, base=base)
    print_upload(upload.repo, upload.endpoint, upload.private, upload.list_sizes(), upload.card)
    if dry_run:
        click.echo("nothing was sent")
        return
    click.echo(f"sent: {send_upload(upload)}")
