"""Print docs/models.md: `python -m benchmarks.architectures > docs/models.md`."""

from benchmarks.architectures.check import page
from or1.core.quiet import quiet_libraries

if __name__ == "__main__":
    quiet_libraries()
    print(page(), end="")
