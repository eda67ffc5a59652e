# SPDX-License-Identifier: Apache-2.0
"""Parameter groups, depths, heads, plans and recipes, on models of torch, torchvision, timm and transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from vision import vision

import fastloop
from fastloop.loop import Loop
from fastloop.recipes.finetune import (
    depth_of,
    finetuning_recipe,
    freeze,
    parameter_groups,
    replace_head,
    suggest_finetuning,
)

TINY_BERT = {
    "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 16,
}  # fmt: skip


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return vision().models.resnet18(num_classes=10)


def tiny_vit(**options: Any) -> nn.Module:
    vision()
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, **{**sizes, **options})


def bert(**options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TINY_BERT, **options))


def gpt2(kind: str = "GPT2LMHeadModel") -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    return getattr(transformers, kind)(config)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def by_depth(model: nn.Module) -> list[set[str]]:
    depth = depth_of(model)
    assert list(depth) == [name for name, _ in model.named_parameters()] or set(depth) == {
        name for name, _ in model.named_parameters()
    }
    return [{name for name, at in depth.items() if at == d} for d in range(max(depth.values()) + 1)]


def tops(layers: list[set[str]], parts: int = 1) -> list[list[str]]:
    return [sorted({".".join(name.split(".")[:parts]) for name in layer}) for layer in layers]


# ---- depth


def test_the_depth_of_a_sequential_is_its_index_and_a_normalization_belongs_to_the_layer_before_it() -> None:
    assert tops(by_depth(mlp())) == [["0", "1"], ["3"], ["5"]]


def test_the_depth_of_a_resnet_goes_by_its_stages() -> None:
    wanted = [["bn1", "conv1"], ["layer1"], ["layer2"], ["layer3"], ["layer4"], ["fc"]]
    assert tops(by_depth(resnet())) == wanted


@pytest.mark.parametrize(("name", "count"), [("vgg11", 11), ("vit_b_16", 14), ("swin_t", 17)])
def test_the_layers_of_torchvision_models_are_counted(name: str, count: int) -> None:
    models = vision().models
    with torch.device("meta"):
        layers = by_depth(getattr(models, name)())
    assert len(layers) == count


def test_the_depth_of_a_timm_model_is_its_own() -> None:
    layers = by_depth(tiny_vit())
    assert tops(layers[1:3], 2) == [["blocks.0"], ["blocks.1", "norm.bias", "norm.weight"]]
    assert tops([layers[0], layers[3]]) == [["cls_token", "patch_embed", "pos_embed"], ["head"]]


def test_the_depth_of_transformers_models_goes_by_their_layers() -> None:
    layers = by_depth(bert())
    assert tops(layers, 2)[0] == ["bert.embeddings"]
    assert tops(layers[1:3], 4) == [["bert.encoder.layer.0"], ["bert.encoder.layer.1"]]
    assert tops(layers[3:]) == [["bert", "classifier"]]
    layers = by_depth(gpt2("GPT2ForSequenceClassification"))
    assert tops(layers, 3) == [
        ["transformer.wpe.weight", "transformer.wte.weight"], ["transformer.h.0"], ["transformer.h.1"],
        ["score.weight", "transformer.ln_f.bias", "transformer.ln_f.weight"],
    ]  # fmt: skip


def test_the_depth_of_other_models_goes_by_the_order_of_registration() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.conv = nn.Conv2d(1, 2, 3)
            self.norm = nn.GroupNorm(1, 2)
            self.hidden = nn.Linear(2, 2)
            self.head = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))

    layers = tops(by_depth(Plain()), 2)
    assert [layer[0].partition(".")[0] for layer in layers] == ["scale", "conv", "hidden", "head", "head"]
    assert layers[1][-1] == "norm.weight"


# ---- groups


def of_name(groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {group["name"]: group for group in groups}


@pytest.mark.parametrize("make", [mlp, resnet, tiny_vit, bert, gpt2])
@pytest.mark.parametrize("options", [{}, {"layer_decay": 0.5}, {"no_decay": False}, {"weight_decay": 0.0}])
def test_every_trained_parameter_is_in_one_group_and_no_other_is_in_any(make: Any, options: dict[str, Any]) -> None:
    model = make()
    frozen = freeze(model, [next(name for name, _ in model.named_parameters())])
    groups = parameter_groups(model, 1e-3, **options)
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for name, p in model.named_parameters() if name not in frozen)
    assert len(of_name(groups)) == len(groups)


def test_norms_biases_and_what_the_model_names_have_no_weight_decay() -> None:
    model = tiny_vit()
    groups = parameter_groups(model, 1e-3, weight_decay=0.1)
    spared = {id(p) for group in groups if group["weight_decay"] == 0.0 for p in group["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in spared) == (p.ndim <= 1 or name in ("pos_embed", "cls_token")), name
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    assert {g["weight_decay"] for g in parameter_groups(model, 1e-3, weight_decay=0.1, no_decay=False)} == {0.1}


def test_layer_decay_is_a_power_of_the_depth_from_the_head() -> None:
    model = resnet()
    groups = parameter_groups(model, 1e-2, layer_decay=0.5, no_decay=False)
    assert [group["lr"] for group in groups] == [1e-2 * 0.5**n for n in (5, 4, 3, 2, 1, 0)]
    assert [group["name"] for group in groups] == [f"depth {n}" for n in range(6)]


def test_the_discriminative_rates_of_the_guideline() -> None:
    model = resnet()
    rates = {"layer[12]": 1e-5, "layer[34]": 1e-4, "fc": 1e-3}
    groups = parameter_groups(model, 1e-5, rates=rates, no_decay=False)
    assert {g["name"]: g["lr"] for g in groups} == {**rates, "others": 1e-5}  # conv1 and bn1 are trained too
    assert of_name(groups)["fc"]["params"] == list(model.fc.parameters())  # type: ignore[union-attr]


def test_the_first_pattern_wins_over_the_head_and_the_depth() -> None:
    model = mlp()
    rates = {"5.bias": 3e-3, "5": 2e-3}
    groups = of_name(parameter_groups(model, 1e-3, rates=rates, layer_decay=0.5, head_lr=1.0, no_decay=False))
    assert [(groups[n]["lr"], len(groups[n]["params"])) for n in ("5.bias", "5")] == [(3e-3, 1), (2e-3, 1)]
    assert "head" not in groups


def test_the_head_has_its_own_rate() -> None:
    groups = of_name(parameter_groups(bert(), 2e-5, head_lr=1e-3, no_decay=False))
    assert {name: g["lr"] for name, g in groups.items()} == {"backbone": 2e-5, "head": 1e-3}
    assert len(groups["head"]["params"]) == 2


@pytest.mark.parametrize("optimizer", [fastloop.AdamW, torch.optim.AdamW, torch.optim.SGD])
def test_optimizers_take_the_groups(optimizer: Any) -> None:
    model = mlp()
    made = optimizer(parameter_groups(model, 1e-3, layer_decay=0.5))
    model(torch.randn(8, 4)).sum().backward()
    made.step()
    assert made.state_dict()["param_groups"][0]["name"] == "depth 0"


def test_groups_of_one_name_keep_their_rates() -> None:
    model = nn.ModuleDict({"others": nn.Linear(4, 4), "rest": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    rates = {"others": 1e-5, "head.weight": 1e-4}
    found = {id(p): group["lr"] for group in parameter_groups(model, 1e-3, rates=rates) for p in group["params"]}
    assert {name: found[id(p)] for name, p in model.named_parameters()} == {
        "others.weight": 1e-5, "others.bias": 1e-5, "rest.weight": 1e-3, "rest.bias": 1e-3, "head.weight": 1e-4,
        "head.bias": 1e-3,
    }  # fmt: skip


def test_a_layer_by_itself_is_a_head() -> None:
    assert {group["lr"] for group in finetuning_recipe(nn.Linear(4, 2)).groups} == {1e-3}
    with pytest.raises(TypeError, match="rates must be learning rates by pattern"):
        parameter_groups(nn.Linear(4, 2), 1e-3, rates=[("weight", 1e-3)])  # type: ignore[arg-type]


def test_a_shared_parameter_is_in_one_group_under_any_of_its_names() -> None:
    groups = of_name(parameter_groups(gpt2(), 1e-3, rates={"lm_head": 1.0}, no_decay=False))
    assert len(groups["lm_head"]["params"]) == 1
    assert groups["lm_head"]["params"][0].shape == (30, 16)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"lr": 0.0}, "lr must be a number above 0"),
        ({"lr": float("nan")}, "lr must be a number above 0"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"layer_decay": 1.5}, r"layer_decay must lie in \(0, 1\]"),
        ({"head_lr": 0.0}, "head_lr"),
        ({"rates": {"0": "fast"}}, r"rates\['0'\]"),
        ({"rates": {"layer9": 1.0}}, "'layer9' matches nothing"),
    ],
)
def test_numbers_and_patterns_that_cannot_be_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parameter_groups(mlp(), **{"lr": 1e-3, **options})


def test_a_model_without_anything_to_train_or_without_a_head_is_refused() -> None:
    model = mlp()
    freeze(model)
    with pytest.raises(ValueError, match="no parameter that is trained"):
        parameter_groups(model, 1e-3)
    with pytest.raises(ValueError, match="no head is found"):
        parameter_groups(nn.Sequential(nn.LayerNorm(3)), 1e-3, head_lr=1.0)


# ---- heads


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet18", "fc"), ("vgg11", "classifier.6"), ("mobilenet_v3_small", "classifier.3"),
        ("vit_b_16", "heads.head"), ("swin_t", "head"), ("densenet121", "classifier"),
        ("convnext_tiny", "classifier.2"), ("squeezenet1_1", "classifier.1"),
    ],
)  # fmt: skip
def test_torchvision_heads_are_found(name: str, head: str) -> None:
    models = vision().models
    with torch.device("meta"):
        model = getattr(models, name)()
        assert replace_head(model, 3) == head
    new = model.get_submodule(head)
    assert new.weight.shape[0] == 3
    assert new.weight.device.type == "meta"


def test_a_new_head_keeps_dtype_bias_and_mode_and_is_trained() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2, bias=False)).double().eval()
    freeze(model)
    assert replace_head(model, 7) == "1"
    assert model[1].weight.shape == (7, 4)
    assert model[1].weight.dtype == torch.float64
    assert model[1].bias is None
    assert not model[1].training
    assert [p.requires_grad for p in model.parameters()] == [False, False, True]


def test_timm_replaces_its_own_head() -> None:
    model = tiny_vit().bfloat16()
    freeze(model)
    assert replace_head(model, 3) == "head"
    assert model.num_classes == 3
    assert {(p.dtype, p.requires_grad, p.shape[0]) for p in model.head.parameters()} == {(torch.bfloat16, True, 3)}  # type: ignore[union-attr]
    assert replace_head(tiny_vit(num_classes=0), 3) == "head"


def test_transformers_hear_of_their_new_number_of_labels() -> None:
    model = bert(num_labels=1)
    model.config.problem_type = "regression"  # as its forward has guessed
    assert replace_head(model, 4) == "classifier"
    batch = {"input_ids": torch.randint(30, (2, 5)), "labels": torch.tensor([0, 3])}
    assert model(**batch).logits.shape == (2, 4)
    assert model.config.num_labels == 4
    assert replace_head(gpt2("GPT2ForSequenceClassification"), 3) == "score"


def test_a_head_that_cannot_be_replaced_is_refused() -> None:
    with pytest.raises(ValueError, match="outputs must be an integer of at least 1, got 0"):
        replace_head(mlp(), 0)
    with pytest.raises(ValueError, match="'2': it is a ReLU; the last one is '5'"):
        replace_head(mlp(), 3, name="2")
    with pytest.raises(ValueError, match="there is none of that name"):
        replace_head(mlp(), 3, name="fc")
    with pytest.raises(ValueError, match="no Linear and no convolution"):
        replace_head(nn.Sequential(nn.LayerNorm(3)), 3)
    with pytest.raises(ValueError, match=r"the weight of 'lm_head' is also 'transformer.wte.weight'"):
        replace_head(gpt2(), 3)


def test_a_named_layer_is_replaced() -> None:
    model = mlp()
    assert replace_head(model, 6, name="3") == "3"
    assert model[3].weight.shape == (6, 8)


# ---- plans


@pytest.mark.parametrize(
    ("samples", "similarity", "strategy", "rates"),
    [
        (500, "high", "feature extraction", None),
        (500, "low", "top layers", (1e-5, 1e-4)),
        (10_000, "high", "all layers", (1e-5, 1e-4)),
        (10_000, "low", "all layers", (1e-4, 1e-3)),
    ],
)
def test_the_guideline_table(samples: int, similarity: str, strategy: str, rates: object) -> None:
    plan = suggest_finetuning(samples, similarity)
    assert (plan.strategy, plan.backbone_lr, plan.head_lr) == (strategy, rates, 1e-3)
    assert strategy in str(plan)
    assert plan.to_json()["strategy"] == strategy


def test_a_model_says_what_small_is_and_what_to_freeze() -> None:
    model = resnet()  # 11.2 million parameters
    assert suggest_finetuning(11_000, "high", model=model).strategy == "feature extraction"
    assert suggest_finetuning(11_500, "high", model=model).strategy == "all layers"
    freeze(model, suggest_finetuning(100, "high", model=model).freeze)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"fc.weight", "fc.bias"}
    assert suggest_finetuning(100, "low", model=model).freeze == ("conv1", "bn1", "layer1", "layer2")


def test_a_question_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="samples must be"):
        suggest_finetuning(0, "high")
    with pytest.raises(ValueError, match='"high" or "low", got \'medium\''):
        suggest_finetuning(10, "medium")


# ---- recipes


def trained(model: nn.Module, recipe: Any, loader: Any, lr_factor: float) -> Loop:
    for group in recipe.groups:
        group["lr"] *= lr_factor  # the models are random, and the steps few
    loop = Loop(
        model,
        fastloop.AdamW(recipe.groups),
        recipe.loss_fn,
        seed=0,
        threads=1,
        loggers=(),
        log_every=1,
        **recipe.options,
    )
    loop.fit(loader, loader, max_steps=20)
    return loop


def mobilenet() -> nn.Module:
    torch.manual_seed(0)
    return vision().models.mobilenet_v3_small(num_classes=10)


def falls(loop: Loop) -> bool:
    losses = [value for _, value in loop.history["train/loss"]]
    return sum(losses[-4:]) < 0.9 * sum(losses[:4])


@pytest.mark.parametrize(("make", "kind", "rates"), [
    (mobilenet, "torch", {1e-5, 1e-4, 1e-3}), (tiny_vit, "timm", {1e-5, 1e-3}),
])  # fmt: skip
def test_images_are_learned(make: Any, kind: str, rates: set[float]) -> None:
    model = make()
    replace_head(model, 2)
    recipe = finetuning_recipe(model)
    assert (recipe.kind, recipe.schedule.name) == (kind, "warmup_cosine")
    assert {group["lr"] for group in recipe.groups} == rates
    x = torch.randn(8, 3, 32, 32)
    loader = DataLoader(TensorDataset(x, (x.mean(dim=(1, 2, 3)) > 0).long()), batch_size=8)
    assert falls(trained(model, recipe, loader, 10.0))


def text(labels: Any) -> DataLoader:
    tokens = torch.randint(1, 30, (16, 6), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": labels(row)} for row in tokens]
    return DataLoader(rows, batch_size=8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "labels"), [(bert, lambda row: (row[0] > 14).long()), (gpt2, lambda row: row)], ids=["bert", "gpt2"]
)
def test_text_is_learned_by_transformers(make: Any, labels: Any) -> None:
    model = make()
    recipe = finetuning_recipe(model, total_steps=20)
    assert (recipe.kind, recipe.schedule.name) == ("transformers", "warmup_linear")
    assert {group["lr"] for group in recipe.groups} == {2e-5}
    assert {group["weight_decay"] for group in recipe.groups} == {0.0, 0.01}
    loop = trained(model, recipe, text(labels), 500.0)
    assert falls(loop)
    assert 0.0 <= loop.history["val/accuracy"][-1][1] <= 1.0


def test_the_accuracy_and_weight_of_a_language_model_are_of_the_next_token() -> None:
    model = gpt2().eval()
    ids = torch.randint(1, 30, (3, 7))
    labels = ids.clone()
    labels[0, 4:] = -100
    with torch.no_grad():
        loss, metrics, weight = finetuning_recipe(model).loss_fn(model, {"input_ids": ids, "labels": labels})
        logits = model(input_ids=ids).logits
    pairs = [(b, t) for b in range(3) for t in range(6) if labels[b, t + 1] != -100]
    losses = [nn.functional.cross_entropy(logits[b, t], labels[b, t + 1]) for b, t in pairs]
    right = [float(logits[b, t].argmax() == labels[b, t + 1]) for b, t in pairs]
    assert int(weight) == len(pairs) == 15
    assert float(loss) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx(sum(right) / len(right))


def test_a_regression_of_transformers_has_no_accuracy() -> None:
    model = bert(num_labels=1).eval()
    batch = {"input_ids": torch.randint(1, 30, (3, 5)), "labels": torch.randn(3)}
    assert isinstance(finetuning_recipe(model).loss_fn(model, batch), torch.Tensor)


@pytest.mark.parametrize(("batch", "got"), [({"input_ids": 1}, "input_ids"), ((1, 2), "tuple")])
def test_a_batch_without_labels_is_refused(batch: Any, got: str) -> None:
    with pytest.raises(TypeError, match=f'mapping with "labels", got .*{got}'):
        finetuning_recipe(bert()).loss_fn(None, batch)


def test_settings_of_a_recipe() -> None:
    model = resnet()
    recipe = finetuning_recipe(model, total_steps=100, lr=1e-2, weight_decay=0.2, warmup=0.5, layer_decay=0.5)
    rates = {group["lr"] for group in recipe.groups}
    assert max(rates) == 1e-2
    assert min(rates) == pytest.approx(1e-2 * 0.5**5)
    assert {group["weight_decay"] for group in recipe.groups} == {0.0, 0.2}
    assert recipe.schedule(50) == 1.0
    assert recipe.schedule(100) == 0.0
    assert recipe.options == {"schedule": recipe.schedule, "max_grad_norm": 1.0}
    lines = str(recipe).splitlines()
    assert lines[0] == "torch"
    assert len(lines) == 2 + len(recipe.groups)
    with pytest.raises(ValueError, match="warmup"):
        finetuning_recipe(model, warmup=500)


def test_a_recipe_is_of_what_is_trained() -> None:
    model = resnet()
    freeze(model)
    replace_head(model, 2)
    assert [group["name"] for group in finetuning_recipe(model).groups] == ["head", "head without decay"]
