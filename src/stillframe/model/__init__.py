"""The nouns, the state table and the error tree. Imports nothing else of ours."""
