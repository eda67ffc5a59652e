# SPDX-License-Identifier: Apache-2.0
"""run.json: what it says of a run, over resumes, errors and damage; pictures of a run and what they become."""

from __future__ import annotations

import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    ChainDataset,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from fastloop import AdamW, Loop
from fastloop.extras import MissingExtra
from fastloop.loop import description, images, loader_description
from fastloop.loop.files import replace_file
from fastloop.loop.plain import plain

SAMPLES = TensorDataset(torch.arange(32.0).reshape(16, 2), torch.arange(16) % 2)


def made(run_dir: Path | None, **options: Any) -> Loop:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    optimizer = AdamW(
        [{"params": model[0].parameters(), "lr": 1e-3}, {"params": model[2].parameters()}], lr=1e-2, weight_decay=0.1
    )
    settings: dict[str, Any] = {"curves": False, "log_every": 1, **options}
    return Loop(model, optimizer, torch.nn.CrossEntropyLoss(label_smoothing=0.1), run_dir=run_dir, **settings)


def loader(shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(SAMPLES, batch_size=4, shuffle=shuffle)


def starts(run_dir: Path) -> list[dict[str, Any]]:
    content = json.loads((run_dir / "run.json").read_text(), parse_constant=lambda text: pytest.fail(text))
    assert (content["format"], content["version"]) == ("fastloop-run", 1)
    return content["starts"]


# ---- what is said


def test_what_a_start_says(tmp_path: Path) -> None:
    loop = made(
        tmp_path, schedule={"name": "warmup_cosine", "warmup_steps": 2}, config={"width": 4, "path": tmp_path}, seed=3,
        max_grad_norm=1.0, callbacks=[Counter()], monitor=["val/loss", "val/accuracy"], mode=["min", "max"],
    )  # fmt: skip
    loop.fit(loader(), loader(False), epochs=2)
    (start,) = starts(tmp_path)
    assert (start["by"], start["step"], start["epochs"], start["max_steps"], start["total_steps"]) == (
        "fit", 0, 2, None, 8,
    )  # fmt: skip
    options = start["options"]
    assert options["schedule"] == start["schedule"] == {"name": "warmup_cosine", "warmup_steps": 2}
    assert (options["seed"], options["max_grad_norm"], options["patience"]) == (3, 1.0, None)
    assert options["callbacks"] == [f"{__name__}.Counter"]
    assert not {"model", "optimizer", "loss_fn", "self", "config"} & set(options)
    assert start["monitors"] == {"val/loss": "min", "val/accuracy": "max"}
    assert start["loggers"] == ["jsonl", "csv"]
    assert start["model"] == {
        "class": "torch.nn.modules.container.Sequential", "parameters": 22, "trainable": 22, "bytes": 88,
        "layers": {"Linear": 2, "ReLU": 1},
    }  # fmt: skip
    assert start["loss"]["class"].endswith(".CrossEntropyLoss")
    assert (start["loss"]["label_smoothing"], start["loss"]["weighted"]) == (0.1, False)
    first, second = start["optimizer"]["groups"]
    assert start["optimizer"]["class"] == "fastloop.optim.adamw.AdamW"
    assert (first["initial_lr"], second["initial_lr"], second["weight_decay"]) == (1e-3, 1e-2, 0.1)
    assert (first["betas"], first["parameters"], second["parameters"]) == ([0.9, 0.999], 12, 10)
    train, val = start["train_loader"], start["val_loader"]
    assert (train["batch_size"], train["shuffle"], train["num_workers"], train["batches"]) == (4, True, 0, 4)
    assert (val["shuffle"], val["pin_memory"], val["dataset"]["length"]) == (False, False, 16)
    assert start["config"] == {"width": 4, "path": str(tmp_path)}
    assert start["versions"]["torch"] == torch.__version__
    ended = start["end"]
    assert (ended["step"], ended["epoch"], ended["reason"]) == (8, 2, "end")
    assert 0.0 <= ended["seconds"] < 60.0
    assert ended["best"]["val/loss"] == min(value for _, value in loop.history["val/loss"])


class Counter:
    def on_window(self, loop: Any, record: Any) -> None:
        pass


def test_a_loop_of_ones_own_and_one_that_is_broken_off(tmp_path: Path) -> None:
    loop = made(tmp_path)
    for window in loop.windows(loader(), epochs=1):
        for x, y in window:
            loop.backward(torch.nn.functional.cross_entropy(loop.model(x), y))
        loop.step()
        if loop.global_step == 2:
            break
    (start,) = starts(tmp_path)
    assert (start["by"], start["val_loader"]) == ("windows", None)
    assert (start["end"]["step"], start["end"]["reason"]) == (2, "left")


def test_starts_are_kept_over_resumes_and_a_new_run_begins_anew(tmp_path: Path) -> None:
    made(tmp_path).fit(loader(), epochs=1)
    made(tmp_path).fit(loader(), epochs=2)
    first, second = starts(tmp_path)
    assert (first["step"], second["step"], second["epoch"]) == (0, 4, 1)
    assert (first["end"]["step"], second["end"]["step"]) == (4, 8)
    made(tmp_path, resume=False).fit(loader(), epochs=1)
    assert len(starts(tmp_path)) == 1
    assert len(json.loads((tmp_path / "run.json.old").read_text())["starts"]) == 2


def test_an_error_is_the_end(tmp_path: Path) -> None:
    class Broken:
        def on_window(self, loop: Any, record: Any) -> None:
            if record.step == 3:
                raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        made(tmp_path, callbacks=[Broken()]).fit(loader(), epochs=1)
    assert starts(tmp_path)[0]["end"]["reason"] == "RuntimeError"


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made(None).fit(loader(), max_steps=1)
    assert list(tmp_path.iterdir()) == []


def test_a_run_inside_of_an_except_block_did_not_fail(tmp_path: Path) -> None:
    try:
        raise ImportError("of the user's own")
    except ImportError:
        made(tmp_path).fit(loader(), max_steps=2)
    assert starts(tmp_path)[0]["end"]["reason"] == "end"


def test_an_error_before_the_start_is_no_end_of_a_killed_run(tmp_path: Path) -> None:
    made(tmp_path).fit(loader(), max_steps=2)
    killed = starts(tmp_path)
    del killed[0]["end"]
    (tmp_path / "run.json").write_text(json.dumps({"format": "fastloop-run", "version": 1, "starts": killed}))
    with pytest.raises(KeyError), made(tmp_path):
        raise KeyError
    assert "end" not in starts(tmp_path)[0]


def test_a_fit_for_every_window_keeps_the_file_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(description, "MOST_STARTS", 4)
    loop, data = made(tmp_path, loggers=(), save_every_epochs=None), loader()
    for step in range(1, 10):
        loop.fit(data, max_steps=step)
    kept = starts(tmp_path)
    assert [start["step"] for start in kept] == [0, 6, 7, 8]
    assert kept[-1]["end"]["step"] == 9
    assert kept[0]["left_out"]["starts"] == 5
    assert kept[0]["left_out"]["seconds"] > 0


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "fastloop-run", "version": 1, "starts": [3]}', "\xff"])
def test_a_damaged_file_is_set_aside(tmp_path: Path, content: str) -> None:
    made(tmp_path).fit(loader(), epochs=1)
    (tmp_path / "run.json").write_text(content, encoding="latin-1")
    assert description.read(tmp_path / "run.json") == []
    made(tmp_path).fit(loader(), epochs=2)
    assert [start["step"] for start in starts(tmp_path)] == [4]
    assert (tmp_path / "run.json.old").read_text(encoding="latin-1") == content


def test_a_description_that_fails_stops_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(description, "replace_file", full)
    history = made(tmp_path).fit(loader(), max_steps=2)
    assert len(history["train/loss"]) == 2
    assert "run.json is not written" in caplog.text


def test_a_dataset_that_raises_leaves_the_rest_of_the_description(tmp_path: Path) -> None:
    class Odd(TensorDataset):
        @property
        def transform(self) -> Any:
            raise OSError("no such thing")

    odd = Odd(*SAMPLES.tensors)
    made(tmp_path).fit(DataLoader(odd, batch_size=4), max_steps=1)
    (start,) = starts(tmp_path)
    assert "no such thing" in start["train_loader"]["error"]
    assert start["model"]["parameters"] == 22


# ---- loaders and transforms


class RandomFlip:
    def __call__(self, x: Any) -> Any:
        return x


class Normalize(RandomFlip):
    pass


class Compose(RandomFlip):
    def __init__(self, *transforms: Any) -> None:
        self.transforms = list(transforms)


class Transformed(Dataset[Any]):
    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return torch.zeros(2), 0


def test_transforms_are_seen_through_subsets_and_compositions() -> None:
    data = Transformed(Compose(RandomFlip(), Compose(Normalize())))
    for each in (data, Subset(data, [0, 1]), ConcatDataset([SAMPLES, Subset(data, [0])])):
        found = loader_description.described(DataLoader(each))["dataset"]
        assert (found["transforms"], found["random"]) == (["RandomFlip", "Normalize"], True)
    plain = loader_description.described(DataLoader(Transformed(Normalize())))["dataset"]
    assert (plain["transforms"], plain["random"]) == (["Normalize"], False)


@pytest.mark.parametrize(
    ("arguments", "shuffle"),
    [
        ({"shuffle": True}, True),
        ({}, False),
        ({"sampler": WeightedRandomSampler(torch.ones(16), 16)}, True),
        ({"sampler": [3, 1, 2]}, None),
        ({"sampler": torch.utils.data.DistributedSampler(SAMPLES, 2, 0, shuffle=False)}, False),
        ({"batch_sampler": [[0, 1], [2, 3]]}, None),
    ],
)
def test_whether_a_loader_shuffles(arguments: dict[str, Any], shuffle: bool | None) -> None:
    assert loader_description.described(DataLoader(SAMPLES, **arguments))["shuffle"] is shuffle


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(SAMPLES)


def test_an_iterator_inside_of_a_dataset_is_left_to_the_training(tmp_path: Path) -> None:
    loop = made(tmp_path)
    loop.fit(DataLoader(ChainDataset(each for each in [Stream()]), batch_size=4), max_steps=2)
    assert loop.global_step == 2
    assert starts(tmp_path)[0]["train_loader"]["dataset"]["length"] is None


class RandomTokens(TensorDataset):
    pass


@pytest.mark.parametrize(
    ("dataset", "collate", "random"),
    [
        (SAMPLES, None, False), (RandomTokens(torch.zeros(2)), None, None), (SAMPLES, lambda batch: batch, None),
        (Transformed([Normalize()]), None, False), (Transformed(lambda x: x), None, None),
        (Transformed([Normalize(), RandomFlip()]), None, True),
    ],
)  # fmt: skip
def test_whether_data_are_augmented(dataset: Any, collate: Any, random: bool | None) -> None:
    """None where it cannot be seen from outside."""
    assert loader_description.described(DataLoader(dataset, collate_fn=collate))["dataset"]["random"] is random


def test_a_loader_that_is_a_list() -> None:
    assert loader_description.described([1, 2]) == {"class": "builtins.list", "batches": 2, "shuffle": None}


def test_what_is_no_json_is_named() -> None:
    assert plain(float("nan")) == "nan"
    assert plain({1: (torch.float32, np.float64(2.0), Path("a"))}) == {"1": ["torch.float32", 2.0, "a"]}
    assert plain(math.sin) == "math.sin"
    assert plain(torch.ones(3)) == "torch.Tensor"  # its values are nobody's business
    assert len(plain("x" * 10_000)) == 500


def test_odd_objects_stop_no_loop(tmp_path: Path) -> None:
    class Mute:
        __slots__ = ()

        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(name)

    round_in_itself: dict[str, Any] = {"list": []}
    round_in_itself["list"].append(round_in_itself)
    assert plain(round_in_itself) == {"list": ["builtins.dict"]}
    assert plain(each for each in "ab") == "builtins.generator"
    assert plain(np.longdouble(0.5)) == 0.5
    assert plain(list(range(5000)))[999:] == [999, "... and 4000 more"]
    assert plain(dict.fromkeys(range(5000)))["..."] == "... and 4000 more"
    assert description.options({"schedule": Mute()}) == {"schedule": "Mute"}
    loop = made(tmp_path, loggers=(each for each in ["jsonl"]))
    loop.fit(loader(), max_steps=1)
    assert starts(tmp_path)[0]["loggers"] == ["jsonl"]


def test_layers_without_a_shape_yet(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.LazyLinear(2), torch.nn.Linear(2, 2))
    loop = Loop(model, AdamW(model.parameters()), torch.nn.CrossEntropyLoss(), run_dir=tmp_path, curves=False)
    loop.fit(loader(), max_steps=1)
    (start,) = starts(tmp_path)
    assert (start["model"]["parameters"], start["model"]["lazy"]) == (6, 2)
    assert start["optimizer"]["groups"][0]["parameters"] == 6


def test_settings_that_loggers_and_comparisons_get(tmp_path: Path) -> None:
    loop = made(tmp_path, config={"lr": "mine", "data": {"kind": "toy", "sizes": [1, 2]}})
    loop.fit(loader(), max_steps=1)
    found = description.configured(starts(tmp_path)[0])
    assert found["lr"] == "mine"  # the user's own goes before the optimizer's
    assert (found["data.kind"], found["data.sizes"], found["batch_size"]) == ("toy", "[1, 2]", 4)


# ---- files and pictures


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = replace_file(tmp_path / "a" / "b.txt", "old")
    monkeypatch.setattr("os.replace", lambda *given: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        replace_file(path, "new")
    assert path.read_text() == "old"
    assert [each.name for each in path.parent.iterdir()] == ["b.txt"]


def decoded(content: bytes) -> np.ndarray:
    """The pixels of a PNG without filters, by the standard alone."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    position, chunks = 8, {}
    while position < len(content):
        (length,) = struct.unpack(">I", content[position : position + 4])
        kind, data = content[position + 4 : position + 8], content[position + 8 : position + 8 + length]
        (crc,) = struct.unpack(">I", content[position + 8 + length : position + 12 + length])
        assert crc == zlib.crc32(kind + data)
        chunks[kind] = data
        position += 12 + length
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, colour, rest) == (8, 2, [0, 0, 0])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


def test_png_is_read_by_others(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert (decoded(images.png(pixels)) == pixels).all()
    pillow = pytest.importorskip("PIL.Image", reason="needs Pillow")
    (tmp_path / "a.png").write_bytes(images.png(pixels))
    assert (np.asarray(pillow.open(tmp_path / "a.png")) == pixels).all()


RAMP = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)


@pytest.mark.parametrize(
    "image",
    [
        RAMP,
        torch.from_numpy(RAMP.transpose(2, 0, 1).copy()),
        torch.from_numpy(RAMP),
        RAMP.transpose(2, 0, 1),
        RAMP.astype(np.int64),
        RAMP / 255.0,
        torch.from_numpy(RAMP.transpose(2, 0, 1) / 255.0).requires_grad_(),
    ],
)
def test_images_of_any_layout(image: Any) -> None:
    assert (images.as_rgb(image) == RAMP).all()


def test_greys_and_ambiguous_images() -> None:
    grey = RAMP[:, :, 0]
    for image in (grey, grey[:, :, None], grey[None], torch.from_numpy(grey.copy()), grey > 5):
        found = images.as_rgb(image)
        assert found.shape == (2, 4, 3)
        assert (found == found[:, :, :1]).all()
    square = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert (images.as_rgb(square) == square).all()
    assert (images.as_rgb(torch.from_numpy(square)) == square.transpose(1, 2, 0)).all()
    assert images.as_rgb(torch.ones(3, 2, 2, dtype=torch.bfloat16)).max() == 255


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (np.zeros((2, 3, 4, 4)), "must have the shape"),
        (np.zeros((4, 4, 4)), "without transparency"),
        (np.zeros((0, 4, 3)), "must have the shape"),
        (np.zeros(4), "must have the shape"),
        (np.full((2, 2), 1.5), r"floats of an image must lie in \[0, 1\]"),
        (np.full((2, 2), np.nan), "undo the normalization"),
        (np.full((2, 2), -1), r"integers of an image must lie in \[0, 255\]"),
        (np.array([["a"]]), "must be made of numbers"),
    ],
)
def test_no_images(image: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        images.as_rgb(image)


def test_log_image_writes_a_file_and_tells_the_loggers(tmp_path: Path) -> None:
    recorder = Recorder()
    loop = made(tmp_path, loggers=["jsonl", recorder])
    loop.log_image("before", RAMP)
    loop.fit(loader(), max_steps=3)
    loop.log_image("val/worst", torch.zeros(1, 2, 2))
    assert (decoded((tmp_path / "images" / "before-000000000.png").read_bytes()) == RAMP).all()
    assert (tmp_path / "images" / "val" / "worst-000000003.png").exists()
    assert [(name, step) for name, _, step in recorder.images] == [("before", 0), ("val/worst", 3)]
    assert recorder.images[1][1].dtype == np.uint8
    assert recorder.opened == recorder.closed == 3  # before the run, in it, after it
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3  # none is lost by the pictures
    with pytest.raises(ValueError, match=r"name must be made of letters"):
        loop.log_image("../escape", RAMP)


class Recorder:
    def __init__(self) -> None:
        self.images: list[Any] = []
        self.opened = self.closed = 0
        self.fails = False

    def open(self, run_dir: Any, resume_step: Any) -> None:
        self.opened += 1

    def log(self, row: Any) -> None:
        pass

    def log_image(self, name: str, image: Any, step: int) -> None:
        if self.fails:
            raise OSError("the service is away")
        self.images.append((name, image, step))

    def close(self) -> None:
        self.closed += 1


class Refusing(Recorder):
    """A service whose library for pictures is not installed, and that does not take the config."""

    def log_image(self, name: str, image: Any, step: int) -> None:
        raise ImportError("No module named 'PIL'")

    def log_config(self, config: Any) -> None:
        raise ValueError("no such setting")


def test_a_service_that_refuses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = Refusing()
    loop = made(tmp_path, loggers=[logger])
    loop.fit(loader(), max_steps=1)
    assert starts(tmp_path)[0]["end"]["reason"] == "end"
    assert "did not take what the run was configured with: no such setting" in caplog.text
    with pytest.warns(RuntimeWarning, match="PIL"):
        loop.log_image("a", RAMP)
    assert (tmp_path / "images/a-000000001.png").exists()


def test_loggers_are_closed_after_a_picture_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = Recorder()
    loop = made(tmp_path, loggers=[logger])
    monkeypatch.setattr(logger, "log_image", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loop.log_image("a", RAMP)
    assert (logger.opened, logger.closed) == (1, 1)


def test_a_service_and_a_disk_that_fail_stop_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    recorder.fails = True
    monkeypatch.setattr(images, "replace_file", lambda *given: (_ for _ in ()).throw(OSError("full")))
    loop = made(tmp_path, loggers=[recorder])
    with pytest.warns(RuntimeWarning, match="the service is away"):
        loop.log_image("a", RAMP)
    assert "a.png of step 0 is not written: full" in caplog.text


def test_a_confusion_matrix_is_numbers_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    recorder = Recorder()
    loop = made(tmp_path, loggers=[recorder])
    loop.log_confusion_matrix("confusion", torch.tensor([[5, 1], [0, 0]]), ["cat", "dog"])
    content = json.loads((tmp_path / "images" / "confusion-000000000.json").read_text())
    assert content == {"name": "confusion", "step": 0, "classes": ["cat", "dog"], "matrix": [[5, 1], [0, 0]]}
    picture = decoded((tmp_path / "images" / "confusion-000000000.png").read_bytes())
    assert (picture == recorder.images[0][1]).all()
    assert picture.std() > 10  # something is drawn


def test_a_confusion_matrix_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*given: Any) -> None:
        raise MissingExtra("[plots] matplotlib")

    monkeypatch.setattr(images.drawing, "figure", missing)
    made(tmp_path).log_confusion_matrix("confusion", np.eye(3))
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["confusion-000000000.json"]


def test_roundings_palettes_and_dollars(tmp_path: Path) -> None:
    assert (images.as_rgb(torch.full((3, 2, 2), 1.0 + 1e-6)) == 255).all()
    assert (images.as_rgb(np.full((2, 2), -1e-6)) == 0).all()
    red = pytest.importorskip("PIL.Image").new("RGB", (2, 2), (255, 0, 0)).convert("P")
    assert images.as_rgb(red)[0, 0].tolist() == [255, 0, 0]
    pytest.importorskip("matplotlib")
    made(tmp_path).log_confusion_matrix("prices", [[1, 2], [3, 4]], classes=["$x_$", "0"])
    assert (tmp_path / "images/prices-000000000.png").exists()


@pytest.mark.parametrize(
    ("matrix", "classes", "why"),
    [
        ([[1, 2]], None, "must be .classes, classes."),
        ([], None, "must be .classes, classes."),
        ([[1, -1], [0, 1]], None, "at least 0"),
        ([[1, math.nan], [0, 1]], None, "finite"),
        ([[1, 0], [0, 1]], ["a"], "name each of the 2 rows, got 1"),
    ],
)
def test_no_confusion_matrices(matrix: Any, classes: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        images.as_confusion(matrix, classes)
