"""Every parser that reads bytes of other peers or of files, with real documents to start from. Also used by tests/fuzz."""
