"""The losses of lsce_jax in processes of `jax.distributed`, which talk by gloo: truth, and what ends in an error."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parity_tests.losses.adapters import JaxAdapter
from parity_tests.losses.sharded import arithmetic_on, on_shards
from parity_tests.losses.workers import WorkerError, Workers
from parity_tests.suite import on_jax_processes
from parity_tests.suite.stats_truth import assert_statistics
from parity_tests.truth.cases import Case, case_names, features, make_case, random_case
from parity_tests.truth.comparison import AnyResult, against_oracle
from parity_tests.truth.linear_cases import linear_case_names, make_linear_case
from parity_tests.truth.oracle import solve

# How many processes there are, and the devices of each: by the number of all devices.
PROCESSES = {2: (2, 1), 4: (4, 1), 6: (2, 3)}
# Of `make test`. All other tests are marked.
QUICK = [(2, "everything", "float32"), (2, "class_mask_of_rows_soft", "bfloat16"), (2, "linear_everything", "float32")]
FEATURES = {name: features(make_case(name, "float32")) for name in case_names()}
# The first case with each option, and more: `on_eight_devices.py` has all cases, which differ here in the way alone
# that numbers take.
CASES = {
    *(next(name for name in FEATURES if option in FEATURES[name]) for option in frozenset().union(*FEATURES.values())),
    *("classes_2", "minus_infinity", "large_offset", "dominant", "all_ignored", "no_rows", "class_mask_of_rows_soft"),
}
# Many options, in few cases.
OPTIONS = (
    "class_mask_max_sup",
    "bad_labels",
    "soft_clamp",
    "axis_in_the_middle",
    "ties",
    "prior_distribution",
    "classes_3",
)
LAYERS = ("linear_everything", "linear_class_mask_of_rows", "linear_many_chunks", "linear_max_sup")
SECONDS = 10


@cache
def processes(num_devices: int) -> Workers:
    number, devices = PROCESSES[num_devices]
    return Workers(number, partial(on_jax_processes.start, SECONDS, devices))


def answers(num_devices: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what a function returns in every process."""
    workers = processes(num_devices)
    found = workers.run(function, [arguments] * workers.number)
    assert not any(isinstance(each, Exception) for each in found), found
    return found


def marked(ways: Any, quick: Any) -> list[Any]:
    return [pytest.param(*way, marks=[] if way in quick else [pytest.mark.distributed]) for way in ways]


def case_of(name: str, dtype: str) -> tuple[Case, bool]:
    linear = name in linear_case_names()
    return (make_linear_case if linear else make_case)(name, dtype), linear


def assert_all_agree(case: Case, results: list[AnyResult], arithmetic: Any) -> None:
    """Each process has the whole result, within the bounds, and all have the same."""
    truth = solve(case)
    for result in results:
        comparison = against_oracle(case, truth, result, arithmetic)
        assert comparison.agrees, comparison
        for part, values in result.parts.items():
            np.testing.assert_array_equal(values, results[0].parts[part])


OF_SHARD_MAP = dict.fromkeys([
    *QUICK,
    *((2, name, "float32") for name in (*sorted(CASES), *LAYERS)),
    *product((4, 6), ("everything", *OPTIONS, *LAYERS), ("float32",)),
    *product((4,), ("everything", *OPTIONS, "linear_everything"), ("bfloat16", "float64")),
])  # fmt: skip


@pytest.mark.parametrize(("num_devices", "name", "dtype"), marked(OF_SHARD_MAP, QUICK))
def test_in_shard_map(num_devices: int, name: str, dtype: str) -> None:
    """Loss and gradients of the vocab-parallel losses."""
    case, linear = case_of(name, dtype)
    arithmetic = arithmetic_on(num_devices, JaxAdapter(linear=linear))
    assert_all_agree(case, answers(num_devices, on_jax_processes.in_shard_map, case, linear), arithmetic)


DIVISIBLE = {
    "classes": ("everything", "classes_8", "classes_128", "ties_max_sup"),
    "rows": ("everything", "classes_8", "class_mask_of_rows", "linear_many_chunks"),
}
UNDER_JIT = [(number, name, what) for number in (2, 4) for what, names in DIVISIBLE.items() for name in names]
UNDER_JIT += [(2, "linear_two_classes", "classes")]
QUICK_UNDER_JIT = [(2, "everything", "classes"), (2, "linear_many_chunks", "rows")]


@pytest.mark.parametrize(("num_devices", "name", "what"), marked(UNDER_JIT, QUICK_UNDER_JIT))
def test_under_jit(num_devices: int, name: str, what: str) -> None:
    """The ordinary losses, of arrays with a NamedSharding over the devices of all processes."""
    case, linear = case_of(name, "float32")
    arithmetic = on_shards(JaxAdapter(linear=linear).arithmetic, num_devices)
    assert_all_agree(case, answers(num_devices, on_jax_processes.under_jit, case, linear, what), arithmetic)


@pytest.mark.parametrize(
    ("num_devices", "name"), marked(product((2, 4), ("everything", "class_mask_of_rows_soft", "ties")), [(2, "ties")])
)
def test_statistics(num_devices: int, name: str) -> None:
    case = make_case(name, "float32")
    for stats in answers(num_devices, on_jax_processes.statistics, case):
        flat = {field: value.reshape(-1) for field, value in stats.items()}
        flat.pop("loss")
        assert_statistics(case, stats["loss"], flat, arithmetic_on(num_devices, JaxAdapter()))


# --- What ends in an error -------------------------------------------------------------------------------------------


def of_rows(num_rows: int) -> Case:
    return random_case("float32", np.random.default_rng(0), num_rows, 16)


@pytest.mark.distributed
def test_a_process_that_ends() -> None:
    """The next collective of another process raises, and the next call starts new processes."""
    case = of_rows(8)
    answers(2, on_jax_processes.in_shard_map, case, False)
    begin = time.monotonic()
    first, second = processes(2).run(on_jax_processes.in_shard_map_or_exit, [(case, False), (case, True)])
    assert time.monotonic() - begin < 4 * SECONDS
    assert isinstance(first, Exception)
    assert re.search("Gloo .* failed|process 0 of 2 has ended", str(first)), first
    assert isinstance(second, WorkerError)
    assert str(second) == "process 1 of 2 has ended, with exit code 3"
    answers(2, on_jax_processes.in_shard_map, case, False)


@pytest.mark.distributed
@pytest.mark.parametrize("num_rows", [7, 9])
def test_processes_with_other_shapes(num_rows: int) -> None:
    """Gloo ends a process that gets more than it expects, and so the other gets an error. Neither has a result."""
    begin = time.monotonic()
    found = processes(2).run(on_jax_processes.in_shard_map, [(of_rows(8), False), (of_rows(num_rows), False)])
    assert time.monotonic() - begin < 4 * SECONDS
    assert all(isinstance(each, Exception) for each in found), found
    assert any(isinstance(each, WorkerError) for each in found), found


@pytest.mark.distributed
def test_nothing_compares_options() -> None:
    """Each process has its own loss. The page says to compare first what may differ."""
    ours = of_rows(8)
    theirs = replace(ours, options={**ours.options, "convention": "non_target"})
    first, second = processes(2).run(on_jax_processes.in_shard_map, [(ours, False), (theirs, False)])
    assert np.all(first.loss != second.loss)


@pytest.mark.distributed
def test_a_check_before_the_loss() -> None:
    """Every process raises, and says what differs."""
    check = on_jax_processes.checked_number_of_rows
    assert processes(2).run(check, [(8,), (8,)]) == [None, None]
    for problem in processes(2).run(check, [(8,), (9,)]):
        assert isinstance(problem, AssertionError)
        assert re.match(r"the number of rows differs. Expected: \[8 9\]; got: [89]", str(problem))


SCRIPT = """
import os, signal, sys
import jax
from jax.experimental import multihost_utils

number, address = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 2, number, heartbeat_timeout_seconds={s}, shutdown_timeout_seconds={s})
multihost_utils.sync_global_devices("start")
if number == 1:
    {ends}
multihost_utils.sync_global_devices("the loss")
"""


@pytest.mark.distributed
@pytest.mark.parametrize(("ends", "words"), [
    ("os.kill(os.getpid(), signal.SIGKILL)", "Task 1 heartbeat timeout|Gloo .* failed"),
    ("raise ValueError('mine')", "mine"),
])  # fmt: skip
def test_scripts_end(ends: str, words: str, tmp_path: Path) -> None:
    """Where a process is killed or raises, all end within the time-outs that they were given, and the log says why."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(s=SECONDS, ends=ends))
    address = on_jax_processes._address(0, tmp_path)
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, str(script)]
    started = [
        subprocess.Popen([*command, str(i), address], env=environment, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    texts = [each.communicate(timeout=6 * SECONDS)[1] for each in started]
    assert all(each.returncode != 0 for each in started)
    assert re.search(words, "".join(texts)), texts
