"""Heads on new slides: from stored bags, or from the slides themselves."""

from __future__ import annotations

import csv
import dataclasses
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

import xmag_hf  # noqa: F401  (registers the classes of heads with transformers)
from xmag_hf.atomic_write import write_atomically
from xmag_hf.embedding import Bag, EmbedOptions, SlideSource, read_bag
from xmag_hf.embedding.bag import BagInfo, not_the_same
from xmag_hf.embedding.folding import folded
from xmag_hf.embedding.options import POOLINGS
from xmag_hf.embedding.run import checked_device, one_device
from xmag_hf.embedding.sources import SLIDE_FAULTS, reason_of
from xmag_hf.encoders import ENCODERS, Encoder, load_encoder

from .errors import MILError
from .slide_models import own_encoder

logger = logging.getLogger(__name__)

HUB_PREFIX = "hf:"
HEAD_IDENTITY = (*BagInfo().identity, "embed_dim")  # what a head compares with a bag
ANSWER_COLUMNS = ("slide_id", "predicted")  # the first two
HEAD_TYPES = ("xmag_abmil", "xmag_mean_pool", "xmag_slide")


@dataclass(frozen=True, eq=False)
class SlidePrediction:
    """What a head says of a slide.

    Attributes:
        probabilities: (C,) float64, sum 1.
        attentions: (M,) float32, sum 1.
        label: The class of the highest probability.
    """

    probabilities: np.ndarray
    attentions: np.ndarray
    label: str


@dataclass(frozen=True, eq=False)
class SlideAnswer:
    """A line of the CSV: a prediction, or why there is none, or why to doubt it.

    `skipped` means that nothing went wrong: the slide has no tissue to predict from.
    """

    slide_id: str
    patches: int
    prediction: SlidePrediction | None
    reason: str = ""
    skipped: bool = False

    @property
    def problem(self) -> bool:
        """Whether somebody should look at the slide."""
        return bool(self.reason) and not self.skipped


def load_head(where: str | Path) -> Any:
    """Load a head: attention, mean pool, or encoder and head trained end to end.

    Args:
        where: A folder, or `hf:ORG/NAME`; only the latter is looked for on the Hub.

    Returns:
        The model, in eval mode, on the CPU.

    Raises:
        MILError: Nothing there that loads, or another kind of model.
    """
    from transformers import AutoConfig, AutoModel

    name = str(where).removeprefix(HUB_PREFIX)
    if name == str(where) and not Path(name).is_dir():
        raise MILError(
            f"--head {where}: no such folder. If it is on the Hub: --head {HUB_PREFIX}{where}"
        )
    inner = Path(name) / "head"
    if (inner / "config.json").is_file() and not (Path(name) / "config.json").exists():
        raise MILError(f"--head {where}: is a study. Its head is in it: --head {inner}")
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type not in HEAD_TYPES:
            raise MILError(
                f"--head {where}: is {config.model_type}, which is no head. Give a folder that "
                "`xmag mil` or `xmag e2e` wrote (its head/, or one of its heads/)."
            )
        model, report = AutoModel.from_pretrained(name, config=config, output_loading_info=True)
        if report["missing_keys"]:  # they would hold random numbers, others at every load
            raise MILError(
                f"--head {where}: its weights lack {', '.join(sorted(report['missing_keys'])[:5])}."
                " Copy or save the head again."
            )
    except MILError:
        raise
    # A file cut short is a SafetensorError, weights of other shapes a RuntimeError.
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise MILError(
            f"--head {where}: no head there that loads ({str(error).splitlines()[0]}). Give a "
            "folder with config.json and model.safetensors, or hf:ORG/NAME."
        ) from error
    unsaid = [name for name in ("encoder", "mpp") if getattr(config, name) is None]
    if unsaid:
        logger.warning(
            "%s: its bags did not say their %s: whether others are of the same cannot be checked. "
            "`xmag bags import` writes it into bags.",
            where, " and ".join(unsaid),
        )  # fmt: skip
    return model.eval()


def check_bag(config: Any, bag: Bag) -> None:
    """Refuse a bag that a head was not trained for.

    Args:
        config: Of the head.
        bag: To be predicted.

    Raises:
        MILError: Another encoder, revision, pooling, um/px, patch size or width, each named with
            both values; an empty bag; or features that are not finite.
    """
    theirs = bag.identity | {"embed_dim": bag.features.shape[1]}
    ours = {name: getattr(config, name) for name in HEAD_IDENTITY}
    told = [f"{k} {theirs[k]!r}, not {ours[k]!r}" for k in not_the_same(ours, theirs)]
    if told:
        raise MILError(
            f"{bag.slide_id}: not a bag for this head: {', '.join(told)}. Embed the slide as the "
            "head's card says."
        )
    if not len(bag.features):
        raise MILError(f"{bag.slide_id}: an empty bag, without a patch; nothing to predict from.")
    if not np.isfinite(bag.features).all():
        raise MILError(f"{bag.slide_id}: NaN or infinite features. Embed the slide again.")


def head_of(model: Any) -> Any:
    """The head itself, also of an end-to-end model."""
    return model.head if model.config.model_type == "xmag_slide" else model


def predict_bag(model: Any, bag: Bag) -> SlidePrediction:
    """Ask a head about one bag.

    Args:
        model: As `load_head` gives it; of an end-to-end model the head is asked.
        bag: Of the head's encoder; `check_bag` has looked at it.

    Returns:
        The prediction.
    """
    head = head_of(model)
    features = torch.from_numpy(np.ascontiguousarray(bag.features)).to(head.device).float()
    with torch.inference_mode():
        output = head(features[None])
    probabilities = output.logits[0].double().softmax(dim=0).cpu().numpy()
    label = model.config.id2label[int(probabilities.argmax())]
    return SlidePrediction(probabilities, output.attentions[0].cpu().numpy(), label)


def answer_of(model: Any, bag: Bag) -> SlideAnswer:
    """What a head says of a bag, with a reason where the bag lacks patches of its slide.

    Raises:
        MILError: As `check_bag`.
    """
    check_bag(model.config, bag)
    return SlideAnswer(bag.slide_id, len(bag.features), predict_bag(model, bag), patches_lost(bag))


def patches_lost(bag: Bag) -> str:
    """How many of its slide's patches a bag lacks, and what to do; empty if none."""
    lost = bag.info.unreadable_patches
    if not lost:
        return ""
    return (
        f"{bag.slide_id}: {lost} patches could not be decoded; the answer is from the other "
        f"{len(bag.features)}. Copy the slide again, and remove its bag if it has one."
    )


def predict_bags(model: Any, paths: Sequence[Path]) -> Iterator[SlideAnswer]:
    """Ask a head about stored bags, one at a time; a bag that cannot be used is told, not raised.

    Args:
        model: As `load_head` gives it.
        paths: Bags.

    Yields:
        An answer a bag.
    """
    for path in paths:
        try:
            answer = answer_of(model, read_bag(path))
        except SLIDE_FAULTS as error:
            answer = SlideAnswer(path.stem, 0, None, reason_of(path.stem, error))
        yield answer


def predict_slides(
    model: Any, sources: Sequence[SlideSource], encoder: str | None, options: EmbedOptions
) -> Iterator[SlideAnswer]:
    """Embed slides as the head wants it, and ask it; nothing else is kept of them.

    The encoder is loaded by the call itself, so that what is wrong with it is known at once.

    Args:
        model: As `load_head` gives it.
        sources: Slides.
        encoder: What `load_encoder` takes; None for the encoder that a table names, or that is
            part of an end-to-end model.
        options: Of reading; scale, patch size and pooling are the head's.

    Returns:
        An answer a slide.

    Raises:
        MILError: The encoder is not the head's, or has to be given.
        EmbedError: There is no such device.
        EncoderError: The encoder cannot be had.
    """
    loaded = folded(head_encoder(model, encoder, options))  # once, not for every slide
    return _embedded_answers(model, sources, loaded, head_geometry(model.config, options))


def _embedded_answers(
    model: Any, sources: Sequence[SlideSource], encoder: Encoder, options: EmbedOptions
) -> Iterator[SlideAnswer]:
    from xmag_hf.embedding import embed_slide

    for source in sources:
        try:
            bag = embed_slide(
                source.path, encoder, options, mpp0=source.mpp, slide_id=source.slide_id,
                tissue_geojson=source.tissue_geojson,
            )  # fmt: skip
            if not len(bag.features):
                yield SlideAnswer(source.slide_id, 0, None, f"{source.slide_id}: no tissue", True)
                continue
            answer = answer_of(model, bag)
        except SLIDE_FAULTS as error:
            answer = SlideAnswer(source.slide_id, 0, None, reason_of(source.slide_id, error))
        yield answer


def head_geometry(config: Any, options: EmbedOptions) -> EmbedOptions:
    """The options with scale, patch size and pooling as a head's bags have them."""
    pooling = config.pooling if config.pooling in POOLINGS else "auto"
    return dataclasses.replace(options, mpp=config.mpp, patch_px=config.patch_px, pooling=pooling)


def head_encoder(model: Any, name: str | None, options: EmbedOptions) -> Encoder:
    """The encoder of a head's bags, loaded, and checked to be that one."""
    device = checked_device(one_device(options))
    if model.config.model_type == "xmag_slide":
        return own_encoder(model, device=device, precision=options.precision)
    config = model.config
    if name is None and config.encoder not in ENCODERS:
        raise MILError(
            f"this head takes bags of {config.encoder!r} ({config.encoder_revision}), which no "
            "table names. Say where that encoder is (--model)."
        )
    encoder = load_encoder(name or config.encoder, device=device, precision=options.precision)
    found = {
        "encoder": encoder.name,
        "encoder_revision": encoder.revision,
        "normalisation": encoder.normalisation,
    }
    wanted = {key: getattr(config, key) for key in found}
    other = not_the_same(wanted, found)
    if other:
        raise MILError(
            f"--model {name or config.encoder}: is {_named(found, other)}, and this head takes "
            f"bags of {_named(wanted, other)}."
        )
    return encoder


def _named(identity: dict[str, Any], differing: Sequence[str]) -> str:
    """Encoder and revision, and what was done to pixels where only that differs."""
    text = f"{identity['encoder']} {identity['encoder_revision']}"
    return f"{text}, {identity['normalisation']}" if list(differing) == ["normalisation"] else text


def check_replaceable(path: Path) -> None:
    """Refuse to write answers over a file that holds something else, labels say.

    Raises:
        MILError: It is there, and does not begin as answers do.
    """
    if not path.exists():
        return
    begin = ",".join(ANSWER_COLUMNS).encode() + b","
    with path.open("rb") as file:
        start = file.read(len(begin))
    if start and start != begin:
        raise MILError(f"--out {path}: exists and holds no predictions. Name another file.")


def write_answers(path: Path, classes: Sequence[str], answers: Sequence[SlideAnswer]) -> None:
    """Write slide_id, predicted, p_CLASS for each class, patches, reason."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([*ANSWER_COLUMNS, *(f"p_{c}" for c in classes), "patches", "reason"])
    for answer in answers:
        told: list[str] = [""] * (1 + len(classes))
        if answer.prediction is not None:
            numbers = [f"{value:.9g}" for value in answer.prediction.probabilities]
            told = [answer.prediction.label, *numbers]
        writer.writerow([answer.slide_id, *told, answer.patches, answer.reason])
    write_atomically(path, text.getvalue().encode())
