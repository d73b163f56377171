"""Pictures of the live panel and of the report, of a real run; see `__main__`."""
