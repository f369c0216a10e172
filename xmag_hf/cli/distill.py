"""Distil a 20x teacher into a 5x student on a paired corpus.

One process by itself; many by `accelerate launch train_distill.py` with the same options. What it
saves loads with `AutoModel.from_pretrained(output_dir)`; stop it at any moment and run the same
command to go on.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xmag_hf.atomic_write import write_atomically
from xmag_hf.cli.options import add_options, read_options
from xmag_hf.distillation.options import CARD_OPTIONS, DistillOptions, recorded_options
from xmag_hf.reporting.records import versions

if TYPE_CHECKING:
    from xmag_hf.distillation.trainer import DistillResult
    from xmag_hf.hub.cards import CardFacts

EXAMPLE = (
    "xmag distill --data corpus --teacher efficientnet-lite0 --student lite --cache-teacher \\\n"
    "      --epochs 3 --batch-size 32 --learning-rate 1e-3 --output-dir xmag"
)
PACKAGES = ("torch", "transformers", "timm", "accelerate", "datasets", "numpy")
START_LICENCES = {"dinov2": "Apache-2.0", "imagenet": "Apache-2.0", "random": "none"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every field of `DistillOptions`, with hyphens or underscores."""
    add_options(parser, DistillOptions)


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Distil, save the folder, push it if asked, print what was made."""
    from accelerate import PartialState

    from xmag_hf.distillation.trainer import distill

    options = read_options(DistillOptions, args)
    _refuse_start(options)
    failed = False
    with contextlib.ExitStack() as held:  # no other run may write there before all is saved
        result = distill(options, quiet=args.quiet, held=held)
        state = PartialState()
        if state.is_main_process:
            failed = _conclude(options, result)
    state.wait_for_everyone()  # the others leave once the folder is there
    state.destroy_process_group()
    return int(failed)


def _conclude(options: DistillOptions, result: DistillResult | None) -> bool:
    """Save, score and push, as far as that is not done yet; whether scoring failed."""
    if result is None:
        print(f"{options.output_dir} already holds this model; {_correct_card(options)}")
    elif _save_and_score(result):
        return True
    if options.push_to_hub and options.hub_model_id:
        from xmag_hf.hub.folders import push_folder

        print(push_folder(options.output_dir, options.hub_model_id, private=options.hub_private))
    return False


def _refuse_start(options: DistillOptions) -> None:
    """Refuse a start whose licence forbids changed versions before training, not after it."""
    from xmag_hf.hub.licences import student_licence

    student_licence(None, _start_licence(options), [])


def _start_licence(options: DistillOptions) -> str | None:
    """Licence of the starting weights; None where nobody said."""
    from xmag_hf.encoders import weights_licence
    from xmag_hf.modeling.convert import DEFAULT_INIT

    start = options.init or DEFAULT_INIT[options.student]
    return START_LICENCES[start] if start in START_LICENCES else weights_licence(start)


def _save_and_score(result: DistillResult) -> bool:
    """Save the model, then score it and save again with the scores; whether scoring failed."""
    from xmag_hf.distillation.trainer import score_result
    from xmag_hf.training.checkpoints import remove_checkpoints

    _save(result, [], scored=False)  # first of all: nothing that happens now may lose the model
    try:
        alignment = score_result(result)
    except (ValueError, OSError) as error:
        print(
            f"{result.options.output_dir} is saved, but its alignment could not be measured: "
            f"{error}\nRun the same command to try again.",
            file=sys.stderr,
        )
        return True
    _save(result, alignment, scored=True)
    remove_checkpoints(result.options.output_dir)
    _print_result(result, alignment)
    return False


def _save(result: DistillResult, alignment: list[dict[str, Any]], *, scored: bool) -> None:
    """Write encoder, processor, card and record into `output_dir`."""
    from xmag_hf.distillation.checkpoints import RESULT_FILE
    from xmag_hf.hub.cards import render_card
    from xmag_hf.hub.folders import save_folder
    from xmag_hf.hub.licences import student_licence

    facts = _card_facts(result, alignment)
    licence = student_licence(facts.teacher_licence, facts.start_licence, facts.corpus_licences)
    result.student.config.licence = licence.summary
    elsewhere = ("options", "versions", "alignment")
    record = {
        "run": result.run,
        "steps": result.steps,
        "seconds": result.seconds,
        "last_metrics": result.last_metrics,
        "scored": scored,
        "alignment": alignment,
        "versions": facts.versions,
        "card": {name: value for name, value in vars(facts).items() if name not in elsewhere},
    }
    folder = result.options.output_dir
    extra = {RESULT_FILE: json.dumps(record, indent=2)}
    save_folder(result.student, result.processor, render_card(facts), folder, extra)


def _correct_card(options: DistillOptions) -> str:
    """Write a finished model's card anew if the slides' licence or source is now another."""
    from xmag_hf.distillation.checkpoints import RESULT_FILE
    from xmag_hf.hub.cards import CardFacts, render_card
    from xmag_hf.hub.licences import student_licence

    folder = Path(options.output_dir)
    record = json.loads((folder / RESULT_FILE).read_text())
    then, now = record["run"]["options"], recorded_options(options)
    if all(then.get(name) == now[name] for name in CARD_OPTIONS):
        return "nothing to do (--overwrite makes it again)."
    then |= {name: now[name] for name in CARD_OPTIONS}
    record["card"] |= {
        "corpus_licences": [options.data_licence],
        "corpus_source": options.data_source,
    }
    given = {"versions": record["versions"], "alignment": record["alignment"] or None}
    facts = CardFacts(**record["card"], options=then, **given)
    licence = student_licence(facts.teacher_licence, facts.start_licence, facts.corpus_licences)
    config = json.loads((folder / "config.json").read_text()) | {"licence": licence.summary}
    # The record last: after a kill before it, the same command writes them again.
    write_atomically(folder / "README.md", render_card(facts))
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"  # as transformers writes it
    write_atomically(folder / "config.json", text)
    write_atomically(folder / RESULT_FILE, json.dumps(record, indent=2))
    return "its card now gives the licence and source of the slides as said."


def _card_facts(result: DistillResult, alignment: list[dict[str, Any]]) -> CardFacts:
    from xmag_hf.encoders import ENCODERS
    from xmag_hf.hub.cards import CardFacts
    from xmag_hf.modeling.convert import DEFAULT_INIT

    options, config, index = result.options, result.student.config, result.corpus.index
    recorded = recorded_options(options)
    start = recorded["init"] or DEFAULT_INIT[options.student]
    teacher = ENCODERS.get(result.teacher.name)
    return CardFacts(
        model_type=config.model_type,
        size=options.student,
        parameters=result.student.num_parameters(),
        embed_dim=config.hidden_size,
        patch_px=config.image_size,
        mpp=config.mpp,
        teacher=result.teacher.name,
        teacher_revision=result.teacher.revision,
        teacher_licence=result.teacher.licence,
        teacher_source=teacher.source if teacher else "its own page",
        start=start,
        start_licence=_start_licence(options),
        corpus=Path(options.data).name if Path(options.data).exists() else options.data,
        corpus_fingerprint=result.corpus.fingerprint,
        corpus_source=options.data_source,
        corpus_licences=[options.data_licence],
        n_pairs=len(result.split.train),
        n_slides=len(set(index.slide[result.split.train].tolist())),
        options=recorded,
        versions=versions(PACKAGES),
        alignment=alignment or None,  # type: ignore[arg-type]
        downstream=None,
        seeds=[options.seed],
        date=datetime.date.today().isoformat(),
        repo_id=options.hub_model_id or Path(options.output_dir).name,
        teacher_view=options.teacher_view,
    )


def _print_result(result: DistillResult, alignment: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from xmag_hf.distillation.scoring import beats_start

    console = Console()
    last = result.last_metrics
    console.print(
        f"{result.steps} steps on {len(result.split.train)} pairs in {result.seconds:.0f} s; "
        f"loss {last.get('loss', float('nan')):.4f} -> {result.options.output_dir}"
    )
    if not alignment:
        console.print("No --holdout: alignment with the teacher was not measured.")
        return
    for part, better in beats_start(alignment).items():
        rows = [row for row in alignment if row["part"] == part]
        table = Table(title=f"{part}: {rows[0]['n_pairs']} pairs, {rows[0]['n_disjoint']} disjoint")
        for heading in ("level", "encoder"):
            table.add_column(heading)
        for heading in ("cosine", "centred", "retrieval", "chance"):
            table.add_column(heading, justify="right")
        for row in rows:
            scores = [f"{row[k]:.3f}" for k in ("cosine", "centred_cosine", "retrieval", "chance")]
            table.add_row(row["level"], row["student"], *scores)
        console.print(table)
        verdict = "above" if better else "NOT above"
        console.print(f"The student is {verdict} start and constant on every measure.")
    console.print("Held-out pairs, after one ridge map per encoder fitted on training pairs.")
