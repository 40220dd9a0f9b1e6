"""Where what must outlast a request is kept; each implements a seam that a rule declares."""
