"""Every option of a distillation run, its default and its meaning: the one home of both."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEACHER_VIEWS = ("20x", "5x")
# How many dihedral views of a pair are encoded, and which: each set is a group, and holds the one
# before. 2 adds the left-right flip, 4 the half turn and the top-bottom flip, 8 the quarter turns.
CACHED_VIEWS = {1: (0,), 2: (0, 4), 4: (0, 2, 4, 6), 8: (0, 1, 2, 3, 4, 5, 6, 7)}
TARGET_CENTERINGS = ("none", "mean", "whiten")
NAMED_STARTS = ("dinov2", "imagenet", "random")  # of --init; anything else is somebody's weights
MOST_SEED = 2**31  # NumPy takes twice that, but processes add their rank


class DistillationError(ValueError):
    """A run that cannot start or go on; the message names subject, value and remedy."""


def _option(default: Any, text: str, **metadata: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, **metadata})


@dataclass(frozen=True)
class DistillOptions:
    """Options of one run of the recipe of XMAG (arXiv 2509.23097).

    Defaults are the paper's where it states them (AdamW, 5e-4, cosine, ten epochs, 48 pairs per
    GPU, weights 1.0 and 0.5) and its published code's where it does not (EMA 0.999, weight decay
    0.05, clip 1.0). The warm-up is ours: 5% of the steps. The paper does not state one, and its
    code warms up over the whole run.
    """

    data: str = dataclasses.field(
        metadata={"help": "paired corpus: folder made by `xmag corpus`, or a Hub data set repo"}
    )
    teacher: str = _option(
        "uni2-h", "20x teacher: a name of xmag_hf.encoders, timm:NAME, hf:ID or a folder"
    )
    teacher_view: str = _option(
        "20x",
        "what the teacher sees of a pair: its 20x sub-patches, or with 5x the cells of its 5x view "
        "enlarged four times (Lanczos), a control whose targets hold no 20x detail; the scores of "
        "--holdout are against the 20x teacher either way (with --cache-teacher from a complete "
        "20x cache, else encoded at the end)",
        choices=TEACHER_VIEWS,
    )
    student: str = _option("base", "student size", choices=("base", "small", "tiny", "lite"))
    init: str | None = _option(
        None,
        "start of the student: dinov2, imagenet, random, or weights (folder, file or Hub id); "
        "none: dinov2 for base and small, random for tiny, imagenet for lite",
    )
    output_dir: str = _option("xmag", "folder that AutoModel.from_pretrained will load")

    epochs: float = _option(10.0, "passes over the training pairs")
    max_steps: int | None = _option(None, "optimiser steps, instead of --epochs")
    batch_size: int = _option(48, "pairs per process and micro-batch")
    gradient_accumulation_steps: int = _option(1, "micro-batches per optimiser step")
    learning_rate: float = _option(5e-4, "peak of the cosine schedule")
    warmup_ratio: float = _option(0.05, "share of the steps in linear warm-up, below 1")
    weight_decay: float = _option(0.05, "AdamW's; not on biases, norms and layer scales")
    max_grad_norm: float = _option(1.0, "gradient clipping")
    global_weight: float = _option(1.0, "weight of the class-token loss")
    local_weight: float = _option(0.5, "weight of the 4 x 4 local loss")
    relational_weight: float = _option(
        0.0,
        "weight of a loss on the batch's pairwise cosine similarities (each process its own "
        "batch), student's global projections against teacher's global targets; no gain in one "
        "screening",
    )
    target_centering: str = _option(
        "none",
        "none, mean (targets minus the mean training-teacher feature) or whiten (and PCA-whitened, "
        "since a few directions carry most of the variance); needs --cache-teacher; mean helped "
        "alignment, and no yardstick (docs/results.md); whiten did not",
        choices=TARGET_CENTERINGS,
    )
    ema_decay: float = _option(
        0.999, "EMA of the student, which is what is saved; ramps up as (1 + t) / (10 + t)"
    )
    drop_path_rate: float = _option(0.0, "stochastic depth of the student")
    gradient_checkpointing: bool = _option(False, "trade compute for memory in the student")
    dihedral: bool = _option(
        True,
        "flips and quarter turns, the same for both magnifications; with a cached teacher the "
        "sixteen cells are permuted instead of encoded anew, which is an approximation unless "
        "--cache-views is above 1, and cost alignment in one screening (docs/results.md): say "
        "--no-dihedral, or --cache-views",
    )
    color_jitter: bool = _option(
        True,
        "0.95 to 1.05, hue 0.05, one draw for both magnifications; a cached teacher sees none",
    )
    stain_jitter: float = _option(
        0.0,
        "largest change of haematoxylin, eosin and residual (scale 1 +- F, shift +- F in optical "
        "density), one draw for both magnifications; a cached teacher sees none; no help to "
        "alignment in one screening",
    )
    token_mask_ratio: float = _option(
        0.0,
        "share of the student's patch tokens replaced by a learnt token, targets whole; not for "
        "lite, which has no tokens; not yet measured",
    )
    reading_paths: bool = _option(
        False,
        "draw the student's 5x view at random among image_5x and, where the corpus has them "
        "(xmag corpus --reading-paths), image_5x_scanner and image_5x_fast, so that features "
        "depend less on how a slide is read: they did, in one screening, and alignment did not "
        "gain (docs/results.md)",
    )
    mpp_jitter: float = _option(
        0.0,
        "draw the student's um/px from 2.0 * (1 +- F), cut from image_5x_wide (xmag corpus "
        "--margin F); targets: the mean of the sub-patches by the share of each that the view "
        "shows, and each cell's own only within 5% of 2.0 um/px; cost alignment at 2.0 in one "
        "screening (docs/results.md)",
    )
    mixed_precision: str = _option(
        "auto",
        "auto: bf16 or fp16 if `accelerate launch` was told so, else bf16 on a GPU that has it, "
        "else no; the launcher's own no is its default and does not count: for full precision say "
        "no here",
        choices=("auto", "no", "bf16", "fp16"),
    )

    cache_teacher: bool = _option(
        False, "compute teacher features once and keep them; runs started together share the work"
    )
    cache_dir: str | None = _option(
        None, "where the cache lies; none: DATA/teacher, or the Hugging Face home for a repo"
    )
    share_sub_patches: bool = _option(
        True,
        "cache: a sub-patch seen by several overlapping pairs of a shard goes through the teacher "
        "once",
    )
    cache_views: int = _option(
        1,
        "cache: dihedral views of a pair whose features are computed: 1, 2 (and the left-right "
        "flip), 4 (and the half turn and the top-bottom flip) or 8 (and the quarter turns); above "
        "1, --dihedral draws among these only, and nothing is approximated; costs that many times "
        "the teacher passes and the space",
        choices=tuple(CACHED_VIEWS),
    )
    teacher_precision: str = _option(
        "auto", "auto: bf16 on a GPU, else fp32", choices=("auto", "fp32", "bf16", "fp16")
    )
    teacher_batch_size: int = _option(128, "sub-patches per teacher call")

    streaming: bool = _option(
        False,
        "read shards as they come; else they are memory-mapped, for which `datasets` writes a copy "
        "of the columns used to its cache (HF_DATASETS_CACHE); several processes take whole shards "
        "each, or, if that is uneven, every one all shards and its own pairs of them",
    )
    shuffle_buffer: int = _option(2048, "streaming: pairs held to shuffle among")
    num_workers: int = _option(2, "loader processes per training process")

    data_licence: str | None = _option(
        None, "licence of the slides, for the card", metavar="LICENCE"
    )
    data_source: str | None = _option(None, "where the slides come from, for the card")
    holdout: tuple[str, ...] = _option(
        (),
        "pairs kept out of training and scored at the end: SLIDE_ID, or a band of it as "
        "SLIDE_ID:y>0.75 (x or y, share of the slide's extent)",
        metavar="PART",
    )
    alignment_pairs: int = _option(3000, "training pairs for the ridge map of the final scores")

    checkpoint_steps: int = _option(500, "a checkpoint every N steps, and on SIGTERM")
    resume: bool = _option(True, "go on from the last checkpoint in output_dir")
    overwrite: bool = _option(False, "replace a finished model made with other options")
    seed: int = _option(0, "of weights, order and augmentation")
    log_steps: int = _option(10, "a line in metrics.jsonl every N steps")
    report_to: tuple[str, ...] = _option(
        (), "trackers through accelerate: tensorboard, wandb, ...", metavar="TRACKER"
    )
    push_to_hub: bool = _option(False, "send the finished folder to the Hub")
    hub_model_id: str | None = _option(None, "ORG/NAME to push to")
    hub_private: bool = _option(True, "create that repository as private")

    def __post_init__(self) -> None:
        """Refuse contradictions where they are said, before any work."""
        positive = (
            "batch_size gradient_accumulation_steps learning_rate epochs teacher_batch_size "
            "checkpoint_steps log_steps max_grad_norm alignment_pairs shuffle_buffer"
        )
        for name in positive.split():
            if not getattr(self, name) > 0:
                raise DistillationError(f"--{name}={getattr(self, name)}: must be above 0.")
        shares = "warmup_ratio ema_decay drop_path_rate stain_jitter token_mask_ratio mpp_jitter"
        for name in shares.split():
            if not 0 <= getattr(self, name) < 1:
                raise DistillationError(f"--{name}={getattr(self, name)}: must be in [0, 1).")
        if not 0 <= self.seed < MOST_SEED:
            raise DistillationError(f"--seed={self.seed}: must be in [0, {MOST_SEED}).")
        choices = {
            "teacher_view": TEACHER_VIEWS,
            "target_centering": TARGET_CENTERINGS,
            "cache_views": tuple(CACHED_VIEWS),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                value, known = getattr(self, name), ", ".join(map(str, known))
                raise DistillationError(f"--{name}={value}: must be one of {known}.")
        if self.cache_views > 1 and not (self.cache_teacher and self.dihedral):
            raise DistillationError(
                f"--cache_views={self.cache_views} keeps turned views for --dihedral to draw from. "
                "Add --cache_teacher and --dihedral, or leave it at 1."
            )
        if self.target_centering != "none" and not self.cache_teacher:
            raise DistillationError(
                f"--target_centering={self.target_centering} takes its mean from all training "
                "features, which a live teacher has not computed. Add --cache_teacher."
            )
        if self.reading_paths and self.mpp_jitter:
            raise DistillationError(
                f"--reading_paths and --mpp_jitter={self.mpp_jitter} show the student different "
                "stored pictures. Choose one."
            )
        if self.token_mask_ratio and self.student == "lite":
            raise DistillationError(
                f"--token_mask_ratio={self.token_mask_ratio}: lite has no tokens to mask. Use 0, "
                "or a ViT: --student base, small or tiny."
            )
        if self.batch_size < 2:
            raise DistillationError("--batch_size=1: BatchNorm in the heads needs at least 2.")
        if self.max_steps is not None and self.max_steps < 1:
            raise DistillationError(f"--max_steps={self.max_steps}: must be at least 1.")
        weights = (self.global_weight, self.local_weight, self.relational_weight)
        if min(*weights, self.weight_decay, self.num_workers) < 0:
            raise DistillationError("weights, weight decay and num_workers must not be negative.")
        if max(weights) == 0:
            raise DistillationError("--global_weight and --local_weight are both 0: no loss left.")
        if self.push_to_hub and not self.hub_model_id:
            raise DistillationError("--push_to_hub needs --hub_model_id ORG/NAME.")


# Where things lie: the corpus is compared by its fingerprint, since a folder may move.
PLACES = frozenset({"data", "output_dir", "cache_dir"})
# What may differ between a run and its resumption without changing the loss curve.
RESUMABLE_DIFFERENCES = PLACES | {
    *("hub_model_id", "hub_private", "push_to_hub", "data_licence", "data_source"),
    *("num_workers", "checkpoint_steps", "resume", "overwrite", "log_steps", "report_to"),
    *("alignment_pairs", "teacher_batch_size"),
}
# What the card of a finished model says, and no weight depends on.
CARD_OPTIONS = ("data_licence", "data_source")


def recorded_options(options: DistillOptions) -> dict[str, Any]:
    """Options as JSON for checkpoints, results and cards; one's own folders are not told."""
    values = json.loads(json.dumps(dataclasses.asdict(options)))
    for name in ("teacher", "init"):  # a name, or a path; weights are compared by their digest
        if values[name] and Path(values[name]).exists():
            values[name] = Path(values[name]).name
    return {name: value for name, value in values.items() if name not in PLACES}


def differing_options(
    old: dict[str, Any], new: dict[str, Any], free: Collection[str] = RESUMABLE_DIFFERENCES
) -> list[str]:
    """Say which options of a resumed run differ from those of its checkpoint.

    Args:
        old: `recorded_options` of the checkpoint.
        new: `recorded_options` of this run.
        free: Options that may differ.

    Returns:
        Lines such as `learning_rate: 0.001 then, 0.0005 now`; empty when the curve can go on.
    """
    # A record from before an option existed is of a run that did what its default does.
    old = recorded_options(DistillOptions(data="")) | old
    if new["streaming"]:
        # Loader processes share out the shards: order depends on them.
        free = set(free) - {"num_workers"}
    return [
        f"{name}: {old[name]} then, {value} now"
        for name, value in new.items()
        if name not in free and old[name] != value
    ]
