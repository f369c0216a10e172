"""What became of each slide, and the run's summary files."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from xmag_hf.atomic_write import write_atomically
from xmag_hf.reporting.records import versions

from .plan import SlidePlan
from .sources import SlideSource

# What results depend on.
PACKAGES = ("torch", "numpy", "pillow", "h5py", "openslide-python", "openslide-bin")
STAGES = ("open", "tissue", "read", "resample", "encode", "write")
STATUSES = ("ok", "present", "no_tissue", "refused", "failed")


@dataclass
class SlideRecord:
    """What became of a slide: a line of the summary.

    Attributes:
        status: `ok`; `present` (finished earlier, and the same); `no_tissue`; `refused` (scale, or
            a bag of something else is in its place); `failed`.
        reason: Why neither `ok` nor `present`, or why patches are missing, and what to do.
        patches: In the bag.
        unreadable: Patches with tissue that could not be decoded.
        first_unreadable: Its reason.
        padded: Patches in the bag that reach past the edge.
        grid_patches: With and without tissue.
        tissue_share: Of the tissue's area, what lies in patches.
        seconds: By stage of `STAGES`; reading and resampling are summed over threads.
    """

    slide_id: str
    patient_id: str
    path: str
    status: str = "failed"
    reason: str = ""
    bag: str = ""
    patches: int = 0
    unreadable: int = 0
    first_unreadable: str = ""
    padded: int = 0
    grid_patches: int | None = None
    tissue_mm2: float | None = None
    tissue_share: float | None = None
    mpp0: float | None = None
    mpp_source: str = ""
    level: int | None = None
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @classmethod
    def of(cls, source: SlideSource) -> SlideRecord:
        """A record that says nothing yet but whose slide it is."""
        return cls(source.slide_id, source.patient_id, str(source.path))

    def take(self, plan: SlidePlan) -> None:
        """Note what planning found."""
        self.grid_patches, self.tissue_mm2 = plan.grid_patches, round(plan.tissue_mm2, 4)
        share = plan.tissue_share
        self.tissue_share = None if math.isnan(share) else round(share, 4)
        self.mpp0, self.mpp_source, self.level = plan.mpp0, plan.mpp_source, plan.level
        self.seconds |= plan.seconds

    @property
    def problem(self) -> bool:
        """Whether somebody should look at the slide."""
        return self.status in ("refused", "failed") or self.unreadable > 0


@dataclass(frozen=True)
class RunSummary:
    """A run over slides.

    Attributes:
        out_dir: Where the bags are.
        records: One a slide, in the order given.
        facts: Encoder, geometry, options and versions.
    """

    out_dir: Path
    records: tuple[SlideRecord, ...]
    facts: Mapping[str, Any]

    @property
    def problems(self) -> list[SlideRecord]:
        """Slides that failed, were refused, or lost patches."""
        return [record for record in self.records if record.problem]

    @property
    def counts(self) -> dict[str, int]:
        """Slides by status."""
        counts = Counter(record.status for record in self.records)
        return {status: counts[status] for status in STATUSES if counts[status]}


def recall(records: Sequence[SlideRecord], out_dir: Path) -> None:
    """Fill what an earlier summary of the folder knew of slides that were finished before.

    Bags do not hold how long they took, nor the slide's area of tissue.

    Args:
        records: Those that are `present` are changed.
        out_dir: Of the run; without a readable summary.json nothing happens.
    """
    try:
        text = (out_dir / "summary.json").read_text(encoding="utf-8")
        earlier = {line["slide_id"]: line for line in json.loads(text)["records"]}
    except (OSError, ValueError, LookupError, TypeError):
        return
    for record in records:
        line = earlier.get(record.slide_id, {})
        if record.status == "present" and line.get("status") in ("ok", "present"):
            for name in ("grid_patches", "tissue_mm2", "tissue_share"):
                setattr(record, name, line.get(name))
            record.first_unreadable = line.get("first_unreadable", "")
            seconds = line.get("seconds", {})
            record.seconds |= {stage: seconds[stage] for stage in STAGES if stage in seconds}


def write_summary(summary: RunSummary) -> None:
    """Write summary.csv and summary.json into the run's folder, each complete or absent.

    Raises:
        OSError: The folder cannot be written.
    """
    content = {
        **summary.facts,
        "slides": summary.counts,
        "patches": sum(record.patches for record in summary.records),
        "unreadable": sum(record.unreadable for record in summary.records),
        "versions": versions(PACKAGES),
        "records": [asdict(record) for record in summary.records],
    }
    text = json.dumps(content, indent=1, allow_nan=False)
    write_atomically(summary.out_dir / "summary.json", f"{text}\n")
    write_atomically(summary.out_dir / "summary.csv", _table(summary.records))


def _table(records: Sequence[SlideRecord]) -> str:
    rows = []
    for record in records:
        row = asdict(record)
        seconds = row.pop("seconds")
        rows.append(row | {f"seconds_{name}": round(seconds[name], 4) for name in STAGES})
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
