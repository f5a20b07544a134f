"""Model folders from the Hugging Face hub, through its own library: its cache, its progress bars, its resumed downloads.

The library obeys its environment: HF_HUB_OFFLINE=1 (only what the cache holds), HF_HOME (where the cache is), HF_TOKEN,
HF_ENDPOINT (a mirror).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from athanor.core.errors import CheckpointError

PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_PICKLES = ("pytorch_model*.bin",)
# A second copy of the weights, for other programs: in a subfolder, or Mistral's and Meta's own files.
_COPIES = ("*/*.safetensors", "*/*.bin", "consolidated*")
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_]|-(?!-)|\.(?!\.)){0,94}(?<![.-])"
_ID = re.compile(rf"{_PART}/{_PART}")


def is_id(text: str) -> bool:
    """Whether `text` has the form `org/name` of a model on the hub. A relative path can have it too: look for a folder first.

    Letters, digits, `_`, `.` and `-`; the last two neither at an end of a part nor doubled; a part has at most 95.
    """
    return _ID.fullmatch(text) is not None


def fetch(repo_id: str, revision: str | None = None, *, pickled: bool = False, patterns: Sequence[str] = PATTERNS) -> Path:
    """Download a model into the hub's cache, as far as it is not there yet, and return its folder.

    Args:
        repo_id: `org/name`.
        revision: branch, tag or commit; the main branch when None.
        pickled: where the model has no safetensors, download pytorch_model.bin or its shards too.
        patterns: of the files wanted.

    Raises:
        CheckpointError: not an `org/name`; no such model or revision; a gated model; no way to the hub.
    """
    if not is_id(repo_id):
        raise CheckpointError(f"{repo_id!r} is neither a folder here nor a model id of the form org/name: check the spelling")
    folder = _download(repo_id, revision, patterns)
    if pickled and not any(folder.glob("*.safetensors")):
        folder = _download(repo_id, revision, (*patterns, *_PICKLES))
    return folder


def _download(repo_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    wanted = repo_id if revision is None else f"{repo_id} at revision {revision!r}"
    try:
        folder: str = huggingface_hub.snapshot_download(
            repo_id, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(_COPIES)
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{wanted} is gated: accept its terms at https://huggingface.co/{repo_id}, then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the hub has no model {repo_id}, or it is private: check the spelling, or log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"the hub has no {wanted}: name a branch, tag or commit that the model has") from error
    except Exception as error:  # each generation of the library brings another transport with errors of its own
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"cannot reach the hub for {wanted} ({type(error).__name__}: {reason:.300}): try again, or download the model"
            " elsewhere and give its folder"
        ) from error
    return Path(folder)
