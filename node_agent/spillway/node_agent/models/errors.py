"""What can be wrong with a model: every way to fail while opening one has a type."""

from __future__ import annotations

from spillway.api.errors import SpillwayError


class ModelError(SpillwayError):
    """Root of every error about a model, its checkpoint or its tokenizer."""


class UnsupportedModelError(ModelError):
    """A model family, or a setting of a known family, that this version does not run."""


class CheckpointError(ModelError):
    """A checkpoint that cannot be used as it is."""


class CheckpointNotFoundError(CheckpointError):
    """No such folder, no such hub id, or the hub is out of reach."""


class CorruptCheckpointError(CheckpointError):
    """Files that are truncated, unreadable, or contradict themselves."""


class WeightMismatchError(CheckpointError):
    """Weights that are missing, left over, or of a shape or dtype that does not fit the config."""


class ShardError(ModelError):
    """A model that cannot be split over the asked number of ranks."""


class TokenizerError(ModelError):
    """A tokenizer that cannot be loaded."""


class ChatTemplateError(TokenizerError):
    """The tokenizer has no chat template, or the template refuses the messages."""
