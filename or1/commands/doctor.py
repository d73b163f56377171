"""`or1 doctor`: what this machine has, and whether engine and trainer compute the same log-probs before any update."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, NamedTuple

from or1.commands.arguments import add_overrides
from or1.config import Config
from or1.config.load import load_config
from or1.core.errors import EXIT_RUN
from or1.core.quiet import quiet_libraries
from or1.core.text import visible
from or1.report.console import default_console

if TYPE_CHECKING:
    from rich.console import Console

_STYLE = {"ok": "green", "absent": "dim", "problem": "bold red"}
_MARK = {"ok": "ok", "absent": "-", "problem": "!!"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `or1 doctor`."""
    parser.add_argument("config", nargs="?", help="TOML file whose engine to try, without any update")
    add_overrides(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the findings. Return EXIT_RUN if there is a problem. Raises ConfigError, DataError, ModelError."""
    config = load_config(arguments.config, arguments.overrides) if arguments.config else None
    return 0 if diagnose(config) else EXIT_RUN


def diagnose(config: Config | None, console: Console | None = None) -> bool:
    """Print the findings, and return True if there is no problem.

    With a config, also compare its engine with its trainer.
    """
    from rich.text import Text

    quiet_libraries()
    console = console or default_console()
    problems = 0
    for title, lines in _sections(config):
        console.print(Text(visible(title), style="bold"))
        for line in lines:
            mark = f"  {_MARK[line.state]:<3}"
            text = visible(f"{line.name:<14} {line.text}")
            console.print(Text.assemble((mark, _STYLE[line.state]), text), soft_wrap=True)
            problems += line.state == "problem"
    verdict = "everything works" if not problems else f"{problems} problem{'s' * (problems > 1)}"
    console.print(Text(f"{verdict}", style="bold green" if not problems else "bold red"))
    return not problems


def _sections(config: Config | None) -> Iterator[tuple[str, Sequence[Line]]]:
    yield "Machine", [*machine_lines(), *_gpu_lines()]
    yield "Packages", [*package_lines(), _vllm_line(config)]
    yield "Attention in training", attention_lines(config)
    yield "Sandbox of the code reward", _sandbox_lines()
    if config is None:
        yield "Engine", [Line("canary", "absent", "not run; `or1 doctor CONFIG` compares its engine with its trainer")]
    else:
        yield f"Engine of {config.model.path}", list(_canary(config))


def _gpu_lines() -> list[Line]:
    import torch

    if not torch.cuda.is_available():
        built = "a CPU build" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        return [Line("GPU", "absent", f"none that torch sees ({built})")]
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        Line(f"GPU {i}", "ok", f"{p.name}, {p.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
        for i, p in enumerate(found)
    ]


def attention_lines(config: Config | None) -> list[Line]:
    """Return the backend that `model.attention` means here, and for each other one why it is not taken."""
    import torch

    from or1.core.errors import AttentionError, ModelError
    from or1.model.attention_backends import BACKENDS, Features, choose_backend, features_of, refusal_of
    from or1.model.folder import read_config
    from or1.model.load import resolve_device

    wanted, dtype, features = "auto", torch.bfloat16, Features()
    device = resolve_device("auto")
    try:
        if config is not None:
            wanted, dtype = config.model.attention, getattr(torch, config.model.dtype)
            device = resolve_device(config.model.device)
            features = features_of(read_config(config.model.path, "sdpa")[0])
        chosen = choose_backend(wanted, device, dtype, features)
    except (ModelError, AttentionError) as error:
        return [Line("attention", "problem", str(error))]
    lines = [
        Line("attention", "ok", f"{wanted} is {chosen} ({BACKENDS[chosen].title})".replace("auto is", "auto takes"))
    ]
    for name in BACKENDS:
        if name != chosen:
            refusal = refusal_of(name, device, dtype, features)
            why = "can run too" if refusal is None else f"{refusal.reason}; {refusal.remedy}"
            lines.append(Line(name, "ok" if refusal is None else "absent", why))
    return lines


def _sandbox_lines() -> list[Line]:
    """Return the kind of sandbox that the code reward uses here, and each of its protections that was tried."""
    from or1.core.errors import ScorerError
    from or1.reward.code.protections import PROTECTIONS
    from or1.reward.code.sandbox import find_sandbox, missing_protections

    try:
        kind = find_sandbox("auto")
    except ScorerError as error:
        return [Line("sandbox", "absent", str(error))]
    missing = missing_protections(kind)
    held = [name for name in PROTECTIONS if name not in missing]
    lines = [Line("sandbox", "ok", f"{kind}; {len(held)} of {len(PROTECTIONS)} protections tried and held")]
    lines += [Line(name, "ok", PROTECTIONS[name]) for name in held]
    # `find_sandbox` refuses a sandbox without the required protections; those missing here are optional.
    return lines + [Line(name, "absent", f"does not hold: {why}") for name, why in missing.items()]


def _vllm_line(config: Config | None) -> Line:
    from or1.rollout.vllm.setup import installed_vllm, is_tested, tested_range

    version = installed_vllm()
    if version is None:
        wanted = config is not None and config.rollout.engine == "vllm"
        return Line("vllm", "problem" if wanted else "absent", f"not installed; or1 is tested with {tested_range()}")
    if not is_tested(version):
        return Line("vllm", "problem", f"{version}, but or1 is tested with {tested_range()}")
    return Line("vllm", "ok", version)


def _canary(config: Config) -> Iterator[Line]:
    """Compare the log-probs of engine and trainer, with the weights as loaded and again after a push of the weights."""
    from or1.core.errors import AttentionError, EngineError, ModelError
    from or1.environment.open import problems_of_run
    from or1.model.load import load_model, load_tokenizer, remarks_of
    from or1.report.live import RunDisplay
    from or1.rollout.make import engine_warnings, make_engine
    from or1.train.engine_check import compare_engine

    tokenizer = load_tokenizer(config.model.path)
    try:
        # As training does: this checks, in training mode, that documents of a packed row do not see each other.
        model = load_model(config.model)
    except (ModelError, AttentionError) as error:
        yield Line("model", "problem", str(error))
        return
    for warning in engine_warnings(config, model.device):
        # Without a GPU the run works, only slowly, and no other engine may be at hand.
        yield Line("engine", "problem" if model.device.type == "cuda" else "absent", warning)
    for remark in remarks_of(model):
        yield Line("model", "ok", remark)
    prompts = problems_of_run(config, tokenizer).prompts
    with RunDisplay(1, config.stage) as display:
        display.phase("engine")
        try:
            engine = make_engine(config, model, tokenizer)
        except EngineError as error:
            yield Line("engine", "problem", str(error))
            return
        try:
            for when, version in (("as loaded", None), ("after a push", 1)):
                display.phase(f"canary {when}")
                if version is not None:
                    engine.update_weights(version)
                found = compare_engine(engine, model, prompts, config)
                text = (
                    f"{type(engine).__name__} {when}: log-probs of {found.tokens} tokens differ from the trainer's "
                    f"by {found.mean_abs:.1e} on average, {found.max_abs:.1e} at most; KL {found.kl:.1e}"
                )
                yield Line("canary", "ok" if found.agrees else "problem", text)
        finally:
            engine.close()


class Line(NamedTuple):
    """One finding. `state` is "ok", "absent" (only some features need this) or "problem" (or1 cannot run)."""

    name: str
    state: str
    text: str


_REQUIRED = (
    "torch",
    "transformers",
    "safetensors",
    "numpy",
    "pyarrow",
    "pydantic",
    "math-verify",
    "rich",
    "tensorboard",
    "matplotlib",
)


_OPTIONAL = {
    "triton": "GPU kernels of the head",
    "liger-kernel": "fused norms",
    "flash-attn": "faster attention",
    "flash-attn-4": "attention for Hopper and Blackwell",
    "torchao": "8-bit moments",
    "quack-kernels": "a head without row passes on Hopper and Blackwell",
    "trl": "or1's loss inside TRL",
    "verl": "or1's loss inside verl",
    "wandb": "log.wandb",
    "trackio": "log.trackio",
}


def machine_lines() -> list[Line]:
    """Return Python's version, the processor and the memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = [Line("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
        return [*lines, Line("machine", "ok", f"{cores} cores, {gib:.0f} GiB of memory")]
    return [*lines, Line("machine", "ok", f"{cores} cores")]


def package_lines() -> list[Line]:
    """Return the packages that or1 needs or can use, with versions."""
    lines = []
    for name in _REQUIRED:
        version = _version(name)
        lines.append(Line(name, "problem" if version is None else "ok", version or "missing; reinstall or1"))
    native = importlib.util.find_spec("or1_kernels._native")
    lines.append(
        Line(
            "or1_kernels",
            "problem" if native is None else "ok",
            "no native module; reinstall or1 with a C++17 compiler" if native is None else "native module",
        )
    )
    for name, purpose in _OPTIONAL.items():
        version = _version(name)
        lines.append(Line(name, "absent" if version is None else "ok", version or f"not installed ({purpose})"))
    bubblewrap = shutil.which("bwrap")
    lines.append(Line("bubblewrap", "absent" if bubblewrap is None else "ok", bubblewrap or "not installed (sandbox)"))
    return lines


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
