"""Runs the command line ``python -m jflow.comparison``; see ``jflow.comparison.shell``."""

from jflow.comparison.shell import main

if __name__ == "__main__":
    main()
