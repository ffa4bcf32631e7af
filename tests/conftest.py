"""Puts this directory on the path, so that scenarios can import ``support``."""
