"""Image processor of XMAG: RGB uint8 -> normalised pixel_values. Nothing is silently stretched.

Works without torchvision. Travels to the Hub with the weights: imports numpy, PIL, torch,
transformers and nothing of ours.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# An image coarser than the target by more than this is refused: its detail would be invented.
MAX_ENLARGEMENT = 1.1


class XMAGImageProcessor(BaseImageProcessor):
    """Makes pixel_values (B, 3, 224, 224), float32, from images.

    An image of 224 x 224 px is taken as it is: /255, minus mean, over std. Any other size needs
    `mpp=` (its scale in um/px: it is resampled to 2.0 um/px by PIL's Lanczos and the centre
    cropped) or `do_resize=True` (it is stretched to 224 x 224 px, whatever its scale).

    Args:
        size: {"height": 224, "width": 224}, or the side in px.
        image_mean: Per channel, of values in 0..1. ImageNet's by default.
        image_std: Per channel, of values in 0..1. ImageNet's by default.
        target_mpp: Scale that `mpp=` resamples to, um/px.
        do_resize: Stretch images of another size. Off: they are refused.
        do_rescale: Divide by 255 (times rescale_factor).
        rescale_factor: 1/255.
        do_normalize: Subtract mean, divide by std.
        **kwargs: Kept as attributes, as transformers' processors do.

    Raises:
        ValueError: mean and std that are not three numbers, or sizes and scales not above 0.
    """

    model_input_names = ["pixel_values"]
    _auto_class = "AutoImageProcessor"

    def __init__(
        self,
        size: dict[str, int] | int = 224,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        target_mpp: float = 2.0,
        do_resize: bool = False,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.size = {"height": size, "width": size} if isinstance(size, int) else dict(size)
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.target_mpp = target_mpp
        self.do_resize = do_resize
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            raise ValueError(
                f"XMAGImageProcessor: image_mean={self.image_mean} and image_std={self.image_std} "
                "must be three numbers each, image_std above 0."
            )
        if min(*self.size.values(), target_mpp) <= 0 or set(self.size) != {"height", "width"}:
            raise ValueError(
                f"XMAGImageProcessor: size={self.size} needs height and width above 0 px, "
                f"target_mpp={target_mpp} must be above 0 um/px."
            )

    def preprocess(
        self,
        images: Any,
        mpp: float | Sequence[float] | None = None,
        do_resize: bool | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare one image or several.

        Args:
            images: PIL image, path or URL, NumPy uint8 (H, W, 3), (H, W, 4), (H, W, 1) or (H, W),
                torch uint8 (3, H, W), (4, H, W), (1, H, W) or (H, W, 3), a 4-D batch of these, or a
                list. Transparency is composited on white, grey becomes RGB. Channels come first in
                torch only: in NumPy three grey images would look like one RGB image.
            mpp: Scale of the images in um/px, one number or one per image. Resampled to
                target_mpp with the Lanczos-3 kernel stretched by the factor (PIL, reducing_gap
                None), fractional factors included, around the centre.
            do_resize: Stretch to 224 x 224 px without regard to scale (Lanczos). Default: as the
                processor was made, which is no.
            return_tensors: "pt", "np", or None for a list of arrays.
            **kwargs: None is known; they are refused by name.

        Returns:
            BatchFeature with pixel_values (B, 3, 224, 224), float32.

        Raises:
            ValueError: An image of another size without mpp or do_resize, one that covers less
                than 224 px at the target scale or is coarser than 1.1 times it, float values,
                an unknown option.
        """
        if kwargs:
            raise ValueError(f"XMAGImageProcessor: unknown options {sorted(kwargs)}.")
        if mpp is not None and do_resize:
            raise ValueError("XMAGImageProcessor: mpp= and do_resize=True exclude each other.")
        stretch = mpp is None and (self.do_resize if do_resize is None else do_resize)
        pictures = [to_rgb(image) for image in flatten_images(images)]
        if not pictures:
            raise ValueError("XMAGImageProcessor: no image was given.")
        single = mpp is None or np.ndim(mpp) == 0
        scales: list[Any] = [mpp] * len(pictures) if single else list(mpp)  # type: ignore[arg-type]
        if len(scales) != len(pictures):
            raise ValueError(
                f"XMAGImageProcessor: {len(scales)} values of mpp for {len(pictures)} images. "
                "Give one number, or one per image."
            )
        arrays = [
            self._to_pixels(self._fit(picture, scale, stretch))
            for picture, scale in zip(pictures, scales, strict=True)
        ]
        pixels = np.stack(arrays) if return_tensors else arrays
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def _fit(self, picture: Image.Image, mpp: float | None, stretch: bool) -> Image.Image:
        target = (self.size["width"], self.size["height"])
        if mpp is not None:
            return resample_centre(picture, mpp, self.target_mpp, target)
        if picture.size == target:
            return picture
        if stretch:
            return picture.resize(target, Image.Resampling.LANCZOS, reducing_gap=None)
        raise ValueError(
            f"XMAGImageProcessor: the image is {picture.width} x {picture.height} px, but the "
            f"encoder reads {target[0]} x {target[1]} px at {self.target_mpp:g} um/px. Pass mpp= "
            "(the image's um/px) to resample it to scale, or do_resize=True to stretch it."
        )

    def _to_pixels(self, picture: Image.Image) -> np.ndarray:
        pixels = np.asarray(picture, dtype=np.float32).transpose(2, 0, 1)  # (3, H, W)
        if self.do_rescale:
            pixels = pixels * np.float32(self.rescale_factor)
        if self.do_normalize:
            mean = np.asarray(self.image_mean, dtype=np.float32)[:, None, None]
            std = np.asarray(self.image_std, dtype=np.float32)[:, None, None]
            pixels = (pixels - mean) / std
        return np.ascontiguousarray(pixels)


def resample_centre(
    picture: Image.Image, mpp: float, target_mpp: float, target_px: tuple[int, int]
) -> Image.Image:
    """The centre of an image at another scale: resampling contract of this project.

    Args:
        picture: RGB.
        mpp: Its scale, um/px.
        target_mpp: Wanted scale, um/px.
        target_px: (width, height) of the result.

    Returns:
        target_px of the centre at target_mpp; at equal scales a plain crop.

    Raises:
        ValueError: Not a scale, coarser than the target by more than 10 %, or too small.
    """
    if not (math.isfinite(mpp) and mpp > 0):
        raise ValueError(f"XMAGImageProcessor: mpp={mpp} must be a number above 0, in um/px.")
    if mpp > target_mpp * MAX_ENLARGEMENT:
        raise ValueError(
            f"XMAGImageProcessor: mpp={mpp:g} um/px is more than 10 % coarser than "
            f"{target_mpp:g} um/px. Read the region from a finer level."
        )
    factor = target_mpp / mpp
    # A hair of tolerance, so that rounding does not refuse an image that fits exactly.
    sides = [min(n * factor, have) for n, have in zip(target_px, picture.size, strict=True)]
    if any(side < n * factor * (1 - 1e-6) for side, n in zip(sides, target_px, strict=True)):
        needed = [math.ceil(n * factor - 1e-6) for n in target_px]
        raise ValueError(
            f"XMAGImageProcessor: {picture.width} x {picture.height} px at {mpp:g} um/px is less "
            f"than {target_px[0]} x {target_px[1]} px at {target_mpp:g} um/px. Read at least "
            f"{needed[0]} x {needed[1]} px, or pad with white."
        )
    left, top = ((have - side) / 2 for side, have in zip(sides, picture.size, strict=True))
    if factor == 1.0:
        return picture.crop(
            (int(left), int(top), int(left) + target_px[0], int(top) + target_px[1])
        )
    # The kernel reads beyond the box where the image goes on: borders see real neighbours.
    box = (left, top, left + sides[0], top + sides[1])
    return picture.resize(target_px, Image.Resampling.LANCZOS, box=box, reducing_gap=None)


def flatten_images(images: Any) -> list[Any]:
    """One image, a batch or a (nested) list of them as a flat list."""
    if isinstance(images, list | tuple):
        return [single for image in images for single in flatten_images(image)]
    if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4:
        return list(images)
    return [images]


def to_rgb(image: Any) -> Image.Image:
    """Any accepted image as PIL RGB, transparency composited on white.

    Raises:
        ValueError: Not an image, not uint8, or more than 8 bits a channel.
    """
    if isinstance(image, str | os.PathLike):
        from transformers.image_utils import load_image  # pipelines pass paths and URLs

        image = load_image(os.fspath(image))
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().numpy()
        if image.ndim == 3 and image.shape[0] in (1, 3, 4):
            image = image.transpose(1, 2, 0)
    if isinstance(image, np.ndarray):
        image = _array_to_picture(image)
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"XMAGImageProcessor: {type(image).__name__} is no image. Pass PIL, NumPy uint8 "
            "(H, W, 3), torch uint8 (3, H, W), or a list of these."
        )
    if image.mode[0] in "IF":
        raise ValueError(
            f"XMAGImageProcessor: mode {image.mode!r} has more than 8 bits a channel. Scale it to "
            "8-bit RGB first."
        )
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _array_to_picture(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8:
        raise ValueError(
            f"XMAGImageProcessor: dtype {array.dtype}, but images are uint8, 0 to 255. For floats "
            "in 0..1: (image * 255).round() as uint8."
        )
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ValueError(
            f"XMAGImageProcessor: shape {array.shape} is no image. Expected (H, W, 3), (H, W, 4) "
            f"or (H, W). Several grey images: pass a list, or shape {(*array.shape, 1)}. Channels "
            "first: pass array.transpose(1, 2, 0), or a torch tensor."
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array))
