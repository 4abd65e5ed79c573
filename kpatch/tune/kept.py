"""Verdicts in the cache, by all that decides them: weights, method, setting, pilot facts and seed."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from kpatch.cache import atomic_write_text, cache_dir
from kpatch.edit.methods import Inputs
from kpatch.models.fingerprint import weights_fingerprint
from kpatch.tune.judge import Judge, Setting, Verdict

_CODE = 1  # raise it when the same settings come to give other verdicts


def kept_verdict(judge: Judge, setting: Setting, inputs: Inputs) -> Verdict | None:
    """What an earlier run found for the setting; None where there is nothing, or nothing whole."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        verdict = Verdict.from_dict(json.loads(_path(judge, setting, inputs).read_text(encoding="utf-8")))
        if len(verdict.gains) == len(judge.facts):
            return verdict
    return None


def keep(judge: Judge, setting: Setting, inputs: Inputs, verdict: Verdict) -> None:
    """Keep a verdict. Raises KpatchError where the cache cannot be written."""
    atomic_write_text(_path(judge, setting, inputs), json.dumps(verdict.to_dict()))


def _path(judge: Judge, setting: Setting, inputs: Inputs) -> Path:
    model = judge.model
    content = [_CODE, weights_fingerprint(model, inputs.report), model.precision, model.device.type]
    content += [judge.method.name, setting.hyper.to_dict(), list(setting.hyper.layers), setting.wordings]
    content += [[fact.to_dict() for fact in judge.facts], inputs.corpus, inputs.tokens, inputs.seed, inputs.budget]
    name = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return cache_dir("tune") / f"{name}.json"
