"""`koat push`: what is shown is what is sent, against a local server that speaks the Hub's protocol."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

from koat.core.errors import AdapterError, HubError, RunFolderError
from koat.report.card import CardFacts, describe_scores, describe_use
from koat.workflows.sharing.merge import merge_run
from koat.workflows.sharing.push import prepare_upload, public_settings, send_upload
from tests.tiny_base import call_koat
from tests.workflows.local_hub import TOKEN, LocalHub

SCORE = {"value": 0.75, "low": 0.6, "high": 0.86, "num_items": 40, "meaningful": True}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    """A local Hub that the environment points to."""
    # Xet has a protocol of its own, spoken by native code with servers of its own.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with LocalHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """The finished run with a score on record."""
    shutil.copytree(finished, tmp_path / "run")
    predictions = tmp_path / "run" / "predictions"
    predictions.mkdir()
    result = {
        "task": "nsmc-prompt1", "num_shots": 10, "scores": {"likelihood": SCORE},
        "contracts": {"likelihood": {"hash": "0123456789abcdef"}}, "conditions": {"hash": "fedcba9876543210"},
    }  # fmt: skip
    (predictions / "one.scores.json").write_text(json.dumps({"subject": "run", "results": [result]}), encoding="utf-8")
    return tmp_path / "run"


def test_a_dry_run_shows_everything_and_sends_nothing(hub: LocalHub, run: Path, place: Path) -> None:
    status, out, error = call_koat("push", run, "me/mine", "--dry-run", "--licence", "mit")
    assert status == 0, error
    assert hub.kept.seen == []
    for name in prepare_upload(run, "me/mine").files:
        assert name in out
    for text in ("license: mit", "75.0 % (60.0–86.0)", "0123456789abcdef", "| 10 |", "rows.jsonl", "nothing was sent"):
        assert text in out
    assert str(place) not in out


def test_the_adapter_arrives_byte_for_byte(hub: LocalHub, run: Path, place: Path) -> None:
    status, out, error = call_koat("push", run, "me/mine", "--private", "--base", "owner/base", "--licence", "mit")
    assert status == 0, error
    assert f"sent: {hub.address}/me/mine/commit/" in out
    (created,) = hub.kept.created
    assert created["visibility"] == "private"
    assert hub.kept.commits == 1
    arrived = hub.kept.files["me/mine"]
    kept = {path.name: path.read_bytes() for path in (run / "adapter").iterdir()}
    assert arrived.keys() == {*kept, "README.md"}
    for name, content in kept.items():
        if name != "adapter_config.json":
            assert arrived[name] == content, name
    stored, sent = (json.loads(each["adapter_config.json"]) for each in (kept, arrived))
    assert sent == {**stored, "base_model_name_or_path": "owner/base"}
    assert not any(str(place).encode() in content for content in arrived.values())


def test_data_files_of_one_name_stand_apart_in_the_card(run: Path) -> None:
    path = run / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["data"] = {f"/secret/{name}/rows.tsv": {"sha256": name * 64, "bytes": 7} for name in "ab"}
    path.write_text(json.dumps(manifest), encoding="utf-8")
    card = prepare_upload(run, "me/mine").card
    for name in "ab":
        assert f"| {name}/rows.tsv | `{name * 64}` | 7 |" in card
    assert "secret" not in card


def read_front_matter(card: str) -> Any:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_says_what_a_reader_must_know(hub: LocalHub, run: Path) -> None:
    card = prepare_upload(run, "me/mine", base="owner/base", licence="mit").card
    assert read_front_matter(card) == {
        "license": "mit", "library_name": "peft", "pipeline_tag": "text-generation", "tags": ["koat", "IA3"],
        "base_model": "owner/base", "base_model_relation": "adapter",
    }  # fmt: skip
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    (data,) = manifest["data"].values()
    for text in (data["sha256"], manifest["base"]["fingerprint"], f"{manifest['trainable_parameters']:,}"):
        assert text in card
    settings = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert settings["training"]["max_steps"] == 6
    assert settings["adapter"]["method"] == "ia3"
    assert "| nsmc-prompt1 | likelihood | 10 | 40 | 75.0 % (60.0–86.0) | `0123456789abcdef` |" in card
    assert '"me/mine"' in card and "### 질문: {instruction}" in card
    assert public_settings({"adapter": {"method": "ia3", "start": str(run), "targets": None}}) == {
        "adapter": {"method": "ia3", "start": "run"}
    }
    assert "Plain PEFT opens" not in card
    facts = CardFacts("mine", "IA3", "owner/base", "mit", places=["mlp.experts"])
    assert "without its vectors in mlp.experts" in describe_use(facts)
    assert "without its vectors" not in describe_use(replace(facts, merge={"dtype": "float32"}))
    # Without the Hub's name for it, a folder of this machine is no base that a card could link to.
    assert "base_model" not in read_front_matter(prepare_upload(run, "me/mine").card)


def test_a_score_that_is_no_share_is_no_percentage() -> None:
    key = {"task": "news", "scoring": "bleu", "shots": 0, "contract": "c", "meaningful": True, "num_items": 40}
    card = describe_scores([{**key, "value": 23.41, "low": 20.6, "high": 26.2}])
    assert "| score (95 % interval) |" in card and "accuracy" not in card
    assert "| news | bleu | 0 | 40 | 23.41 (20.6–26.2) | `c` |" in card


def test_a_merged_model_arrives(hub: LocalHub, run: Path, place: Path, tmp_path: Path) -> None:
    merged = merge_run(run, tmp_path / "merged").folder
    (merged / "notes.txt").write_text("private", encoding="utf-8")
    upload = prepare_upload(run, "me/whole", merged=merged)
    address = send_upload(upload)
    assert address.startswith(f"{hub.address}/me/whole/commit/")
    arrived = hub.kept.files["me/whole"]
    assert arrived["model.safetensors"] == (merged / "model.safetensors").read_bytes()
    assert {"config.json", "tokenizer.json", "merge.json", "prompt_template.json"} <= arrived.keys()
    assert "notes.txt" not in arrived and "adapter_model.safetensors" not in arrived
    assert {name: len(content) for name, content in arrived.items()} == upload.list_sizes()
    assert "Merged in float32" in arrived["README.md"].decode()
    assert not any(str(place).encode() in content or str(tmp_path).encode() in content for content in arrived.values())


def test_another_runs_merge_is_refused(hub: LocalHub, run: Path, tmp_path: Path) -> None:
    merged = merge_run(run, tmp_path / "merged").folder
    weights = run / "adapter" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(RunFolderError, match="another adapter"):
        prepare_upload(run, "me/whole", merged=merged)
    with pytest.raises(RunFolderError, match=r"koat merge RUN"):
        prepare_upload(run, "me/whole", merged=run)


def test_an_adapter_without_weights_is_not_sent(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "adapter" / "adapter_model.safetensors").rename(copy / "adapter" / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"has lost its weights.*adapter_model\.bin, a pickle"):
        prepare_upload(copy, "me/mine")


@pytest.mark.parametrize(
    ("part", "status", "said"),
    [
        ("repos/create", 401, "hf auth login"),
        ("repos/create", 403, "write permission"),
        ("/preupload/", 403, "write permission"),
        ("/lfs-store/", 403, "write permission"),
        ("/commit/", 409, "push again"),
    ],
)
def test_refusals_say_what_to_do(hub: LocalHub, run: Path, part: str, status: int, said: str) -> None:
    hub.kept.refuse[part] = status
    with pytest.raises(HubError, match=f"status {status}.*{said}"):
        send_upload(prepare_upload(run, "me/mine"))
    assert hub.kept.commits == 0


def test_a_token_is_needed(hub: LocalHub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="HF_TOKEN"):
        send_upload(prepare_upload(run, "me/mine"))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="status 401"):
        send_upload(prepare_upload(run, "me/mine"))


def test_a_server_that_is_not_there(hub: LocalHub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    status, out, error = call_koat("push", run, "me/mine")
    assert status == 2
    assert "cannot be reached" in error and "HF_ENDPOINT" in error
    assert "adapter_model.safetensors" in out


def test_a_name_that_is_none(hub: LocalHub, run: Path) -> None:
    with pytest.raises(HubError, match="OWNER/NAME"):
        send_upload(prepare_upload(run, "me/what is this"))


def test_nothing_private_goes_into_a_public_repository(hub: LocalHub, run: Path) -> None:
    assert call_koat("push", run, "me/mine", "--licence", "mit")[0] == 0
    commits = hub.kept.commits
    status, _, error = call_koat("push", run, "me/mine", "--private", "--licence", "mit")
    assert status == 2
    assert "exists already and is public" in " ".join(error.split())
    assert hub.kept.commits == commits
