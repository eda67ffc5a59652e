# SPDX-License-Identifier: Apache-2.0
"""export_model: each format loaded again and compared; what fails is a row, and leaves no file."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastloop.recipes.export import ExportReport, export_model
from fastloop.recipes.export.comparing import Arguments, batch_of, of_batch, other_values

ALL = ("program", "onnx", "torchscript")


@pytest.fixture(autouse=True)
def _few_pairs(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """A latency of 2 pairs is enough to see that there is one."""
    monkeypatch.setattr("fastloop.recipes.export.comparing.PAIRS", 2)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3)
    )


def formats() -> tuple[str, ...]:
    """ONNX where its packages are."""
    try:
        import onnx
        import onnxruntime
        import onnxscript
    except ImportError:
        return ("program", "torchscript")
    del onnx, onnxruntime, onnxscript
    return ALL


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_format_with_an_open_batch(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kinds, _ = formats(), network()(torch.ones(2, 1, 4, 4))
    capfd.readouterr()  # what torch and onnxruntime say, once, of a machine that they do not know
    model = network()
    model[1].running_mean.uniform_(-1, 1)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        example = torch.randn(1, 1, 4, 4, generator=torch.Generator())
        made = export_model(model, example, tmp_path / "new", formats=kinds)
    assert capfd.readouterr() == ("", "")
    assert made.passed, str(made)
    assert made.batch_sizes == [1, 4]
    endings = {"program": "model.pt2", "onnx": "model.onnx", "torchscript": "model.torchscript.pt"}
    assert names(tmp_path / "new") == sorted(endings[kind] for kind in kinds)
    for row in made.rows:
        assert row.path == str(tmp_path / "new" / endings[row.format])
        assert row.bytes == Path(row.path).stat().st_size
        assert row.max_rel_error is not None
        assert row.max_rel_error <= 1e-5
        assert row.latency is not None
        assert row.latency.low <= row.latency.median <= row.latency.high
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert any("deprecated" in f.what for f in made.findings)
    assert json.loads(json.dumps(made.to_json()))["rows"][0]["format"] == "program"
    made.record(tmp_path / "run")
    assert "export_model" in (tmp_path / "run" / "practices.jsonl").read_text()

    # A service loads the file alone: of a batch that nobody has tried.
    x = torch.randn(6, 1, 4, 4)
    loaded = torch.export.load(tmp_path / "new" / "model.pt2").module()
    assert torch.allclose(loaded(x), model.eval()(x), atol=1e-6)


class Named(nn.Module):
    """Keyword arguments, one of them a dict, and nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)

    def forward(self, ids: Tensor, extra: dict[str, Tensor], scale: float = 2.0) -> dict[str, Any]:
        y = self.embed(ids) * scale + extra["z"][:, None]
        return {"logits": y, "pair": (y.sum(1), y.argmax(-1))}


def test_keyword_arguments_dicts_and_several_outputs(tmp_path: Path) -> None:
    example = {"ids": torch.randint(7, (3, 5)), "extra": {"z": torch.randn(3, 4)}}
    kinds = [kind for kind in formats() if kind != "torchscript"]
    made = export_model(Named(), example, tmp_path, formats=kinds, name="named")
    assert made.passed, str(made)
    assert made["program"].path == str(tmp_path / "named.pt2")


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else -self.layer(x)


def test_a_branch_on_values_fails_and_leaves_the_earlier_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.pt2").write_text("of last week")
    torch.manual_seed(3)
    example = torch.randn(4, 4)
    assert example.sum() * other_values(Arguments.of(example)).args[0].sum() < 0  # one goes this way, one the other
    made = export_model(Branch(), example, tmp_path, formats=("program", "torchscript"))
    assert capfd.readouterr() == ("", "")
    assert not made.passed
    assert "branches on values" in made["program"].reason
    assert made["program"].path is None
    assert any(f.level == "warning" and "baked in" in f.what for f in made.findings)
    assert not made["torchscript"].passed  # other values go the other way, and show it
    assert names(tmp_path) == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_text() == "of last week"
    assert "FAILED" in str(made)


class Fixed(nn.Module):
    """For one batch size."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(4, -1) + torch.arange(4.0)[:, None]


def test_a_batch_size_that_is_fixed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"batch of 7: .* dynamic_batch=False"):
        export_model(Fixed(), torch.randn(4, 3), tmp_path, formats="program")
    assert names(tmp_path) == []
    assert export_model(Fixed(), torch.randn(4, 3), tmp_path, formats="program", dynamic_batch=False).passed


class Sized(nn.Module):
    """Any batch, and nothing that torch.export could keep open: it reads the size as a number."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tensor([float(len(range(x.shape[0])))])


def test_tracing_that_bakes_the_batch_size_in_is_seen(tmp_path: Path) -> None:
    made = export_model(Sized(), torch.randn(4, 3), tmp_path, formats=("torchscript", "program"))
    assert not made["torchscript"].passed
    assert "tolerance" in made["torchscript"].reason


def test_randomness_in_eval_mode_is_told(tmp_path: Path) -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x, 0.5, training=True)

    made = export_model(Noisy(), torch.randn(8, 8), tmp_path, formats="program")
    assert [f.where for f in made.findings if f.level == "error"] == ["model", "program"]


def test_a_tolerance_that_is_not_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastloop.recipes.export.formats import Exporter

    write = Exporter.write

    def wrong(self: Exporter, kind: str, path: Path) -> Any:
        loaded = write(self, kind, path)
        return lambda given: loaded(given) * 1.001

    monkeypatch.setattr(Exporter, "write", wrong)
    made = export_model(nn.Linear(4, 3), torch.randn(2, 4), tmp_path, formats="program")
    assert made["program"].max_rel_error == pytest.approx(1e-3, rel=0.01)
    assert not made.passed
    assert names(tmp_path) == []
    assert export_model(nn.Linear(4, 3), torch.randn(2, 4), tmp_path, formats="program", tolerance=0.01).passed


def test_models_without_parameters_and_integers(tmp_path: Path) -> None:
    class Count(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return (ids > 2).sum(1)

    made = export_model(Count(), torch.randint(5, (3, 6)), tmp_path, formats="program")
    assert made.passed, str(made)
    assert made.model_bytes == 0


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"formats": ("program", "tflite")}, ValueError, "tflite"),
        ({"formats": ()}, ValueError, "formats must be among"),
        ({"tolerance": -1}, ValueError, "tolerance"),
        ({"tolerance": float("nan")}, ValueError, "tolerance"),
        ({"name": "../model"}, ValueError, "file name"),
        ({"name": ""}, ValueError, "file name"),
        ({"example": 3}, ValueError, "batch of tensors, got none"),
        ({"example": torch.zeros(0, 4)}, ValueError, "an empty one"),
        ({"example": torch.zeros(2, 5)}, RuntimeError, "shapes"),
        ({"model": torch.relu}, TypeError, "nn.Module"),
    ],
)
def test_bad_input(tmp_path: Path, options: dict[str, Any], error: type[Exception], words: str) -> None:
    given = {
        "model": nn.Linear(4, 3),
        "example": torch.zeros(2, 4),
        "folder": tmp_path,
        "formats": "program",
        **options,
    }
    with pytest.raises(error, match=words):
        export_model(**given)
    assert names(tmp_path) == []


def test_a_missing_package_is_named_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"onnx.*fastloop\[export\]"):
        export_model(nn.Linear(4, 3), torch.zeros(2, 4), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match="taken"):
        export_model(nn.Linear(4, 3), torch.zeros(2, 4), tmp_path / "taken", formats="program")


class Writes(nn.Module):
    """The forward changes its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(1) * 2


def test_a_model_that_writes_into_its_input(tmp_path: Path) -> None:
    example = torch.randn(3, 4)
    before = example.clone()
    made = export_model(Writes(), example, tmp_path, formats=("program", "torchscript"))
    assert made.passed, str(made)
    assert not [f for f in made.findings if f.level == "error"]
    assert torch.equal(example, before)


# ---- the inputs on which files are compared


def test_other_inputs_are_like_the_example() -> None:
    ids, mask, x = torch.tensor([[3, 9], [9, 3]]), torch.ones(2, 2, dtype=torch.bool), torch.zeros(2, 3)
    given = Arguments.of({"ids": ids, "rest": (mask, x), "flag": True})
    made = other_values(given)
    assert set(made.kwargs["ids"].unique().tolist()) <= {3, 9}
    assert made.kwargs["rest"][0].all()
    assert made.kwargs["rest"][1].abs().min() > 0
    assert made.kwargs["flag"] is True
    assert torch.equal(other_values(given).kwargs["rest"][1], made.kwargs["rest"][1])
    assert not torch.equal(other_values(given, seed=1).kwargs["rest"][1], made.kwargs["rest"][1])


def test_only_what_has_the_batch_in_front_is_resized() -> None:
    given = Arguments.of((torch.arange(6).view(3, 2), torch.ones(2), torch.tensor(1.0)))
    made = of_batch(given, 5)
    assert [tuple(tensor.shape) for tensor in made.tensors()] == [(5, 2), (2,), ()]
    assert made.args[0][3].tolist() == [0, 1]
    assert batch_of(made) == 5
    assert batch_of(Arguments.of(torch.tensor(1.0))) is None


def test_a_report_by_format() -> None:
    with pytest.raises(KeyError, match="none of format"):
        ExportReport([], 0, [])["onnx"]
