"""Rules of style as tests: what may import what, and what a source file may not be or say.

Each rule is a function from sources to complaints, and each has a control: sources that break it.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE_ROOTS = {"powercut": ROOT / "rig", "quire": ROOT / "format"}

# From the ground up. A part imports what lies on lower floors, and itself; on the ground also its neighbours.
FLOORS = [
    {"errors", "verdict", "disk", "trace", "sparse", "stamp", "stats", "compiled", "scratch"},
    {"scenario", "compare", "mount"},
    {"capture", "crash", "oracles", "guest", "report"},
    {"stores", "doctor", "endings"},
    {"formats"},
    {"recording", "explore", "inspection", "rescue"},
    {"faults", "loops", "defects"},
    {"gate"},
    {"fuzz"},
    {"rerecord"},
    {"commands"},
    {"cli", "__main__"},
]
FLOOR_OF = {part: number for number, parts in enumerate(FLOORS) for part in parts}

MAX_LINES = 500
KITCHEN_SINKS = {"util", "utils", "helper", "helpers", "common", "misc"}
UNFINISHED = re.compile(r"\b(?:TO[D]O|FIX[M]E|X[X]X)\b")
PRIVATE = re.compile(  # written so that this file does not match it
    r"(?<![\w.-])/(?:work|root)/|(?<![\w.-])/home/\w"
    r"|\b(?:pypi\.org|pythonhosted\.org|deb\.debian\.org|index[-]url|find[-]links)\b"
)

Graph = dict[str, set[str]]


# ---- what there is ---------------------------------------------------------------------------------------


def tracked() -> list[Path]:
    """Every file under version control or about to be; without git, every file that is not hidden or generated."""
    try:
        command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, capture_output=True, check=True, timeout=30).stdout.decode().split("\0")
        files = [ROOT / name for name in listed if name]
    except (OSError, subprocess.SubprocessError):
        files = [
            path
            for path in ROOT.rglob("*")
            if not {part for part in path.relative_to(ROOT).parts if part.startswith(".") or part == "__pycache__"}
        ]
    return sorted({path for path in files if path.is_file()})


def texts() -> dict[str, str]:
    """Path within the checkout -> content, of every tracked file that is text."""
    contents = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in tracked()}
    return {path: data.decode(errors="replace") for path, data in contents.items() if b"\0" not in data}


def modules() -> dict[str, tuple[Path, ast.Module]]:
    """Dotted name -> (file, tree), of both packages."""
    found = {}
    for package, root in SOURCE_ROOTS.items():
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = (path, ast.parse(path.read_text("utf-8"), str(path)))
    return found


def imported(name: str, tree: ast.AST, is_package: bool, known: Iterable[str]) -> Iterator[str]:
    """The modules that `name` imports, wherever in the file: `from p import m` is p.m if p.m is `known`, else p."""
    known = set(known)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if is_package else name.split(".")[:-1]
                above = package[: len(package) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in known else base


def imports() -> Graph:
    found = modules()
    return {
        name: {target for target in imported(name, tree, path.name == "__init__.py", found) if target != name}
        for name, (path, tree) in found.items()
    }


# ---- the rules -------------------------------------------------------------------------------------------


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


SERVE = {"capture", "guest", "recording", "explore", "faults", "loops", "defects"}
STORES = {"powercut.capture.store", "powercut.stores", "powercut.mount"}


def quire_trespasses(graph: Graph) -> list[str]:
    """The format knows nothing of the rig, and the rig knows the format at three places."""
    complaints = []
    for name, targets in graph.items():
        for target in sorted(targets):
            if is_within(name, "quire") and is_within(target, "powercut"):
                complaints.append(f"{name} imports {target}: the format imports nothing of the rig")
            if is_within(name, "powercut") and is_within(target, "quire"):
                serves = target in {"quire.nbd", "quire.nbd_protocol"} and name.split(".")[1] in SERVE
                stores = target == "quire.store" and name in STORES
                if not is_within(name, "powercut.formats.quire") and not serves and not stores:
                    complaints.append(f"{name} imports {target}: only formats/quire.py does, and who serves or stores")
    return complaints


def upward_arrows(graph: Graph) -> list[str]:
    complaints = []
    for name, targets in graph.items():
        if not name.startswith("powercut."):
            continue
        part = name.split(".")[1]
        if part not in FLOOR_OF:
            complaints.append(f"{name} has no floor: add {part!r} to FLOORS")
            continue
        for target in sorted(target for target in targets if target.startswith("powercut.")):
            other = target.split(".")[1]
            if other == part or other not in FLOOR_OF or FLOOR_OF[part] == FLOOR_OF[other] == 0:
                continue
            if FLOOR_OF[other] >= FLOOR_OF[part]:
                complaints.append(f"{name} imports {target}: {other!r} does not lie on a lower floor than {part!r}")
    return complaints


def circles(graph: Graph) -> list[str]:
    try:
        TopologicalSorter({name: targets & graph.keys() for name, targets in graph.items()}).prepare()
    except CycleError as error:
        return ["a circle of imports: " + " -> ".join(error.args[1])]
    return []


def long_files(sources: dict[str, str]) -> list[str]:
    counts = {path: text.count("\n") for path, text in sources.items() if path.endswith((".py", ".sh", ".c", ".h"))}
    return [f"{path}: {count} lines, more than {MAX_LINES}" for path, count in counts.items() if count > MAX_LINES]


def kitchen_sinks(paths: Iterable[str]) -> list[str]:
    bad = [path for path in paths if path.endswith(".py") and KITCHEN_SINKS & set(Path(path).with_suffix("").parts)]
    return [f"{path}: name it after what it does" for path in bad]


def lines_that_match(sources: dict[str, str], pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{path}:{number}: {match[0]}"
        for path, text in sources.items()
        for number, line in enumerate(text.splitlines(), 1)
        if (match := pattern.search(line))
    ]


def without_docstring(sources: dict[str, str]) -> list[str]:
    """A file with nothing in it needs none: it only marks a package."""
    return [
        path
        for path, text in sources.items()
        if path.endswith(".py") and text.strip() and not ast.get_docstring(ast.parse(text))
    ]


def names_on_page(page: str) -> set[str]:
    """Modules that a page names: `powercut/crash/model.py`, `powercut/crash/` or `powercut.crash.model`."""
    named = re.findall(r"\b(?:powercut|quire)(?:[./]\w+)*", page)
    return {re.sub(r"[./](?:__init__[./])?py$", "", name).replace("/", ".") for name in named}


# ---- the tests -------------------------------------------------------------------------------------------


def code() -> dict[str, str]:
    return {path: text for path, text in texts().items() if path.endswith((".py", ".sh", ".c", ".h"))}


def test_there_is_something_to_look_at() -> None:
    assert {"powercut.trace", "powercut.disk", "quire"} <= modules().keys()
    assert "pyproject.toml" in texts()


def test_the_format_and_the_rig_meet_only_where_they_should() -> None:
    assert quire_trespasses(imports()) == []


def test_no_import_runs_up() -> None:
    assert upward_arrows(imports()) == []


def test_imports_go_in_no_circle() -> None:
    assert circles(imports()) == []


def test_no_file_is_too_long() -> None:
    assert long_files(texts()) == []


def test_no_module_is_a_kitchen_sink() -> None:
    assert kitchen_sinks(texts()) == []


def test_nothing_is_left_unfinished() -> None:
    assert lines_that_match(code(), UNFINISHED) == []


def test_every_module_says_what_it_is() -> None:
    assert without_docstring(texts()) == []


def test_no_file_names_a_machine_or_a_registry() -> None:
    assert lines_that_match(texts(), PRIVATE) == []


def test_whats_here_names_every_module_and_no_other() -> None:
    page = (ROOT / "docs" / "whats-here.md").read_text("utf-8")
    named, there = names_on_page(page), modules()
    packages = {name for name, (path, _) in there.items() if path.name == "__init__.py"}
    in_table = {name for name in there if is_within(name, "powercut.commands")}  # the command line names those
    assert [name for name in sorted(there.keys() - packages - in_table) if name not in named] == []
    gone = re.findall(r"`(?:rig/|format/)?((?:powercut|quire)/[\w/]+\.py)`", page)
    assert [path for path in gone if not (SOURCE_ROOTS[path.split("/")[0]] / path).exists()] == []


# ---- the controls ----------------------------------------------------------------------------------------


def test_control_imports_are_found_wherever_they_stand() -> None:
    source = """
import powercut.explore.run, os
from powercut import trace, nothing
from . import model
from ..disk import Disk
def late():
    from quire import nbd
"""
    known = {"powercut.trace", "powercut.crash.model", "quire.nbd", "powercut.crash"}
    expected = {"powercut.explore.run", "os", "powercut.trace", "powercut", "powercut.crash.model", "powercut.disk"}
    assert set(imported("powercut.crash.explore", ast.parse(source), False, known)) == expected | {"quire.nbd"}
    assert set(imported("powercut.crash", ast.parse("from .model import x"), True, known)) == {"powercut.crash.model"}


def test_control_trespasses() -> None:
    assert quire_trespasses({"quire.image": {"powercut.disk"}})
    assert quire_trespasses({"powercut.formats.qcow2.checker": {"quire.layout"}})
    assert quire_trespasses({"powercut.capture.nbd": {"quire.image"}})
    assert quire_trespasses({"powercut.crash.model": {"quire.nbd"}})
    assert not quire_trespasses({"powercut.capture.nbd": {"quire.nbd"}, "powercut.formats.quire": {"quire.image"}})


def test_control_upward_arrows() -> None:
    assert upward_arrows({"powercut.trace": {"powercut.explore.run"}})
    assert upward_arrows({"powercut.crash.model": {"powercut.capture.nbd"}}), "side by side"
    assert upward_arrows({"powercut.guest.machine": {"powercut.endings"}})
    assert upward_arrows({"powercut.novelty": set()}), "a part without a floor"
    assert not upward_arrows({"powercut.trace": {"powercut.errors"}, "powercut.cli": {"powercut.explore.run"}})
    assert not upward_arrows({"powercut.crash.model": {"powercut.crash.media", "powercut.trace"}})


def test_control_circles() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert not circles({"a": {"b", "os"}, "b": set()})


def test_control_texts() -> None:
    assert long_files({"a.py": "x\n" * 501})
    assert not long_files({"a.py": "x\n" * 500, "data.md": "x\n" * 5000})
    assert kitchen_sinks(["rig/powercut/utils.py", "rig/powercut/common/a.py"])
    assert not kitchen_sinks(["rig/powercut/crash/model.py"])
    assert lines_that_match({"a.py": "x = 1  # TO" + "DO: more"}, UNFINISHED) == ["a.py:1: TO" + "DO"]
    for private in ["/wo" + "rk/x", "/ro" + "ot/x", "/ho" + "me/me", "https://py" + "pi.org/x", "--index-" + "url"]:
        assert lines_that_match({"a.md": f"see {private}"}, PRIVATE), private
    assert not lines_that_match({"a.md": "frame/wo" + "rk/x, ./ro" + "ot/, /tmp/x"}, PRIVATE)
    assert without_docstring({"a.py": "x = 1\n", "b.py": "", "c.py": '"""Says it."""\n'}) == ["a.py"]


def test_control_names_on_a_page() -> None:
    page = "`powercut/crash/model.py`, [rig/powercut/disk.py], `powercut.trace`, `quire/__init__.py`, `powercut/guest/`"
    assert {"powercut.crash.model", "powercut.disk", "powercut.trace", "quire", "powercut.guest"} <= names_on_page(page)
