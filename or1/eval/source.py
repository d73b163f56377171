"""The source of responses: a checkpoint that is loaded here, or a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from or1.config import Config
from or1.model.load import load_model, load_tokenizer
from or1.rollout import make_engine
from or1.rollout.endpoint import EndpointEngine
from or1.rollout.engine import Engine


@dataclass(frozen=True)
class Source:
    """An engine, the tokenizer of its prompts (None for a server), and what identifies the weights."""

    engine: Engine
    tokenizer: Any
    model: dict[str, Any]


@contextmanager
def open_source(config: Config) -> Iterator[Source]:
    """Open the server of `[endpoint]` if it has a URL, else the model of `[model]` in the engine of `[rollout]`.

    The engine is closed at the end of the block. Raises EndpointError or ModelError.
    """
    if config.endpoint.url is not None:
        endpoint = EndpointEngine(config.endpoint, config.data.chat_template)
        yield Source(endpoint, None, {"url": config.endpoint.url, "model": endpoint.model})
        return
    tokenizer = load_tokenizer(config.model.path)
    # Without adapters: those of a run are merged into its exported weights, and fresh ones compute the base model.
    config = config.model_copy(update={"model": config.model.model_copy(update={"lora": None})})
    engine = make_engine(config, load_model(config.model, packs=False).eval(), tokenizer)
    try:
        yield Source(engine, tokenizer, _identity(config))
    finally:
        engine.close()


def _identity(config: Config) -> dict[str, Any]:
    """Return names, sizes and times of the weight files, which change when the weights are rewritten."""
    files = sorted(Path(config.model.path).glob("*.safetensors"))
    described = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return {"path": config.model.path, "dtype": config.model.dtype, "files": described}
