"""From the recorder's log to a trace.

Two passes: the first follows every call through the tree of files and finds out which files were touched; the
second writes the trace, with what the touched files held before, and a mark `tree` that says how they were called.
"""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from powercut.capture.filetree import Node, Tree
from powercut.capture.recorded import Call, Key, LazyBytes, LostBytesError, Mode, Op
from powercut.errors import InputError
from powercut.trace import Flag, Kind, TraceWriter

# A call that failed so never began; after any other error a part of it may have been done.
_NOTHING_DONE = frozenset(
    getattr(errno, name)
    for name in ("EBADF", "EINVAL", "EOPNOTSUPP", "ENOSYS", "EPERM", "EFAULT", "EFBIG", "ESPIPE", "EISDIR", "ETXTBSY")
) | {errno.EAGAIN, errno.ENODEV, errno.EACCES, errno.ENOENT, errno.ENOTDIR, errno.EROFS}
_PAST = frozenset({"mmap", "freopen"})  # notes of what the recorder let pass; the others it refused
MAX_FILES = 1 << 16


@dataclass(slots=True)
class Event:
    """One event of the trace to be. `about` names nodes, which become ids when it is written."""

    kind: Kind
    node: Node
    offset: int = 0
    length: int = 0
    data: memoryview | LazyBytes | None = None
    flags: int = 0
    about: dict[str, Any] | None = None
    position: int = 0


@dataclass(slots=True)
class Step:
    event: Event
    completes: bool
    result: int = 0


@dataclass
class Translation:
    """The first pass. `problems` are reasons to refuse; `past` tells what wrote to a file unseen."""

    tree: Tree
    calls: list[Call]
    problems: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    past: dict[Node, set[str]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    known: list[Node] = field(default_factory=list)  # touched so far

    def __post_init__(self) -> None:
        moments = [(call.position, False, i) for i, call in enumerate(self.calls)]
        moments += [(call.ended, True, i) for i, call in enumerate(self.calls) if call.result is not None]
        open_events: dict[int, list[Event]] = {}
        for _, ended, i in sorted(moments):
            call = self.calls[i]
            if not ended:
                open_events[i] = self._entered(call)
                self.steps += [Step(event, False) for event in open_events[i]]
                continue
            result = -call.result if call.result is not None and call.result < 0 else 0
            for event in open_events.pop(i):
                self.steps.append(Step(event, True, result))
                self._resize(event, result)
        for events in open_events.values():
            for event in events:
                if event.kind in (Kind.WRITE, Kind.ZERO):
                    event.node.largest = max(event.node.largest, event.offset + event.length)

    def _touch(self, node: Node) -> Node:
        if not node.touched:
            node.touch()
            self.known.append(node)
        return node

    def _resize(self, event: Event, result: int) -> None:
        if result:
            return
        if event.kind is Kind.TRUNCATE:
            event.node.resized(event.length)
        elif event.kind in (Kind.WRITE, Kind.ZERO):
            event.node.resized(max(event.node.size, event.offset + event.length))

    def _entered(self, call: Call) -> list[Event]:
        if call.op is Op.SYNC:
            here = [node for node in self.known if call.key[0] in (0, node.key[0])]
            return [self._flush(node) for node in here]
        if call.op is Op.NOTE:
            self._note(call)
            return []
        if call.result is not None and -call.result in _NOTHING_DONE:
            return []
        if call.changes_names:
            return self._named(call)
        node = self.tree.live.get(call.key)
        if node is None:
            self.problems.append(f"a file was changed ({call.op.name.lower()}) that was not known: inode {call.key[1]}")
            return []
        return self._changed(call, node)

    def _flush(self, node: Node) -> Event:
        return Event(Kind.FLUSH if node.entries is None else Kind.SYNC_DIR, node)

    def _note(self, call: Call) -> None:
        what = call.names[0]
        node = self.tree.live.get(call.key)
        if what in _PAST and node is not None:
            self.past.setdefault(node, set()).add(what)
        else:
            self.refused[what] += 1

    def _changed(self, call: Call, node: Node) -> list[Event]:
        """What a call on an open file becomes."""
        if call.op is Op.FLUSH:
            return [self._flush(node)]
        if call.op is Op.RANGE:
            return [Event(Kind.MARK, node, call.offset, call.length, about={"label": "sync_file_range"})]
        if call.op is Op.TRUNCATE:
            return [Event(Kind.TRUNCATE, self._touch(node), length=call.length)]
        if call.op is Op.WRITE:
            length = call.length if call.result is None or call.result < 0 else call.result
            offset = call.offset if call.result is None or call.result < 0 else call.end_offset
            flags = int(Flag.FUA) if call.flags & Mode.FUA else 0
            if not length:
                return []
            data = call.lazy or call.data[:length]  # a short write is not lazy
            return [Event(Kind.WRITE, self._touch(node), offset, length, data, flags)]
        end = call.offset + call.length
        if call.op is Op.ALLOCATE:
            grows = end > node.size and not call.flags & Mode.KEEP_SIZE
            return [Event(Kind.TRUNCATE, self._touch(node), length=end)] if grows else []
        if call.op is Op.PUNCH or call.flags & Mode.KEEP_SIZE:
            end = min(end, node.size)
        if end <= call.offset:
            return []
        kind = Kind.DISCARD if call.op is Op.PUNCH else Kind.ZERO
        return [Event(kind, self._touch(node), call.offset, end - call.offset)]

    # Names. The recorder makes these one at a time, so what was asked is what happened.

    def _named(self, call: Call) -> list[Event]:
        one, other = call.names
        if call.result is None:
            if not _seems_done(call, one, other):
                return []
        elif call.result < 0:
            return []  # all or nothing
        if call.op is Op.OPEN:
            return self._opened(call, call.end_path or one)
        if call.op is Op.MKDIR:
            node = self._new(call.end_key, one, {}) if call.result is not None else self._appeared(one, {})
            return self._create(one, node)
        if call.op is Op.SYMLINK:
            return self._create(one, Node(one, (0, 0), other=True, touched=True))
        if call.op is Op.LINK:
            linked = self.tree.live.get(call.end_key if call.result is not None else call.key)
            return self._create(other, self._arrived(linked, other, "linked"), Kind.LINK)
        if call.op is Op.UNLINK:
            parent, gone = self._take(one)
            return [] if parent is None else [self._event(Kind.UNLINK, parent, one, file=gone)]
        return self._renamed(call, one, other)

    def _event(self, kind: Kind, parent: Node, path: str, **about: Any) -> Event:
        return Event(kind, self._touch(parent), about={"name": os.path.basename(path), **about})

    def _new(self, key: Key, path: str, entries: dict[str, Node] | None = None) -> Node:
        node = self.tree.live[key] = Node(path, key, entries=entries)
        return self._touch(node)

    def _appeared(self, path: str, entries: dict[str, Node] | None = None) -> Node:
        """Made by a call that never returned: the program died in it."""
        status = os.lstat(path)
        return self._new((status.st_dev, status.st_ino), path, entries)

    def _arrived(self, node: Node | None, path: str, how: str) -> Node:
        if node is None:
            self.problems.append(
                f"{self.tree.name(path)} was {how} there from outside of what is recorded: "
                "name that directory too (--dir)"
            )
            return Node(path, (0, 0), other=True, touched=True)
        return self._touch(node)

    def _create(self, path: str, node: Node, kind: Kind = Kind.CREATE) -> list[Event]:
        parent = self.tree.parent(path)
        if parent is None:
            return []  # linked to a place outside
        assert parent.entries is not None
        parent.entries[os.path.basename(path)] = node
        return [self._event(kind, parent, path, file=node)]

    def _take(self, path: str) -> tuple[Node | None, Node | None]:
        parent = self.tree.parent(path)
        if parent is None:
            return None, None
        assert parent.entries is not None
        gone = parent.entries.pop(os.path.basename(path), None)
        return parent, None if gone is None else self._touch(gone)

    def _opened(self, call: Call, path: str) -> list[Event]:
        if call.flags & Mode.TRUNCATED:
            node = self.tree.live.get(call.key)
            if node is None:
                self.problems.append(f"{self.tree.name(path)} was emptied, and nothing is known about what it held")
                return []
            return [Event(Kind.TRUNCATE, self._touch(node), length=0)]
        if call.flags & Mode.UNNAMED:
            if call.result is not None:
                self._new(call.end_key, path)
            return []
        node = self._new(call.end_key, path) if call.result is not None else self._appeared(path)
        return self._create(path, node)

    def _renamed(self, call: Call, one: str, other: str) -> list[Event]:
        source, target = self.tree.parent(one), self.tree.parent(other)
        there = (target.entries or {}).get(os.path.basename(other)) if target else None
        here = (source.entries or {}).get(os.path.basename(one)) if source else None
        if here is not None and here is there:
            return []  # two names of one file: POSIX says that nothing happens
        if call.flags & Mode.EXCHANGE:
            if source is None or target is None or here is None or there is None:
                self.problems.append(f"{self.tree.name(one)} was exchanged with a file outside of what is recorded")
                return []
            assert source.entries is not None
            assert target.entries is not None
            source.entries[os.path.basename(one)], target.entries[os.path.basename(other)] = there, here
            about: dict[str, Any] = {"exchanges": self._touch(there)}
        else:
            if source is not None:
                self._take(one)
            if target is None:
                return [] if source is None else [self._event(Kind.UNLINK, source, one, file=here)]
            here = self._arrived(here, other, "moved")
            assert target.entries is not None
            target.entries[os.path.basename(other)] = here
            about = {"replaces": None if there is None else self._touch(there)}
        if source is None:
            return []  # a problem, and noted as one
        self._touch(target)
        assert here is not None
        about |= {"file": self._touch(here), "to": os.path.basename(other), "directory": target}
        return [self._event(Kind.RENAME, source, one, **about)]

    # The second pass

    def write(self, writer: TraceWriter, image: Node | None, stopped: bool) -> int:
        """Write it all into `writer`; `image` gets that role. Returns the number of events. Where the recorder had
        `stopped`, the trace ends before the first write whose bytes were lost since. Raises InputError.
        """

        def declare(node: Node) -> int | None:
            if node.id is None and not node.other:
                role = "image" if node is image else "file" if node.entries is None else "directory"
                size = node.largest if node is image else node.size_before
                node.id = writer.file(self.tree.name(node.path), size, role)
            return node.id

        first = [node for node in self.tree.initial if node.touched or node.beside]
        for node in sorted(first, key=lambda node: node.path):
            declare(node)
            if node.copy is not None and node.size_before:
                writer.base_file(node.id or 0, node.copy)
        entries = [(up.id, name, node.id) for up, name, node in self._before() if up.id is not None]
        writer.mark("tree", entries=[*entries, *self._joined(writer)])
        events = 0
        for step in self.steps:
            event = step.event
            if not event.node.touched:
                continue  # a flush of a file that nobody changed
            if step.completes:
                writer.complete(event.position, step.result)
                continue
            file = declare(event.node) or 0
            data: Any = event.data
            if data is not None and not isinstance(data, memoryview):
                try:
                    data = data.read()
                except LostBytesError:
                    if stopped:
                        break
                    raise InputError(self._lost(event)) from None
            if event.about is not None:
                ids = {key: declare(value) if isinstance(value, Node) else value for key, value in event.about.items()}
                data = json.dumps(ids).encode()
            event.position = writer.issue(event.kind, file, event.offset, event.length, data=data, flags=event.flags)
            events += 1
        return events

    def _joined(self, writer: TraceWriter) -> list[tuple[int, str, int | None]]:
        """Where there are several roots: the entries that lead to them from the directory that they have in common."""
        entries: list[tuple[int, str, int | None]] = []
        made: dict[str, int] = {}

        def directory(name: str) -> int:
            if name not in made:
                made[name] = writer.file(name, 0, "directory")
                if name != ".":
                    entries.append((directory(os.path.dirname(name) or "."), os.path.basename(name), made[name]))
            return made[name]

        for root, node in self.tree.roots.items() if len(self.tree.roots) > 1 else ():
            name = self.tree.name(root)
            entries.append((directory(os.path.dirname(name) or "."), os.path.basename(name), node.id))
        return entries

    def _lost(self, event: Event) -> str:
        past = self.past.get(event.node, ())
        how = f" ({' and '.join(sorted(past))})" if past else ""
        return (
            f"{self.tree.name(event.node.path)}: the {event.length:,} bytes that were written at byte {event.offset:,} "
            f"({event.offset:#x}) were changed later: it was written past the recorder{how}"
        )

    def _before(self) -> list[tuple[Node, str, Node]]:
        found = [(parent, name, node) for node in self.tree.initial for parent, name in node.before]
        return sorted(found, key=lambda entry: (entry[0].path, entry[1]))


def find_image(tree: Tree, name: str, written: Callable[[Node], bool]) -> Node:
    """The file that the user calls `name`. Raises InputError."""
    nodes = [node for node in tree.live.values() if node.entries is None and written(node)]
    for path in (os.path.realpath(name), *(os.path.join(root, name) for root in tree.roots)):
        for node in nodes:
            if node.path == path:
                return node
    names = ", ".join(sorted(tree.name(node.path) for node in nodes)[:5]) or "none"
    raise InputError(f"--image {name}: the program changed no such file; it changed: {names}")


def _seems_done(call: Call, one: str, other: str) -> bool:
    """Whether a change of names that never returned was made, as far as can be told afterwards."""
    if call.op is Op.UNLINK:
        return not os.path.lexists(one)
    if call.op is Op.RENAME:
        return os.path.lexists(other) and os.lstat(other).st_ino == call.key[1]
    if call.op is Op.OPEN and call.flags & Mode.TRUNCATED:
        return True
    return os.path.lexists(other if call.op is Op.LINK else one)
