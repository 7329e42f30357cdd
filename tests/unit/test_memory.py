"""What was freed goes back to the system when it is said so."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FREED = """
import psutil
from surgeon.memory import give_back

blocks = [bytearray(100_000) for _ in range(2_000)]
kept = blocks[-1]
del blocks
held = psutil.Process().memory_info().rss
give_back()
print(held - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_was_freed_below_a_block_in_use_goes_back() -> None:
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 150_000_000
