"""The gateway over HTTP: OpenAI's files and batches, figures for Prometheus, and a page for people."""
