"""Reads weights from files and other libraries, renames them to canonical names, and reports what was mapped."""
