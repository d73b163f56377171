"""`or1 doctor`: what this machine has, and whether engine and trainer compute the same model before any update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from or1.commands.environment import Line, machine_lines, package_lines
from or1.commands.train import quiet_libraries
from or1.config import Config
from or1.core.text import visible
from or1.report.live import RunDisplay, default_console

if TYPE_CHECKING:
    from rich.console import Console

_STYLE = {"ok": "green", "absent": "dim", "problem": "bold red"}
_MARK = {"ok": "ok", "absent": "-", "problem": "!!"}


def diagnose(config: Config | None, console: Console | None = None) -> bool:
    """Print the findings; returns whether nothing is wrong. With a config, also run its engine once (the canary)."""
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
    return [Line(f"GPU {i}", "ok", f"{p.name}, {p.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
            for i, p in enumerate(found)]  # fmt: skip


def _sandbox_lines() -> list[Line]:
    """Which sandbox programs would run in here, and each protection that was tried in it."""
    from or1.reward.code.protections import PROTECTIONS
    from or1.reward.code.sandbox import find_sandbox, missing_protections
    from or1.reward.scorer import ScorerError

    try:
        kind = find_sandbox("auto")
    except ScorerError as error:
        return [Line("sandbox", "absent", str(error))]
    missing = missing_protections(kind)
    held = [name for name in PROTECTIONS if name not in missing]
    lines = [Line("sandbox", "ok", f"{kind}; {len(held)} of {len(PROTECTIONS)} protections tried and held")]
    lines += [Line(name, "ok", PROTECTIONS[name]) for name in held]
    # What a sandbox must have, `find_sandbox` has required; the rest this type of machine cannot have.
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
    """Log-probs of engine and trainer with the checkpoint's weights, then again after pushing those very weights."""
    from or1.data import load_run_data
    from or1.model.attention import AttentionError
    from or1.model.load import ModelError, load_model, load_tokenizer, remarks_of
    from or1.rollout import make_engine
    from or1.rollout.engine import EngineError
    from or1.train.engine_check import compare_engine

    tokenizer = load_tokenizer(config.model.path)
    try:
        # As training does, which asks the model in training mode whether packed rows are computed rightly.
        model = load_model(config.model)
    except (ModelError, AttentionError) as error:
        yield Line("model", "problem", str(error))
        return
    for remark in remarks_of(model):
        yield Line("model", "ok", remark)
    prompts = load_run_data(config, tokenizer).prompts
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
                text = (f"{type(engine).__name__} {when}: log-probs of {found.tokens} tokens differ from the trainer's "
                        f"by {found.mean_abs:.1e} on average, {found.max_abs:.1e} at most; KL {found.kl:.1e}")
                yield Line("canary", "ok" if found.agrees else "problem", text)
        finally:
            engine.close()
