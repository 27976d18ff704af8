"""One pyvene process of bench_causal: reads a saved MLP problem, trains a rotation, prints CPU seconds of each request.

Run by the interpreter of an environment that has pyvene 0.1.8; it knows nothing of interp.
"""

import sys
import time

import torch
from torch import nn

torch.set_num_threads(1)


def main(path):
    import pyvene
    from pyvene.models.mlp.modelings_mlp import MLPConfig, MLPForClassification

    problem = torch.load(path)
    config = MLPConfig(
        h_dim=16,
        n_layer=3,
        num_classes=2,
        activation_function="relu",
        pdrop=0.0,
        include_bias=True,
        squeeze_output=True,
    )
    module = MLPForClassification(config=config).eval()
    blocks = [{"component": "block_output", "layer": 0, "unit": "pos", "max_number_of_units": 1,
               "subspace_partition": [[0, 8], [8, 16]], "intervention_link_key": 0,
               "intervention_type": pyvene.RotatedSpaceIntervention} for _ in range(2)]  # fmt: skip
    model = pyvene.IntervenableModel(pyvene.IntervenableConfig(blocks), module)
    model.disable_model_gradients()
    optimizer = torch.optim.Adam(list(dict.fromkeys(model.get_trainable_parameters())), lr=1e-3)
    base, one, two, labels = (problem[name] for name in ("base", "one", "two", "labels"))
    n, batch = len(base), problem["batch"]
    where = {"sources->base": ([[[0]] * batch, [[0]] * batch], [[[0]] * batch, [[0]] * batch])}
    generator = torch.Generator().manual_seed(0)
    for line in sys.stdin:
        start = time.process_time()
        for _ in range(int(line)):
            rows = torch.randint(n, (batch,), generator=generator)
            inputs = [{"inputs_embeds": x[rows][:, None]} for x in (base, one, two)]
            subspaces = [[[0]] * batch, [[1]] * batch]
            _, out = model(inputs[0], inputs[1:], where, subspaces=subspaces)
            loss = nn.functional.cross_entropy(out[0].flatten(0, -2), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        sys.stdout.write(f"seconds {time.process_time() - start}\n")
        sys.stdout.flush()


main(sys.argv[1])
