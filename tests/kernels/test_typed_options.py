"""The TypedDicts of keyword arguments equal the signatures that they describe."""

import inspect
from dataclasses import MISSING, fields
from typing import get_type_hints

import pytest
import torch

from or1_kernels import HeadOptions, HeadOptionsDict, LMHead, linear_policy_loss
from or1_kernels.lm_head import PolicyLossDict


def test_options_are_the_fields_of_their_dataclass():
    assert get_type_hints(HeadOptionsDict) == get_type_hints(HeadOptions)
    assert HeadOptionsDict.__optional_keys__ == {field.name for field in fields(HeadOptions)}
    assert all(field.default is not MISSING for field in fields(HeadOptions))


def test_lm_head_takes_the_keywords_of_the_policy_loss():
    hints = get_type_hints(linear_policy_loss)
    parameters = inspect.signature(linear_policy_loss).parameters.values()
    keywords = {p.name: hints[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert get_type_hints(PolicyLossDict) == keywords | get_type_hints(HeadOptions)


def test_lm_head_refuses_options_that_belong_to_the_module():
    with pytest.raises(TypeError, match=r"\['softcap'\], which belong to the module"):
        LMHead(6, 19)(torch.zeros(2, 6), torch.zeros(2, dtype=torch.int64), softcap=1.0)
