"""The front door: help at once, and one plain message with status 2 for everything that a user can mend."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from koat.cli import koat as front_door
from tests.tiny_base import call_koat, find_koat, make_environment, make_rows, run_koat, write_base, write_rows

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy")


def list_commands(group: click.Group = front_door, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return every command and group as the words one types."""
    found: list[tuple[str, ...]] = [path]
    for name, command in group.commands.items():
        below = (*path, name)
        found += list_commands(command, below) if isinstance(command, click.Group) else [below]
    return found


COMMANDS = list_commands()
GROUPS = (("data",), ("adapters",))
LEAVES = [words for words in COMMANDS if words and words not in GROUPS]


def test_all_commands_are_known() -> None:
    assert {" ".join(words) for words in LEAVES} >= {
        "finetune",
        "plan",
        "eval",
        "data inspect",
        "demo",
        "settings",
        "list",
    }


def count_seconds_of_children() -> float:
    """Return the processor's time that children which have ended took: a busy machine takes longer, not more of it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_comes_within_a_second() -> None:
    seconds = []
    for _ in range(3):  # the first may have to compile
        began = count_seconds_of_children()
        done = subprocess.run([find_koat(), "--help"], capture_output=True, env=make_environment(), check=True)
        seconds.append(count_seconds_of_children() - began)
        assert b"koat demo" in done.stdout
    assert 0 < min(seconds) < 1


def test_no_help_imports_anything_heavy() -> None:
    code = (
        "import sys\nfrom koat.cli import koat\n"
        f"for words in {COMMANDS!r}:\n"
        "    koat([*words, '--help'], standalone_mode=False)\n"
        f"print('heavy:', sorted(set({HEAVY!r}) & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=make_environment(), check=True
    )
    assert done.stdout.rstrip().endswith("heavy: []")
    assert done.stdout.count("Usage:") == len(COMMANDS)


@pytest.mark.parametrize("arguments", [["settings"], ["settings", "training."], ["list"], ["finetune", "--show"]])
def test_looking_around_needs_no_pytorch(arguments: list[str]) -> None:
    flags = ["--base", "nano", "--data", "x.jsonl"] if "--show" in arguments else []
    code = (
        f"import sys\nsys.argv = ['koat', *{[*arguments, *flags]!r}]\n"
        "from koat.cli import main\nmain()\nprint('heavy:', sorted({'torch', 'peft'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=make_environment(), check=True
    )
    assert len(done.stdout.splitlines()) > 5
    if arguments != ["list"]:  # names of tasks and templates are read from their rooms
        assert done.stdout.rstrip().endswith("heavy: []")


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_every_command_shows_an_example(words: tuple[str, ...]) -> None:
    status, out, _ = call_koat(*words, "--help")
    assert status == 0
    assert re.search(rf"^\s+koat {' '.join(words)}(\s|$)", out, re.MULTILINE), "the help shows no call of itself"


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_every_command_is_in_the_readme(words: tuple[str, ...]) -> None:
    assert f"koat {' '.join(words)}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_setting_is_listed_with_what_it_does() -> None:
    from koat.core.config import known_keys
    from koat.workflows.config import RunConfig

    status, out, _ = call_koat("settings")
    assert status == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    listed = [(name.split(" ")[0], default, help) for name, default, help in rows if name]
    assert {name for name, _, _ in listed} == set(known_keys(RunConfig))
    assert all(default and help for _, default, help in listed)
    part = call_koat("settings", "training.")[1]
    assert "training.noise" in part and "data.train" not in part
    said = " ".join(" ".join(help for _, _, help in rows).split())
    for choices in ("'cosine', 'linear', 'constant'", "'error', 'drop', 'truncate_context'", "'ia3', 'lora', 'qlora'"):
        assert choices in said


def test_the_rates_that_methods_bring_are_listed() -> None:
    from koat.adapters.methods import METHODS
    from koat.core.settings import TrainingSettings

    said = TrainingSettings.model_fields["learning_rate"].description or ""
    rates = {
        name: float(rate)
        for names, rate in re.findall(r"(\w+(?: and \w+)*) (\d+e-\d+)", said)
        for name in names.split(" and ")
    }
    assert rates == {name: method.learning_rate for name, method in METHODS.items()}
    assert "(by method)" in call_koat("settings", "training.learning_rate")[1]


@pytest.mark.parametrize(
    ("prefix", "nearest"),
    [("trainig.", "training."), ("learning_rate", "training.learning_rate"), ("zzz", "")],
)
def test_a_prefix_of_no_setting_is_refused(prefix: str, nearest: str) -> None:
    status, out, error = call_koat("settings", prefix)
    assert (status, out) == (2, "")
    assert f"no setting begins with {prefix!r}" in error
    assert (f"did you mean {nearest!r}" in error) == bool(nearest)
    assert "model., data., data.template., adapter., training." in error


def test_names_that_ship_are_listed() -> None:
    status, out, _ = call_koat("list")
    assert status == 0
    for name in ("ia3", "lora", "demo-ia3", "nsmc-prompt1", "koalpaca-context"):
        assert name in out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert all(what and what.lower() != name for _, name, what in rows if name), "a name alone explains nothing"


def test_version() -> None:
    import importlib.metadata

    status, out, _ = call_koat("--version")
    assert status == 0
    assert importlib.metadata.version("koat") in out


# Bad input ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base model, one without tokenizer, and files that are broken in many ways."""
    folder = tmp_path_factory.mktemp("cli")
    write_base(folder / "base")
    write_base(folder / "no-tokenizer", with_tokenizer=False)
    write_base(folder / "broken-weights")
    weights = folder / "broken-weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    write_base(folder / "broken-config")
    (folder / "broken-config" / "config.json").write_text("{", encoding="utf-8")
    write_base(folder / "strange-family")
    config = json.loads((folder / "strange-family" / "config.json").read_text(encoding="utf-8"))
    config["model_type"] = "llamma"
    (folder / "strange-family" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "no-model").mkdir()
    write_rows(folder / "rows.jsonl", make_rows(20))
    rows = make_rows(3)
    write_rows(folder / "empty-answer.jsonl", [*rows, {"instruction": "a", "output": ""}])
    write_rows(folder / "missing-field.jsonl", [*rows, {"instruction": "a"}])
    write_rows(folder / "number.jsonl", [*rows, {"instruction": ["a"], "output": "b"}])
    write_rows(folder / "long.jsonl", [*rows, {"instruction": "비가 " * 300, "output": "옵니다"}])
    (folder / "empty.jsonl").write_text("", encoding="utf-8")
    (folder / "torn.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruc', encoding="utf-8")
    (folder / "binary.jsonl").write_bytes(bytes(range(256)))
    (folder / "strange.json").write_text('{"a": [1, 2, 3]}', encoding="utf-8")
    (folder / "text.tsv").write_text("id\tdocument\tlabel\n1\t비가\t0\n2\t눈이\n", encoding="utf-8")
    (folder / "run.yaml").write_text("model: {base: nano\n", encoding="utf-8")
    (folder / "twice.yaml").write_text("model: {base: nano}\nmodel: {base: x}\n", encoding="utf-8")
    (folder / "keys.yaml").write_text("trainin: {epochs: 1}\nmodel: {bas: x}\n", encoding="utf-8")
    return folder


def refuse(place: Path, *arguments: object) -> str:
    """Run a command that must be refused; return its one message."""
    status, out, error = call_koat(*arguments)
    assert status == 2, f"status {status}: {out}{error}"
    assert "Traceback" not in out + error
    messages = re.findall(r"^(?:koat|Error): ", error, re.MULTILINE)
    assert len(messages) == 1, error
    assert not re.search(r"\b(?:NoneType|KeyError|TypeError|AttributeError|pydantic)\b", error), error
    return error


FINETUNE: dict[str, tuple[list[str], str]] = {
    "section misspelt": (["trainig.epochs=1"], r"trainig.*did you mean 'training"),
    "key misspelt": (["training.epoch=1"], r"training\.epoch: .*did you mean 'training\.epochs'"),
    "method key misspelt": (["adapter.target=paper"], r"did you mean 'adapter\.targets'"),
    "template key misspelt": (["data.template={promt: x}"], r"promt.*did you mean 'data\.template\.prompt'"),
    "key of another method": (["adapter.rank=4"], r"adapter\.rank"),
    "value of a wrong type": (["training.epochs=many"], r"training\.epochs: received 'many'.*a number"),
    "value out of range": (["training.batch_size=0"], r"training\.batch_size: received 0"),
    "choice misspelt": (["training.schedule=cosin"], r"did you mean 'cosine'"),
    "no assignment": (["training.epochs"], r"write key=value"),
    "method misspelt": (["--method", "lorra"], r"did you mean 'lora'"),
    "recipe misspelt": (["--recipe", "demo-ia4"], r"did you mean 'demo-ia3'"),
    "template misspelt": (["data.template=koalpacca"], r"did you mean 'koalpaca'"),
    "no such config": (["--config", "nowhere.yaml"], r"nowhere\.yaml: there is no such file"),
    "broken config": (["--config", "{place}/run.yaml"], r"run\.yaml, line \d: is not valid YAML"),
    "config with a key twice": (["--config", "{place}/twice.yaml"], r"given twice"),
    "misspelt keys in a config": (
        ["--config", "{place}/keys.yaml"],
        r"(?s)model\.bas: .*'model\.base'.*trainin: .*'training'",
    ),
    "no such data": (["--data", "{place}/rows.json"], r"no such file.*\brows\.jsonl"),
    "empty data": (["--data", "{place}/empty.jsonl"], r"empty\.jsonl: .*(no rows|empty)"),
    "torn data": (["--data", "{place}/torn.jsonl"], r"torn\.jsonl:2"),
    "binary data": (["--data", "{place}/binary.jsonl"], r"binary\.jsonl"),
    "strange data": (["--data", "{place}/strange.json"], r"strange\.json"),
    "empty answer": (["--data", "{place}/empty-answer.jsonl"], r"empty-answer\.jsonl:4.*output"),
    "field missing": (["--data", "{place}/missing-field.jsonl"], r"missing-field\.jsonl:4.*output"),
    "field of a wrong type": (["--data", "{place}/number.jsonl"], r"number\.jsonl:4.*instruction"),
    "short table row": (["--data", "{place}/text.tsv"], r"text\.tsv:3"),
    "longer than the model": (["--data", "{place}/long.jsonl"], r"longer than max_length=256.*long\.jsonl:4"),
    "longer than the limit": (["data.max_length=8"], r"longer than max_length=8 "),
    "template without its field": (
        ["data.template={prompt: '{question}:'}"],
        r"question.*rows\.jsonl:1|rows\.jsonl:1.*question",
    ),
    "column that is not there": (["data.columns={instruction: qestion}"], r"qestion"),
    "target that matches nothing": (["adapter.targets=[k_porj]"], r"'k_porj' matches no (linear )?layer.*did you mean"),
    "base that is not there": (["--base", "{place}/bse"], r"bse does not exist.*did you mean 'base'"),
    "base without configuration": (["--base", "{place}/no-model"], r"holds no config\.json"),
    "base without tokenizer": (["--base", "{place}/no-tokenizer"], r"has no tokenizer"),
    "base with broken weights": (["--base", "{place}/broken-weights"], r"weights.*broken-weights.*could not be loaded"),
    "base with broken configuration": (
        ["--base", "{place}/broken-config"],
        r"broken-config/config\.json.*not a valid JSON",
    ),
    "base of an unknown family": (["--base", "{place}/strange-family"], r"strange-family"),
    "device that is none": (["model.device=gpu"], r"model\.device='gpu' is no device"),
    "weight decay on vectors": (["training.weight_decay=0.1"], r"weight_decay"),
}


@pytest.mark.parametrize("name", FINETUNE)
def test_finetune_refuses(name: str, place: Path, tmp_path: Path) -> None:
    given, pattern = FINETUNE[name]
    arguments = [argument.replace("{place}", str(place)) for argument in given]
    flags = [] if "--base" in given else ["--base", str(place / "base")]
    flags += [] if "--data" in given else ["--data", str(place / "rows.jsonl")]
    error = refuse(place, "finetune", *flags, *arguments, "--out", tmp_path / "run")
    assert re.search(pattern, error), error
    run = tmp_path / "run"
    assert not run.exists() or not list(run.iterdir()), "what failed to begin stands in the way of the next try"


def test_every_problem_of_the_settings_comes_at_once(tmp_path: Path) -> None:
    error = refuse(tmp_path, "finetune", "model.bse=x", "data.trian=y", "training.lr=1", "--out", tmp_path / "run")
    for key in ("model.bse", "data.trian", "training.lr", "model.base: missing", "data.train: missing"):
        assert key in error


OTHERS: dict[str, tuple[list[str], str]] = {
    "no command": (["fintune"], r"No such command 'fintune'"),
    "no such option": (["plan", "--bass", "nano"], r"--bass"),
    "no out": (["finetune", "--base", "nano", "--data", "x"], r"--out"),
    "plan without base": (["plan"], r"model\.base: missing"),
    "plan of an unknown method": (["plan", "--base", "nano", "--method", "ia33"], r"did you mean 'ia3'"),
    "resume of nothing": (["finetune", "--resume", "{tmp}/nowhere"], r"nowhere"),
    "resume and another out": (["finetune", "--resume", "a", "--out", "b"], r"leave --out away"),
    "eval of an unknown task": (
        ["eval", "{place}/base", "--task", "nsmc-promt1", "--data", "x.tsv"],
        r"did you mean 'nsmc-prompt1'|nsmc-prompt1, nsmc-prompt2",
    ),
    "eval on no such file": (
        ["eval", "{place}/base", "--task", "nsmc-prompt1", "--data", "{place}/nowhere.tsv", "--shots", "0"],
        r"nowhere\.tsv: there is no such file",
    ),
    "eval without shots": (
        ["eval", "{place}/base", "--task", "nsmc-prompt1", "--data", "{place}/text.tsv"],
        r"--shots-from",
    ),
    "eval with a limit of words": (
        ["eval", "{place}/base", "--task", "nsmc-prompt1", "--data", "x", "--limit", "some"],
        r"'some' is neither a number nor",
    ),
    "eval of a broken base": (
        ["eval", "{place}/broken-weights", "--task", "nsmc-prompt1", "--data", "{place}/text.tsv", "--shots", "0"],
        r"could not be loaded",
    ),
    "eval of no model": (
        ["eval", "{place}/no-model", "--task", "nsmc-prompt1", "--data", "{place}/text.tsv"],
        r"holds no config\.json",
    ),
    "inspect no such file": (["data", "inspect", "{place}/rows.jsnl"], r"no such file.*\brows\.jsonl"),
    "inspect with a misspelt setting": (
        ["data", "inspect", "{place}/rows.jsonl", "--set", "colums={a: b}"],
        r"did you mean '(data\.)?columns'",
    ),
    "inspect with a misspelt template": (
        ["data", "inspect", "{place}/rows.jsonl", "--template", "kaot"],
        r"did you mean 'koat'",
    ),
    "demo where something is": (["demo", "--out", "{place}"], r"no earlier demo"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_commands_refuse(name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, pattern = OTHERS[name]
    monkeypatch.chdir(tmp_path)
    before = sorted(place.rglob("*"))
    error = refuse(place, *(word.replace("{place}", str(place)).replace("{tmp}", str(tmp_path)) for word in given))
    assert re.search(pattern, error), error
    assert sorted(place.rglob("*")) == before


def test_a_run_without_adapter_is_refused(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    status, _, error = call_koat(
        "finetune", "--base", place / "base", "--data", place / "rows.jsonl", "--out", run, "training.max_steps=2"
    )
    assert status == 0, error
    (run / "adapter").rename(run / "elsewhere")
    error = refuse(place, "eval", run, "--task", "nsmc-prompt1", "--data", place / "text.tsv", "--shots", 0)
    assert "holds no adapter" in error


# A full disk -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def limit_files(num_bytes: int) -> Iterator[None]:
    """Let no file grow beyond a size, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


FULL = {
    "metrics": (6_000, 40, r"cannot write .*metrics\.jsonl"),
    "checkpoint": (2_300, 5, r"cannot write .*step-000001"),
    "adapter": (6_000, 5, r"cannot write .*adapter"),
}
"""What does not fit any more: bytes a file may have, steps of the run, the message."""


@pytest.mark.parametrize("what", FULL)
def test_a_full_disk_loses_nothing_and_the_run_goes_on(what: str, place: Path, tmp_path: Path) -> None:
    num_bytes, num_steps, message = FULL[what]
    arguments = ["finetune", "--base", place / "base", "--data", place / "rows.jsonl", "training.save_every=1"]
    settings = [f"training.max_steps={num_steps}", "training.batch_size=4"]
    with limit_files(num_bytes):
        error = refuse(place, *arguments, *settings, "--out", tmp_path / "run")
    assert re.search(message, error), error
    assert "What was there before is untouched" in error
    assert not (tmp_path / "run" / "adapter").exists()
    steps = [path.name for path in (tmp_path / "run").glob("checkpoints/step-*")]
    assert len(steps) == {"metrics": 2, "checkpoint": 0, "adapter": 2}[what]

    for more in (["finetune", "--resume", tmp_path / "run"], [*arguments, *settings, "--out", tmp_path / "whole"]):
        status, _, error = call_koat(*more)
        assert status == 0, error
    for name in ("adapter/adapter_model.safetensors", "config.yaml"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, num_steps + 1))


def test_a_full_disk_leaves_the_earlier_run(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["--base", place / "base", "--data", place / "rows.jsonl", "training.max_steps=2"]
    assert call_koat("finetune", *arguments, "--out", run)[0] == 0
    data = place / "text.tsv"
    (tmp_path / "text.tsv").write_text(data.read_text(encoding="utf-8").replace("눈이", "눈이\t1"), encoding="utf-8")
    options = ["--task", "nsmc-prompt1", "--data", tmp_path / "text.tsv", "--shots", 0, "--limit", "all"]
    assert call_koat("eval", run, *options)[0] == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with limit_files(100):
        error = refuse(place, "eval", run, *options)
    assert "cannot write" in error
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


# In processes of their own -----------------------------------------------------------------------------------


def test_a_message_is_all_there_is(tmp_path: Path) -> None:
    done = run_koat("finetune", "--config", "nowhere.yaml", "--out", "run", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"koat: nowhere\.yaml: there is no such file.*\n", done.stderr)
    assert not list(tmp_path.iterdir())


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from koat.report import catalogue

    def fail(*arguments: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(catalogue, "print_catalogue", fail)
    with pytest.raises(AssertionError, match="a bug"):
        call_koat("settings")


def test_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        f"'{find_koat()}' settings | head -n 1", shell=True, capture_output=True, text=True, env=make_environment()
    )
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
