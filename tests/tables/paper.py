"""Numbers of Sutter, Minder, Hofmann and Pimentel 2025 (arXiv 2507.08802), per cent, from their result files.

Means and standard deviations over 10 seeds (progressions: 5) of the accuracy on all pairs, at blocks 1, 2 and 3 of an
MLP of three blocks, with half of the coordinates for each variable.
"""

Cell = tuple[float, float | None]  # mean, standard deviation where there is one

BUDGET = "1,280,000 pairs, batches of 6,400, at most 50 epochs, Adam 1e-3"

# Algorithm, map: blocks 1, 2, 3.
HEADLINE: dict[tuple[str, str], list[Cell]] = {
    ("both", "search"): [(69.1, 12.0), (56.4, 6.1), (50.0, 3.8)],
    ("both", "orthogonal"): [(84.2, 8.2), (61.4, 8.6), (49.8, 0.5)],
    ("both", "revnet"): [(99.8, 0.1), (99.9, 0.1), (99.9, 0.1)],
    ("left", "search"): [(71.3, 10.8), (54.7, 2.8), (48.6, 1.9)],
    ("left", "orthogonal"): [(82.1, 11.2), (61.3, 8.1), (49.9, 0.4)],
    ("left", "revnet"): [(99.8, 0.1), (99.9, 0.1), (99.9, 0.1)],
    ("first_argument", "search"): [(50.5, None), (50.5, None), (50.3, None)],
    ("first_argument", "orthogonal"): [(50.0, None), (49.9, None), (49.9, None)],
    ("first_argument", "revnet"): [(51.1, 1.0), (50.7, 0.5), (51.0, 0.6)],
    ("and_or", "search"): [(70.4, 2.9), (73.0, 1.3), (76.8, 0.7)],
    ("and_or", "orthogonal"): [(79.2, 2.4), (77.1, 1.4), (77.0, 1.3)],
    ("and_or", "revnet"): [(97.4, 1.1), (92.5, 0.9), (88.5, 1.4)],
    ("and_or_and", "search"): [(65.7, 7.7), (59.8, 1.3), (57.1, 0.4)],
    ("and_or_and", "orthogonal"): [(72.3, 5.4), (66.0, 2.7), (57.1, 0.5)],
    ("and_or_and", "revnet"): [(99.8, 0.2), (99.9, 0.1), (99.7, 0.3)],
}

# RevNet of one block, hierarchical equality, both: hidden width, then blocks 1, 2, 3.
HIDDEN: dict[int, list[Cell]] = {
    1: [(66, None), (67, None), (51, None)],
    2: [(84, None), (82, None), (70, None)],
    4: [(94, None), (99, None), (99, None)],
    8: [(98.7, None), (99.6, None), (99.5, None)],
    16: [(99.4, None), (99.7, None), (99.7, None)],
}

# Hierarchical equality, both: map, then (state of the network): blocks 1 and 3.
PROGRESSION: dict[tuple[str, str], list[Cell]] = {
    ("orthogonal", "untrained"): [(50.2, None), (50.2, None)],
    ("orthogonal", "a quarter"): [(55.0, None), (47.3, None)],
    ("orthogonal", "trained"): [(76.5, None), (50.2, None)],
    ("revnet", "untrained"): [(53.6, 6.9), (50.2, None)],
    ("revnet", "a quarter"): [(89.8, None), (71.9, None)],
    ("revnet", "trained"): [(99.6, None), (99.1, None)],
}

# Networks that were fitted to the first algorithm at block 2; aligned with the second, map: block 2.
FITTED: dict[tuple[str, str, str], Cell] = {
    ("and_or_and", "and_or_and", "neurons"): (97.0, None),
    ("and_or_and", "and_or_and", "orthogonal"): (99.9, None),
    ("and_or_and", "and_or_and", "revnet"): (100.0, None),
    ("and_or_and", "and_or", "orthogonal"): (73.3, None),
    ("and_or_and", "and_or", "revnet"): (87.3, None),
    ("and_or", "and_or", "neurons"): (96.2, None),
    ("and_or", "and_or", "orthogonal"): (99.9, None),
    ("and_or", "and_or", "revnet"): (99.9, None),
    ("and_or", "and_or_and", "orthogonal"): (64.1, None),
    ("and_or", "and_or_and", "revnet"): (100.0, None),
}
