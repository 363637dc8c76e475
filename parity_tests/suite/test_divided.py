"""The adapters jax-sharded and torch-sharded, dense and linear: the three-way verdict.

`test_vocab_parallel.py` and `test_vocab_parallel_torch.py` divide the classes in many more ways.
"""

from functools import cache
from itertools import product

import pytest

from parity_tests.losses.divided import DividedAdapter
from parity_tests.losses.registry import make_adapter
from parity_tests.plugin import Recorder
from parity_tests.studies.survey import Member, survey
from parity_tests.suite.large_logits import assert_right_near_the_largest_number
from parity_tests.truth.cases import case_names
from parity_tests.truth.linear_cases import linear_case_names, make_any_case
from parity_tests.truth.precision import DTYPES

QUICK = ("everything", "linear_everything")
EVERY = dict.fromkeys([*product(QUICK, DTYPES), *product((*case_names(), *linear_case_names()), ("float32",))])
WAYS = [
    pytest.param(name, dtype, marks=[] if name in QUICK else [pytest.mark.distributed])
    for name, dtype in EVERY
    if name != "wide"
]


@cache
def member(name: str, twin: str) -> Member:
    return Member(make_adapter(name), ours=True, twin=twin)


@pytest.mark.parametrize(("name", "dtype"), WAYS)
def test_three_way_verdict(name: str, dtype: str, parity_ledger: Recorder) -> None:
    kind = "linear-sharded" if name in linear_case_names() else "sharded"
    pair = (f"jax-{kind}", f"torch-{kind}")
    members = {pair[0]: member(*pair), pair[1]: member(pair[1], pair[0])}
    for each in members.values():
        assert isinstance(each.adapter, DividedAdapter)
        parity_ledger.record(each.adapter.name, "cpu", dtype, "executed", each.adapter.where)
    found = survey(members, [make_any_case(name, dtype)])
    assert found.agrees, (found.outcomes, found.differences)
    assert len(found.differences) == 1
    assert {each.detail for each in found.evidence()} == {
        "4 virtual devices on the CPU",
        "3 processes by gloo on the CPU",
    }


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_logits_near_the_largest_number(framework: str) -> None:
    assert_right_near_the_largest_number(make_adapter(f"{framework}-sharded"), names=("smoothing 0.1", "soft labels"))
