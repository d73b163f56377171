"""`or1 plan` against measurements (check) and against the Skywork-OR1 report (report)."""
