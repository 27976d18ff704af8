# %% [markdown]
# # Bring your own model
#
# Any `nn.Module` can be attached. It stays as it is: `model.module` is the object that was given.

# %%
from dataclasses import replace

import torch
from torch import nn

import interp

torch.manual_seed(0)
network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
model = interp.attach(network)
image = torch.randn(1, 1, 8, 8)
print(model.sites())
print(model.capture(image, "1"))
scope = interp.LinearScope(model, image)
assert float((scope.Fx + scope.r - network(image)).abs().max()) < 1e-5

# %% [markdown]
# ## A transformer that no table knows
#
# Recognised families have names for sites, heads, attribution and paths at once. For your own, say where its parts
# are. Here is one with names of its own.


# %%
class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (w(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(z.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.n1, self.n2, self.mix = nn.LayerNorm(width), nn.LayerNorm(width), Attention(width, heads)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        x = x + self.mix(self.n1(x))
        return x + self.down(torch.relu(self.up(self.n2(x))))


class Language(nn.Module):
    main_input_name = "input_ids"

    def __init__(self, vocabulary=50, width=32, heads=4, layers=2):
        super().__init__()
        self.words, self.last = nn.Embedding(vocabulary, width), nn.LayerNorm(width)
        self.stack = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.out = nn.Linear(width, vocabulary)

    def forward(self, input_ids):
        x = self.words(input_ids)
        for block in self.stack:
            x = block(x)
        return self.out(self.last(x))


module = Language().eval()
layout = interp.Layout(
    name="mine", embed="words", blocks="stack", attn="mix", o="mix.wo", q="mix.wq", k="mix.wk", v="mix.wv", n_heads=4,
    mlp_pre="up", mlp_down="down", ln1="n1", ln2="n2", final_norm="last", unembed="out",
)  # fmt: skip
mine = interp.attach(module, layout=layout)
print(mine.sites("blocks.0.*"))

# %% [markdown]
# A layout is not believed: when a model is attached, each site is compared with the model's own numbers. Exchange two
# paths and it is refused.

# %%
try:
    interp.attach(Language().eval(), layout=replace(layout, q="mix.wk", k="mix.wq"))
except interp.InterpError as error:
    print(type(error).__name__, error)
else:
    raise AssertionError("a wrong layout was taken")

# %% [markdown]
# From here on it is a model like every other.

# %%
ids = torch.tensor([[3, 17, 42, 8, 25]])
observable = interp.Observable.logit_diff(mine, 7, 9)
attribution = interp.direct_attribution(mine, observable, ids)
print(attribution.top(5))
assert attribution.completeness_error < 1e-5
vector = interp.propagate(mine, observable, ids, path="L0H1@2 -> L1H3@4")
assert vector.vector.shape == (32,)

# %% [markdown]
# With a tokenizer (`interp.attach(module, tokenizer)`) texts work wherever token ids do. Hugging Face models,
# TransformerLens bridges and nnsight models are attached in the same way; [limits](../docs/limits.md) says which
# families are known.
