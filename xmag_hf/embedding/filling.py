"""Fourth stage: a bag that fills up with encoded batches."""

from __future__ import annotations

import time

import numpy as np

from xmag_hf.slides import SlideReadError

from .bag import Bag, BagInfo
from .encode import PatchEncoder
from .plan import SlidePlan
from .read import PatchBatch
from .records import SlideRecord


class Filling:
    """A bag that fills up, batch by batch.

    Args:
        plan: Of the slide.
        record: Learns what is read, and for how long.
        dtype: Of the stored features.
    """

    def __init__(self, plan: SlidePlan, record: SlideRecord, dtype: str):
        self.plan, self.record, self._dtype = plan, record, np.dtype(dtype)
        self.unreadable: list[int] = []
        self._filled = np.zeros(len(plan.coords), dtype=bool)
        self._features: np.ndarray | None = None
        self._tokens: np.ndarray | None = None
        record.take(plan)

    @property
    def share(self) -> float:
        """Of the patches that are done with."""
        done = int(self._filled.sum()) + len(self.unreadable)
        return done / max(1, len(self._filled))

    def add(self, batch: PatchBatch, encoder: PatchEncoder) -> None:
        """Encode a batch and put it in its place."""
        record = self.record
        self.unreadable += [row for row, _ in batch.unreadable]
        record.unreadable = len(self.unreadable)
        if batch.unreadable and not record.first_unreadable:
            record.first_unreadable = batch.unreadable[0][1]
        record.seconds["read"] += batch.seconds - batch.resample_seconds
        record.seconds["resample"] += batch.resample_seconds
        if not len(batch.rows):
            return
        started = time.perf_counter()
        encoded = encoder(batch.pixels)
        record.seconds["encode"] += time.perf_counter() - started
        self._features = self._put(self._features, batch.rows, encoded.features, self._dtype)
        if encoded.tokens is not None:
            self._tokens = self._put(self._tokens, batch.rows, encoded.tokens, np.dtype("f2"))
        self._filled[batch.rows] = True

    def bag(self, encoder: PatchEncoder, head: str | None) -> Bag:
        """The bag of what was read.

        Raises:
            SlideReadError: Patches with tissue, and not one could be decoded.
        """
        plan, record, rows = self.plan, self.record, self._filled
        if record.unreadable and not rows.any():
            raise SlideReadError(
                f"{record.slide_id}: none of {record.unreadable} patches could be decoded; first: "
                f"{record.first_unreadable}"
            )
        record.patches, record.padded = int(rows.sum()), int(plan.padded[rows].sum())
        features = self._features
        if features is None:
            features = np.empty((len(rows), encoder.feature_dim), self._dtype)
        whole = bool(rows.all())  # the usual case: no copy
        tokens = self._tokens
        return Bag(
            record.slide_id,
            features if whole else features[rows],
            plan.coords if whole else plan.coords[rows],
            _info(plan, encoder, record, head),
            tokens if whole or tokens is None else tokens[rows],
        )

    def _put(
        self, into: np.ndarray | None, rows: np.ndarray, values: np.ndarray, dtype: np.dtype
    ) -> np.ndarray:
        if into is None:
            into = np.zeros((len(self._filled), *values.shape[1:]), dtype)
        with np.errstate(over="ignore"):  # infinities are refused, with a remedy, by write_bag
            into[rows] = values
        return into


def _info(plan: SlidePlan, encoder: PatchEncoder, record: SlideRecord, head: str | None) -> BagInfo:
    geometry = plan.geometry
    return BagInfo(
        encoder=encoder.encoder.name,
        encoder_revision=encoder.encoder.revision,
        encoder_commit=encoder.encoder.card.commit,
        pooling=encoder.pooling,
        normalisation=encoder.encoder.normalisation,
        precision=encoder.encoder.precision,
        mpp=geometry.mpp,
        patch_px=geometry.patch_px,
        overlap=geometry.overlap,
        input_px=geometry.input_px,
        input_mpp=geometry.input_mpp,
        mpp0=plan.mpp0,
        mpp_source=plan.mpp_source,
        level=plan.level,
        level0_size=plan.level0_size,
        reader=plan.reader,
        tissue=plan.tissue_method,
        tissue_threshold=plan.least_tissue,
        pad_edges=plan.pad_edges,
        unreadable_patches=record.unreadable,
        padded_patches=record.padded,
        slide_sha256_head=head,
    )
