"""A study: five folds by patient, for every encoder on the same ones, several at once, resumable.

Work lies in `OUT.partial/` until everything is there, then the folder is renamed. A fold counts as
done when its answers are in `work/`; its head was written whole before them.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import io
import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xmag_hf._version import __version__
from xmag_hf.atomic_write import write_atomically
from xmag_hf.child_process import begin_child
from xmag_hf.embedding.run import checked_device
from xmag_hf.hub import save_folder
from xmag_hf.lock import only_writer
from xmag_hf.reporting.records import bare, plain

from .bags import LabelledBags, spokesman, warn_of_losses
from .compare import CompareOptions, CompareResult, compare_studies
from .compare_report import comparison_markdown, write_comparison
from .errors import MILError
from .folds import COLUMNS as FOLD_COLUMNS
from .folds import (
    check_classes,
    make_folds,
    read_folds,
    share_of_patients,
    validation_rows,
    warn_rare,
    write_folds,
)
from .labels import (
    Advance,
    Cohort,
    bag_paths,
    class_names,
    differences,
    join,
    read_labels,
    read_lines,
)
from .options import DEFAULT_FOLDS, INTERNAL, RESULTS, HeadOptions, StudyOptions
from .predict import load_head
from .preset_labels import with_preset
from .presets import load_preset
from .report import Tested, head_card, score_study, write_report
from .train import Head, Training, precision_of, predict_head, train_head

logger = logging.getLogger(__name__)

RUN, WORK = "run.json", "work"
POLL_SECONDS = 0.2
LOCAL = ("out", "device", "jobs")  # of a machine; what a device changes is `_precision`
_WORKER: dict[str, Any] = {}  # of a process that trains: where it tells of finished epochs


@dataclass(frozen=True, eq=False)
class Study:
    """One row of the table: a folder of bags under one kind of head.

    Attributes:
        name: Of the row.
        folder: Where its results go.
        kind: `abmil` or `mean-pool`.
        bags: Number of the folder of bags.
    """

    name: str
    folder: Path
    kind: str
    bags: int


@dataclass(frozen=True, eq=False)
class FoldTask:
    """What a process needs to train and test one fold.

    Attributes:
        study: Of the fold.
        fold: Its number.
        classes: Names.
        training: Slides learned from.
        validation: Slides that say when to stop.
        tested: Slides of the fold, then of the external cohort if there is one.
        options: Of the head.
        device: Where it is trained.
    """

    study: Study
    fold: int
    classes: tuple[str, ...]
    training: LabelledBags
    validation: LabelledBags
    tested: tuple[LabelledBags, ...]
    options: HeadOptions
    device: str

    @property
    def answers(self) -> Path:
        """Written last."""
        return self.study.folder / WORK / f"fold-{self.fold}.npz"

    @property
    def head(self) -> Path:
        """Folder of the trained head."""
        return self.study.folder / "heads" / f"fold-{self.fold}"


@dataclass(frozen=True, eq=False)
class _Plan:
    """Everything that is settled before a head is trained."""

    options: StudyOptions
    head: HeadOptions
    cohort: Cohort
    folds: np.ndarray
    validation: tuple[np.ndarray, ...]
    external: Cohort | None
    studies: tuple[Study, ...]
    partial: Path

    @property
    def cohorts(self) -> list[Cohort]:
        return [self.cohort] if self.external is None else [self.cohort, self.external]


def run_study(
    bag_folders: Sequence[Path],
    options: StudyOptions,
    head: HeadOptions,
    advance: Advance | None = None,
) -> CompareResult:
    """Cross-validate heads on bags; go on where an interrupted run of the same command stopped.

    With one folder of bags and one kind of head, `options.out` is the study's folder. With more,
    it holds one for each, named after the folder of bags (and head), and a comparison of them.

    Args:
        bag_folders: One for each encoder.
        options: Of the study.
        head: Of the heads.
        advance: Told of bags checked and epochs trained.

    Returns:
        The scores; with several studies, paired tests of each pair too.

    Raises:
        MILError: Labels, bags, folds or an output folder that cannot be used, see `labels`,
            `folds`; another process works on the same `options.out`; or a process that trains was
            killed or is out of memory.
        EmbedError: There is no such device.
        OSError: Something cannot be read or written.
    """
    out = Path(options.out).expanduser().resolve()
    options = with_preset(options) if options.preset else options
    _check_inputs(bag_folders, options)
    with only_writer(out, MILError):
        plan = _plan(bag_folders, options, head, out, advance)
        return _made(plan, out, advance)


def _made(plan: _Plan, out: Path, advance: Advance | None) -> CompareResult:
    """The study, made now or earlier, in its folder."""
    digest = _digest(plan)
    if _finished(out, digest):
        logger.info("%s: done already", out)
        _tidy(plan, out)
        return _scores(plan, out)
    tasks = _tasks(plan)
    _open_partial(plan.partial, out, digest)
    write_folds(plan.partial / "folds.csv", plan.cohort, plan.folds, plan.validation)
    undone = [task for task in tasks if not task.answers.is_file()]
    _train_all(undone, plan.options.jobs, plan.head, advance)
    for study in plan.studies:
        own = [task for task in tasks if task.study is study]
        result = _conclude(plan, study, own, digest)
    if len(plan.studies) > 1:
        result = _compare(plan, digest)
    if out.exists():
        out.rmdir()  # empty: `_finished` has looked
    os.replace(plan.partial, out)
    _tidy(plan, out)
    return result


def train_fold(task: FoldTask, advance: Callable[[int], None] | None = None) -> None:
    """Train and test one fold; writes its head's folder, then its answers."""
    device = torch.device(task.device)
    seed = 1000 * task.options.seed + task.fold
    model, training = train_head(
        task.study.kind, task.classes, task.training, task.validation, task.options,
        device=device, seed=seed, advance=advance,
    )  # fmt: skip
    answers = [predict_head(model, bags, task.options, device)[0] for bags in task.tested]
    save_head(model.cpu(), _fold_card(task, model, training), task.head, training)
    content = io.BytesIO()
    told = {f"tested{number}": array for number, array in enumerate(answers)}
    np.savez(content, training=np.array(json.dumps(plain(training))), **told)  # type: ignore[arg-type]
    task.answers.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(task.answers, content.getvalue())


def save_head(model: Head, card: str, folder: Path, training: Training) -> None:
    """Write a folder that `AutoModel` loads and the Hub takes, with its training's history."""
    text = json.dumps(plain(training), indent=1)
    save_folder(model, None, card, folder, {"training.json": text})


# --- before ----------------------------------------------------------------------------------


def _check_inputs(bag_folders: Sequence[Path], options: StudyOptions) -> None:
    """Refuse what is known before bags are read, which takes minutes for a large cohort."""
    _devices(options.device)
    class_names(read_labels(Path(str(options.labels)), options.label_column, options.against_rest))
    if options.external_labels is not None:
        read_labels(Path(options.external_labels), options.label_column, options.against_rest)
    if options.folds_csv is not None:
        read_lines(Path(options.folds_csv), FOLD_COLUMNS)
    if options.external_bags and len(options.external_bags) != len(bag_folders):
        raise MILError(
            f"--external-bags: {len(options.external_bags)} folders for {len(bag_folders)} of "
            "BAGS. Give one for each, in their order."
        )
    for folder in (*bag_folders, *options.external_bags):
        bag_paths(Path(folder))


def _plan(
    bag_folders: Sequence[Path],
    options: StudyOptions,
    head: HeadOptions,
    out: Path,
    advance: Advance | None,
) -> _Plan:
    names = _names(bag_folders, options.head)
    rows = read_labels(Path(str(options.labels)), options.label_column, options.against_rest)
    classes = class_names(rows)
    if options.preset:  # in the task's own order: what is high comes after what is low
        classes = tuple(name for name in load_preset(options.preset).classes if name in classes)
    cohort = join(INTERNAL, rows, bag_folders, classes, advance)
    if options.folds_csv is None:
        check_classes(cohort)
        folds = make_folds(cohort, options.folds or DEFAULT_FOLDS, head.seed)
    else:
        cohort, folds = read_folds(Path(options.folds_csv), cohort)
        check_classes(cohort)
        if options.folds not in (None, folds.max() + 1):
            raise MILError(
                f"{options.folds_csv}: {folds.max() + 1} folds, and --folds {options.folds}. Leave "
                "--folds out."
            )
    n_folds = int(folds.max()) + 1
    options = dataclasses.replace(options, folds=n_folds)  # as it is told in results and cards
    warn_rare(cohort, n_folds)
    for exclusion in cohort.exclusions:
        logger.warning("left out: %s: %s", exclusion.slide_id, exclusion.reason)
    external = _external(cohort, options, advance)
    cohorts = [cohort] if external is None else [cohort, external]
    warn_of_losses(bag for one in cohorts for files in one.bags for bag in files)
    validation = tuple(
        validation_rows(cohort, folds != fold, options.validation_share, head.seed)
        for fold in range(n_folds)
    )
    partial = out.with_name(f"{out.name}.partial")
    studies = tuple(
        Study(name, partial if len(names) == 1 else partial / name, kind, bags)
        for (bags, kind), name in names.items()
    )
    return _Plan(options, head, cohort, folds, validation, external, studies, partial)


def _external(cohort: Cohort, options: StudyOptions, advance: Advance | None) -> Cohort | None:
    """The other cohort, of the same classes and encoders, and of other patients."""
    if options.external_labels is None:
        return None
    folders = [Path(folder) for folder in options.external_bags]
    rows = read_labels(Path(options.external_labels), options.label_column, options.against_rest)
    external = join(options.external_name, rows, folders, cohort.classes, advance)
    for ours, theirs in zip(cohort.bags, external.bags, strict=True):
        told = differences(spokesman(ours), spokesman(theirs))
        if told:
            raise MILError(
                f"{ours[0].path.parent} and {theirs[0].path.parent}: bags of different encoders: "
                f"{told}. Give the folders of --external-bags in the order of BAGS."
            )
    both = sorted(set(cohort.patient_ids.tolist()) & set(external.patient_ids.tolist()))
    if both:
        raise MILError(
            f"patient {both[0]!r} is in the labels of both cohorts ({len(both)} in all): heads "
            "would be tested on patients they have learnt from. Drop them from one."
        )
    for exclusion in external.exclusions:
        logger.warning("left out: %s: %s", exclusion.slide_id, exclusion.reason)
    return external


def _names(bag_folders: Sequence[Path], kinds: Sequence[str]) -> dict[tuple[int, str], str]:
    """(number of the folder, kind of head) -> name in tables and of the folder."""
    if not bag_folders:
        raise MILError("no bags: name at least one folder of them.")
    folders = [Path(folder).resolve().name for folder in bag_folders]
    twice = {name for name in folders if folders.count(name) > 1}
    if twice:
        raise MILError(
            f"two folders of bags named {twice.pop()!r}: results are named after them. Rename one."
        )
    return {
        (number, kind): folder if len(kinds) == 1 else f"{folder}-{kind}"
        for number, folder in enumerate(folders)
        for kind in kinds
    }


def _tasks(plan: _Plan) -> list[FoldTask]:
    devices = _devices(plan.options.device)
    tasks = []
    for fold, validation in enumerate(plan.validation):
        outside = plan.folds != fold
        for study in plan.studies:
            bags = plan.cohort.labelled(study.bags)
            tested = [bags.rows(~outside)]
            if plan.external is not None:
                tested.append(plan.external.labelled(study.bags))
            tasks.append(
                FoldTask(
                    study=study,
                    fold=fold,
                    classes=plan.cohort.classes,
                    training=bags.rows(outside & ~validation),
                    validation=bags.rows(validation),
                    tested=tuple(tested),
                    options=plan.head,
                    device=devices[len(tasks) % len(devices)],
                )
            )
    return tasks


def _devices(name: str) -> list[str]:
    if name == "auto":
        return [f"cuda:{k}" for k in range(torch.cuda.device_count())] or ["cpu"]
    return [checked_device(name)]


def _digest(plan: _Plan) -> str:
    """sha256 over whatever changes a result."""
    slides = [
        [cohort.name, *map(str, row), *(files[n].checksum for files in cohort.bags)]
        for cohort in plan.cohorts
        for n, row in enumerate(
            zip(cohort.slide_ids, cohort.patient_ids, cohort.labels, strict=True)
        )
    ]
    identities = [files[0].identity for cohort in plan.cohorts for files in cohort.bags]
    content = [
        __version__, _shown(plan.options), dataclasses.asdict(plan.head),
        plan.cohort.classes, slides, identities, plan.folds.tolist(),
        [study.name for study in plan.studies], _precision(plan.options),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(plain(content), sort_keys=True).encode()).hexdigest()


def _precision(options: StudyOptions) -> str:
    """Of training and predicting: a study begun on a GPU does not go on without one."""
    return precision_of(torch.device(_devices(options.device)[0]))


def _shown(options: StudyOptions) -> dict[str, Any]:
    """Options without the folders of a disk and its machine: results are shown around."""
    values = {k: v for k, v in dataclasses.asdict(options).items() if k not in LOCAL}
    for name in ("labels", "folds_csv", "external_labels"):
        values[name] = None if values[name] is None else bare(values[name])
    for name in ("external_bags", "preset_files"):
        values[name] = [bare(path) for path in values[name]]
    return values


def _finished(out: Path, digest: str) -> bool:
    """Whether `out` holds this very study.

    Raises:
        MILError: It holds anything else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if _recorded(out / RESULTS) != digest:
        raise MILError(
            f"--out {out}: holds something else than the results of this very command. Name "
            "another, or remove it."
        )
    return True


def _recorded(path: Path) -> str | None:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("study")
    except (OSError, ValueError, AttributeError):
        return None


def _tidy(plan: _Plan, out: Path) -> None:
    """Remove what only a resumed run needs; last, so that a kill at any moment loses nothing."""
    for study in plan.studies:
        shutil.rmtree(out / study.folder.relative_to(plan.partial) / WORK, ignore_errors=True)
    (out / RUN).unlink(missing_ok=True)


def _open_partial(partial: Path, out: Path, digest: str) -> None:
    """A folder to work in: new, or that of an interrupted run of the same study."""
    if partial.exists() and any(partial.iterdir()) and _recorded(partial / RUN) != digest:
        raise MILError(
            f"{partial}: work of another study (other options, labels or bags). Remove it, or "
            f"choose another --out than {out.name}."
        )
    partial.mkdir(parents=True, exist_ok=True)
    write_atomically(partial / RUN, json.dumps({"study": digest}).encode())


# --- training --------------------------------------------------------------------------------


def _train_all(
    tasks: Sequence[FoldTask], jobs: int | None, head: HeadOptions, advance: Advance | None
) -> None:
    """Train folds, several at once in processes of their own.

    Raises:
        MILError: A process was killed, or a GPU is out of memory; names what is not done.
    """
    if not tasks:
        return
    total = head.epochs * len(tasks)

    def told(epochs: int) -> None:
        if advance is not None:
            advance("epochs", epochs, total)

    # As many threads as this process may use: cores, or what OMP_NUM_THREADS leaves.
    cores = torch.get_num_threads()
    on_gpu = tasks[0].device != "cpu"
    jobs = jobs or (len({task.device for task in tasks}) if on_gpu else cores)
    jobs = min(jobs, len(tasks))
    try:
        if jobs == 1:
            for task in tasks:
                train_fold(task, told)
        else:
            _train_apart(tasks, jobs, max(1, cores // jobs), told)
    except (concurrent.futures.BrokenExecutor, torch.OutOfMemoryError) as error:
        undone = [task for task in tasks if not task.answers.is_file()]
        short = isinstance(error, torch.OutOfMemoryError)
        raise MILError(
            f"not done: {', '.join(f'{task.study.name} fold {task.fold}' for task in undone)}: "
            + ("the GPU's memory is full" if short else "a process was killed, or did not start")
            + ". Finished folds are kept: with more memory free"
            + (f", or a lower --jobs ({jobs})," if jobs > 1 else "")
            + " the same command goes on."
        ) from error


def _train_apart(
    tasks: Sequence[FoldTask], jobs: int, threads: int, told: Callable[[int], None]
) -> None:
    context = multiprocessing.get_context("spawn")  # a forked process has no usable GPU
    epochs = context.Queue()
    pool = concurrent.futures.ProcessPoolExecutor(jobs, context, _start_worker, (epochs, threads))
    with pool:
        pending = {pool.submit(_train_in_worker, task) for task in tasks}
        try:
            while pending:
                done, pending = concurrent.futures.wait(pending, POLL_SECONDS)
                while not epochs.empty():
                    told(epochs.get())
                for future in done:
                    future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_worker(epochs: Any, threads: int) -> None:
    begin_child(threads)
    _WORKER["epochs"] = epochs


def _train_in_worker(task: FoldTask) -> None:
    train_fold(task, _WORKER["epochs"].put)


# --- after -----------------------------------------------------------------------------------


def _conclude(plan: _Plan, study: Study, tasks: Sequence[FoldTask], digest: str) -> CompareResult:
    """Write the report of a study, and the head to publish: of the lowest validation loss."""
    tested: list[list[Tested]] = [[] for _ in plan.cohorts]
    trained: list[dict[str, Any]] = []
    for task in tasks:
        with np.load(task.answers) as stored:
            outside = plan.folds != task.fold
            share = share_of_patients(plan.cohort, plan.validation[task.fold], outside)
            sizes = {
                "training": len(task.training), "validation": len(task.validation),
                "tested": len(task.tested[0]), "validation_share": share,
            }  # fmt: skip
            trained.append(json.loads(str(stored["training"])) | sizes)
            own = np.flatnonzero(~outside)
            tested[0].append(Tested(plan.cohort, task.fold, own, stored["tested0"]))
            if plan.external is not None:
                rows = np.arange(len(plan.external))
                tested[1].append(Tested(plan.external, task.fold, rows, stored["tested1"]))
    losses = [entry["history"][entry["best_epoch"] - 1]["validation_loss"] for entry in trained]
    best = int(np.argmin(losses))
    write_folds(study.folder / "folds.csv", plan.cohort, plan.folds, plan.validation)
    record = {
        "study": digest,
        "name": study.name,
        "head": study.kind,
        "bags": plan.cohort.bags[study.bags][0].identity,
        "embed_dim": plan.cohort.bags[study.bags][0].embed_dim,
        "precision": _precision(plan.options),
        "options": _shown(plan.options) | dataclasses.asdict(plan.head),
        "classes": plan.cohort.classes,
        "folds": trained,
        "published_fold": best,
    }
    options = plan.options
    result = write_report(
        study.folder, study.name, [one for cohort in tested for one in cohort], record,
        samples=options.samples, level=options.level, seed=plan.head.seed, preset=options.preset,
    )  # fmt: skip
    model = load_head(tasks[best].head)
    origin = (
        f"Of {len(tasks)} heads of a cross-validation the one with the lowest validation loss: it "
        f"has learnt from {len(tasks[best].training)} slides (all but fold {best} and a validation "
        "split). The results are those of all of them, each on slides it has not learnt from."
    )
    tables = comparison_markdown(result).replace("\n## ", "\n### ").replace("## ", "### ", 1)
    card = head_card(model, plan.cohorts, origin, tables, record["options"])
    history = (tasks[best].head / "training.json").read_text(encoding="utf-8")
    save_folder(model, None, card, study.folder / "head", {"training.json": history})
    return result


def _compare(plan: _Plan, digest: str) -> CompareResult:
    """Tests of every pair of studies, and the results.json that says which studies these are."""
    folders = [study.folder for study in plan.studies]
    result = compare_studies(folders, _compare_options(plan))
    write_comparison(result, folders, plan.partial)
    record = {"study": digest, "studies": [study.name for study in plan.studies]}
    write_atomically(plan.partial / RESULTS, json.dumps(record, indent=2).encode())
    return result


def _compare_options(plan: _Plan) -> CompareOptions:
    options = plan.options
    return CompareOptions(
        names=tuple(study.name for study in plan.studies),
        samples=options.samples, level=options.level, seed=plan.head.seed, preset=options.preset,
    )  # fmt: skip


def _scores(plan: _Plan, out: Path) -> CompareResult:
    """What a finished study says, computed from its predictions."""
    options = plan.options
    folders = [out / study.folder.relative_to(plan.partial) for study in plan.studies]
    if len(folders) > 1:
        return compare_studies(folders, _compare_options(plan))
    name = plan.studies[0].name
    return score_study(
        folders[0], name, samples=options.samples, level=options.level, seed=plan.head.seed,
        preset=options.preset,
    )  # fmt: skip


def _fold_card(task: FoldTask, model: Head, training: Training) -> str:
    origin = (
        f"Fold {task.fold} of a cross-validation: it has learnt from {len(task.training)} slides, "
        f"and {len(task.validation)} others chose epoch {training.best_epoch} of "
        f"{len(training.history)}."
    )
    results = "In the study's folder: a fold alone says little."
    return head_card(model, [], origin, results, dataclasses.asdict(task.options))
