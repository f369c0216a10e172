"""Saving whole or not at all, and pushing: crashes at every step, and a Hub that refuses."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import loopback_hub
import numpy as np
import pytest
import torch
from huggingface_hub import errors
from transformers import AutoImageProcessor, AutoModel

from xmag_hf.hub import PublishError, push_folder, save_folder
from xmag_hf.modeling import XMAGConfig, XMAGImageProcessor, XMAGModel

CARD = "---\nlicense: other\n---\n# card\n"


class FakeModel:
    """Writes what transformers writes; `version` is in each file, so that a mixture shows."""

    def __init__(self, version: str, weights: tuple[str, ...] = ("model.safetensors",)) -> None:
        self.version = version
        self.weights = weights

    def save_pretrained(self, folder: Path) -> None:
        config = {"model_type": "xmag", "version": self.version}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        for name in self.weights:
            (Path(folder) / name).write_text(self.version)


class FakeProcessor(FakeModel):
    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "preprocessor_config.json").write_text(self.version)


def _save(version: str, out: Path, **kwargs) -> Path:
    model = FakeModel(version, **kwargs)
    return save_folder(model, FakeProcessor(version), CARD, out, {"distillation.json": version})


def _loaded_version(out: Path) -> str | None:
    """What a reader of the folder gets: a version, None if it does not load; never a mixture."""
    if not (out / "config.json").is_file():
        return None
    version = json.loads((out / "config.json").read_text())["version"]
    for name in ("model.safetensors", "preprocessor_config.json", "distillation.json"):
        assert (out / name).read_text() == version, f"{name} is of another model"
    return version


def test_new_folder_holds_everything_and_nothing_else(tmp_path):
    out = _save("one", tmp_path / "deep" / "xmag")
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json", "model.safetensors", "preprocessor_config.json", "README.md",
        "distillation.json",
    }  # fmt: skip
    assert (out / "README.md").read_text() == CARD
    assert [path.name for path in out.parent.iterdir()] == ["xmag"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask  # others may read as usual


def test_a_saved_student_loads_by_the_auto_classes(tmp_path):
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = XMAGModel(XMAGConfig(**small)).eval()
    out = save_folder(model, XMAGImageProcessor(), CARD, tmp_path / "xmag")
    loaded = AutoModel.from_pretrained(out).eval()
    processor = AutoImageProcessor.from_pretrained(out)
    image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    inputs = processor(image, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs)[0], model(**inputs)[0])
    assert {"configuration_xmag.py", "modeling_xmag.py"} <= {path.name for path in out.iterdir()}
    (out / "config.json").unlink()  # as in the middle of a replacement
    with pytest.raises((OSError, ValueError)):
        AutoModel.from_pretrained(out)


def test_replacing_keeps_checkpoints_and_logs(tmp_path):
    out = _save("one", tmp_path / "xmag", weights=("model.safetensors", "pytorch_model.bin"))
    (out / "checkpoints" / "step-5").mkdir(parents=True)
    (out / "checkpoints" / "step-5" / "state.bin").write_text("state")
    with (out / "metrics.jsonl").open("w") as log:  # open, as in a run
        _save("two", out)
        log.write("line\n")
    assert _loaded_version(out) == "two"
    assert (out / "checkpoints/step-5/state.bin").read_text() == "state"
    assert (out / "metrics.jsonl").read_text() == "line\n"
    # transformers would otherwise find weights of the old model.
    assert not (out / "pytorch_model.bin").exists()


def test_files_that_are_not_the_models_stay(tmp_path):
    """Weights under names of the user's own are no weights of ours, at the first save and later."""
    names = ("start.safetensors", "pytorch_model_teacher.bin", "model-end.safetensors", "notes.md")
    for name in names:
        (tmp_path / name).write_text(f"mine: {name}")
    _save("one", tmp_path, weights=("model-00001-of-00002.safetensors",))
    for version in ("two", "three"):
        _save(version, tmp_path)
        for name in names:
            assert (tmp_path / name).read_text() == f"mine: {name}"
    assert _loaded_version(tmp_path) == "three"
    assert not (tmp_path / "model-00001-of-00002.safetensors").exists()  # of version one


@pytest.mark.parametrize(
    "name", ["README.md", "model.safetensors", "pytorch_model.bin", "preprocessor_config.json"]
)
def test_where_no_model_of_ours_is_nothing_is_replaced(tmp_path, name):
    out = tmp_path / "project"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(PublishError, match=f"{name}.*no config.json.*another folder"):
        _save("1", out)
    assert [path.name for path in tmp_path.rglob("*")] == ["project", name]
    assert (out / name).read_text() == "mine"


def test_a_crash_at_any_step_leaves_old_new_or_nothing(tmp_path, monkeypatch):
    """The process is stopped before the k-th change to the output folder, for every k."""
    seen = []
    for k in range(100):
        out = _save("old", tmp_path / str(k))
        (out / "metrics.jsonl").write_text("kept")
        changes = []

        def stopping(change, changes=changes, k=k, out=out):
            def instead(*args, **kwargs):
                if out in (Path(args[0]).parent, Path(args[-1]).parent):
                    changes.append(args)
                    if len(changes) > k:
                        raise KeyboardInterrupt
                return change(*args, **kwargs)

            return instead

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stopping(os.replace))
            patch.setattr(Path, "unlink", stopping(Path.unlink))
            try:
                _save("new", out)
                finished = True
            except KeyboardInterrupt:
                finished = False
        seen.append(_loaded_version(out))
        assert (out / "metrics.jsonl").read_text() == "kept"
        _save("after", out)  # whatever was left behind is no obstacle
        assert _loaded_version(out) == "after"
        if finished:
            break
    assert seen[0] == "old" and seen[-1] == "new" and finished
    assert len(seen) >= 6  # config away, four files, config in; the loop did stop at each
    assert set(seen[1:-1]) == {None}


def test_a_failed_save_leaves_the_old_model(tmp_path):
    out = _save("old", tmp_path / "xmag")

    class Failing(FakeProcessor):
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_folder(FakeModel("new"), Failing("new"), CARD, out)
    with pytest.raises(PublishError, match="lacks model.safetensors"):
        save_folder(FakeModel("new", weights=()), FakeProcessor("new"), CARD, out)
    assert _loaded_version(out) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["xmag"]


@pytest.mark.parametrize("name", ["../up", "a/b", "..", ""])
def test_extra_files_stay_inside(tmp_path, name):
    with pytest.raises(ValueError, match="plain file name"):
        save_folder(FakeModel("1"), FakeProcessor("1"), CARD, tmp_path / "x", {name: "text"})
    assert list(tmp_path.iterdir()) == []


def test_extra_files_do_not_replace_the_models_own(tmp_path):
    with pytest.raises(ValueError, match="config.json.*own file"):
        save_folder(FakeModel("1"), FakeProcessor("1"), CARD, tmp_path / "x", {"config.json": ""})


def test_what_is_not_ours_is_not_replaced(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(PublishError, match="another model .model_type 'bert'"):
        _save("1", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(PublishError, match="is a file"):
        _save("1", tmp_path / "file")


# --- push ----------------------------------------------------------------------------------------


class FakeApi:
    """Keeps what it is told; `public` is the state of the repository that exists already."""

    public = False
    refusal: Exception | None = None

    def __init__(self) -> None:
        FakeApi.calls = []

    def create_repo(self, repo_id, **kwargs):
        if self.refusal:
            raise self.refusal
        self.calls.append(("create_repo", repo_id, kwargs))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def repo_info(self, repo_id):
        return SimpleNamespace(private=not self.public)

    def create_branch(self, repo_id, **kwargs):
        self.calls.append(("create_branch", repo_id, kwargs))

    def upload_folder(self, **kwargs):
        self.calls.append(("upload_folder", kwargs["repo_id"], kwargs))
        return SimpleNamespace(commit_url=f"https://huggingface.co/{kwargs['repo_id']}/commit/1")


@pytest.fixture
def api(monkeypatch) -> type[FakeApi]:
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "public", False)
    monkeypatch.setattr(FakeApi, "refusal", None)
    return FakeApi


def test_push_sends_the_model_and_not_the_run(tmp_path, api):
    out = _save("one", tmp_path / "xmag")
    unwanted = ["checkpoints/step-1/a.bin", ".hidden", "teacher/key/features.h5", ".git/config"]
    for name in unwanted:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("x")
    url = push_folder(out, "org/name", revision="v1")
    assert url == "https://huggingface.co/org/name/commit/1"
    names = [call[0] for call in api.calls]
    assert names == ["create_repo", "create_branch", "upload_folder"]
    assert api.calls[0][2] == {"private": True, "exist_ok": True}
    upload = api.calls[2][2]
    assert upload["revision"] == "v1" and Path(upload["folder_path"]) == out
    # The Hub client's own filter decides what these patterns let through.
    assert _sent(out, upload) == MODEL


MODEL = {
    "config.json", "model.safetensors", "preprocessor_config.json", "README.md",
    "distillation.json",
}  # fmt: skip


def _sent(out: Path, upload: dict) -> set[str]:
    """The files that the Hub client's own filter lets through."""
    files = [str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()]
    patterns = {key: upload[key] for key in upload if key.endswith("_patterns")}
    return set(huggingface_hub.utils.filter_repo_objects(files, **patterns))


def test_push_leaves_other_weights_here(tmp_path, api, caplog):
    """A teacher's weights beside the student may be under a licence that keeps them private."""
    others = ("pytorch_model_teacher.bin", "start.safetensors", "teacher.pth", "start.pt",
              "optimizer.npz", "uni2/model.safetensors", "uni2/pytorch_model.bin",
              "uni2/config.json", "uni2/modeling.py", "patients.csv", "slides.json")  # fmt: skip
    own = ("metrics.jsonl", "modeling_xmag.py", "NOTICE")
    (tmp_path / "uni2").mkdir()
    for name in (*others, *own):
        (tmp_path / name).write_text("x")
    weights = "model-00001-of-00001.safetensors"
    out = _save("one", tmp_path, weights=(weights,))
    push_folder(out, "org/name")
    assert _sent(out, api.calls[-1][2]) == MODEL - {"model.safetensors"} | {weights, *own}
    for name in {Path(name).parts[0] for name in others}:
        assert name in caplog.text
    assert weights not in caplog.text


def test_a_student_and_a_head_are_pushed_whole(tmp_path, api, caplog):
    """Saved by the package itself: code, weights in parts and what lies beside them."""
    from xmag_hf.modeling import XMAGABMILConfig, XMAGABMILModel

    student = XMAGModel(XMAGConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    head = XMAGABMILModel(XMAGABMILConfig(embed_dim=6, hidden_dim=8, attention_dim=4))
    for name, model, processor, more in (
        ("student", student, XMAGImageProcessor(), "distillation.json"),
        ("head", head, None, "training.json"),
    ):
        out = save_folder(model, processor, CARD, tmp_path / name, {more: "{}"})
        push_folder(out, "org/name")
        assert _sent(out, api.calls[-1][2]) == {path.name for path in out.iterdir()}
    assert not caplog.text


def test_push_does_not_publish_by_accident(tmp_path, api):
    out = _save("one", tmp_path / "xmag")
    api.public = True
    with pytest.raises(PublishError, match="exists and is public.*private=False"):
        push_folder(out, "org/name")
    assert "upload_folder" not in [call[0] for call in api.calls]
    assert push_folder(out, "org/name", private=False).endswith("/commit/1")


def test_push_refuses_what_is_not_a_model(tmp_path, api):
    with pytest.raises(PublishError, match="no such folder"):
        push_folder(tmp_path / "absent", "org/name")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PublishError, match="lacks preprocessor_config.json, README.md, model.saf"):
        push_folder(tmp_path, "org/name")
    out = _save("one", tmp_path / "xmag")
    with pytest.raises(PublishError, match="<org>/<name>"):
        push_folder(out, "not a name/at all")


def test_push_without_login_says_how(tmp_path, api, monkeypatch):
    out = _save("one", tmp_path / "xmag")
    response = SimpleNamespace(status_code=403, headers={}, request=None)
    for refusal in (
        errors.LocalTokenNotFoundError("no token"),
        errors.HfHubHTTPError("Forbidden", response=response),
    ):
        monkeypatch.setattr(api, "refusal", refusal)
        with pytest.raises(PublishError, match="org/name.*hf auth login"):
            push_folder(out, "org/name")


class ModelsHub(loopback_hub.CommittingHub):
    """Also says of a model's repository that it is there, and private."""

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/")
        if name.count("/") != 1 or not (self.root / name).is_dir():
            return self._refuse(404, "RepoNotFound")
        self._answer({"id": name, "sha": loopback_hub.COMMIT, "private": True, "siblings": []})


def test_a_name_without_organisation_is_the_users(tmp_path, monkeypatch):
    """The real client against a Hub on 127.0.0.1, which knows the user as `lab`."""
    monkeypatch.setenv("HF_TOKEN", "hf_nothing")
    out = _save("one", tmp_path / "xmag")
    with loopback_hub.serving(ModelsHub, tmp_path, monkeypatch):
        url = push_folder(out, "my-xmag")
    sent = {path.name: path.read_bytes() for path in (tmp_path / "hub/lab/my-xmag").iterdir()}
    assert sent == {path.name: path.read_bytes() for path in out.iterdir()}
    assert url.endswith("/lab/my-xmag/commit/1")


def test_push_when_the_hub_cannot_be_reached(tmp_path, monkeypatch):
    """The real client against a port where nobody listens."""
    out = _save("one", tmp_path / "xmag")
    real = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        huggingface_hub, "HfApi", lambda: real(endpoint="http://127.0.0.1:9", token="hf_x")
    )
    with pytest.raises(PublishError, match="could not be reached"):
        push_folder(out, "org/name")


def test_every_file_is_as_readable_as_the_others(tmp_path: Path) -> None:
    """safetensors writes its files for the owner alone."""
    from xmag_hf.hub.cards import render_start_card
    from xmag_hf.modeling import XMAGConfig, XMAGModel
    from xmag_hf.modeling.convert import image_processor_for

    narrow = XMAGConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
    model = XMAGModel(narrow)
    card = render_start_card("nothing", "xmag", model.num_parameters(), copied=False)
    folder = save_folder(model, image_processor_for(model), card, tmp_path / "xmag")
    plain = tmp_path / "plain"
    plain.write_text("")
    assert {path.stat().st_mode for path in folder.iterdir()} == {plain.stat().st_mode}
    with pytest.raises(PublishError, match="exists already"):
        save_folder(model, image_processor_for(model), card, folder, replace=False)
