"""The report's study of entropy collapse in miniature: `python -m benchmarks.paper OUT_DIR`.

task.py    the problems, and the tiny model that starts out able and undecided
reward.py  what a response is worth
arms.py    the settings that are compared, each a Config
runs.py    trains every arm on several seeds with or1's own Trainer
claims.py  what the report says, and the rule that decides each statement; written before the runs
page.py    the page with a plot for each claim
"""
