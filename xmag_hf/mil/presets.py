"""The slide-level tasks of XMAG's paper, as data: classes, cohorts, published values, readings.

Values: arXiv 2509.23097, tables S1 to S4, mean and standard deviation over five folds. Where the
paper contradicts itself, `reading` says which way a preset takes. Labels are read by
`preset_labels`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .errors import MILError

PAPER_SOURCE = "Paper: arXiv 2509.23097, mean and sd over five folds, F1 averaging not stated"
Role = Literal["train", "test"]


@dataclass(frozen=True)
class PresetCohort:
    """Slides of one source.

    Attributes:
        name: As in predictions and label files.
        role: `train` cross-validates, `test` is an external cohort for every fold's model.
        source: Kind of label file, see `preset_labels`.
        slides: The paper's number.
        class_slides: The paper's numbers by class; empty where it gives none.
        obtain: How a user gets slides and labels.
        available: Whether others can get it at all.
    """

    name: str
    role: Role
    source: str
    slides: int
    class_slides: dict[str, int]
    obtain: str
    available: bool = True


@dataclass(frozen=True)
class PaperRow:
    """One model's published scores.

    Attributes:
        model: Its name in the paper.
        mpp: um/px of the patches it saw.
        accuracy: (mean, sd) over five folds.
        f1: The same; averaging not stated.
        auc: The same.
    """

    model: str
    mpp: float
    accuracy: tuple[float, float]
    f1: tuple[float, float]
    auc: tuple[float, float]

    @property
    def values(self) -> tuple[tuple[float, float], ...]:
        """Accuracy, F1 and AUC, in the paper's order."""
        return self.accuracy, self.f1, self.auc


@dataclass(frozen=True)
class Preset:
    """One task of the paper.

    Attributes:
        name: As `--preset` takes it.
        task: In words.
        classes: In the order of the labels 0..C-1, which is that of a study's head.
        cohorts: One trains; others test.
        paper: Published rows.
        reading: What the paper leaves open or says twice, and what is done here.
        label_map: What label files call a class, folded (see `preset_labels`) -> class; what is
            not in it is left out, and counted.
    """

    name: str
    task: str
    classes: tuple[str, ...]
    cohorts: tuple[PresetCohort, ...]
    paper: tuple[PaperRow, ...]
    reading: str
    label_map: dict[str, str] = field(default_factory=dict)


_GDC = (
    "portal.gdc.cancer.gov: put the diagnostic slides (Data Type 'Slide Image', Experimental "
    "Strategy 'Diagnostic Slide') of {projects} into a cart; download its manifest and its sample "
    "sheet; `gdc-client download -m MANIFEST -d SLIDES`. Labels: the sample sheet, whose Project "
    "ID is the diagnosis."
)

PRESETS: dict[str, Preset] = {
    "nsclc": Preset(
        name="nsclc",
        task="lung adenocarcinoma or squamous cell carcinoma",
        classes=("LUAD", "LUSC"),
        cohorts=(
            PresetCohort(
                "tcga",
                "train",
                "gdc",
                958,
                {"LUAD": 492, "LUSC": 466},
                _GDC.format(projects="TCGA-LUAD and TCGA-LUSC"),
            ),
            PresetCohort(
                "cptac",
                "test",
                "cptac",
                974,
                {"LUAD": 668, "LUSC": 306},
                "cancerimagingarchive.net: collections CPTAC-LUAD and CPTAC-LSCC, 'Tissue Slide "
                "Images', with the slide table of each (CSV: case, slide, tumor or normal). The "
                "GDC's project CPTAC-3 mixes tumours, so its sample sheet gives no label.",
            ),
        ),
        paper=(
            PaperRow("Phikon", 0.5, (0.855, 0.018), (0.849, 0.011), (0.945, 0.011)),
            PaperRow("UNI2", 0.5, (0.860, 0.013), (0.854, 0.013), (0.951, 0.008)),
            PaperRow("XMAG", 2.0, (0.845, 0.033), (0.843, 0.023), (0.941, 0.015)),
        ),
        reading="The paper's text cross-validates on CPTAC, its list of data trains on TCGA and "
        "tests on CPTAC: the list is followed. Slides of normal tissue are left out.",
        label_map={
            "tcga-luad": "LUAD", "tcga-lusc": "LUSC", "luad": "LUAD", "lusc": "LUSC",
            "lscc": "LUSC",
        },
    ),
    "rcc": Preset(
        name="rcc",
        task="chromophobe, papillary or clear cell renal cell carcinoma",
        classes=("ChRCC", "PRCC", "CCRCC"),
        cohorts=(
            PresetCohort(
                "tcga",
                "train",
                "gdc",
                903,
                {"ChRCC": 118, "PRCC": 288, "CCRCC": 497},
                _GDC.format(projects="TCGA-KICH, TCGA-KIRP and TCGA-KIRC"),
            ),
            PresetCohort(
                "dhmc",
                "test",
                "dhmc",
                563,
                {},
                "bmirds.github.io/KidneyCancer: on request, with its metadata CSV (file name, "
                "diagnosis). Its images are PNG without um/px: give --slide-mpp as its page says.",
            ),
        ),
        paper=(
            PaperRow("Phikon", 0.5, (0.903, 0.013), (0.812, 0.017), (0.969, 0.006)),
            PaperRow("UNI2", 0.5, (0.958, 0.015), (0.913, 0.021), (0.989, 0.003)),
            PaperRow("XMAG", 2.0, (0.953, 0.008), (0.916, 0.015), (0.986, 0.009)),
        ),
        reading="DHMC labels five classes (Zhu et al. 2021, doi:10.1038/s41598-021-86540-4) and "
        "TCGA three: oncocytoma and benign have no answer and are left out. Whether they are among "
        "the paper's 563 slides is not said.",
        label_map={
            "tcga-kich": "ChRCC", "tcga-kirp": "PRCC", "tcga-kirc": "CCRCC",
            "chromophobe": "ChRCC", "papillary": "PRCC", "clearcell": "CCRCC",
            "clear cell": "CCRCC", "chromophobe rcc": "ChRCC", "papillary rcc": "PRCC",
            "clear cell rcc": "CCRCC",
        },
    ),
    "panda-isup": Preset(
        name="panda-isup",
        task="ISUP grade of prostate biopsies",
        classes=tuple(f"ISUP-{grade}" for grade in range(6)),
        cohorts=(
            PresetCohort(
                "panda",
                "train",
                "panda",
                10_616,
                {},
                "kaggle.com/c/prostate-cancer-grade-assessment: train_images and train.csv "
                "(image_id, data_provider, isup_grade, gleason_score). It names no patients, so "
                "each biopsy counts as one.",
            ),
        ),
        paper=(
            PaperRow("Phikon", 0.5, (0.731, 0.009), (0.674, 0.017), (0.923, 0.002)),
            PaperRow("UNI2", 0.5, (0.719, 0.010), (0.666, 0.010), (0.925, 0.004)),
            PaperRow("XMAG", 2.0, (0.688, 0.010), (0.632, 0.012), (0.910, 0.003)),
            PaperRow("XMAG end to end", 2.0, (0.713, 0.005), (0.654, 0.006), (0.924, 0.002)),
        ),
        reading="AUC of the tables (XMAG 0.910); the text's differences give 0.917. Six classes, "
        "cross-entropy, no ordinal loss.",
        label_map={str(grade): f"ISUP-{grade}" for grade in range(6)},
    ),
    "brca-odx": Preset(
        name="brca-odx",
        task="recurrence score above 25 in breast cancer",
        classes=("low", "high"),
        cohorts=(
            PresetCohort(
                "tcga",
                "train",
                "scores",
                1_065,
                {"low": 753, "high": 312},
                _GDC.format(projects="TCGA-BRCA")
                + " The score of each patient comes from a second CSV (patient and score): TCGA "
                "has no Oncotype DX; published ones are computed from gene expression.",
            ),
            PresetCohort(
                "osuwmc",
                "test",
                "none",
                994,
                {"low": 847, "high": 147},
                "Private to the Ohio State University Wexner Medical Center: not available.",
                available=False,
            ),
        ),
        paper=(
            PaperRow("Phikon", 0.5, (0.785, 0.068), (0.805, 0.048), (0.781, 0.003)),
            PaperRow("UNI2", 0.5, (0.826, 0.030), (0.835, 0.022), (0.780, 0.015)),
            PaperRow("XMAG", 2.0, (0.845, 0.016), (0.844, 0.007), (0.776, 0.006)),
        ),
        reading="Tested on OSUWMC in the paper, which is private, so only cross-validation on TCGA "
        "can be repeated. Always 'low' has accuracy 0.852 on OSUWMC, above all three models. High "
        "is a score above 25.",
    ),
}  # fmt: skip


def load_preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        MILError: No such preset; the known ones are named.
    """
    if name not in PRESETS:
        raise MILError(f"preset {name!r}: none of {', '.join(PRESETS)}.")
    return PRESETS[name]
