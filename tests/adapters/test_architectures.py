"""The table against the models themselves: names, and what each linear layer feeds."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface

from koat.adapters.architectures import ARCHITECTURES, find_architecture, mark_queries
from koat.core.errors import AdapterError

FAMILIES = ["gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gpt2"]
IDS = torch.randint(3, 300, (1, 9), generator=torch.Generator().manual_seed(0))


def list_block_linears(model) -> list[str]:
    """Return the names of the first block's linear layers."""
    block = next(name for name, _ in model.named_modules() if name.endswith(".0"))
    kinds = ("Linear", "Conv1D")
    return [n for n, m in model.named_modules() if n.startswith(f"{block}.") and type(m).__name__ in kinds]


def capture(model, perturbed: str | None = None):
    """Return the first layer's (query, key, value) and the final logits, one linear layer's output perturbed."""
    seen: list[tuple[torch.Tensor, ...]] = []

    def spy(module, query, key, value, attention_mask, **others):
        seen.append((query, key, value))
        groups = query.shape[1] // key.shape[1]
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), is_causal=True
        )
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("table_spy", spy)
    model.config._attn_implementation = "table_spy"
    hooks = []
    if perturbed:
        layer = model.get_submodule(perturbed)
        # No factor, which a norm would take away again, and no constant, which a softmax over keys would.
        hooks = [layer.register_forward_hook(lambda _, __, out: out + out.roll(1, -1))]
    with torch.no_grad():
        logits = model(input_ids=IDS, position_ids=torch.zeros_like(IDS), use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return seen[0], logits


def test_the_table_covers_the_promised_families() -> None:
    assert set(FAMILIES) <= set(ARCHITECTURES)


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_are_all_of_a_block_once(make_model, family) -> None:
    model = make_model(family)
    names = list_block_linears(model)
    table = find_architecture(model.config).linears
    assert len(table) == len(set(table)) == len(names)
    for name in names:
        assert sum(name.endswith(f".{ending}") for ending in table) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_are_what_they_feed(make_model, family) -> None:
    """Perturb each linear layer in turn and see which of query, key and value move."""
    model = make_model(family)
    architecture = find_architecture(model.config)
    plain, logits = capture(model)
    for name in list_block_linears(model):
        states, other = capture(model, perturbed=name)
        moved = [not torch.allclose(one, two, atol=1e-6) for one, two in zip(states, plain, strict=True)]
        roles = (architecture.query, architecture.key, architecture.value)
        assert moved == [name.endswith(f".{role}") for role in roles]
        assert not torch.allclose(other, logits, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_inner_layer_takes_the_activation(make_model, family) -> None:
    """Its input is as wide as the feed-forward, and is made by exactly the `up` layers."""
    model = make_model(family)
    architecture = find_architecture(model.config)
    names = list_block_linears(model)
    (inner,) = [name for name in names if name.endswith(f".{architecture.inner}")]
    inputs: list[torch.Tensor] = []
    model.get_submodule(inner).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    block = model.get_submodule(inner.rsplit(".", 1)[0])
    hidden = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        block(hidden)
        for name in names:
            layer = model.get_submodule(name)
            hook = layer.register_forward_hook(lambda _, __, out: out + 1)
            block(hidden)
            hook.remove()
            changed = not torch.equal(inputs[-1], inputs[0])
            assert changed == any(name.endswith(f".{up}") for up in architecture.up)
    assert inputs[0].shape[-1] == (256 if family == "gpt2" else 96)


@pytest.mark.parametrize("family", FAMILIES)
def test_key_norm_is_where_a_key_scale_vanishes(make_model, family) -> None:
    model = make_model(family)
    architecture = find_architecture(model.config)
    if architecture.fused:
        assert not architecture.key_norm
        return
    (_, plain, _), _ = capture(model)
    name = next(n for n in list_block_linears(model) if n.endswith(architecture.key))
    model.get_submodule(name).register_forward_hook(lambda _, __, out: out * 3)
    (_, scaled, _), _ = capture(model)
    vanished = torch.allclose(scaled, plain, atol=1e-4)
    assert vanished == (architecture.key_norm is not None)


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])
def test_marked_outputs_are_the_queries(make_model, family) -> None:
    """Perturb single outputs of the fused projection and see whether a query moves."""
    model = make_model(family)
    marks = mark_queries(find_architecture(model.config), model.config)
    name = next(n for n in list_block_linears(model) if n.endswith(find_architecture(model.config).query))
    layer = model.get_submodule(name)
    plain, _ = capture(model)
    assert marks.shape == (192,)
    for index in range(0, 192, 5):
        hook = layer.register_forward_hook(lambda _, __, out, i=index: out + torch.eye(192)[i])
        (query, _, _), _ = capture(model)
        hook.remove()
        assert (not torch.allclose(query, plain[0], atol=1e-6)) == bool(marks[index])


def test_an_unknown_family_is_told_how_to_go_on(make_config) -> None:
    with pytest.raises(AdapterError) as caught:
        find_architecture(make_config("mamba"))
    message = str(caught.value)
    assert "'mamba'" in message
    assert all(family in message for family in FAMILIES)
    assert "adapter.targets=[" in message
