"""Rows of files → examples → global batches."""
