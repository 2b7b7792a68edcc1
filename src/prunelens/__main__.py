"""`python -m prunelens` is the command line."""

from prunelens.cli import main

if __name__ == "__main__":
    main()
