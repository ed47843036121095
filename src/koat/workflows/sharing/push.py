"""Push: an adapter or a merged model to the Hugging Face Hub, in one commit, with a model card."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koat.adapters.files import CONFIG, EXTRA, WEIGHTS, WHOLE, list_weight_files, read_extra
from koat.adapters.methods import METHODS
from koat.core.config_files import read_config_file
from koat.core.errors import HubError, RunFolderError
from koat.model import NANO
from koat.report.card import CardFacts, write_card
from koat.workflows.comparing.run_facts import name_data
from koat.workflows.sharing.merge import RECORD
from koat.workflows.sharing.shelf import collect_scores
from koat.workflows.trained import TEMPLATE, TOKENIZER, Trained, find_trained, fingerprint_adapter, public_name

CARD = "README.md"
DEFAULT_ENDPOINT = "https://huggingface.co"
PARTS = {
    "adapter": (CONFIG, WEIGHTS, EXTRA, TEMPLATE),
    "merged": (
        "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "*.py",
        TEMPLATE, RECORD,
    ),
}  # fmt: skip
"""Files that belong to each kind of upload; nothing else in the folder is sent."""


@dataclass(frozen=True, slots=True)
class Upload:
    """All that a push sends: where to, and each file's content or place."""

    repo: str
    endpoint: str
    private: bool
    files: dict[str, Path | bytes]

    def list_sizes(self) -> dict[str, int]:
        """Return the size in bytes of each file, by its name in the repository."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }

    @property
    def card(self) -> str:
        """The model card."""
        content = self.files[CARD]
        assert isinstance(content, bytes)
        return content.decode("utf-8")


def prepare_upload(
    target: str | Path,
    repo: str,
    *,
    merged: Path | None = None,
    private: bool = False,
    licence: str = "other",
    base: str | None = None,
) -> Upload:
    """Gather what would be sent, without network and without reading weights.

    `base` is the Hub id of the base model, where training took it from a folder. No path of this machine is
    sent: a local base goes by its folder's name. Raises KoatError.
    """
    trained = find_trained(target)
    if merged is None and trained.read_adapter_config()["peft_type"] == WHOLE:
        raise RunFolderError(
            f"{target} holds a whole model, not an adapter. Write it in the type to be served in, then send that: "
            f"koat merge {target} --out DIR, and koat push {target} {repo} --merged DIR"
        )
    files: dict[str, Path | bytes] = {}
    folder, kind = (trained.folder, "adapter") if merged is None else (merged, "merged")
    record = read_merge(merged, trained) if merged is not None else {}
    list_weight_files(folder)  # refuses a folder that has none
    for pattern in (*PARTS[kind], *TOKENIZER):
        files |= {path.name: path for path in sorted(folder.glob(pattern)) if path.is_file()}
    named = base or public_name(trained.model.base)
    if kind == "adapter":
        config = {**trained.read_adapter_config(), "base_model_name_or_path": named}
        files[CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    card = write_card(gather_facts(trained, repo, named, licence, record, is_local=base is None and is_local(trained)))
    files[CARD] = card.replace('"REPO"', f'"{repo}"').encode()
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or DEFAULT_ENDPOINT
    return Upload(repo, endpoint, private, dict(sorted(files.items())))


def is_local(trained: Trained) -> bool:
    """Whether the base model is a folder of this machine, or ships with koat."""
    return trained.model.base == NANO or Path(trained.model.base).expanduser().is_dir()


def read_merge(folder: Path, trained: Trained) -> dict[str, Any]:
    """Return a merged folder's record. Raises RunFolderError when it is another adapter's merge, or none."""
    if not (folder / RECORD).is_file():
        raise RunFolderError(
            f"{folder} is no merged model: it has no {RECORD}. Make one: koat merge RUN --out {folder}"
        )
    record = read_config_file(folder / RECORD)
    if record["adapter"]["sha256"] != fingerprint_adapter(trained.folder):
        raise RunFolderError(
            f"{folder} was merged from another adapter than the one in {trained.folder}; the card would be wrong. "
            f"Merge again: koat merge RUN --out {folder} --overwrite"
        )
    return record


def gather_facts(
    trained: Trained, repo: str, base: str, licence: str, record: dict[str, Any], *, is_local: bool
) -> CardFacts:
    """Return what the model card says, from the run's own records."""
    template = trained.read_template()
    manifest = trained.run.read_manifest() if trained.run else {}
    config = trained.run.read_config() if trained.run else {}
    method = str(manifest.get("method") or str(trained.read_adapter_config()["peft_type"]).lower())
    return CardFacts(
        name=repo.rpartition("/")[2],
        method=METHODS[method].title if method in METHODS else method,
        base=base,
        licence=licence,
        base_fingerprint=str(manifest.get("base", {}).get("fingerprint", "")),
        is_local_base=is_local,
        template=template.to_mapping() if template else {},
        num_parameters=int(manifest.get("trainable_parameters", 0)),
        data=name_data(manifest.get("data", {})),
        settings=public_settings(config),
        result=manifest.get("result", {}),
        versions=manifest.get("versions", {}),
        scores=collect_scores(trained.predictions),
        merge=record,
        places=name_kinds(read_extra(trained.folder).get("places", [])),
    )


def name_kinds(places: list[str]) -> list[str]:
    """Return what kinds of modules places are, each once: the last parts of their names."""
    return sorted({".".join(place.split(".")[-2:]) for place in places})


def public_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return a run's settings without where things lie on this machine."""
    kept = ("template", "loss_on", "max_length", "overflow", "limit", "validation_fraction", "columns", "values")
    adapter = {key: value for key, value in config.get("adapter", {}).items() if value is not None}
    if "start" in adapter:
        adapter["start"] = public_name(str(adapter["start"]))
    data = {key: value for key, value in config.get("data", {}).items() if key in kept and value}
    sections = {"adapter": adapter, "training": config.get("training", {}), "data": data}
    return {name: values for name, values in sections.items() if values}


def send_upload(upload: Upload) -> str:
    """Create the repository if need be, send everything in one commit, and return the commit's address.

    Raises HubError for a missing or refused token, a refused name, and a server that cannot be reached.
    """
    import httpx
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    token = get_token()
    if token is None:
        raise HubError(
            "The Hub wants to know who is writing, and no token was found. Run `hf auth login`, or set HF_TOKEN to a "
            "token with write permission."
        )
    api = HfApi(endpoint=upload.endpoint, token=token)
    operations = [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in upload.files.items()
    ]
    try:
        api.create_repo(upload.repo, private=upload.private, exist_ok=True)
        if upload.private and not api.repo_info(upload.repo).private:
            raise HubError(
                f"{upload.repo} exists already and is public, and --private was asked for. Make it private on "
                f"{upload.endpoint}, or give another name; nothing was uploaded."
            )
        done = api.create_commit(upload.repo, operations, commit_message="Upload with koat")
    except HFValidationError as error:
        raise HubError(f"{upload.repo!r} is no repository name: {error} Write OWNER/NAME.") from error
    except (httpx.HTTPError, OfflineModeIsEnabled, OSError, RuntimeError) as error:
        # The library wraps what goes wrong with a single file in a RuntimeError.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        if isinstance(cause, HfHubHTTPError):
            raise HubError(_explain_refusal(upload, cause.response.status_code, str(cause))) from error
        raise HubError(
            f"{upload.endpoint} cannot be reached ({cause}). Check the network, HF_ENDPOINT and HF_HUB_OFFLINE, then "
            "push again: what arrived is not sent twice."
        ) from error
    return str(done.commit_url)


def _explain_refusal(upload: Upload, status: int, message: str) -> str:
    first = next((line.strip() for line in message.splitlines() if line.strip()), "")
    advice = {
        401: "The token is not valid: run `hf auth login` again, or set HF_TOKEN.",
        403: f"The token may not write to {upload.repo}: use one with write permission, or a name of your own.",
        404: f"There is no {upload.repo}, or this token may not see it. Check the name.",
        409: "Somebody else wrote at the same time: push again.",
    }.get(status, "Try again later." if status >= 500 else "Read what it says, mend that, and push again.")
    return f"{upload.endpoint} refused the upload with status {status}: {first} {advice}"
