"""Errors. One root; each class is also a standard one, so callers may catch narrowly or broadly."""


class InterpError(Exception):
    """Root of every error that interp raises on purpose.

    The text has three parts: what was given, what was needed, what to do.
    """

    def __init__(self, given: str, needed: str = "", do: str = ""):
        self.given, self.needed, self.do = given, needed, do
        super().__init__("; ".join(part for part in (given, needed and f"needed: {needed}", do) if part))


class SiteError(InterpError, ValueError):
    """A site that does not parse, does not exist in this model, or is asked for out of range."""


class SiteUnavailableError(SiteError):
    """A site that has a meaning elsewhere but not in this model's layout."""


class InputError(InterpError, ValueError):
    """Inputs of a kind, shape or range that this model cannot take."""


class PositionError(InputError):
    """A position outside an example, or a substring that does not name one."""


class ArgumentError(InterpError, ValueError):
    """An argument of a public call whose value is not among the legal ones."""


class NoPathError(ArgumentError):
    """A target that does not depend on a source: the derivative is zero by structure."""


class ModelStateError(InterpError, RuntimeError):
    """A model that cannot be read faithfully in the state it is in."""


class TrainModeError(ModelStateError):
    """Dropout or batch statistics are live."""


class CompiledModelError(ModelStateError):
    """Hooks on a compiled, scripted or sharded module would not be seen, or only in part."""


class MetaWeightsError(ModelStateError):
    """Weights without data, and nothing that would load them."""


class NonFiniteError(ModelStateError, ArithmeticError):
    """NaN or infinity in weights or activations."""


class UnknownFamilyError(InterpError, TypeError):
    """No adapter recognises the architecture."""


class LayoutError(InterpError, RuntimeError):
    """A recognised layout whose sites do not mean what they should."""


class InterventionError(InterpError, ValueError):
    """An intervention that cannot be carried out as described."""


class InterventionNotAppliedError(InterventionError):
    """An intervention whose site never ran."""


class LinearizationError(InterpError, RuntimeError):
    """Root of what can go wrong while a network is frozen into an affine map."""


class UnsupportedOpError(LinearizationError, NotImplementedError):
    """A call on a live value that no rule explains."""


class MixedBatchError(UnsupportedOpError):
    """A network that mixes the items of a batch, where one batch holds the reference and its probes."""


class BilinearOpError(LinearizationError):
    """A product of two live factors without a rule for which one is held."""


class ControlFlowError(LinearizationError):
    """Python control flow that reads a live value."""


class ControlFlowDivergedError(LinearizationError):
    """A replay that met other calls than the reference run."""


class CompletenessError(LinearizationError, ArithmeticError):
    """Parts that do not sum to the whole."""


class SizeError(InterpError, MemoryError):
    """Something that would not fit the budget."""


class TokenError(InputError):
    """A string that does not name exactly one token."""


class MissingExtraError(InterpError, ImportError):
    """An optional dependency that a call needs."""


class NotCachedError(InterpError, FileNotFoundError):
    """A packaged model that is neither cached nor can be fetched."""


class ChecksumError(InterpError, OSError):
    """A file whose SHA-256 is not the recorded one."""


class DictionaryError(InterpError, ValueError):
    """A dictionary's folder that cannot be read, or holds what this library does not know."""


class LensFileError(InterpError, ValueError):
    """A file that holds no lens, or one that cannot be trusted."""


class RunError(InterpError, OSError):
    """A run folder that cannot be written, read or trusted."""


class StoreError(InterpError, OSError):
    """A store of activations, or a file of Jacobians, that cannot be written, read or continued."""


class ErasureError(InterpError, ArithmeticError):
    """A concept that is still there after its erasure."""


class ProbeFileError(InterpError, ValueError):
    """A probe file that cannot be read or trusted."""


class CausalAbstractionError(InterpError, ValueError):
    """Root of what can go wrong when a causal model is aligned with a network."""


class SiteNotFoundError(CausalAbstractionError, SiteError):
    """An alignment's site that the network does not have, or that never ran."""


class ShapeMismatchError(CausalAbstractionError):
    """A map, a partition, a site and pairs whose sizes do not fit together."""


class UnmatchedVariableError(CausalAbstractionError):
    """A variable without a node, a block, a source or a legal value."""


class NonInvertibleMapError(CausalAbstractionError, ArithmeticError):
    """An alignment map that does not undo itself on real activations."""


class DegenerateDataError(CausalAbstractionError):
    """Pairs from which nothing can be concluded: empty, without flips, or leaking between splits."""


class UncontrolledError(CausalAbstractionError):
    """An interchange intervention accuracy that is read without the controls that give it a meaning."""
