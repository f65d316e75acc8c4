"""`python -m flashvl`: the command line where the `flashvl` program is not in the PATH."""

from flashvl.cli import main

main()
