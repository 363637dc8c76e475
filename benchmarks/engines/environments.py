"""Environments of their own for libraries that would change the versions of others, made by pip and kept.

An environment is a thin one: it finds all that is installed here, and pip adds what is missing or needs another
version, which then goes before. So torch and JAX are not installed again unless a library asks for others.
"""

import json
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "out/bench-envs"
COMPLETE = "complete.json"


class InstallError(Exception):
    """Pip cannot install what an environment needs; the message says why."""


def python_of(name: str, requirements: Sequence[str], install: bool, folder: Path = FOLDER) -> Path:
    """Return the interpreter of an environment, which is made if it is not there or needs something else.

    Args:
        name: of its folder.
        requirements: as pip takes them.
        install: whether to make it.
        folder: of all environments.

    Raises:
        InstallError: it is not there, and cannot or shall not be made.
    """
    root = folder / name
    python, complete = root / "bin/python", root / COMPLETE
    wanted = json.dumps({"requirements": list(requirements), "base": sys.executable, "python": sys.version})
    if complete.is_file() and complete.read_text(encoding="utf-8") == wanted:
        return python
    if not install:
        raise InstallError(
            f"{' '.join(requirements)} has no environment yet: leave --quick out, which installs nothing"
        )
    complete.unlink(missing_ok=True)
    _run([sys.executable, "-m", "venv", "--clear", str(root)])
    packages = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # What is in this file comes after the environment's own packages.
    Path(packages, "base.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements])
    complete.write_text(wanted, encoding="utf-8")
    return python


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        raise InstallError(errors[0].strip() if errors else f"exit code {done.returncode}")


def versions_in(python: Path, libraries: Sequence[str]) -> dict[str, str]:
    """Return the versions of those libraries that an interpreter finds."""
    code = (
        "import json, sys\n"
        "from importlib.metadata import PackageNotFoundError, version\n"
        "found = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        found[name] = version(name)\n"
        "    except PackageNotFoundError:\n"
        "        pass\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run([str(python), "-c", code, *libraries], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found
