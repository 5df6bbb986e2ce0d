"""A program in a process of its own that answers jobs: one line of JSON in on stdin, one out on a pipe.

Its own output goes into a log, which is shown when it ends early.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from typing import IO, Any


class Contender:
    """A running process. ``command`` gets ``--answers FD``, the pipe that it writes its answers to."""

    def __init__(self, name: str, command: Sequence[str], env: dict[str, str]) -> None:
        self.name = name
        self.log: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the process
        read, write = os.pipe()
        self.process = subprocess.Popen(
            [*command, "--answers", str(write)],
            env={**os.environ, **env},
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=self.log,
            pass_fds=[write],
            text=True,
        )
        os.close(write)
        self.answers = os.fdopen(read)

    def ask(self, job: dict[str, Any]) -> Any:
        """What it answers to one job.

        Raises:
            SystemExit: it has ended; with the end of its log.
        """
        assert self.process.stdin is not None
        try:
            print(json.dumps(job), file=self.process.stdin, flush=True)
            line = self.answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.log.seek(0)
            raise SystemExit(f"{self.name} ended:\n{self.log.read()[-4000:]}")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()
