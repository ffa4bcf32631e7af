"""OCI references, registries, layers, root disks, kernel and initrd."""
