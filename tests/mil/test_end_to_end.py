"""Training on pixels: small slides of real tissue, an encoder of three blocks."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from PIL import Image

from xmag_hf.embedding import EmbedOptions, SlideSource, embed_slide
from xmag_hf.mil.e2e_options import E2EOptions
from xmag_hf.mil.e2e_training import epoch_order, turned
from xmag_hf.mil.end_to_end import end_to_end
from xmag_hf.mil.errors import MILError
from xmag_hf.mil.predict import check_bag, load_head, predict_slides
from xmag_hf.modeling import (
    XMAGConfig,
    XMAGForSlideClassification,
    XMAGImageProcessor,
    XMAGModel,
)

READING = EmbedOptions(slide_mpp=2.0, tissue=0.0, threads=1)
SLIDES = 12


@pytest.fixture(scope="module")
def slides(tmp_path_factory, cmu_pixels: np.ndarray) -> Path:
    """Twelve images of two 5x patches, one of six patients each; every other one is darkened."""
    folder = tmp_path_factory.mktemp("slides")
    rows = []
    for number in range(SLIDES):
        x, y = 60 * number, 150 * number
        part = cmu_pixels[300 + y : 524 + y, 600 + x : 1048 + x]
        if number % 2:
            part = (part * 0.6).astype(np.uint8)
        Image.fromarray(np.ascontiguousarray(part)).save(folder / f"s{number:02d}.png")
        rows.append([f"s{number:02d}", f"p{number // 2}", ("light", "dark")[number % 2]])
    with (folder / "labels.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["slide_id", "patient_id", "label"], *rows])
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "xmag"
    torch.manual_seed(0)
    config = XMAGConfig(
        hidden_size=96, num_attention_heads=3, num_hidden_layers=3, licence="house-rules"
    )
    XMAGModel(config).save_pretrained(folder)
    XMAGImageProcessor().save_pretrained(folder)
    return folder


def sources(slides: Path) -> list[SlideSource]:
    return [SlideSource(path) for path in sorted(slides.glob("*.png"))]


def options(slides: Path, encoder: Path, out: Path, **changed) -> E2EOptions:
    values = {
        "encoder": str(encoder), "labels": str(slides / "labels.csv"), "out": str(out),
        "folds": 3, "only": (1,), "epochs": 2, "accumulation": 2, "validation_share": 0.25,
        "learning_rate": 1e-3, "encoder_learning_rate": 1e-3, "kept_type": "float32",
        "checkpoint_steps": 1,
    }  # fmt: skip
    return E2EOptions(**(values | changed))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return XMAGForSlideClassification.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def finished(slides: Path, encoder: Path, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "study"
    metrics = []
    result = end_to_end(
        sources(slides), options(slides, encoder, out), READING,
        advance=lambda name, done, total: metrics.append(name),
    )  # fmt: skip
    return out, result, metrics


def test_a_fold_is_one_folder_that_predict_takes(finished, slides: Path) -> None:
    """From the slides, by another path: bags of the saved encoder, then the saved head."""
    out, result, _ = finished
    fold = result.trained[0]
    tested = {str(result.cohort.patient_ids[row]) for row in fold.rows}
    others = {str(patient) for patient in result.cohort.patient_ids[result.folds != 1]}
    assert len(tested) == 2 and not tested & others
    names = [str(result.cohort.slide_ids[row]) for row in fold.rows]
    paths = [SlideSource(slides / f"{name}.png") for name in names]
    float32 = dataclasses.replace(READING, features="float32")
    answers = list(predict_slides(load_head(fold.folder), paths, None, float32))
    assert [(answer.slide_id, answer.patches) for answer in answers] == [(n, 2) for n in names]
    told = [answer.prediction.probabilities for answer in answers]
    np.testing.assert_allclose(told, fold.probabilities, atol=1e-5)
    assert not (out / "runs" / "fold-1" / "checkpoints").exists()


def test_bags_of_the_encoder_before_training_are_refused(
    finished, slides: Path, encoder: Path
) -> None:
    out, _, _ = finished
    bag = embed_slide(slides / "s00.png", str(encoder), READING)
    with pytest.raises(MILError, match="encoder_revision"):
        check_bag(load_head(out / "heads" / "fold-1").config, bag)


def test_only_the_last_blocks_have_moved(finished, encoder: Path) -> None:
    out, _, _ = finished
    before = XMAGModel.from_pretrained(encoder).state_dict()
    after = weights(out / "heads" / "fold-1")
    moved = {n for n, value in before.items() if not torch.equal(after[f"encoder.{n}"], value)}
    assert {n.split(".")[2] for n in moved if n.startswith("encoder.layer")} == {"1", "2"}
    assert not any(n.startswith("embeddings") for n in moved)
    values = sum(before[n].numel() for n in moved)
    card = (out / "heads" / "fold-1" / "README.md").read_text()
    assert f"1 stages frozen, {values:,} of its parameters trained" in card


def test_its_card_says_whose_licence_it_carries(finished) -> None:
    """It holds the encoder's weights, changed; and no pipeline takes a slide."""
    out, _, _ = finished
    card = ModelCard.load(out / "heads" / "fold-1" / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "see-card")
    assert card.data.pipeline_tag is None
    assert "a changed version: house-rules." in card.text.split("## Licence")[1].replace("\n", " ")


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_killed_run_goes_on_on_the_same_curve(
    finished, slides: Path, encoder: Path, tmp_path: Path, stop_after: int
) -> None:
    """SIGTERM in the middle of an epoch, and at its end: losses and weights are the others'."""
    out, result, metrics = finished
    steps = 0

    def stop(name: str, done: int, total: int) -> None:
        nonlocal steps
        steps += name.startswith("fold")
        if steps == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    again = options(slides, encoder, tmp_path / "study")
    with pytest.raises(MILError, match="stopped by SIGTERM"):
        end_to_end(sources(slides), again, READING, advance=stop)
    resumed = []
    end_to_end(sources(slides), again, READING, advance=lambda name, *_: resumed.append(name))
    assert resumed.count("fold 1") == metrics.count("fold 1") - stop_after  # the rest of the curve
    curves = [
        (folder / "runs" / "fold-1" / "metrics.jsonl").read_text()
        for folder in (out, tmp_path / "study")
    ]
    assert curves[0] == curves[1] and len(curves[0].splitlines()) > stop_after
    theirs = weights(tmp_path / "study" / "heads" / "fold-1")
    for name, value in weights(out / "heads" / "fold-1").items():
        assert torch.equal(value, theirs[name]), name
    history = json.loads((tmp_path / "study" / "heads" / "fold-1" / "fold.json").read_text())
    assert [e["validation_loss"] for e in history["history"]] == [
        e["validation_loss"] for e in result.trained[0].history
    ]


def test_pixels_give_what_kept_states_give(
    finished, slides: Path, encoder: Path, tmp_path: Path
) -> None:
    """Frozen part every epoch or once: the same losses. (No augmentation, so pixels by hand.)"""
    import xmag_hf.mil.end_to_end as module

    out, _, _ = finished
    plain = module.frozen_cache
    try:
        module.frozen_cache = lambda *a, **k: plain(*a, **(k | {"pixels": True}))
        end_to_end(sources(slides), options(slides, encoder, tmp_path / "study"), READING)
    finally:
        module.frozen_cache = plain
    losses = [
        [json.loads(line)["loss"] for line in (folder / "runs/fold-1/metrics.jsonl").open()]
        for folder in (out, tmp_path / "study")
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_a_finished_study_is_read_and_another_is_refused(
    finished, slides: Path, encoder: Path
) -> None:
    out, result, _ = finished
    done = []
    again = end_to_end(
        sources(slides), options(slides, encoder, out), READING,
        advance=lambda name, *_: done.append(name),
    )  # fmt: skip
    assert set(done) == {"slides read"}
    np.testing.assert_array_equal(again.trained[0].probabilities, result.trained[0].probabilities)
    with pytest.raises(MILError, match="learning_rate: 0.001 then, 0.002 now"):
        end_to_end(sources(slides), options(slides, encoder, out, learning_rate=2e-3), READING)
    text = (slides / "labels.csv").read_text()
    renamed = out.parent / "renamed.csv"  # heads of both names would lie beside each other
    renamed.write_text(text.replace("light", "pale"))
    with pytest.raises(MILError, match="slides: "):
        end_to_end(sources(slides), options(slides, encoder, out, labels=str(renamed)), READING)
    record = json.loads((result.trained[0].folder / "fold.json").read_text())["run"]
    assert record["precision"] == "no"  # what "auto" meant here: on a GPU this is another run


def test_a_study_does_not_go_on_in_another_precision(
    finished, slides: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same options: `auto` is what the launcher was told, and that has changed."""
    out, _, _ = finished
    AcceleratorState._reset_state(reset_partial_state=True)  # as in a new process
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    try:
        with pytest.raises(MILError, match="precision: no then, bf16 now"):
            end_to_end(sources(slides), options(slides, encoder, out), READING)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_slides_that_cannot_be_used_are_left_out_and_told(
    slides: Path, encoder: Path, tmp_path: Path
) -> None:
    own = tmp_path / "slides"
    own.mkdir()
    for path in slides.glob("*.png"):
        (own / path.name).symlink_to(path)
    (own / "s00.png").unlink()
    (own / "s00.png").write_bytes(b"no picture")
    Image.new("RGB", (448, 224), "white").save(own / "extra.png")
    (own / "s01.png").unlink()
    result = end_to_end(
        sources(own),
        options(slides, encoder, tmp_path / "study", epochs=1, folds=1, only=()),
        READING,
    )
    told = {exclusion.slide_id: exclusion.reason for exclusion in result.cohort.exclusions}
    assert told.keys() == {"s00", "s01", "extra"}
    assert "cannot be decoded" in told["s00"] and "no slide" in told["s01"]
    assert len(result.cohort) == SLIDES - 2 and not len(result.trained[0].rows)


def test_bad_options_are_named(slides: Path, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(MILError, match="--folds=0: it must be above 0"):
        options(slides, encoder, tmp_path, folds=0)
    with pytest.raises(MILError, match="frozen_stages=4 must be a whole number from 0 to 3"):
        end_to_end(sources(slides), options(slides, encoder, tmp_path, frozen_stages=4), READING)
    with pytest.raises(MILError, match="one head for 3 folds"):
        end_to_end(sources(slides), options(slides, encoder, tmp_path, head=str(encoder)), READING)
    natural = options(slides, Path("efficientnet-lite0"), tmp_path)
    with pytest.raises(MILError, match="end to end trains XMAG"):
        end_to_end(sources(slides), natural, EmbedOptions(mpp=2.0, slide_mpp=2.0))


def test_an_encoder_used_to_other_pixels_is_refused(
    slides: Path, encoder: Path, tmp_path: Path
) -> None:
    """Training would show it pixels normalised otherwise than those of its bags."""
    other = Path(shutil.copytree(encoder, tmp_path / "other"))
    file = other / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.7, 0.6, 0.7]}))
    with pytest.raises(MILError, match=r"mean \(0.7, 0.6, 0.7\)"):
        end_to_end(sources(slides), options(slides, other, tmp_path / "study"), READING)
    assert not (tmp_path / "study" / "cache").exists()


def test_every_view_and_every_slide_comes() -> None:
    pixels = torch.arange(16 * 16 * 3).reshape(1, 16, 16, 3).expand(64, 16, 16, 3).contiguous()
    views = turned(pixels, np.random.default_rng(0))
    expected = set()
    for flip in (False, True):
        image = pixels[0].numpy()[:, ::-1] if flip else pixels[0].numpy()
        expected |= {np.rot90(image, k).tobytes() for k in range(4)}
    assert {view.numpy().tobytes() for view in views} == expected and len(expected) == 8
    order = epoch_order(10, 4, seed=3, epoch=1)
    assert (
        len(order) == 12
        and set(order[:10]) == set(range(10))
        and list(order[10:]) == list(order[:2])
    )
    assert not np.array_equal(order, epoch_order(10, 4, seed=3, epoch=2))


def test_two_processes_equal_one(slides: Path, encoder: Path, tmp_path: Path) -> None:
    """torchrun and gloo, two slides each a step, against this process with four."""
    same = {"only": (0,), "epochs": 1, "dropout": 0.0}
    alone = options(slides, encoder, tmp_path / "one", accumulation=4, **same)
    end_to_end(sources(slides), alone, READING)
    command = [
        "--module", "xmag_hf.cli.e2e", *(str(path) for path in sorted(slides.glob("*.png"))),
        "--labels", str(slides / "labels.csv"), "--validation-share", "0.25",
        "--encoder", str(encoder), "--out", str(tmp_path / "two"), "--folds", "3", "--only", "0",
        "--epochs", "1", "--dropout", "0", "--accumulation", "2", "--kept-type", "float32",
        "--learning-rate", "1e-3", "--encoder-learning-rate", "1e-3",
        "--slide-mpp", "2", "--tissue", "0", "--quiet",
    ]  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launch, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    curves = [
        [json.loads(line)["loss"] for line in (tmp_path / out / "runs/fold-0/metrics.jsonl").open()]
        for out in ("one", "two")
    ]
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-4)
    assert curves[0] and (tmp_path / "two" / "heads" / "fold-0" / "model.safetensors").is_file()
