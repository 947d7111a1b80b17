"""The benchmarks that `python -m benchmarks` runs, one module each; `NAME_process.py` is a process that NAME starts."""
