"""Merges with mergekit: runs in mergekit's environment, without kpatch.

Standard input: {merges: {name: configuration}, out: folder}. Every merge is written to out/name.
Standard output: {versions}.
"""

import json
import os
import sys
from importlib.metadata import version

from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions


def main():
    # progress bars and notes may go to standard output, so the result goes where only the caller looks
    result, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    given = json.load(sys.stdin)
    for name, configuration in given["merges"].items():
        options = MergeOptions(
            copy_tokenizer=False,
            quiet=True,
            write_model_card=False,
            lora_merge_cache=os.path.join(given["out"], "lora"),
        )
        run_merge(MergeConfiguration.model_validate(configuration), os.path.join(given["out"], name), options)
    json.dump({"versions": {name: version(name) for name in ("mergekit", "peft", "transformers", "torch")}}, result)
    result.flush()


main()
