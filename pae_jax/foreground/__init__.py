"""Foreground segmentation (§4): a small U-Net, trained apart from the detection task.

verb      `pae foreground`: the workdir F and what is written there
labels    masks without a user: Otsu's threshold against the colour of the border
training  the loss and the loop
sheet     the pictures to look at before the network is trusted

`workdir.suppression` applies the network to the images of a run.
"""

from pae_jax.foreground.verb import Outcome, summary, train_foreground

__all__ = ["Outcome", "summary", "train_foreground"]
