"""Log-probs from the logits of a plain model, to compare or1's with."""

# L tokens of a response, V vocab

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from or1.core.types import TrainSequence


@torch.no_grad()
def plain_logp(model: nn.Module, sequences: Sequence[TrainSequence]) -> Tensor:
    """Return log-probs from a model's logits, f64[all tokens], one sequence at a time."""
    found = []
    for s in sequences:
        ids = torch.as_tensor(np.concatenate([s.prompt_ids, s.response_ids]).astype(np.int64))
        logits_LV = model(input_ids=ids[None, :-1]).logits[0, len(s.prompt_ids) - 1 :]
        found.append(logits_LV.double().log_softmax(-1).gather(1, ids[len(s.prompt_ids) :, None])[:, 0])
    return torch.cat(found)
