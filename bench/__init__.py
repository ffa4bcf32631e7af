"""What Stillframe costs, measured beside the floor and the peers' way: ``make bench``."""
