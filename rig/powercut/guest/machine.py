"""A running QEMU, driven over QMP. This is the only module with asyncio in it: one event loop, in a thread of its own.

Every wait has a deadline. However the context of a machine is left, its process and its sockets are gone; if the rig
itself is killed, the kernel ends QEMU with it (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from powercut.errors import Crashed, EnvironmentFault, Unanswered
from powercut.guest.agent import Agent
from powercut.guest.lifetime import with_parent

PATIENCE = 30.0  # seconds for an answer to a command, and for an end that was asked for
T = TypeVar("T")
_running: set[Machine] = set()


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="qmp", daemon=True).start()
    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # what it would say about an end is told by the machine
    return loop


def _wait(coroutine: Coroutine[Any, Any, T], patience: float, what: str) -> T:
    """Run `coroutine` in the event loop. Raises Unanswered."""
    future = asyncio.run_coroutine_threadsafe(coroutine, _event_loop())
    try:
        return future.result(patience)
    except TimeoutError:
        raise Unanswered(f"QEMU gave no answer to {what} for {patience:g} s") from None
    finally:
        future.cancel()


def kill_all() -> None:
    """End every machine there is, so that whoever waits for one stops waiting."""
    for machine in list(_running):
        machine.kill()


class Machine:
    """QEMU, started with `command` and the two monitor and agent sockets that are added to it.

    `folder` takes its standard error (`stderr`); core files appear there, too, where the system writes any. Raises
    EnvironmentFault if it does not start. `with_agent`: its guest runs our agent (`Machine.agent`).
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        *,
        with_agent: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.transcript: list[str] = []  # what was said over QMP, with the seconds since the start
        self.agent: Agent
        self._events: list[dict[str, Any]] = []
        self._news = threading.Condition()
        self._begin = time.monotonic()
        self._killed = False
        mine, its = socket.socketpair()
        command = [*command, "-chardev", f"socket,id=qmp,fd={its.fileno()}", "-mon", "chardev=qmp,mode=control"]
        given = [its]
        if with_agent:
            line, its_line = socket.socketpair()
            self.agent = Agent(line)
            given.append(its_line)
            command += ["-chardev", f"socket,id=agent,fd={its_line.fileno()}"]
            command += ["-device", "virtserialport,chardev=agent,name=powercut"]
        self.command = command
        self._with_agent = with_agent
        self._monitor = mine
        _running.add(self)
        try:
            try:
                self._process = _wait(self._spawn(given, environment), PATIENCE, "its start")
            finally:  # or the end of QEMU would not be the end of the connection
                for end in given:
                    end.close()
            self._client = _wait(self._connect(), PATIENCE, "the first greeting")
        except BaseException as error:
            self.close()
            if isinstance(error, Exception) and not isinstance(error, Unanswered):
                raise EnvironmentFault(self._why(error)) from None
            raise

    async def _spawn(
        self, given: list[socket.socket], environment: Mapping[str, str] | None
    ) -> subprocess.Popen[bytes]:
        """In the thread of the event loop: the kernel ends QEMU when the thread that started it ends."""
        with open(self.folder / "stderr", "wb") as said:
            return subprocess.Popen(
                with_parent(self.command),
                pass_fds=[end.fileno() for end in given],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                cwd=self.folder,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # Ctrl-C is for the rig, which then ends QEMU
            )

    async def _connect(self) -> Any:
        from qemu.qmp import QMPClient  # only those who start a machine pay for it

        client = QMPClient("powercut")
        await client.connect(self._monitor)
        self._listening = asyncio.ensure_future(self._listen(client))
        return client

    async def _listen(self, client: Any) -> None:
        async for event in client.events:
            self._note("event", dict(event))
            with self._news:
                self._events.append(dict(event))
                self._news.notify_all()

    def _note(self, what: str, message: object) -> None:
        self.transcript.append(f"{time.monotonic() - self._begin:9.4f} {what} {json.dumps(message, default=str)}")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def said(self) -> str:
        """What it wrote to standard output and standard error."""
        with suppress(OSError):
            return (self.folder / "stderr").read_text(errors="replace").strip()
        return ""

    def _why(self, error: Exception) -> str:
        said = self.said.splitlines()
        return f"{Path(self.command[0]).name} did not go on: {said[-1] if said else error}"

    def ask(self, command: str, *, patience: float = PATIENCE, **arguments: Any) -> Any:
        """Execute a QMP command; underscores in the names of arguments stand for hyphens. Returns what it returned.

        Raises EnvironmentFault with QEMU's words if it fails, Unanswered, and Crashed if QEMU was ended by a signal.
        """
        from qemu.qmp import ExecuteError, QMPError

        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._note("ask", {"execute": command, "arguments": named})
        try:
            answer = _wait(self._client.execute(command, named or None), patience, command)
        except ExecuteError as error:
            self._note("error", str(error))
            raise EnvironmentFault(f"QEMU: {command}: {error}") from None
        except (QMPError, OSError, EOFError) as error:
            self.wait_end(PATIENCE)  # raises Crashed if it was a signal
            raise EnvironmentFault(self._why(error)) from None
        self._note("answer", answer)
        return answer

    def add_node(self, node: Mapping[str, Any], name: str) -> None:
        """Open a block node, in the form of QMP's blockdev-add."""
        self.ask("blockdev-add", **{**node, "node-name": name})

    def monitor(self, line: str, patience: float = PATIENCE) -> str:
        """Execute a line of the human monitor. It reports errors as text: what it says is returned."""
        said: str = self.ask("human-monitor-command", patience=patience, command_line=line)
        return said.strip()

    def wait_event(self, name: str, patience: float = PATIENCE, **data: object) -> dict[str, Any]:
        """The first event of that name, since the start, whose data hold `data`. Raises Unanswered."""

        with self._news:
            if not self._news.wait_for(lambda: self.happened(name, **data) is not None, patience):
                raise Unanswered(f"no event {name} of QEMU for {patience:g} s")
            event = self.happened(name, **data)
        assert event is not None
        return event

    def happened(self, name: str, **data: object) -> dict[str, Any] | None:
        """The first event of that name, since the start, whose data hold `data`, if there was one."""
        for event in self._events:
            if event["event"] == name and data.items() <= event.get("data", {}).items():
                return event
        return None

    def wait_end(self, patience: float = PATIENCE) -> int:
        """Wait until the process has ended by itself. Returns its exit status.

        Raises Unanswered, and Crashed if it was ended by a signal that is none of ours.
        """
        try:
            status = self._process.wait(patience)
        except subprocess.TimeoutExpired:
            raise Unanswered(f"QEMU had not ended after {patience:g} s") from None
        if status < 0 and not self._killed:
            core = next(self.folder.glob("core*"), None)
            words = self.said.splitlines()
            raise Crashed(
                f"QEMU was ended by {signal.Signals(-status).name}: {words[-1] if words else 'it said nothing'} "
                f"(core: {core or 'none in ' + str(self.folder)})"
            )
        return status

    def send(self, number: signal.Signals) -> None:
        """Send the process a signal; a death by SIGKILL is no crash then."""
        self._killed = self._killed or number == signal.SIGKILL
        with suppress(OSError):
            self._process.send_signal(number)

    def kill(self) -> None:
        """End the process at once."""
        if hasattr(self, "_process"):
            self.send(signal.SIGKILL)

    def close(self) -> None:
        """End the process, whatever it is doing, and let go of the sockets."""
        _running.discard(self)
        self.kill()
        if hasattr(self, "_process"):
            self._process.wait()
        if hasattr(self, "_client"):
            with suppress(Exception):  # how the connection ended is of no interest any more
                _wait(self._disconnect(), PATIENCE, "the end of the connection")
        self._monitor.close()
        if self._with_agent:
            self.agent.close()

    async def _disconnect(self) -> None:
        self._listening.cancel()
        with suppress(Exception):
            await self._client.disconnect()

    def reproduce(self) -> str:
        """The command line, for a shell; the sockets are those of this run."""
        return shlex.join(self.command)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()
