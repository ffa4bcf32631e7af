"""One file for each part of the contract: HTTP to engine calls and back."""
