"""vLLM in processes of its own: jobs go in as JSON, answers come out. Tests and the benchmark share it.

    python -m tests.vllm.engine JOBS.json ANSWERS.json

A job is a model, options for ``vllm.LLM``, and rounds of prompts; the prompts of a round are asked at once.
Clients who asked the prompts in "left" before have gone after three steps.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

# vLLM without our plugin.
STOCK = {"VLLM_PLUGINS": ""}

Job = dict[str, Any]
Answer = dict[str, Any]


def stock_options(dtype: str) -> dict[str, Any]:
    """What vLLM has to be told to compute MLA rightly without our plugin."""
    # Its own rotary operator reads MLA's queries wrongly.
    options: dict[str, Any] = {"dtype": dtype, "compilation_config": {"custom_ops": ["-rotary_embedding"]}}
    if dtype != "bfloat16":
        # On a processor with AMX it takes its backend for that, whatever the dtype, which packs bf16 only.
        options["attention_backend"] = "CPU_MLA"
    return options


def run(jobs: list[Job], env: dict[str, str] | None = None, *, timeout: float = 1800) -> list[Answer]:
    """One process for all jobs, one after the other.

    Raises:
        RuntimeError: the process failed; with the end of what it wrote.
    """
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        # Everything in one process starts three times as fast.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("jobs.json", "answers.json")]
        files[0].write_text(json.dumps(jobs))
        process = subprocess.run(
            [sys.executable, "-m", "tests.vllm.engine", *map(str, files)],
            cwd=ROOT,
            env={**os.environ, **settings, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        if process.returncode:
            raise RuntimeError(process.stdout[-6000:])
        answers: list[Answer] = json.loads(files[1].read_text())
    for answer in answers:
        answer["log"] = process.stdout
    return answers


def _answer(job: Job) -> Answer:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    options = {"enforce_eager": True, "skip_tokenizer_init": True, "max_model_len": 512, **job["options"]}
    try:
        llm = LLM(job["model"], **options)
    except Exception as error:  # noqa: BLE001  what vLLM makes of a refusal is what the test asks for
        return {"error": f"{type(error).__name__}: {error}"}
    sampling = SamplingParams(
        temperature=0, max_tokens=job.get("tokens", 12), ignore_eos=True, logprobs=5, detokenize=False
    )
    for number, prompt in enumerate(job.get("left", ())):
        llm.llm_engine.add_request(f"left {number}", TokensPrompt(prompt_token_ids=prompt), sampling)
        for _ in range(3):
            llm.llm_engine.step()
        llm.llm_engine.abort_request([f"left {number}"])
    rounds = []
    for prompts in job["rounds"]:
        inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        found = llm.generate(inputs, sampling, use_tqdm=False)
        rounds.append(
            [
                {
                    "tokens": list(each.outputs[0].token_ids),
                    "logprobs": [
                        {token: value.logprob for token, value in step.items()}
                        for step in each.outputs[0].logprobs
                    ],
                    "cached": each.num_cached_tokens,
                }
                for each in found
            ]
        )
    config = llm.llm_engine.vllm_config
    return {
        "rounds": rounds,
        "cache_tokens": config.cache_config.num_gpu_blocks * config.cache_config.block_size,
        "limit": config.model_config.max_model_len,
    }


def main() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    source, target = map(Path, sys.argv[1:])
    answers = []
    for job in json.loads(source.read_text()):
        answers.append(_answer(job))
        ensure_kv_transfer_shutdown()  # the next model would be given this one's connector
        with contextlib.suppress(AssertionError):  # a refused model left nothing to clean up
            cleanup_dist_env_and_memory()
    target.write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
