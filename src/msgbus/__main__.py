"""`python -m msgbus`: the command line, where `msgbus` is not on the path."""

from msgbus.cli import main

if __name__ == "__main__":
    main()
