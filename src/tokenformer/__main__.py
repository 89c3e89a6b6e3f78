"""``python -m tokenformer``: the command line."""

from tokenformer.cli.main import main

if __name__ == "__main__":
    main()
