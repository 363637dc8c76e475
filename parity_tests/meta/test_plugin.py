"""The pytest plugin, in sessions of their own, on machines whose frameworks and devices are pretended."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parity_tests.evidence import ledger
from parity_tests.evidence.ledger import Evidence
from parity_tests.meta.running import run_code

pytest_plugins = ["pytester"]

JAX = """
class Card:
    device_kind = "Card of JAX"

def devices(platform):
    if platform in {devices}:
        return [Card]
    raise RuntimeError("Unknown backend " + platform + ".\\nAnd much more.")
"""
TORCH = """
class cuda:
    def is_available():
        return "cuda" in {devices}

    def get_device_name():
        return "Card of torch"
"""
MISSING = "raise ModuleNotFoundError(f'No module named {__name__!r}', name=__name__)"

IMPORTS = "import pytest, sys\n"
RECORD = 'parity_ledger.record("jax-a", "cpu", "float32", "executed")'
PASSING = f"def test_passing(parity_ledger): {RECORD}"

Run = Callable[..., pytest.RunResult]


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a test file, where the frameworks see these devices; None: not installed."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    def run(
        code: str, *options: str, jax: list[str] | None = None, torch: list[str] | None = None, plugin: bool = True
    ) -> pytest.RunResult:
        modules = {"jax": MISSING if jax is None else JAX.format(devices=jax)}
        modules["torch"] = MISSING if torch is None else TORCH.format(devices=torch)
        pytester.makepyfile(**modules, test_it=IMPORTS + code)
        loaded = ["-p", "parity_tests.plugin"] if plugin else []
        return pytester.runpytest_subprocess(*loaded, "--strict-markers", "-ra", *options, "test_it.py")

    return run


def shown(result: pytest.RunResult) -> str:
    """Return what a session printed, without what it took."""
    return re.sub(r"in [\d.]+s", "", result.stdout.str() + result.stderr.str())


def written(path: Path) -> list[tuple[str, ...]]:
    [session] = ledger.read(path)
    return sorted((*entry.key, entry.kind, entry.detail) for entry in session.evidence)


# --- A session that has nothing to do with it -----------------------------------------------------------------------

LOADED = """
import sys, pytest
before = {name.partition(".")[0] for name in sys.modules}
import parity_tests.plugin
print(*{name.partition(".")[0] for name in sys.modules} - before - sys.stdlib_module_names)
"""


def test_it_loads_pytest_and_the_standard_library_only() -> None:
    loaded = run_code(LOADED).stdout
    assert loaded.split() == ["parity_tests"]
    also_numpy = LOADED.replace("parity_tests.plugin", "parity_tests.plugin, parity_tests.losses.adapters")
    loaded = run_code(also_numpy).stdout
    assert {"parity_tests", "numpy"} < set(loaded.split())


UNRELATED = """
@pytest.mark.parametrize("n", range(3))
def test_passing(n): pass
def test_failing(): assert False
def test_skipped(): pytest.skip("why")
"""


@pytest.mark.parametrize("options", [(), ("-q",), ("-v",), ("--collect-only",)])
def test_it_is_silent_in_other_sessions(run: Run, options: tuple[str, ...]) -> None:
    with_it, without = run(UNRELATED, *options), run(UNRELATED, *options, plugin=False)
    assert with_it.ret == without.ret
    assert shown(with_it) == shown(without)


def test_as_an_entry_point_it_loads_no_framework(
    run: Run, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The distribution that pytest finds is made here, whether or not this one is installed with its entry point.
    information = pytester.mkdir("made_up-1.0.dist-info")
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[pytest11]\nlsce_parity = parity_tests.plugin\n")
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    monkeypatch.setenv("PYTHONPATH", str(pytester.path))
    code = """
def test_loaded(pytestconfig):
    assert pytestconfig.pluginmanager.get_plugin("lsce_parity").__name__ == "parity_tests.plugin"
    assert not {"jax", "torch"} & sys.modules.keys()
"""
    result = run(code, "-p", "no:jaxtyping", plugin=False)
    result.assert_outcomes(passed=1)
    assert "parity ledger" not in shown(result)


# --- Needs ----------------------------------------------------------------------------------------------------------

NO_CUDA = "jax finds no cuda device: Unknown backend cuda."


@pytest.mark.parametrize(("jax", "torch", "marks", "reason"), [
    (["cpu"], None, {"framework": "jax"}, None),
    (None, ["cpu"], {"framework": "jax"}, "jax is not installed"),
    (None, ["cpu"], {"device": "cpu"}, None),
    (["cpu"], None, {"framework": "torch", "device": "cpu"}, "torch is not installed"),
    (["cpu", "cuda"], ["cpu"], {"device": "cuda"}, None),
    (["cpu"], ["cpu", "cuda"], {"device": "cuda"}, None),
    (["cpu"], ["cpu"], {"device": "cuda"}, f"{NO_CUDA}; torch finds no cuda device"),
    (["cpu"], ["cpu", "cuda"], {"framework": "jax", "device": "cuda"}, NO_CUDA),
    (["cpu", "cuda"], ["cpu"], {"framework": "torch", "device": "cuda"}, "torch finds no cuda device"),
    (["cpu", "tpu"], None, {"framework": "jax", "device": "tpu"}, None),
    (["cpu", "tpu"], ["cpu"], {"framework": "torch", "device": "tpu"}, "torch finds no tpu device"),
])  # fmt: skip
def test_markers(run: Run, jax: Any, torch: Any, marks: dict[str, str], reason: str | None) -> None:
    code = "".join(f"@pytest.mark.parity_{kind}({name!r})\n" for kind, name in marks.items()) + PASSING
    result = run(code, jax=jax, torch=torch)
    result.assert_outcomes(passed=int(reason is None), skipped=int(reason is not None))
    if reason is not None:
        assert re.search(rf"SKIPPED \[1\] .*: {re.escape(reason)}\n", shown(result))


@pytest.mark.parametrize("marks", ['device("gpu")', "device", 'framework("tensorflow")', 'framework("jax", "torch")'])
def test_wrong_markers_fail(run: Run, marks: str) -> None:
    result = run(f"@pytest.mark.parity_{marks}\ndef test(): pass", jax=["cpu"])
    result.assert_outcomes(errors=1)
    assert f"the marker parity_{marks.partition('(')[0]} takes one of " in shown(result)


def test_a_broken_framework_is_no_reason_to_skip(run: Run, pytester: pytest.Pytester) -> None:
    code = "@pytest.mark.parity_framework('jax')\ndef test(): pass"
    run(code).assert_outcomes(skipped=1)
    pytester.makepyfile(jax="import a_module_that_it_needs")
    pytester.runpytest_subprocess("-p", "parity_tests.plugin").assert_outcomes(errors=1)


def test_what_is_skipped_sets_nothing_up(run: Run) -> None:
    code = "@pytest.fixture\ndef needs_it(): import jax\n@pytest.mark.parity_framework('jax')\ndef test(needs_it): pass"
    run(code).assert_outcomes(skipped=1)


ON_EACH = """
from parity_tests.plugin import find_device

@pytest.mark.parity_framework("jax")
def test_it(parity_device, parity_ledger):
    parity_ledger.record("jax-a", parity_device, "float32", "executed", find_device("jax", parity_device))
"""


def test_each_device(run: Run, pytester: pytest.Pytester) -> None:
    result = run(ON_EACH, "--parity-ledger=found.json", jax=["cpu", "cuda"])
    result.assert_outcomes(passed=2, skipped=1)
    assert result.stdout.str().partition("parity ledger")[2].splitlines()[1:5] == [
        "adapter  device  float32",
        "jax-a    cpu     executed",
        "jax-a    cuda    executed",
        "jax-a    tpu     not run",
    ]
    assert "not run: 1 test, jax finds no tpu device: Unknown backend tpu." in shown(result)
    assert written(pytester.path / "found.json") == [
        ("jax-a", "cpu", "float32", "executed", ""),
        ("jax-a", "cuda", "float32", "executed", "Card of JAX"),
    ]


# --- --parity-require -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("required", "errors"), [("cuda", 1), ("cpu,tpu", 1), ("cuda,tpu", 2), ("cpu,jax", 0)])
def test_what_is_required_fails_instead_of_skipping(run: Run, required: str, errors: int) -> None:
    result = run(ON_EACH, f"--parity-require={required}", jax=["cpu"])
    result.assert_outcomes(passed=1, errors=errors, skipped=2 - errors)
    assert result.ret == (pytest.ExitCode.TESTS_FAILED if errors else pytest.ExitCode.OK)
    for name in {"cuda", "tpu"} & set(required.split(",")):
        reason = f"jax finds no {name} device: Unknown backend {name}.; --parity-require={name} asks for it"
        assert reason in shown(result)


@pytest.mark.parametrize("required", ["jax", "cpu"])
def test_a_required_framework_that_is_missing(run: Run, required: str) -> None:
    code = "@pytest.mark.parity_device('cpu')\n@pytest.mark.parity_framework('jax')\n" + PASSING
    run(code).assert_outcomes(skipped=1)
    result = run(code, f"--parity-require={required}")
    result.assert_outcomes(errors=1)
    assert f"jax is not installed; --parity-require={required} asks for it" in shown(result)


RECORDS = "def test_it(parity_ledger): parity_ledger.record({})"


@pytest.mark.parametrize(("record", "required", "missing"), [
    ('"jax-a", "cpu", "float32", "executed"', "cpu,jax", []),
    ('"jax-a", "cpu", "float32", "executed"', "cpu,torch,tpu", ["torch", "tpu"]),
    ('"jax-a", "cuda", "float32", "executed"', "cuda", []),
    ('"jax-a", "cuda", "float32", "compiled"', "cuda", ["cuda"]),
    ('"jax-a", "cuda", "float32", "not run"', "jax", ["jax"]),
])  # fmt: skip
def test_what_is_required_must_have_been_executed(run: Run, record: str, required: str, missing: list[str]) -> None:
    result = run(RECORDS.format(record), f"--parity-require={required}")
    result.assert_outcomes(passed=1)
    assert result.ret == (pytest.ExitCode.TESTS_FAILED if missing else pytest.ExitCode.OK)
    assert re.findall(r"ERROR --parity-require=(\w+): no test that passed recorded", shown(result)) == missing


def test_the_marker_says_the_framework_where_the_name_does_not(run: Run) -> None:
    code = RECORDS.format('"mine", "cpu", "float32", "executed"')
    assert run(code, "--parity-require=jax", jax=["cpu"]).ret == pytest.ExitCode.TESTS_FAILED
    code = "@pytest.mark.parity_framework('jax')\n" + code
    assert run(code, "--parity-require=jax", jax=["cpu"]).ret == pytest.ExitCode.OK


@pytest.mark.parametrize("code", ["", "def test(): pass", f"def test(parity_ledger):\n {RECORD}\n assert False"])
def test_nothing_executed_is_not_green(run: Run, code: str) -> None:
    result = run(code, "--parity-require=cpu")
    assert result.ret in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
    assert "ERROR --parity-require=cpu: no test that passed recorded anything executed there" in shown(result)


@pytest.mark.parametrize("names", ["gpu", "cpu,", "", "cpu cuda", "CPU"])
def test_unknown_names(run: Run, names: str) -> None:
    result = run(PASSING, f"--parity-require={names}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "--parity-require: it takes names of cpu, cuda, tpu, jax, torch" in shown(result)


# --- The ledger -----------------------------------------------------------------------------------------------------

NO_EVIDENCE = {
    "assertion": f"def test(parity_ledger):\n {RECORD}\n assert False",
    "assertion before it": f"def test(parity_ledger):\n assert False\n {RECORD}",
    "other test": f"{PASSING}\ndef test(parity_ledger):\n {RECORD}\n assert False",
    "other test, before": f"def test(parity_ledger):\n {RECORD}\n assert False\n{PASSING}",
    "other test, xfail": f"{PASSING}\n@pytest.mark.xfail\ndef test(parity_ledger):\n {RECORD}\n assert False",
    "teardown": f"@pytest.fixture\ndef late():\n yield\n assert False\ndef test(late, parity_ledger): {RECORD}",
    "setup": f"@pytest.fixture\ndef early(parity_ledger):\n {RECORD}\n assert False\ndef test(early): pass",
    "xfail": f"@pytest.mark.xfail\ndef test(parity_ledger):\n {RECORD}\n assert False",
    "xpass": f"@pytest.mark.xfail(strict=True)\ndef test(parity_ledger): {RECORD}",
    "skip": f"def test(parity_ledger):\n {RECORD}\n pytest.skip('no')",
    "exit": f"def test(parity_ledger):\n {RECORD}\n pytest.exit('no', returncode=0)",
    "wrong record": "def test(parity_ledger): parity_ledger.record('jax-a', 'gpu', 'float32', 'executed')",
    "no record": "def test(parity_ledger): pass",
}


@pytest.mark.parametrize("code", NO_EVIDENCE.values(), ids=NO_EVIDENCE)
def test_only_a_test_that_passes_is_evidence(run: Run, pytester: pytest.Pytester, code: str) -> None:
    run(code, "--parity-ledger=found.json")
    assert written(pytester.path / "found.json") == []


def test_a_test_that_passes_is_evidence(run: Run, pytester: pytest.Pytester) -> None:
    run(PASSING, "--parity-ledger=found.json")
    assert written(pytester.path / "found.json") == [("jax-a", "cpu", "float32", "executed", "")]


def test_a_test_that_is_not_called_is_no_evidence(run: Run, pytester: pytest.Pytester) -> None:
    code = f"@pytest.fixture\ndef early(parity_ledger): {RECORD}\ndef test(early): pass"
    run(code, "--parity-ledger=found.json", "--setup-only")
    assert written(pytester.path / "found.json") == []
    run(code, "--parity-ledger=found.json")
    assert len(written(pytester.path / "found.json")) == 1


def test_a_failure_is_shown(run: Run) -> None:
    code = """
@pytest.mark.parametrize("n", range(3))
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_it(parity_ledger, dtype, n):
    parity_ledger.record("jax-a", "cpu", dtype, "executed")
    assert dtype == "float64" or n != 1
"""
    lines = shown(run(code)).splitlines()
    assert "adapter  device  float64   float16" in lines
    assert "jax-a    cpu     executed  failed" in lines


def test_the_file_is_the_same_each_time(run: Run, pytester: pytest.Pytester) -> None:
    code = "\n".join(
        f"def test_{n}(parity_ledger): parity_ledger.record('torch-{n % 5}', 'cpu', 'float{n % 3}', 'executed')"
        for n in range(15)
    )
    files = [pytester.path / "folder" / name for name in ("first.json", "second.json")]
    for file in files:
        run(code, f"--parity-ledger={file}").assert_outcomes(passed=15)
    assert files[0].read_bytes() == files[1].read_bytes()
    [session] = json.loads(files[0].read_text())["sessions"]
    assert session["versions"]["python"] == sys.version.split()[0]
    assert len(session["evidence"]) == 15


def test_a_folder_is_no_file(run: Run) -> None:
    result = run(PASSING, "--parity-ledger=.")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "--parity-ledger: . is a folder; name a file" in shown(result)


def test_a_file_that_cannot_be_written(run: Run) -> None:
    result = run(PASSING, "--parity-ledger=test_it.py/found.json")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert "ERROR --parity-ledger: [Errno" in shown(result)


# --- --parity-claims ------------------------------------------------------------------------------------------------


def claim(pytester: pytest.Pytester, *entries: tuple[str, ...]) -> str:
    evidence = frozenset(Evidence(*entry) for entry in entries)  # type: ignore[arg-type]
    ledger.write(pytester.path / "claims.json", [ledger.Session({"python": "3"}, evidence)])
    return "--parity-claims=claims.json"


EXECUTED = ("jax-a", "cpu", "float32", "executed")


@pytest.mark.parametrize(("claims", "unproven"), [
    ([EXECUTED], []),
    ([(*EXECUTED, "with a detail")], []),
    ([EXECUTED, ("jax-b", "cpu", "float16", "executed"), ("jax-b", "cpu", "float64", "executed")],
     ["jax-b on cpu in float64, float16"]),
    ([EXECUTED, ("jax-a", "cuda", "float32", "executed")], ["jax-a on cuda in float32"]),
    ([EXECUTED, ("jax-a", "tpu", "float32", "executed")], []),  # there is no TPU
    ([EXECUTED, ("torch-a", "cpu", "float32", "executed")], []),  # there is no torch
    ([EXECUTED, ("mine", "cpu", "float32", "executed")], ["mine on cpu in float32"]),
    ([EXECUTED, ("mine", "cuda", "float32", "executed")], []),  # nobody knows
    ([EXECUTED, ("jax-b", "cpu", "float32", "compiled")], []),
])  # fmt: skip
def test_claims(run: Run, pytester: pytest.Pytester, claims: list[tuple[str, ...]], unproven: list[str]) -> None:
    result = run(PASSING, claim(pytester, *claims), jax=["cpu", "cuda"])
    assert result.ret == (pytest.ExitCode.TESTS_FAILED if unproven else pytest.ExitCode.OK)
    assert re.findall(r"ERROR claims.json claims what this session has not shown: (.*) was", shown(result)) == unproven


def test_a_claim_whose_test_fails(run: Run, pytester: pytest.Pytester) -> None:
    result = run(f"{PASSING}\ndef test(parity_ledger):\n {RECORD}\n assert False", claim(pytester, EXECUTED), jax=[])
    assert "has not shown: jax-a on cpu" not in shown(result)  # this JAX has not even a CPU
    result = run(
        f"{PASSING}\ndef test(parity_ledger):\n {RECORD}\n assert False", claim(pytester, EXECUTED), jax=["cpu"]
    )
    assert "has not shown: jax-a on cpu" in shown(result)


def test_what_is_not_claimed_is_shown(run: Run, pytester: pytest.Pytester) -> None:
    result = run(PASSING, claim(pytester), jax=["cpu"])
    assert result.ret == pytest.ExitCode.OK
    assert "executed and not claimed by claims.json: jax-a on cpu in float32" in shown(result)


@pytest.mark.parametrize(
    "content", [None, "", "[]", '{"sessions": [{"versions": {}, "evidence": [{"adapter": "a"}]}]}']
)
def test_claims_that_cannot_be_read(run: Run, pytester: pytest.Pytester, content: str | None) -> None:
    if content is not None:
        (pytester.path / "claims.json").write_text(content)
    result = run(PASSING, "--parity-claims=claims.json")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert re.search(r"ERROR: --parity-claims: .*claims\.json", shown(result))


def test_claims_are_not_overwritten(run: Run, pytester: pytest.Pytester) -> None:
    option = claim(pytester, EXECUTED)
    before = (pytester.path / "claims.json").read_bytes()
    result = run(PASSING, option, "--parity-ledger=./claims.json")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "--parity-ledger would replace the claims" in shown(result)
    assert (pytester.path / "claims.json").read_bytes() == before


# --- Other options of pytest ----------------------------------------------------------------------------------------


def test_without_a_terminal(pytester: pytest.Pytester, run: Run) -> None:
    run(PASSING)  # writes the files
    options = ("-p", "parity_tests.plugin", "-p", "no:terminal", "test_it.py")
    assert pytester.runpytest_subprocess(*options, "--parity-require=cpu").ret == pytest.ExitCode.OK
    result = pytester.runpytest_subprocess(*options, "--parity-require=cuda")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert result.errlines == ["--parity-require=cuda: no test that passed recorded anything executed there"]


@pytest.mark.parametrize("options", [("-q",), ("-qq",), ("-x",), ("-v",), ("-p", "no:cacheprovider"), ("--tb=no",)])
def test_with_other_options(run: Run, options: tuple[str, ...]) -> None:
    result = run(PASSING, "--parity-require=cpu", *options)
    assert result.ret == pytest.ExitCode.OK
    assert "jax-a    cpu     executed" in shown(result)
    result = run(PASSING, "--parity-require=cuda", *options)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert "ERROR --parity-require=cuda" in shown(result)


def test_a_session_that_stops_at_the_first_failure(run: Run, pytester: pytest.Pytester) -> None:
    code = f"{PASSING}\ndef test_failing(parity_ledger): assert False\n" + RECORDS.format('"b", "cpu", "c", "executed"')
    result = run(code, "-x", "--parity-ledger=found.json")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert written(pytester.path / "found.json") == [(*EXECUTED, "")]


@pytest.mark.parametrize("option", ["--collect-only", "--fixtures", "--markers"])
def test_nothing_is_required_of_a_session_that_runs_nothing(run: Run, pytester: pytest.Pytester, option: str) -> None:
    result = run(PASSING, "--parity-require=cuda", claim(pytester, EXECUTED), "--parity-ledger=found.json", option)
    assert result.ret == pytest.ExitCode.OK
    assert "parity ledger\n" not in shown(result)
    assert not (pytester.path / "found.json").exists()
