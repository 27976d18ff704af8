"""The identities of attribution and propagation, on a tiny random model of each family and through each engine.

`python -m tests.identities` in the root of the repository writes docs/observable_propagation_families.md from a run of
both grids. tests/tiny/test_identities.py computes them again, and holds the page to them.
"""

import functools
import itertools
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import interp
from interp.hooks.errors import InterpError
from tests.cases import CASES, DECODERS, build, inputs_for, perturb, save_tokenizer
from tests.propagation_oracles import WEIGHTS, branch_pull, final_pull, measured, network_gradients, sequences_of_steps
from tests.tiny.test_engines import bridge_of, nnsight_of

PAGE = Path(__file__).parents[1] / "docs" / "observable_propagation_families.md"
TOLERANCE, ENGINE_TOLERANCE = 1e-9, 1e-4


# Models that compute in float64 ------------------------------------------------------------------------------------


def in_float64(module: nn.Module) -> nn.Module:
    """A module in float64, its norms too: transformers computes those of root mean squares in float32."""
    for norm in module.double().modules():
        kind = type(norm).__name__
        if kind.endswith("RMSNorm") or kind == "CohereLayerNorm":
            norm.forward = functools.partial(_norm, norm, centred="RMS" not in kind, shift="Gemma" in kind)
    return module


def _norm(norm: nn.Module, x: Tensor, centred: bool, shift: bool) -> Tensor:
    eps = next(float(getattr(norm, name)) for name in ("eps", "variance_epsilon") if hasattr(norm, name))
    x = x - x.mean(-1, keepdim=True) if centred else x
    return (norm.weight + shift) * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def small(family: str) -> nn.Module:
    """A family's model with two layers and two heads, which share keys and values where its heads do."""
    import transformers

    model_class, config_class, options = CASES[family]
    less = {key: 2 for key in options if key.endswith(("_layers", "_layer", "_heads", "n_head"))}
    less |= {"num_key_value_heads": 1} if "num_key_value_heads" in options else {}
    less |= {"attention_types": [[["global", "local"], 1]]} if "attention_types" in options else {}
    config = getattr(transformers, config_class)(**options | less)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # the grouped product of experts has no float64
    torch.manual_seed(0)
    return perturb(getattr(transformers, model_class)(config)).eval()


def observable(model: interp.Model) -> interp.Observable:
    """Three tokens with weights of different size and sign."""
    return interp.Observable.tokens(model, list(WEIGHTS), weights=list(WEIGHTS.values()))


class Case:
    """A family's model, what is measured of it, and what its own code gives."""

    def __init__(self, family: str):
        module = build(family)
        module.config._experts_implementation = "eager"
        self.family, self.model, self.ids = family, interp.attach(in_float64(module)), inputs_for(family)[:1]
        self.observable = observable(self.model)
        self.reference = interp.Reference.of(self.model, self.ids)
        with torch.no_grad():
            out = self.model.module(self.ids, output_hidden_states=True)
        self.measured, self.hidden = measured(self.model, out.logits[0, -1]), out.hidden_states

    def attribution(self, unit: str) -> interp.Attribution:
        """Direct attribution by this unit."""
        return interp.direct_attribution(self.model, self.observable, self.ids, unit)


# Identities: the error of each -------------------------------------------------------------------------------------


def direct(case: Case) -> float:
    """Embedding, heads, attention biases, MLPs and the constant sum to the model's own logits."""
    rows = [row["value"] for row in case.attribution("head").to_records() if row["kind"] != "rounding"]
    return abs(sum(rows) - float(case.measured)) / sum(map(abs, rows))


def per_head(case: Case) -> float:
    """What a head adds by each token that it reads sums to what it adds."""
    found = case.attribution("source")
    return float((found.sources.sum(-1) - found.heads).abs().max() / found.sources.abs().sum(-1).max())


def feature_vectors(case: Case) -> float:
    """A head is the sum over tokens of its feature vector's score on the stream and its offset."""
    heads, worst = case.attribution("head").heads, 0.0
    acts = case.model.capture(case.ids, "blocks.*.hook_resid_pre")
    for layer, head in itertools.product(*map(range, heads.shape)):
        terms = []
        for source in range(case.ids.shape[1]):
            path = interp.Path((interp.Step(layer, head, source),))
            f = interp.propagate(case.model, case.observable, case.reference, path=path, linearization="frozen")
            terms.append(float(f.score(acts)[0]) + f.offset)
        worst = max(worst, abs(sum(terms) - float(heads[layer, head])) / sum(map(abs, terms)))
    return worst


def whole_network(case: Case) -> float:
    """Total vectors times the model's own hidden states, and a constant, are its logits, at every layer."""
    found, worst = interp.propagate_all(case.model, case.observable, case.reference, linearization="frozen"), 0.0
    for layer in range(case.model.n_layers):
        site = f"blocks.{layer}.hook_resid_pre"
        terms, offset = found[site][0] * case.hidden[layer][0], found.offsets[site][0]
        worst = max(worst, float((terms.sum() + offset - case.measured).abs() / (terms.abs().sum() + offset.abs())))
    return worst


def paths(case: Case) -> float:
    """The total vector in front of the first block is the sum of all paths' vectors: two layers and heads."""
    model, ids = interp.attach(in_float64(small(case.family))), torch.tensor([[3, 17, 42]])
    ref, n = interp.Reference.of(model, ids), observable(model)
    total = interp.propagate_all(model, n, ref, linearization="frozen")["blocks.0.hook_resid_pre"][0]
    summed = torch.zeros_like(total)
    for steps, position in sequences_of_steps(model, ids.shape[1]):
        path = interp.Path(tuple(interp.Step(*step) for step in steps))
        summed[position] += interp.propagate(model, n, ref, path=path, linearization="frozen").vector
    return _gap(summed, total)


def path_by_autograd(case: Case) -> float:
    """A path's vector is the chain of autograd products through the model's modules, with all else detached."""
    steps = ((0, 2, 3), (1, None, None), (2, 1, 4))
    y, here = final_pull(case.model, case.ids), case.ids.shape[1] - 1
    for layer, head, source in reversed(steps):
        y = branch_pull(case.model, case.ids, layer, y, here, head, source)
        here = here if source is None else source
    path = interp.Path(tuple(interp.Step(*step) for step in steps))
    return _gap(interp.propagate(case.model, case.observable, case.reference, path=path).vector, y)


def totals_by_autograd(case: Case) -> float:
    """Total vectors are the gradients of the model's own code: all tangent, patterns held, or all held."""
    worst = 0.0
    for held in ("exact", "path") + (("frozen",) if case.model.layout.mlp_down else ()):
        found = interp.propagate_all(case.model, case.observable, case.reference, linearization=held)
        for site, wanted in network_gradients(case.model, case.ids, held).items():
            worst = max(worst, _gap(found[site][0], wanted.reshape(found[site][0].shape)))
    return worst


def _gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


IDENTITIES: dict[str, Callable[[Case], float]] = {
    "1 direct": direct, "2 heads by token": per_head, "3 feature vectors": feature_vectors,
    "4 whole network": whole_network, "5 paths": paths, "path, autograd": path_by_autograd,
    "totals, autograd": totals_by_autograd,
}  # fmt: skip


def errors(family: str) -> dict[str, float | str]:
    """The error of each identity in float64; or the name of the error by which it is refused."""
    found: dict[str, float | str] = {}
    try:
        case = Case(family)
    except InterpError as refusal:
        return dict.fromkeys(IDENTITIES, type(refusal).__name__)
    for name, identity in IDENTITIES.items():
        try:
            found[name] = identity(case)
        except InterpError as refusal:
            found[name] = type(refusal).__name__
    return found


# Engines: the same numbers, in float32 -----------------------------------------------------------------------------


def bridged(family: str, tokenizer) -> interp.Model:
    """The family in a TransformerBridge, as it is."""
    return interp.attach(bridge_of(build(family), tokenizer))


def processed(family: str, tokenizer) -> interp.Model:
    """In a TransformerBridge's compatibility mode: gains folded, what is written to the stream and logits centred."""
    bridge = bridge_of(build(family), tokenizer)
    bridge.enable_compatibility_mode()
    return interp.attach(bridge)


def in_nnsight(family: str, tokenizer) -> interp.Model:
    """In nnsight."""
    return interp.attach(nnsight_of(build(family), tokenizer))


ENGINES = {"TransformerBridge": bridged, "compatibility mode": processed, "nnsight": in_nnsight}


def numbers(model: interp.Model, ids: Tensor) -> dict[str, Tensor]:
    """What attribution, a path and all paths say of one zero-sum observable."""
    difference = interp.Observable.logit_diff(model, 3, 7)
    direct = interp.direct_attribution(model, difference, ids)
    path = "L0H1@2 -> L2H3@2" if CASES["mixtral"][0] == type(model.module).__name__ else "L0H1@2 -> L1MLP -> L2H3@2"
    along = interp.propagate(model, difference, ids, path=path)
    total = interp.propagate(model, difference, ids, site="blocks.1.hook_resid_pre@3", linearization="frozen")
    acts = model.capture(ids, ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"])
    return {
        "measurement": torch.tensor(direct.measurement), "heads": direct.heads, "attention": direct.attention,
        "MLPs": direct.mlps, "path": along.score(acts) + along.offset, "path's vector": along.vector,
        "total": total.vector,
    }  # fmt: skip


def shares(model: interp.Model, ids: Tensor) -> dict[str, Tensor]:
    """What stays where weights are processed: biases of values go to the branch's, vectors change with the gains."""
    direct = interp.direct_attribution(model, interp.Observable.logit_diff(model, 3, 7), ids)
    return {"measurement": torch.tensor(direct.measurement), "attention": direct.attention, "MLPs": direct.mlps}


def engine_error(family: str, engine: str, tokenizer) -> float | str:
    """The largest difference from the Hugging Face model, relative to the size of each number's tensor.

    Or, as a text, who refuses the family and by which error.
    """
    try:
        made = ENGINES[engine](family, tokenizer)
        read = shares if engine == "compatibility mode" else numbers
        found = read(made, inputs_for(family)[:1])
    except InterpError as refusal:
        return type(refusal).__name__
    except RuntimeError as error:
        return f"{type(error).__name__} of the engine"
    wanted = read(interp.attach(build(family)), inputs_for(family)[:1])
    return max(float((found[key] - value).abs().max() / value.abs().max()) for key, value in wanted.items())


# The page ----------------------------------------------------------------------------------------------------------


def cell(error: float | str) -> str:
    """How the page writes a cell."""
    return f"`{error}`" if isinstance(error, str) else f"{error:.0e}" if error else "0"


def table(first: str, columns: Iterable[str], rows: Mapping[str, Mapping[str, float | str]]) -> str:
    """A Markdown table: one row for each family."""
    names = list(columns)
    lines = [f"| {first} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cell(row[c]) for c in names) + " |" for name, row in rows.items()]
    return "\n".join(lines)


def page(tokenizer) -> str:
    """The page, from a run of both grids."""
    families = [*DECODERS, "bert"]
    held = {family: errors(family) for family in families}
    same = {family: {e: engine_error(family, e, tokenizer) for e in ENGINES} for family in DECODERS}
    return TEXT.format(families=table("family", IDENTITIES, held), engines=table("family", ENGINES, same))


TEXT = """# Observable propagation on every family

Does what `direct_attribution`, `propagate` and `propagate_all` give sum to what the model computes? `python -m
tests.identities` makes this page, `tests/tiny/test_identities.py` computes the grids again and holds the page to them.

Each row is a tiny random model of three layers, with norm gains other than 1 and biases other than 0, in float64 (the
norms of transformers that compute in float32 are replaced by their formula). The observable is a weighted sum of three
logits, before a final soft-cap. A number is the largest relative error; sums are relative to the sum of absolute
terms, vectors to their norm. A name is the error by which a quantity is refused.

{families}

What is compared, under the preset `frozen` unless said:

- 1 direct: embedding + Σ heads + Σ attention biases + Σ MLPs + constant, with n · logits of the model's own code.
- 2 heads by token: Σ over tokens of what a head adds by reading each, from its pattern and values, with the head, from
  its output.
- 3 feature vectors: Σ over tokens of y · x + offset, with y the vector of the path through one head and x the stream
  that it reads, with the head.
- 4 whole network: Σ over positions of G · x + c, with G the total vectors in front of a block and x the model's own
  hidden states, with n · logits of the model's own code; the worst block.
- 5 paths: the sum of the vectors of all paths, with the total vector in front of the first block, of a model of two
  layers and two heads (148 paths from three tokens, or 52 where attention and MLP are parallel).
- path, autograd: a path through a head, an MLP and a head, preset `path`, with a chain of autograd products through the
  model's modules.
- totals, autograd: total vectors in front of each block, at z and at neurons, presets `exact`, `path` and `frozen`, and
  the gradients of the model's own code in which the same things are detached.

What is refused:

- A mixture of experts has no closed form for a path through it: totals and attributions take the frozen backward pass.
  `propagate` refuses such a path. Its totals are compared with autograd under `exact` and `path`.
- An encoder with a norm behind each sum (BERT) has no residual stream that parts sum up in.

## Engines

The same model inside TransformerLens and nnsight, in float32, with a zero-sum observable (a logit difference). A number
is the largest difference from the Hugging Face model, relative to the largest entry: of measurement, heads, attention,
MLPs, the vector of a path and what flows along it, and a total vector. Compatibility mode folds gains and biases and
centres weights, so that vectors at the stream differ by construction: there measurement, attention branches and MLPs
are compared.

{engines}

- A bridge of GPT-Neo or Phi-3 has modules of its own in the place of the model's, which no layout names, or which do
  not run: pass the Hugging Face model.
- `... of the engine`: TransformerLens itself fails on this model in compatibility mode.
- Cohere multiplies its logits, and compatibility mode changes where, which the verification of the layout sees.
"""

if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        PAGE.write_text(page(save_tokenizer(folder)), encoding="utf-8")
