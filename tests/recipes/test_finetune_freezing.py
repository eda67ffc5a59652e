# SPDX-License-Identifier: Apache-2.0
"""What is frozen stays as it is: weights, statistics of BatchNorm, the optimizer's state."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastloop
from fastloop.loop import Loop
from fastloop.recipes.finetune import GradualUnfreezing, freeze, unfreeze

EPOCHS = {0: ["head"], 1: ["layer2"], 3: ["*"]}
OPTIMIZERS = {"fastloop": fastloop.AdamW, "torch": torch.optim.AdamW}


pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.layer10 = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer10(self.layer2(self.layer1(x))))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def data(shuffle: bool = True) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(48, 4, generator=generator)
    return DataLoader(TensorDataset(x, x.abs().argmax(dim=1) % 3), batch_size=8, shuffle=shuffle)


def loop_of(model: nn.Module, optimizer: torch.optim.Optimizer, **options: object) -> Loop:
    return Loop(model, optimizer, nn.CrossEntropyLoss(), seed=0, loggers=(), progress=False, curves=False, **options)  # type: ignore[arg-type]


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ---- freeze and unfreeze


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        (["layer1"], {"layer1.0.weight", "layer1.0.bias", "layer1.1.weight", "layer1.1.bias"}),
        ("layer1.1", {"layer1.1.weight", "layer1.1.bias"}),
        (["layer[12].0", "head.bias"], {f"layer{i}.0.{n}" for i in "12" for n in ("weight", "bias")} | {"head.bias"}),
        (
            ["*.bias"],
            {"layer1.0.bias", "layer1.1.bias", "layer2.0.bias", "layer2.1.bias", "layer10.0.bias", "head.bias"},
        ),
        ([], set()),
    ],
)
def test_patterns_choose_parameters_by_their_names_and_by_their_modules(patterns: object, frozen: set[str]) -> None:
    model = net()
    assert set(freeze(model, patterns)) == frozen  # type: ignore[arg-type]
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
    assert set(unfreeze(model, patterns)) == frozen  # type: ignore[arg-type]
    assert all(p.requires_grad for p in model.parameters())


def test_everything_is_frozen_without_patterns_and_returned_in_order() -> None:
    model = net()
    assert freeze(model) == [name for name, _ in model.named_parameters()]
    assert unfreeze(model) == [name for name, _ in model.named_parameters()]


def test_a_shared_parameter_is_chosen_by_each_of_its_names() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "output": nn.Linear(4, 5, bias=False)})
    model["output"].weight = model["embedding"].weight
    assert freeze(model, "output") == ["embedding.weight"]


def test_a_pattern_for_nothing_names_what_is_close() -> None:
    with pytest.raises(ValueError, match=r"\[freeze\] pattern 'layr2' .*did you mean 'layer2'"):
        freeze(net(), ["head", "layr2"])
    with pytest.raises(ValueError, match=r"its modules are layer1, layer2, layer10, head"):
        freeze(net(), "zzz")
    for patterns in ([3], None, 3):
        with pytest.raises(TypeError, match="a pattern must be text"):
            unfreeze(net(), patterns)  # type: ignore[arg-type]


def test_nothing_is_frozen_where_one_pattern_is_wrong() -> None:
    model = net()
    with pytest.raises(ValueError):
        freeze(model, ["head", "nothing"])
    assert all(p.requires_grad for p in model.parameters())


def test_what_is_frozen_has_no_gradient_left_that_an_optimizer_would_step_with() -> None:
    model = net()
    model(torch.randn(8, 4)).sum().backward()
    freeze(model, "layer1")
    assert model.layer1[0].weight.grad is None
    assert model.head.weight.grad is not None


def test_integers_cannot_be_unfrozen() -> None:
    model = nn.Linear(2, 2)
    model.codes = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    assert unfreeze(model) == ["weight", "bias"]


# ---- BatchNorm


def test_frozen_batchnorms_keep_their_statistics_through_fit_and_its_evaluations() -> None:
    model = net().eval()  # as it comes from inference: fit puts it into train mode
    freeze(model, ["layer1", "layer10"])
    before = values(model)
    loop = loop_of(model, fastloop.AdamW(model.parameters(), lr=1e-2))
    loop.fit(data(), data(False), epochs=2, evaluate_every_steps=2)
    after = values(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in changed if "layer1." in name or "layer10." in name} == set()
    assert {"layer2.1.running_mean", "layer2.1.num_batches_tracked", "head.weight"} <= changed


def test_without_batchnorm_the_statistics_follow_the_data() -> None:
    model = net()
    freeze(model, "layer1", batchnorm=False)
    model(torch.randn(8, 4))
    assert model.layer1[1].num_batches_tracked == 1


def test_a_batchnorm_with_a_trained_parameter_is_not_held() -> None:
    model = net()
    freeze(model, "layer1.1.weight")
    assert model.train().layer1[1].training


def test_unfrozen_batchnorms_follow_train_and_eval_again() -> None:
    model = net()
    freeze(model)
    assert not any(model.train().get_submodule(name).training for name in ("layer1.1", "layer10.1"))
    unfreeze(model, ["layer1", "layer10"])
    assert model.layer1[1].training
    assert model.layer10[1].training
    assert not model.layer2[1].training
    assert not model.eval().layer1[1].training


def test_a_copy_is_held_by_itself() -> None:
    model = net()
    freeze(model, "layer1")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        unfreeze(other, "layer1")
        assert other.train().layer1[1].training
        assert not model.train().layer1[1].training


def test_a_held_batchnorm_is_no_part_of_the_state_dict() -> None:
    model = net()
    keys = list(model.state_dict())
    freeze(model)
    assert list(model.state_dict()) == keys


# ---- gradual unfreezing


def test_each_stage_trains_what_the_schedule_says() -> None:
    model, seen = net(), []

    class Look:
        def on_epoch_end(self, loop: Loop) -> None:  # before that of the schedule: as the epoch was trained
            seen.append({name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad})

    loop = loop_of(model, fastloop.AdamW(model.parameters()), callbacks=[Look(), GradualUnfreezing(EPOCHS)])
    loop.fit(data(), epochs=5)
    everything = {"layer1", "layer2", "layer10", "head"}
    assert seen == [{"head"}, {"head", "layer2"}, {"head", "layer2"}, everything, everything]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_is_frozen_is_untouched_and_its_state_begins_when_it_is_unfrozen(kind: str) -> None:
    model = net()
    optimizer = OPTIMIZERS[kind](model.parameters(), lr=1e-2, weight_decay=0.5)
    before = values(model)
    loop = loop_of(model, optimizer, callbacks=[GradualUnfreezing(EPOCHS)])
    loader = data()
    loop.fit(loader, epochs=1)
    assert all(torch.equal(before[name], value) for name, value in values(model).items() if "layer" in name)
    assert {p for p in model.parameters() if optimizer.state.get(p)} == set(model.head.parameters())
    loop.fit(loader, epochs=4)
    steps = {name: float(optimizer.state[p]["step"]) for name, p in model.named_parameters()}
    windows = len(loader)
    assert steps["head.weight"] == 4 * windows
    assert steps["layer2.0.weight"] == steps["layer2.1.bias"] == 3 * windows
    assert steps["layer1.0.weight"] == steps["layer10.0.bias"] == 1 * windows


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_run_is_that_of_an_optimizer_that_gets_new_groups(kind: str) -> None:
    """An optimizer to which parameters are added when they are unfrozen does the same, bit for bit."""

    def trained(gradually: bool) -> dict[str, torch.Tensor]:
        model = net()
        stages = [list(model.head.parameters()), list(model.layer2.parameters())]
        stages.append([*model.layer1.parameters(), *model.layer10.parameters()])
        if gradually:
            optimizer = OPTIMIZERS[kind]([{"params": stage} for stage in stages], lr=1e-2, weight_decay=0.1)
            loop = loop_of(model, optimizer, callbacks=[GradualUnfreezing(EPOCHS, batchnorm=False)])
            loop.fit(data(), epochs=4)
            return values(model)
        freeze(model, ["layer1", "layer2", "layer10"], batchnorm=False)
        optimizer = OPTIMIZERS[kind](stages[0], lr=1e-2, weight_decay=0.1)

        class Add:
            def on_epoch_end(self, loop: Loop) -> None:
                for epoch, stage in ((1, stages[1]), (3, stages[2])):
                    if loop.epoch == epoch:
                        for p in stage:
                            p.requires_grad_(True)
                        optimizer.add_param_group({"params": stage})

        loop_of(model, optimizer, callbacks=[Add()]).fit(data(), epochs=4)
        return values(model)

    ours, theirs = trained(True), trained(False)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("stop", [6, 15, 20])  # windows; an epoch has 6
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_run_that_is_resumed_equals_one_that_was_not_interrupted(kind: str, stop: int, tmp_path) -> None:
    def run(folder: str, max_steps: int | None) -> tuple[dict[str, torch.Tensor], dict]:
        model = net()
        optimizer = OPTIMIZERS[kind](model.parameters(), lr=1e-2, weight_decay=0.1)
        loop = loop_of(model, optimizer, run_dir=tmp_path / folder, callbacks=[GradualUnfreezing(EPOCHS)])
        loop.fit(data(), data(False), epochs=4, max_steps=max_steps)
        state = {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if optimizer.state.get(p)}
        return values(model), state

    whole, whole_state = run("whole", None)
    run("parts", stop)
    parts, parts_state = run("parts", None)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert whole_state.keys() == parts_state.keys()
    for name, state in whole_state.items():
        assert all(torch.equal(torch.as_tensor(state[key]), torch.as_tensor(parts_state[name][key])) for key in state)


def test_batchnorms_are_held_until_their_layer_is_unfrozen() -> None:
    model = net()
    counts = []

    class Look:
        def on_epoch_end(self, loop: Loop) -> None:
            counts.append(
                [int(model.get_submodule(n).num_batches_tracked) for n in ("layer1.1", "layer2.1", "layer10.1")]
            )

    loop = loop_of(model, fastloop.AdamW(model.parameters()), callbacks=[Look(), GradualUnfreezing(EPOCHS)])
    loop.fit(data(), data(False), epochs=4)
    assert counts == [[0, 0, 0], [0, 6, 0], [0, 12, 0], [6, 18, 6]]


def test_a_compiled_model_is_traced_anew_for_what_is_trained() -> None:
    def trained(compiled: bool) -> dict[str, torch.Tensor]:
        model = net()
        if compiled:
            model.compile(backend="aot_eager")
        loop = loop_of(model, fastloop.AdamW(model.parameters(), lr=1e-2), callbacks=[GradualUnfreezing(EPOCHS)])
        loop.fit(data(), data(False), epochs=4)
        return values(model)

    eager, compiled = trained(False), trained(True)
    assert all(torch.allclose(eager[name], compiled[name], rtol=1e-4, atol=1e-5) for name in eager)


def test_what_no_epoch_names_stays_frozen_and_a_hand_made_freeze_is_replaced() -> None:
    model = net()
    freeze(model, "layer2")
    schedule = GradualUnfreezing({0: "head", 1: ["layer2"]})
    schedule.apply(model, 7)
    assert {n.partition(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"head", "layer2"}
    assert model.layer2[1].training
    assert not model.layer1[1].training


@pytest.mark.parametrize(
    ("schedule", "problem"),
    [
        ({}, "patterns by epoch"),
        ([("head", 0)], "patterns by epoch"),
        ({"0": ["head"]}, "an epoch must be an integer"),
        ({-1: ["head"]}, "an epoch must be an integer"),
        ({2: ["head"]}, "in epoch 0"),
        ({0: []}, "in epoch 0"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(schedule: object, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        GradualUnfreezing(schedule)  # type: ignore[arg-type]


def test_a_pattern_for_nothing_is_refused_before_the_first_window() -> None:
    model = net()
    loop = loop_of(model, fastloop.AdamW(model.parameters()), callbacks=[GradualUnfreezing({0: "head", 9: "layer9"})])
    with pytest.raises(ValueError, match="'layer9' matches nothing"):
        loop.fit(data(), epochs=1)
    assert loop.global_step == 0


def test_an_epoch_in_which_nothing_is_trained_is_refused() -> None:
    model = net()
    schedule = GradualUnfreezing({0: "layer10.1", 1: "*"})  # a BatchNorm without parameters
    loop = loop_of(model, fastloop.AdamW(model.parameters()), callbacks=[schedule])
    with pytest.raises(ValueError, match="no parameter is trained in epoch 0"):
        loop.fit(data(), epochs=1)


def test_the_optimizer_need_not_have_integers() -> None:
    model = net()
    model.codes = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    trained = [p for p in model.parameters() if p.is_floating_point()]
    loop_of(model, fastloop.AdamW(trained), callbacks=[GradualUnfreezing({0: "head", 1: "*"})]).fit(data(), epochs=2)
    assert not model.codes.requires_grad


def test_an_optimizer_without_the_frozen_parameters_is_refused() -> None:
    model = net()
    loop = loop_of(model, fastloop.AdamW(model.head.parameters()), callbacks=[GradualUnfreezing({0: "head", 1: "*"})])
    with pytest.raises(ValueError, match=r"lacks 10, the first is 'layer1.0.weight'"):
        loop.fit(data(), epochs=1)


def test_a_cuda_graph_is_refused() -> None:
    model = net()
    loop = loop_of(model, fastloop.AdamW(model.parameters()))
    loop._graphs = 1  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="cuda_graph"):
        GradualUnfreezing({0: "head"}).on_fit_start(loop)
