"""What every process needs of its operating system: errors with exit codes, atomic files, paths, child processes."""
