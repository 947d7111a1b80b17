"""What every process of ours needs from its operating system: errors with exit codes, atomic files, paths, children."""
