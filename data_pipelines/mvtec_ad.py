"""TFDS builder of MVTec AD, from the extracted archive. `data_pipelines.prepare` runs it."""

import tensorflow_datasets as tfds

from data_pipelines import folder
from data_pipelines.items import Item
from data_pipelines.tfds_builder import OneClassBuilder

CATEGORIES = (
    "bottle",
    "cable",
    "capsule",
    "carpet",
    "grid",
    "hazelnut",
    "leather",
    "metal_nut",
    "pill",
    "screw",
    "tile",
    "toothbrush",
    "transistor",
    "wood",
    "zipper",
)


class MvtecAd(OneClassBuilder):
    """MVTec AD: ten objects and five textures of industrial inspection, with pixel masks."""

    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in CATEGORIES]  # noqa: RUF012
    MANUAL_DOWNLOAD_INSTRUCTIONS = """
    Register at the home page, download the archive and extract it. The manual directory holds
    CATEGORY/train/good, CATEGORY/test/{good,DEFECT} and CATEGORY/ground_truth/DEFECT.
    """
    HOMEPAGE = "https://www.mvtec.com/company/research/datasets/mvtec-ad"
    CITATION = """
    @article{bergmann2021mvtec,
      author = {Paul Bergmann and Kilian Batzner and Michael Fauser and David Sattlegger and
                Carsten Steger},
      title = {The {MVTec} Anomaly Detection Dataset: A Comprehensive Real-World Dataset for
               Unsupervised Anomaly Detection},
      journal = {International Journal of Computer Vision},
      volume = {129}, pages = {1038--1059}, year = {2021}
    }"""

    def items(self, root: str, category: str) -> dict[str, list[Item]]:
        """Returns the items of "train" and "test" in the official folders."""
        return {
            "train": folder.training_items(root, category),
            "test": folder.test_items(root, category),
        }
