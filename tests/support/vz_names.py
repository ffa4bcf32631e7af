"""Makes vz_names.json: what classes, selectors and constants Virtualization.framework has.

Facts from two sources, neither of which is needed to run the tests:

* a clone of ``madsmtm/objc2-generated``, whose bindings list every selector of Apple's headers;
* the unpacked macOS wheels of pyobjc-framework-Virtualization and -Cocoa, whose metadata tell how
  PyObjC sees them: constants, completion handlers, ``error:`` arguments, delegate methods.

    python -m support.vz_names CLONE WHEELS
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stillframe.host.process import run_blocking

FIXTURE = Path(__file__).with_name("vz_names.json")
# Of Foundation only what is used: the class, and the file that declares it.
_FOUNDATION = {
    "NSData": "NSData",
    "NSError": "NSError",
    "NSOperationQueue": "NSOperation",
    "NSURL": "NSURL",
}
_IMPLEMENTS = re.compile(r"^impl(?:<[^>]*>)? (\w+)")
_METHOD = re.compile(r"#\[unsafe\(method\(([\w:]+?)(?::_)?\)\)\]")
_SUPERS = re.compile(r"#\[unsafe\(super\(([^)]*)\)\)\]")
_STRUCT = re.compile(r"pub struct (\w+)")


def classes_of(text: str) -> Iterator[tuple[str, str, str]]:
    """(class, "super" or "selector", name) for all that a file of bindings declares."""
    current, supers = "", ""
    for line in text.splitlines():
        if found := _IMPLEMENTS.match(line):
            current = found[1]
        elif found := _SUPERS.search(line):
            supers = found[1]
        elif (found := _STRUCT.search(line)) and supers:
            yield from ((found[1], "super", name.strip()) for name in supers.split(","))
            supers = ""
        elif found := _METHOD.search(line):
            selector = found[1] + (":" if ":_))]" in line else "")
            yield current, "selector", selector


def bindings(clone: Path) -> dict[str, dict[str, list[str]]]:
    """Every class of Virtualization, and those of Foundation: superclasses and selectors."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(clone), *arguments]
        return run_blocking(command, timeout=60).stdout.decode()

    names = git("ls-tree", "--name-only", "HEAD", "Virtualization/").split()
    files = [name for name in names if name.endswith(".rs")]
    files += [f"Foundation/{name}.rs" for name in _FOUNDATION.values()]
    classes: dict[str, dict[str, set[str]]] = {}
    for name in files:
        for owner, kind, word in classes_of(git("show", f"HEAD:{name}")):
            classes.setdefault(owner, {"super": set(), "selector": set()})[kind].add(word)
    return {
        owner: {kind: sorted(words) for kind, words in sorted(known.items())}
        for owner, known in sorted(classes.items())
        if owner.startswith("VZ") or owner in _FOUNDATION
    }


def registered(text: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(class, selector, metadata) of every ``r(...)`` in a ``_metadata.py``."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "r" and len(node.args) == 3:
            owner, selector, about = node.args
            try:
                values = [ast.literal_eval(part) for part in (owner, selector, about)]
            except ValueError:  # differs between architectures
                continue
            yield values[0].decode(), values[1].decode(), values[2]


def metadata(wheels: Path, owners: set[str]) -> dict[str, Any]:
    """What PyObjC says of the classes in ``owners``."""
    own = (wheels / "Virtualization/_metadata.py").read_text()
    blocks: dict[str, int] = {}
    errors: list[str] = []
    delegate: list[str] = []
    for text in (own, (wheels / "Foundation/_metadata.py").read_text()):
        for owner, selector, about in registered(text):
            if owner == "NSObject" and text is own:
                delegate.append(selector)
            if owner not in owners:
                continue
            for argument in about.get("arguments", {}).values():
                if "callable" in argument:  # the first argument is the block itself
                    blocks[f"{owner} {selector}"] = len(argument["callable"]["arguments"]) - 1
                if argument.get("type_modifier") == b"o":
                    errors.append(f"{owner} {selector}")
    values = dict(re.findall(r"\$(\w+)@(-?\d+)", own))
    strings = re.findall(r'constants = """\$([\w$]*)\$"""', own)[0].split("$")
    functions = re.findall(
        r'"(CFRunLoopRun)":', (wheels / "CoreFoundation/_metadata.py").read_text()
    )
    return {
        "blocks": dict(sorted(blocks.items())),
        "errors": sorted(errors),
        "delegate": sorted(delegate),
        "constants": sorted([*values, *strings]),
        "functions": functions,
    }


def main(clone: Path, wheels: Path) -> None:
    """Write the fixture, with where it is from."""
    classes = bindings(clone)
    head = run_blocking(["git", "-C", str(clone), "rev-parse", "HEAD"], timeout=60)
    versions = sorted(path.name.removesuffix(".dist-info") for path in wheels.glob("*.dist-info"))
    document = {
        "sources": {
            "selectors": f"github.com/madsmtm/objc2-generated {head.stdout.decode().strip()}",
            "metadata": versions,
        },
        "classes": classes,
        **metadata(wheels, set(classes)),
    }
    lines = [
        f" {json.dumps(key)}: {_lines(value) if key == 'classes' else json.dumps(value)}"
        for key, value in document.items()
    ]
    FIXTURE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _lines(table: dict[str, Any]) -> str:
    """One class a line, so that a difference can be read."""
    rows = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in table.items()]
    return "{\n" + ",\n".join(rows) + "\n }"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
