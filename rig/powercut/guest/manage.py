"""What a host does with an image besides its guest's requests: snapshots, resizing, commits, closing and opening.

Snapshots are made and deleted, and the disk is resized, while the storage daemon has the image open, its caches as
the guest left them. A snapshot is applied, and an overlay committed, by qemu-img on the closed image, as QEMU has no
other way or refuses it to a disk with a guest. Either way the image's file is behind the same server.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

from powercut.errors import EnvironmentFault
from powercut.guest.control import Control, Guest
from powercut.guest.daemon import tool
from powercut.guest.workload import Operation, Verb

_PATIENCE = 120.0  # seconds that qemu-img may take


class Managed:
    """An image, open under a storage daemon; a context manager. `node` is its block node in the form of QMP's
    blockdev-add, with the nodes below inside it; `client` is its guest's connection, another one after each `manage`.

    Raises EnvironmentFault when QEMU refuses something or is lost.
    """

    def __init__(self, node: dict[str, Any]) -> None:
        self._node = node
        self._control = Control()
        try:
            self.client: Guest = self._control.open(node)
        except EnvironmentFault:
            self._control.close()
            raise

    def __enter__(self) -> Managed:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._control.shut(self.client)
        finally:
            self._control.close()

    def manage(self, operation: Operation) -> None:
        """Do what `operation` says. Nothing of the guest's may be in flight."""
        name, control = operation.name, self._control
        match operation.verb:
            case Verb.CREATE:
                control.ask("blockdev-snapshot-internal-sync", device="disk", name=name)
            case Verb.DELETE:
                control.ask("blockdev-snapshot-delete-internal-sync", device="disk", name=name)
            case Verb.RESIZE:
                self.client = control.resize(self.client, operation.length)
            case Verb.APPLY:
                self._closed("snapshot", "-a", name)
            case Verb.COMMIT:
                self._closed("commit", "-q")
            case _:
                self._closed()

    def _closed(self, *command: str) -> None:
        """Close the image, run qemu-img on it if a command is given, and open it again."""
        self._control.shut(self.client)
        if command:
            image = "json:" + json.dumps(self._node)
            done = subprocess.run(
                [tool("qemu-img"), *command, image], capture_output=True, text=True, timeout=_PATIENCE
            )
            if done.returncode:
                raise EnvironmentFault(f"qemu-img {' '.join(command)}: {done.stderr.strip()}")
        self.client = self._control.open(self._node)
