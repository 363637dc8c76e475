"""The pytest plugin: losses held against each other, devices and frameworks that a test needs, a ledger of evidence.

    def test_port(assert_same_loss):
        assert_same_loss(torch_loss, jax_loss, dtype="bfloat16")

    @pytest.mark.parity_framework("jax")
    def test_loss(parity_device, parity_ledger):  # once for each device
        parity_ledger.record("jax-mine", parity_device, "float32", "executed")
        ...

A test that a machine cannot run is skipped, and counted as not run; with `--parity-require=cuda` it fails.

pytest loads this in every session of an environment with lsce. So the plugin imports pytest and the standard library
only, prints nothing unless it is used, and imports a framework only if a test or an option asks for it.
"""

import argparse
import importlib
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from parity_tests.evidence.cards import AbsentError, find_device, load_framework
from parity_tests.evidence.ledger import (
    DEVICES,
    DTYPES,
    Evidence,
    Key,
    Kind,
    Session,
    framework_of,
    in_order,
    read,
    session_versions,
    strongest,
    table,
    write,
)

FRAMEWORKS = ("jax", "torch")
REQUIRABLE = (*DEVICES, *FRAMEWORKS)

_KEEPER = pytest.StashKey["Keeper"]()

# --- Devices and frameworks of this machine -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Obstacle:
    """Why a test cannot be run, and the devices and frameworks that it therefore lacks."""

    reason: str
    needs: list[str]


def _find_obstacle(devices: list[str], frameworks: list[str]) -> _Obstacle | None:
    """Return the obstacle, or None: each framework must find each device; without a framework, any may find it."""
    for framework in frameworks:
        try:
            load_framework(framework)
        except AbsentError as error:
            return _Obstacle(str(error), [framework, *devices])
    for device in devices:
        reasons = [_find_absence(framework, device) for framework in frameworks]
        if not frameworks and device != "cpu":
            both = [_find_absence(framework, device) for framework in FRAMEWORKS]
            reasons = both if all(both) else []
        if any(reasons):
            return _Obstacle("; ".join(filter(None, reasons)), [device])
    return None


def _find_absence(framework: str, device: str) -> str | None:
    """Return why a framework finds no such device, or None."""
    try:
        find_device(framework, device)
    except AbsentError as error:
        return str(error)
    return None


def _could_execute(adapter: str, device: str) -> bool:
    """Return whether this machine can run an adapter; if its name has no framework, on the CPU only."""
    framework = framework_of(adapter)
    return _find_absence(framework, device) is None if framework in FRAMEWORKS else device == "cpu"


# --- Options, markers, fixtures -------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("parity", "parity of losses between devices and frameworks")
    group.addoption(
        "--parity-require",
        type=_parse_requirements,
        default=(),
        metavar="NAMES",
        help=f"Of {','.join(REQUIRABLE)}: fail if no test was executed there, and fail tests that need it instead of "
        "skipping them.",
    )
    group.addoption("--parity-ledger", type=Path, metavar="FILE", help="Write the recorded evidence, as JSON.")
    group.addoption(
        "--parity-claims",
        type=Path,
        metavar="FILE",
        help="Ledger: fail if it claims an execution that this machine can do, and no test did.",
    )


def _parse_requirements(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in REQUIRABLE:
            raise argparse.ArgumentTypeError(f"it takes names of {', '.join(REQUIRABLE)}, with commas; got {name!r}")
    return names


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers, and start the ledger."""
    config.addinivalue_line("markers", "parity_device(name): the test needs this device: cpu, cuda or tpu.")
    config.addinivalue_line("markers", "parity_framework(name): the test needs this framework: jax or torch.")
    config.stash[_KEEPER] = Keeper(config)
    config.pluginmanager.register(config.stash[_KEEPER], "lsce_parity_keeper")


@pytest.fixture(params=[pytest.param(device, marks=pytest.mark.parity_device(device)) for device in DEVICES])
def parity_device(request: pytest.FixtureRequest) -> str:
    """Run the test once for each device: "cpu", "cuda", "tpu"."""
    return str(request.param)


@pytest.fixture
def assert_same_loss(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return `lsce_parity.assert_same_loss`, for the device of the test if it uses `parity_device`.

    Where there is no verdict, the test fails with the reason.
    """
    try:
        lsce_parity: Any = importlib.import_module("lsce_parity")
    except ModuleNotFoundError as error:
        pytest.fail(str(error), pytrace=False)
    device = {"device": request.getfixturevalue("parity_device")} if "parity_device" in request.fixturenames else {}

    def call(first: Any, second: Any, **options: Any) -> None:
        __tracebackhide__ = True
        try:
            lsce_parity.assert_same_loss(first, second, **{**device, **options})
        except (lsce_parity.NoVerdictError, lsce_parity.UnavailableError) as error:
            pytest.fail(f"no verdict: {error}", pytrace=False)

    return call


@dataclass
class Recorder:
    """The evidence that a test records; it counts if the test passes."""

    frameworks: frozenset[str]
    evidence: set[Evidence] = field(default_factory=set)
    called: bool = False
    skipped: bool = False
    failed: bool = False

    def record(self, adapter: str, device: str, dtype: str, kind: Kind, detail: str = "") -> None:
        """Record evidence. If the test fails, no evidence of any test for this adapter, device and dtype counts.

        Call it first: if the test fails before, the ledger does not know the adapter.

        Args:
            adapter: name of the adapter; it starts with its framework, as in "jax-fused".
            device: "cpu", "cuda" or "tpu".
            dtype: of the logits.
            kind: "executed", "replayed", "interpreted", "compiled" or "not run".
            detail: a detail for tables, such as the card's name, which `find_device` returns.

        Raises:
            ValueError: a field is empty or not a string, or there is no such device or kind.
        """
        self.evidence.add(Evidence(adapter, device, dtype, kind, detail))


@pytest.fixture
def parity_ledger(request: pytest.FixtureRequest) -> Recorder:
    """Return the recorder of the test."""
    return request.config.stash[_KEEPER].start(request.node)


# --- The session ----------------------------------------------------------------------------------------------------


class Keeper:
    """Keeps the evidence of tests until they have passed, and compares it with the requirements and claims.

    Raises:
        pytest.UsageError: a file cannot be read or written.
    """

    def __init__(self, config: pytest.Config) -> None:
        """Read the claims."""
        self._config = config
        self._required: tuple[str, ...] = config.getoption("--parity-require")
        self._ledger: Path | None = config.getoption("--parity-ledger")
        self._claims: Path | None = config.getoption("--parity-claims")
        self._claimed: set[Key] = set()
        if self._claims is not None:
            try:
                self._claimed = _executed(entry for session in read(self._claims) for entry in session.evidence)
            except (OSError, ValueError) as error:
                raise pytest.UsageError(f"--parity-claims: {error}") from error
        if self._ledger is not None and self._ledger.is_dir():
            raise pytest.UsageError(f"--parity-ledger: {self._ledger} is a folder; name a file")
        if self._ledger and self._claims and self._ledger.resolve() == self._claims.resolve():
            raise pytest.UsageError(
                "--parity-ledger would replace the claims of other machines; write another file, and add it with "
                f"lsce-parity matrix --ledger {self._claims} --add FILE"
            )
        self._running: dict[str, Recorder] = {}
        self._passed: dict[Evidence, frozenset[str]] = {}
        self._failed: set[Key] = set()
        self._not_run: Counter[str] = Counter()
        self._absent: set[tuple[str, str]] = set()
        self._problems: list[str] = []
        self._ran = False

    def start(self, item: pytest.Item) -> Recorder:
        """Return a new recorder for a test."""
        recorder = Recorder(frozenset(_names(item, "parity_framework", FRAMEWORKS)))
        self._running[item.nodeid] = recorder
        return recorder

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> None:
        """Note whether tests are run, and not only listed."""
        self._ran = not session.config.option.collectonly

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Skip a test that cannot be run here, or fail it if its device or framework is required."""
        devices, frameworks = _names(item, "parity_device", DEVICES), _names(item, "parity_framework", FRAMEWORKS)
        obstacle = _find_obstacle(devices, frameworks)
        if obstacle is None:
            return
        required = [name for name in obstacle.needs if name in self._required]
        if required:
            pytest.fail(f"{obstacle.reason}; --parity-require={','.join(required)} asks for it", pytrace=False)
        self._not_run[obstacle.reason] += 1
        self._absent.update((framework, device) for framework in frameworks or FRAMEWORKS for device in devices)
        pytest.skip(obstacle.reason)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Follow a test that records; its teardown decides whether its evidence counts."""
        recorder = self._running.get(report.nodeid)
        if recorder is None:
            return
        expected_failure = report.skipped and hasattr(report, "wasxfail")
        recorder.failed |= report.failed or expected_failure
        recorder.skipped |= report.skipped
        recorder.called |= report.when == "call"
        if report.when == "teardown":
            del self._running[report.nodeid]
            if recorder.failed:
                self._failed |= {entry.key for entry in recorder.evidence}
            elif recorder.called and not recorder.skipped:
                for entry in recorder.evidence:
                    self._passed[entry] = self._passed.get(entry, frozenset()) | recorder.frameworks

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Compare the ledger with the requirements and claims, and write it."""
        if not self._ran:
            return
        self._problems = [*self._find_missing(), *self._find_unproven(), *self._write_ledger()]
        if self._problems and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if not self._config.pluginmanager.has_plugin("terminalreporter"):
            for problem in self._problems:
                print(problem, file=sys.stderr)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> Generator[None]:
        """Show the ledger, last of all, if there is one or an option asks for it."""
        yield  # to the summary of pytest itself
        asked = self._required or self._ledger or self._claims
        if not self._ran or not (asked or self._passed or self._failed):
            return
        terminalreporter.write_sep("=", "parity ledger")
        for line in self._show():
            terminalreporter.write_line(line)
        for problem in self._problems:
            terminalreporter.write_line(f"ERROR {problem}", red=True)

    def _evidence(self) -> list[Evidence]:
        return [entry for entry in self._passed if entry.key not in self._failed]

    def _show(self) -> list[str]:
        cells: dict[Key, str] = {key: kind for key, (kind, _) in strongest(self._evidence()).items()}
        cells |= dict.fromkeys(self._failed, "failed")
        for adapter, _, dtype in list(cells):
            for framework, device in self._absent:
                if framework == framework_of(adapter):
                    cells.setdefault((adapter, device, dtype), "not run")
        lines = table(cells) if cells else ["nothing was recorded"]
        lines += [f"not run: {_count(count, 'test')}, {reason}" for reason, count in sorted(self._not_run.items())]
        if self._claims is not None:
            beyond = _list(_executed(self._evidence()) - self._claimed)
            lines += [f"executed and not claimed by {self._claims}: {text}" for text in beyond]
        return lines

    def _find_missing(self) -> list[str]:
        executed = [entry for entry in self._evidence() if entry.kind == "executed"]
        found = {entry.device for entry in executed} | {entry.framework for entry in executed}
        found.update(name for entry in executed for name in self._passed[entry])
        missing = [name for name in self._required if name not in found]
        return [f"--parity-require={name}: no test that passed recorded anything executed there" for name in missing]

    def _find_unproven(self) -> list[str]:
        unproven = self._claimed - _executed(self._evidence())
        possible = {key for key in unproven if _could_execute(*key[:2])}
        return [
            f"{self._claims} claims what this session has not shown: {text} was executed" for text in _list(possible)
        ]

    def _write_ledger(self) -> list[str]:
        if self._ledger is None:
            return []
        try:
            today = date.today().isoformat()
            write(self._ledger, [Session(session_versions(), frozenset(self._evidence()), today)])
        except OSError as error:
            return [f"--parity-ledger: {error}"]
        return []


def _names(item: pytest.Item, marker: str, allowed: tuple[str, ...]) -> list[str]:
    names = []
    for mark in item.iter_markers(marker):
        if len(mark.args) != 1 or mark.args[0] not in allowed or mark.kwargs:
            pytest.fail(f"the marker {marker} takes one of {', '.join(allowed)}; got {mark.args}", pytrace=False)
        names.append(mark.args[0])
    return names


def _executed(evidence: Iterable[Evidence]) -> set[Key]:
    return {entry.key for entry in evidence if entry.kind == "executed"}


def _list(keys: set[Key]) -> list[str]:
    """Return a text for each adapter and device, with its dtypes."""
    pairs = sorted({key[:2] for key in keys})
    dtypes = {pair: in_order((dtype for *each, dtype in keys if tuple(each) == pair), DTYPES) for pair in pairs}
    return [f"{adapter} on {device} in {', '.join(dtypes[adapter, device])}" for adapter, device in pairs]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
