"""Hypervisor drivers behind one small protocol."""
