"""Batch normalisations of XMAG-lite folded into the convolutions before them, to encode faster."""

from __future__ import annotations

import copy

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from xmag_hf.encoders import Encoder


def folded(encoder: Encoder) -> Encoder:
    """The encoder without the passes over its maps that only scale and shift them.

    A normalisation with fixed statistics is linear, and so part of the convolution before it:
    features agree to float32's rounding, at 1.1 to 1.3 times the speed (docs/benchmarks.md).

    Args:
        encoder: Any; it stays as it is.

    Returns:
        A folded copy of XMAG-lite in fp32, with its weights of this moment; itself if it is one
        already, another encoder, or runs under autocast.
    """
    config = getattr(encoder.model, "config", None)
    if getattr(config, "model_type", "") != "xmag_lite" or encoder.precision != "fp32":
        return encoder
    if not any(isinstance(module, _BatchNorm) for module in encoder.modules()):
        return encoder
    copied = copy.deepcopy(encoder)
    _fold(copied.model.backbone)  # type: ignore[arg-type]
    return copied


def _fold(module: nn.Module) -> None:
    """Fold all that follow a convolution in one module; timm's blocks name them in that order."""
    before: nn.Conv2d | None = None
    for name, child in list(module.named_children()):
        if isinstance(child, _BatchNorm) and before is not None:
            weight, bias = fuse_conv_bn_weights(
                before.weight, before.bias,
                child.running_mean, child.running_var,  # type: ignore[arg-type]
                child.eps, child.weight, child.bias,
            )  # fmt: skip
            before.weight, before.bias = weight, bias
            setattr(module, name, child.act)  # timm's norms hold the activation
        _fold(child)
        before = child if isinstance(child, nn.Conv2d) else None
