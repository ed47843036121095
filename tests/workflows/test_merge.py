"""`koat merge`: a folder that transformers opens alone, checked before it is left, or no folder at all."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import koat
from koat.adapters.attach import attach_adapter, restore_adapter, save_adapter
from koat.adapters.methods import Ia3Settings, LoraSettings
from koat.core.settings import ModelSettings
from koat.model import load_model, load_tokenizer
from koat.quantise.weights import dequantise, list_quantised
from koat.workflows.sharing import merge as merging
from koat.workflows.sharing.merge import merge_run
from tests.tiny_base import VOCABULARY, call_koat, make_environment, make_rows, write_rows

IDS = torch.arange(3, 40)[None]
FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "prompt_template.json"}


@torch.no_grad()
def ask(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids.to(model.device)).logits.float().cpu()
    return logits


def move(folder: Path, spread: float = 0.2) -> None:
    """Move an adapter's tensors far enough from where they began for a difference to show."""
    path = folder / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(0)
    state = {
        name: tensor + spread * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(path).items()
    }
    save_file(state, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def run(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run with an adapter that does something."""
    folder = tmp_path_factory.mktemp("merge") / "run"
    shutil.copytree(finished, folder)
    move(folder / "adapter")
    return folder


def test_the_folder_opens_without_koat(run: Path, tmp_path: Path) -> None:
    status, out, error = call_koat("merge", run, "--out", tmp_path / "merged", "--json")
    assert status == 0, error
    found = json.loads(out)
    assert {path.name for path in (tmp_path / "merged").iterdir()} >= {*FILES, "merge.json"}
    expected = ask(koat.load(run).model)
    torch.save(IDS, tmp_path / "ids.pt")
    code = (
        "import sys; sys.modules['koat'] = sys.modules['peft'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained('merged'); AutoTokenizer.from_pretrained('merged')\n"
        "torch.save(model(input_ids=torch.load('ids.pt')).logits.detach(), 'logits.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=make_environment(), check=True)
    gap = float((torch.load(tmp_path / "logits.pt") - expected).abs().max())
    assert gap <= 1e-4
    assert found["check"]["folder"]["max"] <= 1e-4 < found["check"]["largest_logit"]
    assert found["check"]["source"] == "the run's own data"
    assert json.loads((tmp_path / "merged" / "merge.json").read_text(encoding="utf-8")) == {
        key: value for key, value in found.items() if key != "folder"
    }
    for name in ("tokenizer.json", "prompt_template.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (run / "adapter" / name).read_bytes()
    kinds = [
        json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["tokenizer_class"]
        for folder in (run / "adapter", tmp_path / "merged")
    ]
    assert kinds == ["TokenizersBackend", "PreTrainedTokenizerFast"]


def test_bfloat16_is_rounded_once(run: Path, tmp_path: Path) -> None:
    exact = merge_run(run, tmp_path / "exact", dtype="float32").folder
    done = merge_run(run, tmp_path / "merged", dtype="bfloat16")
    wanted, found = (load_file(folder / "model.safetensors") for folder in (exact, done.folder))
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight.bfloat16()), name
    check = done.record["check"]
    assert check["merging"]["max"] <= 1e-4 < check["folder"]["max"] <= 2 * check["rounding"]["max"] == check["limit"]
    assert json.loads((done.folder / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


def test_a_base_stored_in_bfloat16_is_merged_into_bfloat16(place: Path, tmp_path: Path) -> None:
    """Unless another type is asked for, a merged model is stored as its base is."""
    base = tmp_path / "base"
    shutil.copytree(place / "base", base)
    AutoModelForCausalLM.from_pretrained(place / "base").bfloat16().save_pretrained(base)
    settings = ModelSettings(base=str(base))
    (tmp_path / "adapter").mkdir()
    save_adapter(attach_adapter(load_model(settings), Ia3Settings()), tmp_path / "adapter")
    load_tokenizer(settings).save_pretrained(tmp_path / "adapter")
    move(tmp_path / "adapter")
    for asked, kind in (("auto", torch.bfloat16), ("float32", torch.float32)):
        done = merge_run(tmp_path / "adapter", tmp_path / asked, dtype=asked, settings=settings)
        assert {tensor.dtype for tensor in load_file(done.folder / "model.safetensors").values()} == {kind}
        name = str(kind).removeprefix("torch.")
        assert json.loads((done.folder / "config.json").read_text(encoding="utf-8"))["dtype"] == name
        assert done.record["dtype"] == name


def test_a_wrong_merge_is_not_left(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def merge_wrongly(model: Any) -> Any:
        merged = model.merge_and_unload()
        merged.model.layers[1].mlp.down_proj.weight.data *= 1.01
        return merged

    monkeypatch.setattr(merging, "merge_adapter", merge_wrongly)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(koat.AdapterError, match=r"rounding explains 0\.0001"):
            merge_run(run, tmp_path / "merged", dtype=dtype)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["tensor", "type"])
def test_what_was_written_is_what_is_checked(
    damage: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is opened again: a tensor that saving spoils shows, in whatever type."""
    save = merging.save_company

    def spoil(trained: Any, tokenizer: Any, folder: Path) -> None:
        save(trained, tokenizer, folder)
        path = folder / "model.safetensors"
        state = load_file(path)
        name = "model.layers.0.self_attn.v_proj.weight"
        state[name] = torch.zeros_like(state[name]) if damage == "tensor" else state[name].to(torch.float8_e5m2).half()
        save_file(state, path, metadata={"format": "pt"})

    monkeypatch.setattr(merging, "save_company", spoil)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(koat.AdapterError, match="folder as written"):
            merge_run(run, tmp_path / "merged", dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_products_are_exact_in_a_merge(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, collect = [], merging.collect_logits

    def note(*given: Any) -> Any:
        seen.append(torch.get_float32_matmul_precision())
        return collect(*given)

    monkeypatch.setattr(merging, "collect_logits", note)
    torch.set_float32_matmul_precision("high")
    try:
        merge_run(run, tmp_path / "merged", dtype="bfloat16")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["highest"] * 4


def test_the_tolerance_is_kept(run: Path, tmp_path: Path) -> None:
    with pytest.raises(koat.AdapterError, match="--tolerance"):
        merge_run(run, tmp_path / "merged", tolerance=1e-12)


def test_an_earlier_merge_is_replaced_only_when_asked(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    merge_run(run, out, dtype="float32")
    with pytest.raises(koat.RunFolderError, match="--overwrite"):
        merge_run(run, out)
    assert koat.merge(run, out=out, dtype="bfloat16", overwrite=True).record["dtype"] == "bfloat16"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(koat.RunFolderError, match="no merged model"):
        merge_run(run, tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "letter.txt").read_text(encoding="utf-8") == "dear"


def test_data_that_is_gone_is_replaced_by_sentences(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("rows.jsonl", "gone.jsonl"), encoding="utf-8")
    done = merge_run(tmp_path / "run", tmp_path / "merged")
    assert done.record["check"]["source"] == "built-in sentences"
    assert done.record["check"]["prompts"] == 6


def test_a_plain_peft_folder_is_merged(place: Path, run: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(place / "base")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    model.save_pretrained(tmp_path / "lora")
    move(tmp_path / "lora", 0.1)
    expected = ask(koat.load(tmp_path / "lora").model)
    done = merge_run(tmp_path / "lora", tmp_path / "merged", settings=ModelSettings(base=str(place / "base")))
    assert float((ask(AutoModelForCausalLM.from_pretrained(done.folder)) - expected).abs().max()) <= 1e-4
    assert float((ask(AutoModelForCausalLM.from_pretrained(place / "base")) - expected).abs().max()) > 0.01
    assert AutoTokenizer.from_pretrained(done.folder)("비가")["input_ids"]
    assert not (done.folder / "prompt_template.json").exists()


def test_a_prefix_is_refused_before_any_weight_is_read(place: Path, tmp_path: Path) -> None:
    config = {"peft_type": "PREFIX_TUNING", "base_model_name_or_path": str(tmp_path / "nowhere")}
    (tmp_path / "prefix").mkdir()
    (tmp_path / "prefix" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    status, _, error = call_koat("merge", tmp_path / "prefix", "--out", tmp_path / "merged")
    assert status == 2
    assert "PREFIX_TUNING adapter" in error and "cannot be merged" in error


def test_requantising_asks_for_a_quantised_base(run: Path, tmp_path: Path) -> None:
    with pytest.raises(koat.AdapterError, match="not quantised"):
        merge_run(run, tmp_path / "merged", measure_requantising=True)
    status, _, error = call_koat("merge", run, "--out", tmp_path / "merged", "--requantise")
    assert status == 2 and "the base model is not quantised" in error
    assert not (tmp_path / "merged").exists()


def test_a_chat_template_goes_along(run: Path, tmp_path: Path) -> None:
    """Where it is the tokenizer's, in the tokenizer's file; where there is none, there is no such merge."""
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "prompt_template.json").write_text('{"kind": "chat", "name": "chat"}', encoding="utf-8")
    with pytest.raises(koat.DataError, match="chat template"):
        merge_run(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    chat = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (tmp_path / "adapter" / "chat_template.jinja").write_text(chat, encoding="utf-8")
    done = merge_run(tmp_path / "adapter", tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(done.folder).chat_template == chat


@pytest.mark.parametrize("settings", [Ia3Settings(targets="all-linear"), LoraSettings()], ids=["ia3", "lora"])
def test_a_merged_nano_writes_what_the_adapter_wrote(settings: Any, randomise: Any, tmp_path: Path) -> None:
    """Token for token, float32, greedy."""
    nano = ModelSettings(base="nano", dtype="float32", device="cpu")
    model = attach_adapter(load_model(nano), settings).eval()
    randomise(model, spread=0.05)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "nano"}))
    merged = AutoModelForCausalLM.from_pretrained(merge_run(tmp_path, tmp_path / "merged", dtype="float32").folder)
    adapter, base = restore_adapter(load_model(nano), tmp_path).eval(), load_model(nano)
    tokenizer = load_tokenizer(nano)
    for text in ("이 영화는 정말", "### 질문: 오늘 날씨는?\n\n### 답변:"):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        said = [
            each.generate(input_ids=ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=1)
            for each in (adapter, merged, base)
        ]
        assert torch.equal(said[0], said[1])
        assert not torch.equal(said[0], said[2])


@pytest.mark.parametrize("quantisation", ["nf4-double", "8bit"])
def test_the_base_that_was_trained_on_is_the_one_merged_into(quantisation: str, place: Path, tmp_path: Path) -> None:
    """Codes are of the type that was quantised: by default bfloat16, whatever type the base is stored in."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; quantised bases need it")
    load_tokenizer(ModelSettings(base=str(place / "base"))).save_pretrained(tmp_path / "base")
    shape = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(shape).half().save_pretrained(tmp_path / "base")
    base = {"base": str(tmp_path / "base"), "quantisation": quantisation, "device": "cpu"}
    settings = {
        "model": base, "data": {"train": [str(write_rows(tmp_path / "rows.jsonl", make_rows(8)))]},
        "training": {"max_steps": 1, "batch_size": 4},
    }  # fmt: skip
    run = koat.finetune(settings, out=tmp_path / "run")
    trained = load_model(ModelSettings(**base))
    layers = {name: dequantise(module) for name, module in list_quantised(trained).items()}
    vectors = load_file(run.adapter / "adapter_model.safetensors")
    merged = AutoModelForCausalLM.from_pretrained(merge_run(run.path, tmp_path / "merged", dtype="float32").folder)
    name = "model.layers.0.self_attn.k_proj"
    scale = vectors[f"base_model.model.{name}.ia3_l"].float()
    torch.testing.assert_close(merged.get_submodule(name).weight, scale * layers[name], rtol=1e-6, atol=1e-7)


def test_settings_of_generation_that_transformers_does_not_save(place: Path, finished: Path, tmp_path: Path) -> None:
    """Published bases have a temperature and no sampling; transformers opens such a file and refuses to write it."""
    base = shutil.copytree(place / "base", tmp_path / "base")
    own = {"temperature": 0.9, "top_p": 0.6}
    (base / "generation_config.json").write_text(json.dumps(own), encoding="utf-8")
    settings = {
        "model": {"base": str(base)}, "data": {"train": [str(place / "rows.jsonl")]},
        "adapter": {"method": "full"}, "training": {"max_steps": 1},
    }  # fmt: skip
    run = koat.finetune(settings, out=tmp_path / "full")
    done = merge_run(finished, tmp_path / "merged", settings=ModelSettings(base=str(base)))
    for folder in (run.adapter, done.folder):
        kept = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        assert {name: kept.get(name) for name in own} == own
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_merged_model_stops_where_the_adapter_did(place: Path, finished: Path, tmp_path: Path) -> None:
    """The base names no token to stop at; the tokenizer has the one that responses were trained to end with."""
    for own, expected in (({}, 0), ({"eos_token_id": 7}, 7)):
        base = shutil.copytree(place / "base", tmp_path / f"base{expected}")
        (base / "generation_config.json").write_text(json.dumps(own), encoding="utf-8")
        done = merge_run(finished, tmp_path / f"merged{expected}", settings=ModelSettings(base=str(base)))
        kept = json.loads((done.folder / "generation_config.json").read_text(encoding="utf-8"))
        assert kept["eos_token_id"] == expected


def test_a_tokenizer_with_code_of_its_own_goes_along(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    base = shutil.copytree(place / "base", tmp_path / "base")
    code = (
        "from transformers import PreTrainedTokenizerFast\n\n\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    (base / "tokenization_own.py").write_text(code, encoding="utf-8")
    path = base / "tokenizer_config.json"
    names = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}}
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **names}), encoding="utf-8")
    settings = {
        "model": {"base": str(base), "trust_remote_code": True},
        "data": {"train": [str(place / "rows.jsonl")]}, "training": {"max_steps": 1, "batch_size": 4},
    }  # fmt: skip
    run = koat.finetune(settings, out=tmp_path / "run")
    for name in ("vocab.tiktoken", "spiece.model"):
        (run.adapter / name).write_text("x", encoding="utf-8")
    done = merge_run(run.path, tmp_path / "merged")
    assert {path.name for path in done.folder.iterdir()} >= {"tokenization_own.py", "vocab.tiktoken", "spiece.model"}
    opened = load_tokenizer(ModelSettings(base=str(done.folder), trust_remote_code=True))
    assert type(opened).__name__ == "OwnTokenizer"


def test_a_source_folder_that_is_not_installed_merges(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = importlib.metadata.version

    def find(name: str) -> str:
        if name == "koat":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("importlib.metadata.version", find)
    assert merge_run(run, tmp_path / "merged").record["koat"] == "unknown"


def test_a_type_that_is_none_is_refused(run: Path, tmp_path: Path) -> None:
    for dtype in ("bf16", "int8"):
        with pytest.raises(koat.ConfigError, match="stored as auto, float32, bfloat16, float16"):
            koat.merge(run, out=tmp_path / "merged", dtype=dtype)


@pytest.mark.parametrize("quantisation", ["nf4-double", "8bit"])
def test_a_quantised_base_is_dequantised_first(quantisation: str, randomise: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; quantised bases need it")
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(8))
    settings = {
        "model": {"base": "nano", "quantisation": quantisation, "dtype": "float32", "device": "cpu"},
        "data": {"train": [str(rows)]},
        "training": {"max_steps": 1, "batch_size": 4},
    }
    run = koat.finetune(settings, out=tmp_path / "run")
    move(run.adapter, 0.1)
    expected = ask(koat.load(run.path).model)
    done = merge_run(run.path, tmp_path / "merged", dtype="float32", measure_requantising=True)
    merged = AutoModelForCausalLM.from_pretrained(done.folder)
    plain = ask(restore_adapter(load_model(ModelSettings(base="nano", dtype="float32")), run.adapter).eval())
    found = ask(merged)
    # LLM.int8() also rounds activations; NF4 in float32 computes with the very weights that were merged.
    near, far = float((found - expected).abs().max()), float((plain - expected).abs().max())
    assert near < (1e-3 if quantisation != "8bit" else far) < far + 1e-9
    assert "quantization_config" not in json.loads((done.folder / "config.json").read_text(encoding="utf-8"))
    assert done.record["dequantised_layers"] > 10
    assert done.record["check"]["folder"]["max"] <= 1e-4 < done.record["check"]["requantising"]["max"]
