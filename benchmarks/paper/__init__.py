"""The report's study of entropy collapse on a task that can decide it: `python -m benchmarks.paper OUT_DIR`.

RULE.md        how statements are decided; committed before the runs
ladder.py      the task
arms.py        the compared settings
tabular.py     tier A: tables instead of a model, many seeds at once
model.py       tier B: a one-layer Qwen2 that or1's Trainer trains
measures.py    numbers of a run, and the manipulation checks
claims.py      the report's claims as statements
statistics.py  sign test, Holm, alpha spending, interval
rule.py        the verdict of a statement
study.py       the runs, and the findings of a claim
history/       the former study, with sums of two numbers
"""
