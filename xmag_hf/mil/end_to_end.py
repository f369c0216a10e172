"""A study end to end: pixels of whole slides to classes, fold by fold.

Folds, validation split and what is written are as in `study`; what differs is what is trained.
Every process of `accelerate launch` runs the same code; the first one writes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed

from xmag_hf._version import __version__
from xmag_hf.embedding import EmbedOptions, SlideSource
from xmag_hf.embedding.bag import not_the_same
from xmag_hf.embedding.embed import check_sources
from xmag_hf.embedding.encode import own_pooling
from xmag_hf.embedding.plan import PatchGeometry, patch_geometry
from xmag_hf.encoders import Encoder, load_encoder
from xmag_hf.hub.folders import save_folder
from xmag_hf.modeling import XMAGForSlideClassification
from xmag_hf.modeling.convert import image_processor_for
from xmag_hf.training.checkpoints import remove_checkpoints
from xmag_hf.training.processes import only_run, open_accelerator

from .compare import CompareResult
from .e2e_options import E2EOptions, recorded
from .e2e_training import (
    TrainingSlide,
    normalised,
    predict_slides,
    refuse_other,
    train_fold,
)
from .errors import MILError
from .folds import (
    check_classes,
    make_folds,
    read_folds,
    validation_rows,
    warn_rare,
    write_folds,
)
from .frozen_cache import FrozenCache, fill_cache, frozen_cache
from .labels import Cohort, Exclusion, class_names, read_labels, read_lines
from .options import HEADS, INTERNAL, HeadOptions
from .predict import load_head
from .report import Tested, write_report
from .slide_models import SCRATCH, slide_model, stamp
from .train import balanced_weights
from .training_slides import stopping_rows, training_slides

logger = logging.getLogger(__name__)

FOLD_FILE = "fold.json"
# (what is counted, steps done since the last call, steps in all)
Advance = Callable[[str, int, int], None]


def _silent(name: str, done: int, total: int) -> None:
    """No progress shown."""


@dataclasses.dataclass(frozen=True, eq=False)
class FoldResult:
    """One trained fold.

    Attributes:
        fold: Its number.
        folder: Encoder and head.
        rows: (m,) int64, slides of the cohort that it was tested on.
        probabilities: (m, C).
        best_epoch: Of the lowest validation loss, from 1.
        history: A dictionary an epoch.
    """

    fold: int
    folder: Path
    rows: np.ndarray
    probabilities: np.ndarray
    best_epoch: int
    history: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class E2EResult:
    """A study end to end.

    Attributes:
        cohort: The slides that were used, and those left out.
        folds: (n,) int64.
        trained: Folds, those of earlier runs included.
        scores: Once all folds of a cross-validation are there; on the first process.
    """

    cohort: Cohort
    folds: np.ndarray
    trained: tuple[FoldResult, ...]
    scores: CompareResult | None


def end_to_end(
    sources: Sequence[SlideSource],
    options: E2EOptions,
    reading: EmbedOptions,
    *,
    advance: Advance = _silent,
) -> E2EResult:
    """Train encoder and head together, fold by fold; go on where an earlier run stopped.

    Args:
        sources: Slides; those that the labels do not name are left out.
        options: See there.
        reading: How patches are cut: tissue, overlap, edges, scales.
        advance: Told of slides read and of optimiser steps.

    Returns:
        Predictions and folders of the folds. `OUT/heads/fold-K` is complete or absent.

    Raises:
        MILError: Labels, slides, folds, heads or an earlier run that do not fit; another process
            works on the same `options.out`; SIGTERM, once a checkpoint is written.
        EmbedError: Options of reading that do not fit the encoder.
        EncoderError: The encoder cannot be had.
        TrainingError: accelerate's own settings say another accumulation.
        OSError: The output cannot be written.
    """
    accelerator = _accelerator(options)
    check_sources(sources)
    with only_run(accelerator, Path(options.out).expanduser().resolve(), MILError):
        return _made(accelerator, sources, options, reading, advance)


def _made(
    accelerator: Accelerator,
    sources: Sequence[SlideSource],
    options: E2EOptions,
    reading: EmbedOptions,
    advance: Advance,
) -> E2EResult:
    """The study, made now, or as far as it is not there yet."""
    encoder = load_encoder(options.encoder)
    geometry = patch_geometry(encoder.card, reading)
    # Whatever refuses a study must do so before any pixel is read.
    probe = slide_model(encoder, _scratch(encoder, ("a", "b"), options), **_shape(options))
    chosen = sorted(set(options.only or range(options.folds)))
    heads = {str(fold): _head_revision(options, fold) for fold in chosen}
    cohort = labelled_slides(sources, options)
    cache = frozen_cache(
        Path(options.cache_dir or Path(options.out) / "cache"),
        probe,
        geometry,
        reading,
        pixels=options.augment or not probe.config.frozen_stages,
        dtype=options.kept_type,
        precision=str(accelerator.mixed_precision),
    )
    # Refused now, not after hours of reading.
    planned, folds = _folds(cohort, options)
    _validation(planned, folds, chosen, options)
    for fold in chosen if options.head not in HEADS else ():
        _trained_head(encoder, planned, fold, options, geometry)
    if accelerator.is_main_process:
        _warn(planned, chosen, options)
    began = time.perf_counter()
    cohort = _filled(accelerator, cache, probe, cohort, sources, advance)
    seconds = time.perf_counter() - began
    cohort, folds = _folds(cohort, options)
    validation = _validation(cohort, folds, chosen, options)
    if accelerator.is_main_process:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        write_folds(Path(options.out) / "folds.csv", cohort, folds)
    record = {
        "options": recorded(options),
        "encoder_revision": encoder.revision,
        "head_revisions": heads,
        "slides": _digest(cohort, folds, cache),
        "cache": cache.folder.name,
        "precision": str(accelerator.mixed_precision),
        "world": accelerator.num_processes,
        "xmag_hf": __version__,
    }
    trained = [
        _fold(encoder, cache, cohort, folds, fold, validation[fold], options, record, advance)
        for fold in chosen
    ]
    scores = None
    if accelerator.is_main_process and len(trained) == options.folds > 1:
        scores = _conclude(cohort, trained, options, record | {"cache_seconds": seconds})
    accelerator.wait_for_everyone()
    return E2EResult(cohort, folds, tuple(trained), scores)


def _accelerator(options: E2EOptions) -> Accelerator:
    cpu = not torch.cuda.is_available()
    return open_accelerator(options.mixed_precision, options.accumulation, cpu=cpu)


def _digest(cohort: Cohort, folds: np.ndarray, cache: FrozenCache) -> str:
    """Of what is learnt from whom: a resumed run must mean the same pixels, labels and folds."""
    origins = [cache.origin(str(name)) for name in cohort.slide_ids]
    slides = [cohort.slide_ids, cohort.patient_ids, cohort.labels, folds]
    content = [cohort.classes, *(column.tolist() for column in slides), origins]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def labelled_slides(sources: Sequence[SlideSource], options: E2EOptions) -> Cohort:
    """The slides that have a label.

    Raises:
        MILError: As `read_labels` and `class_names`, or no slide has a label.
    """
    rows = read_labels(Path(options.labels), options.label_column, options.against_rest)
    classes = class_names(rows)
    known = {source.slide_id for source in sources}
    kept = sorted((row for row in rows if row.slide_id in known), key=lambda row: row.slide_id)
    named = {row.slide_id for row in rows}
    left = [Exclusion(row.slide_id, "a label, and no slide") for row in rows
            if row.slide_id not in known]  # fmt: skip
    left += [Exclusion(name, "a slide, and no label") for name in sorted(known - named)]
    if not kept:
        raise MILError(
            f"{options.labels}: names none of the {len(known)} slides. Its slide_id is the file's "
            "stem, or what --slides-csv says."
        )
    return Cohort(
        name=INTERNAL,
        slide_ids=np.array([row.slide_id for row in kept]),
        patient_ids=np.array([row.patient_id for row in kept]),
        labels=np.array([classes.index(row.label) for row in kept]),
        classes=classes,
        bags=(),
        exclusions=tuple(left),
    )


def _shape(options: E2EOptions) -> dict[str, Any]:
    return {"frozen_stages": options.frozen_stages, "chunk_size": options.chunk_size}


def _scratch(encoder: Encoder, classes: Sequence[str], options: E2EOptions) -> Any:
    """Configuration of a fresh head."""
    kind = options.head if options.head in HEADS else HEADS[0]
    widths = HeadOptions()
    shared: dict[str, Any] = {
        "embed_dim": encoder.embed_dim,
        "hidden_dim": widths.hidden_dim,
        "dropout": options.dropout,
        "id2label": dict(enumerate(classes)),
        "label2id": {name: number for number, name in enumerate(classes)},
    }
    if kind == "abmil":
        shared["attention_dim"] = widths.attention_dim
    return SCRATCH[kind](**shared)


def _filled(
    accelerator: Accelerator,
    cache: FrozenCache,
    model: XMAGForSlideClassification,
    cohort: Cohort,
    sources: Sequence[SlideSource],
    advance: Advance,
) -> Cohort:
    """Fill the cache, each process its share; the cohort without slides that cannot be used."""
    model.to(accelerator.device)  # type: ignore[arg-type]
    own = {source.slide_id: source for source in sources}
    wanted = [own[str(name)] for name in cohort.slide_ids]
    share = wanted[accelerator.process_index :: accelerator.num_processes]

    def keep(pixels: torch.Tensor) -> torch.Tensor:
        if cache.pixels:
            return pixels
        with accelerator.autocast():
            return model.frozen(normalised(pixels, model, accelerator.device)).float()

    failed = fill_cache(
        cache, share, keep, batch_size=model.config.chunk_size, device=accelerator.device,
        step=lambda: advance("slides read", 1, len(share)),
    )  # fmt: skip
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        failed = dict(gather_object(list(failed.items())))
    model.cpu()
    good = np.array([str(name) not in failed for name in cohort.slide_ids])
    if not good.any():
        reasons = "; ".join(list(failed.values())[:3])
        raise MILError(f"not one of {len(cohort)} labelled slides can be used: {reasons}")
    told = tuple(Exclusion(name, reason) for name, reason in sorted(failed.items()))
    for exclusion in told:
        logger.warning("left out: %s", exclusion.reason)
    exclusions = cohort.exclusions + told
    return dataclasses.replace(cohort.rows(good, ""), exclusions=exclusions)


def _folds(cohort: Cohort, options: E2EOptions) -> tuple[Cohort, np.ndarray]:
    """Folds of the slides: given, of the heads' study, or made; all 0 for a single training."""
    study = Path(options.head) / "folds.csv"
    of_study = options.head not in HEADS and study.is_file()  # a folder may be called abmil, too
    given = options.folds_csv or (study if of_study else None)
    check_classes(cohort)
    if options.folds == 1:
        return cohort, np.full(len(cohort), -1)  # no slide is in the test fold, 0
    if given is None:
        return cohort, make_folds(cohort, options.folds, options.seed)
    if of_study and Path(given).read_bytes() != study.read_bytes():
        raise MILError(
            f"--folds-csv {given}: other folds than those of the heads in {options.head}, which "
            "would be tested on slides they have learnt from. Leave --folds-csv out."
        )
    cohort, folds = read_folds(Path(given), cohort)
    written = {line["fold"] for _, line in read_lines(study, ("fold",))} if of_study else ()
    if written and folds.max() + 1 != len(written):
        raise MILError(
            f"{given}: of its {len(written)} folds only {folds.max() + 1} have slides here: heads "
            f"in {options.head} would be taken for those of other folds, and tested on slides they "
            "have learnt from. Give slides of every fold, or --head abmil."
        )
    if folds.max() + 1 != options.folds:
        raise MILError(f"{given}: {folds.max() + 1} folds, and --folds {options.folds}.")
    return cohort, folds


def _validation(
    cohort: Cohort, folds: np.ndarray, chosen: Sequence[int], options: E2EOptions
) -> dict[int, np.ndarray]:
    """Validation slides of each fold, (n,) bool; for a trained head those that stopped it."""
    made: dict[int, np.ndarray] = {}
    for fold in chosen:
        outside, rows = folds != fold, None
        if options.head not in HEADS:
            rows = stopping_rows(cohort, outside, _head_folder(options, fold))
        if rows is None:
            rows = validation_rows(cohort, outside, options.validation_share, options.seed)
        made[fold] = rows
    return made


def _warn(cohort: Cohort, chosen: Sequence[int], options: E2EOptions) -> None:
    """Say what makes a study weaker than it looks."""
    if options.folds > 1:
        warn_rare(cohort, options.folds)
    if options.head not in HEADS and not training_slides(_head_folder(options, chosen[0])):
        logger.warning(
            "--head %s: no study beside it says from which slides it has learnt. Those among the "
            "validation slides would keep the training going for too long.",
            options.head,
        )


def _fold(
    encoder: Encoder,
    cache: FrozenCache,
    cohort: Cohort,
    folds: np.ndarray,
    fold: int,
    validation: np.ndarray,
    options: E2EOptions,
    record: dict[str, Any],
    advance: Advance,
) -> FoldResult:
    """Train one fold, test it, save its folder; or read what an earlier run left."""
    folder = Path(options.out) / "heads" / f"fold-{fold}"
    record = record | {"fold": fold, "head_revision": record["head_revisions"][str(fold)]}
    del record["head_revisions"]  # of the other folds
    validating = [str(name) for name in cohort.slide_ids[validation]]
    if options.head not in HEADS:  # by the head's study, which no option tells
        record["validation"] = hashlib.sha256(json.dumps(validating).encode()).hexdigest()[:16]
    test = np.flatnonzero(folds == fold)
    if (folder / "config.json").is_file():
        return _finished_fold(folder, fold, test, cohort, record)
    rows = np.flatnonzero((folds != fold) & ~validation)
    accelerator = _accelerator(options)
    set_seed(options.seed + fold)
    model = _start(encoder, cohort, cohort.labels[rows], fold, options, cache.geometry)
    per_step = options.accumulation * accelerator.num_processes
    steps = options.epochs * -(-len(rows) // per_step)
    work = Path(options.out) / "runs" / f"fold-{fold}"
    model, progress = train_fold(
        accelerator,
        model,
        cache,
        _slides(cohort, rows),
        _slides(cohort, np.flatnonzero(validation)),
        options,
        work,
        record,
        step=lambda: advance(f"fold {fold}", 1, steps),
    )
    probabilities = predict_slides(accelerator, model, cache, _slides(cohort, test))
    model = model.cpu().eval()
    trained = sum(p.numel() for p in model.encoder.parameters() if p.requires_grad)
    stamp(model, cache.geometry)
    if accelerator.is_main_process:
        result = {
            "run": record,
            "best_epoch": progress.best_epoch,
            "history": progress.history,
            "trained_parameters": trained,  # of the encoder
            "validation": validating,
            "test": [str(name) for name in cohort.slide_ids[test]],
            "probabilities": probabilities.tolist(),
        }
        _save(model, folder, cohort, encoder, result)
        remove_checkpoints(work)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return FoldResult(fold, folder, test, probabilities, progress.best_epoch, progress.history)


def _slides(cohort: Cohort, rows: np.ndarray) -> list[TrainingSlide]:
    return [TrainingSlide(str(cohort.slide_ids[row]), int(cohort.labels[row])) for row in rows]


def _finished_fold(
    folder: Path, fold: int, test: np.ndarray, cohort: Cohort, record: dict[str, Any]
) -> FoldResult:
    """What an earlier run of the same options left."""
    path = folder / FOLD_FILE
    if not path.is_file():
        raise MILError(
            f"{folder} holds a model that `xmag e2e` did not make. Choose another --out."
        )
    old = json.loads(path.read_text())
    # What is finished does not depend on how many processes read it.
    refuse_other(f"{folder} holds a model", old["run"], record | {"world": old["run"]["world"]})
    if old["test"] != [str(name) for name in cohort.slide_ids[test]]:
        raise MILError(f"{folder} was tested on other slides. Choose another --out, or remove it.")
    probabilities = np.array(old["probabilities"]).reshape(len(test), len(cohort.classes))
    return FoldResult(fold, folder, test, probabilities, old["best_epoch"], old["history"])


def _start(
    encoder: Encoder,
    cohort: Cohort,
    labels: np.ndarray,
    fold: int,
    options: E2EOptions,
    geometry: PatchGeometry,
) -> XMAGForSlideClassification:
    """The model before its training."""
    weights = balanced_weights(labels, len(cohort.classes)) if options.class_weights else None
    head = _scratch(encoder, cohort.classes, options)
    if options.head not in HEADS:
        head = _trained_head(encoder, cohort, fold, options, geometry)
    return slide_model(encoder, head, class_weights=weights, **_shape(options))


def _head_folder(options: E2EOptions, fold: int) -> Path:
    """Where the trained head lies that a fold goes on from.

    Raises:
        MILError: One head for several folds, or heads whose folds are not known.
    """
    study = Path(options.head)
    folder = study / "heads" / f"fold-{fold}"
    if folder.is_dir():
        if not (study / "folds.csv").is_file():
            raise MILError(f"{study}: no folds.csv, so its heads' folds are not known.")
        return folder
    if options.folds > 1:
        raise MILError(
            f"--head {study}: one head for {options.folds} folds has learnt from slides that it "
            "would be tested on. Give the study that holds heads/fold-K, or --folds 1."
        )
    return study


def _head_revision(options: E2EOptions, fold: int) -> str | None:
    """Digest of the weights that a fold's head goes on from; None from scratch."""
    if options.head in HEADS:
        return None
    weights = _head_folder(options, fold) / "model.safetensors"
    try:
        return f"sha256:{hashlib.sha256(weights.read_bytes()).hexdigest()[:16]}"
    except OSError as error:
        raise MILError(f"--head {options.head}: {error}. Give a folder of `xmag mil`.") from error


def _trained_head(
    encoder: Encoder, cohort: Cohort, fold: int, options: E2EOptions, geometry: PatchGeometry
) -> Any:
    """The head that a fold goes on from, checked against encoder, classes and folds."""
    head = load_head(str(_head_folder(options, fold)))
    classes = tuple(head.config.id2label[k] for k in range(head.config.num_labels))
    ours = {
        "classes": cohort.classes,
        "encoder": encoder.name,
        "encoder_revision": encoder.revision,
        "pooling": own_pooling(encoder),
        "normalisation": encoder.normalisation,
        "mpp": geometry.mpp,
        "patch_px": geometry.patch_px,
    }
    theirs = {name: getattr(head.config, name, None) for name in ours} | {"classes": classes}
    wrong = [f"{name} {theirs[name]!r}, here {ours[name]!r}" for name in not_the_same(ours, theirs)]
    if wrong:
        raise MILError(f"--head {options.head}: trained on other bags: {'; '.join(wrong)}.")
    return head


def _conclude(
    cohort: Cohort, trained: Sequence[FoldResult], options: E2EOptions, record: dict[str, Any]
) -> CompareResult:
    """Write the study's report, and the model to publish: of the lowest validation loss."""
    out = Path(options.out)
    losses = [result.history[result.best_epoch - 1]["validation_loss"] for result in trained]
    best = trained[int(np.argmin(losses))]
    head, partial = out / "head", out / ".head.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(best.folder, partial)
    shutil.rmtree(head, ignore_errors=True)
    partial.replace(head)
    told = [{"best_epoch": one.best_epoch, "history": one.history} for one in trained]
    return write_report(
        out,
        out.name,
        [Tested(cohort, one.fold, one.rows, one.probabilities) for one in trained],
        record | {"classes": cohort.classes, "folds": told, "published_fold": best.fold},
        samples=options.samples,
        level=options.level,
        seed=options.seed,
    )


def _save(
    model: XMAGForSlideClassification,
    folder: Path,
    cohort: Cohort,
    encoder: Encoder,
    result: dict[str, Any],
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    card = _card(model, cohort, encoder, result)
    text = json.dumps(result, indent=1)
    save_folder(model, image_processor_for(model.encoder), card, folder, {FOLD_FILE: text})


def _card(
    model: XMAGForSlideClassification, cohort: Cohort, encoder: Encoder, result: dict[str, Any]
) -> str:
    """The folder's README.md."""
    options, config = result["run"]["options"], model.config
    return f"""---
library_name: transformers
license: other
license_name: see-card
license_link: README.md#licence
tags: [pathology, whole-slide-images, multiple-instance-learning, xmag]
---
# {config.encoder_config.model_type} and {config.head_config.model_type}, trained end to end

Pixels of a whole slide, in patches of {config.patch_px} px at {config.mpp:g} um/px, to
{", ".join(cohort.classes)}. Research only: not for diagnosis.

- Encoder: started from {encoder.name} {encoder.revision}; the first
  {config.frozen_stages} stages frozen, {result["trained_parameters"]:,} of its parameters trained.
- Slides: {len(cohort)} of {len(set(cohort.patient_ids))} patients, fold {result["run"]["fold"]} of
  {options["folds"]} left out; epoch {result["best_epoch"]} of {len(result["history"])} kept.
- Options: `{json.dumps(options)}`

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("FOLDER", trust_remote_code=True).eval()
output = model(pixel_values=patches)  # (1, M, 3, 224, 224), from the image processor beside it
output.logits, output.attentions
```

`xmag predict` and `xmag heatmap` take the folder as `--head`.

## Licence

The encoder's, of which this is a changed version: {encoder.licence}. Terms of slides and labels:
not stated here; ask whoever trained this model.
"""
