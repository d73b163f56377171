"""Keep the chatter of libraries out of the output of or1."""

from __future__ import annotations

import logging
import os


def quiet_libraries() -> None:
    """Keep progress bars and advice of libraries out of the display; their errors still show."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
