# SPDX-License-Identifier: Apache-2.0
"""A loader as JSON: how it loads, of what, in which order, and what is done to its samples as far as it can be seen."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.data import (
    BatchSampler,
    ChainDataset,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from fastloop.loop.loader import distributed_sampler, length_of
from fastloop.loop.plain import LONGEST, name_of, plain

SHUFFLED = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
# What begins the name of a transform that draws random numbers: torchvision's, and others' that go by these names.
MIXING = ("MixUp", "Mixup", "CutMix", "Cutmix", "StagedAugmentation")  # of a collate_fn or a dataset that wraps another
RANDOM = ("Random", "Rand", "AutoAugment", "TrivialAugment", "AugMix", "ColorJitter", "ElasticTransform", *MIXING)
# That do the same to each sample; of the others nobody can tell by the name.
PLAIN = ("Compose", "Identity", "Normalize", "Resize", "CenterCrop", "Pad", "Grayscale", "ToTensor", "ToImage",
         "ToDtype", "ToPILImage", "ToPureTensor", "PILToTensor", "ConvertImageDtype", "FiveCrop")  # fmt: skip
KNOWN = ("torch.utils.data.", "torchvision.datasets.", "builtins.")  # data sets that augment by their transforms alone
COLLATES = ("default_collate", "default_convert")
AUGMENTATIONS = ("transform", "transforms", "augmentation")  # attributes of datasets that say what is done to samples


def described(loader: Any) -> dict[str, Any]:
    """A loader or a dataset of the user's may raise anything."""
    try:
        return _loader(loader)
    except Exception as error:
        return {"class": name_of(loader), "shuffle": None, "error": str(error)[:LONGEST]}


def _loader(loader: Any) -> dict[str, Any]:
    if not isinstance(loader, DataLoader):
        return {"class": name_of(loader), "batches": length_of(loader), "shuffle": None}
    batches = None if type(loader.batch_sampler) is BatchSampler else plain(loader.batch_sampler)
    collate = loader.collate_fn
    return {
        "class": name_of(loader),
        "batches": _length(loader, loader.dataset),
        "batch_size": loader.batch_size or getattr(loader.batch_sampler, "batch_size", None),
        "drop_last": bool(loader.drop_last),
        "sampler": name_of(loader.sampler),
        "batch_sampler": batches,
        "shuffle": _shuffles(loader),
        "num_workers": loader.num_workers,
        "pin_memory": bool(loader.pin_memory),
        "persistent_workers": bool(loader.persistent_workers),
        "prefetch_factor": loader.prefetch_factor,
        "collate_fn": name_of(collate),
        "dataset": _dataset(loader.dataset, name_of(collate).rpartition(".")[2]),
    }


def _length(sized: Any, dataset: Any) -> int | None:
    """None for a ChainDataset: it would run through what it was given, perhaps an iterator that the training needs."""
    return None if isinstance(dataset, ChainDataset) else length_of(sized)


def _shuffles(loader: DataLoader[Any]) -> bool | None:
    """None for a sampler that nobody knows, and for a dataset that gives its own order."""
    if loader.batch_sampler is not None and type(loader.batch_sampler) is not BatchSampler:
        return None
    divided = distributed_sampler(loader)
    if divided is not None:
        return bool(divided.shuffle)
    if isinstance(loader.sampler, SHUFFLED):
        return True
    return False if isinstance(loader.sampler, SequentialSampler) else None


def _dataset(dataset: Any, collate: str) -> dict[str, Any]:
    """Through subsets and wrappers that keep what they wrap in `dataset`, or several in `datasets`.

    "random" is None where a transform, a dataset or a collate_fn may be: it is the user's own.
    """
    transforms: list[str] = []
    classes: list[str] = []
    pending = [dataset]
    seen: set[int] = set()
    while pending and len(seen) < 20:
        each = pending.pop(0)
        if id(each) in seen:
            continue
        seen.add(id(each))
        classes.append(name_of(each))
        for attribute in AUGMENTATIONS:
            transforms += _transforms(getattr(each, attribute, None))
        several = getattr(each, "datasets", None)  # of a ChainDataset perhaps an iterator, which the training needs
        inner = [getattr(each, "dataset", None), *(several if isinstance(several, (list, tuple)) else ())]
        pending += [one for one in inner if one is not None]
    known, names = list(dict.fromkeys(transforms)), [each.rpartition(".")[2] for each in classes]
    random: bool | None = any(name.startswith(RANDOM) for name in known)
    random = random or any(name.startswith(MIXING) for name in [*names, collate])  # a RandomTokens is data
    seen_through = known or all(each.startswith(KNOWN) for each in classes)
    if not random and not (seen_through and all(name in PLAIN for name in known) and collate in COLLATES):
        random = None
    return {"class": name_of(dataset), "length": _length(dataset, dataset), "transforms": known, "random": random}


def _transforms(given: Any, depth: int = 0) -> list[str]:
    """The names of transforms, those inside of others too."""
    if given is None or depth > 5:
        return []
    if isinstance(given, (list, tuple)):
        return [name for each in given for name in _transforms(each, depth + 1)]
    inner = getattr(given, "transforms", None)
    if isinstance(inner, (list, tuple, nn.ModuleList)):
        return _transforms(list(inner), depth + 1)
    pair = [getattr(given, name, None) for name in ("transform", "target_transform")]
    if type(given).__name__ == "StandardTransform":  # torchvision's pair of the two
        return [name for each in pair for name in _transforms(each, depth + 1)]
    return [name_of(given).rpartition(".")[2]]
