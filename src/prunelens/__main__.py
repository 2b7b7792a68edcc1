"""`python -m prunelens` is the command line."""

from prunelens.cli.main import main

if __name__ == "__main__":
    main()
