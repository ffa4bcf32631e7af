"""Apple's Virtualization.framework: one shim process per VM, and the driver that speaks to it."""
