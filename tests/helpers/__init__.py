"""What tests of several files share, importable in the processes that tests start too."""
