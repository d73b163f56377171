"""Print a line of coverage for each room: python .ci/coverage_by_room.py coverage.json [FLOOR].

The JSON comes from `pytest --cov --cov-report=json`. Exits with an error if the total is below FLOOR percent.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path, PurePosixPath


def room_of(path: str) -> str:
    """Return the room of a source file: or1/model, or1/trainer.py, or1_kernels/rows."""
    parts = PurePosixPath(path.replace("\\", "/")).parts
    start = max(i for i, part in enumerate(parts[:-1]) if part in ("or1", "or1_kernels"))
    if parts[start] == "or1_kernels" and len(parts) == start + 2:
        return "or1_kernels"
    return "/".join(parts[start : start + 2])


def main() -> None:
    """Print statements, missed statements and percent of each room and of all."""
    files = json.loads(Path(sys.argv[1]).read_text())["files"]
    rooms: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for path, entry in files.items():
        for room in (room_of(path), "total"):
            rooms[room][0] += entry["summary"]["num_statements"]
            rooms[room][1] += entry["summary"]["missing_lines"]
    total = rooms.pop("total")
    print(f"{'room':24s} {'statements':>10s} {'missed':>7s} {'covered':>8s}")
    for room, (statements, missed) in [*sorted(rooms.items()), ("total", total)]:
        covered = 100 * (1 - missed / statements) if statements else 100.0
        print(f"{room:24s} {statements:10d} {missed:7d} {covered:6.1f} %")
    percent = 100 * (1 - total[1] / total[0])
    if len(sys.argv) > 2 and percent < float(sys.argv[2]):
        sys.exit(f"coverage is {percent:.1f} %, below the floor of {sys.argv[2]} %")


if __name__ == "__main__":
    main()
