"""The guest's disks are unplugged while it writes, their images closed, and QEMU is ended afterwards."""

from powercut.endings import Running
from powercut.guest.ledger import Keeps

KEEPS = Keeps.COMPLETED


def end(running: Running) -> None:
    machine = running.machine
    for number in range(len(running.images)):
        machine.ask("device_del", id=f"disk{number}")
        machine.wait_event("DEVICE_DELETED", device=f"disk{number}")
    nodes = {node["node-name"] for node in machine.ask("query-named-block-nodes")}
    for number in range(len(running.images)):
        for name in (f"top{number}", f"disk{number}"):
            if name in nodes:
                machine.ask("blockdev-del", node_name=name)
    machine.ask("quit")
    machine.wait_end()
