"""The former study, on sums of two numbers: `python -m benchmarks.paper.history OUT_DIR`.

Nothing collapses in this task, so many of the claims are not tested by it; see benchmarks.paper for the present study.

task.py    the problems, and the tiny base model
reward.py  the reward of a response
arms.py    the compared settings, each a Config
runs.py    training of every arm on several seeds with or1's Trainer
claims.py  the report's claims, and the rule that decides each statement; written before the runs
page.py    the page with a plot for each claim
"""
