"""One optimizer step: the update, its optimizer, its metrics, and the queue of rollouts that feeds it."""
