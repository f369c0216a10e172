"""One fold end to end: encoder and head trained together on the cached rows of whole slides.

The loop is `train_fold`. Stopped at any moment, the same call goes on from the last checkpoint on
the same loss curve.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import get_cosine_schedule_with_warmup

from xmag_hf.embedding.ahead import ahead
from xmag_hf.modeling import XMAGForSlideClassification
from xmag_hf.modeling.convert import image_processor_for
from xmag_hf.training.checkpoints import (
    Metrics,
    newest_checkpoint,
    save_checkpoint,
    stop_on_sigterm,
)
from xmag_hf.training.processes import any_rank

from .e2e_options import FREE, E2EOptions
from .errors import MILError
from .frozen_cache import FrozenCache

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

logger = logging.getLogger(__name__)

SLIDES_AHEAD = 2  # read from disk while one is trained on


class TrainingSlide(NamedTuple):
    """A slide and its class."""

    slide_id: str
    label: int


@dataclass
class Progress:
    """What early stopping remembers; saved with every checkpoint.

    Attributes:
        epochs: Finished.
        best_loss: Lowest validation loss.
        best_epoch: That had it, from 1; 0 before the first.
        best: Trained tensors of that epoch, by name.
        history: A dictionary an epoch.
    """

    epochs: int = 0
    best_loss: float = math.inf
    best_epoch: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """For accelerate's checkpoints."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `state_dict` gave it."""
        vars(self).update(state)


@dataclass
class _Run:
    accelerator: Accelerator
    options: E2EOptions
    cache: FrozenCache
    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    progress: Progress
    train: Sequence[TrainingSlide]
    validation: Sequence[TrainingSlide]
    folder: Path
    record: dict[str, Any]
    steps_per_epoch: int


def normalised(pixels: Tensor, model: XMAGForSlideClassification, device: torch.device) -> Tensor:
    """(N, S, S, 3) uint8 -> (N, 3, S, S) float32 on the device, normalised for the encoder."""
    processor = image_processor_for(model.encoder)
    mean, std = (
        torch.tensor(values, device=device).view(1, 3, 1, 1)
        for values in (processor.image_mean, processor.image_std)
    )
    return (pixels.to(device).permute(0, 3, 1, 2).float() / 255 - mean) / std


def train_fold(
    accelerator: Accelerator,
    model: XMAGForSlideClassification,
    cache: FrozenCache,
    train: Sequence[TrainingSlide],
    validation: Sequence[TrainingSlide],
    options: E2EOptions,
    folder: Path,
    record: dict[str, Any],
    *,
    step: Callable[[], None] = lambda: None,
) -> tuple[XMAGForSlideClassification, Progress]:
    """Train on some slides, stop early by others.

    Called by every process. An optimiser step takes `accumulation` slides on each process, in an
    order that depends on seed and epoch only; the last step of an epoch is filled up with the
    epoch's first slides.

    Args:
        accelerator: Of this fold alone.
        model: At its start; trained in place.
        cache: With every slide's rows.
        train: Slides to train on.
        validation: Slides whose mean loss chooses the epoch; without any, the last.
        options: Rates, epochs, patience.
        folder: Gets checkpoints and metrics.jsonl.
        record: What a checkpoint must agree with before it is continued.
        step: Called after each optimiser step.

    Returns:
        The model of the best epoch, on the CPU in eval mode, and the course of the training.

    Raises:
        MILError: A loss that is not finite, a checkpoint of another run, or SIGTERM, once a
            checkpoint is written.
    """
    run = _prepare(accelerator, model, cache, train, validation, options, folder, record)
    done = _resume(run)
    metrics = None
    if accelerator.is_main_process:
        metrics = Metrics(folder / "metrics.jsonl", done)
    with stop_on_sigterm() as stop:
        while not _finished(run):
            epoch = run.progress.epochs
            slides = _ahead_of(run, epoch, start=done - epoch * run.steps_per_epoch)
            began, stopping = time.perf_counter(), False
            for number in range(done + 1, (epoch + 1) * run.steps_per_epoch + 1):
                line = _step(run, slides) | {"step": number, "epoch": epoch + 1}
                done = number
                if metrics is not None:
                    metrics.write(line)
                step()
                stopping = any_rank(accelerator, stop.asked)
                last = number == (epoch + 1) * run.steps_per_epoch
                if not last and (stopping or number % options.checkpoint_steps == 0):
                    save_checkpoint(accelerator, folder, number, record)
                if stopping and not last:
                    _stop(folder, number)
            _end_epoch(run, time.perf_counter() - began)
            save_checkpoint(accelerator, folder, done, record)
            if stopping and not _finished(run):
                _stop(folder, done)
    model = accelerator.unwrap_model(run.model).cpu()
    if run.progress.best:
        model.load_state_dict(run.progress.best, strict=False)
    return model.eval(), run.progress


def _stop(folder: Path, step: int) -> None:
    raise MILError(
        f"stopped by SIGTERM after step {step}; a checkpoint is in {folder}. Run the same command "
        "to go on."
    )


def _prepare(
    accelerator: Accelerator,
    model: XMAGForSlideClassification,
    cache: FrozenCache,
    train: Sequence[TrainingSlide],
    validation: Sequence[TrainingSlide],
    options: E2EOptions,
    folder: Path,
    record: dict[str, Any],
) -> _Run:
    per_step = options.accumulation * accelerator.num_processes
    per_epoch = math.ceil(len(train) / per_step)
    total = per_epoch * options.epochs
    model.to(accelerator.device)  # type: ignore[arg-type]
    optimizer = AdamW(_parameter_groups(model, options), fused=accelerator.device.type == "cuda")
    warmup = min(math.ceil(options.warmup_ratio * total), total - 1)
    scheduler = get_cosine_schedule_with_warmup(optimizer, warmup, total)
    progress = Progress()
    model.train()
    wrapped, prepared = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(scheduler, progress)
    set_seed(options.seed, device_specific=True)  # dropout differs between processes
    return _Run(
        accelerator, options, cache, wrapped, prepared, scheduler, progress, train, validation,
        folder, record, per_epoch,
    )  # fmt: skip


def _parameter_groups(
    model: XMAGForSlideClassification, options: E2EOptions
) -> list[dict[str, Any]]:
    """Encoder and head at their rates; weight decay on matrices and kernels only."""
    groups = []
    for part, rate in (
        (model.encoder, options.encoder_learning_rate),
        (model.head, options.learning_rate),
    ):
        trained = [p for p in part.parameters() if p.requires_grad]
        for matrices, decay in ((True, options.weight_decay), (False, 0.0)):
            chosen = [p for p in trained if (p.ndim >= 2) == matrices]
            groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
    return [group for group in groups if group["params"]]


def _resume(run: _Run) -> int:
    """Load the last checkpoint of this very run; its step, 0 without one."""
    found = newest_checkpoint(run.folder)
    if found is None:
        return 0
    step, folder, old = found
    refuse_other(f"{folder}: a checkpoint", old, run.record)
    run.accelerator.load_state(str(folder))
    logger.info("resumed from %s", folder)
    return step


def refuse_other(what: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse what was made with other options, slides or weights.

    Raises:
        MILError: Each difference is listed.
    """
    flat_old, flat_new = ({**r, **r.get("options", {})} for r in (old, new))
    differences = [
        f"{name}: {flat_old.get(name)} then, {value} now"
        for name, value in flat_new.items()
        if name not in {"options", "xmag_hf", *FREE} and flat_old.get(name) != value
    ]
    if differences:
        raise MILError(
            f"{what} of another run:\n  " + "\n  ".join(differences) + "\nUse the same values to "
            "go on, or another --out. (`slides` also differ once a damaged one was copied again, a "
            "label or a fold was changed, or xmag_hf was: what is finished cannot go on then.)"
        )


def _finished(run: _Run) -> bool:
    progress, options = run.progress, run.options
    stale = bool(run.validation) and progress.epochs - progress.best_epoch >= options.patience
    return progress.epochs >= options.epochs or (progress.epochs > 0 and stale)


def epoch_order(slides: int, per_step: int, seed: int, epoch: int) -> np.ndarray:
    """Which slides an epoch takes, in order, filled up to whole steps with its first ones."""
    order = np.random.default_rng([seed, epoch]).permutation(slides)
    return np.resize(order, math.ceil(slides / per_step) * per_step)


def _ahead_of(run: _Run, epoch: int, start: int) -> Iterator[tuple[TrainingSlide, Tensor]]:
    """This process's slides of an epoch from a step on, with their rows."""
    accelerator, options = run.accelerator, run.options
    world, rank = accelerator.num_processes, accelerator.process_index
    per_step = options.accumulation * world
    order = epoch_order(len(run.train), per_step, options.seed, epoch)

    def rows() -> Generator[tuple[TrainingSlide, Tensor], None, None]:
        for index in order[start * per_step :][rank::world]:
            slide = run.train[index]
            values = run.cache.rows(slide.slide_id)
            if options.augment:
                generator = np.random.default_rng([options.seed, epoch, int(index)])
                values = turned(values, generator)
            yield slide, values

    return ahead(rows(), SLIDES_AHEAD)


def turned(pixels: Tensor, generator: np.random.Generator) -> Tensor:
    """One of the eight dihedral views of each patch, (N, S, S, 3)."""
    views = generator.integers(8, size=len(pixels))
    out = torch.empty_like(pixels)
    for view in range(8):
        chosen = torch.from_numpy(views == view)
        part = pixels[chosen].flip(2) if view >= 4 else pixels[chosen]
        out[chosen] = torch.rot90(part, int(view % 4), (1, 2))
    return out


def _step(run: _Run, slides: Iterator[tuple[TrainingSlide, Tensor]]) -> dict[str, float]:
    """One optimiser step over `accumulation` slides; its mean loss over all processes."""
    accelerator, options = run.accelerator, run.options
    losses, norm = [], math.nan
    for _ in range(options.accumulation):
        slide, rows = next(slides)
        with accelerator.accumulate(run.model):
            loss = _forward(run, run.model, slide, rows).loss
            if not torch.isfinite(loss):
                raise MILError(
                    f"loss is {loss.item()} on slide {slide.slide_id}. Lower the learning rates, "
                    "or use --mixed-precision no."
                )
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                clipped = accelerator.clip_grad_norm_(run.model.parameters(), options.max_grad_norm)
                norm = float(clipped) if clipped is not None else norm
            run.optimizer.step()
            run.optimizer.zero_grad()
        losses.append(loss.detach())
    rate = float(run.scheduler.get_last_lr()[-1])
    run.scheduler.step()
    mean = accelerator.reduce(torch.stack(losses).mean(), reduction="mean")
    return {"loss": float(mean), "grad_norm": norm, "learning_rate": rate}  # type: ignore[arg-type]


def _forward(run: _Run, model: nn.Module, slide: TrainingSlide, rows: Tensor) -> Any:
    device = run.accelerator.device
    inner = run.accelerator.unwrap_model(run.model)
    label = torch.tensor([slide.label], device=device)
    return model(**_inputs(run.cache, inner, rows, device), labels=label)


def _inputs(
    cache: FrozenCache, model: XMAGForSlideClassification, rows: Tensor, device: torch.device
) -> dict[str, Tensor]:
    """A slide's rows as the model takes them, a batch of one."""
    if cache.pixels:
        return {"pixel_values": normalised(rows, model, device)[None]}
    # Half precision is how it is kept, not how it is computed.
    return {"frozen_states": rows.to(device).float()[None]}


def _end_epoch(run: _Run, seconds: float) -> None:
    """Validate, and remember the epoch if it is the best."""
    progress = run.progress
    progress.epochs += 1
    line: dict[str, Any] = {"epoch": progress.epochs, "seconds": seconds}
    if run.validation:
        inner = run.accelerator.unwrap_model(run.model)
        probabilities = predict_slides(run.accelerator, inner, run.cache, run.validation)
        labels = np.array([slide.label for slide in run.validation])
        weights = np.array(inner.config.head_config.class_weights or [1.0] * probabilities.shape[1])
        chosen = probabilities[np.arange(len(labels)), labels]
        loss = float((-np.log(np.maximum(chosen, 1e-12)) * weights[labels]).mean())
        line |= {"validation_loss": loss}
        if loss < progress.best_loss:
            progress.best_loss, progress.best_epoch = loss, progress.epochs
            progress.best = _trained_tensors(inner)
    progress.history.append(line)
    run.model.train()


def _trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what is trained, on the CPU."""
    return {
        name: parameter.detach().cpu().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def predict_slides(
    accelerator: Accelerator,
    model: nn.Module,
    cache: FrozenCache,
    slides: Sequence[TrainingSlide],
) -> np.ndarray:
    """Class probabilities of slides, shared out over the processes: (n, C) float64, in order."""
    inner = accelerator.unwrap_model(model).eval()
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    inner.to(device)
    found: list[tuple[int, list[float]]] = []
    for index in range(rank, len(slides), world):
        rows = cache.rows(slides[index].slide_id)
        with accelerator.autocast():
            logits = inner(**_inputs(cache, inner, rows, device)).logits
        found.append((index, logits[0].double().softmax(-1).tolist()))
    if world > 1:
        found = gather_object(found)
    rows = [values for _, values in sorted(found)]
    return np.array(rows, dtype=np.float64).reshape(len(slides), inner.config.num_labels)
