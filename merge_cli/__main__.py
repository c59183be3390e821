"""python -m merge_cli"""

from merge_cli.cli import main

main()
