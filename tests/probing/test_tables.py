"""Tables of a probe: nothing is cut, rows can be told apart, values of other data are not shown."""

from __future__ import annotations

import dataclasses
import io
import math

import numpy as np
import pytest
from rich.console import Console

from xmag_hf.probing import scoring, tables
from xmag_hf.probing.options import ProbeOptions
from xmag_hf.probing.record import ProbeResult, RowResult
from xmag_hf.probing.rows import Row
from xmag_hf.reporting.tables import LEAST_WIDTH, as_markdown, drawn

TEACHER = "efficientnet-lite0"
ROWS = [
    Row("xmag-student-base-v2@2", "model", "x", 2.0),
    Row(f"{TEACHER}@0.5", "teacher", TEACHER, 0.5),
    Row(f"{TEACHER}@2", "teacher at 5x", TEACHER, 2.0),
]


def _result(classes: int = 2, protocol: str = "official split", groups: bool = True) -> ProbeResult:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % classes
    clusters = np.arange(60) // 4 if groups else np.zeros(60, dtype=int)
    rows = []
    for row in ROWS:
        p = rng.dirichlet(np.ones(classes), 60)
        questions = scoring.class_questions(row.label, "linear", labels, p, clusters)
        scores = [s for q in questions for s in scoring.score(q, samples=20, level=0.9, seed=0)]
        rows.append(RowResult(row, {"name": row.name}, questions, scores, {}))
    found = scoring.compare([row.questions for row in rows], samples=20, level=0.9, seed=0)
    data = {
        "name": "tissue [v2]", "fingerprint": "0", "protocol": protocol,
        "classes": [f"class {i}" for i in range(classes)], "splits": {"test": {"images": 60}},
    }  # fmt: skip
    options = ProbeOptions(data="tissue", paper_table="spider-crc", level=0.9)
    return ProbeResult(options, data, rows, found, tables.remarks(data, rows, found), 1.0)


def _printed(result: ProbeResult, width: int) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width)
    for sheet in tables.sheets(result):
        console.print(drawn(sheet))
    return stream.getvalue()


@pytest.mark.parametrize("width", [LEAST_WIDTH, 160])
def test_every_number_is_printed_whole(width):
    result = _result()
    printed = _printed(result, width)
    assert "…" not in printed and max(map(len, printed.splitlines())) <= width
    for row in result.rows:
        for score in row.scores:
            if score.unit == "group":
                assert f"{score.estimate:.3f}" in printed
                assert f"{score.low:.3f}-{score.high:.3f}" in printed
    for c in result.comparisons:
        assert f"{c.test.difference:+.3f} [{c.test.low:+.3f}, {c.test.high:+.3f}]" in printed
    for label in ("xmag-student-base-v2@2", "(teacher at 5x,", "(clustered)", "weighted F1"):
        assert label in printed  # words stay whole
    assert "tissue [v2]: linear (90% intervals by group)" in printed
    assert "2 of AUC, linear" in printed  # the family of the adjusted p-values


def test_markdown_tells_the_teachers_two_scales_apart():
    text = as_markdown(tables.sheets(_result()), [])
    assert f"| {TEACHER}@0.5 (teacher, 0.5 um/px) |" in text
    assert f"| {TEACHER}@2 (teacher at 5x, 2 um/px) |" in text
    assert f"## {TEACHER}@2 (teacher at 5x, 2 um/px) minus xmag-student-base-v2@2 (model" in text
    for block in text.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1


def test_resolution_is_said_for_each_pair():
    result = _result()
    for c in result.comparisons:
        if c.metric == "AUC":
            half = (c.test.high - c.test.low) / 2
            (line,) = [r for r in result.remarks if r.startswith(f"{c.row} against")]
            assert f"{half:.3f} (AUC, linear)" in line


def test_reasons_of_missing_answers_are_said_once():
    result = _result(groups=False)
    (untested,) = [line for line in result.remarks if line.startswith("no test: ")]
    assert "one cluster only" in untested and untested.count("linear AUC") == 1
    (unknown,) = [line for line in result.remarks if line.startswith("no interval: ")]
    assert "linear AUC by group" in unknown
    text = as_markdown(tables.sheets(result), tables.all_remarks(result))
    assert "nan" not in _printed(result, 160) + text


@pytest.mark.parametrize(
    "classes, protocol, words",
    [
        (2, "official split", "2 classes, not 13"),
        (13, "cross-validation", "cross-validation, not the official split"),
        (13, "official split", ""),
    ],
)
def test_published_values_beside_their_own_data_only(classes, protocol, words):
    result = _result(classes, protocol)
    shown = [sheet for sheet in tables.sheets(result) if sheet.title.startswith("spider-crc")]
    said = [line for line in tables.all_remarks(result) if "--paper-table" in line]
    if words:
        assert not shown and words in said[0]
        return
    assert not said and "F1: ours macro" in shown[0].caption
    assert ["published: XMAG, 2 um/px", "0.828", "0.827", "", "0.990"] in shown[0].lines
    ours = {s.metric: s.estimate for s in result.rows[0].scores}
    assert shown[0].lines[-3][1:3] == [f"{ours[m]:.3f}" for m in ("accuracy", "macro F1")]


def test_a_score_without_an_interval():
    score = dataclasses.replace(_result().rows[0].scores[0], low=math.nan, high=math.nan)
    row = dataclasses.replace(_result().rows[0], scores=[score])
    sheet = tables.sheets(dataclasses.replace(_result(), rows=[row], comparisons=[]))[0]
    assert sheet.lines[0][1] == f"{score.estimate:.3f}"
