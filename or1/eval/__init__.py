"""How good a model is: avg@k, pass@k and difficulty, by a run or by a command."""
