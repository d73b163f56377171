"""Suppression of progress bars and advice that libraries print."""

from __future__ import annotations

import logging
import os


def quiet_libraries() -> None:
    """Turn off progress bars and warnings of Hugging Face libraries; their errors are still shown."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
