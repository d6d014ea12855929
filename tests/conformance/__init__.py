"""The conformance kit: one list of checks, held against any library through a thin driver. docs/conformance.md."""
