"""Images under test while errors strike below them: the formats that QEMU writes in place, and how each is made."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from powercut.scenario import parse_size

_CLUSTER = "cluster_size"


class Layout(NamedTuple):
    """How an image is made: options beside the user's, the option that sets the cluster size, and that size."""

    options: dict[str, str]
    cluster_option: str | None
    cluster: str


LAYOUTS: Final = {  # every format that QEMU 7.2 writes in place
    "qcow2": Layout({}, _CLUSTER, "64k"),
    "qed": Layout({}, _CLUSTER, "64k"),
    "vdi": Layout({}, None, "1M"),
    "vmdk": Layout({}, None, "64k"),
    "vpc": Layout({"force_size": "on"}, None, "2M"),  # or the size is rounded to what old BIOSes can express
    "vhdx": Layout({"block_size": "1M"}, "block_size", "1M"),  # QEMU's own choice would be 8M
    "parallels": Layout({}, _CLUSTER, "1M"),
    "raw": Layout({}, None, "64k"),
}
CHECKED: Final = frozenset({"qcow2", "qed", "vdi", "vmdk", "vhdx", "parallels"})  # by qemu-img check


@dataclass(frozen=True, slots=True)
class Target:
    """What is under test: an image of `size` bytes, over `backing` bytes of something else (0: none); its guest has
    `depth` requests in flight at once."""

    format: str
    size: int
    options: tuple[tuple[str, str], ...] = ()
    backing: int = 0
    depth: int = 1

    @property
    def all_options(self) -> dict[str, str]:
        return {**LAYOUTS[self.format].options, **dict(self.options)}

    def node(self, file: str | dict[str, Any]) -> dict[str, Any]:
        """The image's node over that of its file."""
        return {"driver": self.format, "discard": "unmap", "file": file}


def cluster(format: str, options: Collection[tuple[str, str]]) -> int:
    """Bytes of a cluster, or what the format calls so."""
    layout = LAYOUTS[format]
    return parse_size(dict(options).get(layout.cluster_option or "", layout.cluster))
