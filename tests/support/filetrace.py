"""A trace of several files, replayed to its end in the plainest way: a second opinion."""

from __future__ import annotations

import os
from pathlib import Path

from powercut.trace import Kind, Trace

Files = dict[str, bytes | None]  # path within the directory -> content; None: a directory


def files_of(trace: Trace) -> Files:
    """What the files are called and hold when everything in `trace` was done, in the order in which it completed."""
    contents = [bytearray(info.size) for info in trace.files]
    for file, offset, length, row in trace.bases.tolist():
        data = trace.rows[row : row + -(-length // 512)].tobytes()[:length]
        contents[file][offset : offset + length] = data[: max(0, len(contents[file]) - offset)]
    entries: dict[int, dict[str, int]] = {info.id: {} for info in trace.files if info.role == "directory"}
    for event in sorted(trace.events, key=lambda event: int(event["completed"])):
        kind, file, offset, length = (int(event[field]) for field in ("kind", "file", "offset", "length"))
        if event["result"]:
            continue
        content = contents[file]
        if kind in (Kind.WRITE, Kind.ZERO, Kind.DISCARD):
            content.extend(bytes(max(0, offset + length - len(content))))
            content[offset : offset + length] = trace.payload(event) if kind == Kind.WRITE else bytes(length)
        elif kind == Kind.TRUNCATE:
            del content[length:]
            content.extend(bytes(length - len(content)))
        elif kind in (Kind.MARK, Kind.CREATE, Kind.LINK, Kind.UNLINK, Kind.RENAME):
            about = trace.about(event)
            names = entries.get(file, {})
            if kind == Kind.MARK and about.get("label") == "tree":
                for directory, name, child in about["entries"]:
                    entries[directory][name] = child
            elif kind in (Kind.CREATE, Kind.LINK):
                names[about["name"]] = about["file"]
            elif kind == Kind.UNLINK:
                del names[about["name"]]
            elif kind == Kind.RENAME and "exchanges" in about:
                names[about["name"]], entries[about["directory"]][about["to"]] = about["exchanges"], about["file"]
            elif kind == Kind.RENAME:
                del names[about["name"]]
                entries[about["directory"]][about["to"]] = about["file"]
    found: Files = {}

    def visit(directory: int, path: str) -> None:
        for name, child in entries[directory].items():
            inner = os.path.join(path, name)
            if child is None:
                continue  # a symbolic link
            found[inner] = None if child in entries else bytes(contents[child])
            if child in entries:
                visit(child, inner)

    visit(next(info.id for info in trace.files if info.name == "."), "")
    return found


def files_under(folder: Path) -> Files:
    """What is really there, symbolic links left out."""
    paths = [path for path in folder.rglob("*") if not path.is_symlink()]
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in paths}
