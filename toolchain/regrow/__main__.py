"""`python -m regrow`: the command line."""

from regrow_toolchain.cli import main

if __name__ == "__main__":
    main()
