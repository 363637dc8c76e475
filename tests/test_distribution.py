"""`make wheel` checks all that pyproject.toml offers, and notices what is wrong. Nothing is installed here."""

import re
import sys
import zipfile
from pathlib import Path

import pytest

from tools import check_wheel
from tools.check_wheel import CHECKS, EXTRAS, METADATA, PACKAGES, PYPROJECT, ROOT, CheckError

WHEEL = "lsce-0.1.0-py3-none-any.whl"


def test_every_extra_is_checked() -> None:
    """Fails if a new extra has no entry in tools.check_wheel.CHECKS."""
    assert CHECKS.keys() == {"", *EXTRAS}
    assert all(check.commands for check in CHECKS.values())


def test_make_has_the_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^wheel: install\n(\t.*\n)*\t.*-m build\n\t.*-m tools\.check_wheel dist", makefile, re.MULTILINE)
    assert re.search(r"^\.PHONY:.* wheel( |$)", makefile, re.MULTILINE)


def test_the_halves_of_the_tests_are_all() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    rest = re.search(r"^REST := (.*)$", makefile, re.MULTILINE)
    assert rest
    assert {"parity_tests", *rest[1].split()} == {*PYPROJECT["tool"]["pytest"]["ini_options"]["testpaths"]}
    # Each test has the markers of one of these.
    selected = {
        *("not slow and not devices and not distributed", "slow and not devices", "distributed"),
        *("devices and not slow", "devices and slow"),
    }
    assert selected <= {*re.findall(r'(?:SELECTED \?= |SELECTED="|-m ")([^"\n]*)', makefile)}
    assert [*re.findall(r'-m "distributed" -k "(.*)" parity_tests', makefile)] == ["not ($(OF_TORCH))", "$(OF_TORCH)"]


def test_every_package_is_typed() -> None:
    assert {*PACKAGES} <= {*PYPROJECT["tool"]["mypy"]["packages"]}
    for package in PACKAGES:
        assert (ROOT / package / "py.typed").read_bytes() == b"", package


# --- The check itself -----------------------------------------------------------------------------------------------


def write_wheel(folder: Path, *, without: str = "", extra: str = "", content: str = "") -> Path:
    """Write a wheel with the names that it must have, but for one, and the same content in each file."""
    names = {f"lsce-0.1.0.dist-info/{name}" for name in METADATA} | check_wheel.sources()
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        for name in sorted(name for name in names | {extra} if name not in ("", without)):
            archive.writestr(name, content)
    return folder / WHEEL


def test_what_the_checkout_gives_must_be_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = write_wheel(tmp_path, content="same")
    monkeypatch.setattr(check_wheel, "run", lambda command: write_wheel(Path(command[-2]), content="same"))
    check_wheel.check_contents(wheel)
    monkeypatch.setattr(check_wheel, "run", lambda command: write_wheel(Path(command[-2]), content="other"))
    with pytest.raises(CheckError, match=r"from the checkout differ in .*'lsce_spec/options.py'"):
        check_wheel.check_contents(wheel)


@pytest.mark.parametrize("name", ["lsce_jax/fused.py", "lsce_torch/py.typed", "lsce-0.1.0.dist-info/licenses/LICENSE"])
def test_what_is_missing_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckError, match=re.escape(f"lacks ['{name}'] and should not hold []")):
        check_wheel.check_contents(write_wheel(tmp_path, without=name))


@pytest.mark.parametrize(
    "name", ["tests/test_jax.py", "examples/__init__.py", "lsce_jax/draft.py", "parity_tests/suite/test_parity.py"]
)
def test_what_does_not_belong_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckError, match=re.escape(f"lacks [] and should not hold ['{name}']")):
        check_wheel.check_contents(write_wheel(tmp_path, extra=name))


def test_a_command_that_fails_shows_what_it_printed() -> None:
    with pytest.raises(CheckError, match=r"(?s)exit code 3 of .*\nseen\n"):
        check_wheel.run([sys.executable, "-c", "print('seen'); raise SystemExit(3)"])


def test_a_block_that_is_not_there() -> None:
    assert "import jax" in check_wheel.readme_block("JAX, Flax and Optax")
    with pytest.raises(CheckError, match="no block of Python under 'No such heading'"):
        check_wheel.readme_block("No such heading")
