"""What tests that need a real QEMU share."""

from __future__ import annotations

import shutil

import pytest

PROGRAMS = ("qemu-img", "qemu-io", "qemu-storage-daemon")
_missing = [name for name in PROGRAMS if shutil.which(name) is None]

needs_qemu = pytest.mark.skipif(bool(_missing), reason=f"not installed: {', '.join(_missing)}")
