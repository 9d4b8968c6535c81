"""Data sets, images, splits and the prepared store."""
