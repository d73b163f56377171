"""The plan of a run with adapters: small gradients and moments, two GEMMs of the head, megabytes to save and push."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from or1.config.load import load_config
from or1.plan.adapters import Adapters
from or1.plan.devices import GIB, find_device
from or1.plan.estimate import Plan, make_plan
from or1.plan.head import head_buffers
from or1.plan.shapes import shape_of
from or1.plan.table import plan_json, print_plan_table, verdict

RECIPE = "examples/recipes/7b-lora-1gpu.toml"


def planned(root: Path, *overrides: str) -> Plan:
    config = load_config(root / RECIPE, overrides, files=False)
    return make_plan(config, shape_of(config.model.path), find_device("H100", "cuda")[0])


def test_the_recipe_fits_one_80_gb_gpu_and_full_fine_tuning_does_not(root: Path) -> None:
    plan = planned(root)
    assert plan.fits and plan.longest == 34816 and plan.largest_tokens >= plan.longest
    full = replace(plan.choices, adapters=None, masters=True)
    config = plan.config.model_copy(update={"model": plan.config.model.model_copy(update={"lora": None})})
    whole = make_plan(config, plan.shape, plan.device)
    assert whole.choices == full and not whole.fits and "does not fit" in verdict(whole)

    numbers, others = plan_json(plan), plan_json(whole)
    # Rank 32 on seven layers of each of 28: 32 * (in + out).
    layer = 2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944)
    assert numbers["trained_parameters"] == 28 * 32 * layer
    assert 0.8 * GIB < numbers["checkpoint_bytes"] < GIB < 80 * GIB < others["checkpoint_bytes"]
    assert numbers["push_bytes"] == others["push_bytes"]
    seconds, more = (each["stages"][0]["seconds"] for each in (numbers, others))
    assert seconds["LM head"] * 3 == more["LM head"] * 2
    assert seconds["matrix products"] < 0.8 * more["matrix products"]


def test_an_adapter_alone_and_four_bits_need_less(root: Path) -> None:
    plan, alone = planned(root), planned(root, "model.lora.push=adapter")
    assert plan_json(alone)["push_bytes"] == 4 * plan_json(plan)["trained_parameters"] < 0.4 * GIB
    four = planned(root, "model.lora.quantize=nf4")
    weights = [each.stages[0].memory.phases[1].parts["weights"] for each in (plan, four)]
    assert weights[1] < 0.4 * weights[0]


def test_a_frozen_head_has_no_gradient_buffer(root: Path) -> None:
    plan = planned(root)
    frozen = head_buffers(plan.shape, plan.choices, plan.device, 1000)
    trained = head_buffers(plan.shape, replace(plan.choices, adapters=None), plan.device, 1000)
    size = plan.shape.vocab * plan.shape.hidden
    assert trained.kept - frozen.kept == 4 * size and trained.backward - frozen.backward == 6 * size


def test_targets_choose_layers(root: Path) -> None:
    shape = planned(root).shape
    assert list(Adapters(8, ("q_proj",)).layer_shapes(shape)) == [(3584, 3584)]
    assert len(list(Adapters(8, ("all-linear",)).layer_shapes(shape))) == 7
    assert sum(Adapters(8, ("self_attn.k_proj",)).sizes(shape)) == 28 * 8 * (3584 + 512)


def test_the_table_says_what_adapters_cost(root: Path) -> None:
    out = io.StringIO()
    print_plan_table(planned(root), "test", Console(file=out, width=200))
    text = " ".join(out.getvalue().split())
    assert "rank 32, 80.7 M trained parameters (1.06%) in 32 bit" in text and "two GEMMs of three" in text
    assert "checkpoint 0.90 GiB, push to an engine of its own 14.19 GiB" in text
    assert json.dumps(plan_json(planned(root)))
