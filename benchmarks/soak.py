"""Many requests at once against ``mla serve``, some of whose clients go away: right answers, steady memory.

    python benchmarks/soak.py [MODEL] [--engine transformers] [--requests 500] [--concurrency 16]

Without MODEL a tiny model with random weights is made, which vLLM does not know. Every answer that a client
waits for is compared with the one the server gives to the same request alone, before anything is printed.
"""

import argparse
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.cli.conftest import make_tokenizer
from tests.cli.serving import Server, VLLMServer
from tests.families import build

DISTINCT = 40
GONE = 0.2  # share of requests whose client goes away


def make_requests(seed: int) -> list[dict]:
    """Mixed requests: lengths, endpoints, greedy or drawn."""
    draw = random.Random(seed)
    made = []
    for number in range(DISTINCT):
        text = "".join(draw.choices("abcde fghij. ", k=draw.randrange(1, 300)))
        prompt = (
            {"prompt": text} if draw.random() < 0.5 else {"messages": [{"role": "user", "content": text}]}
        )
        options = {"max_tokens": draw.randrange(1, 25), "temperature": draw.choice([0, 1.0]), "seed": number}
        made.append({**prompt, **options})
    return made


def ask(client: openai.OpenAI, model: str, request: dict, stream: bool, read: int | None = None) -> str:
    """The text of the answer; after ``read`` pieces of it the client goes away."""
    chat = "messages" in request
    endpoint = client.chat.completions if chat else client.completions
    answer = endpoint.create(model=model, stream=stream, **request)
    if not stream:
        return answer.choices[0].message.content if chat else answer.choices[0].text
    pieces = []
    for chunk in answer:
        choice = chunk.choices[0]
        pieces.append((choice.delta.content or "") if chat else choice.text)
        if len(pieces) == read:
            answer.close()
            break
    return "".join(pieces)


def memory(server: Server) -> int:
    """Bytes that the server and its helpers hold."""
    process = psutil.Process(server.process.pid)
    return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))


def soak(server: Server, count: int, concurrency: int) -> None:
    """Ask, compare, print."""
    client = server.client()
    requests = make_requests(0)
    alone = [ask(client, server.model, request, stream=False) for request in requests]
    draw = random.Random(1)
    sizes: list[int] = []
    gone = 0

    def one(number: int) -> bool:
        """Whether the answer is right; one that nobody waits for is."""
        chosen, kind, read = plan[number]
        answer = ask(client, server.model, requests[chosen], stream=kind != "whole", read=read)
        if number % max(1, count // 20) == 0:
            sizes.append(memory(server))
        return answer == alone[chosen] or read is not None

    plan = []
    for _ in range(count):
        leaves = draw.random() < GONE
        gone += leaves
        kind = "stream" if leaves else draw.choice(["whole", "stream"])
        plan.append((draw.randrange(DISTINCT), kind, draw.randrange(1, 4) if leaves else None))
    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        right = list(pool.map(one, range(count)))
    seconds = time.perf_counter() - start
    if not all(right):
        sys.exit(f"{right.count(False)} of {count} answers differ from those given alone")
    print(
        f"{count} requests at concurrency {concurrency} in {seconds:.0f} s, {gone} clients gone in mid-stream"
    )
    print("every answer equals the one given alone")
    # The caches fill their budget first: what counts is whether it goes on growing then.
    quarters = ", ".join(f"{sizes[len(sizes) * part // 4 - 1] / 2**20:.0f}" for part in (1, 2, 3, 4))
    print(f"memory after each quarter of the requests: {quarters} MiB")


def main() -> None:
    """Parse, serve, soak."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--concurrency", type=int, default=16)
    arguments = parser.parse_args()
    if arguments.engine == "vllm" and arguments.model is None:
        parser.error("--engine vllm takes a MODEL")
    with tempfile.TemporaryDirectory() as folder:
        model, log = arguments.model, Path(folder) / "log"
        room = ["--memory", "256MB"]
        if model is None:
            model, room = Path(folder) / "tiny", ["--memory", "2MB"]
            build("deepseek_v3", vocab_size=256).save_pretrained(model)
            make_tokenizer().save_pretrained(model)
        if arguments.engine == "vllm":
            started: Server = VLLMServer(model, log, "--dtype", "float32", "--max-model-len", 1024, *room)
        else:
            started = Server(model, log, "--engine", "transformers", *room)
        with started as server:
            soak(server, arguments.requests, arguments.concurrency)


if __name__ == "__main__":
    main()
