"""What an NBD server and client agree on: the numbers on the wire, and what an export is.

The protocol is the NetworkBlockDevice project's doc/proto.md; names in capitals are its names without the prefix.
"""

from __future__ import annotations

import enum
import struct
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

Data: TypeAlias = bytes | bytearray | memoryview

INIT_MAGIC: Final = b"NBDMAGIC"
OPTION_MAGIC: Final = b"IHAVEOPT"
OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698

GREETING: Final = struct.Struct(">8s8sH")
OPTION: Final = struct.Struct(">8sII")  # magic, option, length
OPTION_REPLY: Final = struct.Struct(">QIII")  # magic, option, reply type, length
EXPORT_INFO: Final = struct.Struct(">HQH")  # INFO_EXPORT: type, size, transmission flags
BLOCK_SIZE_INFO: Final = struct.Struct(">HIII")  # INFO_BLOCK_SIZE: type, minimum, preferred, maximum
REQUEST: Final = struct.Struct(">IHH8sQI")  # magic, flags, type, cookie, offset, length
SIMPLE_REPLY: Final = struct.Struct(">II8s")  # magic, error, cookie

FIXED_NEWSTYLE: Final = 1  # handshake flags, the same bits in both directions
NO_ZEROES: Final = 2
MAX_REQUEST: Final = 32 << 20  # the length every server and client should manage, says the protocol
MAX_MINIMUM_BLOCK: Final = 65536


class Option(enum.IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    INFO = 6
    GO = 7


class OptionReply(enum.IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    ERR_UNSUP = 1 << 31 | 1
    ERR_INVALID = 1 << 31 | 3


class Info(enum.IntEnum):
    EXPORT = 0
    BLOCK_SIZE = 3


class TransmissionFlag(enum.IntFlag):
    HAS_FLAGS = 1
    READ_ONLY = 2
    SEND_FLUSH = 4
    SEND_FUA = 8
    SEND_TRIM = 32
    SEND_WRITE_ZEROES = 64
    CAN_MULTI_CONN = 256


class Command(enum.IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6


class CommandFlag(enum.IntFlag):
    FUA = 1
    NO_HOLE = 2


class Export(Protocol):
    """A disk. `size` is a multiple of `block_size`, which is a power of two up to 65536.

    Ranges are never empty, within the disk, and multiples of `block_size`. Methods are called by the thread of
    the connection, and by whoever calls `Request.finish`. The data of a write is valid until `write` returns.
    Two attributes are optional and False where missing: `read_only`, and `multi_conn` (a flush on one
    connection covers what was answered on another).
    """

    @property
    def size(self) -> int: ...

    @property
    def block_size(self) -> int: ...

    def read(self, offset: int, length: int) -> Data: ...

    def write(self, offset: int, data: Data, fua: bool) -> None: ...

    def zero(self, offset: int, length: int, may_unmap: bool, fua: bool) -> None: ...

    def discard(self, offset: int, length: int) -> None: ...

    def flush(self) -> None: ...


class Answers(Protocol):
    """Whoever executes a request that was held, and answers it."""

    def finish(self, request: Request) -> None: ...


class Request:
    """One request of a client. `data` is what a write brings, valid until the request was finished.

    `note` belongs to the observer: the position of the request in a trace, for instance.
    """

    __slots__ = (
        "answer",
        "connection",
        "cookie",
        "data",
        "error",
        "fua",
        "kind",
        "length",
        "may_unmap",
        "note",
        "offset",
    )

    def __init__(
        self,
        connection: Answers,
        cookie: bytes,
        kind: Command,
        offset: int,
        length: int,
        data: Data,
        fua: bool,
        may_unmap: bool,
    ) -> None:
        self.connection = connection
        self.cookie = cookie
        self.kind = kind
        self.offset = offset
        self.length = length
        self.data = data
        self.fua = fua
        self.may_unmap = may_unmap
        self.note: Any = None
        self.error = 0
        self.answer: Data = b""

    def finish(self) -> None:
        """Execute a held request and answer it: once, from any thread. After the server stopped it is still
        executed, and the answer goes nowhere."""
        self.connection.finish(self)

    def __repr__(self) -> str:
        return f"Request({self.kind.name}, offset={self.offset}, length={self.length}, fua={self.fua})"


@runtime_checkable
class Observer(Protocol):
    """What an export may implement besides, to see when requests begin and end.

    Both are called once for each valid request, reads included. An OSError from either becomes the request's
    answer; a request that `received` refused is neither executed nor finished.
    """

    def received(self, request: Request) -> None:
        """The request was issued: called by the thread of its connection when it was read."""

    def finishing(self, request: Request, error_number: int) -> None:
        """The request was executed (0, or an errno of the protocol), and its reply is about to be sent."""


@runtime_checkable
class Holder(Observer, Protocol):
    """An observer that may keep requests from being executed. Their data is copied, so they may wait."""

    def held(self, request: Request) -> bool:
        """Asked after the batch was read and before the request is executed. True: it waits for `finish`."""
