"""Every parser that meets bytes of others, with real documents to start from. Used by `benchmarks fuzz` and by tests/fuzz."""
