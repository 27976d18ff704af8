# %% [markdown]
# # Write your own unit, observable, probe or map
#
# Four places where your mathematics goes in, and the check that each comes with.

# %%
import torch
from torch import nn

import interp
from interp.causal import Alignment, AlignmentMap, Partition, hierarchical_equality, mlp
from interp.probes import MassMeanProbe, evaluate

torch.manual_seed(0)

# %% [markdown]
# ## A unit
#
# LinearScope refuses an activation that it does not know. An element-wise one needs f(z)/z, with its limit at zero.


# %%
class Bessel(nn.Module):
    def forward(self, x):
        return torch.special.i1(x)


network = nn.Sequential(nn.Linear(4, 8), Bessel(), nn.Linear(8, 2)).double().eval()
model, x = interp.attach(network), torch.randn(1, 4, dtype=torch.float64)
try:
    interp.LinearScope(model, x)
except interp.InterpError as error:
    print(error)


def gain(z):
    """i1(z)/z, which is 1/2 at zero."""
    safe = torch.where(z.abs() < 1e-8, torch.ones_like(z), z)
    return torch.where(z.abs() < 1e-8, torch.full_like(z, 0.5), torch.special.i1(safe) / safe)


forget = interp.register_unit(torch.special.i1, interp.Unit(gain=gain))
scope = interp.LinearScope(model, x)
print(scope.check())  # a wrong gain raises before this line
assert float((scope.Fx + scope.r - network(x)).abs().max()) < 1e-12
forget()

# %% [markdown]
# ## An observable
#
# Any weights on the logits are one, and so is a direction at a site. Here: months that end in "ber" against the rest.

# %%
language = interp.load("smollm2-135m")
ber = [" September", " October", " November", " December"]
others = [" January", " February", " March", " April"]
months = interp.Observable.tokens(language, ber, others)
prompt = "Halloween is celebrated in the month of"
attribution = interp.direct_attribution(language, months, prompt)
print(attribution.top(5))
assert attribution.completeness_error < 1e-5

site = "blocks.20.hook_resid_post"
direction = language.capture(prompt, site, positions="last")[site][0, 0]
stream = interp.Observable.from_residual(direction / direction.norm(), site=site, name="along this prompt's state")
print(stream, interp.propagate(language, stream, prompt, site="blocks.10.hook_resid_pre@1").vector.shape)

# %% [markdown]
# ## A probe
#
# A probe is a scikit-learn classifier. Derive from one of ours and change what is fitted: labels, weights and pools of
# tokens are then handled as everywhere, and `evaluate`, `sweep` and the controls take it.


# %%
class MedianProbe(MassMeanProbe):
    """Mass-mean on values cut off at three median deviations, so that outliers do not count."""

    def fit(self, X, y, sample_weight=None, mask=None):
        X = torch.as_tensor(X)
        middle = X.median(0).values
        spread = 3 * (X - middle).abs().median(0).values
        return super().fit(X.clamp(middle - spread, middle + spread), y, sample_weight, mask)


labels = torch.arange(120) % 2
activations = torch.randn(120, 16) + 0.8 * labels[:, None]
activations[::10] *= 30
plain, median = (evaluate(probe, activations, labels.tolist()) for probe in (MassMeanProbe(), MedianProbe()))
print(plain, median, sep="\n")

# %% [markdown]
# ## An alignment map
#
# A map needs a way there and a way back; both are checked on real activations. This one turns pairs of coordinates by
# trained angles.


# %%
class PairMap(AlignmentMap):
    """Rotation of coordinates 2i and 2i + 1 by an angle of their own."""

    kind = "pairs"

    def __init__(self, width, **options):
        super().__init__(width, **options)
        self.angles = nn.Parameter(torch.zeros(width // 2, dtype=self.dtype))

    def turned(self, x, sign):
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = self.angles.cos().unsqueeze(-2), sign * self.angles.sin().unsqueeze(-2)
        return torch.stack([cos * a - sin * b, sin * a + cos * b], -1).flatten(-2)

    def encode(self, x, parts=None):
        return self.turned(x, 1), None

    def decode(self, z, rest=None, parts=None):
        return self.turned(z, -1)


task = hierarchical_equality()
aligned = Alignment(
    interp.attach(mlp(task)), task.causal_model, "block1", PairMap(16), Partition({"v1": 8, "v2": 8})
)  # fmt: skip
report = aligned.evaluate(task.splits(512, 256, 256), controls=())
print(report)  # untrained network, untrained map, no controls: so no accuracy is shown
