"""Reference pages made from the code: command line, settings, protocol, status document and Python API."""
