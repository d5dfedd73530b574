"""Every key with its default. Variants import this file and change what they must.

On the command line: --config=configs/default.py --config.train.steps=500
"""

import ml_collections
from ml_collections import ConfigDict, config_dict


def get_config(arg: str | None = None) -> ConfigDict:
    """The defaults; takes no argument."""
    if arg:
        raise ValueError(f"configs/default.py takes no argument, not {arg!r}")
    config = ml_collections.ConfigDict()

    # ---- method: the paper's, or one to compare it with (pae_jax/methods) ----
    # projection | inpainting (with corruption.kind = "riad") | segmentation | deep_svdd | pca |
    # one_class_svm
    config.method = "projection"

    # ---- data: one model for each category (§4 of the paper) ----
    config.data = data = ConfigDict()
    data.source = "procedural"  # procedural | folder (MVTec layout) | elpv | tfds
    data.root = ""  # folder: the category's folder; tfds: the data_dir
    data.category = ""  # folder: a subfolder; tfds: "mvtec_ad/screw"; procedural: a pattern
    data.size = 256  # images are resized to size × size …
    data.height = config_dict.placeholder(int)  # … or to height × width, where these are set
    data.width = config_dict.placeholder(int)
    data.crop_size = 0  # train on random crops of this side; 0: on whole images
    data.textures = "builtin"  # corruption patterns: builtin | a folder | "tfds:DATA_DIR" (dtd)
    data.texture_size = 256  # they are stored at this side, and cropped from it
    data.holdout_fraction = 0.05  # share of the training images kept for validation (§4)
    data.holdout_groups = "auto"  # what is held out together: auto | none | number:GAP | blocks:N
    data.max_images = 0  # train on at most so many of the others, drawn by train.seed; 0: on all
    data.augmentation = "none"  # policies joined by "+", for example flips+rotation
    data.cache_dir = ""  # decoded images; "": $PAE_CACHE or ~/.cache/pae_jax
    data.on_device = "auto"  # images on the device, drawn by index: yes | no | auto by their size
    data.num_threads = 4  # reading threads

    # ---- corruption: x̂ = M⊙y + (1−M)⊙x (eq. 13) ----
    config.corruption = corruption = ConfigDict()
    corruption.kind = "texture"  # texture (the paper's) | mixed | draem | cutpaste | riad
    corruption.mask = "ellipses"  # ellipses | perlin | boxes
    corruption.placement = "uniform"  # of the blobs: uniform | edges (half of them, by ‖∇x‖²)
    corruption.min_blobs = 1
    corruption.max_blobs = 4
    corruption.min_axis = 0.01  # half-axes, as shares of the side, log-uniform
    corruption.max_axis = 0.25
    corruption.softness = 0.25  # width of a blob's soft edge, as a share of its radius
    corruption.distortion = 0.5  # elastic distortion of the blobs
    corruption.min_opacity = 0.0  # α ~ U(min, max]: mass near zero is what Theorem 2 needs
    corruption.max_opacity = 1.0
    corruption.clean_fraction = 0.1  # share of samples left uncorrupted
    corruption.brightness = 0.2  # of the texture: shift of at most ± this
    corruption.contrast = 0.3  # of the texture: factor in 1 ± this

    # ---- model: a U-Net with a bottleneck of stacked dilated convolutions (§4) ----
    config.model = model = ConfigDict()
    model.name = "unet"
    model.patch_size = 1  # works on blocks of so many pixels a side as channels; 2 is faster
    model.widths = (64, 128, 256)  # channels of a stage; one 2×2 pooling after each
    model.convs_per_stage = 2  # 3×3 convolutions of a stage
    model.bottleneck_layers = 2
    model.branch_width = 64  # channels of one dilated branch
    model.dilation_rates = (1, 2, 4, 8)  # dilations of the branches; at 512²: (1, 2, 4, 8, 16, 32)
    model.dilated_kernel_size = 5  # 5 at 256² (objects), 3 at 512² (textures)
    model.norm = "group"  # group | instance | layer | none
    model.skip = "concatenate"  # concatenate | convex (the parent paper's) | none
    model.output = (
        "sigmoid"  # sigmoid | residual_logit (added to the input's logit: f starts as id)
    )
    model.dtype = "float32"  # of the computation: float32 | bfloat16; parameters stay float32
    model.remat = False  # recompute activations in the backward pass: less memory, more time

    # ---- objective: eq. 1 and the penalties of appendix A.3; weight 0 costs nothing ----
    config.objective = objective = ConfigDict()
    objective.mask_weight = 0.5  # λ of eq. 1
    objective.noise = 0.0  # σ: the same Gaussian noise on input and target
    objective.ssim = ConfigDict()  # mean of 1 − SSIM(f(x̂), x): the loss of a baseline
    objective.ssim.weight = 0.0
    objective.jacobian = ConfigDict()  # ‖J_f(x̂) − I‖_F by forward-mode probes
    objective.jacobian.weight = 0.0
    objective.jacobian.form = "frobenius"  # frobenius (the paper's, unsquared) | squared
    objective.jacobian.probes = 1
    objective.jacobian.distribution = "rademacher"  # rademacher | gaussian
    objective.jacobian.at = "corrupted"  # corrupted (x̂, the paper) | clean (x)
    objective.jacobian.normalize = True  # by √d, so that one weight serves all sizes
    objective.jacobian.every = 1  # only every k-th step
    objective.idempotency = ConfigDict()  # ‖f(f(x̂)) − f(x̂)‖²
    objective.idempotency.weight = 0.0
    objective.idempotency.gradient = "both"  # through: both | outer | inner application
    objective.identity = ConfigDict()  # ‖f(x) − x‖²
    objective.identity.weight = 0.0

    # ---- optimizer: Adam (§4) ----
    config.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate = 1e-4
    optimizer.schedule = "constant"  # constant | cosine (to 0 at the last step)
    optimizer.warmup_steps = 0  # steps of linear warm-up
    optimizer.clip_norm = 0.0  # global norm of the gradient; 0: not clipped
    optimizer.ema_decay = 0.0  # decay of the parameters' moving average; 0: none

    # ---- train ----
    config.train = train = ConfigDict()
    train.seed = 0
    train.steps = 10_000  # pca and one_class_svm take none
    train.batch_size = 8  # of all devices together
    train.grad_accumulation_steps = 1  # parts of the batch, one after the other: less memory
    train.steps_per_call = 0  # steps the device takes by itself; 0: up to 10 with the data on it
    train.log_every = 50
    train.validate_every = 500
    train.checkpoint_every = 500
    train.panel_every = 1_000
    train.keep_checkpoints = 2  # checkpoints kept
    train.validation_examples = 64  # fixed corruptions of held-out images
    train.tensorboard = True

    # ---- sharding ----
    config.sharding = sharding = ConfigDict()
    sharding.transform = "jit"  # jit (with shardings) | shard_map | pmap
    sharding.data_parallel = -1  # devices along the batch; -1: all that divide it
    sharding.model_parallel = (
        1  # devices along the output channels of parameters and optimiser state
    )

    # ---- population: many runs as one program, of a sweep or of :all ----
    config.population = population = ConfigDict()
    population.members_per_program = 0  # runs that one program trains; 0: one a device
    population.mapping = "auto"  # members on one device: unroll | map (in turn), vmap (together)

    # ---- eval: from f(x̂) to maps, scores and metrics (§2.2) ----
    config.eval = evaluation = ConfigDict()
    evaluation.anomaly_map = "ssim"  # Δ: ssim (the paper's) | mse | gms | msgms
    evaluation.smoothing = "gaussian"  # gaussian | mean | none
    evaluation.smoothing_fraction = 1 / 12  # the filter's size, as a share of the side
    evaluation.image_score = "sum"  # image score that decides: sum (the paper's) | max | topk
    evaluation.topk_fraction = 0.01  # share of the pixels that topk averages
    evaluation.false_positive_rate = 0.05  # of the held-out normal images, sets the threshold
    evaluation.apply = "once"  # f(x) | iterate (fⁿ(x)) | fixed_point (§3.2)
    evaluation.iterations = 1  # n, with apply = "iterate"
    evaluation.solver = "picard"  # of the fixed point: picard | damped | anderson
    evaluation.fixed_point_tolerance = 1e-3  # relative to the norm of the iterate
    evaluation.max_steps = 50
    evaluation.native_size = False  # metrics at the images' own size, maps upsampled
    evaluation.aupro_limit = 0.3  # largest false-positive rate of the per-region overlap
    evaluation.bootstrap_resamples = 1_000  # resamples of the images for the intervals; 0: none
    evaluation.diagnostics = True  # is f a projection? on held-out normal images
    evaluation.batch_size = 16
    evaluation.bootstrap_seed = 0

    # ---- baseline: read by the method that the key begins with ----
    config.baseline = baseline = ConfigDict()
    baseline.pca_components = 32
    baseline.svm_nu = 0.1  # at most this share of the training images is called an outlier
    baseline.svm_side = 32  # it sees images shrunk to side × side
    baseline.svm_images = 1_000  # at most so many training images, drawn by train.seed
    baseline.svdd_dimensions = 32  # of φ(x)

    config.profile = ()  # (first, end): a jax.profiler trace of these steps in W/profile
    return config
