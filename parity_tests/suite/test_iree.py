"""What JAX makes for a TPU or a GPU, compiled by IREE and run on the CPU, against the truth. For cards: compiled."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from parity_tests.losses import iree
from parity_tests.losses.adapters import UnavailableError
from parity_tests.losses.iree import CARDS, NO_LAVAPIPE, TARGETS, IreeAdapter
from parity_tests.losses.registry import make_adapter
from parity_tests.plugin import Recorder
from parity_tests.suite.wrong_losses import WRONG_LOSSES
from parity_tests.truth.cases import Case, case_names, make_case
from parity_tests.truth.comparison import against_oracle
from parity_tests.truth.linear_cases import linear_case_names, make_any_case, make_linear_case
from parity_tests.truth.oracle import solve
from parity_tests.truth.precision import DTYPES

# IREE is installed by `make install-devices`.
pytestmark = pytest.mark.devices
NARROW = ("float32", "bfloat16", "float16")
# These show every option.
FEW = ("everything", "bad_labels", "class_mask_max_sup", "soft_clamp", "minus_infinity", "no_rows", "classes_1009")
FEW_LINEAR = ("linear_everything", "linear_many_chunks")


# What IREE 3.13 cannot do; see IreeAdapter.unsupported.
REFUSED = {
    "linear_batch_of_sequences",
    "axis_in_the_middle",
    "class_mask_of_groups",
    "class_mask_of_rows",
    "class_weight",
    "linear_class_mask_of_rows",
    "linear_class_weight",
    "linear_everything",
    "linear_no_rows",
    "linear_where_none",
}


def runs(names: list[str], every: str, few: tuple[str, ...], fast: str, reference: str) -> list[Any]:
    """Return every case in machine code and on Vulkan, each in one dtype; a few cases in the other ways."""
    found = [("tpu", f"{fast}-tpu-iree-vulkan", name, "float32") for name in names]
    found += [("tpu", f"{fast}-tpu-iree-vulkan", name, dtype) for name in few for dtype in NARROW[1:]]
    found += [("cuda", f"{fast}-cuda-iree-vulkan", name, "float32") for name in few]
    found += [("tpu", f"{reference}-tpu-iree-vulkan", name, "float32") for name in few]
    found += [("tpu", f"{fast}-tpu-iree-cpu", name, every) for name in names]
    found += [("tpu", f"{fast}-tpu-iree-cpu", name, dtype) for name in few for dtype in NARROW if dtype != every]
    for adapter in (f"{fast}-tpu-iree-vm", f"{reference}-tpu-iree-cpu"):
        found += [("tpu", adapter, name, dtype) for name in few for dtype in NARROW]
    return found + [("cuda", f"{fast}-cuda-iree-cpu", name, dtype) for name in few for dtype in DTYPES]


@contextmanager
def skipping_without_lavapipe() -> Iterator[None]:
    """Skip a test where Mesa's driver is missing: it is a package of the system, which pip does not install."""
    try:
        yield
    except UnavailableError as error:
        if str(error) != NO_LAVAPIPE:
            raise
        pytest.skip(NO_LAVAPIPE)


def assert_agrees(platform: str, name: str, case: Case, ledger: Recorder) -> None:
    with skipping_without_lavapipe():
        adapter = make_adapter(name)
    if adapter.unsupported(case):
        assert case.name in REFUSED or case.dtype == "float64" or "-vm" in name, adapter.unsupported(case)
        return
    by = "IREE on Vulkan" if name.endswith("-vulkan") else "IREE"
    ledger.record(name.partition(f"-{platform}-")[0], platform, case.dtype, "interpreted", f"{platform} by {by}")
    comparison = against_oracle(case, solve(case), adapter(case), adapter.arithmetic)
    assert comparison.agrees, comparison


RUN = ("platform", "adapter", "name", "dtype")


@pytest.mark.parametrize(RUN, runs(case_names(), "bfloat16", FEW, "jax-fused", "jax-reference"))
def test_dense(platform: str, adapter: str, name: str, dtype: str, parity_ledger: Recorder) -> None:
    assert_agrees(platform, adapter, make_case(name, dtype), parity_ledger)


@pytest.mark.parametrize(
    RUN, runs(linear_case_names(), "float32", FEW_LINEAR, "jax-linear-chunked", "jax-linear-reference")
)
def test_linear(platform: str, adapter: str, name: str, dtype: str, parity_ledger: Recorder) -> None:
    assert_agrees(platform, adapter, make_linear_case(name, dtype), parity_ledger)


@pytest.mark.parametrize("target", TARGETS.values())
def test_a_wrong_loss_is_rejected(target: str) -> None:
    """Another convention, and a gradient that is not that of the loss."""
    case = make_case("uniform_mean", "float32")
    for loss in WRONG_LOSSES:
        with skipping_without_lavapipe():
            adapter = IreeAdapter("tpu", target, loss=loss, name="wrong")
        assert not against_oracle(case, solve(case), adapter(case), adapter.arithmetic).agrees


def test_without_lavapipe_the_error_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iree, "LAVAPIPE", "no such device")
    iree._lavapipe.cache_clear()
    with pytest.raises(UnavailableError, match="apt-get install libvulkan1 mesa-vulkan-drivers"):
        make_adapter("jax-fused-tpu-iree-vulkan")


# --- Code for cards that are not here ---------------------------------------------------------------------------------

# The cards with the dtypes in which every program is compiled for them.
COMPILED = [
    (card, name, dtype)
    for card, dtypes in {"gfx942": DTYPES, "gfx90a": ("bfloat16",), "sm_80": DTYPES, "sm_89": ("bfloat16",)}.items()
    for dtype in dtypes
    for name in ("uniform_none", "everything", "class_mask_max_sup", "soft_clamp", "linear_many_chunks")
]


@pytest.mark.parametrize(("card", "name", "dtype"), COMPILED)
def test_compiled_for_a_card(card: str, name: str, dtype: str, parity_ledger: Recorder) -> None:
    """Each program has code of the card: an ELF file for AMD's, PTX for NVIDIA's."""
    platform, _ = CARDS[card]
    linear = name.startswith("linear")
    base = "jax-linear-chunked" if linear else "jax-fused"
    case = make_any_case(name, dtype)
    code = IreeAdapter(platform, "llvm-cpu", linear=linear, name=base).compile_for(card, case)
    named = f"amdhsa-unknown-{card}" if platform == "rocm" else f".target {card}"
    assert named.encode() in code
    assert (b"\x7fELF" in code) == (platform == "rocm")
    parity_ledger.record(base, platform, dtype, "compiled", f"{card} by IREE")


def test_an_unknown_card_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CARDS, "sm_90", ("cuda", "--iree-cuda-target=sm_90"))
    with pytest.raises(Exception, match="sm_90"):
        IreeAdapter("cuda", "llvm-cpu").compile_for("sm_90", make_case("uniform_none", "float32"))
