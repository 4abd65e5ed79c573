"""Loads adapter directories with PEFT and prints logits: runs in PEFT's environment, without kpatch.

Standard input: {adapters: {name: folder}, ids: [token ids], prompts: [text]}.
Standard output: {versions, adapters: {name: {auto, merged, fan_in_fan_out, warnings, answers}}}.

With {inside: {kpatch: checkout, model: directory, patch: file}} it takes kpatch from that checkout, lets PEFT do
things while a patch is on a model, and answers {inside: {what: whether the weights end as without the patch}}.
"""

import json
import sys
import warnings
from contextlib import nullcontext
from importlib.metadata import version

import torch
from peft import AutoPeftModel, AutoPeftModelForCausalLM, LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


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


def changed(model, **settings):
    """The model with an adapter, and with an MLP that is trained as a whole where `settings` say so."""
    torch.manual_seed(0)
    found = get_peft_model(model, LoraConfig(r=4, **settings)).eval()
    for name, weight in found.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    return found


def inside(kpatch, model, patch):
    """What becomes of the weights when PEFT does this or that while a patch is on them."""
    sys.path.append(kpatch)
    from kpatch.errors import Refused
    from kpatch.evaluate.patched import patched

    ways = {
        "merge_adapter": lambda net: net.merge_adapter() or net,
        "merge_and_unload": lambda net: net.merge_and_unload(),
        "unload": lambda net: net.unload(),
    }
    answers = {}
    for dora in (False, True):
        for name, way in ways.items():
            ended = []
            for on in (True, False):
                net = changed(AutoModelForCausalLM.from_pretrained(model), target_modules=["down_proj"], use_dora=dora)
                with patched(net, patch) if on else nullcontext():
                    net = way(net)
                ended.append(net.state_dict())
            one, other = ended
            answers[f"{name} dora={dora}"] = all(torch.equal(weight, other[key]) for key, weight in one.items())
    for saved in ("down_proj", "mlp"):
        net = changed(AutoModelForCausalLM.from_pretrained(model), target_modules=["q_proj"], modules_to_save=[saved])
        before = {key: weight.clone() for key, weight in net.state_dict().items()}
        try:
            with patched(net, patch):
                answers[f"{saved} refused"] = False
        except Refused as error:
            answers[f"{saved} refused"] = "modules_to_save" in str(error)
        with net.disable_adapter(), patched(net, patch):
            pass
        answers[f"{saved} off"] = all(torch.equal(weight, before[key]) for key, weight in net.state_dict().items())
    return answers


def main():
    torch.set_num_threads(1)
    given = json.load(sys.stdin)
    adapters = given.get("adapters", {})
    found = {name: load(folder, given["ids"], given["prompts"]) for name, folder in adapters.items()}
    answer = {"versions": {name: version(name) for name in ("peft", "transformers", "torch")}, "adapters": found}
    if "inside" in given:
        answer["inside"] = inside(**given["inside"])
    json.dump(answer, sys.stdout)


main()
