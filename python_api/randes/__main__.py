"""``python -m randes``: the command line."""

from randes.cli import app

if __name__ == "__main__":
    app()
