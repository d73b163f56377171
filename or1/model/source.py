"""Early checks that a model exists: a folder with a tokenizer, or one request to the hub, not minutes of retries."""

from __future__ import annotations

import os
from pathlib import Path

from or1.core.errors import ModelSourceError

_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "*.tiktoken",
    "*.spm",
    "*.bpe",
    "spiece.model",
    "tekken.json",
)
_ONE_TRY_S = 10


def require_tokenizer(path: str) -> None:
    """Raise ModelSourceError if a model folder has no tokenizer file."""
    folder = Path(path)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _TOKENIZERS):
        raise ModelSourceError(
            f"{path!r} holds no tokenizer (no tokenizer.json, tokenizer.model or vocab.json); copy "
            "these files of the checkpoint into the folder"
        )


def require_source(path: str) -> None:
    """Raise ModelSourceError unless a model is a folder, in the local cache, or found at the hub in one request."""
    if Path(path).is_dir():
        return
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError

    where = f"the model {path!r} is no folder here (looked in {Path.cwd()}), so a hub id"
    remedy = "correct the path, or download the checkpoint and name its folder"
    try:
        if isinstance(try_to_load_from_cache(path, "config.json"), str):
            return
        if constants.HF_HUB_OFFLINE:
            raise ModelSourceError(
                f"{where}, which is not in this machine's cache, and HF_HUB_OFFLINE is set; {remedy}"
            )
        # from_pretrained retries five times per file: half a minute for a typing error.
        get_hf_file_metadata(hf_hub_url(path, "config.json"), timeout=_ONE_TRY_S)
    except EntryNotFoundError:
        return  # The repository exists; loading reports the missing file.
    except GatedRepoError as error:
        raise ModelSourceError(
            f"{where}, which is gated: only some accounts have access; ask for access on its page, and set HF_TOKEN"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelSourceError(
            f"{where}, and the hub has no such model, or this account may not see it; {remedy}, "
            "or set HF_TOKEN for a private one"
        ) from error
    except Exception as error:
        # huggingface_hub's HTTP library, and so its exception types, differ between versions.
        if isinstance(error, ModelSourceError | MemoryError):
            raise
        host = os.environ.get("HF_ENDPOINT", "huggingface.co")
        raise ModelSourceError(
            f"{where}, but {host} cannot be reached ({type(error).__name__}: {error}); {remedy}. "
            "Without a network, set HF_HUB_OFFLINE=1"
        ) from error
