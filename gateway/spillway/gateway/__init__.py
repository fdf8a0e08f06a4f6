"""Intake, ledger and results of a batch. Imports api, never torch; the embedded path here imports no gRPC."""
