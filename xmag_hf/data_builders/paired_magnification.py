"""The paired-magnification corpus: `build_corpus`, and a `datasets` builder for Python.

Both cut the very same pairs (`pairs.slide_pairs`). `build_corpus` (verb `xmag corpus`) writes
Parquet that anyone loads with `load_dataset(DIR)`; the builder is for people who have slides and
want a `Dataset` in their cache without a folder of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import datasets

from xmag_hf.slides import sha256_head

from .build import BuildState, CorpusSummary, build_corpus
from .corpus_options import CorpusOptions, corpus_fingerprint
from .features import FEATURES, corpus_features
from .pairs import SLIDE_FAULTS, SlideRecord, describe_fault, open_row, slide_pairs
from .slide_list import SlideRow, absolute, check_unique, read_slides_csv

__all__ = [
    "FEATURES",
    "BuildState",
    "CorpusOptions",
    "CorpusSummary",
    "PairedMagnification",
    "PairedMagnificationConfig",
    "SlideRow",
    "build_corpus",
    "read_slides_csv",
]

logger = logging.getLogger(__name__)


@dataclass
class PairedMagnificationConfig(datasets.BuilderConfig):
    """Slides and options of a data set.

    Attributes:
        slides: Paths or `SlideRow`s.
        options: Default `CorpusOptions()`.
        fingerprint: Filled in by the builder: makes the cache notice a changed slide.
    """

    slides: tuple[SlideRow, ...] = ()
    options: CorpusOptions = field(default_factory=CorpusOptions)
    fingerprint: str = ""


class PairedMagnification(datasets.GeneratorBasedBuilder):
    """Pairs of 20x and 5x images from slides.

    `PairedMagnification(slides=[...]).download_and_prepare()`, then `.as_dataset("train")`. Slides
    that cannot be used are logged and left out.

    Raises:
        CorpusError: No slides, or slide_ids given twice.
        OSError: A slide file does not exist.
    """

    config: PairedMagnificationConfig
    BUILDER_CONFIG_CLASS = PairedMagnificationConfig
    VERSION = datasets.Version("1.0.0")

    def __init__(
        self,
        *args: Any,
        slides: Any = (),
        options: CorpusOptions | None = None,
        **kwargs: Any,
    ):
        rows = tuple(
            absolute(slide if isinstance(slide, SlideRow) else SlideRow(slide)) for slide in slides
        )
        check_unique(rows)
        options = options or CorpusOptions()
        heads = [(row.slide_id, row.mpp, sha256_head(row.path)) for row in rows]
        fingerprint = corpus_fingerprint(options, heads)
        super().__init__(*args, slides=rows, options=options, fingerprint=fingerprint, **kwargs)

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(
            description="Pairs of one square of tissue at 20x (0.5 um/px) and 5x (2.0 um/px).",
            features=corpus_features(self.config.options),
        )

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        return [
            datasets.SplitGenerator(
                name="train",  # pyright: ignore[reportArgumentType]
                gen_kwargs={"slides": list(self.config.slides)},
            )
        ]

    def _generate_examples(
        self, slides: list[SlideRow]
    ) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
        # `slides` is a list so that `num_proc` splits it over processes.
        for number, row in enumerate(slides):
            record = SlideRecord.of(row, None)
            try:
                with open_row(row, self.config.options) as slide:
                    pairs = slide_pairs(slide, row, self.config.options, record)
                    for index, pair in enumerate(pairs):
                        yield (number, index), pair
            except SLIDE_FAULTS as error:
                logger.warning("left out: %s", describe_fault(row, error))
            else:
                if record.unreadable or not record.pairs:
                    logger.warning(
                        "%s: %d pairs, %d regions could not be decoded",
                        row.slide_id,
                        record.pairs,
                        record.unreadable,
                    )
