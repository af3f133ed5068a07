"""One file for each framework; each imports its framework alone and is loaded by name."""
