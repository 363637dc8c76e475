"""Install extras of this clone into a virtual environment, and say what is being installed. `make` runs this.

    python3 -m tools.install .venv demo

Standard library only, in a syntax that Python 3.8 reads, too: it tells old ones which Python is needed. pip is quiet
for minutes or prints hundreds of lines; here is a line for each large download, and one every few seconds after that.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

OLDEST = (3, 11)  # requires-python of pyproject.toml
# What an extra brings, and GB of the environment without what torch for Linux brings: `main` prints them, and
# CONTRIBUTING.md has measurements.
EXTRAS = {
    "demo": ("what the demo needs: JAX, Flax, Optax, torch, scikit-learn, Matplotlib and lsce-parity", 1.4),
    "all": ("everything for tests, lint, examples and benchmarks", 1.8),
    "docs": ("Sphinx and what the site needs", 1.9),
    "devices": ("the compilers for devices that are not here: IREE and Triton", 2.2),
}
CUDA = 4.9
LARGE = 20.0  # MB
SILENCE = 10.0  # seconds
_FETCHED = re.compile(r"\s*(Downloading|Using cached) (\S+?)-(\d[^-]*)-\S+\.whl \((\d+\.\d) ([MG]B)\)")
_COLLECTED = re.compile(r"Installing collected packages: (.*)")


def announcement(extras: str, system: str) -> str:
    """Return what the last of some extras brings, and roughly how large the environment will be.

    Example:
        >>> print(announcement("all", "darwin"))
        Installing everything for tests, lint, examples and benchmarks: about 1.8 GB
    """
    what, size = EXTRAS[extras.rpartition(",")[2]]
    if not system.startswith("linux"):
        return f"Installing {what}: about {size:.1f} GB"
    return (
        f"Installing {what}: about {size + CUDA:.1f} GB, {CUDA} of them CUDA\n"
        "and Triton, which torch for Linux brings. Where PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS names a place with\n"
        "PyTorch's wheels for CPUs, pip takes one of those, without either."
    )


def shown(line: str) -> str:
    """Return what to show of a line that pip prints: a large download, or how many packages follow; else nothing.

    Example:
        >>> shown("  Downloading torch-2.15.0-cp311-cp311-manylinux_2_28_x86_64.whl (506.1 MB)")
        '  downloading torch 2.15.0, 506 MB'
        >>> shown("Using cached rich-14.2.0-py3-none-any.whl (243 kB)")
        ''
    """
    if found := _COLLECTED.match(line):
        return f"  unpacking {len(found[1].split(', '))} packages"
    if found := _FETCHED.match(line):
        verb, name, version, number, unit = found.groups()
        megabytes = float(number) * (1000 if unit == "GB" else 1)
        if megabytes >= LARGE:
            return f"  {verb[0].lower()}{verb[1:]} {name.replace('_', '-')} {version}, {megabytes:.0f} MB"
    return ""


def create(folder: Path) -> None:
    """Make the virtual environment, unless there is one with a Python that is new enough."""
    version = (
        "import sys, pip; "
        f"print('%d.%d' % sys.version_info[:2]) if sys.version_info >= {OLDEST} else sys.exit('too old')"
    )
    try:
        found = subprocess.run([str(folder / "bin/python"), "-c", version], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        if sys.version_info < OLDEST:
            wanted = "%d.%d" % OLDEST  # noqa: UP031  # for old Pythons
            raise SystemExit(
                f"lsce needs Python {wanted} or newer, and {sys.executable} is {sys.version.split()[0]}. "
                "Name another one: make demo PYTHON=python3.13"
            ) from None
        print(f"Making a virtual environment in {folder}, with Python {sys.version.split()[0]}", flush=True)
        clear = ["--clear"] if (folder / "pyvenv.cfg").is_file() else []  # never what is no environment
        if subprocess.call([sys.executable, "-m", "venv", *clear, str(folder)]):
            raise SystemExit(1) from None
    else:
        print(f"Using the virtual environment in {folder}, with Python {found.stdout.strip()}", flush=True)


def install(folder: Path, extras: str, options: "list[str]") -> int:
    """Install, show how far it is, and return pip's exit code."""
    command = [str(folder / "bin/python"), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=off"]
    if not sys.dont_write_bytecode:
        command.append("--no-compile")  # Python compiles what it imports, which is a small part
    command += ["--editable", f".[{extras}]", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as pip:
        for line in pip.stdout or ():
            if text := shown(line):
                print(text, flush=True)
            if _COLLECTED.match(line):
                break
        there, shown_at = installed(folder), time.monotonic()
        while pip.poll() is None:
            time.sleep(0.2)
            if time.monotonic() - shown_at > SILENCE:
                print(f"  {installed(folder) - there} are unpacked", flush=True)
                shown_at = time.monotonic()
    return pip.returncode


def installed(folder: Path) -> int:
    """Return how many packages an environment has."""
    return len([*folder.glob("lib/python*/site-packages/*.dist-info")])


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(description="Install extras of this clone into a virtual environment.")
    parser.add_argument("folder", type=Path, help="the virtual environment; it is made if it is not there")
    parser.add_argument("extras", help=f"such as all,docs; the last is one of {', '.join(EXTRAS)}")
    arguments, options = parser.parse_known_args()  # options are pip's
    started = time.monotonic()
    create(arguments.folder)
    print(announcement(arguments.extras, sys.platform), flush=True)
    code = install(arguments.folder, arguments.extras, options)
    if code == 0:
        size = sum(path.lstat().st_size for path in arguments.folder.rglob("*")) / 1e9
        print(f"Installed in {time.monotonic() - started:.0f} s; {arguments.folder} holds {size:.1f} GB", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
