"""GSM8K by or1 eval and by lm-evaluation-harness."""
