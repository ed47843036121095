"""IA3 beyond PEFT's layers: after the norms of keys and queries, and inside experts, against the model done by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from koat.adapters.attach import attach_adapter, count_trainable, read_adapter_state, restore_adapter, save_adapter
from koat.adapters.average import StoredAdapter, average_adapters
from koat.adapters.files import WEIGHTS, read_adapter_config, read_adapter_file, read_extra
from koat.adapters.merge import merge_adapter
from koat.adapters.methods import Ia3Settings
from koat.adapters.reach import list_kinds, list_places, route
from koat.adapters.remarks import describe_remarks
from koat.adapters.start import start_from
from koat.core.errors import AdapterError
from koat.forest.verify import verify_layout
from tests.family_models import FAMILIES, make_family, make_family_config
from tests.forest.test_score import assert_same, run_layout, run_single

NORMED = sorted(name for name in FAMILIES if FAMILIES[name].key_norm)
ROUTED = sorted(name for name in FAMILIES if FAMILIES[name].kind in ("mixtral", "qwen3_moe"))
REACHED = sorted({*NORMED, *ROUTED})
WHOLE = Ia3Settings(targets="attention", reach="whole")
IDS = torch.randint(3, 300, (2, 17), generator=torch.Generator().manual_seed(0))


def attach(name: str, randomise, settings: Ia3Settings = WHOLE):
    model = attach_adapter(make_family(name), settings).eval()
    randomise(model)
    return model


def list_own(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return koat's own vectors by the module that they are in."""
    marked = ".rescaling.ia3_l"
    return {
        name.split(marked)[0].removeprefix("base_model.model."): weight
        for name, weight in model.named_parameters()
        if marked in name
    }


@torch.no_grad()
def ask(model) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def scale_by_hand(name: str, own: dict[str, nn.Parameter], model) -> nn.Module:
    """Return a model with PEFT's vectors alone, whose norms' outputs and experts' columns are multiplied by hand."""
    plain = attach_adapter(make_family(name), Ia3Settings(targets="attention")).eval()
    state = {key: value for key, value in model.state_dict().items() if ".rescaling." not in key}
    plain.load_state_dict(state)
    for path, vector in own.items():
        module = plain.get_base_model().get_submodule(path)
        if hasattr(module, "down_proj"):
            experts = module.down_proj.detach()
            del module._parameters["down_proj"]
            module.down_proj = torch.stack([experts[at] * vector[at] for at in range(len(experts))])
        else:
            module.register_forward_hook(lambda _, __, out, vector=vector: out * vector)
    return plain


@pytest.mark.parametrize("name", REACHED)
def test_norms_and_experts_are_rescaled_and_nothing_else(name, randomise) -> None:
    model, family = attach(name, randomise), FAMILIES[name]
    own = list_own(model)
    wanted = {"q_norm", "k_norm"} if family.key_norm and family.kind != "phi" else set()
    wanted |= {"q_layernorm", "k_layernorm"} if family.kind == "phi" else set()
    wanted |= {"experts"} if name in ROUTED else set()
    assert {path.split(".")[-1] for path in own} == wanted
    assert list(own) == list_places(model.get_base_model())

    by_hand = scale_by_hand(name, {path: vector.detach() for path, vector in own.items()}, model)
    torch.testing.assert_close(ask(model), ask(by_hand), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ask(model), ask(attach(name, randomise, Ia3Settings(targets="attention"))), atol=1e-2)


@pytest.mark.parametrize("name", REACHED)
def test_gradients_are_those_of_the_model_done_by_hand(name, randomise) -> None:
    model = attach(name, randomise)
    own = list_own(model)
    model(input_ids=IDS).logits.square().mean().backward()
    leaves = {path: vector.detach().clone().requires_grad_() for path, vector in own.items()}
    by_hand = scale_by_hand(name, leaves, model)
    by_hand(input_ids=IDS).logits.square().mean().backward()
    for path, vector in own.items():
        scale = float(leaves[path].grad.abs().max())
        assert scale > 0
        torch.testing.assert_close(vector.grad, leaves[path].grad, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("name", NORMED)
def test_after_the_norm_a_common_factor_counts(name, randomise) -> None:
    """What the norm takes away from a vector before it, a vector after it can say: sharper attention as a whole."""
    model = attach_adapter(make_family(name), WHOLE).eval()
    before = ask(model)
    with torch.no_grad():
        for path, vector in model.get_base_model().named_parameters():
            if path.endswith("k_proj.ia3_l.default"):
                vector.mul_(3)
    assert torch.allclose(ask(model), before, atol=1e-3)
    with torch.no_grad():
        for path, vector in list_own(model).items():
            if ".k_" in path:
                vector.mul_(3)
    assert not torch.allclose(ask(model), before, atol=1e-2)


@pytest.mark.parametrize("name", REACHED)
def test_saved_restored_switched_off_and_merged(name, randomise, tmp_path) -> None:
    model = attach(name, randomise)
    expected = ask(model)
    save_adapter(model, tmp_path)
    again = restore_adapter(make_family(name), tmp_path)
    assert torch.equal(ask(again.eval()), expected)
    assert not any(weight.requires_grad for weight in again.parameters())
    assert list_own(restore_adapter(make_family(name), tmp_path, trainable=True)).keys() == list_own(model).keys()
    with model.disable_adapter():
        torch.testing.assert_close(ask(model), ask(make_family(name)), rtol=1e-5, atol=1e-5)
    merged = merge_adapter(model)
    for path in list_own(again):
        assert type(merged.get_submodule(path)) is type(make_family(name).get_submodule(path))
    torch.testing.assert_close(ask(merged), expected, rtol=1e-4, atol=1e-5)
    assert merged.state_dict().keys() == make_family(name).state_dict().keys()


@pytest.mark.parametrize("name", REACHED)
def test_forests_are_exact(name, randomise, make_sequences, score_singly) -> None:
    sequences = make_sequences("shared")
    model = attach(name, randomise)
    expected = run_single(model, sequences, score_singly)
    layout, found = verify_layout(model)
    assert found.shares == FAMILIES[name].shares, found.reason
    assert_same(run_layout(model, sequences, layout, 150, 100), expected)


@pytest.mark.parametrize("name", REACHED)
def test_shapes_alone_know_the_count(name) -> None:
    """On the meta device, as `koat plan` asks."""
    kind = type(make_family(name))
    with torch.device("meta"):
        empty = kind(make_family_config(name))
    counted = count_trainable(attach_adapter(empty, WHOLE))
    assert counted == count_trainable(attach_adapter(make_family(name), WHOLE))
    assert counted > count_trainable(attach_adapter(make_family(name), Ia3Settings(targets="attention")))


def test_an_adapter_with_other_places_is_no_start(randomise, tmp_path) -> None:
    model = attach("qwen3", randomise)
    save_adapter(model, tmp_path)
    fresh = attach_adapter(make_family("qwen3"), WHOLE)
    start_from(fresh, tmp_path)
    assert all(torch.equal(read_adapter_state(fresh)[key], value) for key, value in read_adapter_state(model).items())
    with pytest.raises(AdapterError, match="in 4 modules that PEFT does not reach, and the settings want them in 0"):
        start_from(attach_adapter(make_family("qwen3"), Ia3Settings(targets="attention")), tmp_path)


def test_a_base_without_the_place_is_refused(randomise, tmp_path) -> None:
    save_adapter(attach("qwen3", randomise), tmp_path)
    with pytest.raises(AdapterError, match="_norm, and the base model has no such module"):
        restore_adapter(make_family("llama"), tmp_path)


def test_experts_of_another_form_are_refused(monkeypatch) -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    plain = MixtralExperts.forward
    monkeypatch.setattr(MixtralExperts, "forward", lambda self, *args: 2 * plain(self, *args))
    with pytest.raises(AdapterError, match="MixtralExperts does not compute its experts in the form"):
        attach_adapter(make_family("mixtral"), WHOLE)


def test_a_norm_that_is_not_understood_is_not_merged(randomise) -> None:
    model = attach("qwen3", randomise)
    norm = model.get_base_model().model.layers[0].self_attn.k_norm
    plain = type(norm).__mro__[2]
    odd = type("OddNorm", (plain,), {"forward": lambda self, x: plain.forward(self, x) + 1})
    norm.__class__ = type("NormPlaceOdd", (type(norm).__mro__[1], odd), {})
    before = norm.weight.clone()
    with pytest.raises(AdapterError, match="applies its gain is not known"):
        merge_adapter(model)
    assert torch.equal(norm.weight, before)


def test_only_norms_after_rescaled_layers_are_reached(randomise) -> None:
    """Targets may name single layers."""
    named = Ia3Settings(targets=["layers.1.self_attn.k_proj", "v_proj"], reach="whole")
    model = attach("qwen3", randomise, named)
    assert list(list_own(model)) == ["model.layers.1.self_attn.k_norm"]


def test_another_active_adapter_switches_the_vectors_off(randomise) -> None:
    model = attach("qwen3_moe", randomise)
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    torch.testing.assert_close(ask(model), ask(make_family("qwen3_moe")), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("autocast", [False, True])
def test_in_bfloat16_it_is_the_float32_result_rounded(name, autocast, randomise) -> None:
    model = attach(name, randomise)
    expected = ask(model)
    if not autocast:
        model = model.bfloat16()
        for vector in list_own(model).values():
            vector.data = vector.data.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(input_ids=IDS, use_cache=False).logits
    logits.float().square().mean().backward()
    assert (logits.float() - expected).norm() <= 0.1 * expected.norm()
    assert all(vector.grad.dtype == torch.float32 and vector.grad.norm() > 0 for vector in list_own(model).values())


def test_an_unknown_family_is_refused_by_what_to_do(make_config) -> None:
    with pytest.raises(AdapterError, match=r"'mamba' is not in the table\. Leave it out"):
        list_kinds(Ia3Settings(targets=["x_proj"], reach="whole"), make_config("mamba"))


def test_adapters_with_other_places_have_no_mean(randomise, tmp_path) -> None:
    adapters = []
    for number, settings in enumerate((WHOLE, Ia3Settings(targets="attention"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_adapter(attach("qwen3", randomise, settings), folder)
        state = read_adapter_file(folder / WEIGHTS)
        adapters.append(StoredAdapter(str(number), read_adapter_config(folder), read_extra(folder), state))
    with pytest.raises(AdapterError, match="different places beyond PEFT's reach"):
        average_adapters(adapters)
    _, mean = average_adapters([adapters[0], adapters[0]])
    assert all(torch.allclose(mean[key], value) for key, value in adapters[0].state.items())


@pytest.mark.parametrize("settings", [Ia3Settings(reach="whole"), Ia3Settings(targets=["v_proj"], reach="whole")])
def test_where_peft_reaches_all_it_is_said(settings) -> None:
    config = make_family_config("llama")
    assert list_kinds(settings, config) == []
    assert "changes nothing" in " ".join(describe_remarks(settings, config))
    assert "experts too" in " ".join(describe_remarks(Ia3Settings(reach="whole"), make_family_config("mixtral")))


def test_every_choice_of_an_expert_is_routed_once() -> None:
    chosen = torch.tensor([[0, 2], [2, 1], [0, 1]])
    found = {(e, int(t), int(p)) for e, tokens, places in route(chosen, 4) for t, p in zip(tokens, places, strict=True)}
    assert found == {(int(chosen[t, p]), t, p) for t in range(3) for p in range(2)}
