"""Base models: what cannot be loaded is said in one message; nothing is unpickled, nothing is left random."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from koat.core.errors import ModelError
from koat.core.settings import ModelSettings
from koat.model import (
    build_empty,
    find_commit,
    fingerprint_base,
    load_config,
    load_model,
    load_tokenizer,
    locate_base,
    pick_attention,
    pick_device,
    pick_dtype,
)
from tests.hub_cache import NAME, cache_base

WEIGHTS = "model.safetensors"
IDS = torch.arange(3, 20)[None]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def base(make_model, tmp_path) -> Path:
    """Return the folder of a good tiny Llama, with a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path / "tiny-llama"
    make_model("llama").save_pretrained(str(folder))
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "?"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def settle(folder: Path | str, **others) -> ModelSettings:
    return ModelSettings(base=str(folder), device="cpu", **others)


def refuse(load, settings: ModelSettings) -> str:
    with pytest.raises(ModelError) as caught:
        load(settings)
    return str(caught.value)


def test_the_good_one_loads(make_model, base) -> None:
    model = load_model(settle(base))
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, make_model("llama")(input_ids=IDS).logits)
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert load_tokenizer(settle(base))("b a")["input_ids"] == [1, 0]
    assert load_config(settle(base)).vocab_size == 300


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_come_in_the_type_asked_for(base, dtype) -> None:
    model = load_model(settle(base, dtype=dtype))
    assert {weight.dtype for weight in model.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_the_one_asked_for(base, attention) -> None:
    assert load_model(settle(base, attention=attention)).config._attn_implementation == attention


# ------------------------------------------------------------------------------------------- where it is


def test_a_missing_folder_names_the_nearest(base) -> None:
    message = refuse(load_config, settle(base.with_name("tiny-lama")))
    assert "does not exist" in message
    assert "did you mean 'tiny-llama'" in message


@pytest.mark.parametrize("where", ["./nowhere", "~/nowhere-at-all", "/nowhere/at/all", "some/deep/folder"])
def test_a_path_is_not_taken_for_a_hub_id(where) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        locate_base(where)


@pytest.mark.parametrize("where", ["~nobody-of-this-name/model", "a" * 400])
def test_a_path_that_the_system_does_not_know(where) -> None:
    with pytest.raises(ModelError, match="is no folder and no Hub id"):
        locate_base(where)


def test_a_folder_in_ones_home_is_looked_into(base, monkeypatch) -> None:
    """Advice for a pickle is given where the folder is, not where its name would be."""
    monkeypatch.setenv("HOME", str(base.parent))
    (base / WEIGHTS).rename(base / "pytorch_model.bin")
    message = refuse(load_model, settle("~/tiny-llama"))
    assert "no pickled weights (.bin)" in message
    (base / "tokenizer.json").write_text("{", encoding="utf-8")
    assert "Hub id" not in refuse(load_tokenizer, settle("~/tiny-llama"))


def test_a_hub_id_is_left_alone() -> None:
    assert locate_base("EleutherAI/polyglot-ko-5.8b") == "EleutherAI/polyglot-ko-5.8b"
    assert locate_base("gpt2") == "gpt2"


def test_a_file_instead_of_a_folder(base) -> None:
    with pytest.raises(ModelError, match=r"is a file\. Give the model folder"):
        locate_base(str(base / WEIGHTS))


def test_a_folder_without_configuration(base) -> None:
    (base / "config.json").unlink()
    for load in (load_config, load_model, load_tokenizer):
        assert "holds no config.json" in refuse(load, settle(base))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": "no-such-family"}'])
def test_a_broken_configuration(base, content) -> None:
    (base / "config.json").write_text(content, encoding="utf-8")
    assert str(base) in refuse(load_config, settle(base))


def change_config(base: Path, **values) -> None:
    stored = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps({**stored, **values}), encoding="utf-8")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"hidden_size": "64"}, "Field 'hidden_size' expected int, got str"),
        ({"num_hidden_layers": None}, "Field 'num_hidden_layers' expected int"),
        ({"num_attention_heads": 5}, "hidden size (64) is not a multiple of the number of attention"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"dtype": "bfloat"}, "AttributeError: module 'torch' has no attribute 'bfloat'"),
        ({"quantization_config": 3}, "AttributeError"),
    ],
)
def test_a_configuration_with_values_that_cannot_be(base, values, said) -> None:
    change_config(base, **values)
    for load in (load_config, load_model):
        message = refuse(load, settle(base))
        assert said in message and str(base) in message and "\n" not in message


@pytest.mark.parametrize(("values", "said"), [({"hidden_act": "nope"}, "'nope'"), ({"hidden_size": -64}, "negative")])
def test_a_configuration_that_no_model_can_be_built_from(base, values, said) -> None:
    change_config(base, **values)
    assert said in refuse(load_model, settle(base))
    with pytest.raises(ModelError, match=r"No causal model can be built from the configuration of .*tiny-llama"):
        build_empty(load_config(settle(base)))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_who_stops_a_loading_is_heard(base, monkeypatch, error) -> None:
    def stop(*given, **more):
        raise error

    for name, load in [("AutoConfig", load_config), ("AutoTokenizer", load_tokenizer)]:
        with monkeypatch.context() as patch:
            patch.setattr(f"transformers.{name}.from_pretrained", stop)
            with pytest.raises(type(error)):
                load(settle(base))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), None])
def test_a_model_that_does_not_fit_is_said_with_what_to_do(base, monkeypatch, error) -> None:
    def run_out(*given, **more):
        if error:
            raise error
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", run_out)
    assert "larger than the memory that is free: see `koat plan --fit`" in refuse(load_model, settle(base))


def test_a_folder_without_tokenizer(base) -> None:
    (base / "tokenizer.json").unlink()
    (base / "tokenizer_config.json").unlink()
    message = refuse(load_tokenizer, settle(base))
    assert "has no tokenizer" in message
    assert "tokenizer.json" in message


def test_a_broken_tokenizer(base) -> None:
    (base / "tokenizer.json").write_text("{", encoding="utf-8")
    assert "tokenizer" in refuse(load_tokenizer, settle(base))


@pytest.mark.parametrize("values", [{"model": {"type": "Nope"}}, {"pre_tokenizer": {"type": "Nope"}}])
def test_a_tokenizer_of_another_version(base, values) -> None:
    """The library of tokenizers says it by a plain Exception."""
    stored = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    (base / "tokenizer.json").write_text(json.dumps({**stored, **values}), encoding="utf-8")
    assert "The tokenizer of the base model" in refuse(load_tokenizer, settle(base))


# ------------------------------------------------------------------------------------------- its weights


def test_no_weights(base) -> None:
    (base / WEIGHTS).unlink()
    assert "weights" in refuse(load_model, settle(base))


def test_only_a_pickle(base) -> None:
    """It is not opened: this one would tell."""
    (base / WEIGHTS).unlink()
    (base / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    message = refuse(load_model, settle(base))
    assert "no pickled weights (.bin)" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_weights_that_break_off(base, keep) -> None:
    path = base / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    assert "weights" in refuse(load_model, settle(base))


def test_weights_with_a_tensor_missing(base) -> None:
    """Left alone, it would be drawn at random."""
    state = load_file(str(base / WEIGHTS))
    state.pop("model.layers.1.mlp.down_proj.weight")
    save_file(state, str(base / WEIGHTS), metadata={"format": "pt"})
    message = refuse(load_model, settle(base))
    assert "model.layers.1.mlp.down_proj.weight" in message


def test_weights_of_another_shape(base) -> None:
    state = load_file(str(base / WEIGHTS))
    state["model.layers.1.mlp.down_proj.weight"] = torch.zeros(64, 7)
    save_file(state, str(base / WEIGHTS), metadata={"format": "pt"})
    message = refuse(load_model, settle(base))
    assert "weights" in message
    assert len(message) < 1500


def test_tied_weights_are_not_missing(make_model, tmp_path) -> None:
    make_model("gpt2").save_pretrained(str(tmp_path))
    assert not any("lm_head" in name for name in load_file(str(tmp_path / WEIGHTS)))
    model = load_model(settle(tmp_path))
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, make_model("gpt2")(input_ids=IDS).logits)


def test_remote_code_is_not_run(base, tmp_path) -> None:
    ran = tmp_path / "ran"
    (base / "custom.py").write_text(f"open({str(ran)!r}, 'w').write('x')\n", encoding="utf-8")
    stored = json.loads((base / "config.json").read_text(encoding="utf-8"))
    stored |= {"model_type": "stranger", "auto_map": {"AutoConfig": "custom.Config"}}
    (base / "config.json").write_text(json.dumps(stored), encoding="utf-8")
    message = refuse(load_config, settle(base))
    assert "model.trust_remote_code=true" in message
    assert not ran.exists()


# --------------------------------------------------------------------------------------- device and type


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "", "cpu0", "mps", "xpu", "meta", "hpu:0", "cuda:-1"])
def test_a_device_that_koat_does_not_run_on(device) -> None:
    with pytest.raises(ModelError, match=r"is no device that koat runs on\. Use auto, cpu, cuda or cuda:0"):
        pick_device(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:3"])
def test_cuda_without_a_gpu(base, device) -> None:
    with pytest.raises(ModelError, match=r"no CUDA GPU here. Use cpu or auto"):
        load_model(ModelSettings(base=str(base), device=device))


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
@pytest.mark.parametrize(("device", "number"), [("auto", 1), ("cuda", 1), ("cuda:2", 2), ("cpu", None)])
def test_weights_are_read_onto_the_gpu_that_works_here(base, monkeypatch, device, number, quantisation) -> None:
    """Never through the host's memory whole, and under torchrun each process onto its own."""
    if quantisation != "none":
        pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    given, load = {}, AutoModelForCausalLM.from_pretrained

    def note(where, **options):
        given.update(options)
        return load(where, config=options["config"], output_loading_info=True)

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", note)
    for name, value in [("is_available", True), ("device_count", 4), ("current_device", 1)]:
        monkeypatch.setattr(f"torch.cuda.{name}", lambda value=value: value)
    load_model(ModelSettings(base=str(base), device=device, quantisation=quantisation))
    if number is not None:
        assert given["device_map"] == {"": torch.device("cuda", number)}
    elif quantisation == "none":
        assert "device_map" not in given


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_that_is_read_onto_its_device_is_like_any_other(make_model, tmp_path, monkeypatch, family) -> None:
    """No hooks of accelerate, weights that are one stay one, and it may be moved."""
    make_model(family).save_pretrained(str(tmp_path))
    monkeypatch.setattr("koat.model.make_loading_options", lambda *_: {"device_map": {"": torch.device(DEVICE)}})
    model, plain = load_model(settle(tmp_path)), make_model(family)
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    assert len({id(weight) for weight in model.parameters()}) == len({id(weight) for weight in plain.parameters()})
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {DEVICE}
    model.to("meta")
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}


def test_automatic_choices() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert pick_device("auto").type == expected
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert pick_dtype("float16", torch.device("cpu")) == torch.float16


def test_attention_that_the_family_lacks(make_model, tmp_path) -> None:
    make_model("gptj").save_pretrained(str(tmp_path))
    assert "scaled_dot_product_attention" in refuse(load_model, settle(tmp_path, attention="sdpa"))


def test_capped_scores_are_not_left_to_a_kernel_that_knows_no_caps(make_config) -> None:
    """transformers takes SDPA for Gemma 2, which leaves the caps out and says nothing."""
    config = make_config("gemma2", attn_logit_softcapping=0.5)
    assert pick_attention("auto", config) == pick_attention("eager", config) == "eager"
    assert pick_attention("flex", config) == "flex_attention"
    with pytest.raises(ModelError, match=r"model\.attention=sdpa leaves out the cap of 0\.5"):
        pick_attention("sdpa", config)
    assert pick_attention("sdpa", make_config("gemma2", attn_logit_softcapping=None)) == "sdpa"
    assert pick_attention("sdpa", make_config("llama")) == "sdpa"


def test_a_loaded_gemma_2_caps_its_scores(make_model, tmp_path) -> None:
    capped = make_model("gemma2", "eager", attn_logit_softcapping=0.01)
    capped.save_pretrained(str(tmp_path))
    with torch.no_grad():
        expected, found = (model(input_ids=IDS).logits for model in (capped, load_model(settle(tmp_path))))
        capped.config._attn_implementation = "sdpa"
        uncapped = capped(input_ids=IDS).logits
    torch.testing.assert_close(found, expected)
    assert (uncapped - expected).abs().max() > 1e-3
    assert "Use model.attention=auto or eager" in refuse(load_model, settle(tmp_path, attention="sdpa"))


# ------------------------------------------------------------------------------------------- fingerprint


def test_a_fingerprint_tells_bases_apart(base) -> None:
    def take() -> str:
        return fingerprint_base(settle(base), load_config(settle(base)))

    first = take()
    assert take() == first
    state = load_file(str(base / WEIGHTS))
    state["model.norm.weight"] += 1
    save_file(state, str(base / WEIGHTS), metadata={"format": "pt"})
    second = take()
    assert second != first
    stored = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps({**stored, "rms_norm_eps": 0.1}), encoding="utf-8")
    assert take() not in {first, second}


COMMITS = ["a" * 40, "b" * 40]


def test_a_hub_id_has_the_fingerprint_of_its_files(base, hub_cache) -> None:
    """A local copy is the same base, and so is a later commit that left the weights alone."""
    expected = fingerprint_base(settle(base), load_config(settle(base)))
    for commit in COMMITS:
        cache_base(hub_cache, base, commit)
        settings = settle(NAME)
        config = load_config(settings)
        assert find_commit(settings, config) == commit
        assert fingerprint_base(settings, config) == expected


def test_a_stale_index_beside_whole_weights_hides_nothing(base) -> None:
    """transformers loads model.safetensors where it is there."""
    index = base / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}), encoding="utf-8")
    first = fingerprint_base(settle(base), load_config(settle(base)))
    state = load_file(str(base / WEIGHTS))
    state["model.norm.weight"] += 1
    save_file(state, str(base / WEIGHTS), metadata={"format": "pt"})
    assert fingerprint_base(settle(base), load_config(settle(base))) != first
    (base / WEIGHTS).unlink()
    index.write_text("[]", encoding="utf-8")
    with pytest.raises(ModelError, match="no index of weights"):
        fingerprint_base(settle(base), load_config(settle(base)))


def test_a_hub_id_without_its_weights_is_told_by_its_commit(base, hub_cache) -> None:
    found = set()
    for commit in COMMITS:
        cache_base(hub_cache, base, commit, weights=False)
        settings = settle(NAME)
        found.add(fingerprint_base(settings, load_config(settings)))
    assert len(found) == 2 and fingerprint_base(settle(base), load_config(settle(base))) not in found


def test_a_fingerprint_does_not_hang_on_what_transformers_adds(base, monkeypatch) -> None:
    """A release that gives a configuration one more attribute makes no other model of it."""
    config = load_config(settle(base))
    before = fingerprint_base(settle(base), config)
    plain = type(config).to_dict
    monkeypatch.setattr(type(config), "to_dict", lambda self: {**plain(self), "came_later": 1})
    assert fingerprint_base(settle(base), load_config(settle(base))) == before


@pytest.mark.parametrize("device", ["cuda:1", "cuda:7"])
def test_a_gpu_that_is_not_there(monkeypatch, device) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ModelError, match=f"{device} was asked for, and PyTorch sees 1 GPUs"):
        pick_device(device)


def test_a_missing_shard_is_not_called_a_pickle(base) -> None:
    (base / WEIGHTS).rename(base / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert "pickled" not in refuse(load_model, settle(base))


def test_code_that_was_trusted_is_trusted_without_weights_too(base, tmp_path) -> None:
    code = (
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    (base / "own.py").write_text(code, encoding="utf-8")
    stored = json.loads((base / "config.json").read_text(encoding="utf-8"))
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (base / "config.json").write_text(json.dumps({**stored, "model_type": "own_llama", "auto_map": names}))
    config = load_config(settle(base, trust_remote_code=True))
    assert type(build_empty(config)).__name__ == "OwnModel"
