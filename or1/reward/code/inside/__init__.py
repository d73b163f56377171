"""Programs that run inside sandboxes. `or1.reward.code.sandbox` sends their sources; the trainer imports `wire` only.

The sandbox joins wire, guard, cleaning (runner only) and runner or checker into one script, with prelude as text.
They import the standard library only. They are the only files in the project that execute code from elsewhere.
"""
