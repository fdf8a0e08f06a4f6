"""The `spillway` command. The only part that may import all others, and it does so lazily: `--help` is instant."""
