"""What is promised of the disk images in a recording, and whether a crash state keeps it.

Nobody says what a program acknowledged; but some promises need no saying:

    opens      an image that was there before the program ran can be opened after every crash
    structure  and its format's check finds nothing worse than leaks (those formats that heal themselves when they are
               opened are healed first, and what that writes is recorded like any recovery)
    content    and each sector of its disk holds what it held before or what it holds when the program is done; one
               that is not the same then and now may also hold anything else that was written, or zeros, since it may
               have been written more than once

Of an image that the program makes, nothing is promised until the program has ended, and then only if what it had
synced is the whole image: then all of that holds, and each sector holds what it should. What else there is in the
directory is not judged. Nor is a name: QEMU's tools never sync a directory. A state in which an unsynced change of
names was lost is judged only for images whose own name was replaced.

A sector of the disk is judged without a branch for each (see `_Content`).
"""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from powercut.crash.contents import Choice
from powercut.crash.explore import Unjudged
from powercut.crash.fileset import Node, of_contents
from powercut.crash.options import Options
from powercut.crash.search import Search
from powercut.crash.settled import beginning, end, on_disk, root_of, write_out
from powercut.errors import EnvironmentFault
from powercut.explore.calls import Call
from powercut.explore.external import TIMEOUT
from powercut.explore.outside import Outside, Runs
from powercut.formats.probe import HEAD, check_of, probe
from powercut.stores import Case
from powercut.trace import SECTOR, Kind, Trace
from powercut.verdict import Problem, Severity

Sectors = NDArray[np.uint8]  # shape (n, 512)
_SHOWN = 200
_LEGAL = (0, 3)  # of qemu-img check: clean, or leaks


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of one run of qemu-img: its exit code, what it said, and the disk that it read."""

    code: int
    said: str
    disk: Sectors | None = None


def qemu_img(words: Sequence[str], within: str = "") -> Ran:
    """Run it. Raises Unjudged if it does not end by itself, EnvironmentFault if it is not there."""
    try:
        done = subprocess.run(
            ["qemu-img", *words], stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise Unjudged(f"qemu-img {words[0]} did not end within {TIMEOUT:.0f} s") from None
    except FileNotFoundError:
        raise EnvironmentFault("qemu-img was not found, and it judges disk images: install qemu-utils") from None
    if done.returncode < 0:
        raise Unjudged(f"qemu-img {words[0]} ended with signal {-done.returncode}")
    said = (done.stdout + done.stderr).decode(errors="replace").replace(within and f"{within}/", "")
    return Ran(done.returncode, " ".join(said.split())[:_SHOWN])


def read_disk(format: str, path: str, within: str = "") -> Ran:
    """The disk of the image at `path`."""
    with tempfile.TemporaryDirectory(prefix="powercut-") as scratch:
        out = f"{scratch}/disk"
        ran = qemu_img(["convert", "-m", "1", "-f", format, "-O", "raw", path, out], within)
        if ran.code:
            return ran
        size = os.stat(out).st_size
        whole = np.zeros(-(-size // SECTOR) * SECTOR, dtype=np.uint8)
        whole[:size] = np.memmap(out, dtype=np.uint8, mode="r") if size else 0
        return Ran(0, "", whole.reshape(-1, SECTOR))


@dataclass(frozen=True, slots=True)
class Image:
    """One image: what its disk may hold, a list of whole disks of which each sector may come from any; `early`: from
    the beginning on, not only when the program has ended. `written`: digests of all sectors that were written."""

    path: str
    format: str
    may: tuple[Sectors, ...]
    early: bool
    written: frozenset[int] = frozenset()

    def passing(self, sector: int, content: bytes) -> bool:
        """Whether a sector that changes may have held this in between."""
        if not self.early or len(self.may) < 2 or any(sector >= len(disk) for disk in self.may):
            return False
        before, after = self.may
        if (before[sector] == after[sector]).all():
            return False
        return not any(content) or xxhash.xxh3_64_intdigest(content) in self.written


@dataclass(frozen=True, slots=True)
class Wrong:
    """A promise that is not kept."""

    rule: str
    kind: str
    severity: Severity
    text: str
    sector: int = 0

    def shown_by(self, image: Image, directory: str) -> str:
        """A command of QEMU's own that shows it."""
        name = shlex.quote(f"{directory}/{image.path}")
        if self.rule == "content":
            return f"qemu-io -r -f {image.format} -c 'read -v {self.sector * SECTOR} {SECTOR}' {name}"
        return f"qemu-img check -f {image.format} {name}"


class Promised(Outside):
    """Judges every state by what is promised. `formats` are those of all images there are, by path. Raises
    EnvironmentFault without qemu-img."""

    def __init__(self, trace: Trace, options: Options) -> None:
        super().__init__()
        self._trace = trace
        self.judged: list[str] = []
        self.reasons: list[str] = []
        self._images: list[Image] = []
        self._written = frozenset(_written(trace))
        root = root_of(trace)
        with tempfile.TemporaryDirectory(prefix="powercut-") as scratch:
            before, after, disk = (Path(scratch) / name for name in ("before", "after", "disk"))
            write_out(beginning(trace, options), root, before)
            write_out(on_disk(trace, options), root, disk)
            self._at_end = frozenset(write_out(end(trace, options), root, after))
            self.formats = {
                str(path.relative_to(folder)): format
                for folder in (after, before)
                for path in folder.rglob("*")
                if (format := _format_of(path)) is not None
            }
            for path in sorted(self.formats):
                self._promise(path, before / path, after / path, disk / path)

    def _promise(self, path: str, before: Path, after: Path, disk: Path) -> None:
        """Find out what is promised of the image called `path`."""
        format = self.formats[path]
        was, done = _sound(before), _sound(after)
        if was is not None:
            may = (was,) if done is None else (was, done)
            self._images.append(Image(path, format, may, True, self._written))
            self.judged.append(f"{path} ({format}), which was there before")
        elif done is None:
            self.reasons.append(f"{path} was no sound {format} image when the program ended: nothing is promised of it")
        elif self._trace.meta.get("exit_status") != 0:
            self.reasons.append(f"{path}: its maker failed: nothing is promised of it")
        else:
            synced = _sound(disk)
            if synced is None or synced.shape != done.shape or (synced != done).any():
                command = self._trace.meta.get("command") or [""]
                again = "; qemu-img syncs what it writes with `-t writeback`" if "qemu-img" in command[0] else ""
                self.reasons.append(
                    f"{path}: its maker ended without having synced it: nothing is promised of it{again}"
                )
            else:
                self._images.append(Image(path, format, (done,), False))
                self.judged.append(f"{path} ({format}), once its maker had ended")

    def positions(self, ends: Sequence[int]) -> list[int]:
        """Those epochs at which something is promised."""
        if any(image.early for image in self._images):
            return list(ends)
        return [end for end in ends if end == self._trace.length and self._images]

    def __call__(self, case: Case) -> None:
        own = {image.path for image in self._images if image.early}
        lost, others = _lost_names(case, self._trace, own)
        runs = self.on(case)
        for image in self._images:
            now = image.early or case.position == self._trace.length
            if now and (image.path in lost or not others):
                self._judge(case, runs, image)

    def _judge(self, case: Case, runs: Runs, image: Image) -> None:
        def report(wrong: Wrong | None) -> None:
            if wrong is not None:
                after = f" (after a crash inside recovery {case.level})" if case.level else ""
                where = self._images.index(image) << 40 | wrong.sector  # tells problems apart
                text = f"{image.path}: {wrong.text}{after}"
                case.report(Problem(wrong.rule, wrong.kind, where, wrong.severity, text))

        folder, name = os.path.split(image.path)
        store = case.again()
        if (store.at(folder) if folder else store).kind(name) != "file":
            report(self._gone(image))
            return
        (wrong,), _ = runs.run(("check", image.path), lambda path: (_checked(image, path),))
        if wrong is not None:
            report(wrong)
        else:
            _Content(case.search, runs, image, report).judge()

    def _gone(self, image: Image) -> Wrong | None:
        if not image.early or image.path not in self._at_end:
            return None
        return Wrong("opens", "gone", Severity.UNOPENABLE, "it was there before, and is gone")

    def look_at(self, directory: str) -> list[tuple[Image, Wrong]]:
        """What is wrong with the images in a real directory. Heals those that are to be healed."""
        found = []
        for image in self._images:
            if not os.path.exists(f"{directory}/{image.path}"):
                wrong = self._gone(image)
            else:
                wrong = _checked(image, directory) or _read(image, directory)
            if wrong is not None:
                found.append((image, wrong))
        return found


def _checked(image: Image, directory: str) -> Wrong | None:
    """What its format's check says of the image."""
    with open(f"{directory}/{image.path}", "rb") as file:
        check = check_of(image.format, file.read(HEAD))
    if check is None:
        return None
    ran = qemu_img([*check, "-f", image.format, f"{directory}/{image.path}"], directory)
    if ran.code == 1:
        return Wrong("opens", "unopenable", Severity.UNOPENABLE, ran.said)
    return None if ran.code in _LEGAL else Wrong("structure", "corrupt", Severity.CORRUPT, ran.said)


def _read(image: Image, directory: str) -> Wrong | None:
    """What is wrong with the image's disk, as it reads now."""
    ran = read_disk(image.format, f"{directory}/{image.path}", directory)
    if ran.disk is None:
        return Wrong("opens", "unopenable", Severity.UNOPENABLE, ran.said)
    sectors, may = len(ran.disk), image.may
    if not any(sectors == len(disk) for disk in may):
        text = f"its disk has {sectors:,} sectors, not {' or '.join(f'{len(disk):,}' for disk in may)}"
        return Wrong("content", "size", Severity.SILENT, text)
    fine = np.zeros(sectors, dtype=bool)
    for disk in may:
        both = min(len(disk), sectors)
        fine[:both] |= (ran.disk[:both] == disk[:both]).all(axis=1)
    wrong = (n for n in np.flatnonzero(~fine).tolist() if not image.passing(n, ran.disk[n].tobytes()))
    sector = next(wrong, None)
    if sector is None:
        return None
    text = f"sector {sector:,} of its disk holds neither what it held nor what it should"
    return Wrong("content", "content", Severity.SILENT, text, sector)


def _written(trace: Trace) -> Iterator[int]:
    """Digests of all whole sectors that were written."""
    for event in trace.events[trace.events["kind"] == Kind.WRITE]:
        data = trace.payload(event)
        for place in range(-int(event["offset"]) % SECTOR, len(data) - SECTOR + 1, SECTOR):
            yield xxhash.xxh3_64_intdigest(data[place : place + SECTOR])


def _sound(place: Path) -> Sectors | None:
    """The disk of the image at `place`, if it is a sound one."""
    format = _format_of(place)
    if format is None:
        return None
    check = check_of(format, place.read_bytes()[:HEAD])
    if check is not None and qemu_img([*check, "-f", format, str(place)]).code not in _LEGAL:
        return None
    return read_disk(format, str(place)).disk


def _format_of(path: Path) -> str | None:
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        head = file.read(HEAD)
        file.seek(max(0, path.stat().st_size - SECTOR))
        return probe(head, file.read(SECTOR))


def _lost_names(case: Case, trace: Trace, own: set[str]) -> tuple[set[str], bool]:
    """Of the changes of names in flight, those of the paths `own` that were lost, and whether another one was."""
    newest = {entry: file for change in case.files.names.in_flight for entry, file in change.sets.items()}
    lost: set[str] = set()
    by_path = {os.path.normpath(f"{trace.files[entry[0]].name}/{entry[1]}"): entry for entry in newest}
    for path in sorted(by_path, key=lambda path: (path not in own, path)):
        directory, name = by_path[path]
        file = newest[by_path[path]]
        if case.state.lookup(Node(0, directory), name) != (None if file is None else Node(0, file)):
            if path not in own:
                return lost, True
            lost.add(path)
    return lost, False


class _Content:
    """Judges each sector of an image's disk, as sets: what is in flight on them is not decided.

    Once the check has decided the metadata, reading the disk copies bytes. So the disk is read several times: the
    first time every undecided atom has its first content, the next time its second, and so on, until every content
    was seen. If the calls are the same each time, where bytes come from does not depend on them, and each sector was
    judged for all it may hold. If they are not, all is decided, one after the other."""

    def __init__(self, search: Search, runs: Runs, image: Image, report: Callable[[Wrong | None], None]) -> None:
        self._search = search
        self._runs = runs
        self._image = image
        self._report = report

    def judge(self) -> None:
        most, turn = 1, 0
        first: list[Call] | None = None
        while turn < most:

            def answer(disk: int, choice: Choice, turn: int = turn) -> int | None:
                nonlocal most
                if not of_contents(disk):
                    return None
                most = max(most, len(choice.contents))
                return min(turn, len(choice.contents) - 1)

            with self._search.assuming(answer):
                wrong, calls = self._read()
            first = calls if first is None else first
            if calls != first:
                self._report(self._read()[0])
                return
            if wrong is not None:  # once more, decided, so that the finding says what it rests on
                self._search.answering(
                    lambda disk, choice, turn=turn: min(turn, len(choice.contents) - 1),  # type: ignore[misc]
                    lambda: self._report(self._read()[0]),
                )
                return
            turn += 1

    def _read(self) -> tuple[Wrong | None, list[Call]]:
        (wrong,), calls = self._runs.run(("content", self._image.path), lambda path: (_read(self._image, path),))
        return wrong, calls
