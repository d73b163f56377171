"""`python -m or1`."""

from or1.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
