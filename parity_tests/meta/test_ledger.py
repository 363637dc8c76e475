"""The ledger: its files, its tables, and that docs/devices.md says what it says."""

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result as CommandResult

from parity_tests.commands.matrix import COMMAND
from parity_tests.evidence import ledger
from parity_tests.evidence.ledger import Evidence, Session
from parity_tests.evidence.pages import replace_block
from parity_tests.meta.running import invoke
from parity_tests.truth import precision

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- lsce-parity matrix: begin -->", "<!-- lsce-parity matrix: end -->"
COMPILED = [Evidence("jax-fused", "tpu", "bfloat16", "compiled", detail) for detail in ("v6e", "v5e")]


def executed(*adapters: str, device: str = "cpu", dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> list[Evidence]:
    return [Evidence(adapter, device, dtype, "executed") for adapter in adapters for dtype in dtypes]


def session(*evidence: Evidence, **versions: str) -> Session:
    return Session(versions, frozenset(evidence))


def rows(sessions: list[Session]) -> list[str]:
    return ledger.matrix(sessions).splitlines()[2:]


def test_names_are_those_of_the_other_modules() -> None:
    assert ledger.DTYPES == precision.DTYPES


@pytest.mark.parametrize(("fields", "message"), [
    (("jax-a", "gpu", "float32", "executed"), "there is no device 'gpu'; the devices are cpu, cuda, tpu"),
    (("jax-a", "cpu", "float32", "passed"), "there is no kind of evidence 'passed'; the kinds are executed, "),
    (("", "cpu", "float32", "executed"), "names an adapter and a dtype"),
    (("jax-a", "cpu", "", "executed"), "names an adapter and a dtype"),
    (("jax-a", "cpu", float, "executed"), "consists of texts"),
    (("jax-a", "cpu", "float32", "executed", None), "consists of texts"),
    (("jax-a", "rocm", "float32", "executed"), "for rocm losses are only compiled, got 'executed'"),
])  # fmt: skip
def test_wrong_evidence(fields: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Evidence(*fields)


def test_versions() -> None:
    versions = ledger.session_versions()
    assert next(iter(versions)) == "python"
    assert {"numpy", "jax", "torch"} < versions.keys()


def test_merge_puts_sessions_of_the_same_versions_together() -> None:
    one, two, three = executed("jax-a", "jax-b", "torch-a", dtypes=("float32",))
    merged = ledger.merge(
        [session(one, jax="1", torch="2"), session(two, jax="2"), session(one, three, torch="2", jax="1")]
    )
    assert merged == [session(one, three, jax="1", torch="2"), session(two, jax="2")]


@pytest.mark.parametrize("weaker", range(1, len(ledger.KINDS)))
def test_the_strongest_evidence_counts(weaker: int) -> None:
    entries = [Evidence("a", "cpu", "b", kind, kind) for kind in ledger.KINDS[weaker - 1 : weaker + 1]]
    for given in (entries, entries[::-1]):
        assert ledger.strongest(given) == {("a", "cpu", "b"): (ledger.KINDS[weaker - 1], [ledger.KINDS[weaker - 1]])}


# --- Files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sessions", [
    [],
    [session()],
    [session(*executed("jax-a"), *COMPILED, python="3.11", jax="0.10")],
    [Session({"jax": "0.10"}, frozenset(executed("jax-a")), "2026-11-26")],
    [session(*executed("jax-a"), jax="0.11"), session(Evidence("ü\n", "cpu", '"', "replayed", "|"), jax="0.10")],
])  # fmt: skip
def test_files_hold_everything(tmp_path: Path, sessions: list[Session]) -> None:
    path = tmp_path / "folder" / "ledger.json"
    ledger.write(path, sessions)
    assert ledger.read(path) == sessions
    assert path.read_text(encoding="utf-8").count('"adapter"') == sum(len(each.evidence) for each in sessions)


BAD_FILES = {
    "empty": "",
    "list": "[]",
    "other": '{"outcomes": []}',
    "no versions": '{"sessions": [{"evidence": []}]}',
    "no kind": '{"sessions": [{"versions": {}, "evidence": [{"adapter": "a", "device": "cpu", "dtype": "b"}]}]}',
    "wrong device": '{"sessions": [{"versions": {}, "evidence": [{"adapter": "a", "device": "b", "dtype": "c", "kind": '
    '"executed"}]}]}',
    "number": '{"sessions": 3}',
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files(tmp_path: Path, content: str) -> None:
    path = tmp_path / "ledger.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"ledger\.json is no ledger as --parity-ledger writes it: .+"):
        ledger.read(path)


# --- Tables ---------------------------------------------------------------------------------------------------------


def test_terminal_table() -> None:
    cells = {("jax-a", "tpu", "float16"): "compiled", ("jax-a", "cpu", "float64"): "executed"}
    assert ledger.table(cells | {("b", "cuda", "float8"): "failed"}) == [
        "adapter  device  float64   float16   float8",
        "b        cuda    not run   not run   failed",
        "jax-a    cpu     executed  not run   not run",
        "jax-a    tpu     not run   compiled  not run",
    ]


def test_matrix_puts_equal_dtypes_and_adapters_together() -> None:
    assert rows([session(*executed("jax-fused", "jax-reference", "torch-fused"), *COMPILED, jax="0.10")]) == [
        "| `jax-fused` | float32 | executed | not run | not run |",
        "| `jax-fused` | bfloat16 | executed | not run | compiled |",
        "| `jax-reference` | float32, bfloat16 | executed | not run | not run |",
        "| `torch-fused` | float32, bfloat16 | executed | not run | not run |",
        "",
        "- executed (CPU), compiled (TPU): with jax 0.10",
    ]
    assert rows([session(*executed("jax-reference", "jax-fused"))])[0] == (
        "| `jax-fused`, `jax-reference` | float32, bfloat16 | executed | not run | not run |"
    )


def test_matrix_shows_every_kind_but_beside_an_execution() -> None:
    both = [Evidence("jax-a", "tpu", "float32", kind, "v5e") for kind in ("simulated", "interpreted")]
    assert rows([session(*both)])[0] == "| `jax-a` | float32 | not run | not run | interpreted, simulated |"
    ran = Evidence("jax-a", "tpu", "float32", "executed", "TPU v5e")
    assert rows([session(ran, *both)])[0] == "| `jax-a` | float32 | not run | not run | executed (TPU v5e) |"


def test_details_have_a_row_for_equal_evidence() -> None:
    def simulated(adapter: str, *details: str, dtypes: tuple[str, ...] = ("float32",)) -> list[Evidence]:
        return [Evidence(adapter, "tpu", dtype, "simulated", each) for dtype in dtypes for each in details]

    found = [
        *simulated("jax-a", "tpu-v4", "tpu-v5e"),
        *simulated("jax-b", "tpu-v4", "tpu-v5e"),
        *simulated("torch-a", "tpu-v4", dtypes=("bfloat16", "float32")),
        Evidence("jax-a", "cuda", "float32", "interpreted"),
        Evidence("jax-a", "cuda", "float32", "not run"),
    ]
    assert ledger.details([Session({"jax": "0.10"}, frozenset(found), "2026-11-26")]).splitlines()[2:] == [
        "| interpreted | cuda | `jax-a` | float32 |",
        "| simulated | tpu-v4, tpu-v5e | `jax-a`, `jax-b` | float32 |",
        "| simulated | tpu-v4 | `torch-a` | float32, bfloat16 |",
        "",
        "- interpreted (CUDA), simulated (TPU): 2026-11-26, with jax 0.10",
    ]


def test_what_is_only_compiled_is_a_detail_and_no_column() -> None:
    found = [
        session(*executed("jax-a", dtypes=("float32",)), Evidence("jax-a", "rocm", "float32", "compiled", "gfx942"))
    ]
    assert ledger.matrix(found).splitlines()[:3] == [
        "| adapter | dtypes | CPU | CUDA | TPU |",
        "|---|---|---|---|---|",
        "| `jax-a` | float32 | executed | not run | not run |",
    ]
    assert "| compiled | gfx942 | `jax-a` | float32 |" in ledger.details(found).splitlines()


def test_merged_sessions_have_the_last_date() -> None:
    dated = [Session({"jax": "1"}, frozenset(executed("jax-a")), date) for date in ("2026-11-26", "2026-10-01", "")]
    for order in (dated, dated[::-1]):
        assert [each.date for each in ledger.merge(order)] == ["2026-11-26"]


def test_matrix_shows_gaps() -> None:
    lines = rows([session(*executed("jax-a"), *executed("jax-b", dtypes=("float32",)))])
    assert "| `jax-b` | bfloat16 | not run | not run | not run |" in lines


def test_matrix_says_how_much_a_session_found() -> None:
    first, second = session(*executed("jax-a"), jax="0.11"), session(executed("jax-a")[0], jax="0.10")
    assert rows([first, second])[-2:] == [
        "- executed (CPU): with jax 0.11",
        "- executed (CPU): with jax 0.10, 1 of 2 combinations of adapter and dtype",
    ]


def test_matrix_of_nothing() -> None:
    assert ledger.matrix([]).splitlines() == ["| adapter | dtypes | CPU | CUDA | TPU |", "|---|---|---|---|---|"]


def test_matrix_keeps_its_columns() -> None:
    lines = rows([session(Evidence("jax-a", "cuda", "float32", "executed", "a|card\nof two lines"))])
    assert lines[0] == r"| `jax-a` | float32 | not run | executed (a\|card of two lines) | not run |"


# --- lsce-parity matrix ---------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Return a page that is what its ledger gives, and the ledger of one more session."""
    found = {"ledger": tmp_path / "ledger.json", "page": tmp_path / "page.md", "more": tmp_path / "more.json"}
    ledger.write(found["ledger"], [session(*executed("jax-fused"), jax="0.10")])
    ledger.write(found["more"], [session(*executed("jax-fused", device="cuda"), jax="0.10")])
    found["page"].write_text(f"Before.\n\n{BEGIN}\n{END}\n\nAfter.\n", encoding="utf-8")
    assert matrix(found).exit_code == 0
    return found


def matrix(files: dict[str, Path], *options: str) -> CommandResult:
    return invoke("matrix", "--ledger", str(files["ledger"]), "--page", str(files["page"]), *options)


def test_the_page_around_the_matrix_stays(files: dict[str, Path]) -> None:
    page = files["page"].read_text(encoding="utf-8")
    assert page.startswith(f"Before.\n\n{BEGIN}\n| adapter |")
    assert page.endswith(f"- executed (CPU): with jax 0.10\n{END}\n\nAfter.\n")
    assert matrix(files).exit_code == 0
    assert files["page"].read_text(encoding="utf-8") == page


def test_the_evidence_of_every_device_stands_where_the_page_asks_for_it(files: dict[str, Path]) -> None:
    page = files["page"]
    with page.open("a", encoding="utf-8") as file:
        file.write("<!-- lsce-parity matrix devices: begin -->\n<!-- lsce-parity matrix devices: end -->\n")
    assert matrix(files, "--check").exit_code == 1
    assert matrix(files).exit_code == 0
    assert "| executed | cpu | `jax-fused` | float32, bfloat16 |" in page.read_text(encoding="utf-8")
    assert matrix(files, "--check").exit_code == 0


def test_check(files: dict[str, Path]) -> None:
    assert matrix(files, "--check").exit_code == 0
    page = files["page"].read_text(encoding="utf-8").replace("| not run | not run |", "| executed | not run |")
    files["page"].write_text(page, encoding="utf-8")
    result = matrix(files, "--check")
    assert result.exit_code == 1
    assert "run this without --check" in result.stderr
    assert files["page"].read_text(encoding="utf-8") == page


def test_add(files: dict[str, Path]) -> None:
    assert matrix(files, "--add", str(files["more"])).exit_code == 0
    assert ledger.read(files["ledger"]) == [
        session(*executed("jax-fused"), *executed("jax-fused", device="cuda"), jax="0.10")
    ]
    assert "| executed | executed | not run |" in files["page"].read_text(encoding="utf-8")
    assert matrix(files, "--check").exit_code == 0


@pytest.mark.parametrize(("broken", "message"), [
    ("ledger", "is no ledger"),
    ("more", "is no ledger"),
    ("page", "needs each of these lines once"),
])  # fmt: skip
@pytest.mark.parametrize("missing", [False, True])
def test_files_that_are_not_what_they_should_be(
    files: dict[str, Path], broken: str, message: str, missing: bool
) -> None:
    if missing:
        files[broken].unlink()
    else:
        files[broken].write_text("no", encoding="utf-8")
    before = {name: path.read_bytes() for name, path in files.items() if path.exists()}
    result = matrix(files, "--add", str(files["more"]))
    assert result.exit_code == 2
    assert ("No such file" if missing else message) in result.stderr
    assert {name: path.read_bytes() for name, path in files.items() if path.exists()} == before


def test_check_adds_nothing(files: dict[str, Path]) -> None:
    assert matrix(files, "--check", "--add", str(files["more"])).exit_code == 2


@pytest.mark.parametrize(
    "page", ["", BEGIN, END, END + BEGIN, BEGIN + END + END, BEGIN + BEGIN + END, END + BEGIN + END]
)
def test_comments_that_do_not_pair(page: str) -> None:
    with pytest.raises(ValueError, match="once, in this order"):
        replace_block(page, COMMAND, "text")


# --- What this repository claims ------------------------------------------------------------------------------------


def test_the_page_of_devices_says_what_the_ledger_says() -> None:
    claims = {"ledger": ROOT / "docs" / "ledger.json", "page": ROOT / "docs" / "devices.md"}
    result = matrix(claims, "--check")
    assert result.exit_code == 0, result.output
