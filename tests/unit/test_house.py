"""The house rules of ARCHITECTURE.md, checked by reading the source."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "stillframe"
FILES = sorted(SOURCE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# What each room may import beside itself.
MAY_IMPORT = {
    "model": set[str](),
    "host": {"model"},
    "store": {"model", "host"},
    "guest": {"model", "host"},
    "vmm": {"model", "host"},
    "images": {"model", "host", "store"},
    "engine": {"model", "host", "store", "guest", "vmm", "images"},
    "api": {"model", "engine"},
    "cli": {"model"},
}
# Exceptions by file, each with its reason.
EXCEPTIONS = {
    # The command that is the server, not a client of it.
    "cli/commands/serve.py": {"stillframe.api.server", "stillframe.engine.settings"},
    # Looks at this machine itself, also when no server runs.
    "cli/commands/host.py": {
        "stillframe.host.files",
        "stillframe.host.programs",
        "stillframe.vmm.drivers",
    },
    "cli/commands/setup.py": {"stillframe.host.releases"},
    # Puts the server together: it alone chooses the drivers.
    "api/server.py": {"stillframe.vmm.drivers"},
}
# The fake hypervisor plays the guest's side too, so it speaks the guest's wire format.
FAKE_MAY_IMPORT = {"stillframe.guest.wire"}

MAX_FILE_LINES = 600
MAX_FILES_PER_ROOM = 16  # about 15, and the package's own __init__
MAX_FUNCTION_LINES = 60


def _name(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""


def _calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_imports_between_rooms_run_downward_only(path: Path) -> None:
    room = path.relative_to(SOURCE).parts[0]
    if room.endswith(".py"):
        return
    allowed = MAY_IMPORT[room] | {room}
    for module in _imports(ast.parse(path.read_text(encoding="utf-8"))):
        parts = module.split(".")
        if parts[0] != "stillframe" or len(parts) == 1 or parts[1] in allowed:
            continue
        if module in EXCEPTIONS.get(_name(path), ()):
            continue
        if path.parent.name == "fake" and module in FAKE_MAY_IMPORT:
            continue
        pytest.fail(f"{_name(path)} may not import {module}")


def test_exceptions_to_the_import_rule_are_still_needed() -> None:
    for name, modules in EXCEPTIONS.items():
        path = SOURCE / name
        used = set(_imports(ast.parse(path.read_text("utf-8")))) if path.exists() else set()
        assert modules <= used or not path.exists(), f"{name} no longer needs {modules - used}"


@pytest.mark.parametrize("path", [*FILES, *TESTS], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_readable(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_FILE_LINES, f"{lines} lines; split it by concern"


def test_rooms_stay_small() -> None:
    for room in MAY_IMPORT:
        # A directory inside a room (api/schemas) is a room of its own for this count.
        for directory in {path.parent for path in (SOURCE / room).rglob("*.py")}:
            files = list(directory.glob("*.py"))
            assert len(files) <= MAX_FILES_PER_ROOM, f"{directory.name} has {len(files)} files"


def test_every_room_is_in_the_plan() -> None:
    rooms = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert rooms == set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_functions_stay_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = (node.end_lineno or node.lineno) - node.lineno + 1
            assert body <= MAX_FUNCTION_LINES, f"{node.name} has {body} lines"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_dangerous_calls_are_absent(path: Path) -> None:
    for name, call in _calls(ast.parse(path.read_text(encoding="utf-8"))):
        last = name.rpartition(".")[2]
        assert last not in {"extractall", "extract"} or "tar" not in name, (
            f"{name}: own path checks"
        )
        assert last != "extractall", "archives are never unpacked onto the host"
        assert name not in {"os.system", "os.popen", "eval", "exec"}, f"{name} runs text as code"
        assert name != "time.sleep", "wait for a notification instead of sleeping"
        assert "pickle" not in name, "stored bytes must not be able to run code"
        for keyword in call.keywords:
            assert keyword.arg != "shell", "a subprocess gets an argument list, never a shell"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_subprocesses_start_in_one_file_only(path: Path) -> None:
    if _name(path) == "host/process.py":
        return
    modules = set(_imports(ast.parse(path.read_text(encoding="utf-8"))))
    assert "subprocess" not in modules, "use host/process.py"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_cancellation_is_never_swallowed(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = ast.unparse(node.type) if node.type else "everything"
        broad = caught == "everything" or "BaseException" in caught or "CancelledError" in caught
        raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
        assert not broad or raises, f"line {node.lineno} catches {caught} and does not raise it"


def test_readme_names_only_targets_that_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for target in re.findall(r"^\$? ?make ([a-z-]+)", readme, re.MULTILINE):
        assert target in targets, f"make {target}"


_TOLD = [
    pytest.param(shlex.split(line, comments=True)[1:], id=line.partition("#")[0].strip())
    for document in ("README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
    for line in re.findall(
        r"^\$? ?(stillframe .*)", (ROOT / document).read_text(encoding="utf-8"), re.MULTILINE
    )
]


@pytest.mark.parametrize("words", _TOLD)
def test_what_the_documents_type_is_understood(words: list[str]) -> None:
    from stillframe.cli.main import app

    command: Any = typer.main.get_command(app)
    context, name = None, "stillframe"
    while True:  # each level takes what is its own and leaves the rest; nothing is run
        context = command.make_context(name, words, parent=context)
        if not hasattr(command, "resolve_command"):
            break
        name, command, words = command.resolve_command(
            context, [*context._protected_args, *context.args]
        )


def test_ci_runs_what_people_run() -> None:
    lines = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert lines[-1] == "exec make test"
