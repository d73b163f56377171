"""Measure and choose: which of several correct implementations is fastest here, for the shapes of one run.

case      the shapes of a run: row, model, objective
options   which candidates there are
search    a budget of seconds, shared over candidates by successive halving
process   the child that runs candidates, so that one that hangs or crashes can be ended
child     what runs in that child;  benches, head_bench, attention_bench, mlp_bench: what it times and checks
choice    the result;  apply: the one place where a result takes effect
cache     results of earlier measurements;  machine: what they depend on
run       all of that together, for `or1 tune` and before the first update of a run
"""
