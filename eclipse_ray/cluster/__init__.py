"""Everything that talks to a Ray cluster."""
