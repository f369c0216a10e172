"""Builders of data sets. Light to import; `.paired_magnification` needs `datasets`."""

from .corpus_options import CorpusError, CorpusOptions, corpus_fingerprint
from .slide_list import SlideRow, find_slides, read_slides_csv

__all__ = [
    "CorpusError",
    "CorpusOptions",
    "SlideRow",
    "corpus_fingerprint",
    "find_slides",
    "read_slides_csv",
]
