"""How these tests run the command line, in this process, and Python code, in a new one."""

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from typer.testing import CliRunner, Result

from parity_tests.__main__ import app

BLOCK = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""


def invoke(*arguments: str) -> Result:
    """Return the result of `lsce-parity` with these arguments, on a wide terminal."""
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


def run_code(code: str, blocked: Sequence[str] = (), **options: Any) -> subprocess.CompletedProcess[str]:
    """Run code in a new process in which the blocked modules appear not to be installed."""
    prelude = BLOCK.format(blocked=tuple(blocked)) if blocked else ""
    command = [sys.executable, "-c", prelude + code]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)
