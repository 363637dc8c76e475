"""Manners of the command line: help, completion, messages, widths, pipes, and control characters in what it prints."""

import inspect
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.text import Text
from typer.testing import CliRunner
from typer.testing import Result as CommandResult

from parity_tests import __main__ as command_line
from parity_tests.__main__ import PANELS, app
from parity_tests.commands.help_texts import split_examples
from parity_tests.commands.terminal import FittingTable, PlainConsole, may_lose_its_reader
from parity_tests.meta.running import invoke
from parity_tests.report import page as page_module
from parity_tests.texts import nearest, one_line, visible

FUNCTIONS = {each.__name__.replace("_", "-"): each for commands in PANELS.values() for each in commands}
COMMANDS = list(FUNCTIONS)
WIDTHS = (40, 80, 160)
# Every command, with arguments that make it quick.
QUICK: dict[str, tuple[str, ...]] = {
    "adapters": (),
    "compare": ("mutant:stale_lse", "oracle"),
    "devices": (),
    "fingerprint": ("--framework", "torch"),
    "hunt": ("--adapter", "numpy", "--examples", "2", "--dtype", "float32"),
    "kit": ("kit", "--adapter", "numpy", "--case", "ties", "--dtype", "float32", "--no-benchmarks", "--force"),
    "layers": ("torch:models:make", "torch:models:make"),
    "matrix": ("--ledger", "ledger.json", "--page", "page.md"),
    "peer-tests": (),
    "power": ("--fault", "bfloat16_l*", "--dtype", "float32"),
    "record": ("bundle", "--adapter", "numpy", "--case", "ties", "--dtype", "float32", "--force"),
    "replay": ("recorded", "--adapter", "numpy"),
    "run": ("--adapter", "numpy", "--adapter", "mutant:linear_strided_rows", "--case", "ties", "--case", "linear_sum"),
    "self-check": ("torch:lsce_torch:label_smoothed_cross_entropy", "--dtype", "float32"),
    "trajectory": ("jax:steps:Steps", "torch:steps:Steps", "--steps", "2"),
}
SLOW = ("adapters", "compare", "fingerprint", "hunt", "kit", "peer-tests", "power", "self-check")  # seconds each
SOME = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in QUICK]
WITH_PAGES = ("compare", "hunt", "layers", "power", "replay", "run", "self-check", "trajectory")
STEPS = """
import numpy as np

class Steps:
    def __init__(self):
        self.weights = np.ones(3, np.float32)

    def state(self):
        return {"a long name of a tensor of the first layer": self.weights}

    def load(self, state):
        self.weights = state["a long name of a tensor of the first layer"]

    def step(self, number):
        self.weights = self.weights * np.float32(0.5)
        return float(self.weights.sum())
"""
MODELS = """
import torch

def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh()), torch.ones(2, 4)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands of `QUICK` read."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "steps.py").write_text(STEPS)
    (folder / "models.py").write_text(MODELS)
    (folder / "page.md").write_text("<!-- lsce-parity matrix: begin -->\n<!-- lsce-parity matrix: end -->\n")
    evidence = {"adapter": "jax-fused", "device": "cpu", "dtype": "float32", "kind": "executed", "detail": ""}
    (folder / "ledger.json").write_text(json.dumps({"sessions": [{"versions": {}, "evidence": [evidence]}]}))
    recorded = invoke("record", str(folder / "recorded"), "--adapter", "numpy", "--case", "ties", "--dtype", "float32")
    assert recorded.exit_code == 0, recorded.output
    return folder


@pytest.fixture
def there(files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(files)
    monkeypatch.syspath_prepend(str(files))
    return files


def at_width(width: int, *arguments: str, **environment: str) -> CommandResult:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": str(width), **environment})


def run_main(*arguments: str, code: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `lsce-parity` in a new process, after some code."""
    start = f"import sys\nsys.argv = ['lsce-parity', *{arguments!r}]\nfrom parity_tests import __main__\n{code}\n"
    command = [sys.executable, "-c", f"{start}__main__.main()"]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


# Help.


def test_every_command_is_in_one_of_two_groups() -> None:
    assert sorted(COMMANDS) == sorted(QUICK)
    shown = invoke("--help").output
    groups = re.split(r"^(For your losses|About this library):$", shown, flags=re.MULTILINE)
    assert [groups[1], groups[3]] == list(PANELS)
    for commands, text in zip(PANELS.values(), groups[2::2], strict=True):
        names = [command.__name__.replace("_", "-") for command in commands]
        assert re.findall(r"^  ([a-z-]+)  ", text, re.MULTILINE) == names
    assert "..." not in shown.partition("For your losses")[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_can_be_copied(name: str) -> None:
    function = next(
        each for commands in PANELS.values() for each in commands if each.__name__.replace("_", "-") == name
    )
    _, heading, examples = split_examples(re.sub(r"^    ", "", function.__doc__ or "", flags=re.MULTILINE))
    assert examples, "no example"
    shown = invoke(name, "--help").output.splitlines()
    assert heading in shown
    for example in examples:
        assert example.startswith(f"lsce-parity {name}")
        assert f"  {example}" in shown
    others = [line for line in shown if line.strip() not in examples]
    assert max(map(len, others)) <= 80


def test_examples_have_known_options() -> None:
    """Each is parsed as it stands; what it names need not exist."""
    for name in COMMANDS:
        known = set(re.findall(r"--[a-z-]+", at_width(160, name, "--help").output.split("Options:")[1]))
        for example in split_examples(inspect.getdoc(FUNCTIONS[name]) or "")[2]:
            assert set(re.findall(r"--[a-z-]+", example)) <= known | {"--no-benchmarks"}, example


def test_version() -> None:
    assert re.fullmatch(r"lsce \d+\.\d+\S*\n", invoke("--version").output)


def test_completion() -> None:
    variables = {"_LSCE_PARITY_COMPLETE": "complete_bash", "COMP_WORDS": "lsce-parity traj", "COMP_CWORD": "1"}
    assert run_main(env=os.environ | variables).stdout.split() == ["trajectory"]
    options = variables | {"COMP_WORDS": "lsce-parity power --fa", "COMP_CWORD": "2"}
    assert run_main(env=os.environ | options).stdout.split() == ["--fault"]
    assert "--install-completion" in invoke("--help").output


# Internal errors.


@pytest.mark.parametrize("arguments", [("--traceback", "adapters"), ("adapters", "--traceback"), ("adapters",)])
def test_an_internal_error(arguments: tuple[str, ...]) -> None:
    code = """
def broken(name, device):
    raise RuntimeError("first\\nsecond \\x1b[31m")
from parity_tests.commands import run
run.make_adapter = broken"""
    done = run_main(*arguments, code=code)
    assert done.returncode == 2
    if command_line.TRACEBACK in arguments:
        assert done.stderr.startswith("Traceback (most recent call last)")
        return
    assert done.stderr == (
        "internal error: RuntimeError: first\\nsecond \\x1b[31m; run again with --traceback, and report it\n"
    )


# Readers that leave.


@pytest.mark.parametrize(("arguments", "code"), [
    (("--help",), 0), (("devices",), 0), (("run", *QUICK["run"], "--dtype", "float32"), 1),
])  # fmt: skip
@pytest.mark.parametrize("also_errors", [False, True])
def test_head_is_no_error(arguments: tuple[str, ...], code: int, also_errors: bool) -> None:
    """As in `lsce-parity ... | head`, with a head that has left before the first line. The verdict is not lost."""
    command = [sys.executable, "-m", "parity_tests", *arguments]
    errors = subprocess.STDOUT if also_errors else subprocess.PIPE
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        error = "" if also_errors else process.communicate()[1]
        assert process.wait() == code
    assert "Traceback" not in error
    assert "Broken pipe" not in error
    assert "Exception ignored" not in error


def test_a_stream_goes_on_without_its_reader() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = may_lose_its_reader(io.TextIOWrapper(os.fdopen(writer, "wb"), encoding="ascii"))
    for _ in range(3):
        assert stream.write("line\n" * 100_000) == 500_000
    stream.write("é\n")
    stream.close()


# Widths.


@pytest.mark.parametrize("name", SOME)
def test_nothing_is_cut_at_any_width(name: str, there: Path) -> None:
    cut = ("…", "...")
    numbers = {}
    for width in WIDTHS:
        # On a terminal: elsewhere the lines of a verdict stay whole.
        done = at_width(width, name, *QUICK[name], FORCE_COLOR="1", TERM="xterm")
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        shown = Text.from_ansi(done.stdout).plain
        for line in shown.splitlines():
            # Paths and reasons can be copied in one piece.
            is_whole = line.startswith(("wrote ", "AGREE on ")) or (": " in line and "/" in line)
            assert cell_len(line.rstrip()) <= width or is_whole, (width, line)
            assert not line.endswith(cut), (width, line)
        numbers[width] = sorted(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", shown))
    if name not in ("hunt", "fingerprint", "kit"):  # each of which measures anew
        assert numbers[40] == numbers[80] == numbers[160]


@pytest.mark.parametrize("width", range(20, 130, 7))
def test_a_table_shows_every_cell_at_every_width(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    rows = [
        ["jax-linear-reference-cuda-iree-vulkan", "bfloat16", "3", "", "1.25", "an element of a case"],
        ["é" * 9] * 6,
    ]
    table = FittingTable.of(["adapter", "dtype", ">cases", ">failed", ">share", "~in case"], rows, titles=2)
    console = PlainConsole()
    with console.capture() as capture:
        console.print(table)
    text = capture.get()
    assert all(cell_len(line) <= width for line in text.splitlines())
    together = re.sub(r"\s", "", text)
    for cell in (cell for row in rows for cell in row):
        for word in cell.split():
            assert word in together
    assert "…" not in text


def test_columns_without_an_entry_are_left_out_before_the_table_is(monkeypatch: pytest.MonkeyPatch) -> None:
    console = PlainConsole()

    def shown(width: int) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        with console.capture() as capture:
            console.print(FittingTable.of(["adapter", ">failed"], [["jax", ""], ["torch", ""]]))
        return capture.get()

    assert "failed" in shown(40)
    assert "adapter" in shown(12)
    assert "failed" not in shown(12)
    assert shown(4).split() == ["jax", "torc", "h"]


# Names that are not known.


@pytest.mark.parametrize(("arguments", "message"), [
    (("run", "--case", "tie"), "no case is called tie; did you mean ties?"),
    (("run", "--case", "ties", "--case", "nothing_like_it"), "is called nothing_like_it; the cases are "),
    (("run", "--adapter", "jax-fusd"), "there is no adapter 'jax-fusd'; did you mean jax-fused?"),
    (("replay", "recorded", "--adapter", "jax-fusd*"), "there is no adapter 'jax-fusd*'; did you mean jax-fused?"),
    (("kit", "new", "--adapter", "jax-fusd"), "there is no adapter 'jax-fusd'; did you mean jax-fused"),
    (("run", "--adapter", "mutant:stale_lze"), "there is no mutant 'stale_lze'; did you mean stale_lse?"),
    (("run", "--dtype", "bflat16"), "there is no dtype 'bflat16' here; did you mean bfloat16 or float16 or float64?"),
    (("run", "--device", "gpu"), "there is no device 'gpu' here; did you mean cuda?"),
    (("run", "--device", "cdua"), "there is no device 'cdua' here; did you mean cuda?"),
    (("run", "--device-model", "tpu_v5e"), "there is no device 'tpu_v5e'; did you mean tpu-v5e"),
    (("run", "--device-model", "h100"), "there is no device 'h100'; did you mean gpu-h100?"),
    (("power", "--fault", "stale_ls"), "no fault is called stale_ls; did you mean stale_lse?"),
    (("power", "--fault", "nothing"), "no fault is called nothing; the faults are zero_gradient, "),
    (("fingerprint", "--framework", "torhc"), "there is no framework 'torhc' here; did you mean torch?"),
    (("compare", "oracel", "oracle"), "'oracel'; did you mean oracle? (a loss of your own is named"),
    (("compare", "oracle", "oracle", "--convention", "unifrom"), "; did you mean uniform?"),
    (("compare", "oracle", "oracle", "--convention", "fairseq"), "Did you mean 'non_target'?\n"),
    (("compare", "torch:torch.nn:CrossEntropyLos", "oracle"), "has no CrossEntropyLos; did you mean CrossEntropyLoss"),
    (("trajectory", "torch:steps:Step", "oracle"), "steps has no Step; did you mean Steps?"),
    (("compar",), "Did you mean 'compare'?"),
    (("run", "--adaptr", "numpy"), "--adapter"),
])  # fmt: skip
@pytest.mark.usefixtures("there")
def test_what_was_meant(arguments: tuple[str, ...], message: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert not Path("new").exists()


def test_nearest() -> None:
    assert nearest("zzz", ["ties", "one_row"]) == []
    assert nearest("TIE*", ["one_row", "Ties"]) == ["Ties"]
    assert nearest("", ["one_row"]) == []


# Messages that speak of the right thing, in one line.


@pytest.mark.parametrize(("arguments", "message"), [
    (("run", "--case", ""), "no case is called ''; "),
    (("run", "--json", "page.md/out.json"), "is a file, so page.md/out.json cannot be in it"),
    (("run", "--report", "page.md/out"), "is a file, so page.md/out cannot be in it"),
    (("record", "page.md/new"), "is a file, so page.md/new cannot be in it"),
    (("kit", "page.md/new"), "is a file, so page.md/new cannot be in it"),
    (("record", "new", "--adapter", "torch-linear-chunked", "--case", "ties"), "no adapter can handle these cases"),
    (("replay", "recorded", "--rtol", "0.1"), "--rtol and --atol are for a recorded loss of yours"),
    (("replay", "page.md"), "no bundle can be read in page.md: manifest.json: Not a directory"),
    (("hunt", "--save", ".", "--examples", "1"), ". is not empty and holds no bundle; name another folder"),
    (("hunt", "--seconds", "nan", "--adapter", "numpy"), "seconds must be above 0 and finite, not nan"),
    (("peer-tests", "--markdown", "nowhere.md"), "nowhere.md cannot be updated: No such file or directory\n"),
    (("devices", "--markdown", "steps.py"), "steps.py cannot be updated: the page needs each of these lines once"),
    (("matrix", "--ledger", "nowhere.json", "--page", "page.md"), "run: nowhere.json: No such file or directory\n"),
    (("matrix", "--ledger", ".", "--page", "page.md"), "cannot run: .: Is a directory\n"),
    (("matrix", "--ledger", "ledger.json", "--page", "steps.py"), "steps.py cannot be updated: the page needs"),
    (("matrix", "--ledger", "ledger.json", "--page", "no.md"), "no.md cannot be updated: No such file or dir"),
    (("matrix", "--ledger", "steps.py", "--page", "page.md"), "steps.py is no ledger as --parity-ledger writes it: "),
    (("matrix", "--ledger", "ledger.json", "--page", "page.md", "--add", "recorded"), "That is a bundle"),
    (("matrix", "--ledger", "ledger.json", "--page", "page.md", "--add", "."), "there is no kit: kit.json: No such "),
])  # fmt: skip
def test_what_is_wrong(arguments: tuple[str, ...], message: str, there: Path) -> None:
    before = sorted(there.iterdir())
    done = invoke(*arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr, done.stderr
    assert sorted(there.iterdir()) == before


# Files of every command.


@pytest.mark.parametrize("name", SOME)
def test_every_command_writes_json(name: str, there: Path, tmp_path: Path) -> None:
    file, page = tmp_path / "found.json", tmp_path / "page"
    pages = ("--report", str(page)) if name in WITH_PAGES else ()
    done = invoke(name, *QUICK[name], "--json", str(file), *pages)
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["command"] == name
    assert len(content) > 1
    if pages:
        word = re.search(r"^(NO VERDICT|ALL REJECTED|DISAGREE|AGREE)\b", done.stdout, re.MULTILINE)
        assert word is not None, done.stdout
        assert f"<strong>{word[0]}</strong>" in (page / "index.html").read_text(encoding="utf-8")


def test_power_tries_the_faults_of_a_pattern_alone(tmp_path: Path) -> None:
    file, page = tmp_path / "power.json", tmp_path / "page"
    done = invoke("power", "--fault", "stale_lse", "--dtype", "bfloat16", "--json", str(file), "--report", str(page))
    assert done.exit_code == 0, done.output
    content = json.loads(file.read_text(encoding="utf-8"))
    assert {each["fault"] for each in content["trials"]} == {"stale_lse"}
    assert {each["assertion"] for each in content["trials"]} == {"oracle", "each other", "trajectory"}
    assert {fault for faults in content["self_checks"].values() for fault in faults} == {"stale_lse"}
    shown = done.stdout + (page / "index.html").read_text(encoding="utf-8")
    assert "stale_lse" in shown
    assert "zero_gradient" not in shown
    linear = invoke("power", "--fault", "linear_strided_rows", "--dtype", "bfloat16")
    assert linear.stdout.endswith("ALL REJECTED: 1 fault at bfloat16\n")  # no training has such a layer


@pytest.mark.slow
def test_a_simulated_tpu_has_no_float64() -> None:
    assert "float64" not in invoke("power", "--fault", "stale_lse", "--device-model", "tpu-v5e").stdout


# Pages.


def test_a_page_counts_steps_as_the_terminal_does(there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong update shows in the weights at once, and in the loss, which is taken before it, one step later."""
    before = STEPS.replace(
        "    def step(self, number):", "    def step(self, number):\n        loss = self.weights.sum()"
    )
    before = before.replace("float(self.weights.sum())", "float(loss)")
    (there / "right.py").write_text(before)
    (there / "wrong.py").write_text(before.replace("float32(0.5)", "float32(0.5 if number != 2 else 0.4)"))
    drawn = []
    draw = page_module.draw_trajectory
    monkeypatch.setattr(page_module, "draw_trajectory", lambda *given: drawn.append(draw(*given)) or drawn[-1])
    done = invoke("trajectory", "jax:right:Steps", "torch:wrong:Steps", "--steps", "5", "--report", str(tmp_path))
    assert done.exit_code == 1, done.output
    steps = re.findall(r"part at step (\d+), a long name", done.stdout)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    banner = page.split('<div class="verdict')[1].split("</div>")[0]
    assert re.findall(r"part at step (\d+), a long name", banner) == steps == ["2", "2"]
    assert "step 3" not in banner
    legend = drawn[0].axes[0].get_legend()
    assert legend is not None
    assert "trainings part (step 2)" in [text.get_text() for text in legend.get_texts()]
    for mode in ("free-running", "teacher-forced"):
        table = page.split(f"<h2>Tensors, {mode}</h2>")[1].split("</table>")[0]
        assert re.findall(r'<span class="name">(.*?)</span>', table) == [
            "loss", "a long name of a tensor of the first layer",
        ]  # fmt: skip


# Text of others.

EVIL = "\x1b]0;owned\x07\x1b[31m\x9b2J\u202e\ud800"
EVIL_PATH = EVIL.replace("\ud800", "\udc80")  # as Python reads a byte of a path that is no UTF-8
LOSSES = f"""
def loss(logits, labels):
    raise ValueError({EVIL!r})
"""


def has_codes(text: str) -> bool:
    return bool(re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", text))


def test_exceptions_of_a_loss_do_not_reach_the_terminal(there: Path, tmp_path: Path) -> None:
    (there / "evil.py").write_text(LOSSES)
    file = tmp_path / "found.json"
    done = invoke("compare", "torch:evil:loss", "oracle", "--json", str(file), "--report", str(tmp_path / "page"))
    assert r"\x1b]0;owned\x1b[31m\x9b2J\u202e\ud800" in done.output  # Rich drops the bell
    assert not has_codes(done.output)
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert "<strong>NO VERDICT</strong>" in page
    assert r"\x1b]0;owned\x07\x1b[31m" in page
    assert not has_codes(page)
    assert not has_codes(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("arguments", [
    ("run", "--adapter", EVIL),
    ("run", "--case", EVIL),
    ("compare", f"torch:{EVIL}:loss", "oracle"),
    ("replay", EVIL_PATH),
    ("matrix", "--ledger", EVIL_PATH, "--page", "page.md"),
    ("record", "new", "--case", "x\nAGREE: all"),
])  # fmt: skip
@pytest.mark.usefixtures("there")
def test_names_do_not_reach_the_terminal(arguments: tuple[str, ...]) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert not has_codes(done.output)


def test_names_in_tables_stay_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    console = PlainConsole()
    with console.capture() as capture:
        console.print(FittingTable.of(["name"], [[f"a\nAGREE{EVIL}"]]))
        console.print(f"[red]{EVIL}[/red]")
    assert "a\\nAGREE" in capture.get()
    assert "[red]" in capture.get()
    assert not has_codes(capture.get().replace("\x1b[1m", ""))


def test_visible() -> None:
    assert visible("plain text,\n\ttab, é, 漢, ∞") == "plain text,\n\ttab, é, 漢, ∞"
    assert one_line("a\r\nb") == "a\\r\\nb"
    assert not has_codes(visible("".join(map(chr, range(0x100))) + EVIL))
