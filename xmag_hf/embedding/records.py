"""What became of each slide, and the run's summary files."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from xmag_hf.atomic_write import write_atomically
from xmag_hf.reporting.records import versions

from .plan import SlidePlan
from .sources import SlideSource

# What results depend on.
PACKAGES = ("torch", "numpy", "pillow", "h5py", "openslide-python", "openslide-bin")
STAGES = ("open", "tissue", "read", "resample", "encode", "write")
# What only the run that made a bag knows: not in the bag.
RECALLED = ("grid_patches", "tissue_mm2", "tissue_share", "first_unreadable", "seconds")
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


def write_summary(summary: RunSummary, *, ended: bool = True) -> None:
    """Write summary.csv and summary.json into the run's folder, each complete or absent.

    Lines of slides that are not of this run stay as they were, behind its own: a folder may be
    filled by several runs and machines. Of two that write at the same moment the later one wins,
    without the other's new lines. Encoder, options and versions are those of the last run.

    Args:
        summary: Records that are `present` get what earlier lines know of them.
        ended: False where the run was given up half way; else finished slides whose bag is gone
            lose their line.

    Raises:
        OSError: The folder cannot be written.
    """
    earlier = _earlier(summary.out_dir)  # only now, as other runs may have ended since the start
    _recall(summary.records, earlier)
    own = {record.slide_id for record in summary.records}
    others = [
        line
        for name, line in earlier.items()
        if name not in own and not (ended and _gone(line, summary.out_dir))
    ]
    whole = RunSummary(summary.out_dir, (*summary.records, *others), summary.facts)
    content = {
        **whole.facts,
        "slides": whole.counts,
        "patches": sum(record.patches for record in whole.records),
        "unreadable": sum(record.unreadable for record in whole.records),
        "versions": versions(PACKAGES),
        "records": [asdict(record) for record in whole.records],
    }
    text = json.dumps(content, indent=1, allow_nan=False)
    write_atomically(whole.out_dir / "summary.json", f"{text}\n")
    write_atomically(whole.out_dir / "summary.csv", _table(whole.records))


def _earlier(out_dir: Path) -> dict[str, SlideRecord]:
    """Records of the folder's summary.json by slide; none if it is not there or not readable."""
    try:
        text = (out_dir / "summary.json").read_text(encoding="utf-8")
        return {line["slide_id"]: _read_record(line) for line in json.loads(text)["records"]}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _read_record(line: Mapping[str, Any]) -> SlideRecord:
    """A record of any version: what it lacks is left open, what it has beyond ours is dropped."""
    known: dict[str, Any] = {"patient_id": "", "path": ""}
    known |= {f.name: line[f.name] for f in fields(SlideRecord) if f.name in line}
    seconds = line.get("seconds", {})
    known["seconds"] = {stage: seconds.get(stage, 0.0) for stage in STAGES}
    return SlideRecord(**known)


def _recall(records: Sequence[SlideRecord], earlier: Mapping[str, SlideRecord]) -> None:
    """Fill in what bags that are `present` do not hold."""
    for record in records:
        line = earlier.get(record.slide_id)
        if record.status == "present" and line and line.status in ("ok", "present"):
            for name in RECALLED:
                setattr(record, name, getattr(line, name))


def _gone(record: SlideRecord, out_dir: Path) -> bool:
    finished = record.status in ("ok", "present")
    return finished and not (out_dir / f"{record.slide_id}.h5").exists()


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
