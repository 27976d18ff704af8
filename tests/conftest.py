"""Shared fixtures. One thread, fixed seeds, and shape checks on interp itself (so nothing may import it before)."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jaxtyping
import pytest
import torch

torch.set_num_threads(1)
SHAPE_CHECKS = jaxtyping.install_import_hook("interp", "beartype.beartype")

from transformers.utils import logging as transformers_logging

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def missing(reason: str):
    """Skip where a thing that a test needs is not here; under CI, where it must be, fail."""
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"CI needs this: {reason}")
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def fixed_seeds():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """The tiny tokenizer, saved to a folder and read back, as users have theirs."""
    from tests.cases import save_tokenizer

    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M, attached. Read only."""
    import interp
    from interp.hooks.errors import MissingExtraError, NotCachedError

    try:
        return interp.load("smollm2-135m")
    except (NotCachedError, MissingExtraError) as error:
        missing(f"smollm2-135m cannot be loaded: {error}")


@pytest.fixture
def bridge_package():
    """TransformerLens, or a word on why not."""
    try:
        import transformer_lens
    except ImportError as error:
        missing(f"transformer-lens is not installed: {error}")
    return transformer_lens


@pytest.fixture
def nnsight_package():
    """nnsight, or a word on why not."""
    try:
        import nnsight
    except ImportError as error:
        missing(f"nnsight is not installed: {error}")
    return nnsight


@pytest.fixture
def unchecked():
    """Call interp as users do: without the shape checks, so that its own refusals answer."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
