"""Command of benchmarks.plan.report: `python -m benchmarks.plan_report [--write]`."""

from benchmarks.plan.report import main

if __name__ == "__main__":
    main()
