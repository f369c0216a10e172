"""Columns of the paired corpus as `datasets` features."""

from datasets import Features, Image, Value

from .corpus_options import CorpusOptions
from .reading_paths import other_columns

FEATURES = Features(
    {
        "image_20x": Image(),
        "image_5x": Image(),
        "slide_id": Value("string"),
        "patient_id": Value("string"),
        "cancer_type": Value("string"),
        "x": Value("int64"),
        "y": Value("int64"),
        "width0": Value("float64"),
        "mpp0": Value("float32"),
        "level": Value("int16"),
        "tissue_fraction": Value("float32"),
        "source": Value("string"),
    }
)


def corpus_features(options: CorpusOptions) -> Features:
    """Columns of a corpus made with `options`: those above, and the optional images after them."""
    return Features(FEATURES | {name: Image() for name in other_columns(options)})
