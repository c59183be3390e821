"""python -m merge_cli, and the command merge-cli"""

import os
import signal


def main() -> None:
    """Run the command line."""
    # Ctrl-C while modules are still being loaded ends the process, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # torch's threads spin between loops that take microseconds in a small model. Where another
    # process wants the core, it then waits for the spinning one: minutes instead of seconds.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from merge_cli.cli import main as run

    run()


if __name__ == "__main__":
    main()
