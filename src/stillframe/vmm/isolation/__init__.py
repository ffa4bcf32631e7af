"""What a VMM is kept apart from: other VMs' files, and the host's network."""
