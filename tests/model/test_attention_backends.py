"""Which attention backend is chosen on which GPU, and what is said of those that cannot run."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config, GptOssConfig, Qwen2Config

from or1.commands.doctor import attention_lines
from or1.config import ModelConfig
from or1.core.errors import AttentionError
from or1.model import attention, attention_backends
from or1.model.attention import choose_backend
from or1.model.attention_backends import BACKENDS, Features, candidates, features_of, require_features
from or1.model.attention_calls import CALLS
from or1.model.isolation import rehearse_model
from tests.helpers.attention_fakes import forget, install

CPU, GPU, BF16 = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
PACKAGES = ("flash", "flash3", "flash4")
HEAD = Features(head_dim=128)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    forget()
    for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    forget()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that sets the compute capability that torch reports, and installs packages."""

    def pretend(capability: tuple[int, int], *packages: str) -> None:
        forget()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
        for package in packages:
            install(package, monkeypatch)

    return pretend


def test_the_names_are_the_same_everywhere() -> None:
    declared = ModelConfig.model_fields["attention"].annotation
    assert set(declared.__args__) == {"auto", *BACKENDS}  # type: ignore[union-attr]
    assert set(BACKENDS) == set(CALLS) == set(attention._NAMES)
    assert not [name for name in attention._NAMES.values() if "flash" in name]
    assert {name for order in attention_backends._ORDER.values() for name in order} == set(BACKENDS)
    assert all(order[-1] == "sdpa" for order in attention_backends._ORDER.values())


def test_without_a_gpu_or_16_bits_it_is_sdpa() -> None:
    assert choose_backend("auto", CPU, BF16) == "sdpa"
    assert choose_backend("auto", GPU, torch.float32) == "sdpa"
    assert choose_backend("sdpa", GPU, BF16) == "sdpa"
    for wanted in set(BACKENDS) - {"sdpa"}:
        with pytest.raises(AttentionError, match=rf'"{wanted}" needs a GPU.*float32 on cuda.*"sdpa"'):
            choose_backend(wanted, GPU, torch.float32)


@pytest.mark.parametrize(
    ("capability", "installed", "expected"),
    [
        ((7, 5), PACKAGES, ["sdpa"]),
        ((8, 0), (), ["varlen", "sdpa"]),
        ((8, 6), PACKAGES, ["flash", "varlen", "sdpa"]),
        ((9, 0), (), ["cudnn", "varlen", "sdpa"]),
        ((9, 0), ("flash4",), ["flash4", "cudnn", "varlen", "sdpa"]),
        ((9, 0), ("flash3", "flash"), ["flash3", "cudnn", "flash", "varlen", "sdpa"]),
        ((10, 0), (), ["cudnn", "varlen", "sdpa"]),
        ((10, 0), ("flash3", "flash4"), ["flash4", "cudnn", "varlen", "sdpa"]),
        ((12, 0), ("flash", "flash3"), ["flash", "varlen", "sdpa"]),
    ],
)
def test_auto_takes_the_fastest_that_the_gpu_and_the_packages_allow(
    capability: tuple[int, int], installed: tuple, expected: list[str], gpu: Callable[..., None]
) -> None:
    gpu(capability, *installed)
    assert candidates(GPU, BF16, HEAD) == expected
    assert choose_backend("auto", GPU, BF16, HEAD) == expected[0]
    assert choose_backend("auto", GPU, torch.float16, HEAD) == expected[0]


@pytest.mark.parametrize(
    ("capability", "features", "expected"),
    [
        ((9, 0), Features(head_dim=128, softcap=True), ["flash3", "flash4", "sdpa"]),
        ((9, 0), Features(head_dim=64, sinks=True), ["flash4", "sdpa"]),
        ((9, 0), Features(head_dim=128, deterministic=True), ["flash3", "flash4", "varlen", "sdpa"]),
        ((9, 0), Features(head_dim=256, deterministic=True), ["flash4", "varlen", "sdpa"]),
        ((9, 0), Features(head_dim=256), ["flash3", "flash4", "varlen", "sdpa"]),
        ((9, 0), Features(head_dim=192, value_dim=128), ["flash3", "flash4", "sdpa"]),
        ((9, 0), Features(head_dim=100), ["sdpa"]),
        ((9, 0), Features(head_dim=512), ["sdpa"]),
        ((10, 0), Features(head_dim=192), ["varlen", "sdpa"]),
        ((10, 0), Features(head_dim=256), ["flash4", "varlen", "sdpa"]),
        ((10, 0), Features(head_dim=256, softcap=True), ["sdpa"]),
    ],
)
def test_auto_leaves_out_what_lacks_a_feature(
    capability: tuple[int, int], features: Features, expected: list[str], gpu: Callable[..., None]
) -> None:
    gpu(capability, "flash3", "flash4")
    assert candidates(GPU, BF16, features) == expected


def test_flash_attn_2_takes_any_head_dimension_up_to_256(gpu: Callable[..., None]) -> None:
    gpu((8, 0), "flash")
    assert candidates(GPU, BF16, Features(head_dim=100)) == ["flash", "sdpa"]
    assert candidates(GPU, BF16, Features(head_dim=257)) == ["sdpa"]


def test_the_namespace_of_flash_attn_4_is_not_flash_attn_2(
    gpu: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As the wheel of flash-attn-4 installs it: a folder `flash_attn` without __init__.py.
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("def flash_attn_varlen_func(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    gpu((9, 0))
    assert candidates(GPU, BF16, HEAD) == ["flash4", "cudnn", "varlen", "sdpa"]
    with pytest.raises(AttentionError, match=r'"flash" cannot run: flash-attn 2 does not import .*no attribute.*; pip'):
        choose_backend("flash", GPU, BF16)


def test_a_library_that_is_broken_is_left_out_with_its_reason_and_tried_once(
    gpu: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = tmp_path / "tried"
    (tmp_path / "flash_attn_interface.py").write_text(
        f"open({str(tried)!r}, 'a').write('x')\nraise ImportError('undefined symbol: _ZN3c10')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    gpu((9, 0))
    for _ in range(3):
        assert choose_backend("auto", GPU, BF16) == "cudnn"
    assert tried.read_text() == "x"
    with pytest.raises(
        AttentionError, match=r"does not import \(ImportError: undefined symbol: _ZN3c10\); build hopper"
    ):
        choose_backend("flash3", GPU, BF16)


def test_explicit_choices_say_what_is_missing_and_what_to_do(gpu: Callable[..., None]) -> None:
    gpu((8, 0))
    for wanted, message in (
        ("flash", r'flash-attn 2 is not installed; pip install "or1\[flash-attn\]", or use "auto"'),
        ("flash3", r'no kernels for a GPU \(compute capability 8\.0\), only for Hopper; use "auto"'),
        ("flash4", r"only for Hopper, Blackwell"),
    ):
        with pytest.raises(AttentionError, match=f'model.attention = "{wanted}" .*{message}'):
            choose_backend(wanted, GPU, BF16)
    for features, message in (
        (
            Features(head_dim=128, deterministic=True),
            'no deterministic backward; use "auto", or set deterministic = fal',
        ),
        (Features(head_dim=136), r"no kernel for heads of 136 .* multiples of 8 up to 128"),
        (Features(head_dim=128, softcap=True), "no soft caps on attention scores, which the model uses"),
    ):
        with pytest.raises(AttentionError, match=message):
            choose_backend("cudnn", GPU, BF16, features)


def test_an_old_cudnn_is_refused(gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu((9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 8907)
    assert choose_backend("auto", GPU, BF16) == "varlen"
    with pytest.raises(AttentionError, match="needs cuDNN 9, and torch has version 8907"):
        choose_backend("cudnn", GPU, BF16)


def test_torch_with_its_flash_attn_4_activated_cannot_train(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu((9, 0))
    for active, chosen in ((None, "cudnn"), ("FA3", "cudnn"), ("FA4", "sdpa")):
        monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda active=active: active)
        assert choose_backend("auto", GPU, BF16) == chosen
    with pytest.raises(AttentionError, match=r"after activate_flash_attention_impl.*; call .*restore_flash"):
        choose_backend("varlen", GPU, BF16)


def test_what_a_config_asks_for() -> None:
    qwen = Qwen2Config(hidden_size=64, num_attention_heads=4)
    assert features_of(qwen) == Features(head_dim=16)
    gemma, gpt = Gemma2Config(head_dim=256), GptOssConfig(head_dim=64)
    assert features_of(gemma) == Features(head_dim=256, softcap=True)
    assert features_of(gpt) == Features(head_dim=64, sinks=True)
    for wanted in ("auto", "sdpa", "flash", "flash3", "flash4"):
        require_features(wanted, gemma, CPU)
    for wanted in ("varlen", "cudnn"):
        with pytest.raises(AttentionError, match=f'"{wanted}" has no soft caps'):
            require_features(wanted, gemma, CPU)
        require_features(wanted, qwen, CPU)
    with pytest.raises(AttentionError, match='"flash3" has no attention sinks'):
        require_features("flash3", gpt, CPU)
    require_features("flash4", gpt, CPU)


def test_a_dry_run_refuses_a_backend_without_what_the_model_needs(tmp_path: Path) -> None:
    Gemma2Config(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, head_dim=8).save_pretrained(
        tmp_path
    )
    with pytest.raises(AttentionError, match='"varlen" has no soft caps'):
        rehearse_model(ModelConfig(path=str(tmp_path), attention="varlen"))


def test_the_doctor_says_what_auto_takes_and_why_not_the_others(gpu: Callable[..., None]) -> None:
    gpu((9, 0), "flash4")
    lines = {line.name: (line.state, line.text) for line in attention_lines(None)}
    assert lines.pop("attention") == ("ok", "auto takes flash4 (flash-attn 4)")
    assert set(lines) == set(BACKENDS) - {"flash4"}
    assert lines["varlen"] == ("ok", "can run too")
    assert lines["flash3"][0] == "absent"
    assert "flash-attn 3 is not installed; build hopper/" in lines["flash3"][1]


def test_determinism_is_that_of_torch_when_it_is_asked() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert Features().deterministic
    finally:
        torch.use_deterministic_algorithms(False)
    assert not Features().deterministic


def test_the_page_shows_the_table(root: Path) -> None:
    page = (root / "docs" / "attention.md").read_text()
    rows = {cells[0].strip("`"): cells for line in page.splitlines() if len(cells := _cells(line)) == 9}
    for name, backend in BACKENDS.items():
        _, title, gpus, heads, soft, sinks, windows, sharing, exact = rows[name]
        assert title == backend.title
        assert [int(n) for n in re.findall(r"(\d+)\.x", gpus)] == sorted(backend.max_head)
        assert {int(n) for n in re.findall(r"\d+", heads.partition(";")[0])} == set(backend.max_head.values())
        if name == "sdpa":
            continue
        has = (backend.softcap, backend.sinks, backend.own_windows, backend.own_sharing)
        assert tuple(cell == "yes" for cell in (soft, sinks, windows, sharing)) == has
        assert exact.startswith("no" if backend.deterministic_max == 0 else "yes")
        assert (str(backend.deterministic_max) in exact) == (0 < backend.deterministic_max < 1000)
    orders = {line.split("|")[2].strip() for line in page.splitlines() if line.count("|") == 3}
    assert {", ".join(order) for order in attention_backends._ORDER.values()} <= orders


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]
