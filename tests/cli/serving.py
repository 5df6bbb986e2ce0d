"""A real server in a process of its own, on a free port of this machine."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai


class Server:
    """``mla serve`` as a context: ``url``, ``client()``, and what it wrote."""

    def __init__(self, model: Path, log: Path, *options: object, **environment: str) -> None:
        self.model = str(model)
        self.log = log
        command = [sys.executable, "-m", "mla", "serve", self.model, "--port", "0", *map(str, options)]
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                command,
                stdout=stream,
                stderr=stream,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
            )
        self.url = self._wait()

    def _wait(self) -> str:
        end = time.monotonic() + 300
        while time.monotonic() < end:
            if found := re.search(r"serving .* at (http://\S+)", self.notes()):
                return found[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.stop()
        raise RuntimeError(f"no server: {self.notes()}")

    def notes(self) -> str:
        return self.log.read_text()

    def client(self, key: str = "none", **options) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=300, **options)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=30)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is not None:
            return
        try:
            self.stop()  # killed, vLLM's server would leave its engine and its workers behind
        except subprocess.TimeoutExpired:
            self.stop(signal.SIGKILL)


class VLLMServer(Server):
    """It takes this process over, so it says in vLLM's way that it is ready."""

    def __init__(self, model: Path, log: Path, *options: object, **environment: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        super().__init__(model, log, "--engine", "vllm", "--port", self.port, *options, **environment)

    def _wait(self) -> str:
        end = time.monotonic() + 600
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return f"http://127.0.0.1:{self.port}/v1"
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        self.__exit__()
        raise RuntimeError(f"no server: {self.notes()[-6000:]}")
