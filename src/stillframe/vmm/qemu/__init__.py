"""QEMU on q35."""
