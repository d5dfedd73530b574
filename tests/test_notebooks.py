"""Each notebook equals the output of its script, and runs from start to end at a small size."""

import base64
import os
import sys
from pathlib import Path

import nbformat
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "colab"))

import generate

# The number of pictures that each notebook shows.
PICTURES = {"projection": 12}
PNG = b"\x89PNG\r\n\x1a\n"


def committed(name: str) -> nbformat.NotebookNode:
    notebook = nbformat.read(generate.HERE / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_every_script_is_known_here():
    assert {source.stem for source in generate.SOURCES} == set(PICTURES)
    assert {path.stem for path in generate.HERE.glob("*.ipynb")} == set(PICTURES)


@pytest.mark.parametrize("source", generate.SOURCES, ids=lambda source: source.stem)
def test_the_committed_notebook_is_what_its_script_generates(source):
    generated, stored = generate.notebook(source), committed(source.stem)

    def content(notebook):
        return [(cell.cell_type, cell.source) for cell in notebook.cells]

    assert content(stored) == content(generated)
    for cell in stored.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.parametrize("source", generate.SOURCES, ids=lambda source: source.stem)
def test_the_notebook_runs(source, tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")  # jupyter_core warns without it
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    class ThisPython(AsyncKernelManager):
        """Starts the Python that runs the tests, independent of the installed kernels."""

        @property
        def kernel_spec(self) -> KernelSpec:
            command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=command, display_name="tests", language="python")

    workdir, temporary = tmp_path / "work", tmp_path / "temporary"
    for directory in (workdir, temporary):
        directory.mkdir()
    environment = os.environ | {
        "PAE_NOTEBOOK_STEPS": "4",
        "PAE_NOTEBOOK_SIZE": "16",
        "TMPDIR": str(temporary),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        # The second training and evaluation compile mostly the same programs as the first.
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    notebook = committed(source.stem)
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_manager_class=ThisPython,
        resources={"metadata": {"path": str(workdir)}},
    )
    client.execute(env=environment)

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    shown = [output.data for output in outputs if output.output_type == "display_data"]
    pictures = [base64.b64decode(data["image/png"]) for data in shown if "image/png" in data]
    assert len(pictures) == PICTURES[source.stem]
    assert all(picture.startswith(PNG) for picture in pictures)
    assert not list(workdir.iterdir())  # all files go to a temporary folder
    assert list(temporary.glob("pae_*/plain/eval/metrics.json"))
    printed = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    assert "finished after 4 steps" in printed
    warned = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stderr")
    assert "Warning" not in warned
