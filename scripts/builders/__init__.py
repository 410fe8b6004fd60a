"""What ``build_data.py`` is made of: one module for each sub-command, and the two that read the packages."""
