"""One HTML page on what an output folder holds, and the tables of experiments."""
