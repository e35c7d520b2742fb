"""The notebook runs from its first cell to its last, and is committed with what the carried pair says."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from nlae_jax.cli import main

pytest_plugins = ["tests.tiny_run"]

NOTEBOOK = Path(__file__).parent.parent / "examples" / "explore.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.mark.slow
def test_it_runs_on_a_tiny_pair(notebook, tiny_run, tmp_path, monkeypatch):
    assert main(["export", "--workdir", str(tiny_run.workdir), "--out", str(tmp_path / "pair")]) == 0
    monkeypatch.setenv("NLAE_PAIR", str(tmp_path / "pair"))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("text/html" in output.get("data", {}) for output in outputs) >= 5


def test_it_is_committed_with_outputs(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    shown = [cell for cell in cells if cell.outputs]
    assert len(shown) >= len(cells) - 1
    assert not any("/home/" in str(output) or "/root/" in str(output) for cell in cells for output in cell.outputs)
