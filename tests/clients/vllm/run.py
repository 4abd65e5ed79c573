"""Asks vLLM with and without a LoRA adapter: runs in vLLM's environment, without kpatch.

Standard input: {model: folder, adapter: folder, max_lora_rank, prompts: [text]}.
Standard output: {versions, without: [answers], adapted: [answers]}.
"""

import json
import os
import sys
from importlib.metadata import version

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1")


def main():
    # vLLM itself writes to standard output, so the result goes where only the caller looks
    result, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)
    given = json.load(sys.stdin)

    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    model = LLM(
        given["model"],
        dtype="float32",
        enable_lora=True,
        max_lora_rank=given["max_lora_rank"],
        max_model_len=128,
        max_num_seqs=4,
        max_num_batched_tokens=128,
        enforce_eager=True,
    )
    greedy = SamplingParams(temperature=0, max_tokens=8)

    def ask(adapter):
        return [one.outputs[0].text for one in model.generate(given["prompts"], greedy, lora_request=adapter)]

    without, adapted = ask(None), ask(LoRARequest("news", 1, given["adapter"]))
    names = ("vllm-cpu", "transformers", "torch")
    found = {"versions": {name: version(name) for name in names}, "without": without, "adapted": adapted}
    json.dump(found, result)
    result.flush()


if __name__ == "__main__":
    main()
