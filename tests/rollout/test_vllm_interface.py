"""What or1 uses of vLLM, in sources that stand for vLLM's, and the counts that a server shows. Without vLLM."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from or1.core.errors import EngineError
from or1.rollout.vllm.drafts import DraftCounts, counts_on, taken_from
from or1.rollout.vllm.interface import FIELDS, FUNCTIONS, differences, require_known
from or1.rollout.vllm.local import flat_logp


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write a package with everything that or1 uses."""
    files: dict[str, list[str]] = {}
    for (file, name), wanted in FUNCTIONS.items():
        owner, _, function = name.partition(".")
        files.setdefault(file, []).append(
            f"class {owner}:\n  def {function}(self, {', '.join((*wanted, '*'))}, x=0): ..."
        )
    for (file, name), fields in FIELDS.items():
        files.setdefault(file, []).append(f"class {name}:\n" + "".join(f"  {field}: int = 0\n" for field in fields))
    for file, classes in files.items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        # Methods of a class together, as Python takes the last class of a name.
        path.write_text("\n".join(_merged(classes)))
    return tmp_path


def _merged(classes: list[str]) -> list[str]:
    bodies: dict[str, list[str]] = {}
    for each in classes:
        head, _, body = each.partition("\n")
        bodies.setdefault(head, []).append(body)
    return [f"{head}\n" + "\n".join(body) for head, body in bodies.items()]


def test_a_source_with_all_of_it_has_no_differences(source: Path) -> None:
    assert differences(source) == []


def test_a_renamed_field_and_a_moved_class_are_named(source: Path, tmp_path: Path) -> None:
    file = source / "sampling_params.py"
    file.write_text(file.read_text().replace("flat_logprobs", "flat"))
    (source / "logprobs.py").unlink()
    found = differences(source)
    assert "SamplingParams in sampling_params.py has no 'flat_logprobs'" in found
    assert "logprobs.py has no FlatLogprobs" in found and len(found) == 2


@pytest.mark.skipif("OR1_VLLM_SOURCES" not in os.environ, reason="OR1_VLLM_SOURCES names unpacked vLLM wheels")
def test_other_versions_have_all_of_it() -> None:
    for folder in os.environ["OR1_VLLM_SOURCES"].split(os.pathsep):
        assert differences(Path(folder)) == [], folder


def test_an_unknown_argument_is_refused_with_the_nearest_name(source: Path) -> None:
    require_known({"max_num_batched_tokens": 1}, source)
    with pytest.raises(EngineError, match="did you mean 'block_size'"):
        require_known({"blocksize": 16}, source)
    with pytest.raises(EngineError, match="cannot be read"):
        require_known({"block_size": 16}, source / "nothing")
    require_known({}, source / "nothing")


PAGE = """# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="policy"} 30.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="policy"} 10.0
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="policy"} 120.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="policy"} 6e+01
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="policy",position="0"} 40.0
vllm:spec_decode_num_accepted_tokens_created{engine="0",model_name="policy"} 1.7e+09
"""


def test_counts_of_a_servers_page_are_summed_over_its_engines() -> None:
    counts = counts_on(PAGE)
    assert counts == DraftCounts(drafts=40, tokens=120, accepted=60)
    assert counts.metrics() == {"rollout/draft_accepted": 0.5, "rollout/draft_len": 2.5}
    assert counts_on("").metrics() == {} == taken_from(object()).metrics()


def test_counts_of_a_restarted_server_start_at_zero() -> None:
    before, after = DraftCounts(40, 120, 60), DraftCounts(50, 150, 75)
    assert after.since(before) == DraftCounts(10, 30, 15)
    assert before.since(after) == before


class Flat:
    """Stands for vLLM's FlatLogprobs: a sampled token alone at each position."""

    def __init__(self, token_ids: list[int], logprobs: list[float]):
        self.token_ids, self.logprobs = token_ids, logprobs


class Part:
    def __init__(self, token_ids: list[int], logprobs: Flat | None):
        self.token_ids, self.logprobs = token_ids, logprobs


def test_log_probs_of_other_tokens_are_no_log_probs() -> None:
    assert flat_logp(Part([3, 4], Flat([3, 4], [-0.5, -1.5]))) == [-0.5, -1.5]
    assert flat_logp(Part([], None)) == []
    for logprobs in (None, Flat([3], [-0.5]), Flat([4, 3], [-0.5, -1.5]), Flat([3, 4, 4], [-0.5, -1.5, -2.0])):
        with pytest.raises(EngineError, match="log-probs for 2 tokens"):
            flat_logp(Part([3, 4], logprobs))
