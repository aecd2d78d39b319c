"""python tests/killed.py FOLDER COUNT SCRIPT FLAGS: run a script and kill it (-9) before its COUNT-th change of a file in FOLDER.

With a COUNT of 0 the script runs to its end. Then the number of changes is printed to stderr.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def watch(folder: str, count: int) -> None:
    changes = 0

    def before(event: str, arguments: tuple) -> None:  # Python calls it before each operation
        nonlocal changes
        if event == "open":
            path, _, flags = arguments
            changed = isinstance(path, str) and path.startswith(folder) and flags & (os.O_WRONLY | os.O_RDWR)
        else:  # shutil.rmtree names the files relative to an open folder
            changed = event in CHANGES and (str(arguments[0]).startswith(folder) or not os.path.isabs(os.fsdecode(arguments[0])))
        changes += bool(changed)
        if changed and changes == count:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(before)
    return lambda: changes


if __name__ == "__main__":
    _, folder, count, *sys.argv = sys.argv
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    sys.modules.update({"matplotlib": None, "matplotlib.figure": None})  # drawing takes longer than the runs of the tests
    changes = watch(folder, int(count))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        print(f"changes: {changes()}", file=sys.stderr)
