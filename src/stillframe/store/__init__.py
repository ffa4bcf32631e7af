"""What is kept: paths, records, snapshot payloads."""
