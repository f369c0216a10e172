"""Configuration of XMAG, the 5x pathology ViT, and what it shares with XMAG-lite.

Travels to the Hub with the weights: imports transformers and nothing of ours but siblings.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

# size -> (hidden_size, num_hidden_layers, num_attention_heads). A preset for the constructor only;
# what is stored are the three numbers.
XMAG_SIZES = {"base": (768, 12, 12), "small": (384, 12, 6), "tiny": (192, 12, 3)}

# The classes that each architecture offers, by Auto class: the `auto_map` of every saved config
# names all of them, so that an encoder's folder also opens as a classifier and the reverse.
XMAG_AUTO_MAP = {
    "AutoConfig": "configuration_xmag.XMAGConfig",
    "AutoModel": "modeling_xmag.XMAGModel",
    "AutoModelForImageClassification": "modeling_xmag.XMAGForImageClassification",
}


def _same_fields(self: XMAGBaseConfig, other: object) -> bool:
    """Same class and same fields, but for where it was saved and by what."""
    if type(self) is not type(other):
        return False
    volatile = {"auto_map", "architectures", "dtype", "transformers_version", "_name_or_path"}
    ours, theirs = (config.to_dict() for config in (self, other))  # type: ignore[attr-defined]
    return all(ours.get(k) == theirs.get(k) for k in (ours.keys() | theirs.keys()) - volatile)


class XMAGBaseConfig(PreTrainedConfig):
    """What XMAG and XMAG-lite have in common: input, geometry of the 4 x 4 grid, provenance.

    Args:
        image_size: Input side in px.
        num_channels: Input channels; 3, RGB.
        drop_path_rate: Stochastic depth in training, 0 <= rate < 1.
        initializer_range: Standard deviation of fresh linear weights.
        mpp: Scale the encoder was made for, in um/px.
        spatial_grid: `spatial_features` gives spatial_grid**2 cells, one per teacher sub-patch.
        teacher: Identifier of the 20x teacher, None before distillation.
        teacher_dim: Width of the teacher's features, None before distillation.
        corpus_fingerprint: sha256 of the paired corpus, None before distillation.
        licence: Licence of the weights as it follows from start, teacher and data.
        **kwargs: Anything else a transformers configuration takes (`id2label`, ...).

    Raises:
        ValueError: A value that cannot be meant; field, value and what is allowed are named.
    """

    auto_classes: ClassVar[dict[str, str]] = {}

    def __init__(
        self,
        image_size: int = 224,
        num_channels: int = 3,
        drop_path_rate: float = 0.0,
        initializer_range: float = 0.02,
        mpp: float = 2.0,
        spatial_grid: int = 4,
        teacher: str | None = None,
        teacher_dim: int | None = None,
        corpus_fingerprint: str | None = None,
        licence: str | None = None,
        **kwargs: Any,
    ):
        self.image_size = check_whole("image_size", image_size)
        self.num_channels = check_whole("num_channels", num_channels)
        self.drop_path_rate = check_range("drop_path_rate", drop_path_rate, 0.0, 1.0, low_ok=True)
        self.initializer_range = check_range("initializer_range", initializer_range, 0.0, 1.0)
        # Scales outside this are not microscopy: 0.05 um/px is beyond 100x, 20 um/px a thumbnail.
        self.mpp = check_range("mpp", mpp, 0.05, 20.0, low_ok=True)
        self.spatial_grid = check_whole("spatial_grid", spatial_grid)
        self.teacher = check_text("teacher", teacher)
        self.teacher_dim = None if teacher_dim is None else check_whole("teacher_dim", teacher_dim)
        self.corpus_fingerprint = check_text("corpus_fingerprint", corpus_fingerprint)
        self.licence = check_text("licence", licence)
        super().__init__(**kwargs)

    def __init_subclass__(cls, *args: Any, **kwargs: Any):
        super().__init_subclass__(*args, **kwargs)
        # transformers makes every subclass a dataclass, whose comparison sees declared fields
        # only: a base and a tiny would be equal.
        cls.__eq__ = _same_fields

    def to_dict(self) -> dict[str, Any]:
        """All fields, with the classes of this architecture in `auto_map`."""
        fields = super().to_dict()
        if fields.get("auto_map"):
            # A folder loaded from the Hub refers to its code as "org/name--module.Class".
            prefix = next(iter(fields["auto_map"].values())).rpartition("--")[0]
            full = {k: f"{prefix}--{v}" if prefix else v for k, v in self.auto_classes.items()}
            fields["auto_map"] = full | fields["auto_map"]
        return fields


class XMAGConfig(XMAGBaseConfig):
    """Configuration of `XMAGModel`, a ViT with DINOv2's block at 224 px and 2.0 um/px.

    Args:
        size: "base", "small" or "tiny": presets hidden_size, num_hidden_layers and
            num_attention_heads. Not stored. Without it and without those, base.
        hidden_size: Width D of a token.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Heads a block; divides hidden_size.
        mlp_ratio: Width of the MLP over hidden_size.
        layerscale_value: What LayerScale starts from.
        patch_size: Side of a patch token in px; divides image_size.
        layer_norm_eps: Epsilon of every LayerNorm.
        qkv_bias: Whether query, key and value have a bias.
        hidden_act: Activation of the MLP.
        **kwargs: See `XMAGBaseConfig`.

    Raises:
        ValueError: Unknown size, a size that contradicts explicit fields, or a value that cannot
            be meant.
    """

    model_type = "xmag"
    auto_classes = XMAG_AUTO_MAP
    _auto_class = "AutoConfig"

    # Fixed, not stored: parts of transformers' DINOv2 that XMAG is composed of read them.
    hidden_dropout_prob = 0.0
    use_mask_token = False

    def __init__(
        self,
        size: str | None = None,
        hidden_size: int | None = None,
        num_hidden_layers: int | None = None,
        num_attention_heads: int | None = None,
        mlp_ratio: int = 4,
        layerscale_value: float = 1.0,
        patch_size: int = 14,
        layer_norm_eps: float = 1e-6,
        qkv_bias: bool = True,
        hidden_act: str = "gelu",
        **kwargs: Any,
    ):
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
        given = (hidden_size, num_hidden_layers, num_attention_heads)
        shape = dict(zip(names, _preset(size), strict=True))
        for name, value in zip(names, given, strict=True):
            if value is not None and size is not None and value != shape[name]:
                raise ValueError(
                    f"XMAGConfig: size={size!r} has {name}={shape[name]}, but {name}={value!r} "
                    "was given too. Leave out one of them."
                )
            shape[name] = shape[name] if value is None else check_whole(name, value)
        self.hidden_size = shape["hidden_size"]
        self.num_hidden_layers = shape["num_hidden_layers"]
        self.num_attention_heads = shape["num_attention_heads"]
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"XMAGConfig: num_attention_heads={self.num_attention_heads} does not divide "
                f"hidden_size={self.hidden_size}."
            )
        self.mlp_ratio = check_range("mlp_ratio", mlp_ratio, 0.0, 64.0)
        self.layerscale_value = check_range("layerscale_value", layerscale_value, 0.0, 100.0)
        self.patch_size = check_whole("patch_size", patch_size)
        self.layer_norm_eps = check_range("layer_norm_eps", layer_norm_eps, 0.0, 1.0)
        self.qkv_bias = bool(qkv_bias)
        self.hidden_act = hidden_act
        super().__init__(**kwargs)
        side = self.image_size / self.patch_size
        if side % self.spatial_grid:
            raise ValueError(
                f"XMAGConfig: image_size={self.image_size} over patch_size={self.patch_size} is "
                f"{side:g} tokens a side, which a {self.spatial_grid} x {self.spatial_grid} "
                "spatial_grid does not divide evenly."
            )


def _preset(size: str | None) -> tuple[int, int, int]:
    """(hidden_size, layers, heads) of a size; base for None."""
    size = "base" if size is None else size
    if size not in XMAG_SIZES:
        raise ValueError(f"XMAGConfig: size={size!r} is not one of {', '.join(XMAG_SIZES)}.")
    return XMAG_SIZES[size]


def check_whole(field: str, value: Any) -> int:
    """`value` as a positive int, or a ValueError that names the field."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"XMAG configuration: {field}={value!r} must be a whole number above 0.")
    return value


def check_range(
    field: str, value: Any, low: float, high: float, *, low_ok: bool = False
) -> int | float:
    """`value` if low < value < high (low <= value with `low_ok`), or a ValueError."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not (low < value < high or (low_ok and value == low)):
        sign = "<=" if low_ok else "<"
        raise ValueError(
            f"XMAG configuration: {field}={value!r} must be a number with "
            f"{low:g} {sign} {field} < {high:g}."
        )
    return value


def check_text(field: str, value: Any) -> str | None:
    """`value` if it is None or a non-empty string, or a ValueError."""
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise ValueError(f"XMAG configuration: {field}={value!r} must be text, or None if unknown.")
    return value
