"""Exit with an error unless a run has learnt: held-out greedy accuracy up by 25 points, as README says."""

import json
import sys
from pathlib import Path

GAIN_POINTS = 25

records = [json.loads(line) for line in (Path(sys.argv[1]) / "metrics.jsonl").read_text().splitlines()]
values = [record["eval/greedy/avg@1"] for record in records if "eval/greedy/avg@1" in record]
gain = 100 * (values[-1] - values[0])
print(f"greedy accuracy {100 * values[0]:.1f} -> {100 * values[-1]:.1f} %")
if gain < GAIN_POINTS:
    sys.exit(f"the gain is {gain:.1f} points, but README says more than {GAIN_POINTS}")
