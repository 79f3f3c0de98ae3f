"""Entry point of `python -m dinocli`: the same as `dino`, for launchers that start a module."""

from dinocli.cli import main

if __name__ == "__main__":
    main()
