"""Real inputs of the head: hidden states of a model on text and on its own answers, and the head's figures on them."""

import os

# As in `or1`, and before torch is imported: spinning threads distort every time on a machine that is not idle.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
