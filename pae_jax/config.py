"""The configuration: frozen dataclasses with the type and the limits of every key.

`from_config_dict` turns the `ml_collections.ConfigDict` of a config file into a `Config`; only
`config_file` and the config files handle a ConfigDict. The meaning of each key is explained beside
its default in `configs/default.py`. Every error is one line that begins with the dotted key.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from data_pipelines.errors import BadInput
from data_pipelines.spec import DatasetSpec
from pae_jax.config_schema import (
    MapPart,
    check_field,
    check_maps,
    check_section,
    construct,
    convert,
    field,
    map_parts,
)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The section `data`: the images, the textures and their division."""

    source: str = field("procedural", choices=("procedural", "folder", "list", "elpv", "tfds"))
    root: str = ""
    category: str = ""
    height: int = field(256, at_least=1, at_most=2**14)
    width: int = field(256, at_least=1, at_most=2**14)
    crop_size: int = field(0, at_least=0, at_most=2**14)
    textures: str = "builtin"
    texture_size: int = field(256, at_least=8, at_most=2**14)
    holdout_fraction: float = field(0.05, above=0.0, at_most=0.5)
    holdout_groups: str = "auto"
    max_images: int = field(0, at_least=0)
    augmentation: str = "none"
    cache_dir: str = ""
    foreground: str = ""
    value_range: str = "auto"
    on_device: str = field("auto", choices=("auto", "yes", "no"))
    num_threads: int = field(4, at_least=1)

    @property
    def spec(self) -> DatasetSpec:
        """The settings that the data pipelines need."""
        return DatasetSpec(
            self.source,
            self.root,
            self.category,
            self.shape,
            self.holdout_groups,
            self.cache_dir,
            self.value_range,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """The size (h, w) to which every image is resized."""
        return self.height, self.width

    @property
    def train_shape(self) -> tuple[int, int]:
        """The size (h, w) of a training example: a random crop or the whole image."""
        if not self.crop_size:
            return self.shape
        return min(self.crop_size, self.height), min(self.crop_size, self.width)


@dataclasses.dataclass(frozen=True)
class CorruptionConfig:
    """The section `corruption`: how training examples are corrupted (eq. 13)."""

    kind: str = field(
        "texture", choices=("texture", "mixed", "varied", "draem", "cutpaste", "riad")
    )
    mask: str = field("ellipses", choices=("ellipses", "perlin", "boxes", "shapes"))
    placement: str = field("uniform", choices=("uniform", "edges"))
    min_blobs: int = field(1, at_least=1)
    max_blobs: int = field(4, at_least=1)
    min_axis: float = field(0.01, above=0.0, at_most=1.0)  # positive for a logarithmic scale
    max_axis: float = field(0.25, above=0.0, at_most=1.0)
    softness: float = field(0.25, above=0.0, at_most=1.0)  # positive because it is a divisor
    distortion: float = field(0.5, at_least=0.0, at_most=2.0)
    min_opacity: float = field(0.0, at_least=0.0, at_most=1.0)
    max_opacity: float = field(1.0, above=0.0, at_most=1.0)  # with 0 nothing is corrupted
    clean_fraction: float = field(0.1, at_least=0.0, at_most=1.0)
    brightness: float = field(0.2, at_least=0.0, at_most=1.0)
    contrast: float = field(0.3, at_least=0.0, at_most=1.0)  # above 1 a gain may be negative


def _check_positive(section: str, config: Any, keys: tuple[str, ...]) -> None:
    """Checks that tuples hold at least one number and only positive ones."""
    for key in keys:
        values = getattr(config, key)
        if not values or any(v < 1 for v in values):
            raise BadInput(f"{section}.{key}: at least one positive integer, not {values}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The section `model`: the U-Net."""

    name: str = field("unet", choices=("unet",))
    patch_size: int = field(1, at_least=1)
    widths: tuple[int, ...] = (64, 128, 256)
    convs_per_stage: int = field(2, at_least=1)
    bottleneck_layers: int = field(2, at_least=0)
    branch_width: int = field(64, at_least=1)
    dilation_rates: tuple[int, ...] = (1, 2, 4, 8)
    dilated_kernel_size: int = field(5, at_least=1)
    input: str = field("image", choices=("image", "high_pass"))
    grey: bool = False
    norm: str = field("group", choices=("group", "instance", "layer", "none"))
    skip: str = field("concatenate", choices=("concatenate", "convex", "none"))
    output: str = field("sigmoid", choices=("sigmoid", "residual_logit"))
    dtype: str = field("float32", choices=("float32", "bfloat16"))
    precision: str = field("default", choices=("default", "high", "highest"))
    remat: bool = False

    def __post_init__(self) -> None:
        _check_positive("model", self, ("widths", "dilation_rates"))
        # An even kernel has no central pixel, so it would move the image by half a pixel.
        if self.dilated_kernel_size % 2 == 0:
            raise BadInput(
                f"model.dilated_kernel_size: an odd size, not {self.dilated_kernel_size}"
            )


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """The section `head`: the second network g of the method `discrepancy`."""

    patch_size: int = field(2, at_least=1)
    widths: tuple[int, ...] = (16, 32, 64)
    dilation_rates: tuple[int, ...] = (1, 2, 4)
    focal_gamma: float = field(2.0, at_least=0.0)
    changed: float = field(7.0, at_least=0.0)
    reserved_fraction: float = field(0.0, at_least=0.0, at_most=0.5)

    def __post_init__(self) -> None:
        _check_positive("head", self, ("widths", "dilation_rates"))


@dataclasses.dataclass(frozen=True)
class JacobianConfig:
    """The section `objective.jacobian`: the penalty on the Jacobian of f."""

    weight: float = field(0.0, at_least=0.0)
    directions: str = field("random", choices=("random", "tangent", "normal", "both"))
    form: str = field("frobenius", choices=("frobenius", "squared"))
    probes: int = field(1, at_least=1)
    distribution: str = field("rademacher", choices=("rademacher", "gaussian"))
    at: str = field("corrupted", choices=("corrupted", "clean"))
    normalize: bool = True
    every: int = field(1, at_least=1)

    def __post_init__(self) -> None:
        if self.directions == "random":
            return
        # An example has one corruption, and neither kind of direction is a draw of independent
        # values, so these keys would be ignored.
        for key, default in (("probes", 1), ("distribution", "rademacher")):
            if (value := getattr(self, key)) != default:
                raise BadInput(
                    f"objective.jacobian.{key}: {value} needs objective.jacobian.directions=random"
                )


@dataclasses.dataclass(frozen=True)
class IdempotencyConfig:
    """The section `objective.idempotency`: the penalty on f(f(x̂)) − f(x̂)."""

    weight: float = field(0.0, at_least=0.0)
    gradient: str = field("both", choices=("both", "outer", "inner"))


@dataclasses.dataclass(frozen=True)
class IdentityConfig:
    """The section `objective.identity`: the penalty on f(x) − x."""

    weight: float = field(0.0, at_least=0.0)


@dataclasses.dataclass(frozen=True)
class SsimConfig:
    """The section `objective.ssim`: the SSIM loss."""

    weight: float = field(0.0, at_least=0.0)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """The section `objective`: eq. 1 and the weights of the penalties."""

    mask_weight: float = field(0.5, at_least=0.0, at_most=1.0)
    noise: float = field(0.0, at_least=0.0)
    # Instances may be defaults, because these dataclasses cannot be changed.
    ssim: SsimConfig = SsimConfig()
    jacobian: JacobianConfig = JacobianConfig()
    idempotency: IdempotencyConfig = IdempotencyConfig()
    identity: IdentityConfig = IdentityConfig()


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The section `optimizer`: Adam and its learning rate."""

    learning_rate: float = field(1e-4, above=0.0)
    schedule: str = field("constant", choices=("constant", "cosine"))
    warmup_steps: int = field(0, at_least=0)
    clip_norm: float = field(0.0, at_least=0.0)
    ema_decay: float = field(0.0, at_least=0.0, at_most=0.99999)


# The limit is for one device. At the paper's size 64 examples at once would take 19 GiB.
MAX_VALIDATION_BATCH = 16


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The section `train`: the training loop, logging and checkpoints."""

    # JAX keeps only the lower 32 bits of a seed, so larger seeds could name the same run.
    seed: int = field(0, at_least=0, at_most=2**31 - 1)
    steps: int = field(10_000, at_least=1)
    batch_size: int = field(8, at_least=1)
    grad_accumulation_steps: int = field(1, at_least=1)
    steps_per_call: int = field(0, at_least=0)
    log_every: int = field(50, at_least=1)
    validate_every: int = field(500, at_least=1)
    checkpoint_every: int = field(500, at_least=1)
    panel_every: int = field(1_000, at_least=1)
    keep_checkpoints: int = field(2, at_least=1)
    validation_examples: int = field(64, at_least=1)
    tensorboard: bool = True
    deterministic: bool = False

    @property
    def validation_batch_size(self) -> int:
        """The number of validation examples that one device computes at once."""
        # A training batch is spread over all devices, and one may be too small for it.
        return min(self.batch_size, self.validation_examples, MAX_VALIDATION_BATCH)


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    """The section `sharding`: how one run is spread over devices."""

    transform: str = field("jit", choices=("jit", "shard_map", "pmap"))
    data_parallel: int = field(-1, at_least=-1)
    model_parallel: int = field(1, at_least=1)


@dataclasses.dataclass(frozen=True)
class PopulationConfig:
    """The section `population`: how several runs share one program."""

    members_per_program: int = field(0, at_least=0)
    mapping: str = field("auto", choices=("auto", "unroll", "map", "vmap"))


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The section `eval`: anomaly maps, image scores, thresholds and metrics."""

    anomaly_map: str = "ssim"
    smoothing: str = field("gaussian", choices=("gaussian", "mean", "none"))
    smoothing_fraction: float = field(1 / 12, above=0.0, at_most=1.0)
    symmetries: bool = False
    calibration: str = field("none", choices=("none", "all", "position", "auto"))
    image_score: str = field("sum", choices=("sum", "max", "topk"))
    topk_fraction: float = field(0.01, above=0.0, at_most=1.0)
    false_positive_rate: float = field(0.05, above=0.0, at_most=0.5)
    apply: str = field("once", choices=("once", "iterate", "fixed_point", "tangent"))
    iterations: int = field(1, at_least=1)
    solver: str = field("picard", choices=("picard", "damped", "anderson"))
    fixed_point_tolerance: float = field(1e-3, above=0.0)
    max_steps: int = field(50, at_least=1)
    native_size: bool = False
    aupro_limit: float = field(0.3, above=0.0, at_most=1.0)
    bootstrap_resamples: int = field(1_000, at_least=0)
    diagnostics: bool = True
    floor: bool = True
    batch_size: int = field(16, at_least=1)
    bootstrap_seed: int = field(0, at_least=0, at_most=2**31 - 1)

    @property
    def parts(self) -> tuple[MapPart, ...]:
        """The maps that `anomaly_map` names, as in "ssim+ssim@2+logit".

        Raises:
          BadInput: it is not a list of names with widths.
        """
        return map_parts(self.anomaly_map)


@dataclasses.dataclass(frozen=True)
class ForegroundConfig:
    """The section `foreground`: the network of `pae foreground`. Nothing else reads it."""

    size: int = field(128, at_least=16, at_most=2**12)
    labels: str = field("auto", choices=("auto", "given", "otsu"))
    steps: int = field(600, at_least=1)
    margin: float = field(0.02, at_least=0.0, at_most=0.25)


@dataclasses.dataclass(frozen=True)
class BaselineConfig:
    """The section `baseline`: settings of the methods for comparison."""

    pca_components: int = field(32, at_least=1)
    svm_nu: float = field(0.1, above=0.0, at_most=1.0)
    svm_side: int = field(32, at_least=1)
    svm_images: int = field(1_000, at_least=1)
    svdd_dimensions: int = field(32, at_least=1)


# The names stand here and not in `methods`, because that package imports this module.
METHODS = (
    "projection",
    "discrepancy",
    "inpainting",
    "segmentation",
    "deep_svdd",
    "pca",
    "one_class_svm",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of one run; immutable and hashable, so that jit accepts it as static."""

    method: str = field("projection", choices=METHODS)
    data: DataConfig = DataConfig()
    corruption: CorruptionConfig = CorruptionConfig()
    model: ModelConfig = ModelConfig()
    head: HeadConfig = HeadConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    sharding: ShardingConfig = ShardingConfig()
    population: PopulationConfig = PopulationConfig()
    eval: EvalConfig = EvalConfig()
    foreground: ForegroundConfig = ForegroundConfig()
    baseline: BaselineConfig = BaselineConfig()
    profile: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.profile and not (len(self.profile) == 2 and 0 <= self.profile[0] < self.profile[1]):
            raise BadInput(f"profile: (first step, step after the last), not {self.profile}")
        # The host validates and saves between two calls, never inside one.
        call = self.train.steps_per_call
        for key in ("steps", "validate_every", "checkpoint_every"):
            value = getattr(self.train, key)
            if call and value % call:
                raise BadInput(f"train.steps_per_call: {call} does not divide train.{key}={value}")
        if call and any(step % call for step in self.profile):
            raise BadInput(f"train.steps_per_call: {call} does not divide profile={self.profile}")
        if self.train.deterministic and self.sharding.transform == "pmap":
            raise BadInput("train.deterministic: needs sharding.transform=jit or shard_map")
        for key in ("blobs", "axis", "opacity"):
            low = getattr(self.corruption, f"min_{key}")
            high = getattr(self.corruption, f"max_{key}")
            if low > high:
                raise BadInput(f"corruption.min_{key}: {low} exceeds max_{key} {high}")
        if self.eval.apply != "iterate" and self.eval.iterations != 1:
            raise BadInput(f"eval.iterations: {self.eval.iterations} needs eval.apply=iterate")
        file = {"folder": "DIR", "list": "LIST.csv"}.get(self.data.source)
        if file and not self.data.root:
            needed = f"the {self.data.source} source needs --config.data.root={file}"
            raise BadInput(f"data.root: {needed}")
        if self.data.foreground and self.objective.noise:
            # Noise would leave no pixel at the value that says background.
            raise BadInput(
                f"objective.noise: {self.objective.noise} needs an empty data.foreground"
            )
        check_maps(self.eval.parts, self.method, self.eval.calibration)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain nested dictionaries, ready for JSON."""
        return dataclasses.asdict(self)

    @property
    def hash(self) -> str:
        """Twelve hex digits that identify the configuration; they change with any value."""
        # Not `hash(self)`, because Python's hash of a string differs between processes.
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def from_config_dict(config: Mapping[str, Any]) -> Config:
    """Checks a nested mapping and turns it into a `Config`.

    Missing keys take the defaults of the dataclasses.

    Args:
      config: a ConfigDict or nested dictionaries; `data.size` sets both sides of the images.

    Returns:
      The frozen configuration.

    Raises:
      BadInput: for an unknown key, a wrong type, a value beyond its limits or a key without a
        value, with one line that begins with the key.
    """
    to_dict = getattr(config, "to_dict", None)
    return construct(Config, check(to_dict() if to_dict else config), prefix="")


def check(values: Mapping[str, Any]) -> dict[str, Any]:
    """Checks keys, types and limits of a nested mapping; None is allowed for any value.

    Args:
      values: nested dictionaries, as they come from a config file.

    Returns:
      A copy with the types of the dataclasses, where `data.size` is replaced by height and width.

    Raises:
      BadInput: with one line that begins with the key.
    """
    values = dict(values)
    if isinstance(values.get("data"), Mapping):
        values["data"] = _resolve_size(values["data"])
    return check_section(Config, values, prefix="")


def _resolve_size(data: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces `data.size` by the sides `height` and `width` that have no value yet."""
    values = {key: value for key, value in data.items() if key != "size"}
    size = data.get("size")
    if size is None:
        return values
    # Checked here, so that an error names the key that the user set.
    (limits,) = (f.metadata for f in dataclasses.fields(DataConfig) if f.name == "height")
    size = check_field("data.size", convert("data.size", int, size), limits)
    for side in ("height", "width"):
        if values.get(side) is None:
            values[side] = size
    return values
