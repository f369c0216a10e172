"""One head: built, trained, stopped by its validation split, and asked for probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xmag_hf.embedding.ahead import ahead
from xmag_hf.modeling import (
    XMAGABMILConfig,
    XMAGABMILModel,
    XMAGMeanPoolConfig,
    XMAGMeanPoolModel,
)

from .bags import (
    BagFile,
    LabelledBags,
    batch_tensors,
    ordered_batches,
    shuffled_batches,
    spokesman,
)
from .errors import MILError
from .options import HeadOptions

Head = XMAGABMILModel | XMAGMeanPoolModel
BATCHES_AHEAD = 2


@dataclass(frozen=True)
class Epoch:
    """Mean losses of an epoch, in nats, class weights included."""

    training_loss: float
    validation_loss: float


@dataclass(frozen=True)
class Training:
    """How a head was trained.

    Attributes:
        best_epoch: Whose weights it has, from 1: the lowest validation loss.
        history: Every epoch that was run.
    """

    best_epoch: int
    history: tuple[Epoch, ...]

    @property
    def validation_loss(self) -> float:
        """Of the best epoch."""
        return self.history[self.best_epoch - 1].validation_loss


def balanced_weights(labels: np.ndarray, n_classes: int) -> list[float]:
    """N / (C n_c) for each class c: their mean over the slides is 1.

    Args:
        labels: (n,) int64; every class occurs.
        n_classes: C.

    Returns:
        C numbers.
    """
    return (len(labels) / (n_classes * np.bincount(labels, minlength=n_classes))).tolist()


def build_head(
    kind: str, bag: BagFile, classes: Sequence[str], weights: list[float] | None,
    options: HeadOptions,
) -> Head:  # fmt: skip
    """A fresh head for the bags that `bag` is one of; weights by torch's global seed.

    Args:
        kind: `abmil` or `mean-pool`.
        bag: Gives the width and the identity.
        classes: Names.
        weights: Of the classes, for the loss.
        options: Widths and dropout.

    Returns:
        The head, on the CPU.
    """
    shared: dict[str, Any] = {
        "embed_dim": bag.embed_dim,
        "hidden_dim": options.hidden_dim,
        "dropout": options.dropout,
        "class_weights": weights,
        "id2label": dict(enumerate(classes)),
        "label2id": {name: number for number, name in enumerate(classes)},
        **bag.identity,
    }
    if kind == "abmil":
        config = XMAGABMILConfig(attention_dim=options.attention_dim, **shared)
        return XMAGABMILModel(config)
    return XMAGMeanPoolModel(XMAGMeanPoolConfig(**shared))


def train_head(
    kind: str,
    classes: Sequence[str],
    training: LabelledBags,
    validation: LabelledBags,
    options: HeadOptions,
    *,
    device: torch.device,
    seed: int,
    advance: Callable[[int], None] | None = None,
) -> tuple[Head, Training]:
    """Train a head; the random state of the caller stays as it is.

    Args:
        kind: `abmil` or `mean-pool`.
        classes: Names; each has a slide in `training`.
        training: Slides learned from.
        validation: Slides that say when to stop, and which epoch's weights are kept.
        options: See there.
        device: CPU or a GPU, where it runs in bf16 autocast.
        seed: Of weights, order and dropout.
        advance: Told how many epochs are over since the last call.

    Returns:
        The head in eval mode, on the device, with the weights of its best epoch.

    Raises:
        MILError: The loss is not finite.
    """
    weights = balanced_weights(training.labels, len(classes)) if options.class_weights else None
    lengths = np.array([bag.patches for bag in training.files])
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model: Any = build_head(kind, spokesman(training.files), classes, weights, options)
        model.to(device)
        optimizer = torch.optim.AdamW(
            model.parameters(), options.learning_rate, weight_decay=options.weight_decay, fused=True
        )
        steps = options.epochs * math.ceil(len(training) / options.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        history: list[Epoch] = []
        best: dict[str, Tensor] = {}
        best_epoch = 0
        for _ in range(options.epochs):
            batches = shuffled_batches(lengths, options.batch_size, rng)
            loss = _train_epoch(model, training, batches, optimizer, schedule, device)
            history.append(Epoch(loss, predict_head(model, validation, options, device)[1]))
            if not math.isfinite(history[-1].validation_loss):
                raise MILError(
                    f"validation loss is {history[-1].validation_loss} after epoch {len(history)}: "
                    f"lower --learning-rate ({options.learning_rate:g})."
                )
            if not best or history[-1].validation_loss < history[best_epoch - 1].validation_loss:
                best_epoch = len(history)
                best = {name: value.clone() for name, value in model.state_dict().items()}
            stop = options.patience and len(history) - best_epoch >= options.patience
            if advance is not None:
                advance(options.epochs - len(history) + 1 if stop else 1)
            if stop:
                break
        model.load_state_dict(best)
    return model.eval(), Training(best_epoch, tuple(history))


def predict_head(
    model: Any, bags: LabelledBags, options: HeadOptions, device: torch.device
) -> tuple[np.ndarray, float]:
    """Probabilities of bags, and the loss that their labels give.

    Args:
        model: On the device; left in eval mode.
        bags: With labels.
        options: Batch size.
        device: Of the model.

    Returns:
        (n, C) float64, rows sum to 1; the mean loss in nats, class weights included.
    """
    model.eval()
    lengths = np.array([bag.patches for bag in bags.files])
    batches = ordered_batches(lengths, options.batch_size)
    probabilities = np.empty((len(bags), model.config.num_labels))
    total = 0.0
    with torch.inference_mode():
        loaded = _loaded(bags, batches, device)
        for rows, (features, mask, labels) in zip(batches, loaded, strict=True):
            with _autocast(device):
                output = model(features, mask, labels)
            probabilities[rows] = output.logits.double().softmax(dim=1).cpu().numpy()
            total += float(output.loss) * len(rows)
    return probabilities, total / len(bags)


def _train_epoch(
    model: Any,
    bags: LabelledBags,
    batches: Sequence[np.ndarray],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    device: torch.device,
) -> float:
    """One pass; the mean loss over slides."""
    model.train()
    total = torch.zeros((), device=device)  # read once an epoch: each reading waits for the GPU
    for features, mask, labels in _loaded(bags, batches, device):
        with _autocast(device):
            loss = model(features, mask, labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.detach() * len(labels)
    return float(total) / len(bags)


def _loaded(bags: LabelledBags, batches: Sequence[np.ndarray], device: torch.device) -> Any:
    """Batches on the device; read ahead for a GPU, while a CPU has nothing to spare for it."""
    tensors = batch_tensors(bags, batches, device)
    return tensors if device.type == "cpu" else ahead(tensors, BATCHES_AHEAD)  # type: ignore[arg-type]


def precision_of(device: torch.device) -> str:
    """fp32 on a CPU, since bf16 without instructions for it is ten times slower; else bf16."""
    return "fp32" if device.type == "cpu" else "bf16"


def _autocast(device: torch.device) -> AbstractContextManager[Any]:
    if precision_of(device) == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
