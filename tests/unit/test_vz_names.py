"""Every name of Apple's that the shim uses exists, with as many arguments: no Mac is asked.

``vz_names.json`` holds what there is. What is used is read from the source of ``framework.py``, so
it cannot be forgotten; an object whose class cannot be told from the source fails the test too.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.vz_names import FIXTURE, classes_of

SOURCE = Path(__file__).resolve().parents[2] / "src/stillframe"
TEXT = (SOURCE / "vmm/vz/framework.py").read_text(encoding="utf-8")
KNOWN: dict[str, Any] = json.loads(FIXTURE.read_text())
MODULES = {"Virtualization", "Foundation", "CoreFoundation"}
# From objc/NSObject.h; init is not: the headers list it where it may be called.
FROM_NSOBJECT = {"alloc"}
# Names that stand for objects of Python, whose attributes are none of Apple's.
PYTHON = {"asyncio", "description", "future", "loop", "os", "self", "threading", "Refusal"}
PYTHON |= {"_STATES", "_KINDS", "delegate"}
MADE_BY_PYTHON = ("type(", "_failure(", "asyncio.", "threading.")
Types = dict[str, str]  # the class of a name or attribute, as written


def selector(name: str) -> str:
    """PyObjC's spelling turned back."""
    return name.replace("_", ":")


def has(owner: str, word: str) -> bool:
    known = KNOWN["classes"].get(owner, {"selector": [], "super": []})
    above = (KNOWN["classes"].get(name, {"selector": []}) for name in known["super"])
    every = {word for one in (known, *above) for word in one["selector"]}
    return word in every or word in FROM_NSOBJECT


class Checker:
    """Looks through a source for names that do not exist; ``problems`` are sentences."""

    def __init__(self, text: str) -> None:
        self.tree = ast.parse(text)
        self.problems: list[str] = []
        self.selectors: set[str] = set()
        self._returns = {
            node.name: ast.unparse(node.returns)
            for node in self.tree.body
            if isinstance(node, ast.FunctionDef) and node.returns is not None
        }
        self._own_classes = {
            node.name for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef)
        }
        self._scope(self.tree, {})
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ClassDef) and any(
                "NSObject" in ast.unparse(b) for b in node.bases
            ):
                self._delegate(node)

    def _scope(self, scope: ast.AST, outer: Types) -> None:
        """Check one function or class; functions within it know its names."""
        types = dict(outer)
        inner: list[ast.AST] = []
        self._declared(scope, types)
        nodes = list(self._own_nodes(scope, inner))
        for node in nodes:
            if isinstance(node, ast.AnnAssign):
                self._note(types, ast.unparse(node.target), node.annotation)
            elif isinstance(node, ast.Assign):
                target = node.targets[0]
                if isinstance(target, ast.Tuple):
                    target = target.elts[0]
                if owner := self.type_of(node.value, types):
                    types[ast.unparse(target)] = owner
        for node in nodes:
            if isinstance(node, ast.Attribute):
                self._attribute(node, types)
            elif isinstance(node, ast.Call):
                self._call(node, types)
        for node in inner:
            self._scope(node, types)

    def _declared(self, scope: ast.AST, types: Types) -> None:
        """Parameters; and of a class what __init__ says of self, for all methods."""
        if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef):
            for argument in [*scope.args.args, *scope.args.kwonlyargs]:
                self._note(types, argument.arg, argument.annotation)
        elif isinstance(scope, ast.ClassDef):
            for node in ast.walk(scope):
                if isinstance(node, ast.AnnAssign):
                    self._note(types, ast.unparse(node.target), node.annotation)

    def _own_nodes(self, scope: ast.AST, inner: list[ast.AST]) -> Iterator[ast.AST]:
        """In the order of the source, without what is inside inner functions and classes."""
        for child in ast.iter_child_nodes(scope):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner.append(child)
            else:
                yield child
                yield from self._own_nodes(child, inner)

    def _note(self, types: Types, name: str, annotation: ast.expr | None) -> None:
        word = "" if annotation is None else ast.unparse(annotation)
        if word in KNOWN["classes"]:
            types[name] = word

    def type_of(self, node: ast.expr, types: Types) -> str | None:
        """The class of Apple's that an expression has, if it can be told."""
        written = ast.unparse(node)
        if written in types:
            return types[written]
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in MODULES:
            return node.attr if node.attr in KNOWN["classes"] else None
        if not isinstance(node, ast.Call):
            return None
        if isinstance(node.func, ast.Name):
            told = self._returns.get(node.func.id, "")
            return told if told in KNOWN["classes"] else None
        if isinstance(node.func, ast.Attribute):
            owner = self.type_of(node.func.value, types)
            makes = node.func.attr.startswith(("alloc", "init", "mainQueue"))
            return owner if makes else None
        return None

    def _attribute(self, node: ast.Attribute, types: Types) -> None:
        base = ast.unparse(node.value)
        if base in MODULES:
            known = {*KNOWN["classes"], *KNOWN["constants"], *KNOWN["functions"], "NSObject"}
            if node.attr not in known:
                self.problems.append(f"there is no {base}.{node.attr}")
            return
        owner = self.type_of(node.value, types)
        if owner is None:
            made_here = base.removesuffix(".alloc()") in self._own_classes
            python = base in PYTHON or made_here or base.startswith(MADE_BY_PYTHON)
            if not python or re.search("[^_]_$", node.attr):
                self.problems.append(f"of which class is {base}, whose {node.attr} is used?")
            return
        self.selectors.add(f"{owner} {selector(node.attr)}")
        if not has(owner, selector(node.attr)):
            self.problems.append(f"{owner} has no {selector(node.attr)}")

    def _call(self, node: ast.Call, types: Types) -> None:
        if not isinstance(node.func, ast.Attribute):
            self._passed(node, types)
            return
        owner = self.type_of(node.func.value, types)
        if owner is None:
            return
        word = selector(node.func.attr)
        if len(node.args) != word.count(":"):
            self.problems.append(f"{owner} {word} is called with {len(node.args)} arguments")
        if word.lower().endswith("error:"):
            last = ast.unparse(node.args[-1]) if node.args else ""
            if f"{owner} {word}" not in KNOWN["errors"] or last != "None":
                self.problems.append(f"the error of {owner} {word} is not taken as a result")
        if word.endswith(("completionHandler:", "WithBlock:", "CompletionHandler:")):
            self._handler(node.args[-1], KNOWN["blocks"].get(f"{owner} {word}"), word)

    def _handler(self, handler: ast.expr, expected: int | None, word: str) -> None:
        if isinstance(handler, ast.Lambda):
            given = len(handler.args.args)
        else:
            name = ast.unparse(handler)
            made = [n for n in ast.walk(self.tree) if isinstance(n, ast.FunctionDef)]
            named = [n for n in made if n.name == name]
            given = len(named[0].args.args) if named else 1  # ``done``, by _completed
        if given != expected:
            self.problems.append(f"the handler of {word} takes {given}, not {expected}")

    def _passed(self, node: ast.Call, types: Types) -> None:
        """A method given to ``_completed`` takes one handler, of one argument."""
        if ast.unparse(node.func) != "_completed" or not isinstance(node.args[0], ast.Attribute):
            return
        method = node.args[0]
        owner, word = self.type_of(method.value, types), selector(method.attr)
        if word.count(":") != 1 or KNOWN["blocks"].get(f"{owner} {word}") != 1:
            self.problems.append(f"{owner} {word} cannot be waited for")

    def _delegate(self, node: ast.ClassDef) -> None:
        for method in node.body:
            if isinstance(method, ast.FunctionDef):
                word = selector(method.name)
                if word not in KNOWN["delegate"] or word.count(":") != len(method.args.args) - 1:
                    self.problems.append(f"nobody calls a delegate's {word}")


def test_every_name_that_the_shim_uses_exists() -> None:
    checker = Checker(TEXT)
    assert checker.problems == []
    assert len(checker.selectors) > 40
    assert "VZVirtualMachine saveMachineStateToURL:completionHandler:" in checker.selectors


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("setSocketDevices_", "setSocketDevice_"),
        ("VZVirtioEntropyDeviceConfiguration", "VZVirtioEntropyConfiguration"),
        ("VZErrorOutOfDiskSpace", "VZErrorNoSpace"),
        ("saveMachineStateToURL_completionHandler_(url, done)", "saveMachineStateToURL_(url)"),
        ("restoreMachineStateFromURL_", "restoreMachineStateToURL_"),
        ("setMACAddress_", "setMacAddress_"),
        ("setCPUCount_", "setCpuCount_"),
        ("setBlockDeviceIdentifier_", "setDeviceIdentifier_"),
        ("VZMACAddress.alloc().initWithString_(mac)", "VZMACAddress.alloc().init()"),
        ("error.localizedFailureReason()", "error.failureReason()"),
        ("connection.fileDescriptor()", "connection.descriptor()"),
        ("startWithCompletionHandler_", "startWithHandler_"),
        ("guestDidStopVirtualMachine_", "guestDidStop_"),
        ("validateWithError_(None)", "validateWithError_()"),
        ("initWithURL_append_error_(", "initWithURL_error_("),
        ("def connected(connection: VZVirtioSocketConnection, error", "def connected(error"),
        ("CFRunLoopRun", "CFRunLoopStart"),
        ("addOperationWithBlock_(lambda:", "addOperationWithBlock_(lambda one:"),
        ("device: VZVirtioSocketDevice = ", "device = "),
        ("self._vm: VZVirtualMachine = vm", "self._vm = vm"),
    ],
)
def test_a_misspelt_name_is_found(right: str, wrong: str) -> None:
    assert right in TEXT
    assert Checker(TEXT.replace(right, wrong)).problems


def test_only_one_file_speaks_to_the_framework() -> None:
    for path in SOURCE.rglob("*.py"):
        if path.name == "framework.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not MODULES & {alias.name for alias in node.names}, path
            elif isinstance(node, ast.ImportFrom):
                assert node.module not in MODULES, path


def test_the_names_come_from_bindings_as_they_are_written() -> None:
    text = """
extern_class!(
    #[unsafe(super(VZBase, NSObject))]
    pub struct VZThing;
);
impl VZThing {
        #[unsafe(method(setSize:))]
        #[unsafe(method(checkWithError:_))]
        // -init (unavailable)
"""
    assert list(classes_of(text)) == [
        ("VZThing", "super", "VZBase"),
        ("VZThing", "super", "NSObject"),
        ("VZThing", "selector", "setSize:"),
        ("VZThing", "selector", "checkWithError:"),
    ]
