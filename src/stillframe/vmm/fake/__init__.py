"""A hypervisor without guest kernels, for tests and for seeing the API."""
