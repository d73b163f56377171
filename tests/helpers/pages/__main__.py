"""Entry point of `python -m tests.helpers.pages`."""

from tests.helpers.pages import main

main()
