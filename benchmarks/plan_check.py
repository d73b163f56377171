"""Command of benchmarks.plan.check: `python -m benchmarks.plan_check OUT_DIR`."""

import sys

from benchmarks.plan.check import main

if __name__ == "__main__":
    sys.exit(main())
