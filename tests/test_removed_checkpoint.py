"""A kill while an old checkpoint was being removed: the next start removes the rest of it."""

import shutil

import runs
from pae_jax import train


def test_the_rest_of_a_removed_checkpoint_goes_at_the_next_start(trained, tmp_path):
    run = runs.clone(trained, tmp_path)
    checkpoints = run.workdir / "checkpoints"
    shutil.copytree(checkpoints / "20", checkpoints / "10")
    (checkpoints / "10" / "_CHECKPOINT_METADATA").unlink()
    result = train.train_and_evaluate(runs.load_config(run.root), run.workdir)
    assert (result.outcome, result.step) == (train.FINISHED, runs.STEPS)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["20", "30"]
    runs.assert_same_state(run.workdir, trained.workdir)
