"""The order of the rooms, kept by reading the code: imports go one way, files are short, names stay in place."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "koat"
FILES = sorted(SOURCE.rglob("*.py"))
FLOORS = (
    ("core",),
    ("quantise",),
    ("adapters", "data", "forest", "model"),
    ("training", "evaluation", "generation"),
    ("report", "serving"),
    ("workflows",),
    ("cli", "koat"),
)
"""Rooms from the ground up; `koat` is the package's own front page."""
MAX_LINES = 300
MAX_FUNCTION_LINES = 40
PICKLERS = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
SPEAKERS = ("report", "workflows/shell.py", "workflows/demo.py", "cli/")
"""Where `print` may stand: what people look at."""


def name_module(path: Path) -> str:
    """Return a file's module name."""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_module(path): path for path in FILES}


def find_room(module: str) -> str:
    """Return the room that a module stands in."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "koat"


def find_floor(room: str) -> int:
    """Return how high a room stands."""
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def list_imports(path: Path) -> Iterator[tuple[str, int]]:
    """Yield (module of koat, line) for each import anywhere in a file, TYPE_CHECKING and functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names if name.name.split(".")[0] == "koat")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; name the module in full"
            if node.module and node.module.split(".")[0] == "koat":
                for name in node.names:
                    full = f"{node.module}.{name.name}"
                    yield (full if full in MODULES else node.module), node.lineno


def list_functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield every function and method."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def list_calls(path: Path) -> Iterator[tuple[str, int]]:
    """Yield (dotted name, line) for each call in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node.lineno


def show(path: Path) -> str:
    """Return a file's name as messages show it."""
    return path.relative_to(SOURCE).as_posix()


def test_every_room_is_on_a_floor() -> None:
    known = {room for floor in FLOORS for room in floor} | {"recipes", "nano"}
    assert {find_room(module) for module in MODULES} <= known
    assert len(FILES) > 50


def test_imports_go_down() -> None:
    wrong = []
    for module, path in MODULES.items():
        room = find_room(module)
        for imported, line in list_imports(path):
            other = find_room(imported)
            front_page = room == "cli" or other != "koat"
            if room != other and not (front_page and find_floor(other) < find_floor(room)):
                wrong.append(f"{show(path)}:{line} ({room}) imports {imported} ({other})")
    assert not wrong, "\n".join(wrong)


def test_modules_import_each_other_in_no_circle() -> None:
    graph = {name: {imported for imported, _ in list_imports(path)} & MODULES.keys() for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " > ".join((*above[above.index(module) :], module))
        if module not in done:
            for imported in sorted(graph[module]):
                visit(imported, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())
    assert done == MODULES.keys()


@pytest.mark.parametrize("path", FILES, ids=show)
def test_files_are_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{show(path)} has {lines} lines: it holds more than one room"


@pytest.mark.parametrize("path", FILES, ids=show)
def test_functions_are_short(path: Path) -> None:
    functions = list_functions(ast.parse(path.read_text(encoding="utf-8")))
    long = {function.name: (function.end_lineno or 0) - function.lineno + 1 for function in functions}
    assert not {name: lines for name, lines in long.items() if lines > MAX_FUNCTION_LINES}


def test_methods_are_told_apart_in_their_own_room_alone() -> None:
    from koat.adapters.methods import METHODS

    names = set(METHODS)
    wrong = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Compare | ast.MatchValue) or find_room(name_module(path)) == "adapters":
                continue
            words = {leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)}
            if re.search(r"\bmethod\b", ast.unparse(node)) and words & names:
                wrong.append(f"{show(path)}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


def test_only_what_people_look_at_prints() -> None:
    wrong = [
        f"{show(path)}:{line}"
        for path in FILES
        if not show(path).startswith(SPEAKERS)
        for name, line in list_calls(path)
        if name == "print" or name.endswith("Console") or name.startswith("sys.stdout")
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_is_unpickled() -> None:
    wrong = []
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            names = [name.name for name in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if {name.split(".")[0] for name in names} & PICKLERS:
                wrong.append(f"{show(path)}:{node.lineno}")
        wrong += [
            f"{show(path)}:{line}"
            for name, line in list_calls(path)
            if name in {"torch.load", "eval", "exec", "yaml.unsafe_load", "yaml.full_load", "numpy.load", "np.load"}
        ]
    assert not wrong, "\n".join(wrong)


def test_yaml_is_loaded_by_safe_loaders_alone() -> None:
    from koat.core.config_files import _Loader

    calls = [
        (show(path), line, ast.unparse(node))
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for line in [getattr(node, "lineno", 0)]
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"yaml.load", "yaml.load_all"}
    ]
    assert calls
    assert all(call.endswith(", _Loader)") for _, _, call in calls), calls
    assert "SafeLoader" in {base.__name__ for base in _Loader.__mro__}


def test_remote_code_runs_only_where_the_setting_says() -> None:
    wrong = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                allowed = ast.unparse(node.value).endswith(".trust_remote_code") or ast.unparse(node.value) == "False"
                wrong += [] if allowed else [f"{show(path)}:{node.lineno}"]
    assert not wrong, "\n".join(wrong)


def test_no_file_knows_where_it_was_written() -> None:
    # "/proc/..." is a place of the system; homes, work folders and temporary folders are places of a person.
    absolute = re.compile(r"""["'](?:/(?:home|root|work|workspace|Users|tmp|mnt|data|opt|srv)\b|[A-Z]:\\)""")
    wrong = [
        f"{show(path)}:{number}: {line.strip()}"
        for path in FILES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if absolute.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_room_is_a_lumber_room() -> None:
    names = {part for module in MODULES for part in module.split(".")}
    assert not names & {"utils", "util", "common", "helpers", "misc", "tools"}


def test_public_things_say_what_they_do() -> None:
    silent = []
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not ast.get_docstring(tree):
            silent.append(show(path))
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                silent.append(f"{show(path)}:{node.lineno} {node.name}")
    assert not silent, "\n".join(silent)
