# SPDX-License-Identifier: Apache-2.0
"""Parameters that are frozen and unfrozen during a run of several processes."""

from __future__ import annotations

import copy
import pickle

import pytest
import ranks
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import fastloop
from fastloop.recipes.finetune import GradualUnfreezing, freeze, unfreeze

EPOCHS = {0: ["4"], 1: ["2"], 3: ["*"]}
WINDOWS = 6  # of an epoch


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def loader(batch):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(48, 5, generator=generator), torch.randn(48, 2, generator=generator)
    return DataLoader(TensorDataset(x, y), batch)


def loop_of(model, strategy, kind=fastloop.AdamW, **options):
    optimizer = kind(model.parameters(), lr=0.01, weight_decay=0.1)
    return fastloop.Loop(model, optimizer, nn.MSELoss(), strategy=strategy, progress=False, curves=False, **options)


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def inner(loop):
    return loop.model.module if isinstance(loop.model, DistributedDataParallel) else loop.model


def weights(loop):
    return {name: full(p.detach()).clone().numpy() for name, p in inner(loop).named_parameters()}


class Look:
    """What is trained in each epoch, and whether the weights of the ranks are the same after it."""

    def __init__(self):
        self.trained, self.equal, self.calls = [], [], 0

    def on_epoch_end(self, loop):
        self.trained.append([name for name, p in inner(loop).named_parameters() if p.requires_grad])
        flat = torch.cat([full(p.detach()).flatten() for p in inner(loop).parameters()])
        every = [torch.empty_like(flat) for _ in range(loop.ranks.size)]
        if loop.ranks.size > 1:
            torch.distributed.all_gather(every, flat)
        self.equal.append(loop.ranks.size == 1 or all(torch.equal(every[0], each) for each in every))


def gradual(rank, strategy, batch, accumulation, kind=fastloop.AdamW, run_dir=None, max_steps=None):
    look = Look()
    loop = loop_of(
        network(), strategy, kind, accumulation_steps=accumulation, run_dir=run_dir, max_grad_norm=1.0,
        callbacks=[look, GradualUnfreezing(EPOCHS)],
    )  # fmt: skip
    loop.fit(loader(batch), epochs=4, max_steps=max_steps)
    steps = {name: float(loop.optimizer.state[p]["step"]) for name, p in inner(loop).named_parameters()
             if loop.optimizer.state.get(p)}  # fmt: skip
    return {"weights": weights(loop), "trained": look.trained, "equal": look.equal, "steps": steps}


def call(rank, keywords):
    return gradual(rank, **keywords)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradual_unfreezing_of_two_ranks_is_that_of_one(strategy, accumulation, tmp_path):
    alone = gradual(0, None, 8, 1)
    together = ranks.run(call, 2, tmp_path, {"strategy": strategy, "batch": 4 // accumulation,
                                             "accumulation": accumulation})  # fmt: skip
    for each in together:
        assert each["equal"] == [True] * 4
        assert each["trained"] == alone["trained"]
        assert each["steps"] == alone["steps"]
        for name, value in alone["weights"].items():
            assert each["weights"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert alone["steps"] == {f"{n}.{kind}": steps * WINDOWS for n, steps in (("0", 1), ("2", 3), ("4", 4))
                              for kind in ("weight", "bias")}  # fmt: skip


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_resumed_between_two_stages(strategy, tmp_path):
    def run(folder, max_steps=None):
        keywords = {"strategy": strategy, "batch": 4, "accumulation": 1, "run_dir": tmp_path / folder}
        return ranks.run(call, 2, tmp_path, keywords | {"max_steps": max_steps})[0]

    whole = run("whole")
    run("parts", 3 * WINDOWS - 2)
    parts = run("parts")
    assert parts["steps"] == whole["steps"]
    for name, value in whole["weights"].items():
        assert (parts["weights"][name] == value).all()


def by_hand(rank):
    """Of a loop, and of a DDP of the caller's own."""
    torch.manual_seed(rank)  # the ranks begin apart, but for what DDP makes equal
    model = network()
    loop = loop_of(model, "ddp")
    sent = []

    def hook(state, bucket):
        sent.append(len(bucket.parameters()))
        bucket.buffer().div_(2)
        return torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])

    loop.model.register_comm_hook(None, hook)
    first = loop.model
    loop.requires_grad_changed()
    same = loop.model is first  # nothing changed
    freeze(model, ["0", "2"])
    loop.requires_grad_changed()
    loop.fit(loader(4), epochs=1)
    few, loop_model = sum(sent), loop.model
    sent.clear()
    unfreeze(model)
    loop.requires_grad_changed()
    loop.fit(loader(4), epochs=2)
    look = Look()
    look.on_epoch_end(loop)
    problem = ""
    try:
        model(torch.zeros(1, 5))
    except RuntimeError as error:
        problem = str(error)

    own = loop_of(DistributedDataParallel(network()), None)
    freeze(own.model, "0")
    refused = ""
    try:
        own.requires_grad_changed()
    except RuntimeError as error:
        refused = str(error)
    return {"same": same, "few": few, "all": sum(sent), "anew": loop_model is not loop.model, "equal": look.equal,
            "problem": problem, "refused": refused}  # fmt: skip


def test_frozen_and_unfrozen_by_hand(tmp_path):
    for each in ranks.run(by_hand, 2, tmp_path):
        assert each["same"]
        assert each["anew"]
        assert each["few"] == 2 * WINDOWS
        assert each["all"] == 6 * WINDOWS
        assert each["equal"] == [True]
        assert "called past loop.model" in each["problem"]
        assert "made by the caller" in each["refused"]


def error_of(function, *args, **keywords):
    try:
        function(*args, **keywords)
    except RuntimeError as error:
        return str(error)
    return ""


def modes(rank):
    """A model in eval mode is trained in train mode, before and after DDP is wrapped anew."""
    model = network()
    model.eval()
    loop = loop_of(model, "ddp")
    loop.fit(loader(4), epochs=1)
    before = model.training
    loop.model.eval()
    freeze(model, "0")
    loop.requires_grad_changed()
    held = model.training
    loop.fit(loader(4), epochs=2)
    return before, held, model.training, model[0].training


def test_a_model_in_eval_mode_is_trained_in_train_mode(tmp_path):
    assert ranks.run(modes, 2, tmp_path) == [(True, False, True, True)] * 2


def refusals(rank):
    model = network()
    loop = loop_of(model, "ddp")
    freeze(model)
    none_left = error_of(loop.requires_grad_changed)
    unfreeze(model)
    loop.requires_grad_changed()
    loop.fit(loader(4), epochs=1)
    former = loop.model
    freeze(model, "0")
    loop.requires_grad_changed()
    return none_left, loop.global_step, error_of(former, torch.zeros(2, 5))


def test_nothing_left_to_train_and_what_was_the_model_before(tmp_path):
    for none_left, step, former in ranks.run(refusals, 2, tmp_path):
        assert "no parameter is left to train" in none_left
        assert step == WINDOWS
        assert "call loop.model(...)" in former


def copies(rank):
    """What a copy, one that is loaded, and a copy in a loop of its own say to a call."""
    model = network()
    loop_of(model, "ddp")
    copied = copy.deepcopy(model)
    loaded = pickle.loads(pickle.dumps(model))
    said = [error_of(each, torch.zeros(2, 5)) for each in (model, copied, loaded)]
    loop = loop_of(copied, "ddp")
    freeze(copied, "0")
    loop.requires_grad_changed()
    return [*said, error_of(copied, torch.zeros(2, 5))]


def test_a_copy_of_the_model_may_be_called(tmp_path):
    for said in ranks.run(copies, 2, tmp_path):
        assert ["called past loop.model" in each for each in said] == [True, False, False, True]
        assert said[1:3] == ["", ""]


def test_each_stage_is_compiled(monkeypatch):
    """torch.compile keeps 8 forms of one code, and gives up then."""
    compiled = []
    compile = torch.compile

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function: compile(function, backend=count))
    schedule = {0: ["12"], 1: ["10"], 2: ["8"], 3: ["6"], 4: ["4"], 5: ["*"]}
    model = nn.Sequential(*[nn.Linear(5, 5) if i % 2 == 0 else nn.Tanh() for i in range(12)], nn.Linear(5, 2))
    loop = loop_of(model, None, compile=True, callbacks=[GradualUnfreezing(schedule)])
    loop.fit(loader(8), loader(8), epochs=6)
    assert len(compiled) == 2 * len(schedule)  # in training and in evaluation


def test_within_a_window():
    model = network()
    loop = loop_of(model, None, accumulation_steps=2)
    for window in loop.windows(loader(8), max_steps=1):
        freeze(model, "0")
        loop.requires_grad_changed()  # no micro-batch yet
        unfreeze(model)
        for x, y in window:
            loop.backward(nn.functional.mse_loss(loop.model(x), y))
            with pytest.raises(RuntimeError, match="between windows"):
                loop.requires_grad_changed()
        loop.step()
    loop.requires_grad_changed()


def test_nothing_to_train_is_said_before_the_first_window():
    model = network()
    loop = loop_of(model, None)
    freeze(model)
    with pytest.raises(RuntimeError, match="no parameter of the optimizer requires a gradient; unfreeze"):
        loop.fit(loader(8), epochs=1)
    assert loop.global_step == 0
