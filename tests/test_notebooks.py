"""The notebooks run from top to bottom on a CPU, as they are."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def run(notebook, folder, **replacements):
    """Execute a notebook in a folder, with parts of its code replaced; return what its cells print."""
    for cell in notebook.cells:
        for old, new in replacements.items():
            cell.source = cell.source.replace(old, new)
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(folder)}}).execute()
    return [
        "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_files_are_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.execution_count is None
            assert not cell.outputs


@pytest.mark.slow
def test_your_device(tmp_path):
    (notebook,) = (nbformat.read(path, as_version=4) for path in NOTEBOOKS if path.stem == "your_device")
    _, _, device, kit, said, archive = run(notebook, tmp_path, **{'SOURCE = ".."': f"SOURCE = {str(ROOT)!r}"})
    assert device == "JAX finds: cpu\n"
    assert "\nAGREE on cpu: " in kit
    assert said.startswith("AGREE on cpu: ")
    assert "jax: the arithmetic fits cpu, " in said
    assert "\n  lsce linear, recompute " in said
    assert archive.startswith("kit.zip: ")
    assert (tmp_path / "kit.zip").is_file()
