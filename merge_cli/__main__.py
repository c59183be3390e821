"""python -m merge_cli, and the command merge-cli"""

import signal


def main() -> None:
    """Run the command line."""
    # Ctrl-C while modules are still being loaded ends the process, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from merge_cli.cli import main as run

    run()


if __name__ == "__main__":
    main()
