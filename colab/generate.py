"""Generates the notebooks from their scripts: python colab/generate.py

Each colab/NAME.py is a notebook as text (jupytext's percent format); NAME.ipynb is committed
beside it, without outputs, for Colab and for reading.
"""

from pathlib import Path
from typing import Any

import jupytext

from pae_jax.workdir.files import write_atomically

HERE = Path(__file__).parent
SOURCES = sorted(path for path in HERE.glob("*.py") if path.name != Path(__file__).name)


def notebook(source: Path) -> Any:
    """Returns a script in percent format as a notebook, with the same cell ids every time."""
    result = jupytext.read(source, fmt="py:percent")
    # Removed because it names the version of jupytext.
    result.metadata.pop("jupytext", None)
    for number, cell in enumerate(result.cells):
        cell["id"] = f"cell-{number}"
    return result


def main() -> None:
    """Writes NAME.ipynb for every script."""
    for source in SOURCES:
        target = source.with_suffix(".ipynb")
        write_atomically(target, jupytext.writes(notebook(source), fmt="ipynb"))
        print(target)


if __name__ == "__main__":
    main()
