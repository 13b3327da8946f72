"""The handshake of an NBD connection, the server's side of it: fixed newstyle, doc/proto.md, "Fixed newstyle
negotiation"."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Final

from quire.nbd_protocol import (
    BLOCK_SIZE_INFO,
    EXPORT_INFO,
    FIXED_NEWSTYLE,
    GREETING,
    INIT_MAGIC,
    MAX_REQUEST,
    NO_ZEROES,
    OPTION,
    OPTION_MAGIC,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    Export,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
)

_MAX_OPTION: Final = 64 << 10


class Unframeable(Exception):
    """The client sent what this server cannot find the end of, or hung up."""


class Handshake:
    """Agrees with the client on `connected` to serve it `export`, under whatever name it asks for."""

    def __init__(self, connected: socket.socket, export: Export) -> None:
        self._socket = connected
        self._export = export

    def _exactly(self, length: int) -> bytes:
        received = self._socket.recv(length, socket.MSG_WAITALL)
        if len(received) != length:
            raise Unframeable
        return received

    def negotiate(self) -> bool:
        """Haggle until the client has chosen the export (True) or leaves (False)."""
        self._socket.sendall(GREETING.pack(INIT_MAGIC, OPTION_MAGIC, FIXED_NEWSTYLE | NO_ZEROES))
        client = int.from_bytes(self._exactly(4), "big")
        if client & ~(FIXED_NEWSTYLE | NO_ZEROES):
            raise Unframeable
        while True:
            magic, option, length = OPTION.unpack(self._exactly(OPTION.size))
            if magic != OPTION_MAGIC or length > _MAX_OPTION:
                raise Unframeable
            data = self._exactly(length) if length else b""
            if option == Option.EXPORT_NAME:
                zeroes = b"" if client & NO_ZEROES else bytes(124)
                self._socket.sendall(EXPORT_INFO.pack(0, self._export.size, self._flags())[2:] + zeroes)
                return True
            if option == Option.ABORT:
                with contextlib.suppress(OSError):  # the client need not wait for it
                    self._answer(option, OptionReply.ACK)
                return False
            if option in (Option.INFO, Option.GO):
                if self._inform(option, data) and option == Option.GO:
                    return True
            elif option == Option.LIST:
                if length:
                    self._answer(option, OptionReply.ERR_INVALID)
                else:
                    self._answer(option, OptionReply.SERVER, bytes(4))  # one export, its name is empty
                    self._answer(option, OptionReply.ACK)
            else:
                self._answer(option, OptionReply.ERR_UNSUP)

    def _answer(self, option: int, reply: OptionReply, data: bytes = b"") -> None:
        self._socket.sendall(OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, reply, len(data)) + data)

    def _inform(self, option: int, data: bytes) -> bool:
        """Answer INFO and GO: a name (any will do), then the list of what the client wants to know."""
        name = int.from_bytes(data[:4], "big")
        count = int.from_bytes(data[4 + name : 6 + name], "big")
        if len(data) != 6 + name + 2 * count:
            self._answer(option, OptionReply.ERR_INVALID)
            return False
        self._answer(option, OptionReply.INFO, EXPORT_INFO.pack(Info.EXPORT, self._export.size, self._flags()))
        if Info.BLOCK_SIZE in struct.unpack_from(f">{count}H", data, 6 + name):
            minimum = self._export.block_size
            sizes = BLOCK_SIZE_INFO.pack(Info.BLOCK_SIZE, minimum, max(minimum, 4096), MAX_REQUEST)
            self._answer(option, OptionReply.INFO, sizes)
        self._answer(option, OptionReply.ACK)
        return True

    def _flags(self) -> TransmissionFlag:
        flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_FUA
        flags |= TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES
        if getattr(self._export, "read_only", False):
            flags |= TransmissionFlag.READ_ONLY
        if getattr(self._export, "multi_conn", False):
            flags |= TransmissionFlag.CAN_MULTI_CONN
        return flags
