"""The NBD client against qemu-nbd, against our own server, and against servers that misbehave."""

from __future__ import annotations

import contextlib
import errno
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from powercut.errors import EnvironmentFault
from powercut.guest.nbd_client import Client
from quire import nbd_protocol as nbd
from quire.nbd import Server
from quire.nbd_protocol import Command, Data, TransmissionFlag

SIZE = 64 << 20


class Memory:
    """An export that is a bytearray."""

    size = SIZE
    block_size = 4096

    def __init__(self) -> None:
        self.content = bytearray(SIZE)

    def read(self, offset: int, length: int) -> Data:
        return memoryview(self.content)[offset : offset + length]

    def write(self, offset: int, data: Data, fua: bool) -> None:
        self.content[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int, may_unmap: bool, fua: bool) -> None:
        self.content[offset : offset + length] = bytes(length)

    def discard(self, offset: int, length: int) -> None:
        self.zero(offset, length, True, False)

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "full")


def listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return path.exists() and probe.connect_ex(str(path)) == 0


@contextlib.contextmanager
def qemu_nbd(folder: Path) -> Iterator[Path]:
    if shutil.which("qemu-nbd") is None:
        pytest.skip("qemu-nbd is not installed")
    image, path = folder / "image", folder / "nbd"
    with image.open("wb") as file:
        file.truncate(SIZE)
    server = subprocess.Popen(["qemu-nbd", "-f", "raw", "-t", "-e", "4", "--discard=unmap", "-k", path, image])
    try:
        deadline = time.monotonic() + 20
        while not listening(path) and time.monotonic() < deadline:
            time.sleep(0.01)
        yield path
    finally:
        server.terminate()
        server.wait(20)


@contextlib.contextmanager
def ours(folder: Path) -> Iterator[Path]:
    with Server(Memory(), folder / "nbd"):
        yield folder / "nbd"


@pytest.fixture(params=[ours, qemu_nbd], ids=["ours", "qemu-nbd"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    with request.param(tmp_path) as path:
        yield path


def test_every_operation(path: Path) -> None:
    with Client(path) as client:
        assert client.size == SIZE
        assert client.flags & TransmissionFlag.SEND_WRITE_ZEROES
        assert client.flags & TransmissionFlag.SEND_FUA
        assert client.block_size in (1, 4096)
        assert client.max_length == nbd.MAX_REQUEST
        client.write(0, b"a" * 65536, fua=True)
        client.zero(4096, 4096)
        client.zero(8192, 4096, may_unmap=True, fua=True)
        client.discard(12288, 4096)
        assert client.read(0, 65536) == b"a" * 4096 + bytes(12288) + b"a" * (65536 - 16384)
        with pytest.raises(OSError, match="READ at") as caught:
            client.read(SIZE, 4096)
        assert caught.value.errno == errno.EINVAL
        assert client.pending == 0


def test_deep_and_big_does_not_deadlock(path: Path) -> None:
    with Client(path) as client:
        for n in range(48):  # far more than the sockets hold, in both directions, before the first wait
            client.submit(Command.WRITE, n << 20, data=bytes([n]) * (1 << 20), tag=n)
            client.submit(Command.READ, n << 20, 1 << 20, tag="read")
        replies = [client.wait() for _ in range(96)]
        assert not any(reply.error for reply in replies)
        assert sorted(reply.tag for reply in replies if reply.tag != "read") == list(range(48))
        for n in range(48):
            assert client.read(n << 20, 1 << 20) == bytes([n]) * (1 << 20)


def test_answers_of_others_stay_for_wait(path: Path) -> None:
    with Client(path) as client:
        for n in range(300):
            client.submit(Command.WRITE, n * 4096, data=bytes(4096), tag=n)
        assert client.read(1 << 20, 4096) == bytes(4096)
        assert sorted(client.wait().tag for _ in range(300)) == list(range(300))
        with pytest.raises(ValueError, match="nothing was asked"):
            client.wait()


def test_both_servers_hold_the_same_after_the_same(tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    with qemu_nbd(tmp_path / "q") as other, ours(tmp_path) as own, Client(other) as a, Client(own) as b:
        for client in (a, b):
            for n in range(64):
                client.submit(Command.WRITE, n * 12288, data=bytes([n]) * 8192, fua=n % 7 == 0)
            while client.pending:
                assert not client.wait().error
            client.zero(40960, 81920)
        assert a.read(0, 1 << 20) == b.read(0, 1 << 20)


def test_error_of_the_disk_is_an_oserror(tmp_path: Path) -> None:
    with ours(tmp_path) as path, Client(path) as client:
        with pytest.raises(OSError, match="FLUSH") as caught:
            client.flush()
        assert caught.value.errno == errno.ENOSPC


def test_no_server(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="nowhere"):
        Client(tmp_path / "nowhere")


def test_server_that_stops(tmp_path: Path) -> None:
    with Server(Memory(), tmp_path / "nbd"):
        client = Client(tmp_path / "nbd")
    with pytest.raises(EnvironmentFault, match="nbd: NBD connection lost"):
        client.read(0, 4096)
    client.close()


@pytest.mark.parametrize("said", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"NBDMAGICIHAVEOPT\0\1" + bytes(20)])
def test_something_else_listens(tmp_path: Path, said: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()

        def talk() -> None:
            plug, _ = listener.accept()
            plug.sendall(said)
            plug.close()

        thread = threading.Thread(target=talk)
        thread.start()
        with pytest.raises(EnvironmentFault, match="/s: "):
            Client(tmp_path / "s", timeout=5)
        thread.join()


def test_silent_server(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with pytest.raises(EnvironmentFault, match="timed out"):
            Client(tmp_path / "s", timeout=0.1)
