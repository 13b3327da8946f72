"""quit while an overlay is committed into the image below, and the guest goes on writing.

The overlay is put on top of the first disk's image while the guest writes.
"""

from dataclasses import replace

from powercut.endings import Running
from powercut.endings.mirror_quit import SPEED, go_on
from powercut.errors import InputError
from powercut.guest.ledger import Keeps

KEEPS = Keeps.COMPLETED
DIRECT = True


def end(running: Running) -> None:
    machine, image = running.machine, running.images[0]
    if image.format != "qcow2":
        raise InputError(f"ending commit-quit: a {image.format} image is no overlay; qcow2 is")
    overlay = replace(image, path=image.path.with_name("disk-overlay.qcow2"))
    overlay.path.unlink(missing_ok=True)
    machine.ask(
        "blockdev-snapshot-sync",
        node_name="disk0",
        snapshot_file=str(overlay.path),
        snapshot_node_name="overlay",
        format="qcow2",
    )
    go_on(running)
    # Without a base it would go down to the last image of the chain, which is not ours to write to.
    machine.ask("block-commit", job_id="job", device="overlay", base_node="disk0", speed=SPEED)
    go_on(running)
    machine.ask("quit")
    machine.wait_end()
    running.images[0] = overlay
    running.others.append(image)
