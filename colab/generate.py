"""Generates the notebooks from their scripts: python colab/generate.py

Each script is a notebook as text (jupytext's percent format); its .ipynb is committed beside it,
without outputs, for Colab and for reading. What all notebooks share is added here: a badge below
the title, the setup cell (setup_cell.py) after the first cell, and the wish for an accelerator.
"""

from pathlib import Path
from typing import Any

import jupytext
import nbformat

from pae_jax.workdir.files import write_atomically

HERE = Path(__file__).parent
SETUP = HERE / "setup_cell.py"
SOURCES = sorted(HERE / f"{name}.py" for name in ("ablation", "own_images", "projection"))
# OWNER/NAME of the repository on GitHub, as soon as it has such a place. Until then the badge opens
# Colab's dialog, in which a notebook is chosen.
REPOSITORY = ""
BADGE = "[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})"


def notebook(source: Path) -> Any:
    """Returns a script in percent format as a notebook, with the same cell ids every time."""
    result = jupytext.read(source, fmt="py:percent")
    # Removed because it names the version of jupytext.
    result.metadata.pop("jupytext", None)
    # Colab offers a runtime of this kind when the notebook is opened.
    result.metadata["accelerator"] = "GPU"
    result.metadata["colab"] = {"gpuType": "T4", "provenance": [], "toc_visible": True}
    link = "https://colab.research.google.com/"
    if REPOSITORY:
        link += f"github/{REPOSITORY}/blob/main/colab/{source.stem}.ipynb"
    title, _, text = result.cells[0].source.partition("\n")
    result.cells[0].source = f"{title}\n\n{BADGE.format(link=link)}\n{text}"
    setup = nbformat.v4.new_code_cell(SETUP.read_text().strip(), metadata={"cellView": "form"})
    result.cells.insert(1, setup)
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
