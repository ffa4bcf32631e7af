"""The verbs, one file each: what a request makes the engine do."""
