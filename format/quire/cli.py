"""The command `quire`. A set is named by its directory; a disk in it by `directory@name`, or by the directory alone
if it has one head, or one called main.

Exit codes: 0 done, 1 damage or a difference was found, 2 wrong usage or the system refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from quire.image import Image
    from quire.sets import Set

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


class _Size(click.ParamType[int]):
    """Bytes, or a number with K, M, G, T or P (powers of 1024)."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value).upper().removesuffix("IB").removesuffix("B")
        number, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS and text[-1:] else (text, "")
        if not number.isdecimal() or int(number) == 0:
            self.fail(f"{value!r} is not a size: a positive number, and K, M, G, T or P if wanted", param, ctx)
        return int(number) * _UNITS[unit]


class _Group(click.Group):
    """Turns errors that are the user's or the disk's into one sentence and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            text = f"{where}{error.strerror}" if type(error).__str__ is OSError.__str__ else str(error)
            click.echo(f"quire: {text}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("quire: interrupted; what was flushed is there", err=True)
            ctx.exit(2)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="powercut", prog_name="quire")
def main() -> None:
    """Disks that are always consistent: one sparse file for each snapshot or clone."""


def _split(address: str) -> tuple[str, str | None]:
    """Directory and name of `directory@name`."""
    if os.path.isdir(address):
        return address, None
    directory, at, name = address.rpartition("@")
    return (directory, name) if at else (address, None)


@contextlib.contextmanager
def _opened(address: str, *, write: bool = False) -> Iterator[tuple[Set, str | None]]:
    """The set at an address, and the name in it if one was given."""
    from quire.sets import Set
    from quire.store import RealStore

    directory, name = _split(address)
    store = RealStore(directory)
    try:
        with Set.open(store, write=write) as opened:
            yield opened, name
    finally:
        store.close()


def _head(opened: Set, name: str | None) -> str:
    """The head that is meant. Raises Unusable."""
    from quire.errors import Unusable

    if name is not None:
        return name
    heads = sorted(head for head, value in opened.manifest.names.items() if value.writable)
    if len(heads) == 1 or "main" in heads:
        return heads[0] if len(heads) == 1 else "main"
    raise Unusable(opened.store.path, f"which disk? @ and one of: {', '.join(sorted(opened.manifest.names)) or 'none'}")


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows bytes done, on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn(what), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as shown:
        task = shown.add_task(what, total=None)
        yield lambda done, of: shown.update(task, completed=done, total=of)


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--size", type=_Size(), help="The disk's size: bytes, or with K, M, G, T, P.")
@click.option("--head", default="main", show_default=True, help="What the disk is called.")
@click.option("--base", metavar="SET@SNAPSHOT", help="Begin as a snapshot of another set, which stays needed.")
def create(directory: Path, size: int | None, head: str, base: str | None) -> None:
    """Make a set with one disk in the new DIRECTORY."""
    from quire.errors import Unusable
    from quire.sets import Set
    from quire.store import RealStore

    if size is None and base is None:
        raise click.UsageError("give --size, or --base")
    where: dict[str, Any] = {}
    if base is not None:
        other, snapshot = _split(base)
        if snapshot is None:
            raise click.UsageError(f"--base {base}: name a snapshot of it: {base}@SNAPSHOT")
        where = {"base": os.path.relpath(os.path.realpath(other), os.path.realpath(directory)), "snapshot": snapshot}
    made = not directory.exists()
    if made:
        directory.mkdir()
    elif not directory.is_dir():
        raise Unusable(str(directory), "is there already")
    store = RealStore(directory)
    try:
        Set.create(store, size, head=head, **where).close()
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                directory.rmdir()
        raise
    finally:
        store.close()


@main.command("list")
@click.argument("directory")
@JSON
def list_(directory: str, as_json: bool) -> None:
    """List the heads and snapshots of a set."""
    with _opened(directory) as (opened, _):
        rows = [
            {
                "name": name,
                "kind": "head" if value.writable else "snapshot",
                "size": opened.manifest.leaves[value.leaf].size,
                "created": value.created,
                "guest_state": value.state_size,
                "leaf": value.leaf.hex(),
                "parents": sum(1 for _ in opened.manifest.chain(value.leaf)) - 1,
            }
            for name, value in sorted(opened.manifest.names.items(), key=lambda item: item[1].created)
        ]
    if as_json:
        click.echo(json.dumps({"schema": "quire.list/1", "names": rows}, indent=1))
        return
    for row in rows:
        state = f", guest state {row['guest_state']:,} bytes" if row["guest_state"] else ""
        click.echo(f"{row['kind']:8}  {row['name']}  {row['size']:,} bytes, {row['parents']} leaves below{state}")


@main.command("import")
@click.argument("address")
@click.argument("disk", type=click.Path(path_type=Path))
@click.option("--format", "of", metavar="FORMAT", help="Of DISK.  [default: as qemu-img finds]")
def import_(address: str, disk: Path, of: str | None) -> None:
    """Make a head hold the DISK of another format. It grows if it is smaller."""
    from quire.transfer import import_disk

    with _opened(address, write=True) as (opened, name), _progress("import") as progress:
        import_disk(opened, _head(opened, name), disk, of, progress)


@main.command()
@click.argument("address")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--format", "of", metavar="FORMAT", help="Of OUT.  [default: by its ending, else raw]")
def export(address: str, out: Path, of: str | None) -> None:
    """Write a head or snapshot to the new file OUT, as raw or whatever qemu-img can write."""
    from quire.transfer import export_disk

    of = of or {".img": "raw", ".vhd": "vpc"}.get(out.suffix, out.suffix[1:]) or "raw"
    with _opened(address) as (opened, name), _progress("export") as progress:
        export_disk(opened.image(_head(opened, name)), out, of, progress)


@main.command()
@click.argument("address")
@click.argument("name")
@click.option("--state", type=click.File("rb"), help="The guest's state, to be kept with it.")
def snapshot(address: str, name: str, state: Any) -> None:
    """Give what a head holds now a NAME of its own."""
    with _opened(address, write=True) as (opened, head):
        pieces = None if state is None else iter(lambda: state.read(1 << 20), b"")
        opened.snapshot(_head(opened, head), name, state=pieces)


@main.command()
@click.argument("address")
@click.argument("name")
def clone(address: str, name: str) -> None:
    """Make the new head NAME that begins as a snapshot."""
    with _opened(address, write=True) as (opened, snapshot):
        opened.clone(_head(opened, snapshot), name)


@main.command()
@click.argument("address")
@click.argument("snapshot")
def revert(address: str, snapshot: str) -> None:
    """Let a head begin again as SNAPSHOT; what it held is gone."""
    with _opened(address, write=True) as (opened, head):
        opened.revert(_head(opened, head), snapshot)


@main.command()
@click.argument("address")
@click.argument("name")
def rename(address: str, name: str) -> None:
    """Call a head or snapshot NAME from now on."""
    with _opened(address, write=True) as (opened, old):
        opened.rename(_head(opened, old), name)


@main.command()
@click.argument("address")
def delete(address: str) -> None:
    """Remove a head or snapshot, and the files that only it needs."""
    with _opened(address, write=True) as (opened, name):
        if name is None:
            raise click.UsageError(f"name what is to go: {address}@NAME")
        opened.delete(name)


@main.command()
@click.argument("address")
@click.argument("size", type=_Size())
def resize(address: str, size: int) -> None:
    """Give a head another SIZE. What is cut off is gone for it; snapshots keep theirs."""
    with _opened(address, write=True) as (opened, head):
        opened.resize(_head(opened, head), size)


@main.command()
@click.argument("old")
@click.argument("new")
@JSON
def diff(old: str, new: str, as_json: bool) -> None:
    """Show in which blocks two heads or snapshots differ: OLD is an address, NEW a name in the same set.

    Exits 1 if they differ."""
    from quire.extents import differences

    with _opened(old) as (opened, name):
        one, other = opened.image(_head(opened, name)), opened.image(new)
        ranges = list(differences(one.leaf, other.leaf))
    total = sum(length for _, length in ranges)
    if as_json:
        click.echo(json.dumps({"schema": "quire.diff/1", "bytes": total, "ranges": ranges}))
    else:
        for offset, length in ranges:
            click.echo(f"{offset:>16,}  {length:>14,}")
        click.echo(f"{total:,} bytes in {len(ranges):,} ranges differ")
    sys.exit(bool(ranges))


@main.command()
@click.argument("address")
def seal(address: str) -> None:
    """Seal a snapshot and what it builds on: from then on, what it reads as can be verified."""
    with _opened(address, write=True) as (opened, name), _progress("seal") as progress:
        opened.seal(_head(opened, name), progress)


@main.command()
@click.argument("address")
@JSON
def verify(address: str, as_json: bool) -> None:
    """Read all that a sealed snapshot builds on in its set, and compare it with the seals. Changes nothing.

    Exits 1 if something is not what was sealed."""
    from quire.errors import Damaged
    from quire.seal import UNIT

    bad: list[tuple[str, int | None, str]] = []
    units = 0
    with _opened(address) as (opened, name), _progress("verify") as progress:
        chain = list(opened.manifest.chain(opened.manifest.name(_head(opened, name)).leaf))
        for identity in chain:
            try:
                with contextlib.closing(opened.seal_of(opened.leaf(identity.leaf)) or _unsealed(identity.file)) as held:
                    bad += [(identity.file, at, f"{UNIT} bytes") for at in held.verify_all(progress)]
                    bad += [(held.name, at, "one copy of a page of the seal") for at in held.bad]
            except Damaged as error:
                bad.append((error.file, error.offset, error.what))
            units += -(-identity.size // UNIT)
    if as_json:
        click.echo(json.dumps({"schema": "quire.verify/1", "leaves": len(chain), "units": units, "bad": bad}))
    else:
        for file, at, what in bad:
            click.echo(f"{file}, offset {at}: {what}: not what was sealed")
        click.echo(f"{len(chain)} leaves, {units:,} units of {UNIT:,} bytes: {len(bad) or 'nothing'} bad")
    sys.exit(bool(bad))


def _unsealed(file: str) -> Any:
    from quire.errors import Unusable

    raise Unusable(file, "is not sealed")


@main.command()
@click.argument("directory")
@JSON
def scrub(directory: str, as_json: bool) -> None:
    """Read every copy of everything in a set, and mend what can be.

    Exits 1 if something is left that could not be mended."""
    from quire.scrub import scrub as scrub_set

    with _opened(directory, write=True) as (opened, _), _progress("scrub") as progress:
        found = scrub_set(opened, lambda what, done, of: progress(done, of))
    left = [one for one in found if not one.mended]
    if as_json:
        rows = [{"file": one.file, "offset": one.offset, "what": one.what, "mended": one.mended} for one in found]
        click.echo(json.dumps({"schema": "quire.scrub/1", "found": rows}))
    else:
        for one in found:
            where = one.file if one.offset is None else f"{one.file}, offset {one.offset:,}"
            click.echo(f"{'mended' if one.mended else 'DAMAGE'}  {where}: {one.what}")
        click.echo(f"{len(found)} found, {len(found) - len(left)} mended" if found else "all is as it should be")
    sys.exit(bool(left))


@main.command()
@click.argument("address")
@click.option("--socket", "path", required=True, type=click.Path(path_type=Path), help="Where to listen.")
@click.option("--read-only", is_flag=True, help="Let nobody write.")
def serve(address: str, path: Path, read_only: bool) -> None:
    """Give a head or snapshot to QEMU and qemu-img over NBD, until SIGINT or SIGTERM."""
    import signal

    from quire.nbd import Server

    stop = [signal.SIGINT, signal.SIGTERM]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stop)  # first: no thread that is started may take them
    try:
        with _opened(address, write=not read_only and _writable(address)) as (opened, name):
            image: Image = opened.image(_head(opened, name))
            with Server(image, path):
                click.echo(f"serving {opened.store.path}@{image.name}: nbd+unix:///?socket={path}", err=True)
                signal.sigwait(stop)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _writable(address: str) -> bool:
    """Whether a head is meant."""
    with _opened(address) as (opened, name):
        return opened.manifest.name(_head(opened, name)).writable


if __name__ == "__main__":
    main()
