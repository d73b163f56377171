"""Token objectives that the tests of the head run with. A test fails for a kind that is not among them."""

from or1_kernels import PolicyObjective

OBJECTIVES = {
    "ppo": PolicyObjective(),
    "clip_higher": PolicyObjective(clip_low=0.2, clip_high=0.28),
    "ppo_kl_is": PolicyObjective(kl_coef=0.05, is_cap=2.0),
    "cispo": PolicyObjective(kind="cispo", clip_low=1.0, clip_high=0.3),
    "icepop": PolicyObjective(is_cap=1.2, is_floor=0.8, is_mask=True),
    "gspo": PolicyObjective(kind="gspo", clip_low=0.05, clip_high=0.08),
    "cispo_kl": PolicyObjective(kind="cispo", kl_coef=0.1),
}
