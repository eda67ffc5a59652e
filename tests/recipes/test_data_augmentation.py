# SPDX-License-Identifier: Apache-2.0
"""Augmentation by stages: what each stage does to an image, draws that resume exactly, and their picture."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from vision import vision

import fastloop
from fastloop.loop import Loop
from fastloop.recipes.data import StagedAugmentation, augmentation, augmentation_grid, labels_of, split

STAGES = ["none", "weak", "medium", "strong"]


@pytest.fixture(autouse=True)
def torchvision(one_thread: None) -> None:
    vision()


def picture(size: int = 16) -> Tensor:
    return torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def pictures(n: int = 24) -> TensorDataset:
    x = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, torch.arange(n) % 3)


def staged(**options: Any) -> StagedAugmentation:
    return StagedAugmentation(pictures(), {0: "weak", 2: "strong"}, 8, **options)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_takes_every_form_of_an_image(stage: str) -> None:
    image = pytest.importorskip("PIL.Image")
    x = picture()
    array = x.movedim(0, -1).numpy()
    colours = [x, x / 255, x.double() / 255, (x / 255).half(), array, image.fromarray(array)]
    colours += [image.fromarray(array).convert(mode) for mode in ("P", "RGBA", "CMYK")]
    grey = [x[:1], x[0], array[..., 0], image.fromarray(array[..., 0])]
    for forms, channels in ((colours, 3), (grey, 1)):
        for form in forms:
            made = augmentation(stage, 12)(form)
            assert (type(made), made.dtype, made.shape) == (Tensor, torch.float32, (channels, 12, 12))
            assert 0 <= float(made.min()) < float(made.max()) <= 1


def test_none_changes_nothing_and_the_others_draw_anew() -> None:
    x = picture()
    torch.testing.assert_close(augmentation("none", 16)(x), x / 255, rtol=2**-23, atol=0)
    torch.testing.assert_close(augmentation("none", 8)(x), x[:, 4:12, 4:12] / 255, rtol=2**-23, atol=0)
    for stage in STAGES[1:]:
        transform = augmentation(stage, 16)
        draws = [transform(x) for _ in range(8)]
        assert len({draw.numpy().tobytes() for draw in draws}) > 5, stage


def test_a_palette_is_of_colours_and_not_of_grey_values() -> None:
    image = pytest.importorskip("PIL.Image")
    red = image.new("RGB", (4, 4), (255, 0, 0)).convert("P", palette=image.Palette.ADAPTIVE)
    assert augmentation("none", 4)(red).mean(dim=(1, 2)).tolist() == [1, 0, 0]


def test_no_flip_where_left_and_right_mean_something() -> None:
    """Without padding a weak augmentation of the same size is the flip alone."""
    x = picture()
    for flip, count in ((True, 2), (False, 1)):
        transform = augmentation("weak", 16, flip=flip, padding=0)
        assert len({transform(x).numpy().tobytes() for _ in range(20)}) == count


def test_what_torchvision_would_spoil_without_a_word_is_refused() -> None:
    x = picture()
    normalized = x / 255 * 4 - 2
    assert augmentation("weak", 16)(normalized).min() < -1
    for stage in ("medium", "strong"):
        with pytest.raises(ValueError, match=r"colours must lie in \[0, 1\], got -2 to 2; augment first"):
            augmentation(stage, 16)(normalized)
    with pytest.raises(ValueError, match=r"of uint8 or floating-point numbers, got torch\.int64"):
        augmentation("none", 16)(x.long())


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match="stage must be one of none, weak, medium, strong, got 'hard'"):
        augmentation("hard")
    with pytest.raises(ValueError, match="size must be an integer of at least 1"):
        augmentation(size=0)
    with pytest.raises(ValueError, match="padding must be an integer of at least 0"):
        augmentation(padding=-1)
    for stages in ({}, {1: "weak"}, {-1: "weak", 0: "weak"}, "weak"):
        with pytest.raises(ValueError, match="stages must be by epoch, from epoch 0 on"):
            StagedAugmentation(pictures(), stages)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be one of none, weak, medium, strong or a transform, got None for"):
        StagedAugmentation(pictures(), {0: None})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"pass loader\.dataset"):
        StagedAugmentation(DataLoader(pictures()), {0: "weak"})


def test_the_stage_is_that_of_the_epoch() -> None:
    data = StagedAugmentation(pictures(), {0: "none", 2: lambda image: image * 0}, 8)
    stages = []
    for epoch in range(4):
        data.set_epoch(epoch)
        stages.append("changed" if float(data[3][0].max()) == 0 else data.stage)
    assert stages == ["none", "none", "changed", "changed"]
    assert torch.equal(data.dataset[3][0], pictures()[3][0])
    assert torch.equal(labels_of(data), pictures().tensors[1])


def test_draws_are_a_function_of_seed_epoch_and_index() -> None:
    data, other = staged(), staged(seed=1)
    state = torch.get_rng_state()
    first = data[5][0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert torch.equal(data[5][0], first)
    whole = [torch.cat([x for x, _ in DataLoader(data, 8, num_workers=workers)]) for workers in (0, 1)]
    assert torch.equal(*whole)
    assert not torch.equal(torch.stack([data[i][0] for i in range(24)]), torch.stack([other[i][0] for i in range(24)]))


def test_validation_of_the_same_data_is_not_augmented() -> None:
    parts = split(pictures(), (0.5, 0.5))
    train = StagedAugmentation(parts.train, {0: "strong"}, 8)
    assert not all(torch.equal(train[i][0], parts.train[i][0]) for i in range(len(train)))
    for place, index in enumerate(parts.validation.indices):
        assert torch.equal(parts.validation[place][0], pictures()[index][0])


def test_samples_of_every_form() -> None:
    image, double = torch.ones(3, 4, 4), {0: lambda image: image * 2}
    pair = namedtuple("pair", ["image", "label"])
    forms = [image, (image, 1), [image, 1], pair(image, 1), {"pixel_values": image, "label": 1}]
    made = [StagedAugmentation([form], double)[0] for form in forms]
    assert [type(each) for each in made] == [type(form) for form in forms]
    assert float(made[3].image.max()) == float(made[4]["pixel_values"].max()) == 2
    assert (made[1][1], made[4]["label"]) == (1, 1)
    with pytest.raises(ValueError, match="image under one of image, images, pixel_values, input, x, got a"):
        StagedAugmentation([{"a": image}], double)[0]


def run(folder: Path, steps: int) -> list[Tensor]:
    torch.manual_seed(0)
    model, seen = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    loop = Loop(model, fastloop.AdamW(model.parameters()), nn.CrossEntropyLoss(), run_dir=folder, save_every_steps=5,
                progress=False, loggers=(), curves=False)  # fmt: skip
    loop.fit(DataLoader(staged(), 6, shuffle=True), max_steps=steps)
    return seen


def test_a_run_resumes_exactly_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """The tenth step is in the middle of the third epoch, whose stage is another."""
    whole = run(tmp_path / "whole", 12)
    parts = [*run(tmp_path / "parts", 10), *run(tmp_path / "parts", 12)]
    assert len(whole) == len(parts) == 12
    assert all(map(torch.equal, whole, parts))


# ---- the picture


def test_originals_and_draws_are_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from fastloop.recipes.data import grid

    shown: list[tuple[Any, str]] = []
    show = grid.show

    def spy(axes: Any, image: Any, title: str = "") -> None:
        shown.append((image, title))
        show(axes, image, title)

    monkeypatch.setattr(grid, "show", spy)
    data = staged()
    state = torch.get_rng_state()
    for given, base in ((data, list(range(24))), (Subset(data, [3, 5, 7]), [3, 5, 7])):
        shown.clear()
        path = augmentation_grid(given, tmp_path / "grid.png", samples=2, draws=3)
        assert path.stat().st_size > 3000
        titles = [title for _, title in shown]
        assert titles[1:4] == ["draw 0", "draw 1", "draw 2"]
        assert titles[5:] == ["", "", ""]
        for row in (shown[:4], shown[4:]):
            index = base[int(row[0][1].removeprefix("sample "))]
            assert torch.equal(row[0][0], pictures()[index][0])
            assert len({numpy.asarray(image).tobytes() for image, _ in row}) > 2
    assert torch.equal(torch.get_rng_state(), state)
    assert data.seed == 0


def test_what_has_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="TensorDataset has neither a transform nor stages"):
        augmentation_grid(pictures(), tmp_path / "a.png")
    with pytest.raises(ValueError, match="draws must be an integer of at least 1"):
        augmentation_grid(staged(), tmp_path / "a.png", draws=0)
    with pytest.raises(ValueError, match=r"an image must be \[channels, height, width\] of 1 or 3 channels, got \[4\]"):
        augmentation_grid(StagedAugmentation([(torch.rand(4), 0)], {0: lambda x: x}), tmp_path / "a.png")
