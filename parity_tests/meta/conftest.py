"""Bundles that several tests read."""

import shutil
from pathlib import Path

import pytest

from parity_tests.losses.registry import FaultyAdapter, make_adapter
from parity_tests.studies.bundle import record, write_bundle
from parity_tests.studies.survey import make_cases
from parity_tests.truth.linear_cases import SOME


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of two adapters and three cases, made without a framework."""
    folder = tmp_path_factory.mktemp("bundles") / "original"
    cases = make_cases(["ties", "minus_infinity", "axis_in_the_middle"], ["bfloat16"])
    write_bundle(folder, record([FaultyAdapter(), make_adapter("oracle")], cases))
    return folder


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a linear adapter, with and without a bias."""
    folder = tmp_path_factory.mktemp("bundles") / "linear"
    write_bundle(
        folder, record([make_adapter("torch-linear-chunked")], make_cases([*SOME, "linear_mean"], ["float16"]))
    )
    return folder
