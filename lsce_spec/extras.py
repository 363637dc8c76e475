"""The command that installs a missing extra, in the form that works for the reader."""

import json
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec

from lsce_spec.errors import error

# Whether a package index has a version of lsce. With the first release this becomes True, and
# tests/test_distribution.py names every page that has to change.
RELEASED = False


def install(extras: str, also: str = "", *, clone: bool | None = None) -> str:
    """Return the command that installs extras of this distribution, and other packages.

    Args:
        extras: as within the brackets, such as "jax,parity".
        also: requirements of other distributions.
        clone: whether to write the form that works in the folder of a clone, or the one that works anywhere once an
            index or a wheel has brought lsce. By default the one that works for this process.

    Example:
        >>> install("metrics", clone=True)
        "pip install -e '.[metrics]'"
        >>> install("metrics", "'jax[tpu]'", clone=False)
        "pip install 'lsce[metrics]' 'jax[tpu]'"
    """
    if clone is None:
        clone = is_clone()
    command = f"pip install -e '.[{extras}]'" if clone else f"pip install 'lsce[{extras}]'"
    return f"{command} {also}" if also else command


def is_clone() -> bool:
    """Return whether this distribution is a folder, installed or only on the path, and not an index's or a wheel."""
    try:
        origin = distribution("lsce").read_text("direct_url.json")
    except PackageNotFoundError:
        return True
    return origin is not None and "dir_info" in json.loads(origin)


def require(user: str, extras: str, *modules: str) -> None:
    """Raise a ModuleNotFoundError with the command to run, unless all modules are installed.

    Args:
        user: name of the package or command that needs the modules, for the message.
        extras: which of this distribution bring them, such as "jax".
        modules: names of top-level modules. None is loaded.
    """
    for name in modules:
        if not _is_installed(name):
            problem = error("not_installed", user=user, name=name, install=install(extras))
            problem.name = name  # type: ignore[attr-defined]  # of ModuleNotFoundError
            raise problem


def require_for_command(command: str, extras: str, *modules: str) -> None:
    """Exit with 2 and the command to run, unless all modules are installed."""
    try:
        require(command, extras, *modules)
    except ModuleNotFoundError as problem:
        print(f"cannot run: {problem}", file=sys.stderr)
        raise SystemExit(2) from None


def _is_installed(name: str) -> bool:
    if name in sys.modules:
        return sys.modules[name] is not None
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False
