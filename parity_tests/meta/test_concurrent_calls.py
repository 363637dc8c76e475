"""Adapters that may be called beside others are, the rest are not, and the results are those of one call at a time."""

import threading
from collections.abc import Callable

import numpy as np
import pytest

from parity_tests.faults.dense import evaluate
from parity_tests.losses import adapters as adapters_module
from parity_tests.losses.adapters import JaxAdapter
from parity_tests.losses.pallas import PallasAdapter
from parity_tests.losses.peers import PeerAdapter
from parity_tests.losses.registry import FaultyAdapter, make_adapter
from parity_tests.studies import concurrent_calls
from parity_tests.studies.concurrent_calls import BLOCK, call_each
from parity_tests.studies.survey import Member, make_cases, survey
from parity_tests.truth.cases import Case, make_case
from parity_tests.truth.comparison import Result
from parity_tests.truth.linear_cases import make_any_case


class Called(FaultyAdapter):
    """The sound loss, with something to do before it."""

    def __init__(self, name: str, before: Callable[[Case], object], concurrent: bool = True) -> None:
        super().__init__()
        self.name, self.before, self.concurrent = name, before, concurrent

    def __call__(self, case: Case) -> Result:
        self.before(case)
        return evaluate(case)


def test_two_are_called_at_the_same_time() -> None:
    """Each waits for the other: one call after another would time out."""
    barrier = threading.Barrier(2, timeout=10)
    both = [Called(name, lambda case: barrier.wait()) for name in ("one", "two")]
    cases = [make_case(name, "float32") for name in ("ties", "dominant")]
    found = survey({each.name: Member(each, True) for each in both}, cases)
    assert [outcome.status for outcome in found.outcomes] == ["agree"] * 4


def test_those_that_say_nothing_are_called_in_turn_in_this_thread() -> None:
    threads: list[threading.Thread] = []
    names: list[str] = []

    def note(case: Case) -> None:
        threads.append(threading.current_thread())
        names.append(case.name)

    cases = [make_case(name, "float32") for name in ("ties", "dominant")]
    for case, calls in call_each([Called(name, note, concurrent=False) for name in ("one", "two")], cases):
        for call in calls.values():
            call()
        assert names[-2:] == [case.name] * 2
    assert set(threads) == {threading.main_thread()}


def test_an_adapter_is_never_called_twice_at_once() -> None:
    inside, most = [], []

    def watch(case: Case) -> None:
        inside.append(case)
        most.append(len(inside))
        threading.Event().wait(0.01)
        inside.remove(case)

    cases = [make_case(name, "float32") for name in ("no_rows", "one_row", "no_rows")]
    for _, calls in call_each([Called("one", watch)], cases):
        calls["one"]()
    assert most == [1, 1, 1]


def test_who_may_be_called_beside_others() -> None:
    """Adapters that change global state of JAX or of modules, as the interpreted kernel does, are not."""
    assert JaxAdapter().concurrent
    assert PeerAdapter(JaxAdapter()).concurrent
    assert not PallasAdapter(interpreted=True).concurrent
    for name in ("torch-fused", "torch-fused-compiled", "torch-cross-entropy"):
        assert not getattr(make_adapter(name), "concurrent", False), name


@pytest.mark.slow
def test_results_are_those_of_one_call_at_a_time() -> None:
    names = ("jax-fused", "jax-reference", "jax-optax", "jax-fused-eager", "jax-linear-chunked")
    adapters = [make_adapter(name) for name in names]
    some = ("uniform_mean", "minus_infinity", "linear_everything")
    cases = [make_any_case(name, dtype) for name in some for dtype in ("float64", "bfloat16")]
    compared = 0
    for case, calls in call_each(adapters, cases):
        for adapter in adapters:
            assert (adapter.name in calls) == (adapter.unsupported(case) is None)
            if adapter.name in calls:
                beside, alone = calls[adapter.name](), adapter(case)
                assert beside.dtypes == alone.dtypes
                for part, values in alone.parts.items():
                    assert np.array_equal(beside.parts[part], values, equal_nan=True), (adapter.name, case.name, part)
                compared += 1
    assert compared == 2 * (2 * 4 + 1)


def test_an_exception_is_an_outcome() -> None:
    def fail(case: Case) -> None:
        raise SystemExit("enough")

    found = survey({"one": Member(Called("one", fail), True)}, [make_case("ties", "float32")])
    assert [outcome.reason for outcome in found.outcomes] == ["SystemExit: enough"]


def test_what_is_not_begun_when_the_reader_stops_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concurrent_calls, "BLOCK", 3)
    called: list[str] = []
    go = threading.Event()

    def note(case: Case) -> None:
        called.append(case.name)
        if case.name == "one_row":
            go.wait(10)

    names = ("no_rows", "one_row", "ties", "dominant")
    calls = call_each([Called("one", note)], [make_case(name, "float32") for name in names])
    next(calls).of["one"]()
    calls.close()
    go.set()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and "ThreadPoolExecutor" in thread.name:
            thread.join(10)
    assert "ties" not in called
    assert "dominant" not in called


def test_compiled_programs_go_between_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped = []
    monkeypatch.setattr(concurrent_calls, "forget_programs", lambda: dropped.append(True))
    cases = make_cases(["no_rows"] * (2 * BLOCK + 1), ["float32"])
    assert len(list(call_each([FaultyAdapter()], cases))) == len(cases)
    assert len(dropped) == 3
    jax = pytest.importorskip("jax")
    step = jax.jit(lambda x: x + 1)
    step(1.0)
    assert step._cache_size() == 1
    adapters_module.forget_programs()
    assert step._cache_size() == 0


def test_outcomes_hold_no_results() -> None:
    found = survey({"numpy": Member(FaultyAdapter(), True)}, [make_case("ties", "float32")])
    assert found.outcomes[0].status == "agree"
    assert found.outcomes[0].result is None
