"""This machine: processes, files, memory of other processes, probes."""
