"""Talking into the guest: wire format, exec, files, identity."""
