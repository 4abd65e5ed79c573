"""Loads adapter directories with PEFT and prints logits: runs in PEFT's environment, without kpatch.

Standard input: {adapters: {name: folder}, ids: [token ids], prompts: [text]}.
Standard output: {versions, adapters: {name: {auto, merged, fan_in_fan_out, warnings, answers}}}.
"""

import json
import sys
import warnings
from importlib.metadata import version

import torch
from peft import AutoPeftModel, AutoPeftModelForCausalLM, PeftConfig
from transformers import AutoTokenizer


@torch.no_grad()
def load(folder, ids, prompts):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # nothing but the folder: the base is found through adapter_config.json
        auto = AutoPeftModelForCausalLM if PeftConfig.from_pretrained(folder).task_type else AutoPeftModel
        model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    if prompts:
        tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)
        for prompt in prompts:
            given = tokenizer(prompt, return_tensors="pt")
            out = model.generate(**given, max_new_tokens=8, do_sample=False)
            answers.append(tokenizer.decode(out[0, given["input_ids"].shape[1] :]))
    tokens = torch.tensor([ids])
    auto = model(tokens).logits[0]
    with model.disable_adapter():
        base = model(tokens).logits[0]
    merged = model.merge_and_unload()(tokens).logits[0]
    return {
        "auto": auto.tolist(),
        "base": base.tolist(),
        "merged": merged.tolist(),
        "warnings": [
            str(one.message) for one in caught if "adapter" in str(one.message) or "fan_in" in str(one.message)
        ],
        "answers": answers,
    }


def main():
    torch.set_num_threads(1)
    given = json.load(sys.stdin)
    found = {name: load(folder, given["ids"], given["prompts"]) for name, folder in given["adapters"].items()}
    names = ("peft", "transformers", "torch")
    json.dump({"versions": {name: version(name) for name in names}, "adapters": found}, sys.stdout)


main()
