"""`pae pack`: a trained model as a small folder, which other verbs take as a workdir.

DIR/config.json         the configuration of the run
DIR/parameters.npz      the parameters for evaluation (workdir/parameters.py)
DIR/data.json           the record of the training split
DIR/foreground.npz      the network that suppresses the background, if the run has one
DIR/thresholds.json     scores of the held-out images, from which thresholds are chosen
DIR/calibration/        with eval.calibration: the statistics by which maps are standardised
DIR/eval/metrics.json   the metrics of the run's evaluation, if it is one of these parameters
DIR/provenance.json     the packages and the machine that packed it, the configuration, the step
DIR/README.md           the model card

Checkpoints, optimizer state, logs and pictures stay behind. No file holds code or a pickle.
"""

import contextlib
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.errors import BadInput, CannotWrite, printable
from pae_jax.config_schema import SCHEMA
from pae_jax.deployment import model_card
from pae_jax.workdir import (
    calibration,
    files,
    parameters,
    provenance,
    record,
    suppression,
    thresholds,
    trained_model,
)
from pae_jax.workdir.changes import PLACES
from pae_jax.workdir.paths import AnyPath, to_workdir

_logger = logging.getLogger(__name__)

METRICS = "eval/metrics.json"


def pack(
    workdir: str | os.PathLike[str], out: str | os.PathLike[str], *, overrides: Sequence[str] = ()
) -> AnyPath:
    """Writes the folder of a trained model.

    Args:
      workdir: the folder of a training run, local or gs://.
      out: a folder that does not exist yet or is empty; it appears at once, when it is complete.
      overrides: places of the data, --config.data.root=DIR, for thresholds that are not stored.

    Returns:
      The path of the folder.

    Raises:
      BadInput: one line that names the file, folder or key.
      CannotWrite: no space or no permission.
    """
    workdir, out = to_workdir(workdir), to_workdir(out)
    if out.is_file():
        raise BadInput(f"{out}: a file; results are never overwritten")
    files.check_empty(out)
    for word in overrides:
        if word.removeprefix("--config.").partition("=")[0] not in PLACES:
            raise BadInput(
                f"{word}: `pae pack` keeps the settings of the run; only the places of the data "
                f"can be named: {', '.join(f'--config.{key}' for key in PLACES)}"
            )
    model = trained_model.load(workdir, overrides)
    key = model.params, model.step, model.config.eval
    files.check_writable(out.parent)
    metrics = _read_metrics(workdir, model)
    with _appearing(out) as folder:
        files.write_json(folder / "config.json", {"schema": SCHEMA, **model.config.to_dict()})
        data_record = record.read_data_record(workdir)
        files.write_json(folder / "data.json", data_record)
        size = parameters.write(folder, model.params, model.step)
        if model.foreground:
            suppression.write(folder, model.foreground)
        held_out = workdir / thresholds.NAME
        if thresholds.read(workdir, *key) is not None:
            files.write_json(folder / thresholds.NAME, files.read_json(held_out))
        # Computed from the training images and written to the folder, if the run has none.
        chosen = trained_model.thresholds(
            folder, model, lambda: trained_model.open_split(workdir, model.config)
        )
        if model.calibration is not None:
            calibration.write(folder, *key, model.calibration, images=chosen.images)
        if metrics is not None:
            files.write_json(folder / METRICS, metrics)
        origin = provenance.describe(model.config, step=model.step)
        files.write_json(folder / "provenance.json", origin)
        try:
            card = model_card.render(model, data_record, chosen, metrics, origin)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if metrics is None:
                raise
            raise _damaged(workdir / METRICS, error) from error
        files.write_atomically(folder / "README.md", card)
        _logger.info("%s", printable(f"{out}: parameters of {size / 1e6:.1f} MB"))
    return out


def _read_metrics(workdir: AnyPath, model: trained_model.Model) -> dict[str, Any] | None:
    """Returns the content of W/eval/metrics.json, or None if it is not of this model."""
    path = workdir / METRICS
    if not path.exists():
        _warn(f"{path}: not found; the model card has no metrics until `pae evaluate` has run")
        return None
    metrics = files.read_json(path)
    try:
        origin = metrics["provenance"]
        own = origin["step"], origin["config"]["eval"]
    except (KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    if own != (model.step, model.config.to_dict()["eval"]):
        _warn(f"{path}: of another step or other settings than the model; the card has no metrics")
        return None
    return metrics


def _damaged(path: AnyPath, error: Exception) -> BadInput:
    return BadInput(f"{path}: damaged; evaluate again ({error!r})")


def _warn(line: str) -> None:
    _logger.warning("%s", printable(line))


@contextlib.contextmanager
def _appearing(out: AnyPath) -> Iterator[AnyPath]:
    """Yields a folder that becomes `out` when the context ends without an error.

    In a bucket nothing can be renamed, so that files are written to their places, and an object
    says meanwhile that they are incomplete.

    Raises:
      CannotWrite: the folder cannot be made or renamed.
    """
    if not isinstance(out, Path):
        with files.incomplete(out):
            yield out
        return
    folder = out.absolute().with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        folder.mkdir()
    except OSError as error:
        raise CannotWrite(out, error) from error
    try:
        yield folder
        try:
            # It replaces an empty folder.
            os.replace(folder, out)
        except OSError as error:
            raise CannotWrite(out, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
