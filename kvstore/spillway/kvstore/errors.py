"""The errors a caller of the store can see. A lost, late or damaged block is never one of them: that is a miss."""


class KVStoreError(Exception):
    """Root of every error that this part raises on purpose."""


class ConfigError(KVStoreError, ValueError):
    """A setting cannot work: the message names the setting and the values that would."""


class BlockBufferError(KVStoreError, ValueError):
    """A buffer handed to the store has the wrong length, is not contiguous, or must be writable and is not."""


class TokenIdError(KVStoreError, ValueError):
    """A token id does not fit an unsigned 32-bit integer."""


class StoreClosedError(KVStoreError):
    """The store was used after ``close``."""


class MountError(KVStoreError):
    """The disk directory cannot be used: not a directory, not writable, or its books are unreadable."""


class MountBusyError(MountError):
    """Every share of the disk directory is held by a living store; the message names the holders."""


class MountMismatchError(MountError):
    """Living stores share the directory under another budget or another number of sharers."""


class ConservationError(KVStoreError):
    """The books of the store do not add up: a defect in the store, found by ``check``."""


class PeerError(KVStoreError):
    """Trouble with one peer; to a caller of the store it is a miss. ``code``: the refusal's, 0 where there is none."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class PeerProtocolError(PeerError):
    """What a peer sent breaks the rules of the protocol."""


class PeerRefusedError(PeerError):
    """A peer refused us, and said why."""


class IndexUnavailableError(KVStoreError):
    """The Redis index does not answer, or refuses: for people who asked; a store goes on without it."""


class StillLivingError(KVStoreError):
    """What was to be removed belongs to a node or a store that is alive."""


class NodeUnreachableError(KVStoreError):
    """A node's block server cannot be reached, or refuses; the message says why and what to do."""
