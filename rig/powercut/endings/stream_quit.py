"""quit while what lies in the backing file is copied up into the first disk's image, and the guest goes on writing."""

from powercut.endings import Running
from powercut.endings.mirror_quit import SPEED, go_on
from powercut.errors import InputError
from powercut.guest.ledger import Keeps

KEEPS = Keeps.COMPLETED
DIRECT = True


def end(running: Running) -> None:
    machine = running.machine
    if not running.images[0].backing:
        raise InputError("ending stream-quit: there is nothing to stream without a backing file (--backing SIZE)")
    machine.ask("block-stream", job_id="job", device="disk0", speed=SPEED)
    go_on(running)
    machine.ask("quit")
    machine.wait_end()
