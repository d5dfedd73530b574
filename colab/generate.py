"""Makes the notebooks from their scripts: python colab/generate.py

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
    """A script in percent format as a notebook; the same ids for its cells every time."""
    made = jupytext.read(source, fmt="py:percent")
    made.metadata.pop("jupytext", None)  # names the version that happened to be installed
    for number, cell in enumerate(made.cells):
        cell["id"] = f"cell-{number}"
    return made


def main() -> None:
    for source in SOURCES:
        target = source.with_suffix(".ipynb")
        write_atomically(target, jupytext.writes(notebook(source), fmt="ipynb"))
        print(target)


if __name__ == "__main__":
    main()
