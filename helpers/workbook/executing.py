"""One notebook in a process of its own, which the runner starts in the kernel's environment.

It reads its job, one line of JSON, from standard input, and exits with 0, or says on stderr what
went wrong. It stops, and its kernel with it, when standard input closes: the runner was
interrupted, or is gone.
"""

import json
import os
import signal
import sys
import threading

import papermill
from nbclient.output_widget import OutputWidget
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import Engine, papermill_engines
from papermill.exceptions import PapermillExecutionError

from .notebooks import read, widget_errors


class SilentOutput(OutputWidget):
    """An Output widget that keeps its content on this side: nbclient sends it back to the kernel on
    the socket where it awaits a cell's reply, and may then never notice the reply (its issue 312;
    about one such cell in twenty on a busy machine)."""

    def sync_state(self) -> None:
        pass


class WorkbookEngine(Engine):
    """Papermill's own engine, with such Output widgets and without the kernel's chatter."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, execution_timeout, **_):
        settings = {"kernel_name": kernel_name, "timeout": execution_timeout}
        settings |= {"coalesce_streams": True, "extra_arguments": ["--log-level=CRITICAL"]}
        client = PapermillNotebookClient(nb_man, **settings)
        client.widget_registry = {"@jupyter-widgets/output": {"OutputModel": SilentOutput}}
        client.execute()


papermill_engines.register("workbook", WorkbookEngine)


def execute(path, output, parameters, cwd, cell_seconds) -> str | None:
    """Execute the notebook at `path` into the file `output`. Returns None, or where and why it
    failed: a cell or a widget's callback raised, the kernel died, the disk is full."""
    # under LANG=C the runner's paths may hold undecoded bytes, which no notebook can
    path, output, cwd = (os.fsdecode(os.fsencode(name)) for name in (path, output, cwd))
    nb = read(path)
    target = str(output).replace("{", "{{").replace("}", "}}")  # papermill formats its paths
    settings = {"engine_name": "workbook", "kernel_name": "python3", "language": "python"}
    settings |= {"execution_timeout": cell_seconds, "progress_bar": False, "cwd": cwd}
    try:
        done = once_more(papermill.execute_notebook, nb, target, parameters, **settings)
    except PapermillExecutionError as error:
        index = error.cell_index - bool(parameters)  # papermill put a cell of parameters in front
        first = next((line for line in error.source.splitlines() if line.strip()), "")
        where = f"cell {index + 1} of {len(nb.cells)}: {first.strip()}"
        return f"{where}\n  {error.ename}: {' '.join(str(error.evalue).split())[:300]}"
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    errors = widget_errors(done)
    return f"a widget's callback raised\n  {errors[0]}" if errors else None


def once_more(run, *arguments, **settings):
    """`run`, and again where its kernel died before any cell: kernels choose a free port and bind
    it later, and in between another process may have taken it ("Address already in use")."""
    try:
        return run(*arguments, **settings)
    except RuntimeError as error:
        if "Kernel died before replying" not in str(error):
            raise
    return run(*arguments, **settings)


def _stop_when_input_closes() -> None:
    while os.read(0, 64):
        pass
    if os.name == "nt":
        signal.raise_signal(signal.SIGINT)  # where os.kill would end this process at once
    else:
        os.kill(os.getpid(), signal.SIGINT)  # wakes the main thread, whatever it waits for


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where begun with &
    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_stop_when_input_closes, daemon=True).start()
    sys.exit(execute(**job))
