"""A store whose calls are noticed before they happen: to fail one, to do something meanwhile, to kill the program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from quire.store import File, Store

_NOTICED = {"write", "truncate", "allocate", "punch", "sync", "create", "rename", "unlink", "sync_dir", "read"}


class Disturbed:
    """`inner`, with `before(call, file)` called first; what it raises is raised instead. `file` is "" for directories.
    Reads are noticed too."""

    def __init__(self, inner: Store | File, before: Callable[[str, str], None], file: str = "") -> None:
        self._inner = inner
        self._before = before
        self._file = file

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if name in ("create", "open"):
            return lambda file, **how: self._opened(name, value, file, **how)
        if name in _NOTICED:
            return lambda *arguments: self._noticed(name, value, *arguments)
        return value

    def _noticed(self, name: str, call: Any, *arguments: Any) -> Any:
        self._before(name, self._file)
        return call(*arguments)

    def _opened(self, name: str, call: Any, file: str, **how: Any) -> Any:
        if name == "create":
            self._before(name, file)
        return Disturbed(call(file, **how), self._before, file)


def disturbed(inner: Store, before: Callable[[str, str], None]) -> Store:
    """See Disturbed."""
    return cast(Store, Disturbed(inner, before))
