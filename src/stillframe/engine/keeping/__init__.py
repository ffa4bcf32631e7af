"""Keeping snapshots: schedules, expiry, edits, the family tree, quotas, the host's resources."""
