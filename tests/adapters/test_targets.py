"""Names that match nothing are refused, with the nearest name that would."""

from __future__ import annotations

import pytest

from koat.adapters.attach import attach_adapter
from koat.adapters.methods import Ia3Settings, LoraSettings, find_method
from koat.adapters.targets import check_targets, list_linears, read_peft_default
from koat.core.errors import AdapterError


def refuse(make_model, settings, family: str = "llama") -> str:
    """Return the message with which an adapter is refused; the model stays as it was."""
    model = make_model(family)
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(AdapterError) as caught:
        attach_adapter(model, settings)
    assert [name for name, _ in model.named_modules()] == before
    return str(caught.value)


@pytest.mark.parametrize(
    ("family", "wrong", "nearest"),
    [
        ("llama", "k_prj", "k_proj"),
        ("llama", "down_pro", "down_proj"),
        ("llama", "mlp.downproj", "mlp.down_proj"),
        ("gpt_neox", "query_key_valu", "query_key_value"),
        ("gpt2", "cattn", "c_attn"),
    ],
)
@pytest.mark.parametrize("settings", [Ia3Settings, LoraSettings])
def test_a_misspelt_target_is_refused(make_model, settings, family, wrong, nearest) -> None:
    message = refuse(make_model, settings(targets=[wrong]), family)
    assert repr(wrong) in message
    assert f"did you mean '{nearest}'" in message


def test_one_misspelt_target_among_good_ones_is_refused(make_model) -> None:
    """PEFT would train the others and say nothing."""
    message = refuse(make_model, Ia3Settings(targets=["k_proj", "v_prj", "down_proj"], feedforward=["down_proj"]))
    assert "'v_prj'" in message


def test_a_target_that_resembles_nothing_lists_what_there_is(make_model) -> None:
    message = refuse(make_model, LoraSettings(targets=["zzz"]))
    assert "did you mean" not in message
    assert "model.layers.*.self_attn.q_proj" in message
    assert "model.layers.*.mlp.down_proj" in message


def test_part_of_a_name_is_no_match(make_model) -> None:
    assert "'proj'" in refuse(make_model, LoraSettings(targets=["proj"]))
    assert "'self_attn'" in refuse(make_model, LoraSettings(targets=["self_attn"]))


@pytest.mark.parametrize("settings", [Ia3Settings, LoraSettings])
def test_no_targets_at_all(make_model, settings) -> None:
    assert "empty" in refuse(make_model, settings(targets=[]))


@pytest.mark.parametrize(
    ("targets", "feedforward", "nearest"),
    [
        (["k_proj", "v_proj", "down_proj"], ["down_prj"], "down_proj"),
        (["k_proj", "v_proj"], ["down_proj"], None),
        (["k_proj", "down_proj"], ["mlp.down_proj"], "down_proj"),
    ],
)
def test_feedforward_names_must_be_targets(make_model, targets, feedforward, nearest) -> None:
    """Otherwise the inner activation would not be scaled, or the layer's output instead of its input."""
    message = refuse(make_model, Ia3Settings(targets=targets, feedforward=feedforward))
    assert repr(feedforward[0]) in message
    assert "adapter.targets" in message
    if nearest:
        assert f"did you mean '{nearest}'" in message


@pytest.mark.parametrize("targets", ["paper", "peft", "attention", "all-linear"])
def test_feedforward_goes_with_named_targets_only(make_model, targets) -> None:
    """It would have been ignored."""
    message = refuse(make_model, Ia3Settings(targets=targets, feedforward=["down_proj"]))
    assert "adapter.feedforward" in message
    assert "named targets" in message


@pytest.mark.parametrize("settings", [Ia3Settings(), LoraSettings(), Ia3Settings(targets="attention")])
def test_a_family_that_is_not_in_the_table(make_model, settings) -> None:
    message = refuse(make_model, settings, "mamba")
    assert "'mamba'" in message
    assert "gpt_neox" in message
    assert "adapter.targets=" in message
    assert "backbone.layers.*.mixer.in_proj, backbone.layers.*.mixer.x_proj" in message


def test_a_family_that_is_not_in_the_table_takes_names(make_model) -> None:
    model = attach_adapter(make_model("mamba"), Ia3Settings(targets=["in_proj", "x_proj"], feedforward=["x_proj"]))
    vectors = [weight for name, weight in model.named_parameters() if "ia3_l" in name]
    assert sorted(tuple(vector.shape) for vector in vectors) == [(1, 128)] * 3 + [(256, 1)] * 3


def test_a_family_without_a_default_in_peft(make_config) -> None:
    with pytest.raises(AdapterError, match="PEFT has no default targets for the model family 'mamba'"):
        read_peft_default("TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING", make_config("mamba"))


def test_linear_layers_are_listed_once_without_the_head(make_model) -> None:
    names = list_linears(make_model("gpt2"))
    assert names == [f"transformer.h.*.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]


@pytest.mark.parametrize("name", ["q_proj", "self_attn.q_proj", "model.layers.0.self_attn.q_proj", "lm_head"])
def test_names_match_as_peft_matches_them(make_model, name) -> None:
    check_targets(make_model("llama"), [name])
    attach_adapter(make_model("llama"), LoraSettings(targets=[name]))


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(AdapterError, match=r"'ia33'.*did you mean 'ia3'"):
        find_method("ia33")
