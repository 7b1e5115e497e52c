"""Rows into and out of an installation: import from elsewhere, export of everything."""
