# SPDX-License-Identifier: Apache-2.0
"""Trains a character-level GPT on the Python standard library's text with fastloop.Loop; see docs/training.md.

python benchmarks/train_gpt.py --run-dir runs/gpt              trains, or goes on where the run was killed
python benchmarks/train_gpt.py --run-dir runs/gpt --evaluate   evaluates its best checkpoint, and writes some text
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import fastloop
from fastloop import schedules
from fastloop.bench.chargpt import VOCABULARY, CharGPT, Size, encode, standard_library

VALIDATION = 20  # one window of so many is held out
ALPHABET = [*map(chr, range(32, 127)), "\t", "\n", "?"]  # character of each code of chargpt.encode


class Windows(Dataset[Tensor]):
    """Non-overlapping windows of the text, context + 1 characters long: int64 [context + 1].

    Args:
        text: codes of characters, 1-dim.
        context: characters that the model sees.
        held_out: the windows number 0, VALIDATION, 2 * VALIDATION, ..., or all the others.
    """

    def __init__(self, text: Tensor, context: int, held_out: bool) -> None:
        windows = text[: len(text) // (context + 1) * (context + 1)].view(-1, context + 1)
        chosen = torch.arange(len(windows)) % VALIDATION == 0
        self._windows = windows[chosen if held_out else ~chosen]

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Tensor:
        return self._windows[index]


def loss_fn(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor], int]:
    """Cross-entropy in nats per character, the share of characters guessed right, and how many there are."""
    logits, targets = model(batch[:, :-1]), batch[:, 1:]
    loss = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    right = (logits.detach().argmax(-1) == targets).float().mean()
    return loss, {"accuracy": right}, targets.numel()


def loaders(options: argparse.Namespace) -> tuple[DataLoader[Tensor], DataLoader[Tensor]]:
    text = standard_library()
    train = Windows(text, options.context, held_out=False)
    validation = Windows(text, options.context, held_out=True)
    return (
        DataLoader(train, options.batch, shuffle=True, num_workers=options.workers),
        DataLoader(validation, 4 * options.batch),
    )


def make_loop(options: argparse.Namespace, resume: str | bool) -> fastloop.Loop:
    size = Size(layers=options.layers, width=options.width, heads=4, context=options.context, batch=options.batch)
    torch.manual_seed(options.seed)  # the weights are drawn before the loop seeds everything
    model = CharGPT(size)
    return fastloop.Loop(
        model,
        fastloop.AdamW(model.parameters(), lr=options.lr, weight_decay=0.1, betas=(0.9, 0.95)),
        loss_fn,
        precision=options.precision,
        accumulation_steps=options.accumulation,
        max_grad_norm=1.0,
        schedule=schedules.warmup_cosine(0.05, min_factor=0.1),
        run_dir=options.run_dir,
        resume=resume,
        save_every_steps=options.save_every,
        strategy=options.strategy,
        seed=options.seed,
        compile=options.compile,
        log_every=options.log_every,
        progress=True,
        config=vars(options) | {"run_dir": str(options.run_dir)},
    )


def train(options: argparse.Namespace) -> None:
    train_loader, val_loader = loaders(options)
    loop = make_loop(options, resume="auto")
    loop.fit(train_loader, val_loader, max_steps=options.steps, evaluate_every_steps=options.evaluate_every)
    if loop.ranks.rank == 0:
        for name in ("val/loss", "val/accuracy"):
            print(f"step {loop.history[name][-1][0]}: {name} {loop.history[name][-1][1]:.4f}")


def evaluate(options: argparse.Namespace) -> None:
    loop = make_loop(options, resume="best")
    values = loop.evaluate(loaders(options)[1], name=None)
    if loop.ranks.rank == 0:
        print(f"step {loop.global_step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
    if loop.ranks.size == 1:
        print(written(loop.model, options.context, options.prompt, options.characters))


@torch.no_grad()
def written(model: nn.Module, context: int, prompt: str, count: int) -> str:
    """`prompt`, and `count` characters that the model writes after it, each drawn from its distribution."""
    model.eval()
    codes = encode(prompt).tolist()
    device = next(model.parameters()).device
    for _ in range(count):
        logits = model(torch.tensor([codes[-context:]], device=device))[0, -1]
        codes.append(int(torch.multinomial(torch.softmax(logits.float(), 0), 1)))
    return "".join(ALPHABET[code] for code in codes)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--run-dir", type=Path, default=Path("runs/gpt"), help="checkpoints, logs and curves")
    add("--steps", type=int, default=1500, help="windows of the whole run")
    add("--evaluate", action="store_true", help="do not train: evaluate the best checkpoint and write some text")
    add("--strategy", choices=["ddp", "fsdp2"], help="under torchrun")
    add("--precision", default="fp32", choices=["fp32", "bf16", "fp16", "bf16-pure", "auto"], help="of the training")
    add("--batch", type=int, default=16, help="windows of text in a micro-batch, on each process")
    add("--accumulation", type=int, default=1, help="micro-batches of a step")
    add("--lr", type=float, default=3e-3, help="peak of the schedule")
    add("--layers", type=int, default=4, help="blocks of the model")
    add("--width", type=int, default=96, help="of the model, a multiple of 4")
    add("--context", type=int, default=64, help="characters that the model sees")
    add("--workers", type=int, default=0, help="processes that load data")
    add("--save-every", type=int, default=100, help="steps between two checkpoints")
    add("--evaluate-every", type=int, default=500, help="steps between two evaluations")
    add("--log-every", type=int, default=10, help="steps between two rows of metrics.jsonl")
    add("--compile", action="store_true", help="torch.compile")
    add("--seed", type=int, default=0, help="of everything")
    add("--prompt", default="def ", help="what the text begins with, with --evaluate")
    add("--characters", type=int, default=300, help="that are written, with --evaluate")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    if options.evaluate:
        evaluate(options)
    else:
        train(options)


if __name__ == "__main__":
    assert len(ALPHABET) == VOCABULARY
    main()
