"""Each notebook equals the output of its script, and runs from start to end at a small size."""

import base64
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import nbformat
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "colab"))

import generate

# The number of pictures that each notebook shows, and a file that it writes.
PICTURES = {"ablation": 3, "own_images": 4, "projection": 12}
WRITTEN = {
    "ablation": "sweep/sweep/results.md",
    "own_images": "pae_result.zip",
    "projection": "plain/eval/metrics.json",
}
PNG = b"\x89PNG\r\n\x1a\n"

for_every_notebook = pytest.mark.parametrize(
    "source", generate.SOURCES, ids=lambda source: source.stem
)


def committed(name: str) -> nbformat.NotebookNode:
    notebook = nbformat.read(generate.HERE / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_every_script_is_known_here():
    scripts = {path.stem for path in generate.HERE.glob("*.py")}
    assert scripts == {*PICTURES, "generate", "setup_cell"}
    assert {source.stem for source in generate.SOURCES} == set(PICTURES)
    assert {path.stem for path in generate.HERE.glob("*.ipynb")} == set(PICTURES)


@for_every_notebook
def test_the_committed_notebook_is_what_its_script_generates(source):
    generated, stored = generate.notebook(source), committed(source.stem)

    def content(notebook):
        return [(cell.cell_type, cell.source) for cell in notebook.cells]

    assert content(stored) == content(generated)
    assert stored.metadata == generated.metadata
    for cell in stored.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@for_every_notebook
def test_colab_finds_its_badge_accelerator_setup_and_forms(source):
    notebook = committed(source.stem)
    title, setup, settings = notebook.cells[:3]
    assert "colab-badge.svg" in title.source
    assert notebook.metadata["accelerator"] == "GPU"
    assert setup.source == generate.SETUP.read_text().strip()
    for name in ("STEPS", "SIZE"):
        lines = settings.source.splitlines()
        assert any(line.startswith(f"{name} = ") and "# @param" in line for line in lines)


class Pip:
    """Stands for pip: records its command and the constraints."""

    def __init__(self, returncode: int):
        self.returncode, self.commands, self.constraints = returncode, [], ""

    def __call__(self, command, **options):
        self.commands.append(command)
        self.constraints = Path(command[command.index("-c") + 1]).read_text()
        return subprocess.CompletedProcess(command, self.returncode, "", "no such folder")


@pytest.mark.parametrize("found", [None, importlib.util.spec_from_loader("pae_jax", None)])
def test_setup_installs_without_touching_jax(found, monkeypatch, capsys):
    """Both without a package and with a clone beside the notebook, which has no `origin`."""
    pip = Pip(returncode=0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(subprocess, "run", pip)
    exec(generate.SETUP.read_text(), {})
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "install"] and "./pae_jax" in command
    for name, version in (("jax", jax.__version__), ("numpy", np.__version__)):
        assert f"{name}=={version}\n" in pip.constraints
    assert "jaxlib==" in pip.constraints and "pae_jax==" not in pip.constraints
    assert f"jax {jax.__version__}" in capsys.readouterr().out


def test_setup_shows_what_pip_says_when_it_fails(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", Pip(returncode=1))
    with pytest.raises(SystemExit) as error:
        exec(generate.SETUP.read_text(), {})
    assert str(error.value) == "no such folder\npip could not install './pae_jax'"


def test_setup_installs_nothing_where_the_package_is(monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", None)
    exec(generate.SETUP.read_text(), {})
    printed = capsys.readouterr().out
    assert "devices: 8 × cpu (cpu)\nThis runtime has no accelerator" in printed


@for_every_notebook
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
        "PAE_NOTEBOOK_DIRECTIONS": "both",
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
    assert list(temporary.glob(f"pae_*/{WRITTEN[source.stem]}"))
    printed = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
    assert "This runtime has no accelerator" in printed
    assert "finished after 4 steps" in printed
    warned = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stderr")
    assert "Warning" not in warned
