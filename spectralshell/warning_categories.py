"""Warning categories, so that a user can silence or escalate one kind without the others."""


class ResolutionWarning(UserWarning):
    """A figure would be read below the resolution that the number of Lanczos steps gives."""


class DynamicsWarning(UserWarning):
    """A quantity needs the relation ė = −M e, which this residual or model does not have."""


class GateWarning(UserWarning):
    """An exact derivative of a kernel misses the jumps of gates, as those of ReLU."""


class KernelWarning(UserWarning):
    """A kernel had to be found in a slower way than its structure promised."""


class CacheWarning(UserWarning):
    """An entry of a cache on disk was broken, or could not be written."""


class SnapshotWarning(UserWarning):
    """A snapshot was left out, or its data are not what its label says."""


class RunWarning(UserWarning):
    """A recorder left something out, or a training run on disk is not whole."""
