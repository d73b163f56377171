"""The code verifier: it runs programs of the policy in a sandbox and compares their answers outside the sandbox.

A program gets inputs only. The expected answers never enter its sandbox. The grader (`or1.reward.code.grade`) compares
them, or, for scripts of asserts, a second sandbox that exchanges values with the first. A program that forges its
results can therefore only forge an answer, and would need to know the right one.
"""
