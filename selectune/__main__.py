"""`python -m selectune`: the command line."""

from selectune.cli import main

if __name__ == "__main__":
    main()
