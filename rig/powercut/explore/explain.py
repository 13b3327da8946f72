"""From what the search found to a finding for a person: few lost writes, by their roles, and what had to come first."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np

from powercut.crash.disk import CrashDisk
from powercut.crash.explore import Found
from powercut.crash.finding import Decided, Finding, Legal, describe, from_found
from powercut.crash.shrink import lost_atoms, newest
from powercut.explore.session import Plan, Session
from powercut.trace import Trace

_MOST = 100  # problems looked at in one state
_SHRUNK = 64  # atoms of a finding that are tried one by one


def explain(found: Found, plan: Plan, trace: Trace, seen: int) -> Finding:
    """Shrink and explain what was found; `seen` says how often the search met it."""
    session = Session(plan, trace)
    session.advance(found.position)
    finding = _told(session, found, seen)
    own = trace.meta.get("recorder") == "nbd" and "workload" in trace.meta
    if session.promise is None or not found.problem.found or not own:
        return finding  # what another guest wrote is known by its number only
    legal = session.promise.contents(found.problem.where)
    return msgspec.structs.replace(finding, expected=[Legal(what, data) for what, data in legal])


def _told(session: Session, found: Found, seen: int) -> Finding:
    """The finding, with the fewest lost atoms and what had to come first, as far as that can be told."""
    image, plan, trace = session.image, session.plan, session.trace

    def breaks() -> bool:
        return any(p.rule == found.problem.rule and p.kind == found.problem.kind for p in session.problems(_MOST))

    name = namer(session)
    if plan.options.narrow or plan.options.torn != "old-or-new":  # lost atoms are not for the choosing
        return from_found(found, trace, plan, seen, name)
    if plan.checker or found.fault:  # every try would be a run of the program; or what came first is the medium's fault
        return from_found(found, trace, plan, seen, name)
    atoms, _ = newest(image)
    survived = [d for d in found.decisions if not d.durable]
    lost = np.array([d.offset // plan.atom for d in found.decisions if d.durable], dtype=np.int64)
    if not len(lost):  # the rule broke by what survived: then something else in flight was lost
        kept = np.array([d.offset // plan.atom for d in survived], dtype=np.int64)
        lost = np.setdiff1d(atoms[[bool(image.choices(a, a + 1)) for a in atoms.tolist()]], kept)
    fewest = lost_atoms(image, lost, breaks) if 0 < len(lost) <= _SHRUNK else None
    finding = from_found(found, trace, plan, seen, name)
    losers = sorted({name(int(atom) * plan.atom) for atom in (lost if fewest is None else fewest)})
    if not losers or len(losers) > 4:
        return finding
    before = sorted({name(d.offset) for d in survived})
    forgotten = found.problem.kind in ("zeros", "stale")
    instead = "the flush was acknowledged" if forgotten else "the place it no longer points to was written again"
    needs = " and ".join(before[:3]) or instead
    order = f"{' and '.join(losers)} had to be on disk before {needs}"
    if fewest is None:
        return finding.retold(finding.decisions, "lost", order)
    retold = []
    for atom in fewest.tolist():
        event, offset = int(image.writer[atom * image.per_atom]) - 1, atom * plan.atom
        contents = len(image.choices(atom, atom + 1)[0].contents)
        retold.append(Decided(offset, event, contents, True, describe(trace, event), name(offset)))
    return finding.retold(retold, "survived", order)


def namer(session: Session) -> Callable[[int], str]:
    """Names bytes by their role if all survived, else by their role if all was lost, where `session` stands."""
    image = session.image
    with image.settled_as(*newest(image)):
        after = session.format.roles(CrashDisk(image))
    with image.settled_as(np.zeros(0, dtype=np.int64), np.zeros((0, image.per_atom), dtype=np.int64)):
        before = session.format.roles(CrashDisk(image))

    def name(offset: int) -> str:
        role = str(after(offset))
        return str(before(offset)) if role == "free space" else role

    return name
