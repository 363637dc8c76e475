"""What to install for something that is missing, and how."""

import sys
from importlib.util import find_spec

from lsce_spec.errors import error


def install(extras: str, also: str = "") -> str:
    """Return the commands that install extras of this distribution, and other packages.

    Example:
        >>> install("metrics")
        "pip install 'lsce[metrics]', or, from a clone, pip install -e '.[metrics]'"
    """
    also = also and f" {also}"
    return f"pip install 'lsce[{extras}]'{also}, or, from a clone, pip install -e '.[{extras}]'{also}"


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
