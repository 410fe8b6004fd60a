"""``python -m mcl``."""

from mcl.cli import main

if __name__ == "__main__":
    main()
