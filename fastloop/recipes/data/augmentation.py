# SPDX-License-Identifier: Apache-2.0
"""Augmentation of images that grows with the training, on torchvision's transforms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastloop.extras import need
from fastloop.loop.seeded import SeededDataset
from fastloop.recipes.data.samples import as_dataset, with_index
from fastloop.recipes.sampling import generator_of

STAGES = ("none", "weak", "medium", "strong")
IMAGES = ("image", "images", "pixel_values", "input", "x")  # keys of the image, in samples that are dicts


def augmentation(
    stage: str = "weak", size: int = 32, *, flip: bool = True, padding: int = 4
) -> Callable[[Any], Tensor]:
    """A transform of one image: float32 in [0, 1] for uint8, [channels, size, size].

    - "none": the middle, nothing random; for validation and test.
    - "weak": a part of the image padded by `padding`, and a flip left to right.
    - "medium": also brightness, contrast and saturation by up to 20 %.
    - "strong": those by up to 40 %, hue by 0.1, a rotation by up to 15 degrees with a shift by up to 10 % in one
      resampling, and in half of the images a rectangle erased.

    Args:
        size: height and width of the result; an image may not be smaller than size - 2*padding.
        flip: False where left and right mean something, as for digits and text.
        padding: zeros on each side before the crop.

    Images are PIL's (those with a palette, CMYK or transparency become RGB), uint8 or float tensors [channels, height,
    width], or arrays [height, width, channels], of 1 or 3 channels. Draws are of torch's random state.

    Raises:
        ValueError: an unknown stage, or sizes out of range. The transform raises it for an image of other integers than
            uint8, and from "medium" on for one outside of [0, 1]: brightness, contrast and saturation are of colours,
            so normalize afterwards.
        MissingExtra: torchvision cannot be imported.
    """
    if stage not in STAGES:
        raise ValueError(f"[augmentation] stage must be one of {', '.join(STAGES)}, got {stage!r}")
    for name, value, least in (("size", size, 1), ("padding", padding, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"[augmentation] {name} must be an integer of at least {least}, got {value!r}")
    v2 = need("torchvision.transforms.v2", "vision", "augmentation")
    to_tensor = [_in_colours, v2.ToImage(), _of_known_range, v2.ToDtype(torch.float32, scale=True)]
    if stage == "none":
        return _composed(v2, [*to_tensor, v2.CenterCrop(size)])
    steps = [*to_tensor, v2.RandomCrop(size, padding=padding or None)]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    if stage in ("medium", "strong"):
        steps.append(_in_unit_range)
    if stage == "medium":
        steps.append(v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2))
    elif stage == "strong":
        steps += [
            v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
            v2.RandomAffine(degrees=15, translate=(0.1, 0.1), interpolation=v2.InterpolationMode.BILINEAR),
            v2.RandomErasing(p=0.5),
        ]
    return _composed(v2, steps)


def _in_colours(image: Any) -> Any:
    """PIL's images as colours; torchvision takes the numbers of a palette's entries for grey values."""
    mode = getattr(image, "mode", None)
    return image.convert("RGB") if mode in ("P", "PA", "RGBA", "LA", "CMYK") else image


def _of_known_range(image: Tensor) -> Tensor:
    """The image as it is; torchvision divides int64 by 2**63 without a word, which leaves nothing of pixels."""
    if not image.is_floating_point() and image.dtype not in (torch.uint8, torch.bool):
        raise ValueError(
            f"[augmentation] an image must be of uint8 or floating-point numbers, got {image.dtype}; convert it by "
            ".to(torch.uint8)"
        )
    return image


def _in_unit_range(image: Tensor) -> Tensor:
    """The image as it is; torchvision clamps colours to [0, 1] without a word, which ruins normalized ones."""
    low, high = image.aminmax()
    if low < 0 or high > 1:
        raise ValueError(
            f"[augmentation] colours must lie in [0, 1], got {float(low):.4g} to {float(high):.4g}; augment first and "
            "normalize afterwards, and divide pixels up to 255 by 255"
        )
    return image


def _composed(v2: Any, steps: list[Any]) -> Callable[[Any], Tensor]:
    composed: Callable[[Any], Tensor] = v2.Compose([*steps, v2.ToPureTensor()])
    return composed


class StagedAugmentation(SeededDataset):
    """`dataset` with its images augmented, more from one epoch on than before.

    Draws are a function of (seed, epoch, index): a resumed run repeats them exactly, without reading again what was
    consumed. `Loop` calls `set_epoch`. The data set itself is not changed, so that parts of it for validation, as those
    of `split`, stay as they are: give the train part only.

    Args:
        dataset: with an index, of images or of (image, target) or of dicts with an image under "image", "images",
            "pixel_values", "input" or "x".
        stages: {epoch: stage}, one of epoch 0; a stage is a name as of `augmentation`, or a transform of one's own.
        size, flip: as of `augmentation`.
        seed: of the draws.

    Raises:
        TypeError: no data set, or one without an index; a stage that is neither a name nor a transform.
        ValueError: stages without epoch 0, or unknown ones.
        MissingExtra: torchvision cannot be imported, and a stage is a name.
    """

    def __init__(
        self,
        dataset: Any,
        stages: Mapping[int, str | Callable[[Any], Any]],
        size: int = 32,
        *,
        flip: bool = True,
        seed: int = 0,
    ) -> None:
        generator_of(seed)
        super().__init__(with_index(as_dataset(dataset, "StagedAugmentation"), "StagedAugmentation"), seed)
        epochs = sorted(stages)
        if not epochs or epochs[0] != 0 or any(isinstance(e, bool) or not isinstance(e, int) for e in epochs):
            raise ValueError(
                f"[StagedAugmentation] stages must be by epoch, from epoch 0 on, got {epochs}; pass e.g. "
                '{0: "weak", 50: "medium"}'
            )
        self.stages = {epoch: stages[epoch] for epoch in epochs}
        for epoch, stage in self.stages.items():
            if not isinstance(stage, str) and not callable(stage):
                raise TypeError(
                    f"[StagedAugmentation] a stage must be one of {', '.join(STAGES)} or a transform, got {stage!r} "
                    f"for epoch {epoch}"
                )
        self._transforms = {
            epoch: augmentation(stage, size, flip=flip) if isinstance(stage, str) else stage
            for epoch, stage in self.stages.items()
        }

    @property
    def stage(self) -> str | Callable[[Any], Any]:
        """Of the present epoch."""
        return self.stages[self._begun()]

    def _begun(self) -> int:
        return max(epoch for epoch in self.stages if epoch <= self.epoch)

    def sample(self, index: Any) -> Any:
        """The sample with its image augmented."""
        return _with_image(self.dataset[index], self._transforms[self._begun()])


def _with_image(sample: Any, transform: Callable[[Any], Any]) -> Any:
    """The sample with its image transformed, its other parts as they are.

    Raises:
        ValueError: a dict without an image.
    """
    if isinstance(sample, Mapping):
        key = next((each for each in IMAGES if each in sample), None)
        if key is None:
            raise ValueError(
                f"[StagedAugmentation] a sample that is a dict must have its image under one of {', '.join(IMAGES)}, "
                f"got {', '.join(map(str, sample))}"
            )
        return {**sample, key: transform(sample[key])}
    if isinstance(sample, tuple) and hasattr(sample, "_fields"):
        return type(sample)(transform(sample[0]), *sample[1:])
    if isinstance(sample, (list, tuple)):
        return type(sample)([transform(sample[0]), *sample[1:]])
    return transform(sample)


def image_of(sample: Any) -> Any:
    """The image of a sample."""
    found: list[Any] = []
    _with_image(sample, lambda image: found.append(image))
    return found[0]
