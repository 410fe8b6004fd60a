"""Weights of others: files and libraries in, canonical names and a report out."""
