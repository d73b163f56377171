"""Exit with an error unless a run has learnt: held-out greedy accuracy up by 25 points, as README says.

Prints the sha256 of the metrics without times and memory: two trees that train alike print the same.
"""

import hashlib
import json
import sys
from pathlib import Path

GAIN_POINTS = 25

records = [json.loads(line) for line in (Path(sys.argv[1]) / "metrics.jsonl").read_text().splitlines()]
values = [record["eval/greedy/avg@1"] for record in records if "eval/greedy/avg@1" in record]
gain = 100 * (values[-1] - values[0])
measured = [
    {name: value for name, value in record.items() if name != "time" and not name.startswith(("time/", "perf/"))}
    for record in records
]
digest = hashlib.sha256("".join(json.dumps(record, sort_keys=True) + "\n" for record in measured).encode()).hexdigest()
print(f"metrics without times: sha256 {digest}")
print(f"greedy accuracy {100 * values[0]:.1f} -> {100 * values[-1]:.1f} %")
if gain < GAIN_POINTS:
    sys.exit(f"the gain is {gain:.1f} points, but README says more than {GAIN_POINTS}")
