"""Starts the tests of the vocab-parallel losses on eight devices, in a process of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("on_eight_devices.py")


@pytest.mark.parametrize("marked", ["not distributed", pytest.param("distributed", marks=pytest.mark.distributed)])
def test_on_eight_devices(marked: str) -> None:
    """Every test of the file passes, and none is skipped."""
    # Two processes that write the same list of failures would lose some.
    cache = f"cache_dir={FILE.parents[2] / '.pytest_cache' / FILE.stem}"
    command = [sys.executable, "-m", "pytest", str(FILE), "-m", marked, "-q", "-o", cache]
    environment = {**os.environ, "LSCE_TEST_DEVICES": "8"}
    root = FILE.parents[2]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=root)
    print(outcome.stdout[-10_000:])
    assert outcome.returncode == 0, outcome.stdout[-10_000:] + outcome.stderr[-2_000:]
    last = outcome.stdout.strip().splitlines()[-1]
    assert re.fullmatch(r"\d+ passed(, \d+ deselected)? in .*", last), last
