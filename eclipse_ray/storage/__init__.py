"""Where bytes lie: local folders and object stores, behind one small interface."""
