"""Pages of docs/ that are written by a program, and what the tests read off the others."""
