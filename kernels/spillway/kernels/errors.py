"""The kernels' error tree: everything a caller can get wrong has a type of its own."""


class KernelError(Exception):
    """Root of every error the kernels raise."""


class KernelShapeError(KernelError, ValueError):
    """Tensors whose shapes or strides do not fit together."""


class KernelDtypeError(KernelError, TypeError):
    """A tensor of a dtype that the op does not take."""


class KernelValueError(KernelError, ValueError):
    """A parameter out of its range, such as a negative window."""


class BackendError(KernelError, RuntimeError):
    """The implementation asked for does not exist here (no Triton, no GPU, unknown name)."""
