"""``python -m raytorch``: the command, where it is not installed as one."""

from raytorch.cli.main import main

main()
