"""The choices of the fault model: what a disk, and a file system on it, may do to what was in flight.

| choice | values | default |
| --- | --- | --- |
| atom | 512, 4096, or a whole write | 512 |
| order | any; issue: those that survive are a prefix of the writes in the order in which they were issued | any |
| torn | old-or-new: an atom in flight is as before or as some write left it; also zeros, or garbage | old-or-new |
| lying | the last k flushes did nothing | 0 |
| directory | posix: each change of a name survives by itself; ordered: a prefix of them does | posix |
| sizes | an extending write may lose its size, its bytes, or both; else no size is lost | on |

`atom=write` and `order=issue` narrow what may happen; `torn`, `lying` and a smaller atom widen it.
"""

from __future__ import annotations

from dataclasses import dataclass

from powercut.trace import SECTOR

ORDERS = ("any", "issue")
TORN = ("old-or-new", "zeros", "garbage")
DIRECTORIES = ("posix", "ordered")


@dataclass(frozen=True, slots=True)
class Options:
    """See the module. `atom` bytes are written in one piece; `whole`: a write survives whole or not at all."""

    atom: int = SECTOR
    lying: int = 0
    directory: str = "posix"
    sizes: bool = True
    whole: bool = False
    order: str = "any"
    torn: str = "old-or-new"

    @property
    def narrow(self) -> bool:
        """Whether what survives on one atom depends on what survives elsewhere."""
        return self.whole or self.order == "issue"

    def __str__(self) -> str:
        words = ["whole writes" if self.whole else f"atoms of {self.atom} bytes"]
        words += ["survivors in the order of issue"] * (self.order == "issue")
        words += [f"torn atoms may be {self.torn}"] * (self.torn != "old-or-new")
        words += [f"the last {self.lying} flushes lied"] * bool(self.lying)
        words += ["changes of names in order"] * (self.directory == "ordered")
        words += ["no size is lost"] * (not self.sizes)
        return ", ".join(words)


DEFAULT = Options()
ZEROED, SCRAMBLED = -2, -3  # in place of the event that left an atom's content: a torn atom


def atom_of(word: str) -> tuple[int, bool]:
    """Bytes, and whether writes are whole, for "512", "4096" or "write"."""
    return (SECTOR, True) if word == "write" else (int(word), False)
