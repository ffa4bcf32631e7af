"""HTTP: the contract to the engine and back."""
