"""Every key with its default value and its meaning.

The defaults are the paper's values, where it gives them.
The other config files start from this one and change some keys, as does the command line:
--config=default --config.train.steps=500
"""

import ml_collections
from ml_collections import ConfigDict, config_dict


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the defaults; takes no argument."""
    if arg:
        raise ValueError(f"configs/default.py takes no argument, not {arg!r}")
    config = ml_collections.ConfigDict()

    # ---- method: the paper's, or another one for comparison (pae_jax/methods) ----
    # projection | discrepancy (projection and a learned Δ) | segmentation | deep_svdd | pca |
    # one_class_svm | inpainting (with corruption.kind = "riad")
    config.method = "projection"

    # ---- data: one model for each category (§4 of the paper) ----
    config.data = data = ConfigDict()
    data.source = "procedural"  # procedural | folder (MVTec layout) | list | elpv | tfds
    data.root = ""  # folder: the category's folder; list: a CSV or JSONL file; tfds: the data_dir
    data.category = ""  # folder: a subfolder; tfds: "mvtec_ad/screw"; procedural: a pattern
    data.size = 256  # images are resized to size × size pixels; it sets height and width
    data.height = config_dict.placeholder(int)  # set it for images that are not square
    data.width = config_dict.placeholder(int)
    data.crop_size = 0  # train on random crops of this side; 0: on whole images
    data.textures = "builtin"  # corruption patterns: builtin | a folder | "tfds:DATA_DIR" (dtd)
    data.texture_size = 256  # textures are stored as squares of this side, patterns cropped from it
    data.holdout_fraction = 0.05  # fraction of the training images kept for validation (§4)
    data.holdout_groups = "auto"  # images held out together: auto | none | number:GAP | blocks:N
    data.max_images = 0  # train on at most so many images, drawn by train.seed; 0: no limit
    data.augmentation = "none"  # policies joined by "+", for example flips+rotation
    data.foreground = ""  # a workdir of `pae foreground`, whose network suppresses the background
    data.value_range = "auto"  # values of images of more than 8 bits that become 0:255 | LOW:HIGH
    data.cache_dir = ""  # folder of decoded images; "": $PAE_CACHE or ~/.cache/pae_jax
    data.on_device = "auto"  # keep the images in device memory: yes | no | auto (by their size)
    data.num_threads = 4  # threads that read batches

    # ---- corruption: x̂ = M⊙y + (1−M)⊙x (eq. 13) ----
    config.corruption = corruption = ConfigDict()
    # texture (the paper's) | mixed | varied | draem | cutpaste | riad
    corruption.kind = "texture"
    corruption.mask = "ellipses"  # ellipses | perlin | boxes | shapes
    corruption.placement = "uniform"  # of blobs: uniform | edges (half of them on edges, by ‖∇x‖²)
    corruption.min_blobs = 1
    corruption.max_blobs = 4
    corruption.min_axis = 0.01  # half-axes as fractions of the side, drawn log-uniformly
    corruption.max_axis = 0.25
    corruption.softness = 0.25  # width of a blob's soft edge as a fraction of its radius
    corruption.distortion = 0.5  # strength of the elastic distortion of the blobs
    corruption.min_opacity = 0.0  # α ~ U(min, max]; Theorem 2 needs values near zero
    corruption.max_opacity = 1.0
    corruption.clean_fraction = 0.1  # fraction of the training examples left uncorrupted
    corruption.brightness = 0.2  # the texture is shifted by at most ± this
    corruption.contrast = 0.3  # the texture is scaled by a factor in 1 ± this

    # ---- model: a U-Net with a bottleneck of stacked dilated convolutions (§4) ----
    config.model = model = ConfigDict()
    model.name = "unet"
    model.patch_size = 1  # side of the pixel blocks that become channels (space to depth)
    model.widths = (64, 128, 256)  # channels of each stage; a 2×2 pooling follows each
    model.convs_per_stage = 2  # 3×3 convolutions per stage
    model.bottleneck_layers = 2  # dilated layers
    model.branch_width = 64  # channels of each dilated branch
    model.dilation_rates = (1, 2, 4, 8)  # dilations of the branches; at 512²: (1, 2, 4, 8, 16, 32)
    model.dilated_kernel_size = 5  # 5 at 256² (objects), 3 at 512² (textures)
    model.input = "image"  # what the network sees: image | high_pass (no slow changes, no colour)
    model.grey = False  # f gives equal channels, as grey images have
    model.norm = "group"  # group | instance | layer | none
    model.skip = "concatenate"  # skip connections: concatenate | convex (the parent paper's) | none
    # sigmoid | residual_logit (added to the logit of the input, so that f starts as the identity)
    model.output = "sigmoid"
    model.dtype = "float32"  # of activations: float32 | bfloat16; parameters stay float32
    model.precision = "default"  # of float32 products on a GPU or TPU: default | high | highest
    model.remat = False  # recompute activations in the backward pass: less memory, more time

    # ---- head: the network g of the method discrepancy, a smaller U-Net with one logit ----
    config.head = head = ConfigDict()
    head.patch_size = 2
    head.widths = (16, 32, 64)
    head.dilation_rates = (1, 2, 4)  # of its one dilated layer
    head.focal_gamma = 2.0  # exponent of the focal loss; 0: cross-entropy
    head.changed = 7.0  # grey levels of change at which a pixel of the mask counts half
    # The fraction of the training images, by whole groups, on which g alone is trained and f is
    # not, so that g sees f on images that f does not know; 0: both are trained on all.
    head.reserved_fraction = 0.0

    # ---- objective: eq. 1 and the penalties of appendix A.3; a weight of 0 removes a term ----
    config.objective = objective = ConfigDict()
    objective.mask_weight = 0.5  # λ of eq. 1, the weight of the error inside the mask
    objective.noise = 0.0  # σ of the Gaussian noise that is added to input and target alike
    objective.ssim = ConfigDict()  # mean of 1 − SSIM(f(x̂), x), used by baselines
    objective.ssim.weight = 0.0
    objective.jacobian = ConfigDict()  # ‖J_f(x̂) − I‖_F, or its part along chosen directions
    objective.jacobian.weight = 0.0
    # random: ‖(J − I)v‖, the paper's, estimated by probes v | tangent: ‖J t − t‖, t a small shift,
    # rotation and change of exposure of x | normal: ‖J n‖, n = x̂ − x | both: √ of their squares
    objective.jacobian.directions = "random"
    objective.jacobian.form = "frobenius"  # frobenius (the paper's, unsquared) | squared
    objective.jacobian.probes = 1  # random probes per example
    objective.jacobian.distribution = "rademacher"  # of the probes: rademacher | gaussian
    objective.jacobian.at = "corrupted"  # corrupted (x̂, the paper) | clean (x)
    objective.jacobian.normalize = True  # divide by √d, so that one weight suits all image sizes
    objective.jacobian.every = 1  # compute it only at every k-th step
    objective.idempotency = ConfigDict()  # ‖f(f(x̂)) − f(x̂)‖²
    objective.idempotency.weight = 0.0
    objective.idempotency.gradient = "both"  # applications that are trained: both | outer | inner
    objective.identity = ConfigDict()  # ‖f(x) − x‖²
    objective.identity.weight = 0.0

    # ---- optimizer: Adam (§4) ----
    config.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate = 1e-4
    optimizer.schedule = "constant"  # constant | cosine (to 0 at the last step)
    optimizer.warmup_steps = 0  # steps of linear warm-up
    optimizer.clip_norm = 0.0  # largest global norm of the gradient; 0: not clipped
    # Decay of the parameters' moving average, at most (1 + n) / (10 + n) after n updates; 0: none.
    optimizer.ema_decay = 0.0

    # ---- train ----
    config.train = train = ConfigDict()
    train.seed = 0  # seed of all random streams of the run
    train.steps = 10_000  # updates; pca and one_class_svm need none
    train.batch_size = 8  # examples per update, over all devices
    train.grad_accumulation_steps = 1  # parts of a batch, computed in turn: less memory
    train.steps_per_call = 0  # steps per compiled call; 0: up to 10 if the data are on the device
    train.log_every = 50  # steps between lines of metrics.jsonl
    train.validate_every = 500  # steps between validations
    train.checkpoint_every = 500  # steps between checkpoints
    train.panel_every = 1_000  # steps between pictures of validation examples
    train.keep_checkpoints = 2  # number of newest checkpoints that are kept
    train.validation_examples = 64  # fixed corruptions of held-out images
    train.tensorboard = True  # write TensorBoard logs as well
    train.deterministic = False  # on a GPU, the same bits in every run: slower (docs/gpu.md)

    # ---- sharding: one run over several devices ----
    config.sharding = sharding = ConfigDict()
    sharding.transform = "jit"  # jit (with shardings) | shard_map | pmap
    sharding.data_parallel = -1  # devices that divide the batch; -1: as many as possible
    sharding.model_parallel = 1  # devices that divide the output channels of the parameters

    # ---- population: several runs as one program (pae sweep, or the argument "all") ----
    config.population = population = ConfigDict()
    population.members_per_program = 0  # runs per program; 0: one per device
    population.mapping = "auto"  # runs on one device: unroll | map (in turn) | vmap | auto

    # ---- eval: anomaly maps, image scores and metrics (§2.2) ----
    config.eval = evaluation = ConfigDict()
    # Δ: ssim (the paper's) | mse | gms | msgms; with method = "discrepancy" also learned (the
    # probability that g gives) | logit (that of g); or several joined by +, which a calibration
    # adds; @2 doubles the smoothing of a map, as in "ssim+ssim@2+logit"
    evaluation.anomaly_map = "ssim"
    evaluation.smoothing = "gaussian"  # filter of the map: gaussian | mean | none
    evaluation.smoothing_fraction = 1 / 12  # size of the filter as a fraction of the side
    evaluation.symmetries = False  # average the map over the flips and turns of data.augmentation
    # none | all | position | auto: the map in standard deviations of the held-out normal images (at
    # least 3), over all pixels or, for images that are aligned with each other, at each position;
    # auto: at each position if these images look alike there
    evaluation.calibration = "none"
    evaluation.image_score = "sum"  # score of an image: sum of its map (the paper's) | max | topk
    evaluation.topk_fraction = 0.01  # fraction of the pixels that topk averages
    evaluation.false_positive_rate = 0.05  # on held-out normal images, sets the thresholds
    # once: f(x) | iterate: fⁿ(x) | fixed_point: the limit (§3.2) |
    # tangent: f(x) + J_f(f(x))·(x − f(x)), which takes normal variation out of the residual
    evaluation.apply = "once"
    evaluation.iterations = 1  # n, with apply = "iterate"
    evaluation.solver = "picard"  # iteration to the fixed point: picard | damped | anderson
    evaluation.fixed_point_tolerance = 1e-3  # relative to the norm of the iterate
    evaluation.max_steps = 50  # largest number of applications of f on the way to it
    evaluation.native_size = False  # metrics at the original image size, with upsampled maps
    evaluation.aupro_limit = 0.3  # integration limit of AUPRO, a false-positive rate
    evaluation.bootstrap_resamples = 1_000  # resamples for the confidence intervals; 0: none
    evaluation.diagnostics = True  # measure on held-out images whether f is a projection
    evaluation.floor = True  # measure PCA on at most 1,000 of the same training images as well
    evaluation.batch_size = 16  # images per call of the network
    evaluation.bootstrap_seed = 0  # seed of the resamples

    # ---- foreground: the network of `pae foreground` (§4); data.foreground names its workdir ----
    config.foreground = foreground = ConfigDict()
    foreground.size = 128  # the longer side of the images that the network sees
    foreground.labels = "auto"  # given (masks of the user) | otsu (without masks) | auto
    foreground.steps = 600  # updates by batches of 8 images
    foreground.margin = 0.02  # the object grows by this fraction of the shorter side

    # ---- baseline: settings of pca, one_class_svm (svm) and deep_svdd (svdd) ----
    config.baseline = baseline = ConfigDict()
    baseline.pca_components = 32  # number of principal components
    baseline.svm_nu = 0.1  # largest fraction of the training images outside the boundary
    baseline.svm_side = 32  # images are shrunk to side × side pixels
    baseline.svm_images = 1_000  # largest number of training images, drawn by train.seed
    baseline.svdd_dimensions = 32  # dimensions of the features φ(x)

    # ---- profile: (first step, step after the last) of a jax.profiler trace in W/profile ----
    config.profile = ()
    return config
