"""How Python was started, and what JAX finds: restarts, JAX_PLATFORMS, other systems."""

import os
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import pytest

import runs
from data_pipelines.errors import BadInput
from pae_jax import main
from pae_jax.devices import process, surroundings

PROJECT = Path(__file__).parents[1]
PAE = str(Path(sysconfig.get_path("scripts"), "pae"))
# Says that it runs, then calls the command line as `pae` does.
SCRIPT = """
import runpy, sys
print("once", flush=True)
sys.argv = ["pae", "evaluate", "--workdir=nowhere"]
CALL
"""
CALLS = {
    "main": "from pae_jax import main; main.main()",
    "runpy": "runpy.run_module('pae_jax.main', run_name='__main__', alter_sys=True)",
}
linux = pytest.mark.skipif(sys.platform != "linux", reason="glibc's tunables")


@pytest.fixture
def restarts(monkeypatch):
    """The restarts that are asked for, on a machine with nothing but a CPU."""
    calls = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "execv", lambda *words: calls.append(words))
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv(process.TUNABLES, raising=False)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "pae_jax.main", "train", "--help"])
    return calls


def test_huge_pages_are_asked_for_once(restarts, monkeypatch):
    monkeypatch.setenv(process.TUNABLES, "")
    process.restart_with_huge_pages()  # does nothing, because the variable is set
    assert not restarts
    monkeypatch.delenv(process.TUNABLES)
    process.restart_with_huge_pages()
    process.restart_with_huge_pages()
    arguments = [sys.executable, "-m", "pae_jax.main", "train", "--help"]
    assert restarts == [(sys.executable, arguments)]
    assert os.environ[process.TUNABLES] == "glibc.malloc.hugetlb=1"


@pytest.mark.parametrize(
    ("words", "restart"),
    [
        (["-m", "pae_jax.main", "train"], True),
        (["-X", "dev", "-W", "error", "-Im", "pae_jax.main", "train"], True),
        (["-mpae_jax.main", "train"], True),
        (["-u", PAE, "train"], True),
        (["-m", "pdb", "-m", "pae_jax.main", "train"], False),
        (["-m", "pdb", PAE, "train"], False),
        (["-mcProfile", "-m", "pae_jax.main", "train"], False),
        (["-m", "ipykernel_launcher", "-f", "kernel.json"], False),
        (["/opt/debugpy/launcher", "5678", "--", "-m", "pae_jax.main", "train"], False),
        (["my_script.py"], False),
        (["my_script.py", "-m", "pae_jax.main"], False),
        (["-c", "from pae_jax import main; main.main()", PAE], False),
        (["-"], False),
        ([], False),
        (["-m"], False),
    ],
)
def test_only_pae_itself_is_restarted(words, restart, restarts, monkeypatch):
    same = surroundings._is_same_file
    monkeypatch.setattr(
        surroundings, "_is_same_file", lambda name, path: name == str(path) or same(name, path)
    )
    monkeypatch.setattr(sys, "orig_argv", ["python", *words])
    process.restart_with_huge_pages()
    assert bool(restarts) == restart


@pytest.mark.parametrize("name", ["inspect", "interactive"])
def test_an_interactive_python_is_not_restarted(name, restarts, monkeypatch):
    flags = {"inspect": 0, "interactive": 0} | {name: 1}
    monkeypatch.setattr(sys, "flags", types.SimpleNamespace(**flags))
    process.restart_with_huge_pages()
    assert not restarts


@pytest.mark.parametrize("name", ["gettrace", "getprofile"])
def test_a_debugger_keeps_its_hold(name, restarts, monkeypatch):
    monkeypatch.setattr(sys, name, lambda: print)
    process.restart_with_huge_pages()
    assert not restarts


def test_a_script_that_asks_for_it_is_restarted(restarts, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", __file__])
    process.restart_with_huge_pages()
    assert not restarts
    process.restart_with_huge_pages(__file__)
    assert restarts == [(sys.executable, [sys.executable, __file__])]


@linux
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("source", ["stdin", "file", "interactive"])
def test_the_users_program_runs_once(source, call, tmp_path):
    program = SCRIPT.replace("CALL", CALLS[call])
    path = tmp_path / "program.py"
    path.write_text(program)
    words = {"stdin": ["-"], "file": [str(path)], "interactive": ["-i", str(path)]}[source]
    environment = {k: v for k, v in os.environ.items() if k != process.TUNABLES}
    done = subprocess.run(
        [sys.executable, *words],
        input=program if source == "stdin" else "",
        env=environment | {"PYTHONPATH": str(PROJECT), "JAX_PLATFORMS": "cpu"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "once\n"
    assert "nowhere/config.json: not found" in done.stderr


@pytest.mark.parametrize(
    ("platforms", "cpu"), [("cpu", True), ("cpu,cuda", True), ("cuda,cpu", False), ("tpu", False)]
)
def test_the_environment_says_what_will_be_used(platforms, cpu, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert surroundings.expects_cpu() == cpu


@pytest.mark.parametrize(
    ("packages", "files", "cpu"),
    [
        ([], [], True),
        (["jax_plugins"], [], True),  # JAX for CUDA on a machine without a GPU
        ([], ["nvidia0"], True),  # JAX for the CPU on a machine with a GPU
        (["jax_plugins"], ["nvidia0"], False),
        (["libtpu"], ["accel0"], False),
    ],
)
def test_an_accelerator_needs_its_device_and_its_package(packages, files, cpu, monkeypatch):
    for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in packages or None)
    monkeypatch.setattr(
        Path, "glob", lambda self, pattern: [name for name in files if name[:4] == pattern[:4]]
    )
    assert surroundings.expects_cpu() == cpu


@pytest.mark.parametrize(
    ("platforms", "verb"),
    [("cuda", "evaluate"), ("tpu", "predict"), ("nonsense", "train"), ("rocm", "sweep")],
)
def test_a_platform_that_is_not_there_is_one_line(platforms, verb, tmp_path):
    flags = {
        "evaluate": [],
        "predict": ["--images=x", "--out=y"],
        "train": ["--config=smoke"],
        "sweep": ["--config=ablation:smoke"],
    }
    done = subprocess.run(
        [sys.executable, "-m", "pae_jax.main", verb, f"--workdir={tmp_path / 'w'}", *flags[verb]],
        env=runs.environment() | {"JAX_PLATFORMS": platforms, process.TUNABLES: ""},
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("pae ")]
    assert len(lines) == 1
    assert lines[0].startswith(f"pae {verb}: JAX_PLATFORMS={platforms}: JAX finds no such device")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "w").exists()


def test_devices_that_fail_without_the_variable(monkeypatch):
    def fail():
        raise RuntimeError("driver too old\nmore")

    monkeypatch.setattr("jax.devices", fail)
    with pytest.raises(BadInput, match=r"devices of this machine \(driver too old\); JAX_PLATF"):
        surroundings.check_devices()


def test_matplotlib_without_a_home(tmp_path, monkeypatch):
    monkeypatch.delenv("MPLCONFIGDIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    surroundings.use_cache_without_home(tmp_path / "cache")
    assert "MPLCONFIGDIR" not in os.environ
    monkeypatch.setenv("HOME", "/proc/nowhere")
    surroundings.use_cache_without_home(tmp_path / "cache")
    assert os.environ["MPLCONFIGDIR"] == str(tmp_path / "cache/matplotlib")


def test_windows_is_one_line_at_the_start(monkeypatch, capsys):
    monkeypatch.setattr(surroundings.sys, "platform", "win32")
    assert main.main(["configs"]) == 0
    note = capsys.readouterr().err
    assert note.count("\n") == 1
    assert note.startswith("pae: Windows is not tested: train, evaluate, predict and sweep are")
    monkeypatch.setattr(surroundings.sys, "platform", "linux")
    assert main.main(["configs"]) == 0
    assert capsys.readouterr().err == ""


def test_without_fcntl_the_package_is_imported():
    script = (
        "import sys; sys.modules['fcntl'] = None\n"
        "import data_pipelines.dataset, pae_jax.main, pae_jax.train, pae_jax.sweep\n"
        "import pae_jax.evaluate, pae_jax.predict"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
