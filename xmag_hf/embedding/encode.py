"""Third stage: batches of pixels through an encoder."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from xmag_hf.encoders import GRID, Encoder

from .folding import folded
from .options import EmbedError

logger = logging.getLogger(__name__)

BATCH_SIZE = {"cuda": 256, "cpu": 32}
# What an encoder's own embedding is: its card's pooling -> the name in a bag.
OWN_POOLING = {"cls": "cls", "cls+mean": "cls+mean", "average": "mean", "model": "model"}
CELLS = GRID * GRID
OUT_OF_MEMORY = (
    "can't allocate memory",  # CPU
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # its workspace did not fit
    "CUDNN_STATUS_ALLOC_FAILED",
    "out of memory",
)


@dataclass(frozen=True, eq=False)
class Encoded:
    """Embeddings of a batch.

    Attributes:
        features: (B, D) float32.
        tokens: (B, 16, C) float32, or None.
    """

    features: np.ndarray
    tokens: np.ndarray | None


class PooledEncoder(Encoder):
    """An encoder with another pooling, and local features from the same pass.

    Its weights are those of the encoder it is made from; forward gives (B, D), or (B, D + 16 * C)
    with the local features behind the pooled ones.

    Args:
        encoder: Loaded.
        pooling: `cls`, `mean`, `cls+mean`, or `own`.
        tokens: Give local features too.
    """

    def __init__(self, encoder: Encoder, pooling: str, *, tokens: bool) -> None:
        super().__init__(encoder.model, encoder.card, precision=encoder.precision)
        self.pooling, self.tokens = pooling, tokens
        self.pooled_dim = self.embed_dim  # of the last pass: where the local features begin

    def _embed(self, pixel_values: Tensor) -> Tensor:
        own, cls, patches = self._parts(pixel_values)
        pooled = own if self.pooling == "own" else self._pool(cls, patches)
        self.pooled_dim = pooled.shape[1]
        if not self.tokens:
            return pooled
        return torch.cat([pooled, _cells(patches, self.name).flatten(1)], dim=1)

    def _pool(self, cls: Tensor | None, patches: Tensor) -> Tensor:
        mean = patches.mean(dim=1)
        if self.pooling == "mean":
            return mean
        if cls is None:
            raise EmbedError(
                f"{self.name}: no class token, so no --pooling {self.pooling}. Take mean, or auto."
            )
        return cls if self.pooling == "cls" else torch.cat([cls, mean], dim=1)

    def _parts(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Own embedding (B, D), class token (B, C) or None, patch tokens (B, N, C)."""
        if self.card.builder in ("timm", "pypi"):
            output = self.model.forward_features(pixel_values)  # type: ignore[operator]
            if output.ndim == 4:  # (B, C, H, W)
                own = self.model.forward_head(output)  # type: ignore[operator]
                return own, None, output.flatten(2).transpose(1, 2)
            prefix = self._prefix()
            cls, patches = output[:, 0] if prefix else None, output[:, prefix:]
            if self._both() and cls is not None:
                return torch.cat([cls, patches.mean(dim=1)], dim=1), cls, patches
            return self.model.forward_head(output), cls, patches  # type: ignore[operator]
        output = self.model(pixel_values=pixel_values)
        hidden = output.last_hidden_state
        if _is_lite(self):
            return output.pooler_output, None, hidden
        cls, patches = hidden[:, 0], hidden[:, self._prefix() :]
        own = output.pooler_output if self.card.pooling == "pooler" else cls
        return (torch.cat([cls, patches.mean(dim=1)], dim=1) if self._both() else own), cls, patches


class PatchEncoder:
    """Encode batches; when memory runs out, halve the batch and go on.

    Attributes:
        encoder: As loaded.
        pooling: Name of what it gives, as bags record it.
        batch_size: Largest batch that is tried; shrinks when memory runs out.

    Args:
        encoder: Loaded, on its device, where it stays: a folded copy of XMAG-lite does the work.
        pooling: `auto`, `cls`, `mean` or `cls+mean`.
        tokens: Give the 4 x 4 local features too.
        batch_size: None: `BATCH_SIZE` of the device.
        compiled: Run the model's forward pass through torch.compile. A timm encoder with another
            pooling than its own, or with tokens, has another pass, which is not compiled.

    Raises:
        EmbedError: The encoder cannot pool so, or has no 4 x 4 map.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        pooling: str = "auto",
        tokens: bool = False,
        batch_size: int | None = None,
        compiled: bool = False,
    ):
        own = own_pooling(encoder)
        self.encoder = encoder
        self.pooling = own if pooling == "auto" else pooling
        self.batch_size = batch_size or BATCH_SIZE.get(encoder.device.type, BATCH_SIZE["cpu"])
        kind = "own" if self.pooling == own else self.pooling
        plain = kind == "own" and not tokens
        fast = folded(encoder)
        self._forward: Encoder = fast if plain else PooledEncoder(fast, kind, tokens=tokens)
        if compiled:
            self._forward.model.compile()
        if not plain:  # say now, not after an hour of reading, what the encoder cannot do
            self._encode_at_once(np.zeros((1, encoder.input_px, encoder.input_px, 3), np.uint8))

    @property
    def feature_dim(self) -> int:
        """Length of an embedding."""
        pooled = isinstance(self._forward, PooledEncoder)
        return self._forward.pooled_dim if pooled else self.encoder.embed_dim  # type: ignore[union-attr]

    def __call__(self, pixels: np.ndarray | Tensor) -> Encoded:
        """Encode patches.

        Args:
            pixels: (B, input_px, input_px, 3) uint8 RGB.

        Returns:
            Their embeddings.

        Raises:
            torch.OutOfMemoryError: Not even one patch fits.
        """
        parts: list[Encoded] = []
        start = 0
        while start < len(pixels):
            chunk = pixels[start : start + self.batch_size]
            try:
                parts.append(self._encode_at_once(chunk))
            except (RuntimeError, MemoryError) as error:
                if not memory_ran_out(error):
                    raise
                if len(chunk) == 1:
                    raise torch.OutOfMemoryError(str(error)) from error
                self.batch_size = max(1, len(chunk) // 2)
                logger.warning(
                    "%s: memory ran out; going on with batches of %d.",
                    self.encoder.name,
                    self.batch_size,
                )
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            start += len(chunk)
        tokens = [part.tokens for part in parts if part.tokens is not None]
        return Encoded(
            np.concatenate([part.features for part in parts]),
            np.concatenate(tokens) if tokens else None,
        )

    def _encode_at_once(self, pixels: np.ndarray | Tensor) -> Encoded:
        images = torch.as_tensor(pixels).to(self._forward.device)
        output = self._forward(images.permute(0, 3, 1, 2)).cpu().numpy()  # (B, D [+ 16 * C])
        if not (isinstance(self._forward, PooledEncoder) and self._forward.tokens):
            return Encoded(output, None)
        features, tokens = np.split(output, [self._forward.pooled_dim], axis=1)
        return Encoded(features, tokens.reshape(len(pixels), CELLS, -1))


def memory_ran_out(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on whatever device.

    Only CUDA's own allocator raises a type of its own; a CPU's, cuBLAS and cuDNN raise
    RuntimeErrors that say it in words.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in OUT_OF_MEMORY)


def own_pooling(encoder: Encoder) -> str:
    """What an encoder's own embedding is, as bags record it."""
    if encoder.card.pooling == "pooler":  # XMAG: class token; XMAG-lite: global average
        return "mean" if _is_lite(encoder) else "cls"
    return OWN_POOLING[encoder.card.pooling]


def _is_lite(encoder: Encoder) -> bool:
    return getattr(getattr(encoder.model, "config", None), "model_type", "") == "xmag_lite"


def _cells(patches: Tensor, name: str) -> Tensor:
    """Patch tokens (B, N, C) -> (B, 16, C) on the 4 x 4 grid, as `Encoder.spatial_features`."""
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1] or side < GRID:
        raise EmbedError(
            f"{name}: {patches.shape[1]} patch tokens are no square map of at least {GRID} x "
            f"{GRID}, so no local features (--tokens)."
        )
    maps = patches.transpose(1, 2).unflatten(2, (side, side))  # (B, C, n, n)
    return F.adaptive_avg_pool2d(maps, GRID).flatten(2).transpose(1, 2)
