"""Programs that do not outlive the process that started them, even if that is killed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence


def with_parent(command: Sequence[str]) -> list[str]:
    """`command`, to be started so that the kernel kills it when the *thread* that starts it ends (prctl(2),
    PR_SET_PDEATHSIG). Without util-linux's `setpriv` it is the command itself, and may be left over."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", *command] if setpriv else [*command]
