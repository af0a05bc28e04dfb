"""Is a dataset poisoned? Scores of images and labels, each with a null distribution, and their verdict."""
