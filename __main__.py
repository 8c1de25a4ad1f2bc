"""`python -m autolabel` is the command `autolabel`."""

from autolabel.cli import run

if __name__ == "__main__":
    run()
