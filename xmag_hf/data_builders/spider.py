"""SPIDER: labelled 20x patches with their surroundings, as pairs of a 20x and a 5x image.

`build_spider` (verb `xmag spider`) writes Parquet that anyone loads with `load_dataset(DIR)`; the
builder `Spider` is for people who want a `Dataset` in their cache, or a stream, without a folder of
their own. Both make the very same rows (`spider_records.make_row`).

SPIDER: Nechaev, Pchelnikov, Ivanova 2025 (arXiv:2503.02876), CC-BY-NC-4.0.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Features, Image, Value

from .spider_build import SpiderSummary, build_spider
from .spider_records import (
    CHUNK,
    CLASSES,
    ORGANS,
    SPLITS,
    SpiderOptions,
    SpiderTask,
    locate,
    make_row,
    read_records,
)
from .spider_source import (
    LICENCE,
    FolderReader,
    PartsReader,
    SpiderError,
    SpiderSource,
    find_source,
)

__all__ = [
    "Spider",
    "SpiderConfig",
    "SpiderError",
    "SpiderOptions",
    "SpiderSource",
    "SpiderSummary",
    "build_spider",
    "find_source",
    "spider_features",
]

logger = logging.getLogger(__name__)


def spider_features(classes: Sequence[str]) -> Features:
    """Columns of the data set."""
    return Features(
        {
            "image_20x": Image(),
            "image_5x": Image(),
            "label": ClassLabel(names=list(classes)),
            "slide_id": Value("string"),
            "num_missing_context": Value("int8"),
            "mpp": Value("float32"),
            "mpp_5x": Value("float32"),
        }
    )


@dataclass
class SpiderConfig(datasets.BuilderConfig):
    """One organ.

    Attributes:
        options: Default `SpiderOptions()`.
        revision: Of the Hub repository; None is main.
        fingerprint: Filled in by the builder: makes the cache notice other local files.
    """

    options: SpiderOptions = field(default_factory=SpiderOptions)
    revision: str | None = None
    fingerprint: str = ""


class Spider(datasets.GeneratorBasedBuilder):
    """SPIDER with a 5x view of each patch's surroundings.

    `Spider(config_name="breast").download_and_prepare()`, then `.as_dataset("train")`; or
    `.as_streaming_dataset("train")`. `data_dir=` names local files (see `find_source`), and without
    it the Hub is asked. Records that cannot be used are logged and left out.

    Raises:
        SpiderError: The files are not there, may not be had, or are not SPIDER's.
    """

    config: SpiderConfig
    BUILDER_CONFIG_CLASS = SpiderConfig
    BUILDER_CONFIGS = [SpiderConfig(name=organ) for organ in ORGANS]
    VERSION = datasets.Version("1.0.0")

    def __init__(
        self,
        *args: Any,
        config_name: str | None = None,
        data_dir: str | Path | None = None,
        options: SpiderOptions | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ):
        fingerprint = ""
        if data_dir is not None and config_name in ORGANS:
            fingerprint = find_source(config_name, data_dir).identity
        super().__init__(
            *args,
            config_name=config_name,
            data_dir=None if data_dir is None else str(Path(data_dir).absolute()),
            options=options or SpiderOptions(),
            revision=revision,
            fingerprint=fingerprint,
            **kwargs,
        )

    def _info(self) -> datasets.DatasetInfo:
        known = CLASSES.get(self.config.name)
        return datasets.DatasetInfo(
            description="SPIDER's patches at 20x (0.5 um/px), each with a 5x view (2.0 um/px).",
            homepage=f"https://huggingface.co/datasets/histai/SPIDER-{self.config.name}",
            license=LICENCE,
            features=spider_features(known) if known else None,
        )

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        organ, options = self.config.name, self.config.options
        source = find_source(organ, self.config.data_dir, revision=self.config.revision).open()
        data = read_records(organ, source.metadata, options)
        for warning in data.warnings:
            logger.warning("SPIDER-%s: %s", organ, warning)
        # The organ's class names are in the data, which is only now at hand.
        self.info.features = spider_features(data.classes)
        generators = []
        for split in SPLITS:
            tasks = [locate(source, record) for record in data.of(split)]
            if not tasks:  # `datasets` cannot read a split without rows
                logger.warning("SPIDER-%s: split %s is empty, so it is left out", organ, split)
                continue
            chunks = [tasks[i : i + CHUNK] for i in range(0, len(tasks), CHUNK)]
            arguments = {"chunks": chunks, "reader": source.reader, "missing": options.missing}
            generators.append(
                datasets.SplitGenerator(
                    name=split,  # pyright: ignore[reportArgumentType]
                    gen_kwargs=arguments,
                )
            )
        return generators

    def _generate_examples(
        self, chunks: list[list[SpiderTask]], reader: FolderReader | PartsReader, missing: str
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        # `chunks` is a list so that `num_proc`, and the workers of a stream, share it out.
        for chunk in chunks:
            for task in chunk:
                made = make_row(reader, task, missing)
                for problem in made.problems:
                    logger.warning("SPIDER-%s: %s", self.config.name, problem)
                if made.row is not None:
                    yield task.record.index, made.row
