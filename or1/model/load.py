"""Any Hugging Face causal language model, as hidden states over packed rows and an LM head that computes losses."""

# T packed tokens, H hidden

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from or1.config import ModelConfig
from or1.dist.fsdp import fill_shards, is_sharded, shard_model, whole_tensors
from or1.dist.ulysses import check_heads
from or1.dist.world import SINGLE, World
from or1.model import attention
from or1.model.folder import (
    UNREADABLE,
    ModelError,
    making,
    read_config,
    reading,
    require_implementation,
    require_weights,
    silence_dropout,
)
from or1.model.memory import apply_liger, checkpoint_layers, tile_mlps
from or1.model.rows import Microbatch
from or1.model.seal import seal_export
from or1.model.source import require_source, require_tokenizer
from or1_kernels.lm_head import LMHead

_INDEX = ".safetensors.index.json"
_PLAIN_WEIGHTS = re.compile(r"[^/\\\0]+\.safetensors")


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one. Raises ModelError for `cuda` without one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError('model.device = "cuda", but torch sees no GPU; install a CUDA build of torch or use "auto"')
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, never running code that came with it. Raises ModelError."""
    require_source(path)
    require_tokenizer(path)
    with reading(path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {path!r} has no eos_token; name one in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(config: ModelConfig, world: World = SINGLE, packs: bool = True) -> PreTrainedModel:
    """Weights from safetensors, packed attention, no dropout, and `lm_head` replaced by an LMHead that shares its
    parameter.

    `packs` asks the model whether packed rows train it rightly. Raises ModelError if they do not, if the folder lacks a
    tensor or a plain `lm_head`; AttentionError and MemoryOptionError for an explicit option that cannot be had.
    """
    require_source(config.path)
    device, dtype = resolve_device(config.device), getattr(torch, config.dtype)
    name = attention.NAMES[attention.choose_backend(config.attention, device, dtype)]
    settings, remarks = read_config(config.path, name)
    _require_safetensors(config.path)
    options = {"config": settings, "dtype": dtype, "attn_implementation": name, "trust_remote_code": False}
    # Before the weights are read: what architecture and config.json alone rule out.
    with torch.device("meta"), making(config.path, settings):
        put_head(AutoModelForCausalLM.from_config(**options | {"config": copy.deepcopy(settings)}), config.path)
    if world.size == 1:
        model = prepare_model(_read(config.path, options), config, device)
        if packs:
            _require_isolation(model, config.path)
    else:
        whole = _read_on_main(config.path, options, world, packs)
        model = prepare_model(_without_values(config.path, options), config, device, world)
        fill_shards(model, whole, world)
    model.or1_remarks = remarks
    return model


def _require_isolation(model: PreTrainedModel, path: str) -> None:
    # That module is made of this one's functions.
    from or1.model.isolation import require_isolation

    require_isolation(model, path)


def _read_on_main(path: str, options: dict[str, Any], world: World, packs: bool) -> PreTrainedModel | None:
    """The whole model in the main rank's host memory, from which the others get their shards. Collective.

    What is wrong with it is raised by all ranks, as what it is by the main one, as a ModelError by the others.
    """
    whole, problem = None, None
    if world.is_main:
        try:
            whole = _read(path, options)
            if packs:
                _require_isolation(put_head(whole, path), path)
        except (ModelError, attention.AttentionError) as error:
            problem = error
    found = world.gather(str(problem or "").encode())[0].decode()
    if problem is not None:
        raise problem
    if found:
        raise ModelError(found)
    return whole


def remarks_of(model: PreTrainedModel) -> list[str]:
    """One line for each thing of the checkpoint's config.json that `load_model` has set otherwise."""
    return model.or1_remarks


def _read(path: str, options: dict[str, Any]) -> PreTrainedModel:
    with making(path, options["config"]), reading(path):
        # Shapes that do not fit are reported beside the rest, instead of raised one kind at a time.
        model, info = AutoModelForCausalLM.from_pretrained(
            path, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        require_weights(path, model, info)
    require_implementation(path, model, options["attn_implementation"])
    silence_dropout(model)
    return model


def _without_values(path: str, options: dict[str, Any]) -> PreTrainedModel:
    """What `_read` gives, its tensors on the meta device."""
    with torch.device("meta"), making(path, options["config"]):
        model = AutoModelForCausalLM.from_config(**options).eval()
    silence_dropout(model)
    # As from_pretrained does; without the file, what the model's config implies stands.
    with reading(path), contextlib.suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model


def put_head(model: PreTrainedModel, path: str) -> PreTrainedModel:
    """Replace the output embedding by an LMHead over the same parameter; returns the model."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(f"{path!r}: the output embedding is {type(head).__name__}, not Linear; unsupported")
    if model.get_decoder() is model:
        raise ModelError(f"{path!r}: transformers gives no decoder of {model.config.model_type} apart from its head; "
                         "unsupported")  # fmt: skip
    settings = model.config.get_text_config()
    # Cohere multiplies its logits, Granite divides them.
    scale = getattr(settings, "logit_scale", None) or 1.0 / (getattr(settings, "logits_scaling", None) or 1.0)
    softcap = getattr(settings, "final_logit_softcapping", None)
    model.set_output_embeddings(LMHead.from_linear(head, softcap=softcap, logit_scale=scale))
    return model


def prepare_model(
    model: PreTrainedModel, config: ModelConfig, device: torch.device, world: World = SINGLE
) -> PreTrainedModel:
    """What `load_model` does once there are weights: LMHead, Liger, tiles, checkpointing, the device or the shards."""
    put_head(model, config.path)
    check_heads(model.config, world.sequence_size)
    apply_liger(model, config.liger, device)
    # After Liger, which replaces the forward of the MLPs.
    if config.mlp_tile_tokens:
        tile_mlps(model, config.mlp_tile_tokens)
    if config.gradient_checkpointing != "none":
        checkpoint_layers(model, offload=config.gradient_checkpointing == "offload")
    return shard_model(model, world, device)


def _require_safetensors(path: str) -> None:
    folder = Path(path)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{path!r} has no *.safetensors; or1 reads no pickled weights. Convert them with transformers' "
            "save_pretrained"
        )
    for index in _indexes(path):
        _require_plain_names(index)


def _indexes(path: str) -> list[Path]:
    """Return the files that name the shards of a checkpoint; those of a hub id are fetched if need be.

    Raises ModelError for a config that names pickled weights, which transformers would read instead.
    """
    with reading(path):
        # transformers looks for the weights under this name alone where a config has it.
        named = getattr(AutoConfig.from_pretrained(path, trust_remote_code=False), "transformers_weights", None)
    if named is not None and not (isinstance(named, str) and named.endswith((".safetensors", _INDEX))):
        raise ModelError(
            f"the config.json of {path!r} takes weights from {named!r} (transformers_weights), which is no safetensors "
            "file; or1 reads no pickled weights. Remove that key"
        )
    also = [named] if named is not None and named.endswith(_INDEX) else []
    if Path(path).is_dir():
        return sorted({*Path(path).glob(f"*{_INDEX}"), *(Path(path) / name for name in also)})
    absent = ("missing_entries", "connection_errors", "gated_repo")
    options = {f"_raise_exceptions_for_{what}": False for what in absent}
    with reading(path):
        found = [cached_file(path, name, **options) for name in sorted({SAFE_WEIGHTS_INDEX_NAME, *also})]
    return [Path(file) for file in found if file is not None]


def _require_plain_names(index: Path) -> None:
    """Raise ModelError for an index through which transformers would read pickled weights, or a file elsewhere."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        bad = sorted(str(name) for name in names if not _PLAIN_WEIGHTS.fullmatch(name))
    except UNREADABLE as error:
        raise ModelError(
            f"{index} does not say which file holds which weight ({type(error).__name__}: {error}); download it again"
        ) from error
    if bad:
        raise ModelError(
            f"{index} takes weights from {bad[0]!r}; or1 reads *.safetensors beside the index, and nothing pickled or "
            "in other folders. Convert the checkpoint with transformers' save_pretrained"
        )


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a response: the tokenizer's and those of the checkpoint's generation_config.json, ascending."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [tokenizer.eos_token_id, *listed] if i is not None})


def named_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The present weights under their Hugging Face names, whole and detached, one at a time; none is copied.

    A tied lm_head is named too: an engine that keeps a packed copy of it would go on with the old one otherwise.
    """
    for name, tensor in _named_state(model).items():
        # Shards are fp32 masters; an engine wants what the model computes with.
        whole = tensor.full_tensor().to(model.config.dtype) if hasattr(tensor, "full_tensor") else tensor
        yield name, whole.detach()


def weight_forms(model: PreTrainedModel) -> list[tuple[str, torch.dtype, torch.Size]]:
    """Name, dtype and whole shape of all that `named_weights` yields, in its order; nothing is gathered for it."""
    return [
        (name, model.config.dtype if hasattr(tensor, "full_tensor") else tensor.dtype, tensor.shape)
        for name, tensor in _named_state(model).items()
    ]


def _named_state(model: PreTrainedModel) -> dict[str, Tensor]:
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.setdefault("lm_head.weight", model.get_input_embeddings().weight)
    return state


def hidden_states(model: PreTrainedModel, batch: Microbatch, sequence_group: ProcessGroup | None = None) -> Tensor:
    """Final hidden states [T, H] of a packed row, after the last norm; documents do not see each other.

    With a `sequence_group`, `batch` is this rank's slice of the row (`sequence_parallel.my_slice`), and so is T.
    """
    layout = attention.Layout(
        batch.cu_seqlens, batch.cu_keys, batch.max_seqlen, batch.max_keys, batch.kv_rows_U
    )
    with attention.packed_forward():
        output = (model.decode if is_sharded(model) else model.get_decoder())(
            input_ids=batch.ids_T[None],
            position_ids=batch.positions_T[None],
            # A cache, even an empty one, would make transformers attend across documents.
            use_cache=False,
            **layout.as_kwargs(),
            **({} if sequence_group is None else {"sequence_group": sequence_group}),
        )
    return output.last_hidden_state[0]


def trained_rows(hidden_TH: Tensor, batch: Microbatch) -> Tensor:
    """hidden_TH[rows_N], float[N, H]: the hidden states that predict the trained tokens.

    Rows repeat where responses share a prompt. The gradient of plain indexing adds repeated rows up in the order in
    which threads come to them, which moves its last bit from run to run; that of an embedding has a fixed order.
    """
    return nn.functional.embedding(batch.rows_N, hidden_TH)


def lm_head(model: PreTrainedModel) -> LMHead:
    """The model's LMHead."""
    return model.get_output_embeddings()


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients inside; the former mode afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def export_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, world: World = SINGLE
) -> Path:
    """Write a plain Hugging Face checkpoint, committed by rename; replaces an older one there. Returns the folder.

    Collective: the ranks put the weights together, the main one writes them, in the type the model computes in.
    """
    dtype = model.config.dtype
    state = {name: t.to("cpu", dtype) for name, t in whole_tensors(model)} if world.size > 1 else None
    # A run ends here: gloo aborts a rank whose peer has gone while it still talks. Not after the main one has written,
    # which may take longer than a collective waits.
    world.barrier()
    if not world.is_main:
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.is_symlink():
        partial.unlink()
    partial.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(partial, state_dict=state)
    tokenizer.save_pretrained(partial)
    _forget_attention(partial / "config.json", dtype)
    seal_export(partial)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)
    return folder


def _forget_attention(path: Path, dtype: torch.dtype) -> None:
    """Drop the name of or1's attention from a saved config, where nobody else could resolve it; note the weights' type.

    transformers notes that of the parameters, which are fp32 masters while they are sharded.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    for key in ("_attn_implementation", "attn_implementation", "_attn_implementation_internal"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
