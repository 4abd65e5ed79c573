"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
import torch

from kpatch.memory import give_back


def resident() -> int:
    """Bytes that this process holds."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def glibc() -> bool:
    return sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "malloc_trim")


@pytest.mark.skipif(not glibc(), reason="another C library gives back what it likes")
def test_freed_blocks_between_others_that_stay_go_back_to_the_system() -> None:
    size, count = 16_000, 1600  # 64 kB each, 102 MB in all
    blocks = [torch.ones(size) for _ in range(count)]
    stay = blocks[::50]
    del blocks
    held = resident()
    give_back()
    assert held - resident() > size * 4 * count // 2
    assert all(float(one.sum()) == size for one in stay)


def test_a_system_without_such_a_call_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from kpatch import memory

    monkeypatch.setattr(memory, "_trim", lambda: None)
    give_back()
