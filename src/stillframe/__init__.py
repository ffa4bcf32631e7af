"""Stillframe snapshots and forks virtual machines."""

__version__ = "0.1.0"
