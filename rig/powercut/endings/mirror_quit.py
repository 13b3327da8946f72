"""quit while the first disk is being mirrored to a new image, and the guest goes on writing."""

from dataclasses import replace

from powercut.endings import Running
from powercut.guest.daemon import create_image
from powercut.guest.ledger import Keeps

KEEPS = Keeps.COMPLETED
DIRECT = True
SPEED = 8 << 20  # bytes a second: such a job does not end by itself meanwhile
_MORE = 20  # answers of the guest's disk while the job runs


def go_on(running: Running) -> None:
    """Let the guest work on while a job runs."""
    if running.writing is not None:
        running.writing.run(_MORE)


def end(running: Running) -> None:
    machine, image = running.machine, running.images[0]
    target = replace(image, path=image.path.with_name("disk-mirror"), backing=0)
    create_image(target.path, image.format, image.size, {})
    file = {"driver": "file", "filename": str(target.path)}
    machine.add_node({"driver": image.format, "file": file}, "mirror")
    machine.ask("blockdev-mirror", job_id="job", device="disk0", target="mirror", sync="full", speed=SPEED)
    go_on(running)
    machine.ask("quit")
    machine.wait_end()
    running.others.append(target)
