"""The NBD server under real clients (QEMU's), and under bytes that no client would send."""

from __future__ import annotations

import contextlib
import errno
import random
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire import nbd_protocol as nbd
from quire.nbd import Server
from quire.nbd_protocol import Command, Data, Option, OptionReply, Request

SIZE = 16 << 20


class Memory:
    """An export that is a bytearray. `log` tells what it was asked; `fail` raises at a method's name."""

    def __init__(self, size: int = SIZE, block_size: int = 512) -> None:
        self.size, self.block_size, self.multi_conn = size, block_size, True
        self.content = bytearray(size)
        self.log: list[tuple[object, ...]] = []
        self.fail: dict[str, Exception] = {}

    def _note(self, name: str, *about: object) -> None:
        self.log.append((name, *about))
        if name in self.fail:
            raise self.fail[name]

    def read(self, offset: int, length: int) -> Data:
        self._note("read", offset, length)
        return memoryview(self.content)[offset : offset + length]

    def write(self, offset: int, data: Data, fua: bool) -> None:
        self._note("write", offset, len(data), fua)
        self.content[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int, may_unmap: bool, fua: bool) -> None:
        self._note("zero", offset, length, may_unmap, fua)
        self.content[offset : offset + length] = bytes(length)

    def discard(self, offset: int, length: int) -> None:
        self._note("discard", offset, length)
        self.content[offset : offset + length] = bytes(length)

    def flush(self) -> None:
        self._note("flush")


class Watched(Memory):
    """Also notes when requests begin and end, and holds those for which `hold` is true."""

    def __init__(self) -> None:
        super().__init__()
        self.hold: Callable[[Request], bool] = lambda request: False
        self.kept: list[Request] = []
        self.keeping = threading.Event()

    def received(self, request: Request) -> None:
        self._note("received", request.offset)

    def finishing(self, request: Request, error_number: int) -> None:
        self._note("finishing", request.offset, error_number)

    def held(self, request: Request) -> bool:
        if self.hold(request):
            self.kept.append(request)
            self.keeping.set()
            return True
        return False


def url(path: Path) -> str:
    return f"nbd+unix:///?socket={path}"


def run(*arguments: object) -> str:
    if shutil.which(str(arguments[0])) is None:
        pytest.skip(f"{arguments[0]} is not installed")
    words = [str(word) for word in arguments]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@contextlib.contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    """A raw connection in the transmission phase."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as plug:
        plug.settimeout(20)
        plug.connect(str(path))
        assert len(exactly(plug, nbd.GREETING.size)) == 18
        plug.sendall(struct.pack(">I", 3) + nbd.OPTION.pack(nbd.OPTION_MAGIC, Option.EXPORT_NAME, 4) + b"name")
        assert int.from_bytes(exactly(plug, 10)[:8], "big") == SIZE
        yield plug


def exactly(plug: socket.socket, length: int) -> bytes:
    received = b""
    while len(received) < length and (part := plug.recv(length - len(received))):
        received += part
    return received


def ask(kind: int, offset: int = 0, length: int = 0, data: bytes = b"", cookie: int = 0, flags: int = 0) -> bytes:
    head = nbd.REQUEST.pack(nbd.REQUEST_MAGIC, flags, kind, cookie.to_bytes(8, "big"), offset, length or len(data))
    return head + data


def hear(plug: socket.socket, length: int = 0) -> tuple[int, int, bytes]:
    """cookie, error, data"""
    magic, error, cookie = nbd.SIMPLE_REPLY.unpack(exactly(plug, 16))
    assert magic == nbd.SIMPLE_REPLY_MAGIC
    return int.from_bytes(cookie, "big"), error, b"" if error else exactly(plug, length)


def test_qemu_img_converts_and_compares(tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    source.write_bytes(random.Random(1).randbytes(5 << 20) + bytes(3 << 20) + random.Random(2).randbytes(8 << 20))
    with Server(Memory(), tmp_path / "nbd") as server:
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, url(tmp_path / "nbd"))
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, url(tmp_path / "nbd"))
        assert isinstance(server.export, Memory)
        assert server.export.content == source.read_bytes()


def test_qemu_io_reaches_every_method(tmp_path: Path) -> None:
    export = Memory()
    commands = ["write -f -P 7 0 64k", "discard 64k 64k", "write -z 128k 64k", "write -z -u 192k 64k", "flush"]
    commands += ["write -P 9 1M 8M", "read -P 9 1M 8M", "read -P 7 0 64k"]
    with Server(export, tmp_path / "nbd"):
        run("qemu-io", "-f", "raw", "-t", "none", *(w for c in commands for w in ("-c", c)), url(tmp_path / "nbd"))
    kib = 1024
    assert ("write", 0, 64 * kib, True) in export.log
    assert ("discard", 64 * kib, 64 * kib) in export.log
    assert ("zero", 128 * kib, 64 * kib, False, False) in export.log
    assert ("zero", 192 * kib, 64 * kib, True, False) in export.log
    assert ("flush",) in export.log
    assert export.content[1 << 20 : 9 << 20] == b"\t" * (8 << 20)


@pytest.mark.parametrize("options", [("-w", "-d", "16"), ("-d", "16"), ("-w", "-d", "4", "-s", "1048576")])
def test_qemu_img_bench(tmp_path: Path, options: tuple[str, ...]) -> None:
    with Server(Memory(), tmp_path / "nbd"):
        run("qemu-img", "bench", *options, "-c", "64", "-t", "none", "-f", "raw", url(tmp_path / "nbd"))


def test_qemu_nbd_lists_the_export(tmp_path: Path) -> None:
    with Server(Memory(block_size=4096), tmp_path / "nbd"):
        listed = run("qemu-nbd", "--list", "-k", tmp_path / "nbd")
    for line in (f"size:  {SIZE}", "min block: 4096", "max block: 33554432", "flush fua trim zeroes multi"):
        assert line in listed


def test_two_writes_in_one_segment_overlap(tmp_path: Path) -> None:
    export = Watched()
    with Server(export, tmp_path / "nbd"), connected(tmp_path / "nbd") as plug:
        plug.sendall(ask(Command.WRITE, 0, data=bytes(512)) + ask(Command.WRITE, 512, data=bytes(512)))
        hear(plug), hear(plug)
    names = [entry[0] for entry in export.log]
    assert names == ["received", "received", "write", "write", "finishing", "finishing"]


@pytest.mark.parametrize("length", [4096, 1 << 20])
def test_a_request_half_sent_was_issued_before_others_end(tmp_path: Path, length: int) -> None:
    export = Watched()
    with Server(export, tmp_path / "nbd"), connected(tmp_path / "nbd") as plug:
        late = ask(Command.WRITE, 4096, data=b"x" * length)
        plug.sendall(ask(Command.WRITE, 0, data=bytes(512)) + late[:1000])
        threading.Timer(0.02, plug.sendall, [late[1000:]]).start()
        hear(plug), hear(plug)
    assert [entry[0] for entry in export.log[:2]] == ["received", "received"]
    assert export.content[4096 : 4096 + length] == b"x" * length


def test_a_client_that_waits_within_a_request_is_answered(tmp_path: Path) -> None:
    with Server(Memory(), tmp_path / "nbd"), connected(tmp_path / "nbd") as plug:
        late = ask(Command.WRITE, 0, data=b"x" * 512, cookie=2)
        plug.sendall(ask(Command.FLUSH, cookie=1) + late[:100])
        assert hear(plug) == (1, 0, b"")
        plug.sendall(late[100:])
        assert hear(plug) == (2, 0, b"")


def test_flush_is_answered_after_its_batch(tmp_path: Path) -> None:
    export = Watched()
    with Server(export, tmp_path / "nbd"), connected(tmp_path / "nbd") as plug:
        plug.sendall(ask(Command.FLUSH, cookie=1) + ask(Command.WRITE, 512, data=bytes(512), cookie=2))
        assert [hear(plug)[0], hear(plug)[0]] == [2, 1]
    assert export.log.index(("finishing", 512, 0)) < export.log.index(("flush",))


def test_batches_larger_than_every_bound(tmp_path: Path) -> None:
    export = Memory()
    picture = random.Random(3).randbytes(SIZE)
    with Server(export, tmp_path / "nbd"), connected(tmp_path / "nbd") as plug:
        pieces = [1, 8, 500, 600, 3, 4096, 2, 511, 512, 513, 1024] * 12
        requests, place = [], 0
        for number, sectors in enumerate(pieces):
            data = picture[place : place + sectors * 512]
            if data:
                requests.append(ask(Command.WRITE, place, data=data, cookie=number))
                place += len(data)
        requests += [ask(Command.WRITE, 0, data=picture[:512], cookie=1000 + n) for n in range(1500)]
        sender = threading.Thread(target=plug.sendall, args=(b"".join(requests),))
        sender.start()
        assert len({hear(plug)[0] for _ in requests}) == len(requests)
        sender.join()
        assert export.content[:place] == picture[:place]
        reads = [ask(Command.READ, n * 65536, 65536, cookie=n) for n in range(place // 65536)] * 2
        plug.sendall(b"".join(reads))
        for _ in reads:
            cookie, error, data = hear(plug, 65536)
            assert (error, data) == (0, picture[cookie * 65536 :][:65536])


def test_held_request_waits_for_finish(tmp_path: Path) -> None:
    export = Watched()
    export.hold = lambda request: request.kind is Command.WRITE and request.offset == 0
    with Server(export, tmp_path / "nbd"), connected(tmp_path / "nbd") as plug:
        plug.sendall(ask(Command.WRITE, 0, data=b"h" * 512, cookie=1) + ask(Command.FLUSH, cookie=2))
        assert hear(plug) == (2, 0, b"")
        for number in range(20):  # the buffer that brought the held payload is used again
            plug.sendall(ask(Command.WRITE, 4096, data=b"o" * 4096, cookie=3 + number))
            hear(plug)
        assert export.content[:512] == bytes(512)
        thread = threading.Thread(target=export.kept[0].finish)
        thread.start()
        assert hear(plug) == (1, 0, b"")
        thread.join()
        assert export.content[:512] == b"h" * 512
        with pytest.raises(RuntimeError, match="not held"):
            export.kept[0].finish()


def test_disconnect_waits_for_held_requests(tmp_path: Path) -> None:
    export = Watched()
    export.hold = lambda request: True
    with Server(export, tmp_path / "nbd"), connected(tmp_path / "nbd") as plug:
        plug.sendall(ask(Command.WRITE, 0, data=b"h" * 512, cookie=1) + ask(Command.DISC))
        assert export.keeping.wait(20)
        export.kept[0].finish()
        assert hear(plug) == (1, 0, b"")
        assert plug.recv(1) == b""


def test_stop_leaves_held_requests_undone(tmp_path: Path) -> None:
    export = Watched()
    export.hold = lambda request: True
    with Server(export, tmp_path / "nbd"), connected(tmp_path / "nbd") as plug:
        plug.sendall(ask(Command.WRITE, 0, data=b"h" * 512))
        assert export.keeping.wait(20)
    assert export.content[:512] == bytes(512)
    export.kept[0].finish()
    assert export.content[:512] == b"h" * 512


def test_several_connections(tmp_path: Path) -> None:
    export = Memory()
    with Server(export, tmp_path / "nbd"), contextlib.ExitStack() as stack:
        plugs = [stack.enter_context(connected(tmp_path / "nbd")) for _ in range(8)]
        for n, plug in enumerate(plugs):
            plug.sendall(ask(Command.WRITE, n * 512, data=bytes([n]) * 512, cookie=n))
        for n, plug in reversed(list(enumerate(plugs))):
            assert hear(plug) == (n, 0, b"")
    assert export.content[: 8 * 512] == b"".join(bytes([n]) * 512 for n in range(8))


@pytest.mark.parametrize(
    ("raised", "heard"),
    [
        (errno.ENOSPC, errno.ENOSPC),
        (errno.EDQUOT, errno.ENOSPC),
        (errno.EFBIG, errno.ENOSPC),
        (errno.EROFS, errno.EPERM),
        (errno.EIO, errno.EIO),
        (errno.ENODEV, errno.EIO),
        (None, errno.EIO),
    ],
)
def test_errors_of_the_export_reach_the_client(tmp_path: Path, raised: int | None, heard: int) -> None:
    export = Watched()
    error = OSError(raised, "no") if raised else OSError("no number")
    export.fail = dict.fromkeys(("read", "write", "zero", "discard", "flush"), error)
    with Server(export, tmp_path / "nbd"), connected(tmp_path / "nbd") as plug:
        for command in (Command.READ, Command.WRITE, Command.WRITE_ZEROES, Command.TRIM, Command.FLUSH):
            length = 0 if command is Command.FLUSH else 512
            plug.sendall(ask(command, 0, length, bytes(512) if command is Command.WRITE else b""))
            assert hear(plug)[1] == heard
            assert export.log[-1] == ("finishing", 0, heard)


@pytest.mark.parametrize("place", ["write", "received", "finishing"])
def test_bugs_are_answered_and_raised_by_stop(tmp_path: Path, place: str) -> None:
    export = Watched()
    export.fail = {place: KeyError("first")}
    server = Server(export, tmp_path / "nbd")
    server.start()
    with connected(tmp_path / "nbd") as plug:
        for word in ("first", "second"):
            export.fail = {place: KeyError(word)}
            plug.sendall(ask(Command.WRITE, 0, data=bytes(512)))
            assert hear(plug)[1] == errno.EIO
    with pytest.raises(KeyError, match="first"):
        server.stop()
    assert not (tmp_path / "nbd").exists()


def test_bad_requests_are_refused_and_the_connection_lives(tmp_path: Path) -> None:
    export = Watched()
    bad = [
        (ask(Command.READ, SIZE, 512), errno.EINVAL),
        (ask(Command.READ, 2**64 - 512, 512), errno.EINVAL),
        (ask(Command.WRITE, SIZE - 512, data=bytes(1024)), errno.ENOSPC),
        (ask(Command.WRITE, 2**64 - 512, data=bytes(1 << 20)), errno.ENOSPC),
        (ask(Command.WRITE_ZEROES, 0, 2**32 - 512), errno.ENOSPC),
        (ask(Command.TRIM, SIZE, 512), errno.EINVAL),
        (ask(Command.READ, 0, nbd.MAX_REQUEST + 512), errno.EINVAL),
        (ask(Command.READ, 1, 512), errno.EINVAL),
        (ask(Command.WRITE, 0, data=bytes(511)), errno.EINVAL),
        (ask(Command.READ, 0, 0), errno.EINVAL),
        (ask(Command.FLUSH, 0, 512), errno.EINVAL),
        (ask(5, 0, 512), errno.EINVAL),
        (ask(999), errno.EINVAL),
        (ask(Command.READ, 0, 512, flags=2), errno.EINVAL),
        (ask(Command.WRITE_ZEROES, 0, 512, flags=16), errno.EINVAL),
    ]
    with Server(export, tmp_path / "nbd"), connected(tmp_path / "nbd") as plug:
        for request, expected in bad:
            plug.sendall(request)
            assert hear(plug)[1] == expected, request[:28]
        assert export.log == []
        plug.sendall(ask(Command.READ, 0, 512))
        assert hear(plug, 512) == (0, 0, bytes(512))


def test_read_only_export(tmp_path: Path) -> None:
    export = Memory()
    export.read_only = True  # type: ignore[attr-defined]
    with Server(export, tmp_path / "nbd"), connected(tmp_path / "nbd") as plug:
        plug.sendall(ask(Command.WRITE, 0, data=bytes(512)))
        assert hear(plug)[1] == errno.EPERM
        plug.sendall(ask(Command.READ, 0, 512))
        assert hear(plug, 512)[1] == 0


@pytest.mark.parametrize(
    "poison", [b"\0" * 28, ask(Command.WRITE, 0, nbd.MAX_REQUEST + 512), ask(Command.WRITE, 0, 2**32 - 1)]
)
def test_unframeable_bytes_cost_the_connection_only(tmp_path: Path, poison: bytes) -> None:
    export = Memory()
    with Server(export, tmp_path / "nbd"), connected(tmp_path / "nbd") as plug:
        with connected(tmp_path / "nbd") as other:
            other.sendall(ask(Command.WRITE, 0, data=b"w" * 512) + poison)
            assert hear(other) == (0, 0, b"")
            with contextlib.suppress(ConnectionResetError):
                assert other.recv(1) == b""
        plug.sendall(ask(Command.READ, 0, 512))
        assert hear(plug, 512)[2] == b"w" * 512


def test_options(tmp_path: Path) -> None:
    def option(number: int, data: bytes = b"") -> tuple[int, bytes]:
        plug.sendall(nbd.OPTION.pack(nbd.OPTION_MAGIC, number, len(data)) + data)
        magic, echoed, reply, length = nbd.OPTION_REPLY.unpack(exactly(plug, nbd.OPTION_REPLY.size))
        assert (magic, echoed) == (nbd.OPTION_REPLY_MAGIC, number)
        return reply, exactly(plug, length)

    with Server(Memory(), tmp_path / "nbd"), socket.socket(socket.AF_UNIX) as plug:
        plug.settimeout(20)
        plug.connect(str(tmp_path / "nbd"))
        exactly(plug, 18)
        plug.sendall(struct.pack(">I", 3))
        assert option(8)[0] == OptionReply.ERR_UNSUP  # structured replies
        assert option(5)[0] == OptionReply.ERR_UNSUP  # TLS
        assert option(77, b"what")[0] == OptionReply.ERR_UNSUP
        for junk in (b"", b"\0\0\0\7", b"\xff" * 6, struct.pack(">IH", 0, 3), struct.pack(">IHB", 0, 0, 0)):
            assert option(Option.GO, junk)[0] == OptionReply.ERR_INVALID
        assert option(Option.LIST, b"x")[0] == OptionReply.ERR_INVALID
        assert option(Option.INFO, struct.pack(">IH", 0, 0))[0] == OptionReply.INFO
        assert nbd.OPTION_REPLY.unpack(exactly(plug, 20))[2] == OptionReply.ACK
        assert option(Option.ABORT)[0] == OptionReply.ACK
        assert plug.recv(1) == b""


_heads = st.builds(
    lambda kind, offset, length, flags: ask(kind, offset, length, flags=flags),
    st.integers(0, 9),
    st.one_of(st.integers(0, 2**64 - 1), st.just(0)),
    st.one_of(st.integers(0, 2**32 - 1), st.just(512)),
    st.integers(0, 3),
)
_greetings = st.sampled_from([b"", struct.pack(">I", 3), struct.pack(">I", 3) + nbd.OPTION_MAGIC])
_name = nbd.OPTION.pack(nbd.OPTION_MAGIC, Option.EXPORT_NAME, 0)
_chosen = struct.pack(">I", 3) + _name


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    hostile=st.one_of(
        st.tuples(_greetings, st.binary(max_size=200)).map(b"".join),
        st.lists(st.one_of(_heads, st.binary(max_size=60)), max_size=6).map(lambda parts: _chosen + b"".join(parts)),
    )
)
def test_hostile_bytes_hurt_nobody_else(hostile_server: Path, hostile: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as plug:
        plug.settimeout(20)
        plug.connect(str(hostile_server))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            plug.sendall(hostile)
            plug.shutdown(socket.SHUT_WR)
            while plug.recv(1 << 20):
                pass


@pytest.fixture(scope="module")
def hostile_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("hostile") / "nbd"
    with Server(Memory(), path):
        yield path
        with connected(path) as plug:
            plug.sendall(ask(Command.FLUSH))
            assert hear(plug) == (0, 0, b"")


def test_stop_leaves_no_thread_and_no_socket(tmp_path: Path) -> None:
    before = set(threading.enumerate())  # some may end meanwhile: an earlier test's
    with socket.socket(socket.AF_UNIX) as silent, contextlib.ExitStack() as stack:
        with Server(Memory(), tmp_path / "nbd") as server:
            silent.connect(str(tmp_path / "nbd"))  # never says a word
            plug = stack.enter_context(connected(tmp_path / "nbd"))
            plug.sendall(ask(Command.WRITE, 0, 4096)[:20])
        assert plug.recv(1) == b""
        server.stop()
    assert set(threading.enumerate()) <= before
    assert not (tmp_path / "nbd").exists()


def test_a_path_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "nbd").write_text("mine")
    server = Server(Memory(), tmp_path / "nbd")
    with pytest.raises(OSError, match="cannot listen"):
        server.start()
    server.stop()
    assert (tmp_path / "nbd").read_text() == "mine"


@pytest.mark.parametrize(("size", "block"), [(SIZE, 0), (SIZE, 513), (SIZE, 1 << 17), (SIZE + 1, 512)])
def test_sizes_that_no_client_could_use(tmp_path: Path, size: int, block: int) -> None:
    with pytest.raises(ValueError, match="block size"):
        Server(Memory(size, block), tmp_path / "nbd")


def test_what_nobody_has_read_yet_is_known(tmp_path: Path) -> None:
    entered, leave = threading.Event(), threading.Event()

    class Slow(Memory):
        def flush(self) -> None:
            entered.set()
            leave.wait(20)

    with Server(Slow(), tmp_path / "nbd") as server, connected(tmp_path / "nbd") as plug:
        assert not server.unread
        plug.sendall(ask(Command.FLUSH))
        assert entered.wait(20)
        assert not server.unread, "it was read, and is being worked on"
        plug.sendall(ask(Command.FLUSH))
        assert server.unread
        leave.set()
        assert hear(plug) == hear(plug) == (0, 0, b"")
        assert not server.unread
