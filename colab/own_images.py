# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own images
#
# Train a projecting autoencoder on pictures of your own product, texture or part, all *without
# defects*, and let it find defects in other pictures. No defect has to be marked or even known
# for the training. The method is that of
# [Rethinking Structural Anomaly Detection](https://arxiv.org/abs/2606.15280).
#
# Run the cells from top to bottom. As it is, the notebook uses a drawn example, a perforated sheet;
# choose `upload` or `folder` below for your own pictures. With the example and the settings below
# it takes about six minutes on two CPU cores; the first pictures come within half a minute.
#
# On Colab, put a clone of the repository beside this notebook as `pae_jax`, or name another place
# in the first cell. Elsewhere install it before.

# %%
# @title Settings
# @markdown **IMAGES**: `example`, or `upload` (pictures or a ZIP archive, on Colab), or `folder`.
IMAGES = "example"  # @param ["example", "upload", "folder"]
# @markdown **FOLDER**, for `folder`: a folder of normal pictures, all alike in kind and position.
# @markdown For metrics it needs the layout of MVTec AD: `train/good`, `test/good`, `test/DEFECT`
# @markdown and, if there are masks, `ground_truth/DEFECT/NAME_mask.png`. An archive may have the
# @markdown same layout.
FOLDER = ""  # @param {type: "string"}
# @markdown **SIZE**: pictures are resized to SIZE × SIZE pixels. A defect should still be a few
# @markdown pixels wide. Twice the size takes four times as long.
SIZE = 128  # @param [64, 128, 256] {type: "raw"}
# @markdown **STEPS**: more steps make *f* more exact; 2,500 are a good training at 256.
STEPS = 600  # @param {type: "integer"}
# @markdown **AUGMENTATION**: how a normal part may be turned in front of the camera.
AUGMENTATION = "none"  # @param ["none", "flips", "rotation", "flips+rotation"]

import csv
import html
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
from IPython.display import HTML, Image, display

from data_pipelines import procedural
from data_pipelines.folder import image_files
from pae_jax import config_file, evaluate, predict, train
from pae_jax.report import pictures
from pae_jax.report.table import format_table
from pae_jax.workdir import run, validation

# The tests of the repository set smaller numbers.
STEPS = int(os.environ.get("PAE_NOTEBOOK_STEPS", STEPS))
SIZE = int(os.environ.get("PAE_NOTEBOOK_SIZE", SIZE))

WORK = Path(tempfile.mkdtemp(prefix="pae_"))  # the folder of all files that are written
ON_COLAB = "google.colab" in sys.modules

# %% [markdown]
# ## 1. The pictures


# %%
def draw_example(folder):
    """Draws a perforated sheet in the layout of MVTec AD: normal images, defects, their masks."""
    items = [("train", item) for item in procedural.training_items("", "dots")]
    items += [("test", item) for item in procedural.test_items("", "dots")]
    for split, item in items:
        files = {folder / split / item.name: item.image}
        if item.mask is not None:
            name = f"{Path(item.name).with_suffix('')}_mask.png"
            files[folder / "ground_truth" / name] = item.mask
        for path, read in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(read())


def upload(folder):
    """Asks for files, and puts them into a folder; archives are extracted."""
    if not ON_COLAB:
        raise SystemExit("upload works on Colab only; choose folder, and name it in FOLDER")
    from google.colab import files  # type: ignore[import-not-found]

    folder.mkdir(parents=True)
    for name, content in files.upload().items():
        path = folder / Path(name).name
        path.write_bytes(content)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                archive.extractall(folder)
            path.unlink()


def in_layout(folder):
    """Returns a folder in the layout of MVTec AD with the pictures of `folder`."""
    for train_folder in (folder / "train", *sorted(folder.glob("*/train"))):
        if (train_folder / "good").is_dir():
            return train_folder.parent
    # Pictures without the layout are taken as normal ones, and there is no test.
    copies = WORK / "layout"
    for path in image_files(folder):
        copy = copies / "train" / "good" / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return copies


if IMAGES == "example":
    draw_example(WORK / "example")
    root = WORK / "example"
elif IMAGES == "upload":
    upload(WORK / "uploaded")
    root = in_layout(WORK / "uploaded")
else:
    root = in_layout(Path(FOLDER))

config = config_file.load(
    "folder",
    [
        f"--config.data.root={root}",
        f"--config.data.cache_dir={WORK / 'cache'}",
        f"--config.data.size={SIZE}",
        f"--config.data.texture_size={SIZE}",
        f"--config.data.augmentation={AUGMENTATION}",
        f"--config.train.steps={STEPS}",
        f"--config.train.validate_every={max(1, STEPS // 4)}",
        f"--config.train.panel_every={STEPS}",
        f"--config.train.checkpoint_every={STEPS}",
        "--config.train.tensorboard=False",
        "--config.eval.bootstrap_resamples=200",
    ],
)
data, textures = run.open_data(config)
print(f"{len(data.names)} images for training, {len(data.held_out_names)} held out, {SIZE}×{SIZE}")


def show_rows(rows, titles, width=8):
    """Shows rows of pictures (h, w, 3), uint8, with a title above each column."""
    size = (width, width * len(rows) / len(titles) + 0.3)
    _figure, axes = plt.subplots(
        len(rows), len(titles), figsize=size, layout="constrained", squeeze=False
    )
    for line, row in zip(axes, rows, strict=True):
        for ax, picture in zip(line, row, strict=True):
            ax.imshow(picture)
            ax.axis("off")
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=9)
    plt.show()


def in_colour(image):
    return np.broadcast_to(image, (*image.shape[:2], 3))


first = [in_colour(image) for image in data.images[:6]]
show_rows([first], [Path(name).name for name in data.names[:6]])

# %% [markdown]
# These are some of the normal pictures, as the network sees them. Is everything that should be
# inspected visible at this size, and is the part in the same place everywhere? If not, change the
# settings, or crop the pictures before.
#
# Next come the training's corruptions: soft blobs of other images, and shifted parts of the image
# itself. The network learns to remove them. They need not look like your defects.

# %%
batch = validation.fixed_examples(data.held_out, textures.held_out, config, at_most=4)[0]
rows = []
for parts in zip(batch.clean[:4], batch.corrupted[:4], batch.mask[:4], strict=True):
    rows.append([in_colour(pictures.to_uint8(np.asarray(part))) for part in parts])
show_rows(rows, ["normal image x", "corrupted image x̂", "mask M"], width=5)

# %% [markdown]
# ## 2. Training
#
# The bar shows the loss. If the runtime stops, run this cell again within the same session: the
# training continues where it was.

# %%
result = train.train_and_evaluate(config, WORK / "run")
print(f"{result.outcome} after {result.step} steps")
display(Image(sorted((WORK / "run/panels").glob("*.png"))[-1].read_bytes()))

# %% [markdown]
# Held-out normal images, from left to right: the image, the image with a corruption, its mask, the
# reconstruction by *f*, the anomaly map. In a good reconstruction the corruption is gone and
# everything else is unchanged. If normal detail is blurred, train longer.

# %% [markdown]
# ## 3. The report
#
# If there are test images, the next cell compares the maps with them: AUROC is 1 for a perfect
# order of the images (or pixels) and 0.5 for chance. The decisions use a threshold from held-out
# normal images. Without test images, continue with section 4.

# %%
if (root / "test").is_dir():
    evaluation = evaluate.evaluate(WORK / "run")
    print(format_table(evaluation.metrics | {"diagnostics": {}}))
    page = html.escape(evaluation.report.read_text())
    display(HTML(f'<div><iframe srcdoc="{page}" width="100%" height="700"></iframe></div>'))
else:
    print("no folder test: nothing to compare with")

# %% [markdown]
# ## 4. New images
#
# **NEW**: a folder of pictures, with or without defects, or `upload`. If it is empty, the test
# images are taken, and without them the training images, among which an outlier may be found.

# %%
# @title New images
NEW = ""  # @param {type: "string"}

if NEW == "upload":
    new = Path(tempfile.mkdtemp(dir=WORK)) / "new"
    upload(new)
elif NEW:
    new = Path(NEW)
else:
    new = root / ("test" if (root / "test").is_dir() else "train")

out = Path(tempfile.mkdtemp(prefix="predicted_", dir=WORK))
with predict.predict(WORK / "run", new, out).open() as table:
    rows = sorted(csv.DictReader(table), key=lambda row: -float(row["score_sum"]))
defective = sum(int(row["defective"]) for row in rows)
print(f"{defective} of {len(rows)} images are called defective; the highest scores:")
for row in rows[:8]:
    print(f"{float(row['score_sum']):10.1f}  {row['name']}")


def read(path):
    return np.asarray(PIL.Image.open(path).convert("RGB").resize((SIZE, SIZE)))


# Three images with the highest scores, one from the middle, and the one with the lowest.
shown = [rows[i] for i in sorted({0, 1, 2, len(rows) // 2, len(rows) - 1}) if i < len(rows)]
columns = [
    [read(new / row["name"]) for row in shown],
    [read(out / f"heatmaps/{row['name']}.png") for row in shown],
    [read(out / f"masks/{row['name']}.png") for row in shown],
]
titles = [f"score {float(row['score_sum']):.1f}" for row in shown]
show_rows(columns, titles, width=9)

# %% [markdown]
# Above each image its score; below it the heat map, and the pixels that exceed the threshold. All
# heat maps share one scale. Are the bright places those that you would have marked?
#
# - **Everything is anomalous**: the new images differ from those of the training, for example in
#   light or position; or the training was too short.
# - **A defect stays dark**: it may be too small at this size, or it looks like something that
#   occurs in normal images.
#
# `docs/troubleshooting.md` has more.

# %% [markdown]
# ## 5. Download
#
# One archive with the trained model, the report, the scores and the pictures of section 4. With the
# model, `pae predict --workdir=run --images=FOLDER --out=RESULTS` judges images on any computer.

# %%
result_folder = WORK / "result"
shutil.copytree(WORK / "run", result_folder / "run", dirs_exist_ok=True)
shutil.copytree(out, result_folder / "predicted", dirs_exist_ok=True)
archive = shutil.make_archive(str(WORK / "pae_result"), "zip", result_folder)
print(f"{archive}, {Path(archive).stat().st_size / 1e6:.1f} MB")
if ON_COLAB:
    from google.colab import files  # type: ignore[import-not-found]

    files.download(archive)
