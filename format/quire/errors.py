"""What can go wrong, as a tree. The name says who is at fault, the message names the file and what was seen.

    QuireError
      Refused      what is on disk cannot be used
        Damaged    it was a quire, and bytes are wrong in every copy
        Foreign    it is not a quire, or of another version, or with unknown features, or not the one that was meant
      Busy         somebody else writes to the set; the message says who
      ReadOnly     opened for reading, or an error on the disk stopped all writing
      Unusable     the caller asked for what cannot be: a name that is taken, a range beyond the end

All are OSErrors with a fitting errno, so that a server can answer with it. Errors of the disk itself are plain
OSErrors.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import ClassVar

_NO_FILE = (errno.ELOOP, errno.EINVAL, errno.EISDIR, errno.ENXIO, errno.ENOTDIR)


class QuireError(OSError):
    """See the module. `file` is the name of the file, or of the set."""

    number: ClassVar[int] = errno.EIO

    def __init__(self, file: str, what: str, offset: int | None = None) -> None:
        super().__init__(self.number, what)
        self.file = file
        self.what = what
        self.offset = offset

    def __str__(self) -> str:
        where = self.file if self.offset is None else f"{self.file}, offset {self.offset:#x}"
        return f"{where}: {self.what}"


class Refused(QuireError):
    """What is on disk cannot be used."""


class Damaged(Refused):
    """Bytes are wrong in every copy."""


class Foreign(Refused):
    """Not a quire, another version, unknown features, or not the one that was meant."""

    number = errno.EINVAL


class Busy(QuireError):
    """Somebody else writes to the set."""

    number = errno.EBUSY


class ReadOnly(QuireError):
    """Opened for reading, or an error on the disk stopped all writing."""

    number = errno.EROFS


class Unusable(QuireError):
    """The caller asked for what cannot be."""

    number = errno.EINVAL


@contextlib.contextmanager
def opening(file: str) -> Iterator[None]:
    """Says in the format's own words that a file which must be there is missing, or is none."""
    try:
        yield
    except FileNotFoundError:
        raise Damaged(file, "is missing") from None
    except OSError as error:
        if error.errno in _NO_FILE and not isinstance(error, QuireError):
            raise Foreign(file, "is not a regular file") from None
        raise
