"""Generation with the embedded engine."""
