"""Datasets on disk: reading each format, writing, and images in memory."""
