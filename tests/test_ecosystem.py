# SPDX-License-Identifier: Apache-2.0
"""Code that nobody here wrote, with our optimizers in the place of torch's: the same losses within rounding.

The libraries are no requirement of the development environment; what is not installed is skipped, and said.
"""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from cases import CASES
from support import bits, bits_of, example, make, torch_class

import fastloop

every_optimizer = pytest.mark.parametrize("name", CASES)
NAMES = tuple(name for name in CASES if CASES[name].torch_name)
every_twin = pytest.mark.parametrize("name", NAMES)


def pair(name):
    """torch's class and ours."""
    return torch_class(name), getattr(fastloop, name)


def new_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))


def new_data(count=64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 6, generator=generator)
    return torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True).sin())


def loss_of(model, batch):
    x, y = batch
    return torch.nn.functional.mse_loss(model(x), y)


def assert_same_curve(ours, torchs):
    assert len(ours) == len(torchs) > 2
    assert ours[-1] != ours[0]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(torchs), rtol=1e-5, atol=1e-6)


# -- torch's own ------------------------------------------------------------------------------------------------


@every_twin
def test_stochastic_weight_averaging(name):
    from torch.optim.swa_utils import SWALR, AveragedModel, update_bn

    def train(optimizer_class):
        torch.manual_seed(0)
        layers = (torch.nn.Linear(6, 16), torch.nn.BatchNorm1d(16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        model = torch.nn.Sequential(*layers)
        opt = optimizer_class(model.parameters(), lr=0.01)
        averaged, swa = AveragedModel(model), SWALR(opt, swa_lr=0.05, anneal_epochs=3)
        loader = torch.utils.data.DataLoader(new_data(), batch_size=16)
        for _ in range(5):
            for batch in loader:
                opt.zero_grad()
                loss_of(model, batch).backward()
                opt.step()
            averaged.update_parameters(model)
            swa.step()
        update_bn(loader, averaged)
        averaged.eval()
        return [loss_of(averaged, batch).item() for batch in loader]

    torchs, ours = map(train, pair(name))
    assert_same_curve(ours, torchs)


@every_twin
def test_averaging_by_ema_of_swa_utils_agrees_with_ours(name):
    """AveragedModel with torch's EMA follows the same parameters as `ema_decay`."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = new_model()
    opt = make(name, model.parameters(), **(example(name) | {"lr": 0.01, "ema_decay": 0.9}))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(model)  # its first update copies; ours starts at the parameters as they are
    for batch in torch.utils.data.DataLoader(new_data(), batch_size=16):
        opt.zero_grad()
        loss_of(model, batch).backward()
        opt.step()
        averaged.update_parameters(model)
    for key, value in opt.ema_state_dict(model).items():
        torch.testing.assert_close(value, averaged.module.state_dict()[key], rtol=1e-5, atol=1e-6)


@every_optimizer
def test_apply_optimizer_in_backward(name):
    from torch.distributed.optim import _apply_optimizer_in_backward

    settings = example(name) | {"lr": 0.01}
    model, plain = new_model(), new_model()
    opt = make(name, plain.parameters(), **settings)
    _apply_optimizer_in_backward(getattr(fastloop, name), model.parameters(), settings)
    for batch in torch.utils.data.DataLoader(new_data(), batch_size=16):
        loss_of(model, batch).backward()  # steps, and drops the gradients
        opt.zero_grad()
        loss_of(plain, batch).backward()
        opt.step()
    assert all(p.grad is None for p in model.parameters())
    assert [bits(p) for p in model.parameters()] == [bits(p) for p in plain.parameters()]


@every_optimizer
def test_a_checkpoint_of_torch_distributed_checkpoint(name, tmp_path):
    """One process, without a process group."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    settings = example(name) | {"lr": 0.01, "max_grad_norm": 0.5, "ema_decay": 0.9}

    def train(model, opt, seeds):
        for seed in seeds:
            torch.manual_seed(seed)
            opt.zero_grad()
            loss_of(model, (torch.randn(8, 6), torch.randn(8, 1))).backward()
            opt.step()

    model = new_model()
    opt = make(name, model.parameters(), **settings)
    train(model, opt, range(3))
    weights, states = get_state_dict(model, opt)
    dcp.save({"model": weights, "optim": states}, checkpoint_id=tmp_path, no_dist=True)
    other = new_model()
    resumed = make(name, other.parameters(), **settings)
    train(other, resumed, range(5, 7))
    weights, states = get_state_dict(other, resumed)
    dcp.load({"model": weights, "optim": states}, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=states)
    train(model, opt, range(10, 13))
    train(other, resumed, range(10, 13))
    assert bits_of(resumed) == bits_of(opt)


# -- transformers -------------------------------------------------------------------------------------------------


class TinyText(torch.utils.data.Dataset):
    def __init__(self):
        self.tokens = torch.randint(0, 64, (48, 16), generator=torch.Generator().manual_seed(3))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def hugging_face_curve(folder, optimizer_class, give):
    """The losses of a tiny GPT-2 under transformers.Trainer; `give(model)` says how the optimizer reaches it."""
    import transformers

    transformers.set_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=8, per_device_train_batch_size=8, gradient_accumulation_steps=2,
        learning_rate=1e-2, max_grad_norm=0.5, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        save_steps=4, seed=0,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=TinyText(), **give(model))
    trainer.train()
    assert type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)) is optimizer_class
    first = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    # From the checkpoint in the middle: the optimizer's state goes through the Trainer's own file.
    transformers.set_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=TinyText(), **give(model))
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    resumed = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert resumed[-4:] == pytest.approx(first[-4:], rel=1e-3)
    return first


@pytest.mark.parametrize("way", ["optimizers", "optimizer_cls_and_kwargs"])
@every_twin
def test_transformers_trainer(name, way, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    transformers.logging.set_verbosity_error()

    def curve(optimizer_class, folder):
        def give(model):
            if way == "optimizer_cls_and_kwargs":
                return {"optimizer_cls_and_kwargs": (optimizer_class, {"lr": 1e-2})}
            opt = optimizer_class(model.parameters(), lr=1e-2)
            return {"optimizers": (opt, torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)))}

        return hugging_face_curve(folder, optimizer_class, give)

    torchs, ours = (curve(cls, tmp_path / cls.__module__) for cls in pair(name))
    assert_same_curve(ours, torchs)


# -- Accelerate -----------------------------------------------------------------------------------------------------


@every_twin
def test_accelerate(name, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

    def train(optimizer_class):
        accelerate.utils.set_seed(0)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = new_model()
        opt = optimizer_class(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.5)
        loader = torch.utils.data.DataLoader(new_data(), batch_size=8)
        model, opt, loader, schedule = accelerator.prepare(model, opt, loader, schedule)
        losses = []

        def epoch():
            for batch in loader:
                with accelerator.accumulate(model):
                    loss = loss_of(model, batch)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.1)
                    opt.step()
                    schedule.step()
                    opt.zero_grad()
                losses.append(loss.item())

        folder = tmp_path / optimizer_class.__module__
        epoch()
        accelerator.save_state(str(folder))
        epoch()
        after = [p.detach().clone() for p in model.parameters()]
        accelerator.load_state(str(folder))
        epoch()
        torch.testing.assert_close(list(model.parameters()), after, rtol=0, atol=0)
        return losses

    torchs, ours = map(train, pair(name))
    assert_same_curve(ours, torchs)


# -- Lightning ------------------------------------------------------------------------------------------------------


def lightning():
    for package in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return __import__(package, fromlist=["Trainer"])
        except ImportError:
            continue
    pytest.skip("neither lightning nor pytorch-lightning is installed")


@pytest.mark.parametrize("manual", [False, True])
@every_twin
def test_lightning_trainer(name, manual, tmp_path):
    pl = lightning()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

    def train(optimizer_class):
        losses = []

        class Module(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.model = new_model()
                self.automatic_optimization = not manual

            def training_step(self, batch, index):
                loss = loss_of(self.model, batch)
                losses.append(loss.item())
                if manual:
                    opt = self.optimizers()
                    opt.zero_grad()
                    self.manual_backward(loss)
                    self.clip_gradients(opt, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
                    opt.step()
                return loss

            def configure_optimizers(self):
                opt = optimizer_class(self.parameters(), lr=0.01)
                return [opt], [torch.optim.lr_scheduler.CosineAnnealingLR(opt, 4)]

        folder = tmp_path / optimizer_class.__module__
        loader = torch.utils.data.DataLoader(new_data(), batch_size=16)

        def fit(epochs, checkpoint=None):
            settings = {} if manual else {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}
            trainer = pl.Trainer(
                max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
                enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder, **settings,
            )  # fmt: skip
            torch.manual_seed(0)
            trainer.fit(Module(), loader, ckpt_path=checkpoint, **({"weights_only": False} if checkpoint else {}))
            return trainer

        first = fit(2)
        first.save_checkpoint(folder / "middle.ckpt")
        fit(4, str(folder / "middle.ckpt"))
        return losses

    torchs, ours = map(train, pair(name))
    assert_same_curve(ours, torchs)


@every_twin
def test_lightning_fabric(name):
    try:
        from lightning.fabric import Fabric
    except ImportError:
        Fabric = pytest.importorskip("lightning_fabric", reason="no lightning package is installed").Fabric

    def train(optimizer_class):
        fabric = Fabric(accelerator="cpu", devices=1)
        model = new_model()
        opt = optimizer_class(model.parameters(), lr=0.01)
        model, opt = fabric.setup(model, opt)
        loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(new_data(), batch_size=16))
        losses = []
        for batch in loader:
            opt.zero_grad()
            loss = loss_of(model, batch)
            fabric.backward(loss)
            fabric.clip_gradients(model, opt, max_norm=0.1)
            opt.step()
            losses.append(loss.item())
        state = copy.deepcopy(opt.state_dict())
        opt.load_state_dict(state)
        return losses

    torchs, ours = map(train, pair(name))
    assert_same_curve(ours, torchs)
