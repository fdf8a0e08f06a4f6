"""The contracts people see: request lines in, result lines out, errors. Imports no other part."""
