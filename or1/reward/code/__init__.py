"""The code reward: programs of the policy, run where they can do no harm, judged where they cannot reach.

A program runs in a sandbox and gets inputs and nothing else. What it must answer stays outside: it is compared by the
grader (`or1.reward.code.grade`) or, for scripts of asserts, in a second sandbox that talks to the first by values. So
a program that forges its results can only ever forge an answer, and has to know the right one.
"""
