"""Windows to patches on the encoder's device: Lanczos-3 as two small matrix products.

On a CPU Pillow does it (`xmag_hf.slides.windows.resample_windows`): it sums only over the kernel's
reach, which beats dense products there. On a GPU the windows travel as bytes and the products cost
a hundredth of what the encoder does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xmag_hf.slides.reader import LANCZOS_SUPPORT
from xmag_hf.slides.windows import AxisWindow, resample_windows

from .encode import memory_ran_out

Place = tuple[AxisWindow, AxisWindow]  # columns and rows
# Places between px whose weights are kept. Levels reduced by a whole number have a few; the others
# one for each column and row of the grid, at up to 1 MB.
MOST_WEIGHTS = 256


class Resampler:
    """Resample the windows of a slide; for all its threads.

    Args:
        device: Of the encoder.
        n_px: Side of a patch.
    """

    def __init__(self, device: torch.device, n_px: int):
        self.device, self.n_px = device, n_px
        # On its own stream, so that copies and products run beside the encoder.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._weights: dict[tuple[float, float, int, int, int], Tensor] = {}

    def buffer(self, most: int, shape: tuple[int, int, int]) -> np.ndarray:
        """Memory for the windows of one call.

        Args:
            most: Windows that are wanted at once.
            shape: Of a window.

        Returns:
            (B, *shape) uint8: on a CPU one window, resampled while it is in the cache; for a GPU
            `most`, where it can fetch them by itself.
        """
        if self._stream is None:
            return np.empty((1, *shape), np.uint8)
        return torch.empty((most, *shape), dtype=torch.uint8, pin_memory=True).numpy()

    def __call__(self, windows: np.ndarray, places: Sequence[Place]) -> np.ndarray | Tensor:
        """Patches of windows; when it returns, the windows may be overwritten.

        Args:
            windows: (B, H, W, 3) uint8.
            places: Of each window.

        Returns:
            (B, n_px, n_px, 3) uint8: an array on a CPU, else a tensor on the device, or an array
            where the device's memory ran out.
        """
        if self._stream is None:
            return self._on_cpu(windows, places)
        return self._on_device(windows, places, self._stream)

    def _on_cpu(self, windows: np.ndarray, places: Sequence[Place]) -> np.ndarray:
        across, down = [x for x, _ in places], [y for _, y in places]
        return resample_windows(windows, across, down, self.n_px)

    def _on_device(
        self, windows: np.ndarray, places: Sequence[Place], stream: Any
    ) -> np.ndarray | Tensor:
        """In halves, and at last on the CPU, while the encoder leaves no memory."""
        try:
            return self._at_once(windows, places, stream)
        except RuntimeError as error:
            if not memory_ran_out(error):
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(windows) < 2:
            return self._on_cpu(windows, places)
        half = len(windows) // 2
        parts = (windows[:half], places[:half]), (windows[half:], places[half:])
        return concatenated([self._on_device(*part, stream) for part in parts])

    def _at_once(self, windows: np.ndarray, places: Sequence[Place], stream: Any) -> Tensor:
        with torch.cuda.stream(stream):
            moved = torch.from_numpy(windows).to(self.device, non_blocking=True)
            patches = self.products(moved, places)
        stream.synchronize()
        # The encoder reads it on another stream: its memory is not to be used again before that.
        patches.record_stream(torch.cuda.default_stream(self.device))
        return patches

    def products(self, windows: Tensor, places: Sequence[Place]) -> Tensor:
        """Columns, then rows, rounded and clipped to bytes after each as Pillow does.

        Args:
            windows: (B, H, W, 3) uint8 on the device.
            places: Of each window.

        Returns:
            (B, n_px, n_px, 3) uint8.
        """
        if not len(places):
            return torch.empty((0, self.n_px, self.n_px, 3), dtype=torch.uint8, device=self.device)
        columns = torch.stack([self._weight(x) for x, _ in places])  # (B, n, W)
        rows = torch.stack([self._weight(y) for _, y in places])  # (B, n, H)
        values = windows.permute(0, 3, 1, 2).float()  # (B, 3, H, W)
        values = _bytes(values @ columns.transpose(1, 2)[:, None])  # (B, 3, H, n)
        values = _bytes(rows[:, None] @ values)  # (B, 3, n, n)
        return values.to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def _weight(self, axis: AxisWindow) -> Tensor:
        """Of a place between two px."""
        key = (axis.first, axis.last, axis.low, axis.high, axis.side)
        weight = self._weights.get(key)
        if weight is None:
            if len(self._weights) >= MOST_WEIGHTS:
                self._weights.clear()
            values = torch.from_numpy(lanczos_weights(axis, self.n_px))
            weight = self._weights[key] = values.to(self.device)
        return weight


def concatenated(parts: Sequence[np.ndarray | Tensor]) -> np.ndarray | Tensor:
    """Patches one behind the other: on the device if all lie there and it has room, else here."""
    on_device = [part for part in parts if isinstance(part, Tensor)]
    if on_device and len(on_device) == len(parts):
        try:
            return torch.cat(on_device)
        except RuntimeError as error:
            if not memory_ran_out(error):
                raise
    return np.concatenate([p.cpu().numpy() if isinstance(p, Tensor) else p for p in parts])


def selected(pixels: np.ndarray | Tensor, which: np.ndarray) -> np.ndarray | Tensor:
    """Some of the patches, (B,) bool: where they lie if there is room for them, else here."""
    if isinstance(pixels, Tensor):
        try:
            return pixels[torch.from_numpy(which)]
        except RuntimeError as error:
            if not memory_ran_out(error):
                raise
            pixels = pixels.cpu().numpy()
    return pixels[which]


def lanczos_weights(axis: AxisWindow, n_px: int) -> np.ndarray:
    """The contract's kernel for one axis of a window.

    sinc(t) sinc(t/3) for |t| < 3, t the distance in px over max(1, px per px of the result), scaled
    to sum 1 over what the kernel may see; Pillow's rule for which px those are.

    Args:
        axis: Of the window.
        n_px: Side of the result.

    Returns:
        (n_px, side) float32.
    """
    step = (axis.last - axis.first) / n_px
    stretch = max(1.0, step)
    centres = (axis.first + (np.arange(n_px) + 0.5) * step)[:, None]
    px = np.arange(axis.side) + 0.5
    t = (px - centres) / stretch
    reach = LANCZOS_SUPPORT * stretch
    seen = (px > np.floor(centres - reach + 0.5)) & (px < np.floor(centres + reach + 0.5))
    seen &= (px > axis.low) & (px < axis.high) & (np.abs(t) < LANCZOS_SUPPORT)
    weights = np.where(seen, np.sinc(t) * np.sinc(t / LANCZOS_SUPPORT), 0.0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _bytes(values: Tensor) -> Tensor:
    """Rounded half up and clipped to 0 to 255, still float."""
    return values.add(0.5).floor_().clamp_(0, 255)
