"""Asks llama.cpp with and without a LoRA adapter: runs in llama.cpp's environment, without kpatch.

Standard input: {model: GGUF file, adapter: GGUF file, prompts: [text]}.
Standard output: {versions, without: [answers], adapted: [answers]}.
"""

import json
import os
import sys
from importlib.metadata import version

import xllamacpp as llama


def ask(model, adapter, prompts):
    params = llama.CommonParams()
    params.model.path = model
    params.n_ctx = 256
    params.n_parallel = 1
    params.cpuparams.n_threads = 1
    params.warmup = False
    if adapter:
        params.lora_adapters = [llama.CommonAdapterLoraInfo(path=adapter, scale=1.0)]
    server = llama.Server(params)
    answers = []
    for prompt in prompts:
        done = server.handle_completions({"prompt": prompt, "max_tokens": 8, "temperature": 0, "top_k": 1})
        done = json.loads(done) if isinstance(done, str) else done
        answers.append(done["choices"][0]["text"])
    return answers


def main():
    # llama.cpp itself writes to standard output, so the result goes where only the caller looks
    result, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)
    given = json.load(sys.stdin)
    found = {
        "versions": {"xllamacpp": version("xllamacpp")},
        "without": ask(given["model"], None, given["prompts"]),
        "adapted": ask(given["model"], given["adapter"], given["prompts"]),
    }
    json.dump(found, result)
    result.flush()


main()
