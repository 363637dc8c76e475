"""The search for the worst inputs: it finds what random cases miss, and what it found stays within the bounds."""

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from parity_tests.faults.dense import evaluate
from parity_tests.faults.linear import evaluate_linear
from parity_tests.losses.adapters import Adapter
from parity_tests.losses.registry import FaultyAdapter, make_adapter
from parity_tests.meta.running import invoke
from parity_tests.studies import hunt as hunt_module
from parity_tests.studies.bundle import read_bundle
from parity_tests.studies.drawn_cases import draw_case, draw_linear_case
from parity_tests.studies.hunt import LINEAR_PARTS, PARTS, hunt, row_shares, share_of
from parity_tests.studies.simpler_cases import shrink
from parity_tests.truth.bounds import error_bound
from parity_tests.truth.cases import Case, LinearCase
from parity_tests.truth.comparison import AnyResult, Result, against_oracle
from parity_tests.truth.oracle import solve
from parity_tests.truth.precision import DTYPES

HUNTED = Path(__file__).parents[1] / "hunted"
LINEAR = ("torch-linear-chunked", "torch-linear-reference", "jax-linear-chunked")
OURS = ("jax-fused", "jax-reference", "torch-fused", "torch-reference")


@cache
def ours(name: str) -> Adapter:
    return make_adapter(name)


class Planted(FaultyAdapter):
    """The sound loss, three bounds off in rows of 31 or 63 classes whose two largest logits are equal."""

    def __call__(self, case: Case) -> Result:
        sound = evaluate(case)
        rows = case.rows()
        if rows.logits.shape[-1] not in (31, 63) or case.options["reduction"] != "none" or case.class_mask is not None:
            return sound
        largest = np.sort(rows.logits, axis=-1)[:, -2:]
        tied = (largest[:, 0] == largest[:, 1]) & np.isfinite(sound.loss)
        bound = error_bound(case, solve(case), self.arithmetic)
        return replace(sound, loss=sound.loss + np.where(tied, 3 * bound.loss, 0.0))


def test_a_planted_fault_is_found_and_made_small() -> None:
    found = hunt(Planted(), "float32", "loss", examples=400)
    assert not found.agrees
    assert found.share > 1
    # What is left is one row, of a size that has the fault, with a tie at the top.
    assert len(found.case.logits) == 1
    assert found.case.num_classes in (31, 63)
    largest = np.sort(found.case.logits[0])[-2:]
    assert largest[0] == largest[1]
    assert not against_oracle(found.case, solve(found.case), Planted()(found.case), FaultyAdapter().arithmetic).agrees


def test_as_many_random_draws_find_less() -> None:
    adapter, generator = FaultyAdapter(), np.random.default_rng(0)

    def share(case: Case) -> float:
        truth = solve(case, math)  # precise enough for float32
        return float(np.max(row_shares(case, truth, adapter(case), adapter.arithmetic)["gradient"], initial=0.0))

    drawn = max(share(draw_case(generator, "float32")) for _ in range(40))
    found = hunt(adapter, "float32", "gradient", examples=40)
    assert found.agrees
    assert found.evaluations == 40
    assert found.share > drawn


@pytest.mark.parametrize(("fault", "seconds"), [(None, 30.0), ("other_off", 4.5)])
def test_compilation_and_simpler_cases_are_within_the_time(
    fault: str | None, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that moves with calls of the adapter alone, by as much as JAX takes to compile a loss."""
    clock = [1000.0]

    class Compiled(FaultyAdapter):
        def __call__(self, case: Case) -> AnyResult:
            clock[0] += 0.75
            return super().__call__(case)

    monkeypatch.setattr(hunt_module.time, "monotonic", lambda: clock[0])
    found = hunt(Compiled(fault), "float32", "gradient", seconds=seconds)
    assert found.agrees == (fault is None)
    spent = clock[0] - 1000.0
    if fault is None:
        assert found.evaluations == 32  # 0.8 of the time
    # A call that has begun ends, and so does the one that measures the share of what is left.
    assert seconds <= spent <= seconds + 2 * 0.75


def test_a_seed_finds_the_same() -> None:
    first, second, other = (hunt(FaultyAdapter(), "bfloat16", "loss", examples=20, seed=seed) for seed in (1, 1, 2))
    assert first.share == second.share
    assert np.array_equal(first.case.logits, second.case.logits)
    assert other.share != first.share


def test_a_failure_ends_the_search() -> None:
    class Raising(FaultyAdapter):
        def __call__(self, case: Case) -> Result:
            if case.options["z_loss"]:
                raise RuntimeError("no z-loss on Tuesdays")
            return evaluate(case)

    found = hunt(Raising(), "float32", "loss", examples=200)
    assert "no z-loss on Tuesdays" in str(found.problem)
    assert found.case.options["z_loss"]
    assert found.case.logits.size <= 4


def test_shrinking_keeps_what_it_is_asked_to_keep() -> None:
    case = draw_case(np.random.default_rng(3), "float32", 17)
    small = shrink(case, lambda simpler: bool(np.max(simpler.logits) > 0))
    assert np.max(small.logits) > 0
    assert small.logits.size < case.logits.size
    assert small.options["convention"] == "uniform"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.slow
def test_drawn_cases_are_sound(dtype: str) -> None:
    """Whatever is drawn, the sound loss is within its bounds: or a search would report itself."""
    generator, adapter = np.random.default_rng(5), FaultyAdapter()
    for _ in range(12):
        case = draw_case(generator, dtype, int(generator.choice([1, 2, 3, 8, 33])))
        comparison = against_oracle(case, solve(case), adapter(case), adapter.arithmetic)
        assert comparison.agrees, (case, comparison)


class PlantedInLayer(FaultyAdapter):
    """The sound linear loss, whose gradient of the weight is wrong where there are 2 features and a z-loss."""

    linear = True

    def __call__(self, case: Case) -> AnyResult:
        assert isinstance(case, LinearCase)
        is_hit = case.hidden.shape[-1] == 2 and case.options["z_loss"] > 0
        return evaluate_linear(case, "linear_weight_of_last_chunk" if is_hit else None)


def test_a_planted_fault_of_a_layer_is_found_and_made_small() -> None:
    found = hunt(PlantedInLayer(), "float32", "hidden", examples=300)
    assert not found.agrees
    assert found.part == "weight"
    assert isinstance(found.case, LinearCase)
    assert found.case.hidden.shape[-1] == 2
    # More than one chunk is needed.
    assert len(found.case.logits) <= found.case.chunk_size + 1


@pytest.mark.parametrize("part", LINEAR_PARTS)
@pytest.mark.slow
def test_a_linear_loss_is_searched(part: str) -> None:
    found, more = (hunt(make_adapter("torch-linear-chunked"), "bfloat16", part, examples=number) for number in (4, 12))
    assert found.agrees, found.problem
    assert more.agrees, more.problem
    assert 0 < found.share < 1
    assert 0 < more.share < 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_drawn_linear_cases_are_sound(dtype: str) -> None:
    generator, adapter = np.random.default_rng(5), FaultyAdapter()
    for _ in range(12):
        case = draw_linear_case(generator, dtype)
        comparison = against_oracle(case, solve(case), adapter(case), adapter.arithmetic)
        assert comparison.agrees, (case, comparison)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"dtype": "int8"}, "there is no dtype 'int8'"),
    ({"part": "both"}, "there is no part 'both'"),
    ({"examples": None}, "give one of examples and seconds"),
    ({"seconds": 1.0}, "give one of examples and seconds"),
    ({"examples": 0}, "examples must be at least 1"),
    ({"examples": None, "seconds": float("nan")}, "seconds must be above 0"),
])  # fmt: skip
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"dtype": "float32", "part": "loss", "examples": 5, **arguments}
    with pytest.raises(ValueError, match=message):
        hunt(FaultyAdapter(), given.pop("dtype"), given.pop("part"), **given)  # type: ignore[arg-type]


# --- What was found --------------------------------------------------------------------------------------------------


def hunted() -> list[Case]:
    return [case for folder in ("jax", "torch") for case in read_bundle(HUNTED / folder).cases]


def hunted_linear() -> list[Case]:
    return read_bundle(HUNTED / "linear").cases


# What broke a bound when it was found: a gap that XLA fused with the softcap's product, so that the largest term was
# not left out of the sum; and a label's probability as exp of a sum, whose rounding was that of a large gap once more.
CAPPED = [
    *(-9.392661769663107, -9.392662109043439, -9.392661427783763, -9.39266156673219, -9.392661375145732),
    *(-0.001000990475356965, -9.392662203833778, -9.392662308399638, -9.392661569394562, -9.392662835304803),
    *(-9.392662160659468, -9.392662369585414, -9.392661997998596),
]
MENDED = [
    Case("softcap", "float64", np.array([CAPPED]), np.array([5]),
         {"reduction": "none", "convention": "non_target", "softcap": 11.970759740570253}, 0.001),
    Case("large gap", "float32", np.array([[21.112056732177734] + [-45.2574462890625] + [21.112056732177734] * 5]),
         np.array([1]), {"reduction": "none", "convention": "non_target"}, 1.0),
    Case("tiny loss", "float64", np.array([[-4.123624055284118, -68.57268166388386]]), np.array([0]),
         {"reduction": "none"}, 0.0),
    # XLA flushes exp(-87.4) to 0 before it is multiplied with what is upstream.
    Case("flushed", "float32", np.array([[-87.4000015258789, 0.0]]), np.array([1]), {"reduction": "none"}, 0.0,
         upstream=np.array([100.0])),
]  # fmt: skip


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("case", MENDED, ids=lambda case: case.name.replace(" ", "_"))
def test_what_was_mended_stays_mended(case: Case, name: str) -> None:
    comparison = against_oracle(case, solve(case), ours(name)(case), ours(name).arithmetic)
    assert comparison.agrees, comparison


def test_what_was_found_covers_everything() -> None:
    wanted = {f"hunted {dtype} {part} {name}" for dtype in DTYPES for part in PARTS for name in OURS}
    assert {case.name for case in hunted()} == wanted


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("case", hunted(), ids=lambda case: case.name.replace(" ", "_"))
@pytest.mark.slow
def test_what_was_found_stays_within_the_bounds(case: Case, name: str) -> None:
    """For all of ours, whoever it was found for."""
    adapter = ours(name)
    comparison = against_oracle(case, solve(case), adapter(case), adapter.arithmetic)
    assert comparison.agrees, comparison
    if case.name.endswith(name):
        part = "loss" if " loss " in case.name else "gradient"
        print(f"{case.name}: {share_of(adapter, case, part):.2f}")
        assert share_of(adapter, case, part) > 0


def test_what_was_found_of_linear_losses_covers_everything() -> None:
    wanted = {f"hunted {dtype} {part} torch-linear-chunked" for dtype in DTYPES for part in LINEAR_PARTS}
    assert {case.name for case in hunted_linear()} == wanted


@pytest.mark.parametrize("case", hunted_linear(), ids=lambda case: case.name.replace(" ", "_"))
def test_what_was_found_of_linear_losses_stays_within_the_bounds(case: Case) -> None:
    # JAX compiles each: one dtype is enough.
    for name in LINEAR if case.dtype == "bfloat16" else LINEAR[:2]:
        comparison = against_oracle(case, solve(case), ours(name)(case), ours(name).arithmetic)
        assert comparison.agrees, (name, comparison)


# --- The command ----------------------------------------------------------------------------------------------------


def test_command(tmp_path: Path) -> None:
    file, folder = tmp_path / "hunt.json", tmp_path / "worst"
    arguments = ("--adapter", "torch-fused", "--dtype", "float32", "--examples", "6")
    outcome = invoke("hunt", *arguments, "--save", str(folder), "--json", str(file))
    assert outcome.exit_code == 0, outcome.output
    assert "AGREE: no result beyond its bound in 12 calls" in outcome.output
    assert {case.name for case in read_bundle(folder).cases} == {
        "hunted float32 loss torch-fused",
        "hunted float32 gradient torch-fused",
    }
    assert [find["evaluations"] for find in json.loads(file.read_text())["finds"]] == [6, 6]


def test_command_that_finds_a_fault() -> None:
    outcome = invoke("hunt", "--adapter", "mutant:stale_lse", "--dtype", "float32", "--examples", "5")
    assert outcome.exit_code == 1, outcome.output
    assert "DISAGREE: 2 of 2 searches found a result beyond its bound" in outcome.output
    assert "    logits: [[" in outcome.output


def test_command_on_a_linear_loss(tmp_path: Path) -> None:
    folder = tmp_path / "worst"
    outcome = invoke(
        "hunt", "--adapter", "torch-linear-chunked", "--dtype", "float16", "--examples", "2", "--save", str(folder)
    )
    assert outcome.exit_code == 0, outcome.output
    assert {case.name for case in read_bundle(folder).cases} == {
        f"hunted float16 {part} torch-linear-chunked" for part in LINEAR_PARTS
    }


@pytest.mark.parametrize(("arguments", "message"), [
    (["--adapter", "torch-fusd"], "there is no adapter 'torch-fusd'"),
    (["--device", "abacus"], "there is no device 'abacus'"),
    (["--examples", "5", "--seconds", "5"], "give one of examples and seconds"),
    (["--examples", "0"], "examples must be at least 1"),
    (["--seconds", "-1"], "seconds must be above 0"),
    (["--dtype", "float8"], "there is no dtype 'float8'"),
])  # fmt: skip
def test_command_that_cannot_run(arguments: list[str], message: str) -> None:
    outcome = invoke("hunt", *arguments)
    assert outcome.exit_code == 2, outcome.output
    assert message in outcome.output
