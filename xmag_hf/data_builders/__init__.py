"""Builders of data sets. Light to import; `.paired_magnification`, `.spider` need `datasets`."""

from .corpus_options import CorpusError, CorpusOptions, corpus_fingerprint
from .slide_list import SlideRow, find_slides, read_slides_csv
from .spider_records import SpiderOptions
from .spider_source import SpiderError, SpiderSource, find_source

__all__ = [
    "CorpusError",
    "CorpusOptions",
    "SlideRow",
    "SpiderError",
    "SpiderOptions",
    "SpiderSource",
    "corpus_fingerprint",
    "find_slides",
    "find_source",
    "read_slides_csv",
]
