"""MEMIT as kpatch has it: joint writes in all layers of R, rows in several wordings, other subjects held in C.

Source: Meng et al. 2023 (MEMIT), algorithm 1, with the changes that docs/memit.md explains. `Memit` is also the frame
of every method that finds targets for groups of rows and writes them upwards: see `kpatch.edit.memit_paper`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from kpatch import distributed
from kpatch.edit.bystanders import bystanders, windows
from kpatch.edit.earlier import facts_to_hold, facts_to_learn_again
from kpatch.edit.first_token import Part, key_covariances, split, touched
from kpatch.edit.held import Held, Standing
from kpatch.edit.layer_states import written
from kpatch.edit.methods import Edit, Inputs, Method
from kpatch.edit.presets import PRESETS, HyperParams, MemitHyper
from kpatch.edit.protect import protected_keys
from kpatch.edit.refine import Goal, refine
from kpatch.edit.requests import Group, contexts_for, group_facts
from kpatch.edit.solve import KeyCovariance, key_covariance
from kpatch.edit.unpatched import unpatched
from kpatch.edit.upwards import Residual, write_upwards
from kpatch.edit.values_cache import find_values
from kpatch.edit.weights import add, restored
from kpatch.edit.writes import JointObjective
from kpatch.facts.fact import Fact
from kpatch.models.model import Model
from kpatch.patch.delta import Delta, LowRank, smaller, total
from kpatch.reporter import Reporter
from kpatch.stats.covariance import Covariance, collect
from kpatch.stats.moment import SecondMoment
from kpatch.stats.subject_keys import subject_moments
from kpatch.stats.text import open_text
from kpatch.text import counted, ranges

_HELD_TOKENS = 15_360  # of text: 120 windows, two or more of which each step of refinement looks at


class Memit(Method):
    """Joint writes, with subjects that open their text edited at a layer of their own (`kpatch.edit.first_token`)."""

    name = "memit"
    hyper: ClassVar[type[HyperParams]] = MemitHyper
    presets = PRESETS["memit"]
    ranks_share = True
    keys_apart: ClassVar[bool] = True  # each row's key is asked for the residual, not their mean alone
    in_turn: ClassVar[bool] = False  # a part's values are found in the model as the parts before it left it

    def choose_layers(self, model: Model, report: Reporter) -> tuple[int, ...]:
        middle = default_layers(model.n_layers)
        layers = tuple(layer for layer in middle if layer in model.editable)
        if not layers:  # mixtures of experts without a shared expert: a dense layer near them
            below = [layer for layer in model.editable if layer < model.n_layers - 1]
            layers = tuple(sorted(below, key=lambda layer: min(abs(layer - one) for one in middle))[:1])
        if layers:
            report.note(f"layers {ranges(layers)} of {model.n_layers}: chosen by the depth of the model")
        return layers

    def layers(self, hyper: Any) -> tuple[int, ...]:
        return tuple(sorted({*hyper.layers, hyper.first_layer}))

    def edit(self, model: Model, facts: Sequence[Fact], hyper: Any, inputs: Inputs) -> Edit:
        """Contexts, rows, covariance, values, updates. Raises BadInput for too many facts on one subject."""
        on = inputs.on
        again = facts_to_learn_again(on, facts, inputs.report, inputs.gone)
        told = [*facts, *again]
        goal = self.refining(hyper, len(told))
        with unpatched(model, on, inputs.report):  # one C and one set of contexts for a whole chain
            with inputs.report.task("Choosing contexts"):
                contexts = distributed.main_does(lambda: self.contexts(model, hyper, inputs))
            asked = self.spare(hyper), self.chat(hyper), self.others(hyper)
            parts = self.parts(group_facts(model, told, contexts, *asked), hyper)
            layers = touched(parts)
            with inputs.timed("covariance"):
                covariance = self._covariance(model, hyper, layers, inputs)
                held = protected_keys(model, inputs.protect, facts, layers)
                preserved = [self._preserved(model, part, told, covariance, held, inputs) for part in parts]
            text = None if goal is None else self._text(model, covariance, inputs)
            names = map(model.weight_name, layers) if on else ()
            base = {name: model.numbers(name).clone() for name in names}
        earlier = self._held(model, parts, hyper, contexts, facts, base, inputs) if on else []
        values = [] if self.in_turn else [self._values(model, part, inputs) for part in parts]
        deltas, keys, by_row, moved = self._write(model, parts, values, preserved, inputs, earlier)
        if goal is not None and text is not None:
            with inputs.timed("refining"):
                deltas = self._refined(model, deltas, told, facts, text, goal, hyper, inputs)
        about = []
        rows = []
        for part, some, more in zip(parts, values, moved, strict=True):
            opens = {"first": True} if part.first else {}
            for group, found in zip(part.groups, some, strict=True):
                own = [index for index in group.facts if index < len(facts)]
                about += [{"facts": own, "layers": list(places), **opens} for places in self.places(part.hyper)]
                rows.append(found)
            for layer, outputs in sorted(more.items()):
                about += [{"facts": [], "layers": [layer], **opens}] * len(outputs)
                rows.append(outputs)
        return Edit(
            *(deltas, tuple(layers), keys, torch.cat(rows), tuple(about), covariance),
            by_row=by_row,
            refined=goal is not None,
        )

    # What another method of this kind does in its own way

    def parts(self, groups: Sequence[Group], hyper: Any) -> list[Part]:
        """Groups and the layers that they are written to together, in the order in which they are written."""
        return split(groups, hyper)

    def contexts(self, model: Model, hyper: Any, inputs: Inputs) -> tuple[str, ...]:
        """Texts x_j that stand before the prompts; the empty one comes first."""
        return contexts_for(model, hyper.lead_ins, 0, 0, inputs.seed)

    def spare(self, hyper: Any) -> int:
        """How many contexts a fact's wordings take the place of: one context stays."""
        return max(0, int(hyper.lead_ins) - 1)

    def chat(self, hyper: Any) -> int:
        """Whether questions are learned in the model's chat form: 0 no, 1 beside the prompts, 2 alone."""
        return int(hyper.chat)

    def others(self, hyper: Any) -> int:
        """How many questions about other things of a subject are answered as before."""
        return int(hyper.others)

    def places(self, hyper: Any) -> list[tuple[int, ...]]:
        """Which layers each of a group's values is for: here one value for each layer."""
        return [(layer,) for layer in hyper.layers]

    def objective(self, hyper: Any) -> Any:
        """What values are optimized for: the settings that decide them, and no others."""
        return JointObjective(hyper.layers, hyper.steps, hyper.learning_rate, hyper.stop_loss, hyper.clamp, hyper.kl)

    def refining(self, hyper: Any, count: int) -> Goal | None:
        """How residuals of so many facts are refined once they are written; None leaves them as they are."""
        return Goal(hyper.refine, hyper.stop_loss, hyper.kl, hyper.hold) if hyper.refines(count) else None

    def weight(self, model: Model, hyper: Any, layer: int) -> float:
        """λ: the mean of k^T E[k k^T]^{-1} k over text is f, so that f / λ is the mean leverage."""
        return model.key_width(layer) / float(hyper.leverage)

    def subject_weight(self, hyper: Any) -> float:
        """μ, how much other subjects count in C beside text."""
        return float(hyper.subject_weight)

    def check(self, model: Model, hyper: Any, covariance: Covariance) -> None:
        """Refuse a covariance that the method cannot work with, before values are searched. Raises BadInput."""

    def preserve(
        self, model: Model, hyper: Any, layer: int, mean: Tensor, earlier: Tensor | None, report: Reporter
    ) -> KeyCovariance:
        """What `layer` must go on doing, from E[k k^T] [f, f] and keys [f, p] that must keep their meaning."""
        return key_covariance(layer, mean, self.weight(model, hyper, layer), earlier, report)

    def residual(self, model: Model, part: Part, values: Tensor) -> Residual:
        """What a layer is asked for: the whole of what its target still lacks. values [n, R, d]."""

        def lacking(layer: int, keys: Tensor, h: Tensor) -> Tensor:
            target = values[:, part.hyper.layers.index(layer)].double()  # (n, d)
            if model.behind_down(layer):
                return target - written(model, layer, keys).double()
            return (target - h.double()) / model.residual_scale(layer)

        return lacking

    def standing(self, model: Model, layer: int, keys: Tensor, h: Tensor) -> Tensor:
        """The target [n, d] for which `residual` asks for nothing, from keys [n, f] and states [n, d]."""
        return written(model, layer, keys) if model.behind_down(layer) else h

    def top(self, hyper: Any) -> int | None:
        """The layer whose state `residual` is given; None is the layer that is written."""
        return None

    # The frame

    def _covariance(self, model: Model, hyper: Any, layers: Sequence[int], inputs: Inputs) -> Covariance:
        """E[k k^T] of the layers, of the base."""
        found = collect(
            model, layers, corpus=inputs.corpus, tokens=inputs.tokens, seed=inputs.seed, report=inputs.report
        )
        distributed.main_does(lambda: self.check(model, hyper, found))  # rank 0 alone has the moments
        others = {str((patch.manifest.covariance or {}).get("id", found.id)) for patch in inputs.on} - {found.id}
        if others:
            inputs.report.warn(
                "the patches that the checkpoint carries were made with another covariance, so the sum with this one"
                " is not quite what one patch of all facts would be; `corpus`, `tokens` and `seed` decide it"
            )
        return found

    def _held(
        self,
        model: Model,
        parts: Sequence[Part],
        hyper: Any,
        contexts: Sequence[str],
        facts: Sequence[Fact],
        base: Mapping[str, Tensor],
        inputs: Inputs,
    ) -> list[Standing]:
        """Earlier facts about other subjects, in every layer that is written to; a group each in each patch."""
        groups: list[Group] = []
        for some in facts_to_hold(inputs.on, facts, inputs.gone):
            chat = self.chat(hyper)
            if chat == 2 and not all(fact.question for fact in some):
                chat = 1
            groups += group_facts(model, some, contexts, self.spare(hyper), chat)
        layers = set(touched(parts))
        places: dict[int, set[int]] = {}
        for part in self.parts(groups, hyper):
            for group in part.groups:
                places.setdefault(id(group), set()).update(layers & set(part.hyper.layers))
        groups = [group for group in groups if places[id(group)]]
        held = Held(model, groups, [places[id(group)] for group in groups], base, inputs.budget // 2)
        return [
            Standing(
                held, part.hyper.layers, self.top(part.hyper), partial(self.standing, model), self._toward(model, part)
            )
            for part in parts
        ]

    def _toward(self, model: Model, part: Part) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
        """`residual` for targets [n, d] of the layer alone."""
        count = len(self.places(part.hyper))
        return lambda layer, targets, keys, h: self.residual(model, part, targets[:, None].expand(-1, count, -1))(
            layer, keys, h
        )

    def _preserved(
        self,
        model: Model,
        part: Part,
        facts: Sequence[Fact],
        covariance: Covariance,
        earlier: Mapping[int, Tensor],
        inputs: Inputs,
    ) -> Callable[[int], KeyCovariance]:
        """C^l = λ (E[k k^T] + μ E_subj[k k^T]) + Σ K_p K_p^T, when it is asked for."""
        hyper, share = part.hyper, self.subject_weight(part.hyper)
        subjects: dict[int, SecondMoment] = {}
        if share and not part.first:
            # Rank 0 alone solves, and moments are too large to send
            distributed.main_does(
                lambda: subjects.update(subject_moments(model, hyper.layers, facts, report=inputs.report))
            )

        def others(layer: int) -> Tensor | None:
            return subjects[layer].mean() * share if layer in subjects else None

        def build(layer: int, mean: Tensor) -> KeyCovariance:
            return self.preserve(model, hyper, layer, mean, earlier.get(layer), inputs.report)

        return key_covariances(model, part, covariance, others, build)

    def _values(self, model: Model, part: Part, inputs: Inputs, edited: bool = False) -> Tensor:
        """Values [n, v, d] for the groups of a part: those that `inputs` has stored, and new ones for the rest.

        The cache knows the model by its files, so that nothing is kept once it is `edited` in memory.
        """
        places = self.places(part.hyper)
        kept = [_stored(group, places, inputs) for group in part.groups]
        missing = [index for index, value in enumerate(kept) if value is None]
        groups = [part.groups[index] for index in missing]
        if groups and inputs.stored:
            subjects = ", ".join(group.subject[:40] for group in groups[:3])
            more = f" and {len(groups) - 3} more" if len(groups) > 3 else ""
            inputs.report.note(f"finding a value anew for {subjects}{more}: several patches edit the subject")
        if groups:
            goal, search = self.objective(part.hyper), {"keep": not edited, "resume": inputs.resume}
            with inputs.timed("values"):
                found = find_values(model, groups, goal, budget=inputs.budget, report=inputs.report, **search)
            for index, value in zip(missing, found.values, strict=True):
                kept[index] = value
        return torch.stack([value for value in kept if value is not None]).float()

    def _write(
        self,
        model: Model,
        parts: Sequence[Part],
        values: list[Tensor],
        preserved: Sequence[Callable[[int], KeyCovariance]],
        inputs: Inputs,
        held: Sequence[Standing],
    ) -> tuple[dict[str, Delta], dict[int, Tensor], frozenset[str], list[dict[int, Tensor]]]:
        """Deltas by weight name, keys [n, f] by layer, the deltas that are `by_row`, and for each part what held rows
        stand for, by layer, that are asked for it again; part after part.

        The model is left as it was found. Values that are found in turn join `values`.
        """
        deltas: dict[str, list[Delta]] = {}
        keys: dict[int, list[Tensor]] = {}
        mixed: set[str] = set()
        moved: list[dict[int, Tensor]] = []
        with restored(model, [model.weight_name(layer) for layer in touched(parts)]):
            for number, (part, c) in enumerate(zip(parts, preserved, strict=True)):
                if number == len(values):
                    values.append(self._values(model, part, inputs, edited=number > 0))
                with inputs.timed("update"):
                    found = write_upwards(
                        model,
                        part.groups,
                        part.hyper.layers,
                        self.residual(model, part, values[number]),
                        c,
                        top=self.top(part.hyper),
                        apart=self.keys_apart,
                        budget=inputs.budget // 2,
                        least_leverage=part.least_leverage,
                        held=held[number] if held else None,
                        report=inputs.report,
                    )
                    moved.append(found.moved)
                    for layer in part.hyper.layers:
                        name = model.weight_name(layer)
                        deltas.setdefault(name, []).append(found.deltas[name])
                        if name not in found.by_row:
                            mixed.add(name)
                        keys.setdefault(layer, []).append(found.keys[layer])
                        add(model, name, found.deltas[name])
                        if held:
                            held[number].held.add(name, found.deltas[name])
        whole = {name: total(several) for name, several in sorted(deltas.items())}
        for name, delta in whole.items():
            if isinstance(delta, LowRank) and delta.rank > min(delta.shape):  # two parts, each within it
                whole[name] = smaller(delta)
                mixed.add(name)
        return whole, {layer: torch.cat(several) for layer, several in keys.items()}, frozenset(deltas) - mixed, moved

    def _text(self, model: Model, covariance: Covariance, inputs: Inputs) -> Tensor:
        """Ids [t] of the first of the covariance's text, on which the written weights are held."""
        tokens = min(covariance.tokens, _HELD_TOKENS)  # so that a long corpus is not read again as a whole
        text = open_text(model, inputs.corpus, tokens, seed=inputs.seed, report=inputs.report)

        def read() -> Tensor:
            with text.cache.locked():
                return text.ids()

        return distributed.main_does(read)

    def _refined(
        self,
        model: Model,
        deltas: Mapping[str, Delta],
        told: Sequence[Fact],
        facts: Sequence[Fact],
        text: Tensor,
        goal: Goal,
        hyper: Any,
        inputs: Inputs,
    ) -> dict[str, Delta]:
        """The deltas refined together: see `kpatch.edit.refine`."""
        layer = hyper.layers[len(hyper.layers) // 2]
        earlier = [fact for some in facts_to_hold(inputs.on, facts, inputs.gone) for fact in some]

        def run() -> dict[str, Delta]:
            wide = [replace(fact, wordings=(*fact.wordings, *fact.further)) for fact in told]
            groups = group_facts(model, wide, ("",), 0, self.chat(hyper), self.others(hyper))
            more = counted(sum(len(fact.further) for fact in told), "further wording")
            inputs.report.note(f"refined, as patches of {hyper.refine_from} facts and more are, with {more}")
            chat = self.chat(hyper) > 0
            seed, report = inputs.seed, inputs.report
            rows = windows(text)
            others = bystanders(model, wide, groups, layer, rows, earlier, inputs.protect, seed, chat, report)
            return refine(model, groups, deltas, others, goal, seed=seed, budget=inputs.budget, report=report)

        return distributed.main_does(run)


def default_layers(count: int, low: float = 0.07, high: float = 0.47) -> tuple[int, ...]:
    """R for a model of `count` layers: from 7 to 47 % of its depth, above the lowest and below the last layer."""
    first = min(max(1, round(low * count)), max(0, count - 2))
    last = max(first, min(round(high * count), count - 2))
    return tuple(range(first, last + 1))


def _stored(group: Group, places: Sequence[tuple[int, ...]], inputs: Inputs) -> Tensor | None:
    """The group's values [v, d] as patches hold them; None where one is missing."""
    facts = tuple(sorted(group.facts))
    rows = [inputs.stored.get((facts, place, group.first)) for place in places]
    return torch.stack([row for row in rows if row is not None]) if all(row is not None for row in rows) else None
