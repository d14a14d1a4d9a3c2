"""Vocabulary and contracts shared by every part. Imports neither torch nor a host."""
