"""Snapshots on their way: out as archives, and in; and whether they run where they arrive."""
