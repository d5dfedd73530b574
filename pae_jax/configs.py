"""The shipped config files as a package: `from pae_jax.configs import folder`.

A checkout has them in `configs/` beside this package; an installation has them inside it.
"""

from pathlib import Path

_PACKAGE = Path(__file__).parent
_PLACES = (_PACKAGE / "shipped_configs", _PACKAGE.parent / "configs")

DIRECTORY = next((place for place in _PLACES if place.is_dir()), _PLACES[0])

# A module with a `__path__` is a package: its submodules are the files of that directory.
__path__ = [str(DIRECTORY)]
