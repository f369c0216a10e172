"""One distillation run: teacher on sixteen 20x sub-patches, student on the 5x view.

The loop itself is `_train`; everything before it opens inputs, everything after it scores the
averaged student on held-out pairs.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from xmag_hf.distillation.checkpoints import (
    find_checkpoint,
    finished_with,
    refuse_foreign,
    run_record,
)
from xmag_hf.distillation.corpus import Corpus, Split, open_corpus, split_digest, split_pairs
from xmag_hf.distillation.distiller import Distiller, prepare_batch
from xmag_hf.distillation.ema import ExponentialMovingAverage
from xmag_hf.distillation.loss import DistillationLoss
from xmag_hf.distillation.options import NAMED_STARTS, DistillationError, DistillOptions
from xmag_hf.distillation.pairs import (
    Batch,
    PairReader,
    Placement,
    batches,
    micro_batches_per_epoch,
    student_columns,
)
from xmag_hf.distillation.scoring import PixelStatistics, score_students
from xmag_hf.distillation.targets import TargetMap, fit_target_map
from xmag_hf.distillation.teacher import (
    Teacher,
    agree,
    best_device,
    check_teacher,
    open_teacher,
    plan_teacher,
    progress_bar,
    scoring_features,
)
from xmag_hf.encoder_files import tensors_digest
from xmag_hf.modeling import XMAGImageProcessor
from xmag_hf.modeling.convert import build_student, image_processor_for
from xmag_hf.training.checkpoints import (
    Metrics,
    remove_checkpoints,
    save_checkpoint,
    stop_on_sigterm,
)
from xmag_hf.training.processes import any_rank, only_run, open_accelerator

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DistillResult:
    """What a finished run hands over.

    Attributes:
        options: Of the run.
        student: The averaged encoder.
        start: The student before training.
        processor: Image processor of both.
        teacher: That it was distilled from.
        corpus: That it was distilled on.
        split: Which pairs were trained on.
        steps: Optimiser steps.
        seconds: Of training, checkpoints included, interruptions not.
        last_metrics: Last line of metrics.jsonl.
        run: Options, fingerprint and versions, for the record.
    """

    options: DistillOptions
    student: PreTrainedModel
    start: PreTrainedModel
    processor: XMAGImageProcessor
    teacher: Teacher
    corpus: Corpus
    split: Split
    steps: int
    seconds: float
    last_metrics: dict[str, Any]
    run: dict[str, Any]


@dataclass
class _Run:
    """Everything the loop touches."""

    options: DistillOptions
    accelerator: Accelerator
    corpus: Corpus
    split: Split
    teacher: Teacher
    distiller: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    ema: ExponentialMovingAverage
    pixels: PixelStatistics
    total_steps: int
    record: dict[str, Any]
    quiet: bool


def distill(
    options: DistillOptions, *, quiet: bool = False, held: contextlib.ExitStack | None = None
) -> DistillResult | None:
    """Distil a student as `options` say; go on from a checkpoint if there is one.

    Recipe: arXiv 2509.23097, Sec. 2. Called by every process of `accelerate launch`.

    Args:
        options: Of the run.
        quiet: No progress bars.
        held: Keeps other runs out of `output_dir` until it is closed, for who saves the student
            there; None: until this returns.

    Returns:
        The result, or None if `output_dir` already holds it.

    Raises:
        DistillationError: Data, teacher, options or loss that cannot go on; another run has
            `output_dir`; also after SIGTERM, once a checkpoint is written.
        TrainingError: What accelerate is set to, or has installed, does not fit the options.
    """
    accelerator = open_accelerator(
        options.mixed_precision,
        options.gradient_accumulation_steps,
        cpu=best_device().type == "cpu",
        trackers=options.report_to,
        project_dir=options.output_dir,
    )
    with contextlib.ExitStack() as own:
        out = Path(options.output_dir).resolve()
        lock = only_run(accelerator, out, DistillationError, "--output-dir")
        (own if held is None else held).enter_context(lock)
        return _distilled(accelerator, options, quiet)


def _distilled(
    accelerator: Accelerator, options: DistillOptions, quiet: bool
) -> DistillResult | None:
    """The student, from first to last step, or as far as it is not there yet."""
    refuse_foreign(options.output_dir)
    # A student or a gated teacher that cannot be had must fail before hours of data work.
    checked = check_teacher(options)
    set_seed(options.seed)
    student = build_student(options.student, options.init, drop_path_rate=options.drop_path_rate)
    corpus = open_corpus(options.data, streaming=options.streaming)
    student_columns(options, corpus)  # what is not there must be said before the teacher's work
    split = split_pairs(corpus.index, options.holdout, margin=options.mpp_jitter)
    per_epoch = micro_batches_per_epoch(corpus, split.train, options, accelerator.num_processes)
    total_steps = options.max_steps or max(
        1, int(options.epochs * per_epoch) // options.gradient_accumulation_steps
    )
    warmup_steps = _warmup_steps(options, total_steps)
    plan = plan_teacher(options, checked, corpus, accelerator)
    # A named start is known by its name and the seed: drawn or resampled numbers may differ in
    # their last bits from one processor to another.
    named = options.init is None or options.init in NAMED_STARTS
    record = run_record(
        options,
        fingerprint=corpus.fingerprint,
        split=split_digest(corpus.index, split),
        start=None if named else tensors_digest(student.state_dict()),
        teacher=plan.revision,
        teacher_precision=plan.precision,
        world=accelerator.num_processes,
        precision=str(accelerator.mixed_precision),
    )
    finished = not options.overwrite and finished_with(options.output_dir, record)
    agree(accelerator, finished, "finished models", "--output-dir")
    if finished:
        return None
    teacher = open_teacher(options, plan, corpus, accelerator, quiet)
    start = copy.deepcopy(student)
    run = _prepare(
        options, accelerator, corpus, split, teacher, student, total_steps, warmup_steps, record
    )
    run.quiet = quiet
    try:
        seconds, last = _train(run)
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
    student = _finished_student(run)
    processor = image_processor_for(student)
    return DistillResult(
        options,
        student,
        start,
        processor,
        teacher,
        corpus,
        split,
        total_steps,
        seconds,
        last,
        record,
    )


def score_result(result: DistillResult) -> list[dict[str, Any]]:
    """Alignment of start, student and constant on the held-out parts; for one process.

    Always against the teacher on 20x sub-patches, also after --teacher-view 5x, so that such a
    control and the student beside it are measured with one ruler.

    Args:
        result: Of `distill`.

    Returns:
        Rows of `scoring.score_students`; none without held-out parts.

    Raises:
        DistillationError: A held-out pair that does not decode.
        ValueError: Too few training pairs for the ridge map.
    """
    if not result.split.held_out:
        return []
    options, teacher = result.options, result.teacher
    device = teacher.encoder.device if teacher.encoder is not None else best_device()
    teacher_features = scoring_features(options, teacher, result.corpus, device)
    students = {"start": result.start, "distilled": result.student}
    for student in students.values():
        student.to(device)  # type: ignore[arg-type]
    rows = score_students(
        students,
        PixelStatistics.of(result.processor),
        result.corpus,
        result.split,
        teacher_features,
        max_pairs=options.alignment_pairs,
        seed=options.seed,
    )
    result.student.cpu()
    return rows


def _warmup_steps(options: DistillOptions, total_steps: int) -> int:
    """Warm-up as steps; a warm-up as long as the run would never let the rate fall."""
    steps = math.ceil(options.warmup_ratio * total_steps)
    if steps >= total_steps and total_steps > 1:
        raise DistillationError(
            f"--warmup_ratio={options.warmup_ratio}: {steps} of {total_steps} steps would be "
            "warm-up, so the rate would never fall. Lower it or train longer."
        )
    return min(steps, total_steps - 1)


def _prepare(
    options: DistillOptions,
    accelerator: Accelerator,
    corpus: Corpus,
    split: Split,
    teacher: Teacher,
    student: PreTrainedModel,
    total_steps: int,
    warmup_steps: int,
    record: dict[str, Any],
) -> _Run:
    """Build optimiser, schedule and average, and place them on the device."""
    student.config.teacher = teacher.name
    if options.teacher_view != "20x":
        student.config.teacher += f" on {options.teacher_view} views enlarged, no 20x detail"
    student.config.teacher_dim = teacher.embed_dim
    student.config.corpus_fingerprint = corpus.fingerprint
    # Channels last: a third off a step of the convolutional student on a CPU, nothing on a ViT.
    student.to(device=accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = ExponentialMovingAverage(student, options.ema_decay)
    if options.gradient_checkpointing:
        student.gradient_checkpointing_enable()
    set_seed(options.seed)  # the heads are the same whether a teacher was loaded before or not
    loss = DistillationLoss(
        student.config.hidden_size,
        teacher.embed_dim,
        global_weight=options.global_weight,
        local_weight=options.local_weight,
        relational_weight=options.relational_weight,
        target_map=_target_map(options, teacher, split),
    )
    distiller: nn.Module = Distiller(student, loss, masks_tokens=options.token_mask_ratio > 0)
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        # timm's, because torch's own would drop the activations inside timm's BatchNorms.
        distiller = convert_sync_batchnorm(distiller)  # type: ignore[assignment]
    optimizer = AdamW(
        _parameter_groups(distiller, options.weight_decay),
        lr=options.learning_rate,
        fused=accelerator.device.type == "cuda",
    )
    scheduler = get_cosine_schedule_with_warmup(optimizer, warmup_steps, total_steps)
    distiller, prepared = accelerator.prepare(distiller, optimizer)
    accelerator.register_for_checkpointing(ema, scheduler)
    set_seed(options.seed, device_specific=True)  # stochastic depth differs between ranks
    pixels = PixelStatistics.of(image_processor_for(student))
    return _Run(
        options,
        accelerator,
        corpus,
        split,
        teacher,
        distiller,
        prepared,
        scheduler,
        ema,
        pixels,
        total_steps,
        record,
        quiet=False,
    )


def _target_map(options: DistillOptions, teacher: Teacher, split: Split) -> TargetMap | None:
    if teacher.features is None:
        return None  # the options have refused anything but plain targets
    return fit_target_map(teacher.features, split.train, options.target_centering, options.seed)


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices and kernels only, not on biases, norms and layer scales."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def _train(run: _Run) -> tuple[float, dict[str, Any]]:
    """Run the loop from the last checkpoint to the end; return seconds and the last metrics."""
    options, accelerator = run.options, run.accelerator
    done, earlier = _resume(run)
    accumulation = options.gradient_accumulation_steps
    if options.report_to:
        accelerator.init_trackers("xmag_distill", config=_flat(run.record["options"]))
    metrics = None
    if accelerator.is_main_process:
        metrics = Metrics(Path(options.output_dir) / "metrics.jsonl", done)
    reader = PairReader.of(options, run.teacher.features, run.corpus)
    loader = batches(
        run.corpus,
        run.split.train,
        reader,
        options,
        Placement(accelerator.process_index, accelerator.num_processes),
        start=done * accumulation,
        stop=run.total_steps * accumulation,
        pin_memory=accelerator.device.type == "cuda",
    )
    run.distiller.train()
    window = _Window.of(earlier.get("window"), accelerator)
    last = _last_line(options, done)
    began = time.perf_counter() - earlier.get("seconds", 0.0)
    with stop_on_sigterm() as stop, progress_bar(accelerator, run.quiet) as bar:
        task = bar.add_task("distillation", total=run.total_steps, completed=done, note="")
        for step in range(done + 1, run.total_steps + 1):
            window.add(*_step(run, loader, window))
            if step % options.log_steps == 0 or step == run.total_steps:
                last = _log(run, metrics, step, window)
                window = _Window()
            bar.update(task, completed=step, note=f"loss {last.get('loss', float('nan')):.4f}")
            stopping = any_rank(accelerator, stop.asked)
            if stopping or step % options.checkpoint_steps == 0 or step == run.total_steps:
                state = run.record | {"seconds": time.perf_counter() - began}
                state["window"] = window.state(accelerator)
                pause = time.perf_counter()
                save_checkpoint(accelerator, options.output_dir, step, state)
                window.began += time.perf_counter() - pause  # no part of the rate
            if stopping and step < run.total_steps:
                raise DistillationError(
                    f"stopped by SIGTERM after step {step} of {run.total_steps}; a checkpoint is "
                    f"in {options.output_dir}/checkpoints. Run the same command to go on."
                )
    return time.perf_counter() - began, last


class _Window:
    """What is summed between two lines of the log."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.waited = 0.0
        self.steps = 0
        self.sums: dict[str, Tensor] = {}
        self.grad_norm = self.learning_rate = float("nan")

    @classmethod
    def of(cls, state: dict[str, Any] | None, accelerator: Accelerator) -> _Window:
        """The one that a checkpoint cut, as `state` gave it; None for a new one."""
        window = cls()
        if state is not None:
            values = state["processes"][accelerator.process_index]
            waited, seconds, *sums = torch.tensor(values, device=accelerator.device)
            window.waited, window.began = float(waited), window.began - float(seconds)
            window.steps, window.sums = state["steps"], dict(zip(state["names"], sums, strict=True))
        return window

    def add(self, parts: dict[str, Tensor], grad_norm: float, learning_rate: float) -> None:
        self.steps += 1
        self.grad_norm, self.learning_rate = grad_norm, learning_rate  # of the last step
        for name, value in parts.items():
            earlier = self.sums.get(name)
            self.sums[name] = value if earlier is None else earlier.to(value) + value

    def state(self, accelerator: Accelerator) -> dict[str, Any] | None:
        """The sums of every process for a checkpoint, as JSON takes them; None between windows."""
        if not self.steps:
            return None
        times = torch.tensor([self.waited, time.perf_counter() - self.began])
        values = torch.stack([*times.to(accelerator.device), *self.sums.values()])
        processes = accelerator.gather(values[None]).tolist()  # type: ignore[union-attr]
        return {"steps": self.steps, "names": list(self.sums), "processes": processes}


def _step(
    run: _Run, loader: Iterator[Batch], window: _Window
) -> tuple[dict[str, Tensor], float, float]:
    """One optimiser step: forward, backward, clip, step, schedule, average.

    Returns the losses, the gradient's norm before clipping and the learning rate of the step.
    """
    accelerator, options = run.accelerator, run.options
    sums: dict[str, Tensor] = {}
    grad_norm = float("nan")
    for _ in range(options.gradient_accumulation_steps):
        waiting = time.perf_counter()
        batch = _next(loader)
        window.waited += time.perf_counter() - waiting
        batch = {k: v.to(accelerator.device, non_blocking=True) for k, v in batch.items()}
        with accelerator.accumulate(run.distiller):
            pixel_values, targets = prepare_batch(
                batch, run.pixels, run.teacher.encoder, options.teacher_batch_size
            )
            parts = run.distiller(pixel_values, targets, batch.get("mask"), batch.get("zoom"))
            _refuse_non_finite(run, parts["loss"], batch["row"])
            accelerator.backward(parts["loss"])
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(
                    run.distiller.parameters(), options.max_grad_norm
                )
                grad_norm = float(norm) if norm is not None else grad_norm
            run.optimizer.step()
            run.optimizer.zero_grad()
        for name, value in parts.items():
            part = value.detach() / options.gradient_accumulation_steps
            sums[name] = sums[name] + part if name in sums else part
    if not accelerator.optimizer_step_was_skipped:  # fp16's scaler skips steps that overflowed
        run.ema.update(_unwrapped_student(run))
    learning_rate = run.scheduler.get_last_lr()[0]
    run.scheduler.step()
    return sums, grad_norm, float(learning_rate)


def _next(loader: Iterator[Batch]) -> Batch:
    """The next batch; an error of a loader process as its own message, without its traceback."""
    try:
        return next(loader)
    except DistillationError as error:
        text = str(error).strip().splitlines()[-1].split("DistillationError: ")[-1]
        raise DistillationError(text) from error


def _refuse_non_finite(run: _Run, loss: Tensor, rows: Tensor) -> None:
    if torch.isfinite(loss):
        return
    index = run.corpus.index
    names = sorted({str(index.slide_names[index.slide[row]]) for row in rows.tolist()})
    raise DistillationError(
        f"loss is {loss.item()} on pairs {rows.tolist()[:8]} ... of {', '.join(names[:5])}. Lower "
        "--learning_rate, use --mixed_precision no, or look at those pairs; the last checkpoint "
        f"in {run.options.output_dir}/checkpoints is from before."
    )


def _log(
    run: _Run,
    metrics: Metrics | None,
    step: int,
    window: _Window,
) -> dict[str, Any]:
    """Average over ranks and window, write one line, tell the trackers."""
    accelerator = run.accelerator
    seconds = time.perf_counter() - window.began
    names = list(window.sums)
    values = torch.stack([window.sums[name] / window.steps for name in names])
    values = accelerator.reduce(values, reduction="mean")
    waits = torch.tensor([window.waited / seconds], device=accelerator.device)
    options = run.options
    pairs = options.batch_size * options.gradient_accumulation_steps * accelerator.num_processes
    line = {
        "step": step,
        **dict(zip(names, values.tolist(), strict=True)),  # type: ignore[union-attr]
        "learning_rate": window.learning_rate,
        "grad_norm": window.grad_norm,
        "pairs_per_second": pairs * window.steps / seconds,
        # The slowest loader: the other processes wait for it in the backward pass.
        "data_wait_share": accelerator.gather(waits).max().item(),  # type: ignore[union-attr]
    }
    if metrics is not None:
        metrics.write(line)
    if run.options.report_to:
        accelerator.log({k: v for k, v in line.items() if k != "step"}, step=step)
    return line


def _resume(run: _Run) -> tuple[int, dict[str, Any]]:
    """Load the last checkpoint; return its step and record, 0 and {} without one."""
    options, accelerator = run.options, run.accelerator
    if not options.resume:
        if accelerator.is_main_process:
            remove_checkpoints(options.output_dir)
        accelerator.wait_for_everyone()
        return 0, {}
    found = find_checkpoint(options.output_dir, run.record)
    agree(accelerator, found and found.step, "checkpoints", "--output-dir")
    if found is None:
        return 0, {}
    accelerator.load_state(str(found.folder))
    logger.info("resumed from %s", found.folder)
    return found.step, found.record


def _last_line(options: DistillOptions, step: int) -> dict[str, Any]:
    """The last line of metrics.jsonl, for a run that resumes after its last step."""
    path = Path(options.output_dir) / "metrics.jsonl"
    lines = path.read_text().splitlines() if step and path.exists() else []
    return json.loads(lines[-1]) if lines else {"step": step}


def _unwrapped_student(run: _Run) -> nn.Module:
    return run.accelerator.unwrap_model(run.distiller).student


def _finished_student(run: _Run) -> PreTrainedModel:
    return run.ema.model.cpu().eval()  # type: ignore[return-value]


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    """Options as trackers take them: no lists, no None."""
    return {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in options.items()}
