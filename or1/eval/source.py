"""Where responses come from: a checkpoint that is loaded here, or a server that has it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from or1.config import Config
from or1.rollout.engine import Engine


@dataclass(frozen=True)
class Source:
    """An engine; the tokenizer of its prompts, or None where the server has it; and what identifies the weights."""

    engine: Engine
    tokenizer: Any
    model: dict[str, Any]


@contextmanager
def open_source(config: Config) -> Iterator[Source]:
    """The server of `[endpoint]` if there is one, else the model of `[model]` in the engine of `[rollout]`.

    Raises EndpointError or ModelError.
    """
    if config.endpoint.url is not None:
        from or1.rollout.endpoint import EndpointEngine

        endpoint = EndpointEngine(config.endpoint)
        yield Source(endpoint, None, {"url": config.endpoint.url, "model": endpoint.model})
        return
    from or1.model.load import load_model, load_tokenizer
    from or1.rollout import make_engine

    tokenizer = load_tokenizer(config.model.path)
    engine = make_engine(config, load_model(config.model, packs=False).eval(), tokenizer)
    try:
        yield Source(engine, tokenizer, _identity(config))
    finally:
        engine.close()


def _identity(config: Config) -> dict[str, Any]:
    """Names, sizes and times of the weight files, so that weights written anew are not taken for the old ones."""
    files = sorted(Path(config.model.path).glob("*.safetensors"))
    described = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return {"path": config.model.path, "dtype": config.model.dtype, "files": described}
