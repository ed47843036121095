"""The group that all commands belong to, how it ends, and what commands share."""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Any

import click

from koat.core.errors import KoatError
from koat.core.quiet import quieten

STOPPED = "\nkoat: stopped."
GOES_ON = {"finetune": " The run goes on with `koat finetune --resume RUN`."}
"""What to do after a command was stopped, by its name."""
HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=HELP)
@click.version_option(package_name="koat")
def koat() -> None:
    """Fine-tune causal language models with few parameters, and prove what that bought.

    \b
    Begin with:
      koat demo                              everything at once, on a small model that ships
      koat data inspect my_data.jsonl        what is in your data, how long it is
      koat plan --base DIR_OR_ID             what a run will take, before it takes it
      koat finetune --base DIR_OR_ID --data my_data.jsonl --method ia3 --out runs/mine
      koat ask runs/mine "..."               what it answers
      koat eval runs/mine --task nsmc-prompt1 --data test.tsv --shots-from train.tsv
      koat compare runs/mine runs/other      which is better, by how much, how sure
      koat report runs/mine runs/other       the same as one HTML page
      koat experiment koat-vs-lora ...       variants x seeds x tasks from one file

    Settings can be given as `section.key=value` to whatever trains or plans; `koat settings` lists them all.
    """


def read_flags(overrides: tuple[str, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Merge options such as --base into `key=value` overrides; overrides win."""
    from koat.core.config_files import parse_overrides

    merged: dict[str, dict[str, Any]] = {}
    for key, value in named.items():
        if value not in (None, (), []):
            section, _, name = key.partition(".")
            merged.setdefault(section, {})[name] = value
    for section, values in parse_overrides(overrides).items():
        merged[section] = {**merged.get(section, {}), **values} if isinstance(values, dict) else values
    return merged


def describe_stop() -> str:
    """Return what is said when a command is stopped."""
    return STOPPED + GOES_ON.get("".join(sys.argv[1:2]), "")


def tolerate_letters() -> None:
    """Let letters that the terminal's encoding lacks be printed as question marks instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def catch_endings() -> None:
    """Let the signals that end a program run its clean-up first: processes that it started must end with it."""

    def end(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not break into the clean-up
        click.echo(describe_stop(), err=True)
        raise SystemExit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # What `nohup` ignores stays ignored.
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, end)


def main() -> None:
    """Run the command line: status 2 and a plain message for what a user can mend."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    quieten()  # before any command imports PEFT, and bitsandbytes with it
    catch_endings()
    tolerate_letters()
    try:
        koat(standalone_mode=False)
    except KoatError as error:
        click.echo(f"koat: {error}", err=True)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo(describe_stop(), err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
