"""Keeps figures: as JSON in docs/figures, and as tables in the pages; and reads them again."""

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.pages import report
from parity_tests.evidence.pages import write_block
from parity_tests.json_files import check_form, read_json

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Which page has which block of tables.
PAGES = {
    "dense": "performance.md",
    "small": "performance.md",
    "tpu": "performance.md",
    "linear": "linear.md",
    "scaling": "linear.md",
    "smoothing": "smoothing.md",
    "tpu linear": "linear.md",
    "tpu kernel": "tpu.md",
    "device cuda": "gpu.md",
    "device tpu": "tpu.md",
    "all": "benchmarks.md",
}
# As far as it is read without asking.
PART_FORM = {"stage": str, "kind": str, "dtype": str, "shape": [int], "rows": [dict], "missing": dict, ...: None}
SESSION_FORM = {"name": str, "framework": str, "versions": {str: str}, "parts": [PART_FORM], ...: None}
RECORD_FORM = {"rounds": int, "quick": bool, "sessions": [SESSION_FORM], "absent": {str: str}, "imports": [dict]}


def keep(figures: report.Figures, json_file: Path | None, write: bool) -> Iterator[Path]:
    """Write the figures to a file, and to the docs if asked; yield each file that is written."""
    text = json.dumps(figures, indent=1) + "\n"
    record = report.record_path(DOCS / "figures", figures)
    yield from write_text(text, *([record] if write else []), json_file)
    if not write:
        return
    # From the files, as a test reads them; those of other machines stay on the page.
    of_command = sorted(record.parent.glob("*.json"))
    records = [json.loads(path.read_text(encoding="utf-8")) for path in of_command]
    for block, tables in report.page_blocks(records).items():
        write_block(DOCS / PAGES[block], f"benchmarks {block}", tables)
        yield DOCS / PAGES[block]


def write_text(text: str, *paths: Path | None) -> Iterator[Path]:
    """Write a text to files; yield each."""
    for path in filter(None, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        yield path


def read_record(path: Path) -> report.Figures:
    """Return a record of `all`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no such record.
    """
    figures = read_json(path)
    check_form(figures, {"machine": {"cpu": str, ...: None}, "all": RECORD_FORM})
    return dict(figures)
