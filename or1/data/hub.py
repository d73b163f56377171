"""Datasets of the Hugging Face hub as local parquet files, downloaded once and then read from the cache.

The hub converts every public dataset to parquet, on the branch refs/convert/parquet as CONFIG/SPLIT/0000.parquet and so
on. That branch is read, so no code of a dataset runs and no other library is needed.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from or1.config.data_paths import Dataset, dataset_of
from or1.core.errors import DataError
from or1.core.files import write_whole

CONVERTED = "refs/convert/parquet"
T = TypeVar("T")


def files_of(name: str) -> list[str]:
    """Return the local files of a dataset such as hf:openai/gsm8k:main/train, in order; download those not cached.

    A split of a private or gated dataset needs HF_TOKEN. HF_ENDPOINT names another hub, and HF_HOME the cache.

    Raises DataError, in one line: a malformed name, no such dataset or split, no access, no network and no whole copy.
    """
    dataset = dataset_of(name)
    if dataset is None:
        raise DataError(f"{name}: is not the name of a dataset; write hf:OWNER/NAME:CONFIG/SPLIT or hf:OWNER/NAME/FILE")
    return _asked(name, lambda: _download(name, dataset))


def _download(name: str, dataset: Dataset) -> list[str]:
    from huggingface_hub import HfApi, hf_hub_download

    endpoint = os.environ.get("HF_ENDPOINT") or None
    revision = dataset.revision or ("main" if dataset.file else CONVERTED)
    options: dict[str, Any] = {"repo_id": dataset.repo, "repo_type": "dataset"}
    if dataset.file and _is_fixed(dataset, revision):
        return [hf_hub_download(filename=dataset.file, revision=revision, local_files_only=True, **options)]
    # Without network this call fails at once. hf_hub_download first retries for half a minute.
    api = HfApi(endpoint=endpoint)
    info = _listing_or_none(lambda: api.dataset_info(dataset.repo, revision=revision))
    if dataset.file:
        where: dict[str, Any] = {"endpoint": endpoint, "local_files_only": info is None}
        return [hf_hub_download(filename=dataset.file, revision=revision, **where, **options)]
    if info is None:
        return _cached(name, dataset, revision)
    names = [each.rfilename for each in info.siblings or []]
    wanted = sorted(fnmatch.filter(names, f"{dataset.config}/{dataset.split}/*.parquet"))
    if not wanted:
        splits = sorted({each.rpartition("/")[0] for each in names if each.endswith(".parquet")})
        raise DataError(f"{name}: has no such split; there are: {', '.join(splits) or 'none'}; correct the name")
    # A commit instead of the branch: all files of one version, even if the branch moves meanwhile.
    found = [hf_hub_download(filename=each, revision=info.sha, endpoint=endpoint, **options) for each in wanted]
    record = _record_of(dataset, revision)
    record.parent.mkdir(parents=True, exist_ok=True)
    write_whole(record, json.dumps({"commit": info.sha, "files": wanted}))
    return found


def _is_fixed(dataset: Dataset, revision: str) -> bool:
    """Return True if a file of a commit, which never changes, is in the cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(dataset.repo, dataset.file, repo_type="dataset", revision=revision)
    return re.fullmatch("[0-9a-f]{40}", revision) is not None and isinstance(found, str)


def _listing_or_none(ask: Callable[[], T]) -> T | None:
    """Return the answer of the hub; None if the hub cannot be reached, or must not be (HF_HUB_OFFLINE)."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        return ask()
    except Exception as error:
        if isinstance(error, OfflineModeIsEnabled) or _is_of(error, "TransportError"):
            return None
        raise


def _is_of(error: Exception, kind: str) -> bool:
    """Return True if an error is of httpx's class of that name. huggingface_hub uses httpx or httpx2 by its version."""
    return any(base.__name__ == kind and base.__module__.startswith("httpx") for base in type(error).__mro__)


def _record_of(dataset: Dataset, revision: str) -> Path:
    """Return the file beside a dataset in the cache that names all files of a split that was downloaded whole."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=dataset.repo, repo_type="dataset")
    return folder / "or1" / f"{quote(f'{revision}:{dataset.config}:{dataset.split}', safe='')}.json"


def _cached(name: str, dataset: Dataset, revision: str) -> list[str]:
    """Return the files of a split in the cache. Raises DataError unless the copy is whole."""
    from huggingface_hub import try_to_load_from_cache

    try:
        record = json.loads(_record_of(dataset, revision).read_bytes())
        options = {"repo_type": "dataset", "revision": record["commit"]}
        found = [try_to_load_from_cache(dataset.repo, each, **options) for each in record["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        found = []
    paths = [path for path in found if isinstance(path, str)]
    if not paths or len(paths) < len(found):
        raise DataError(
            f"{name}: the hub cannot be reached, and no whole copy is in the cache; start once with network, copy the "
            "cache (HF_HOME) from a machine that has one, or name a local file"
        )
    return paths


def _asked(name: str, load: Callable[[], list[str]]) -> list[str]:
    """Return the result of `load`; an error of the hub becomes one line with a remedy."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return load()
    except GatedRepoError as error:
        reason = "asks for an agreement first; accept it on the hub and set HF_TOKEN"
        raise DataError(f"{name}: {reason}") from error
    except RepositoryNotFoundError as error:
        reason = "no such dataset, or a private one; correct the name, or set HF_TOKEN"
        raise DataError(f"{name}: {reason}") from error
    except RevisionNotFoundError as error:
        reason = "no such revision, or the hub has not converted the dataset to parquet; name a file of it instead"
        raise DataError(f"{name}: {reason}") from error
    except LocalEntryNotFoundError as error:
        reason = "the hub cannot be reached, and no whole copy is in the cache; start once with network"
        raise DataError(f"{name}: {reason}") from error
    except EntryNotFoundError as error:
        raise DataError(f"{name}: no such file in the dataset; correct the name") from error
    except Exception as error:
        if not (isinstance(error, HfHubHTTPError | OSError) or _is_of(error, "HTTPError")):
            raise
        cause = str(error).strip().partition("\n")[0]
        raise DataError(f"{name}: cannot be downloaded ({cause}); try again, or name a local file") from error
