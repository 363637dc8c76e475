"""Do wheel and sdist hold what they should, and does each extra install alone? `make wheel` builds, then runs this.

    python -m tools.check_wheel dist
    python -m tools.check_wheel dist --extra jax --extra torch

Each extra gets a virtual environment that holds the wheel and what the extra asks for, nothing else, not even pip. Its
commands run in a folder of their own, from where this checkout cannot be imported. One line each; exit code 1 if one
fails.
"""

import argparse
import email
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tools.repository import relative_links, repository_url

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WHEEL_OPTIONS = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
PACKAGES, EXCLUDED = WHEEL_OPTIONS["packages"], tuple(WHEEL_OPTIONS["exclude"])
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
METADATA = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")


class CheckError(Exception):
    """What is wrong, in words for the terminal."""


# --- What is run ----------------------------------------------------------------------------------------------------


class Check(NamedTuple):
    """Commands, whose program comes from the environment, and what is copied from the checkout to where they run."""

    commands: tuple[tuple[str, ...], ...]
    files: tuple[str, ...] = ()


def python(code: str) -> tuple[str, ...]:
    """Return the command that runs code which sees the environment's packages only."""
    return ("python", "-I", "-c", code)


def readme_block(heading: str) -> str:
    """Return the first block of Python under a heading of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    block, fence, _ = section.partition("```python\n")[2].partition("```")
    if not fence:
        raise CheckError(f"README.md has no block of Python under {heading!r}")
    return block


def cannot_import(*names: str) -> tuple[str, ...]:
    """Return the command that fails if one of the modules is installed."""
    return python(f"from importlib.util import find_spec\nfor name in {names}: assert not find_spec(name), name")


SPEC = """
import lsce_spec
on, off = lsce_spec.smoothing_weights("uniform", 0.1, 10)
assert abs(on + 9 * off - 1) < 1e-15
for package, framework in (("lsce_jax", "jax"), ("lsce_torch", "torch"), ("lsce_parity", "numpy")):
    try:
        __import__(package)
    except ModuleNotFoundError as error:
        assert error.name == framework, error
    else:
        raise AssertionError(f"{package} was imported")
"""

METRICS = """
import torch
from torchmetrics import MetricCollection
from lsce_torch import label_smoothed_cross_entropy_with_stats
from lsce_torch.metrics import Accuracy, CalibrationError, MeanLoss, MeanNLL, Perplexity
metrics = MetricCollection([MeanLoss(), MeanNLL(), Perplexity(), Accuracy(), CalibrationError()])
_, stats = label_smoothed_cross_entropy_with_stats(torch.eye(4), torch.tensor([0, 1, 2, 0]))
metrics.update(stats=stats)
assert metrics.compute()["Accuracy"] == 0.75, metrics.compute()
"""

PEERS = """
import os
os.environ["KERAS_BACKEND"] = "torch"
import keras, timm.loss, torch
from lsce_torch import label_smoothed_cross_entropy
logits, labels = torch.randn(8, 10), torch.arange(8)
ours = label_smoothed_cross_entropy(logits, labels, smoothing=0.1)
targets = torch.nn.functional.one_hot(labels, 10).float()
torch.testing.assert_close(timm.loss.LabelSmoothingCrossEntropy(0.1)(logits, labels), ours)
keras_loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
torch.testing.assert_close(keras_loss(targets, logits), ours)
"""

PARITY = """
from lsce_parity import compare_losses, save_batch
assert compare_losses("oracle", "oracle").agrees
"""

JAX = python(readme_block("JAX"))
TORCH = python(readme_block("PyTorch"))
PORT = ("torch:examples.torch_original_loss:label_smoothed_nll", "jax:examples.jax_ported_loss:ported")

# "" is the distribution without any extra.
CHECKS = {
    "": Check((python(SPEC),)),
    "jax": Check((JAX, cannot_import("torch"))),
    "torch": Check((TORCH, cannot_import("jax"))),
    "metrics": Check((python(METRICS), cannot_import("jax"))),
    "parity": Check((
        ("lsce-parity", "--help"),
        ("lsce-parity", "compare", "oracle", "oracle"),
        python(PARITY),
        cannot_import("jax", "torch"),
    )),
    "peers": Check((python(PEERS),)),
    "demo": Check((
        ("python", "-m", "examples.digits_parity", "--epochs", "1"),
        ("lsce-parity", "compare", *PORT),
    ), files=("examples",)),
    "examples": Check((
        ("python", "-m", "examples.digits_parity", "--epochs", "1"),
        ("python", "-m", "examples.jax_digits", "--epochs", "1"),
        ("python", "-m", "examples.torch_digits", "--epochs", "1"),
        ("lsce-parity", "compare", *PORT),
    ), files=("examples",)),
    "devices": Check((
        ("lsce-parity", "run", "--adapter", "jax-fused-tpu-iree-cpu", "--case", "uniform_mean", "--dtype", "float32"),
        cannot_import("torch"),
    )),
    "bench": Check((("python", "-m", "benchmarks", "dense", "--quick"),), files=("benchmarks",)),
    "cost": Check((
        ("lsce-cost", "--target", "tpu-v6e", "--rows", "1024", "--classes", "1000", "--way", "lsce fused"),
        cannot_import("torch"),
    )),
    "bench-tpu": Check((("python", "-m", "benchmarks", "tpu"),), files=("benchmarks",)),
    "docs": Check((("python", "-m", "tools.site"),), files=(
        "docs", "examples", "notebooks", "parity_tests", "tools", "pyproject.toml", # the packages are the wheel's
        "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md",
    )),
    "dev": Check((
        # Fails where a package does not say that it is typed.
        ("mypy", "--config-file=", "--strict", "-c", f"import {', '.join(PACKAGES)}"),
        ("python", "-m", "pytest", "--quiet", "tests/test_mirror.py", "tests/test_isolation.py"),
    ), files=("tests", "conftest.py", "pyproject.toml")),
    "all": Check((JAX, TORCH, ("lsce-parity", "replay", "golden/cpu")), files=("parity_tests/golden",)),
}  # fmt: skip


# --- What is in the wheel -------------------------------------------------------------------------------------------


def check_contents(wheel: Path) -> None:
    """Raise CheckError unless the wheel holds exactly the files of the packages, tests excluded."""
    files = read_wheel(wheel)
    metadata = {f"{wheel.name.removesuffix('-py3-none-any.whl')}.dist-info/{name}" for name in METADATA}
    typed = {f"{package}/py.typed" for package in PACKAGES}
    expected = metadata | typed | sources()
    if files.keys() != expected:
        missing, others = sorted(expected - files.keys()), sorted(files.keys() - expected)
        raise CheckError(f"{wheel.name} lacks {missing} and should not hold {others}")
    with tempfile.TemporaryDirectory() as folder:
        run([sys.executable, "-m", "build", "--wheel", "--outdir", folder, str(ROOT)])
        direct = read_wheel(find(Path(folder), "*.whl"))
    differing = sorted(name for name in files.keys() | direct.keys() if files.get(name) != direct.get(name))
    if differing:
        raise CheckError(f"the wheel made from the sdist and the one made from the checkout differ in {differing}")


def check_metadata(folder: Path, wheel: Path) -> dict[str, str]:
    """Return the addresses of the project in the metadata of the wheel, by label.

    Raises:
        CheckError: twine finds fault with wheel or sdist; or the repository's address is known, and the addresses are
            missing or the README, which PyPI shows, has links that work in the repository only.
    """
    run([sys.executable, "-m", "twine", "check", "--strict", *map(str, sorted(folder.iterdir()))])
    (content,) = (text for name, text in read_wheel(wheel).items() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(content)
    urls = dict(line.split(", ", 1) for line in metadata.get_all("Project-URL", []))
    url = repository_url(ROOT)
    links = relative_links(str(metadata.get_payload()))
    if url is not None and (urls.get("Source") != url or links):
        raise CheckError(f"the repository is {url}, but the wheel has the addresses {urls} and relative links {links}")
    return urls


def sources() -> set[str]:
    """Return the files of the packages that belong in the wheel."""
    paths = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    names = {path.relative_to(ROOT).as_posix() for path in paths if "__pycache__" not in path.parts}
    return {name for name in names if not name.startswith(tuple(f"{folder}/" for folder in EXCLUDED))}


def read_wheel(path: Path) -> dict[str, bytes]:
    """Return the files of a wheel."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def find(folder: Path, pattern: str) -> Path:
    """Return the one file of a folder that matches."""
    paths = sorted(folder.glob(pattern))
    if len(paths) != 1:
        raise CheckError(f"expected one {pattern} in {folder}, found {[path.name for path in paths]}")
    return paths[0].resolve()


# --- Whether it works -----------------------------------------------------------------------------------------------


def check_extra(extra: str, wheel: Path) -> float:
    """Install the wheel with one extra, run its commands, and return the installed size in MB, without bytecode.

    Raises:
        CheckError: the installation or a command failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment, work = Path(folder, "environment"), Path(folder, "work")
        venv.create(environment, symlinks=True)
        pip = [sys.executable, "-m", "pip", "--python", str(environment), "install", "--quiet", "--no-compile"]
        run([*pip, f"{wheel}[{extra}]" if extra else str(wheel)])
        size = sum(path.lstat().st_size for path in (environment / "lib").rglob("*") if path.is_file())
        work.mkdir()
        for name in CHECKS[extra].files:
            copy(ROOT / name, work)
        for program, *arguments in CHECKS[extra].commands:
            run([str(environment / "bin" / program), *arguments], work)
    return size / 1e6


def copy(source: Path, folder: Path) -> None:
    """Copy a file or a folder into a folder."""
    if source.is_dir():
        shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, folder)


def run(command: Sequence[str], folder: Path | None = None) -> None:
    """Run a command, and raise CheckError with what it printed if it fails."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    outcome = subprocess.run(
        command, cwd=folder, env=variables, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if outcome.returncode:
        raise CheckError(f"exit code {outcome.returncode} of {' '.join(command)}\n{outcome.stdout}")


# --- The command line -----------------------------------------------------------------------------------------------


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(description="Check the wheel in a folder, and each extra in an environment.")
    parser.add_argument("folder", type=Path, help="where the wheel is")
    parser.add_argument("--extra", action="append", choices=CHECKS, help="may be repeated; all by default")
    arguments = parser.parse_args()
    failed = CHECKS.keys() ^ {"", *EXTRAS}
    if failed:
        print(f"CHECKS and pyproject.toml differ in the extras {sorted(failed)}")
    try:
        wheel = find(arguments.folder, "*.whl")
        check_contents(wheel)
        urls = check_metadata(arguments.folder, wheel)
    except CheckError as error:
        print(f"FAILED {error}")
        return 1
    print(
        f"{wheel.name}: {wheel.stat().st_size / 1e3:.0f} kB, the same from sdist and checkout; twine has no objections"
    )
    if not urls:
        print("No LSCE_REPOSITORY_URL and no git remote `origin` with an address: built without project URLs")
    for label, address in urls.items():
        print(f"  {label}: {address}")
    for extra in arguments.extra or CHECKS:
        started, name = time.monotonic(), f"lsce[{extra}]" if extra else "lsce"
        try:
            size = check_extra(extra, wheel)
        except CheckError as error:
            failed = failed | {extra}
            print(f"{name:16} FAILED {time.monotonic() - started:4.0f} s: {error}", flush=True)
        else:
            print(f"{name:16} ok     {time.monotonic() - started:4.0f} s {size:6.0f} MB", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
