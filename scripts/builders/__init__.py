"""Implementation of ``build_data.py``: a module for each sub-command, and modules that read the packages."""
