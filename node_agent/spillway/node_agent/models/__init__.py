"""Models: a checkpoint's config becomes a `DecoderSpec`, its weights become one rank's `Decoder`."""
