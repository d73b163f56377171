"""LMHead: plain logits without targets, the losses with them, shared and tied parameters."""

import pytest
import torch
from torch import nn

from or1_kernels import LMHead, linear_logprob_entropy


@pytest.mark.parametrize("bias", [False, True])
def test_three_forms(bias):
    torch.manual_seed(0)
    linear = nn.Linear(6, 19, bias=bias)
    head = LMHead.from_linear(linear, logit_scale=0.5)
    hidden, targets = torch.randn(2, 5, 6), torch.randint(0, 19, (10,))
    assert torch.equal(head(hidden), linear(hidden))
    flat = hidden.reshape(10, 6)
    logp, entropy = head(flat, targets)
    want = linear_logprob_entropy(flat, linear.weight, targets, bias=linear.bias, logit_scale=0.5)
    assert torch.equal(logp, want[0]) and torch.equal(entropy, want[1])
    loss, stats = head(flat, targets, torch.ones(10), token_weight=torch.full((10,), 0.1))
    loss.backward()
    assert torch.equal(stats.logp, logp.detach()) and linear.weight.grad.abs().sum() > 0
    assert not bias or linear.bias.grad.abs().sum() > 0


def test_tied_embedding_stays_tied():
    embedding = nn.Embedding(19, 6)
    linear = nn.Linear(6, 19, bias=False)
    linear.weight = embedding.weight
    head = LMHead.from_linear(linear)
    assert head.weight is embedding.weight
    logp, _ = head(embedding(torch.arange(5)), torch.arange(5))
    logp.sum().backward()
    full = embedding.weight.detach().requires_grad_()
    lp = (full[:5] @ full.T).log_softmax(-1).diagonal()
    (want,) = torch.autograd.grad(lp.sum(), full)
    torch.testing.assert_close(embedding.weight.grad, want)


def test_state_dict_is_that_of_a_linear_layer():
    head = LMHead(6, 19)
    assert isinstance(head, nn.Linear) and set(head.state_dict()) == {"weight"}


def test_options_without_targets_are_refused():
    with pytest.raises(ValueError, match="no targets"):
        LMHead(6, 19)(torch.zeros(2, 6), temperature=0.5)
