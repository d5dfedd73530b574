# @title Setup { display-mode: "form" }
# @markdown Installs pae_jax where it is missing, from a folder with a clone of the repository, a
# @markdown git address (`git+https://…`) or a wheel. The runtime's own JAX stays as it is.
SOURCE = "./pae_jax"  # @param {type: "string"}

import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
import tempfile

spec = importlib.util.find_spec("pae_jax")
# A clone beside the notebook is found as well, as a folder without an __init__.py: no origin.
if spec is None or spec.origin is None:
    # JAX fits the accelerator and its driver, and numpy may be in use: pip must not replace them.
    kept = ("jax", "libtpu", "flax", "orbax", "numpy")
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    with tempfile.NamedTemporaryFile("w", suffix=".txt", delete=False) as constraints:
        lines = [f"{n}=={v}\n" for n, v in installed.items() if n.startswith(kept)]
        constraints.writelines(lines)
    install = [sys.executable, "-m", "pip", "install", "-q", "-c", constraints.name]
    install += [SOURCE, "scikit-learn"]
    print("installing, about a minute")
    done = subprocess.run(install, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}\npip could not install {SOURCE!r}")
    importlib.invalidate_caches()

import jax

import pae_jax

device = jax.devices()[0]
print(f"pae_jax {pae_jax.__version__}, jax {jax.__version__}, Python {platform.python_version()}")
print(f"devices: {jax.device_count()} × {device.device_kind} ({device.platform})")
if device.platform == "cpu":
    print(
        "This runtime has no accelerator, so training takes several times as long. In Colab choose "
        "a GPU or TPU under Runtime > Change runtime type, then run this cell again."
    )
