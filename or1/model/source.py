"""Whether a model can be had at all, before minutes of retries: its folder, its tokenizer, or one try of the hub."""

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
    """Raise ModelSourceError for a model folder without any file of a tokenizer."""
    folder = Path(path)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _TOKENIZERS):
        raise ModelSourceError(
            f"{path!r} holds no tokenizer (no tokenizer.json, tokenizer.model or vocab.json); copy "
            "these files of the checkpoint into the folder"
        )


def require_source(path: str) -> None:
    """Raise ModelSourceError for a hub id that is not in the cache of this machine, and not at the hub in one try."""
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
        # from_pretrained tries five times, file by file, which is half a minute for a slip of the pen.
        get_hf_file_metadata(hf_hub_url(path, "config.json"), timeout=_ONE_TRY_S)
    except EntryNotFoundError:
        return  # What reads the repository in earnest says what it lacks.
    except GatedRepoError as error:
        raise ModelSourceError(
            f"{where}, which its owners give to some accounts only; ask for access on its page, and set HF_TOKEN"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelSourceError(
            f"{where}, and the hub has no such model, or none that this account may see; {remedy}, "
            "or set HF_TOKEN for a private one"
        ) from error
    except Exception as error:
        # The HTTP library behind the hub's differs by its version, and so do its exceptions.
        if isinstance(error, ModelSourceError | MemoryError):
            raise
        host = os.environ.get("HF_ENDPOINT", "huggingface.co")
        raise ModelSourceError(
            f"{where}, but {host} cannot be asked ({type(error).__name__}: {error}); {remedy}. "
            "HF_HUB_OFFLINE=1 says that there is no network"
        ) from error
