"""The report's study of entropy collapse in miniature: `python -m benchmarks.paper OUT_DIR`.

task.py    the problems, and the tiny base model
reward.py  the reward of a response
arms.py    the compared settings, each a Config
runs.py    training of every arm on several seeds with or1's Trainer
claims.py  the report's claims, and the rule that decides each statement; written before the runs
page.py    the page with a plot for each claim
"""
