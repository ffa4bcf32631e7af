"""The command line: an HTTP client for people."""
