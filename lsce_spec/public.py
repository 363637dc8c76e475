"""Hides the internal modules of a package from `dir()`, and reads its version when it is first asked for."""

import sys
from collections.abc import Callable, Sequence

PUBLIC_MODULES = ("metrics", "trainers")


def hide_internals(package: str, public: Sequence[str]) -> tuple[Callable[[str], str], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package.

    `__getattr__` has the version, which is read when it is first asked for: that may take longer than an import.
    """

    def get(name: str) -> str:
        if name != "__version__":
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package])
        from importlib import metadata  # noqa: PLC0415 - as above

        try:
            version = metadata.version("lsce")
        except metadata.PackageNotFoundError as problem:
            raise AttributeError(f"{package} has no version, since lsce is not installed, only imported") from problem
        setattr(sys.modules[package], name, version)
        return version

    def names() -> list[str]:
        own = vars(sys.modules[package])
        shown = (name for name in own if name.startswith("__") or name in PUBLIC_MODULES)
        return sorted({*public, "__version__", *shown})

    return get, names
