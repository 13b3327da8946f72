"""What fails below a format while a guest uses it: a protocol, and one small file for each way.

`blkdebug.py`: QEMU's own injection of errors; `server.py`: a storage server that fails, stalls, hangs up or goes away;
`full.py`: a really full file system.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from typing import Any, Final, Protocol

NODE: Final = "below"  # the block node that the format writes to


@dataclass(frozen=True, slots=True)
class Armed:
    """An image with a failure below it: its node, in the form of QMP's blockdev-add, without a name; what is to be
    called when its guest has seen an error, before it goes on; and how many occasions to fail there were so far, where
    the failure can tell."""

    node: dict[str, Any]
    noticed: Callable[[], None] = lambda: None
    occasions: Callable[[], int] = lambda: 0


class Failure(Protocol):
    """What fails, and when. `error` is a word, `lasting` "once" or "good"; it prints as a phrase."""

    @property
    def error(self) -> str: ...

    @property
    def lasting(self) -> str: ...

    @property
    def table(self) -> dict[str, Any]:
        """Where it strikes, as keys of a scenario's `errors`."""

    def earlier(self) -> Iterator[Failure]:
        """Itself, and then the same ever nearer to the beginning."""

    def armed(self, template: Path, out: Path) -> AbstractContextManager[Armed]:
        """A copy of `template`, for as long as the context lasts. Then the image is in `out`, and nothing fails."""


def file_node(path: Path) -> dict[str, Any]:
    """The node of a file. Its flushes are not carried out: nothing here ends with a power cut, and they take time."""
    return {"driver": "file", "filename": str(path), "discard": "unmap", "cache": {"no-flush": True}}


@contextmanager
def unharmed(template: Path, out: Path) -> Iterator[Armed]:
    """As `Failure.armed`, if nothing fails."""
    copyfile(template, out)
    yield Armed(file_node(out))
