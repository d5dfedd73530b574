"""The shipped config files as a package: `from pae_jax.configs import folder`.

In a checkout they are in `configs/` beside this package, in an installation inside it.
"""

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_CANDIDATES = (_PACKAGE / "shipped_configs", _PACKAGE.parent / "configs")

DIRECTORY = next((path for path in _CANDIDATES if path.is_dir()), _CANDIDATES[0])

# The submodules of this package are the files of that directory.
__path__ = [str(DIRECTORY)]
