"""Poisons, defenses and victims measured together: one dataset, a matrix, a sweep."""
