"""What runs inside sandboxes. Never imported by the trainer: `or1.reward.code.sandbox` sends the sources.

These files are joined into one script (wire, prelude where needed, then runner or checker), import the standard
library only, and are the only ones in the project that run code they are given.
"""
