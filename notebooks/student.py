"""One notebook of a student, run in a process of its own: cases go in, answers come out.

Of the notebook only imports, definitions, constants and the cells of exercises are run. An endless
loop or a crash ends that process alone, and it is started again for the next question.
What comes back is read by `torch.load(weights_only=True)`, which runs nothing.
Not here: whether an answer is right (`grade.py`); a sandbox: the code runs with your rights.
"""

import ast
import contextlib
import io
import json
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from compare import Trouble, answer

MEMORY = 8 * 2**30  # bytes that the process may hold, where the system can limit them
LARGEST = 2**28  # bytes of one answer


# ------------------------------------------------------------------- in the student's process
def serve(connection) -> None:
    """Load a notebook, then answer: a request is (function, case), a reply (is it one, answer)."""
    if hasattr(os, "setsid"):  # no Windows
        import resource

        os.setsid()  # what it starts ends with it
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1), os.dup2(nowhere, 2)  # it may print what it likes
    connection.send_bytes(b"ready")
    names, troubles = {"__name__": "__main__"}, []
    while True:
        function, case = pickle.loads(connection.recv_bytes())
        try:
            if function == "":
                reply = True, load(*case, names, troubles)
            elif function in names:
                reply = True, to_plain(answer(names[function], case))
            else:
                reply = False, " ".join(["is not there", *troubles[:1]])
        except Trouble as trouble:
            reply = False, str(trouble)
        except BaseException as error:  # also SystemExit
            reply = False, f"raises {type(error).__name__}: {error}"
        file = io.BytesIO()
        torch.save(reply, file)
        connection.send_bytes(file.getvalue())


def load(path: Path, alone: bool, names: dict, troubles: list[str]) -> None:
    """Run what a notebook defines, and each cell of an exercise. alone: without the library."""
    sys.modules.update({"tinydance": None, "checks": None} if alone else {})
    defines = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        lines = "".join(cell["source"] if cell["cell_type"] == "code" else "").splitlines()
        is_exercise = "exercise" in cell["metadata"].get("tags", [])
        try:
            nodes = ast.parse("\n".join(s for s in lines if not s.startswith(("%", "!")))).body
        except SyntaxError as error:
            troubles.append(f"(SyntaxError: {error})")
            continue
        for node in nodes:
            calls = any(isinstance(part, ast.Call) for part in ast.walk(node))
            is_constant = isinstance(node, ast.Assign) and not calls
            if is_exercise or is_constant or isinstance(node, defines):
                try:
                    exec(compile(ast.Module([node], []), path.name, "exec"), names)
                except BaseException as error:
                    troubles.append(f"({type(error).__name__}: {error})")


def to_plain(x):
    """An answer as what `torch.load` reads without running anything: tensors, numbers, lists."""
    if isinstance(x, torch.Tensor):
        return x.detach().cpu().clone()
    if isinstance(x, (np.ndarray, np.generic)):
        return torch.from_numpy(np.array(x)) if x.ndim else x.item()
    if isinstance(x, dict):
        return {to_plain(key): to_plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple, range)):
        return (tuple if isinstance(x, tuple) else list)(map(to_plain, x))
    if x is None or isinstance(x, (bool, int, float, str, bytes)):
        return x
    raise Trouble(f"returns a {type(x).__name__}")


# ------------------------------------------------------------------------ in the grader's process
class Student:
    """One notebook of one student. Its process is started again where it has ended."""

    def __init__(self, path: Path, alone: bool, limit: float):
        self.path, self.alone, self.limit = path.resolve(), alone, limit
        self.process, self.broken = None, ""

    def ask(self, function: str, case: tuple):
        """The student's answer to a case. Raises Trouble where there is none in time."""
        if self.broken:
            raise Trouble(self.broken)
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, other = context.Pipe()
            self.process = context.Process(target=serve, args=(other,), daemon=True)
            self.process.start()
            other.close()
            self.pipe.recv_bytes()  # "ready": until here it was our code
            try:
                self.exchange("", (self.path, self.alone))
            except Trouble as trouble:
                self.broken = f"cannot be run: the notebook {trouble}"
                raise Trouble(self.broken) from trouble
        return self.exchange(function, case)

    def exchange(self, function: str, case: tuple):
        timer, begun = threading.Timer(self.limit, self.end), time.monotonic()
        timer.start()
        try:
            self.pipe.send_bytes(pickle.dumps((function, case)))
            reply = io.BytesIO(self.pipe.recv_bytes(LARGEST))
            is_answer, value = torch.load(reply, weights_only=True)
        except Exception as error:  # it has ended, or what it sent is no reply
            self.end()
            self.process, late = None, time.monotonic() - begun >= self.limit
            reason = f"gives no answer in {self.limit:g} seconds" if late else "ends its process"
            raise Trouble(reason) from error
        finally:
            timer.cancel()
        if not is_answer:
            raise Trouble(value)
        return value

    def end(self) -> None:
        if self.process is not None:
            with contextlib.suppress(OSError, AttributeError):  # no Windows; or just started
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
