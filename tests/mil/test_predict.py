"""Heads on new slides: from bags, and from slides by way of an encoder."""

from __future__ import annotations

import csv
import dataclasses
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiled_tiff import write_tiff

from xmag_hf.cli.main import main
from xmag_hf.embedding import Bag, BagInfo, EmbedOptions, SlideSource, embed_slide, write_bag
from xmag_hf.encoders import load_encoder
from xmag_hf.mil import MILError, check_bag, load_head, predict_bag
from xmag_hf.mil.predict import predict_slides
from xmag_hf.modeling import (
    XMAGABMILConfig,
    XMAGABMILModel,
    XMAGConfig,
    XMAGModel,
)
from xmag_hf.modeling.convert import image_processor_for

D = 6
INFO = BagInfo(
    encoder="made-up", encoder_revision="1", pooling="cls", mpp=2.0, patch_px=224, mpp0=0.5
)
LABELS = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}


def make_head(folder: Path, **identity) -> Path:
    torch.manual_seed(0)
    values = {
        "embed_dim": D, "encoder": "made-up", "encoder_revision": "1", "pooling": "cls",
        "mpp": 2.0, "patch_px": 224, **identity,
    }  # fmt: skip
    XMAGABMILModel(
        XMAGABMILConfig(hidden_dim=8, attention_dim=4, **LABELS, **values)
    ).save_pretrained(folder)
    return folder


def bag_of(name: str, rows: int = 7, info: BagInfo = INFO, dim: int = D) -> Bag:
    features = np.random.default_rng(rows).normal(size=(rows, dim)).astype(np.float16)
    return Bag(name, features, np.zeros((rows, 2), np.int64), info)


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Path:
    return make_head(tmp_path_factory.mktemp("head") / "head")


def test_prediction_is_the_models(head):
    model, bag = load_head(head), bag_of("s")
    check_bag(model.config, bag)
    made = predict_bag(model, bag)
    with torch.inference_mode():
        output = model(torch.from_numpy(bag.features.astype(np.float32))[None])
    exp = np.exp(output.logits[0].double().numpy())
    np.testing.assert_allclose(made.probabilities, exp / exp.sum(), rtol=1e-6)
    np.testing.assert_allclose(made.attentions, output.attentions[0], rtol=1e-6)
    assert made.label == "abc"[int(exp.argmax())] and len(made.attentions) == 7


def test_a_bag_of_other_pixels_is_refused_where_both_say(tmp_path: Path) -> None:
    """The page of an encoder gave another mean: the same weights see other numbers."""
    said = "rgb/255 mean=(0.5, 0.5, 0.5)"
    model = load_head(make_head(tmp_path / "head", normalisation=said))
    for normalisation in (said, None):
        info = dataclasses.replace(INFO, normalisation=normalisation)
        check_bag(model.config, bag_of("s", info=info))
    with pytest.raises(MILError, match="normalisation 'rgb/255 mean=.0.7"):
        info = dataclasses.replace(INFO, normalisation="rgb/255 mean=(0.7, 0.6, 0.7)")
        check_bag(model.config, bag_of("s", info=info))
    check_bag(load_head(make_head(tmp_path / "older")).config, bag_of("s", info=info))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"encoder": "other"}, "encoder 'other', not 'made-up'"),
        ({"encoder_revision": "2"}, "encoder_revision '2', not '1'"),
        ({"pooling": "mean"}, "pooling 'mean', not 'cls'"),
        ({"mpp": 0.5}, "mpp 0.5, not 2.0"),
        ({"patch_px": 256}, "patch_px 256, not 224"),
        ({"encoder": None}, "encoder None, not 'made-up'"),
    ],
)
def test_bags_of_another_encoder_are_refused(head, change, words):
    bag = bag_of("s", info=dataclasses.replace(INFO, **change))
    with pytest.raises(MILError, match=f"^s: not a bag for this head: {words}"):
        check_bag(load_head(head).config, bag)


def test_bags_that_hold_nothing_to_predict_from(head):
    config = load_head(head).config
    with pytest.raises(MILError, match="embed_dim 5, not 6"):
        check_bag(config, bag_of("s", dim=5))
    with pytest.raises(MILError, match="s: an empty bag"):
        check_bag(config, bag_of("s", rows=0))
    bag = bag_of("s")
    bag.features[2, 1] = np.nan
    with pytest.raises(MILError, match="s: NaN"):
        check_bag(config, bag)


def test_bags_to_csv_and_bad_ones_do_not_end_the_run(head, tmp_path, capsys):
    bags = tmp_path / "bags"
    bags.mkdir()
    for name in ("one", "two"):
        write_bag(bags / f"{name}.h5", bag_of(name, rows=len(name) + ord(name[0]) % 5))
    write_bag(bags / "other.h5", bag_of("other", info=dataclasses.replace(INFO, mpp=0.5)))
    (bags / "torn.h5").write_bytes((bags / "one.h5").read_bytes()[:50])
    out = tmp_path / "p.csv"
    arguments = ["predict", str(bags), "--head", str(head), "--out", str(out), "--quiet"]
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert "mpp 0.5, not 2.0" in printed and "torn" in printed
    with out.open(newline="") as stream:
        rows = {row["slide_id"]: row for row in csv.DictReader(stream)}
    assert list(rows["one"]) == ["slide_id", "predicted", "p_a", "p_b", "p_c", "patches", "reason"]
    model = load_head(head)
    for name in ("one", "two"):
        made = predict_bag(model, bag_of(name, rows=len(name) + ord(name[0]) % 5))
        told = [float(rows[name][f"p_{c}"]) for c in "abc"]
        assert told == pytest.approx(made.probabilities.tolist(), abs=1e-6)
        assert rows[name]["predicted"] == made.label and rows[name]["reason"] == ""
    assert rows["other"]["predicted"] == "" and "not a bag" in rows["other"]["reason"]
    assert main([*arguments[:1], str(bags / "one.h5"), *arguments[2:]]) == 0
    for more in (["slide.svs"], ["--slides-csv", "slides.csv"]):  # nothing is left out in silence
        with pytest.raises(SystemExit) as stop:
            main([*arguments[:2], *more, *arguments[2:]])
        assert stop.value.code == 2
        assert f"{more[0]} is none" in capsys.readouterr().err


def test_slides_of_the_training_are_named(tmp_path, head, capsys):
    """Fold 1's head, published, knows the slides of the others; elsewhere nothing is known."""
    study, bags = tmp_path / "study", tmp_path / "bags"
    for name in ("head", "heads/fold-0"):
        shutil.copytree(head, study / name)
    (study / "results.json").write_text('{"published_fold": 1}')
    (study / "folds.csv").write_text("slide_id,patient_id,label,fold\none,p,a,0\ntwo,q,b,1\n")
    bags.mkdir()
    for name in ("one", "two", "new"):
        write_bag(bags / f"{name}.h5", bag_of(name))
    out = tmp_path / "p.csv"
    for where, known in (("head", "one"), ("heads/fold-0", "two")):
        assert main(["predict", str(bags), "--head", str(study / where), "--out", str(out)]) == 0
        assert f"1 of 3 slides belong to the training of this head ({known})" in (
            capsys.readouterr().err
        )
    (study / "predictions.csv").write_text("")
    (study / "linked").symlink_to(study / "heads" / "fold-0")
    assert main(["predict", str(bags), "--head", str(study / "linked"), "--out", str(out)]) == 0
    assert (
        f"(two): its answers there are too good to judge it by. Those of heads that had not "
        f"seen a slide: {study / 'predictions.csv'}" in capsys.readouterr().err
    )
    shutil.copytree(head, study / "from-elsewhere")
    for damage in ("", "{", "{}"):
        where = study / ("head" if damage else "from-elsewhere")
        (study / "results.json").write_text(damage or '{"published_fold": 1}')
        assert main(["predict", str(bags), "--head", str(where), "--out", str(out)]) == 0
        assert "training" not in capsys.readouterr().err
    assert main(["predict", str(bags), "--head", str(head), "--out", str(out)]) == 0
    assert "training" not in capsys.readouterr().err


def test_only_predictions_are_replaced(tmp_path, head, capsys):
    bag, labels = tmp_path / "s.h5", tmp_path / "labels.csv"
    write_bag(bag, bag_of("s"))
    labels.write_text("slide_id,label\ns,a\n")
    assert main(["predict", str(bag), "--head", str(head), "--out", str(labels)]) == 1
    assert "holds no predictions" in capsys.readouterr().err
    assert labels.read_text() == "slide_id,label\ns,a\n"
    for _ in range(2):
        assert main(["predict", str(bag), "--head", str(head), "--out", str(tmp_path / "p")]) == 0


def test_slides_are_embedded_as_the_head_wants(tmp_path, cmu_slide, capsys):
    """Slide -> CSV equals embedding by hand and asking the head."""
    torch.manual_seed(0)
    student = XMAGModel(XMAGConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=3))
    student.save_pretrained(tmp_path / "student")
    image_processor_for(student).save_pretrained(tmp_path / "student")
    encoder = load_encoder(str(tmp_path / "student"))
    bag = embed_slide(cmu_slide, encoder, EmbedOptions(mpp=4.0, patch_px=112))
    head = make_head(tmp_path / "head", embed_dim=24, mpp=4.0, patch_px=112,
                     encoder=encoder.name, encoder_revision=encoder.revision)  # fmt: skip
    expected = predict_bag(load_head(head), bag)
    out = tmp_path / "p.csv"
    arguments = ["predict", str(cmu_slide), "--head", str(head), "--out", str(out), "--quiet"]
    assert main([*arguments, "--model", str(tmp_path / "student")]) == 0
    with out.open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    told = [float(row[f"p_{c}"]) for c in "abc"]
    assert told == pytest.approx(expected.probabilities.tolist(), abs=1e-5)
    assert int(row["patches"]) == len(bag.features) >= 3
    capsys.readouterr()
    loud = [argument for argument in arguments if argument != "--quiet"]
    assert main(loud) == 1  # no table names this encoder
    (error,) = capsys.readouterr().err.splitlines()  # no bar was drawn
    assert "Say where that encoder is (--model)" in error
    # Other weights of the same architecture are another encoder.
    with torch.no_grad():
        student.layernorm.weight.mul_(2)
    student.save_pretrained(tmp_path / "student")
    assert main([*arguments, "--model", str(tmp_path / "student")]) == 1
    assert "and this head takes bags of" in capsys.readouterr().err
    sources = [SlideSource(tmp_path / "none.svs")]
    model = load_head(head)
    model.config.encoder_revision = load_encoder(str(tmp_path / "student")).revision
    (answer,) = predict_slides(model, sources, str(tmp_path / "student"), EmbedOptions())
    assert answer.prediction is None and "none" in answer.reason


def test_an_answer_from_what_is_left_of_a_slide_says_so(tmp_path, cmu_slide, capsys):
    """Kept, with its reason, and exit code 1, as `xmag embed` ends for such a slide."""
    student, slide = tmp_path / "student", tmp_path / "damaged.svs"
    config = XMAGConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=3)
    XMAGModel(config).save_pretrained(student)
    image_processor_for(config).save_pretrained(student)
    encoder, whole = load_encoder(str(student)), cmu_slide.read_bytes()
    slide.write_bytes(whole[:1_100_000] + bytes(100_000) + whole[1_200_000:])
    bag = embed_slide(slide, encoder, EmbedOptions(mpp=2.0, patch_px=224))
    lost = bag.info.unreadable_patches
    assert lost and len(bag.features)
    write_bag(tmp_path / "damaged.h5", bag)
    head = make_head(tmp_path / "head", embed_dim=24, encoder=encoder.name,
                     encoder_revision=encoder.revision)  # fmt: skip
    expected, out = predict_bag(load_head(head), bag), tmp_path / "p.csv"
    asked = ["--head", str(head), "--out", str(out), "--quiet"]
    for given in ([str(slide), "--model", str(student)], [str(tmp_path / "damaged.h5")]):
        assert main(["predict", *given, *asked]) == 1
        printed = capsys.readouterr().out
        assert f"damaged: {expected.label} " in printed
        assert f"damaged: {lost} patches could not be decoded" in printed
        with out.open(newline="") as stream:
            (row,) = csv.DictReader(stream)
        assert row["predicted"] == expected.label and row["patches"] == str(len(bag.features))
        assert row["reason"].startswith(f"damaged: {lost} patches could not be decoded")


def test_slides_of_another_nominal_scale_are_refused(tmp_path, caplog):
    """TRIDENT's files say no um/px and no encoder: their magnification, and a warning."""
    silent = {"encoder": None, "encoder_revision": None, "pooling": None, "mpp": None}
    folder = make_head(tmp_path / "h", **silent, patch_px=256, target_magnification=20.0)
    model = load_head(folder)
    assert "did not say their encoder and mpp" in caplog.text
    info = BagInfo(patch_px=256, magnifications=(40.0, 20.0))
    check_bag(model.config, bag_of("s", info=info))
    other = dataclasses.replace(info, magnifications=(40.0, 5.0))
    with pytest.raises(MILError, match=r"target_magnification 5.0, not 20.0"):
        check_bag(model.config, bag_of("s", info=other))
    known = dataclasses.replace(info, mpp=0.5)
    assert known.target_magnification is None  # um/px says it better


def test_what_was_answered_is_kept_when_the_rest_is_not(head, tmp_path, capsys, monkeypatch):
    bags = [tmp_path / f"{name}.h5" for name in "abc"]
    for path in bags:
        write_bag(path, bag_of(path.stem))
    out = tmp_path / "p.csv"
    asked = ["predict", *map(str, bags), "--head", str(head), "--out", str(out), "--quiet"]

    def fails(error):
        def ask(model, bag):
            if bag.slide_id == "b":
                raise error
            return predict_bag(model, bag)

        return ask

    older = "slide_id,predicted,p_a,patches,reason\n" + "x,a,1,7,\n" * 1000
    out.write_text(older)
    partial = tmp_path / "p.csv.partial"
    monkeypatch.setattr("xmag_hf.mil.predict.predict_bag", fails(KeyboardInterrupt()))
    assert main(asked) == 1
    told = capsys.readouterr()
    assert f"{partial}: 1 of 3 slides" in told.out and "resume" not in told.err
    with partial.open(newline="") as stream:
        assert [row["slide_id"] for row in csv.DictReader(stream)] == ["a"]
    assert out.read_text() == older
    monkeypatch.setattr("xmag_hf.mil.predict.predict_bag", fails(MemoryError()))
    assert main(asked) == 1
    assert "b: not enough memory" in capsys.readouterr().out
    with out.open(newline="") as stream:
        assert [row["predicted"] != "" for row in csv.DictReader(stream)] == [True, False, True]
    assert not partial.exists()


def test_sigterm_keeps_what_was_answered(head, tmp_path, capsys, monkeypatch):
    """A scheduler's warning before it kills; afterwards the signal is what it was."""
    for name in "abc":
        write_bag(tmp_path / f"{name}.h5", bag_of(name))
    out, before = tmp_path / "p.csv", signal.getsignal(signal.SIGTERM)

    def ask(model, bag):
        if bag.slide_id == "c":
            signal.raise_signal(signal.SIGTERM)
        return predict_bag(model, bag)

    monkeypatch.setattr("xmag_hf.mil.predict.predict_bag", ask)
    asked = ["predict", str(tmp_path), "--head", str(head), "--out", str(out), "--quiet"]
    assert main(asked) == 1
    assert "2 of 3 slides" in capsys.readouterr().out and not out.exists()
    with (tmp_path / "p.csv.partial").open(newline="") as stream:
        assert [row["slide_id"] for row in csv.DictReader(stream)] == ["a", "b"]
    assert signal.getsignal(signal.SIGTERM) is before
    kept = (tmp_path / "p.csv.partial").read_text()  # another that is stopped earlier takes nothing
    monkeypatch.setattr("xmag_hf.mil.predict.predict_bag", lambda *_: signal.raise_signal(15))
    assert main(asked) == 1
    assert "2 of 3 slides" in capsys.readouterr().out
    assert (tmp_path / "p.csv.partial").read_text() == kept


def test_two_bags_of_one_name_are_refused(head, tmp_path, capsys):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_bag(tmp_path / folder / "s.h5", bag_of("s"))
    with pytest.raises(SystemExit):
        main(["predict", str(tmp_path / "one"), str(tmp_path / "two"), "--head", str(head),
              "--out", str(tmp_path / "p.csv")])  # fmt: skip
    assert "two bags of one name" in capsys.readouterr().err


def test_a_slide_without_tissue_is_no_failure(tmp_path, capsys):
    student = tmp_path / "student"
    config = XMAGConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=3)
    XMAGModel(config).save_pretrained(student)
    image_processor_for(config).save_pretrained(student)
    encoder = load_encoder(str(student))
    identity = {"encoder": encoder.name, "encoder_revision": encoder.revision, "embed_dim": 24}
    head = make_head(tmp_path / "head", **identity)
    glass = write_tiff(tmp_path / "glass.tif", [np.full((900, 900, 3), 245, np.uint8)], mpp=0.5)
    out = tmp_path / "p.csv"
    code = main(["predict", str(glass), "--head", str(head), "--model", str(student), "--out",
                 str(out), "--quiet"])  # fmt: skip
    assert code == 0 and "skipped: glass: no tissue" in capsys.readouterr().out
    assert "glass,,,,,0,glass: no tissue" in out.read_text()


@pytest.mark.parametrize(
    "what",
    ["nothing", "empty", "study", "encoder", "no weights", "cut short", "other shapes", "gaps"],
)
def test_what_is_no_head(head, tmp_path, what):
    """A name that is no folder is not looked for on the Hub, which may be out of reach."""
    folder = tmp_path / "model"
    words = "no head there that loads"
    if what == "nothing":
        words = f"no such folder. If it is on the Hub: --head hf:{folder}"
    if what == "empty":
        folder.mkdir()
    if what == "study":
        shutil.copytree(head, folder / "head")
        words = f"is a study. Its head is in it: --head {folder / 'head'}"
    if what == "encoder":
        config = XMAGConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=3)
        XMAGModel(config).save_pretrained(folder)
        words = "is xmag, which is no head"
    if what == "no weights":
        folder.mkdir()
        (folder / "config.json").write_bytes((head / "config.json").read_bytes())
    if what == "cut short":
        shutil.copytree(head, folder)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
    if what == "other shapes":
        shutil.copytree(head, folder)
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace('"hidden_dim": 8', '"hidden_dim": 9'))
    if what == "gaps":  # transformers would fill them at random, differently at each load
        shutil.copytree(head, folder)
        tensors = load_file(folder / "model.safetensors")
        del tensors["classifier.bias"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        words = f"{folder}: its weights lack classifier.bias"
    with pytest.raises(MILError, match=words):
        load_head(folder)
