"""``python -m breastcli``, the form that ``torchrun -m`` needs."""

from breastcli.cli import main

if __name__ == "__main__":
    main()
